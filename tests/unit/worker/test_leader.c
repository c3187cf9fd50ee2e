/* The leader: what it promises about requests (leader.h, scheduler.h) against a pretended replica
 * whose tokens say whether the right keys were read. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "proto/base/error.h"
#include "proto/base/random.h"
#include "tests/unit/worker/leader_world.h"

#include <string.h>

static const StepLimits LIMITS = {
    .max_rows = 48, .max_slots = 3, .max_pages = 40, .context = 256, .vocab_size = 1000};
/* ---- random mixes: each request gets what it would get alone ---- */

enum { MIX_REQUESTS = 14, MIX_PROMPT = 200 };

typedef struct Mix {
    World w;
    RandomSeeded random;
    Client clients[MIX_REQUESTS];
    EngineRequest requests[MIX_REQUESTS];
    uint32_t prompts[MIX_REQUESTS][MIX_PROMPT], generated[MIX_REQUESTS][160];
    bool cancelled[MIX_REQUESTS];
    uint32_t n_submitted;
} Mix;

static uint32_t below(Mix *m, uint32_t n)
{
    return (uint32_t)(random_u64(&m->random.base) % n);
}

/* Prompts share beginnings: each goes on like an earlier one for a while. */
static void mix_prompt(Mix *m, uint32_t i)
{
    const uint32_t n = 1 + below(m, MIX_PROMPT);
    uint32_t same = 0;
    if (i > 0 && below(m, 4) > 0) {
        const uint32_t other = below(m, i);
        same = MIN(MIN(n, m->requests[other].n_prompt), 16 * below(m, 13));
        memcpy(m->prompts[i], m->prompts[other], sizeof(uint32_t) * same);
    }
    for (uint32_t k = same; k < n; k++) {
        m->prompts[i][k] = below(m, 3);
    }
    m->requests[i].prompt = m->prompts[i];
    m->requests[i].n_prompt = n;
}

static void mix_submit(Mix *m)
{
    const uint32_t i = m->n_submitted++;
    EngineRequest *r = &m->requests[i];
    mix_prompt(m, i);
    r->max_tokens = 1 + below(m, 160);
    r->fresh = below(m, 6) == 0;
    r->cache_salt.bytes[0] = below(m, 5) == 0;
    r->share_key.bytes[0] = (uint8_t)below(m, 3);
    if (below(m, 5) == 0) {
        r->kind = 1;
        r->score_from = below(m, r->n_prompt + 1);
    } else if (below(m, 4) == 0) { /* resumed */
        r->generated = m->generated[i];
        r->n_generated = below(m, MIN(r->max_tokens, m->w.limits.context - r->n_prompt + 1));
        for (uint32_t k = 0; k < r->n_generated; k++) {
            m->generated[i][k] = below(m, 1000);
        }
    }
    world_submit(&m->w, i, r, &m->clients[i]);
}

static void mix_check(Mix *m)
{
    for (uint32_t i = 0; i < MIX_REQUESTS; i++) {
        const EngineRequest *r = &m->requests[i];
        Client *c = &m->clients[i];
        world_drain(&m->w, c);
        if (m->cancelled[i] && strcmp(c->reason, "cancelled") == 0) {
            if (r->kind == 0) { /* what came until then is right */
                world_assert_tokens(&m->w, c, r, c->n);
            }
            continue;
        }
        assert_string_equal(c->reason, "length");
        if (r->kind == 1 && r->score_from < r->n_prompt && r->n_prompt > 1) {
            world_assert_scores(&m->w, c, r);
        } else if (r->kind == 0) {
            world_assert_tokens(&m->w, c, r,
                                MIN(r->max_tokens, m->w.limits.context - r->n_prompt) -
                                    r->n_generated);
        }
    }
}

