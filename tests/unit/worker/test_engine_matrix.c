/* The matrix of NUMERICS, "Proof", where it goes beyond layouts (test_engine_layouts.c has those):
 * one result over threads, chunks, cache types, weight types, shared KV heads, stale cache memory,
 * a thread's float control, a tied head on another stage, instruction sets, and a change of layout
 * in mid-stream. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "kernels/kernels.h"
#include "kernels/ops/attention.h"
#include "tests/unit/worker/engine_runs.h"

#include <glib/gstdio.h>
#include <stdio.h>
#include <string.h>
#include <xmmintrin.h>

enum { N_PROMPT = RUNS_PROMPT, N_TOKENS = 10 };

/* Widths of K blocks; 8 query heads on `n_kv_heads`; 8 units of attention, at least 2 of the
 * feed-forward. */
static Gguf *model(Dtype type, uint32_t n_kv_heads)
{
    GgufBuilderConfig config;
    gguf_builder_defaults(&config);
    gguf_builder_set_type(&config, type);
    config.width = 256;
    config.n_heads = 8;
    config.n_kv_heads = n_kv_heads;
    config.head_size = dtype_info(type)->block == 256 ? 256 : 32;
    config.ffn_width = 768;
    config.vocab_size = 1200;
    config.n_layers = 2;
    config.seed = 11;
    return runs_model(&config);
}

/* Every layout gives what the first gives. */
static void expect_same(const Gguf *gguf, const LocalLayout *layouts, unsigned n)
{
    LocalResult first, other;
    runs_greedy(gguf, layouts[0], N_PROMPT, N_TOKENS, &first);
    for (unsigned i = 1; i < n; i++) {
        runs_greedy(gguf, layouts[i], N_PROMPT, N_TOKENS, &other);
        if (!runs_equal(&first, &other)) {
            fail_msg("layout %u gives %s, the first %s", i, other.digest, first.digest);
        }
        local_result_clear(&other);
    }
    local_result_clear(&first);
}

static void threads_and_chunks(void **state)
{
    const int isa = kernels_best_isa();
    const LocalLayout layouts[] = {
        {.pp = 1, .tp = {1}, .isa = isa, .max_rows = 512},
        {.pp = 1, .tp = {1}, .isa = isa, .max_rows = 512, .threads = 2},
        {.pp = 1, .tp = {1}, .isa = isa, .max_rows = 64, .threads = 2},
        {.pp = 1, .tp = {1}, .isa = isa, .max_rows = 7},
        {.pp = 1, .tp = {1}, .isa = isa, .max_rows = 7, .threads = 2},
        {.pp = 1, .tp = {1}, .isa = isa, .max_rows = 1},
        {.pp = 2, .tp = {2, 1}, .isa = isa, .max_rows = 64, .threads = 2},
    };
    static const Dtype types[] = {DTYPE_F32, DTYPE_BF16, DTYPE_Q4_1};
    for (unsigned i = 0; i < G_N_ELEMENTS(types); i++) {
        g_autoptr(Gguf) gguf = model(types[i], 2);
        expect_same(gguf, layouts, G_N_ELEMENTS(layouts));
    }
}

static void cache_types(void **state)
{
    static const KvType types[] = {KV_F16, KV_BF16, KV_F32, KV_Q8};
    g_autoptr(Gguf) gguf = model(DTYPE_Q8_0, 2);
    LocalResult by_type[G_N_ELEMENTS(types)];
    for (unsigned i = 0; i < G_N_ELEMENTS(types); i++) {
        const int isa = kernels_best_isa();
        const LocalLayout layouts[] = {
            {.pp = 1, .tp = {1}, .kv_type = types[i]},
            {.pp = 1, .tp = {1}, .kv_type = types[i], .isa = isa, .threads = 2, .max_rows = 512},
            {.pp = 1, .tp = {4}, .kv_type = types[i], .isa = isa, .max_rows = 7},
            {.pp = 2, .tp = {1, 2}, .kv_type = types[i], .isa = isa},
        };
        expect_same(gguf, layouts, G_N_ELEMENTS(layouts));
        runs_greedy(gguf, layouts[1], N_PROMPT, 1, &by_type[i]);
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(types); i++) { /* they are different caches */
        assert_false(runs_equal(&by_type[i], &by_type[(i + 1) % G_N_ELEMENTS(types)]));
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(types); i++) {
        local_result_clear(&by_type[i]);
    }
}

