/* The planner: choices that can be worked out by hand, refusals with their numbers, and thousands
 * of random clusters whose plans all pass plan_check(). */
#include "proto/base/error.h"
#include "proto/base/random.h"
#include "proto/base/version.h"
#include "proto/plan/tree.h"
#include "tests/golden/plan_builder.h"
#include "tests/unit/coordinator/planner_case.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

/* ---- automatic choice -------------------------------------------------------------------------
 */

static void test_one_worker(void **state)
{
    g_autoptr(ModelSpec) spec = smol();
    PlanMember members[1];
    plan_builder_members(members, 1);
    PlanWish wish = {.job = "j", .model = "m.gguf", .streams = 4};
    g_autoptr(Plan) plan = plan_ok(spec, members, 1, &wish);
    assert_layout(plan, 1, 1, 1);
    assert_string_equal(plan->job, "j");
    assert_string_equal(plan->model, "m.gguf");
    assert_int_equal(plan->definition.context, 8192);
    assert_int_equal(plan->max_rows, 512);
    assert_int_equal(plan->streams, 4);
    assert_true(plan->kv_pages == 4 * 256);
    assert_true(plan->predicted.decode_tokens_per_s > 50 &&
                plan->predicted.decode_tokens_per_s < 250);
    assert_string_equal(plan->predicted.bound, "memory");
    assert_true(plan->reasons->len >= 2);
}

/* Two alike: with a fast link both are used, with a slow one the single worker is the fastest. */
static void test_link_decides(void **state)
{
    g_autoptr(ModelSpec) spec = smol();
    PlanMember members[2];
    plan_builder_members(members, 2);
    PlanWish wish = {.streams = 1};
    g_autoptr(Plan) fast = plan_ok(spec, members, 2, &wish);
    assert_layout(fast, 1, 1, 2);
    members[0].link_latency_s = members[1].link_latency_s = 1e-3;
    g_autoptr(Plan) slow = plan_ok(spec, members, 2, &wish);
    assert_layout(slow, 1, 1, 1);
    members[0].host = members[1].host = "machine"; /* shared memory, if allowed */
    g_autoptr(Plan) still = plan_ok(spec, members, 2, &wish);
    assert_layout(still, 1, 1, 1);
    wish.one_host_shared = true;
    g_autoptr(Plan) shared = plan_ok(spec, members, 2, &wish);
    assert_layout(shared, 1, 1, 2);
}

static const uint32_t cpu0[] = {0}, cpu1[] = {1};

/* w0 and w1 on one CPU of a machine, w2 on the other; one thread each. */
static void three_on_two_cpus(PlanMember *members)
{
    plan_builder_members(members, 3);
    for (int i = 0; i < 3; i++) {
        members[i].host = "machine";
        members[i].threads = 1;
        members[i].cpus = i < 2 ? cpu0 : cpu1;
        members[i].n_cpus = 1;
    }
}

/* Two ranks go where each has a CPU, also if those that share one measured more. */
static void test_ranks_take_own_cpus(void **state)
{
    g_autoptr(ModelSpec) spec = smol();
    PlanMember members[3];
    three_on_two_cpus(members);
    members[0].read_bytes_per_s = members[1].read_bytes_per_s = 1.1 * members[2].read_bytes_per_s;
    PlanWish wish = {.streams = 1, .one_host_shared = true};
    g_autoptr(Plan) plan = plan_ok(spec, members, 3, &wish);
    assert_layout(plan, 1, 1, 2);
    const PlanRank *ranks = plan->replicas[0].stages[0].ranks;
    assert_string_equal(ranks[0].worker, "w0");
    assert_string_equal(ranks[1].worker, "w2");
}

/* Those that must share a CPU get half of the units of one that does not, and the prediction is
 * that of two CPUs. */
static void test_crowded_ranks(void **state)
{
    g_autoptr(ModelSpec) spec = smol();
    PlanMember members[3];
    three_on_two_cpus(members);
    PlanWish wish = {.pp = 1, .tp = 3, .streams = 1, .one_host_shared = true};
    g_autoptr(Plan) crowded = plan_ok(spec, members, 3, &wish);
    const PlanRank *ranks = crowded->replicas[0].stages[0].ranks;
    for (int k = 0; k < 3; k++) {
        bool is_alone = strcmp(ranks[k].worker, "w2") == 0;
        assert_in_range(ranks[k].ffn_count, is_alone ? 5 : 2, is_alone ? 8 : 4);
    }
    wish.tp = 2;
    g_autoptr(Plan) two = plan_ok(spec, members, 3, &wish);
    assert_true(crowded->predicted.decode_tokens_per_s < two->predicted.decode_tokens_per_s);
    assert_true(crowded->predicted.decode_tokens_per_s > 0.5 * two->predicted.decode_tokens_per_s);
}

