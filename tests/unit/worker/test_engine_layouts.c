/* The same tokens and row hashes on every layout: engines of one replica in this process over
 * inproc links (NUMERICS, "Proof"). Model: a tiny random Llama of each weight type made by
 * gguf_builder; test_engine_matrix.c has the real one. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "kernels/kernels.h"
#include "tests/unit/worker/engine_runs.h"

#include <glib/gstdio.h>
#include <string.h>
#include <unistd.h>

static const uint32_t PROMPT[] = {1,  17,  5,   99, 23,  4,  250, 31, 77, 8,  140, 63, 2,  201,
                                  19, 55,  180, 9,  12,  33, 47,  81, 3,  66, 111, 90, 14, 28,
                                  7,  222, 35,  51, 160, 44, 13,  70, 6,  39, 25,  101};
enum { N_PROMPT = G_N_ELEMENTS(PROMPT), N_TOKENS = 24 };

static LocalReplica *replica(const Gguf *g, LocalLayout layout)
{
    g_autoptr(GError) error = NULL;
    LocalReplica *r = local_replica_new(g, &layout, NULL, &error);
    if (r == NULL) {
        fail_msg("%s", error->message);
    }
    return r;
}

static void greedy(const Gguf *g, LocalLayout layout, LocalResult *result)
{
    LocalReplica *r = replica(g, layout);
    local_replica_greedy(r, PROMPT, N_PROMPT, N_TOKENS, result);
    if (result->error != NULL) {
        fail_msg("%s", result->error);
    }
    local_replica_free(r);
}

static void assert_same(const LocalResult *a, const LocalResult *b)
{
    assert_int_equal(a->n, b->n);
    assert_memory_equal(a->ids, b->ids, sizeof(uint32_t) * a->n);
    assert_memory_equal(a->logprobs, b->logprobs, sizeof(float) * a->n);
    assert_memory_equal(a->hashes, b->hashes, 16 * (size_t)a->n);
}

static const double UNEVEN[] = {1.0, 2.6, 0.7, 1.3};

static const LocalLayout LAYOUTS[] = {
    {.pp = 1, .tp = {1}, .threads = 2},
    {.pp = 1, .tp = {2}},
    {.pp = 1, .tp = {3}},
    {.pp = 1, .tp = {4}, .weight = UNEVEN},
    {.pp = 2, .tp = {1, 1}},
    {.pp = 3, .tp = {1, 1, 1}},
    {.pp = 2, .tp = {2, 1}},
    {.pp = 2, .tp = {1, 3}, .weight = UNEVEN},
    {.pp = 2, .tp = {3, 2}, .weight = UNEVEN, .threads = 2},
    {.pp = 1, .tp = {1}, .max_rows = 1},
    {.pp = 2, .tp = {1, 1}, .max_rows = 7},
    {.pp = 1, .tp = {2}, .max_rows = 3, .plain = true},
};

static void check_layouts(Dtype type, int isa, unsigned n_layouts)
{
    g_autoptr(Gguf) g = runs_awkward_model(type);
    LocalResult alone, other;
    greedy(g, (LocalLayout){.pp = 1, .tp = {1}, .isa = isa}, &alone);
    assert_int_equal(alone.n, N_TOKENS);
    for (unsigned i = 0; i < n_layouts; i++) {
        LocalLayout layout = LAYOUTS[i];
        layout.isa = isa;
        greedy(g, layout, &other);
        assert_same(&alone, &other);
        local_result_clear(&other);
    }
    local_result_clear(&alone);
}

static void test_f32_layouts(void **state)
{
    check_layouts(DTYPE_F32, ISA_GENERIC, G_N_ELEMENTS(LAYOUTS));
}

static void test_q4_1_layouts(void **state)
{
    check_layouts(DTYPE_Q4_1, kernels_best_isa(), G_N_ELEMENTS(LAYOUTS));
}

static void test_other_types(void **state)
{
    static const Dtype types[] = {DTYPE_F16,  DTYPE_BF16, DTYPE_Q8_0,
                                  DTYPE_Q4_0, DTYPE_Q5_0, DTYPE_Q5_1};
    for (unsigned i = 0; i < G_N_ELEMENTS(types); i++) {
        check_layouts(types[i], kernels_best_isa(), 6);
    }
}

static void test_instruction_sets(void **state)
{
    static const Dtype types[] = {DTYPE_F32,  DTYPE_F16,  DTYPE_BF16, DTYPE_Q8_0,
                                  DTYPE_Q4_0, DTYPE_Q4_1, DTYPE_Q5_0, DTYPE_Q5_1};
    for (unsigned i = 0; i < G_N_ELEMENTS(types); i++) {
        g_autoptr(Gguf) g = runs_awkward_model(types[i]);
        LocalResult specification, fast;
        greedy(g, (LocalLayout){.pp = 1, .tp = {1}, .isa = ISA_GENERIC}, &specification);
        for (int isa = ISA_AVX2; isa <= (int)kernels_best_isa(); isa++) {
            greedy(g, (LocalLayout){.pp = 1, .tp = {2}, .isa = isa}, &fast);
            assert_same(&specification, &fast);
            local_result_clear(&fast);
        }
        local_result_clear(&specification);
    }
}

/* Neighbours in the batch, other slots and other pages change nothing. */
static void test_neighbours(void **state)
{
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_Q8_0);
    LocalReplica *r =
        replica(g, (LocalLayout){.pp = 2, .tp = {2, 1}, .max_rows = 16, .isa = kernels_best_isa()});
    EngineRequest requests[4];
    LocalResult alone[4], together[4];
    for (uint32_t i = 0; i < 4; i++) {
        requests[i] = (EngineRequest){
            .prompt = PROMPT + 3 * i, .n_prompt = N_PROMPT - 7 * i, .max_tokens = 10 + 3 * i};
        if (i >= 2) {
            requests[i].temperature = 0.8f;
            requests[i].top_p = i == 3 ? 0.9f : 0.0f;
            requests[i].seed = 1000 + i;
            requests[i].repeat_penalty = 1.1f;
            requests[i].penalty_window = 64;
        }
        local_replica_run(r, &requests[i], 1, &alone[i]);
    }
    local_replica_run(r, requests, 4, together);
    for (unsigned i = 0; i < 4; i++) {
        assert_same(&alone[i], &together[i]);
        local_result_clear(&alone[i]);
        local_result_clear(&together[i]);
    }
    local_replica_free(r);
}