static void k_quants(void **state)
{
    static const Dtype types[] = {DTYPE_Q4_K, DTYPE_Q5_K, DTYPE_Q6_K};
    for (unsigned i = 0; i < G_N_ELEMENTS(types); i++) {
        g_autoptr(Gguf) gguf = model(types[i], 2);
        const int isa = kernels_best_isa();
        const LocalLayout layouts[] = {
            {.pp = 1, .tp = {1}, .isa = isa},
            {.pp = 1, .tp = {1}, .isa = isa, .max_rows = 7, .threads = 2},
            {.pp = 1, .tp = {3}, .isa = isa},
            {.pp = 2, .tp = {1, 2}, .isa = isa},
        };
        expect_same(gguf, layouts, G_N_ELEMENTS(layouts));
    }
}

/* Short, because the specification is slow; every level that this CPU has. */
static void instruction_sets(void **state)
{
    static const Dtype types[] = {DTYPE_F32,  DTYPE_F16,  DTYPE_BF16, DTYPE_Q8_0,
                                  DTYPE_Q4_0, DTYPE_Q4_1, DTYPE_Q5_0, DTYPE_Q5_1,
                                  DTYPE_Q4_K, DTYPE_Q5_K, DTYPE_Q6_K};
    for (unsigned i = 0; i < G_N_ELEMENTS(types); i++) {
        g_autoptr(Gguf) gguf = model(types[i], 2);
        LocalResult specification, fast;
        runs_greedy(gguf, (LocalLayout){.pp = 1, .tp = {1}}, 34, 3, &specification);
        for (int isa = ISA_AVX2; isa <= (int)kernels_best_isa(); isa++) {
            runs_greedy(gguf, (LocalLayout){.pp = 1, .tp = {2}, .isa = isa}, 34, 3, &fast);
            assert_true(runs_equal(&specification, &fast));
            local_result_clear(&fast);
        }
        local_result_clear(&specification);
    }
}

/* One KV head that four ranks need, and two that are cut in their middle. */
static void a_shared_kv_head(void **state)
{
    static const double uneven[] = {1.0, 2.2, 0.8};
    for (uint32_t n_kv = 1; n_kv <= 2; n_kv++) {
        g_autoptr(Gguf) gguf = model(DTYPE_Q4_0, n_kv);
        const int isa = kernels_best_isa();
        const LocalLayout layouts[] = {
            {.pp = 1, .tp = {1}, .isa = isa},
            {.pp = 1, .tp = {4}, .isa = isa},
            {.pp = 1, .tp = {3}, .weight = uneven, .isa = isa, .max_rows = 7},
            {.pp = 2, .tp = {3, 1}, .weight = uneven, .isa = isa},
        };
        expect_same(gguf, layouts, G_N_ELEMENTS(layouts));
    }
}

/* ---- what lies in the cache beyond the keys that were written ---- */

static struct {
    const Kernels *real;
    GMutex mutex;
    GHashTable *seen; /* blocks that hold NaN where nothing was written */
    uint32_t n_filled;
} stale;

static void fill_once(void *block, size_t size)
{
    g_mutex_lock(&stale.mutex);
    if (g_hash_table_add(stale.seen, block)) {
        memset(block, 0xff, size); /* a NaN in every cache type */
        stale.n_filled++;
    }
    g_mutex_unlock(&stale.mutex);
}

#define WRITE_STALE(NAME, TYPE)                                                                    \
    static void NAME(const float *k, const float *v, uint32_t head_size, uint32_t slot,            \
                     void *k_block, void *v_block)                                                 \
    {                                                                                              \
        fill_once(k_block, kv_block_bytes(TYPE, head_size));                                       \
        fill_once(v_block, kv_block_bytes(TYPE, head_size));                                       \
        stale.real->kv_write[TYPE](k, v, head_size, slot, k_block, v_block);                       \
    }
