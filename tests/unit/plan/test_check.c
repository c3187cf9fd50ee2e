/* plan_check(): legal plans pass, and each way of breaking one is reported under its rule, with the
 * others still reported beside it. */
#include "proto/plan/plan.h"

#include "proto/base/random.h"
#include "tests/golden/gguf_builder.h"
#include "tests/golden/plan_builder.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#define N_MEMBERS 64u

typedef struct Bench {
    ModelSpec *spec;
    PlanMember members[N_MEMBERS];
    Plan *plan; /* pp 3 x tp 2, legal */
} Bench;

static int setup(void **state)
{
    GgufBuilderConfig c;
    Bench *b = g_new0(Bench, 1);
    gguf_builder_defaults(&c);
    c.n_layers = 6;
    c.width = 288;
    c.n_heads = 9;
    c.n_kv_heads = 3;
    c.ffn_width = 384;
    c.vocab_size = 5000;
    b->spec = gguf_builder_spec(&c, NULL);
    b->spec->file_hash.bytes[0] = 1;
    plan_builder_members(b->members, N_MEMBERS);
    b->plan = plan_builder_even(b->spec, 1, 3, 2);
    *state = b;
    return 0;
}

static int teardown(void **state)
{
    Bench *b = *state;
    plan_free(b->plan);
    model_spec_free(b->spec);
    g_free(b);
    return 0;
}

static GPtrArray *check(const Bench *b)
{
    return plan_check(b->plan, b->spec, b->members, N_MEMBERS);
}

static void assert_legal(const Bench *b)
{
    g_autoptr(GPtrArray) found = check(b);
    if (found->len > 0) {
        fail_msg("%s", ((PlanViolation *)found->pdata[0])->text);
    }
}

/* At least one violation, all of this rule, one of them with `part` in its text. */
static void assert_broken(const Bench *b, PlanRule rule, const char *part)
{
    g_autoptr(GPtrArray) found = check(b);
    bool told = false;
    assert_true(found->len > 0);
    for (guint i = 0; i < found->len; i++) {
        const PlanViolation *v = found->pdata[i];
        if (v->rule != rule) {
            fail_msg("rule %d: %s", (int)v->rule, v->text);
        }
        told = told || strstr(v->text, part) != NULL;
    }
    if (!told) {
        fail_msg("'%s' lacks '%s'", ((PlanViolation *)found->pdata[0])->text, part);
    }
}

static PlanStage *stage(Bench *b, uint32_t s)
{
    return &b->plan->replicas[0].stages[s];
}

static PlanRank *rank(Bench *b, uint32_t s, uint32_t k)
{
    return &stage(b, s)->ranks[k];
}

static void test_legal(void **state)
{
    assert_legal(*state);
}

static void test_random_layouts_are_legal(void **state)
{
    Bench *b = *state;
    RandomSeeded random;
    random_seeded_init(&random, 5);
    for (int i = 0; i < 200; i++) {
        uint32_t dp = 1 + (uint32_t)(random_u64(&random.base) % 2),
                 pp = 1 + (uint32_t)(random_u64(&random.base) % 4);
        plan_free(b->plan);
        b->plan =
            plan_builder_random(&random.base, b->spec, dp, pp, MIN(plan_tp_limit(b->spec), 8));
        assert_legal(b);
    }
}

static void test_layers(void **state)
{
    Bench *b = *state;
    stage(b, 1)->layer_first++;
    assert_broken(b, PLAN_RULE_LAYERS, "layers 2 to 2 belong to nobody");
    stage(b, 1)->layer_first -= 2;
    assert_broken(b, PLAN_RULE_LAYERS, "layers 1 to 1 belong to several");
    stage(b, 1)->layer_first++;
    stage(b, 2)->layer_last++;
    assert_broken(b, PLAN_RULE_LAYERS, "holds layers 4 to 6, and there are 6");
    stage(b, 2)->layer_last = UINT32_MAX;
    assert_broken(b, PLAN_RULE_LAYERS, "and there are 6");
    stage(b, 2)->layer_last = 4;
    assert_broken(b, PLAN_RULE_LAYERS, "layers 5 to 5 belong to nobody");
    stage(b, 2)->layer_last = 3;
    assert_broken(b, PLAN_RULE_LAYERS, "holds no layer");
}

static void test_layer_order(void **state)
{
    Bench *b = *state;
    PlanStage first = *stage(b, 0);
    stage(b, 0)->layer_first = stage(b, 1)->layer_first;
    stage(b, 0)->layer_last = stage(b, 1)->layer_last;
    stage(b, 1)->layer_first = first.layer_first;
    stage(b, 1)->layer_last = first.layer_last;
    assert_broken(b, PLAN_RULE_LAYERS, "order the parts");
}

