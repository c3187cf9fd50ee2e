#pragma once

#include "kernels/ops/act.h"

VEC_FN Vec swiglu_lanes(Vec gate, Vec up)
{
    return vec_mul(vec_div(gate, vec_add(vec_all(1.0f), vec_exp(vec_negate(gate)))), up);
}

static void swiglu_vector(const float *gate, const float *up, uint32_t n, float *out)
{
    uint32_t i = 0;
    for (; i + VEC_LANES <= n; i += VEC_LANES) {
        vec_store(out + i, swiglu_lanes(vec_load(gate + i), vec_load(up + i)));
    }
    if (i < n) {
        vec_store_first(
            out + i, swiglu_lanes(vec_load_first(gate + i, n - i), vec_load_first(up + i, n - i)),
            n - i);
    }
}

static void add_vector(float *x, const float *y, size_t n)
{
    size_t i = 0;
    for (; i + VEC_LANES <= n; i += VEC_LANES) {
        vec_store(x + i, vec_add(vec_load(x + i), vec_load(y + i)));
    }
    if (i < n) {
        const uint32_t rest = (uint32_t)(n - i);
        vec_store_first(x + i, vec_add(vec_load_first(x + i, rest), vec_load_first(y + i, rest)),
                        rest);
    }
}
