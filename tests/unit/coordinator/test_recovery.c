/* A stream survives: whatever happens to its workers, it ends with the tokens of an undisturbed
 * run, each once, within a bounded time. The real coordinator under virtual time. */
#include "tests/unit/coordinator/sim_streams.h"

#include "proto/base/error.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

/* ---- one worker is lost ---- */

static void survive(Harm how, bool leader, double most_s)
{
    SimCluster *s = sim_cluster_new(1);
    start_workers(s, 3);
    Answer want = {0}, a = {0};
    begin_after(s, &want, &a, 2, 1);
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
    assert_ends_same(s, &a, &want);
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

/* ---- more than one, and more than once ---- */

static void test_two_at_once(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 6);
    Answer want = {0}, a = {0};
    undisturbed(s, &want, 2, 2);
    for (Harm how = KILL; how <= CUT; how++) {
        begin(s, &a, 2, 2);
        sim_run_for(s, 500000);
        FakeWorker *victims[] = {leader_of(s), follower_of(s)};
        harm(victims[0], how);
        harm(victims[1], how);
        assert_ends_same(s, &a, &want);
        assert_true(a.run_done->stall_s <= (how == KILL ? 1.0 : 5.0));
        heal(s, victims[0], how);
        heal(s, victims[1], how);
        sim_run_for(s, 2 * SECOND);
        answer_clear(&a);
    }
    answer_clear(&want);
}

/* The next leader dies too, while its epoch is brought into force and while it computes again. */
static void test_dies_again_during_recovery(void **state)
{
    for (int64_t after_us = 0; after_us < 60000; after_us += 300) {
        SimCluster *s = sim_cluster_new((uint64_t)after_us + 1);
        start_workers(s, 4);
        Answer want = {0}, a = {0};
        undisturbed(s, &want, 2, 1);
        begin(s, &a, 2, 1);
        sim_run_for(s, 300000);
        sim_worker_kill(leader_of(s));
        sim_run_for(s, 521000 + after_us % 5000); /* about when the loss is known */
        FakeWorker *next = leader_of(s) != NULL ? leader_of(s) : follower_of(s);
        if (after_us >= 5000) {
            sim_run_for(s, after_us);
            next = leader_of(s);
        }
        if (next != NULL) {
            sim_worker_kill(next);
        }
        assert_ends_same(s, &a, &want);
        answer_clear(&a);
        answer_clear(&want);
        sim_cluster_free(s);
    }
}

/* 32 sequences of one request and 8 requests beside it. */
static void test_many_streams(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 3);
    SimRequest request;
    sim_request_init(s, &request, "", N_TOKENS, 1, 2, 1);
    request.run.random_prompt = 7;
    request.run.streams = 32;
    Answer wide = {0}, want = {0}, beside[8] = {0};
    undisturbed(s, &want, 2, 1);
    sim_request_begin(s, &wide, &request);
    for (unsigned i = 0; i < 8; i++) {
        begin(s, &beside[i], 2, 1);
    }
    sim_run_for(s, 700000);
    sim_worker_kill(leader_of(s));
    sim_answer(s, &wide, 20 * SECOND);
    g_assert_no_error(wide.error);
    assert_int_equal(wide.run_done->tokens, 32 * N_TOKENS);
    assert_int_equal(wide.run_done->recoveries, 1);
    for (unsigned i = 0; i < 8; i++) {
        sim_answer(s, &beside[i], SECOND);
        assert_same(&beside[i], &want);
        answer_clear(&beside[i]);
    }
    answer_clear(&wide);
    answer_clear(&want);
}

