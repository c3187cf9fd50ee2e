#pragma once

#include "kernels/ops/attention_backward.h"
#include "kernels/vector/norm_backward.h" /* row_load, row_store */

#include <string.h>

/* Every product of the backward pass is a *chain*: out(r, :) = sum over t of a(r, t) * b(t, :),
 * with the lanes along b's rows. A head's rows are first copied into rows padded to whole vectors,
 * keys and values also turned ([head_size][keys]), so chains need no masks. ROW_TILE rows of scores
 * live at a time; dk and dv go on from memory, tile after tile. */

enum { ATTENTION_ROW_TILE = 32 };

typedef struct Chain {
    const float *a;
    size_t a_row, a_step;
    const float *b;
    size_t b_step;
    float *out;
    size_t out_row;
    uint32_t first, last; /* steps t */
} Chain;

VEC_FN void chain_tile(const Chain *c, uint32_t row, uint32_t column, bool from_out,
                       const unsigned rows, const unsigned vecs)
{
    Vec acc[4][3];
    const float *a = c->a + row * c->a_row;
    float *out = c->out + row * c->out_row + column;
#pragma GCC unroll 4
    for (unsigned r = 0; r < rows; r++) {
#pragma GCC unroll 3
        for (unsigned v = 0; v < vecs; v++) {
            acc[r][v] = from_out ? vec_load(out + r * c->out_row + v * VEC_LANES) : vec_zero();
        }
    }
    for (size_t t = c->first; t < c->last; t++) {
        const float *b = c->b + t * c->b_step + column;
#pragma GCC unroll 4
        for (unsigned r = 0; r < rows; r++) {
            const Vec x = vec_all(a[r * c->a_row + t * c->a_step]);
#pragma GCC unroll 3
            for (unsigned v = 0; v < vecs; v++) {
                acc[r][v] = vec_fma(x, vec_load(b + v * VEC_LANES), acc[r][v]);
            }
        }
    }
#pragma GCC unroll 4
    for (unsigned r = 0; r < rows; r++) {
#pragma GCC unroll 3
        for (unsigned v = 0; v < vecs; v++) {
            vec_store(out + r * c->out_row + v * VEC_LANES, acc[r][v]);
        }
    }
}

/* Rows [row, row + rows), rows 4 or 1, `columns` lanes (whole vectors). */
VEC_FN void chain_rows(const Chain *c, uint32_t row, const unsigned rows, uint32_t columns,
                       bool from_out)
{
    uint32_t j = 0;
    for (; j + 3 * VEC_LANES <= columns; j += 3 * VEC_LANES) {
        chain_tile(c, row, j, from_out, rows, 3);
    }
    for (; j < columns; j += VEC_LANES) {
        chain_tile(c, row, j, from_out, rows, 1);
    }
}

static void chain_four(const Chain *c, uint32_t row, uint32_t columns, bool from_out)
{
    chain_rows(c, row, 4, columns, from_out);
}

static void chain_one(const Chain *c, uint32_t row, uint32_t columns, bool from_out)
{
    chain_rows(c, row, 1, columns, from_out);
}

typedef struct HeadWork {
    uint32_t hd, keys; /* padded to whole vectors */
    float *q, *k, *dout, *k_turned, *v_turned, *p, *ds, *dq;
    float *dk, *dv; /* [n_rows][hd] */
} HeadWork;

VEC_FN uint32_t whole_vectors(uint32_t n)
{
    return (n + VEC_LANES - 1) / VEC_LANES * VEC_LANES;
}

static void copy_rows(const float *from, size_t ld, uint32_t rows, uint32_t n, uint32_t to_ld,
                      float *to)
{
    for (uint32_t i = 0; i < rows; i++) {
        memcpy(to + (size_t)i * to_ld, from + i * ld, n * sizeof(float));
        memset(to + (size_t)i * to_ld + n, 0, (to_ld - n) * sizeof(float));
    }
}

static void turn_rows(const float *from, size_t ld, uint32_t rows, uint32_t n, uint32_t to_ld,
                      float *to)
{
    for (uint32_t d = 0; d < n; d++) {
        for (uint32_t i = 0; i < rows; i++) {
            to[(size_t)d * to_ld + i] = from[i * ld + d];
        }
        memset(to + (size_t)d * to_ld + rows, 0, (to_ld - rows) * sizeof(float));
    }
}

