/* The plan as data: definition, layout text, cuts, copies, slices of every rank, memory. */
#include "proto/plan/plan.h"
#include "proto/plan/rank_span.h"

#include "proto/base/random.h"
#include "proto/plan/tree.h"
#include "tests/golden/gguf_builder.h"
#include "tests/golden/plan_builder.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

static ModelSpec *sample(bool tied)
{
    GgufBuilderConfig c;
    gguf_builder_defaults(&c);
    c.n_layers = 5;
    c.width = 288;
    c.n_heads = 9;
    c.n_kv_heads = 3;
    c.ffn_width = 384;
    c.vocab_size = 5000;
    c.tied = tied;
    c.qkv_bias = tied;
    ModelSpec *spec = gguf_builder_spec(&c, NULL);
    assert_non_null(spec);
    return spec;
}

/* ---- small things -----------------------------------------------------------------------------
 */

static void test_definition_hash(void **state)
{
    Definition d = {1, NUMERICS_EXACT, KV_BF16, 0x01020304, 0, {{0}}, ""};
    uint8_t bytes[36] = {1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 4, 3, 2, 1};
    d.file_hash.bytes[0] = bytes[20] = 0xab;
    d.file_hash.bytes[15] = bytes[35] = 0xcd;
    Hash128 got = definition_hash(&d), wanted = hash128(bytes, sizeof bytes);
    assert_true(hash128_equal(&got, &wanted));
    Definition others[] = {d, d, d, d, d, d, d};
    others[0].numerics_version++;
    others[1].numerics = NUMERICS_FAST;
    others[2].kv_type = KV_F32;
    others[3].context++;
    others[4].wire++;
    others[5].file_hash.bytes[7]++;
    strcpy(others[6].exact_kind, "NVIDIA H200, sm_90, CUDA 13.0");
    for (size_t i = 0; i < G_N_ELEMENTS(others); i++) {
        Hash128 other = definition_hash(&others[i]);
        assert_false(hash128_equal(&got, &other));
    }
}

static void assert_layout(Plan *plan /* taken */, const char *text, uint32_t dp, uint32_t pp,
                          uint32_t tp)
{
    uint32_t got[3];
    g_autofree char *layout = plan_layout_text(plan);
    plan_layout(plan, &got[0], &got[1], &got[2]);
    assert_string_equal(layout, text);
    assert_int_equal(got[0], dp);
    assert_int_equal(got[1], pp);
    assert_int_equal(got[2], tp);
    plan_free(plan);
}

static void test_layout_text(void **state)
{
    g_autoptr(ModelSpec) spec = sample(true);
    assert_layout(plan_builder_even(spec, 1, 1, 1), "dp1 pp1 tp1", 1, 1, 1);
    assert_layout(plan_builder_even(spec, 2, 3, 2), "dp2 pp3 tp2", 2, 3, 2);
    Plan *plan = plan_builder_even(spec, 1, 2, 3);
    g_free(plan->replicas[0].stages[0].ranks[2].worker);
    plan->replicas[0].stages[0].n_ranks = 2;
    assert_layout(plan, "dp1 pp2 tp2,3", 1, 2, 3);
    plan = plan_builder_even(spec, 2, 1, 2);
    g_free(plan->replicas[1].stages[0].ranks[1].worker);
    plan->replicas[1].stages[0].n_ranks = 1;
    assert_layout(plan, "dp2 pp1/1 tp2/1", 2, 1, 2);
}

static void test_copy(void **state)
{
    g_autoptr(ModelSpec) spec = sample(true);
    g_autoptr(Plan) plan = plan_builder_even(spec, 2, 2, 2);
    g_ptr_array_add(plan->reasons, g_strdup("because"));
    Plan *copy = plan_copy(plan);
    g_clear_pointer(&plan, plan_free);
    assert_string_equal(copy->job, "test");
    assert_string_equal(copy->reasons->pdata[0], "because");
    assert_string_equal(copy->replicas[1].stages[1].ranks[1].worker, "w7");
    assert_true(copy->replicas[1].stages[1].ranks[1].weight_bytes > 0);
    plan_free(copy);
    plan_free(NULL);
}

