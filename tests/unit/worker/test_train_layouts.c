/* Losses and weights_digest of a training run do not depend on threads, micro-batches,
 * data-parallel replicas (with their optimizer sharded or not) or instruction set (NUMERICS 14-18),
 * and do depend on what defines them; the bytes that replicas exchange are the formula's. */
#include "tests/unit/worker/train_runs.h"

#include "proto/plan/tree.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

enum { STEPS = 3, SAMPLES = 7 };

/* One of the eight leaves is empty. */
static void eight_leaves(TrainRankOptions *options)
{
    options->sequences = SAMPLES;
    options->leaves = 8;
}

static void whole_optimizer(TrainRankOptions *options)
{
    options->whole_optimizer = true;
}

static void small_buckets(TrainRankOptions *options)
{
    options->bucket_floats = 1000;
}

static void whole_in_small_buckets(TrainRankOptions *options)
{
    options->whole_optimizer = true;
    options->bucket_floats = 1;
}

static void assert_equal_runs(const Toy *toy, void (*define)(TrainRankOptions *options))
{
    const KernelIsa best = kernels_best_isa();
    const RunSpread spreads[] = {
        {.threads = 2, .isa = best},
        {.micro = 2, .isa = best},
        {.micro = 7, .threads = 2, .dp = 2, .isa = best},
        {.micro = SAMPLES, .threads = 2, .isa = best},
        {.micro = SAMPLES, .isa = ISA_GENERIC},
        {.micro = 3, .threads = 3, .dp = 3, .isa = best, .change = small_buckets},
        {.micro = 4, .dp = 2, .isa = ISA_GENERIC, .change = whole_optimizer},
        {.dp = 3, .isa = best, .change = whole_in_small_buckets},
    };
    const RunResult want = run_toy(toy, &(const RunSpread){.isa = best}, STEPS, define);
    for (size_t i = 0; i < G_N_ELEMENTS(spreads); i++) {
        const RunResult got = run_toy(toy, &spreads[i], STEPS, define);
        assert_same_run(&got, &want);
    }
}

static void test_gpt2(void **state)
{
    assert_equal_runs(&toy_gpt2, eight_leaves);
}

static void test_llama(void **state)
{
    assert_equal_runs(&toy_llama, eight_leaves);
}

/* Positions that count from each document's begin: leaves meet at other rows. */
static void test_documents(void **state)
{
    Toy toy = toy_gpt2;
    toy.bounds = BOUNDS_POSITIONS;
    assert_equal_runs(&toy, eight_leaves);
}

/* Leaves of two and three samples: micro-batches go on in a leaf's chain. */
static void wide_leaves(TrainRankOptions *options)
{
    options->sequences = SAMPLES;
    options->leaves = 3;
}

static void test_wide_leaves(void **state)
{
    assert_equal_runs(&toy_gpt2, wide_leaves);
    assert_equal_runs(&toy_llama, wide_leaves);
}

static void sgd(TrainRankOptions *options)
{
    eight_leaves(options);
    options->optimizer.kind = OPTIMIZER_SGD;
    options->optimizer.nesterov = true;
}

static void test_sgd(void **state)
{
    assert_equal_runs(&toy_gpt2, sgd);
}

/* Three samples in eight leaves: replicas that have none. */
static void few_samples(TrainRankOptions *options)
{
    options->sequences = 3;
    options->leaves = 8;
}

static void test_more_replicas(void **state)
{
    void (*const definitions[])(TrainRankOptions *) = {eight_leaves, few_samples};
    const KernelIsa best = kernels_best_isa();
    for (size_t i = 0; i < G_N_ELEMENTS(definitions); i++) {
        const RunResult want =
            run_toy(&toy_llama, &(const RunSpread){.isa = best}, STEPS, definitions[i]);
        for (uint32_t dp = 4; dp <= 8; dp += i == 0 ? 1 : 4) {
            const RunSpread spread = {.dp = dp, .isa = best, .change = small_buckets};
            const RunResult got = run_toy(&toy_llama, &spread, STEPS, definitions[i]);
            assert_same_run(&got, &want);
        }
    }
}

/* ---- bytes (FORMULAS 7, 7a) ---- */

