/* Diagram: train_job.h. Invariants
 *   1. Calls of one epoch only; a new one begins when all calls of the last were ended and nothing
 * is written any more, under a number that is durable.
 *   2. `working` counts what runs in the pool or the store, and savings that are not closed: the
 *      job is freed after the last of them, and no epoch begins before.
 *   3. A step is said once, whatever is repeated; told again with another loss it ends the job.
 *   4. A job that asked for no numerics class gets that of its first place, and its log says which:
 * no later place, and no restart of the coordinator, changes it. */
#include "coordinator/train/train_job.h"

#include "coordinator/jobs/deployment.h"
#include "coordinator/train/train_call.h"
#include "coordinator/train/train_file.h"
#include "coordinator/train/train_log.h"
#include "coordinator/train/train_placing.h"
#include "coordinator/train/train_plot.h"
#include "coordinator/train/train_saving.h"
#include "coordinator/train/train_settings.h"
#include "coordinator/train/train_status.h"
#include "coordinator/train/train_trace.h"
#include "coordinator/train/train_want.h"
#include "coordinator/train/train_workers.h"
#include "proto/base/error.h"
#include "proto/model/model_message.h"
#include "proto/plan/plan_message.h"

#include <errno.h>
#include <glib/gstdio.h>
#include <string.h>

#define AGAIN_US 700000 /* after a failure: the detector has spoken then (MEMBER_RESET_US) */
#define LOOK_US 500000
#define LOAD_STALL_US (INT64_C(60) * 1000000)
#define FRUITLESS_LIMIT 20u /* epochs without a new step */

typedef enum JobState {
    JOB_PREPARING,
    JOB_PLANNING,
    JOB_LOADING,
    JOB_RUNNING,
    JOB_DONE,
    JOB_FAILED
} JobState;

struct TrainJob {
    TrainJobOptions o;
    JobSpec *spec; /* own: the pool reads it, whatever becomes of its submission */
    char *text;
    TrainJobCallbacks callbacks;
    void *user;
    JobState state;
    GError *problem;
    TrainInput *input;
    TrainLog *log;
    Checkpoint *checkpoint; /* that the epoch went on from; NULL: none */
    char *saved;            /* the newest one's path */
    TrainPlacing *placing;  /* PLANNING: under way; else NULL */
    TrainLayoutChoice layout;
    TrainPace pace;
    Plan *plan;
    uint64_t epoch;
    GPtrArray *calls;    /* of TrainCall, by rank */
    TrainTrace *trace;   /* of the epoch, until it is written; NULL: there is none */
    TrainSaving *saving; /* of the epoch; NULL: no epoch, or no checkpoints */
    LoopTimer *timer;
    uint32_t working, fruitless;
    uint64_t steps_before; /* that were said when the epoch began */
    int64_t entered_us;    /* this state */
    bool dead, may_shrink, started;
    bool any_numerics; /* none was asked, and there was no place yet */
    bool tracing;      /* the trace is being written */
};

static void job_plan(TrainJob *job);
static void job_end_epoch(TrainJob *job, const GError *why);

/* ---- what is said ---- */

static void job_say(TrainJob *job, const char *line)
{
    if (!job->dead) {
        job->callbacks.say(line, job->user);
    }
}

static void G_GNUC_PRINTF(2, 3) job_sayf(TrainJob *job, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    g_autofree char *line = g_strdup_vprintf(format, args);
    va_end(args);
    job_say(job, line);
}

static void job_enter(TrainJob *job, JobState state)
{
    job->state = state;
    job->entered_us = loop_now_us(job->o.loop);
}

const char *train_job_state(const TrainJob *job)
{
    static const char *const names[] = {"preparing", "planning", "loading",
                                        "running",   "done",     "failed"};
    return names[job->state];
}

const GError *train_job_problem(const TrainJob *job)
{
    return job->problem;
}

bool train_job_failed(const TrainJob *job)
{
    return job->state == JOB_FAILED;
}

bool train_job_is_over(const TrainJob *job)
{
    return job->state == JOB_DONE || job->state == JOB_FAILED;
}

/* ---- life ---- */

