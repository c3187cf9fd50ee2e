#include "tests/unit/coordinator/sim_streams.h"

#include "coordinator/message.h"

#include <string.h>

int cluster_set_up(void **state)
{
    *state = sim_cluster_new(1);
    return 0;
}

int cluster_tear_down(void **state)
{
    sim_cluster_free(*state);
    return 0;
}

void start_workers(SimCluster *s, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        sim_worker_start(s, i);
    }
    sim_run_for(s, 2 * SECOND);
}

const char *state_of(SimCluster *s, const char *name)
{
    static char text[32];
    Answer a = {0};
    const Weft__V1__Member *member = sim_status(s, &a, name);
    g_strlcpy(text, member != NULL ? member->state : "absent", sizeof text);
    answer_clear(&a);
    return text;
}

void run_ok(SimCluster *s, Answer *a, uint32_t pp, uint32_t tp)
{
    sim_run_begin(s, a, "hello", 5, pp, tp);
    sim_answer(s, a, 10 * SECOND);
    g_assert_no_error(a->error);
    g_assert_cmpint(a->ids->len, ==, 5);
    g_assert_cmpint(a->n_choices_done, ==, 1);
}

void begin(SimCluster *s, Answer *a, uint32_t pp, uint32_t tp)
{
    sim_run_begin(s, a, "hello", N_TOKENS, pp, tp);
}

void undisturbed(SimCluster *s, Answer *want, uint32_t pp, uint32_t tp)
{
    begin(s, want, pp, tp);
    sim_answer(s, want, 10 * SECOND);
    g_assert_no_error(want->error);
    g_assert_cmpint(want->ids->len, ==, N_TOKENS);
    g_assert_cmpint(want->run_done->recoveries, ==, 0);
}

void begin_after(SimCluster *s, Answer *want, Answer *a, uint32_t pp, uint32_t tp)
{
    undisturbed(s, want, pp, tp);
    begin(s, a, pp, tp);
    sim_run_for(s, 500000);
}

void assert_same(const Answer *a, const Answer *want)
{
    g_assert_no_error(a->error);
    g_assert_cmpint(a->ids->len, ==, want->ids->len);
    g_assert_cmpmem(a->ids->data, a->ids->len * sizeof(uint32_t), want->ids->data,
                    want->ids->len * sizeof(uint32_t));
    g_assert_cmpstr(a->text->str, ==, want->text->str);
    g_assert_cmpmem(a->run_done->digest.data, a->run_done->digest.len, want->run_done->digest.data,
                    want->run_done->digest.len);
    g_assert_cmpstr(a->run_done->finish_reason, ==, want->run_done->finish_reason);
}

void assert_ends_same(SimCluster *s, Answer *a, const Answer *want)
{
    sim_answer(s, a, 10 * SECOND);
    assert_same(a, want);
}

void report_wait(FakeWorker *w, const char *waits_for, const char *operation, uint64_t since_ms,
                 bool expired)
{
    const Weft__V1__Held *held = g_ptr_array_index(w->held, 0);
    Weft__V1__Waiting waiting = WEFT__V1__WAITING__INIT;
    waiting.job = held->job;
    waiting.replica = held->replica;
    waiting.epoch = held->epoch;
    waiting.waits_for = (char *)waits_for;
    waiting.operation = (char *)operation;
    waiting.since_ms = since_ms;
    waiting.expired = expired;
    g_ptr_array_add(w->waiting, message_copy(&waiting.base));
}

FakeWorker *leader_of(SimCluster *s)
{
    for (unsigned i = 0; i < WORKERS_LIMIT; i++) {
        if (s->workers[i].running && s->workers[i].streams->len > 0) {
            return &s->workers[i];
        }
    }
    return NULL;
}

FakeWorker *follower_of(SimCluster *s)
{
    for (unsigned i = 0; i < WORKERS_LIMIT; i++) {
        FakeWorker *w = &s->workers[i];
        if (w->running && w->streams->len == 0 && w->held->len > 0) {
            return w;
        }
    }
    return NULL;
}

void harm(FakeWorker *w, Harm how)
{
    if (how == KILL) {
        sim_worker_kill(w);
    } else if (how == FREEZE) {
        sim_worker_freeze(w, true);
    } else {
        sim_worker_cut(w, true);
    }
}

void heal(SimCluster *s, FakeWorker *w, Harm how)
{
    if (how == KILL) {
        sim_worker_start(s, (unsigned)(w - s->workers));
    } else if (how == FREEZE) {
        sim_worker_freeze(w, false);
    } else {
        sim_worker_cut(w, false);
    }
}
