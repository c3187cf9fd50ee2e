/* The device ops on the CPU's streams, by the kernels of this host's instruction set: what runs the
 * device's way of a forward pass where there is no other device, and what the others are compared
 * with. Both classes are one here: the CPU's bits. Serial: the plain CPU path is the fast one. */
#include "kernels/device/cpu.h"
#include "kernels/device/ops.h"

#include "kernels/kernels.h"
#include "proto/base/crc32c.h"
#include "proto/base/hash.h"

#include <math.h>
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

/* Attention's: scratch of a group of heads, then two lists of blocks. */
static size_t attention_bytes(uint32_t n_heads, uint32_t head_size, uint32_t max_keys)
{
    const size_t blocks = (max_keys + KV_BLOCK - 1) / KV_BLOCK;
    return aligned(sizeof(float) * attention_scratch_floats(n_heads, head_size)) +
           aligned(2 * blocks * sizeof(void *));
}

/* ---- embedding and norms ---- */

typedef struct EmbedArgs {
    PackedMatrix w;
    const uint32_t *ids;
    uint32_t first_id, n_rows;
    bool accumulate;
    float *x;
} EmbedArgs;

static void run_embed(void *user)
{
    const EmbedArgs *a = user;
    const uint32_t n = a->w.n_in;
    float *row = g_new(float, n);
    for (uint32_t r = 0; r < a->n_rows; r++) {
        float *x = a->x + (size_t)r * n;
        const uint32_t id = a->ids[r] - a->first_id; /* an id below wraps: not there */
        memset(row, 0, sizeof(float) * n);
        if (id < a->w.n_out) {
            packed_get_row(&a->w, id, row);
        }
        if (a->accumulate) {
            kernels()->add(x, row, n);
        } else {
            memcpy(x, row, sizeof(float) * n);
        }
    }
    g_free(row);
}

static DeviceStatus embed(DeviceStream *stream, const PackedMatrix *w, const uint32_t *ids,
                          uint32_t first_id, uint32_t n_rows, bool accumulate, float *x)
{
    const EmbedArgs args = {*w, ids, first_id, n_rows, accumulate, x};
    return device_cpu_enqueue(stream, run_embed, &args, sizeof args);
}

static void run_norm(void *user)
{
    const DeviceNorm *a = user;
    for (uint32_t r = 0; r < a->n_rows; r++) {
        const float *x = a->x + (size_t)(a->index != NULL ? a->index[r] : r) * a->width;
        float *out = a->out + (size_t)r * a->width;
        if (a->bias != NULL) {
            kernels()->train.layer_norm(x, a->weight, a->bias, a->eps, a->width, out);
        } else {
            kernels()->rms_norm(x, a->weight, a->eps, a->width, out);
        }
    }
}

static DeviceStatus norm(DeviceStream *stream, const DeviceNorm *args)
{
    return device_cpu_enqueue(stream, run_norm, args, sizeof *args);
}

/* ---- products ---- */

typedef struct MatmulTask {
    PackedMatrix w;
    DeviceMatmul m;
    MatmulUnit units[TREE_LEAVES_LIMIT];
} MatmulTask;

static void quantise(const DeviceMatmul *m, const PackedMatrix *w)
{
    kernels()->act_quantise[act_kind_of(w->type)](m->x, m->x_ld, m->rows, 0, m->rows, w->n_in,
                                                  m->workspace);
}

/* What is added to a product goes where generic's order has it: old + (W x + bias). */
static void finish_product(const MatmulTask *t, float *product, size_t ld)
{
    const DeviceMatmul *m = &t->m;
    for (uint32_t r = 0; r < m->rows; r++) {
        float *row = product + r * ld;
        if (m->bias != NULL) {
            kernels()->add(row, m->bias, t->w.n_out);
        }
        if (m->gelu) {
            kernels()->train.gelu(row, t->w.n_out, row);
        }
        if (m->accumulate) {
            kernels()->add(m->out + r * m->out_ld, row, t->w.n_out);
        }
    }
}

