/* What the leader does at its bounds (leader.h): with nothing to do, and with too much. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "proto/base/error.h"
#include "proto/plan/logits_limits.h"
#include "tests/unit/worker/leader_world.h"

#include <string.h>

static const StepLimits LIMITS = {
    .max_rows = 48, .max_slots = 3, .max_pages = 40, .context = 256, .vocab_size = 1000};

static void assert_empty(const Step *s)
{
    assert_int_equal(s->n_rows + s->n_segments + s->n_admits + s->n_releases + s->n_pages +
                         s->n_reuses + s->n_copies + s->n_tokens + s->n_biases,
                     0);
}

/* A canary is a step of its own only when there is nothing else to do, and never more than one. */
static void test_canary(void **state)
{
    World w;
    Client c;
    world_open(&w, &LIMITS, 40, 2);
    const EngineLoad before = world_load(&w);
    assert_false(world_build(&w));
    leader_canary(w.leader);
    leader_canary(w.leader);
    assert_true(world_build(&w));
    assert_empty(w.step);
    assert_false(world_build(&w));
    assert_int_equal(leader_steps_in_flight(w.leader), 1);
    uint32_t number;
    assert_true(leader_oldest_step_us(w.leader, &number) > 0); /* it has the flight's deadline */
    world_return(&w);
    assert_int_equal(leader_steps_in_flight(w.leader), 0);
    const EngineLoad after = world_load(&w);
    assert_memory_equal(&before, &after, sizeof before);

    const EngineRequest r = world_request(70, 9);
    world_submit(&w, 1, &r, &c);
    leader_canary(w.leader);
    assert_true(world_build(&w));
    assert_true(w.step->n_rows > 0); /* the request's step is the canary */
    while (leader_open_requests(w.leader) > 0) {
        leader_canary(w.leader); /* between all of its steps */
        while (world_build(&w)) {
        }
        assert_true(leader_steps_in_flight(w.leader) <= 3);
        world_return(&w);
    }
    world_run(&w);
    world_drain(&w, &c);
    world_assert_tokens(&w, &c, &r, 9);
    world_close(&w);
}

/* ---- the queue (invariant 5) ---- */

typedef struct Crowd {
    World w;
    Client *clients;
    uint32_t n;
} Crowd;

static Client *crowd_submit(Crowd *crowd, const EngineRequest *r)
{
    Client *c = &crowd->clients[crowd->n++];
    world_submit(&crowd->w, crowd->n, r, c);
    return c;
}

static void crowd_open(Crowd *crowd, const StepLimits *limits, uint32_t n_pages, uint32_t n_clients)
{
    crowd->clients = g_new0(Client, n_clients);
    crowd->n = 0;
    world_open(&crowd->w, limits, n_pages, 1);
}

static void crowd_close(Crowd *crowd)
{
    for (uint32_t i = 0; i < crowd->n; i++) {
        world_drain(&crowd->w, &crowd->clients[i]);
    }
    world_close(&crowd->w);
    g_free(crowd->clients);
}

static void assert_full(Crowd *crowd, const EngineRequest *r)
{
    Client *c = crowd_submit(crowd, r);
    world_drain(&crowd->w, c);
    assert_string_equal(c->reason, "error");
    assert_int_equal(c->code, WEFT_ERROR_FULL);
    assert_non_null(strstr(c->error, "queue is full"));
    assert_int_equal(c->n, 0);
}

/* One too many is refused, and only that one; who was cancelled, or runs, makes room. */
static void test_queue_of_requests_is_bounded(void **state)
{
    Crowd crowd;
    const EngineRequest r = world_request(1, 2);
    const uint32_t generated = 7;
    EngineRequest resumed = r;
    resumed.generated = &generated;
    resumed.n_generated = 1;
    crowd_open(&crowd, &LIMITS, 40, LEADER_QUEUE_REQUESTS + 20);
    for (uint32_t i = 0; i < LEADER_QUEUE_REQUESTS; i++) {
        crowd_submit(&crowd, &r);
    }
    assert_full(&crowd, &r);
    Client *again = crowd_submit(&crowd, &resumed);
    leader_cancel(crowd.w.leader, 5);
    leader_cancel(crowd.w.leader, 6);
    crowd_submit(&crowd, &r);
    assert_full(&crowd, &r);
    assert_true(world_build(&crowd.w)); /* max_slots of them run */
    for (uint32_t i = 0; i < LIMITS.max_slots; i++) {
        crowd_submit(&crowd, &r);
    }
    assert_full(&crowd, &r);
    world_run(&crowd.w);
    world_drain(&crowd.w, again);
    world_assert_tokens(&crowd.w, again, &resumed, 1);
    uint32_t n_answered = 0;
    for (uint32_t i = 0; i < crowd.n; i++) {
        world_drain(&crowd.w, &crowd.clients[i]);
        n_answered += strcmp(crowd.clients[i].reason, "length") == 0;
    }
    assert_int_equal(n_answered, crowd.n - 3 - 2); /* all but the refused and the cancelled */
    crowd_submit(&crowd, &r);                      /* the queue is empty again */
    world_run(&crowd.w);
    world_drain(&crowd.w, &crowd.clients[crowd.n - 1]);
    world_assert_tokens(&crowd.w, &crowd.clients[crowd.n - 1], &r, 2);
    crowd_close(&crowd);
}