/* Stages of one request take turns; stages that are all busy do not. */
static void test_crowded_stages(void **state)
{
    g_autoptr(ModelSpec) spec = smol();
    PlanMember members[3];
    three_on_two_cpus(members);
    PlanWish wish = {.pp = 2, .tp = 1, .streams = 1, .one_host_shared = true};
    members[2].usable = false;
    g_autoptr(Plan) shared = plan_ok(spec, members, 3, &wish);
    members[1].cpus = cpu1;
    g_autoptr(Plan) own = plan_ok(spec, members, 3, &wish);
    assert_true(shared->predicted.decode_tokens_per_s == own->predicted.decode_tokens_per_s);
    double ratio = own->predicted.prefill_tokens_per_s / shared->predicted.prefill_tokens_per_s;
    assert_true(ratio > 1.99 && ratio < 2.01);
}

static uint32_t n_layers(const PlanStage *stage)
{
    return stage->layer_last - stage->layer_first + 1;
}

/* Stages on one CPU hold together what the stage on the other does, and follow each other, whatever
 * the order of their speeds: so do ranks, whose cuts then fall on nodes. */
static void test_stages_share_cpus(void **state)
{
    g_autoptr(ModelSpec) spec = smol();
    PlanMember members[3];
    for (int faster = 0; faster < 3; faster++) {
        three_on_two_cpus(members);
        members[faster].read_bytes_per_s *= 1.001;
        PlanWish wish = {.pp = 3, .tp = 1, .streams = 1, .one_host_shared = true};
        g_autoptr(Plan) plan = plan_ok(spec, members, 3, &wish);
        const PlanStage *stages = plan->replicas[0].stages;
        assert_string_not_equal(stages[1].ranks[0].worker, "w2");
        for (int s = 0; s < 3; s++) {
            const bool is_alone = strcmp(stages[s].ranks[0].worker, "w2") == 0;
            assert_in_range(n_layers(&stages[s]), is_alone ? 13 : 5, is_alone ? 17 : 9);
        }
        wish = (PlanWish){.pp = 1, .tp = 3, .streams = 1, .one_host_shared = true};
        g_autoptr(Plan) ranks = plan_ok(spec, members, 3, &wish);
        assert_string_not_equal(ranks->replicas[0].stages[0].ranks[1].worker, "w2");
    }
    PlanMember four[4]; /* in two pairs, their speeds mixed */
    plan_builder_members(four, 4);
    for (int i = 0; i < 4; i++) {
        four[i].host = "machine";
        four[i].threads = four[i].n_cpus = 1;
        four[i].cpus = i < 2 ? cpu0 : cpu1;
        four[i].read_bytes_per_s *= 1.0 + 0.001 * (i % 2);
    }
    const PlanWish wish = {.pp = 4, .tp = 1, .streams = 1, .one_host_shared = true};
    g_autoptr(Plan) plan = plan_ok(spec, four, 4, &wish);
    for (int s = 0; s < 4; s += 2) {
        const char *one = plan->replicas[0].stages[s].ranks[0].worker,
                   *next = plan->replicas[0].stages[s + 1].ranks[0].worker;
        assert_int_equal(one[1] < '2', next[1] < '2');
    }
}

static void test_fastest_worker_is_taken(void **state)
{
    g_autoptr(ModelSpec) spec = smol();
    PlanMember members[3];
    plan_builder_members(members, 3);
    members[1].read_bytes_per_s = 60e9;
    for (int i = 0; i < 3; i++) {
        members[i].link_latency_s = 1e-3;
    }
    PlanWish wish = {.streams = 1};
    g_autoptr(Plan) plan = plan_ok(spec, members, 3, &wish);
    assert_layout(plan, 1, 1, 1);
    assert_string_equal(plan->replicas[0].stages[0].ranks[0].worker, "w1");
}

/* Too large for one: the model goes over those that are needed. */
static void test_too_large_for_one(void **state)
{
    g_autoptr(ModelSpec) spec = large();
    PlanMember members[3];
    plan_builder_members(members, 3);
    for (int i = 0; i < 3; i++) {
        members[i].memory_bytes = 3000 * MIB;
        members[i].link_latency_s = 5e-3;
    }
    PlanWish wish = {.streams = 1, .context = 2048};
    g_autoptr(Plan) plan = plan_ok(spec, members, 3, &wish);
    uint32_t dp, pp, tp;
    plan_layout(plan, &dp, &pp, &tp);
    assert_true(pp * tp >= 2);
}

/* ---- uneven -----------------------------------------------------------------------------------
 */

static void test_units_by_speed(void **state)
{
    g_autoptr(ModelSpec) spec = smol();
    PlanMember members[2];
    plan_builder_members(members, 2);
    members[1].read_bytes_per_s = 40e9; /* twice w0 */
    PlanWish wish = {.pp = 1, .tp = 2, .streams = 1};
    g_autoptr(Plan) plan = plan_ok(spec, members, 2, &wish);
    const PlanRank *ranks = plan->replicas[0].stages[0].ranks;
    assert_string_equal(ranks[0].worker, "w1");
    assert_int_equal(ranks[0].attn_count, 6);
    assert_int_equal(ranks[1].attn_count, 3);
    assert_int_equal(ranks[0].ffn_count, 8);
    assert_int_equal(ranks[0].vocab_count, 32);
}

