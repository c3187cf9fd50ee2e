#include "worker/model/device_stage.h"

#include "worker/model/device_group.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"

#include <string.h>

/* ---- sizes: one list serves counting and placing ---- */

static size_t align256(size_t n)
{
    return (n + 255) & ~(size_t)255;
}

static uint32_t page_entries(const Stage *s)
{
    return (s->o.plan->definition.context + KV_BLOCK - 1) / KV_BLOCK;
}

/* The input: ids, positions, tables, outputs; draws; segments; page tables. */
static size_t draws_offset(const Stage *s)
{
    return align256(sizeof(uint32_t) * 4 * (size_t)s->max_rows);
}

static size_t segments_offset(const Stage *s)
{
    return align256(draws_offset(s) + sizeof(DeviceDraw) * (size_t)s->max_rows);
}

static size_t pages_offset(const Stage *s)
{
    return align256(segments_offset(s) + sizeof(DeviceSegment) * (size_t)s->max_rows);
}

static size_t input_bytes(const Stage *s)
{
    return pages_offset(s) + sizeof(uint32_t) * (size_t)s->max_rows * page_entries(s);
}

/* Rows whose logits fit: all of a step that is sampled here, if they are not too many. */
static uint32_t logits_rows(const Stage *s)
{
    return MAX(STAGE_LOGITS_ROWS, MIN(s->max_rows, DEVICE_LOGITS_ROWS));
}

static uint32_t n_chunks(const Stage *s)
{
    return (s->o.shard->vocab_count + VOCAB_CHUNK - 1) / VOCAB_CHUNK;
}

bool stage_draws(const Stage *s)
{
    const uint32_t n = s->o.shard->vocab_count;
    return s->o.shard->device != NULL && s->o.shard->has_head && n > 0 &&
           (n - 1) % VOCAB_CHUNK + 1 >= DEVICE_SHORTEST_CHUNK;
}

static DeviceDrawn drawn_of(const Stage *s, uint8_t *memory, const DevicePass *pass)
{
    const size_t rows = pass->n_draws, chunks = sizeof(DeviceChunk) * n_chunks(s) * rows,
                 best = sizeof(DeviceCandidate) * pass->keep * rows,
                 top = sizeof(DeviceCandidate) * pass->n_top * rows;
    DeviceDrawn drawn = {.n_chunks = n_chunks(s), .bytes = chunks + best + top};
    if (memory != NULL) {
        drawn.chunks = (DeviceChunk *)(void *)memory;
        drawn.best = (DeviceCandidate *)(void *)(memory + chunks);
        drawn.top = (DeviceCandidate *)(void *)(memory + chunks + best);
    }
    return drawn;
}

static size_t drawn_bytes(const Stage *s)
{
    const DevicePass most = {
        .n_draws = s->max_rows, .keep = DEVICE_KEEP_LIMIT, .n_top = SAMPLE_TOP_LIMIT};
    return stage_draws(s) ? drawn_of(s, NULL, &most).bytes : 0;
}

static void widest(const PackedMatrix *m, DeviceLimits *limits)
{
    limits->widest_in = MAX(limits->widest_in, m->n_in);
    limits->widest_out = MAX(limits->widest_out, m->n_out);
}

static DeviceLimits limits_of(const Stage *s)
{
    const Shard *shard = s->o.shard;
    const LayerWeights *w = &shard->layers[0];
    DeviceLimits limits = {.max_rows = s->max_rows,
                           .max_keys = s->o.plan->definition.context,
                           .max_segments = s->max_rows,
                           .n_heads = shard->n_heads,
                           .head_size = s->o.spec->head_size};
    const PackedMatrix *all[] = {&w->q, &w->k, &w->v, &w->attn_out, &w->up, &w->down, &w->gate};
    for (unsigned i = 0; i < G_N_ELEMENTS(all); i++) {
        widest(all[i], &limits);
    }
    if (shard->has_head) {
        widest(shard_head(shard), &limits);
    }
    if (stage_draws(s)) {
        limits.sampled_rows = logits_rows(s);
        limits.vocabulary = shard->vocab_count;
    }
    return limits;
}

static void *take(uint8_t *base, size_t *at, size_t bytes)
{
    void *place = base != NULL ? base + *at : NULL;
    *at += align256(bytes);
    return place;
}