/* A preempted request was let in before: it neither fills the queue nor is it refused. */
static void test_preempted_requests_are_not_queued(void **state)
{
    Crowd crowd;
    const EngineRequest r = world_request(32, 100);
    crowd_open(&crowd, &LIMITS, 8, LEADER_QUEUE_REQUESTS + 20);
    for (uint32_t i = 0; i < 3; i++) {
        crowd_submit(&crowd, &r);
    }
    while (world_load(&crowd.w).preemptions == 0) {
        assert_true(world_build(&crowd.w));
        world_return(&crowd.w);
    }
    assert_true(world_load(&crowd.w).waiting > 0);
    const EngineRequest small = world_request(1, 1);
    for (uint32_t i = 0; i < LEADER_QUEUE_REQUESTS; i++) {
        crowd_submit(&crowd, &small);
    }
    assert_full(&crowd, &small);
    world_run(&crowd.w);
    for (uint32_t i = 0; i < 3; i++) {
        world_drain(&crowd.w, &crowd.clients[i]);
        world_assert_tokens(&crowd.w, &crowd.clients[i], &r, 100);
    }
    crowd_close(&crowd);
}

static void test_queue_of_tokens_is_bounded(void **state)
{
    enum { LONG = 1 << 18 };
    StepLimits limits = LIMITS;
    limits.context = LONG;
    limits.max_pages = LONG / 32;
    g_autofree uint32_t *prompt = g_new0(uint32_t, LONG);
    const EngineRequest r = {.prompt = prompt, .n_prompt = LONG - 8, .max_tokens = 1},
                        small = world_request(33, 1);
    Crowd crowd;
    crowd_open(&crowd, &limits, limits.max_pages, 16);
    const uint32_t n_fit = LEADER_QUEUE_TOKENS / (LONG - 8);
    for (uint32_t i = 0; i < n_fit; i++) {
        crowd_submit(&crowd, &r);
    }
    assert_full(&crowd, &r);
    assert_full(&crowd, &small);
    for (uint32_t i = 1; i <= n_fit; i++) {
        leader_cancel(crowd.w.leader, i);
    }
    crowd_submit(&crowd, &small);
    world_run(&crowd.w);
    crowd_close(&crowd);
}

/* ---- logits of a step (scheduler.h, invariant 6) ---- */

static uint32_t n_logits(const World *w)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < w->step->n_rows; i++) {
        n += w->step->rows[i].output != STEP_OUTPUT_NONE;
    }
    return n;
}

/* Five sequences whose logits are wanted, on steps that may carry three rows of them; two others
 * beside. Everyone gets what it would get alone. */
static void test_logits_of_a_step_are_bounded(void **state)
{
    enum { MOST = 3, N = 7 };
    const StepLimits limits = {.max_rows = 48,
                               .max_slots = N,
                               .max_pages = 40,
                               .context = 256,
                               .vocab_size = LOGITS_STEP_BYTES / (4 * MOST)};
    for (uint32_t n_stages = 1; n_stages <= 3; n_stages++) {
        World w;
        Client clients[N];
        EngineRequest requests[N];
        uint32_t most = 0, text[120];
        for (uint32_t i = 0; i < G_N_ELEMENTS(text); i++) {
            text[i] = i * 7 % 90;
        }
        world_open(&w, &limits, 40, n_stages);
        for (uint32_t i = 0; i < N; i++) {
            requests[i] = world_request(20 + i, 6);
            requests[i].prompt = text + i;
            requests[i].want_logits = i < 5;
            if (i < 3) { /* scored, from the middle on or as a whole */
                requests[i].kind = 1;
                requests[i].max_tokens = 0;
                requests[i].n_prompt = 60;
                requests[i].score_from = i == 0 ? 1 : 40;
            }
            world_submit(&w, i + 1, &requests[i], &clients[i]);
        }
        for (unsigned turn = 0; leader_open_requests(w.leader) > 0; turn++) {
            assert_true(turn < 1000);
            while (world_build(&w)) {
                const uint32_t n = n_logits(&w), beside = 2;
                assert_true(n <= MOST + beside);
                most = MAX(most, n);
            }
            assert_false(g_queue_is_empty(&w.flights));
            world_return(&w);
        }
        assert_true(most >= MOST); /* what may go goes */
        world_run(&w);
        for (uint32_t i = 0; i < N; i++) {
            world_drain(&w, &clients[i]);
            if (i < 3) {
                world_assert_scores(&w, &clients[i], &requests[i]);
            } else {
                world_assert_tokens(&w, &clients[i], &requests[i], 6);
            }
        }
        world_close(&w);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_canary),
        cmocka_unit_test(test_queue_of_requests_is_bounded),
        cmocka_unit_test(test_preempted_requests_are_not_queued),
        cmocka_unit_test(test_queue_of_tokens_is_bounded),
        cmocka_unit_test(test_logits_of_a_step_are_bounded),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
