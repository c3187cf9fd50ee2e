/* The leader's bookkeeping (leader.h, invariants 1-4) against a pretended replica, and the Step's
 * wire form against hostile bytes. The replica's next token is a function of the sequence's uid and
 * position, so what a request must get is known. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "proto/base/error.h"
#include "proto/base/random.h"
#include "transport/daemon/daemon.h"
#include "worker/serve/leader.h"

#include <string.h>

static const StepLimits LIMITS = {
    .max_rows = 48, .max_slots = 3, .max_pages = 40, .context = 256, .vocab_size = 1000};

typedef struct Client {
    uint32_t ids[512], positions[512], n, n_done;
    char reason[16], error[200];
} Client;

static void on_token(const EngineToken *t, void *user)
{
    Client *c = user;
    assert_int_equal(c->n_done, 0); /* invariant 4: done is the last event */
    if (t->done) {
        c->n_done++;
        g_strlcpy(c->reason, t->finish_reason, sizeof c->reason);
        g_strlcpy(c->error, t->error != NULL ? t->error->message : "", sizeof c->error);
        return;
    }
    c->ids[c->n] = t->id;
    c->positions[c->n++] = t->position;
}

static uint64_t no_bytes(void *user)
{
    return 0;
}

static uint32_t next_id(uint32_t position, uint32_t n_prompt)
{
    return (position * 31 + n_prompt * 7) % LIMITS.vocab_size;
}

/* What every rank knows, kept from Steps alone; checks invariants 1-3 as steps come. */
typedef struct Mirror {
    bool used[3], page_used[40];
    uint64_t uid[3];
    uint32_t n_prompt[3], n_rows[3], pages[3][8], n_pages[3];
} Mirror;

static void mirror_release(Mirror *m, const Step *s)
{
    for (uint32_t i = 0; i < s->n_releases; i++) {
        const uint32_t slot = s->releases[i];
        assert_true(m->used[slot]);
        m->used[slot] = false;
        for (uint32_t k = 0; k < m->n_pages[slot]; k++) {
            m->page_used[m->pages[slot][k]] = false;
        }
    }
}

static void mirror_apply(Mirror *m, const Step *s)
{
    mirror_release(m, s);
    for (uint32_t i = 0; i < s->n_admits; i++) {
        const StepAdmit *a = &s->admits[i];
        assert_false(m->used[a->slot]); /* invariant 3 */
        m->used[a->slot] = true;
        m->uid[a->slot] = a->uid;
        m->n_prompt[a->slot] = a->n_prompt;
        m->n_rows[a->slot] = m->n_pages[a->slot] = 0;
    }
    for (uint32_t i = 0; i < s->n_segments; i++) {
        const StepSegment *g = &s->segments[i];
        assert_true(m->used[g->slot]);
        assert_int_equal(g->position, m->n_rows[g->slot]); /* invariant 1 */
        assert_int_equal(g->page_index, m->n_pages[g->slot]);
        m->n_rows[g->slot] += g->n_rows;
        for (uint32_t k = 0; k < g->n_pages; k++) {
            const uint32_t page = s->pages[g->page0 + k];
            assert_false(m->page_used[page]); /* two sequences never share one */
            m->page_used[page] = true;
            m->pages[g->slot][m->n_pages[g->slot]++] = page;
        }
        assert_true(m->n_pages[g->slot] * KV_BLOCK >= m->n_rows[g->slot]); /* invariant 2 */
    }
}

/* A step on its way through the pretended pipeline. */
typedef struct Flight {
    uint32_t number, n;
    RowResult results[48];
} Flight;

static Flight *fly(const Step *s, const Mirror *m)
{
    Flight *f = g_new0(Flight, 1);
    f->number = s->number;
    for (uint32_t i = 0; i < s->n_segments; i++) {
        const StepSegment *g = &s->segments[i];
        for (uint32_t r = 0; r < g->n_rows; r++) {
            const StepRow *row = &s->rows[g->row0 + r];
            if (row->output != STEP_OUTPUT_NONE) {
                f->results[f->n++] =
                    (RowResult){.slot = g->slot,
                                .uid = m->uid[g->slot],
                                .position = g->position + r,
                                .id = row->output == STEP_OUTPUT_SCORE
                                          ? row->target
                                          : next_id(g->position + r, m->n_prompt[g->slot])};
            }
        }
    }
    return f;
}

