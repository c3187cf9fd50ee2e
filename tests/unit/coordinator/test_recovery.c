/* A stream survives: whatever happens to its workers, it ends with the tokens of an undisturbed
 * run, each once, within a bounded time. The real coordinator under virtual time. */
#include "tests/unit/coordinator/sim_cluster.h"

#include "proto/base/error.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#define N_TOKENS 50u

static int set_up(void **state)
{
    *state = sim_cluster_new(1);
    return 0;
}

static int tear_down(void **state)
{
    sim_cluster_free(*state);
    return 0;
}

static void start_workers(SimCluster *s, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        sim_worker_start(s, i);
    }
    sim_run_for(s, 2 * SECOND);
}

static const char *state_of(SimCluster *s, const char *name)
{
    static char text[32];
    Answer a = {0};
    const Weft__V1__Member *member = sim_status(s, &a, name);
    g_strlcpy(text, member != NULL ? member->state : "absent", sizeof text);
    answer_clear(&a);
    return text;
}

static void begin(SimCluster *s, Answer *a, uint32_t pp, uint32_t tp)
{
    sim_run_begin(s, a, "hello", N_TOKENS, pp, tp);
}

/* What an undisturbed run gives; leaves the job loaded. */
static void undisturbed(SimCluster *s, Answer *want, uint32_t pp, uint32_t tp)
{
    begin(s, want, pp, tp);
    sim_answer(s, want, 10 * SECOND);
    g_assert_no_error(want->error);
    assert_int_equal(want->ids->len, N_TOKENS);
    assert_int_equal(want->run_done->recoveries, 0);
}

static void assert_same(const Answer *a, const Answer *want)
{
    g_assert_no_error(a->error);
    assert_int_equal(a->ids->len, want->ids->len);
    assert_memory_equal(a->ids->data, want->ids->data, want->ids->len * sizeof(uint32_t));
    assert_string_equal(a->text->str, want->text->str);
    assert_memory_equal(a->run_done->digest.data, want->run_done->digest.data, 16);
    assert_string_equal(a->run_done->finish_reason, want->run_done->finish_reason);
}

static FakeWorker *leader_of(SimCluster *s)
{
    for (unsigned i = 0; i < WORKERS_LIMIT; i++) {
        if (s->workers[i].running && s->workers[i].streams->len > 0) {
            return &s->workers[i];
        }
    }
    return NULL;
}

/* Holds a part of the running job and leads nothing. */
static FakeWorker *follower_of(SimCluster *s)
{
    for (unsigned i = 0; i < WORKERS_LIMIT; i++) {
        FakeWorker *w = &s->workers[i];
        if (w->running && w->streams->len == 0 && w->held->len > 0) {
            return w;
        }
    }
    return NULL;
}

typedef enum Harm { KILL, FREEZE, CUT } Harm;

static void harm(FakeWorker *w, Harm how)
{
    if (how == KILL) {
        sim_worker_kill(w);
    } else if (how == FREEZE) {
        sim_worker_freeze(w, true);
    } else {
        sim_worker_cut(w, true);
    }
}

static void heal(SimCluster *s, FakeWorker *w, Harm how)
{
    if (how == KILL) {
        sim_worker_start(s, (unsigned)(w - s->workers));
    } else if (how == FREEZE) {
        sim_worker_freeze(w, false);
    } else {
        sim_worker_cut(w, false);
    }
}

/* ---- one worker is lost ---- */

