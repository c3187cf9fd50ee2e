/* Small models learn real text from their first weights: a licence of Debian's (base-files), byte
 * by byte. The loss starts at that of guessing (ln of the vocabulary) and falls below the entropy
 * of single bytes, which only a model that reads what came before can; also on the windows that it
 * is validated on.
 */
#include "tests/unit/worker/text_data.h"

#include "proto/model/model_config.h"
#include "worker/train/train_rank.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

enum { STEPS = 400, LENGTH = 64, SEQUENCES = 8, BYTES = 256 };

/* Entropy of the windows' single bytes, in nats. */
static double unigram_entropy(const TokenData *data)
{
    double counts[BYTES] = {0}, total = 0.0, entropy = 0.0;
    uint32_t tokens[LENGTH], targets[LENGTH];
    for (uint64_t w = 0; w < token_data_windows(data); w++) {
        token_data_read(data, w, tokens, targets);
        for (int i = 0; i < LENGTH; i++, total += 1.0) {
            counts[targets[i]] += 1.0;
        }
    }
    for (int i = 0; i < BYTES; i++) {
        entropy -= counts[i] > 0.0 ? counts[i] / total * log(counts[i] / total) : 0.0;
    }
    return entropy;
}

static void check(ModelFamily family)
{
    const ModelConfig config = {.family = family,
                                .layers = 2,
                                .width = 64,
                                .heads = 4,
                                .kv_heads = family == FAMILY_LLAMA ? 2 : 0,
                                .vocabulary = BYTES,
                                .context = LENGTH};
    g_autoptr(GError) error = NULL;
    g_autoptr(ModelSpec) spec = model_spec_from_config(&config, &error);
    g_autoptr(TokenData) data = text_data(TEXT, LENGTH, &error);
    assert_non_null(data);
    Pool *pool = pool_new(2, NULL, false, 0);
    Parameters *weights = parameters_new(spec, false, &error);
    parameters_initialise(weights, 1, pool);
    TokenSamples samples = {.data = data, .seed = 1}, in_order = {.data = data, .in_order = true};
    const SampleSource source = token_samples_source(&samples),
                       checked = token_samples_source(&in_order);
    const TrainRankOptions options = {.spec = spec,
                                      .kernels = kernels_get(kernels_best_isa()),
                                      .pool = pool,
                                      .source = &source,
                                      .sequences = SEQUENCES,
                                      .leaves = 2,
                                      .micro_sequences = 4,
                                      .optimizer = {.rate = 3e-3,
                                                    .beta1 = 0.9,
                                                    .beta2 = 0.95,
                                                    .eps = 1e-8,
                                                    .decay = 0.1,
                                                    .clip = 1.0,
                                                    .schedule = RATE_COSINE,
                                                    .warmup = 10,
                                                    .steps = STEPS}};
    TrainRank *rank = train_rank_new(&options, weights, &error);
    assert_non_null(rank);
    TrainStep out;
    for (int step = 0; step < STEPS; step++) {
        assert_true(train_rank_step(rank, &out, &error));
        if (step == 0) {
            assert_true(fabs((double)out.loss - log(BYTES)) < 0.2);
        }
    }
    float validated;
    assert_true(train_rank_validate(rank, &checked, 16, &validated, &error));
    const double entropy = unigram_entropy(data), after = (double)validated;
    print_message("# family %u: loss %.3f, validated %.3f, entropy of bytes %.3f\n",
                  (unsigned)family, (double)out.loss, after, entropy);
    assert_true((double)out.loss < entropy - 0.1 && after < entropy - 0.4);
    train_rank_free(rank);
    pool_free(pool);
}

static void test_gpt2(void **state)
{
    check(FAMILY_GPT2);
}

static void test_llama(void **state)
{
    check(FAMILY_LLAMA);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_gpt2), cmocka_unit_test(test_llama)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