/* Vectors that all ranks of the stage hand over, in a layer's sums of attention and FFN. */
static void count_subtrees(const ModelSpec *spec, const PlanStage *stage, uint32_t *attn,
                           uint32_t *ffn)
{
    *attn = *ffn = 0;
    for (uint32_t k = 0; k < stage->n_ranks; k++) {
        const PlanRank *r = &stage->ranks[k];
        *attn += tree_subtrees(spec->n_attn_units, r->attn_first, r->attn_first + r->attn_count);
        *ffn += tree_subtrees(spec->n_ffn_units, r->ffn_first, r->ffn_first + r->ffn_count);
    }
}

/* Over a link so fast that vectors cost next to nothing. */
static Plan *plan_two(const ModelSpec *spec, PlanMember *members, double faster)
{
    PlanWish wish = {.pp = 1, .tp = 2, .streams = 1};
    plan_builder_members(members, 2);
    members[1].read_bytes_per_s = faster * members[0].read_bytes_per_s;
    members[0].link_bytes_per_s = members[1].link_bytes_per_s = 2e10;
    return plan_ok(spec, members, 2, &wish);
}

/* Two equal hosts, one measured under load: each holds half of the tree, and the plan says so where
 * speed alone would have cut otherwise. */
static void test_equal_hosts_are_cut_at_nodes(void **state)
{
    static const double faster[] = {1.0, 1.03, 1.05, 1.08};
    g_autoptr(ModelSpec) mid = middle();
    g_autoptr(ModelSpec) big = large();
    const ModelSpec *const specs[] = {mid, big};
    for (size_t i = 0; i < G_N_ELEMENTS(specs) * G_N_ELEMENTS(faster); i++) {
        const ModelSpec *spec = specs[i % 2];
        PlanMember members[2];
        g_autoptr(Plan) plan = plan_two(spec, members, faster[i / 2]);
        const PlanRank *ranks = plan->replicas[0].stages[0].ranks;
        for (int k = 0; k < 2; k++) {
            assert_int_equal(ranks[k].attn_count, spec->n_attn_units / 2);
            assert_int_equal(ranks[k].ffn_count, spec->n_ffn_units / 2);
        }
        const PlanCost cost = planner_cost(plan, spec, members, 2, 0, 1, 0);
        assert_true(cost.sums_bytes == spec->n_layers * 2.0 * 2.0 * 4.0 * spec->width);
        assert_true(has_reason(plan, "for fewer partial sums") ==
                    (faster[i / 2] > (spec == big ? 1.04 : 1.07)));
    }
}

/* 17 and 15 FFN units would be six vectors instead of two. */
static void test_reason_tells_what_speed_would_send(void **state)
{
    g_autoptr(ModelSpec) spec = middle();
    PlanMember members[2];
    g_autoptr(Plan) plan = plan_two(spec, members, 1.08);
    assert_true(has_reason(plan, "shares its attention/FFN units 4/16, 4/16 for fewer partial "
                                 "sums: 4/17, 4/15, by measured speed"));
    assert_true(has_reason(plan, "partial sums are 704 KiB a token; by measured speed 1.4 MiB"));
}

static void test_unequal_hosts_keep_their_shares(void **state)
{
    g_autoptr(ModelSpec) mid = middle();
    g_autoptr(ModelSpec) big = large();
    const ModelSpec *const specs[] = {mid, big};
    for (int i = 0; i < 4; i++) {
        const ModelSpec *spec = specs[i % 2];
        const double faster = i < 2 ? 2.0 : 1.5;
        PlanMember members[2];
        g_autoptr(Plan) plan = plan_two(spec, members, faster);
        const PlanRank *ranks = plan->replicas[0].stages[0].ranks;
        const double share = faster / (1.0 + faster);
        assert_string_equal(ranks[0].worker, "w1");
        assert_true(fabs(ranks[0].attn_count - share * spec->n_attn_units) < 2.5);
        assert_true(fabs(ranks[0].ffn_count - share * spec->n_ffn_units) < 2.5);
    }
}

/* Half of the tree is a little more than the slower one can hold: it gets less than half. */
static void test_memory_before_nodes(void **state)
{
    g_autoptr(ModelSpec) spec = large();
    PlanMember members[2];
    PlanWish wish = {.pp = 1, .tp = 2, .streams = 1};
    g_autoptr(Plan) roomy = plan_two(spec, members, 1.05);
    const PlanRank *slower = &roomy->replicas[0].stages[0].ranks[1];
    assert_string_equal(slower->worker, "w0");
    members[0].memory_bytes = slower->peak_bytes - MIB;
    g_autoptr(Plan) tight = plan_ok(spec, members, 2, &wish);
    const PlanRank *ranks = tight->replicas[0].stages[0].ranks;
    assert_int_equal(ranks[1].ffn_count, 27); /* by speed alone, 29 and 27, it fits */
    assert_true(has_reason(tight, "by measured speed, memory and the number of partial sums"));
}

