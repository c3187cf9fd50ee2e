/* SampleSource: where a rank's samples come from. Which sample a number is, is a pure function, the
 * same on all ranks: so nothing about data is kept, sent or saved but the number of the step. A
 * source is called by the rank's thread only. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

typedef struct SampleSource {
    void *user;
    /* Sample number `sample` (0, 1, ... over all steps): `length` tokens and the target of each,
     * TARGET_NONE where there is no loss. Ids are below the model's vocab_size. */
    void (*read)(void *user, uint64_t sample, uint32_t *tokens, uint32_t *targets);
    /* The position at which the document of each of the sample's positions begins: attention stays
     * inside it. NULL: a sample is one document. */
    void (*begins)(void *user, uint64_t sample, uint32_t *begins);
    bool restart; /* positions count from there */
    uint32_t length;
} SampleSource;
