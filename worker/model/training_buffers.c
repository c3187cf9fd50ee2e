/* The buffers of a training pass: their sizes, units and trees. */
#include "worker/model/training_device.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"

/* ---- arena ---- */

enum { DEVICE_LOGITS_ALIGN = 32 }; /* floats: rows that a device's products write fast */

static bool on_device(const TrainingOptions *o)
{
    return o->work != NULL || o->plan_ops != NULL;
}

static float *carve(Training *t, size_t *used, size_t n)
{
    float *at = t->arena == NULL ? NULL : t->arena + *used;
    *used += (n + 15) / 16 * 16;
    return at;
}

static size_t scratch_floats(const Training *t)
{
    const ModelSpec *spec = t->spec;
    const uint32_t group = spec->n_heads / spec->n_kv_heads, length = t->o.length;
    const size_t pages =
        2 * (size_t)((length + KV_BLOCK - 1) / KV_BLOCK) * KV_BLOCK * spec->head_size;
    const uint32_t leaves = MIN(t->o.max_sequences, TREE_LEAVES_LIMIT),
                   units = MAX(MAX(t->attn_units.n, t->ffn_units.n), MAX(t->chunks.n, leaves));
    const size_t forward = pages + attention_scratch_floats(group, spec->head_size),
                 backward = attention_backward_scratch_floats(length, spec->head_size, group);
    return MAX(MAX(forward, backward), gemm_scratch_floats(units));
}

/* What a layer's backward reads but its input: what is always kept with it, unless the whole layer
 * is computed again. */
static void carve_products(Training *t, size_t *used, Tape *tape)
{
    const size_t rows = t->max_rows, kv = rows * t->kv_width, ffn = rows * t->ffn_width;
    tape->q = carve(t, used, rows * t->q_width);
    tape->k = carve(t, used, kv);
    tape->v = carve(t, used, kv);
    tape->mid = carve(t, used, rows * t->width);
    tape->gate = t->spec->family == FAMILY_GPT2 ? NULL : carve(t, used, ffn);
    tape->up = carve(t, used, ffn);
}

/* And what is selected to be computed again. */
static void carve_selected(Training *t, size_t *used, Tape *tape)
{
    const size_t rows = t->max_rows, wide = rows * t->width;
    tape->attn_in = carve(t, used, wide);
    tape->attn = carve(t, used, rows * t->q_width);
    tape->ffn_in = carve(t, used, wide);
    tape->act = carve(t, used, rows * t->ffn_width);
}

static LayerGradients carve_gradients(Training *t, size_t *used)
{
    const size_t rows = t->max_rows, kv = rows * t->kv_width * t->kv_subtrees,
                 wide = t->o.apart ? rows * t->width : 0;
    LayerGradients d = {.dq = carve(t, used, rows * t->q_width),
                        .dact = carve(t, used, rows * t->ffn_width),
                        .dk = carve(t, used, kv),
                        .dv = carve(t, used, kv)};
    if (t->o.apart) {
        d.out = carve(t, used, wide);
        d.mid = carve(t, used, wide);
    }
    return d;
}

static void lay_out_slots(Training *t, size_t *used)
{
    const size_t wide = (size_t)t->max_rows * t->width;
    const Recompute again = t->o.recompute;
    Tape shared = {0}; /* by all layers and slots */
    if (again == RECOMPUTE_FULL) {
        carve_products(t, used, &shared);
    }
    if (again != RECOMPUTE_NONE) {
        carve_selected(t, used, &shared);
    }
    for (uint32_t s = 0; s < t->o.slots; s++) {
        for (uint32_t l = 0; l < t->max_layers; l++) {
            Tape *tape = &t->slots[s].tape[l];
            *tape = shared;
            if (again != RECOMPUTE_FULL) {
                carve_products(t, used, tape);
            }
            if (again == RECOMPUTE_NONE) {
                carve_selected(t, used, tape);
            }
            tape->x = carve(t, used, wide);
            if (t->o.apart) {
                t->slots[s].gradients[l] = carve_gradients(t, used);
            }
        }
        t->slots[s].x = carve(t, used, wide);
    }
}

static uint32_t subtrees_of(const Units *units, const Holding *h)
{
    return tree_subtrees(units->n_leaves, units->cuts[h->rank], units->cuts[h->rank + 1]);
}

static void lay_out_head(Training *t, size_t *used)
{
    const size_t rows = t->max_rows, chunks = rows * t->spec->n_vocab_chunks;
    if (t->h->is_last) {
        t->head_in = carve(t, used, rows * t->width);
        t->logits = carve(t, used, rows * t->logits_ld);
        t->row_max = carve(t, used, chunks);
        t->row_sum = carve(t, used, chunks);
        t->row_target = carve(t, used, rows);
        t->row_total = carve(t, used, t->o.smoothing > 0.0f ? chunks : 0);
    }
}

