/* Losses and weights_digest of a training run do not depend on threads, micro-batches, replicas or
 * instruction set (NUMERICS 14-18), and do depend on what defines them. */
#include "tests/unit/worker/toy_training.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

enum { STEPS = 3, SAMPLES = 7 };

typedef struct Spread {
    unsigned threads;
    uint32_t micro, replicas;
    KernelIsa isa;
} Spread;

typedef struct Result {
    float losses[STEPS], norms[STEPS];
    Hash128 digest;
} Result;

static Result run(const Toy *toy, Spread spread, void (*change)(TrainerOptions *options))
{
    g_autoptr(ModelSpec) spec = toy_spec(toy);
    g_autoptr(TokenData) data = toy_data(toy);
    g_autoptr(GError) error = NULL;
    Pool *pool = pool_new(spread.threads, NULL, false, 0);
    TrainerOptions options = toy_options(toy, spec, data);
    options.sequences = SAMPLES;
    options.leaves = 8; /* one of them empty */
    options.kernels = kernels_get(spread.isa);
    options.pool = pool;
    options.micro_sequences = spread.micro;
    options.replicas = spread.replicas;
    if (change != NULL) {
        change(&options);
    }
    Trainer *trainer = trainer_new(&options, toy_weights(toy, spec), &error);
    assert_non_null(trainer);
    Result result;
    for (int i = 0; i < STEPS; i++) {
        TrainerStep out;
        assert_true(trainer_step(trainer, &out, &error));
        assert_int_equal(out.step, i);
        assert_int_equal(out.samples_seen, (uint64_t)(i + 1) * SAMPLES);
        result.losses[i] = out.loss;
        result.norms[i] = out.gradient_norm;
    }
    result.digest = trainer_digest(trainer);
    trainer_free(trainer);
    pool_free(pool);
    return result;
}

static void assert_equal_runs(const Toy *toy, void (*change)(TrainerOptions *options))
{
    const KernelIsa best = kernels_best_isa();
    const Spread spreads[] = {{2, 1, 1, best}, {1, 2, 1, best}, {2, 7, 2, best},
                              {3, 3, 3, best}, {1, 1, 8, best}, {2, 4, 5, ISA_GENERIC}};
    const Result want = run(toy, (Spread){1, 1, 1, best}, change);
    for (size_t i = 0; i < G_N_ELEMENTS(spreads); i++) {
        const Result got = run(toy, spreads[i], change);
        assert_memory_equal(got.losses, want.losses, sizeof want.losses);
        assert_memory_equal(got.norms, want.norms, sizeof want.norms);
        assert_true(hash128_equal(&got.digest, &want.digest));
    }
}

static void test_gpt2(void **state)
{
    assert_equal_runs(&toy_gpt2, NULL);
}

static void test_llama(void **state)
{
    assert_equal_runs(&toy_llama, NULL);
}

/* Leaves of two and three samples: micro-batches go on in a leaf's chain. */
static void wide_leaves(TrainerOptions *options)
{
    options->leaves = 3;
    options->replicas = MIN(options->replicas, 3u);
}

static void test_wide_leaves(void **state)
{
    assert_equal_runs(&toy_gpt2, wide_leaves);
    assert_equal_runs(&toy_llama, wide_leaves);
}

static void sgd(TrainerOptions *options)
{
    options->optimizer.kind = OPTIMIZER_SGD;
    options->optimizer.nesterov = true;
}

static void test_sgd(void **state)
{
    assert_equal_runs(&toy_gpt2, sgd);
}

static void other_order(TrainerOptions *options)
{
    options->seed++;
}

static void more_decay(TrainerOptions *options)
{
    options->optimizer.decay *= 2.0;
}

static void test_what_defines_a_run(void **state)
{
    void (*const changes[])(TrainerOptions *) = {other_order, more_decay, wide_leaves, sgd};
    const Spread one = {1, 1, 1, kernels_best_isa()};
    const Result want = run(&toy_gpt2, one, NULL);
    for (size_t i = 0; i < G_N_ELEMENTS(changes); i++) {
        const Result got = run(&toy_gpt2, one, changes[i]);
        assert_false(hash128_equal(&got.digest, &want.digest));
    }
}

/* A step whose loss is not finite has not happened. */
static void test_non_finite_loss(void **state)
{
    g_autoptr(ModelSpec) spec = toy_spec(&toy_gpt2);
    g_autoptr(TokenData) data = toy_data(&toy_gpt2);
    g_autoptr(GError) error = NULL;
    Pool *pool = pool_new(1, NULL, false, 0);
    TrainerOptions options = toy_options(&toy_gpt2, spec, data);
    options.kernels = kernels_get(kernels_best_isa());
    options.pool = pool;
    Parameters *weights = toy_weights(&toy_gpt2, spec);
    float *norm = parameters_at(weights, ROLE_OUTPUT_NORM, -1);
    const float kept = norm[0];
    Trainer *trainer = trainer_new(&options, weights, &error);
    const Hash128 before = trainer_digest(trainer);
    TrainerStep out;
    norm[0] = INFINITY;
    assert_false(trainer_step(trainer, &out, &error));
    assert_non_null(strstr(error->message, "step 0: the loss of sample 0"));
    norm[0] = kept;
    const Hash128 after = trainer_digest(trainer);
    assert_true(hash128_equal(&before, &after));
    g_clear_error(&error);
    assert_true(trainer_step(trainer, &out, &error));
    assert_int_equal(out.step, 0);
    assert_true(fabs((double)trainer_validate(trainer, data, 3) - (double)out.loss) < 1.0);
    trainer_free(trainer);
    pool_free(pool);
}

static void test_refused(void **state)
{
    g_autoptr(ModelSpec) spec = toy_spec(&toy_gpt2);
    g_autoptr(TokenData) data = toy_data(&toy_gpt2);
    Pool *pool = pool_new(1, NULL, false, 0);
    TrainerOptions good = toy_options(&toy_gpt2, spec, data);
    good.kernels = kernels_get(ISA_GENERIC);
    good.pool = pool;
    Parameters *weights = toy_weights(&toy_gpt2, spec);
    const struct {
        uint32_t leaves, replicas, length;
        const char *says;
    } rows[] = {{0, 1, 20, "0 leaves; choose 1 to 64"},
                {65, 1, 20, "65 leaves"},
                {4, 5, 20, "5 replicas share 4 leaves"},
                {4, 1, 25, "context 24"}};
    for (size_t i = 0; i < G_N_ELEMENTS(rows); i++) {
        g_autoptr(GError) error = NULL;
        TrainerOptions options = good;
        options.leaves = rows[i].leaves;
        options.replicas = rows[i].replicas;
        options.length = rows[i].length;
        assert_null(trainer_new(&options, weights, &error));
        assert_non_null(strstr(error->message, rows[i].says));
    }
    parameters_free(weights);
    pool_free(pool);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gpt2),
        cmocka_unit_test(test_llama),
        cmocka_unit_test(test_wide_leaves),
        cmocka_unit_test(test_sgd),
        cmocka_unit_test(test_what_defines_a_run),
        cmocka_unit_test(test_non_finite_loss),
        cmocka_unit_test(test_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
