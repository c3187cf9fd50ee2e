#include "worker/model/device_stage.h"

#include "worker/model/device_group.h"
#include "worker/serve/sample.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"

#include <string.h>

/* ---- sizes: proto/plan/device_memory.h, which plans count by ---- */

_Static_assert(STAGE_LOGITS_ROWS == DEVICE_LOGITS_ROWS_DOWN && SAMPLE_TOP_LIMIT == DEVICE_TOP_LIMIT,
               "plans count these");

bool stage_draws(const Stage *s)
{
    return s->device != NULL && s->device->sizes.draws;
}

static DeviceDrawn drawn_of(const DeviceStage *d, uint8_t *memory, const DevicePass *pass)
{
    const uint32_t n_chunks = (d->sizes.vocabulary + VOCAB_CHUNK - 1) / VOCAB_CHUNK;
    const size_t rows = pass->n_draws, chunks = sizeof(DeviceChunk) * n_chunks * rows,
                 best = sizeof(DeviceCandidate) * pass->keep * rows,
                 top = sizeof(DeviceCandidate) * pass->n_top * rows;
    DeviceDrawn drawn = {.n_chunks = n_chunks, .bytes = chunks + best + top};
    if (memory != NULL) {
        drawn.chunks = (DeviceChunk *)(void *)memory;
        drawn.best = (DeviceCandidate *)(void *)(memory + chunks);
        drawn.top = (DeviceCandidate *)(void *)(memory + chunks + best);
    }
    return drawn;
}

static void *take(uint8_t **at, uint64_t bytes)
{
    uint8_t *place = *at;
    *at += bytes;
    return place;
}

/* Every buffer in the arena; all of it is used. */
static void place(DeviceStage *d)
{
    const DeviceSizes *z = &d->sizes;
    uint8_t *at = d->arena;
    d->x = take(&at, z->x);
    d->h = take(&at, z->x);
    d->arriving = z->arriving > 0 ? take(&at, z->arriving) : NULL;
    d->q = take(&at, z->q);
    d->attn = take(&at, z->q);
    d->k = take(&at, z->kv);
    d->v = take(&at, z->kv);
    d->gate = take(&at, z->ffn);
    d->up = take(&at, z->ffn);
    d->partial = take(&at, z->partial);
    d->gathered = take(&at, z->gathered);
    d->logits = take(&at, z->logits);
    d->drawn = take(&at, z->drawn);
    d->cos = take(&at, z->rope);
    d->sin = take(&at, z->rope);
    d->input = take(&at, z->input.bytes);
    d->workspace = take(&at, z->workspace);
    g_assert(at == d->arena + d->arena_bytes);
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
    return (DeviceDraw *)(void *)(side + d->sizes.input.draws);
}
DeviceSegment *device_stage_segments(const DeviceStage *d, uint8_t *side)
{
    return (DeviceSegment *)(void *)(side + d->sizes.input.segments);
}
uint32_t *device_stage_pages(const DeviceStage *d, uint8_t *side)
{
    return (uint32_t *)(void *)(side + d->sizes.input.pages);
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
    return drawn_of(d, memory, pass);
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
    status = api->alloc_pinned(d->device->handle, d->sizes.input.bytes, (void **)&d->host_input);
    if (status == DEVICE_OK && d->sizes.drawn > 0) {
        status = api->alloc_pinned(d->device->handle, d->sizes.drawn, (void **)&d->host_drawn);
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
    const StageOptions *o = &stage->o;
    d->stage = stage;
    d->device = o->shard->device;
    d->fast = o->plan->definition.numerics == NUMERICS_FAST;
    d->sizes = device_sizes(o->plan, o->spec, &o->plan->replicas[o->replica], stage->plan_stage,
                            &stage->plan_stage->ranks[o->rank]);
    d->arena_bytes = device_sizes_total(&d->sizes);
    d->kv = (DeviceKv){.page_bytes = stage->kv.page_bytes,
                       .block_bytes = stage->kv.block_bytes,
                       .n_heads = stage->kv.n_kv_heads,
                       .type = stage->o.plan->definition.kv_type};
    if (!allocate(d, error)) {
        device_stage_free(d);
        return NULL;
    }
    place(d);
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
           a->n_outputs == b->n_outputs && a->embed == b->embed && a->here == b->here &&
           a->give == b->give && a->sum == b->sum;
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