/* Leaf 0 of eight has no sample. */
static uint64_t subtrees_of(uint32_t dp, uint32_t replica)
{
    return tree_subtrees_missing(8, 1, 8 * replica / dp, 8 * (replica + 1) / dp);
}

static void assert_data_bytes(const Toy *toy, uint32_t dp, bool whole)
{
    const RunSpread spread = {.dp = dp,
                              .isa = kernels_best_isa(),
                              .change = whole ? whole_in_small_buckets : small_buckets};
    const RunResult run = run_toy(toy, &spread, STEPS, eight_leaves);
    g_autoptr(ModelSpec) spec = toy_spec(toy);
    g_autoptr(Plan) plan = train_plan_new(spec, dp, 1, 1, NULL);
    g_autoptr(Holding) holding = holding_whole(spec);
    size_t owned_by_all = 0;
    for (uint32_t d = 0; d < dp; d++) {
        const TrainPosition at = train_position(plan, d, 0, 0);
        Ownership *o = ownership_new(spec, plan, &at, holding, true, whole ? 1 : 1000);
        uint64_t own = 0, own_lookup = 0;
        for (uint32_t b = 0; b < o->buckets->len; b++) {
            const Bucket *bucket = &g_array_index(o->buckets, Bucket, b);
            const uint64_t n = bucket->first[d + 1] - bucket->first[d];
            own += n;
            own_lookup += bucket->is_embedding && spec->tied_output ? n : 0;
        }
        const uint64_t reduced =
                           subtrees_of(dp, d) * (run.floats[d] - own - own_lookup) * sizeof(float),
                       shared = (dp - 1) * own * sizeof(float);
        assert_int_equal(run.traffic[d].data, STEPS * (reduced + shared));
        assert_int_equal(run.traffic[d].pipeline + run.traffic[d].tensor, 0);
        assert_int_equal(run.owned[d] == o->n_owned, !whole);
        owned_by_all += o->n_owned;
        assert_true(o->n_owned <= run.floats[d] / dp + 2048); /* by whole rows of tiles */
        ownership_free(o);
    }
    /* each once; ZeRO-1's moments: parameters / dp */
    assert_int_equal(owned_by_all, model_spec_parameters(spec));
}

static void test_data_bytes(void **state)
{
    assert_data_bytes(&toy_gpt2, 2, false);
    assert_data_bytes(&toy_llama, 3, false);
    assert_data_bytes(&toy_gpt2, 3, true);
}

/* ---- what defines a run ---- */

static void more_decay(TrainRankOptions *options)
{
    eight_leaves(options);
    options->optimizer.decay *= 2.0;
}

static void test_what_defines_a_run(void **state)
{
    void (*const changes[])(TrainRankOptions *) = {more_decay, wide_leaves, sgd};
    const RunSpread one = {.isa = kernels_best_isa()};
    const RunResult want = run_toy(&toy_gpt2, &one, STEPS, eight_leaves);
    for (size_t i = 0; i < G_N_ELEMENTS(changes); i++) {
        const RunResult got = run_toy(&toy_gpt2, &one, STEPS, changes[i]);
        assert_false(hash128_equal(&got.digest, &want.digest));
    }
    Toy other = toy_gpt2;
    other.order++;
    const RunResult got = run_toy(&other, &one, STEPS, eight_leaves);
    assert_false(hash128_equal(&got.digest, &want.digest));
}

/* A step whose loss is not finite has not happened. */
static void test_non_finite_loss(void **state)
{
    g_autoptr(ModelSpec) spec = toy_spec(&toy_gpt2);
    g_autoptr(TokenData) data = toy_data(&toy_gpt2);
    g_autoptr(GError) error = NULL;
    Pool *pool = pool_new(1, NULL, false, 0);
    TokenSamples samples = {.data = data, .seed = 1}, in_order = {.data = data, .in_order = true};
    const SampleSource source = token_samples_source(&samples),
                       checked = token_samples_source(&in_order);
    TrainRankOptions options = toy_options(&toy_gpt2, spec, &source);
    options.kernels = kernels_get(kernels_best_isa());
    options.pool = pool;
    Parameters *weights = toy_weights(&toy_gpt2, spec);
    float *norm = parameters_at(weights, ROLE_OUTPUT_NORM, -1);
    const float kept = norm[0];
    TrainRank *rank = train_rank_new(&options, weights, &error);
    Hash128 before, after;
    float validated;
    assert_true(train_rank_digest(rank, &before, &error));
    TrainStep out;
    norm[0] = INFINITY;
    assert_false(train_rank_step(rank, &out, &error));
    assert_non_null(strstr(error->message, "step 1: the loss of sample 0"));
    norm[0] = kept;
    assert_true(train_rank_digest(rank, &after, &error));
    assert_true(hash128_equal(&before, &after));
    g_clear_error(&error);
    assert_true(train_rank_step(rank, &out, &error));
    assert_int_equal(out.step, 0);
    assert_true(train_rank_validate(rank, &checked, 3, &validated, &error));
    assert_true(fabs((double)(validated - out.loss)) < 1.0);
    train_rank_free(rank);
    pool_free(pool);
}