static void test_sampled_layouts(void **state)
{
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_Q8_0);
    static const EngineRequest base = {
        .prompt = PROMPT, .n_prompt = N_PROMPT, .max_tokens = 20, .temperature = 1.3f, .seed = 7};
    EngineRequest requests[4] = {base, base, base, base};
    requests[1].top_k = 40;
    requests[2].top_p = 0.97f;
    requests[3].min_p = 0.02f;
    requests[3].top_logprobs = 5;
    LocalResult alone[4], other[4];
    LocalReplica *one = replica(g, (LocalLayout){.pp = 1, .tp = {1}, .isa = kernels_best_isa()});
    LocalReplica *many =
        replica(g, (LocalLayout){.pp = 2, .tp = {1, 3}, .isa = kernels_best_isa()});
    local_replica_run(one, requests, 4, alone);
    local_replica_run(many, requests, 4, other);
    for (unsigned i = 0; i < 4; i++) {
        assert_null(alone[i].error);
        assert_same(&alone[i], &other[i]);
        assert_int_equal(alone[i].n, 20);
    }
    assert_memory_not_equal(alone[0].ids, alone[2].ids, 20 * sizeof(uint32_t));
    for (unsigned i = 0; i < 4; i++) {
        local_result_clear(&alone[i]);
        local_result_clear(&other[i]);
    }
    local_replica_free(one);
    local_replica_free(many);
}

/* Going on from generated ids gives what the undisturbed run gave. */
static void test_resumed(void **state)
{
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_Q8_0);
    LocalReplica *r = replica(g, (LocalLayout){.pp = 1, .tp = {2}, .isa = kernels_best_isa()});
    EngineRequest whole = {.prompt = PROMPT,
                           .n_prompt = N_PROMPT,
                           .max_tokens = 20,
                           .temperature = 1.0f,
                           .seed = 3,
                           .repeat_penalty = 1.2f,
                           .penalty_window = 16};
    LocalResult undisturbed, rest;
    local_replica_run(r, &whole, 1, &undisturbed);
    EngineRequest resumed = whole;
    resumed.generated = undisturbed.ids;
    resumed.n_generated = 9;
    local_replica_run(r, &resumed, 1, &rest);
    assert_int_equal(rest.n, 11);
    assert_memory_equal(rest.ids, undisturbed.ids + 9, 11 * sizeof(uint32_t));
    assert_memory_equal(rest.hashes, undisturbed.hashes + 9, 11 * 16);
    local_result_clear(&undisturbed);
    local_result_clear(&rest);
    local_replica_free(r);
}

