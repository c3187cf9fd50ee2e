/* A stage's pass over a step: the embedding, the layers of its family, logits of some rows. */
#include "worker/model/device_forward.h"
#include "worker/model/stage_ops.h"

#include <string.h>

/* ---- layers ---- */

static const StageLayerFn layer_of_family[] = {
    [FAMILY_LLAMA] = llama_serving_layer,
    [FAMILY_GPT2] = gpt2_serving_layer,
};

static void layers_region(void *user, unsigned t, unsigned n_threads)
{
    StagePass p = *(const StagePass *)user;
    const StageLayerFn layer = layer_of_family[p.s->o.spec->family];
    p.t = t;
    p.n_threads = n_threads;
    if (t == 0) {
        stage_times_begin(&p.s->times);
    }
    for (uint32_t l = 0; l < p.s->o.shard->n_layers; l++) {
        if (!layer(&p, l)) {
            return;
        }
    }
}

GroupStatus stage_layers(Stage *stage, const StageRun *run)
{
    if (stage->device != NULL) {
        return device_forward_layers(stage, run);
    }
    StagePass p = {.s = stage, .run = run, .rows = run->step->n_rows};
    stage->status = GROUP_OK;
    pool_run(stage->o.pool, layers_region, &p);
    return stage->status;
}

/* ---- embedding: each row is a copy from the one rank that owns its id (NUMERICS 6) ---- */

static uint32_t owner_of(const Stage *s, uint32_t token)
{
    const uint32_t chunk = token / VOCAB_CHUNK;
    for (uint32_t r = 0; r < s->plan_stage->n_ranks; r++) {
        const PlanRank *rank = &s->plan_stage->ranks[r];
        if (chunk >= rank->vocab_first && chunk < rank->vocab_first + rank->vocab_count) {
            return r;
        }
    }
    g_assert_not_reached(); /* plan_check: every chunk has one owner */
}

GroupStatus stage_gather_embedding(Stage *s, const StageRun *run, const float *mine)
{
    const Step *step = run->step;
    const size_t row_bytes = sizeof(float) * s->o.spec->width;
    const uint32_t n_ranks = s->plan_stage->n_ranks;
    size_t sizes[PLAN_RANKS_LIMIT] = {0}, offset[PLAN_RANKS_LIMIT + 1] = {0};
    void *parts[PLAN_RANKS_LIMIT];
    for (uint32_t r = 0; r < step->n_rows; r++) {
        sizes[owner_of(s, step->rows[r].token)] += row_bytes;
    }
    for (uint32_t r = 0; r < n_ranks; r++) {
        parts[r] = (uint8_t *)s->gathered + offset[r];
        offset[r + 1] = offset[r] + sizes[r];
    }
    memcpy(parts[s->o.rank], mine, sizes[s->o.rank]);
    const GroupWait wait = {.step = step->number,
                            .site = 0,
                            .deadline_us = g_get_monotonic_time() + run->deadline_us,
                            .operation = "gather of the embedding"};
    const GroupStatus status = group_all_gather(s->group, &wait, parts[s->o.rank], sizes, parts);
    if (status != GROUP_OK) {
        return status;
    }
    for (uint32_t r = 0; r < step->n_rows; r++) {
        const uint32_t owner = owner_of(s, step->rows[r].token);
        memcpy(s->x + (size_t)r * s->o.spec->width, (uint8_t *)s->gathered + offset[owner],
               row_bytes);
        offset[owner] += row_bytes;
    }
    return GROUP_OK;
}

/* GPT-2: each row adds what was learnt for its position. */
static void add_positions(Stage *s, const Step *step)
{
    const uint32_t width = s->o.spec->width;
    const PackedMatrix *positions = &s->o.shard->positions;
    float *row = s->h; /* free until the layers */
    for (uint32_t i = 0; positions->data != NULL && i < step->n_segments; i++) {
        const StepSegment *g = &step->segments[i];
        for (uint32_t r = 0; r < g->n_rows; r++) {
            packed_get_row(positions, g->position + r, row);
            s->o.kernels->add(s->x + (size_t)(g->row0 + r) * width, row, width);
        }
    }
}

/* The rows that this rank owns, in order, to the front of x, and from there to all ranks. */
static GroupStatus embed_over_ranks(Stage *s, const StageRun *run)
{
    const Step *step = run->step;
    float *mine = s->x;
    for (uint32_t r = 0; r < step->n_rows; r++) {
        if (owner_of(s, step->rows[r].token) == s->o.rank) {
            packed_get_row(&s->o.shard->embedding, step->rows[r].token - s->o.shard->vocab_first,
                           mine);
            mine += s->o.spec->width;
        }
    }
    return stage_gather_embedding(s, run, s->x);
}

static void copy_embedding(Stage *s, const Step *step)
{
    for (uint32_t r = 0; r < step->n_rows; r++) {
        packed_get_row(&s->o.shard->embedding, step->rows[r].token,
                       s->x + (size_t)r * s->o.spec->width);
    }
}

GroupStatus stage_embed(Stage *stage, const StageRun *run)
{
    GroupStatus status = GROUP_OK;
    if (stage->device != NULL) {
        return device_forward_embed(stage, run);
    }
    if (stage->group != NULL) {
        status = embed_over_ranks(stage, run);
    } else {
        copy_embedding(stage, run->step);
    }
    if (status == GROUP_OK) {
        add_positions(stage, run->step);
    }
    return status;
}

/* ---- vocabulary projection of some rows ---- */

typedef struct LogitsPass {
    StagePass pass;
    const uint32_t *rows;
} LogitsPass;

static void logits_region(void *user, unsigned t, unsigned n_threads)
{
    const LogitsPass *lp = user;
    StagePass pass = lp->pass, *p = &pass;
    Stage *s = p->s;
    const Shard *shard = s->o.shard;
    const size_t width = s->o.spec->width;
    const PackedMatrix *head = shard_head(shard);
    uint32_t first, last;
    p->t = t;
    p->n_threads = n_threads;
    stage_own_rows(p, &first, &last);
    for (uint32_t i = first; i < last; i++) {
        stage_norm_row(p, s->x + lp->rows[i] * width, shard->output_norm, shard->output_norm_bias,
                       s->h + i * width);
    }
    stage_quantise(p, s->h, s->o.spec->width, &head, 1);
    stage_meet(p);
    stage_products(p, (const Product[]){{head, s->logits, shard->vocab_count}}, 1);
}

void stage_logits(Stage *stage, const uint32_t *rows, uint32_t n)
{
    LogitsPass lp = {.pass = {.s = stage, .rows = n}, .rows = rows};
    g_assert(n <= STAGE_LOGITS_ROWS);
    if (stage->device != NULL) {
        device_forward_logits(stage, rows, n);
        return;
    }
    if (stage->o.shard->vocab_count > 0) {
        stage_times_begin(&stage->times);
        pool_run(stage->o.pool, logits_region, &lp);
        stage_times_mark(&stage->times, STAGE_OP_HEAD);
    }
}
