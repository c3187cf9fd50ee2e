/* A rank of training over the device kernels, run by the emulation of tests/kernels/cuda_emulation:
 * every op of kernels/cuda/train_ops.c, in the order of both families, with the library's products
 * in double precision here. Losses and the first gradients are PyTorch's golden ones within the
 * tolerance that the host has; with 16-bit operands they are the host's up to roundings. What this
 * does not prove is the hardware, and cuBLASLt. */
#include "kernels/cuda/dense.h"
#include "kernels/cuda/module.h"
#include "kernels/device/cpu.h"
#include "kernels/device/train_ops.h"
#include "proto/model/blocks.h"
#include "tests/unit/worker/train_runs.h"

#include <math.h>
#include <stdatomic.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

enum { GOLDEN_STEPS = 20, STEPS = 2 };

/* ---- what module.h asks of kernels/cuda/device.c ---- */

static _Atomic int first_error;

/* Kernels run at once here: all that was enqueued before comes first. */
struct CUstream_st *cuda_stream(DeviceStream *stream)
{
    assert_int_equal(device_cpu_api.stream_wait(stream), DEVICE_OK);
    return NULL;
}

DeviceStatus cuda_result(DeviceStream *stream, int error)
{
    (void)stream;
    int none = 0;
    atomic_compare_exchange_strong(&first_error, &none, error);
    return error == 0 ? DEVICE_OK : DEVICE_FAILED;
}

static double element(Dtype type, const void *data, size_t at)
{
    const uint16_t *narrow = data;
    return type == DTYPE_F32    ? (double)((const float *)data)[at]
           : type == DTYPE_BF16 ? (double)bf16_to_f32(narrow[at])
                                : (double)f16_to_f32(narrow[at]);
}

struct CudaDense *cuda_dense(DeviceStream *stream)
{
    static int handle;
    (void)cuda_stream(stream);
    return (struct CudaDense *)(void *)&handle;
}

int cuda_dense_product(CudaDense *dense, const CudaDenseProduct *a, WeftCudaStream stream)
{
    (void)dense;
    (void)stream;
    assert_true(a->bias == NULL && !a->gelu && a->workspace != NULL);
    assert_true(a->type == DTYPE_F32 || (a->w_ld % 8 == 0 && a->x_ld % 8 == 0));
    for (size_t r = 0; r < a->rows; r++) {
        for (size_t n = 0; n < a->n_out; n++) {
            double sum = a->accumulate ? (double)a->out[r * a->ld + n] : 0.0;
            for (size_t k = 0; k < a->n_in; k++) {
                sum += element(a->type, a->x, a->x_by_in ? k * a->x_ld + r : r * a->x_ld + k) *
                       element(a->type, a->w, a->w_by_in ? k * a->w_ld + n : n * a->w_ld + k);
            }
            a->out[r * a->ld + n] = (float)sum;
        }
    }
    return 0;
}

static Device *emulated_device(uint32_t index)
{
    Device *device = device_open_module(device_module_cpu(), index, NULL);
    assert_non_null(device);
    device->train_ops = &cuda_train_ops;
    return device;
}

/* ---- runs ---- */

typedef struct Result {
    TrainStep steps[STEPS];
    Parameters *gradients; /* of the first step */
} Result;

static Result run(const Toy *toy, const ModelSpec *spec, const Device *device,
                  void (*change)(TrainRankOptions *))
{
    g_autoptr(TokenData) data = toy_data(toy);
    g_autoptr(GError) error = NULL;
    Pool *pool = pool_new(1, NULL, false, 0);
    TokenSamples samples = {.data = data, .seed = toy->order, .bounds = toy->bounds};
    const SampleSource source = token_samples_source(&samples);
    TrainRankOptions options = toy_options(toy, spec, &source);
    Result result = {.gradients = parameters_new(spec, true, NULL)};
    options.kernels = kernels_get(kernels_best_isa());
    options.pool = pool;
    options.device = device;
    options.fast = true;
    options.micro_sequences = 2;
    if (change != NULL) {
        change(&options);
    }
    TrainRank *rank = train_rank_new(&options, toy_weights(toy, spec), &error);
    for (int step = 0; step < STEPS; step++) {
        if (rank == NULL || !train_rank_step(rank, &result.steps[step], &error)) {
            fail_msg("%s (first error of a launch: %d)", error->message, first_error);
        }
        if (step == 0) {
            const Parameters *gradients = train_rank_gradients(rank);
            memcpy(result.gradients->floats, gradients->floats,
                   gradients->n_floats * sizeof(float));
        }
    }
    train_rank_free(rank);
    pool_free(pool);
    return result;
}

/* Largest difference of a tensor to its largest element. */
static double apart(const ModelSpec *spec, const Parameters *got, const float *const *want)
{
    double worst = 0.0;
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        const size_t n = (size_t)spec->tensors[i].rows * spec->tensors[i].columns;
        double most = 2e-4, off = 0.0; /* a key bias has a gradient of 0 */
        for (size_t e = 0; e < n; e++) {
            most = fmax(most, fabs((double)want[i][e]));
            off = fmax(off, fabs((double)want[i][e] - (double)got->tensors[i][e]));
        }
        assert_true(isfinite(off));
        worst = fmax(worst, off / most);
    }
    return worst;
}

