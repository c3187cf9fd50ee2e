/* The ends of a training pass (embedding, head, loss) and its buffers; the layers are the
 * families'. */
#include "worker/model/training_pass.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"

#include <math.h>
#include <string.h>

/* ---- embedding ---- */

static void embed(Pass *p)
{
    Training *m = p->m;
    const float *table = weight(p, ROLE_TOKEN_EMBD, -1),
                *positions = weight(p, ROLE_POSITION_EMBD, -1);
    uint32_t first, last;
    pool_share(p->rows, 1, p->t, p->n_threads, &first, &last);
    float *out = m->o.spec->n_layers > 0 ? m->tape[0].x : m->x;
    for (uint32_t r = first; r < last; r++) {
        float *x = out + (size_t)r * m->width;
        memcpy(x, table + (size_t)p->batch->tokens[r] * m->width, m->width * sizeof(float));
        if (positions != NULL) {
            m->o.kernels->add(x, positions + (size_t)(r % p->batch->length) * m->width, m->width);
        }
    }
}

/* Rows in order; threads share the channels (NUMERICS 16). */
static void embed_backward(Pass *p)
{
    Training *m = p->m;
    float *table = p->g->lookup != NULL ? p->g->lookup : gradient(p, ROLE_TOKEN_EMBD, -1);
    float *positions = gradient(p, ROLE_POSITION_EMBD, -1);
    uint32_t first, last;
    pool_share(m->width, 16, p->t, p->n_threads, &first, &last);
    for (uint32_t r = 0; first < last && r < p->rows; r++) {
        const float *dx = m->dx + (size_t)r * m->width + first;
        const size_t id = p->batch->tokens[r], position = r % p->batch->length;
        m->o.kernels->add(table + id * m->width + first, dx, last - first);
        if (positions != NULL) {
            m->o.kernels->add(positions + position * m->width + first, dx, last - first);
        }
    }
}

/* ---- head and loss ---- */

static void row_loss(Pass *p, uint32_t r)
{
    Training *m = p->m;
    const float *z = m->logits + (size_t)r * m->vocab;
    const uint32_t target = p->batch->targets[r];
    float *max = m->row_max + (size_t)r * m->n_chunks, *sum = m->row_sum + (size_t)r * m->n_chunks;
    bool finite = true;
    for (uint32_t c = 0; c < m->n_chunks; c++) {
        const uint32_t at = c * VOCAB_CHUNK;
        finite &=
            m->o.kernels->chunk_stats(z + at, MIN(VOCAB_CHUNK, m->vocab - at), &max[c], &sum[c]);
    }
    chunk_stats_merge(max, sum, m->n_chunks);
    p->losses[r] = !finite                 ? NAN
                   : target == TARGET_NONE ? 0.0f
                                           : xent_loss(max[0], sum[0], z[target]);
}

static void head(Pass *p)
{
    Training *m = p->m;
    uint32_t first, last;
    pass_norm(p, m->x, weight(p, ROLE_OUTPUT_NORM, -1), weight(p, ROLE_OUTPUT_NORM_BIAS, -1),
              m->head_in);
    meet(p);
    pass_linear(p, m->head_in, m->width,
                (const Linear[]){{parameters_head(m->o.weights), m->vocab, m->logits}}, 1);
    meet(p);
    pool_share(p->rows, 1, p->t, p->n_threads, &first, &last);
    for (uint32_t r = first; r < last; r++) {
        row_loss(p, r);
    }
}

