/* What the bit contract costs: the same ops without it, as fast as we found them. For bench-exact
 * only; no worker links them. */
#pragma once

#include "kernels/kernels.h"

/* Q4_0 products whose activations have one scale for 256 elements instead of 32 (the buffer is
 * ACT_Q8_32's, with equal scales): the sum over eight blocks is scaled once. */
void loose_coarse_q4_0(const MatmulArgs *args);

/* Q4_0 times one row, by dot products along k over rows in the file's layout, lanes added at the
 * end: blocks of {f16 d; u8 q[16]} against {f32 d; i8 q[32]}. */
typedef struct LooseBlock {
    float d;
    int8_t q[32];
} LooseBlock;
void loose_horizontal_q4_0(const uint8_t *rows, size_t row_bytes, uint32_t n_rows, uint32_t n_in,
                           const LooseBlock *x, float *out);

/* Attention with a running maximum: each block rescales what was summed before, in key order,
 * instead of standing by itself and merging by the tree. */
void loose_attention_f16(const AttentionArgs *args);
