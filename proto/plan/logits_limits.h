/* How many logits are on their way at once where a request asks for them: leaders and the gateway
 * agree on it. A row is 4 bytes an id of the vocabulary; one always may go. Ranks hold a step's
 * rows a few times over, beside what plans count: so they are few. */
#pragma once

#include <stdint.h>

/* Of one scored sequence: less than what may wait in a leader's stream and in a message of it. */
#define LOGITS_SEQUENCE_BYTES (1u << 20)
/* Of a step, all its sequences together: a step's results are one message between ranks. */
#define LOGITS_STEP_BYTES (4u << 20)

static inline uint32_t logits_rows(uint32_t bytes, uint32_t vocab_size)
{
    const uint64_t row = 4 * (uint64_t)vocab_size;
    return row > 0 && bytes > row ? (uint32_t)(bytes / row) : 1;
}
