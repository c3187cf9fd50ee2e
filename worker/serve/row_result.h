/* RowResult: one output row's outcome, from the rank that draws to the leader. */
#pragma once

#include <stdint.h>

typedef struct RowResult {
    uint32_t slot;
    uint64_t uid;
    uint32_t position; /* of the row; a sampled token's own position is one more */
    uint32_t id;
    float logprob;
    uint8_t row_hash[16];
    uint32_t failed; /* 1: the logits were not finite */
    uint32_t n_top;
    const uint32_t *top_ids; /* borrowed */
    const float *top_logprobs;
    const float *logits; /* vocab_size floats or NULL; borrowed */
} RowResult;
