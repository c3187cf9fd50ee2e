#pragma once

#include "kernels/ops/optimizer.h"
#include "kernels/ops/xent.h"
#include "kernels/vector/norm_backward.h" /* row_load, row_store */

/* Elements of a tensor in pieces that 32 bits count. */
enum { PIECE = 1 << 30 };

VEC_FN uint32_t piece_of(size_t n, size_t i)
{
    return n - i < PIECE ? (uint32_t)(n - i) : (uint32_t)PIECE;
}

static void gradient_finish_vector(float *g, size_t n, float back, float tokens)
{
    for (size_t at = 0; at < n; at += PIECE) {
        const uint32_t some = piece_of(n, at);
        for (uint32_t i = 0; i < some; i += VEC_LANES) {
            const Vec x = vec_mul(row_load(g + at, i, some), vec_all(back));
            row_store(g + at, i, some, vec_div(x, vec_all(tokens)));
        }
    }
}

/* A row whose first element is in lane 0; lanes are named by constants, so that they are registers.
 */
VEC_FN void row_squares(const float *x, uint32_t n, Vec lanes[LANE_VECS])
{
    uint32_t i = 0;
    for (; i + 32 <= n; i += 32) {
#pragma GCC unroll 4
        for (unsigned v = 0; v < LANE_VECS; v++) {
            const Vec a = vec_load(x + i + v * VEC_LANES);
            lanes[v] = vec_fma(a, a, lanes[v]);
        }
    }
#pragma GCC unroll 4
    for (unsigned v = 0; v < LANE_VECS; v++) {
        if (i + v * VEC_LANES < n) {
            const Vec a = row_load(x, i + v * VEC_LANES, n);
            lanes[v] = vec_fma(a, a, lanes[v]);
        }
    }
}

static float sum_squares_vector(const float *x, size_t ld, uint32_t rows, uint32_t columns)
{
    if (ld == columns && (uint64_t)rows * columns < PIECE) { /* one row is the same sum */
        columns *= rows;
        rows = 1;
    }
    Vec lanes[LANE_VECS];
    for (unsigned v = 0; v < LANE_VECS; v++) {
        lanes[v] = vec_zero();
    }
    if (rows == 1 || columns % 32 == 0) {
        for (uint32_t r = 0; r < rows; r++) {
            row_squares(x + r * ld, columns, lanes);
        }
        return vec_fold(lanes);
    }
    float scalar[32] = {0}; /* rows begin in other lanes */
    for (uint32_t r = 0; r < rows; r++) {
        for (uint32_t c = 0; c < columns; c++) {
            float *lane = &scalar[((size_t)r * columns + c) % 32];
            *lane = fmaf(x[r * ld + c], x[r * ld + c], *lane);
        }
    }
    return lanes_fold(scalar);
}

VEC_FN void adamw_lanes(const AdamwScalars *s, uint32_t n, uint32_t i, const float *g, float *m,
                        float *v, float *w)
{
    const Vec h = vec_mul(row_load(g, i, n), vec_all(s->clip));
    const Vec first = vec_fma(vec_all(s->beta1), row_load(m, i, n), vec_mul(vec_all(s->rest1), h));
    const Vec second =
        vec_fma(vec_all(s->beta2), row_load(v, i, n), vec_mul(vec_mul(vec_all(s->rest2), h), h));
    const Vec root = vec_sqrt(vec_mul(second, vec_all(s->correct2)));
    const Vec u = vec_div(vec_mul(first, vec_all(s->correct1)), vec_add(root, vec_all(s->eps)));
    const Vec old = row_load(w, i, n);
    row_store(m, i, n, first);
    row_store(v, i, n, second);
    row_store(w, i, n, vec_fma(vec_all(-s->rate), vec_fma(vec_all(s->decay), old, u), old));
}

static void adamw_vector(const AdamwScalars *s, size_t n, const float *g, float *m, float *v,
                         float *w)
{
    for (size_t at = 0; at < n; at += PIECE) {
        const uint32_t some = piece_of(n, at);
        for (uint32_t i = 0; i < some; i += VEC_LANES) {
            adamw_lanes(s, some, i, g + at, m + at, v + at, w + at);
        }
    }
}

static void sgd_vector(const SgdScalars *s, size_t n, const float *g, float *b, float *w)
{
    for (size_t at = 0; at < n; at += PIECE) {
        const uint32_t some = piece_of(n, at);
        for (uint32_t i = 0; i < some; i += VEC_LANES) {
            const Vec old = row_load(w + at, i, some);
            const Vec h = vec_fma(vec_all(s->decay), old,
                                  vec_mul(row_load(g + at, i, some), vec_all(s->clip)));
            const Vec moved = vec_fma(vec_all(s->momentum), row_load(b + at, i, some), h);
            const Vec step = s->nesterov ? vec_fma(vec_all(s->momentum), moved, h) : moved;
            row_store(b + at, i, some, moved);
            row_store(w + at, i, some, vec_fma(vec_all(-s->rate), step, old));
        }
    }
}

static void xent_backward_vector(const float *z, uint32_t n, float m, float l, uint32_t target,
                                 float factor, float *dz)
{
    const float r = 1.0f / l, hit = target < n ? z[target] : 0.0f;
    for (uint32_t i = 0; i < n; i += VEC_LANES) {
        const Vec p = vec_mul(vec_exp(vec_sub(row_load(z, i, n), vec_all(m))), vec_all(r));
        row_store(dz, i, n, vec_mul(p, vec_all(factor)));
    }
    if (target < n) {
        dz[target] = (exp32_inline(hit - m) * r - 1.0f) * factor;
    }
}