static void run_matmul(void *user)
{
    const MatmulTask *t = user;
    const DeviceMatmul *m = &t->m;
    g_autofree float *aside = m->accumulate ? g_new(float, (size_t)m->rows * t->w.n_out) : NULL;
    float *product = aside != NULL ? aside : m->out;
    const size_t ld = aside != NULL ? t->w.n_out : m->out_ld;
    const MatmulArgs args = {.w = &t->w,
                             .act = m->workspace,
                             .rows = m->rows,
                             .units = t->units,
                             .n_units = MAX(m->n_units, 1u),
                             .out = product,
                             .ld = ld,
                             .subtree_stride = m->subtree_stride,
                             .panel1 = (t->w.n_out + PANEL_ROWS - 1) / PANEL_ROWS};
    if (!m->same_x) {
        quantise(m, &t->w);
    }
    kernels()->matmul[t->w.type](&args);
    finish_product(t, product, ld);
}

static DeviceStatus matmul(DeviceStream *stream, const DeviceMatmul *m)
{
    MatmulTask task = {*m->w, *m, {{.n_in = m->w->n_in, .step = {.n_merges = 0, .emit = 1}}}};
    if (!has_weight(m->w->type) || m->n_units > TREE_LEAVES_LIMIT ||
        m->workspace_bytes < act_bytes(act_kind_of(m->w->type), m->rows, m->w->n_in)) {
        return DEVICE_UNSUPPORTED;
    }
    memcpy(task.units, m->n_units > 0 ? m->units : task.units,
           sizeof(MatmulUnit) * MAX(m->n_units, 1u));
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
        const float *cos = half > 0 ? a->cos + (size_t)position * half : NULL,
                    *sin = half > 0 ? a->sin + (size_t)position * half : NULL;
        float *q = a->q + (size_t)r * a->n_heads * hd, *k = a->k + (size_t)r * a->kv.n_heads * hd;
        const float *v = a->v + (size_t)r * a->kv.n_heads * hd;
        const uint32_t page =
            t->rows.pages[(size_t)t->rows.tables[r] * t->rows.pages_ld + position / KV_BLOCK];
        if (a->dims > 0) {
            kernels()->rope_apply(q, a->n_heads, hd, a->dims, a->pairing, cos, sin);
            kernels()->rope_apply(k, a->kv.n_heads, hd, a->dims, a->pairing, cos, sin);
        }
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

typedef struct RowsArgs {
    const float *bias; /* of a row */
    uint32_t rows, n;
    float *out;
} RowsArgs;

static void run_add_bias(void *user)
{
    const RowsArgs *a = user;
    for (uint32_t r = 0; r < a->rows; r++) {
        kernels()->add(a->out + (size_t)r * a->n, a->bias, a->n);
    }
}

static DeviceStatus add_bias(DeviceStream *stream, float *x, const float *bias, uint32_t rows,
                             uint32_t n)
{
    const RowsArgs args = {bias, rows, n, x};
    return device_cpu_enqueue(stream, run_add_bias, &args, sizeof args);
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

/* ---- sampling ---- */

/* True if a comes before b: larger value, then lower id. */
static bool before(const DeviceCandidate *a, const DeviceCandidate *b)
{
    return a->value > b->value || (a->value == b->value && a->id < b->id);
}

/* Into the n best so far, at most `limit`; returns their number. */
static uint32_t keep_best(DeviceCandidate *best, uint32_t n, uint32_t limit, DeviceCandidate c)
{
    uint32_t at = n;
    while (at > 0 && before(&c, &best[at - 1])) {
        at--;
    }
    if (at == limit) {
        return n;
    }
    const uint32_t stays = MIN(n, limit - 1);
    memmove(best + at + 1, best + at, sizeof *best * (stays - at));
    best[at] = c;
    return stays + 1;
}

/* Values of one chunk: tempered, with noise where the row's token is drawn with it. */
static void chunk_values(const DeviceDraw *draw, const float *logits, uint32_t first_id, uint32_t n,
                         float *values, DeviceChunk *chunk)
{
    float noise[VOCAB_CHUNK];
    memcpy(values, logits, sizeof(float) * n);
    if (draw->temperature == 0.0f) {
        return;
    }
    for (uint32_t i = 0; i < n; i++) {
        values[i] = values[i] / draw->temperature;
    }
    if (!kernels()->chunk_stats(values, n, &chunk->tempered_m, &chunk->tempered_l)) {
        chunk->tempered_m = chunk->tempered_l = NAN;
    }
    if (draw->noise != 0) {
        const GumbelKey key = {draw->seed, draw->choice, draw->position, draw->purpose};
        kernels()->gumbel(&key, first_id, n, noise);
        kernels()->add(values, noise, n);
    }
}

static void sample_row(const DeviceSample *s, uint32_t row)
{
    const uint32_t n_chunks = (s->n + VOCAB_CHUNK - 1) / VOCAB_CHUNK;
    const float *logits = s->logits + (size_t)row * s->n;
    DeviceCandidate *best = s->best + (size_t)row * s->keep, *top = s->top + (size_t)row * s->n_top;
    uint32_t n_best = 0, n_top = 0;
    float values[VOCAB_CHUNK];
    for (uint32_t c = 0; c < n_chunks; c++) {
        const uint32_t first = c * VOCAB_CHUNK, n = MIN(VOCAB_CHUNK, s->n - first);
        DeviceChunk *chunk = &s->chunks[(size_t)row * n_chunks + c];
        const Hash128 hash = hash128(logits + first, sizeof(float) * n);
        *chunk = (DeviceChunk){0};
        memcpy(chunk->hash, hash.bytes, sizeof chunk->hash);
        if (!kernels()->chunk_stats(logits + first, n, &chunk->m, &chunk->l)) {
            chunk->m = chunk->l = NAN;
        }
        chunk_values(&s->draws[row], logits + first, s->first_id + first, n, values, chunk);
        for (uint32_t i = 0; i < n; i++) {
            const uint32_t id = s->first_id + first + i;
            const float logit = logits[first + i];
            n_best = keep_best(best, n_best, s->keep, (DeviceCandidate){values[i], logit, id});
            if (s->n_top > 0) {
                n_top = keep_best(top, n_top, s->n_top, (DeviceCandidate){logit, logit, id});
            }
        }
    }
}

static void run_sample(void *user)
{
    const DeviceSample *s = user;
    for (uint32_t r = 0; r < s->n_rows; r++) {
        sample_row(s, r);
    }
}

static DeviceStatus sample(DeviceStream *stream, const DeviceSample *args)
{
    if (args->keep == 0 || args->keep > DEVICE_KEEP_LIMIT || args->n_top > DEVICE_KEEP_LIMIT) {
        return DEVICE_UNSUPPORTED;
    }
    return device_cpu_enqueue(stream, run_sample, args, sizeof *args);
}

/* ---- checksums ---- */

typedef struct ChecksumArgs {
    const void *data;
    size_t n_words;
    uint32_t *out;
} ChecksumArgs;

static void run_checksum(void *user)
{
    const ChecksumArgs *a = user;
    *a->out = crc32c(0, a->data, sizeof(uint32_t) * a->n_words);
}

static DeviceStatus checksum(DeviceStream *stream, const void *data, size_t n_words, uint32_t *out,
                             void *workspace, size_t workspace_bytes)
{
    const ChecksumArgs args = {data, n_words, out};
    (void)workspace;
    (void)workspace_bytes;
    return device_cpu_enqueue(stream, run_checksum, &args, sizeof args);
}

static const DeviceOps device_cpu_ops = {
    .abi = DEVICE_ABI,
    .bytes = sizeof(DeviceOps),
    .has_weight = has_weight,
    .has_kv = has_kv,
    .embed = embed,
    .norm = norm,
    .matmul = matmul,
    .rope_store = rope_store,
    .attention = attention,
    .swiglu = swiglu,
    .add = add,
    .add_bias = add_bias,
    .sample = sample,
    .checksum = checksum,
};

const DeviceModule *device_module_cpu(void)
{
    static const DeviceModule module = {.abi = DEVICE_ABI,
                                        .bytes = sizeof(DeviceModule),
                                        .version = "cpu",
                                        .api = &device_cpu_api,
                                        .ops = &device_cpu_ops,
                                        .group = &device_cpu_group,

                                        .train_ops = &device_cpu_train_ops};
    return &module;
}