static void end_calls(TrainJob *job)
{
    for (guint i = 0; i < job->calls->len; i++) {
        train_call_end(job->calls->pdata[i]);
    }
    g_ptr_array_set_size(job->calls, 0);
    train_trace_free(g_steal_pointer(&job->trace));
    train_saving_close(g_steal_pointer(&job->saving));
    train_placing_free(g_steal_pointer(&job->placing));
    loop_timer_cancel(job->o.loop, g_steal_pointer(&job->timer));
}

static void job_release(TrainJob *job)
{
    if (!job->dead || job->working > 0) {
        return;
    }
    train_input_free(job->input);
    train_log_free(job->log);
    checkpoint_free(job->checkpoint);
    plan_free(job->plan);
    g_ptr_array_unref(job->calls);
    train_pace_clear(&job->pace);
    g_clear_error(&job->problem);
    job_spec_free(job->spec);
    g_free(job->text);
    g_free(job->saved);
    g_free(job);
}

void train_job_free(TrainJob *job)
{
    if (job != NULL) {
        end_calls(job);
        job->dead = true;
        job_release(job);
    }
}

static void ended_due(void *user)
{
    TrainJob *job = user;
    job->timer = NULL;
    job->callbacks.ended(job->user);
}

static void job_over(TrainJob *job, JobState state)
{
    end_calls(job);
    job_enter(job, state);
    if (!job->dead) {
        job->timer = loop_timer_start(job->o.loop, 0, ended_due, job);
    }
}

/* error: taken. */
static void job_fail(TrainJob *job, GError *error)
{
    if (train_job_is_over(job)) {
        g_error_free(error);
        return;
    }
    g_clear_error(&job->problem);
    job->problem = error;
    log_warn(job->o.log, "job %s failed: %s", job->spec->name, error->message);
    job_sayf(job, "failed: %s", error->message);
    job_over(job, JOB_FAILED);
}

/* Errors that another try, on other workers, cannot mend. */
static bool is_final(const GError *error)
{
    return g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID) ||
           g_error_matches(error, WEFT_ERROR, WEFT_ERROR_IMPOSSIBLE) ||
           g_error_matches(error, WEFT_ERROR, WEFT_ERROR_NUMERICS);
}

/* ---- work in the pool ---- */

typedef struct JobTask {
    TrainJob *job;
    TrainLog *log;
    TrainInput *input;
    Checkpoint *checkpoint;
    GPtrArray *damages; /* of char * */
    TrainWant *want;
    TrainTrace *trace;
    uint64_t epoch; /* that asked, like rank */
    uint32_t rank;
    char *path, *text; /* of the curves; said of the trace */
    char *digest;
    GError *error;
} JobTask;

static JobTask *task_new(TrainJob *job)
{
    JobTask *task = g_new0(JobTask, 1);
    task->job = job;
    task->damages = g_ptr_array_new_with_free_func(g_free);
    job->working++;
    return task;
}

/* True: the job is still there. */
static bool task_end(JobTask *task)
{
    TrainJob *job = task->job;
    const bool alive = !job->dead;
    g_ptr_array_unref(task->damages);
    train_want_free(task->want);
    train_trace_free(task->trace);
    g_clear_error(&task->error);
    g_free(task->path);
    g_free(task->text);
    g_free(task->digest);
    if (!alive) {
        train_log_free(task->log);
        train_input_free(task->input);
        checkpoint_free(task->checkpoint);
    }
    g_free(task);
    job->working--;
    job_release(job);
    return alive;
}

/* Ends the task; false: the job is gone, or it failed by the task's error. */
static bool task_succeeded(JobTask *task)
{
    TrainJob *job = task->job;
    GError *error = g_steal_pointer(&task->error);
    const bool alive = task_end(task);
    if (alive && error != NULL) {
        job_fail(job, error);
        return false;
    }
    g_clear_error(&error);
    return alive;
}

static void task_dropped(void *user)
{
    JobTask *task = user;
    task->job->dead = true;
    task_end(task);
}

/* ---- DONE: the curves, then the last line ---- */

TrainJobView train_job_view(const TrainJob *job)
{
    return (TrainJobView){.spec = job->spec,
                          .model = job->input != NULL ? job->input->spec : NULL,
                          .points = job->log != NULL ? train_log_points(job->log) : NULL,
                          .steps = train_job_steps(job),
                          .plan = job->calls->len > 0 ? job->plan : NULL,
                          .layout = job->layout,
                          .epoch = job->epoch,
                          .calls = job->calls,
                          .checkpoint = job->saved,
                          .entered_us = job->entered_us,
                          .any_numerics = job->any_numerics};
}