static EngineLoad mix_run(uint64_t seed)
{
    Mix *m = g_new0(Mix, 1);
    random_seeded_init(&m->random, seed);
    StepLimits limits = LIMITS;
    limits.max_slots = 1 + below(m, 8);
    limits.max_rows = 1 + below(m, 100);
    limits.max_pages = 8 + below(m, 12); /* one sequence of the whole context fits */
    world_open(&m->w, &limits, limits.max_pages, 1 + below(m, 4));
    while (m->n_submitted < MIX_REQUESTS || leader_open_requests(m->w.leader) > 0) {
        const uint32_t what = below(m, 10);
        m->w.now_us += 1000 * below(m, 40);
        if (what < 2 && m->n_submitted < MIX_REQUESTS) {
            mix_submit(m);
        } else if (what == 2 && m->n_submitted > 0 && below(m, 8) == 0) {
            const uint32_t i = below(m, m->n_submitted);
            leader_cancel(m->w.leader, i);
            m->cancelled[i] = true;
        } else if (what < 6) {
            world_build(&m->w);
        } else if (!g_queue_is_empty(&m->w.flights)) {
            world_return(&m->w);
        }
    }
    world_run(&m->w);
    mix_check(m);
    const EngineLoad load = world_load(&m->w);
    assert_int_equal(load.kv_pages_used, 0); /* nothing leaks */
    assert_int_equal(load.running + load.waiting, 0);
    world_close(&m->w);
    g_free(m);
    return load;
}

static void test_mixes(void **state)
{
    uint64_t hits = 0, preemptions = 0;
    const char *more = g_getenv("WEFT_TEST_SEEDS");
    const uint64_t n = more != NULL ? g_ascii_strtoull(more, NULL, 10) : 400;
    for (uint64_t seed = 0; seed < n; seed++) {
        const EngineLoad load = mix_run(seed);
        hits += load.prefix_hit_tokens;
        preemptions += load.preemptions;
    }
    print_message("# %" G_GUINT64_FORMAT " seeds: %" G_GUINT64_FORMAT
                  " tokens from the prefix cache, %" G_GUINT64_FORMAT " preemptions\n",
                  n, hits, preemptions);
    assert_true(hits > 100 * n && preemptions > n / 4); /* the mixes are hard enough */
}

/* ---- one at a time ---- */

static void test_cancel_frees_pages(void **state)
{
    World w;
    Client a, b, c;
    const EngineRequest first = world_request(200, 56), second = world_request(40, 9);
    world_open(&w, &LIMITS, 8, 1);
    world_submit(&w, 1, &first, &a);
    world_submit(&w, 2, &second, &b);
    world_submit(&w, 3, &second, &c);
    assert_true(world_build(&w)); /* a's: 7 of 8 pages, the others wait */
    assert_int_equal(world_load(&w).waiting, 2);
    leader_cancel(w.leader, 1); /* with its first step in flight */
    leader_cancel(w.leader, 3); /* waiting */
    world_drain(&w, &a);
    world_drain(&w, &c);
    assert_string_equal(a.reason, "cancelled");
    assert_string_equal(c.reason, "cancelled");
    assert_int_equal(a.n + c.n, 0);
    assert_int_equal(world_load(&w).kv_pages_used, 0); /* at once */
    world_run(&w);                                     /* a's late results are dropped */
    world_drain(&w, &b);
    world_assert_tokens(&w, &b, &second, 9);
    world_close(&w);
}

/* A deadline ends a request that runs and one that waits, and no other. */
static void test_deadlines(void **state)
{
    World w;
    Client c[3];
    StepLimits limits = LIMITS;
    limits.max_slots = 1;
    world_open(&w, &limits, 40, 1);
    EngineRequest runs = world_request(10, 200), waits = world_request(10, 5),
                  patient = world_request(10, 5);
    runs.deadline_ms = 50;
    waits.deadline_ms = 30;
    world_submit(&w, 1, &runs, &c[0]);
    world_submit(&w, 2, &waits, &c[1]);
    world_submit(&w, 3, &patient, &c[2]);
    world_build(&w);
    world_return(&w);
    w.now_us += 29999;
    world_build(&w);
    assert_int_equal(leader_open_requests(w.leader), 3);
    w.now_us += 1;
    world_build(&w);
    assert_int_equal(leader_open_requests(w.leader), 2);
    world_drain(&w, &c[1]);
    assert_int_equal(c[1].code, WEFT_ERROR_DEADLINE);
    assert_non_null(strstr(c[1].error, "within its 30 ms (waiting, 0 tokens drawn)"));
    w.now_us += 20000;
    world_return(&w);
    world_build(&w);
    world_drain(&w, &c[0]);
    assert_int_equal(c[0].code, WEFT_ERROR_DEADLINE);
    world_assert_tokens(&w, &c[0], &runs, 2);
    world_run(&w);
    world_drain(&w, &c[2]);
    world_assert_tokens(&w, &c[2], &patient, 5);
    world_close(&w);
}

