/* Training and serving are one function: the logits of the training forward pass, on weights loaded
 * from a file, are those that the engine serves from it (f32 keys), bit for bit. */
#include "tests/golden/gguf_builder.h"
#include "tests/sim/local_replica.h"
#include "worker/model/training.h"

#include "proto/model/model_config.h"
#include "proto/model/model_source.h"
#include "proto/weft/v1/serve.pb-c.h"

#include <glib/gstdio.h>

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

/* Training's logits of the prompt and what was served are the served ones. */
static void compare(const Parameters *weights, const Gguf *gguf, unsigned threads)
{
    g_autoptr(GError) error = NULL;
    const uint32_t vocabulary = weights->spec->vocab_size;
    uint32_t tokens[LENGTH], targets[LENGTH];
    float losses[LENGTH];
    for (uint32_t i = 0; i < LENGTH; i++) {
        tokens[i] = (i * 37 + 11) % vocabulary;
        targets[i] = TARGET_NONE;
    }
    LocalResult served = serve(gguf, tokens);
    memcpy(tokens + PROMPT, served.ids, TOKENS * sizeof *tokens);
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
    for (uint32_t i = 0; i < TOKENS; i++) {
        assert_memory_equal(training_logits_row(training, PROMPT - 1 + i),
                            served.logits + (size_t)i * vocabulary, vocabulary * sizeof(float));
    }
    training_free(training);
    pool_free(pool);
    local_result_clear(&served);
}

static char *new_path(void)
{
    char *path = g_build_filename(g_get_tmp_dir(), "weft-served-XXXXXX", NULL);
    const int fd = g_mkstemp(path);
    assert_true(fd >= 0 && g_close(fd, NULL));
    return path;
}

/* As a training that starts from a file reads them. */
static Parameters *weights_of(const ModelSource *source)
{
    const ModelSpec *spec = model_source_spec(source);
    Parameters *weights = parameters_new(spec, false, NULL);
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        assert_true(
            model_source_read(source, i, 0, spec->tensors[i].rows, weights->tensors[i], NULL));
    }
    return weights;
}

static void check(ModelFamily family, Dtype type, bool qkv_bias, bool tied, unsigned threads)
{
    g_autoptr(GError) error = NULL;
    GgufBuilderConfig config;
    gguf_builder_defaults(&config);
    gguf_builder_set_type(&config, type);
    config.family = family;
    config.qkv_bias = qkv_bias;
    config.tied = tied;
    g_autofree char *path = new_path();
    assert_true(gguf_builder_write(&config, path, &error));
    g_autoptr(Gguf) gguf = gguf_open(path, &error);
    g_autoptr(ModelSource) source = model_source_open(path, &error);
    g_unlink(path);
    assert_true(gguf != NULL && source != NULL);
    g_autoptr(Parameters) weights = weights_of(source);
    compare(weights, gguf, threads);
}

static void test_f32(void **state)
{
    check(FAMILY_LLAMA, DTYPE_F32, false, true, 1);
    check(FAMILY_LLAMA, DTYPE_F32, true, false, 2);
    check(FAMILY_GPT2, DTYPE_F32, false, true, 1);
    check(FAMILY_GPT2, DTYPE_F32, false, false, 2);
}

/* F16 weights are served from F16: the same values. */
static void test_f16(void **state)
{
    check(FAMILY_LLAMA, DTYPE_F16, false, false, 1);
    check(FAMILY_GPT2, DTYPE_F16, false, true, 2);
}

/* Rows of whole parameters: what weft export reads from a checkpoint. */
static bool read_rows(const void *user, uint32_t tensor, uint32_t row0, uint32_t n_rows, float *out,
                      GError **error)
{
    const Parameters *p = user;
    const size_t columns = p->spec->tensors[tensor].columns;
    memcpy(out, p->tensors[tensor] + row0 * columns, n_rows * columns * sizeof *out);
    return true;
}

/* Weights that were never in a file, written as weft export writes them. */
static void check_exported(ModelFamily family)
{
    g_autoptr(GError) error = NULL;
    const ModelConfig config = {.family = family,
                                .layers = 2,
                                .width = 64,
                                .heads = 4,
                                .vocabulary = 1100,
                                .context = LENGTH};
    g_autoptr(ModelSpec) spec = model_spec_from_config(&config, &error);
    assert_non_null(spec);
    g_autoptr(Parameters) weights = parameters_new(spec, false, &error);
    Pool *pool = pool_new(1, NULL, false, 0);
    parameters_initialise(weights, 5, pool);
    pool_free(pool);
    for (size_t i = 0; i < weights->n_floats; i += 3) {
        weights->floats[i] += 0.03f; /* biases, too */
    }
    const ModelContents contents = {.spec = spec, .read = read_rows, .user = weights};
    g_autofree char *path = new_path();
    assert_true(gguf_write(path, &contents, DTYPE_F32, &error));
    g_autoptr(Gguf) gguf = gguf_open(path, &error);
    g_unlink(path);
    assert_non_null(gguf);
    compare(weights, gguf, 2);
}

static void test_exported(void **state)
{
    check_exported(FAMILY_GPT2);
    check_exported(FAMILY_LLAMA);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_f32),
        cmocka_unit_test(test_f16),
        cmocka_unit_test(test_exported),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