/* Runs the leader until it is empty, at most `steps` steps, with results coming back `lag` steps
 * later. */
static void run_until_empty(Leader *leader, Mirror *m, unsigned lag)
{
    GQueue flights = G_QUEUE_INIT;
    Step *step = step_new(&LIMITS), *copy = step_new(&LIMITS);
    g_autofree uint8_t *wire = g_malloc(step_wire_limit(&LIMITS));
    for (unsigned turn = 0;
         turn < 5000 && (leader_open_requests(leader) > 0 || !g_queue_is_empty(&flights)); turn++) {
        if (leader_next(leader, step)) {
            size_t used = 0;
            const size_t size = step_encode(step, wire);
            assert_true(size <= step_wire_limit(&LIMITS));
            assert_true(step_decode(copy, &LIMITS, wire, size, &used,
                                    NULL)); /* what the leader makes, the ranks accept */
            assert_int_equal(used, size);
            mirror_apply(m, copy);
            copy->number = step->number;
            g_queue_push_tail(&flights, fly(copy, m));
        } else if (g_queue_is_empty(&flights)) {
            break;
        }
        if (g_queue_get_length(&flights) >= lag || leader_steps_in_flight(leader) > 0) {
            if (g_queue_get_length(&flights) >= lag || turn % 2) {
                Flight *f = g_queue_pop_head(&flights);
                if (f != NULL) {
                    leader_result(leader, f->number, f->results, f->n);
                    g_free(f);
                }
            }
        }
    }
    assert_int_equal(leader_open_requests(leader), 0);
    g_queue_clear_full(&flights, g_free);
    step_free(step);
    step_free(copy);
}

static Leader *new_leader(uint32_t in_flight)
{
    const LeaderOptions options = {.limits = LIMITS,
                                   .kv_pages = LIMITS.max_pages,
                                   .steps_in_flight = in_flight,
                                   .wire_bytes = no_bytes};
    return leader_new(&options);
}

static LeaderRequest *request(uint64_t id, uint32_t n_prompt, uint32_t n, MainLoop *loop, Client *c)
{
    uint32_t prompt[256] = {0};
    const EngineRequest r = {.prompt = prompt, .n_prompt = n_prompt, .max_tokens = n};
    memset(c, 0, sizeof *c);
    return leader_request_new(id, &r, main_loop_loop(loop), on_token, c);
}

static void drain(MainLoop *loop, const Client *c)
{
    for (unsigned i = 0; c->n_done == 0 && i < 1000; i++) {
        const bool never = false;
        main_loop_run_until(loop, &never, 1000);
    }
    assert_int_equal(c->n_done, 1);
}

static void assert_tokens(const Client *c, uint32_t n_prompt, uint32_t n)
{
    assert_int_equal(c->n, n);
    for (uint32_t i = 0; i < n; i++) {
        assert_int_equal(c->positions[i], n_prompt + i);
        assert_int_equal(c->ids[i], next_id(n_prompt + i - 1, n_prompt));
    }
}

/* Random mixes of requests over pipelines of different depth: each gets its own tokens, all of
 * them, once. */
static void test_mixes(void **state)
{
    for (uint64_t seed = 0; seed < 40; seed++) {
        RandomSeeded random;
        Client clients[12];
        uint32_t n_prompt[12], n[12];
        Mirror mirror = {0};
        MainLoop *loop = main_loop_new();
        random_seeded_init(&random, seed);
        Leader *leader = new_leader(1 + seed % 4);
        for (unsigned i = 0; i < 12; i++) {
            n_prompt[i] = 1 + random_u64(&random.base) % 120;
            n[i] = 1 + random_u64(&random.base) % 60;
            leader_submit(leader, request(i, n_prompt[i], n[i], loop, &clients[i]));
        }
        run_until_empty(leader, &mirror, 1 + (unsigned)seed % 4);
        for (unsigned i = 0; i < 12; i++) {
            drain(loop, &clients[i]);
            assert_string_equal(clients[i].reason, "length");
            assert_tokens(&clients[i], n_prompt[i], n[i]);
        }
        leader_free(leader, NULL);
        main_loop_free(loop);
    }
}

