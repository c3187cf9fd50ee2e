#include "kernels/generic/train.h"

#include "kernels/ops/math.h"

#include <string.h>

enum {
    LANES_MOST = 16, /* of the widest variant: its rows are padded to this many floats */
    ROW_TILE = 32,
};

static size_t padded(uint32_t n)
{
    return ((size_t)n + LANES_MOST - 1) / LANES_MOST * LANES_MOST;
}

size_t attention_backward_scratch_floats(uint32_t n_rows, uint32_t head_size, uint32_t n_q)
{
    const size_t hd = padded(head_size), keys = padded(n_rows) + LANES_MOST;
    size_t levels = 2;
    while (n_q > 1u << (levels - 2)) {
        levels++;
    }
    return 3 * n_rows * hd        /* rows of q, k, dout */
           + 2 * head_size * keys /* k and v turned */
           + 2 * ROW_TILE * keys  /* p and ds of some rows */
           + ROW_TILE * hd        /* dq of some rows */
           + levels * 2 * n_rows * hd /* dk and dv */;
}

/* dk and dv of one query head, n floats each. */
typedef struct HeadGradients {
    float *dk, *dv;
} HeadGradients;

/* p and ds of row i. */
static void row_backward(const AttentionBackwardArgs *a, uint32_t head, uint32_t i, float *p,
                         float *ds)
{
    const float *q = a->q + i * a->q_ld + (size_t)head * a->head_size;
    const float *dout = a->dout + i * a->q_ld + (size_t)head * a->head_size;
    float lanes[32] = {0}, m = 0.0f;
    for (uint32_t j = 0; j <= i; j++) {
        float score = 0.0f, dp = 0.0f;
        for (uint32_t d = 0; d < a->head_size; d++) {
            score = fmaf(q[d], a->k[j * a->kv_ld + d], score);
            dp = fmaf(dout[d], a->v[j * a->kv_ld + d], dp);
        }
        p[j] = score * a->scale;
        ds[j] = dp;
        m = j == 0 || p[j] > m ? p[j] : m;
    }
    for (uint32_t j = 0; j <= i; j++) {
        p[j] = exp32_inline(p[j] - m);
        lanes[j % 32] += p[j];
    }
    const float r = 1.0f / lanes_fold(lanes);
    memset(lanes, 0, sizeof lanes);
    for (uint32_t j = 0; j <= i; j++) {
        p[j] *= r;
        lanes[j % 32] = fmaf(p[j], ds[j], lanes[j % 32]);
    }
    const float delta = lanes_fold(lanes);
    for (uint32_t j = 0; j <= i; j++) {
        ds[j] = (p[j] * (ds[j] - delta)) * a->scale;
    }
}

static void head_backward(const AttentionBackwardArgs *a, uint32_t head, float *p, float *ds,
                          float *dq, HeadGradients out)
{
    const uint32_t hd = a->head_size;
    memset(out.dk, 0, (size_t)a->n_rows * hd * sizeof(float));
    memset(out.dv, 0, (size_t)a->n_rows * hd * sizeof(float));
    for (uint32_t i = 0; i < a->n_rows; i++) {
        const size_t at = i * a->q_ld + (size_t)head * hd;
        row_backward(a, head, i, p, ds);
        memset(dq, 0, hd * sizeof(float));
        for (uint32_t j = 0; j <= i; j++) {
            for (uint32_t d = 0; d < hd; d++) {
                dq[d] = fmaf(ds[j], a->k[j * a->kv_ld + d], dq[d]);
                out.dk[j * hd + d] = fmaf(ds[j], a->q[at + d], out.dk[j * hd + d]);
                out.dv[j * hd + d] = fmaf(p[j], a->dout[at + d], out.dv[j * hd + d]);
            }
        }
        memcpy(a->dq + at, dq, hd * sizeof(float));
    }
}

static void emit(const AttentionBackwardArgs *a, HeadGradients from, uint32_t subtree)
{
    for (uint32_t j = 0; j < a->n_rows; j++) {
        const size_t to = subtree * a->subtree_stride + j * a->kv_ld;
        memcpy(a->dk + to, from.dk + (size_t)j * a->head_size, a->head_size * sizeof(float));
        memcpy(a->dv + to, from.dv + (size_t)j * a->head_size, a->head_size * sizeof(float));
    }
}

void attention_backward_generic(const AttentionBackwardArgs *a)
{
    const size_t n = (size_t)a->n_rows * a->head_size;
    float *p = a->scratch, *ds = p + a->n_rows, *dq = ds + a->n_rows, *stack = dq + a->head_size;
    uint32_t depth = 0, emitted = 0;
    for (uint32_t h = 0; h < a->n_q; h++) {
        head_backward(a, h, p, ds, dq,
                      (HeadGradients){stack + depth * 2 * n, stack + depth * 2 * n + n});
        depth++;
        for (uint32_t k = 0; k < a->steps[h].n_merges; k++) {
            depth--;
            for (size_t i = 0; i < 2 * n; i++) {
                stack[(depth - 1) * 2 * n + i] += stack[depth * 2 * n + i];
            }
        }
        if (a->steps[h].emit) {
            depth--;
            emit(a, (HeadGradients){stack + depth * 2 * n, stack + depth * 2 * n + n}, emitted++);
        }
    }
}
