/* The pieces of a training pass, inside a pool region. Internal to worker/model. */
#pragma once

#include "worker/model/training.h"
#include "worker/model/training_precision.h"

/* A contraction that is cut: own unit u is elements [first[u], first[u + 1]) of what the rank has.
 */
typedef struct Units {
    uint32_t n;
    uint32_t first[TREE_LEAVES_LIMIT + 1];
    TreeStep steps[TREE_LEAVES_LIMIT];
    uint32_t n_leaves; /* of the whole tree, over all tensor ranks */
    const uint32_t *cuts;
} Units;

/* What a layer keeps for its backward pass; widths are the rank's own. */
typedef struct Tape {
    float *x, *attn_in;  /* [rows][width]: the residual stream, and normed */
    float *q, *attn;     /* [rows][heads * head_size]: after RoPE; attention's result */
    float *k, *v;        /* [rows][KV heads * head_size] */
    float *mid, *ffn_in; /* [rows][width]: the stream after attention, and normed */
    float *gate, *up;    /* [rows][ffn_width] (gpt2 has no gate) */
    float *act;          /* [rows][ffn_width] */
} Tape;

/* Gradients that a layer's weights' gradients are made of. */
typedef struct LayerGradients {
    float *dq, *dact; /* of the tape's q, act */
    float *dk, *dv;   /* [kv_subtrees][rows][kv_width] */
    float *out, *mid; /* [rows][width]: of the results of feed-forward and attention; only where
                         weights are apart */
} LayerGradients;

typedef struct Slot {
    Tape *tape;                /* [layers of the largest chunk] */
    LayerGradients *gradients; /* [layers], where weights are apart */
    float *x;                  /* [rows][width]: the last layer's result */
} Slot;

/* A KV head whose query heads are on several tensor ranks (NUMERICS 16). */
typedef struct SharedHead {
    uint32_t kv;                         /* of the model */
    uint32_t cuts[PLAN_RANKS_LIMIT + 1]; /* its query heads by rank */
} SharedHead;

struct Training {
    TrainingOptions o;
    const struct PassOps *ops;
    struct TrainingDevice *device; /* NULL: on the host */
    const Holding *h;
    const ModelSpec *spec;
    unsigned threads;
    uint32_t max_layers; /* of a chunk */
    uint32_t max_rows, width, q_width, kv_width, ffn_width, vocab;
    Units attn_units, ffn_units, chunks; /* chunks: of the vocabulary; no steps where tp is 1 */
    TreeStep *chunk_steps;               /* of the own chunks */
    TreeStep (*head_steps)[TREE_LEAVES_LIMIT]; /* by own KV head: of its own query heads */
    uint32_t kv_subtrees;                      /* at most of one KV head */
    SharedHead *shared;                        /* all of the stage */
    uint32_t n_shared;
    float *cos, *sin, *sin_back; /* [length][rope dims / 2]; sin_back = -sin */
    Slot *slots;
    float *head_in;           /* [rows][width]: the last layer's result, normed */
    float *logits;            /* [rows][logits_ld] */
    size_t logits_ld;         /* vocab; a device's is rounded up */
    float *row_max, *row_sum; /* [rows][chunks of the model]: (m, l) of the logits */
    float *row_target;        /* [rows]: the logit of the target */
    float *row_total;         /* [rows][chunks of the model]: sums of logits, for smoothed labels */
    float *sum;               /* [rows][width]: a sub-layer's result */
    float *partial;           /* [subtrees][rows][width]: partial sums, where tp > 1 */
    float *gathered;          /* those of all ranks, on a device in class exact */
    float *exchange;          /* what tensor ranks send each other beside partial sums */
    float *dx, *dh;           /* [rows][width] */
    LayerGradients d;         /* of the running layer, where weights are not apart */
    float *stats;             /* [rows][2] */
    uint32_t *first_row;      /* [vocab, or length if more]: the first row with the id, or at the
                                 position; only of those in the batch */
    uint32_t *next_row;       /* [rows]: the next row with the same one, or ROW_NONE */
    float **scratch;          /* per thread */
    GemmSegment **segments;   /* per thread: enough for every product */
    const uint8_t ***pages;   /* per thread: blocks of k, then of v */
    GroupStatus status;       /* of this call's exchanges: the first that failed */
    bool folding;             /* partial sums are under way; thread 0's, like the next */
    size_t fold_made;         /* floats of them that are there */
    float *arena;
    size_t arena_bytes;
};

