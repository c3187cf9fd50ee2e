/* What a plan says that a rank needs, against what the worker's own code maps for it: never less,
 * and not much more. */
#include "proto/plan/plan.h"

#include "kernels/ops/attention.h"
#include "kernels/ops/matmul.h"
#include "proto/plan/device_memory.h"
#include "proto/plan/rank_span.h"
#include "tests/golden/gguf_builder.h"
#include "tests/golden/plan_builder.h"
#include "worker/serve/engine.h"
#include "worker/serve/leader.h"
#include "worker/shard/shard.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>

#define N_MEMBERS 64u
#define THREADS 8u
#define MIB (1ull << 20)

static const Dtype all_types[] = {DTYPE_F32,  DTYPE_F16,  DTYPE_BF16, DTYPE_Q4_0,
                                  DTYPE_Q4_1, DTYPE_Q5_0, DTYPE_Q5_1, DTYPE_Q8_0,
                                  DTYPE_Q4_K, DTYPE_Q5_K, DTYPE_Q6_K};

static void check_rank(const Plan *plan, const ModelSpec *spec, uint32_t r, uint32_t s, uint32_t k)
{
    const PlanReplica *replica = &plan->replicas[r];
    const PlanStage *stage = &replica->stages[s];
    const PlanRank *rank = &stage->ranks[k];
    uint64_t weights = shard_bytes(spec, plan, r, s, k);
    uint64_t buffers = engine_buffer_bytes(spec, plan, r, s, k, THREADS);
    uint64_t planned = rank_buffer_bytes(plan, spec, replica, stage, rank, THREADS);
    if (rank->weight_bytes + MIB < weights || rank->weight_bytes > weights + weights / 20 + MIB) {
        fail_msg("weights: %" G_GUINT64_FORMAT " planned, %" G_GUINT64_FORMAT " mapped",
                 rank->weight_bytes, weights);
    }
    /* what the plan counts beside these, the process's own memory and partial sums on their way, is
     * on top */
    if (planned < buffers + 12 * MIB) {
        fail_msg("buffers: %" G_GUINT64_FORMAT " planned, %" G_GUINT64_FORMAT " mapped", planned,
                 buffers);
    }
    if (stage->n_ranks == 1 && replica->n_stages == 1 &&
        planned > buffers + buffers / 2 + 24 * MIB) {
        fail_msg("buffers: %" G_GUINT64_FORMAT " planned, only %" G_GUINT64_FORMAT " mapped",
                 planned, buffers);
    }
}

static void test_plans_cover_what_workers_map(void **state)
{
    PlanMember members[N_MEMBERS];
    RandomSeeded random;
    random_seeded_init(&random, 31);
    plan_builder_members(members, N_MEMBERS);
    for (uint32_t m = 0; m < N_MEMBERS; m++) {
        members[m].threads = THREADS;
        for (uint32_t type = 0; type < DTYPE_LIMIT; type++) {
            members[m].packed_block_bytes[type] = packed_block_bytes((Dtype)type);
        }
    }
    for (uint32_t i = 0; i < 132; i++) {
        GgufBuilderConfig c;
        gguf_builder_defaults(&c);
        c.n_layers = 4;
        c.width = 768;
        c.n_heads = 12;
        c.n_kv_heads = 4;
        c.ffn_width = 2048;
        c.vocab_size = 9000;
        c.context = 4096;
        c.tied = i % 2 == 0;
        c.qkv_bias = i % 3 == 0;
        gguf_builder_set_type(&c, all_types[i % G_N_ELEMENTS(all_types)]);
        g_autoptr(ModelSpec) spec = gguf_builder_spec(&c, NULL);
        assert_non_null(spec);
        uint32_t pp = 1 + (uint32_t)(random_u64(&random.base) % 3);
        g_autoptr(Plan) plan =
            plan_builder_random(&random.base, spec, 1, pp, i < 22 ? 1 : plan_tp_limit(spec));
        plan->max_rows = i % 4 == 0 ? 16 : 512;
        plan->streams = 1 + i % 40;
        plan->definition.context = 4096;
        plan_measure(plan, spec, members, N_MEMBERS);
        for (uint32_t s = 0; s < pp; s++) {
            for (uint32_t k = 0; k < plan->replicas[0].stages[s].n_ranks; k++) {
                check_rank(plan, spec, 0, s, k);
            }
        }
    }
}

/* To the byte: the index grows with the cache, so no constant would cover it. */
static void test_page_index(void **state)
{
    for (uint64_t n = 1; n < 1000; n++) {
        assert_int_equal(page_index_bytes(n), leader_bytes(n));
    }
    for (uint64_t n = 1024; n <= 1u << 26; n *= 2) {
        assert_int_equal(page_index_bytes(n - 1), leader_bytes(n - 1));
        assert_int_equal(page_index_bytes(n), leader_bytes(n));
        assert_int_equal(page_index_bytes(n + 1), leader_bytes(n + 1));
    }
}