static void test_tp_limit(void **state)
{
    g_autoptr(ModelSpec) spec = sample(true);
    assert_int_equal(plan_tp_limit(spec), MIN(spec->n_attn_units, spec->n_ffn_units));
}

/* ---- cuts -------------------------------------------------------------------------------------
 */

static void assert_cut(uint32_t n, const double *weight, uint32_t n_parts, uint32_t least,
                       const uint32_t *wanted)
{
    uint32_t cuts[9];
    plan_cut(n, weight, n_parts, least, cuts);
    for (uint32_t i = 0; i <= n_parts; i++) {
        assert_int_equal(cuts[i], wanted[i]);
    }
}

static void test_cut(void **state)
{
    assert_cut(12, (double[]){1, 1, 1}, 3, 1, (uint32_t[]){0, 4, 8, 12});
    assert_cut(9, (double[]){1, 1}, 2, 1, (uint32_t[]){0, 5, 9});
    assert_cut(9, (double[]){2, 1}, 2, 1, (uint32_t[]){0, 6, 9});
    assert_cut(9, (double[]){1, 1000}, 2, 1, (uint32_t[]){0, 1, 9});
    assert_cut(3, (double[]){1, 1000, 1, 1}, 4, 0, (uint32_t[]){0, 0, 3, 3, 3});
    assert_cut(0, (double[]){1, 2}, 2, 0, (uint32_t[]){0, 0, 0});
}

/* No other cut has a smaller slowest part, for all weights and small n. */
static void test_cut_is_best(void **state)
{
    RandomSeeded random;
    random_seeded_init(&random, 3);
    for (int i = 0; i < 2000; i++) {
        double weight[3];
        uint32_t cuts[4], n = 3 + (uint32_t)(random_u64(&random.base) % 20);
        for (int p = 0; p < 3; p++) {
            weight[p] = 0.05 + (double)(random_u64(&random.base) % 1000) / 100.0;
        }
        plan_cut(n, weight, 3, 1, cuts);
        double slowest = 0.0, best = 1e300;
        for (int p = 0; p < 3; p++) {
            assert_true(cuts[p + 1] > cuts[p]);
            slowest = MAX(slowest, (cuts[p + 1] - cuts[p]) / weight[p]);
        }
        for (uint32_t a = 1; a + 2 <= n; a++) {
            for (uint32_t b = a + 1; b + 1 <= n; b++) {
                double time = MAX(a / weight[0], MAX((b - a) / weight[1], (n - b) / weight[2]));
                best = MIN(best, time);
            }
        }
        assert_true(slowest <= best * (1 + 1e-12));
    }
}

/* ---- slices of ranks --------------------------------------------------------------------------
 */

/* How many ranks of a replica must hold a slice, from what the slice is for (not from how plan.c
 * finds it). */
static uint32_t wanted_holders(const Plan *plan, const ModelSpec *spec, uint32_t r, uint32_t i,
                               uint32_t slice)
{
    const PlanReplica *replica = &plan->replicas[r];
    const TensorSpec *t = &spec->tensors[i];
    uint32_t n = 0, last = replica->n_stages - 1;
    for (uint32_t s = 0; s <= last; s++) {
        const PlanStage *stage = &replica->stages[s];
        bool in_layer =
            t->layer >= (int32_t)stage->layer_first && t->layer <= (int32_t)stage->layer_last;
        switch (t->role) {
        case ROLE_TOKEN_EMBD:
            n += s == 0 || (s == last && spec->tied_output);
            break;
        case ROLE_OUTPUT:
            n += s == last;
            break;
        case ROLE_OUTPUT_NORM:
            n += s == last ? stage->n_ranks : 0;
            break;
        case ROLE_ROPE_FACTORS:
            n += stage->n_ranks;
            break;
        case ROLE_ATTN_NORM:
        case ROLE_FFN_NORM:
            n += in_layer ? stage->n_ranks : 0;
            break;
        case ROLE_ATTN_K:
        case ROLE_ATTN_V:
        case ROLE_ATTN_K_BIAS:
        case ROLE_ATTN_V_BIAS:
            for (uint32_t k = 0; in_layer && k < stage->n_ranks; k++) {
                bool reads = false;
                for (uint32_t head = 0; head < spec->n_heads; head++) {
                    uint32_t unit = head / spec->attn_unit_heads,
                             group = spec->n_heads / spec->n_kv_heads;
                    bool own = unit >= stage->ranks[k].attn_first &&
                               unit < stage->ranks[k].attn_first + stage->ranks[k].attn_count;
                    reads = reads || (own && head / group == slice);
                }
                n += reads;
            }
            break;
        default:
            n += in_layer;
        }
    }
    return n;
}