static void test_cancel_frees_pages(void **state)
{
    Client a, b;
    Mirror mirror = {0};
    MainLoop *loop = main_loop_new();
    Leader *leader = new_leader(1);
    Step *step = step_new(&LIMITS);
    leader_submit(leader, request(1, 200, 56, loop, &a)); /* 8 of 40 pages */
    assert_true(leader_next(leader, step));
    mirror_apply(&mirror, step);
    Flight *f = fly(step, &mirror);
    leader_cancel(leader, 1); /* with its first step in flight */
    drain(loop, &a);
    assert_string_equal(a.reason, "cancelled");
    assert_int_equal(a.n, 0);
    leader_result(leader, f->number, f->results,
                  f->n); /* late results of the cancelled one: dropped */
    g_free(f);
    leader_submit(leader, request(2, 40, 9, loop, &b));
    run_until_empty(leader, &mirror, 1);
    drain(loop, &b);
    assert_tokens(&b, 40, 9);
    step_free(step);
    leader_free(leader, NULL);
    main_loop_free(loop);
}

static void test_failure_ends_everything(void **state)
{
    Client c[5];
    MainLoop *loop = main_loop_new();
    Leader *leader = new_leader(2);
    Step *step = step_new(&LIMITS);
    g_autoptr(GError) why =
        g_error_new_literal(WEFT_ERROR, WEFT_ERROR_WORKER_LOST, "worker b lost during x");
    for (unsigned i = 0; i < 5; i++) {
        leader_submit(leader, request(i, 10, 10, loop, &c[i])); /* three run, two wait */
    }
    assert_true(leader_next(leader, step));
    leader_fail(leader, why);
    for (unsigned i = 0; i < 5; i++) {
        drain(loop, &c[i]);
        assert_string_equal(c[i].reason, "error");
        assert_string_equal(c[i].error, "worker b lost during x");
    }
    assert_int_equal(leader_open_requests(leader), 0);
    step_free(step);
    leader_free(leader, why);
    main_loop_free(loop);
}

static void test_refused_at_once(void **state)
{
    Client c;
    MainLoop *loop = main_loop_new();
    Leader *leader = new_leader(1);
    leader_submit(leader, request(1, 0, 5, loop, &c));
    drain(loop, &c);
    assert_string_equal(c.reason, "error");
    leader_submit(leader, request(2, 256, 5, loop, &c)); /* the context is full: nothing to draw */
    drain(loop, &c);
    assert_string_equal(c.reason, "length");
    leader_submit(leader, request(3, 5, 0, loop, &c));
    drain(loop, &c);
    assert_string_equal(c.reason, "length");
    leader_free(leader, NULL);
    main_loop_free(loop);
}

/* Every single changed word of a valid message is either refused or decodes to numbers within the
 * limits. */
static void test_hostile_steps(void **state)
{
    Step *step = step_new(&LIMITS), *out = step_new(&LIMITS);
    g_autofree uint8_t *wire = g_malloc(step_wire_limit(&LIMITS)),
                       *bad = g_malloc(step_wire_limit(&LIMITS));
    step->n_admits = 1;
    step->admits[0] = (StepAdmit){.slot = 2, .uid = 9, .n_prompt = 5, .n_bias = 2};
    step->n_biases = 2;
    step->biases[1] = (SampleBias){999, -3.0f};
    step->n_reuses = 1;
    step->reuses[0] = (StepReuse){.slot = 1, .page_index = 1, .n_pages = 2, .page0 = 1};
    step->n_tokens = 64;
    step->n_releases = 1;
    step->n_segments = 1;
    step->segments[0] = (StepSegment){.slot = 2, .position = 3, .n_rows = 4, .n_pages = 1};
    step->n_rows = 4;
    step->n_pages = 3;
    step->pages[0] = 39;
    const size_t size = step_encode(step, wire);
    size_t used;
    for (size_t cut = 0; cut < size; cut++) {
        assert_false(step_decode(out, &LIMITS, wire, cut, &used, NULL));
    }
    static const uint32_t values[] = {0,    1,          3,          48,         49,        256,
                                      1000, 0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff};
    for (size_t at = 0; at + 4 <= size; at++) {
        for (unsigned v = 0; v < G_N_ELEMENTS(values); v++) {
            memcpy(bad, wire, size);
            memcpy(bad + at, &values[v], 4);
            if (step_decode(out, &LIMITS, bad, size, &used, NULL)) {
                assert_true(used <= size && out->n_rows <= LIMITS.max_rows &&
                            out->n_segments <= LIMITS.max_slots);
                for (uint32_t i = 0; i < out->n_segments; i++) {
                    const StepSegment *g = &out->segments[i];
                    assert_true(g->slot < LIMITS.max_slots && g->row0 + g->n_rows <= out->n_rows &&
                                g->position + g->n_rows <= LIMITS.context &&
                                g->page0 + g->n_pages <= out->n_pages &&
                                g->page_index + g->n_pages <= LIMITS.context / 32);
                }
                for (uint32_t i = 0; i < out->n_reuses; i++) {
                    const StepReuse *u = &out->reuses[i];
                    assert_true(u->slot < LIMITS.max_slots &&
                                u->page_index + u->n_pages <= LIMITS.context / 32 &&
                                u->page0 + u->n_pages <= out->n_pages &&
                                u->token0 + 32 * u->n_pages <= out->n_tokens);
                }
                for (uint32_t i = 0; i < out->n_admits; i++) {
                    assert_true(out->admits[i].bias0 + out->admits[i].n_bias <= out->n_biases &&
                                out->n_biases <= SAMPLE_BIAS_LIMIT);
                }
            }
        }
    }
    step_free(step);
    step_free(out);
}