static float *take_floats(uint8_t *base, size_t *at, size_t rows, size_t columns)
{
    return take(base, at, sizeof(float) * rows * columns);
}

/* Sums of its own that a rank gives at most, as all ranks of the stage see it: their parts of a
 * gathering are equally long. */
static uint32_t most_subtrees(const DeviceStage *d)
{
    const Stage *s = d->stage;
    DeviceTree attn, ffn;
    if (s->plan_stage->n_ranks == 1 || d->fast) {
        return s->plan_stage->n_ranks > 1;
    }
    device_tree_init(&attn, s->attn_units.n_leaves, s->attn_units.cuts, s->plan_stage->n_ranks);
    device_tree_init(&ffn, s->ffn_units.n_leaves, s->ffn_units.cuts, s->plan_stage->n_ranks);
    return MAX(attn.most, ffn.most);
}

static bool is_fast(const Stage *s)
{
    return s->o.plan->definition.numerics == NUMERICS_FAST;
}

/* Every buffer from base on, or with NULL only their size. */
static size_t place(DeviceStage *d, uint8_t *base)
{
    const Stage *s = d->stage;
    const Shard *shard = s->o.shard;
    const size_t rows = s->max_rows, width = s->o.spec->width, hd = s->o.spec->head_size,
                 context = s->o.plan->definition.context, half = s->o.spec->rope.dims / 2;
    const size_t ffn = shard->layers[0].up.n_out; /* GPT-2 has no gate */
    const size_t ranks = s->plan_stage->n_ranks, subtrees = most_subtrees(d);
    size_t at = 0;
    d->x = take_floats(base, &at, rows, width);
    d->h = take_floats(base, &at, rows, width);
    d->q = take_floats(base, &at, rows, shard->n_heads * hd);
    d->attn = take_floats(base, &at, rows, shard->n_heads * hd);
    d->k = take_floats(base, &at, rows, shard->n_kv_heads * hd);
    d->v = take_floats(base, &at, rows, shard->n_kv_heads * hd);
    d->gate = take_floats(base, &at, rows, ffn);
    d->up = take_floats(base, &at, rows, ffn);
    d->partial = take_floats(base, &at, subtrees * rows, width);
    d->gathered = take_floats(base, &at, d->fast ? 0 : ranks * subtrees * rows, width);
    d->logits = take_floats(base, &at, d->logits_rows, shard->has_head ? shard->vocab_count : 0);
    d->drawn = take(base, &at, d->drawn_bytes);
    d->cos = take_floats(base, &at, context, half);
    d->sin = take_floats(base, &at, context, half);
    d->input = take(base, &at, d->input_bytes);
    d->workspace = take(base, &at, d->workspace_bytes);
    return at;
}

size_t device_stage_bytes(const Stage *stage)
{
    const DeviceLimits limits = limits_of(stage);
    DeviceStage counting = {.stage = (Stage *)stage,
                            .fast = is_fast(stage),
                            .input_bytes = input_bytes(stage),
                            .logits_rows = logits_rows(stage),
                            .drawn_bytes = drawn_bytes(stage),
                            .workspace_bytes =
                                stage->o.shard->device->ops->workspace_bytes(&limits)};
    return place(&counting, NULL);
}

/* ---- the input's parts ---- */

uint32_t *device_stage_tokens(const DeviceStage *d, uint8_t *side)
{
    (void)d;
    return (uint32_t *)(void *)side;
}
uint32_t *device_stage_positions(const DeviceStage *d, uint8_t *side)
{
    return device_stage_tokens(d, side) + d->stage->max_rows;
}
uint32_t *device_stage_tables(const DeviceStage *d, uint8_t *side)
{
    return device_stage_positions(d, side) + d->stage->max_rows;
}
uint32_t *device_stage_outputs(const DeviceStage *d, uint8_t *side)
{
    return device_stage_tables(d, side) + d->stage->max_rows;
}
DeviceDraw *device_stage_draws(const DeviceStage *d, uint8_t *side)
{
    return (DeviceDraw *)(void *)(side + draws_offset(d->stage));
}
DeviceSegment *device_stage_segments(const DeviceStage *d, uint8_t *side)
{
    return (DeviceSegment *)(void *)(side + segments_offset(d->stage));
}
uint32_t *device_stage_pages(const DeviceStage *d, uint8_t *side)
{
    return (uint32_t *)(void *)(side + d->pages_offset);
}