static void skipping(TrainRankOptions *options)
{
    options->skip_nonfinite = true;
}

/* By choice it is left out, on every rank of any layout. */
static void test_non_finite_loss_skipped(void **state)
{
    Toy broken = toy_gpt2;
    broken.magnify = INFINITY;
    const KernelIsa best = kernels_best_isa();
    const RunSpread spreads[] = {{.isa = best},
                                 {.dp = 2, .pp = 2, .isa = best},
                                 {.tp = 2, .threads = 2, .isa = ISA_GENERIC}};
    const RunResult want = run_toy(&broken, &spreads[0], STEPS, skipping);
    for (int i = 0; i < STEPS; i++) {
        assert_true(isnan(want.losses[i]) && want.skipped[i]);
    }
    for (size_t i = 1; i < G_N_ELEMENTS(spreads); i++) {
        const RunResult got = run_toy(&broken, &spreads[i], STEPS, skipping);
        assert_same_run(&got, &want);
    }
    const RunResult still = run_toy(&broken, &spreads[0], 0, skipping);
    assert_true(hash128_equal(&still.digest, &want.digest));
}

static void test_refused(void **state)
{
    g_autoptr(ModelSpec) spec = toy_spec(&toy_gpt2);
    g_autoptr(TokenData) data = toy_data(&toy_gpt2);
    TokenSamples samples = {.data = data, .seed = 1};
    const SampleSource source = token_samples_source(&samples);
    Pool *pool = pool_new(1, NULL, false, 0);
    TrainRankOptions good = toy_options(&toy_gpt2, spec, &source);
    good.kernels = kernels_get(ISA_GENERIC);
    good.pool = pool;
    Parameters *weights = toy_weights(&toy_gpt2, spec);
    const struct {
        uint32_t leaves, dp, length;
        const char *says;
    } rows[] = {{0, 1, 20, "0 leaves; choose 1 to 64"},
                {65, 1, 20, "65 leaves"},
                {4, 5, 20, "5 replicas share 4 leaves; choose dp 1 to 4"},
                {4, 1, 25, "context 24"}};
    for (size_t i = 0; i < G_N_ELEMENTS(rows); i++) {
        g_autoptr(GError) error = NULL;
        g_autoptr(Plan) plan = train_plan_new(spec, rows[i].dp, 1, 1, NULL);
        TrainRankOptions options = good;
        SampleSource changed = source;
        changed.length = rows[i].length;
        options.source = &changed;
        options.leaves = rows[i].leaves;
        options.plan = plan;
        assert_null(train_rank_new(&options, weights, &error));
        assert_non_null(strstr(error->message, rows[i].says));
    }
    parameters_free(weights);
    pool_free(pool);
}