static void check_golden(const Toy *toy, const char *name)
{
    g_autoptr(ModelSpec) spec = toy_spec(toy);
    g_autofree char *path = g_build_filename(GOLDEN_DIR, name, NULL);
    g_autofree const float **want = g_new(const float *, spec->n_tensors);
    g_autofree char *bytes = NULL;
    assert_true(g_file_get_contents(path, &bytes, NULL, NULL));
    const double *losses = (const double *)(void *)bytes, *norms = losses + GOLDEN_STEPS;
    const float *at = (const float *)(const void *)(norms + GOLDEN_STEPS);
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        want[i] = at;
        at += (size_t)spec->tensors[i].rows * spec->tensors[i].columns;
    }
    Device *device = emulated_device(0);
    const Result result = run(toy, spec, device, NULL);
    for (int step = 0; step < STEPS; step++) {
        const TrainStep *s = &result.steps[step];
        assert_true(fabs((double)s->loss / losses[step] - 1.0) < 1e-5);
        assert_true(fabs((double)s->gradient_norm / norms[step] - 1.0) < 1e-5);
    }
    const double off = apart(spec, result.gradients, want);
    print_message("# %s: gradients within %.2g\n", name, off);
    assert_true(off < 1e-5);
    parameters_free(result.gradients);
    device_free(device);
}

static void test_golden(void **state)
{
    check_golden(&toy_gpt2, "gpt2.run");
    check_golden(&toy_llama, "llama.run");
}

/* ---- ranks: kernels of tensor ranks and owners, sums by the group of the trivial device ---- */

static Device *devices[4];

static void on_ranks(TrainRankOptions *o)
{
    const TrainPosition p = train_position(o->plan, o->replica, o->stage, o->rank);
    o->fast = true;
    o->device = devices[train_global(&p, o->replica, o->stage, o->rank)];
}

/* In one group each, or none of them in any. */
static void check_ranks(const Toy *toy, const char *name, const RunSpread *spread)
{
    g_autofree char *path = g_build_filename(GOLDEN_DIR, name, NULL);
    g_autofree char *bytes = NULL;
    assert_true(g_file_get_contents(path, &bytes, NULL, NULL));
    const double *losses = (const double *)(void *)bytes, *norms = losses + GOLDEN_STEPS;
    const RunResult got = run_toy(toy, spread, STEPS, NULL);
    for (int step = 0; step < STEPS; step++) {
        assert_true(fabs((double)got.losses[step] / losses[step] - 1.0) < 1e-5);
        assert_true(fabs((double)got.norms[step] / norms[step] - 1.0) < 1e-5);
    }
}

static void test_ranks(void **state)
{
    static const RunSpread spreads[] = {
        {.tp = 2, .micro = 2, .isa = ISA_GENERIC, .change = on_ranks},
        {.dp = 2, .micro = 2, .isa = ISA_GENERIC, .change = on_ranks},
        {.pp = 2, .tp = 2, .micro = 2, .isa = ISA_GENERIC, .change = on_ranks}};
    for (uint32_t same = 0; same < 2; same++) {
        for (uint32_t i = 0; i < G_N_ELEMENTS(devices); i++) {
            devices[i] = emulated_device(same ? 0 : i);
        }
        for (size_t i = 0; i < (same ? 1 : G_N_ELEMENTS(spreads)); i++) {
            check_ranks(&toy_gpt2, "gpt2.run", &spreads[i]);
            check_ranks(&toy_llama, "llama.run", &spreads[i]);
        }
        for (uint32_t i = 0; i < G_N_ELEMENTS(devices); i++) {
            device_free(devices[i]);
        }
    }
}

static void test_documents(void **state)
{
    Toy gpt2 = toy_gpt2;
    gpt2.bounds = BOUNDS_POSITIONS;
    check_golden(&gpt2, "gpt2-documents.run");
}

/* Against the host, which has the bits; dropout drops the same elements. */
static void check_host(const Toy *toy, void (*change)(TrainRankOptions *), double tolerance)
{
    g_autoptr(ModelSpec) spec = toy_spec(toy);
    Device *device = emulated_device(0);
    const Result got = run(toy, spec, device, change), want = run(toy, spec, NULL, change);
    for (int step = 0; step < STEPS; step++) {
        assert_true(fabs((double)got.steps[step].loss / (double)want.steps[step].loss - 1.0) <
                    tolerance);
        assert_true(
            fabs((double)got.steps[step].gradient_norm / (double)want.steps[step].gradient_norm -
                 1.0) < tolerance);
    }
    const double off =
        apart(spec, got.gradients, (const float *const *)(void *)want.gradients->tensors);
    print_message("# gradients within %.2g of the host's\n", off);
    assert_true(off < tolerance);
    parameters_free(got.gradients);
    parameters_free(want.gradients);
    device_free(device);
}

static void dropout_and_smoothing(TrainRankOptions *o)
{
    o->dropout = (Dropout){0.2f, 5};
    o->smoothing = 0.1f;
    o->recompute = RECOMPUTE_SELECTIVE;
}

static void sgd(TrainRankOptions *o)
{
    o->optimizer.kind = OPTIMIZER_SGD;
}

static void bf16(TrainRankOptions *o)
{
    o->precision = PRECISION_BF16;
}

static void f16(TrainRankOptions *o)
{
    o->precision = PRECISION_F16;
}

static void test_options(void **state)
{
    check_host(&toy_gpt2, dropout_and_smoothing, 1e-5);
    check_host(&toy_llama, sgd, 1e-5);
}

/* The same rounded operands of products, and attention's forward pass rounds q, k, v and
 * probabilities, too (2^-9 of each in bf16, 2^-12 in f16), where the host's does not. */
static void test_narrow_operands(void **state)
{
    check_host(&toy_gpt2, bf16, 3e-2);
    check_host(&toy_llama, f16, 4e-3);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden),          cmocka_unit_test(test_ranks),
        cmocka_unit_test(test_documents),       cmocka_unit_test(test_options),
        cmocka_unit_test(test_narrow_operands),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