/* Scores and dp of n keys of one row to p and ds, in place. */
static void softmax_row_backward(float *p, float *ds, uint32_t n, float scale)
{
    Vec top = vec_all(-INFINITY), sums[LANE_VECS], products[LANE_VECS];
    for (unsigned v = 0; v < LANE_VECS; v++) {
        sums[v] = products[v] = vec_zero();
    }
    for (uint32_t j = 0; j < n; j += VEC_LANES) {
        const Vec s = vec_mul(row_load(p, j, n), vec_all(scale));
        row_store(p, j, n, s);
        top = vec_max(n - j >= VEC_LANES ? s : vec_between(s, top, 0, (int)(n - j)), top);
    }
    const Vec m = vec_all(vec_max_lane(top));
    for (uint32_t j = 0; j < n; j += VEC_LANES) {
        const Vec e = vec_exp(vec_sub(row_load(p, j, n), m));
        row_store(p, j, n, e);
        Vec *lane = &sums[j / VEC_LANES % LANE_VECS];
        *lane = vec_add(*lane, row_only(e, j, n));
    }
    const Vec r = vec_all(1.0f / vec_fold(sums));
    for (uint32_t j = 0; j < n; j += VEC_LANES) {
        const Vec y = vec_mul(row_load(p, j, n), r);
        row_store(p, j, n, y);
        Vec *lane = &products[j / VEC_LANES % LANE_VECS];
        *lane = vec_fma(y, row_load(ds, j, n), *lane);
    }
    const Vec delta = vec_all(vec_fold(products));
    for (uint32_t j = 0; j < n; j += VEC_LANES) {
        const Vec d = vec_mul(row_load(p, j, n), vec_sub(row_load(ds, j, n), delta));
        row_store(ds, j, n, vec_mul(d, vec_all(scale)));
    }
}

/* p and ds of rows [i0, i1). */
static void tile_scores(const AttentionBackwardArgs *a, const HeadWork *w, uint32_t i0, uint32_t i1)
{
    const Chain score = {.a = w->q + (size_t)i0 * w->hd,
                         .a_row = w->hd,
                         .a_step = 1,
                         .b = w->k_turned,
                         .b_step = w->keys,
                         .out = w->p,
                         .out_row = w->keys,
                         .last = a->head_size};
    Chain dp = score;
    dp.a = w->dout + (size_t)i0 * w->hd;
    dp.b = w->v_turned;
    dp.out = w->ds;
    uint32_t i = i0;
    for (; i + 4 <= i1; i += 4) {
        chain_four(&score, i - i0, whole_vectors(i + 4), false);
        chain_four(&dp, i - i0, whole_vectors(i + 4), false);
    }
    for (; i < i1; i++) {
        chain_one(&score, i - i0, whole_vectors(i + 1), false);
        chain_one(&dp, i - i0, whole_vectors(i + 1), false);
    }
    for (i = i0; i < i1; i++) {
        softmax_row_backward(w->p + (size_t)(i - i0) * w->keys, w->ds + (size_t)(i - i0) * w->keys,
                             i + 1, a->scale);
    }
}

/* dq of rows [i0, i1): four rows share the keys that all of them see, then each goes on alone. */
static void tile_dq(const HeadWork *w, uint32_t i0, uint32_t i1)
{
    Chain c = {.a = w->ds,
               .a_row = w->keys,
               .a_step = 1,
               .b = w->k,
               .b_step = w->hd,
               .out = w->dq,
               .out_row = w->hd};
    for (uint32_t i = i0; i < i1;) {
        const uint32_t rows = i + 4 <= i1 ? 4 : 1;
        c.first = 0;
        c.last = i + 1;
        if (rows == 4) {
            chain_four(&c, i - i0, w->hd, false);
        } else {
            chain_one(&c, i - i0, w->hd, false);
        }
        c.first = i + 1;
        for (uint32_t r = 1; r < rows; r++) {
            c.last = i + r + 1;
            chain_one(&c, i + r - i0, w->hd, true);
        }
        i += rows;
    }
}

/* Gradients of the keys [0, i1) go on over rows [i0, i1): a key is seen from its own row on, so
 * four keys begin one by one and share the rest. `from`: ds or p; rows: q or dout. */