static void test_attention_units(void **state)
{
    Bench *b = *state;
    rank(b, 1, 1)->attn_first++;
    rank(b, 1, 1)->attn_count--;
    assert_broken(b, PLAN_RULE_UNITS, "stage 1: attention units 4 to 4 belong to nobody");
    rank(b, 1, 1)->attn_first -= 2;
    rank(b, 1, 1)->attn_count += 2;
    assert_broken(b, PLAN_RULE_UNITS, "belong to several");
    rank(b, 1, 1)->attn_first++;
    assert_broken(b, PLAN_RULE_UNITS, "and there are 9");
    rank(b, 1, 1)->attn_count = UINT32_MAX;
    assert_broken(b, PLAN_RULE_UNITS, "and there are 9");
}

static void test_ffn_units(void **state)
{
    Bench *b = *state;
    rank(b, 2, 0)->ffn_count--;
    assert_broken(b, PLAN_RULE_UNITS, "stage 2: FFN units");
    rank(b, 2, 0)->ffn_count++;
    PlanRank swap = *rank(b, 2, 0);
    rank(b, 2, 0)->ffn_first = rank(b, 2, 1)->ffn_first;
    rank(b, 2, 0)->ffn_count = rank(b, 2, 1)->ffn_count;
    rank(b, 2, 1)->ffn_first = swap.ffn_first;
    rank(b, 2, 1)->ffn_count = swap.ffn_count;
    assert_broken(b, PLAN_RULE_UNITS, "order the parts");
}

static void test_rank_without_units(void **state)
{
    Bench *b = *state;
    rank(b, 0, 0)->attn_count = b->spec->n_attn_units;
    rank(b, 0, 1)->attn_count = 0;
    assert_broken(b, PLAN_RULE_UNITS, "rank 1 holds 0 attention");
}

static void test_vocabulary(void **state)
{
    Bench *b = *state;
    rank(b, 0, 0)->vocab_count--;
    assert_broken(b, PLAN_RULE_VOCAB, "stage 0: vocabulary chunks");
    rank(b, 0, 0)->vocab_count++;
    rank(b, 2, 1)->vocab_first--;
    rank(b, 2, 1)->vocab_count++;
    assert_broken(b, PLAN_RULE_VOCAB, "stage 2: vocabulary chunks");
    rank(b, 2, 1)->vocab_first++;
    rank(b, 2, 1)->vocab_count--;
    rank(b, 1, 0)->vocab_count = 1;
    assert_broken(b, PLAN_RULE_VOCAB, "only the first and last stage");
}

static void test_empty_vocabulary_is_fine(void **state)
{
    Bench *b = *state;
    rank(b, 0, 0)->vocab_count = b->spec->n_vocab_chunks;
    rank(b, 0, 1)->vocab_first = rank(b, 0, 1)->vocab_count = 0;
    assert_legal(b);
}

static void test_members(void **state)
{
    Bench *b = *state;
    g_autofree char *kept = rank(b, 1, 0)->worker;
    rank(b, 1, 0)->worker = g_strdup("ghost");
    assert_broken(b, PLAN_RULE_MEMBER, "worker 'ghost' is unknown");
    g_free(rank(b, 1, 0)->worker);
    rank(b, 1, 0)->worker = NULL;
    assert_broken(b, PLAN_RULE_MEMBER, "worker '' is unknown");
    rank(b, 1, 0)->worker = g_strdup("w0");
    assert_broken(b, PLAN_RULE_MEMBER, "worker w0 device 0 is used twice");
    g_free(rank(b, 1, 0)->worker);
    rank(b, 1, 0)->worker = g_strdup(kept);
    rank(b, 1, 0)->device = 1;
    assert_broken(b, PLAN_RULE_MEMBER, "no device 1");
    rank(b, 1, 0)->device = 0;
    b->members[2].usable = false;
    assert_broken(b, PLAN_RULE_MEMBER, "worker w2 is lost or draining");
}

static void test_memory(void **state)
{
    Bench *b = *state;
    plan_measure(b->plan, b->spec, b->members, N_MEMBERS);
    b->members[3].memory_bytes = rank(b, 1, 1)->peak_bytes - 1;
    assert_broken(b, PLAN_RULE_MEMORY, "worker w3 needs");
    rank(b, 1, 1)->peak_bytes = 0; /* what the plan claims is not believed */
    assert_broken(b, PLAN_RULE_MEMORY, "worker w3 needs");
    b->members[3].memory_bytes++;
    assert_legal(b);
}

static void test_types(void **state)
{
    Bench *b = *state;
    b->members[4].packed_block_bytes[DTYPE_Q8_0] = 0;
    assert_broken(b, PLAN_RULE_TYPE, "worker w4 cannot compute Q8_0 weights");
    b->members[4].packed_block_bytes[DTYPE_Q8_0] = 34;
    b->members[4].packed_block_bytes[DTYPE_Q6_K] = 0; /* not in this model */
    assert_legal(b);
}