typedef struct Pass {
    Training *m;
    const TrainBatch *batch;
    Slot *slot;
    LayerGradients *d; /* of the running layer; backward only */
    Parameters *g;     /* backward only */
    float *losses;     /* loss only */
    float factor;
    uint32_t rows;
    uint32_t first_row, last_row;   /* what ops on rows take: all, or a block of pass_fold_take() */
    uint32_t layer_first, n_layers; /* of the chunk */
    bool is_first, is_last;         /* the chunk begins with the embedding; ends with the head */
    bool at_head;                   /* its products are the head's */
    unsigned t, n_threads;
} Pass;

/* What this thread did since the last mark was `op`. */
static inline void mark(const Pass *p, TrainOp op)
{
    if (p->t == 0) {
        train_times_mark(p->m->o.times, op);
    }
}

/* op: of a layer's product */
static inline void mark_product(const Pass *p, TrainOp op)
{
    mark(p, p->at_head ? op + TRAIN_OP_HEAD_FORWARD - TRAIN_OP_FORWARD : op);
}

/* Thread 0. Goes on with the fold that is under way. */
void exchange_progress(Pass *p);
/* Lets messages go on, by thread 0. */
static inline void progress(Pass *p)
{
    const TrainingOptions *o = &p->m->o;
    if (p->t == 0 && p->m->folding) {
        exchange_progress(p);
    } else if (p->t == 0 && o->progress != NULL) {
        o->progress(o->progress_user);
    }
}

static inline void meet(Pass *p)
{
    progress(p);
    if (p->n_threads > 1) {
        pool_barrier(p->m->o.pool);
    }
    mark(p, TRAIN_OP_WAIT);
}
static inline int32_t layer_of(const Pass *p, int64_t layer)
{
    return layer < 0 ? -1 : (int32_t)(p->layer_first + layer);
}
/* What RoPE and learnt positions take row r for. */
static inline uint32_t position_of(const Pass *p, uint32_t r)
{
    const TrainBatch *b = p->batch;
    return r % b->length - (b->restart && b->begins != NULL ? b->begins[r] : 0);
}
/* layer: of the chunk; -1: a global tensor */
static inline float *weight(const Pass *p, TensorRole role, int64_t layer)
{
    return parameters_at(p->m->o.weights, role, layer_of(p, layer));
}
static inline float *gradient(const Pass *p, TensorRole role, int64_t layer)
{
    return parameters_at(p->g, role, layer_of(p, layer));
}

#define ROW_NONE UINT32_MAX
static inline uint32_t leaves_of(const Pass *p)
{
    return p->batch->leaves != NULL ? p->batch->leaves->n : 1;
}
/* Whether a chain goes on from what the gradients' buffers hold. */
static inline bool leaf_begun(const Pass *p)
{
    return p->batch->leaves == NULL || p->batch->leaves->begun;
}
/* The end of a leaf's rows; it begins where the one before ends. */
static inline uint32_t leaf_end(const Pass *p, uint32_t leaf)
{
    return p->batch->leaves != NULL ? p->batch->leaves->first[leaf + 1] * p->batch->length
                                    : p->rows;
}
enum { FOLD_COLUMNS = 512 }; /* of one block of vectors that are folded */

/* ---- exchange among tensor ranks: training_exchange.c; nothing where there is one ---- */

