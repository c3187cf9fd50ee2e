/* Smoothed labels, dropout, dynamic loss scale, groups of decay: each against its definition, and
 * the same bits on other layouts. */
#include "tests/unit/kernels/numbers.h"
#include "tests/unit/worker/train_runs.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

enum { STEPS = 4 };

/* A model alone, one micro-batch of two sequences. */
typedef struct Bench {
    ModelSpec *spec;
    Parameters *weights, *gradients;
    Pool *pool;
    Training *training;
    uint32_t *tokens, *targets;
    float *losses;
    TrainBatch batch;
} Bench;

static Bench bench_new(const Toy *toy, float smoothing, Dropout dropout)
{
    Bench b = {.spec = toy_spec(toy), .pool = pool_new(2, NULL, false, 0)};
    const uint32_t rows = 2 * toy->length;
    b.weights = toy_weights(toy, b.spec);
    b.gradients = parameters_new(b.spec, true, NULL);
    const TrainingOptions options = {.weights = b.weights,
                                     .kernels = kernels_get(kernels_best_isa()),
                                     .pool = b.pool,
                                     .max_sequences = 2,
                                     .length = toy->length,
                                     .smoothing = smoothing};
    b.training = training_new(&options, NULL);
    b.tokens = g_new(uint32_t, rows);
    b.targets = g_new(uint32_t, rows);
    b.losses = g_new(float, rows);
    for (uint32_t i = 0; i < rows; i++) {
        b.tokens[i] = i * 97 % toy->config.vocabulary;
        b.targets[i] = i % 7 == 3 ? TARGET_NONE : i * 53 % toy->config.vocabulary;
    }
    b.batch = (TrainBatch){.tokens = b.tokens,
                           .targets = b.targets,
                           .n_sequences = 2,
                           .length = toy->length,
                           .first_sample = 1000,
                           .dropout = dropout};
    return b;
}

static void bench_free(Bench *b)
{
    training_free(b->training);
    parameters_free(b->weights);
    parameters_free(b->gradients);
    model_spec_free(b->spec);
    pool_free(b->pool);
    g_free(b->tokens);
    g_free(b->targets);
    g_free(b->losses);
}

static double bench_loss(Bench *b)
{
    double sum = 0.0;
    assert_int_equal(training_forward(b->training, 0, &b->batch), GROUP_OK);
    assert_int_equal(training_loss(b->training, 0, &b->batch, b->losses), GROUP_OK);
    for (uint32_t i = 0; i < 2 * b->batch.length; i++) {
        sum += (double)b->losses[i];
    }
    return sum;
}

/* ---- smoothed labels ---- */

static double log_sum_exp(const float *z, uint32_t n)
{
    double sum = 0.0;
    for (uint32_t i = 0; i < n; i++) {
        sum += exp((double)z[i]);
    }
    return log(sum);
}

static void test_smoothed_labels(void **state)
{
    const double s = 0.2, factor = 0.25;
    Bench b = bench_new(&toy_llama, (float)s, (Dropout){0});
    const uint32_t rows = 2 * b.batch.length, vocab = b.spec->vocab_size;
    bench_loss(&b);
    g_autofree float *z = g_new(float, (size_t)rows *vocab);
    for (uint32_t r = 0; r < rows; r++) {
        memcpy(z + (size_t)r * vocab, training_logits_row(b.training, r), vocab * sizeof *z);
    }
    training_backward(b.training, 0, &b.batch, (float)factor, b.gradients);
    for (uint32_t r = 0; r < rows; r++) {
        const float *row = z + (size_t)r * vocab, *dz = training_logits_row(b.training, r);
        const double lse = log_sum_exp(row, vocab);
        const bool none = b.targets[r] == TARGET_NONE;
        double mean = 0.0;
        for (uint32_t i = 0; i < vocab; i++) {
            const double share = s / vocab + (i == b.targets[r] ? 1.0 - s : 0.0),
                         want = none ? 0.0 : factor * (exp((double)row[i] - lse) - share);
            mean += (double)row[i] / vocab;
            assert_true(fabs((double)dz[i] - want) < 1e-7);
        }
        const double want = none ? 0.0 : lse - (1.0 - s) * (double)row[b.targets[r]] - s * mean;
        assert_true(fabs((double)b.losses[r] - want) < 2e-6 * MAX(want, 1.0));
    }
    bench_free(&b);
}

/* ---- dropout ---- */

