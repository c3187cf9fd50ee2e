#include "tests/sim/reference.h"

#include "kernels/kernels.h"
#include "proto/base/hash.h"
#include "proto/base/random.h"
#include "tests/golden/gguf_builder.h"
#include "tests/sim/local_replica.h"

#include <glib/gstdio.h>
#include <string.h>

#define VOCABULARY 1100u
#define CONTEXT 96u

/* Small enough for a token in microseconds, with enough units for four tensor ranks and enough
 * layers for three stages. */
static void write_model(const char *path)
{
    GgufBuilderConfig config;
    gguf_builder_defaults(&config);
    gguf_builder_set_type(&config, DTYPE_F32);
    config.n_layers = 3;
    config.width = 32;
    config.n_heads = 4;
    config.n_kv_heads = 2;
    config.head_size = 16;
    config.vocab_size = VOCABULARY;
    config.context = CONTEXT;
    config.seed = 5;
    g_autoptr(GError) error = NULL;
    gguf_builder_write(&config, path, &error);
    g_assert_no_error(error);
}

/* The first three are greedy; the others are drawn in all the ways that there are. */
static void fill_request(ReferenceRequest *r, unsigned index)
{
    RandomSeeded random;
    random_seeded_init(&random, 100 + index);
    r->n_prompt = 1 + (uint32_t)(random_u64(&random.base) % REFERENCE_PROMPT);
    for (uint32_t i = 0; i < r->n_prompt; i++) {
        r->prompt[i] = (uint32_t)(random_u64(&random.base) % VOCABULARY);
    }
    weft__v1__sampler__init(&r->sampler);
    if (index >= 3) {
        r->sampler.temperature = 0.7f + 0.1f * (float)index;
        r->sampler.top_k = index % 2 ? 50 : 0;
        r->sampler.top_p = index % 3 ? 0.9f : 0;
        r->sampler.min_p = index % 4 == 0 ? 0.02f : 0;
        r->sampler.repeat_penalty = index % 5 == 0 ? 1.1f : 0;
        r->sampler.penalty_window = index % 5 == 0 ? 16 : 0;
    }
    r->sampler.seed = 1000 + index;
}

static EngineRequest engine_request(const ReferenceRequest *r, uint32_t choice)
{
    const Weft__V1__Sampler *s = &r->sampler;
    return (EngineRequest){.prompt = r->prompt,
                           .n_prompt = r->n_prompt,
                           .choice = choice,
                           .max_tokens = REFERENCE_TOKENS,
                           .temperature = s->temperature,
                           .top_k = s->top_k,
                           .top_p = s->top_p,
                           .min_p = s->min_p,
                           .repeat_penalty = s->repeat_penalty,
                           .penalty_window = s->penalty_window,
                           .seed = s->seed};
}

static void compute(LocalReplica *replica, const EngineRequest *request, uint32_t n,
                    ReferenceSequence *out)
{
    LocalResult result;
    local_replica_run(replica, request, 1, &result);
    g_assert_cmpstr(result.error, ==, NULL);
    g_assert_cmpuint(result.n, ==, n);
    memcpy(out->ids, result.ids, n * sizeof *out->ids);
    memcpy(out->hashes, result.hashes, n * sizeof *out->hashes);
    out->n = n;
    local_result_clear(&result);
}

static void compute_request(LocalReplica *replica, ReferenceRequest *r)
{
    for (uint32_t c = 0; c < REFERENCE_CHOICES; c++) {
        const EngineRequest request = engine_request(r, c);
        compute(replica, &request, REFERENCE_TOKENS, &r->choices[c]);
    }
    memcpy(r->text, r->prompt, r->n_prompt * sizeof *r->text);
    memcpy(r->text + r->n_prompt, r->choices[0].ids, REFERENCE_TOKENS * sizeof *r->text);
    r->n_text = r->n_prompt + REFERENCE_TOKENS;
    const EngineRequest score = {.kind = WEFT__V1__REQUEST_KIND__SCORE,
                                 .prompt = r->text,
                                 .n_prompt = r->n_text,
                                 .score_from = 1};
    compute(replica, &score, r->n_text - 1, &r->scores);
}

Foundation *foundation_new(void)
{
    Foundation *f = g_new0(Foundation, 1);
    const char *in_memory = "/dev/shm";
    f->dir = g_file_test(in_memory, G_FILE_TEST_IS_DIR)
                 ? g_mkdtemp(g_build_filename(in_memory, "weft-history-XXXXXX", NULL))
                 : g_dir_make_tmp("weft-history-XXXXXX", NULL);
    g_assert_nonnull(f->dir);
    f->model = "tiny.gguf";
    g_autofree char *path = g_build_filename(f->dir, f->model, NULL);
    write_model(path);
    g_autoptr(GError) error = NULL;
    Gguf *gguf = gguf_open(path, &error);
    g_assert_no_error(error);
    const LocalLayout layout = {
        .pp = 1, .tp = {1}, .threads = 1, .isa = (int)kernels_best_isa(), .context = CONTEXT};
    LocalReplica *replica = local_replica_new(gguf, &layout, NULL, &error);
    g_assert_no_error(error);
    for (unsigned i = 0; i < REFERENCE_REQUESTS; i++) {
        fill_request(&f->requests[i], i);
        compute_request(replica, &f->requests[i]);
    }
    local_replica_free(replica);
    gguf_free(gguf);
    return f;
}

void foundation_free(Foundation *f)
{
    GDir *dir = g_dir_open(f->dir, 0, NULL);
    for (const char *name; dir && (name = g_dir_read_name(dir));) {
        g_autofree char *path = g_build_filename(f->dir, name, NULL);
        g_unlink(path);
    }
    if (dir) {
        g_dir_close(dir);
    }
    g_rmdir(f->dir);
    g_free(f->dir);
    g_free(f);
}

void reference_digest(const ReferenceSequence *sequences, uint32_t n_sequences, uint32_t n,
                      uint8_t out[16])
{
    Hasher *hasher = hasher_new();
    for (uint32_t i = 0; i < n_sequences; i++) {
        hasher_update(hasher, sequences[i].hashes, (size_t)n * sizeof *sequences[i].hashes);
    }
    const Hash128 digest = hasher_finish(hasher);
    hasher_free(hasher);
    memcpy(out, digest.bytes, sizeof digest.bytes);
}
