/* The device ops on the CPU's streams, by the kernels of this host's instruction set: what runs the
 * device's way of a forward pass where there is no other device, and what the others are compared
 * with. Serial: the plain CPU path (worker/model/llama.c) is the fast one. */
#include "kernels/device/cpu.h"
#include "kernels/device/ops.h"

#include "kernels/kernels.h"

#include <string.h>

static const Kernels *kernels(void)
{
    return kernels_get(kernels_best_isa());
}

static bool has_weight(Dtype type)
{
    return type < DTYPE_LIMIT && kernels()->matmul[type] != NULL;
}

static bool has_kv(KvType type, uint32_t head_size)
{
    return type < KV_TYPE_LIMIT && kernels()->attention[type] != NULL && head_size <= 256;
}

static size_t aligned(size_t n)
{
    return (n + 63) & ~(size_t)63;
}

/* The product's: activations of the widest kind, then one output. */
static size_t matmul_bytes(uint32_t rows, uint32_t n_in, uint32_t n_out)
{
    size_t act = 0;
    for (int kind = 0; kind < ACT_KIND_LIMIT; kind++) {
        act = MAX(act, act_bytes((ActKind)kind, rows, n_in));
    }
    return aligned(act) + aligned(sizeof(float) * (size_t)rows * n_out);
}

/* Attention's: scratch of a group of heads, then two lists of blocks. */
static size_t attention_bytes(uint32_t n_heads, uint32_t head_size, uint32_t max_keys)
{
    const size_t blocks = (max_keys + KV_BLOCK - 1) / KV_BLOCK;
    return aligned(sizeof(float) * attention_scratch_floats(n_heads, head_size)) +
           aligned(2 * blocks * sizeof(void *));
}

static size_t workspace_bytes(const DeviceLimits *l)
{
    return MAX(matmul_bytes(l->max_rows, l->widest_in, l->widest_out),
               attention_bytes(l->n_heads, l->head_size, l->max_keys));
}

/* ---- embedding and norms ---- */

typedef struct EmbedArgs {
    PackedMatrix w;
    const uint32_t *tokens;
    uint32_t first_id, n_rows;
    float *x;
} EmbedArgs;

static void run_embed(void *user)
{
    const EmbedArgs *a = user;
    for (uint32_t r = 0; r < a->n_rows; r++) {
        float *x = a->x + (size_t)r * a->w.n_in;
        const uint32_t row = a->tokens[r] - a->first_id;
        if (a->tokens[r] >= a->first_id && row < a->w.n_out) {
            packed_get_row(&a->w, row, x);
        } else {
            memset(x, 0, sizeof(float) * a->w.n_in);
        }
    }
}

static DeviceStatus embed(DeviceStream *stream, const PackedMatrix *w, const uint32_t *tokens,
                          uint32_t first_id, uint32_t n_rows, float *x)
{
    const EmbedArgs args = {*w, tokens, first_id, n_rows, x};
    return device_cpu_enqueue(stream, run_embed, &args, sizeof args);
}

typedef struct NormArgs {
    const float *x, *weight;
    const uint32_t *index; /* or NULL */
    float eps;
    uint32_t width, n_rows;
    float *out;
} NormArgs;

static void run_norm(void *user)
{
    const NormArgs *a = user;
    for (uint32_t r = 0; r < a->n_rows; r++) {
        const size_t from = a->index != NULL ? a->index[r] : r;
        kernels()->rms_norm(a->x + from * a->width, a->weight, a->eps, a->width,
                            a->out + (size_t)r * a->width);
    }
}

static DeviceStatus rms_norm_rows(DeviceStream *stream, const float *x, const uint32_t *index,
                                  const float *weight, float eps, uint32_t width, uint32_t n_rows,
                                  float *out)
{
    const NormArgs args = {x, weight, index, eps, width, n_rows, out};
    return device_cpu_enqueue(stream, run_norm, &args, sizeof args);
}

static DeviceStatus rms_norm(DeviceStream *stream, const float *x, const float *weight, float eps,
                             uint32_t width, uint32_t n_rows, float *out)
{
    return rms_norm_rows(stream, x, NULL, weight, eps, width, n_rows, out);
}

/* ---- products ---- */

typedef struct MatmulTask {
    PackedMatrix w;
    DeviceMatmul m;
} MatmulTask;