static void test_numerics(void **state)
{
    Bench *b = *state;
    b->members[5].numerics_version++;
    assert_broken(b, PLAN_RULE_NUMERICS,
                  "worker w5 computes by numerics version 2 and the plan by 1");
    b->members[5].numerics_version--;
    b->plan->definition.numerics = NUMERICS_FAST;
    assert_broken(b, PLAN_RULE_NUMERICS, "does not offer numerics fast");
    b->plan->definition.numerics = NUMERICS_EXACT;
    const uint32_t classes = b->members[5].numerics_classes;
    b->members[5].numerics_classes = 1u << NUMERICS_FAST;
    b->members[5].device = "cuda:0 (NVIDIA H200, 139.8G)";
    assert_broken(b, PLAN_RULE_NUMERICS,
                  "worker w5 computes on cuda:0 (NVIDIA H200, 139.8G), which offers numerics fast "
                  "only, and a plan has one class; say --numerics fast");
    b->members[5].numerics_classes = classes;
    b->members[5].device = NULL;
    b->plan->definition.file_hash.bytes[0]++;
    assert_broken(b, PLAN_RULE_NUMERICS, "the plan is for file");
}

/* An exact plan is of one kind: hosts, or devices whose bits are the same. */
static void test_kinds(void **state)
{
    Bench *b = *state;
    static const char kind[] = "NVIDIA H200, sm_90, CUDA 13.0";
    b->members[5].device = "cuda:0 (NVIDIA H200, 139.8G)";
    b->members[5].exact_kind = kind;
    assert_broken(b, PLAN_RULE_NUMERICS,
                  "worker w5 computes on NVIDIA H200, sm_90, CUDA 13.0, and the plan's exact bits "
                  "are those of hosts' cores; plan hosts alone, or devices of one kind alone, or "
                  "say --numerics fast");
    strcpy(b->plan->definition.exact_kind, kind);
    g_autoptr(GPtrArray) found = plan_check(b->plan, b->spec, b->members, N_MEMBERS);
    assert_true(found->len > 1); /* now all the others are */
    for (uint32_t i = 0; i < N_MEMBERS; i++) {
        b->members[i].exact_kind = kind;
    }
    assert_legal(b);
    b->members[5].exact_kind = "NVIDIA H100, sm_90, CUDA 13.0";
    assert_broken(b, PLAN_RULE_NUMERICS, "and the plan's exact bits are those of NVIDIA H200");
    b->members[5].exact_kind = NULL; /* the trivial device has a host's bits */
    assert_broken(b, PLAN_RULE_NUMERICS, "worker w5 computes on cuda:0 (NVIDIA H200, 139.8G), and");
    for (uint32_t i = 0; i < N_MEMBERS; i++) {
        b->members[i].exact_kind = kind;
        b->members[i].numerics_classes = 1u << NUMERICS_FAST;
    }
    b->plan->definition.numerics = NUMERICS_FAST;
    assert_broken(b, PLAN_RULE_NUMERICS, "class fast and names a kind of exact bits");
    b->plan->definition.exact_kind[0] = '\0';
    b->members[5].exact_kind = NULL;
    assert_legal(b);
}

static void test_counts(void **state)
{
    Bench *b = *state;
    Plan *p = b->plan;
    p->definition.context = b->spec->context + 1;
    p->kv_pages = 1000;
    assert_broken(b, PLAN_RULE_LIMIT, "the context is 257; choose 1 to 256");
    p->definition.context = 0;
    assert_broken(b, PLAN_RULE_LIMIT, "the context is 0");
    p->definition.context = 64;
    p->streams = 0;
    assert_broken(b, PLAN_RULE_LIMIT, "streams");
    p->streams = 1;
    p->kv_pages = 1; /* a context of 64 needs two */
    assert_broken(b, PLAN_RULE_LIMIT, "KV pages is 1; choose 2");
    p->kv_pages = 2;
    p->max_rows = 0;
    assert_broken(b, PLAN_RULE_LIMIT, "rows");
    p->max_rows = 1;
    p->definition.wire = 1;
    assert_broken(b, PLAN_RULE_LIMIT, "wire");
    p->definition.wire = 0;
    p->definition.kv_type = (KvType)KV_TYPE_LIMIT;
    assert_broken(b, PLAN_RULE_LIMIT, "KV type");
    p->definition.kv_type = KV_Q8;
    assert_legal(b);
}

