/* The device's training ops on the CPU's streams, by the kernels of this host's instruction set:
 * the bits of worker/model's own training pass. */
#include "kernels/device/cpu.h"
#include "kernels/device/train_ops.h"

#include "kernels/kernels.h"
#include "kernels/ops/xent_rows.h"

#include <string.h>

static const Kernels *kernels(void)
{
    return kernels_get(kernels_best_isa());
}

static bool has_operands(Dtype type)
{
    return type == DTYPE_F32 || type == DTYPE_BF16 || type == DTYPE_F16;
}

static bool has_shape(uint32_t head_size, uint32_t heads_per_kv, uint32_t width)
{
    (void)heads_per_kv;
    (void)width;
    return head_size <= 256;
}

/* ---- workspace ---- */

static size_t page_floats(uint32_t n_rows, uint32_t head_size)
{
    return 2 * (size_t)((n_rows + KV_BLOCK - 1) / KV_BLOCK) * KV_BLOCK * head_size;
}

static size_t block_pointers(uint32_t n_rows)
{
    return 2 * (size_t)((n_rows + KV_BLOCK - 1) / KV_BLOCK) * sizeof(uint8_t *);
}

static size_t workspace_bytes(const DeviceTrainLimits *l)
{
    const uint32_t group = l->n_kv_heads > 0 ? (l->n_heads + l->n_kv_heads - 1) / l->n_kv_heads : 1,
                   n = l->longest_document;
    const size_t forward =
                     page_floats(n, l->head_size) + attention_scratch_floats(group, l->head_size),
                 backward = attention_backward_scratch_floats(n, l->head_size, group),
                 product = gemm_scratch_floats(l->max_segments);
    return MAX(MAX(forward, backward), product) * sizeof(float) + block_pointers(n);
}

/* ---- products ---- */

typedef struct ProductTask {
    DeviceProduct p;
    GemmSegment segments[];
} ProductTask;

static void run_product(void *user)
{
    ProductTask *task = user;
    const DeviceProduct *p = &task->p;
    const TrainKernels *k = &kernels()->train;
    const GemmFn gemm = p->operands == DTYPE_BF16  ? k->gemm_bf16
                        : p->operands == DTYPE_F16 ? k->gemm_f16
                                                   : k->gemm;
    gemm(&(GemmArgs){.m = p->m,
                     .n = p->n,
                     .segments = task->segments,
                     .n_segments = p->n_segments,
                     .accumulate = p->accumulate,
                     .c = p->c,
                     .ld = p->ld,
                     .subtree_stride = p->subtree_stride,
                     .scratch = p->workspace});
}

static DeviceStatus product(DeviceStream *stream, const DeviceProduct *p)
{
    const size_t segments = p->n_segments * sizeof(GemmSegment);
    if (!has_operands(p->operands) ||
        p->workspace_bytes < gemm_scratch_floats(p->n_segments) * sizeof(float)) {
        return DEVICE_UNSUPPORTED;
    }
    g_autofree ProductTask *task = g_malloc(sizeof *task + segments);
    task->p = *p;
    memcpy(task->segments, p->segments, segments);
    return device_cpu_enqueue(stream, run_product, task, sizeof *task + segments);
}

/* ---- rows by number ---- */

static void run_gather(void *user)
{
    const DeviceGather *a = user;
    const size_t bytes = a->width * sizeof(float);
    for (uint32_t r = 0; r < a->rows; r++) {
        const uint32_t row = a->index[r] - a->first;
        const float *from = a->table + (size_t)row * a->width;
        float *out = a->out + (size_t)r * a->width;
        const bool there = a->index[r] >= a->first && row < a->n;
        if (there && a->accumulate) {
            kernels()->add(out, from, a->width);
        } else if (there) {
            memcpy(out, from, bytes);
        } else if (!a->accumulate) {
            memset(out, 0, bytes);
        }
    }
}

