/* SampleSource: where a rank's samples come from. Which sample a number is, is a pure function, the
 * same on all ranks: so nothing about data is kept, sent or saved but the number of the step. A
 * source is called by the rank's thread only. */
#pragma once

#include <stdint.h>

typedef struct SampleSource {
    void *user;
    /* Sample number `sample` (0, 1, ... over all steps): `length` tokens and the target of each,
     * TARGET_NONE where there is no loss. Ids are below `vocabulary`. */
    void (*read)(void *user, uint64_t sample, uint32_t *tokens, uint32_t *targets);
    uint32_t vocabulary, length;
} SampleSource;
