#include "worker/model/stage.h"

#include "worker/model/device_stage.h"

#include "proto/base/error.h"

#include "proto/base/checked.h"

#include <string.h>

/* ---- sizes: one list serves the plan's memory count and the mapping ---- */

typedef struct Sizes {
    size_t x, q, kv, ffn, partial, logits, gathered, rope, scratch, blocks;
    size_t act[ACT_KIND_LIMIT];
} Sizes;

static size_t align64(size_t n)
{
    return (n + 63) & ~(size_t)63;
}

static void units_init(StageUnits *u, uint32_t n_leaves, const PlanStage *stage, uint32_t rank,
                       bool attention)
{
    TreeStep steps[TREE_LEAVES_LIMIT];
    u->n_leaves = n_leaves;
    for (uint32_t r = 0; r < stage->n_ranks; r++) {
        u->cuts[r] = attention ? stage->ranks[r].attn_first : stage->ranks[r].ffn_first;
    }
    u->cuts[stage->n_ranks] = n_leaves;
    const PlanRank *own = &stage->ranks[rank];
    u->n_units = attention ? own->attn_count : own->ffn_count;
    u->n_subtrees = tree_program(n_leaves, u->cuts[rank], u->cuts[rank] + u->n_units, steps);
    for (uint32_t i = 0; i < u->n_units; i++) {
        u->units[i].step = steps[i];
    }
}

static void units_fill(StageUnits *u, const ModelSpec *spec, uint32_t first, bool attention)
{
    for (uint32_t i = 0; i < u->n_units; i++) {
        uint32_t at, count;
        if (attention) {
            model_spec_attn_unit_heads(spec, first + i, &at, &count);
            u->units[i].n_in = count * spec->head_size;
        } else {
            model_spec_ffn_unit(spec, first + i, &at, &count);
            u->units[i].n_in = count;
        }
    }
}

static void both_units(const ModelSpec *spec, const PlanStage *stage, uint32_t rank,
                       StageUnits *attn, StageUnits *ffn)
{
    const PlanRank *own = &stage->ranks[rank];
    units_init(attn, spec->n_attn_units, stage, rank, true);
    units_fill(attn, spec, own->attn_first, true);
    units_init(ffn, spec->n_ffn_units, stage, rank, false);
    units_fill(ffn, spec, own->ffn_first, false);
}

static uint32_t units_width(const StageUnits *u)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < u->n_units; i++) {
        n += u->units[i].n_in;
    }
    return n;
}

static uint32_t own_vocab(const ModelSpec *spec, const PlanRank *rank)
{
    const uint64_t first = (uint64_t)rank->vocab_first * VOCAB_CHUNK;
    const uint64_t last = MIN(first + (uint64_t)rank->vocab_count * VOCAB_CHUNK, spec->vocab_size);
    return last > first ? (uint32_t)(last - first) : 0;
}

static bool role_is_matmul(TensorRole role)
{
    switch (role) {
    case ROLE_ATTN_Q:
    case ROLE_ATTN_K:
    case ROLE_ATTN_V:
    case ROLE_ATTN_OUT:
    case ROLE_FFN_GATE:
    case ROLE_FFN_UP:
    case ROLE_FFN_DOWN:
    case ROLE_OUTPUT:
    case ROLE_TOKEN_EMBD:
        return true;
    default:
        return false;
    }
}

static void act_sizes(Sizes *s, const ModelSpec *spec, uint32_t rows, uint32_t attn_width,
                      uint32_t ffn_width)
{
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        const TensorSpec *t = &spec->tensors[i];
        if (!role_is_matmul(t->role)) {
            continue;
        }
        const uint32_t n_in = t->role == ROLE_ATTN_OUT   ? attn_width
                              : t->role == ROLE_FFN_DOWN ? ffn_width
                                                         : spec->width;
        const ActKind kind = act_kind_of(t->type);
        s->act[kind] = MAX(s->act[kind], act_bytes(kind, rows, n_in));
    }
}