/* The fast one has little memory: units move to the slow one until they fit. */
static void test_memory_moves_units(void **state)
{
    g_autoptr(ModelSpec) spec = large();
    PlanMember members[2];
    plan_builder_members(members, 2);
    members[0].read_bytes_per_s = 80e9;
    members[0].memory_bytes = 2000 * MIB;
    members[1].memory_bytes = 8000 * MIB;
    PlanWish wish = {.pp = 1, .tp = 2, .streams = 1, .context = 2048};
    g_autoptr(Plan) plan = plan_ok(spec, members, 2, &wish);
    const PlanRank *ranks = plan->replicas[0].stages[0].ranks;
    uint32_t fast = strcmp(ranks[0].worker, "w0") == 0 ? 0 : 1;
    assert_true(ranks[fast].peak_bytes <= 2000 * MIB);
    assert_true(ranks[fast].ffn_count < ranks[1 - fast].ffn_count);
    assert_true(ranks[fast].ffn_count >= 56 / 8); /* though not emptied */
}

static void test_memory_moves_layers(void **state)
{
    g_autoptr(ModelSpec) spec = large();
    PlanMember members[2];
    plan_builder_members(members, 2);
    members[0].memory_bytes = 1500 * MIB;
    members[1].memory_bytes = 8000 * MIB;
    PlanWish wish = {.pp = 2, .tp = 1, .streams = 1, .context = 2048};
    g_autoptr(Plan) plan = plan_ok(spec, members, 2, &wish);
    for (uint32_t s = 0; s < 2; s++) {
        const PlanStage *stage = &plan->replicas[0].stages[s];
        uint32_t n_layers = stage->layer_last - stage->layer_first + 1;
        if (strcmp(stage->ranks[0].worker, "w0") == 0) {
            assert_in_range(n_layers, 2, 10);
        }
    }
}

/* The last stage also reads the vocabulary projection, as much as 13 layers here, and so gets fewer
 * layers: not so few that the first one would be alone with prompts, whose rows pass it by. */
static void test_layers_by_work(void **state)
{
    g_autoptr(ModelSpec) spec = smol();
    PlanMember members[2];
    plan_builder_members(members, 2);
    PlanWish wish = {.pp = 2, .tp = 1, .streams = 1};
    g_autoptr(Plan) plan = plan_ok(spec, members, 2, &wish);
    const PlanCost decode = planner_cost(plan, spec, members, 2, 0, 1, 0),
                   prompt = planner_cost(plan, spec, members, 2, 0, 512, 0);
    assert_true(decode.slowest_stage_s < 0.62 * decode.latency_s);
    assert_true(prompt.slowest_stage_s < 0.6 * prompt.latency_s);
}

/* 3 KV heads over 2 and 4 workers: legal, uneven, the shared KV head on both sides. */
static void test_shared_kv_heads(void **state)
{
    g_autoptr(ModelSpec) spec = smol();
    PlanMember members[4];
    plan_builder_members(members, 4);
    PlanWish wish = {.pp = 1, .tp = 2, .streams = 1};
    g_autoptr(Plan) two = plan_ok(spec, members, 4, &wish);
    assert_layout(two, 1, 1, 2);
    const PlanRank *ranks = two->replicas[0].stages[0].ranks;
    assert_int_equal(ranks[0].attn_count + ranks[1].attn_count, 9);
    assert_int_equal(ranks[0].kv_bytes_per_token + ranks[1].kv_bytes_per_token, 30 * 4 * 64 * 4);
    wish.tp = 4;
    g_autoptr(Plan) four = plan_ok(spec, members, 4, &wish);
    assert_layout(four, 1, 1, 4);
}

static void test_replicas_are_disjoint(void **state)
{
    g_autoptr(ModelSpec) spec = smol();
    PlanMember members[6];
    plan_builder_members(members, 6);
    PlanWish wish = {.dp = 3, .pp = 1, .tp = 2, .streams = 2};
    g_autoptr(Plan) plan =
        plan_ok(spec, members, 6, &wish); /* plan_check() refuses a worker used twice */
    assert_layout(plan, 3, 1, 2);
    wish = (PlanWish){.dp = 3, .streams = 2};
    g_autoptr(Plan) free_degrees = plan_ok(spec, members, 6, &wish);
    assert_int_equal(free_degrees->n_replicas, 3);
}

/* ---- KV memory --------------------------------------------------------------------------------
 */

static void test_streams_as_fits(void **state)
{
    g_autoptr(ModelSpec) spec = smol();
    PlanMember members[1];
    plan_builder_members(members, 1);
    PlanWish wish = {0};
    g_autoptr(Plan) roomy = plan_ok(spec, members, 1, &wish);
    assert_int_equal(roomy->streams, 16);
    members[0].memory_bytes = 700 * MIB; /* weights and buffers 230, a stream 180 */
    g_autoptr(Plan) tight = plan_ok(spec, members, 1, &wish);
    assert_int_equal(tight->streams, 2);
    members[0].memory_bytes = 100 * MIB;
    Refusal r = plan_refused(spec, members, 1, &wish);
    assert_text(&r, "MiB of memory are missing");
    refusal_clear(&r);
}