static void quantise(const DeviceMatmul *m, const PackedMatrix *w)
{
    kernels()->act_quantise[act_kind_of(w->type)](m->x, m->x_ld, m->rows, 0, m->rows, w->n_in,
                                                  m->workspace);
}

static void run_matmul(void *user)
{
    const MatmulTask *t = user;
    const DeviceMatmul *m = &t->m;
    const size_t act = aligned(act_bytes(act_kind_of(t->w.type), m->rows, t->w.n_in));
    float *product = (float *)(void *)((uint8_t *)m->workspace + act);
    const MatmulUnit unit = {.n_in = t->w.n_in, .step = {.n_merges = 0, .emit = 1}};
    const MatmulArgs args = {.w = &t->w,
                             .act = m->workspace,
                             .rows = m->rows,
                             .units = &unit,
                             .n_units = 1,
                             .out = m->accumulate ? product : m->out,
                             .ld = m->accumulate ? t->w.n_out : m->out_ld,
                             .panel1 = (t->w.n_out + PANEL_ROWS - 1) / PANEL_ROWS};
    if (!m->same_x) {
        quantise(m, &t->w);
    }
    kernels()->matmul[t->w.type](&args);
    for (uint32_t r = 0; r < m->rows; r++) {
        float *out = m->out + r * m->out_ld;
        if (m->accumulate) {
            kernels()->add(out, product + (size_t)r * t->w.n_out, t->w.n_out);
        }
        if (m->bias != NULL) {
            kernels()->add(out, m->bias, t->w.n_out);
        }
    }
}

static DeviceStatus matmul(DeviceStream *stream, const DeviceMatmul *m)
{
    const MatmulTask task = {*m->w, *m};
    if (!has_weight(m->w->type) ||
        m->workspace_bytes < matmul_bytes(m->rows, m->w->n_in, m->w->n_out)) {
        return DEVICE_UNSUPPORTED;
    }
    return device_cpu_enqueue(stream, run_matmul, &task, sizeof task);
}

/* ---- attention ---- */

static uint8_t *block_at(const DeviceKv *kv, uint32_t page, uint32_t layer, uint32_t head)
{
    return kv->memory + page * kv->page_bytes +
           ((size_t)layer * kv->n_heads + head) * 2 * kv->block_bytes;
}

typedef struct RopeTask {
    DeviceRows rows;
    DeviceRope a;
} RopeTask;

static void run_rope(void *user)
{
    const RopeTask *t = user;
    const DeviceRope *a = &t->a;
    const uint32_t hd = a->head_size, half = a->dims / 2;
    for (uint32_t r = 0; r < t->rows.n_rows; r++) {
        const uint32_t position = t->rows.positions[r];
        const float *cos = a->cos + (size_t)position * half,
                    *sin = a->sin + (size_t)position * half;
        float *q = a->q + (size_t)r * a->n_heads * hd, *k = a->k + (size_t)r * a->kv.n_heads * hd;
        const float *v = a->v + (size_t)r * a->kv.n_heads * hd;
        const uint32_t page =
            t->rows.pages[(size_t)t->rows.tables[r] * t->rows.pages_ld + position / KV_BLOCK];
        kernels()->rope_apply(q, a->n_heads, hd, a->dims, a->pairing, cos, sin);
        kernels()->rope_apply(k, a->kv.n_heads, hd, a->dims, a->pairing, cos, sin);
        for (uint32_t h = 0; h < a->kv.n_heads; h++) {
            uint8_t *block = block_at(&a->kv, page, a->layer, h);
            kernels()->kv_write[a->kv.type](k + h * hd, v + h * hd, hd, position % KV_BLOCK, block,
                                            block + a->kv.block_bytes);
        }
    }
}

static DeviceStatus rope_store(DeviceStream *stream, const DeviceRows *rows, const DeviceRope *args)
{
    const RopeTask task = {*rows, *args};
    return device_cpu_enqueue(stream, run_rope, &task, sizeof task);
}

typedef struct AttentionTask {
    DeviceRows rows;
    DeviceAttention a;
} AttentionTask;

