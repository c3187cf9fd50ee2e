/* The Llama family's forward pass: RMS norm, grouped-query attention with RoPE, SwiGLU feed-forward
 * (Touvron et al. 2023, arXiv 2302.13971), on one tensor rank of one stage. Reads top to bottom:
 * llama_embed, layer(), llama_logits.
 *
 * Every op is a phase of one pool region: threads share its outputs, then meet at a barrier. Thread
 * 0 alone talks (group, links), between barriers. A thread never splits a sum: sums are lanes,
 * units and the tree (NUMERICS 1-3), so thread counts change no bit. */
#include "worker/model/stage.h"

#include <string.h>

typedef struct Pass {
    Stage *s;
    const StageRun *run;
    uint32_t rows;
    GroupStatus status; /* written by thread 0 before a barrier, read by all after it */
} Pass;

static void progress(Pass *p, unsigned t)
{
    if (t == 0 && p->s->o.progress != NULL) {
        p->s->o.progress(p->s->o.progress_user);
    }
}

static void meet(Pass *p)
{
    pool_barrier(p->s->o.pool);
}

/* The barrier that ends an op. */
static void end(Pass *p, StageOp op, unsigned t)
{
    meet(p);
    if (t == 0) {
        stage_times_mark(&p->s->times, op);
    }
}

/* ---- pieces ---- */

/* One matrix of a phase; several share the phase's panels so that all threads end together. */
typedef struct Product {
    const PackedMatrix *w;
    float *out;
    size_t ld;
} Product;

static uint32_t panels_of(const PackedMatrix *w)
{
    return (w->n_out + PANEL_ROWS - 1) / PANEL_ROWS;
}

