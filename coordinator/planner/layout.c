/* Cuts follow speed first, and fewer partial sums where speeds hardly differ. Where a rank then
 * passes its member's memory, they follow speed alone; after that its speed is marked down and
 * everything is cut again: its units move to the other ranks of the stage, or, when the whole stage
 * is too full, its layers to the other stages. Each round is deterministic and there are at
 * most FIT_ROUNDS of them. */
#include "coordinator/planner/layout.h"

#include "coordinator/planner/cost.h"
#include "proto/base/version.h"
#include "proto/plan/rank_span.h"

#include <math.h>

#define FIT_ROUNDS 32
#define STREAMS_AUTO 16u
#define STREAMS_LIMIT 1024u /* of a wish for memory alone: what a request may ask for at most */
/* Of the vocabulary projection's time, what counts when layers are cut: rows of prompts pass it by,
 * those that draw a token do not. Cut for either alone, the other would leave a stage idle for as
 * long as the projection takes. Reckoned from the times of ops, for 135 M in Q4_1 cut at a half, a
 * quarter, nothing: prompts by 1.67, 1.76, 2 of one worker at most; a step of 4 streams longer by 4
 * and 13 % than at a half, whose streams share its reading. */
#define HEAD_SHARE 0.25
/* Measurements of equal members differ by this much and more where some are taken under load. A cut
 * for fewer partial sums may last so much longer than the one by measured speed. */
#define SPEED_NOISE 0.05
#define PREDICT_DEPTH 512u /* decode is predicted in the middle of a context, at most here */

typedef struct Try {
    const Task *task;
    Layout layout;
    const PlanMember *const *members; /* of this replica, [pp*tp] */
    Plan *plan;
    PlanReplica *replica;
    double *rank_factor;  /* [pp*tp], <= 1: what memory leaves of the speed */
    double *crowding;     /* [pp*tp], among the ranks of the stage: cost.h */
    double *stage_factor; /* [pp], as rank_factor */
    double *stages_crowd; /* [pp], what stages that compute at once leave each other: cost.h */
    double *margin;       /* [pp], of cut_units(); 0 where memory needs the cut by speed */
    bool *is_cut;         /* [pp]: the stage's units fit its ranks' factors */
} Try;

void layout_task_init(Task *task)
{
    const ModelSpec *spec = task->spec;
    TensorRole head = spec->tied_output ? ROLE_TOKEN_EMBD : ROLE_OUTPUT;
    subtree_table_init(&task->attn, spec->n_attn_units);
    subtree_table_init(&task->ffn, spec->n_ffn_units);
    task->attn_bytes = task->ffn_bytes = 0.0;
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        const TensorSpec *t = &spec->tensors[i];
        if (t->layer >= 0) {
            double *sum = t->role <= ROLE_ATTN_OUT ? &task->attn_bytes : &task->ffn_bytes;
            *sum += (double)t->size_bytes / spec->n_layers;
        }
    }
    task->head_bytes = (double)model_spec_tensor(spec, head, -1)->size_bytes;
}

/* ---- cutting one replica ----------------------------------------------------------------------
 */

/* Bytes per second of member i of the replica beside the others of its stage. */
static double member_speed(const Try *t, uint32_t i)
{
    return speed_shared(speed_of(t->members[i]), t->crowding[i]).read_bytes_per_s;
}

/* Of rank k of stage s, marked down by what memory allows. */
static double rank_speed(const Try *t, uint32_t s, uint32_t k)
{
    uint32_t i = s * t->layout.tp + k;
    return member_speed(t, i) * t->rank_factor[i];
}

/* Of a stage while all compute: requests that follow each other keep them busy, and for one alone
 * any cut among the same CPUs is as good. */
static double stage_speed(const Try *t, uint32_t s)
{
    double sum = 0.0;
    for (uint32_t k = 0; k < t->layout.tp; k++) {
        sum += member_speed(t, s * t->layout.tp + k);
    }
    return sum * t->stage_factor[s] / t->stages_crowd[s];
}

static void assign_layers(Try *t)
{
    const ModelSpec *spec = t->task->spec;
    uint32_t pp = t->layout.pp;
    g_autofree double *layer_s = g_new(double, pp);
    g_autofree double *base_s = g_new0(double, pp);
    g_autofree uint32_t *counts = g_new(uint32_t, pp);
    for (uint32_t s = 0; s < pp; s++) {
        layer_s[s] = (t->task->attn_bytes + t->task->ffn_bytes) / stage_speed(t, s);
    }
    base_s[pp - 1] = HEAD_SHARE * t->task->head_bytes / stage_speed(t, pp - 1);
    cut_layers(spec->n_layers, layer_s, base_s, pp, counts);
    uint32_t layer = 0;
    for (uint32_t s = 0; s < pp; s++) {
        t->replica->stages[s].layer_first = layer;
        layer += counts[s];
        t->replica->stages[s].layer_last = layer - 1;
    }
}