uint64_t train_job_steps(const TrainJob *job)
{
    return job->log != NULL ? train_log_steps(job->log) : 0;
}

char *train_job_curves(const TrainJob *job)
{
    const GArray *points = job->log != NULL ? train_log_points(job->log) : NULL;
    return train_plot_svg(job->spec->name,
                          points != NULL ? (const TrainPoint *)(const void *)points->data : NULL,
                          points != NULL ? points->len : 0);
}

static void curves_work(void *user)
{
    JobTask *task = user;
    if (task->path != NULL) {
        train_file_write(task->path, task->text, &task->error);
    }
}

static void curves_done(void *user)
{
    JobTask *task = user;
    TrainJob *job = task->job;
    g_autofree char *layout =
        g_strdup_printf("dp %u, pp %u, tp %u", job->layout.dp, job->layout.pp, job->layout.tp);
    g_autofree char *digest = g_steal_pointer(&task->digest);
    g_autofree char *path = task->error == NULL ? g_steal_pointer(&task->path) : NULL;
    g_autoptr(GError) error = g_steal_pointer(&task->error);
    if (!task_end(task)) {
        return;
    }
    if (error != NULL) {
        job_sayf(job, "no curves: %s", error->message);
    }
    const TrainEnd end = {
        job->saved, path, digest, layout, job->pace.predicted_s, train_pace_measured_s(&job->pace)};
    job_say(job, train_log_end(job->log, &end));
    log_info(job->o.log, "job %s is done: weights %s", job->spec->name, digest);
    job_over(job, JOB_DONE);
}

static void job_finish(TrainJob *job, const char *digest)
{
    end_calls(job);
    train_pace_end(&job->pace);
    JobTask *task = task_new(job);
    task->digest = g_strdup(digest);
    task->path =
        train_file_curves(job->o.state_dir, job->spec->checkpoint_directory, job->spec->name);
    task->text = train_job_curves(job);
    work_pool_run_full(job->o.pool, curves_work, curves_done, task_dropped, task);
}

/* ---- PREPARING ---- */

static void prepare_work(void *user)
{
    JobTask *task = user;
    const JobSpec *spec = task->job->spec;
    if (spec->trace_file == NULL ||
        train_file_check("trace.file", spec->trace_file, &task->error)) {
        task->input = train_input_load(spec, &task->error);
    }
}

static void prepare_done(void *user)
{
    JobTask *task = user;
    TrainJob *job = task->job;
    if (!job->dead) {
        job->input = task->input;
    }
    if (!task_succeeded(task)) {
        return;
    }
    if (job->input->report != NULL) {
        job_say(job, job->input->report);
    }
    job_sayf(job, "%zu tokens to learn from", job->input->train->n);
    job_enter(job, JOB_PLANNING);
    job_plan(job);
}

/* ---- PLANNING: workers, layout, checkpoint, epoch ---- */

static void plan_due(void *user)
{
    TrainJob *job = user;
    job->timer = NULL;
    job_plan(job);
}

static void plan_later(TrainJob *job, int64_t delay_us)
{
    loop_timer_cancel(job->o.loop, job->timer);
    job->timer = loop_timer_start(job->o.loop, delay_us, plan_due, job);
}

static void note_damage(void *user, const char *message)
{
    g_ptr_array_add(((JobTask *)user)->damages, g_strdup(message));
}

static void open_work(void *user)
{
    JobTask *task = user;
    const JobSpec *spec = task->job->spec;
    if (spec->checkpoint_directory == NULL) {
        return;
    }
    task->checkpoint =
        checkpoint_open_newest(spec->checkpoint_directory, note_damage, task, &task->error);
    if (g_error_matches(task->error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND)) {
        g_clear_error(&task->error);
    }
}

static void begin_calls(TrainJob *job);

static void epoch_durable(const GError *error, void *user)
{
    JobTask *task = user;
    TrainJob *job = task->job;
    task->error = error != NULL ? g_error_copy(error) : NULL;
    if (task_succeeded(task)) {
        begin_calls(job);
    }
}