static void products(Pass *p, const Product *list, unsigned n, const MatmulUnit *units,
                     uint32_t n_units, size_t subtree_stride, unsigned t, unsigned n_threads)
{
    uint32_t total = 0, first, last, base = 0;
    for (unsigned i = 0; i < n; i++) {
        total += panels_of(list[i].w);
    }
    pool_share(total, 1, t, n_threads, &first, &last);
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

/* Quantises rows of `x` for every kind that the matrices want. */
static void quantise(Pass *p, const float *x, uint32_t n_in, const PackedMatrix *const *users,
                     unsigned n_users, unsigned t, unsigned n_threads)
{
    bool wanted[ACT_KIND_LIMIT] = {false};
    for (unsigned i = 0; i < n_users; i++) {
        wanted[act_kind_of(users[i]->type)] = true;
    }
    uint32_t first, last;
    pool_share(p->rows, ACT_ROW_GROUP, t, n_threads, &first, &last);
    for (int kind = 0; first < last && kind < ACT_KIND_LIMIT; kind++) {
        if (wanted[kind]) {
            p->s->o.kernels->act_quantise[kind](x, n_in, p->rows, first, last, n_in,
                                                p->s->act[kind]);
        }
    }
}

static void norm_rows(Pass *p, const float *weight, unsigned t, unsigned n_threads)
{
    const uint32_t width = p->s->o.spec->width;
    uint32_t first, last;
    pool_share(p->rows, ACT_ROW_GROUP, t, n_threads, &first, &last);
    for (uint32_t r = first; r < last; r++) {
        p->s->o.kernels->rms_norm(p->s->x + (size_t)r * width, weight, p->s->o.spec->norm_eps,
                                  width, p->s->h + (size_t)r * width);
    }
}

static void add_bias(float *rows, const float *bias, uint32_t n, uint32_t n_rows, const Kernels *k)
{
    for (uint32_t r = 0; bias != NULL && r < n_rows; r++) {
        k->add(rows + (size_t)r * n, bias, n);
    }
}

/* Completes the unit tree of a cut product over the tensor ranks: partial[0] becomes the root. */
static void reduce(Pass *p, const StageUnits *units, uint16_t site, const char *operation,
                   unsigned t)
{
    Stage *s = p->s;
    if (s->group == NULL) {
        return; /* one rank: the product folded all units already */
    }
    if (t == 0) {
        const size_t n = (size_t)p->rows * s->o.spec->width;
        const GroupWait wait = {.step = p->run->step->number,
                                .site = site,
                                .deadline_us = g_get_monotonic_time() + p->run->deadline_us,
                                .operation = operation};
        p->status = group_all_reduce(s->group, &wait, units->n_leaves, units->cuts, s->partial,
                                     (size_t)s->max_rows * s->o.spec->width, n, s->partial);
    }
    end(p, STAGE_OP_REDUCE, t);
}

static void add_residual(Pass *p, unsigned t, unsigned n_threads)
{
    const uint32_t width = p->s->o.spec->width;
    uint32_t first, last;
    pool_share(p->rows, ACT_ROW_GROUP, t, n_threads, &first, &last);
    if (first < last) {
        p->s->o.kernels->add(p->s->x + (size_t)first * width, p->s->partial + (size_t)first * width,
                             (size_t)(last - first) * width);
    }
}

/* x is complete after a sub-layer: the rows that this thread has just written are hashed if they
 * are traced. */
static void trace_rows(Pass *p, uint32_t site, unsigned t, unsigned n_threads)
{
    uint32_t first, last;
    if (p->run->trace != NULL) {
        pool_share(p->rows, ACT_ROW_GROUP, t, n_threads, &first, &last);
        stage_trace_rows(p->run->trace, site, p->s->x, p->s->o.spec->width, first, last);
    }
}

/* Fail point: the lowest bit of the last row's first element, by the thread that owns the row. */
static void flip_bit(Pass *p, uint32_t layer, unsigned t, unsigned n_threads)
{
    uint32_t first, last, bits;
    if (p->run->flip_layer == (int64_t)layer) {
        pool_share(p->rows, ACT_ROW_GROUP, t, n_threads, &first, &last);
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

/* Rotates q and k of own rows and writes k, v to their pages. */
static void rotate_and_store(Pass *p, uint32_t layer, unsigned t, unsigned n_threads)
{
    Stage *s = p->s;
    const Shard *shard = s->o.shard;
    const ModelSpec *spec = s->o.spec;
    const LayerWeights *w = &shard->layers[layer];
    const uint32_t hd = spec->head_size, half = spec->rope.dims / 2;
    const uint32_t nq = shard->n_heads * hd, nk = shard->n_kv_heads * hd;
    uint32_t first, last;
    pool_share(p->rows, 1, t, n_threads, &first, &last);
    for (uint32_t r = first; r < last; r++) {
        const StepSegment *g = segment_of(p->run->step, r);
        const uint32_t position = g->position + (r - g->row0);
        const float *c = s->rope_cos + (size_t)position * half,
                    *sn = s->rope_sin + (size_t)position * half;
        float *q = s->q + (size_t)r * nq, *k = s->k + (size_t)r * nk, *v = s->v + (size_t)r * nk;
        add_bias(q, w->q_bias, nq, 1, s->o.kernels);
        add_bias(k, w->k_bias, nk, 1, s->o.kernels);
        add_bias(v, w->v_bias, nk, 1, s->o.kernels);
        s->o.kernels->rope_apply(q, shard->n_heads, hd, spec->rope.dims, spec->rope.pairing, c, sn);
        s->o.kernels->rope_apply(k, shard->n_kv_heads, hd, spec->rope.dims, spec->rope.pairing, c,
                                 sn);
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
static void attend_tile(Pass *p, uint32_t layer, const StepSegment *g, uint32_t row,
                        uint32_t n_rows, uint32_t kv, uint32_t run, float *partial, unsigned t)
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
    const uint8_t **k_blocks = s->blocks[t], **v_blocks = k_blocks + n_blocks;
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
        .scratch = s->scratch[t],
        .partial = partial,
        .run = run,
    };
    s->o.kernels->attention[s->o.plan->definition.kv_type](&args);
}

/* Work items (row tile x KV head) go round the threads: causal tiles grow, so neighbours balance.
 */
static void attend_whole(Pass *p, uint32_t layer, unsigned t, unsigned n_threads)
{
    const Step *step = p->run->step;
    uint32_t item = 0;
    for (uint32_t i = 0; i < step->n_segments; i++) {
        const StepSegment *g = &step->segments[i];
        for (uint32_t r = 0; r < g->n_rows; r += ROW_TILE) {
            for (uint32_t kv = 0; kv < p->s->o.shard->n_kv_heads; kv++, item++) {
                if (item % n_threads == t) {
                    attend_tile(p, layer, g, g->row0 + r, MIN(ROW_TILE, g->n_rows - r), kv, 0, NULL,
                                t);
                }
            }
        }
    }
}

/* Decoding few sequences, (row, KV head) pairs are too few to occupy the threads evenly: the items
 * are runs of keys, whose partials lie in s->gate (free until the feed-forward) as [run][own head],
 * segment after segment, and are combined behind a barrier. The same bits. */
enum { ITEMS_PER_THREAD = 4 }; /* more whole items than this balance by themselves */

static bool attends_by_runs(const Pass *p, unsigned n_threads)
{
    const Step *step = p->run->step;
    const Shard *shard = p->s->o.shard;
    const size_t capacity = (size_t)p->s->max_rows * shard->layers[0].gate.n_out;
    size_t runs = 0;
    uint32_t longest = 0;
    for (uint32_t i = 0; i < step->n_segments; i++) {
        const uint32_t n = attention_runs(step->segments[i].position + 1);
        longest = MAX(longest, n);
        runs += n;
    }
    return n_threads > 1 && step->n_segments == p->rows && longest > 1 &&
           step->n_segments * shard->n_kv_heads < ITEMS_PER_THREAD * n_threads &&
           runs * shard->n_heads * attention_partial_floats(p->s->o.spec->head_size) <= capacity;
}

static void attend_runs(Pass *p, uint32_t layer, unsigned t, unsigned n_threads)
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
                if (item % n_threads == t) {
                    attend_tile(p, layer, g, g->row0, 1, kv, run,
                                partials + (run * shard->n_heads + h0 - shard->head_first) * floats,
                                t);
                }
            }
        }
        partials += n_runs * shard->n_heads * floats;
    }
}