/* Lays the buffers out: counts them when there is no arena yet. */
static size_t lay_out(Training *t)
{
    const size_t rows = t->max_rows, wide = rows * t->width,
                 table = (size_t)t->o.length * t->spec->rope.dims / 2;
    const bool shares = t->h->tp > 1, device = on_device(&t->o);
    const uint32_t subtrees =
        !shares  ? 0
        : device ? training_device_subtrees(t)
                 : MAX(MAX(subtrees_of(&t->attn_units, t->h), subtrees_of(&t->ffn_units, t->h)),
                       t->h->is_last ? subtrees_of(&t->chunks, t->h) : 0);
    size_t used = 0;
    lay_out_slots(t, &used);
    lay_out_head(t, &used);
    float **const buffers[] = {&t->sum, &t->dx, &t->dh};
    for (size_t i = 0; i < G_N_ELEMENTS(buffers); i++) {
        *buffers[i] = carve(t, &used, wide);
    }
    t->partial = carve(t, &used, subtrees * wide);
    t->gathered = carve(t, &used, shares && device ? training_device_gathered_floats(t) : 0);
    t->exchange = carve(t, &used,
                        !shares  ? 0
                        : device ? training_device_exchange_floats(t)
                                 : exchange_floats(t));
    if (!t->o.apart) {
        t->d = carve_gradients(t, &used);
    }
    t->stats = carve(t, &used, 2 * rows);
    if (t->h->is_first && !on_device(&t->o)) {
        t->first_row = (uint32_t *)carve(t, &used, MAX(t->vocab, t->o.length));
        t->next_row = (uint32_t *)carve(t, &used, rows);
    }
    t->cos = carve(t, &used, table);
    t->sin = carve(t, &used, table);
    t->sin_back = carve(t, &used, table);
    for (unsigned i = 0; i < t->threads && !on_device(&t->o); i++) {
        t->scratch[i] = carve(t, &used, scratch_floats(t));
    }
    return used;
}

/* ---- units and trees ---- */

/* The rank's units of `size` elements of a contraction of `total`. */
static void fill_units(const Training *t, Units *units, const uint32_t *cuts, uint32_t n_leaves,
                       uint32_t size, uint32_t total)
{
    const Holding *h = t->h;
    const uint32_t begin = cuts[h->rank];
    units->n = cuts[h->rank + 1] - begin;
    units->n_leaves = n_leaves;
    units->cuts = cuts;
    for (uint32_t u = 0; u <= units->n; u++) {
        units->first[u] =
            (uint32_t)(MIN((uint64_t)(begin + u) * size, total) - (uint64_t)begin * size);
    }
    if (sums_are_whole(t)) {
        gemm_whole_tree(units->n, units->steps);
    } else {
        tree_program(n_leaves, begin, begin + units->n, units->steps);
    }
}

/* Own KV heads: the trees of their own query heads. */
static void fill_heads(Training *t)
{
    const Holding *h = t->h;
    const uint32_t group = t->spec->n_heads / t->spec->n_kv_heads;
    t->kv_subtrees = 1;
    for (uint32_t i = 0; i < h->n_kv_heads; i++) {
        const uint32_t base = (h->kv_first + i) * group, first = MAX(base, h->head_first) - base,
                       last = MIN(base + group, h->head_first + h->n_heads) - base;
        t->kv_subtrees = MAX(t->kv_subtrees, tree_program(group, first, last, t->head_steps[i]));
    }
}

/* KV heads that the stage's cuts go through. */
static void fill_shared(Training *t)
{
    const ModelSpec *spec = t->spec;
    const uint32_t group = spec->n_heads / spec->n_kv_heads;
    for (uint32_t kv = 0; kv < spec->n_kv_heads; kv++) {
        SharedHead s = {.kv = kv};
        bool cut = false;
        for (uint32_t r = 0; r <= t->h->tp; r++) {
            const uint32_t head = MIN(t->h->attn_cuts[r] * spec->attn_unit_heads, spec->n_heads);
            s.cuts[r] = CLAMP(head, kv * group, (kv + 1) * group) - kv * group;
            cut |= s.cuts[r] > 0 && s.cuts[r] < group;
        }
        if (cut) {
            t->shared[t->n_shared++] = s;
        }
    }
}