/* Logits become their gradient; dx that of the last layer's result. */
static void head_backward(Pass *p)
{
    Training *m = p->m;
    uint32_t first, last;
    size_t n;
    pool_share(p->rows, 1, p->t, p->n_threads, &first, &last);
    for (uint32_t r = first; r < last; r++) {
        float *z = m->logits + (size_t)r * m->vocab;
        const size_t at = (size_t)r * m->n_chunks;
        const bool none = p->batch->targets[r] == TARGET_NONE;
        m->o.kernels->train.xent_backward(z, m->vocab, m->row_max[at], m->row_sum[at],
                                          none ? XENT_NO_TARGET : p->batch->targets[r],
                                          none ? 0.0f : p->factor, z);
    }
    const size_t own = pass_own_rows(p, m->width, &n);
    memset(m->dx + own, 0, n * sizeof(float));
    meet(p);
    GemmSegment *segments = m->segments[p->t];
    const float *w = parameters_head(m->o.weights);
    pool_share(m->width, 48, p->t, p->n_threads, &first, &last);
    for (uint32_t c = 0; c < m->n_chunks; c++) {
        const uint32_t at = c * VOCAB_CHUNK;
        segments[c] = (GemmSegment){.a = m->logits + at,
                                    .a_row = m->vocab,
                                    .a_step = 1,
                                    .b = w + (size_t)at * m->width + first,
                                    .b_step = m->width,
                                    .b_column = 1,
                                    .length = MIN(VOCAB_CHUNK, m->vocab - at),
                                    .step = m->chunk_steps[c]};
    }
    if (first < last) {
        const GemmArgs args = {.m = p->rows,
                               .n = last - first,
                               .segments = segments,
                               .n_segments = m->n_chunks,
                               .c = m->dh + first,
                               .ld = m->width,
                               .scratch = m->scratch[p->t]};
        m->o.kernels->train.gemm(&args);
    }
    pass_linear_dw(p,
                   (const LinearGradient[]){
                       {m->logits, m->vocab, m->head_in, m->width, parameters_head(p->g)}},
                   1);
    meet(p);
    pass_norm_backward(p, m->x, weight(p, ROLE_OUTPUT_NORM, -1), gradient(p, ROLE_OUTPUT_NORM, -1),
                       gradient(p, ROLE_OUTPUT_NORM_BIAS, -1));
    meet(p);
}

/* ---- the passes ---- */

static void forward_region(void *user, unsigned t, unsigned n_threads)
{
    Pass p = *(const Pass *)user;
    p.t = t;
    p.n_threads = n_threads;
    embed(&p);
    meet(&p);
    (p.m->o.spec->family == FAMILY_GPT2 ? gpt2_forward : llama_training_forward)(&p);
    head(&p);
}

static void backward_region(void *user, unsigned t, unsigned n_threads)
{
    Pass p = *(const Pass *)user;
    p.t = t;
    p.n_threads = n_threads;
    head_backward(&p);
    (p.m->o.spec->family == FAMILY_GPT2 ? gpt2_backward : llama_training_backward)(&p);
    embed_backward(&p);
}

static uint32_t rows_of(const Training *t, const TrainBatch *batch)
{
    g_assert(batch->length == t->o.length && batch->n_sequences <= t->o.max_sequences);
    return batch->n_sequences * batch->length;
}

void training_forward(Training *t, const TrainBatch *batch, float *losses)
{
    Pass p = {.m = t, .batch = batch, .losses = losses, .rows = rows_of(t, batch)};
    if (p.rows > 0) {
        pool_run(t->o.pool, forward_region, &p);
    }
}

void training_backward(Training *t, const TrainBatch *batch, float factor, Parameters *gradients)
{
    Pass p = {.m = t, .batch = batch, .g = gradients, .factor = factor, .rows = rows_of(t, batch)};
    if (p.rows > 0) {
        pool_run(t->o.pool, backward_region, &p);
    }
}

const float *training_logits(const Training *t)
{
    return t->logits;
}

size_t training_bytes(const Training *t)
{
    return t->arena_bytes;
}

/* ---- buffers ---- */

static float *carve(Training *t, size_t *used, size_t n)
{
    float *at = t->arena == NULL ? NULL : t->arena + *used;
    *used += (n + 15) / 16 * 16;
    return at;
}