/* Seconds that one more subtree costs in each exchange. */
static double subtree_s(const Try *t, uint32_t s)
{
    double latency, bandwidth;
    group_link_of(t->members + s * t->layout.tp, t->layout.tp, &latency, &bandwidth);
    return (t->layout.tp - 1) * 4.0 * t->task->spec->width / bandwidth;
}

static void assign_units(Try *t, uint32_t s)
{
    const ModelSpec *spec = t->task->spec;
    PlanStage *stage = &t->replica->stages[s];
    uint32_t tp = t->layout.tp;
    bool has_vocab = s == 0 || s + 1 == t->layout.pp;
    double attn_bytes = t->task->attn_bytes / spec->n_attn_units;
    double ffn_bytes = t->task->ffn_bytes / spec->n_ffn_units;
    g_autofree double *speed = g_new(double, tp);
    g_autofree double *attn_s = g_new(double, tp);
    g_autofree double *ffn_s = g_new(double, tp);
    uint32_t attn[PLAN_RANKS_LIMIT + 1], ffn[PLAN_RANKS_LIMIT + 1], vocab[PLAN_RANKS_LIMIT + 1];
    for (uint32_t k = 0; k < tp; k++) {
        speed[k] = rank_speed(t, s, k);
        attn_s[k] = attn_bytes / speed[k];
        ffn_s[k] = ffn_bytes / speed[k];
    }
    cut_units(&t->task->attn, attn_s, tp, subtree_s(t, s), t->margin[s], attn);
    cut_units(&t->task->ffn, ffn_s, tp, subtree_s(t, s), t->margin[s], ffn);
    plan_cut(has_vocab ? spec->n_vocab_chunks : 0, speed, tp, 0, vocab);
    for (uint32_t k = 0; k < tp; k++) {
        PlanRank *rank = &stage->ranks[k];
        rank->attn_first = attn[k];
        rank->attn_count = attn[k + 1] - attn[k];
        rank->ffn_first = ffn[k];
        rank->ffn_count = ffn[k + 1] - ffn[k];
        rank->vocab_first = vocab[k];
        rank->vocab_count = vocab[k + 1] - vocab[k];
    }
}

/* ---- fitting to memory ------------------------------------------------------------------------
 */

/* Marks down what is too full in one stage, once it is cut by speed alone: the stage as a whole, or
 * single ranks. True if all fit. */
static bool mark_down_stage(Try *t, uint32_t s)
{
    const PlanStage *stage = &t->replica->stages[s];
    double need = 0.0, have = 0.0;
    bool fits = true;
    for (uint32_t k = 0; k < stage->n_ranks; k++) {
        const PlanMember *member = t->members[s * t->layout.tp + k];
        need += (double)stage->ranks[k].peak_bytes;
        have += (double)member->memory_bytes;
        fits = fits && stage->ranks[k].peak_bytes <= member->memory_bytes;
    }
    if (fits) {
        return true;
    }
    if (t->margin[s] > 0.0) {
        t->margin[s] = 0.0;
        t->is_cut[s] = false;
        return false;
    }
    if (need > have || stage->n_ranks == 1) {
        t->stage_factor[s] *= MAX(0.2, MIN(0.93, have / need));
    }
    for (uint32_t k = 0; k < stage->n_ranks; k++) {
        double ratio = (double)t->members[s * t->layout.tp + k]->memory_bytes /
                       (double)stage->ranks[k].peak_bytes;
        if (ratio < 1.0) {
            t->rank_factor[s * t->layout.tp + k] *= MAX(0.2, MIN(0.93, ratio));
            t->is_cut[s] = false;
        }
    }
    return false;
}

/* No cut makes room where even the sum of all budgets is passed by a tenth: what ranks share
 * (norms, KV heads) is less. */
static bool is_hopeless(const Try *t)
{
    double need = 0.0, have = 0.0;
    for (uint32_t i = 0; i < t->layout.pp * t->layout.tp; i++) {
        need += (double)t->replica->stages[i / t->layout.tp].ranks[i % t->layout.tp].peak_bytes;
        have += (double)t->members[i]->memory_bytes;
    }
    return need > 1.1 * have;
}