static void run_scatter(void *user)
{
    const DeviceScatter *a = user;
    for (uint32_t i = 0; i < a->n_ids; i++) {
        for (uint32_t at = a->starts[i]; at < a->starts[i + 1]; at++) {
            kernels()->add(a->out + (size_t)a->ids[i] * a->width,
                           a->dy + (size_t)a->order[at] * a->width, a->width);
        }
    }
}

/* ---- norms ---- */

static void run_norm(void *user)
{
    const DeviceTrainNorm *a = user;
    for (size_t r = 0; r < a->rows; r++) {
        const size_t at = r * a->n;
        if (a->bias != NULL) {
            kernels()->train.layer_norm(a->x + at, a->weight, a->bias, a->eps, a->n, a->out + at);
        } else {
            kernels()->rms_norm(a->x + at, a->weight, a->eps, a->n, a->out + at);
        }
    }
}

static void run_norm_backward(void *user)
{
    const DeviceNormBackward *a = user;
    const TrainKernels *k = &kernels()->train;
    const NormBackwardFn backward =
        a->dbias != NULL ? k->layer_norm_backward : k->rms_norm_backward;
    for (size_t r = 0; r < a->rows; r++) {
        const size_t at = r * a->n;
        backward(a->x + at, a->weight, a->dy + at, a->eps, a->n, a->dx + at, a->stats + 2 * r);
    }
    k->norm_weight_backward(a->x, a->dy, a->n, a->stats, a->rows, a->n, a->dweight, a->dbias);
}

/* ---- attention ---- */

static void run_turn(void *user)
{
    const DeviceTurn *a = user;
    const uint32_t half = a->dims / 2;
    float back[256];
    for (size_t r = 0; r < a->rows; r++) {
        const size_t at = (size_t)a->positions[r] * half;
        for (uint32_t i = 0; i < half; i++) {
            back[i] = a->inverse ? -a->sin[at + i] : a->sin[at + i];
        }
        kernels()->rope_apply(a->x + r * a->n_heads * a->head_size, a->n_heads, a->head_size,
                              a->dims, a->pairing, a->cos + at, back);
    }
}

typedef struct AttentionTask {
    DeviceTrainAttention a;
    DeviceRows rows;
    TreeStep steps[TREE_LEAVES_LIMIT];
} AttentionTask;

/* One document, one KV head. */
static void attend(const AttentionTask *t, const DeviceSegment *document, uint32_t head)
{
    const DeviceTrainAttention *a = &t->a;
    const uint32_t n = document->n_rows, hd = a->head_size,
                   n_blocks = (n + KV_BLOCK - 1) / KV_BLOCK;
    const size_t row = document->row0, block = (size_t)KV_BLOCK * hd;
    const uint8_t **pages = a->workspace;
    float *k_blocks = (float *)(void *)((uint8_t *)a->workspace + block_pointers(n)),
          *v_blocks = k_blocks + n_blocks * block;
    for (uint32_t b = 0; b < n_blocks; b++) {
        pages[b] = (const uint8_t *)(k_blocks + b * block);
        pages[n_blocks + b] = (const uint8_t *)(v_blocks + b * block);
    }
    for (uint32_t i = 0; i < n; i++) {
        const size_t at = (row + i) * a->kv_ld + (size_t)head * hd, b = i / KV_BLOCK * block;
        kernels()->kv_write[KV_F32](a->k + at, a->v + at, hd, i % KV_BLOCK, k_blocks + b,
                                    v_blocks + b);
    }
    const size_t at = row * a->q_ld + (size_t)head * a->n_q * hd;
    kernels()->attention[KV_F32](&(AttentionArgs){.q = a->q + at,
                                                  .q_ld = a->q_ld,
                                                  .out = a->out + at,
                                                  .out_ld = a->q_ld,
                                                  .n_rows = n,
                                                  .n_q = a->n_q,
                                                  .head_size = hd,
                                                  .scale = a->scale,
                                                  .causal = true,
                                                  .n_keys = n,
                                                  .k_blocks = pages,
                                                  .v_blocks = pages + n_blocks,
                                                  .scratch = v_blocks + n_blocks * block});
}

