/* Cross-entropy of one row of logits of which a rank has some chunks: what ops/xent.h's pieces make
 * together, with smoothed labels (the loss is (1 - s) (lse - z_target) + s (lse - mean of z)). */
#pragma once

#include "kernels/kernels.h"

/* (m, l) of a row's own chunks, l NaN where a logit of the chunk is not finite; total, unless NULL,
 * their sums over 32 lanes. Returns the target's logit, 0 for XENT_NO_TARGET. */
float xent_row_stats(const Kernels *kernels, const float *z, uint32_t n, uint32_t target, float *m,
                     float *l, float *total);
/* From all chunks: the loss, 0 where nothing is learnt, NaN where a logit is not finite. (m, l) of
 * the row is left in m[0], l[0]. smoothing 0: total is not read. */
float xent_row_loss(float *m, float *l, const float *total, uint32_t n_chunks, float target,
                    bool learnt, float smoothing, uint32_t vocabulary);
/* Logits become their gradient, (p - s / V) and, at the target, 1 - s less, times the factor; 0
 * where the factor is. */
void xent_row_gradient(const Kernels *kernels, float *z, uint32_t n, float m, float l,
                       uint32_t target, float factor, float smoothing, uint32_t vocabulary);
