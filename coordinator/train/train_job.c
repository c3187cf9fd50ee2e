/* Diagram: train_job.h. Invariants
 *   1. Calls of one epoch only; a new one begins when all calls of the last were ended and nothing
 *      is written any more, under a number that is durable.
 *   2. `working` counts what runs in the pool or the store, and savings that are not closed: the
 *      job is freed after the last of them, and no epoch begins before.
 *   3. A step is said once, whatever is repeated; told again with another loss it ends the job.
 *   4. What is over stays over: a job that is done or failed is so, for the same reason, after a
 *      restart of the coordinator; its log says so.
 *   5. A job that asked for no numerics class gets that of its first place, and its log says which:
 *      no later place, and no restart of the coordinator, changes it. */
#include "coordinator/train/train_job_state.h"

#include "coordinator/jobs/deployment.h"
#include "coordinator/train/train_file.h"
#include "coordinator/train/train_plot.h"
#include "coordinator/train/train_settings.h"
#include "coordinator/train/train_workers.h"
#include "proto/base/error.h"

#include <glib/gstdio.h>
#include <string.h>

static void job_plan(TrainJob *job);

/* ---- what is said ---- */

void train_job_say(TrainJob *job, const char *line)
{
    if (!job->dead) {
        job->callbacks.say(line, job->user);
    }
}

void train_job_sayf(TrainJob *job, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    g_autofree char *line = g_strdup_vprintf(format, args);
    va_end(args);
    train_job_say(job, line);
}

void train_job_enter(TrainJob *job, JobState state)
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

void train_job_end_calls(TrainJob *job)
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

void train_job_release(TrainJob *job)
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
        train_job_end_calls(job);
        job->dead = true;
        train_job_release(job);
    }
}

bool train_error_is_final(const GError *error)
{
    return g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID) ||
           g_error_matches(error, WEFT_ERROR, WEFT_ERROR_IMPOSSIBLE) ||
           g_error_matches(error, WEFT_ERROR, WEFT_ERROR_NUMERICS);
}

/* ---- work in the pool ---- */

JobTask *job_task_new(TrainJob *job)
{
    JobTask *task = g_new0(JobTask, 1);
    task->job = job;
    task->damages = g_ptr_array_new_with_free_func(g_free);
    job->working++;
    return task;
}

bool job_task_end(JobTask *task)
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
    train_job_release(job);
    return alive;
}

/* Ends the task; false: the job is gone, or it failed by the task's error. */
static bool task_succeeded(JobTask *task)
{
    TrainJob *job = task->job;
    GError *error = g_steal_pointer(&task->error);
    const bool alive = job_task_end(task);
    if (alive && error != NULL) {
        train_job_fail(job, error);
        return false;
    }
    g_clear_error(&error);
    return alive;
}

void job_task_dropped(void *user)
{
    JobTask *task = user;
    task->job->dead = true;
    job_task_end(task);
}

/* ---- the end ---- */

static void sync_work(void *user)
{
    JobTask *task = user;
    if (task->job->log != NULL) {
        train_log_sync(task->job->log, &task->error);
    }
}

static void sync_done(void *user)
{
    JobTask *task = user;
    TrainJob *job = task->job;
    if (task->error != NULL) {
        log_warn(job->o.log, "job %s may go on after a restart: %s", job->spec->name,
                 task->error->message);
    }
    if (job_task_end(task)) {
        job->callbacks.ended(job->user);
    }
}

/* Whoever waits for it hears of it when that is on the disk (invariant 4). */
static void job_over(TrainJob *job, JobState state)
{
    train_job_end_calls(job);
    train_job_enter(job, state);
    if (!job->dead) {
        work_pool_run(job->o.pool, sync_work, sync_done, job_task_dropped, job_task_new(job));
    }
}

/* error: taken. */
static void job_over_by(TrainJob *job, GError *error)
{
    g_clear_error(&job->problem);
    job->problem = error;
    train_job_sayf(job, "failed: %s", error->message);
    job_over(job, JOB_FAILED);
}

void train_job_fail(TrainJob *job, GError *error)
{
    if (train_job_is_over(job)) {
        g_error_free(error);
        return;
    }
    log_warn(job->o.log, "job %s failed: %s", job->spec->name, error->message);
    if (job->log != NULL) { /* invariant 4 */
        train_log_fail(job->log, error);
    }
    job_over_by(job, error);
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
    if (!job_task_end(task)) {
        return;
    }
    if (error != NULL) {
        train_job_sayf(job, "no curves: %s", error->message);
    }
    const TrainEnd end = {
        job->saved, path, digest, layout, job->pace.predicted_s, train_pace_measured_s(&job->pace)};
    train_job_say(job, train_log_end(job->log, &end));
    log_info(job->o.log, "job %s is done: weights %s", job->spec->name, digest);
    job_over(job, JOB_DONE);
}

void train_job_finish(TrainJob *job, const char *digest)
{
    train_job_end_calls(job);
    train_pace_end(&job->pace);
    JobTask *task = job_task_new(job);
    task->digest = g_strdup(digest);
    task->path =
        train_file_curves(job->o.state_dir, job->spec->checkpoint_directory, job->spec->name);
    task->text = train_job_curves(job);
    work_pool_run(job->o.pool, curves_work, curves_done, job_task_dropped, task);
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
        train_job_say(job, job->input->report);
    }
    train_job_sayf(job, "%zu tokens to learn from", job->input->train->n);
    train_job_enter(job, JOB_PLANNING);
    job_plan(job);
}

