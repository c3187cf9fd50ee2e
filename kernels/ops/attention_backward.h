/* Backward of causal attention over a whole sequence, one KV head and some of its query heads a
 * call. The forward pass is ops/attention.h with f32 keys; nothing but q, k, v is kept from it: the
 * scores are computed again, row by row.
 *
 * Per query head, row i and visible keys j = 0..i:
 *   score = (chain over d of fmaf(q[i][d], k[j][d], .)) * scale
 *   m = max; e = exp(score - m); l = 32 lanes of e, lane j mod 32, node(0,32); p = e * (1 / l)
 *   dp = chain over d of fmaf(dout[i][d], v[j][d], .)
 *   delta = 32 lanes, lane = fmaf(p, dp, lane), node(0,32);  ds = (p * (dp - delta)) * scale
 *   dq[i][d] = chain over j ascending of fmaf(ds, k[j][d], .)
 *   dk[j][d] = chain over i ascending of fmaf(ds, q[i][d], .)
 *   dv[j][d] = chain over i ascending of fmaf(p, dout[i][d], .)
 * Chains start from +0; keys after the query take no part. dk and dv fold over the query heads by
 * the tree program (NUMERICS 16: node() over all query heads of the KV head, across ranks). */
#pragma once

#include "proto/plan/tree.h"

#include <stddef.h>
#include <stdint.h>

typedef struct AttentionBackwardArgs {
    const float *q, *dout; /* [n_rows][q_ld]; heads adjacent: q[i * q_ld + h * head_size + d] */
    const float *k, *v;    /* [n_rows][kv_ld] */
    size_t q_ld, kv_ld;
    float *dq;      /* [n_rows][q_ld]; may be dout, which is then used up */
    float *dk, *dv; /* subtree s at s * subtree_stride, [n_rows][kv_ld]; apart from k, v */
    size_t subtree_stride;
    uint32_t n_rows, n_q, head_size;
    const TreeStep *steps; /* [n_q] */
    float scale;
    float *scratch; /* attention_backward_scratch_floats(n_rows, head_size, n_q) */
} AttentionBackwardArgs;
typedef void (*AttentionBackwardFn)(const AttentionBackwardArgs *args);

/* For every instruction set. */
size_t attention_backward_scratch_floats(uint32_t n_rows, uint32_t head_size, uint32_t n_q);
