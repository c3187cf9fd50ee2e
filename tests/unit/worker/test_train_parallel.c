/* Pipeline stages, tensor ranks and mixes of them with replicas, even and uneven: losses, norms,
 * validation and weights_digest are those of a process alone, and the bytes on the wire are the
 * formula's (NUMERICS 3, 14-17; FORMULAS 7-11). */
#include "tests/unit/worker/train_runs.h"

#include "proto/plan/tree.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

enum { STEPS = 2 };

static void gpipe(TrainRankOptions *options)
{
    options->schedule = PIPELINE_GPIPE;
}

static void zero_bubble(TrainRankOptions *options)
{
    options->schedule = PIPELINE_ZERO_BUBBLE;
}

static void recompute(TrainRankOptions *options)
{
    options->recompute = RECOMPUTE_FULL;
    options->bucket_floats = 3000;
}

static void selective(TrainRankOptions *options)
{
    options->recompute = RECOMPUTE_SELECTIVE;
}

static void gpipe_recompute(TrainRankOptions *options)
{
    options->schedule = PIPELINE_GPIPE;
    options->recompute = RECOMPUTE_FULL;
    options->whole_optimizer = true;
}

static void assert_equal_runs(const Toy *toy, const RunSpread *spreads, size_t n)
{
    const RunSpread one = {.isa = kernels_best_isa()};
    const RunResult want = run_toy(toy, &one, STEPS, NULL);
    for (size_t i = 0; i < n; i++) {
        RunSpread spread = spreads[i];
        spread.isa = spread.isa == ISA_GENERIC ? kernels_best_isa() : spread.isa;
        print_message("# dp %u pp %u tp %u\n", spread.dp, spread.pp, spread.tp);
        const RunResult got = run_toy(toy, &spread, STEPS, NULL);
        assert_same_run(&got, &want);
    }
}

/* ---- pipelines ---- */

/* Stages of 2 and 1 layers. */
static const RunSpread pipelines[] = {
    {.pp = 2},
    {.pp = 3, .threads = 2},
    {.pp = 2, .change = gpipe, .micro = 2},
    {.pp = 3, .change = gpipe_recompute},
    {.pp = 3, .dp = 2, .change = recompute},
    {.pp = 2, .dp = 3, .micro = 2, .change = gpipe_recompute},
    {.pp = 3, .change = zero_bubble},
    {.pp = 2, .dp = 2, .threads = 2, .change = zero_bubble},
    {.change = zero_bubble},
    {.change = recompute, .threads = 2},
    {.pp = 2, .micro = 8},
    {.pp = 2, .dp = 2, .micro = 8, .change = zero_bubble},
    {.change = selective, .threads = 2, .micro = 2},
    {.pp = 3, .dp = 2, .change = selective},
};

static void test_pipelines(void **state)
{
    assert_equal_runs(&toy_wide_gpt2, pipelines, G_N_ELEMENTS(pipelines));
    assert_equal_runs(&toy_wide_llama, pipelines, G_N_ELEMENTS(pipelines));
}

/* ---- chunks ---- */

static const RunSpread chunked[] = {
    {.pp = 2, .chunks = 2},
    {.pp = 3, .chunks = 2, .threads = 2}, /* of 1 and 2 layers */
    {.pp = 2, .chunks = 3, .micro = 2, .change = selective},
    {.pp = 2, .chunks = 2, .dp = 3, .change = recompute},
    {.pp = 2, .chunks = 4, .tp = 2},
};

static void test_chunks(void **state)
{
    Toy gpt2 = toy_wide_gpt2, llama = toy_wide_llama;
    gpt2.config.layers = llama.config.layers = 8;
    llama.config.untied = false;
    assert_equal_runs(&gpt2, chunked, G_N_ELEMENTS(chunked));
    assert_equal_runs(&llama, chunked, G_N_ELEMENTS(chunked));
}

/* ---- tensor ranks ---- */

static const RunSpread tensors[] = {
    {.tp = 2},
    {.tp = 3, .threads = 2},
    {.tp = 5, .micro = 2},
    {.tp = 2, .edit = plan_uneven, .threads = 2},
    {.tp = 3, .change = recompute},
    {.tp = 2, .threads = 2, .micro = 8},
    {.tp = 3, .change = selective},
};