static void take_epoch(TrainJob *job)
{
    GArray *changes = g_array_new(FALSE, TRUE, sizeof(StoreChange));
    job->epoch = jobs_next_epoch(job->o.jobs, job->spec->name, 0, changes);
    store_write(job->o.store, (const StoreChange *)(const void *)changes->data, changes->len,
                epoch_durable, task_new(job));
    store_changes_clear(changes);
    g_array_unref(changes);
}

static void open_done(void *user)
{
    JobTask *task = user;
    TrainJob *job = task->job;
    GError *error = NULL;
    for (guint i = 0; i < task->damages->len; i++) {
        job_sayf(job, "passed over: %s", (const char *)task->damages->pdata[i]);
    }
    if (!job->dead) {
        checkpoint_free(job->checkpoint);
        job->checkpoint = task->checkpoint;
    }
    if (!task_succeeded(task)) {
        return;
    }
    if (job->checkpoint != NULL && !train_checkpoint_check(job->spec, job->input->spec,
                                                           job->checkpoint, job->started, &error)) {
        job_fail(job, error);
        return;
    }
    job->started = true;
    if (job->checkpoint != NULL) {
        const CheckpointState *state = checkpoint_state(job->checkpoint);
        g_free(job->saved);
        job->saved = g_strdup(checkpoint_path(job->checkpoint));
        if (state->step >= job->spec->steps && state->weights_digest != NULL) {
            job_finish(job, state->weights_digest);
            return;
        }
        job_sayf(job, "goes on from step %" G_GUINT64_FORMAT, state->step);
    }
    take_epoch(job);
}

/* Looks again soon. why: taken. */
static void job_wait(TrainJob *job, GError *why)
{
    if (job->problem == NULL || strcmp(job->problem->message, why->message) != 0) {
        job_say(job, why->message);
    }
    g_clear_error(&job->problem);
    job->problem = why;
    plan_later(job, LOOK_US);
}

/* Invariant 4. */
static void job_settle_numerics(TrainJob *job, NumericsClass numerics)
{
    job->any_numerics = false;
    job->spec->numerics = numerics;
    train_log_set_class(job->log, numerics);
}

static void job_choose_numerics(TrainJob *job)
{
    if (job->any_numerics) {
        job->spec->numerics = train_workers_class(job->o.members);
    }
    job->pace.rate = job->o.rates != NULL ? &job->o.rates[job->spec->numerics] : NULL;
}

static void on_placed(TrainPlacing *placing, const GError *error, void *user)
{
    TrainJob *job = user;
    const TrainPlace *place = train_placing_place(placing);
    const bool fits = error == NULL && place->too_large->len == 0;
    GError *why = error != NULL ? g_error_copy(error) : train_place_error(place);
    if (fits) {
        if (job->any_numerics) {
            job_settle_numerics(job, (NumericsClass)job->spec->numerics);
        }
        job->layout = place->layout;
        train_pace_predict(&job->pace, place->cost.efficiency, place->step_s,
                           place->cost.exchange_s + place->cost.update_s);
        plan_free(job->plan);
        job->plan = train_placing_take_plan(placing);
        g_clear_error(&job->problem);
    }
    train_placing_free(g_steal_pointer(&job->placing));
    if (fits) {
        work_pool_run_full(job->o.pool, open_work, open_done, task_dropped, task_new(job));
    } else if (is_final(why) && (error != NULL || !job->may_shrink)) {
        job_fail(job, why);
    } else { /* workers that are lost may come back */
        job_wait(job, why);
    }
}

static void job_plan(TrainJob *job)
{
    if (job->working > 0) { /* a checkpoint is being written: it is what is gone on from */
        plan_later(job, LOOK_US);
        return;
    }
    job_choose_numerics(job);
    const TrainPlacingOptions options = {.members = job->o.members,
                                         .jobs = job->o.jobs,
                                         .spec = job->spec,
                                         .input = job->input,
                                         .rate = job->pace.rate,
                                         .shrink = job->may_shrink};
    train_placing_new(&options, &job->placing, on_placed, job);
}

/* ---- LOADING ---- */

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
    if (task_end(task) && call != NULL) {
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
    JobTask *task = task_new(job);
    task->want = train_want_new(want);
    task->epoch = job->epoch;
    task->rank = call->index;
    call->asking = true;
    work_pool_run_full(job->o.pool, want_work, want_done, task_dropped, task);
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
    job_enter(job, JOB_RUNNING);
}