static void test_dropout_of_a_row(void **state)
{
    enum { WIDTH = 4001 };
    const Dropout d = {.rate = 0.3f, .seed = 5}, other = {.rate = 0.3f, .seed = 6};
    float x[WIDTH], again[WIDTH], changed[WIDTH];
    uint32_t n_zero = 0, differ[4] = {0};
    for (uint32_t i = 0; i < WIDTH; i++) {
        x[i] = again[i] = 2.0f;
    }
    dropout_row(&d, 3, UINT64_C(1) << 40, 17, x, WIDTH);
    dropout_row(&d, 3, UINT64_C(1) << 40, 17, again, 1001); /* a channel's fate is its own */
    assert_memory_equal(x, again, 1001 * sizeof *x);
    for (uint32_t i = 0; i < WIDTH; i++) {
        assert_true(x[i] == 0.0f || fabs((double)x[i] - 2.0 / 0.7) < 1e-5);
        n_zero += x[i] == 0.0f;
    }
    assert_true(fabs(n_zero / (double)WIDTH - 0.3) < 0.03);
    for (uint32_t k = 0; k < 4; k++) {
        for (uint32_t i = 0; i < WIDTH; i++) {
            changed[i] = 2.0f;
        }
        dropout_row(k == 0 ? &other : &d, k == 1 ? 4 : 3,
                    k == 2 ? (UINT64_C(1) << 40) + 1 : UINT64_C(1) << 40, k == 3 ? 18 : 17, changed,
                    WIDTH);
        for (uint32_t i = 0; i < WIDTH; i++) {
            differ[k] += (changed[i] == 0.0f) != (x[i] == 0.0f);
        }
        assert_true(differ[k] > WIDTH / 4); /* seed, site, sample and position count */
    }
}

/* The gradient along a direction is the loss's slope, with dropout and smoothed labels on. */
static void assert_slope(const Toy *toy)
{
    const float step = 1e-3f;
    Bench b = bench_new(toy, 0.1f, (Dropout){.rate = 0.25f, .seed = 9});
    Numbers numbers = {77};
    const size_t n = b.weights->n_floats;
    g_autofree float *start = g_memdup2(b.weights->floats, n * sizeof(float)),
                     *way = g_new(float, n);
    double slope = 0.0, ends[2];
    bench_loss(&b);
    training_backward(b.training, 0, &b.batch, 1.0f, b.gradients);
    for (size_t i = 0; i < n; i++) {
        way[i] = (float)numbers_uniform(&numbers, -1.0, 1.0);
        slope += (double)way[i] * (double)b.gradients->floats[i];
    }
    const size_t lookup = (size_t)b.spec->vocab_size * b.spec->width;
    for (size_t i = 0; b.gradients->lookup != NULL && i < lookup; i++) {
        slope += (double)way[i] * (double)b.gradients->lookup[i];
    }
    for (int end = 0; end < 2; end++) {
        for (size_t i = 0; i < n; i++) {
            b.weights->floats[i] = start[i] + (end == 0 ? -step : step) * way[i];
        }
        ends[end] = bench_loss(&b);
    }
    const double got = (ends[1] - ends[0]) / (2.0 * (double)step);
    print_message("# slope %.5g, by differences %.5g\n", slope, got);
    assert_true(fabs(got - slope) < 0.02 * fabs(slope));
    bench_free(&b);
}

static void test_slopes(void **state)
{
    assert_slope(&toy_gpt2);
    assert_slope(&toy_llama);
}

static void all_of_it(TrainRankOptions *options)
{
    options->sequences = 7;
    options->leaves = 4;
    options->dropout = (Dropout){.rate = 0.2f, .seed = 3};
    options->smoothing = 0.1f;
    options->scaling = (LossScaleRule){.dynamic = true, .initial = 0x1p40f, .window = 2};
    options->optimizer.decay_vectors = true;
    options->optimizer.keep_embeddings = true;
}

static void selective(TrainRankOptions *options)
{
    options->recompute = RECOMPUTE_SELECTIVE;
}

static void recompute(TrainRankOptions *options)
{
    options->recompute = RECOMPUTE_FULL;
}

static void test_same_on_other_layouts(void **state)
{
    const Toy *const toys[] = {&toy_gpt2, &toy_llama};
    const KernelIsa best = kernels_best_isa();
    const RunSpread spreads[] = {{.threads = 2, .micro = 2, .isa = ISA_GENERIC},
                                 {.dp = 2, .pp = 2, .isa = best, .change = recompute},
                                 {.tp = 2, .dp = 2, .isa = best},
                                 {.pp = 2, .tp = 2, .micro = 2, .isa = best, .change = selective}};
    for (size_t t = 0; t < G_N_ELEMENTS(toys); t++) {
        const RunResult want = run_toy(toys[t], &(const RunSpread){.isa = best}, STEPS, all_of_it);
        for (size_t i = 0; i < G_N_ELEMENTS(spreads); i++) {
            const RunResult got = run_toy(toys[t], &spreads[i], STEPS, all_of_it);
            assert_same_run(&got, &want);
        }
    }
}

/* ---- loss scale ---- */