static void survive(Harm how, bool leader, double most_s)
{
    SimCluster *s = sim_cluster_new(1);
    start_workers(s, 3);
    Answer want = {0}, a = {0};
    undisturbed(s, &want, 2, 1);
    begin(s, &a, 2, 1);
    sim_run_for(s, 500000);
    assert_in_range(a.ids->len, 10, N_TOKENS - 10);
    FakeWorker *victim = leader ? leader_of(s) : follower_of(s);
    FakeWorker *stands = leader ? NULL : leader_of(s); /* without the other no step ends */
    harm(victim, how);
    if (stands != NULL) {
        stands->stands = true;
        unsigned n_drops = stands->n_drops;
        while (stands->n_drops == n_drops) {
            sim_run_for(s, 10000);
        }
        stands->stands = false;
    }
    sim_answer(s, &a, 10 * SECOND);
    assert_same(&a, &want);
    assert_int_equal(a.run_done->recoveries, 1);
    assert_true(a.run_done->stall_s <= most_s);
    assert_true(a.stall_s == a.run_done->stall_s);
    g_autofree char *named = g_strdup_printf("worker %s lost", victim->name);
    assert_non_null(strstr(a.notices->str, named));
    assert_non_null(strstr(a.notices->str, "goes on in epoch 3")); /* 2 was burnt at the end of 1 */
    assert_non_null(strstr(s->log->str, "tokens to compute again"));
    answer_clear(&a);
    answer_clear(&want);
    sim_cluster_free(s);
}

static void test_killed_leader(void **state)
{
    survive(KILL, true, 1.0);
}

static void test_killed_follower(void **state)
{
    survive(KILL, false, 1.0);
}

static void test_frozen_leader(void **state)
{
    survive(FREEZE, true, 5.0);
}

static void test_frozen_follower(void **state)
{
    survive(FREEZE, false, 5.0);
}

static void test_cut_off_leader(void **state)
{
    survive(CUT, true, 5.0);
}

static void test_cut_off_follower(void **state)
{
    survive(CUT, false, 5.0);
}

/* ---- what is left is too little ---- */

static void test_waits_for_a_worker(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 2);
    Answer want = {0}, a = {0};
    undisturbed(s, &want, 2, 1);
    for (Harm how = KILL; how <= CUT; how++) {
        begin(s, &a, 2, 1);
        sim_run_for(s, 500000);
        FakeWorker *victim = leader_of(s);
        harm(victim, how);
        sim_run_for(s, 20 * SECOND);
        assert_false(a.done);
        assert_string_equal(state_of(s, victim->name), "lost");
        heal(s, victim, how);
        sim_answer(s, &a, 6 * SECOND);
        assert_same(&a, &want);
        assert_int_equal(victim->n_fences, how == KILL ? 0 : (unsigned)how);
        answer_clear(&a);
    }
    answer_clear(&want);
}

static void test_waits_a_bounded_time(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 2);
    Answer a = {0}, late = {0}, other = {0};
    begin(s, &a, 2, 1);
    sim_run_for(s, 500000);
    int64_t killed_us = sim_world_now_us(s->world);
    sim_worker_kill(leader_of(s));
    sim_run_for(s, 30 * SECOND);
    begin(s, &late, 2, 1); /* shares the wait */
    sim_answer(s, &a, 40 * SECOND);
    assert_in_range((a.done_us - killed_us) / SECOND, 60, 61);
    assert_int_equal(a.error->code, WEFT_ERROR_NOT_READY);
    assert_non_null(strstr(a.error->message, "waited 60 s for workers after worker w"));
    assert_non_null(strstr(a.error->message, "needs 2 workers and 1 can be used"));
    sim_answer(s, &late, SECOND);
    assert_int_equal(late.error->code, WEFT_ERROR_NOT_READY);
    begin(s, &other, 2, 1); /* comes afterwards: is told at once */
    sim_answer(s, &other, SECOND);
    assert_int_equal(other.error->code, WEFT_ERROR_IMPOSSIBLE);
    answer_clear(&a);
    answer_clear(&late);
    answer_clear(&other);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_killed_leader),
        cmocka_unit_test(test_killed_follower),
        cmocka_unit_test(test_frozen_leader),
        cmocka_unit_test(test_frozen_follower),
        cmocka_unit_test(test_cut_off_leader),
        cmocka_unit_test(test_cut_off_follower),
        cmocka_unit_test_setup_teardown(test_waits_for_a_worker, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_waits_a_bounded_time, set_up, tear_down),
    };
    return cmocka_run_group_tests_name("coordinator recovery", tests, NULL, NULL);
}