/* A product of which each tensor rank has a part: sums over all ranks become `out` [rows][width],
 * block of rows after block while the next is made, and while other work is done that needs none.
 * All threads call all of these. */
typedef struct Fold {
    const Units *units; /* what the contraction is cut into */
    float *out;
    const char *operation;
} Fold;
enum { FOLD_ROWS = 264 }; /* of a block: what products take at once (kernels/vector/gemm.h) */
/* Where the own part goes, and how far apart its subtrees are. */
float *pass_fold_target(const Pass *p, float *out, size_t *stride);
/* Makes it: args->n columns by this thread; args->m and what args point to is used up. Then
 * pass_fold_end() once, or pass_fold_take() until it is false. */
void pass_fold_product(Pass *p, const Fold *fold, GemmArgs *args, GemmSegment *segments,
                       TrainOp op);
/* Behind a barrier the next block, from *row (0 at first) on, is complete, and ops on rows take it;
 * false: there is none, and ops take all rows again. */
bool pass_fold_take(Pass *p, uint32_t *row);
/* All rows are complete, behind a barrier. */
void pass_fold_end(Pass *p);
/* The sums of m->partial at once, by one thread, without barriers. */
void exchange_sum(const Pass *p, const Units *units, float *out, const char *operation);
/* Thread 0. Rows of the embedding into x [rows][width], each a copy from the rank that has its id.
 * own: where its own rows are among all, may be x; NULL: in the table. */
void exchange_embedding(Pass *p, const float *own, float *x);
/* The tensor rank that has an id of the vocabulary. */
uint32_t exchange_owner(const Holding *h, uint32_t token);
/* Thread 0. (m, l) of all chunks and the target's logit of each row, from the ranks that have them.
 */
void exchange_row_stats(Pass *p);
/* Thread 0. Gradients of keys and values of shared KV heads: all subtrees to all who share. */
void exchange_shared_heads(Pass *p);
size_t exchange_floats(const Training *t);
/* Whether rank r has query heads of it, and how many subtrees it hands over. */
static inline bool shared_has_part(const SharedHead *s, uint32_t r)
{
    return s->cuts[r] < s->cuts[r + 1];
}
uint32_t shared_subtrees(const Training *m, const SharedHead *s, uint32_t r);
/* Class fast among devices: a rank's own units are one chain, added up as they come. */
static inline bool sums_are_whole(const Training *m)
{
    return m->o.team != NULL && !m->o.exact;
}

/* ---- ops: what differs between a host, whose threads share them, and a device, where thread 0
 * alone enqueues them. All threads call; behind an op there is no barrier unless it says so. ----
 */