static bool fit_replica(Try *t)
{
    for (int round = 0; round < FIT_ROUNDS; round++) {
        bool fits = true;
        assign_layers(t);
        for (uint32_t s = 0; s < t->layout.pp; s++) {
            if (!t->is_cut[s]) {
                assign_units(t, s);
                t->is_cut[s] = true;
            }
        }
        plan_measure(t->plan, t->task->spec, t->task->members, t->task->n_members);
        for (uint32_t s = 0; s < t->layout.pp; s++) {
            fits = mark_down_stage(t, s) && fits;
        }
        if (fits || is_hopeless(t)) {
            return fits;
        }
    }
    return false;
}

static void name_ranks(Try *t)
{
    t->replica->n_stages = t->layout.pp;
    t->replica->stages = g_new0(PlanStage, t->layout.pp);
    for (uint32_t s = 0; s < t->layout.pp; s++) {
        PlanStage *stage = &t->replica->stages[s];
        stage->n_ranks = t->layout.tp;
        stage->ranks = g_new0(PlanRank, t->layout.tp);
        for (uint32_t k = 0; k < t->layout.tp; k++) {
            stage->ranks[k].worker = g_strdup(t->members[s * t->layout.tp + k]->worker);
            stage->ranks[k].device = t->members[s * t->layout.tp + k]->device_index;
        }
    }
}

/* Of replica r, nothing marked down. */
static Try try_new(const Task *task, Layout layout, const PlanMember *const *members, Plan *plan,
                   uint32_t r, double margin)
{
    uint32_t pp = layout.pp, tp = layout.tp, n = pp * tp;
    Try t = {.task = task,
             .layout = layout,
             .members = members,
             .plan = plan,
             .replica = &plan->replicas[r],
             .rank_factor = g_new(double, n),
             .crowding = g_new(double, n),
             .stage_factor = g_new(double, pp),
             .stages_crowd = g_new(double, pp),
             .margin = g_new(double, pp),
             .is_cut = g_new0(bool, pp)};
    for (uint32_t i = 0; i < n; i++) {
        t.rank_factor[i] = 1.0;
    }
    g_autofree uint32_t *n_ranks = g_new(uint32_t, pp);
    for (uint32_t s = 0; s < pp; s++) {
        n_ranks[s] = tp;
        t.stage_factor[s] = 1.0;
        t.margin[s] = tp > 1 ? margin : 0.0;
        crowding_of(members + s * tp, tp, t.crowding + s * tp);
    }
    stage_crowding_of(members, n_ranks, pp, t.stages_crowd);
    return t;
}

static void try_clear(Try *t)
{
    g_free(t->rank_factor);
    g_free(t->crowding);
    g_free(t->stage_factor);
    g_free(t->stages_crowd);
    g_free(t->margin);
    g_free(t->is_cut);
}

/* Cuts every replica for the plan's present KV pages. */
static bool fit_plan(Plan *plan, const Task *task, Layout layout, const PlanMember *const *order)
{
    bool fits = true;
    for (uint32_t r = 0; r < layout.dp; r++) {
        Try t = try_new(task, layout, order + r * layout.pp * layout.tp, plan, r, SPEED_NOISE);
        if (t.replica->stages == NULL) {
            name_ranks(&t);
        }
        fits = fit_replica(&t) && fits;
        try_clear(&t);
    }
    return fits;
}

/* ---- KV memory --------------------------------------------------------------------------------
 */

static uint64_t pages_per_sequence(const Task *task)
{
    return ((uint64_t)task->context + KV_BLOCK - 1) / KV_BLOCK;
}

/* kv_memory is per worker: the rank with the most bytes per token decides. */
static void pages_by_memory(Plan *plan, const Task *task)
{
    uint64_t most = 1;
    for (uint32_t r = 0; r < plan->n_replicas; r++) {
        for (uint32_t s = 0; s < plan->replicas[r].n_stages; s++) {
            const PlanStage *stage = &plan->replicas[r].stages[s];
            for (uint32_t k = 0; k < stage->n_ranks; k++) {
                most = MAX(most, stage->ranks[k].kv_bytes_per_token);
            }
        }
    }
    plan->kv_pages = MAX(task->wish->kv_memory / (KV_BLOCK * most), 1);
    uint64_t most_streams = task->wish->streams != 0 ? task->wish->streams : STREAMS_LIMIT;
    plan->streams = (uint32_t)CLAMP(plan->kv_pages / pages_per_sequence(task), 1, most_streams);
}

static void pages_by_streams(Plan *plan, const Task *task, uint32_t streams)
{
    plan->streams = streams;
    plan->kv_pages = pages_per_sequence(task) * streams;
}