static void attend_backward(const AttentionTask *t, const DeviceSegment *document, uint32_t head)
{
    const DeviceTrainAttention *a = &t->a;
    const size_t q = document->row0 * a->q_ld + (size_t)head * a->n_q * a->head_size,
                 at = document->row0 * a->kv_ld + (size_t)head * a->head_size;
    kernels()->train.attention_backward(
        &(AttentionBackwardArgs){.q = a->q + q,
                                 .dout = a->dout + q,
                                 .k = a->k + at,
                                 .v = a->v + at,
                                 .q_ld = a->q_ld,
                                 .kv_ld = a->kv_ld,
                                 .dq = a->dq + q,
                                 .dk = a->dk + at,
                                 .dv = a->dv + at,
                                 .subtree_stride = a->subtree_stride,
                                 .n_rows = document->n_rows,
                                 .n_q = a->n_q,
                                 .head_size = a->head_size,
                                 .steps = t->steps,
                                 .scale = a->scale,
                                 .scratch = a->workspace});
}

static void for_each_head(const AttentionTask *t,
                          void (*run)(const AttentionTask *, const DeviceSegment *, uint32_t))
{
    for (uint32_t s = 0; s < t->rows.n_segments; s++) {
        for (uint32_t head = 0; head < t->a.n_kv_heads; head++) {
            run(t, &t->rows.segments[s], head);
        }
    }
}

static void run_attention(void *user)
{
    for_each_head(user, attend);
}

static void run_attention_backward(void *user)
{
    for_each_head(user, attend_backward);
}

static DeviceStatus attention(DeviceStream *stream, const DeviceTrainAttention *a)
{
    const AttentionTask task = {.a = *a, .rows = *a->rows};
    return device_cpu_enqueue(stream, run_attention, &task, sizeof task);
}

static DeviceStatus attention_backward(DeviceStream *stream, const DeviceTrainAttention *a)
{
    AttentionTask task = {.a = *a, .rows = *a->rows};
    if (a->n_q > TREE_LEAVES_LIMIT) {
        return DEVICE_UNSUPPORTED;
    }
    memcpy(task.steps, a->steps, a->n_q * sizeof *a->steps);
    return device_cpu_enqueue(stream, run_attention_backward, &task, sizeof task);
}

/* ---- element-wise ---- */

static void run_dropout(void *user)
{
    const DeviceDropout *a = user;
    for (uint32_t r = 0; r < a->rows; r++) {
        const float *x = a->x + (size_t)r * a->width;
        float *out = a->out + (size_t)r * a->width;
        if (out != x) {
            memcpy(out, x, a->width * sizeof *out);
        }
        if (a->bias != NULL) {
            kernels()->add(out, a->bias, a->width);
        }
        if (a->dropout.rate > 0.0f) {
            dropout_row(&a->dropout, a->site, a->first_sample + r / a->length, r % a->length, out,
                        a->width);
        }
        if (a->residual != NULL) { /* a sum of two: either order */
            kernels()->add(out, a->residual + (size_t)r * a->width, a->width);
        }
    }
}

/* Arrays and numbers of the ops that have no struct. */
typedef struct Flat {
    const float *a, *b, *c;
    float *x, *y, *z;
    size_t n;
    uint32_t rows;
    float back, tokens;
    AdamwScalars adamw;
    SgdScalars sgd;
} Flat;

static DeviceStatus enqueue(DeviceStream *stream, void (*run)(void *), Flat flat)
{
    return device_cpu_enqueue(stream, run, &flat, sizeof flat);
}

static void run_bias(void *user)
{
    const Flat *f = user;
    for (size_t r = 0; r < f->rows; r++) {
        kernels()->add(f->x + r * f->n, f->a, f->n);
    }
}
static DeviceStatus bias(DeviceStream *stream, float *y, const float *bias, uint32_t rows,
                         uint32_t n)
{
    return enqueue(stream, run_bias, (Flat){.a = bias, .x = y, .n = n, .rows = rows});
}