/* Every row is of exactly one segment: one that is in none would leave the stage without a
 * position, one that is in two would give more results than there is room for. */
static void test_segments_cover_the_rows_once(void **state)
{
    static const struct {
        uint32_t n_rows, row0[3], n[3], n_segments;
        bool good;
    } cases[] = {
        {6, {0, 4}, {4, 2}, 2, true},
        {6, {0}, {4}, 1, false},
        {6, {2}, {4}, 1, false},
        {6, {0, 0}, {6, 6}, 2, false},
        {6, {0, 3}, {4, 2}, 2, false},
        {6, {4, 0}, {2, 4}, 2, false},
        {6, {0, 4, 4}, {4, 0, 2}, 3, false},
        {6, {0}, {0}, 0, false},
    };
    Step *step = step_new(&LIMITS), *out = step_new(&LIMITS);
    g_autofree uint8_t *wire = g_malloc(step_wire_limit(&LIMITS));
    for (unsigned c = 0; c < G_N_ELEMENTS(cases); c++) {
        step_clear(step);
        step->n_rows = cases[c].n_rows;
        step->n_segments = cases[c].n_segments;
        for (uint32_t i = 0; i < step->n_segments; i++) {
            step->segments[i] =
                (StepSegment){.slot = i, .row0 = cases[c].row0[i], .n_rows = cases[c].n[i]};
        }
        size_t used;
        g_autoptr(GError) error = NULL;
        const size_t size = step_encode(step, wire);
        assert_int_equal(step_decode(out, &LIMITS, wire, size, &used, &error), cases[c].good);
        assert_true(cases[c].good || error->code == WEFT_ERROR_PROTOCOL);
    }
    step_free(step);
    step_free(out);
}

/* A text to be scored may be given in two pieces, as a resumed request is: there is room for the
 * events of both. */
static void test_scores_prompt_and_generated(void **state)
{
    Client c = {0};
    Mirror mirror = {0};
    MainLoop *loop = main_loop_new();
    Leader *leader = new_leader(1);
    const uint32_t prompt[] = {1, 2}, generated[] = {3, 4, 5, 6, 7, 8, 9};
    const EngineRequest r = {
        .kind = 1, .prompt = prompt, .n_prompt = 2, .generated = generated, .n_generated = 7};
    leader_submit(leader, leader_request_new(1, &r, main_loop_loop(loop), on_token, &c));
    run_until_empty(leader, &mirror, 1);
    drain(loop, &c);
    assert_string_equal(c.reason, "length");
    assert_int_equal(c.n, 8);
    for (uint32_t i = 0; i < c.n; i++) {
        assert_int_equal(c.ids[i], i + 2);
        assert_int_equal(c.positions[i], i + 1);
    }
    leader_free(leader, NULL);
    main_loop_free(loop);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_mixes),
        cmocka_unit_test(test_cancel_frees_pages),
        cmocka_unit_test(test_failure_ends_everything),
        cmocka_unit_test(test_refused_at_once),
        cmocka_unit_test(test_hostile_steps),
        cmocka_unit_test(test_segments_cover_the_rows_once),
        cmocka_unit_test(test_scores_prompt_and_generated),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