static void test_tensor_ranks(void **state)
{
    assert_equal_runs(&toy_wide_gpt2, tensors, G_N_ELEMENTS(tensors));
    assert_equal_runs(&toy_wide_llama, tensors, G_N_ELEMENTS(tensors));
}

/* Micro-batches of more rows than are folded at once: sums of some travel while others are made. */
static void test_tensor_blocks(void **state)
{
    static const RunSpread blocks[] = {
        {.tp = 2, .micro = 8},
        {.tp = 2, .micro = 8, .threads = 2, .edit = plan_uneven},
        {.tp = 3, .micro = 8, .threads = 2},
        {.tp = 2, .micro = 8, .change = recompute},
        {.tp = 2, .micro = 8, .change = zero_bubble},
    };
    Toy gpt2 = toy_wide_gpt2, llama = toy_wide_llama;
    gpt2.config.context = gpt2.length = llama.length = 40;
    gpt2.sequences = llama.sequences = 8; /* 320 rows */
    assert_equal_runs(&gpt2, blocks, G_N_ELEMENTS(blocks));
    assert_equal_runs(&llama, blocks, G_N_ELEMENTS(blocks));
}

/* More chunks than a tensor has units: 68, as the vocabularies of Llama 3 and others have. */
static void test_large_vocabularies(void **state)
{
    static const RunSpread large[] = {{.tp = 2, .threads = 2},
                                      {.tp = 3},
                                      {.tp = 2, .edit = plan_uneven},
                                      {.dp = 2, .pp = 2, .tp = 2}};
    Toy toy = toy_wide_llama;
    toy.config.vocabulary = 69000;
    toy.config.width = 12;
    toy.config.layers = 2;
    assert_equal_runs(&toy, large, G_N_ELEMENTS(large));
    toy.config.untied = false;
    assert_equal_runs(&toy, large, 2);
}

/* ---- documents ---- */

/* Attention inside documents of a window, positions over it or anew; stages in the middle know the
 * bounds, too. */
static void test_documents(void **state)
{
    static const RunSpread spreads[] = {
        {.pp = 3, .threads = 2, .micro = 2},
        {.tp = 3, .threads = 2},
        {.dp = 2, .pp = 2, .tp = 2, .change = recompute},
        {.pp = 2, .change = zero_bubble},
        {.pp = 2, .chunks = 2},
    };
    Toy gpt2 = toy_wide_gpt2, llama = toy_wide_llama;
    gpt2.config.layers = llama.config.layers = 4; /* two chunks of two stages */
    gpt2.bounds = BOUNDS_POSITIONS;
    llama.bounds = BOUNDS_ATTENTION;
    assert_equal_runs(&gpt2, spreads, G_N_ELEMENTS(spreads));
    assert_equal_runs(&llama, spreads, G_N_ELEMENTS(spreads));
}

/* ---- mixes ---- */

static const RunSpread mixes[] = {
    {.dp = 2, .pp = 2, .tp = 2, .change = recompute},
    {.pp = 3, .tp = 3, .change = zero_bubble},
    {.dp = 2, .pp = 2, .tp = 3, .change = gpipe_recompute},
    {.dp = 2, .tp = 2, .edit = plan_uneven, .change = recompute},
    {.dp = 2, .pp = 2, .tp = 2, .edit = plan_uneven, .threads = 2},
};

static void test_mixes(void **state)
{
    Toy tied = toy_wide_llama;
    tied.config.untied = false;
    assert_equal_runs(&toy_wide_gpt2, mixes, G_N_ELEMENTS(mixes));
    assert_equal_runs(&tied, mixes, G_N_ELEMENTS(mixes));
}

/* ---- bytes ---- */