static void check_slices(const Plan *plan, const ModelSpec *spec)
{
    for (uint32_t r = 0; r < plan->n_replicas; r++) {
        g_autofree uint32_t **held = g_new0(uint32_t *, spec->n_tensors);
        for (uint32_t i = 0; i < spec->n_tensors; i++) {
            held[i] = g_new0(uint32_t, spec->tensors[i].n_slices);
        }
        for (uint32_t s = 0; s < plan->replicas[r].n_stages; s++) {
            for (uint32_t k = 0; k < plan->replicas[r].stages[s].n_ranks; k++) {
                g_autoptr(GArray) slices = plan_rank_slices(plan, spec, r, s, k);
                uint64_t last = 0;
                for (guint n = 0; n < slices->len; n++) {
                    SliceRef ref = g_array_index(slices, SliceRef, n);
                    uint64_t place = (uint64_t)ref.tensor << 32 | ref.slice;
                    assert_true(ref.tensor < spec->n_tensors &&
                                ref.slice < spec->tensors[ref.tensor].n_slices);
                    assert_true(n == 0 || place > last); /* canonical order, nothing twice */
                    last = place;
                    held[ref.tensor][ref.slice]++;
                }
            }
        }
        for (uint32_t i = 0; i < spec->n_tensors; i++) {
            for (uint32_t slice = 0; slice < spec->tensors[i].n_slices; slice++) {
                if (held[i][slice] != wanted_holders(plan, spec, r, i, slice)) {
                    fail_msg("slice %u of %s is held %u times", slice, spec->tensors[i].name,
                             held[i][slice]);
                }
            }
            g_free(held[i]);
        }
    }
}

static void test_slices_of_random_layouts(void **state)
{
    g_autoptr(ModelSpec) tied = sample(true);
    g_autoptr(ModelSpec) untied = sample(false);
    RandomSeeded random;
    random_seeded_init(&random, 11);
    for (int i = 0; i < 300; i++) {
        const ModelSpec *spec = i % 2 == 0 ? tied : untied;
        uint32_t dp = 1 + (uint32_t)(random_u64(&random.base) % 3),
                 pp = 1 + (uint32_t)(random_u64(&random.base) % 5);
        g_autoptr(Plan) plan = plan_builder_random(&random.base, spec, dp, pp, plan_tp_limit(spec));
        check_slices(plan, spec);
    }
}

/* ---- memory -----------------------------------------------------------------------------------
 */

static void test_measure_one_rank(void **state)
{
    g_autoptr(ModelSpec) spec = sample(true);
    PlanMember member;
    plan_builder_members(&member, 1);
    g_autoptr(Plan) plan = plan_builder_even(spec, 1, 1, 1);
    plan_measure(plan, spec, &member, 1);
    const PlanRank *rank = &plan->replicas[0].stages[0].ranks[0];
    /* Each matrix has a multiple of 16 rows here but the embedding (5000 = 312.5 panels): packed =
     * file bytes + half a panel. */
    uint64_t file_bytes = 0;
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        file_bytes += (spec->tensors[i].size_bytes + 63) / 64 * 64;
    }
    assert_true(rank->weight_bytes >= file_bytes);
    assert_true(rank->weight_bytes <= file_bytes + 16 * (288 / 32 * 34) + 64);
    assert_int_equal(rank->kv_bytes_per_token,
                     5 * 3 * 32 * 2 * 2); /* layers x KV heads x head size x K and V x f16 */
    assert_true(rank->peak_bytes >=
                rank->weight_bytes + rank->kv_bytes_per_token * 32 * plan->kv_pages);
    uint64_t before = rank->peak_bytes;
    plan->kv_pages++;
    plan_measure(plan, spec, &member, 1);
    assert_true(rank->peak_bytes - before == rank->kv_bytes_per_token * 32 +
                                                 page_index_bytes(plan->kv_pages) -
                                                 page_index_bytes(plan->kv_pages - 1));
    plan->definition.kv_type = KV_F32;
    plan_measure(plan, spec, &member, 1);
    assert_int_equal(rank->kv_bytes_per_token, 5 * 3 * 32 * 2 * 4);
    member.packed_block_bytes[DTYPE_Q8_0] *= 2;
    before = rank->weight_bytes;
    plan_measure(plan, spec, &member, 1);
    assert_true(rank->weight_bytes > before * 19 / 10);
}

