/* Continuous batching on real engines: whatever runs beside it, whichever pages it shares, and
 * however often it is preempted, a request gets the ids, logprobs and row hashes that it gets alone
 * (leader.h, invariant 3), on every layout. test_leader.c walks far more schedules against a
 * pretended replica; here the arithmetic is real. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "kernels/kernels.h"
#include "proto/base/random.h"
#include "tests/unit/worker/engine_runs.h"

#include <string.h>

enum { N_REQUESTS = 10, LONGEST = 160 };

typedef struct Mix {
    EngineRequest requests[N_REQUESTS];
    uint32_t prompts[N_REQUESTS][LONGEST];
    LocalResult alone[N_REQUESTS];
} Mix;

static const SampleBias bias[] = {{7, 1.5f}, {200, -20.0f}};

static Gguf *model(ModelFamily family)
{
    GgufBuilderConfig config;
    gguf_builder_defaults(&config);
    gguf_builder_set_type(&config, DTYPE_Q8_0);
    config.width = 64;
    config.n_heads = 4;
    config.n_kv_heads = 2;
    config.head_size = 16;
    config.ffn_width = 128;
    config.vocab_size = 1200;
    config.n_layers = 3;
    config.family = family;
    return runs_model(&config);
}

static uint32_t below(RandomSeeded *random, uint32_t n)
{
    return (uint32_t)(random_u64(&random->base) % n);
}

/* Prompts that begin like others, settings whose sampler looks at the history. */
static void mix_make(Mix *m, uint64_t seed)
{
    RandomSeeded random;
    random_seeded_init(&random, seed);
    for (uint32_t i = 0; i < N_REQUESTS; i++) {
        const uint32_t n = 1 + below(&random, LONGEST), other = i > 0 ? below(&random, i) : 0,
                       same =
                           i > 0 ? MIN(MIN(n, m->requests[other].n_prompt), below(&random, LONGEST))
                                 : 0;
        for (uint32_t k = 0; k < n; k++) {
            m->prompts[i][k] = k < same ? m->prompts[other][k] : below(&random, 259);
        }
        m->requests[i] = (EngineRequest){.prompt = m->prompts[i],
                                         .n_prompt = n,
                                         .max_tokens = 1 + below(&random, 90),
                                         .seed = i};
        EngineRequest *r = &m->requests[i];
        if (i % 3 != 0) {
            r->temperature = 1.1f;
            r->top_k = i % 2 ? 50 : 0;
            r->top_p = 0.97f;
            r->repeat_penalty = 1.2f;
            r->penalty_window = 100; /* reaches into reused pages */
            r->frequency_penalty = 0.3f;
            r->bias = bias;
            r->n_bias = G_N_ELEMENTS(bias);
        }
        if (i % 5 == 4 && n > 40) {
            r->kind = 1;
            r->score_from = n / 2;
        }
    }
}

/* One after another, the prefix cache out of play. */
static void mix_alone(Mix *m, const Gguf *gguf)
{
    LocalReplica *replica = runs_replica(
        gguf, (LocalLayout){.pp = 1, .tp = {1}, .isa = kernels_best_isa(), .max_rows = 512});
    for (uint32_t i = 0; i < N_REQUESTS; i++) {
        EngineRequest r = m->requests[i];
        r.fresh = true;
        local_replica_run(replica, &r, 1, &m->alone[i]);
        assert_null(m->alone[i].error);
    }
    local_replica_free(replica);
}

static EngineLoad load_of(LocalReplica *replica)
{
    EngineStatus status;
    engine_status(local_replica_engine(replica, 0), &status);
    assert_true(status.leads);
    return status.load;
}

/* All at once, twice, so that the second round finds what the first left. */
static EngineLoad mix_together(const Mix *m, const Gguf *gguf, LocalLayout layout)
{
    LocalReplica *replica = runs_replica(gguf, layout);
    for (unsigned round = 0; round < 2; round++) {
        LocalResult results[N_REQUESTS];
        local_replica_run(replica, m->requests, N_REQUESTS, results);
        for (uint32_t i = 0; i < N_REQUESTS; i++) {
            if (results[i].error != NULL) {
                fail_msg("request %u: %s", i, results[i].error);
            }
            if (!runs_equal(&results[i], &m->alone[i])) {
                fail_msg("request %u of round %u, pp %u, %u rows a step: %u ids, %s; alone %u, %s",
                         i, round, layout.pp, layout.max_rows, results[i].n, results[i].digest,
                         m->alone[i].n, m->alone[i].digest);
            }
            local_result_clear(&results[i]);
        }
    }
    const EngineLoad load = load_of(replica);
    local_replica_free(replica);
    return load;
}