static void run_sum_rows(void *user)
{
    const Flat *f = user;
    kernels()->train.sum_rows(f->a, f->n, f->rows, (uint32_t)f->n, f->x);
}
static DeviceStatus sum_rows(DeviceStream *stream, const float *dy, uint32_t rows, uint32_t n,
                             float *out)
{
    return enqueue(stream, run_sum_rows, (Flat){.a = dy, .x = out, .n = n, .rows = rows});
}

enum { PIECE = 1 << 30 }; /* of arrays whose kernels count in 32 bits */

static void run_gelu(void *user)
{
    const Flat *f = user;
    for (size_t i = 0; i < f->n; i += PIECE) {
        kernels()->train.gelu(f->a + i, (uint32_t)MIN(f->n - i, PIECE), f->x + i);
    }
}
static DeviceStatus gelu(DeviceStream *stream, const float *x, size_t n, float *out)
{
    return enqueue(stream, run_gelu, (Flat){.a = x, .x = out, .n = n});
}

static void run_gelu_backward(void *user)
{
    const Flat *f = user;
    for (size_t i = 0; i < f->n; i += PIECE) {
        kernels()->train.gelu_backward(f->a + i, f->b + i, (uint32_t)MIN(f->n - i, PIECE),
                                       f->x + i);
    }
}
static DeviceStatus gelu_backward(DeviceStream *stream, const float *x, const float *dy, size_t n,
                                  float *dx)
{
    return enqueue(stream, run_gelu_backward, (Flat){.a = x, .b = dy, .x = dx, .n = n});
}

static void run_swiglu(void *user)
{
    const Flat *f = user;
    for (size_t i = 0; i < f->n; i += PIECE) {
        kernels()->swiglu(f->a + i, f->b + i, (uint32_t)MIN(f->n - i, PIECE), f->x + i);
    }
}
static DeviceStatus swiglu(DeviceStream *stream, const float *gate, const float *up, size_t n,
                           float *out)
{
    return enqueue(stream, run_swiglu, (Flat){.a = gate, .b = up, .x = out, .n = n});
}

static void run_swiglu_backward(void *user)
{
    const Flat *f = user;
    for (size_t i = 0; i < f->n; i += PIECE) {
        kernels()->train.swiglu_backward(f->a + i, f->b + i, f->c + i,
                                         (uint32_t)MIN(f->n - i, PIECE), f->x + i, f->y + i);
    }
}
static DeviceStatus swiglu_backward(DeviceStream *stream, const float *gate, const float *up,
                                    const float *dy, size_t n, float *dgate, float *dup)
{
    return enqueue(stream, run_swiglu_backward,
                   (Flat){.a = gate, .b = up, .c = dy, .x = dgate, .y = dup, .n = n});
}

static void run_add(void *user)
{
    const Flat *f = user;
    kernels()->add(f->x, f->a, f->n);
}
static DeviceStatus add(DeviceStream *stream, float *x, const float *y, size_t n)
{
    return enqueue(stream, run_add, (Flat){.a = y, .x = x, .n = n});
}

/* ---- the loss ---- */

static void run_row_stats(void *user)
{
    const DeviceRowStats *a = user;
    for (size_t r = 0; r < a->rows; r++) {
        const size_t at = r * a->n_chunks + a->first_chunk;
        a->target[r] =
            xent_row_stats(kernels(), a->logits + r * a->ld, a->n, a->targets[r], a->max + at,
                           a->sum + at, a->total != NULL ? a->total + at : NULL);
    }
}

static void run_row_losses(void *user)
{
    const DeviceRowLosses *a = user;
    for (size_t r = 0; r < a->rows; r++) {
        const size_t at = r * a->n_chunks;
        a->losses[r] = xent_row_loss(a->max + at, a->sum + at,
                                     a->total != NULL ? a->total + at : NULL, a->n_chunks,
                                     a->target[r], a->learnt[r] != 0, a->smoothing, a->vocabulary);
        a->row_max[r] = a->max[at];
        a->row_sum[r] = a->sum[at];
    }
}

