/* Seconds of one step, from measured speeds.
 *
 * A layer on a stage of n ranks is: attention part on all ranks, exchange, FFN part on all ranks,
 * exchange. A part lasts as long as its slowest rank; a rank takes the longer of reading its bytes
 * (weights once a step, KV once a sequence) and computing (2 operations per weight and row;
 * attention 4 per row, key and query element), and a constant per op for dispatch and barriers. The
 * vocabulary projection is one more part; a stage boundary is one message; FORMULAS 7a gives the
 * bytes of an exchange, by the partial sums that the cut of attention or FFN makes of each rank. */
#include "coordinator/planner/planner.h"

#include "coordinator/planner/cost.h"
#include "proto/plan/cpu_share.h"
#include "proto/plan/rank_span.h"

#include <string.h>

#define OP_OVERHEAD_S 3e-6 /* measured: one pool dispatch with its barrier on two cores */
#define OPS_PER_PART                                                                               \
    4.0 /* norm, quantise, products, attention or activation, add: half of a layer's */
#define SHARED_LATENCY_S 2e-6 /* WIRE.md: shared flags, 8 KiB */
#define SHARED_BYTES_PER_S 8e9
/* A collective of NCCL among GPUs of one host, by what others publish of hosts without NVLink; to
 * be replaced by a measurement. */
#define DEVICES_LATENCY_S 15e-6
#define DEVICES_BYTES_PER_S 20e9
#define SWITCH_S 20e-6 /* to run another rank on this rank's CPU: measured, sched_yield() */
/* For members that have not measured: below any machine that is worth using. */
#define DEFAULT_READ_BYTES_PER_S 8e9
#define DEFAULT_INT8_OPS_PER_S 50e9
#define DEFAULT_F32_OPS_PER_S 20e9
#define DEFAULT_LINK_LATENCY_S 50e-6
#define DEFAULT_LINK_BYTES_PER_S 1e8

/* A member says what it measured; NaN, nothing and absurd numbers must not break sums and
 * quotients. */
static double known(double measured, double fallback)
{
    return measured > 1e-12 && measured < 1e18 ? measured : fallback;
}

Speed speed_of(const PlanMember *member)
{
    static const PlanMember nothing;
    const PlanMember *m = member != NULL ? member : &nothing;
    Speed speed = {
        known(m->read_bytes_per_s, DEFAULT_READ_BYTES_PER_S),
        known(m->int8_ops_per_s, DEFAULT_INT8_OPS_PER_S),
        known(m->f32_ops_per_s, DEFAULT_F32_OPS_PER_S),
        known(m->link_latency_s, DEFAULT_LINK_LATENCY_S),
        known(m->link_bytes_per_s, DEFAULT_LINK_BYTES_PER_S),
        {0},
    };
    for (uint32_t type = 0; type < DTYPE_LIMIT; type++) {
        /* F8_E4M3 is multiplied as floats are. */
        const bool in_int8 = dtype_info(type)->block > 1 && type != DTYPE_F8_E4M3;
        speed.matmul_ops_per_s[type] =
            known(m->matmul_ops_per_s[type], in_int8 ? speed.int8_ops_per_s : speed.f32_ops_per_s);
    }
    return speed;
}

Speed speed_shared(Speed speed, double crowding)
{
    speed.read_bytes_per_s /= crowding;
    speed.int8_ops_per_s /= crowding;
    speed.f32_ops_per_s /= crowding;
    for (uint32_t type = 0; type < DTYPE_LIMIT; type++) {
        speed.matmul_ops_per_s[type] /= crowding;
    }
    return speed;
}

void crowding_of(const PlanMember *const *members, uint32_t n_members, double *out)
{
    g_autofree CpuShare *shares = g_new0(CpuShare, n_members);
    for (uint32_t i = 0; i < n_members; i++) {
        const PlanMember *m = members[i];
        if (m != NULL && m->device == NULL) { /* a device's rank leaves the cores alone */
            shares[i] = (CpuShare){m->host, m->threads, m->cpus, m->n_cpus};
        }
    }
    for (uint32_t i = 0; i < n_members; i++) {
        out[i] = cpu_crowding(shares, n_members, i);
    }
}