static void mixes_on_layouts(ModelFamily family, uint64_t n_seeds, uint64_t least_preemptions)
{
    const int isa = kernels_best_isa();
    const LocalLayout layouts[] = {
        {.pp = 1, .tp = {1}, .isa = isa, .streams = 10, .kv_pages = 12, .max_rows = 64},
        {.pp = 1, .tp = {2}, .isa = isa, .streams = 6, .kv_pages = 9, .max_rows = 33},
        {.pp = 2, .tp = {1, 2}, .isa = isa, .streams = 10, .kv_pages = 11, .max_rows = 48},
        {.pp = 3, .tp = {1, 1, 1}, .isa = isa, .streams = 8, .kv_pages = 10, .max_rows = 7},
        {.pp = 1, .tp = {1}, .isa = isa, .threads = 2, .streams = 3, .max_rows = 512},
    };
    g_autoptr(Gguf) gguf = model(family);
    uint64_t hits = 0, preemptions = 0;
    for (uint64_t seed = 1; seed <= n_seeds; seed++) {
        g_autofree Mix *m = g_new0(Mix, 1);
        mix_make(m, seed);
        mix_alone(m, gguf);
        for (unsigned i = 0; i < G_N_ELEMENTS(layouts); i++) {
            const EngineLoad load = mix_together(m, gguf, layouts[i]);
            hits += load.prefix_hit_tokens;
            preemptions += load.preemptions;
        }
        for (uint32_t i = 0; i < N_REQUESTS; i++) {
            local_result_clear(&m->alone[i]);
        }
    }
    print_message("# %" G_GUINT64_FORMAT " tokens from the prefix cache, %" G_GUINT64_FORMAT
                  " preemptions\n",
                  hits, preemptions);
    assert_true(hits > 500 * n_seeds && preemptions >= least_preemptions);
}

static void test_mixes_on_layouts(void **state)
{
    mixes_on_layouts(FAMILY_LLAMA, 4, 11);
}

static void test_mixes_of_gpt2(void **state)
{
    mixes_on_layouts(FAMILY_GPT2, 2, 1);
}

/* A traced request that is preempted tells each traced row once: the trace is that of an
 * undisturbed run. */
static void test_a_trace_survives_preemption(void **state)
{
    g_autoptr(Gguf) gguf = model(FAMILY_LLAMA);
    const int isa = kernels_best_isa();
    uint32_t prompt[90], other[90];
    runs_prompt(prompt, 90, 259);
    runs_prompt(other, 90, 250);
    const EngineRequest requests[2] = {
        {.prompt = other, .n_prompt = 90, .max_tokens = 80},
        {.prompt = prompt, .n_prompt = 90, .max_tokens = 80, .trace = true}};
    LocalResult alone, together[2];
    runs_request(gguf, (LocalLayout){.pp = 1, .tp = {1}, .isa = isa}, &requests[1], &alone);
    LocalReplica *replica =
        runs_replica(gguf, (LocalLayout){.pp = 2, .tp = {1, 1}, .isa = isa, .kv_pages = 9});
    local_replica_run(replica, requests, 2, together);
    assert_true(load_of(replica).preemptions > 0);
    assert_true(runs_equal(&together[1], &alone));
    assert_int_equal(together[1].trace_bytes, alone.trace_bytes);
    assert_memory_equal(together[1].trace, alone.trace, alone.trace_bytes);
    local_result_clear(&alone);
    local_result_clear(&together[0]);
    local_result_clear(&together[1]);
    local_replica_free(replica);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_mixes_on_layouts),
        cmocka_unit_test(test_mixes_of_gpt2),
        cmocka_unit_test(test_a_trace_survives_preemption),
    };
    return cmocka_run_group_tests_name("engine batching", tests, NULL, NULL);
}
