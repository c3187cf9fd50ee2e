#include "worker/model/stage_ops.h"

#include <string.h>

/* ---- pieces ---- */

void stage_meet(StagePass *p)
{
    pool_barrier(p->s->o.pool);
}

void stage_end(StagePass *p, StageOp op)
{
    stage_meet(p);
    if (p->t == 0) {
        stage_times_mark(&p->s->times, op);
    }
}

void stage_progress(StagePass *p)
{
    if (p->t == 0 && p->s->o.progress != NULL) {
        p->s->o.progress(p->s->o.progress_user);
    }
}

void stage_own_rows(const StagePass *p, uint32_t *first, uint32_t *last)
{
    pool_share(p->rows, ACT_ROW_GROUP, p->t, p->n_threads, first, last);
}

static uint32_t panels_of(const PackedMatrix *w)
{
    return (w->n_out + PANEL_ROWS - 1) / PANEL_ROWS;
}

/* Products with the panels of the matrices shared among the threads. */
static void products(StagePass *p, const Product *list, unsigned n, const MatmulUnit *units,
                     uint32_t n_units, size_t subtree_stride)
{
    uint32_t total = 0, first, last, base = 0;
    for (unsigned i = 0; i < n; i++) {
        total += panels_of(list[i].w);
    }
    pool_share(total, 1, p->t, p->n_threads, &first, &last);
    for (unsigned i = 0; i < n; i++) {
        const PackedMatrix *w = list[i].w;
        const uint32_t panels = panels_of(w);
        const uint32_t a = MAX(first, base), b = MIN(last, base + panels);
        if (a < b) {
            const MatmulArgs args = {
                .w = w,
                .act = p->s->act[act_kind_of(w->type)],
                .rows = p->rows,
                .units = units,
                .n_units = n_units,
                .out = list[i].out,
                .ld = list[i].ld,
                .subtree_stride = subtree_stride,
                .panel0 = a - base,
                .panel1 = b - base,
            };
            p->s->o.kernels->matmul[w->type](&args);
        }
        base += panels;
    }
}

void stage_products(StagePass *p, const Product *list, unsigned n)
{
    products(p, list, n, &p->s->whole_width, 1, 0);
}

void stage_product_units(StagePass *p, const PackedMatrix *w, const StageUnits *units)
{
    const uint32_t width = p->s->o.spec->width;
    products(p, (const Product[]){{w, p->s->partial, width}}, 1, units->units, units->n_units,
             (size_t)p->s->max_rows * width);
}

void stage_quantise(StagePass *p, const float *x, uint32_t n_in, const PackedMatrix *const *users,
                    unsigned n_users)
{
    bool wanted[ACT_KIND_LIMIT] = {false};
    for (unsigned i = 0; i < n_users; i++) {
        wanted[act_kind_of(users[i]->type)] = true;
    }
    uint32_t first, last;
    stage_own_rows(p, &first, &last);
    for (int kind = 0; first < last && kind < ACT_KIND_LIMIT; kind++) {
        if (wanted[kind]) {
            p->s->o.kernels->act_quantise[kind](x, n_in, p->rows, first, last, n_in,
                                                p->s->act[kind]);
        }
    }
}

void stage_norm_row(const StagePass *p, const float *x, const float *weight, const float *bias,
                    float *out)
{
    const Kernels *k = p->s->o.kernels;
    const ModelSpec *spec = p->s->o.spec;
    if (bias != NULL) {
        k->train.layer_norm(x, weight, bias, spec->norm_eps, spec->width, out);
    } else {
        k->rms_norm(x, weight, spec->norm_eps, spec->width, out);
    }
}

void stage_norm(StagePass *p, const float *weight, const float *bias)
{
    const size_t width = p->s->o.spec->width;
    uint32_t first, last;
    stage_own_rows(p, &first, &last);
    for (uint32_t r = first; r < last; r++) {
        stage_norm_row(p, p->s->x + r * width, weight, bias, p->s->h + r * width);
    }
}