void stage_crowding_of(const PlanMember *const *members, const uint32_t *n_ranks, uint32_t n_stages,
                       double *out)
{
    double within[PLAN_RANKS_LIMIT];
    uint32_t n = 0;
    for (uint32_t s = 0; s < n_stages; s++) {
        n += n_ranks[s];
    }
    g_autofree double *crowding = g_new(double, n);
    crowding_of(members, n, crowding);
    for (uint32_t s = 0, at = 0; s < n_stages; at += n_ranks[s++]) {
        crowding_of(members + at, n_ranks[s], within);
        out[s] = 1.0;
        for (uint32_t k = 0; k < n_ranks[s]; k++) {
            out[s] = MAX(out[s], crowding[at + k] / within[k]);
        }
    }
}

static const PlanMember *member_of_rank(const PlanMember *members, uint32_t n_members,
                                        const PlanRank *rank)
{
    return plan_member_find(members, n_members, rank->worker, rank->device);
}

void link_of(const PlanMember *const *members, uint32_t n_members, double *latency_s,
             double *bytes_per_s)
{
    bool one_host = n_members > 0;
    *latency_s = 0.0;
    *bytes_per_s = 0.0;
    for (uint32_t i = 0; i < n_members; i++) {
        Speed speed = speed_of(members[i]);
        *latency_s = MAX(*latency_s, speed.link_latency_s);
        *bytes_per_s = i == 0 ? speed.link_bytes_per_s : MIN(*bytes_per_s, speed.link_bytes_per_s);
        one_host = one_host && members[i] != NULL && !members[i]->tcp_only &&
                   members[i]->host != NULL && strcmp(members[i]->host, members[0]->host) == 0;
    }
    if (one_host) {
        *latency_s = MIN(*latency_s, SHARED_LATENCY_S);
        *bytes_per_s = MAX(*bytes_per_s, SHARED_BYTES_PER_S);
    }
}

void group_link_of(const PlanMember *const *members, uint32_t n_members, double *latency_s,
                   double *bytes_per_s)
{
    bool devices = n_members > 0;
    link_of(members, n_members, latency_s, bytes_per_s);
    for (uint32_t i = 0; i < n_members; i++) {
        devices = devices && members[i] != NULL && members[i]->device != NULL &&
                  members[i]->host != NULL && strcmp(members[i]->host, members[0]->host) == 0;
    }
    if (devices) {
        *latency_s = DEVICES_LATENCY_S;
        *bytes_per_s = DEVICES_BYTES_PER_S;
    }
}

/* ---- one part of one stage --------------------------------------------------------------------
 */

typedef struct Step {
    uint32_t rows;        /* through the layers */
    uint32_t sequences;   /* each reads its own KV */
    uint32_t logits_rows; /* through the vocabulary projection */
    uint32_t depth;       /* keys per sequence */
} Step;

typedef struct Context {
    const Plan *plan;
    const ModelSpec *spec;
    const PlanMember *members;
    uint32_t n_members;
    const PlanReplica *replica;
    const PlanStage *stage;
    const PlanMember **ranks; /* members of the stage's ranks */
    Speed *speeds;            /* theirs, as far as the stage's ranks leave each other the CPUs */
    bool crowded;             /* they do not have them to themselves */
} Context;

typedef struct Part {
    double memory_s, compute_s;
} Part;

static void add_tensor(const Context *c, uint32_t k, const TensorSpec *t, uint32_t rows, Part *part)
{
    if (t == NULL) {
        return;
    }
    SliceSpan span = rank_span(c->spec, c->replica, c->stage, &c->stage->ranks[k], t);
    Speed speed = c->speeds[k];
    double ops = 2.0 * (double)span_elements(c->spec, t, span) * rows;
    part->memory_s +=
        (double)packed_span_bytes(c->spec, t, span, c->ranks[k]) / speed.read_bytes_per_s;
    part->compute_s += ops / speed.matmul_ops_per_s[t->type];
}

static void add_attention(const Context *c, uint32_t k, const Step *step, Part *part)
{
    uint32_t first, n_heads, kv_first, n_kv_heads;
    rank_heads(c->spec, &c->stage->ranks[k], &first, &n_heads);
    model_spec_kv_heads_of(c->spec, first, n_heads, &kv_first, &n_kv_heads);
    Speed speed = c->speeds[k];
    double depth = c->spec->window != 0 ? MIN(step->depth, c->spec->window) : step->depth;
    double size = c->spec->head_size,
           row_bytes = kv_row_bytes(c->plan->definition.kv_type, c->spec->head_size);
    part->memory_s +=
        step->sequences * depth * n_kv_heads * 2.0 * row_bytes / speed.read_bytes_per_s;
    part->compute_s += 4.0 * step->rows * depth * n_heads * size / speed.f32_ops_per_s;
}