static void test_stop_string_across_a_loss(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 3);
    Answer want = {0}, a = {0}, b = {0};
    undisturbed(s, &want, 2, 1);
    /* Its first half is drawn before the loss, the second after it. */
    for (uint32_t at = 10; at < 40; at += 7) {
        g_autofree char *stop = g_strndup(want.text->str + at, 6);
        char *stops[] = {stop};
        SimRequest request;
        sim_request_init(s, &request, "hello", N_TOKENS, 1, 2, 1);
        request.run.stop = stops;
        request.run.n_stop = 1;
        sim_request_begin(s, &a, &request);
        sim_answer(s, &a, 10 * SECOND);
        g_assert_no_error(a.error);
        sim_request_begin(s, &b, &request);
        while (b.ids->len < at + 3) {
            sim_run_for(s, 5000);
        }
        FakeWorker *leader = leader_of(s);
        sim_worker_kill(leader);
        assert_ends_same(s, &b, &a);
        assert_string_equal(b.run_done->finish_reason, "stop");
        assert_int_equal(b.run_done->recoveries, 1);
        sim_worker_start(s, (unsigned)(leader - s->workers));
        sim_run_for(s, 2 * SECOND);
        answer_clear(&a);
        answer_clear(&b);
    }
    answer_clear(&want);
}

static void score(SimCluster *s, Answer *a, const char *text)
{
    SimRequest request;
    sim_request_init(s, &request, text, 0, 1, 2, 1);
    request.run.kind = WEFT__V1__REQUEST_KIND__SCORE;
    request.run.score_window = 16;
    sim_request_begin(s, a, &request);
}

static void test_scores_across_a_loss(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 3);
    g_autofree char *text = g_strnfill(200, 'y');
    Answer want = {0}, a = {0};
    score(s, &want, text);
    sim_answer(s, &want, 20 * SECOND);
    g_assert_no_error(want.error);
    score(s, &a, text);
    sim_run_for(s, 200000);
    FakeWorker *leader = leader_of(s);
    assert_non_null(leader);
    sim_worker_kill(leader);
    sim_answer(s, &a, 20 * SECOND);
    g_assert_no_error(a.error);
    assert_int_equal(a.run_done->recoveries, 1);
    assert_int_equal(a.run_done->tokens_scored, want.run_done->tokens_scored);
    assert_true(a.run_done->nll_sum == want.run_done->nll_sum);
    assert_memory_equal(a.run_done->digest.data, want.run_done->digest.data, 16);
    answer_clear(&a);
    answer_clear(&want);
}

/* The other replica takes the stream at once; nothing is loaded. */
static void test_other_replica_takes_over(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 2);
    SimRequest request;
    sim_request_init(s, &request, "hello", N_TOKENS, 2, 1, 1);
    Answer want = {0}, a = {0};
    sim_request_begin(s, &want, &request);
    sim_answer(s, &want, 10 * SECOND);
    sim_request_begin(s, &a, &request);
    sim_run_for(s, 500000);
    sim_worker_kill(leader_of(s));
    assert_ends_same(s, &a, &want);
    assert_int_equal(a.run_done->recoveries, 1);
    assert_int_equal(s->workers[0].n_loads + s->workers[1].n_loads, 2);
    answer_clear(&a);
    answer_clear(&want);
}

/* ---- what does not go on ---- */

/* The new layout draws the last token again, and it is another. */
static void test_wrong_numbers_after_a_loss(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 3);
    Answer a = {0};
    begin(s, &a, 2, 1);
    sim_run_for(s, 500000);
    FakeWorker *leader = leader_of(s);
    for (unsigned i = 0; i < 3; i++) {
        s->workers[i].lies = &s->workers[i] != leader;
    }
    guint n_before = a.ids->len;
    sim_worker_kill(leader);
    sim_answer(s, &a, 10 * SECOND);
    assert_int_equal(a.error->code, WEFT_ERROR_NUMERICS);
    assert_in_range(a.ids->len, n_before, n_before + 1); /* and no token of it was sent */
    answer_clear(&a);
}

/* Exact bits of a device are its kind's alone: a request that began there is not continued on a
 * host, it waits for the kind, and says for what. */
