/* An epoch of a job: its calls from the first to what ends them. Invariants: train_job.c. */
#include "coordinator/train/train_job_state.h"

#include "coordinator/train/train_settings.h"
#include "coordinator/train/train_status.h"
#include "proto/base/error.h"
#include "proto/model/model_message.h"
#include "proto/plan/plan_message.h"

#include <string.h>

#define AGAIN_US 700000 /* after a failure: the detector has spoken then (MEMBER_RESET_US) */
#define LOAD_STALL_US (INT64_C(60) * 1000000)
#define FRUITLESS_LIMIT 20u /* epochs without a new step */

/* ---- LOADING ---- */

static void job_end_epoch(TrainJob *job, const GError *why);
static void on_failed(TrainCall *call, const GError *error, void *user);

static void want_work(void *user)
{
    JobTask *task = user;
    train_want_read(task->want, task->job->input, task->job->checkpoint);
}

static void want_done(void *user)
{
    JobTask *task = user;
    TrainJob *job = task->job;
    TrainWant *want = g_steal_pointer(&task->want);
    const bool asks = task->epoch == job->epoch && task->rank < job->calls->len;
    TrainCall *call = asks ? job->calls->pdata[task->rank] : NULL;
    if (job_task_end(task) && call != NULL) {
        call->asking = false;
        if (want->error != NULL) {
            on_failed(call, want->error, job);
        } else {
            train_call_answer(call, want->id, want->data, want->size);
        }
    }
    train_want_free(want);
}

/* One after another: so what is read and not yet sent is bounded. */
static void on_want(TrainCall *call, const Weft__V1__TrainWant *want, void *user)
{
    TrainJob *job = user;
    if (call->asking) {
        g_autoptr(GError) error = g_error_new_literal(WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                                                      "it asks while a question of it is open");
        on_failed(call, error, job);
        return;
    }
    JobTask *task = job_task_new(job);
    task->want = train_want_new(want);
    task->epoch = job->epoch;
    task->rank = call->index;
    call->asking = true;
    work_pool_run(job->o.pool, want_work, want_done, job_task_dropped, task);
}

static void on_loaded(TrainCall *call, void *user)
{
    TrainJob *job = user;
    for (guint i = 0; i < job->calls->len; i++) {
        if (!((TrainCall *)job->calls->pdata[i])->loaded) {
            return;
        }
    }
    train_calls_start(job->calls, job->o.members, job->o.random);
    train_job_enter(job, JOB_RUNNING);
}

/* ---- RUNNING ---- */

static void on_step(const Weft__V1__TrainProgress *step, void *user)
{
    TrainJob *job = user;
    GError *error = NULL;
    if (step->step >= job->spec->steps) {
        g_autoptr(GError) odd = g_error_new(
            WEFT_ERROR, WEFT_ERROR_PROTOCOL,
            "the first rank tells of a step after the last, %" G_GUINT64_FORMAT, job->spec->steps);
        job_end_epoch(job, odd);
        return;
    }
    g_autofree char *sample =
        step->n_sample > 0 ? train_input_text(job->input, step->sample, step->n_sample) : NULL;
    train_pace_step(&job->pace, step->step, step->seconds);
    const char *line =
        train_log_step(job->log, step, job->spec->sequences * job->spec->length, sample, &error);
    if (error != NULL) {
        train_job_fail(job, error);
    } else if (line != NULL) {
        train_job_say(job, line);
    }
}

static void on_save(TrainCall *call, const Weft__V1__TrainReport *report, void *user)
{
    TrainJob *job = user;
    g_autoptr(GError) error = NULL;
    if (job->saving == NULL) {
        error = g_error_new_literal(WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                                    "it sends a checkpoint of a job that has none");
    }
    if (error != NULL || !train_saving_add(job->saving, call->index, report, &error)) {
        on_failed(call, error, job);
    }
}

static void finish_if_done(TrainJob *job);

static void on_taken(uint32_t rank, uint64_t bytes, void *user)
{
    train_call_taken(((TrainJob *)user)->calls->pdata[rank], bytes);
}

static void on_saved(uint64_t step, const GError *error, void *user)
{
    TrainJob *job = user;
    if (g_error_matches(error, WEFT_ERROR, WEFT_ERROR_NUMERICS)) {
        if (!job->dead) {
            train_job_fail(job, g_error_copy(error));
        }
        return;
    }
    if (error != NULL) {
        train_job_sayf(
            job, "checkpoint of step %" G_GUINT64_FORMAT " was not written: %s; the last one stays",
            step, error->message);
    } else if (!job->dead) {
        g_autofree char *name = checkpoint_name(step);
        g_free(job->saved);
        job->saved = g_build_filename(job->spec->checkpoint_directory, name, NULL);
        train_job_sayf(job, "checkpoint %s", job->saved);
    }
    if (!job->dead) {
        finish_if_done(job);
    }
}