void stage_add_bias(const StagePass *p, float *rows, const float *bias, uint32_t n, uint32_t n_rows)
{
    for (uint32_t r = 0; bias != NULL && r < n_rows; r++) {
        p->s->o.kernels->add(rows + (size_t)r * n, bias, n);
    }
}

bool stage_reduce(StagePass *p, const StageUnits *units, uint16_t site, const char *operation)
{
    Stage *s = p->s;
    if (s->group == NULL) {
        return true; /* one rank: the product folded all units already */
    }
    if (p->t == 0) {
        const size_t n = (size_t)p->rows * s->o.spec->width;
        const GroupWait wait = {.step = p->run->step->number,
                                .site = site,
                                .deadline_us = g_get_monotonic_time() + p->run->deadline_us,
                                .operation = operation};
        s->status = group_all_reduce(s->group, &wait, units->n_leaves, units->cuts, s->partial,
                                     (size_t)s->max_rows * s->o.spec->width, n, s->partial);
    }
    stage_end(p, STAGE_OP_REDUCE);
    return s->status == GROUP_OK;
}

void stage_add_residual(StagePass *p, const float *bias)
{
    Stage *s = p->s;
    const uint32_t width = s->o.spec->width;
    uint32_t first, last;
    stage_own_rows(p, &first, &last);
    if (first < last) {
        const size_t own = (size_t)first * width;
        stage_add_bias(p, s->partial + own, bias, width, last - first);
        s->o.kernels->add(s->x + own, s->partial + own, (size_t)(last - first) * width);
    }
}

void stage_trace(StagePass *p, uint32_t site)
{
    uint32_t first, last;
    if (p->run->trace != NULL) {
        stage_own_rows(p, &first, &last);
        stage_trace_rows(p->run->trace, site, p->s->x, p->s->o.spec->width, first, last);
    }
}

/* The lowest bit of the last row's first element, by the thread that owns the row. */
void stage_flip_bit(StagePass *p, uint32_t layer)
{
    uint32_t first, last, bits;
    if (p->run->flip_layer == (int64_t)layer) {
        stage_own_rows(p, &first, &last);
        if (first < last && last == p->rows) {
            float *x = p->s->x + (size_t)(last - 1) * p->s->o.spec->width;
            memcpy(&bits, x, sizeof bits);
            bits ^= 1;
            memcpy(x, &bits, sizeof bits);
        }
    }
}

/* ---- attention ---- */

static const StepSegment *segment_of(const Step *step, uint32_t row)
{
    for (uint32_t i = 0; i < step->n_segments; i++) {
        const StepSegment *g = &step->segments[i];
        if (row >= g->row0 && row < g->row0 + g->n_rows) {
            return g;
        }
    }
    g_assert_not_reached(); /* step_decode and the scheduler cover every row */
}

void stage_store_keys(StagePass *p, uint32_t layer)
{
    Stage *s = p->s;
    const Shard *shard = s->o.shard;
    const ModelSpec *spec = s->o.spec;
    const LayerWeights *w = &shard->layers[layer];
    const RopeApplyFn rotate = s->o.kernels->rope_apply;
    const uint32_t hd = spec->head_size, dims = spec->rope.dims;
    const uint32_t nq = shard->n_heads * hd, nk = shard->n_kv_heads * hd;
    uint32_t first, last;
    pool_share(p->rows, 1, p->t, p->n_threads, &first, &last);
    for (uint32_t r = first; r < last; r++) {
        const StepSegment *g = segment_of(p->run->step, r);
        const uint32_t position = g->position + (r - g->row0);
        float *q = s->q + (size_t)r * nq, *k = s->k + (size_t)r * nk, *v = s->v + (size_t)r * nk;
        stage_add_bias(p, q, w->q_bias, nq, 1);
        stage_add_bias(p, k, w->k_bias, nk, 1);
        stage_add_bias(p, v, w->v_bias, nk, 1);
        if (dims > 0) {
            const size_t at = (size_t)position * (dims / 2);
            rotate(q, shard->n_heads, hd, dims, spec->rope.pairing, s->rope_cos + at,
                   s->rope_sin + at);
            rotate(k, shard->n_kv_heads, hd, dims, spec->rope.pairing, s->rope_cos + at,
                   s->rope_sin + at);
        }
        const uint32_t page = p->run->page_tables[g->slot][position / KV_BLOCK];
        for (uint32_t h = 0; h < shard->n_kv_heads; h++) {
            s->o.kernels->kv_write[s->o.plan->definition.kv_type](
                k + h * hd, v + h * hd, hd, position % KV_BLOCK, kv_pages_k(&s->kv, page, layer, h),
                kv_pages_v(&s->kv, page, layer, h));
        }
    }
}