static size_t scratch_floats(const Training *t)
{
    const ModelSpec *spec = t->o.spec;
    const uint32_t group = spec->n_heads / spec->n_kv_heads, length = t->o.length;
    const size_t pages =
        2 * (size_t)((length + KV_BLOCK - 1) / KV_BLOCK) * KV_BLOCK * spec->head_size;
    const uint32_t units = MAX(MAX(t->attn_units.n, t->ffn_units.n), t->n_chunks);
    const size_t forward = pages + attention_scratch_floats(group, spec->head_size),
                 backward = attention_backward_scratch_floats(length, spec->head_size, group);
    return MAX(MAX(forward, backward), gemm_scratch_floats(units));
}

/* Lays the buffers out: counts them when there is no arena yet. */
static size_t lay_out(Training *t)
{
    const ModelSpec *spec = t->o.spec;
    const size_t rows = t->max_rows, wide = rows * t->width, q = rows * t->q_width,
                 kv = rows * t->kv_width, ffn = rows * t->ffn_width,
                 table = (size_t)t->o.length * spec->rope.dims / 2;
    size_t used = 0;
    for (uint32_t l = 0; l < spec->n_layers; l++) {
        t->tape[l] = (Tape){.x = carve(t, &used, wide),
                            .attn_in = carve(t, &used, wide),
                            .q = carve(t, &used, q),
                            .attn = carve(t, &used, q),
                            .k = carve(t, &used, kv),
                            .v = carve(t, &used, kv),
                            .mid = carve(t, &used, wide),
                            .ffn_in = carve(t, &used, wide),
                            .gate = spec->family == FAMILY_GPT2 ? NULL : carve(t, &used, ffn),
                            .up = carve(t, &used, ffn),
                            .act = carve(t, &used, ffn)};
    }
    float **const buffers[] = {&t->x, &t->head_in, &t->sum, &t->dx, &t->dh};
    for (size_t i = 0; i < G_N_ELEMENTS(buffers); i++) {
        *buffers[i] = carve(t, &used, wide);
    }
    t->logits = carve(t, &used, rows * t->vocab);
    t->row_max = carve(t, &used, rows * t->n_chunks);
    t->row_sum = carve(t, &used, rows * t->n_chunks);
    t->dq = carve(t, &used, q);
    t->dk = carve(t, &used, kv);
    t->dv = carve(t, &used, kv);
    t->dact = carve(t, &used, ffn);
    t->stats = carve(t, &used, 2 * rows);
    t->cos = carve(t, &used, table);
    t->sin = carve(t, &used, table);
    t->sin_back = carve(t, &used, table);
    for (unsigned i = 0; i < pool_threads(t->o.pool); i++) {
        t->scratch[i] = carve(t, &used, scratch_floats(t));
    }
    return used;
}

static void fill_units(Units *units, uint32_t n, uint32_t size, uint32_t total)
{
    units->n = n;
    for (uint32_t u = 0; u <= n; u++) {
        units->first[u] = (uint32_t)MIN((uint64_t)u * size, total);
    }
    tree_program(n, 0, n, units->steps);
}

/* By thread 0 of a region: its floating-point modes are known. */
static void fill_tables(void *user, unsigned thread, unsigned n_threads)
{
    Training *t = user;
    const ModelSpec *spec = t->o.spec;
    if (thread == 0 && spec->rope.dims > 0) {
        const size_t n = (size_t)t->o.length * spec->rope.dims / 2;
        rope_table(&spec->rope, NULL, 0, t->o.length, t->cos, t->sin);
        for (size_t i = 0; i < n; i++) {
            t->sin_back[i] = -t->sin[i];
        }
    }
}