/* ---- PLANNING: workers, layout, checkpoint, epoch ---- */

static void plan_due(void *user)
{
    TrainJob *job = user;
    job->timer = NULL;
    job_plan(job);
}

void train_job_plan_later(TrainJob *job, int64_t delay_us)
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

static void epoch_durable(const GError *error, void *user)
{
    JobTask *task = user;
    TrainJob *job = task->job;
    task->error = error != NULL ? g_error_copy(error) : NULL;
    if (task_succeeded(task)) {
        train_epoch_begin(job);
    }
}

static void take_epoch(TrainJob *job)
{
    GArray *changes = g_array_new(FALSE, TRUE, sizeof(StoreChange));
    job->epoch = jobs_next_epoch(job->o.jobs, job->spec->name, 0, changes);
    store_write(job->o.store, (const StoreChange *)(const void *)changes->data, changes->len,
                epoch_durable, job_task_new(job));
    store_changes_clear(changes);
    g_array_unref(changes);
}

static void open_done(void *user)
{
    JobTask *task = user;
    TrainJob *job = task->job;
    GError *error = NULL;
    for (guint i = 0; i < task->damages->len; i++) {
        train_job_sayf(job, "passed over: %s", (const char *)task->damages->pdata[i]);
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
        train_job_fail(job, error);
        return;
    }
    job->started = true;
    if (job->checkpoint != NULL) {
        const CheckpointState *state = checkpoint_state(job->checkpoint);
        g_free(job->saved);
        job->saved = g_strdup(checkpoint_path(job->checkpoint));
        if (state->step == job->spec->steps && state->weights_digest != NULL) {
            train_job_finish(job, state->weights_digest);
            return;
        }
        train_job_sayf(job, "goes on from step %" G_GUINT64_FORMAT, state->step);
        if (state->definition != NULL && strcmp(state->definition, job->definition) != 0) {
            train_job_sayf(job,
                           "settings that define the result are not those of %s any more: no run "
                           "from the beginning gives the same",
                           checkpoint_path(job->checkpoint));
        }
    }
    take_epoch(job);
}

/* Looks again soon. why: taken. */
static void job_wait(TrainJob *job, GError *why)
{
    if (job->problem == NULL || strcmp(job->problem->message, why->message) != 0) {
        train_job_say(job, why->message);
    }
    g_clear_error(&job->problem);
    job->problem = why;
    train_job_plan_later(job, TRAIN_LOOK_US);
}

/* Invariant 5. */
static void job_settle_numerics(TrainJob *job, NumericsClass numerics)
{
    job->any_numerics = false;
    job->spec->numerics = numerics;
    train_log_set_class(job->log, numerics);
    const Hash128 definition = job_spec_definition(job->spec);
    hash128_hex(&definition, job->definition);
    train_log_set_definition(job->log, job->definition);
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
        work_pool_run(job->o.pool, open_work, open_done, job_task_dropped, job_task_new(job));
    } else if (train_error_is_final(why) && (error != NULL || !job->may_shrink)) {
        train_job_fail(job, why);
    } else { /* workers that are lost may come back */
        job_wait(job, why);
    }
}

static void job_plan(TrainJob *job)
{
    if (job->working > 0) { /* a checkpoint is being written: it is what is gone on from */
        train_job_plan_later(job, TRAIN_LOOK_US);
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

/* ---- beginning ---- */

/* The log may be long: it is read in the pool, where a job that was cancelled may still be behind
 * one that has taken its name. So only the loop writes. */
static void log_work(void *user)
{
    JobTask *task = user;
    g_autofree char *path = train_file_log(task->job->o.state_dir, task->job->spec->name);
    task->log = train_log_read(path, task->job->submitted_us, &task->error);
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
    GError *error = NULL;
    if (!train_log_begin(job->log, &error)) {
        train_job_fail(job, error);
        return;
    }
    NumericsClass begun;
    const bool has_begun = train_log_class(job->log, &begun);
    if (!job->any_numerics || has_begun) {
        job_settle_numerics(job, job->any_numerics ? begun : (NumericsClass)job->spec->numerics);
    }
    const GPtrArray *lines = train_log_lines(job->log);
    for (guint i = 0; i < lines->len; i++) {
        train_job_say(job, lines->pdata[i]);
    }
    if (train_log_ended(job->log)) {
        job_over(job, JOB_DONE);
        return;
    }
    if (train_log_failure(job->log) != NULL) {
        job_over_by(job, g_error_copy(train_log_failure(job->log)));
        return;
    }
    train_job_say(job, "reads its data");
    work_pool_run(job->o.pool, prepare_work, prepare_done, job_task_dropped, job_task_new(job));
}

static void begin_due(void *user)
{
    TrainJob *job = user;
    GError *error = NULL;
    job->timer = NULL;
    if (!train_settings_check(job->spec, &error)) {
        train_job_fail(job, error);
        return;
    }
    work_pool_run(job->o.pool, log_work, log_done, job_task_dropped, job_task_new(job));
}

TrainJob *train_job_new(const TrainJobOptions *options, const char *text, int64_t submitted_us,
                        bool restored, TrainJobCallbacks callbacks, void *user)
{
    TrainJob *job = g_new0(TrainJob, 1);
    job->o = *options;
    job->spec = job_spec_parse(text, strlen(text), "job file", NULL);
    job->text = g_strdup(text);
    job->submitted_us = submitted_us;
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