uint32_t device_stage_keys(const DeviceStage *d, uint32_t n)
{
    const uint32_t context = d->stage->o.plan->definition.context;
    uint32_t bound = 256;
    while (bound < n) {
        bound *= 2;
    }
    return MIN(bound, context);
}

uint32_t device_stage_keep(uint32_t n)
{
    uint32_t keep = 1;
    while (keep < n && keep < DEVICE_KEEP_LIMIT) {
        keep *= 2;
    }
    return keep;
}

DeviceDrawn device_stage_drawn(const DeviceStage *d, uint8_t *memory, const DevicePass *pass)
{
    return drawn_of(d->stage, memory, pass);
}

/* ---- opening ---- */

static bool serves(const Stage *s, GError **error)
{
    const Device *device = s->o.shard->device;
    const ModelSpec *spec = s->o.spec;
    const KvType kv = s->o.plan->definition.kv_type;
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        const TensorSpec *t = &spec->tensors[i];
        if (t->rows > 1 && !device->ops->has_weight(t->type)) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_IMPOSSIBLE,
                        "%s:%u (%s) has no kernels for weights of type %s (tensor %s): use "
                        "workers with --device cpu, or a model of another type",
                        device->info.kind, device->info.index, device->info.name,
                        dtype_info(t->type)->name, t->name);
            return false;
        }
    }
    if (!device->ops->has_kv(kv, spec->head_size) || spec->attention != ATTENTION_CAUSAL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IMPOSSIBLE,
                    "%s:%u (%s) has no attention of this kind (KV type %u, head size %u): use "
                    "workers with --device cpu",
                    device->info.kind, device->info.index, device->info.name, (unsigned)kv,
                    spec->head_size);
        return false;
    }
    return true;
}

static bool allocate(DeviceStage *d, GError **error)
{
    const DeviceApi *api = d->device->api;
    const DeviceHandle *handle = d->device->handle;
    const KvPages *kv = &d->stage->kv;
    DeviceStatus status = api->stream_new((DeviceHandle *)handle, &d->stream);
    if (status == DEVICE_OK) {
        status = api->event_new(d->device->handle, &d->done);
    }
    if (!device_check(d->device, status, "a stream", error) ||
        !device_check(
            d->device,
            api->alloc(d->device->handle, kv->page_bytes * kv->n_pages, (void **)&d->kv.memory),
            "memory for KV pages", error) ||
        !device_check(d->device, api->alloc(d->device->handle, d->arena_bytes, (void **)&d->arena),
                      "memory for step buffers", error)) {
        return false;
    }
    status = api->alloc_pinned(d->device->handle, d->input_bytes, (void **)&d->host_input);
    if (status == DEVICE_OK && d->drawn_bytes > 0) {
        status = api->alloc_pinned(d->device->handle, d->drawn_bytes, (void **)&d->host_drawn);
    }
    return device_check(d->device, status, "pinned memory for steps", error);
}

/* RoPE's tables go up once. The host's lie in pinned memory. */
static bool fill_tables(DeviceStage *d, GError **error)
{
    const DeviceApi *api = d->device->api;
    const Stage *s = d->stage;
    const size_t bytes =
        sizeof(float) * (size_t)s->o.plan->definition.context * (s->o.spec->rope.dims / 2);
    if (bytes == 0) {
        return true; /* a model without RoPE */
    }
    DeviceStatus status = api->copy(d->stream, d->cos, s->rope_cos, bytes, DEVICE_COPY_UP);
    if (status == DEVICE_OK) {
        status = api->copy(d->stream, d->sin, s->rope_sin, bytes, DEVICE_COPY_UP);
    }
    if (status == DEVICE_OK) {
        status = api->stream_wait(d->stream);
    }
    return device_check(d->device, status, "position tables", error);
}