WRITE_STALE(write_stale_f16, KV_F16)
WRITE_STALE(write_stale_bf16, KV_BF16)
WRITE_STALE(write_stale_f32, KV_F32)
WRITE_STALE(write_stale_q8, KV_Q8)

static void nan_filled_pages(void **state)
{
    g_autoptr(Gguf) gguf = model(DTYPE_Q8_0, 2);
    for (int isa = ISA_GENERIC; isa <= (int)kernels_best_isa(); isa++) {
        Kernels table = *kernels_get((KernelIsa)isa);
        stale.real = kernels_get((KernelIsa)isa);
        table.kv_write[KV_F16] = write_stale_f16;
        table.kv_write[KV_BF16] = write_stale_bf16;
        table.kv_write[KV_F32] = write_stale_f32;
        table.kv_write[KV_Q8] = write_stale_q8;
        for (int kv_type = KV_F16; kv_type < (int)KV_TYPE_LIMIT; kv_type++) {
            stale.seen = g_hash_table_new(NULL, NULL);
            stale.n_filled = 0;
            LocalResult clean, filled;
            LocalLayout layout = {
                .pp = 1, .tp = {2}, .isa = isa, .kv_type = (KvType)kv_type, .max_rows = 48};
            runs_greedy(gguf, layout, 70, 4, &clean);
            layout.kernels = &table;
            runs_greedy(gguf, layout, 70, 4, &filled);
            assert_true(runs_equal(&clean, &filled));
            assert_true(stale.n_filled >= 3 * 2 * 2 * 2); /* pages, layers, KV heads, K and V */
            local_result_clear(&clean);
            local_result_clear(&filled);
            g_hash_table_unref(stale.seen);
        }
    }
}

/* ---- float control ---- */

/* A copy of the file whose tensor `name` (F32) is scaled. */
static Gguf *scaled(const Gguf *gguf, const char *name, float factor)
{
    g_autoptr(GError) error = NULL;
    size_t size;
    const uint8_t *data = gguf_file_data(gguf, 0, &size);
    g_autofree uint8_t *copy = g_memdup2(data, size);
    const GgufTensor *tensor = gguf_find_tensor(gguf, name);
    assert_true(tensor != NULL && tensor->type == DTYPE_F32);
    for (uint64_t i = 0; i < tensor->size_bytes / sizeof(float); i++) {
        float value;
        memcpy(&value, copy + tensor->offset + 4 * i, sizeof value);
        value *= factor;
        memcpy(copy + tensor->offset + 4 * i, &value, sizeof value);
    }
    g_autofree char *path = g_build_filename(g_get_tmp_dir(), "weft-scaled-XXXXXX", NULL);
    const int fd = g_mkstemp(path);
    assert_true(fd >= 0 && g_close(fd, NULL) &&
                g_file_set_contents(path, (const char *)copy, (gssize)size, &error));
    Gguf *out = gguf_open(path, &error);
    g_unlink(path);
    assert_non_null(out);
    return out;
}

/* Logits that are subnormal: flushed, they would all be equal and every token the lowest id.
 * Threads inherit the float control of the one that starts them, here that of a program into which
 * a library built with -ffast-math was loaded. */
static void flushing_set_on_a_thread(void **state)
{
    GgufBuilderConfig config;
    gguf_builder_defaults(&config);
    gguf_builder_set_type(&config, DTYPE_F32);
    config.tied = false;
    g_autoptr(Gguf) plain = runs_model(&config);
    g_autoptr(Gguf) tiny = scaled(plain, "output.weight", 1e-40f);
    uint32_t prompt[20];
    runs_prompt(prompt, 20, 259);
    EngineRequest requests[2] = {{.prompt = prompt, .n_prompt = 20, .max_tokens = 6},
                                 {.prompt = prompt, .n_prompt = 20, .max_tokens = 6}};
    requests[1].repeat_penalty = 1.25f; /* arithmetic on logits */
    requests[1].penalty_window = 64;
    for (unsigned i = 0; i < 2; i++) {
        for (int isa = ISA_GENERIC; isa <= (int)kernels_best_isa(); isa++) {
            const LocalLayout layout = {.pp = 1, .tp = {2}, .threads = 2, .isa = isa};
            LocalResult normal, flushing;
            runs_request(tiny, layout, &requests[i], &normal);
            const unsigned before = _mm_getcsr();
            _mm_setcsr(before | 0x8040u);
            runs_request(tiny, layout, &requests[i], &flushing);
            _mm_setcsr(before);
            assert_true(normal.ids[0] != 0 && normal.ids[0] != normal.ids[5]);
            assert_true(runs_equal(&normal, &flushing));
            local_result_clear(&normal);
            local_result_clear(&flushing);
        }
    }
}

