#pragma once

#include "kernels/ops/act.h"
#include "kernels/vector/norm_backward.h" /* row_load, row_store */

VEC_FN Vec gelu_inner(Vec x)
{
    return vec_mul(x, vec_fma(vec_all(GELU_CUBE), vec_mul(x, x), vec_all(GELU_LINEAR)));
}

static void gelu_vector(const float *x, uint32_t n, float *out)
{
    for (uint32_t i = 0; i < n; i += VEC_LANES) {
        const Vec a = row_load(x, i, n);
        const Vec e = vec_exp(vec_negate(gelu_inner(a)));
        row_store(out, i, n, vec_div(a, vec_add(vec_all(1.0f), e)));
    }
}

/* y = the logistic function of s, z = its slope; the order of the maximum's operands keeps a NaN.
 */
VEC_FN void logistic_lanes(Vec s, Vec *y, Vec *z)
{
    const Vec e = vec_exp(vec_negate(vec_max(vec_all(-88.0f), s)));
    *y = vec_div(vec_all(1.0f), vec_add(vec_all(1.0f), e));
    *z = vec_mul(*y, vec_mul(e, *y));
}

static void gelu_backward_vector(const float *x, const float *dy, uint32_t n, float *dx)
{
    for (uint32_t i = 0; i < n; i += VEC_LANES) {
        const Vec a = row_load(x, i, n), d = row_load(dy, i, n);
        Vec y, z;
        logistic_lanes(gelu_inner(a), &y, &z);
        const Vec inner = vec_fma(vec_all(GELU_CUBE3), vec_mul(a, a), vec_all(GELU_LINEAR));
        row_store(dx, i, n, vec_mul(d, vec_fma(vec_mul(a, z), inner, y)));
    }
}

static void swiglu_backward_vector(const float *gate, const float *up, const float *dy, uint32_t n,
                                   float *dgate, float *dup)
{
    for (uint32_t i = 0; i < n; i += VEC_LANES) {
        const Vec g = row_load(gate, i, n), u = row_load(up, i, n), d = row_load(dy, i, n);
        Vec y, z;
        logistic_lanes(g, &y, &z);
        row_store(dup, i, n, vec_mul(d, vec_mul(g, y)));
        row_store(dgate, i, n, vec_mul(vec_mul(d, u), vec_fma(g, z, y)));
    }
}
