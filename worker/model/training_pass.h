/* The pieces of a training pass, inside a pool region. Internal to worker/model. */
#pragma once

#include "worker/model/training.h"

/* A contraction that is cut: unit u is elements [first[u], first[u + 1]). */
typedef struct Units {
    uint32_t n;
    uint32_t first[TREE_LEAVES_LIMIT + 1];
    TreeStep steps[TREE_LEAVES_LIMIT];
} Units;

/* What a layer keeps for its backward pass. */
typedef struct Tape {
    float *x, *attn_in;  /* [rows][width]: the residual stream, and normed */
    float *q, *attn;     /* [rows][heads * head_size]: after RoPE; attention's result */
    float *k, *v;        /* [rows][KV heads * head_size] */
    float *mid, *ffn_in; /* [rows][width]: the stream after attention, and normed */
    float *gate, *up;    /* [rows][ffn_width] (gpt2 has no gate) */
    float *act;          /* [rows][ffn_width] */
} Tape;

struct Training {
    TrainingOptions o;
    uint32_t max_rows, width, q_width, kv_width, ffn_width, vocab;
    Units attn_units, ffn_units;
    uint32_t n_chunks;
    TreeStep *chunk_steps;
    TreeStep head_steps[TREE_LEAVES_LIMIT]; /* of the query heads of a KV head */
    float *cos, *sin, *sin_back;            /* [length][rope dims / 2]; sin_back = -sin */
    Tape *tape;                             /* [layers] */
    float *x, *head_in;                     /* [rows][width]: the last layer's result, and normed */
    float *logits;                          /* [rows][vocab] */
    float *row_max, *row_sum;               /* [rows]: (m, l) of the logits */
    float *sum;                             /* [rows][width]: a sub-layer's result */
    float *dx, *dh;                         /* [rows][width] */
    float *dq, *dk, *dv, *dact;             /* gradients of the tape's q, k, v, act */
    float *stats;                           /* [rows][2] */
    float **scratch;                        /* per thread */
    GemmSegment **segments;                 /* per thread: enough for every product */
    const uint8_t ***pages;                 /* per thread: blocks of k, then of v */
    float *arena;
    size_t arena_bytes;
};

typedef struct Pass {
    Training *m;
    const TrainBatch *batch;
    Parameters *g; /* backward only */
    float *losses; /* forward only */
    float factor;
    uint32_t rows;
    unsigned t, n_threads;
} Pass;

static inline void meet(Pass *p)
{
    pool_barrier(p->m->o.pool);
}
/* layer -1: a global tensor */
static inline float *weight(const Pass *p, TensorRole role, int64_t layer)
{
    return parameters_at(p->m->o.weights, role, (int32_t)layer);
}
static inline float *gradient(const Pass *p, TensorRole role, int64_t layer)
{
    return parameters_at(p->g, role, (int32_t)layer);
}

/* ---- forward ---- */

/* One matrix W [n_out][n_in] of a phase and its result [rows][n_out]. */
typedef struct Linear {
    const float *w;
    uint32_t n_out;
    float *y;
} Linear;
/* y = x W^T for matrices that read the same x; threads share all their outputs. */
void pass_linear(Pass *p, const float *x, uint32_t n_in, const Linear *list, unsigned n);
/* m->sum = x W^T, W [width][n_in], contracted unit by unit. */
void pass_linear_units(Pass *p, const float *x, const float *w, uint32_t n_in, const Units *units);
/* y = y + bias on this thread's rows; bias may be NULL. */
void pass_bias(Pass *p, float *y, const float *bias, uint32_t n);
/* out = x + (sum + bias) on this thread's rows; bias may be NULL. */
void pass_residual(Pass *p, const float *x, const float *bias, float *out);
/* out = norm(x) on this thread's rows: layer norm where there is a bias. */
void pass_norm(Pass *p, const float *x, const float *w, const float *bias, float *out);
/* RoPE on this thread's rows of q and k [rows][...]; sin: m->sin or, for gradients, m->sin_back. */
void pass_rope(Pass *p, float *q, float *k, const float *sin);
/* tape->attn from q, k, v: (sequence, KV head) pairs go round the threads. */
void pass_attention(Pass *p, Tape *tape);
/* This thread's rows of elementwise n floats: first float and count. */
size_t pass_own_rows(const Pass *p, uint32_t n, size_t *count);

/* ---- backward ---- */

/* dx = dy W for W [n_out][n_in], one chain over n_out. */
void pass_linear_dx(Pass *p, const float *dy, uint32_t n_out, const float *w, uint32_t n_in,
                    float *dx);
/* m->dh = the sum over units of chains: unit u goes through rows [spans[i].first[u],
 * spans[i].first[u + 1]) of each matrix W [n_out][width] in turn. */
typedef struct SpanDx {
    const float *dy; /* [rows][n_out] */
    const float *w;
    uint32_t n_out;
    const uint32_t *first; /* [n_units + 1] */
} SpanDx;
void pass_units_dx(Pass *p, const SpanDx *spans, unsigned n_spans, const TreeStep *steps,
                   uint32_t n_units);
/* dW += dy^T x for each; threads share all their output rows. */
typedef struct LinearGradient {
    const float *dy;
    uint32_t n_out;
    const float *x;
    uint32_t n_in;
    float *dw;
} LinearGradient;
void pass_linear_dw(Pass *p, const LinearGradient *list, unsigned n);
/* dbias += dy, rows in order; dbias may be NULL. */
void pass_bias_gradient(Pass *p, const float *dy, uint32_t n, float *dbias);
/* m->dx += the gradient of x through a norm whose result's gradient is m->dh; then, behind a
 * barrier, the norm's own gradients. dbias NULL: RMS norm. */
void pass_norm_backward(Pass *p, const float *x, const float *w, float *dw, float *dbias);
/* m->dq (which holds the gradient of tape->attn), m->dk, m->dv. */
void pass_attention_backward(Pass *p, const Tape *tape);
/* Gradients of QKV (m->dq, dk, dv) into m->dh, NUMERICS 3: per attention unit one chain, its Q
 * columns, then K, then V of the KV heads whose first query head lies in it. */
void pass_qkv_dx(Pass *p, uint32_t layer);

/* ---- families: all layers of a pass, m->tape[0].x to m->x; m->dx back to the embedding ---- */
void gpt2_forward(Pass *p);
void gpt2_backward(Pass *p);
void llama_training_forward(Pass *p);
void llama_training_backward(Pass *p);
