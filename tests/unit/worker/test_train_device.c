/* Ranks on a device, against the host's bits: in class exact losses, norms, weights and what is
 * saved are the same on every layout, on the trivial device and on a GPU (WEFT_TEST_DEVICE). On the
 * trivial one memory that nobody wrote is NaN, and nothing runs before it is waited for. In class
 * fast sums may have another order: there runs are close. */
#include "tests/unit/worker/chosen_device.h"
#include "tests/unit/worker/train_runs.h"

#include "proto/base/error.h"
#include "proto/base/failpoint.h"

#include "kernels/device/train_ops.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

#define OTHER_ORDER 1e-3 /* what another order of f32 sums may change in a few steps of a toy */

static Device *device;
static bool fast; /* the class of the runs of a test */

static int open_device(void **state)
{
    device = chosen_device();
    return 0;
}

/* What a run on the device is held to. */
static void assert_run(const RunResult *got, const RunResult *want)
{
    if (fast) {
        assert_close_run(got, want, OTHER_ORDER);
    } else {
        assert_same_run(got, want);
    }
}

static int close_device(void **state)
{
    device_free(device);
    return 0;
}

static void on_device(TrainRankOptions *o)
{
    o->fast = fast;
    o->devices = true;
    o->device = device;
}

/* Every second rank: hosts and devices in one layout. */
static void on_some(TrainRankOptions *o)
{
    on_device(o);
    o->device = (o->replica + o->stage) % 2 == 0 ? device : NULL;
}

static void full(TrainRankOptions *o)
{
    on_device(o);
    o->recompute = RECOMPUTE_FULL;
}

static void selective(TrainRankOptions *o)
{
    on_device(o);
    o->recompute = RECOMPUTE_SELECTIVE;
}

static void zero_bubble(TrainRankOptions *o)
{
    on_device(o);
    o->schedule = PIPELINE_ZERO_BUBBLE;
}

static void whole_optimizer(TrainRankOptions *o)
{
    on_device(o);
    o->whole_optimizer = true;
}

static void with_options(TrainRankOptions *o)
{
    o->dropout = (Dropout){0.1f, 77};
    o->smoothing = 0.1f;
}

static void with_sgd(TrainRankOptions *o)
{
    o->optimizer.kind = OPTIMIZER_SGD;
}

static void check(const Toy *toy, void (*define)(TrainRankOptions *))
{
    static const RunSpread spreads[] = {
        {.threads = 1, .micro = 1, .change = on_device},
        {.threads = 2, .micro = 4, .change = on_device},
        {.threads = 1, .micro = 2, .change = full},
        {.threads = 1, .micro = 2, .change = selective},
        {.dp = 2, .micro = 2, .change = on_device},
        {.dp = 3, .micro = 2, .change = whole_optimizer},
        {.pp = 2, .micro = 1, .change = on_device},
        {.pp = 2, .micro = 1, .change = zero_bubble},
        {.dp = 2, .pp = 2, .micro = 2, .change = on_device},
        {.dp = 2, .pp = 2, .micro = 2, .change = on_some},
    };
    const RunSpread host = {.threads = 1, .micro = 1};
    const RunResult want = run_toy(toy, &host, 3, define);
    for (size_t i = 0; i < G_N_ELEMENTS(spreads); i++) {
        const RunResult got = run_toy(toy, &spreads[i], 3, define);
        assert_run(&got, &want);
    }
}

static void test_gpt2(void **state)
{
    check(&toy_gpt2, NULL);
}

static void test_llama(void **state)
{
    check(&toy_llama, NULL);
}

static void test_options(void **state)
{
    check(&toy_gpt2, with_options);
    check(&toy_llama, with_sgd);
}

static void test_documents(void **state)
{
    Toy gpt2 = toy_gpt2, llama = toy_llama;
    gpt2.bounds = BOUNDS_POSITIONS;
    llama.bounds = BOUNDS_ATTENTION;
    check(&gpt2, NULL);
    check(&llama, NULL);
}

static void test_fast(void **state)
{
    fast = true;
    check(&toy_gpt2, with_options);
    check(&toy_llama, NULL);
    fast = false;
}

/* What a run saves on a device goes on on a host, and the other way round. */
static void test_resumed(void **state)
{
    g_autoptr(ModelSpec) spec = toy_spec(&toy_gpt2);
    RunState *saved = run_state_new(spec);
    const RunSpread whole = {.threads = 1, .micro = 1};
    const RunSpread first = {.dp = 2, .micro = 2, .change = on_device, .save = saved};
    const RunSpread host = {.micro = 1, .load = saved},
                    other = {.pp = 2, .micro = 2, .change = on_device, .load = saved};
    const RunResult want = run_toy(&toy_gpt2, &whole, 4, NULL);
    run_toy(&toy_gpt2, &first, 2, NULL);
    const RunResult on_host = run_toy(&toy_gpt2, &host, 2, NULL),
                    again = run_toy(&toy_gpt2, &other, 2, NULL);
    RunResult tail = want; /* its last two steps */
    tail.n_steps = 2;
    memcpy(tail.losses, want.losses + 2, 2 * sizeof *want.losses);
    memcpy(tail.norms, want.norms + 2, 2 * sizeof *want.norms);
    memcpy(tail.skipped, want.skipped + 2, 2 * sizeof *want.skipped);
    assert_run(&on_host, &tail);
    assert_run(&again, &tail);
    run_state_free(saved);
}

