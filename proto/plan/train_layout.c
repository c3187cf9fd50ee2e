#include "proto/plan/train_layout.h"

#include "proto/base/error.h"

#include <string.h>

static bool refuse(GError **error, const ModelSpec *spec, const char *what, uint32_t n,
                   uint32_t limit)
{
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                "model %s cannot be trained with %s %u; choose 1 to %u", spec->name, what, n,
                limit);
    return false;
}

static bool check_counts(const ModelSpec *spec, uint32_t dp, uint32_t pp, uint32_t tp,
                         GError **error)
{
    if (pp < 1 || pp > spec->n_layers) {
        return refuse(error, spec, "pp", pp, spec->n_layers);
    }
    if (tp < 1 || tp > plan_tp_limit(spec)) {
        return refuse(error, spec, "tp", tp, plan_tp_limit(spec));
    }
    const uint32_t limit = MAX(PLAN_RANKS_LIMIT / MIN(pp * tp, PLAN_RANKS_LIMIT), 1);
    if (dp < 1 || (uint64_t)dp * pp * tp > PLAN_RANKS_LIMIT) {
        return refuse(error, spec, "dp", dp, limit);
    }
    return true;
}

static void cut_evenly(uint32_t n, uint32_t parts, uint32_t least, uint32_t *cuts)
{
    g_autofree double *weight = g_new(double, parts);
    for (uint32_t i = 0; i < parts; i++) {
        weight[i] = 1.0;
    }
    plan_cut(n, weight, parts, least, cuts);
}

static void fill_stage(const ModelSpec *spec, PlanStage *stage, uint32_t tp, uint32_t name)
{
    uint32_t attn[PLAN_RANKS_LIMIT + 1], ffn[PLAN_RANKS_LIMIT + 1], vocab[PLAN_RANKS_LIMIT + 1];
    cut_evenly(spec->n_attn_units, tp, 1, attn);
    cut_evenly(spec->n_ffn_units, tp, 1, ffn);
    cut_evenly(spec->n_vocab_chunks, tp, 0, vocab);
    stage->n_ranks = tp;
    stage->ranks = g_new0(PlanRank, tp);
    for (uint32_t r = 0; r < tp; r++) {
        stage->ranks[r] = (PlanRank){.worker = g_strdup_printf("rank-%u", name + r),
                                     .attn_first = attn[r],
                                     .attn_count = attn[r + 1] - attn[r],
                                     .ffn_first = ffn[r],
                                     .ffn_count = ffn[r + 1] - ffn[r],
                                     .vocab_first = vocab[r],
                                     .vocab_count = vocab[r + 1] - vocab[r]};
    }
}

Plan *train_plan_new(const ModelSpec *spec, uint32_t dp, uint32_t pp, uint32_t tp, GError **error)
{
    uint32_t layers[PLAN_RANKS_LIMIT + 1];
    if (!check_counts(spec, dp, pp, tp, error)) {
        return NULL;
    }
    cut_evenly(spec->n_layers, pp, 1, layers);
    Plan *plan = g_new0(Plan, 1);
    plan->job = g_strdup("training");
    plan->model = g_strdup(spec->name);
    plan->reasons = g_ptr_array_new_with_free_func(g_free);
    plan->n_replicas = dp;
    plan->replicas = g_new0(PlanReplica, dp);
    for (uint32_t d = 0; d < dp; d++) {
        PlanReplica *replica = &plan->replicas[d];
        replica->n_stages = pp;
        replica->stages = g_new0(PlanStage, pp);
        for (uint32_t s = 0; s < pp; s++) {
            replica->stages[s].layer_first = layers[s];
            replica->stages[s].layer_last = layers[s + 1] - 1;
            fill_stage(spec, &replica->stages[s], tp, (d * pp + s) * tp);
        }
    }
    return plan;
}

bool train_plan_interleave(Plan *plan, const ModelSpec *spec, uint32_t chunks, GError **error)
{
    const uint32_t pp = plan->replicas[0].n_stages,
                   most = MIN(spec->n_layers / pp, PLAN_CHUNKS_LIMIT);
    if (pp < 2) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "model %s cannot be interleaved on one stage; choose pp 2 or more, or schedule "
                    "1f1b",
                    spec->name);
        return false;
    }
    if (chunks < 1 || chunks > most) {
        return refuse(error, spec, "chunks", chunks, most);
    }
    g_autofree uint32_t *cuts = g_new(uint32_t, (size_t)pp * chunks + 1);
    cut_evenly(spec->n_layers, pp * chunks, 1, cuts);
    for (uint32_t d = 0; d < plan->n_replicas; d++) {
        for (uint32_t s = 0; s < pp; s++) {
            PlanStage *stage = &plan->replicas[d].stages[s];
            stage->layer_first = cuts[s];
            stage->layer_last = cuts[s + 1] - 1;
            stage->n_more = chunks - 1;
            for (uint32_t c = 1; c < chunks; c++) {
                stage->more[c - 1] = (PlanLayers){cuts[c * pp + s], cuts[c * pp + s + 1] - 1};
            }
        }
    }
    return true;
}