/* Pages run out while two decode: the younger waits, is computed anew, and tells no token twice. */
static void test_preemption(void **state)
{
    World w;
    Client a, b;
    uint32_t other[60];
    for (unsigned i = 0; i < 60; i++) {
        other[i] = 7;
    }
    const EngineRequest old = world_request(60, 100),
                        young = {.prompt = other, .n_prompt = 60, .max_tokens = 100};
    world_open(&w, &LIMITS, 7, 1); /* each needs 5 in the end */
    world_submit(&w, 1, &old, &a);
    world_submit(&w, 2, &young, &b);
    world_run(&w);
    world_drain(&w, &a);
    world_drain(&w, &b);
    world_assert_tokens(&w, &a, &old, 100);
    world_assert_tokens(&w, &b, &young, 100);
    assert_true(world_load(&w).preemptions > 0);
    assert_int_equal(world_load(&w).prompt_tokens, 120); /* once each */
    assert_int_equal(world_load(&w).generation_tokens, 200);
    world_close(&w);
}

/* ---- the prefix cache ---- */

static void test_prefixes_are_computed_once(void **state)
{
    World w;
    Client c[6];
    EngineRequest r = world_request(160, 3);
    StepLimits limits = LIMITS;
    limits.max_slots = 6;
    world_open(&w, &limits, 40, 1);
    for (uint32_t i = 0; i < 4; i++) { /* choices of one prompt, all at once */
        r.choice = i;
        world_submit(&w, i, &r, &c[i]);
    }
    world_run(&w);
    /* 160 rows by whoever came first, the last of them again by each, 2 further tokens each */
    assert_in_range(fake_replica_rows(w.replica), 160 + 4 * 2, 160 + 3 * 33 + 4 * 2);
    assert_true(world_load(&w).prefix_hit_tokens >= 3 * 128);
    uint32_t before = fake_replica_rows(w.replica);
    world_submit(&w, 4, &r, &c[4]); /* later: found, but for the row of the last token */
    world_run(&w);
    assert_int_equal(fake_replica_rows(w.replica) - before, 1 + 2);
    before = fake_replica_rows(w.replica);
    r.fresh = true;
    world_submit(&w, 5, &r, &c[5]);
    world_run(&w);
    assert_int_equal(fake_replica_rows(w.replica) - before, 160 + 2);
    for (uint32_t i = 0; i < 6; i++) {
        world_drain(&w, &c[i]);
        world_assert_tokens(&w, &c[i], &r, 3);
    }
    world_close(&w);
}

/* Another salt shares nothing; a text that was scored serves one that is generated; the oldest
 * prefix goes first when pages are wanted. */