/* Ranks of one stage together hold what one rank holds, plus norms, shared KV heads and panel
 * padding. */
static void test_measure_adds_up(void **state)
{
    g_autoptr(ModelSpec) spec = sample(false);
    g_autoptr(Plan) one = plan_builder_even(spec, 1, 1, 1);
    g_autoptr(Plan) three = plan_builder_even(spec, 1, 1, 3);
    uint64_t whole = one->replicas[0].stages[0].ranks[0].weight_bytes, sum = 0, kv = 0;
    for (uint32_t k = 0; k < 3; k++) {
        sum += three->replicas[0].stages[0].ranks[k].weight_bytes;
        kv += three->replicas[0].stages[0].ranks[k].kv_bytes_per_token;
    }
    assert_in_range(sum, whole, whole + whole / 20);
    assert_int_equal(kv, one->replicas[0]
                             .stages[0]
                             .ranks[0]
                             .kv_bytes_per_token); /* 3 KV heads over 3 ranks: none shared */
    g_autoptr(Plan) two = plan_builder_even(spec, 1, 1, 2);
    kv = 0;
    for (uint32_t k = 0; k < 2; k++) {
        kv += two->replicas[0].stages[0].ranks[k].kv_bytes_per_token;
    }
    assert_int_equal(kv, one->replicas[0].stages[0].ranks[0].kv_bytes_per_token / 3 *
                             4); /* the middle one twice */
}

/* Numbers that nobody checked must not overflow into small ones. */
static void test_measure_absurd(void **state)
{
    g_autoptr(ModelSpec) spec = sample(true);
    g_autoptr(Plan) plan = plan_builder_even(spec, 1, 2, 2);
    PlanRank *rank = &plan->replicas[0].stages[0].ranks[0];
    plan->kv_pages = UINT64_MAX / 64;
    plan_measure(plan, spec, NULL, 0);
    assert_true(rank->peak_bytes == UINT64_MAX);
    plan->kv_pages = 4;
    plan->max_rows = UINT32_MAX;
    plan->definition.context = UINT32_MAX;
    rank->attn_first = UINT32_MAX;
    rank->attn_count = UINT32_MAX;
    rank->ffn_count = UINT32_MAX;
    rank->vocab_first = 3;
    rank->vocab_count = UINT32_MAX;
    plan->replicas[0].stages[1].layer_first = UINT32_MAX;
    plan->replicas[0].stages[1].layer_last = UINT32_MAX;
    plan_measure(plan, spec, NULL, 0);
    assert_true(rank->peak_bytes > 1ull << 40);
    g_autoptr(GArray) slices = plan_rank_slices(plan, spec, 0, 0, 0);
    for (guint i = 0; i < slices->len; i++) {
        SliceRef ref = g_array_index(slices, SliceRef, i);
        assert_true(ref.slice < spec->tensors[ref.tensor].n_slices);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_definition_hash),
        cmocka_unit_test(test_layout_text),
        cmocka_unit_test(test_copy),
        cmocka_unit_test(test_tp_limit),
        cmocka_unit_test(test_cut),
        cmocka_unit_test(test_cut_is_best),
        cmocka_unit_test(test_slices_of_random_layouts),
        cmocka_unit_test(test_measure_one_rank),
        cmocka_unit_test(test_measure_adds_up),
        cmocka_unit_test(test_measure_absurd),
    };
    return cmocka_run_group_tests_name("plan", tests, NULL, NULL);
}