static void test_kv_memory(void **state)
{
    g_autoptr(ModelSpec) spec = smol();
    PlanMember members[2];
    plan_builder_members(members, 2);
    PlanWish wish = {.pp = 1, .tp = 1, .kv_memory = 1024 * MIB};
    g_autoptr(Plan) plan = plan_ok(spec, members, 2, &wish);
    uint64_t token = plan->replicas[0].stages[0].ranks[0].kv_bytes_per_token;
    assert_true(plan->kv_pages * KV_BLOCK * token <= 1024 * MIB);
    assert_true((plan->kv_pages + 1) * KV_BLOCK * token > 1024 * MIB);
    assert_int_equal(plan->streams, plan->kv_pages / 256);
    wish.streams = 1; /* more memory than these need: a longer prefix cache */
    g_autoptr(Plan) narrow = plan_ok(spec, members, 2, &wish);
    assert_int_equal(narrow->streams, 1);
    assert_int_equal(narrow->kv_pages, plan->kv_pages);
    wish.streams = 0;
    wish.kv_memory = 10 * MIB;
    Refusal r = plan_refused(spec, members, 2, &wish);
    assert_text(&r, "KV memory of 10.0 MiB");
    refusal_clear(&r);
}

/* ---- refusals ---------------------------------------------------------------------------------
 */

static void test_degree_above_limit(void **state)
{
    g_autoptr(ModelSpec) spec = smol();
    PlanMember members[12];
    plan_builder_members(members, 12);
    PlanWish wish = {.tp = 10, .streams = 1};
    Refusal r = plan_refused(spec, members, 12, &wish);
    assert_text(&r, "tensor parallel 10 is more than this model allows: it has 9 attention units "
                    "and 12 FFN units");
    assert_int_equal(r.violations->len, 1);
    assert_true(r.alternatives->len > 0);
    refusal_clear(&r);
    wish = (PlanWish){.pp = 31, .streams = 1};
    r = plan_refused(spec, members, 12, &wish);
    assert_text(&r, "31 stages are more than the model's 30 layers");
    refusal_clear(&r);
    wish = (PlanWish){.context = 9000};
    r = plan_refused(spec, members, 12, &wish);
    assert_text(&r, "context 9000 is beyond the model's own limit of 8192");
    refusal_clear(&r);
}

static void test_too_few_workers(void **state)
{
    g_autoptr(ModelSpec) spec = smol();
    PlanMember members[3];
    plan_builder_members(members, 3);
    members[2].usable = false;
    PlanWish wish = {.pp = 3, .tp = 1, .streams = 1};
    Refusal r = plan_refused(spec, members, 3, &wish);
    assert_text(&r, "needs 3 workers and 2 can be used; start 1 more");
    refusal_clear(&r);
    r = plan_refused(spec, members, 0, &wish);
    assert_text(&r, "there is no worker");
    refusal_clear(&r);
    wish = (PlanWish){.dp = UINT32_MAX, .pp = 30, .tp = 9};
    r = plan_refused(spec, members, 3, &wish);
    assert_text(&r, "workers and 2 can be used");
    refusal_clear(&r);
}

static void test_unfit_workers(void **state)
{
    g_autoptr(ModelSpec) spec = smol();
    PlanMember members[1];
    PlanWish wish = {.streams = 1};
    plan_builder_members(members, 1);
    members[0].numerics_version = 99;
    Refusal r = plan_refused(spec, members, 1, &wish);
    assert_text(&r, "other numerics");
    refusal_clear(&r);
    plan_builder_members(members, 1);
    members[0].packed_block_bytes[DTYPE_Q4_1] = 0;
    r = plan_refused(spec, members, 1, &wish);
    assert_text(&r, "cannot compute a weight type");
    refusal_clear(&r);
    plan_builder_members(members, 1);
    wish.numerics = NUMERICS_FAST;
    r = plan_refused(spec, members, 1, &wish);
    assert_text(&r, "numerics class");
    refusal_clear(&r);
}

/* The number that is said to be missing is the number: with that much more it fits. */
static void test_missing_memory_is_exact(void **state)
{
    g_autoptr(ModelSpec) spec = smol();
    PlanMember members[1];
    PlanWish wish = {.streams = 1};
    plan_builder_members(members, 1);
    g_autoptr(Plan) plan = plan_ok(spec, members, 1, &wish);
    uint64_t need = plan->replicas[0].stages[0].ranks[0].peak_bytes;
    members[0].memory_bytes = need - 100 * MIB;
    Refusal r = plan_refused(spec, members, 1, &wish);
    assert_text(&r, "100 MiB of memory are missing");
    assert_int_equal(r.violations->len, 1);
    assert_int_equal(((PlanViolation *)r.violations->pdata[0])->rule, PLAN_RULE_MEMORY);
    refusal_clear(&r);
    members[0].memory_bytes = need;
    g_autoptr(Plan) fits = plan_ok(spec, members, 1, &wish);
    assert_non_null(fits);
}

