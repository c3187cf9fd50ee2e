/* Texts scored with their logits: each window comes in pieces, every token once, under losses too,
 * and no faster than the client reads. The real coordinator under virtual time. */
#include "tests/unit/coordinator/sim_streams.h"

#include "proto/base/error.h"
#include "proto/base/failpoint.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

enum {
    WINDOW = 16,
    SCORED = 8,
    N_WINDOWS = 12,
    N_ROWS = N_WINDOWS * SCORED,
    PIECE = 3,
    PIECES = 3
};
#define MIB ((size_t)1 << 20)

static void score(SimCluster *s, Answer *a, bool logits)
{
    g_autofree char *text = g_strnfill(N_WINDOWS * WINDOW + 8, 'y');
    SimRequest request;
    sim_request_init(s, &request, text, 0, 1, 2, 1);
    request.run.kind = WEFT__V1__REQUEST_KIND__SCORE;
    request.run.score_window = WINDOW;
    request.run.want_logits = logits;
    sim_request_begin(s, a, &request);
}

static int by_value(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* Each token of the second halves once. */
static void assert_places(const Answer *a)
{
    assert_int_equal(a->places->len, N_ROWS);
    g_array_sort(a->places, by_value);
    for (uint64_t i = 0; i < N_ROWS; i++) {
        assert_int_equal(g_array_index(a->places, uint64_t, i),
                         (i / SCORED) << 32 | (WINDOW - SCORED + i % SCORED));
    }
}

static void assert_same_scores(const Answer *a, const Answer *want)
{
    assert_int_equal(a->run_done->tokens_scored, want->run_done->tokens_scored);
    assert_true(a->run_done->nll_sum == want->run_done->nll_sum);
    assert_memory_equal(a->run_done->digest.data, want->run_done->digest.data, 16);
}

static int set_up(void **state)
{
    failpoint_set("score-rows", true, PIECE);
    SimCluster *s = sim_cluster_new(1);
    start_workers(s, 3);
    *state = s;
    return 0;
}

static int tear_down(void **state)
{
    failpoint_set("score-rows", false, 0);
    sim_cluster_free(*state);
    return 0;
}

static unsigned n_generates(const SimCluster *s)
{
    return s->workers[0].n_generates + s->workers[1].n_generates + s->workers[2].n_generates;
}

static void test_pieces(void **state)
{
    SimCluster *s = *state;
    Answer want = {0}, a = {0};
    score(s, &want, false);
    sim_answer(s, &want, 20 * SECOND);
    g_assert_no_error(want.error);
    assert_int_equal(want.places->len, 0); /* nothing is sent that was not asked for */
    assert_int_equal(want.started->vocab_size, 0);
    assert_int_equal(n_generates(s), N_WINDOWS);
    score(s, &a, true);
    sim_answer(s, &a, 40 * SECOND);
    g_assert_no_error(a.error);
    assert_int_equal(n_generates(s), N_WINDOWS + N_WINDOWS * PIECES);
    assert_places(&a);
    assert_same_scores(&a, &want);
    assert_int_equal(a.run_done->prefill_tokens, want.run_done->prefill_tokens);
    assert_int_equal(a.started->vocab_size, 258);
    assert_int_equal(a.started->vocabulary.len, 16);
    assert_int_equal(a.started->windows.len, 16);
    answer_clear(&a);
    answer_clear(&want);
}

static void test_pieces_across_a_loss(void **state)
{
    SimCluster *s = *state;
    Answer want = {0}, a = {0};
    score(s, &want, true);
    sim_answer(s, &want, 40 * SECOND);
    g_assert_no_error(want.error);
    for (unsigned after = 10; after < N_ROWS; after += 25) {
        score(s, &a, true);
        while (a.places->len < after) {
            sim_run_for(s, 5000);
        }
        FakeWorker *leader = leader_of(s);
        assert_non_null(leader);
        sim_worker_kill(leader);
        sim_answer(s, &a, 40 * SECOND);
        g_assert_no_error(a.error);
        assert_int_equal(a.run_done->recoveries, 1);
        assert_places(&a);
        assert_same_scores(&a, &want);
        sim_worker_start(s, (unsigned)(leader - s->workers));
        sim_run_for(s, 2 * SECOND);
        answer_clear(&a);
    }
    answer_clear(&want);
}

/* Asks for large logits and stops reading after 5 pieces; pieces that were begun until nothing
 * went on. */
static unsigned begun_unread(SimCluster *s, Answer *a)
{
    for (unsigned i = 0; i < 3; i++) {
        s->workers[i].logits_bytes = MIB;
    }
    score(s, a, true);
    while (a->places->len < 5) {
        sim_run_for(s, 5000);
    }
    rpc_inproc_set_fault(s->transport, "tester", CONTROL, RPC_INPROC_FROZEN);
    sim_run_for(s, 20 * SECOND);
    return n_generates(s);
}

/* A client that does not read for a while: little is begun meanwhile, nothing is lost. */
static void test_no_faster_than_the_client(void **state)
{
    SimCluster *s = *state;
    Answer a = {0};
    const unsigned n = begun_unread(s, &a);
    /* of 36: (5 read + 8 MiB that may wait + 4 pieces that were open) / PIECE */
    assert_true(n < 16);
    sim_run_for(s, 20 * SECOND);
    assert_int_equal(n_generates(s), n);
    assert_false(a.done);
    rpc_inproc_set_fault(s->transport, "tester", CONTROL, RPC_INPROC_UP);
    sim_answer(s, &a, 60 * SECOND);
    g_assert_no_error(a.error);
    assert_places(&a);
    answer_clear(&a);
}

/* The client leaves while its run waits for room. */
static void test_cancel_without_room(void **state)
{
    SimCluster *s = *state;
    Answer a = {0};
    const unsigned n = begun_unread(s, &a);
    rpc_inproc_set_fault(s->transport, "tester", CONTROL, RPC_INPROC_CUT);
    sim_run_for(s, 5 * SECOND);
    assert_true(a.done);
    assert_non_null(a.error);
    rpc_inproc_set_fault(s->transport, "tester", CONTROL, RPC_INPROC_UP);
    sim_run_for(s, 5 * SECOND);
    assert_int_equal(n_generates(s), n);
    for (unsigned i = 0; i < 3; i++) {
        assert_int_equal(s->workers[i].streams->len, 0);
    }
    answer_clear(&a);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_pieces, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_pieces_across_a_loss, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_no_faster_than_the_client, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_cancel_without_room, set_up, tear_down),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