/* Adds the slowest rank of a part to the sums and returns how long it takes. */
static double close_part(const Part *parts, uint32_t n_ranks, double n_ops, PlanCost *cost)
{
    Part worst = {0};
    for (uint32_t k = 0; k < n_ranks; k++) {
        if (MAX(parts[k].memory_s, parts[k].compute_s) > MAX(worst.memory_s, worst.compute_s)) {
            worst = parts[k];
        }
    }
    double overhead = n_ops * OP_OVERHEAD_S;
    if (worst.memory_s >= worst.compute_s) {
        cost->memory_s += worst.memory_s;
    } else {
        cost->compute_s += worst.compute_s;
    }
    cost->compute_s += overhead;
    return MAX(worst.memory_s, worst.compute_s) + overhead;
}

/* What the ranks of a stage send each other of a sum: vectors, or their rows' bytes. */
typedef struct Sums {
    double most, all; /* of one rank, of all */
} Sums;

static Sums sums_of(const Context *c, uint32_t (*subtrees)(const ModelSpec *, const PlanRank *))
{
    Sums sums = {0};
    for (uint32_t k = 0; k < c->stage->n_ranks; k++) {
        double own = subtrees(c->spec, &c->stage->ranks[k]);
        sums.most = MAX(sums.most, own);
        sums.all += own;
    }
    return sums;
}

static void stage_link(const Context *c, double *latency_s, double *bytes_per_s)
{
    group_link_of(c->ranks, c->stage->n_ranks, latency_s, bytes_per_s);
    *latency_s += c->crowded ? SWITCH_S : 0.0;
}

/* FORMULAS 7a, as the ranks' group does it: everybody to everybody, or reduce-scatter and
 * all-gather where those send less of what is large. *sent_bytes grows by what all ranks send. */
static double exchange_s(const Context *c, uint32_t rows, Sums subtrees, double *sent_bytes)
{
    double n = c->stage->n_ranks, latency, bandwidth;
    if (c->stage->n_ranks < 2) {
        return 0.0;
    }
    stage_link(c, &latency, &bandwidth);
    const double bytes = 4.0 * rows * c->spec->width;
    const Sums one = {(n - 1) * subtrees.most * bytes, (n - 1) * subtrees.all * bytes},
               two = {(n - 1) / n * (subtrees.most + 1) * bytes,
                      (n - 1) / n * (subtrees.all + n) * bytes};
    const bool in_two = bytes >= PLAN_TWO_SHOT_BYTES && two.all < one.all;
    *sent_bytes += in_two ? two.all : one.all;
    return (in_two ? 2 : 1) * (n - 1) * latency + (in_two ? two.most : one.most) / bandwidth;
}

/* Rows of the embedding, each from its one owner to all others. */
static double gather_s(const Context *c, uint32_t rows)
{
    double n = c->stage->n_ranks, latency, bandwidth;
    if (c->stage->n_ranks < 2) {
        return 0.0;
    }
    stage_link(c, &latency, &bandwidth);
    return (n - 1) * (latency + MAX(rows / n, 1.0) * 4.0 * c->spec->width / bandwidth);
}

/* Roles [first, last] of a layer on every rank. */
static double layer_part(const Context *c, const Step *step, uint32_t layer, TensorRole first,
                         TensorRole last, PlanCost *cost)
{
    g_autofree Part *parts = g_new0(Part, c->stage->n_ranks);
    for (uint32_t k = 0; k < c->stage->n_ranks; k++) {
        for (uint32_t role = first; role <= last; role++) {
            add_tensor(c, k, model_spec_tensor(c->spec, (TensorRole)role, (int32_t)layer),
                       step->rows, &parts[k]);
        }
        if (first == ROLE_ATTN_NORM) {
            add_attention(c, k, step, &parts[k]);
        }
    }
    return close_part(parts, c->stage->n_ranks, OPS_PER_PART, cost);
}