static void test_alternatives(void **state)
{
    g_autoptr(ModelSpec) spec = large();
    PlanMember members[2];
    plan_builder_members(members, 2);
    members[0].memory_bytes = members[1].memory_bytes = 4000 * MIB;
    PlanWish wish = {.pp = 1, .tp = 1, .streams = 1, .context = 2048};
    Refusal r = plan_refused(spec, members, 2, &wish);
    assert_true(has_alternative(&r, "--pp 2 --tp 1"));
    assert_true(has_alternative(&r, "--pp 1 --tp 2"));
    refusal_clear(&r);
}

/* ---- cost model -------------------------------------------------------------------------------
 */

static void test_roof(void **state)
{
    g_autoptr(ModelSpec) spec = smol();
    PlanMember members[2];
    plan_builder_members(members, 2);
    PlanWish wish = {.pp = 1, .tp = 1, .streams = 1};
    g_autoptr(Plan) one = plan_ok(spec, members, 2, &wish);
    double roof = planner_roof(one, spec, members, 2);
    double wanted = 20e9 / (double)one->replicas[0].stages[0].ranks[0].weight_bytes;
    assert_true(fabs(roof - wanted) < 1e-6 * wanted);
    assert_true(one->predicted.decode_tokens_per_s < roof);
    wish.pp = 2;
    g_autoptr(Plan) two =
        plan_ok(spec, members, 2, &wish); /* the embedding of stage 0 is only looked up */
    assert_true(fabs(planner_roof(two, spec, members, 2) - wanted) < 0.001 * wanted);
}

static void test_cost_follows_speed_and_depth(void **state)
{
    g_autoptr(ModelSpec) spec = smol();
    PlanMember members[2];
    plan_builder_members(members, 2);
    PlanWish wish = {.pp = 1, .tp = 2, .streams = 4};
    g_autoptr(Plan) plan = plan_ok(spec, members, 2, &wish);
    PlanCost base = planner_cost(plan, spec, members, 2, 0, 1, 0);
    PlanCost deep = planner_cost(plan, spec, members, 2, 0, 1, 8000);
    PlanCost batch = planner_cost(plan, spec, members, 2, 0, 4, 0);
    PlanCost prefill = planner_cost(plan, spec, members, 2, 0, 512, 0);
    assert_true(deep.latency_s > base.latency_s);
    assert_true(batch.latency_s < 4 * base.latency_s); /* weights are read once */
    assert_true(prefill.latency_s < 512 * base.latency_s && prefill.compute_s > prefill.memory_s);
    double parts = base.memory_s + base.compute_s + base.link_s;
    assert_true(fabs(parts - base.latency_s) < 1e-9);
    /* 30 layers x 2 exchanges, and the embedding's and the sampler's: each one latency and its
     * bytes. */
    double exchange = 10e-6 + 576 * 4 / 2e9;
    assert_true(fabs(base.link_s - (61 * exchange + 10e-6)) < 1e-7);
    members[0].link_latency_s = members[1].link_latency_s = 1e-3;
    PlanCost slow = planner_cost(plan, spec, members, 2, 0, 1, 0);
    assert_true(slow.link_s > 0.05 && slow.latency_s > base.latency_s);
}

/* Prompts take as long as products with the model's own weight types do, where they were measured.
 */
static void test_cost_follows_rates_of_types(void **state)
{
    g_autoptr(ModelSpec) spec = smol();
    PlanMember members[1];
    plan_builder_members(members, 1);
    PlanWish wish = {.streams = 1};
    g_autoptr(Plan) plan = plan_ok(spec, members, 1, &wish);
    const double base = planner_cost(plan, spec, members, 1, 0, 512, 0).latency_s;
    members[0].matmul_ops_per_s[DTYPE_Q4_K] = 9 * members[0].int8_ops_per_s; /* it has none */
    assert_true(planner_cost(plan, spec, members, 1, 0, 512, 0).latency_s == base);
    members[0].matmul_ops_per_s[DTYPE_Q4_1] = 2 * members[0].int8_ops_per_s;
    const double fast = planner_cost(plan, spec, members, 1, 0, 512, 0).latency_s;
    assert_true(fast > 0.49 * base && fast < 0.53 * base);
}

/* FORMULAS 7a: what n ranks send each other of a sum of so many subtrees, in one step or in two. */
static double sum_bytes(double n, double subtrees, double bytes)
{
    const double one_shot = (n - 1) * subtrees * bytes,
                 two_shot = (n - 1) / n * (subtrees + n) * bytes;
    return bytes >= 64 << 10 ? MIN(one_shot, two_shot) : one_shot;
}