/* Query heads of this rank that read KV head `kv` (absolute numbers): [*first, *last). */
static void group_heads(const Stage *s, uint32_t kv, uint32_t *first, uint32_t *last)
{
    const uint32_t per = s->o.spec->n_heads / s->o.spec->n_kv_heads;
    *first = MAX(kv * per, s->o.shard->head_first);
    *last = MIN((kv + 1) * per, s->o.shard->head_first + s->o.shard->n_heads);
}

enum { ROW_TILE = 16 }; /* rows of one work item */

/* Rows x one KV head over all keys into s->attn, or over one run of keys into `partial`. */
static void attend_tile(StagePass *p, uint32_t layer, const StepSegment *g, uint32_t row,
                        uint32_t n_rows, uint32_t kv, uint32_t run, float *partial)
{
    Stage *s = p->s;
    const Shard *shard = s->o.shard;
    const uint32_t hd = s->o.spec->head_size;
    const uint32_t position = g->position + (row - g->row0);
    const uint32_t n_keys = position + n_rows, n_blocks = (n_keys + KV_BLOCK - 1) / KV_BLOCK,
                   run_blocks = ATTENTION_RUN_KEYS / KV_BLOCK;
    const uint32_t b0 = partial != NULL ? run * run_blocks : 0,
                   b1 = partial != NULL ? MIN(b0 + run_blocks, n_blocks) : n_blocks;
    const uint32_t *pages = p->run->page_tables[g->slot];
    const uint8_t **k_blocks = s->blocks[p->t], **v_blocks = k_blocks + n_blocks;
    uint32_t h0, h1;
    group_heads(s, shard->kv_first + kv, &h0, &h1);
    for (uint32_t b = b0; b < b1; b++) {
        k_blocks[b] = kv_pages_k(&s->kv, pages[b], layer, kv);
        v_blocks[b] = kv_pages_v(&s->kv, pages[b], layer, kv);
    }
    const size_t ld = (size_t)shard->n_heads * hd,
                 at = (size_t)row * ld + (size_t)(h0 - shard->head_first) * hd;
    const AttentionArgs args = {
        .q = s->q + at,
        .q_ld = ld,
        .out = s->attn + at,
        .out_ld = ld,
        .n_rows = n_rows,
        .first_position = position,
        .n_q = h1 - h0,
        .head_size = hd,
        .scale = s->o.spec->attention_scale,
        .window = s->o.spec->window,
        .causal = s->o.spec->attention == ATTENTION_CAUSAL,
        .n_keys = n_keys,
        .k_blocks = k_blocks,
        .v_blocks = v_blocks,
        .scratch = s->scratch[p->t],
        .partial = partial,
        .run = run,
    };
    s->o.kernels->attention[s->o.plan->definition.kv_type](&args);
}

/* Work items (row tile x KV head) go round the threads: causal tiles grow, so neighbours balance.
 */