/* Rank (0,0) pays for it, and nobody else. */
static void test_the_leader_pays_for_its_index(void **state)
{
    GgufBuilderConfig c;
    gguf_builder_defaults(&c);
    c.n_layers = 4;
    g_autoptr(ModelSpec) spec = gguf_builder_spec(&c, NULL);
    g_autoptr(Plan) plan = plan_builder_even(spec, 2, 2, 2);
    const uint64_t n_pages[] = {1000, 5000000};
    uint64_t buffers[2][2][2][8] = {0};
    for (unsigned i = 0; i < 2; i++) {
        plan->kv_pages = n_pages[i];
        for (uint32_t r = 0; r < 2; r++) {
            const PlanReplica *replica = &plan->replicas[r];
            for (uint32_t s = 0; s < 2; s++) {
                const PlanStage *stage = &replica->stages[s];
                assert_in_range(stage->n_ranks, 1, 8);
                for (uint32_t k = 0; k < stage->n_ranks; k++) {
                    buffers[i][r][s][k] =
                        rank_buffer_bytes(plan, spec, replica, stage, &stage->ranks[k], 2);
                }
            }
        }
    }
    const uint64_t grown = leader_bytes(n_pages[1]) - leader_bytes(n_pages[0]);
    assert_true(grown > 1000 * MIB);
    for (uint32_t r = 0; r < 2; r++) {
        for (uint32_t s = 0; s < 2; s++) {
            for (uint32_t k = 0; k < 8; k++) {
                const bool leads = s == 0 && k == 0;
                assert_int_equal(buffers[1][r][s][k] - buffers[0][r][s][k], leads ? grown : 0);
            }
        }
    }
}

/* The trivial device's ops make do with the workspace that plans count. */
static void test_device_workspace(void **state)
{
    RandomSeeded random;
    (void)state;
    random_seeded_init(&random, 5);
    for (uint32_t i = 0; i < 2000; i++) {
        const DeviceLimits l = {.max_rows = 1 + (uint32_t)(random_u64(&random.base) % 700),
                                .max_keys = 1 + (uint32_t)(random_u64(&random.base) % 40000),
                                .max_segments = 1,
                                .n_heads = 1 + (uint32_t)(random_u64(&random.base) % 64),
                                .n_kv_heads = 1,
                                .head_size = 8 + 8 * (uint32_t)(random_u64(&random.base) % 31),
                                .widest_in = 256 + 256 * (uint32_t)(random_u64(&random.base) % 40),
                                .widest_out = 16,
                                .fast = i % 2 == 0};
        const uint64_t bytes = device_workspace_bytes(&l);
        const size_t blocks = (l.max_keys + KV_BLOCK - 1) / KV_BLOCK;
        for (int kind = 0; kind < ACT_KIND_LIMIT; kind++) {
            assert_true(act_bytes((ActKind)kind, l.max_rows, l.widest_in) <= bytes);
        }
        assert_true(sizeof(float) * attention_scratch_floats(l.n_heads, l.head_size) + 64 +
                        2 * blocks * sizeof(void *) + 64 <=
                    bytes);
    }
}

/* A rank on a device pays for what lies there, a host's for what lies here. */
static void test_a_device_is_counted_by_itself(void **state)
{
    GgufBuilderConfig c;
    PlanMember members[4];
    (void)state;
    gguf_builder_defaults(&c);
    c.n_layers = 4;
    g_autoptr(ModelSpec) spec = gguf_builder_spec(&c, NULL);
    g_autoptr(Plan) plan = plan_builder_even(spec, 1, 2, 2);
    plan_builder_members(members, 4);
    members[2].device = "cuda:0 (NVIDIA H200, 139.8G)";
    plan->max_rows = 512;
    plan_measure(plan, spec, members, 4);
    const PlanReplica *replica = &plan->replicas[0];
    for (uint32_t i = 0; i < 4; i++) {
        const PlanStage *stage = &replica->stages[i / 2];
        const PlanRank *rank = &stage->ranks[i % 2];
        const uint64_t beside = rank->peak_bytes - rank->weight_bytes -
                                plan->kv_pages * KV_BLOCK * rank->kv_bytes_per_token;
        assert_int_equal(beside,
                         i == 2 ? device_rank_bytes(plan, spec, replica, stage, rank, &members[i])
                                : rank_buffer_bytes(plan, spec, replica, stage, rank, 2));
    }
    const DeviceSizes exact =
        device_sizes(plan, spec, replica, &replica->stages[1], &replica->stages[1].ranks[0]);
    plan->definition.numerics = NUMERICS_FAST;
    const DeviceSizes fast =
        device_sizes(plan, spec, replica, &replica->stages[1], &replica->stages[1].ranks[0]);
    assert_true(exact.gathered > 0 && fast.gathered == 0);
    assert_true(fast.workspace >= exact.workspace + DEVICE_LIBRARY_BYTES / 2);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_plans_cover_what_workers_map),
                                       cmocka_unit_test(test_page_index),
                                       cmocka_unit_test(test_device_workspace),
                                       cmocka_unit_test(test_a_device_is_counted_by_itself),
                                       cmocka_unit_test(test_the_leader_pays_for_its_index)};
    return cmocka_run_group_tests_name("memory", tests, NULL, NULL);
}
