/* What a long prompt adds to the time between two tokens of the others (worker/serve/step_pace.h),
 * in virtual time under models of what a step costs. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "proto/base/random.h"
#include "tests/unit/worker/leader_world.h"
#include "worker/serve/step_pace.h"

enum { CONTEXT = 2048, N_STREAMS = 8, LONGEST = 1500, SLOTS = 12 };
static const StepLimits LIMITS = {.max_rows = 512,
                                  .max_slots = SLOTS,
                                  .max_pages = SLOTS * CONTEXT / 32,
                                  .context = CONTEXT,
                                  .vocab_size = 1000};

/* Of a step: once, of each row, and of a row for each position that it looks at. A step of few rows
 * reads the weights as one of many does: it takes at least `least`. */
typedef struct Cost {
    double fixed_us, least_us, row_us, position_us;
} Cost;

static double rows_us(const Cost *c, uint32_t n_rows, double positions)
{
    return c->fixed_us + MAX(c->least_us, c->row_us * n_rows) + c->position_us * positions;
}

typedef struct Road {
    World w;
    Cost cost;
    double added_us; /* the most that prompts added to a step with decoding rows */
    double bound_us; /* the least that it may be by the header, over these steps */
    uint32_t n_shared, n_prompt_rows;
} Road;

/* A step there and back in virtual time; prompts are those segments that are not one row at the end
 * of what is known, which the step's order tells: decoding rows come first. */
static bool go(Road *r, uint32_t n_decoding)
{
    if (!world_build(&r->w)) {
        return false;
    }
    const Step *s = r->w.step;
    double all = 0, decoding = 0, prompts = 0;
    uint32_t n_prompt = 0;
    for (uint32_t i = 0; i < s->n_segments; i++) {
        const StepSegment *g = &s->segments[i];
        const double positions = g->n_rows * (g->position + (g->n_rows + 1) / 2.0);
        all += positions;
        if (i < n_decoding) {
            assert_int_equal(g->n_rows, 1);
            decoding += positions;
        } else {
            n_prompt += g->n_rows;
            prompts += positions;
        }
    }
    const double took = rows_us(&r->cost, s->n_rows, all);
    if (n_decoding > 0 && n_prompt > 0) {
        const double added = took - rows_us(&r->cost, n_decoding, decoding),
                     row = r->cost.row_us + r->cost.position_us * prompts / n_prompt;
        const double bound = MAX(PACE_ADDED_US, PACE_LEAST_ROWS * row);
        if (added > bound) {
            fail_msg("%u rows beside %u: %.0f us added, at most %.0f", n_prompt, n_decoding, added,
                     bound);
        }
        r->added_us = MAX(r->added_us, added);
        r->n_shared++;
        r->n_prompt_rows += n_prompt;
    }
    r->w.now_us += (int64_t)took;
    world_return(&r->w);
    return true;
}

/* n streams decode; prompts of random lengths come one after another, each of one token. */
static void drive(Road *r, uint64_t seed, uint32_t n_streams)
{
    static uint32_t text[LONGEST + N_STREAMS];
    Client *clients = g_new0(Client, N_STREAMS + 1);
    RandomSeeded random;
    random_seeded_init(&random, seed);
    world_open(&r->w, &LIMITS, LIMITS.max_pages, 1);
    for (uint32_t i = 0; i < n_streams; i++) {
        EngineRequest talk = world_request(4 + i, 480);
        talk.fresh = true;
        world_submit(&r->w, 1 + i, &talk, &clients[i]);
    }
    for (uint32_t i = 0; i < 3 + 6; i++) { /* all of them decode */
        assert_true(go(r, i == 0 ? 0 : n_streams));
    }
    for (uint32_t i = 0; i < 3; i++) {
        const EngineRequest reads = {
            .prompt = text,
            .n_prompt = 200 + (uint32_t)(random_u64(&random.base) % (LONGEST - 200)),
            .max_tokens = 1,
            .fresh = true};
        world_submit(&r->w, 100 + i, &reads, &clients[N_STREAMS]);
        while (leader_open_requests(r->w.leader) > n_streams && clients[0].n < 400) {
            assert_true(go(r, n_streams));
        }
        world_drain(&r->w, &clients[N_STREAMS]);
    }
    for (uint32_t i = 0; i < n_streams; i++) {
        leader_cancel(r->w.leader, 1 + i);
    }
    world_run(&r->w);
    for (uint32_t i = 0; i < n_streams; i++) {
        world_drain(&r->w, &clients[i]);
    }
    world_close(&r->w);
    g_free(clients);
}

/* Machines and models from a hundredth of a millisecond to many milliseconds a row; attention that
 * makes a prompt's last rows several times as dear as its first. */
static void test_the_bound_is_kept(void **state)
{
    static const Cost costs[] = {
        {0, 0, 2400, 0},    {2000, 8000, 900, 0.5},   {500, 3000, 30, 0.02}, {100, 200, 10, 0.03},
        {5000, 0, 1000, 2}, {20000, 60000, 9000, 10}, {0, 40000, 2500, 1.5}, {100, 5000, 400, 1},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(costs); i++) {
        for (uint32_t n_streams = 1; n_streams <= N_STREAMS; n_streams *= 2) {
            Road *r = g_new0(Road, 1);
            r->cost = costs[i];
            drive(r, i, n_streams);
            assert_true(r->n_shared > 3);
            g_free(r);
        }
    }
}

/* The time that it may add is used: a prompt is not read in crumbs. */
static void test_the_bound_is_used(void **state)
{
    Road *r = g_new0(Road, 1);
    r->cost = (Cost){500, 3000, 200, 0.05};
    drive(r, 1, 4);
    assert_true(r->added_us > PACE_ADDED_US / 2);
    assert_true(r->n_prompt_rows / r->n_shared > 0.5 * PACE_ADDED_US / 300);
    g_free(r);
}

static void test_pace(void **state)
{
    StepPace pace = {0};
    assert_int_equal(step_pace_chunk(&pace, 1), PACE_LEAST_ROWS);
    step_pace_note(&pace, 4, 0, 0, 10000);
    assert_int_equal(step_pace_chunk(&pace, 1), PACE_LEAST_ROWS); /* nothing of prompts yet */
    step_pace_note(&pace, 4, 96, 10000, 110000); /* 1000 us over all, 937 beside the four */
    assert_int_equal(step_pace_chunk(&pace, 1), 37);
    assert_int_equal(step_pace_chunk(&pace, 2), 18);
    step_pace_note(&pace, 2, 12, 110000, 140000); /* 2142 us: dearer counts at once */
    assert_int_equal(step_pace_chunk(&pace, 1), 17);
    step_pace_note(&pace, 0, 100, 140000, 160000); /* 200 us: cheaper by a quarter, 1657 us */
    assert_int_equal(step_pace_chunk(&pace, 1), 22);
    step_pace_note(&pace, 0, 100, 150000, 190000); /* 300 us: counted from the result before */
    assert_int_equal(step_pace_chunk(&pace, 1), 28);
    step_pace_note(&pace, 0, 7, 190000, 290000); /* too few rows to say anything */
    assert_int_equal(step_pace_chunk(&pace, 1), 28);
    step_pace_note(&pace, 0, 100, 290000, 1290000); /* 10 ms a row */
    assert_int_equal(step_pace_chunk(&pace, 1), PACE_LEAST_ROWS);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_bound_is_kept),
        cmocka_unit_test(test_the_bound_is_used),
        cmocka_unit_test(test_pace),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