static void test_no_replicas(void **state)
{
    Bench *b = *state;
    Plan empty = *b->plan;
    empty.n_replicas = 0;
    g_autoptr(GPtrArray) found = plan_check(&empty, b->spec, b->members, N_MEMBERS);
    assert_int_equal(found->len, 1);
    assert_int_equal(((PlanViolation *)found->pdata[0])->rule, PLAN_RULE_LIMIT);
}

/* More ranks than units: the limit is named, and the ranks without units are reported too. */
static void test_degree(void **state)
{
    Bench *b = *state;
    PlanReplica *replica = &b->plan->replicas[0];
    PlanStage *s = &replica->stages[0];
    uint32_t n = plan_tp_limit(b->spec) + 1;
    s->ranks = g_renew(PlanRank, s->ranks, n);
    memset(s->ranks + 2, 0, (n - 2) * sizeof *s->ranks);
    s->n_ranks = n;
    for (uint32_t k = 2; k < n; k++) {
        s->ranks[k].worker = g_strdup_printf("w%u", k + 20);
    }
    g_autoptr(GPtrArray) found = check(b);
    bool limit = false, units = false;
    for (guint i = 0; i < found->len; i++) {
        const PlanViolation *v = found->pdata[i];
        limit = limit ||
                (v->rule == PLAN_RULE_LIMIT && strstr(v->text, "this model allows 1 to 9") != NULL);
        units = units || v->rule == PLAN_RULE_UNITS;
    }
    assert_true(limit && units);
}

/* Several faults at once are all reported. */
static void test_reports_everything(void **state)
{
    Bench *b = *state;
    bool seen[PLAN_RULE_LIMIT + 1] = {false};
    stage(b, 2)->layer_last--;
    rank(b, 0, 0)->ffn_count--;
    rank(b, 2, 0)->vocab_count--;
    b->members[0].usable = false;
    b->members[1].memory_bytes = 1000;
    b->members[2].packed_block_bytes[DTYPE_Q8_0] = 0;
    b->members[3].numerics_version = 7;
    b->plan->max_rows = 0;
    g_autoptr(GPtrArray) found = check(b);
    for (guint i = 0; i < found->len; i++) {
        seen[((PlanViolation *)found->pdata[i])->rule] = true;
    }
    for (int rule = 0; rule <= PLAN_RULE_LIMIT; rule++) {
        assert_true(seen[rule]);
    }
}

/* Any single damaged number of a legal plan is found, or the plan is still one that covers
 * everything: plan_check() never crashes and its verdict does not depend on what was measured into
 * the plan. */
static void test_damaged_plans(void **state)
{
    Bench *b = *state;
    static const uint32_t numbers[] = {0, 1, 2, 5, 6, 9, 64, 65, 1u << 31, UINT32_MAX};
    for (uint32_t s = 0; s < 3; s++) {
        uint32_t *fields[] = {
            &stage(b, s)->layer_first,   &stage(b, s)->layer_last,    &rank(b, s, 1)->attn_first,
            &rank(b, s, 1)->attn_count,  &rank(b, s, 1)->ffn_first,   &rank(b, s, 1)->ffn_count,
            &rank(b, s, 0)->vocab_first, &rank(b, s, 0)->vocab_count, &rank(b, s, 0)->device};
        for (size_t f = 0; f < G_N_ELEMENTS(fields); f++) {
            for (size_t i = 0; i < G_N_ELEMENTS(numbers); i++) {
                uint32_t kept = *fields[f];
                bool is_same = kept == numbers[i];
                *fields[f] = numbers[i];
                g_autoptr(GPtrArray) found = check(b);
                /* the start of an empty range means nothing */
                bool is_idle = f == 6 && rank(b, s, 0)->vocab_count == 0;
                assert_int_equal(found->len == 0, is_same || is_idle);
                *fields[f] = kept;
            }
        }
    }
}

int main(void)
{
#define PLAN_TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        PLAN_TEST(test_legal),
        PLAN_TEST(test_random_layouts_are_legal),
        PLAN_TEST(test_layers),
        PLAN_TEST(test_layer_order),
        PLAN_TEST(test_attention_units),
        PLAN_TEST(test_ffn_units),
        PLAN_TEST(test_rank_without_units),
        PLAN_TEST(test_vocabulary),
        PLAN_TEST(test_empty_vocabulary_is_fine),
        PLAN_TEST(test_members),
        PLAN_TEST(test_memory),
        PLAN_TEST(test_types),
        PLAN_TEST(test_numerics),
        PLAN_TEST(test_kinds),
        PLAN_TEST(test_counts),
        PLAN_TEST(test_no_replicas),
        PLAN_TEST(test_degree),
        PLAN_TEST(test_reports_everything),
        PLAN_TEST(test_damaged_plans),
    };
    return cmocka_run_group_tests_name("check", tests, NULL, NULL);
}