static void tile_keys(const HeadWork *w, uint32_t i0, uint32_t i1, const float *from,
                      const float *rows, float *out)
{
    Chain c = {.a = from,
               .a_row = 1,
               .a_step = w->keys,
               .b = rows + (size_t)i0 * w->hd,
               .b_step = w->hd,
               .out = out,
               .out_row = w->hd};
    for (uint32_t j = 0; j < i1;) {
        const uint32_t keys = j + 4 <= i1 ? 4 : 1;
        const uint32_t common = j + keys - 1 > i0 ? j + keys - 1 : i0;
        for (uint32_t r = 0; r + 1 < keys; r++) {
            c.first = (j + r > i0 ? j + r : i0) - i0;
            c.last = common - i0;
            if (c.first < c.last) {
                chain_one(&c, j + r, w->hd, true);
            }
        }
        c.first = common - i0;
        c.last = i1 - i0;
        if (keys == 4) {
            chain_four(&c, j, w->hd, true);
        } else {
            chain_one(&c, j, w->hd, true);
        }
        j += keys;
    }
}

static void head_backward(const AttentionBackwardArgs *a, const HeadWork *w, uint32_t head)
{
    const size_t at = (size_t)head * a->head_size;
    copy_rows(a->q + at, a->q_ld, a->n_rows, a->head_size, w->hd, w->q);
    copy_rows(a->dout + at, a->q_ld, a->n_rows, a->head_size, w->hd, w->dout);
    memset(w->dk, 0, (size_t)a->n_rows * w->hd * sizeof(float));
    memset(w->dv, 0, (size_t)a->n_rows * w->hd * sizeof(float));
    for (uint32_t i0 = 0; i0 < a->n_rows; i0 += ATTENTION_ROW_TILE) {
        const uint32_t i1 =
            a->n_rows - i0 < ATTENTION_ROW_TILE ? a->n_rows : i0 + ATTENTION_ROW_TILE;
        tile_scores(a, w, i0, i1);
        tile_dq(w, i0, i1);
        for (uint32_t i = i0; i < i1; i++) {
            memcpy(a->dq + i * a->q_ld + at, w->dq + (size_t)(i - i0) * w->hd,
                   a->head_size * sizeof(float));
        }
        tile_keys(w, i0, i1, w->ds, w->q, w->dk);
        tile_keys(w, i0, i1, w->p, w->dout, w->dv);
    }
}

static void emit_head_gradients(const AttentionBackwardArgs *a, uint32_t hd, const float *dk,
                                const float *dv, uint32_t subtree)
{
    for (uint32_t j = 0; j < a->n_rows; j++) {
        const size_t to = subtree * a->subtree_stride + j * a->kv_ld;
        memcpy(a->dk + to, dk + (size_t)j * hd, a->head_size * sizeof(float));
        memcpy(a->dv + to, dv + (size_t)j * hd, a->head_size * sizeof(float));
    }
}

static void attention_backward_vector(const AttentionBackwardArgs *a)
{
    HeadWork w = {.hd = whole_vectors(a->head_size), .keys = whole_vectors(a->n_rows + 3)};
    const size_t rows = (size_t)a->n_rows * w.hd, turned = (size_t)a->head_size * w.keys;
    w.q = a->scratch;
    w.k = w.q + rows;
    w.dout = w.k + rows;
    w.k_turned = w.dout + rows;
    w.v_turned = w.k_turned + turned;
    w.p = w.v_turned + turned;
    w.ds = w.p + (size_t)ATTENTION_ROW_TILE * w.keys;
    w.dq = w.ds + (size_t)ATTENTION_ROW_TILE * w.keys;
    float *stack = w.dq + (size_t)ATTENTION_ROW_TILE * w.hd;
    copy_rows(a->k, a->kv_ld, a->n_rows, a->head_size, w.hd, w.k);
    turn_rows(a->k, a->kv_ld, a->n_rows, a->head_size, w.keys, w.k_turned);
    turn_rows(a->v, a->kv_ld, a->n_rows, a->head_size, w.keys, w.v_turned);
    uint32_t depth = 0, emitted = 0;
    for (uint32_t h = 0; h < a->n_q; h++) {
        w.dk = stack + depth * 2 * rows;
        w.dv = w.dk + rows;
        head_backward(a, &w, h);
        depth++;
        for (uint32_t k = 0; k < a->steps[h].n_merges; k++) {
            depth--;
            float *to = stack + (depth - 1) * 2 * rows, *from = stack + depth * 2 * rows;
            for (size_t i = 0; i < 2 * rows; i += VEC_LANES) {
                vec_store(to + i, vec_add(vec_load(to + i), vec_load(from + i)));
            }
        }
        if (a->steps[h].emit) {
            depth--;
            emit_head_gradients(a, w.hd, stack + depth * 2 * rows, stack + depth * 2 * rows + rows,
                                emitted++);
        }
    }
}