static void test_another_kind_does_not_go_on(void **state)
{
    SimCluster *s = *state;
    Weft__V1__Device device = WEFT__V1__DEVICE__INIT, *devices[] = {&device};
    Weft__V1__Measured fast = WEFT__V1__MEASURED__INIT;
    fast.read_bytes_per_s = fast.int8_ops_per_s = fast.f32_ops_per_s = 4e12;
    device.kind = (char *)"cuda";
    device.exact_kind = (char *)"NVIDIA H200, sm_90";
    device.measured = &fast;
    s->workers[0].devices = devices;
    s->workers[0].n_devices = 1;
    start_workers(s, 2);
    Answer want = {0}, a = {0};
    begin_after(s, &want, &a, 1, 1);
    FakeWorker *victim = leader_of(s);
    assert_ptr_equal(victim, &s->workers[0]);
    const guint n_before = a.ids->len;
    harm(victim, KILL);
    sim_run_for(s, 10 * SECOND);
    assert_false(a.done);
    assert_int_equal(s->workers[1].n_loads, 0);
    assert_true(a.ids->len <= n_before + 1);
    assert_non_null(strstr(s->log->str, "that of the running requests is NVIDIA H200, sm_90"));
    heal(s, victim, KILL);
    assert_ends_same(s, &a, &want);
    answer_clear(&a);
    answer_clear(&want);
    s->workers[0].devices = NULL;
    s->workers[0].n_devices = 0;
}

/* A request that ends each epoch as soon as it begins must not go round for ever. */
static void test_poison_ends(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 2);
    Answer a = {0};
    s->workers[0].fail_generate = s->workers[1].fail_generate = WEFT_ERROR_WORKER_LOST;
    begin(s, &a, 1, 1);
    sim_answer(s, &a, 20 * SECOND);
    assert_int_equal(a.error->code, WEFT_ERROR_WORKER_LOST);
    assert_non_null(strstr(a.error->message, "8 times without a token in between"));
    answer_clear(&a);
}

/* A worker that stops in good order cancels what it serves, and one that was fenced meanwhile does
 * not find the epoch: neither is a fault of the request. */
static void test_server_that_goes_down(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 1);
    Answer want = {0}, a = {0};
    undisturbed(s, &want, 1, 1);
    const int innocent[] = {WEFT_ERROR_CANCELLED, WEFT_ERROR_NOT_FOUND};
    for (size_t i = 0; i < G_N_ELEMENTS(innocent); i++) {
        s->workers[0].fail_generate = innocent[i];
        begin(s, &a, 1, 1);
        sim_run_for(s, SECOND);
        s->workers[0].fail_generate = 0;
        assert_ends_same(s, &a, &want);
    }
    s->workers[0].fail_generate = WEFT_ERROR_INVALID;
    begin(s, &a, 1, 1);
    sim_answer(s, &a, 10 * SECOND);
    assert_int_equal(a.error->code, WEFT_ERROR_INVALID);
    answer_clear(&a);
    answer_clear(&want);
}

/* A leader that ends a call for its slow reader is at no fault: the rest is asked for again, and
 * nobody else's stream is touched. A call that brings nothing new is not repeated. */
static void test_too_slow_for_a_leader(void **state)
{
    SimCluster *s = *state;
    FakeWorker *w = &s->workers[0];
    start_workers(s, 1);
    Answer want = {0}, a = {0}, beside = {0};
    undisturbed(s, &want, 1, 1);
    begin(s, &beside, 1, 1);
    sim_run_for(s, SECOND / 10); /* it has more than one token by now, */
    w->full_after = 2;           /* and is ended too */
    begin(s, &a, 1, 1);
    sim_run_for(s, SECOND / 5);
    assert_false(beside.done);
    w->full_after = 7;
    assert_ends_same(s, &a, &want);
    assert_ends_same(s, &beside, &want);
    assert_int_equal(a.run_done->recoveries + beside.run_done->recoveries, 0);
    assert_int_equal(w->n_starts, 1);
    assert_true(w->n_resumed > 10);
    w->full_after = 1; /* the one that is drawn again */
    begin(s, &a, 1, 1);
    sim_answer(s, &a, SECOND);
    assert_int_equal(a.error->code, WEFT_ERROR_FULL);
    assert_int_equal(w->n_starts, 1);
    answer_clear(&a);
    answer_clear(&beside);
    answer_clear(&want);
}