static bool fit_with_kv(Plan *plan, const Task *task, Layout layout, const PlanMember *const *order)
{
    const PlanWish *wish = task->wish;
    if (wish->kv_memory != 0) {
        /* The cut decides bytes per token and the pages the cut: once each way is enough, memory is
         * checked after. */
        pages_by_streams(plan, task, 1);
        fit_plan(plan, task, layout, order);
        pages_by_memory(plan, task);
        return fit_plan(plan, task, layout, order);
    }
    if (wish->streams != 0) {
        pages_by_streams(plan, task, wish->streams);
        return fit_plan(plan, task, layout, order);
    }
    pages_by_streams(plan, task, 1);
    if (!fit_plan(plan, task, layout, order)) {
        return false;
    }
    for (uint32_t streams = STREAMS_AUTO; streams >= 1; streams /= 2) {
        pages_by_streams(plan, task, streams);
        if (fit_plan(plan, task, layout, order)) {
            return true;
        }
    }
    return false;
}

/* ---- one try ----------------------------------------------------------------------------------
 */

static void predict(Plan *plan, const Task *task)
{
    uint32_t depth = MIN(plan->definition.context / 2, PREDICT_DEPTH);
    PlanCost decode = planner_cost(plan, task->spec, task->members, task->n_members, 0, 1, depth);
    uint32_t chunk = MAX(plan->max_rows, MIN(plan->streams + 1, plan->definition.context));
    PlanCost prefill =
        planner_cost(plan, task->spec, task->members, task->n_members, 0, chunk, depth);
    plan->predicted.decode_tokens_per_s = 1.0 / decode.latency_s;
    plan->predicted.prefill_tokens_per_s = chunk / prefill.slowest_stage_s;
    bool is_link = decode.link_s > decode.memory_s && decode.link_s > decode.compute_s;
    plan->predicted.bound = is_link                              ? "link"
                            : decode.compute_s > decode.memory_s ? "compute"
                                                                 : "memory";
}

static uint64_t missing_memory(const Plan *plan, const Task *task)
{
    uint64_t missing = 0;
    for (uint32_t r = 0; r < plan->n_replicas; r++) {
        for (uint32_t s = 0; s < plan->replicas[r].n_stages; s++) {
            const PlanStage *stage = &plan->replicas[r].stages[s];
            for (uint32_t k = 0; k < stage->n_ranks; k++) {
                const PlanMember *m = plan_member_find(
                    task->members, task->n_members, stage->ranks[k].worker, stage->ranks[k].device);
                uint64_t peak = stage->ranks[k].peak_bytes;
                missing += peak > m->memory_bytes ? peak - m->memory_bytes : 0;
            }
        }
    }
    return missing;
}

Plan *layout_by_speed(const Task *task, const Plan *plan)
{
    Layout layout;
    Plan *copy = plan_copy(plan);
    plan_layout(plan, &layout.dp, &layout.pp, &layout.tp);
    const uint32_t n = layout.pp * layout.tp;
    g_autofree const PlanMember **members = g_new(const PlanMember *, n);
    for (uint32_t i = 0; i < n; i++) {
        const PlanRank *rank = &plan->replicas[0].stages[i / layout.tp].ranks[i % layout.tp];
        members[i] = plan_member_find(task->members, task->n_members, rank->worker, rank->device);
    }
    Try t = try_new(task, layout, members, copy, 0, 0.0);
    for (uint32_t s = 0; s < layout.pp; s++) {
        assign_units(&t, s);
    }
    try_clear(&t);
    plan_measure(copy, task->spec, task->members, task->n_members);
    if (missing_memory(copy, task) == 0) {
        predict(copy, task);
        return copy;
    }
    plan_free(copy);
    return NULL;
}

Plan *layout_try(const Task *task, Layout layout, const PlanMember *const *order,
                 uint64_t *missing_bytes)
{
    const PlanWish *wish = task->wish;
    Plan *plan = g_new0(Plan, 1);
    plan->job = g_strdup(wish->job != NULL ? wish->job : "");
    plan->model = g_strdup(wish->model != NULL ? wish->model : "");
    plan->definition = (Definition){WEFT_NUMERICS_VERSION,
                                    wish->numerics,
                                    wish->kv_type,
                                    task->context,
                                    0,
                                    task->spec->file_hash,
                                    ""};
    g_strlcpy(plan->definition.exact_kind, task->kind, sizeof plan->definition.exact_kind);
    plan->max_rows = wish->max_rows;
    plan->reasons = g_ptr_array_new_with_free_func(g_free);
    plan->n_replicas = layout.dp;
    plan->replicas = g_new0(PlanReplica, layout.dp);
    fit_with_kv(plan, task, layout, order);
    *missing_bytes = missing_memory(plan, task);
    if (*missing_bytes == 0) {
        predict(plan, task);
    }
    return plan;
}