/* ---- the tied head, and a new layout in mid-stream ---- */

/* Stage 0 looks the embedding up, the last stage projects with it: both hold it. */
static void a_tied_head_on_two_stages(void **state)
{
    static const Dtype types[] = {DTYPE_Q8_0, DTYPE_Q6_K, DTYPE_F16};
    for (unsigned i = 0; i < G_N_ELEMENTS(types); i++) {
        g_autoptr(Gguf) gguf = model(types[i], 2);
        const int isa = kernels_best_isa();
        const LocalLayout layouts[] = {
            {.pp = 1, .tp = {1}, .isa = isa},
            {.pp = 2, .tp = {1, 1}, .isa = isa},
            {.pp = 2,
             .tp = {2, 2},
             .isa = isa}, /* two vocabulary chunks over two ranks of either stage */
            {.pp = 2, .tp = {1, 2}, .isa = isa},
        };
        expect_same(gguf, layouts, G_N_ELEMENTS(layouts));
    }
}

/* A stream that stops after any token and goes on elsewhere: prompt and generated ids are all that
 * travels. */
static void resumed_on_another_layout(void **state)
{
    g_autoptr(Gguf) gguf = model(DTYPE_Q5_1, 2);
    const int isa = kernels_best_isa();
    const LocalLayout first = {.pp = 1, .tp = {2}, .isa = isa};
    const LocalLayout others[] = {
        {.pp = 2, .tp = {1, 1}, .isa = isa, .max_rows = 7},
        {.pp = 1, .tp = {1}, .isa = isa, .threads = 2, .max_rows = 512},
        {.pp = 1, .tp = {3}, .isa = ISA_GENERIC},
    };
    static const SampleBias bias[] = {{3, 2.0f}, {1030, -50.0f}, {1100, 1.5f}};
    uint32_t prompt[50];
    runs_prompt(prompt, 50, 259);
    const EngineRequest whole = {.prompt = prompt,
                                 .n_prompt = 50,
                                 .max_tokens = 16,
                                 .temperature = 1.2f,
                                 .top_k = 100,
                                 .top_p = 0.98f,
                                 .seed = 77,
                                 .repeat_penalty = 1.15f,
                                 .penalty_window = 20,
                                 .presence_penalty = 0.4f,
                                 .frequency_penalty = 0.6f,
                                 .bias = bias,
                                 .n_bias = G_N_ELEMENTS(bias)};
    LocalResult undisturbed, rest;
    runs_request(gguf, first, &whole, &undisturbed);
    for (unsigned i = 0; i < G_N_ELEMENTS(others); i++) {
        const uint32_t done = 1 + 7 * i;
        EngineRequest resumed = whole;
        resumed.generated = undisturbed.ids;
        resumed.n_generated = done;
        runs_request(gguf, others[i], &resumed, &rest);
        assert_int_equal(rest.n, 16 - done);
        assert_memory_equal(rest.ids, undisturbed.ids + done, rest.n * sizeof(uint32_t));
        assert_memory_equal(rest.logprobs, undisturbed.logprobs + done, rest.n * sizeof(float));
        assert_memory_equal(rest.hashes, undisturbed.hashes + done, rest.n * 16);
        local_result_clear(&rest);
    }
    local_result_clear(&undisturbed);
}

/* ---- GPT-2 ---- */

/* Learned positions on the first stage, biases added once, a tied head on the last; 8 units of
 * attention, an FFN unit that is shorter, two vocabulary chunks. */
static Gguf *gpt2(Dtype type, bool tied)
{
    GgufBuilderConfig config;
    gguf_builder_defaults(&config);
    gguf_builder_set_type(&config, type);
    config.family = FAMILY_GPT2;
    config.width = 256;
    config.n_heads = 8;
    config.ffn_width = 736;
    config.vocab_size = 1200;
    config.n_layers = 3;
    config.tied = tied;
    return runs_model(&config);
}

