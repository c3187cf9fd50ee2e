/* Silence of the majority, draining members, and members that come back: what moves a stream and
 * what does not. The real coordinator under virtual time. */
#include "tests/unit/coordinator/sim_streams.h"

#include "proto/base/error.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

/* ---- silence of the majority ---- */

static void test_majority_is_silent(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 4);
    Answer want = {0}, a = {0};
    begin_after(s, &want, &a, 2, 1);
    FakeWorker *cut[] = {leader_of(s), follower_of(s), NULL};
    for (unsigned i = 0; i < 4; i++) {
        if (&s->workers[i] != cut[0] && &s->workers[i] != cut[1]) {
            cut[2] = &s->workers[i];
        }
    }
    unsigned n_loads = 0;
    for (unsigned i = 0; i < 4; i++) {
        n_loads += s->workers[i].n_loads;
    }
    for (unsigned i = 0; i < 3; i++) {
        sim_worker_cut(cut[i], true);
    }
    sim_run_for(s, 20 * SECOND);
    assert_false(a.done);
    assert_non_null(strstr(s->log->str, "3 of 4 workers fell silent together: is the coordinator"));
    assert_null(strstr(s->log->str, "lost"));
    for (unsigned i = 0; i < 4; i++) {
        n_loads -= s->workers[i].n_loads;
    }
    assert_int_equal(n_loads, 0);
    for (unsigned i = 0; i < 3; i++) {
        sim_worker_cut(cut[i], false);
    }
    assert_ends_same(s, &a, &want);
    assert_int_equal(a.run_done->recoveries, 1); /* they had fenced themselves */
    answer_clear(&a);
    answer_clear(&want);
}

/* They are dead, and say so: sockets break. Nothing is waited for. */
static void test_majority_is_dead(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 4);
    Answer want = {0}, a = {0};
    begin_after(s, &want, &a, 1, 1);
    FakeWorker *leader = leader_of(s);
    sim_worker_kill(leader);
    for (unsigned i = 0, left = 2; i < 4; i++) {
        if (s->workers[i].running && left > 0) {
            sim_worker_kill(&s->workers[i]);
            left--;
        }
    }
    assert_ends_same(s, &a, &want);
    assert_true(a.run_done->stall_s <= 1.0);
    answer_clear(&a);
    answer_clear(&want);
}

/* The coordinator itself stood still: that says nothing of the workers. */
static void test_coordinator_was_stopped(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 2);
    Answer want = {0}, a = {0};
    begin_after(s, &want, &a, 2, 1);
    sim_loop_freeze(s->coordinator_loop, true);
    sim_run_for(s, 10 * SECOND);
    sim_loop_freeze(s->coordinator_loop, false);
    assert_ends_same(s, &a, &want);
    assert_null(strstr(s->log->str, "lost"));
    answer_clear(&a);
    answer_clear(&want);
}

/* ---- drain ---- */

static void ask_drain(SimCluster *s, const char *name, bool undrain)
{
    Answer a = {0};
    Weft__V1__DrainRequest request = WEFT__V1__DRAIN_REQUEST__INIT;
    request.node = (char *)name;
    request.undrain = undrain;
    sim_call(s, &a, &weft__v1__admin__descriptor, "Drain", &request);
    sim_answer(s, &a, SECOND);
    g_assert_no_error(a.error);
    answer_clear(&a);
}

static void drain(SimCluster *s, const char *name)
{
    ask_drain(s, name, false);
}

static void undrain(SimCluster *s, const char *name)
{
    ask_drain(s, name, true);
}

static void test_drain_moves_streams(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 3);
    Answer want = {0}, a = {0}, b = {0};
    begin_after(s, &want, &a, 2, 1);
    FakeWorker *busy = leader_of(s), *other = follower_of(s);
    drain(s, busy->name);
    begin(s, &b, 2, 1);
    sim_run_for(s, 200000);
    assert_int_equal(busy->streams->len, 0);
    assert_int_equal(busy->held->len, 0);
    assert_ends_same(s, &a, &want);
    assert_int_equal(a.run_done->recoveries, 1);
    assert_true(a.run_done->stall_s < 0.2);
    assert_string_equal(state_of(s, busy->name), "draining");
    assert_true(busy->draining);
    assert_int_equal(busy->n_full_drops, 1);
    assert_int_equal(other->n_full_drops, 0);
    assert_ends_same(s, &b, &want);
    answer_clear(&a);
    answer_clear(&b);
    answer_clear(&want);
}

