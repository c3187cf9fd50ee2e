#include "tests/unit/worker/engine_runs.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <glib/gstdio.h>
#include <string.h>
#include <unistd.h>

Gguf *runs_model(const GgufBuilderConfig *config)
{
    g_autoptr(GError) error = NULL;
    g_autofree char *path = g_strdup_printf("%s/weft-runs-%d.gguf", g_get_tmp_dir(), (int)getpid());
    Gguf *gguf = gguf_builder_write(config, path, &error) ? gguf_open(path, &error) : NULL;
    g_unlink(path);
    if (gguf == NULL) {
        fail_msg("%s", error->message);
    }
    return gguf;
}

Gguf *runs_awkward_model(Dtype type)
{
    GgufBuilderConfig config;
    gguf_builder_defaults(&config);
    gguf_builder_set_type(&config, type);
    config.n_layers = 4;
    config.width = 288;
    config.n_heads = 9;
    config.n_kv_heads = 3;
    config.head_size = 32;
    config.ffn_width = 768;
    config.vocab_size = 2500;
    config.context = 2048;
    config.seed = 42;
    return runs_model(&config);
}

LocalReplica *runs_replica(const Gguf *gguf, LocalLayout layout)
{
    g_autoptr(GError) error = NULL;
    LocalReplica *replica = local_replica_new(gguf, &layout, NULL, &error);
    if (replica == NULL) {
        fail_msg("%s", error->message);
    }
    return replica;
}

void runs_prompt(uint32_t *ids, uint32_t n, uint32_t limit)
{
    for (uint32_t i = 0; i < n; i++) {
        ids[i] = ((i * 2654435761u + 12345u) >> 8) % limit;
    }
}

void runs_request(const Gguf *gguf, LocalLayout layout, const EngineRequest *request,
                  LocalResult *result)
{
    LocalReplica *replica = runs_replica(gguf, layout);
    local_replica_run(replica, request, 1, result);
    if (result->error != NULL) {
        fail_msg("%s", result->error);
    }
    local_replica_free(replica);
}

void runs_greedy(const Gguf *gguf, LocalLayout layout, uint32_t n_prompt, uint32_t n_tokens,
                 LocalResult *result)
{
    uint32_t prompt[RUNS_PROMPT];
    g_assert(n_prompt <= RUNS_PROMPT);
    runs_prompt(prompt, n_prompt, 259);
    const EngineRequest request = {.prompt = prompt, .n_prompt = n_prompt, .max_tokens = n_tokens};
    runs_request(gguf, layout, &request, result);
    assert_int_equal(result->n, n_tokens);
}

bool runs_equal(const LocalResult *a, const LocalResult *b)
{
    return a->n == b->n && memcmp(a->ids, b->ids, sizeof(uint32_t) * a->n) == 0 &&
           memcmp(a->logprobs, b->logprobs, sizeof(float) * a->n) == 0 &&
           memcmp(a->hashes, b->hashes, 16 * (size_t)a->n) == 0;
}