static Sizes sizes_of(const ModelSpec *spec, const Plan *plan, uint32_t replica,
                      uint32_t stage_index, uint32_t rank, unsigned threads)
{
    const PlanStage *stage = &plan->replicas[replica].stages[stage_index];
    const PlanRank *own = &stage->ranks[rank];
    const size_t rows = plan->max_rows;
    const uint32_t n_blocks = (plan->definition.context + KV_BLOCK - 1) / KV_BLOCK;
    StageUnits attn, ffn;
    both_units(spec, stage, rank, &attn, &ffn);
    const uint32_t attn_width = units_width(&attn), ffn_width = units_width(&ffn);
    uint32_t kv_first, kv_count;
    model_spec_kv_heads_of(spec, own->attn_first * spec->attn_unit_heads,
                           attn_width / spec->head_size, &kv_first, &kv_count);
    Sizes s = {0};
    s.x = align64(4 * rows * spec->width);
    s.q = align64(4 * rows * attn_width);
    s.kv = align64(4 * rows * kv_count * spec->head_size);
    s.ffn = align64(4 * rows * ffn_width);
    s.partial = align64(4 * rows * spec->width * MAX(attn.n_subtrees, ffn.n_subtrees));
    if (stage_index + 1 == plan->replicas[replica].n_stages) {
        s.logits = align64((size_t)4 * STAGE_LOGITS_ROWS * own_vocab(spec, own));
    }
    if (stage_index == 0 && stage->n_ranks > 1) {
        s.gathered = s.x;
    }
    s.rope = align64(4 * (size_t)plan->definition.context * (spec->rope.dims / 2));
    s.scratch = align64(
        4 * attention_scratch_floats(spec->n_heads / spec->n_kv_heads + 1, spec->head_size));
    s.blocks = align64(2 * sizeof(void *) * (size_t)n_blocks);
    act_sizes(&s, spec, plan->max_rows, attn_width, ffn_width);
    for (int kind = 0; kind < ACT_KIND_LIMIT; kind++) {
        s.act[kind] = align64(s.act[kind]);
    }
    s.scratch *= threads;
    s.blocks *= threads;
    return s;
}

static size_t sizes_total(const Sizes *s)
{
    size_t total = 2 * s->x + 2 * s->q + 2 * s->kv + 2 * s->ffn + s->partial + s->logits +
                   s->gathered + 2 * s->rope + s->scratch + s->blocks;
    for (int kind = 0; kind < ACT_KIND_LIMIT; kind++) {
        total += s->act[kind];
    }
    return total;
}

size_t stage_buffer_bytes(const ModelSpec *spec, const Plan *plan, uint32_t replica, uint32_t stage,
                          uint32_t rank, unsigned threads)
{
    const Sizes s = sizes_of(spec, plan, replica, stage, rank, threads);
    return sizes_total(&s);
}

/* ---- construction ---- */

static void *carve(uint8_t **at, size_t size)
{
    void *p = size > 0 ? *at : NULL;
    *at += size;
    return p;
}

static void carve_buffers(Stage *s, const Sizes *z, unsigned threads)
{
    uint8_t *at = s->arena;
    s->x = carve(&at, z->x);
    s->h = carve(&at, z->x);
    s->q = carve(&at, z->q);
    s->attn = carve(&at, z->q);
    s->k = carve(&at, z->kv);
    s->v = carve(&at, z->kv);
    s->gate = carve(&at, z->ffn);
    s->up = carve(&at, z->ffn);
    s->partial = carve(&at, z->partial);
    s->logits = carve(&at, z->logits);
    s->gathered = carve(&at, z->gathered);
    s->rope_cos = carve(&at, z->rope);
    s->rope_sin = carve(&at, z->rope);
    for (int kind = 0; kind < ACT_KIND_LIMIT; kind++) {
        s->act[kind] = carve(&at, z->act[kind]);
    }
    s->scratch = g_new0(float *, threads);
    s->blocks = g_new0(const uint8_t **, threads);
    for (unsigned t = 0; t < threads; t++) {
        s->scratch[t] = carve(&at, z->scratch / threads);
        s->blocks[t] = carve(&at, z->blocks / threads);
    }
}