static bool check(const TrainingOptions *o, GError **error)
{
    const ModelSpec *spec = o->spec;
    const uint32_t group = spec->n_heads / spec->n_kv_heads;
    const char *what = NULL;
    if (o->length < 1 || o->length > spec->context) {
        what = "the length of a sequence must be 1 to the model's context";
    } else if (o->max_sequences < 1 || (uint64_t)o->max_sequences * o->length > 1u << 24) {
        what = "a micro-batch has 1 to 16,777,216 tokens; choose smaller micro-batches";
    } else if (spec->window != 0) {
        what = "windows of attention are not trainable; choose a model without";
    } else if (group > TREE_LEAVES_LIMIT || spec->n_vocab_chunks > 1u << GEMM_LEVELS) {
        what = "too many query heads share a KV head, or the vocabulary is too large";
    }
    if (what != NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "model %s cannot be trained with %u sequences of %u tokens (context %u): %s",
                    spec->name, o->max_sequences, o->length, spec->context, what);
    }
    return what == NULL;
}

static bool allocate(Training *t, GError **error)
{
    const unsigned threads = pool_threads(t->o.pool);
    const uint32_t n_blocks = (t->o.length + KV_BLOCK - 1) / KV_BLOCK;
    const size_t n_segments = MAX(3 * TREE_LEAVES_LIMIT, t->n_chunks);
    t->tape = weft_alloc(t->o.spec->n_layers, sizeof *t->tape, "tape", error);
    t->chunk_steps = weft_alloc(t->n_chunks, sizeof *t->chunk_steps, "a tree", error);
    t->scratch = weft_alloc(threads, sizeof *t->scratch, "scratch", error);
    t->segments = weft_alloc(threads, sizeof *t->segments, "segments", error);
    t->pages = weft_alloc(threads, sizeof *t->pages, "page pointers", error);
    if (t->tape == NULL || t->chunk_steps == NULL || t->scratch == NULL || t->segments == NULL ||
        t->pages == NULL) {
        return false;
    }
    for (unsigned i = 0; i < threads; i++) {
        t->segments[i] = weft_alloc(n_segments, sizeof **t->segments, "segments", error);
        t->pages[i] = weft_alloc(2 * (size_t)n_blocks, sizeof **t->pages, "page pointers", error);
        if (t->segments[i] == NULL || t->pages[i] == NULL) {
            return false;
        }
    }
    gemm_whole_tree(t->n_chunks, t->chunk_steps);
    t->arena_bytes = lay_out(t) * sizeof(float);
    t->arena = weft_map(t->arena_bytes, "training buffers", error);
    return t->arena != NULL;
}

Training *training_new(const TrainingOptions *options, GError **error)
{
    const ModelSpec *spec = options->spec;
    if (!check(options, error)) {
        return NULL;
    }
    g_autoptr(Training) t = g_new0(Training, 1);
    t->o = *options;
    t->max_rows = options->max_sequences * options->length;
    t->width = spec->width;
    t->q_width = spec->n_heads * spec->head_size;
    t->kv_width = spec->n_kv_heads * spec->head_size;
    t->ffn_width = spec->ffn_width;
    t->vocab = spec->vocab_size;
    t->n_chunks = spec->n_vocab_chunks;
    fill_units(&t->attn_units, spec->n_attn_units, spec->attn_unit_heads * spec->head_size,
               t->q_width);
    fill_units(&t->ffn_units, spec->n_ffn_units, spec->ffn_unit_width, t->ffn_width);
    tree_program(spec->n_heads / spec->n_kv_heads, 0, spec->n_heads / spec->n_kv_heads,
                 t->head_steps);
    if (!allocate(t, error)) {
        return NULL;
    }
    lay_out(t);
    pool_run(t->o.pool, fill_tables, t);
    return g_steal_pointer(&t);
}

void training_free(Training *t)
{
    if (t == NULL) {
        return;
    }
    for (unsigned i = 0; i < pool_threads(t->o.pool); i++) {
        if (t->segments != NULL) {
            weft_free(t->segments[i]);
        }
        if (t->pages != NULL) {
            weft_free(t->pages[i]);
        }
    }
    if (t->arena != NULL) {
        weft_unmap(t->arena, t->arena_bytes);
    }
    weft_free(t->pages);
    weft_free(t->segments);
    weft_free(t->scratch);
    weft_free(t->chunk_steps);
    weft_free(t->tape);
    g_free(t);
}
