/* The checks of the bit contract are worth what they catch (NUMERICS, "Proof"): each of eight
 * mutations of the kernels must fail the check that guards the rule which it breaks, and the real
 * table must pass the same check. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "tests/unit/worker/engine_runs.h"
#include "tests/unit/worker/golden_digests.h"
#include "tests/unit/worker/mutants.h"
#include "transport/group/reduction.h"

#include <math.h>
#include <string.h>

/* ---- checks: true = the rule holds under this table ---- */

/* The committed digest of a tiny model. */
static bool golden_digest_holds(const Kernels *kernels)
{
    GoldenCase c;
    golden_case(0, &c);
    assert_string_equal(c.name, "F32");
    unsigned version;
    char hex[33];
    g_autofree char *committed = golden_digest_committed(c.name, &version);
    golden_digest(&c, kernels, hex);
    assert_non_null(committed);
    return strcmp(hex, committed) == 0;
}

/* 6 attention units, 10 of the feed-forward. */
static Gguf *small_model(void)
{
    GgufBuilderConfig config;
    gguf_builder_defaults(&config);
    gguf_builder_set_type(&config, DTYPE_F32);
    config.width = 96;
    config.n_heads = 6;
    config.n_kv_heads = 3;
    config.head_size = 16;
    config.ffn_width = 320;
    config.vocab_size = 300;
    return runs_model(&config);
}

static bool same_on(const Kernels *kernels, LocalLayout a, LocalLayout b)
{
    g_autoptr(Gguf) gguf = small_model();
    LocalResult first, second;
    a.kernels = b.kernels = kernels;
    runs_greedy(gguf, a, 70, 8, &first);
    runs_greedy(gguf, b, 70, 8, &second);
    const bool same = runs_equal(&first, &second);
    local_result_clear(&first);
    local_result_clear(&second);
    return same;
}

static bool layouts_agree(const Kernels *kernels)
{
    return same_on(kernels, (LocalLayout){.pp = 1, .tp = {1}}, (LocalLayout){.pp = 1, .tp = {3}});
}

static bool chunks_agree(const Kernels *kernels)
{
    return same_on(kernels, (LocalLayout){.pp = 1, .tp = {1}},
                   (LocalLayout){.pp = 1, .tp = {1}, .max_rows = 7});
}

static bool neighbours_change_nothing(const Kernels *kernels)
{
    g_autoptr(Gguf) gguf = small_model();
    uint32_t prompt[8];
    EngineRequest requests[4];
    LocalResult alone, together[4];
    runs_prompt(prompt, 8, 259);
    for (uint32_t i = 0; i < 4; i++) {
        requests[i] = (EngineRequest){.prompt = prompt + i,
                                      .n_prompt = 1,
                                      .max_tokens = 12}; /* alone, every step is one row */
    }
    LocalReplica *replica =
        runs_replica(gguf, (LocalLayout){.pp = 1, .tp = {1}, .kernels = kernels});
    local_replica_run(replica, requests, 1, &alone);
    local_replica_run(replica, requests, 4, together);
    const bool same = runs_equal(&alone, &together[0]);
    local_result_clear(&alone);
    for (uint32_t i = 0; i < 4; i++) {
        local_result_clear(&together[i]);
    }
    local_replica_free(replica);
    return same;
}

/* ---- one product, cut over ranks as the engine does it ---- */

enum { N_OUT = 20, UNIT = 4, N_UNITS = 3, N_IN = UNIT * N_UNITS };

typedef struct Rank {
    PackedMatrix w;
    void *act;
    float out[TREE_SUBTREES_LIMIT][N_OUT];
} Rank;

static void rank_product(const Kernels *kernels, const float *w, const float *x, uint32_t first,
                         uint32_t last, Rank *rank)
{
    TreeStep steps[N_UNITS];
    MatmulUnit units[N_UNITS];
    const uint32_t n_in = (last - first) * UNIT;
    tree_program(N_UNITS, first, last, steps);
    for (uint32_t u = 0; u < last - first; u++) {
        units[u] = (MatmulUnit){.n_in = UNIT, .step = steps[u]};
    }
    rank->w = (PackedMatrix){.type = DTYPE_F32,
                             .n_out = N_OUT,
                             .n_in = n_in,
                             .panel_bytes = packed_panel_bytes(DTYPE_F32, n_in)};
    const size_t n_panels = (N_OUT + PANEL_ROWS - 1) / PANEL_ROWS;
    rank->w.data = g_aligned_alloc0(n_panels, rank->w.panel_bytes, 64);
    rank->act = g_aligned_alloc0(1, act_bytes(ACT_F32, 1, n_in), 64);
    packed_put(&rank->w, w + first * UNIT, N_IN * sizeof(float), 0, N_OUT, 0, n_in);
    kernels->act_quantise[ACT_F32](x + first * UNIT, n_in, 1, 0, 1, n_in, rank->act);
    const MatmulArgs args = {.w = &rank->w,
                             .act = rank->act,
                             .rows = 1,
                             .units = units,
                             .n_units = last - first,
                             .out = rank->out[0],
                             .ld = N_OUT,
                             .subtree_stride = N_OUT,
                             .panel0 = 0,
                             .panel1 = (uint32_t)n_panels};
    kernels->matmul[DTYPE_F32](&args);
    g_aligned_free(rank->w.data);
    g_aligned_free(rank->act);
}