static void combine_runs(Pass *p, unsigned t, unsigned n_threads)
{
    const Step *step = p->run->step;
    const Shard *shard = p->s->o.shard;
    const uint32_t hd = p->s->o.spec->head_size;
    const size_t floats = attention_partial_floats(hd);
    float *partials = p->s->gate;
    uint32_t first, last;
    pool_share(shard->n_heads, 1, t, n_threads, &first, &last);
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

static void attend(Pass *p, uint32_t layer, unsigned t, unsigned n_threads)
{
    if (!attends_by_runs(p, n_threads)) {
        attend_whole(p, layer, t, n_threads);
        return;
    }
    attend_runs(p, layer, t, n_threads);
    meet(p);
    combine_runs(p, t, n_threads);
}

/* ---- a layer, top to bottom ---- */

static bool layer(Pass *p, uint32_t l, unsigned t, unsigned n_threads)
{
    Stage *s = p->s;
    const Shard *shard = s->o.shard;
    const LayerWeights *w = &shard->layers[l];
    const uint32_t width = s->o.spec->width, hd = s->o.spec->head_size;
    const uint32_t nq = shard->n_heads * hd, nk = shard->n_kv_heads * hd, nf = w->gate.n_out;
    const size_t subtree = (size_t)s->max_rows * width;
    const uint16_t site = (uint16_t)(2 * (shard->layer_first + l));

    norm_rows(p, w->attn_norm, t,
              n_threads); /* same row shares as quantise(): no barrier between */
    quantise(p, s->h, width, (const PackedMatrix *const[]){&w->q, &w->k, &w->v}, 3, t, n_threads);
    end(p, STAGE_OP_NORM, t);
    products(p, (const Product[]){{&w->q, s->q, nq}, {&w->k, s->k, nk}, {&w->v, s->v, nk}}, 3,
             &s->whole_width, 1, 0, t, n_threads);
    end(p, STAGE_OP_QKV, t);
    progress(p, t);
    rotate_and_store(p, l, t, n_threads);
    end(p, STAGE_OP_ROPE, t);
    attend(p, l, t, n_threads);
    end(p, STAGE_OP_ATTENTION, t);
    quantise(p, s->attn, nq, (const PackedMatrix *const[]){&w->attn_out}, 1, t, n_threads);
    end(p, STAGE_OP_NORM, t);
    products(p, (const Product[]){{&w->attn_out, s->partial, width}}, 1, s->attn_units.units,
             s->attn_units.n_units, subtree, t, n_threads);
    end(p, STAGE_OP_ATTN_OUT, t);
    reduce(p, &s->attn_units, (uint16_t)(site + 1), "all-reduce of attention", t);
    if (p->status != GROUP_OK) {
        return false;
    }
    add_residual(p, t, n_threads);
    trace_rows(p, trace_site_attention(shard->layer_first + l), t, n_threads);
    norm_rows(p, w->ffn_norm, t, n_threads);
    quantise(p, s->h, width, (const PackedMatrix *const[]){&w->gate, &w->up}, 2, t, n_threads);
    end(p, STAGE_OP_NORM, t);
    products(p, (const Product[]){{&w->gate, s->gate, nf}, {&w->up, s->up, nf}}, 2, &s->whole_width,
             1, 0, t, n_threads);
    end(p, STAGE_OP_GATE_UP, t);
    progress(p, t);
    uint32_t first, last;
    pool_share(p->rows, ACT_ROW_GROUP, t, n_threads, &first, &last);
    if (first < last) {
        s->o.kernels->swiglu(s->gate + (size_t)first * nf, s->up + (size_t)first * nf,
                             (last - first) * nf, s->gate + (size_t)first * nf);
    }
    quantise(p, s->gate, nf, (const PackedMatrix *const[]){&w->down}, 1, t, n_threads);
    end(p, STAGE_OP_ACTIVATION, t);
    products(p, (const Product[]){{&w->down, s->partial, width}}, 1, s->ffn_units.units,
             s->ffn_units.n_units, subtree, t, n_threads);
    end(p, STAGE_OP_DOWN, t);
    reduce(p, &s->ffn_units, (uint16_t)(site + 2), "all-reduce of feed-forward", t);
    if (p->status != GROUP_OK) {
        return false;
    }
    add_residual(p, t, n_threads);
    flip_bit(p, shard->layer_first + l, t, n_threads);
    trace_rows(p, trace_site_ffn(shard->layer_first + l), t, n_threads);
    return true;
}

static void layers_region(void *user, unsigned t, unsigned n_threads)
{
    Pass *p = user;
    if (t == 0) {
        stage_times_begin(&p->s->times);
    }
    for (uint32_t l = 0; l < p->s->o.shard->n_layers; l++) {
        if (!layer(p, l, t, n_threads)) {
            return;
        }
    }
}

GroupStatus llama_layers(Stage *stage, const StageRun *run)
{
    Pass p = {.s = stage, .run = run, .rows = run->step->n_rows, .status = GROUP_OK};
    pool_run(stage->o.pool, layers_region, &p);
    return p.status;
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

static GroupStatus gather_embedding(Stage *s, const StageRun *run)
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
    float *mine = parts[s->o.rank];
    for (uint32_t r = 0; r < step->n_rows; r++) {
        if (owner_of(s, step->rows[r].token) == s->o.rank) {
            packed_get_row(&s->o.shard->embedding, step->rows[r].token - s->o.shard->vocab_first,
                           mine);
            mine += s->o.spec->width;
        }
    }
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

GroupStatus llama_embed(Stage *stage, const StageRun *run)
{
    if (stage->group != NULL) {
        return gather_embedding(stage, run);
    }
    const Step *step = run->step;
    for (uint32_t r = 0; r < step->n_rows; r++) {
        packed_get_row(&stage->o.shard->embedding, step->rows[r].token,
                       stage->x + (size_t)r * stage->o.spec->width);
    }
    return GROUP_OK;
}

/* ---- vocabulary projection of some rows ---- */

typedef struct LogitsPass {
    Pass pass;
    const uint32_t *rows;
} LogitsPass;

static void logits_region(void *user, unsigned t, unsigned n_threads)
{
    LogitsPass *lp = user;
    Pass *p = &lp->pass;
    Stage *s = p->s;
    const uint32_t width = s->o.spec->width;
    const PackedMatrix *head = shard_head(s->o.shard);
    uint32_t first, last;
    pool_share(p->rows, ACT_ROW_GROUP, t, n_threads, &first, &last);
    for (uint32_t i = first; i < last; i++) {
        s->o.kernels->rms_norm(s->x + (size_t)lp->rows[i] * width, s->o.shard->output_norm,
                               s->o.spec->norm_eps, width, s->h + (size_t)i * width);
    }
    quantise(p, s->h, width, &head, 1, t, n_threads);
    meet(p);
    products(p, (const Product[]){{head, s->logits, s->o.shard->vocab_count}}, 1, &s->whole_width,
             1, 0, t, n_threads);
}

void llama_logits(Stage *stage, const uint32_t *rows, uint32_t n)
{
    LogitsPass lp = {.pass = {.s = stage, .run = NULL, .rows = n, .status = GROUP_OK},
                     .rows = rows};
    g_assert(n <= STAGE_LOGITS_ROWS);
    if (stage->o.shard->vocab_count > 0) {
        stage_times_begin(&stage->times);
        pool_run(stage->o.pool, logits_region, &lp);
        stage_times_mark(&stage->times, STAGE_OP_HEAD);
    }
}
