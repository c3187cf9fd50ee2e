/* Each of the first 200 losses on a real text against PyTorch, in f32 and in bf16
 * (tests/golden/train/make_text.py): the same first weights and order of samples, another
 * implementation. Skipped where Debian's copy of the text is not the one that the losses are of. */
#include "tests/unit/kernels/numbers.h"
#include "tests/unit/worker/text_data.h"

#include "proto/model/model_config.h"
#include "worker/train/train_rank.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

#define TEXT "/usr/share/common-licenses/GPL-3"
#define TEXT_SHA256 "3972dc9744f6499f0f9b2dbf76696f2ae7ad8af9b23dde66d6af86c9dfb36986"

enum { STEPS = 200, LENGTH = 64, SEQUENCES = 8 };

static Parameters *first_weights(const ModelSpec *spec, uint64_t seed)
{
    Parameters *p = parameters_new(spec, false, NULL);
    Numbers numbers = {seed};
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        const TensorSpec *t = &spec->tensors[i];
        const bool is_norm =
            t->role == ROLE_ATTN_NORM || t->role == ROLE_FFN_NORM || t->role == ROLE_OUTPUT_NORM;
        for (size_t e = 0; e < (size_t)t->rows * t->columns; e++) {
            p->tensors[i][e] =
                (float)((is_norm ? 1.0 : 0.0) + numbers_uniform(&numbers, -0.05, 0.05));
        }
    }
    return p;
}

static bool text_is_there(void)
{
    g_autofree char *text = NULL, *digest = NULL;
    gsize size;
    if (g_file_get_contents(TEXT, &text, &size, NULL)) {
        digest = g_compute_checksum_for_data(G_CHECKSUM_SHA256, (const guchar *)text, size);
    }
    return g_strcmp0(digest, TEXT_SHA256) == 0;
}

/* The largest distance of a loss to PyTorch's. */
static double distance(ModelFamily family, Precision precision)
{
    const bool gpt2 = family == FAMILY_GPT2;
    const ModelConfig config = {.family = family,
                                .layers = 2,
                                .width = 64,
                                .heads = 4,
                                .kv_heads = gpt2 ? 0 : 2,
                                .ffn_width = 256,
                                .vocabulary = 256,
                                .context = LENGTH};
    g_autoptr(GError) error = NULL;
    g_autoptr(ModelSpec) spec = model_spec_from_config(&config, &error);
    g_autoptr(TokenData) data = text_data(TEXT, LENGTH, &error);
    g_autofree char *path =
        g_build_filename(GOLDEN_DIR, gpt2 ? "gpt2.losses" : "llama.losses", NULL);
    g_autofree char *golden = NULL;
    gsize size;
    assert_true(g_file_get_contents(path, &golden, &size, NULL));
    assert_int_equal(size, 2 * STEPS * sizeof(double));
    const double *want = (const double *)(void *)golden + (precision == PRECISION_BF16 ? STEPS : 0);
    Pool *pool = pool_new(2, NULL, false, 0);
    TokenSamples samples = {.data = data, .seed = gpt2 ? 7 : 8};
    const SampleSource source = token_samples_source(&samples);
    const TrainRankOptions options = {.spec = spec,
                                      .kernels = kernels_get(kernels_best_isa()),
                                      .pool = pool,
                                      .source = &source,
                                      .sequences = SEQUENCES,
                                      .leaves = 4,
                                      .micro_sequences = 2,
                                      .precision = precision,
                                      .optimizer = {.rate = 1e-3,
                                                    .beta1 = 0.9,
                                                    .beta2 = 0.95,
                                                    .eps = 1e-8,
                                                    .decay = 0.1,
                                                    .clip = 1.0,
                                                    .schedule = RATE_COSINE,
                                                    .warmup = 10,
                                                    .steps = STEPS,
                                                    .floor = 1e-4}};
    TrainRank *rank = train_rank_new(&options, first_weights(spec, gpt2 ? 21 : 22), &error);
    assert_non_null(rank);
    double worst = 0.0;
    for (int step = 0; step < STEPS; step++) {
        TrainStep out;
        assert_true(train_rank_step(rank, &out, &error));
        worst = fmax(worst, fabs((double)out.loss - want[step]));
    }
    train_rank_free(rank);
    pool_free(pool);
    return worst;
}

static void check(ModelFamily family, Precision precision, double most)
{
    if (!text_is_there()) {
        print_message("# skipped: %s is not there, or another one\n", TEXT);
        return;
    }
    const double worst = distance(family, precision);
    print_message("# family %u precision %u: losses at most %.2g apart\n", (unsigned)family,
                  (unsigned)precision, worst);
    assert_true(worst < most);
}

static void test_gpt2(void **state)
{
    check(FAMILY_GPT2, PRECISION_F32, 1e-3);
}

static void test_gpt2_bf16(void **state)
{
    check(FAMILY_GPT2, PRECISION_BF16, 1e-2);
}

static void test_llama(void **state)
{
    check(FAMILY_LLAMA, PRECISION_F32, 1e-3);
}

static void test_llama_bf16(void **state)
{
    check(FAMILY_LLAMA, PRECISION_BF16, 1e-2);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gpt2), cmocka_unit_test(test_gpt2_bf16), cmocka_unit_test(test_llama),
        cmocka_unit_test(test_llama_bf16)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