/* ---- one rank ---- */

typedef struct Alone {
    ModelSpec *spec;
    TokenData *data;
    TokenSamples samples;
    SampleSource source;
    Pool *pool;
    TrainRankOptions options;
} Alone;

static void alone_open(Alone *a, const Toy *toy)
{
    a->spec = toy_spec(toy);
    a->data = toy_data(toy);
    a->samples = (TokenSamples){.data = a->data, .seed = toy->order};
    a->source = token_samples_source(&a->samples);
    a->pool = pool_new(1, NULL, false, 0);
    a->options = toy_options(toy, a->spec, &a->source);
    a->options.kernels = kernels_get(kernels_best_isa());
    a->options.pool = a->pool;
}

static void alone_close(Alone *a)
{
    pool_free(a->pool);
    token_data_free(a->data);
    model_spec_free(a->spec);
}

static void with_bf16(TrainRankOptions *o)
{
    o->precision = PRECISION_BF16;
}

static void with_f16(TrainRankOptions *o)
{
    o->precision = PRECISION_F16;
    o->scaling.dynamic = true;
}

/* 16-bit operands have the host's bits, too. */
static void test_narrow_operands(void **state)
{
    check(&toy_gpt2, with_bf16);
    check(&toy_llama, with_f16);
}

/* In class fast, within what a device that sums in another order may give. */
static void test_fast_narrow_operands(void **state)
{
    fast = true;
    static const struct {
        Precision precision;
        double tolerance;
    } cases[] = {{PRECISION_BF16, 1e-3}, {PRECISION_F16, 1e-4}};
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        Alone a;
        alone_open(&a, &toy_llama);
        a.options.precision = cases[i].precision;
        TrainRank *host = train_rank_new(&a.options, toy_weights(&toy_llama, a.spec), NULL);
        on_device(&a.options);
        TrainRank *other = train_rank_new(&a.options, toy_weights(&toy_llama, a.spec), NULL);
        for (int step = 0; step < 4; step++) {
            TrainStep want, got;
            assert_true(train_rank_step(host, &want, NULL) && train_rank_step(other, &got, NULL));
            assert_true(fabs((double)got.loss / (double)want.loss - 1.0) < cases[i].tolerance);
            assert_true(fabs((double)got.gradient_norm / (double)want.gradient_norm - 1.0) <
                        10 * cases[i].tolerance);
        }
        train_rank_free(host);
        train_rank_free(other);
        alone_close(&a);
    }
    fast = false;
}

#ifdef WEFT_FAILPOINTS
/* A device that fails ends the step with its name, and every later one; nothing hangs. */
static void test_failure(void **state)
{
    Alone a;
    g_autoptr(GError) error = NULL, again = NULL;
    Device *weak = device_open_module(device_module_cpu(), 0, NULL);
    TrainStep out;
    alone_open(&a, &toy_gpt2);
    on_device(&a.options);
    a.options.device = weak;
    TrainRank *rank = train_rank_new(&a.options, toy_weights(&toy_gpt2, a.spec), NULL);
    assert_true(train_rank_step(rank, &out, NULL));
    failpoint_set("device-fail", true, 4);
    assert_false(train_rank_step(rank, &out, &error));
    failpoint_set("device-fail", false, 0);
    assert_non_null(strstr(error->message, "uncorrectable"));
    assert_false(train_rank_step(rank, &out, &again));
    assert_false(train_rank_settle(rank, NULL));
    assert_null(train_rank_gradients(rank));
    train_rank_free(rank);
    device_free(weak);
    alone_close(&a);
}
#endif

static bool narrow_alone(Dtype operands)
{
    return operands != DTYPE_F32;
}

/* Class exact is what a device gives that says so, with these operands. */
static void test_refused(void **state)
{
    Alone a;
    g_autoptr(GError) none = NULL, other = NULL;
    DeviceTrainOps ops = *device->train_ops;
    Device odd = *device;
    ops.gives_exact = narrow_alone;
    odd.train_ops = &ops;
    alone_open(&a, &toy_llama);
    a.options.device = &odd;
    Parameters *weights = toy_weights(&toy_llama, a.spec);
    assert_null(train_rank_new(&a.options, weights, &none));
    assert_non_null(strstr(none->message, "the job says that none does"));
    a.options.devices = true;
    assert_null(train_rank_new(&a.options, weights, &other));
    assert_non_null(strstr(other->message, "precision f32 by numerics class fast only"));
    a.options.precision = PRECISION_BF16;
    TrainRank *rank = train_rank_new(&a.options, weights, NULL);
    assert_non_null(rank);
    train_rank_free(rank);
    alone_close(&a);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gpt2),
        cmocka_unit_test(test_llama),
        cmocka_unit_test(test_options),
        cmocka_unit_test(test_documents),
        cmocka_unit_test(test_fast),
        cmocka_unit_test(test_resumed),
        cmocka_unit_test(test_narrow_operands),
        cmocka_unit_test(test_fast_narrow_operands),
        cmocka_unit_test(test_failure),
        cmocka_unit_test(test_refused),
    };
    return cmocka_run_group_tests(tests, open_device, close_device);
}