static void attend_whole(StagePass *p, uint32_t layer)
{
    const Step *step = p->run->step;
    uint32_t item = 0;
    for (uint32_t i = 0; i < step->n_segments; i++) {
        const StepSegment *g = &step->segments[i];
        for (uint32_t r = 0; r < g->n_rows; r += ROW_TILE) {
            for (uint32_t kv = 0; kv < p->s->o.shard->n_kv_heads; kv++, item++) {
                if (item % p->n_threads == p->t) {
                    attend_tile(p, layer, g, g->row0 + r, MIN(ROW_TILE, g->n_rows - r), kv, 0,
                                NULL);
                }
            }
        }
    }
}

/* Decoding few sequences, (row, KV head) pairs are too few to occupy the threads evenly: the items
 * are runs of keys, whose partials lie in s->gate (free until the feed-forward) as [run][own head],
 * segment after segment, and are combined behind a barrier. The same bits. */
enum { ITEMS_PER_THREAD = 4 }; /* more whole items than this balance by themselves */

static bool attends_by_runs(const StagePass *p)
{
    const Step *step = p->run->step;
    const Shard *shard = p->s->o.shard;
    const size_t capacity = (size_t)p->s->max_rows * shard->layers[0].up.n_out;
    size_t runs = 0;
    uint32_t longest = 0;
    for (uint32_t i = 0; i < step->n_segments; i++) {
        const uint32_t n = attention_runs(step->segments[i].position + 1);
        longest = MAX(longest, n);
        runs += n;
    }
    return p->n_threads > 1 && step->n_segments == p->rows && longest > 1 &&
           step->n_segments * shard->n_kv_heads < ITEMS_PER_THREAD * p->n_threads &&
           runs * shard->n_heads * attention_partial_floats(p->s->o.spec->head_size) <= capacity;
}

static void attend_runs(StagePass *p, uint32_t layer)
{
    const Step *step = p->run->step;
    const Shard *shard = p->s->o.shard;
    const size_t floats = attention_partial_floats(p->s->o.spec->head_size);
    float *partials = p->s->gate;
    uint32_t item = 0;
    for (uint32_t i = 0; i < step->n_segments; i++) {
        const StepSegment *g = &step->segments[i];
        const uint32_t n_runs = attention_runs(g->position + 1);
        for (uint32_t run = 0; run < n_runs; run++) {
            for (uint32_t kv = 0; kv < shard->n_kv_heads; kv++, item++) {
                uint32_t h0, h1;
                group_heads(p->s, shard->kv_first + kv, &h0, &h1);
                if (item % p->n_threads == p->t) {
                    attend_tile(p, layer, g, g->row0, 1, kv, run,
                                partials +
                                    (run * shard->n_heads + h0 - shard->head_first) * floats);
                }
            }
        }
        partials += n_runs * shard->n_heads * floats;
    }
}

static void combine_runs(StagePass *p)
{
    const Step *step = p->run->step;
    const Shard *shard = p->s->o.shard;
    const uint32_t hd = p->s->o.spec->head_size;
    const size_t floats = attention_partial_floats(hd);
    float *partials = p->s->gate;
    uint32_t first, last;
    pool_share(shard->n_heads, 1, p->t, p->n_threads, &first, &last);
    for (uint32_t i = 0; i < step->n_segments; i++) {
        const StepSegment *g = &step->segments[i];
        const uint32_t n_runs = attention_runs(g->position + 1);
        for (uint32_t h = first; h < last; h++) {
            p->s->o.kernels->attention_combine(
                partials + h * floats, shard->n_heads * floats, n_runs, hd,
                p->s->attn + ((size_t)g->row0 * shard->n_heads + h) * hd);
        }
        partials += n_runs * shard->n_heads * floats;
    }
}

void stage_attend(StagePass *p, uint32_t layer)
{
    if (!attends_by_runs(p)) {
        attend_whole(p, layer);
        return;
    }
    attend_runs(p, layer);
    stage_meet(p);
    combine_runs(p);
}
