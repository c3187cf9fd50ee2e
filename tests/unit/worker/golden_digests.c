#include "tests/unit/worker/golden_digests.h"

#include "proto/base/hash.h"
#include "tests/unit/worker/engine_runs.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

enum { N_PROMPT = 40, N_TOKENS = 6 };

static void add_result(Hasher *hasher, const LocalResult *r)
{
    hasher_update(hasher, r->ids, sizeof *r->ids * r->n);
    hasher_update(hasher, r->logprobs, sizeof *r->logprobs * r->n);
    hasher_update(hasher, r->hashes, sizeof *r->hashes * r->n);
}

void golden_digest(const GoldenCase *c, const Kernels *kernels, char hex[33])
{
    uint32_t prompt[N_PROMPT];
    runs_prompt(prompt, N_PROMPT, 259);
    const EngineRequest requests[] = {
        {.prompt = prompt, .n_prompt = N_PROMPT, .max_tokens = N_TOKENS},
        {.prompt = prompt,
         .n_prompt = N_PROMPT,
         .max_tokens = N_TOKENS,
         .temperature = 1.5f,
         .top_k = 60,
         .top_p = 0.95f,
         .min_p = 0.01f,
         .repeat_penalty = 1.1f,
         .penalty_window = 64,
         .seed = 5},
        {.kind = 1, .prompt = prompt, .n_prompt = N_PROMPT, .score_from = N_PROMPT / 2},
    };
    g_autoptr(Gguf) gguf = runs_model(&c->config);
    LocalReplica *replica = runs_replica(
        gguf, (LocalLayout){.pp = 1, .tp = {1}, .kernels = kernels, .kv_type = c->kv_type});
    Hasher *hasher = hasher_new();
    for (unsigned i = 0; i < G_N_ELEMENTS(requests); i++) {
        LocalResult result;
        local_replica_run(replica, &requests[i], 1, &result);
        if (result.error != NULL) {
            fail_msg("%s", result.error);
        }
        add_result(hasher, &result);
        local_result_clear(&result);
    }
    const Hash128 hash = hasher_finish(hasher);
    hasher_free(hasher);
    hash128_hex(&hash, hex);
    local_replica_free(replica);
}

char *golden_digest_committed(const char *name, unsigned *version)
{
    g_autofree char *text = NULL;
    if (!g_file_get_contents(GOLDEN_DIGESTS, &text, NULL, NULL)) {
        fail_msg("%s cannot be read", GOLDEN_DIGESTS);
    }
    g_auto(GStrv) lines = g_strsplit(text, "\n", -1);
    for (char **line = lines; *line != NULL; line++) {
        g_auto(GStrv) words = g_strsplit(*line, " ", 3);
        if (g_strv_length(words) == 3 && strcmp(words[0], name) == 0) {
            *version = (unsigned)strtoul(words[1], NULL, 10);
            return g_strdup(words[2]);
        }
    }
    return NULL;
}