/* A worker that is asked to stop says so: its streams move as in a drain; when it goes, it is gone
 * at once; and it is taken back, as nobody asked for a drain. */
static void test_goodbye_moves_streams(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 3);
    Answer want = {0}, a = {0};
    begin_after(s, &want, &a, 2, 1);
    FakeWorker *busy = leader_of(s);
    busy->leaving = true;
    sim_run_for(s, 700000);
    assert_int_equal(busy->held->len, 0);
    assert_string_equal(state_of(s, busy->name), "draining");
    sim_worker_kill(busy);
    sim_run_for(s, 10000);
    assert_string_equal(state_of(s, busy->name), "lost");
    assert_non_null(strstr(s->log->str, "it was stopped"));
    assert_ends_same(s, &a, &want);
    assert_int_equal(a.run_done->recoveries, 1);
    assert_true(a.run_done->stall_s < 0.2);
    sim_worker_start(s, (unsigned)(busy - s->workers));
    sim_run_for(s, SECOND);
    assert_string_equal(state_of(s, busy->name), "ready");
    answer_clear(&a);
    answer_clear(&want);
}

/* What stands still at a worker is told in its row of the status, as long as it says so. */
static void test_problem_is_told(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 1);
    FakeWorker *w = &s->workers[0];
    Answer a = {0};
    w->problem = "job j epoch 3: its engine stands still in step 17 of 2 rows for 3100 ms";
    sim_run_for(s, SECOND);
    const Weft__V1__Member *member = sim_status(s, &a, w->name);
    assert_string_equal(member->reason, w->problem);
    assert_string_equal(member->state, "ready");
    answer_clear(&a);
    w->problem = NULL;
    sim_run_for(s, SECOND);
    assert_string_equal(sim_status(s, &a, w->name)->reason, "");
    answer_clear(&a);
}

/* Nobody else could take it: requests end where they are, the next is told what is missing. */
static void test_drain_without_a_place_to_go(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 2);
    Answer want = {0}, a = {0};
    begin_after(s, &want, &a, 2, 1);
    FakeWorker *busy = leader_of(s);
    drain(s, busy->name);
    assert_ends_same(s, &a, &want);
    assert_int_equal(a.run_done->recoveries, 0);
    assert_non_null(strstr(s->log->str, "until its requests end"));
    begin(s, &a, 2, 1);
    sim_answer(s, &a, 10 * SECOND);
    assert_int_equal(a.error->code, WEFT_ERROR_IMPOSSIBLE);
    answer_clear(&a);
    answer_clear(&want);
}

static void assert_left(SimCluster *s, FakeWorker *w)
{
    assert_int_equal(w->held->len, 0);
    assert_string_equal(state_of(s, w->name), "draining");
}

static void serve(SimCluster *s)
{
    Answer a = {0};
    Weft__V1__SubmitRequest request = WEFT__V1__SUBMIT_REQUEST__INIT;
    request.spec = (char *)"kind: serve\nname: chat\nmodel: {from: tiny.gguf}\n";
    sim_cluster_model(s);
    sim_call(s, &a, &weft__v1__admin__descriptor, "Submit", &request);
    sim_answer(s, &a, 5 * SECOND);
    g_assert_no_error(a.error);
    answer_clear(&a);
    sim_run_for(s, 2 * SECOND);
}

static void assert_served(SimCluster *s, const char *state)
{
    Answer a = {0};
    Weft__V1__ListJobsRequest request = WEFT__V1__LIST_JOBS_REQUEST__INIT;
    sim_call(s, &a, &weft__v1__admin__descriptor, "ListJobs", &request);
    sim_answer(s, &a, SECOND);
    g_assert_no_error(a.error);
    assert_string_equal(((const Weft__V1__ListJobsResponse *)a.message)->jobs[0]->state, state);
    answer_clear(&a);
}