static void test_rule(void **state)
{
    const LossScaleRule rule = {.dynamic = true, .window = 3};
    const struct {
        bool overflow;
        float scale;
    } rows[] = {{false, 0x1p16f}, {true, 0x1p16f},  {true, 0x1p15f},  {true, 0x1p14f},
                {false, 0x1p14f}, {false, 0x1p14f}, {false, 0x1p15f}, {true, 0x1p15f},
                {false, 0x1p15f}, {false, 0x1p15f}, {true, 0x1p14f}};
    LossScale s = loss_scale_begin(&rule);
    for (size_t i = 0; i < G_N_ELEMENTS(rows); i++) {
        loss_scale_after(&s, &rule, rows[i].overflow);
        assert_true(s.scale == rows[i].scale);
    }
    for (int i = 0; i < 40; i++) {
        loss_scale_after(&s, &rule, true);
    }
    assert_true(s.scale == 1.0f);
    const LossScaleRule none = {.dynamic = false};
    s = loss_scale_begin(&none);
    loss_scale_after(&s, &none, false);
    assert_true(s.scale == 1.0f);
}

static void scaled(TrainRankOptions *options)
{
    options->scaling = (LossScaleRule){.dynamic = true, .initial = 0x1p12f, .window = 2};
}

static void overflowing(TrainRankOptions *options)
{
    options->scaling = (LossScaleRule){.dynamic = true, .initial = 0x1p126f, .hysteresis = 1};
}

/* Powers of two change no bit of f32. */
static void test_scale_changes_no_bit(void **state)
{
    const RunSpread one = {.isa = kernels_best_isa()};
    const RunResult want = run_toy(&toy_llama, &one, STEPS, NULL),
                    got = run_toy(&toy_llama, &one, STEPS, scaled);
    assert_same_run(&got, &want);
}

/* An overflow skips the step on all ranks. */
static void test_overflow(void **state)
{
    Toy large = toy_gpt2; /* gradients of 2^10 and more meet a scale of 2^126 */
    large.magnify = 1e4f;
    g_autoptr(ModelSpec) spec = toy_spec(&large);
    g_autoptr(TokenData) data = toy_data(&large);
    g_autoptr(GError) error = NULL;
    TokenSamples samples = {.data = data, .seed = 1};
    const SampleSource source = token_samples_source(&samples);
    Pool *pool = pool_new(1, NULL, false, 0);
    TrainRankOptions options = toy_options(&large, spec, &source);
    options.kernels = kernels_get(kernels_best_isa());
    options.pool = pool;
    overflowing(&options);
    TrainRank *rank = train_rank_new(&options, toy_weights(&large, spec), &error);
    Hash128 before, after;
    TrainStep out;
    uint64_t skipped = 0;
    assert_true(train_rank_digest(rank, &before, &error));
    do {
        assert_true(train_rank_step(rank, &out, &error));
        assert_true(isfinite(out.loss));
        assert_true(out.scale == ldexpf(1.0f, 126 - (int)skipped));
        assert_true(train_rank_digest(rank, &after, &error));
        assert_int_equal(hash128_equal(&before, &after), out.skipped);
        skipped += out.skipped;
    } while (out.skipped && skipped < 126);
    assert_true(skipped > 0 && skipped < 126);
    assert_int_equal(train_rank_progress(rank)->step, skipped + 1);
    assert_int_equal(train_rank_progress(rank)->updates, 1);
    train_rank_free(rank);
    pool_free(pool);
    const RunSpread one = {.isa = options.kernels->isa},
                    more = {.isa = options.kernels->isa, .dp = 2, .pp = 2};
    const RunResult want = run_toy(&large, &one, STEPS, overflowing),
                    got = run_toy(&large, &more, STEPS, overflowing);
    assert_same_run(&got, &want);
}

/* ---- groups of decay, Adam ---- */

static void adam(TrainRankOptions *options)
{
    options->optimizer.kind = OPTIMIZER_ADAM;
}

static void no_decay(TrainRankOptions *options)
{
    options->optimizer.decay = 0.0;
}

static void test_decay(void **state)
{
    const TensorSpec matrix = {.role = ROLE_FFN_UP, .rows = 9}, vector = {.rows = 1},
                     table = {.role = ROLE_TOKEN_EMBD, .rows = 9};
    OptimizerSettings s = {.kind = OPTIMIZER_ADAMW};
    assert_true(schedule_decays(&s, &matrix) && schedule_decays(&s, &table) &&
                !schedule_decays(&s, &vector));
    s.decay_vectors = s.keep_embeddings = true;
    assert_true(schedule_decays(&s, &matrix) && !schedule_decays(&s, &table) &&
                schedule_decays(&s, &vector));
    s.kind = OPTIMIZER_ADAM;
    assert_false(schedule_decays(&s, &matrix));
    const RunSpread one = {.isa = kernels_best_isa()};
    const RunResult want = run_toy(&toy_gpt2, &one, STEPS, no_decay),
                    got = run_toy(&toy_gpt2, &one, STEPS, adam);
    assert_same_run(&got, &want);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_smoothed_labels),
        cmocka_unit_test(test_dropout_of_a_row),
        cmocka_unit_test(test_slopes),
        cmocka_unit_test(test_same_on_other_layouts),
        cmocka_unit_test(test_rule),
        cmocka_unit_test(test_scale_changes_no_bit),
        cmocka_unit_test(test_overflow),
        cmocka_unit_test(test_decay),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
