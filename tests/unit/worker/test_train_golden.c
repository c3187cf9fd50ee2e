/* Losses, gradients and weights of 20 AdamW steps against PyTorch in float64
 * (tests/golden/train/make_train.py). Relative errors: of each loss and norm to itself, of
 * gradients and weights to the largest of their tensor. */
#include "tests/unit/worker/toy_training.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

enum { STEPS = 20 };
#define TOLERANCE 1e-5

typedef struct Golden {
    char *bytes;
    const double *losses, *norms;
    const float *gradients, *weights;
} Golden;

static Golden golden_load(const char *name, const ModelSpec *spec)
{
    Golden g = {0};
    gsize size;
    g_autofree char *path = g_build_filename(GOLDEN_DIR, name, NULL);
    assert_true(g_file_get_contents(path, &g.bytes, &size, NULL));
    const size_t n = model_spec_parameters(spec);
    assert_int_equal(size, 2 * STEPS * sizeof(double) + 2 * n * sizeof(float));
    g.losses = (const double *)(void *)g.bytes;
    g.norms = g.losses + STEPS;
    g.gradients = (const float *)(const void *)(g.norms + STEPS);
    g.weights = g.gradients + n;
    return g;
}

/* Tensor by tensor. `least`: what a tensor is at least compared to (a key bias has a gradient of 0:
 * softmax does not see it). */
static double compare(const ModelSpec *spec, const Parameters *got, const float *want, double least)
{
    double worst = 0.0;
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        const size_t n = (size_t)spec->tensors[i].rows * spec->tensors[i].columns;
        double most = least, off = 0.0;
        for (size_t e = 0; e < n; e++) {
            most = fmax(most, fabs((double)want[e]));
            off = fmax(off, fabs((double)want[e] - (double)got->tensors[i][e]));
        }
        if (!(off <= TOLERANCE * most)) {
            fail_msg("%s: off by %g, largest %g", spec->tensors[i].name, off, most);
        }
        worst = fmax(worst, off / most);
        want += n;
    }
    return worst;
}

static void check(const Toy *toy, const char *name, KernelIsa isa)
{
    g_autoptr(ModelSpec) spec = toy_spec(toy);
    g_autoptr(TokenData) data = toy_data(toy);
    g_autoptr(GError) error = NULL;
    Pool *pool = pool_new(1, NULL, false, 0);
    TokenSamples samples = {.data = data, .seed = toy->order, .bounds = toy->bounds};
    const SampleSource source = token_samples_source(&samples);
    TrainRankOptions options = toy_options(toy, spec, &source);
    options.kernels = kernels_get(isa);
    options.pool = pool;
    const Golden golden = golden_load(name, spec);
    TrainRank *rank = train_rank_new(&options, toy_weights(toy, spec), &error);
    assert_non_null(rank);
    double worst[4] = {0};
    for (int step = 0; step < STEPS; step++) {
        TrainStep out;
        assert_true(train_rank_step(rank, &out, &error));
        worst[0] = fmax(worst[0], fabs((double)out.loss / golden.losses[step] - 1.0));
        worst[1] = fmax(worst[1], fabs((double)out.gradient_norm / golden.norms[step] - 1.0));
        if (step == 0) {
            worst[2] = compare(spec, train_rank_gradients(rank), golden.gradients, 2e-4);
        }
    }
    assert_true(train_rank_settle(rank, &error));
    worst[3] = compare(spec, train_rank_weights(rank), golden.weights, 0.0);
    print_message("# %s %s: relative error of losses %.2g, norms %.2g, gradients %.2g, weights "
                  "%.2g\n",
                  name, kernels_isa_name(isa), worst[0], worst[1], worst[2], worst[3]);
    assert_true(worst[0] < TOLERANCE && worst[1] < TOLERANCE);
    train_rank_free(rank);
    pool_free(pool);
    g_free(golden.bytes);
}

static void test_gpt2(void **state)
{
    check(&toy_gpt2, "gpt2.run", kernels_best_isa());
}

static void test_llama(void **state)
{
    check(&toy_llama, "llama.run", kernels_best_isa());
}

/* Attention inside documents. With RoPE, where positions begin changes roundings alone. */
static void test_documents(void **state)
{
    Toy gpt2 = toy_gpt2, llama = toy_llama;
    gpt2.bounds = BOUNDS_POSITIONS;
    check(&gpt2, "gpt2-documents.run", kernels_best_isa());
    llama.bounds = BOUNDS_ATTENTION;
    check(&llama, "llama-documents.run", kernels_best_isa());
    llama.bounds = BOUNDS_POSITIONS;
    check(&llama, "llama-documents.run", kernels_best_isa());
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_gpt2), cmocka_unit_test(test_llama),
                                       cmocka_unit_test(test_documents)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