typedef struct PassOps {
    /* A product in the training's precision, scratch filled in. */
    void (*multiply)(Pass *p, GemmArgs *args);
    /* On this thread's rows, like all down to swiglu_backward: y = y + bias; may be NULL. */
    void (*bias)(Pass *p, float *y, const float *bias, uint32_t n);
    /* out = x + dropout(m->sum + bias); bias may be NULL. m->sum is used up. */
    void (*residual)(Pass *p, const float *x, const float *bias, uint32_t site, float *out);
    /* out = dropout(x), both [rows][width]; may be x. */
    void (*dropout)(Pass *p, uint32_t site, const float *x, float *out);
    /* out = norm(x): layer norm where there is a bias. */
    void (*norm)(Pass *p, const float *x, const float *w, const float *bias, float *out);
    /* RoPE of q and k [rows][...]; back: of gradients. */
    void (*rope)(Pass *p, float *q, float *k, bool back);
    void (*gelu)(Pass *p, const float *x, uint32_t n, float *out); /* [rows][n] */
    void (*gelu_backward)(Pass *p, const float *x, uint32_t n, float *dx /* dy before */);
    void (*swiglu)(Pass *p, const float *gate, const float *up, uint32_t n, float *out);
    /* gate and up become their gradients. */
    void (*swiglu_backward)(Pass *p, float *gate, float *up, uint32_t n, const float *dy);
    /* tape->attn from q, k, v: (sequence, KV head) pairs go round the threads. Each document of a
     * sequence is attended to by itself, as if it were a sequence of its own: its neighbours change
     * no bit. */
    void (*attention)(Pass *p, Tape *tape);
    /* d->dq (which holds the gradient of tape->attn), d->dk, d->dv. Ends with a barrier. */
    void (*attention_backward)(Pass *p, const Tape *tape);
    /* dbias += dy, rows of a leaf in order; dbias may be NULL. */
    void (*bias_gradient)(Pass *p, const float *dy, uint32_t n, float *dbias);
    /* m->dx += the gradient of x through a norm whose result's gradient is m->dh; then, behind a
     * barrier, the norm's own gradients. dbias NULL: RMS norm. */
    void (*norm_backward)(Pass *p, const float *x, const float *w, float *dw, float *dbias);
    /* Rows of the embedding, positions and dropout into x. */
    void (*embed)(Pass *p, float *x);
    /* Their gradients from dy [rows][width]. Rows in order; threads share the channels, tensor
     * ranks the ids (NUMERICS 16). */
    void (*embed_backward)(Pass *p, const float *dy);
    /* From logits to p->losses: statistics, over all tensor ranks, then losses. */
    void (*losses)(Pass *p);
    /* Logits become their gradient, m->dx zero. */
    void (*loss_gradient)(Pass *p);
} PassOps;
extern const PassOps training_host_ops, training_device_ops;

static inline void pass_multiply(Pass *p, GemmArgs *args)
{
    p->m->ops->multiply(p, args);
}
static inline void pass_bias(Pass *p, float *y, const float *bias, uint32_t n)
{
    p->m->ops->bias(p, y, bias, n);
}
static inline void pass_residual(Pass *p, const float *x, const float *bias, uint32_t site,
                                 float *out)
{
    p->m->ops->residual(p, x, bias, site, out);
}
static inline void pass_norm(Pass *p, const float *x, const float *w, const float *bias, float *out)
{
    p->m->ops->norm(p, x, w, bias, out);
}
static inline void pass_rope(Pass *p, float *q, float *k, bool back)
{
    p->m->ops->rope(p, q, k, back);
}
static inline void pass_gelu(Pass *p, const float *x, uint32_t n, float *out)
{
    p->m->ops->gelu(p, x, n, out);
}
static inline void pass_gelu_backward(Pass *p, const float *x, uint32_t n, float *dx)
{
    p->m->ops->gelu_backward(p, x, n, dx);
}
static inline void pass_swiglu(Pass *p, const float *gate, const float *up, uint32_t n, float *out)
{
    p->m->ops->swiglu(p, gate, up, n, out);
}
static inline void pass_swiglu_backward(Pass *p, float *gate, float *up, uint32_t n,
                                        const float *dy)
{
    p->m->ops->swiglu_backward(p, gate, up, n, dy);
}
static inline void pass_attention(Pass *p, Tape *tape)
{
    p->m->ops->attention(p, tape);
}
static inline void pass_attention_backward(Pass *p, const Tape *tape)
{
    p->m->ops->attention_backward(p, tape);
}
static inline void pass_bias_gradient(Pass *p, const float *dy, uint32_t n, float *dbias)
{
    p->m->ops->bias_gradient(p, dy, n, dbias);
}
static inline void pass_norm_backward(Pass *p, const float *x, const float *w, float *dw,
                                      float *dbias)
{
    p->m->ops->norm_backward(p, x, w, dw, dbias);
}
/* The host's ops of a model's ends (training.c). */
void host_embed(Pass *p, float *x);
void host_embed_backward(Pass *p, const float *dy);
void host_losses(Pass *p);
void host_loss_gradient(Pass *p);
void host_dropout(Pass *p, uint32_t site, const float *x, float *out);
/* The target's index among the own logits, or XENT_NO_TARGET. */
uint32_t pass_own_target(const Pass *p, uint32_t r);
/* Own query heads of own KV head `kv`: the first one's place among the own, and how many. */
uint32_t training_query_heads(const Training *m, uint32_t kv, uint32_t *n);
/* Rows of one document: all that attend to each other. */
typedef struct Document {
    size_t row;
    uint32_t length;
} Document;
/* The document of a sequence that begins at position `first`. */
Document pass_document_at(const TrainBatch *b, uint32_t sequence, uint32_t first);
/* This thread's rows of elementwise n floats: first float and count. */
size_t pass_own_rows(const Pass *p, uint32_t n, size_t *count);

