#include "tests/golden/plan_builder.h"

#include "proto/base/version.h"

#include <stdlib.h>

#define NAMES_LIMIT 256u

static const char *member_name(uint32_t i)
{
    static char names[NAMES_LIMIT][8];
    g_assert(i < NAMES_LIMIT);
    g_snprintf(names[i], sizeof names[i], "w%u", i);
    return names[i];
}

void plan_builder_members(PlanMember *members, uint32_t n_members)
{
    for (uint32_t i = 0; i < n_members; i++) {
        members[i] = (PlanMember){
            .worker = member_name(i),
            .memory_bytes = 16ull << 30,
            .numerics_version = WEFT_NUMERICS_VERSION,
            .numerics_classes = 1u << NUMERICS_EXACT,
            .threads = 2,
            .read_bytes_per_s = 20e9,
            .int8_ops_per_s = 300e9,
            .f32_ops_per_s = 50e9,
            .link_latency_s = 10e-6,
            .link_bytes_per_s = 2e9,
            .usable = true,
        };
        for (uint32_t type = 0; type < DTYPE_LIMIT; type++) {
            members[i].packed_block_bytes[type] = dtype_info(type)->block_bytes;
        }
    }
}

static uint32_t below(Random *random, uint32_t n)
{
    return (uint32_t)(random_u64(random) % n);
}

static int by_value(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* Cuts n items into n_parts ranges of at least `least`; evenly without a source of randomness. */
static void cut(Random *random, uint32_t n, uint32_t n_parts, uint32_t least, uint32_t *cuts)
{
    uint32_t free_items = n - least * n_parts;
    for (uint32_t p = 0; p <= n_parts; p++) {
        cuts[p] = random != NULL ? below(random, free_items + 1) : free_items * p / n_parts;
    }
    cuts[0] = 0;
    cuts[n_parts] = free_items;
    qsort(cuts, n_parts + 1, sizeof *cuts, by_value);
    for (uint32_t p = 0; p <= n_parts; p++) {
        cuts[p] += least * p;
    }
}

static void fill_stage(Random *random, const ModelSpec *spec, PlanStage *stage, bool has_vocab,
                       uint32_t *next_worker)
{
    uint32_t attn[PLAN_RANKS_LIMIT + 1], ffn[PLAN_RANKS_LIMIT + 1], vocab[PLAN_RANKS_LIMIT + 1];
    cut(random, spec->n_attn_units, stage->n_ranks, 1, attn);
    cut(random, spec->n_ffn_units, stage->n_ranks, 1, ffn);
    cut(random, has_vocab ? spec->n_vocab_chunks : 0, stage->n_ranks, 0, vocab);
    stage->ranks = g_new0(PlanRank, stage->n_ranks);
    for (uint32_t k = 0; k < stage->n_ranks; k++) {
        PlanRank *rank = &stage->ranks[k];
        rank->worker = g_strdup(member_name((*next_worker)++));
        rank->attn_first = attn[k];
        rank->attn_count = attn[k + 1] - attn[k];
        rank->ffn_first = ffn[k];
        rank->ffn_count = ffn[k + 1] - ffn[k];
        rank->vocab_first = vocab[k];
        rank->vocab_count = vocab[k + 1] - vocab[k];
    }
}

static Plan *build(Random *random, const ModelSpec *spec, uint32_t dp, uint32_t pp, uint32_t tp)
{
    Plan *plan = g_new0(Plan, 1);
    uint32_t next_worker = 0;
    plan->job = g_strdup("test");
    plan->model = g_strdup("model.gguf");
    plan->definition =
        (Definition){WEFT_NUMERICS_VERSION, NUMERICS_EXACT, KV_F16, 64, 0, spec->file_hash, ""};
    plan->streams = 2;
    plan->kv_pages = 4;
    plan->max_rows = 64;
    plan->predicted.bound = "memory";
    plan->reasons = g_ptr_array_new_with_free_func(g_free);
    plan->n_replicas = dp;
    plan->replicas = g_new0(PlanReplica, dp);
    for (uint32_t r = 0; r < dp; r++) {
        PlanReplica *replica = &plan->replicas[r];
        g_autofree uint32_t *layers = g_new(uint32_t, pp + 1);
        cut(random, spec->n_layers, pp, 1, layers);
        replica->n_stages = pp;
        replica->stages = g_new0(PlanStage, pp);
        for (uint32_t s = 0; s < pp; s++) {
            PlanStage *stage = &replica->stages[s];
            stage->layer_first = layers[s];
            stage->layer_last = layers[s + 1] - 1;
            stage->n_ranks = random != NULL ? 1 + below(random, tp) : tp;
            fill_stage(random, spec, stage, s == 0 || s + 1 == pp, &next_worker);
        }
    }
    plan_measure(plan, spec, NULL, 0);
    return plan;
}

Plan *plan_builder_random(Random *random, const ModelSpec *spec, uint32_t dp, uint32_t pp,
                          uint32_t tp_limit)
{
    return build(random, spec, dp, pp, tp_limit);
}

Plan *plan_builder_even(const ModelSpec *spec, uint32_t dp, uint32_t pp, uint32_t tp)
{
    return build(NULL, spec, dp, pp, tp);
}