/* Activations one way and their gradients the other, at each boundary. */
static void test_pipeline_bytes(void **state)
{
    const RunSpread spread = {.dp = 2, .pp = 3, .isa = kernels_best_isa()};
    const RunResult run = run_toy(&toy_wide_gpt2, &spread, STEPS, NULL);
    const uint64_t tokens = (uint64_t)toy_wide_gpt2.sequences / 2 * toy_wide_gpt2.length,
                   boundary = STEPS * tokens * toy_wide_gpt2.config.width * sizeof(float);
    for (uint32_t r = 0; r < 6; r++) {
        const uint64_t boundaries = r % 3 == 1 ? 2 : 1;
        assert_int_equal(run.traffic[r].pipeline, boundaries * boundary);
        assert_int_equal(run.traffic[r].tensor, 0);
    }
    /* head and lookup part of the embedding that the replica owns, once each way */
    const uint64_t embedding =
        (uint64_t)toy_wide_gpt2.config.vocabulary * toy_wide_gpt2.config.width;
    assert_int_equal(run.traffic[0].tied + run.traffic[3].tied, STEPS * embedding * sizeof(float));
    assert_int_equal(run.traffic[0].tied, run.traffic[2].tied);
    assert_int_equal(run.traffic[1].tied, 0);
}

/* v chunks: as many boundaries as there are chunks on the way, less one; the ring's way back too.
 */
static void test_chunk_bytes(void **state)
{
    Toy deep = toy_wide_gpt2;
    deep.config.layers = 6;
    const RunSpread spread = {.pp = 3, .chunks = 2, .isa = kernels_best_isa()};
    const RunResult run = run_toy(&deep, &spread, STEPS, NULL);
    const uint64_t tokens = (uint64_t)deep.sequences * deep.length,
                   boundary = STEPS * tokens * deep.config.width * sizeof(float);
    const uint64_t boundaries[] = {3, 4, 3}; /* sent: forward 2 2 1, backward 1 2 2 */
    for (uint32_t r = 0; r < 3; r++) {
        assert_int_equal(run.traffic[r].pipeline, boundaries[r] * boundary);
    }
}

/* Two sums forward and two backward a layer, the head's, (m, l) of chunks and the target's logit,
 * and the rows of the embedding; s_r subtrees of each to the other ranks. */
static void test_tensor_bytes(void **state)
{
    const RunSpread spread = {.tp = 2, .isa = kernels_best_isa()};
    const RunResult run = run_toy(&toy_wide_llama, &spread, STEPS, NULL);
    g_autoptr(ModelSpec) spec = toy_spec(&toy_wide_llama);
    g_autoptr(Plan) plan = train_plan_new(spec, 1, 1, 2, NULL);
    const uint64_t tokens = STEPS * (uint64_t)toy_wide_llama.sequences * toy_wide_llama.length,
                   row = spec->width * sizeof(float);
    uint64_t want = tokens * row, got = 0; /* each row of the embedding goes to the other rank */
    for (uint32_t r = 0; r < 2; r++) {
        const PlanRank *rank = &plan->replicas[0].stages[0].ranks[r];
        const uint64_t attention = tree_subtrees(spec->n_attn_units, rank->attn_first,
                                                 rank->attn_first + rank->attn_count),
                       ffn = tree_subtrees(spec->n_ffn_units, rank->ffn_first,
                                           rank->ffn_first + rank->ffn_count),
                       head = tree_subtrees(spec->n_vocab_chunks, rank->vocab_first,
                                            rank->vocab_first + rank->vocab_count);
        want += tokens * row * (2 * spec->n_layers * (attention + ffn) + head);
        want += tokens * (2 * rank->vocab_count + 1) * sizeof(float);
        got += run.traffic[r].tensor;
    }
    assert_int_equal(got, want);
    assert_int_equal(run.traffic[0].data + run.traffic[0].pipeline, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pipelines),    cmocka_unit_test(test_tensor_ranks),
        cmocka_unit_test(test_chunks),       cmocka_unit_test(test_chunk_bytes),
        cmocka_unit_test(test_mixes),        cmocka_unit_test(test_pipeline_bytes),
        cmocka_unit_test(test_tensor_bytes), cmocka_unit_test(test_large_vocabularies),
        cmocka_unit_test(test_documents),    cmocka_unit_test(test_tensor_blocks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