static void product(const Kernels *kernels, const float *w, const float *x, const uint32_t *cuts,
                    uint32_t n_ranks, float *out)
{
    ReductionCache cache = {0};
    const Reduction *reduction = reduction_find(&cache, N_UNITS, 0, cuts, n_ranks);
    const float *operands[TREE_LEAVES_LIMIT];
    Rank ranks[N_UNITS];
    uint32_t n = 0;
    for (uint32_t r = 0; r < n_ranks; r++) {
        rank_product(kernels, w, x, cuts[r], cuts[r + 1], &ranks[r]);
        for (uint32_t s = 0; s < reduction->n_subtrees[r]; s++) {
            operands[n++] = ranks[r].out[s];
        }
    }
    reduction_sum(reduction, operands, N_OUT, out);
}

/* Products of about 1e-60 of either sign: each rounds to a zero of its sign, and -0 is what every
 * unit sums to. */
static bool cuts_agree_on_negative_zero(const Kernels *kernels)
{
    static const uint32_t whole[] = {0, N_UNITS}, apart[] = {0, 1, 2, 3};
    float w[N_OUT * N_IN], x[N_IN], one[N_OUT], three[N_OUT];
    for (unsigned i = 0; i < N_OUT * N_IN; i++) {
        w[i] = -1e-30f;
    }
    for (unsigned i = 0; i < N_IN; i++) {
        x[i] = 1e-30f;
    }
    product(kernels, w, x, whole, 1, one);
    product(kernels, w, x, apart, 3, three);
    assert_true(three[0] == 0 && signbit(three[0]));
    return memcmp(one, three, sizeof one) == 0;
}

/* The specification's bits where products and sums are subnormal. */
static bool parity_holds_on_subnormals(const Kernels *kernels)
{
    static const uint32_t whole[] = {0, N_UNITS};
    float w[N_OUT * N_IN], x[N_IN], expected[N_OUT], got[N_OUT];
    for (unsigned i = 0; i < N_OUT * N_IN; i++) {
        w[i] = 1e-21f * (float)(i % 7 + 1);
    }
    for (unsigned i = 0; i < N_IN; i++) {
        x[i] = 1e-20f * (float)(i % 5 + 1);
    }
    product(kernels_get(ISA_GENERIC), w, x, whole, 1, expected);
    product(kernels, w, x, whole, 1, got);
    assert_true(fpclassify(expected[3]) == FP_SUBNORMAL);
    return memcmp(expected, got, sizeof got) == 0;
}

/* ---- the eight ---- */

static void expect_caught(Mutation mutation, bool (*holds)(const Kernels *kernels))
{
    Kernels mutant;
    mutant_table(mutation, &mutant);
    assert_true(holds(kernels_get(ISA_GENERIC)));
    assert_false(holds(&mutant));
}

static void reversed_k_is_caught_by_the_golden_digest(void **state)
{
    expect_caught(MUTATION_REVERSED_K, golden_digest_holds);
}

static void another_tree_shape_is_caught_by_the_layouts(void **state)
{
    expect_caught(MUTATION_TREE_SHAPE, layouts_agree);
}

static void unrounded_kv_of_the_chunk_is_caught_by_the_chunks(void **state)
{
    expect_caught(MUTATION_UNROUNDED_KV, chunks_agree);
}

static void an_added_zero_is_caught_by_the_cuts_of_a_negative_zero(void **state)
{
    expect_caught(MUTATION_ADDED_ZERO, cuts_agree_on_negative_zero);
}

static void flushed_subnormals_are_caught_by_parity(void **state)
{
    expect_caught(MUTATION_FLUSHED, parity_holds_on_subnormals);
}

static void eight_lanes_are_caught_by_the_golden_digest(void **state)
{
    expect_caught(MUTATION_EIGHT_LANES, golden_digest_holds);
}

static void exp_of_libm_is_caught_by_the_golden_digest(void **state)
{
    expect_caught(MUTATION_LIBM_EXP, golden_digest_holds);
}

static void a_batch_dependent_kernel_is_caught_by_neighbours(void **state)
{
    expect_caught(MUTATION_BATCH, neighbours_change_nothing);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reversed_k_is_caught_by_the_golden_digest),
        cmocka_unit_test(another_tree_shape_is_caught_by_the_layouts),
        cmocka_unit_test(unrounded_kv_of_the_chunk_is_caught_by_the_chunks),
        cmocka_unit_test(an_added_zero_is_caught_by_the_cuts_of_a_negative_zero),
        cmocka_unit_test(flushed_subnormals_are_caught_by_parity),
        cmocka_unit_test(eight_lanes_are_caught_by_the_golden_digest),
        cmocka_unit_test(exp_of_libm_is_caught_by_the_golden_digest),
        cmocka_unit_test(a_batch_dependent_kernel_is_caught_by_neighbours),
    };
    return cmocka_run_group_tests_name("mutations", tests, NULL, NULL);
}