static void test_isolation_and_eviction(void **state)
{
    World w;
    Client c;
    uint32_t other[250];
    for (unsigned i = 0; i < 250; i++) {
        other[i] = 5;
    }
    EngineRequest r = world_request(100, 1),
                  big = {.prompt = other, .n_prompt = 250, .max_tokens = 1},
                  scored = world_request(100, 0);
    world_open(&w, &LIMITS, 10, 1);
    scored.kind = 1;
    world_submit(&w, 1, &scored, &c);
    world_run(&w);
    world_drain(&w, &c);
    world_assert_scores(&w, &c, &scored);
    assert_int_equal(world_load(&w).kv_pages_cached, 3 + 1); /* the last is not full */
    world_submit(&w, 2, &r, &c);
    world_run(&w);
    world_drain(&w, &c);
    assert_int_equal(world_load(&w).prefix_hit_tokens, 99);
    r.cache_salt.bytes[3] = 1;
    world_submit(&w, 3, &r, &c);
    world_run(&w);
    world_drain(&w, &c);
    world_assert_tokens(&w, &c, &r, 1);
    assert_int_equal(world_load(&w).prefix_hit_tokens, 99);
    assert_int_equal(world_load(&w).kv_pages_cached, 3 + 2 + 4);
    world_submit(&w, 4, &big, &c); /* 8 pages, 1 free: the seven oldest go */
    world_run(&w);
    world_drain(&w, &c);
    world_assert_tokens(&w, &c, &big, 1);
    world_submit(&w, 5, &r, &c); /* the salted ones are newer: two of their three are left */
    world_run(&w);
    world_drain(&w, &c);
    assert_int_equal(world_load(&w).prefix_hit_tokens, 99 + 64);
    world_close(&w);
}

/* ---- order and pace ---- */

/* The prompts that are read at once take turns; admission keeps the order of submission. */
static void test_fair_order(void **state)
{
    World w;
    Client c[5];
    uint32_t texts[5][200], turns[3] = {0};
    EngineRequest r[5];
    StepLimits limits = LIMITS;
    limits.max_rows = 32;
    world_open(&w, &limits, 40, 1);
    for (uint32_t i = 0; i < 5; i++) {
        for (unsigned k = 0; k < 200; k++) {
            texts[i][k] = 10 + i;
        }
        r[i] = (EngineRequest){.prompt = texts[i], .n_prompt = 192, .max_tokens = 2};
        world_submit(&w, i, &r[i], &c[i]);
    }
    for (unsigned step = 0; step < 9; step++) { /* three slots, each a chunk in each round */
        assert_true(world_build(&w));
        assert_int_equal(w.step->n_segments, 1);
        turns[w.step->segments[0].slot]++;
        assert_int_equal(turns[w.step->segments[0].slot], 1 + step / 3);
        world_return(&w);
    }
    uint32_t n_ended = 0;
    while (leader_open_requests(w.leader) > 0) {
        assert_true(world_build(&w));
        for (uint32_t i = 0; i < w.step->n_admits; i++) { /* 4 never before 3 */
            const uint32_t first =
                w.step->rows[w.step->segments[w.step->n_segments - 1].row0].token;
            assert_true(first != 14 || leader_open_requests(w.leader) < 4);
        }
        world_return(&w);
        n_ended++;
    }
    for (uint32_t i = 0; i < 5; i++) {
        world_drain(&w, &c[i]);
        world_assert_tokens(&w, &c[i], &r[i], 2);
    }
    world_close(&w);
}

/* S stages, n decoding sequences: with S steps in flight, each of ceil(n / S) rows, no stage waits.
 * The pipeline is simulated: stage k works on a step in the tick after stage k - 1 did. */
static void test_no_stage_idles(void **state)
{
    for (uint32_t n_stages = 2; n_stages <= 4; n_stages++) {
        World w;
        Client c[8];
        StepLimits limits = LIMITS;
        limits.max_slots = 8;
        world_open(&w, &limits, 40, n_stages);
        const EngineRequest r = world_request(5, 60);
        for (uint32_t i = 0; i < 8; i++) {
            world_submit(&w, i, &r, &c[i]);
        }
        uint32_t busy = 0, ticks = 0, at_stage[4] = {0}; /* rows at each stage */
        while (leader_open_requests(w.leader) == 8) {
            if (at_stage[n_stages - 1] > 0) {
                world_return(&w);
            }
            memmove(at_stage + 1, at_stage, sizeof(uint32_t) * (n_stages - 1));
            at_stage[0] = world_build(&w) ? w.step->n_rows : 0;
            if (ticks++ >= 40) {
                for (uint32_t k = 0; k < n_stages; k++) {
                    busy += at_stage[k] > 0;
                    assert_true(at_stage[k] <= (8 + n_stages - 1) / n_stages);
                }
            }
        }
        assert_true(ticks > 100);
        assert_true(busy >= (ticks - 41) * n_stages * 99 / 100);
        world_run(&w);
        for (uint32_t i = 0; i < 8; i++) {
            world_drain(&w, &c[i]);
            world_assert_tokens(&w, &c[i], &r, 60);
        }
        world_close(&w);
    }
}