static void test_client_leaves_while_it_waits(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 2);
    Answer a = {0}, b = {0};
    begin(s, &a, 2, 1);
    sim_run_for(s, 500000);
    FakeWorker *leader = leader_of(s);
    sim_worker_kill(leader);
    sim_run_for(s, 5 * SECOND);
    rpc_client_cancel(a.call);
    sim_run_for(s, SECOND);
    assert_true(a.done);
    sim_worker_start(s, (unsigned)(leader - s->workers));
    sim_run_for(s, 2 * SECOND);
    unsigned n = s->workers[0].n_generates + s->workers[1].n_generates;
    undisturbed(s, &b, 2, 1);
    assert_int_equal(s->workers[0].n_generates + s->workers[1].n_generates, n + 1);
    answer_clear(&a);
    answer_clear(&b);
}

static void test_deadline_while_it_waits(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 1);
    SimRequest request;
    sim_request_init(s, &request, "hello", N_TOKENS, 0, 0, 0);
    request.run.deadline_ms = 9000;
    Answer a = {0};
    int64_t begun_us = sim_world_now_us(s->world);
    sim_request_begin(s, &a, &request);
    sim_run_for(s, 500000);
    sim_worker_kill(leader_of(s));
    sim_answer(s, &a, 10 * SECOND);
    assert_int_equal(a.error->code, WEFT_ERROR_DEADLINE);
    assert_in_range((a.done_us - begun_us) / 100000, 89, 91);
    answer_clear(&a);
}

/* The leader says that it waits for the other: the other is named. */
static void test_sink_is_named(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 3);
    Answer want = {0}, a = {0};
    begin_after(s, &want, &a, 2, 1);
    FakeWorker *leader = leader_of(s), *other = follower_of(s);
    report_wait(leader, other->name, "step 3 from stage 1", 2100, true);
    leader->stands = true;
    sim_run_for(s, 2 * SECOND);
    leader->stands = false;
    assert_ends_same(s, &a, &want);
    g_autofree char *named =
        g_strdup_printf("worker %s did not answer in step 3 from stage 1", other->name);
    assert_non_null(strstr(a.notices->str, named));
    answer_clear(&a);
    answer_clear(&want);
}

/* Who was named gets no new work before it is heard of, also while its last heartbeat is young: the
 * stream goes on without it before it is declared lost. */
static void test_named_is_not_planned_again(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 3);
    Answer want = {0}, a = {0};
    begin_after(s, &want, &a, 2, 1);
    FakeWorker *leader = leader_of(s), *other = follower_of(s);
    unsigned loads = other->n_loads;
    int64_t frozen_us = sim_world_now_us(s->world);
    report_wait(leader, other->name, "step 3 from stage 1", 2100, true);
    leader->stands = true;
    sim_worker_freeze(other, true);
    sim_run_for(s, 1300000);
    leader->stands = false;
    assert_ends_same(s, &a, &want);
    assert_int_equal(a.run_done->recoveries, 1);
    assert_true(a.done_us - frozen_us < 4 * SECOND);
    sim_worker_freeze(other, false);
    sim_run_for(s, 2 * SECOND);
    assert_int_equal(other->n_loads, loads);
    answer_clear(&a);
    answer_clear(&want);
}

/* One after another, workers die, freeze or lose their cable at a random moment of a request: each
 * request ends with exactly its tokens. */