/* Whatever the cut is. */
static void test_sums_are_counted(void **state)
{
    g_autoptr(ModelSpec) spec = large();
    RandomSeeded random;
    random_seeded_init(&random, 5);
    for (int i = 0; i < 60; i++) {
        PlanMember members[8];
        plan_builder_members(members, 8);
        g_autoptr(Plan) plan = plan_builder_random(&random.base, spec, 1, 2, 4);
        for (uint32_t rows = 1; rows <= 64; rows *= 64) {
            double wanted = 0.0;
            for (uint32_t s = 0; s < 2; s++) {
                const PlanStage *stage = &plan->replicas[0].stages[s];
                const double bytes = 4.0 * spec->width * rows;
                uint32_t attn, ffn;
                count_subtrees(spec, stage, &attn, &ffn);
                wanted += (stage->layer_last - stage->layer_first + 1) *
                          (sum_bytes(stage->n_ranks, attn, bytes) +
                           sum_bytes(stage->n_ranks, ffn, bytes));
            }
            PlanCost cost = planner_cost(plan, spec, members, 8, 0, rows, 0);
            assert_true(fabs(cost.sums_bytes - wanted) <= 1e-9 * wanted);
        }
    }
}

/* The same on three ranks, in time: each sends its s_r vectors to two others. */
static void test_exchange_of_three(void **state)
{
    g_autoptr(ModelSpec) spec = smol();
    PlanMember members[3];
    plan_builder_members(members, 3);
    PlanWish wish = {.pp = 1, .tp = 3, .streams = 1};
    g_autoptr(Plan) plan = plan_ok(spec, members, 3, &wish);
    uint32_t most[2] = {0, 0};
    for (uint32_t k = 0; k < 3; k++) {
        const PlanRank *rank = &plan->replicas[0].stages[0].ranks[k];
        most[0] =
            MAX(most[0], tree_subtrees(9, rank->attn_first, rank->attn_first + rank->attn_count));
        most[1] =
            MAX(most[1], tree_subtrees(12, rank->ffn_first, rank->ffn_first + rank->ffn_count));
    }
    for (uint32_t rows = 1; rows <= 512; rows *= 8) {
        double bytes = 4.0 * 576 * rows;
        double wanted = 2 * (10e-6 + MAX(rows / 3.0, 1.0) * 4.0 * 576 / 2e9) + 10e-6;
        for (int i = 0; i < 2; i++) {
            double one_shot = 2 * (10e-6 + most[i] * bytes / 2e9);
            double two_shot = 4 * 10e-6 + 2.0 / 3 * (most[i] + 1) * bytes / 2e9;
            wanted += 30 * (bytes >= 64 << 10 ? two_shot : one_shot);
        }
        PlanCost cost = planner_cost(plan, spec, members, 3, 0, rows, 0);
        assert_true(fabs(cost.link_s - wanted) < 1e-9 + 1e-6 * wanted);
    }
}

/* Members that measured nothing, or nonsense, still get a finite plan. */
static void test_unmeasured_members(void **state)
{
    g_autoptr(ModelSpec) spec = smol();
    static const double values[] = {0.0, -1.0, NAN, INFINITY, 1e300, 1e-300};
    for (size_t i = 0; i < G_N_ELEMENTS(values); i++) {
        PlanMember members[2];
        plan_builder_members(members, 2);
        members[0].read_bytes_per_s = members[0].int8_ops_per_s = members[0].f32_ops_per_s =
            values[i];
        members[0].link_latency_s = members[0].link_bytes_per_s = values[i];
        PlanWish wish = {.pp = 1, .tp = 2, .streams = 1};
        g_autoptr(Plan) plan = plan_ok(spec, members, 2, &wish);
        assert_true(isfinite(plan->predicted.decode_tokens_per_s) &&
                    plan->predicted.decode_tokens_per_s > 0);
        assert_true(isfinite(plan->predicted.prefill_tokens_per_s) &&
                    plan->predicted.prefill_tokens_per_s > 0);
    }
}

/* ---- random clusters --------------------------------------------------------------------------
 */

static double pick(Random *random, double low, double high)
{
    return low * pow(high / low, (double)(random_u64(random) % 1000) / 999.0);
}

static void random_member(Random *random, PlanMember *m)
{
    static const char *const hosts[] = {"a", "b", "c", NULL};
    m->memory_bytes = (uint64_t)pick(random, 50e6, 20e9);
    m->read_bytes_per_s = pick(random, 2e9, 200e9);
    m->int8_ops_per_s = pick(random, 20e9, 4e12);
    m->f32_ops_per_s = pick(random, 10e9, 1e12);
    m->link_latency_s = pick(random, 1e-6, 5e-3);
    m->link_bytes_per_s = pick(random, 1e7, 2e10);
    m->usable = random_u64(random) % 8 != 0;
    m->host = hosts[random_u64(random) % 4];
    if (random_u64(random) % 16 == 0) {
        m->numerics_version++;
    }
    if (random_u64(random) % 16 == 0) {
        m->packed_block_bytes[DTYPE_Q4_1] = 0;
    }
}

static bool same_plan(const Plan *a, const Plan *b)
{
    g_autofree char *x = plan_layout_text(a), *y = plan_layout_text(b);
    if (strcmp(x, y) != 0 || a->kv_pages != b->kv_pages || a->reasons->len != b->reasons->len) {
        return false;
    }
    for (uint32_t r = 0; r < a->n_replicas; r++) {
        for (uint32_t s = 0; s < a->replicas[r].n_stages; s++) {
            for (uint32_t k = 0; k < a->replicas[r].stages[s].n_ranks; k++) {
                PlanRank p = a->replicas[r].stages[s].ranks[k],
                         q = b->replicas[r].stages[s].ranks[k];
                if (strcmp(p.worker, q.worker) != 0) {
                    return false;
                }
                p.worker = q.worker = NULL;
                if (memcmp(&p, &q, sizeof p) != 0) {
                    return false;
                }
            }
        }
    }
    return true;
}

