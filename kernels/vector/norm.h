#pragma once

#include "kernels/ops/norm.h"

static void rms_norm_vector(const float *x, const float *weight, float eps, uint32_t n, float *out)
{
    enum { N_VEC = 32 / VEC_LANES };
    Vec lanes[N_VEC];
    for (unsigned v = 0; v < N_VEC; v++) {
        lanes[v] = vec_zero();
    }
    uint32_t i = 0;
    for (; i + 32 <= n; i += 32) {
        for (unsigned v = 0; v < N_VEC; v++) {
            const Vec a = vec_load(x + i + v * VEC_LANES);
            lanes[v] = vec_fma(a, a, lanes[v]);
        }
    }
    for (unsigned v = 0; i < n;
         v++) { /* lanes beyond n get +0 * +0, which changes no sum of squares */
        const uint32_t rest = n - i < VEC_LANES ? n - i : VEC_LANES;
        const Vec a = vec_load_first(x + i, rest);
        lanes[v] = vec_fma(a, a, lanes[v]);
        i += rest;
    }
    const float mean = vec_fold(lanes) / (float)n;
    const Vec scale = vec_all(1.0f / sqrtf(mean + eps));
    for (i = 0; i + VEC_LANES <= n; i += VEC_LANES) {
        vec_store(out + i, vec_mul(vec_mul(vec_load(x + i), scale), vec_load(weight + i)));
    }
    if (i < n) {
        const Vec y = vec_mul(vec_mul(vec_load_first(x + i, n - i), scale),
                              vec_load_first(weight + i, n - i));
        vec_store_first(out + i, y, n - i);
    }
}