static void gpt2_on_layouts(void **state)
{
    static const double uneven[] = {1.0, 2.2, 0.8};
    static const Dtype types[] = {DTYPE_F32, DTYPE_F16, DTYPE_BF16, DTYPE_Q8_0, DTYPE_Q4_1};
    for (unsigned i = 0; i < G_N_ELEMENTS(types); i++) {
        g_autoptr(Gguf) gguf = gpt2(types[i], i % 2 == 0);
        const int isa = kernels_best_isa();
        const KvType kv = (KvType)(i % KV_TYPE_LIMIT);
        const LocalLayout layouts[] = {
            {.pp = 1, .tp = {1}, .kv_type = kv, .isa = isa, .max_rows = 512},
            {.pp = 1, .tp = {1}, .kv_type = kv, .isa = isa, .threads = 2, .max_rows = 7},
            {.pp = 1, .tp = {2}, .kv_type = kv, .isa = isa, .threads = 2},
            {.pp = 1, .tp = {3}, .kv_type = kv, .isa = isa, .weight = uneven, .max_rows = 1},
            {.pp = 2, .tp = {2, 1}, .kv_type = kv, .isa = isa},
            {.pp = 3, .tp = {1, 2, 2}, .kv_type = kv, .isa = isa, .max_rows = 33},
            {.pp = 1, .tp = {1}, .kv_type = kv, .isa = ISA_GENERIC, .threads = 2},
        };
        expect_same(gguf, layouts, G_N_ELEMENTS(layouts));
    }
}

/* ---- the real model, at most 32 tokens: the specification is slow ---- */

static void the_real_model(void **state)
{
    g_autoptr(GError) error = NULL;
    g_autoptr(Gguf) gguf = gguf_open(*state, &error);
    if (gguf == NULL) {
        fail_msg("%s", error->message);
    }
    const int isa = kernels_best_isa();
    const LocalLayout layouts[] = {
        {.pp = 1, .tp = {1}, .isa = ISA_GENERIC, .threads = 2},
        {.pp = 1, .tp = {1}, .isa = isa, .threads = 2},
        {.pp = 1, .tp = {3}, .isa = isa, .max_rows = 7},
        {.pp = 2, .tp = {2, 1}, .isa = isa},
        {.pp = 3, .tp = {1, 1, 1}, .isa = isa, .max_rows = 1},
    };
    LocalResult first, other;
    runs_greedy(gguf, layouts[0], 16, 8, &first);
    for (unsigned i = 1; i < G_N_ELEMENTS(layouts); i++) {
        runs_greedy(gguf, layouts[i], 16, 8, &other);
        assert_true(runs_equal(&first, &other));
        local_result_clear(&other);
    }
    local_result_clear(&first);
}

/* Without arguments the tiny models; with one, the model that WEFT_TEST_MODEL names (exit status
 * 77: none). */
int main(int argc, char **argv)
{
    (void)argv;
    if (argc > 1) {
        const char *model = g_getenv("WEFT_TEST_MODEL");
        if (model == NULL || model[0] == '\0') {
            printf("WEFT_TEST_MODEL does not name a model file\n");
            return 77;
        }
        const struct CMUnitTest real[] = {{.name = "the_real_model",
                                           .test_func = the_real_model,
                                           .initial_state = (void *)(uintptr_t)model}};
        return cmocka_run_group_tests(real, NULL, NULL);
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(threads_and_chunks),
        cmocka_unit_test(cache_types),
        cmocka_unit_test(k_quants),
        cmocka_unit_test(instruction_sets),
        cmocka_unit_test(a_shared_kv_head),
        cmocka_unit_test(nan_filled_pages),
        cmocka_unit_test(flushing_set_on_a_thread),
        cmocka_unit_test(a_tied_head_on_two_stages),
        cmocka_unit_test(resumed_on_another_layout),
        cmocka_unit_test(gpt2_on_layouts),
    };
    return cmocka_run_group_tests_name("engine matrix", tests, NULL, NULL);
}