/* ---- RUNNING ---- */

static void on_step(const Weft__V1__TrainProgress *step, void *user)
{
    TrainJob *job = user;
    GError *error = NULL;
    g_autofree char *sample =
        step->n_sample > 0 ? train_input_text(job->input, step->sample, step->n_sample) : NULL;
    train_pace_step(&job->pace, step->step, step->seconds);
    const char *line =
        train_log_step(job->log, step, job->spec->sequences * job->spec->length, sample, &error);
    if (error != NULL) {
        job_fail(job, error);
    } else if (line != NULL) {
        job_say(job, line);
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
    if (error != NULL) {
        job_sayf(job,
                 "checkpoint of step %" G_GUINT64_FORMAT " was not written: %s; the last one stays",
                 step, error->message);
    } else if (!job->dead) {
        g_autofree char *name = checkpoint_name(step);
        g_free(job->saved);
        job->saved = g_build_filename(job->spec->checkpoint_directory, name, NULL);
        job_sayf(job, "checkpoint %s", job->saved);
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
    job_release(job);
}

static void open_saving(TrainJob *job)
{
    const TrainSavingOptions options = {.pool = job->o.pool,
                                        .disk = checkpoint_disk(),
                                        .directory = job->spec->checkpoint_directory,
                                        .job = job->text,
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

/* All ranks have the last weights, and they are saved. */
static void finish_if_done(TrainJob *job)
{
    char digest[33];
    for (guint i = 0; i < job->calls->len; i++) {
        const TrainCall *call = job->calls->pdata[i];
        if (!call->done ||
            !hash128_equal(&call->digest, &((TrainCall *)job->calls->pdata[0])->digest)) {
            return;
        }
    }
    if (job->calls->len == 0 || job->state != JOB_RUNNING || job->tracing ||
        (job->saving != NULL && !train_saving_is_idle(job->saving))) {
        return;
    }
    hash128_hex(&((TrainCall *)job->calls->pdata[0])->digest, digest);
    job_finish(job, digest);
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
    job_say(job, task->text);
    if (task_end(task)) {
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
        JobTask *task = task_new(job);
        task->trace = g_steal_pointer(&job->trace);
        job->tracing = true;
        work_pool_run_full(job->o.pool, trace_work, trace_done, task_dropped, task);
    }
}

static void on_done(TrainCall *call, void *user)
{
    finish_if_done(user);
}

/* ---- the end of an epoch ---- */

static void job_end_epoch(TrainJob *job, const GError *why)
{
    if (is_final(why)) {
        job_fail(job, g_error_copy(why));
        return;
    }
    log_warn(job->o.log, "job %s epoch %" G_GUINT64_FORMAT " ended: %s", job->spec->name,
             job->epoch, why->message);
    job_sayf(job, "epoch %" G_GUINT64_FORMAT " ended: %s", job->epoch, why->message);
    end_calls(job);
    job->fruitless = train_log_steps(job->log) > job->steps_before ? 0 : job->fruitless + 1;
    if (job->fruitless > FRUITLESS_LIMIT) {
        job_fail(job, g_error_new(WEFT_ERROR, WEFT_ERROR_FAILED,
                                  "%u epochs ended without a step, the last one: %s",
                                  job->fruitless, why->message));
        return;
    }
    g_clear_error(&job->problem);
    job->problem = g_error_copy(why);
    job->may_shrink = true;
    job_enter(job, JOB_PLANNING);
    plan_later(job, AGAIN_US);
}

static void on_failed(TrainCall *call, const GError *error, void *user)
{
    TrainJob *job = user;
    g_autoptr(GError) lost = NULL;
    if (!is_final(error) && strstr(error->message, "worker ") == NULL) {
        lost = g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST, "worker %s is gone: %s",
                           call->worker, error->message);
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
    job->timer = loop_timer_start(job->o.loop, LOOK_US, look_due, job);
}

/* ---- an epoch ---- */

static TrainCallEvents call_events(TrainJob *job)
{
    return (TrainCallEvents){on_want,  on_loaded, on_step,   on_save,
                             on_trace, on_done,   on_failed, job};
}

static void begin_calls(TrainJob *job)
{
    Weft__V1__Stamp stamp = WEFT__V1__STAMP__INIT;
    Weft__V1__TrainLoad load = WEFT__V1__TRAIN_LOAD__INIT;
    TrainSettingsMessage settings;
    const TrainCallEvents events = call_events(job);
    if (!train_calls_possible(job->plan, job->o.members)) { /* somebody left since the plan */
        plan_later(job, AGAIN_US);
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
    job_enter(job, JOB_LOADING);
    job->steps_before = train_log_steps(job->log);
    train_pace_begin(&job->pace, settings.settings.first_step);
    job_sayf(job, "epoch %" G_GUINT64_FORMAT ": dp %u, pp %u, tp %u%s", job->epoch, job->layout.dp,
             job->layout.pp, job->layout.tp,
             job->spec->numerics == NUMERICS_FAST ? ", numerics fast" : "");
    train_calls_load(job->calls, job->o.loop, job->plan, job->o.members, &load, &events);
    const TrainJobView view = train_job_view(job);
    train_log_set_course(job->log, job->spec->steps, train_status_share(&job->o, &view));
    g_autofree const char **hosts = train_calls_hosts(job->calls, job->o.members);
    job->trace =
        train_trace_new(job->spec, &job->layout, job->plan, hosts, settings.settings.first_step);
    open_saving(job);
    weft__v1__plan__free_unpacked(load.plan, NULL);
    weft__v1__model__free_unpacked(load.model, NULL);
    job->timer = loop_timer_start(job->o.loop, LOOK_US, look_due, job);
}

/* ---- beginning ---- */

/* The log may be long: it is read in the pool. */
static void log_work(void *user)
{
    JobTask *task = user;
    g_autofree char *path = train_file_log(task->job->o.state_dir, task->job->spec->name);
    task->log = train_log_open(path, &task->error);
}

static void log_done(void *user)
{
    JobTask *task = user;
    TrainJob *job = task->job;
    if (!job->dead) {
        job->log = task->log;
    }
    if (!task_succeeded(task)) {
        return;
    }
    NumericsClass begun;
    const bool has_begun = train_log_class(job->log, &begun);
    if (!job->any_numerics || has_begun) {
        job_settle_numerics(job, job->any_numerics ? begun : (NumericsClass)job->spec->numerics);
    }
    const GPtrArray *lines = train_log_lines(job->log);
    for (guint i = 0; i < lines->len; i++) {
        job_say(job, lines->pdata[i]);
    }
    if (train_log_ended(job->log)) {
        job_over(job, JOB_DONE);
        return;
    }
    job_say(job, "reads its data");
    work_pool_run_full(job->o.pool, prepare_work, prepare_done, task_dropped, task_new(job));
}

static void begin_due(void *user)
{
    TrainJob *job = user;
    GError *error = NULL;
    job->timer = NULL;
    if (!train_settings_check(job->spec, &error)) {
        job_fail(job, error);
        return;
    }
    work_pool_run_full(job->o.pool, log_work, log_done, task_dropped, task_new(job));
}

TrainJob *train_job_new(const TrainJobOptions *options, const char *text, bool restored,
                        TrainJobCallbacks callbacks, void *user)
{
    TrainJob *job = g_new0(TrainJob, 1);
    job->o = *options;
    job->spec = job_spec_parse(text, strlen(text), "job file", NULL);
    job->text = g_strdup(text);
    g_assert(job->spec != NULL);
    job->callbacks = callbacks;
    job->user = user;
    job->calls = g_ptr_array_new();
    job->any_numerics = job->spec->numerics == JOB_ANY_NUMERICS;
    train_pace_init(&job->pace, NULL); /* job_choose_numerics() */
    job->started = job->may_shrink = restored;
    job->entered_us = loop_now_us(options->loop);
    if (!restored) {
        train_job_forget(options, job->spec->name);
    }
    job->timer = loop_timer_start(options->loop, 0, begin_due, job);
    return job;
}

void train_job_forget(const TrainJobOptions *options, const char *name)
{
    g_autofree char *path = train_file_log(options->state_dir, name),
                    *curves = train_file_curves(options->state_dir, NULL, name);
    if (path != NULL) {
        g_unlink(path);
        g_unlink(curves);
    }
}