typedef struct RopeJob {
    Stage *stage;
} RopeJob;

static void rope_region(void *user, unsigned t, unsigned n_threads)
{
    Stage *s = ((RopeJob *)user)->stage;
    const ModelSpec *spec = s->o.spec;
    const size_t half = spec->rope.dims / 2;
    uint32_t first, last;
    pool_share(s->o.plan->definition.context, 1, t, n_threads, &first, &last);
    if (first < last) {
        rope_table(&spec->rope, s->o.shard->rope_factors, first, last - first,
                   s->rope_cos + first * half, s->rope_sin + first * half);
    }
}

/* What the host keeps of a stage on a device. */
static Sizes host_part(Sizes s)
{
    return (Sizes){
        .x = s.x, .partial = s.partial, .logits = s.logits, .gathered = s.gathered, .rope = s.rope};
}

static bool map_buffers(Stage *s, GError **error)
{
    const Shard *shard = s->o.shard;
    const Device *device = shard->device;
    const Plan *plan = s->o.plan;
    if (device != NULL) {
        return device_check(device,
                            device->api->alloc_pinned(device->handle, s->arena_bytes, &s->arena),
                            "pinned memory for steps", error) &&
               kv_pages_size(&s->kv, plan->kv_pages, shard->n_layers, shard->n_kv_heads,
                             s->o.spec->head_size, plan->definition.kv_type, error);
    }
    s->arena = weft_map(s->arena_bytes, "step buffers", error);
    return s->arena != NULL &&
           kv_pages_init(&s->kv, plan->kv_pages, shard->n_layers, shard->n_kv_heads,
                         s->o.spec->head_size, plan->definition.kv_type, error);
}

Stage *stage_new(const StageOptions *options, GError **error)
{
    const ModelSpec *spec = options->spec;
    const Plan *plan = options->plan;
    const unsigned threads = pool_threads(options->pool);
    Sizes sizes = sizes_of(spec, plan, options->replica, options->stage, options->rank, threads);
    Stage *s = g_new0(Stage, 1);
    s->o = *options;
    s->plan_stage = &plan->replicas[options->replica].stages[options->stage];
    s->max_rows = plan->max_rows;
    s->whole_width = (MatmulUnit){.n_in = spec->width, .step = {.n_merges = 0, .emit = 1}};
    both_units(spec, s->plan_stage, options->rank, &s->attn_units, &s->ffn_units);
    if (options->shard->device != NULL) {
        sizes = host_part(sizes);
    }
    s->arena_bytes = sizes_total(&sizes);
    if (!map_buffers(s, error)) {
        stage_free(s);
        return NULL;
    }
    carve_buffers(s, &sizes, threads);
    if (spec->rope.dims > 0) {
        RopeJob job = {s};
        pool_run(options->pool, rope_region, &job);
    }
    if (options->shard->device != NULL && (s->device = device_stage_new(s, error)) == NULL) {
        stage_free(s);
        return NULL;
    }
    return s;
}

void stage_free(Stage *stage)
{
    if (stage == NULL) {
        return;
    }
    device_stage_free(stage->device);
    const Device *device = stage->o.shard->device;
    if (device != NULL) {
        device->api->free_pinned(device->handle, stage->arena);
    } else if (stage->arena != NULL) {
        weft_unmap(stage->arena, stage->arena_bytes);
    }
    g_clear_error(&stage->failure);
    kv_pages_clear(&stage->kv);
    g_free(stage->scratch);
    g_free(stage->blocks);
    g_free(stage);
}

void stage_set_group(Stage *stage, Group *group)
{
    stage->group = group;
}
