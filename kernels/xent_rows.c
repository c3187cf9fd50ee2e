#include "kernels/ops/xent_rows.h"

#include "kernels/ops/math.h"

#include <math.h>

static uint32_t least(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

/* Logits of a chunk, over 32 lanes (NUMERICS 4). */
static float sum_of(const float *z, uint32_t n)
{
    float lanes[32] = {0};
    for (uint32_t i = 0; i < n; i++) {
        lanes[i % 32] += z[i];
    }
    return lanes_fold(lanes);
}

float xent_row_stats(const Kernels *kernels, const float *z, uint32_t n, uint32_t target, float *m,
                     float *l, float *total)
{
    for (uint32_t at = 0, c = 0; at < n; at += VOCAB_CHUNK, c++) {
        const uint32_t in_chunk = least(VOCAB_CHUNK, n - at);
        if (!kernels->chunk_stats(z + at, in_chunk, &m[c], &l[c])) {
            l[c] = NAN;
        }
        if (total != NULL) {
            total[c] = sum_of(z + at, in_chunk);
        }
    }
    return target == XENT_NO_TARGET ? 0.0f : z[target];
}

float xent_row_loss(float *m, float *l, const float *total, uint32_t n_chunks, float target,
                    bool learnt, float smoothing, uint32_t vocabulary)
{
    bool finite = true;
    for (uint32_t c = 0; c < n_chunks; c++) {
        finite &= !isnan(l[c]);
    }
    chunk_stats_merge(m, l, n_chunks);
    if (smoothing > 0.0f) {
        const float mean = node_sum(total, n_chunks) / (float)vocabulary;
        target = fmaf(smoothing, mean - target, target);
    }
    return !finite ? NAN : !learnt ? 0.0f : xent_loss(m[0], l[0], target);
}

void xent_row_gradient(const Kernels *kernels, float *z, uint32_t n, float m, float l,
                       uint32_t target, float factor, float smoothing, uint32_t vocabulary)
{
    const bool smooth = smoothing > 0.0f && factor > 0.0f;
    const float share = -(smoothing / (float)vocabulary * factor);
    kernels->train.xent_backward(z, n, m, l, smooth ? XENT_NO_TARGET : target, factor, z);
    for (uint32_t i = 0; smooth && i < n; i++) {
        z[i] += share;
    }
    if (smooth && target != XENT_NO_TARGET) {
        z[target] -= (1.0f - smoothing) * factor;
    }
}