/* Of the served model's deployment; the answer is the same on whichever worker. */
static void ask_served(SimCluster *s, Answer *a)
{
    SimRequest request;
    sim_request_init(s, &request, "hello", N_TOKENS, 0, 0, 0);
    request.run.streams = 0;
    sim_request_begin(s, a, &request);
}

/* A served model on which nobody is does not hold the only worker that has it: it is not ready, and
 * who asks is told so after the time that is waited for workers, not kept for ever. */
static void test_drain_of_a_served_model(void **state)
{
    SimCluster *s = *state;
    Answer want = {0}, a = {0};
    start_workers(s, 1);
    serve(s);
    assert_served(s, "ready");
    ask_served(s, &want);
    sim_answer(s, &want, 10 * SECOND);
    g_assert_no_error(want.error);
    assert_int_equal(s->workers[0].n_loads, 1);
    drain(s, "w0");
    sim_run_for(s, SECOND);
    assert_left(s, &s->workers[0]);
    assert_served(s, "loading");
    ask_served(s, &a);
    sim_answer(s, &a, 62 * SECOND);
    assert_int_equal(a.error->code, WEFT_ERROR_NOT_READY);
    answer_clear(&a);
    undrain(s, "w0");
    sim_run_for(s, 8 * SECOND);
    assert_served(s, "ready");
    ask_served(s, &a);
    assert_ends_same(s, &a, &want);
    answer_clear(&a);
    answer_clear(&want);
}

/* With a request on it, it goes when that has ended; the next one waits for it no longer. */
static void test_drain_of_a_served_model_in_use(void **state)
{
    SimCluster *s = *state;
    Answer want = {0}, a = {0}, b = {0};
    start_workers(s, 1);
    serve(s);
    ask_served(s, &want);
    sim_answer(s, &want, 10 * SECOND);
    ask_served(s, &a);
    sim_run_for(s, SECOND / 2);
    drain(s, "w0");
    ask_served(s, &b);
    assert_ends_same(s, &a, &want);
    assert_int_equal(a.run_done->recoveries, 0);
    sim_run_for(s, SECOND);
    assert_left(s, &s->workers[0]);
    sim_answer(s, &b, 62 * SECOND);
    assert_int_equal(b.error->code, WEFT_ERROR_NOT_READY);
    answer_clear(&a);
    answer_clear(&b);
    answer_clear(&want);
}

/* Where there is another worker it moves there. */
static void test_drain_moves_a_served_model(void **state)
{
    SimCluster *s = *state;
    Answer want = {0}, a = {0};
    start_workers(s, 2);
    serve(s);
    ask_served(s, &want);
    sim_answer(s, &want, 10 * SECOND);
    FakeWorker *has = &s->workers[s->workers[0].held->len > 0 ? 0 : 1];
    drain(s, has->name);
    sim_run_for(s, 2 * SECOND);
    assert_left(s, has);
    assert_served(s, "ready");
    ask_served(s, &a);
    assert_ends_same(s, &a, &want);
    answer_clear(&a);
    answer_clear(&want);
}

/* ---- replicas of workers that go ---- */

static void undisturbed_replicas(SimCluster *s, SimRequest *request, Answer *want)
{
    start_workers(s, 2);
    sim_request_init(s, request, "hello", 3 * N_TOKENS, 2, 1, 1);
    sim_request_begin(s, want, request);
    sim_answer(s, want, 10 * SECOND);
    g_assert_no_error(want->error);
}

/* Two replicas, and no plan with as many without the worker that goes. Idle, it is let go at once,
 * whatever the other does, which serves on. */