static bool fill_trees(Training *t, GError **error)
{
    const ModelSpec *spec = t->spec;
    const Holding *h = t->h;
    fill_units(t, &t->attn_units, h->attn_cuts, spec->n_attn_units,
               spec->attn_unit_heads * spec->head_size, spec->n_heads * spec->head_size);
    fill_units(t, &t->ffn_units, h->ffn_cuts, spec->n_ffn_units, spec->ffn_unit_width,
               spec->ffn_width);
    t->chunks.n = h->vocab_cuts[h->rank + 1] - h->vocab_cuts[h->rank];
    t->chunks.n_leaves = spec->n_vocab_chunks;
    t->chunks.cuts = h->vocab_cuts;
    t->chunk_steps = weft_alloc(MAX(t->chunks.n, 1), sizeof *t->chunk_steps, "a tree", error);
    t->head_steps = weft_alloc(h->n_kv_heads, sizeof *t->head_steps, "trees", error);
    t->shared = weft_alloc(spec->n_kv_heads, sizeof *t->shared, "shared heads", error);
    if (t->chunk_steps == NULL || t->head_steps == NULL || t->shared == NULL) {
        return false;
    }
    if (h->tp == 1 || sums_are_whole(t)) {
        gemm_whole_tree(t->chunks.n, t->chunk_steps);
    } else {
        tree_program(spec->n_vocab_chunks, h->vocab_cuts[h->rank], h->vocab_cuts[h->rank + 1],
                     t->chunk_steps);
    }
    fill_heads(t);
    fill_shared(t);
    return true;
}

static void fill_tables_of_device(Training *t)
{
    const ModelSpec *spec = t->spec;
    const size_t n = (size_t)t->o.length * spec->rope.dims / 2;
    g_autofree float *cos = g_new(float, n), *sin = g_new(float, n);
    rope_table(&spec->rope, NULL, 0, t->o.length, cos, sin);
    training_device_tables(t, cos, sin, n);
}

/* By thread 0 of a region: its floating-point modes are known. */
static void fill_tables(void *user, unsigned thread, unsigned n_threads)
{
    Training *t = user;
    const ModelSpec *spec = t->spec;
    if (thread == 0 && spec->rope.dims > 0 && t->device != NULL) {
        fill_tables_of_device(t);
    } else if (thread == 0 && spec->rope.dims > 0) {
        const size_t n = (size_t)t->o.length * spec->rope.dims / 2;
        rope_table(&spec->rope, NULL, 0, t->o.length, t->cos, t->sin);
        for (size_t i = 0; i < n; i++) {
            t->sin_back[i] = -t->sin[i];
        }
    }
}

/* ---- making ---- */

static bool check(const ModelSpec *spec, const TrainingOptions *o, GError **error)
{
    const uint32_t group = spec->n_heads / spec->n_kv_heads;
    const char *what = NULL;
    if (o->length < 1 || o->length > spec->context) {
        what = "the length of a sequence must be 1 to the model's context";
    } else if (o->max_sequences < 1 || (uint64_t)o->max_sequences * o->length > 1u << 24) {
        what = "a micro-batch has 1 to 16,777,216 tokens; choose smaller micro-batches";
    } else if (o->apart && o->recompute != RECOMPUTE_NONE) {
        what = "what is computed again is not there for gradients of weights apart; choose another "
               "schedule or no recomputation";
    } else if (spec->window != 0) {
        what = "windows of attention are not trainable; choose a model without";
    } else if (group > TREE_LEAVES_LIMIT || spec->n_vocab_chunks > 1u << GEMM_LEVELS) {
        what = "too many query heads share a KV head, or the vocabulary is too large";
    }
    const DeviceTrainOps *ops = o->work != NULL ? o->work->ops : o->plan_ops;
    if (what == NULL && ops != NULL && !ops->has_shape(spec->head_size, group, spec->width)) {
        what = "a device here has no kernels for its heads or width; train it on hosts";
    }
    if (what != NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "model %s cannot be trained with %u sequences of %u tokens (context %u): %s",
                    spec->name, o->max_sequences, o->length, spec->context, what);
    }
    return what == NULL;
}

static bool allocate_slots(Training *t, GError **error)
{
    t->slots = weft_alloc(t->o.slots, sizeof *t->slots, "tapes", error);
    for (uint32_t s = 0; t->slots != NULL && s < t->o.slots; s++) {
        t->slots[s].tape = weft_alloc(t->max_layers, sizeof *t->slots->tape, "tapes", error);
        t->slots[s].gradients =
            weft_alloc(t->max_layers, sizeof *t->slots->gradients, "tapes", error);
        if (t->slots[s].tape == NULL || t->slots[s].gradients == NULL) {
            return false;
        }
    }
    return t->slots != NULL;
}