static void on_saving_closed(bool dropped, void *user)
{
    TrainJob *job = user;
    job->dead = job->dead || dropped;
    job->working--;
    train_job_release(job);
}

static void open_saving(TrainJob *job)
{
    const TrainSavingOptions options = {.pool = job->o.pool,
                                        .disk = checkpoint_disk(),
                                        .directory = job->spec->checkpoint_directory,
                                        .job = job->text,
                                        .definition = job->definition,
                                        .tokenizer_json = job->input->tokenizer_json,
                                        .spec = job->input->spec,
                                        .keep = (unsigned)job->spec->checkpoint_keep,
                                        .n_ranks = job->calls->len};
    const TrainSavingEvents events = {on_taken, on_saved, on_saving_closed, job};
    if (options.directory != NULL) {
        job->saving = train_saving_new(&options, &events);
        job->working++;
    }
}

static bool all_done(const TrainJob *job)
{
    for (guint i = 0; i < job->calls->len; i++) {
        if (!((TrainCall *)job->calls->pdata[i])->done) {
            return false;
        }
    }
    return job->calls->len > 0;
}

/* Of ranks that are done: one that has not the first one's weights. NULL: all have. */
static GError *other_weights(const TrainJob *job)
{
    const TrainCall *first = job->calls->pdata[0];
    for (guint i = 1; i < job->calls->len; i++) {
        const TrainCall *call = job->calls->pdata[i];
        if (!hash128_equal(&call->digest, &first->digest)) {
            return g_error_new(WEFT_ERROR, WEFT_ERROR_NUMERICS,
                               "worker %s (rank %u) ends with other weights than worker %s (rank "
                               "0): one of them computes wrongly",
                               call->worker, i, first->worker);
        }
    }
    return NULL;
}

/* All ranks have the last weights, and they are saved. */
static void finish_if_done(TrainJob *job)
{
    char digest[33];
    if (job->state != JOB_RUNNING || !all_done(job)) {
        return;
    }
    GError *error = other_weights(job);
    if (error != NULL) {
        train_job_fail(job, error);
        return;
    }
    if (job->tracing || (job->saving != NULL && !train_saving_is_idle(job->saving))) {
        return;
    }
    hash128_hex(&((TrainCall *)job->calls->pdata[0])->digest, digest);
    train_job_finish(job, digest);
}

static void trace_work(void *user)
{
    JobTask *task = user;
    task->text = train_trace_write(task->trace, task->job->spec->trace_file);
}

static void trace_done(void *user)
{
    JobTask *task = user;
    TrainJob *job = task->job;
    job->tracing = false;
    train_job_say(job, task->text);
    if (job_task_end(task)) {
        finish_if_done(job);
    }
}

static void on_trace(TrainCall *call, const Weft__V1__TrainTrace *trace, void *user)
{
    TrainJob *job = user;
    g_autoptr(GError) error = NULL;
    if (job->trace == NULL) {
        error = g_error_new_literal(WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                                    "it sends a trace, and none is asked for");
    }
    if (error != NULL ||
        !train_trace_add(job->trace, call->index, trace, loop_now_us(job->o.loop), &error)) {
        on_failed(call, error, job);
    } else if (train_trace_is_whole(job->trace)) {
        JobTask *task = job_task_new(job);
        task->trace = g_steal_pointer(&job->trace);
        job->tracing = true;
        work_pool_run(job->o.pool, trace_work, trace_done, job_task_dropped, task);
    }
}

static void on_done(TrainCall *call, void *user)
{
    finish_if_done(user);
}

/* ---- the end of an epoch ---- */

static void job_end_epoch(TrainJob *job, const GError *why)
{
    if (train_error_is_final(why)) {
        train_job_fail(job, g_error_copy(why));
        return;
    }
    job->fruitless = train_log_steps(job->log) > job->steps_before ? 0 : job->fruitless + 1;
    const bool goes_on = job->fruitless <= FRUITLESS_LIMIT;
    g_autofree char *line = g_strdup_printf(
        "epoch %" G_GUINT64_FORMAT " ended: %s%s", job->epoch, why->message,
        !goes_on             ? ""
        : job->saved != NULL ? ": it goes on from its newest checkpoint, on the workers left"
                             : ": it begins again, on the workers left");
    log_warn(job->o.log, "job %s %s", job->spec->name, line);
    train_job_say(job, line);
    train_job_end_calls(job);
    if (!goes_on) {
        train_job_fail(job, g_error_new(WEFT_ERROR, WEFT_ERROR_FAILED,
                                        "%u epochs ended without a step, the last one: %s",
                                        job->fruitless, why->message));
        return;
    }
    g_clear_error(&job->problem);
    job->problem = g_error_copy(why);
    job->may_shrink = true;
    train_job_enter(job, JOB_PLANNING);
    train_job_plan_later(job, AGAIN_US);
}