static void test_layouts_refused(void **state)
{
    g_autoptr(ModelSpec) spec = toy_spec(&toy_gpt2);
    const struct {
        uint32_t dp, pp, tp;
        const char *says;
    } rows[] = {{1, 3, 1, "pp 3; choose 1 to 2"},
                {1, 1, 5, "tp 5; choose 1 to 2"},
                {0, 1, 1, "dp 0; choose 1 to 64"},
                {17, 2, 2, "dp 17; choose 1 to 16"}};
    for (size_t i = 0; i < G_N_ELEMENTS(rows); i++) {
        g_autoptr(GError) error = NULL;
        assert_null(train_plan_new(spec, rows[i].dp, rows[i].pp, rows[i].tp, &error));
        assert_non_null(strstr(error->message, rows[i].says));
    }
    g_autoptr(GError) error = NULL;
    g_autoptr(Plan) plan = train_plan_new(spec, 2, 2, 2, NULL);
    assert_true(train_plan_check(plan, spec, &error));
    plan->replicas[1].stages[0].ranks[1].ffn_count++;
    assert_false(train_plan_check(plan, spec, &error));
    assert_non_null(strstr(error->message, "cut differently"));
    for (uint32_t wrong = 0; wrong < 4; wrong++) { /* in all replicas and stages alike */
        g_autoptr(GError) why = NULL;
        g_autoptr(Plan) bad = train_plan_new(spec, 2, 2, 2, NULL);
        for (uint32_t i = 0; i < 4; i++) {
            PlanRank *last = &bad->replicas[i / 2].stages[i % 2].ranks[1];
            last->attn_first -= wrong == 0;
            last->attn_count += wrong == 0 ? 1 : 0;
            last->ffn_count -= wrong == 1;
            last->vocab_count += wrong == 2;
            last->ffn_first += wrong == 3;
        }
        assert_false(train_plan_check(bad, spec, &why));
        assert_non_null(strstr(why->message, "do not cover its units"));
    }
}

static void assert_interleave_refused(const ModelSpec *spec, uint32_t pp, uint32_t chunks,
                                      const char *says)
{
    g_autoptr(GError) error = NULL;
    g_autoptr(Plan) plan = train_plan_new(spec, 1, pp, 1, NULL);
    assert_false(train_plan_interleave(plan, spec, chunks, &error));
    assert_non_null(strstr(error->message, says));
}

static void test_chunks_refused(void **state)
{
    Toy deep = toy_gpt2;
    deep.config.layers = 5;
    g_autoptr(ModelSpec) spec = toy_spec(&deep);
    g_autoptr(GError) error = NULL;
    assert_interleave_refused(spec, 1, 2, "choose pp 2 or more");
    assert_interleave_refused(spec, 2, 3, "chunks 3; choose 1 to 2");
    g_autoptr(Plan) plan = train_plan_new(spec, 2, 2, 1, NULL);
    assert_true(train_plan_interleave(plan, spec, 2, NULL));
    assert_true(train_plan_check(plan, spec, &error));
    assert_int_equal(train_position(plan, 0, 1, 0).chunks, 2);
    PlanLayers *last = &plan->replicas[0].stages[1].more[0];
    assert_int_equal(last->last, 4);
    last->first--; /* a layer on two stages */
    assert_false(train_plan_check(plan, spec, &error));
    assert_non_null(strstr(error->message, "do not cover the layers"));
}

static void zero_bubble(TrainRankOptions *options)
{
    small_buckets(options);
    options->schedule = PIPELINE_ZERO_BUBBLE;
}

/* Buckets are on their way while the backward pass runs, on every rank; not where biases of cut
 * matrices are to be gathered first. */
static void test_overlap(void **state)
{
    const KernelIsa best = kernels_best_isa();
    const RunSpread spreads[] = {{.dp = 2, .isa = best, .change = small_buckets},
                                 {.dp = 2, .pp = 2, .isa = best, .change = zero_bubble},
                                 {.dp = 2, .tp = 2, .isa = best, .change = small_buckets}};
    for (size_t i = 0; i < G_N_ELEMENTS(spreads); i++) {
        const RunResult llama = run_toy(&toy_llama, &spreads[i], STEPS, NULL),
                        gpt2 = run_toy(&toy_gpt2, &spreads[i], STEPS, NULL);
        for (uint32_t r = 0; r < 2 * MAX(spreads[i].pp, 1) * MAX(spreads[i].tp, 1); r++) {
            assert_true(llama.overlapped[r] > 0);
            assert_int_equal(gpt2.overlapped[r] > 0, spreads[i].tp < 2);
        }
    }
}

/* ---- memory ---- */

