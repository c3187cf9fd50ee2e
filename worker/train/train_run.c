/* RUNNING: steps, one after the other, with what belongs between them. */
#include "proto/base/error.h"
#include "worker/train/train_engine_state.h"

/* ---- posts to the owner ---- */

typedef struct ReportPost {
    TrainEvents events;
    TrainReport report;
    uint32_t *sample;
    PipelineOpTime *trace;
    TrainSnapshot *snapshot;
} ReportPost;

static void deliver_report(void *user)
{
    ReportPost *p = user;
    p->events.step(&p->report, p->events.user);
    g_free(p->sample);
    g_free(p->trace);
    g_free(p);
}

static void deliver_snapshot(void *user)
{
    ReportPost *p = user;
    p->events.snapshot(p->snapshot, p->events.user);
    g_free(p);
}

static bool is_due(uint64_t done, uint64_t every, uint64_t steps)
{
    return every > 0 && (done % every == 0 || done == steps);
}

/* ---- a step ---- */

static void begin_trace(TrainEngine *e)
{
    if (e->trace != NULL) {
        g_array_set_size(e->trace, 0);
    }
}

static void end_trace(const TrainEngine *e, TrainReport *out)
{
    const TrainWork *w = &e->o.work;
    const uint64_t step = out->step.step;
    out->traced = step >= w->trace_first && step - w->trace_first < w->trace_steps;
    if (out->traced) {
        out->trace = (const PipelineOpTime *)(const void *)e->trace->data;
        out->n_trace = e->trace->len;
    }
}

static bool run_step(TrainEngine *e, TrainReport *out, GError **error)
{
    const uint64_t waited = e->links != NULL ? train_links_wait_us(e->links) : 0;
    begin_trace(e);
    out->begin_us = link_clock_us();
    if (!train_rank_step(e->rank, &out->step, error)) {
        return false;
    }
    out->end_us = link_clock_us();
    end_trace(e, out);
    if (out->step.step == e->o.work.from.step) {
        const uint64_t now = train_engine_resident();
        out->resident_bytes = now > e->resident_before ? now - e->resident_before : 0;
    }
    out->seconds = (double)(out->end_us - out->begin_us) * 1e-6;
    out->waited = e->links != NULL ? (double)(train_links_wait_us(e->links) - waited) * 1e-6 : 0.0;
    out->memory = train_rank_memory(e->rank);
    return true;
}

static bool validate(TrainEngine *e, TrainReport *out, GError **error)
{
    const TrainWork *w = &e->o.work;
    out->validated =
        e->validation != NULL && is_due(out->step.step + 1, w->validation_every, w->steps);
    return !out->validated || train_rank_validate(e->rank, &e->validation_source,
                                                  w->validation_sequences, &out->validation, error);
}

/* *out: the ids, or NULL. */
static bool sample(TrainEngine *e, TrainReport *report, uint32_t **out, GError **error)
{
    const TrainWork *w = &e->o.work;
    *out = NULL;
    if (!is_due(report->step.step + 1, w->sample_every, w->steps)) {
        return true;
    }
    g_autofree uint32_t *ids = g_new(uint32_t, w->sample.n_tokens);
    if (!train_rank_sample(e->rank, &w->sample, ids, &report->n_sample, error)) {
        return false;
    }
    report->sample = *out = g_steal_pointer(&ids);
    return true;
}

/* The owner has the last one until then: its writing is slower than the training, by however much.
 * So that other ranks wait for this one all the while, it says that it lives. */
static bool wait_for_snapshot(TrainEngine *e, GError **error)
{
    int64_t said_us = g_get_monotonic_time();
    while (atomic_load(&e->snapshot_out) && !atomic_load(&e->abort)) {
        train_engine_rest(e);
        if (g_get_monotonic_time() - said_us > e->wait_us / 4) {
            said_us = g_get_monotonic_time();
            if (!train_greeting_holds(e, error)) {
                return false;
            }
        }
    }
    if (atomic_load(&e->abort)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_CANCELLED, "training was aborted");
        return false;
    }
    return true;
}

static bool checkpoint(TrainEngine *e, const TrainReport *report, GError **error)
{
    Hash128 digest;
    if (!is_due(report->step.step + 1, e->o.work.checkpoint_every, e->o.work.steps)) {
        return true;
    }
    if (!wait_for_snapshot(e, error) || !train_greeting_saves(e, error) ||
        !train_rank_digest(e->rank, &digest, error)) {
        return false;
    }
    TrainSnapshot *snapshot =
        train_snapshot_take(e->rank, e->o.spec, report->step.samples_seen, &digest, error);
    if (snapshot == NULL) {
        return false;
    }
    ReportPost *p = g_new0(ReportPost, 1);
    *p = (ReportPost){.events = e->o.events, .snapshot = snapshot};
    atomic_store(&e->snapshot_out, true);
    loop_post(e->o.loop, deliver_snapshot, p);
    return true;
}

bool train_run(TrainEngine *e, Hash128 *digest, GError **error)
{
    while (train_rank_progress(e->rank)->step < e->o.work.steps) {
        TrainReport report = {.validated = false};
        if (atomic_load(&e->abort)) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_CANCELLED, "training was aborted");
            return false;
        }
        uint32_t *ids;
        if (!run_step(e, &report, error) || !validate(e, &report, error) ||
            !sample(e, &report, &ids, error)) {
            return false;
        }
        ReportPost *p = g_new0(ReportPost, 1);
        PipelineOpTime *trace = g_memdup2(report.trace, sizeof *trace * report.n_trace);
        report.trace = trace;
        *p = (ReportPost){.events = e->o.events, .report = report, .sample = ids, .trace = trace};
        loop_post(e->o.loop, deliver_report, p);
        if (!checkpoint(e, &report, error)) {
            return false;
        }
    }
    return train_rank_digest(e->rank, digest, error);
}
