#pragma once

#include "kernels/ops/rope.h"

/* Pairs (x[i], x[i + dims/2]). */
VEC_FN void rotate_halves(float *x, uint32_t n_pairs, const float *cos, const float *sin)
{
    float *y = x + n_pairs;
    uint32_t i = 0;
    for (; i + VEC_LANES <= n_pairs; i += VEC_LANES) {
        const Vec a = vec_load(x + i), b = vec_load(y + i), c = vec_load(cos + i),
                  s = vec_load(sin + i);
        vec_store(x + i, vec_fma(a, c, vec_negate(vec_mul(b, s))));
        vec_store(y + i, vec_fma(a, s, vec_mul(b, c)));
    }
    if (i < n_pairs) {
        const uint32_t rest = n_pairs - i;
        const Vec a = vec_load_first(x + i, rest), b = vec_load_first(y + i, rest);
        const Vec c = vec_load_first(cos + i, rest), s = vec_load_first(sin + i, rest);
        vec_store_first(x + i, vec_fma(a, c, vec_negate(vec_mul(b, s))), rest);
        vec_store_first(y + i, vec_fma(a, s, vec_mul(b, c)), rest);
    }
}

/* Pairs (x[2i], x[2i + 1]). */
VEC_FN void rotate_adjacent(float *x, uint32_t n_pairs, const float *cos, const float *sin)
{
    uint32_t i = 0;
    for (; i + VEC_LANES / 2 <= n_pairs; i += VEC_LANES / 2) {
        vec_rotate_pairs(x + 2 * i, cos + i, sin + i);
    }
    for (; i < n_pairs; i++) {
        const float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = fmaf(a, cos[i], -(b * sin[i]));
        x[2 * i + 1] = fmaf(a, sin[i], b * cos[i]);
    }
}

static void rope_apply_vector(float *x, uint32_t n_heads, uint32_t head_size, uint32_t dims,
                              RopePairing pairing, const float *cos, const float *sin)
{
    for (uint32_t h = 0; h < n_heads; h++) {
        if (pairing == ROPE_HALVES) {
            rotate_halves(x + (size_t)h * head_size, dims / 2, cos, sin);
        } else {
            rotate_adjacent(x + (size_t)h * head_size, dims / 2, cos, sin);
        }
    }
}