static void test_goodbye_of_an_idle_replica(void **state)
{
    SimCluster *s = *state;
    SimRequest request;
    Answer want = {0}, a = {0}, b = {0};
    undisturbed_replicas(s, &request, &want);
    sim_request_begin(s, &a, &request);
    sim_run_for(s, SECOND / 2);
    const unsigned idle = s->workers[0].streams->len > 0 ? 1 : 0;
    FakeWorker *goes = &s->workers[idle], *stays = &s->workers[1 - idle];
    assert_int_equal(stays->streams->len, 1);
    assert_int_equal(goes->streams->len, 0);
    goes->leaving = true;
    sim_run_for(s, 700000);
    assert_left(s, goes);
    sim_request_begin(s, &b, &request); /* is not kept waiting */
    sim_run_for(s, 100000);
    assert_int_equal(stays->streams->len, 2);
    sim_worker_kill(goes);
    assert_ends_same(s, &a, &want);
    assert_ends_same(s, &b, &want);
    assert_int_equal(a.run_done->recoveries + b.run_done->recoveries, 0);
    answer_clear(&a);
    answer_clear(&b);
    answer_clear(&want);
}

/* Busy, its requests go on with the other. */
static void test_goodbye_of_a_busy_replica(void **state)
{
    SimCluster *s = *state;
    SimRequest request;
    Answer want = {0}, a = {0}, b = {0};
    undisturbed_replicas(s, &request, &want);
    sim_request_begin(s, &a, &request);
    sim_request_begin(s, &b, &request);
    sim_run_for(s, SECOND / 2);
    assert_int_equal(s->workers[0].streams->len, 1);
    assert_int_equal(s->workers[1].streams->len, 1);
    s->workers[0].leaving = true;
    sim_run_for(s, 700000);
    assert_left(s, &s->workers[0]);
    assert_int_equal(s->workers[1].streams->len, 2);
    sim_worker_kill(&s->workers[0]);
    assert_ends_same(s, &a, &want);
    assert_ends_same(s, &b, &want);
    assert_int_equal(a.run_done->recoveries + b.run_done->recoveries, 1);
    answer_clear(&a);
    answer_clear(&b);
    answer_clear(&want);
}

/* With nothing on either, what is left serves without a new plan. */
static void test_goodbye_with_nothing_on_it(void **state)
{
    SimCluster *s = *state;
    SimRequest request;
    Answer want = {0}, a = {0};
    undisturbed_replicas(s, &request, &want);
    s->workers[0].leaving = true;
    sim_run_for(s, 700000);
    assert_left(s, &s->workers[0]);
    const unsigned n_loads = s->workers[1].n_loads;
    sim_request_begin(s, &a, &request);
    assert_ends_same(s, &a, &want);
    assert_int_equal(s->workers[1].n_loads, n_loads);
    answer_clear(&a);
    answer_clear(&want);
}

static bool never_loads(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    FakeWorker *w = user;
    const bool loads = message->descriptor == &weft__v1__load_request__descriptor;
    w->n_loads += loads;
    return loads;
}

/* A plan that is being brought into force is given up for one without it. */
static void test_goodbye_while_loading(void **state)
{
    SimCluster *s = *state;
    Answer want = {0}, a = {0};
    start_workers(s, 2);
    undisturbed(s, &want, 1, 1);
    FakeWorker *first = s->workers[0].n_loads > 0 ? &s->workers[0] : &s->workers[1];
    drain(s, first->name);
    sim_run_for(s, SECOND);
    FakeWorker *second = &s->workers[first == &s->workers[0] ? 1 : 0];
    second->answer = never_loads;
    second->answer_user = second;
    begin(s, &a, 1, 1);
    sim_run_for(s, SECOND);
    assert_false(a.done);
    const unsigned n_loads = second->n_loads;
    assert_true(n_loads > 0);
    undrain(s, first->name);
    second->leaving = true;
    assert_ends_same(s, &a, &want);
    assert_int_equal(second->n_loads, n_loads);
    answer_clear(&a);
    answer_clear(&want);
}

/* ---- workers that come back are used again ---- */

/* Under a stream that never pauses for long: the replica that was lost is planned again when its
 * worker is back, and the stream survives that move too. */
