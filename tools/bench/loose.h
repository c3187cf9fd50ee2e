/* What the bit contract costs: the same ops without it, as fast as we found them. For bench-exact
 * only; no worker links them. */
#pragma once

#include "kernels/kernels.h"

typedef struct LooseBlock {
    float d;
    int8_t q[32];
} LooseBlock;

typedef struct LooseOps {
    /* Q4_0 products whose activations have one scale for 256 elements instead of 32 (the buffer is
     * ACT_Q8_32's, with equal scales): the sum over eight blocks is scaled once. One unit, rows a
     * multiple of 4 or 1, n_in a multiple of 256. */
    MatmulFn coarse_q4_0;
    /* Q4_0 times one row, by dot products along k over rows in the file's layout, lanes added at
     * the end: blocks of {f16 d; u8 q[16]} against `x`. n_in a multiple of 64. */
    void (*horizontal_q4_0)(const uint8_t *rows, size_t row_bytes, uint32_t n_rows, uint32_t n_in,
                            const LooseBlock *x, float *out);
    /* Attention with a running maximum: each two blocks rescale what was summed before, in key
     * order, instead of standing by themselves and merging by the tree. Causal, no window, at most
     * ATTENTION_TILE heads, head_size a multiple of 64. */
    AttentionFn attention_f16;
} LooseOps;

extern const LooseOps loose_avx2, loose_avx512;
