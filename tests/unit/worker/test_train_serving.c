/* Training and serving are one function: the logits of the training forward pass, on weights loaded
 * from a file, are those that the engine serves from it (f32 keys), bit for bit. */
#include "tests/golden/gguf_builder.h"
#include "tests/sim/local_replica.h"
#include "worker/model/training.h"

#include "proto/weft/v1/serve.pb-c.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

enum { PROMPT = 45, TOKENS = 6, LENGTH = PROMPT + TOKENS };

/* The engine's logits of the rows that follow the prompt, and the ids that it drew. */
static LocalResult serve(const Gguf *gguf, const uint32_t *prompt)
{
    g_autoptr(GError) error = NULL;
    const LocalLayout layout = {
        .pp = 1, .tp = {1}, .threads = 1, .isa = kernels_best_isa(), .kv_type = KV_F32};
    LocalReplica *replica = local_replica_new(gguf, &layout, NULL, &error);
    if (replica == NULL) {
        fail_msg("%s", error->message);
    }
    const EngineRequest request = {.kind = WEFT__V1__REQUEST_KIND__GENERATE,
                                   .prompt = prompt,
                                   .n_prompt = PROMPT,
                                   .max_tokens = TOKENS,
                                   .want_logits = true};
    LocalResult result;
    local_replica_run(replica, &request, 1, &result);
    assert_null(result.error);
    assert_int_equal(result.n, TOKENS);
    local_replica_free(replica);
    return result;
}

static void check(Dtype type, bool qkv_bias, bool tied, unsigned threads)
{
    g_autoptr(GError) error = NULL;
    GgufBuilderConfig config;
    gguf_builder_defaults(&config);
    gguf_builder_set_type(&config, type);
    config.qkv_bias = qkv_bias;
    config.tied = tied;
    g_autoptr(GBytes) bytes = gguf_builder_bytes(&config, &error);
    g_autoptr(Gguf) gguf =
        gguf_parse(g_bytes_get_data(bytes, NULL), g_bytes_get_size(bytes), &error);
    g_autoptr(ModelSpec) spec = gguf_model_spec(gguf, &error);
    assert_non_null(spec);
    uint32_t tokens[LENGTH], targets[LENGTH];
    float losses[LENGTH];
    for (uint32_t i = 0; i < LENGTH; i++) {
        tokens[i] = (i * 37 + 11) % config.vocab_size;
        targets[i] = TARGET_NONE;
    }
    LocalResult served = serve(gguf, tokens);
    memcpy(tokens + PROMPT, served.ids, TOKENS * sizeof *tokens);
    g_autoptr(Parameters) weights = parameters_new(spec, false, &error);
    assert_true(parameters_load(weights, gguf, &error));
    Pool *pool = pool_new(threads, NULL, false, 0);
    const TrainingOptions options = {.weights = weights,
                                     .kernels = kernels_get(kernels_best_isa()),
                                     .pool = pool,
                                     .max_sequences = 1,
                                     .length = LENGTH};
    Training *training = training_new(&options, &error);
    assert_non_null(training);
    const TrainBatch batch = {
        .tokens = tokens, .targets = targets, .n_sequences = 1, .length = LENGTH};
    assert_int_equal(training_forward(training, 0, &batch), GROUP_OK);
    assert_int_equal(training_loss(training, 0, &batch, losses), GROUP_OK);
    const float *rows = training_logits(training) + (size_t)(PROMPT - 1) * config.vocab_size;
    assert_memory_equal(rows, served.logits, (size_t)TOKENS * config.vocab_size * sizeof(float));
    training_free(training);
    pool_free(pool);
    local_result_clear(&served);
}

static void test_f32(void **state)
{
    check(DTYPE_F32, false, true, 1);
    check(DTYPE_F32, true, false, 2);
}

/* F16 weights are served from F16: the same values. */
static void test_f16(void **state)
{
    check(DTYPE_F16, false, false, 1);
}

static void test_block_types_are_refused(void **state)
{
    g_autoptr(GError) error = NULL;
    GgufBuilderConfig config;
    gguf_builder_defaults(&config); /* Q8_0 */
    g_autoptr(GBytes) bytes = gguf_builder_bytes(&config, &error);
    g_autoptr(Gguf) gguf =
        gguf_parse(g_bytes_get_data(bytes, NULL), g_bytes_get_size(bytes), &error);
    g_autoptr(ModelSpec) spec = gguf_model_spec(gguf, &error);
    g_autoptr(Parameters) weights = parameters_new(spec, false, &error);
    assert_false(parameters_load(weights, gguf, &error));
    assert_non_null(strstr(error->message, "Q8_0"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_f32),
        cmocka_unit_test(test_f16),
        cmocka_unit_test(test_block_types_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