static void test_random_clusters(void **state)
{
    g_autoptr(ModelSpec) small = smol();
    g_autoptr(ModelSpec) big = large();
    RandomSeeded random;
    uint32_t n_planned = 0, n_refused = 0;
    const uint64_t seed = 4711;
    random_seeded_init(&random, seed);
    for (int i = 0; i < 2000; i++) {
        const ModelSpec *spec = i % 3 == 0 ? big : small;
        PlanMember members[9];
        uint32_t n = 1 + (uint32_t)(random_u64(&random.base) % 9);
        plan_builder_members(members, n);
        for (uint32_t m = 0; m < n; m++) {
            random_member(&random.base, &members[m]);
        }
        PlanWish wish = {
            .dp = random_u64(&random.base) % 4 == 0 ? 1 + (uint32_t)(random_u64(&random.base) % 3)
                                                    : 0,
            .pp = random_u64(&random.base) % 3 == 0 ? 1 + (uint32_t)(random_u64(&random.base) % 4)
                                                    : 0,
            .tp = random_u64(&random.base) % 3 == 0 ? 1 + (uint32_t)(random_u64(&random.base) % 5)
                                                    : 0,
            .streams = (uint32_t)(random_u64(&random.base) % 4),
            .context = random_u64(&random.base) % 2 == 0 ? 1024 : 0,
            .kv_type = (KvType)(random_u64(&random.base) % 3),
            .kv_memory = random_u64(&random.base) % 5 == 0 ? 600 * MIB : 0,
            .one_host_shared = random_u64(&random.base) % 2 == 0,
        };
        g_autoptr(GError) error = NULL;
        g_autoptr(GPtrArray) violations = NULL, alternatives = NULL;
        g_autoptr(Plan) plan =
            planner_plan(spec, members, n, &wish, &violations, &alternatives, &error);
        if (plan == NULL) {
            n_refused++;
            assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_IMPOSSIBLE));
            assert_true(violations->len > 0);
            continue;
        }
        n_planned++;
        assert_legal(plan, spec, members, n);
        assert_true(wish.dp == 0 || plan->n_replicas == wish.dp);
        assert_true(wish.pp == 0 || plan->replicas[0].n_stages == wish.pp);
        assert_true(wish.tp == 0 || plan->replicas[0].stages[0].n_ranks == wish.tp);
        assert_true(isfinite(plan->predicted.decode_tokens_per_s));
        if (i % 10 == 0) {
            g_autoptr(Plan) again = planner_plan(spec, members, n, &wish, NULL, NULL, NULL);
            assert_true(same_plan(plan, again));
        }
    }
    print_message("# seed %" G_GUINT64_FORMAT ": %u planned, %u refused\n", seed, n_planned,
                  n_refused);
    assert_true(n_planned > 800 && n_refused > 300);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_worker),
        cmocka_unit_test(test_link_decides),
        cmocka_unit_test(test_ranks_take_own_cpus),
        cmocka_unit_test(test_crowded_ranks),
        cmocka_unit_test(test_crowded_stages),
        cmocka_unit_test(test_stages_share_cpus),
        cmocka_unit_test(test_fastest_worker_is_taken),
        cmocka_unit_test(test_too_large_for_one),
        cmocka_unit_test(test_units_by_speed),
        cmocka_unit_test(test_equal_hosts_are_cut_at_nodes),
        cmocka_unit_test(test_reason_tells_what_speed_would_send),
        cmocka_unit_test(test_unequal_hosts_keep_their_shares),
        cmocka_unit_test(test_memory_before_nodes),
        cmocka_unit_test(test_memory_moves_units),
        cmocka_unit_test(test_memory_moves_layers),
        cmocka_unit_test(test_layers_by_work),
        cmocka_unit_test(test_shared_kv_heads),
        cmocka_unit_test(test_replicas_are_disjoint),
        cmocka_unit_test(test_streams_as_fits),
        cmocka_unit_test(test_kv_memory),
        cmocka_unit_test(test_degree_above_limit),
        cmocka_unit_test(test_too_few_workers),
        cmocka_unit_test(test_unfit_workers),
        cmocka_unit_test(test_missing_memory_is_exact),
        cmocka_unit_test(test_alternatives),
        cmocka_unit_test(test_roof),
        cmocka_unit_test(test_sums_are_counted),
        cmocka_unit_test(test_exchange_of_three),
        cmocka_unit_test(test_cost_follows_speed_and_depth),
        cmocka_unit_test(test_cost_follows_rates_of_types),
        cmocka_unit_test(test_unmeasured_members),
        cmocka_unit_test(test_random_clusters),
    };
    return cmocka_run_group_tests_name("planner", tests, NULL, NULL);
}