DeviceStage *device_stage_new(Stage *stage, GError **error)
{
    if (!serves(stage, error)) {
        return NULL;
    }
    DeviceStage *d = g_new0(DeviceStage, 1);
    const DeviceLimits limits = limits_of(stage);
    d->stage = stage;
    d->device = stage->o.shard->device;
    d->pages_ld = page_entries(stage);
    d->pages_offset = pages_offset(stage);
    d->input_bytes = input_bytes(stage);
    d->logits_rows = logits_rows(stage);
    d->drawn_bytes = drawn_bytes(stage);
    d->fast = is_fast(stage);
    d->workspace_bytes = d->device->ops->workspace_bytes(&limits);
    d->arena_bytes = place(d, NULL);
    d->kv = (DeviceKv){.page_bytes = stage->kv.page_bytes,
                       .block_bytes = stage->kv.block_bytes,
                       .n_heads = stage->kv.n_kv_heads,
                       .type = stage->o.plan->definition.kv_type};
    if (!allocate(d, error)) {
        device_stage_free(d);
        return NULL;
    }
    place(d, d->arena);
    if (!fill_tables(d, error)) {
        device_stage_free(d);
        return NULL;
    }
    return d;
}

void device_stage_free(DeviceStage *d)
{
    if (d == NULL) {
        return;
    }
    const DeviceApi *api = d->device->api;
    device_team_leave(&d->team); /* or the stream might stand */
    if (d->stream != NULL) {
        api->stream_free(d->stream);
    }
    device_team_free(&d->team);
    for (unsigned i = 0; i < DEVICE_GRAPHS; i++) {
        api->graph_free(d->graphs[i].graph);
    }
    api->event_free(d->done);
    api->free(d->device->handle, d->kv.memory);
    api->free(d->device->handle, d->arena);
    api->free_pinned(d->device->handle, d->host_input);
    api->free_pinned(d->device->handle, d->host_drawn);
    g_free(d);
}

/* ---- running ---- */

bool device_stage_ok(DeviceStage *d, DeviceStatus status, const char *what)
{
    Stage *s = d->stage;
    if (status != DEVICE_OK && s->failure == NULL) {
        device_check(d->device, status, what, &s->failure);
    }
    return s->failure == NULL;
}

bool device_stage_wait(DeviceStage *d, int64_t deadline_us, const char *what)
{
    const DeviceApi *api = d->device->api;
    const Stage *s = d->stage;
    const int64_t end = g_get_monotonic_time() + deadline_us;
    DeviceStatus status = s->failure == NULL ? api->event_record(d->done, d->stream) : DEVICE_OK;
    while (s->failure == NULL && status == DEVICE_OK &&
           (status = api->event_query(d->done)) == DEVICE_NOT_READY) {
        if (s->o.progress != NULL) {
            s->o.progress(s->o.progress_user);
        }
        if (d->team.joined && device_team_gives_up(&d->team, end, deadline_us, what)) {
            return false;
        }
        status = d->team.joined || g_get_monotonic_time() < end ? DEVICE_OK : DEVICE_STUCK;
    }
    return device_stage_ok(d, status, what) &&
           (!d->team.joined || d->device->group->poll(d->team.group) != DEVICE_GROUP_FAILED ||
            !device_team_gives_up(&d->team, end, deadline_us, what));
}

static bool same_pass(const DevicePass *a, const DevicePass *b)
{
    return a->n_rows == b->n_rows && a->n_segments == b->n_segments &&
           a->longest_segment == b->longest_segment && a->max_keys == b->max_keys &&
           a->n_draws == b->n_draws && a->keep == b->keep && a->n_top == b->n_top &&
           a->n_outputs == b->n_outputs && a->embed == b->embed && a->give == b->give;
}

DeviceStepGraph *device_stage_graph(DeviceStage *d, const DevicePass *pass)
{
    DeviceStepGraph *oldest = &d->graphs[0];
    for (unsigned i = 0; i < DEVICE_GRAPHS; i++) {
        DeviceStepGraph *g = &d->graphs[i];
        if (g->used != 0 && same_pass(&g->pass, pass)) {
            g->used = ++d->clock;
            return g;
        }
        if (g->used < oldest->used) {
            oldest = g;
        }
    }
    d->device->api->graph_free(oldest->graph);
    *oldest = (DeviceStepGraph){.pass = *pass, .used = ++d->clock};
    return oldest;
}