/* The rows of a segment for the query heads that share one KV head. */
static void attend_group(const AttentionTask *t, const DeviceSegment *g, uint32_t kv)
{
    const DeviceAttention *a = &t->a;
    const uint32_t first = MAX((a->kv_first + kv) * a->heads_per_kv, a->head_first),
                   last = MIN((a->kv_first + kv + 1) * a->heads_per_kv, a->head_first + a->n_heads);
    const uint32_t n_keys = g->position + g->n_rows, n_blocks = (n_keys + KV_BLOCK - 1) / KV_BLOCK;
    float *scratch = a->workspace;
    const uint8_t **k_blocks =
        (const uint8_t **)(void *)((uint8_t *)a->workspace +
                                   aligned(sizeof(float) *
                                           attention_scratch_floats(a->n_heads, a->head_size)));
    const uint8_t **v_blocks = k_blocks + n_blocks;
    for (uint32_t b = 0; b < n_blocks; b++) {
        const uint32_t page = t->rows.pages[(size_t)g->table * t->rows.pages_ld + b];
        k_blocks[b] = block_at(&a->kv, page, a->layer, kv);
        v_blocks[b] = k_blocks[b] + a->kv.block_bytes;
    }
    const size_t ld = (size_t)a->n_heads * a->head_size,
                 at = g->row0 * ld + (size_t)(first - a->head_first) * a->head_size;
    const AttentionArgs args = {.q = a->q + at,
                                .q_ld = ld,
                                .out = a->out + at,
                                .out_ld = ld,
                                .n_rows = g->n_rows,
                                .first_position = g->position,
                                .n_q = last - first,
                                .head_size = a->head_size,
                                .scale = a->scale,
                                .window = a->window,
                                .causal = true,
                                .n_keys = n_keys,
                                .k_blocks = k_blocks,
                                .v_blocks = v_blocks,
                                .scratch = scratch};
    kernels()->attention[a->kv.type](&args);
}

static void run_attention(void *user)
{
    const AttentionTask *t = user;
    for (uint32_t s = 0; s < t->rows.n_segments; s++) {
        for (uint32_t kv = 0; kv < t->a.kv.n_heads; kv++) {
            attend_group(t, &t->rows.segments[s], kv);
        }
    }
}

static DeviceStatus attention(DeviceStream *stream, const DeviceRows *rows,
                              const DeviceAttention *args)
{
    const AttentionTask task = {*rows, *args};
    if (!has_kv(args->kv.type, args->head_size) ||
        args->workspace_bytes < attention_bytes(args->n_heads, args->head_size, rows->max_keys)) {
        return DEVICE_UNSUPPORTED;
    }
    return device_cpu_enqueue(stream, run_attention, &task, sizeof task);
}

/* ---- element-wise ---- */

typedef struct PairArgs {
    const float *a, *b;
    float *out;
    size_t n;
} PairArgs;

static void run_swiglu(void *user)
{
    const PairArgs *p = user;
    for (size_t i = 0; i < p->n; i += 1u << 30) {
        kernels()->swiglu(p->a + i, p->b + i, (uint32_t)MIN(p->n - i, 1u << 30), p->out + i);
    }
}

static DeviceStatus swiglu(DeviceStream *stream, const float *gate, const float *up, uint32_t rows,
                           uint32_t n, float *out)
{
    const PairArgs args = {gate, up, out, (size_t)rows * n};
    return device_cpu_enqueue(stream, run_swiglu, &args, sizeof args);
}

static void run_add(void *user)
{
    const PairArgs *p = user;
    kernels()->add(p->out, p->b, p->n);
}

static DeviceStatus add(DeviceStream *stream, float *x, const float *y, uint32_t rows, uint32_t n)
{
    const PairArgs args = {NULL, y, x, (size_t)rows * n};
    return device_cpu_enqueue(stream, run_add, &args, sizeof args);
}

const DeviceOps device_cpu_ops = {
    .abi = DEVICE_ABI,
    .bytes = sizeof(DeviceOps),
    .has_weight = has_weight,
    .has_kv = has_kv,
    .workspace_bytes = workspace_bytes,
    .embed = embed,
    .rms_norm = rms_norm,
    .rms_norm_rows = rms_norm_rows,
    .matmul = matmul,
    .rope_store = rope_store,
    .attention = attention,
    .swiglu = swiglu,
    .add = add,
};

const DeviceModule *device_module_cpu(void)
{
    static const DeviceModule module = {.abi = DEVICE_ABI,
                                        .bytes = sizeof(DeviceModule),
                                        .version = "cpu",
                                        .api = &device_cpu_api,
                                        .ops = &device_cpu_ops,
                                        .group = &device_cpu_group};
    return &module;
}