/* ---- products, the same for both ---- */

/* One matrix W [n_out][n_in] of a phase and its result [rows][ld]. */
typedef struct Linear {
    const float *w;
    uint32_t n_out;
    float *y;
    size_t ld; /* 0: n_out */
} Linear;
/* y = x W^T for matrices that read the same x; threads share all their outputs. */
void pass_linear(Pass *p, const float *x, uint32_t n_in, const Linear *list, unsigned n);
/* m->sum = x W^T, W [width][n_in], contracted unit by unit, over all tensor ranks: complete by
 * pass_fold_take() or pass_fold_end(). */
void pass_linear_units(Pass *p, const float *x, const float *w, uint32_t n_in, const Units *units);
/* The gradient of a sub-layer's result: m->dx, or a copy of it in `keep` (NULL: m->sum, if one is
 * needed) through dropout. All threads; ends with a barrier if it copies. */
const float *pass_result_gradient(Pass *p, uint32_t site, float *keep);
/* dx = dy W for W [n_out][n_in], one chain over n_out. */
void pass_linear_dx(Pass *p, const float *dy, uint32_t n_out, const float *w, uint32_t n_in,
                    float *dx);
/* m->dh = the sum over units, over all tensor ranks, of chains: unit u goes through rows
 * [spans[i].first[u], spans[i].first[u + 1]) of each matrix W [n_out][width] in turn. Complete by
 * pass_fold_end(). */
typedef struct SpanDx {
    const float *dy; /* [rows][n_out] */
    const float *w;
    uint32_t n_out;
    const uint32_t *first; /* [units->n + 1] */
} SpanDx;
void pass_units_dx(Pass *p, const SpanDx *spans, unsigned n_spans, const Units *units);
/* dW = dy^T x for each, leaf by leaf, or dW += dy^T x where the leaf is begun; threads share all
 * their output rows. */
typedef struct LinearGradient {
    const float *dy; /* [rows][ld] */
    uint32_t n_out;
    const float *x;
    uint32_t n_in;
    float *dw;
    size_t ld; /* 0: n_out */
} LinearGradient;
void pass_linear_dw(Pass *p, const LinearGradient *list, unsigned n);
/* Gradients of QKV (d->dq, dk, dv) into m->dh, NUMERICS 3: per attention unit one chain, its Q
 * columns, then K, then V of the KV heads whose first query head lies in it. */
void pass_qkv_dx(Pass *p, uint32_t layer);

/* ---- families: layer `layer` of the chunk, tape->x to `out`. out NULL: what backward needs is
 * computed again and nothing else; again: the selective part of that. Backward takes m->dx from the
 * layer's result to its input; weights adds the gradients of its matrices and biases, from p->d,
 * where backward left them apart.
 * ---- */
void gpt2_layer_forward(Pass *p, uint32_t layer, float *out);
void gpt2_layer_again(Pass *p, uint32_t layer);
void gpt2_layer_backward(Pass *p, uint32_t layer);
void gpt2_layer_weights(Pass *p, uint32_t layer);
void llama_training_layer_forward(Pass *p, uint32_t layer, float *out);
void llama_training_layer_again(Pass *p, uint32_t layer);
void llama_training_layer_backward(Pass *p, uint32_t layer);
void llama_training_layer_weights(Pass *p, uint32_t layer);