static bool same_ranges(const PlanRank *a, const PlanRank *b)
{
    return a->attn_first == b->attn_first && a->attn_count == b->attn_count &&
           a->ffn_first == b->ffn_first && a->ffn_count == b->ffn_count &&
           a->vocab_first == b->vocab_first && a->vocab_count == b->vocab_count;
}

static bool same_stage(const PlanStage *a, const PlanStage *b)
{
    bool same = a->layer_first == b->layer_first && a->layer_last == b->layer_last &&
                a->n_ranks == b->n_ranks && a->n_more == b->n_more &&
                memcmp(a->more, b->more, a->n_more * sizeof *a->more) == 0;
    for (uint32_t r = 0; same && r < a->n_ranks; r++) {
        same = same_ranges(&a->ranks[r], &b->ranks[r]);
    }
    return same;
}

/* Chunk by chunk, in each stage by stage. */
static bool covers_layers(const PlanReplica *replica, const ModelSpec *spec)
{
    uint32_t next = 0;
    for (uint32_t c = 0; c <= replica->stages[0].n_more; c++) {
        for (uint32_t s = 0; s < replica->n_stages; s++) {
            const PlanStage *stage = &replica->stages[s];
            const PlanLayers own = {stage->layer_first, stage->layer_last};
            const PlanLayers at = c == 0 ? own : stage->more[c - 1];
            if (stage->n_more != replica->stages[0].n_more || at.first != next ||
                at.last < at.first || at.last >= spec->n_layers) {
                return false;
            }
            next = at.last + 1;
        }
    }
    return next == spec->n_layers;
}

/* Next to each other, from the first to the last; every rank has some attention and feed-forward.
 */
static bool covers_units(const PlanStage *stage, const ModelSpec *spec, bool has_vocabulary)
{
    uint64_t attn = 0, ffn = 0, vocab = 0;
    bool ok = true;
    for (uint32_t r = 0; ok && r < stage->n_ranks; r++) {
        const PlanRank *rank = &stage->ranks[r];
        ok = rank->attn_first == attn && rank->attn_count > 0 && rank->ffn_first == ffn &&
             rank->ffn_count > 0 && (!has_vocabulary || rank->vocab_first == vocab);
        attn += rank->attn_count;
        ffn += rank->ffn_count;
        vocab += rank->vocab_count;
    }
    return ok && attn == spec->n_attn_units && ffn == spec->n_ffn_units &&
           (!has_vocabulary || vocab == spec->n_vocab_chunks);
}

static bool same_vocabulary(const PlanStage *a, const PlanStage *b)
{
    for (uint32_t r = 0; r < a->n_ranks; r++) {
        if (a->ranks[r].vocab_first != b->ranks[r].vocab_first ||
            a->ranks[r].vocab_count != b->ranks[r].vocab_count) {
            return false;
        }
    }
    return true;
}

bool train_plan_check(const Plan *plan, const ModelSpec *spec, GError **error)
{
    const PlanReplica *first = &plan->replicas[0];
    const uint32_t tp = first->stages[0].n_ranks;
    const char *what = NULL;
    if (!check_counts(spec, plan->n_replicas, first->n_stages, tp, error)) {
        return false;
    }
    if (!covers_layers(first, spec)) {
        what = "its stages do not cover the layers in order";
    }
    for (uint32_t d = 0; d < plan->n_replicas && what == NULL; d++) {
        const PlanReplica *replica = &plan->replicas[d];
        what = replica->n_stages != first->n_stages ? "its replicas have other stages" : NULL;
        for (uint32_t s = 0; s < first->n_stages && what == NULL; s++) {
            what = !same_stage(&replica->stages[s], &first->stages[s])
                       ? "its replicas are cut differently"
                   : replica->stages[s].n_ranks != tp ? "its stages have different numbers of ranks"
                   : !covers_units(&replica->stages[s], spec, s == 0 || s + 1 == first->n_stages)
                       ? "the ranks of a stage do not cover its units in order"
                       : NULL;
        }
    }
    if (what == NULL && spec->tied_output &&
        !same_vocabulary(&first->stages[0], &first->stages[first->n_stages - 1])) {
        what = "the first and the last stage of a tied model cut the vocabulary differently";
    }
    if (what != NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "plan of %s cannot be trained: %s",
                    plan->job, what);
    }
    return what == NULL;
}

TrainPosition train_position(const Plan *plan, uint32_t replica, uint32_t stage, uint32_t rank)
{
    return (TrainPosition){.dp = plan->n_replicas,
                           .pp = plan->replicas[0].n_stages,
                           .tp = plan->replicas[0].stages[0].n_ranks,
                           .chunks = plan->replicas[0].stages[0].n_more + 1,
                           .replica = replica,
                           .stage = stage,
                           .rank = rank};
}

PlanRank *train_plan_rank(const Plan *plan, uint32_t global, TrainPosition *at)
{
    *at = train_position(plan, 0, 0, 0);
    at->rank = global % at->tp;
    at->stage = global / at->tp % at->pp;
    at->replica = global / (at->tp * at->pp);
    return &plan->replicas[at->replica].stages[at->stage].ranks[at->rank];
}