static void test_many_losses(void **state)
{
    for (uint64_t seed = 1; seed <= 30; seed++) {
        SimCluster *s = sim_cluster_new(seed);
        Random *random = sim_world_random(s->world);
        start_workers(s, 4);
        Answer want = {0}, a = {0};
        undisturbed(s, &want, 2, 1);
        for (int round = 0; round < 5; round++) {
            begin(s, &a, 2, 1);
            sim_run_for(s, (int64_t)(random_u64(random) % 1200000));
            FakeWorker *victim = &s->workers[random_u64(random) % 4];
            Harm how = (Harm)(random_u64(random) % 3);
            harm(victim, how);
            sim_answer(s, &a, 20 * SECOND);
            assert_same(&a, &want);
            sim_run_for(s, (int64_t)(random_u64(random) % 6000000));
            heal(s, victim, how);
            sim_run_for(s, 2 * SECOND);
            answer_clear(&a);
        }
        answer_clear(&want);
        sim_cluster_free(s);
    }
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

/* Neither can hold it alone: what is missing is memory, and how much is said. */
static void test_says_how_much_memory_is_missing(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 2);
    Answer want = {0}, a = {0};
    undisturbed(s, &want, 1, 1);
    const Weft__V1__Plan *plan = want.started->plan;
    const Weft__V1__Rank *rank = plan->replicas[0]->stages[0]->ranks[0];
    uint64_t one_stream = rank->kv_bytes_per_token * plan->definition->context;
    uint64_t least = rank->peak_bytes - one_stream * (plan->streams - 1);
    for (unsigned i = 0; i < 2; i++) {
        sim_worker_kill(&s->workers[i]);
        s->workers[i].memory_bytes = least - rank->weight_bytes / 4;
        s->workers[i].n_loads = 0;
    }
    start_workers(s, 2);
    undisturbed(s, &want, 0, 0);
    assert_int_equal(s->workers[0].n_loads + s->workers[1].n_loads, 2);
    begin(s, &a, 0, 0);
    sim_run_for(s, 500000);
    sim_worker_kill(leader_of(s));
    sim_answer(s, &a, 70 * SECOND);
    assert_int_equal(a.error->code, WEFT_ERROR_NOT_READY);
    assert_non_null(strstr(a.error->message, "of memory are missing"));
    answer_clear(&a);
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

/* Who is not to wait is told at once, but what can be had without waiting is had. */
static void test_does_not_wait(void **state)
{
    SimCluster *s = *state;
    sim_cluster_stop(s);
    s->recovery_wait_ms = 0;
    sim_cluster_start(s);
    start_workers(s, 3);
    Answer want = {0}, a = {0};
    begin_after(s, &want, &a, 2, 1);
    sim_worker_kill(leader_of(s));
    assert_ends_same(s, &a, &want);
    assert_int_equal(a.run_done->recoveries, 1);
    begin(s, &a, 2, 1);
    sim_run_for(s, SECOND / 2);
    sim_worker_kill(leader_of(s));
    sim_answer(s, &a, SECOND);
    assert_int_equal(a.error->code, WEFT_ERROR_IMPOSSIBLE);
    assert_non_null(strstr(a.error->message, "needs 2 workers and 1 can be used"));
    answer_clear(&a);
    answer_clear(&want);
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
        cmocka_unit_test_setup_teardown(test_two_at_once, cluster_set_up, cluster_tear_down),
        cmocka_unit_test(test_dies_again_during_recovery),
        cmocka_unit_test_setup_teardown(test_many_streams, cluster_set_up, cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_stop_string_across_a_loss, cluster_set_up,
                                        cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_scores_across_a_loss, cluster_set_up,
                                        cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_other_replica_takes_over, cluster_set_up,
                                        cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_wrong_numbers_after_a_loss, cluster_set_up,
                                        cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_another_kind_does_not_go_on, cluster_set_up,
                                        cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_poison_ends, cluster_set_up, cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_server_that_goes_down, cluster_set_up,
                                        cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_too_slow_for_a_leader, cluster_set_up,
                                        cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_client_leaves_while_it_waits, cluster_set_up,
                                        cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_deadline_while_it_waits, cluster_set_up,
                                        cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_sink_is_named, cluster_set_up, cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_named_is_not_planned_again, cluster_set_up,
                                        cluster_tear_down),
        cmocka_unit_test(test_many_losses),
        cmocka_unit_test_setup_teardown(test_waits_for_a_worker, cluster_set_up, cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_says_how_much_memory_is_missing, cluster_set_up,
                                        cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_waits_a_bounded_time, cluster_set_up,
                                        cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_does_not_wait, cluster_set_up, cluster_tear_down),
    };
    return cmocka_run_group_tests_name("coordinator recovery", tests, NULL, NULL);
}
