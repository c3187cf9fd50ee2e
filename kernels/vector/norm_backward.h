#pragma once

#include "kernels/ops/norm.h"
#include "kernels/vector/rows.h"

enum { LANE_VECS = 32 / VEC_LANES };

/* Each vector of a row of n elements: element i on, lanes v of 32. v is a constant everywhere, so
 * that sums by v are registers. */
#define ROW_EACH(i, v, n)                                                                          \
    for (uint32_t i##_32 = 0; i##_32 < (n); i##_32 += 32)                                          \
    _Pragma("GCC unroll 4") for (uint32_t v = 0, i = i##_32; v < LANE_VECS && i < (n);             \
                                 v++, i += VEC_LANES)

static void layer_stats_vector(const float *x, float eps, uint32_t n, float stats[2])
{
    Vec sums[LANE_VECS], squares[LANE_VECS];
    for (unsigned v = 0; v < LANE_VECS; v++) {
        sums[v] = squares[v] = vec_zero();
    }
    ROW_EACH(i, v, n)
    {
        sums[v] = vec_add(sums[v], row_load(x, i, n));
    }
    stats[0] = vec_fold(sums) / (float)n;
    ROW_EACH(i, v, n)
    {
        const Vec d = row_only(vec_sub(row_load(x, i, n), vec_all(stats[0])), i, n);
        squares[v] = vec_fma(d, d, squares[v]);
    }
    stats[1] = 1.0f / sqrtf(vec_fold(squares) / (float)n + eps);
}

static void layer_norm_vector(const float *x, const float *weight, const float *bias, float eps,
                              uint32_t n, float *out)
{
    float stats[2];
    layer_stats_vector(x, eps, n, stats);
    for (uint32_t i = 0; i < n; i += VEC_LANES) {
        const Vec h = vec_mul(vec_sub(row_load(x, i, n), vec_all(stats[0])), vec_all(stats[1]));
        row_store(out, i, n, vec_fma(h, row_load(weight, i, n), row_load(bias, i, n)));
    }
}

/* dx += scale * (g - a - h * c); without `centred` there is no a (a subtraction of it could turn a
 * -0 into +0). */
VEC_FN void norm_backward_row(const float *x, const float *weight, const float *dy, uint32_t n,
                              float *dx, const float stats[2], bool centred)
{
    const Vec mean = vec_all(stats[0]), scale = vec_all(stats[1]);
    Vec sums[LANE_VECS], products[LANE_VECS];
    for (unsigned v = 0; v < LANE_VECS; v++) {
        sums[v] = products[v] = vec_zero();
    }
    ROW_EACH(i, v, n)
    {
        const Vec h = row_only(vec_mul(vec_sub(row_load(x, i, n), mean), scale), i, n);
        const Vec g = row_only(vec_mul(row_load(dy, i, n), row_load(weight, i, n)), i, n);
        sums[v] = vec_add(sums[v], g);
        products[v] = vec_fma(g, h, products[v]);
    }
    const Vec c = vec_all(vec_fold(products) / (float)n);
    const Vec a = centred ? vec_all(vec_fold(sums) / (float)n) : vec_zero();
    for (uint32_t i = 0; i < n; i += VEC_LANES) {
        const Vec h = vec_mul(vec_sub(row_load(x, i, n), mean), scale);
        Vec g = vec_mul(row_load(dy, i, n), row_load(weight, i, n));
        g = centred ? vec_sub(g, a) : g;
        const Vec d = vec_fma(vec_negate(h), c, g);
        row_store(dx, i, n, vec_fma(scale, d, row_load(dx, i, n)));
    }
}

static void rms_norm_backward_vector(const float *x, const float *weight, const float *dy,
                                     float eps, uint32_t n, float *dx, float stats[2])
{
    Vec squares[LANE_VECS];
    for (unsigned v = 0; v < LANE_VECS; v++) {
        squares[v] = vec_zero();
    }
    ROW_EACH(i, v, n)
    {
        const Vec a = row_load(x, i, n);
        squares[v] = vec_fma(a, a, squares[v]);
    }
    stats[0] = 0.0f;
    stats[1] = 1.0f / sqrtf(vec_fold(squares) / (float)n + eps);
    norm_backward_row(x, weight, dy, n, dx, stats, false);
}

static void layer_norm_backward_vector(const float *x, const float *weight, const float *dy,
                                       float eps, uint32_t n, float *dx, float stats[2])
{
    layer_stats_vector(x, eps, n, stats);
    norm_backward_row(x, weight, dy, n, dx, stats, true);
}

static void norm_weight_backward_vector(const float *x, const float *dy, size_t ld,
                                        const float *stats, uint32_t rows, uint32_t n,
                                        float *dweight, float *dbias)
{
    for (uint32_t i = 0; i < n; i += VEC_LANES) {
        Vec w = row_load(dweight, i, n), b = dbias != NULL ? row_load(dbias, i, n) : vec_zero();
        for (uint32_t r = 0; r < rows; r++) {
            const Vec d = row_load(dy + r * ld, i, n);
            const Vec centred = vec_sub(row_load(x + r * ld, i, n), vec_all(stats[2 * r]));
            w = vec_fma(d, vec_mul(centred, vec_all(stats[2 * r + 1])), w);
            b = vec_add(b, d);
        }
        row_store(dweight, i, n, w);
        if (dbias != NULL) {
            row_store(dbias, i, n, b);
        }
    }
}

static void sum_rows_vector(const float *dy, size_t ld, uint32_t rows, uint32_t n, float *out)
{
    for (uint32_t i = 0; i < n; i += VEC_LANES) {
        Vec sum = row_load(out, i, n);
        for (uint32_t r = 0; r < rows; r++) {
            sum = vec_add(sum, row_load(dy + r * ld, i, n));
        }
        row_store(out, i, n, sum);
    }
}