/* Scoring gives the logprobs that sampling saw. */
static void test_score(void **state)
{
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_F16);
    LocalReplica *r =
        replica(g, (LocalLayout){.pp = 2, .tp = {1, 2}, .isa = kernels_best_isa(), .max_rows = 32});
    LocalResult drawn, scored;
    local_replica_greedy(r, PROMPT, N_PROMPT, 12, &drawn);
    uint32_t text[N_PROMPT + 12];
    memcpy(text, PROMPT, sizeof PROMPT);
    memcpy(text + N_PROMPT, drawn.ids, 12 * sizeof(uint32_t));
    const EngineRequest score = {
        .kind = 1, .prompt = text, .n_prompt = N_PROMPT + 12, .score_from = N_PROMPT};
    local_replica_run(r, &score, 1, &scored);
    assert_int_equal(scored.n, 12);
    assert_memory_equal(scored.ids, drawn.ids, 12 * sizeof(uint32_t));
    assert_memory_equal(scored.logprobs, drawn.logprobs, 12 * sizeof(float));
    local_result_clear(&drawn);
    local_result_clear(&scored);
    local_replica_free(r);
}

/* Far behind the first tokens, threads share the keys of one row by runs (kernels/ops/attention.h):
 * from the second run on, and in the middle of decoding; two sequences of different length at once.
 */
static void test_keys_shared_by_threads(void **state)
{
    enum { LONG = 1100, SHORT = 505, TOKENS = 16 };
    static const LocalLayout layouts[] = {{.pp = 1, .tp = {1}},
                                          {.pp = 1, .tp = {1}, .threads = 2},
                                          {.pp = 1, .tp = {2}, .threads = 3}};
    uint32_t prompt[LONG];
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_Q4_1);
    LocalResult first[2], other[2];
    for (uint32_t i = 0; i < LONG; i++) {
        prompt[i] = (i * 37 + i / 11) % 2500;
    }
    const EngineRequest requests[] = {
        {.prompt = prompt, .n_prompt = LONG, .max_tokens = TOKENS},
        {.prompt = prompt + 7, .n_prompt = SHORT, .max_tokens = TOKENS}};
    for (unsigned i = 0; i < G_N_ELEMENTS(layouts); i++) {
        LocalLayout layout = layouts[i];
        layout.isa = kernels_best_isa();
        layout.context = 2048;
        LocalReplica *r = replica(g, layout);
        local_replica_run(r, requests, 2, i == 0 ? first : other);
        local_replica_free(r);
        for (unsigned j = 0; i > 0 && j < 2; j++) {
            assert_int_equal(other[j].n, TOKENS);
            assert_same(&first[j], &other[j]);
            local_result_clear(&other[j]);
        }
    }
    local_result_clear(&first[0]);
    local_result_clear(&first[1]);
}

static void test_bad_requests(void **state)
{
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_Q8_0);
    LocalReplica *r =
        replica(g, (LocalLayout){.pp = 1, .tp = {1}, .isa = kernels_best_isa(), .context = 64});
    uint32_t too_long[65] = {0};
    LocalResult result;
    const EngineRequest requests[] = {{.prompt = too_long, .n_prompt = 65, .max_tokens = 1},
                                      {.prompt = too_long, .n_prompt = 0, .max_tokens = 1}};
    for (unsigned i = 0; i < G_N_ELEMENTS(requests); i++) {
        local_replica_run(r, &requests[i], 1, &result);
        assert_string_equal(result.finish_reason, "error");
        assert_non_null(result.error);
        local_result_clear(&result);
    }
    local_replica_greedy(r, PROMPT, 40, 100, &result); /* stops at the context */
    assert_string_equal(result.finish_reason, "length");
    assert_int_equal(result.n, 24);
    local_result_clear(&result);
    local_replica_free(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_f32_layouts),
        cmocka_unit_test(test_q4_1_layouts),
        cmocka_unit_test(test_other_types),
        cmocka_unit_test(test_instruction_sets),
        cmocka_unit_test(test_neighbours),
        cmocka_unit_test(test_sampled_layouts),
        cmocka_unit_test(test_keys_shared_by_threads),
        cmocka_unit_test(test_resumed),
        cmocka_unit_test(test_score),
        cmocka_unit_test(test_bad_requests),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