static double head_part(const Context *c, const Step *step, PlanCost *cost)
{
    TensorRole role = c->spec->tied_output ? ROLE_TOKEN_EMBD : ROLE_OUTPUT;
    g_autofree Part *parts = g_new0(Part, c->stage->n_ranks);
    for (uint32_t k = 0; k < c->stage->n_ranks; k++) {
        add_tensor(c, k, model_spec_tensor(c->spec, role, -1), step->logits_rows, &parts[k]);
    }
    return close_part(parts, c->stage->n_ranks, OPS_PER_PART, cost);
}

/* Layers whose tensors are of the same types cost the same. */
static bool is_like_previous(const ModelSpec *spec, uint32_t layer)
{
    const TensorSpec *a = model_spec_tensor(spec, ROLE_ATTN_NORM, (int32_t)layer - 1);
    const TensorSpec *b = model_spec_tensor(spec, ROLE_ATTN_NORM, (int32_t)layer);
    for (; a->layer + 1 == (int32_t)layer && b->layer == (int32_t)layer; a++, b++) {
        if (a->role != b->role || a->type != b->type) {
            return false;
        }
    }
    return a->layer == (int32_t)layer; /* both ended together */
}

/* The stage's layers without their exchanges. */
static double layers_s(const Context *c, const Step *step, PlanCost *cost)
{
    PlanCost layer_cost = {0};
    double layer_s = 0.0, seconds = 0.0;
    for (uint32_t layer = c->stage->layer_first;
         layer <= c->stage->layer_last && layer < c->spec->n_layers; layer++) {
        if (layer == c->stage->layer_first || !is_like_previous(c->spec, layer)) {
            layer_cost = (PlanCost){0};
            layer_s = layer_part(c, step, layer, ROLE_ATTN_NORM, ROLE_ATTN_OUT, &layer_cost);
            layer_s += layer_part(c, step, layer, ROLE_FFN_NORM, ROLE_FFN_DOWN, &layer_cost);
        }
        cost->memory_s += layer_cost.memory_s;
        cost->compute_s += layer_cost.compute_s;
        seconds += layer_s;
    }
    return seconds;
}

static double stage_s(const Context *c, const Step *step, PlanCost *cost)
{
    bool is_first = c->stage == &c->replica->stages[0];
    bool is_last = c->stage == &c->replica->stages[c->replica->n_stages - 1];
    const uint32_t n_layers = c->stage->layer_last - c->stage->layer_first + 1;
    double layer_bytes = 0.0, seconds = layers_s(c, step, cost);
    double link =
        n_layers * (exchange_s(c, step->rows, sums_of(c, rank_attn_subtrees), &layer_bytes) +
                    exchange_s(c, step->rows, sums_of(c, rank_ffn_subtrees), &layer_bytes));
    cost->sums_bytes += n_layers * layer_bytes;
    if (is_first) {
        link += gather_s(c, step->rows);
    }
    if (is_last) {
        double latency = 0.0, bandwidth;
        seconds += head_part(c, step, cost);
        if (c->stage->n_ranks > 1) { /* candidates of each rank to rank 0 */
            link_of(c->ranks, c->stage->n_ranks, &latency, &bandwidth);
        }
        link += latency;
    }
    cost->link_s += link;
    return seconds + link;
}

static void fill_ranks(Context *c, const PlanStage *stage)
{
    double crowding[PLAN_RANKS_LIMIT];
    c->stage = stage;
    c->crowded = false;
    for (uint32_t k = 0; k < stage->n_ranks; k++) {
        c->ranks[k] = member_of_rank(c->members, c->n_members, &stage->ranks[k]);
    }
    crowding_of(c->ranks, stage->n_ranks, crowding);
    for (uint32_t k = 0; k < stage->n_ranks; k++) {
        c->speeds[k] = speed_shared(speed_of(c->ranks[k]), crowding[k]);
        c->crowded = c->crowded || crowding[k] > 1.0;
    }
}

static Context context_of(const Plan *plan, const ModelSpec *spec, const PlanMember *members,
                          uint32_t n_members, uint32_t replica)
{
    return (Context){plan,
                     spec,
                     members,
                     n_members,
                     &plan->replicas[replica],
                     NULL,
                     g_new0(const PlanMember *, PLAN_RANKS_LIMIT),
                     g_new0(Speed, PLAN_RANKS_LIMIT),
                     false};
}

