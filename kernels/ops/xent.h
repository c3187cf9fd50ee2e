/* Softmax cross-entropy over a vocabulary in chunks (NUMERICS 6, 15). Per row: chunk_stats() of
 * each chunk where it lies, chunk_stats_merge() of all chunks gives (m, l), on every rank. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define XENT_NO_TARGET UINT32_MAX /* the row's target lies elsewhere */

/* -log softmax of the target's logit z: (m - z) + log32(l). Off the hot path. */
float xent_loss(float m, float l, float z);

/* dz = ((exp(z - m) * (1 / l)) - [i == target]) * factor for n logits of a row; target is an index
 * into z or XENT_NO_TARGET, where nothing is subtracted. dz may be z. */
typedef void (*XentBackwardFn)(const float *z, uint32_t n, float m, float l, uint32_t target,
                               float factor, float *dz);