static void run_loss_gradient(void *user)
{
    const DeviceLossGradient *a = user;
    for (size_t r = 0; r < a->rows; r++) {
        xent_row_gradient(kernels(), a->logits + r * a->ld, a->n, a->row_max[r], a->row_sum[r],
                          a->targets[r], a->learnt[r] != 0 ? a->factor : 0.0f, a->smoothing,
                          a->vocabulary);
    }
}

/* ---- the owner of a gradient ---- */

static void run_finish(void *user)
{
    const Flat *f = user;
    kernels()->train.gradient_finish(f->x, f->n, f->back, f->tokens);
}
static DeviceStatus finish(DeviceStream *stream, float *g, size_t n, float back, float tokens)
{
    return enqueue(stream, run_finish, (Flat){.x = g, .n = n, .back = back, .tokens = tokens});
}

typedef struct Squares {
    const DeviceTile *tiles;
    uint32_t n;
    float *out;
} Squares;

static void run_squares(void *user)
{
    const Squares *s = user;
    for (uint32_t i = 0; i < s->n; i++) {
        const DeviceTile *t = &s->tiles[i];
        s->out[i] = kernels()->train.sum_squares(t->x, t->ld, t->rows, t->columns);
    }
}
static DeviceStatus squares(DeviceStream *stream, const DeviceTile *tiles, uint32_t n_tiles,
                            float *out)
{
    const Squares args = {tiles, n_tiles, out};
    return device_cpu_enqueue(stream, run_squares, &args, sizeof args);
}

static void run_adamw(void *user)
{
    const Flat *f = user;
    kernels()->train.adamw(&f->adamw, f->n, f->a, f->x, f->y, f->z);
}
static DeviceStatus adamw(DeviceStream *stream, const AdamwScalars *scalars, size_t n,
                          const float *g, float *m, float *v, float *w)
{
    return enqueue(stream, run_adamw,
                   (Flat){.adamw = *scalars, .n = n, .a = g, .x = m, .y = v, .z = w});
}

static void run_sgd(void *user)
{
    const Flat *f = user;
    kernels()->train.sgd(&f->sgd, f->n, f->a, f->x, f->y);
}
static DeviceStatus sgd(DeviceStream *stream, const SgdScalars *scalars, size_t n, const float *g,
                        float *b, float *w)
{
    return enqueue(stream, run_sgd, (Flat){.sgd = *scalars, .n = n, .a = g, .x = b, .y = w});
}

/* An op whose struct is all that it takes. */
#define OP(name, Args)                                                                             \
    static DeviceStatus name(DeviceStream *stream, const Args *args)                               \
    {                                                                                              \
        return device_cpu_enqueue(stream, run_##name, args, sizeof *args);                         \
    }
OP(gather, DeviceGather)
OP(scatter, DeviceScatter)
OP(norm, DeviceTrainNorm)
OP(norm_backward, DeviceNormBackward)
OP(turn, DeviceTurn)
OP(dropout, DeviceDropout)
OP(row_stats, DeviceRowStats)
OP(row_losses, DeviceRowLosses)
OP(loss_gradient, DeviceLossGradient)

const DeviceTrainOps device_cpu_train_ops = {
    .abi = DEVICE_ABI,
    .bytes = sizeof(DeviceTrainOps),
    .has_operands = has_operands,
    .gives_exact = has_operands,
    .has_shape = has_shape,
    .workspace_bytes = workspace_bytes,
    .product = product,
    .gather = gather,
    .scatter = scatter,
    .norm = norm,
    .norm_backward = norm_backward,
    .turn = turn,
    .attention = attention,
    .attention_backward = attention_backward,
    .dropout = dropout,
    .bias = bias,
    .sum_rows = sum_rows,
    .gelu = gelu,
    .gelu_backward = gelu_backward,
    .swiglu = swiglu,
    .swiglu_backward = swiglu_backward,
    .add = add,
    .row_stats = row_stats,
    .row_losses = row_losses,
    .loss_gradient = loss_gradient,
    .finish = finish,
    .squares = squares,
    .adamw = adamw,
    .sgd = sgd,
};