static void context_clear(Context *c)
{
    g_free(c->ranks);
    g_free(c->speeds);
}

/* Activations to the next stage, or the token back to the first. */
static double hop_s(const Context *c, const PlanStage *from, const PlanStage *to, double bytes)
{
    const PlanMember *ends[2] = {member_of_rank(c->members, c->n_members, &from->ranks[0]),
                                 member_of_rank(c->members, c->n_members, &to->ranks[0])};
    double latency, bandwidth;
    link_of(ends, 2, &latency, &bandwidth);
    return latency + bytes / bandwidth;
}

/* Of stages that run at once. */
static double slowest_stage_s(const Context *c, const double *seconds)
{
    const uint32_t n_stages = c->replica->n_stages;
    g_autoptr(GPtrArray) all = g_ptr_array_new();
    g_autofree uint32_t *n_ranks = g_new(uint32_t, n_stages);
    g_autofree double *crowding = g_new(double, n_stages);
    double slowest = 0.0;
    for (uint32_t s = 0; s < n_stages; s++) {
        const PlanStage *stage = &c->replica->stages[s];
        n_ranks[s] = stage->n_ranks;
        for (uint32_t k = 0; k < stage->n_ranks; k++) {
            g_ptr_array_add(all,
                            (void *)member_of_rank(c->members, c->n_members, &stage->ranks[k]));
        }
    }
    stage_crowding_of((const PlanMember *const *)all->pdata, n_ranks, n_stages, crowding);
    for (uint32_t s = 0; s < n_stages; s++) {
        slowest = MAX(slowest, seconds[s] * crowding[s]);
    }
    return slowest;
}

PlanCost planner_cost(const Plan *plan, const ModelSpec *spec, const PlanMember *members,
                      uint32_t n_members, uint32_t replica, uint32_t rows, uint32_t depth)
{
    bool is_decode = rows <= MAX(plan->streams, 1);
    Step step = {rows, is_decode ? rows : 1, is_decode ? rows : 1, depth};
    Context c = context_of(plan, spec, members, n_members, replica);
    PlanCost cost = {0};
    g_autofree double *seconds = g_new(double, c.replica->n_stages);
    for (uint32_t s = 0; s < c.replica->n_stages; s++) {
        fill_ranks(&c, &c.replica->stages[s]);
        seconds[s] = stage_s(&c, &step, &cost);
        cost.latency_s += seconds[s];
    }
    cost.slowest_stage_s = slowest_stage_s(&c, seconds);
    for (uint32_t s = 0; c.replica->n_stages > 1 && s < c.replica->n_stages; s++) {
        bool is_last = s + 1 == c.replica->n_stages;
        const PlanStage *to = &c.replica->stages[is_last ? 0 : s + 1];
        double hop =
            hop_s(&c, &c.replica->stages[s], to, is_last ? 64.0 : 4.0 * rows * spec->width);
        cost.link_s += hop;
        cost.latency_s += hop;
    }
    context_clear(&c);
    return cost;
}

/* What one token must read from a rank's weights: everything but the tables that are only looked
 * up. */
static double token_read_s(const Context *c, uint32_t k, bool is_last)
{
    Part part = {0};
    for (uint32_t i = 0; i < c->spec->n_tensors; i++) {
        const TensorSpec *t = &c->spec->tensors[i];
        bool is_lookup = t->role == ROLE_POSITION_EMBD ||
                         (t->role == ROLE_TOKEN_EMBD && !(c->spec->tied_output && is_last));
        if (!is_lookup) {
            add_tensor(c, k, t, 1, &part);
        }
    }
    return part.memory_s;
}

double planner_roof(const Plan *plan, const ModelSpec *spec, const PlanMember *members,
                    uint32_t n_members)
{
    double seconds = 0.0;
    Context c = context_of(plan, spec, members, n_members, 0);
    for (uint32_t s = 0; s < c.replica->n_stages; s++) {
        double worst = 0.0;
        fill_ranks(&c, &c.replica->stages[s]);
        for (uint32_t k = 0; k < c.stage->n_ranks; k++) {
            worst = MAX(worst, token_read_s(&c, k, s + 1 == c.replica->n_stages));
        }
        seconds += worst;
    }
    context_clear(&c);
    return seconds > 0.0 ? 1.0 / seconds : 0.0;
}
