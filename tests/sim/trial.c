#include "tests/sim/trial.h"

#include "tests/sim/sim_disk.h"
#include "tests/sim/watch.h"

/* From the repair to the last answer, whatever was broken before: a fence, a heartbeat's deadline,
 * a start that nobody answers, and the retries of clients fit in. */
#define ANSWER_US (30 * WHOLE_SECOND)
#define LOOK_US (WHOLE_SECOND / 4)
#define QUIET_US (12 * WHOLE_SECOND) /* more than a lost hello is waited for */

typedef struct Trial {
    History history;
    Stream streams[SCHEDULE_STREAMS];
    unsigned n_streams;
} Trial;

static bool all_over(const Trial *t)
{
    for (unsigned i = 0; i < t->n_streams; i++) {
        if (!stream_is_over(&t->streams[i])) {
            return false;
        }
    }
    return true;
}

static void run_until_broken(const Trial *t, int64_t until_us)
{
    while (!t->history.violations && sim_world_step(t->history.whole->world, until_us)) {
    }
}

static void run_until_over(Trial *t, int64_t until_us)
{
    SimWorld *world = t->history.whole->world;
    while (!all_over(t) && !t->history.violations && sim_world_step(world, until_us)) {
    }
}

static void look(void *user)
{
    Trial *t = user;
    if (t->history.whole->over) {
        return;
    }
    watch_look(&t->history);
    loop_timer_start(t->history.whole->director, LOOK_US, look, t);
}

static void check_answers(Trial *t)
{
    for (unsigned i = 0; i < t->n_streams; i++) {
        const Stream *s = &t->streams[i];
        if (!stream_is_over(s)) {
            history_violate(&t->history, "every request is answered",
                            "stream %u has no answer %.1f s after the repair: attempt %u is %s "
                            "with %u of %u tokens, heard of last at %.3f s; last error: %s",
                            i, (double)ANSWER_US / 1e6, s->n_attempts,
                            s->state == STREAM_OPEN ? "open" : "to be made", s->n_got[0],
                            s->plan.n_tokens, (double)s->heard_us / 1e6,
                            s->last_error ? s->last_error : "none");
        }
    }
}

static void check_stalls(Trial *t, int64_t bound_us)
{
    for (unsigned i = 0; bound_us > 0 && i < t->n_streams; i++) {
        if (t->streams[i].stall_us > bound_us) {
            history_violate(&t->history, "a stall is bounded",
                            "stream %u stood still for %.1f s, at most %.1f s is promised", i,
                            (double)t->streams[i].stall_us / 1e6, (double)bound_us / 1e6);
        }
    }
}

static void take_result(Trial *t, TrialResult *result)
{
    SimWorld *world = t->history.whole->world;
    *result = (TrialResult){.n_tokens = t->history.n_tokens,
                            .n_resumed = t->history.n_resumed,
                            .virtual_us = sim_world_now_us(world),
                            .n_events = sim_world_n_events(world),
                            .digest = sim_world_digest(world)};
    for (unsigned i = 0; i < t->n_streams; i++) {
        result->stall_us = MAX(result->stall_us, t->streams[i].stall_us);
        result->n_attempts += t->streams[i].n_attempts;
        result->n_done += t->streams[i].state == STREAM_DONE;
        result->n_cancelled += t->streams[i].state == STREAM_CANCELLED;
    }
}

void trial_run(const Foundation *foundation, const Schedule *schedule, bool chatty,
               TrialResult *result)
{
    Trial trial = {.n_streams = schedule->n_streams};
    History *h = &trial.history;
    const SimEngineHooks hooks = watch_hooks(h);
    Whole *w = h->whole =
        whole_new(foundation, schedule->seed, schedule->n_workers, schedule->memory_bytes,
                  schedule->recovery_wait_ms, &hooks, chatty);
    watch_begin(h);
    for (unsigned i = 0; i < schedule->n_workers; i++) {
        whole_start_worker(w, i);
    }
    sim_world_run_for(w->world, WHOLE_SECOND / 2);
    for (unsigned i = 0; i < schedule->n_streams; i++) {
        stream_begin(&trial.streams[i], h, i, &schedule->streams[i]);
    }
    sim_disk_enter(w, schedule->disk_us);
    schedule_begin(schedule, w);
    look(&trial);
    run_until_broken(&trial, sim_world_now_us(w->world) + schedule->repair_us);
    run_until_over(&trial, sim_world_now_us(w->world) + ANSWER_US);
    if (!h->violations) {
        check_answers(&trial);
        check_stalls(&trial, schedule_stall_us(schedule));
    }
    run_until_broken(&trial, sim_world_now_us(w->world) + QUIET_US);
    if (!h->violations) {
        watch_check_quiet(h);
    }
    take_result(&trial, result);
    for (unsigned i = 0; i < trial.n_streams; i++) {
        stream_clear(&trial.streams[i]);
    }
    watch_end(h);
    sim_disk_leave();
    whole_free(w);
    result->violation = history_text(h);
    history_clear(h);
}

void trial_result_clear(TrialResult *result)
{
    g_free(result->violation);
    *result = (TrialResult){0};
}