/* Four stages that find CPUs for two: two steps of half the sequences, and no third beside them. */
static void test_stages_that_share_cpus(void **state)
{
    World w;
    Client c[8];
    StepLimits limits = LIMITS;
    limits.max_slots = 8;
    world_open(&w, &limits, 40, 4);
    leader_set_stages_at_once(w.leader, 2);
    const EngineRequest r = world_request(5, 60);
    for (uint32_t i = 0; i < 8; i++) {
        world_submit(&w, i, &r, &c[i]);
    }
    for (uint32_t i = 0; i < 40; i++) { /* the prompts, and the order of the first steps */
        while (world_build(&w)) {
        }
        world_return(&w);
    }
    for (uint32_t i = 0; i < 40; i++) {
        while (world_build(&w)) {
            assert_int_equal(w.step->n_rows, 4);
        }
        assert_int_equal(leader_steps_in_flight(w.leader), 2);
        world_return(&w);
    }
    world_run(&w);
    for (uint32_t i = 0; i < 8; i++) {
        world_drain(&w, &c[i]);
        world_assert_tokens(&w, &c[i], &r, 60);
    }
    world_close(&w);
}

enum { PROMPT = 1024 };

/* Of a prompt alone: the time, in rows, until the last stage has done it, where a row takes each
 * stage the same. */
static uint32_t prompt_time(World *w, uint32_t n_stages, uint32_t prompt)
{
    uint32_t done_at[4] = {0}; /* by stage */
    for (uint32_t n_rows = 0; n_rows < prompt;) {
        if (leader_steps_in_flight(w->leader) == (n_stages == 1 ? 1 : n_stages + 1)) {
            world_return(w);
        }
        assert_true(world_build(w));
        n_rows += w->step->n_rows;
        for (uint32_t k = 0, start = 0; k < n_stages; k++) {
            done_at[k] = MAX(start, done_at[k]) + w->step->n_rows;
            start = done_at[k];
        }
    }
    return done_at[n_stages - 1];
}

/* A prompt is cut so that the stages work on it together: in steps of a page, or of half a page
 * where it is short. */
static void test_prompts_fill_the_pipeline(void **state)
{
    static const struct {
        uint32_t prompt, longest_step;
    } cases[] = {{PROMPT, KV_BLOCK}, {256, KV_BLOCK}, {100, KV_BLOCK / 2}};
    StepLimits limits = LIMITS;
    limits.max_rows = 512;
    limits.context = 2 * PROMPT;
    limits.max_pages = 2 * PROMPT / KV_BLOCK;
    for (uint32_t i = 0; i < 4 * G_N_ELEMENTS(cases); i++) {
        const uint32_t n_stages = 1 + i % 4, prompt = cases[i / 4].prompt,
                       most = n_stages == 2 ? cases[i / 4].longest_step : KV_BLOCK;
        World w;
        Client c;
        world_open(&w, &limits, limits.max_pages, n_stages);
        const EngineRequest r = world_request(prompt, 2);
        world_submit(&w, 0, &r, &c);
        const uint32_t time = prompt_time(&w, n_stages, prompt);
        assert_true(time >= prompt);
        assert_true(time <= prompt + (n_stages - 1) * most);
        world_run(&w);
        world_drain(&w, &c);
        world_assert_tokens(&w, &c, &r, 2);
        world_close(&w);
    }
}

static void test_failure_ends_everything(void **state)
{
    World w;
    Client c[5];
    const EngineRequest r = world_request(10, 10);
    g_autoptr(GError) why =
        g_error_new_literal(WEFT_ERROR, WEFT_ERROR_WORKER_LOST, "worker b lost during x");
    world_open(&w, &LIMITS, 40, 2);
    for (unsigned i = 0; i < 5; i++) {
        world_submit(&w, i, &r, &c[i]); /* three run, two wait */
    }
    assert_true(world_build(&w));
    leader_fail(w.leader, why);
    for (unsigned i = 0; i < 5; i++) {
        world_drain(&w, &c[i]);
        assert_string_equal(c[i].reason, "error");
        assert_string_equal(c[i].error, "worker b lost during x");
    }
    assert_int_equal(leader_open_requests(w.leader), 0);
    world_close(&w);
}