static void test_replica_grows_back_under_load(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 2);
    SimRequest request;
    sim_request_init(s, &request, "hello", N_TOKENS, 2, 1, 1);
    Answer want = {0}, a[2] = {0};
    sim_request_begin(s, &want, &request);
    sim_answer(s, &want, 10 * SECOND);
    sim_worker_kill(&s->workers[1]);
    sim_run_for(s, 2 * SECOND);
    sim_worker_start(s, 1);
    unsigned n_recoveries = 0;
    for (int i = 0; i < 20; i++) { /* a second each, one half over the next */
        sim_request_begin(s, &a[i % 2], &request);
        sim_run_for(s, SECOND / 2);
        if (i > 0) {
            Answer *last = &a[(i - 1) % 2];
            sim_answer(s, last, 10 * SECOND);
            assert_same(last, &want);
            n_recoveries += last->run_done->recoveries;
        }
    }
    sim_answer(s, &a[1], 10 * SECOND);
    assert_in_range(n_recoveries, 1, 2); /* those that ran at the one move */
    answer_clear(&a[0]);
    answer_clear(&a[1]);
    assert_non_null(strstr(s->log->str, "workers came: a plan with"));
    assert_int_equal(s->workers[1].n_loads, 2);
    assert_int_equal(s->workers[1].held->len, 1);
    answer_clear(&want);
}

/* The coordinator was away for longer than workers keep an epoch: the job is brought back before
 * anybody asks for it. */
static void test_job_returns_by_itself(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 2);
    Answer want = {0}, a = {0};
    undisturbed(s, &want, 2, 1);
    sim_cluster_stop(s);
    sim_run_for(s, 10 * SECOND);
    assert_int_equal(s->workers[0].held->len, 0); /* fenced */
    sim_cluster_start(s);
    sim_run_for(s, 8 * SECOND);
    assert_string_equal(state_of(s, "w0"), "serving");
    assert_string_equal(state_of(s, "w1"), "serving");
    unsigned n_loads = s->workers[0].n_loads;
    begin(s, &a, 2, 1);
    assert_ends_same(s, &a, &want);
    assert_true(a.started->load_s == 0);
    assert_int_equal(s->workers[0].n_loads, n_loads);
    answer_clear(&a);
    answer_clear(&want);
}

/* Its file is gone then: that is said, and a request brings the job back when the file is. */
static void test_job_without_its_file_returns_when_asked_for(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 2);
    Answer want = {0}, a = {0};
    undisturbed(s, &want, 2, 1);
    g_autofree char *path = g_build_filename(s->dir, sim_cluster_model(s), NULL),
                    *away = g_strconcat(path, ".away", NULL);
    sim_cluster_stop(s);
    sim_run_for(s, 10 * SECOND);
    assert_int_equal(rename(path, away), 0);
    sim_cluster_start(s);
    sim_run_for(s, 30 * SECOND);
    assert_string_equal(state_of(s, "w0"), "ready");
    assert_non_null(strstr(s->log->str, "is not brought back: no such model file"));
    assert_null(strstr(s->log->str, "is brought back"));
    assert_int_equal(rename(away, path), 0);
    begin(s, &a, 2, 1);
    assert_ends_same(s, &a, &want);
    answer_clear(&a);
    answer_clear(&want);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_majority_is_silent, cluster_set_up, cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_majority_is_dead, cluster_set_up, cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_coordinator_was_stopped, cluster_set_up,
                                        cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_drain_moves_streams, cluster_set_up,
                                        cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_goodbye_moves_streams, cluster_set_up,
                                        cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_problem_is_told, cluster_set_up, cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_drain_without_a_place_to_go, cluster_set_up,
                                        cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_drain_of_a_served_model, cluster_set_up,
                                        cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_drain_of_a_served_model_in_use, cluster_set_up,
                                        cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_drain_moves_a_served_model, cluster_set_up,
                                        cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_goodbye_of_an_idle_replica, cluster_set_up,
                                        cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_goodbye_of_a_busy_replica, cluster_set_up,
                                        cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_goodbye_with_nothing_on_it, cluster_set_up,
                                        cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_goodbye_while_loading, cluster_set_up,
                                        cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_replica_grows_back_under_load, cluster_set_up,
                                        cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_job_returns_by_itself, cluster_set_up,
                                        cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_job_without_its_file_returns_when_asked_for,
                                        cluster_set_up, cluster_tear_down),
    };
    return cmocka_run_group_tests_name("coordinator moves", tests, NULL, NULL);
}