static uint64_t activations(const Toy *toy, const ModelSpec *spec, const Plan *plan,
                            const SampleSource *source, Recompute recompute)
{
    g_autoptr(GError) error = NULL;
    TrainRankOptions options = toy_options(toy, spec, source);
    options.plan = plan;
    options.micro_sequences = 8;
    options.recompute = recompute;
    TrainMemory memory;
    if (!train_memory_plan(&options, 1, &memory, &error)) {
        fail_msg("%s", error->message);
    }
    return memory.activations;
}

/* Floats a token and layer that are kept (training.h): the first of 2 stages, with its 2
 * micro-batches in flight, keeps what is selected once instead of for each layer and micro-batch.
 */
static void test_selective_memory(void **state)
{
    Toy toy = toy_llama;
    toy.config.layers = 8;
    toy.config.width = 96;
    toy.config.ffn_width = 160;
    toy.sequences = 32;
    toy.length = 32;
    g_autoptr(ModelSpec) spec = toy_spec(&toy);
    g_autoptr(TokenData) data = toy_data(&toy);
    g_autoptr(Plan) plan = train_plan_new(spec, 1, 2, 1, NULL);
    TokenSamples samples = {.data = data, .seed = 1};
    const SampleSource source = token_samples_source(&samples);
    const uint64_t tokens = 8 * 32, layers = 4, in_flight = 2, q = 96, kv = 48, ffn = 160,
                   selected = 2 * 96 + q + ffn, products = 96 + q + 2 * kv + 2 * ffn,
                   shared = layers * in_flight - 1;
    const uint64_t none = activations(&toy, spec, plan, &source, RECOMPUTE_NONE),
                   selective = activations(&toy, spec, plan, &source, RECOMPUTE_SELECTIVE),
                   full = activations(&toy, spec, plan, &source, RECOMPUTE_FULL);
    assert_int_equal(none - selective, shared * tokens * selected * sizeof(float));
    assert_int_equal(selective - full, shared * tokens * products * sizeof(float));
}

/* ---- trace ---- */

/* A rank's trace is what the schedule says, in order, by a clock that goes on. */
static void test_trace(void **state)
{
    Toy deep = toy_gpt2;
    deep.config.layers = 4;
    GArray *traces[2];
    for (uint32_t r = 0; r < 2; r++) {
        traces[r] = g_array_new(FALSE, FALSE, sizeof(PipelineOpTime));
    }
    const RunSpread spread = {.pp = 2, .chunks = 2, .isa = kernels_best_isa(), .traces = traces};
    run_toy(&deep, &spread, 1, NULL);
    g_autoptr(Pipeline) line = pipeline_new(PIPELINE_INTERLEAVED, 2, 2, deep.sequences);
    g_autoptr(GError) error = NULL;
    PipelineComparison c;
    if (!pipeline_compare(line, traces, &c, &error)) {
        fail_msg("%s", error->message);
    }
    assert_true(c.makespan > 0.0 && c.simulated_makespan > 0.0);
    for (uint32_t r = 0; r < 2; r++) {
        int64_t last = 0;
        for (guint i = 0; i < traces[r]->len; i++) {
            const PipelineOpTime *t = &g_array_index(traces[r], PipelineOpTime, i);
            assert_true(t->begin_us >= last && t->end_us >= t->begin_us);
            last = t->end_us;
        }
        g_array_unref(traces[r]);
    }
}

/* ---- validation ---- */

/* Nothing comes back of a forward pass, and yet the first stage is never far ahead. */
static void test_slow_end(void **state)
{
    const RunSpread spread = {.pp = 2, .isa = kernels_best_isa(), .slow_end = true};
    run_toy(&toy_gpt2, &spread, 1, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gpt2),
        cmocka_unit_test(test_llama),
        cmocka_unit_test(test_documents),
        cmocka_unit_test(test_wide_leaves),
        cmocka_unit_test(test_sgd),
        cmocka_unit_test(test_more_replicas),
        cmocka_unit_test(test_data_bytes),
        cmocka_unit_test(test_overlap),
        cmocka_unit_test(test_selective_memory),
        cmocka_unit_test(test_trace),
        cmocka_unit_test(test_slow_end),
        cmocka_unit_test(test_what_defines_a_run),
        cmocka_unit_test(test_non_finite_loss),
        cmocka_unit_test(test_non_finite_loss_skipped),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_layouts_refused),
        cmocka_unit_test(test_chunks_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