/* Logits that are not finite end that request; what it computed serves nobody. */
static void test_a_failed_row_is_not_shared(void **state)
{
    World w;
    Client a, b;
    const EngineRequest r = world_request(70, 3);
    world_open(&w, &LIMITS, 40, 1);
    world_submit(&w, 1, &r, &a);
    while (world_build(&w)) {
        FakeFlight *f = g_queue_peek_head(&w.flights);
        for (uint32_t i = 0; i < f->n; i++) {
            f->results[i].failed = 1;
        }
        world_return(&w);
    }
    world_drain(&w, &a);
    assert_int_equal(a.code, WEFT_ERROR_NUMERICS);
    assert_int_equal(world_load(&w).kv_pages_cached, 0);
    world_submit(&w, 2, &r, &b);
    world_run(&w);
    world_drain(&w, &b);
    world_assert_tokens(&w, &b, &r, 3);
    assert_int_equal(world_load(&w).prefix_hit_tokens, 0);
    world_close(&w);
}

static void test_refused_at_once(void **state)
{
    World w;
    Client c;
    EngineRequest r = world_request(0, 5);
    world_open(&w, &LIMITS, 7, 1);
    world_submit(&w, 1, &r, &c);
    world_drain(&w, &c);
    assert_string_equal(c.reason, "error");
    r = world_request(256, 5);
    world_submit(&w, 2, &r, &c); /* the context is full: 8 pages */
    world_drain(&w, &c);
    assert_int_equal(c.code, WEFT_ERROR_IMPOSSIBLE);
    r = world_request(5, 0);
    world_submit(&w, 3, &r, &c);
    world_drain(&w, &c);
    assert_string_equal(c.reason, "length");
    world_close(&w);
    world_open(&w, &LIMITS, 8, 1);
    r = world_request(256, 5);
    world_submit(&w, 2, &r, &c); /* nothing to draw */
    world_drain(&w, &c);
    assert_string_equal(c.reason, "length");
    world_close(&w);
}

/* A text to be scored may be given in two pieces, as a resumed request is: there is room for the
 * events of both. */
static void test_scores_prompt_and_generated(void **state)
{
    World w;
    Client c;
    world_open(&w, &LIMITS, 40, 1);
    const uint32_t prompt[] = {1, 2}, generated[] = {3, 4, 5, 6, 7, 8, 9};
    const EngineRequest r = {
        .kind = 1, .prompt = prompt, .n_prompt = 2, .generated = generated, .n_generated = 7};
    world_submit(&w, 1, &r, &c);
    world_run(&w);
    world_drain(&w, &c);
    assert_string_equal(c.reason, "length");
    assert_int_equal(c.n, 8);
    for (uint32_t i = 0; i < c.n; i++) {
        assert_int_equal(c.ids[i], i + 2);
        assert_int_equal(c.positions[i], i + 1);
    }
    world_close(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_mixes),
        cmocka_unit_test(test_cancel_frees_pages),
        cmocka_unit_test(test_deadlines),
        cmocka_unit_test(test_preemption),
        cmocka_unit_test(test_prefixes_are_computed_once),
        cmocka_unit_test(test_isolation_and_eviction),
        cmocka_unit_test(test_fair_order),
        cmocka_unit_test(test_no_stage_idles),
        cmocka_unit_test(test_stages_that_share_cpus),
        cmocka_unit_test(test_prompts_fill_the_pipeline),
        cmocka_unit_test(test_a_failed_row_is_not_shared),
        cmocka_unit_test(test_failure_ends_everything),
        cmocka_unit_test(test_refused_at_once),
        cmocka_unit_test(test_scores_prompt_and_generated),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