/* Of a worker that the failure detector gave up (its channel is closed then) what that says, else
 * how the call ended. */
static void on_failed(TrainCall *call, const GError *error, void *user)
{
    TrainJob *job = user;
    const bool final = train_error_is_final(error);
    g_autoptr(GError) lost = final ? NULL : train_call_lost(call, job->o.members, LOAD_STALL_US);
    if (!final && lost == NULL && strstr(error->message, "worker ") == NULL) {
        const bool gone = g_error_matches(error, WEFT_ERROR, WEFT_ERROR_WORKER_LOST) ||
                          g_error_matches(error, WEFT_ERROR, WEFT_ERROR_UNREACHABLE);
        lost = g_error_new(error->domain, error->code, "worker %s%s: %s", call->worker,
                           gone ? " is gone" : "", error->message);
    }
    job_end_epoch(job, lost != NULL ? lost : error);
}

/* A frozen or cut-off worker answers nothing: the failure detector knows. */
static void look_due(void *user)
{
    TrainJob *job = user;
    job->timer = NULL;
    for (guint i = 0; i < job->calls->len; i++) {
        g_autoptr(GError) error =
            train_call_lost(job->calls->pdata[i], job->o.members, LOAD_STALL_US);
        if (error != NULL) {
            job_end_epoch(job, error);
            return;
        }
    }
    job->timer = loop_timer_start(job->o.loop, TRAIN_LOOK_US, look_due, job);
}

/* ---- an epoch ---- */

static TrainCallEvents call_events(TrainJob *job)
{
    return (TrainCallEvents){on_want,  on_loaded, on_step,   on_save,
                             on_trace, on_done,   on_failed, job};
}

void train_epoch_begin(TrainJob *job)
{
    Weft__V1__Stamp stamp = WEFT__V1__STAMP__INIT;
    Weft__V1__TrainLoad load = WEFT__V1__TRAIN_LOAD__INIT;
    TrainSettingsMessage settings;
    const TrainCallEvents events = call_events(job);
    if (!train_calls_possible(job->plan, job->o.members)) { /* somebody left since the plan */
        train_job_plan_later(job, AGAIN_US);
        return;
    }
    stamp.cluster = (char *)job->o.cluster;
    stamp.generation = job->o.generation;
    stamp.job = job->spec->name;
    stamp.epoch = job->epoch;
    train_settings_fill(job->spec, job->input, &job->layout,
                        job->checkpoint != NULL ? checkpoint_state(job->checkpoint) : NULL,
                        &settings);
    load.stamp = &stamp;
    load.plan = plan_to_message(job->plan);
    load.model = model_to_message(job->input->spec, true);
    load.seal = !job->o.seal_off;
    load.settings = &settings.settings;
    train_job_enter(job, JOB_LOADING);
    job->steps_before = train_log_steps(job->log);
    train_pace_begin(&job->pace, settings.settings.first_step);
    train_job_sayf(job, "epoch %" G_GUINT64_FORMAT ": dp %u, pp %u, tp %u%s", job->epoch,
                   job->layout.dp, job->layout.pp, job->layout.tp,
                   job->spec->numerics == NUMERICS_FAST ? ", numerics fast"
                   : job->layout.on_devices             ? ", numerics exact on devices"
                                                        : "");
    train_calls_load(job->calls, job->o.loop, job->plan, job->o.members, &load, &events);
    const TrainJobView view = train_job_view(job);
    train_log_set_course(job->log, job->spec->steps, train_status_share(&job->o, &view));
    g_autofree const char **hosts = train_calls_hosts(job->calls, job->o.members);
    job->trace =
        train_trace_new(job->spec, &job->layout, job->plan, hosts, settings.settings.first_step);
    open_saving(job);
    weft__v1__plan__free_unpacked(load.plan, NULL);
    weft__v1__model__free_unpacked(load.model, NULL);
    job->timer = loop_timer_start(job->o.loop, TRAIN_LOOK_US, look_due, job);
}