static bool allocate_threads(Training *t, GError **error)
{
    const unsigned threads = t->threads;
    const uint32_t n_blocks = (t->o.length + KV_BLOCK - 1) / KV_BLOCK;
    const size_t n_segments = MAX(MAX(3 * TREE_LEAVES_LIMIT, t->chunks.n), t->o.max_sequences);
    t->scratch = weft_alloc(threads, sizeof *t->scratch, "scratch", error);
    t->segments = weft_alloc(threads, sizeof *t->segments, "segments", error);
    t->pages = weft_alloc(threads, sizeof *t->pages, "page pointers", error);
    if (t->scratch == NULL || t->segments == NULL || t->pages == NULL) {
        return false;
    }
    for (unsigned i = 0; i < threads; i++) {
        t->segments[i] = weft_alloc(n_segments, sizeof **t->segments, "segments", error);
        t->pages[i] = weft_alloc(2 * (size_t)n_blocks, sizeof **t->pages, "page pointers", error);
        if (t->segments[i] == NULL || t->pages[i] == NULL) {
            return false;
        }
    }
    return true;
}

/* Everything but the arena, whose size is found. */
static bool prepare(Training *t, const Holding *holding, const TrainingOptions *options,
                    unsigned threads, GError **error)
{
    if (!check(holding->spec, options, error)) {
        return false;
    }
    t->o = *options;
    t->o.slots = MAX(options->slots, 1);
    t->h = holding;
    t->spec = holding->spec;
    t->threads = threads;
    for (uint32_t c = 0; c < holding->n_chunks; c++) {
        t->max_layers = MAX(t->max_layers, holding->chunks[c].n_layers);
    }
    t->max_rows = options->max_sequences * options->length;
    t->width = t->spec->width;
    t->q_width = holding->n_heads * t->spec->head_size;
    t->kv_width = holding->n_kv_heads * t->spec->head_size;
    t->ffn_width = holding->ffn_width;
    t->vocab = holding->vocab;
    t->logits_ld = on_device(options) ? (t->vocab + DEVICE_LOGITS_ALIGN - 1) / DEVICE_LOGITS_ALIGN *
                                            DEVICE_LOGITS_ALIGN
                                      : t->vocab;
    t->ops = on_device(options) ? &training_device_ops : &training_host_ops;
    if (!fill_trees(t, error) || !allocate_slots(t, error) || !allocate_threads(t, error)) {
        return false;
    }
    t->arena_bytes = lay_out(t) * sizeof(float);
    return true;
}

Training *training_new(const TrainingOptions *options, GError **error)
{
    const Holding *holding = options->weights->holding;
    g_autoptr(Training) t = g_new0(Training, 1);
    g_assert(holding->tp == 1 || (options->group != NULL && options->group->group != NULL));
    if (!prepare(t, holding, options, pool_threads(options->pool), error)) {
        return NULL;
    }
    t->arena = options->work != NULL
                   ? device_work_alloc(options->work, t->arena_bytes, "training buffers", error)
                   : weft_map(t->arena_bytes, "training buffers", error);
    if (t->arena == NULL || (options->work != NULL && !training_device_new(t, error))) {
        return NULL;
    }
    lay_out(t);
    pool_run(t->o.pool, fill_tables, t);
    return g_steal_pointer(&t);
}

size_t training_plan_bytes(const Holding *holding, const TrainingOptions *options, unsigned threads,
                           GError **error)
{
    g_autoptr(Training) t = g_new0(Training, 1);
    if (!prepare(t, holding, options, threads, error)) {
        return 0;
    }
    return t->arena_bytes +
           (options->plan_ops != NULL ? training_device_bytes(t, options->plan_ops) : 0);
}

void training_free(Training *t)
{
    if (t == NULL) {
        return;
    }
    for (unsigned i = 0; i < t->threads; i++) {
        if (t->segments != NULL) {
            weft_free(t->segments[i]);
        }
        if (t->pages != NULL) {
            weft_free(t->pages[i]);
        }
    }
    for (uint32_t s = 0; t->slots != NULL && s < t->o.slots; s++) {
        weft_free(t->slots[s].tape);
        weft_free(t->slots[s].gradients);
    }
    training_device_free(t->device);
    if (t->arena != NULL && t->o.work != NULL) {
        device_work_release(t->o.work, t->arena);
    } else if (t->arena != NULL) {
        weft_unmap(t->arena, t->arena_bytes);
    }
    weft_free(t->slots);
    weft_free(t->pages);
    weft_free(t->segments);
    weft_free(t->scratch);
    weft_free(t->chunk_steps);
    weft_free(t->head_steps);
    weft_free(t->shared);
    g_free(t);
}
