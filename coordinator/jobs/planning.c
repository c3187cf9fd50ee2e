/* PLANNING of a deployment (deployment.c has the whole machine): the planner runs on the pool with
 * a snapshot of the members; its plan and the epochs it will use go to disk in one batch; then
 * LOADING.
 *
 * 1. A PlanTask belongs to the pool, then, while its plan is written, to jobs->writing, then is
 * freed; its deployment may be gone or may have left PLANNING meanwhile: then its result is
 * dropped.
 * 2. When memory alone forbids a plan, the deployment that was idle for longest gives way, and it
 * is planned again; never one that a request uses.
 * 3. The first plan decides the class of a deployment for which none was asked, on disk with it;
 * whatever plans follow are of that class: a stream that has begun ends in the class that it began
 * in.
 * 4. A task that seeks a move leaves its deployment READY until there is a plan: work leaves a
 * draining member only when it has a place to go to, and others only for a plan that is worth the
 * pause. */
#include "coordinator/jobs/deployment.h"

#include "coordinator/message.h"
#include "coordinator/planner/planner.h"
#include "coordinator/store/records.h"
#include "proto/base/error.h"
#include "proto/plan/plan_message.h"

#include <string.h>

#define GAIN_IDLE 1.02    /* as the planner asks of more workers */
#define GAIN_RUNNING 1.25 /* a pause of running requests must be worth it */

typedef struct PlanTask {
    Deployment *deployment; /* NULL: it is gone */
    Jobs *jobs;
    Model *model;
    PlanWish wish;
    char *job;
    char *kind; /* or NULL */
    MemberSnapshot members;
    Plan *plan;
    GError *error;
    GPtrArray *violations, *alternatives;
    bool move;
} PlanTask;

void plan_task_free(void *user)
{
    PlanTask *task = user;
    model_unref(task->model);
    member_snapshot_free(&task->members);
    if (task->plan != NULL) {
        plan_free(task->plan);
    }
    g_clear_pointer(&task->violations, g_ptr_array_unref);
    g_clear_pointer(&task->alternatives, g_ptr_array_unref);
    g_clear_error(&task->error);
    g_free(task->job);
    g_free(task->kind);
    g_free(task);
}

static void plan_task_work(void *user)
{
    PlanTask *task = user;
    task->plan = planner_plan(task->model->spec, task->members.members, task->members.n,
                              &task->wish, &task->violations, &task->alternatives, &task->error);
}

static GBytes *deployment_record(const Deployment *d, const uint64_t *epochs)
{
    Weft__V1__Plan *message = plan_to_message(d->plan);
    JobRecord record = {.model = d->model_path,
                        .dp = d->wish.dp,
                        .pp = d->wish.pp,
                        .tp = d->wish.tp,
                        .context = d->context,
                        .numerics = d->wish.any_numerics ? JOB_RECORD_ANY_NUMERICS
                                                         : (uint32_t)d->wish.numerics,
                        .plan = message_pack(&message->base),
                        .epochs = (uint64_t *)epochs,
                        .n_epochs = d->n_replicas};
    memcpy(record.file_hash, d->file_hash.bytes, sizeof record.file_hash);
    GBytes *bytes = job_record_pack(&record);
    g_bytes_unref(record.plan);
    message_free(message);
    return bytes;
}

static void plan_task_durable(const GError *error, void *user)
{
    PlanTask *task = user;
    Deployment *d = task->deployment;
    if (d != NULL && d->state == DEPLOYMENT_PLANNING) {
        d->task = NULL;
        if (error != NULL) {
            deployment_fail(d, error);
        } else {
            deployment_begin_loading(d);
        }
    }
    g_ptr_array_remove_fast(task->jobs->writing, task);
}

/* Invariant 1: epochs and plan go to disk in one batch before any worker hears of them. */
static void deployment_persist(Deployment *d, PlanTask *task)
{
    g_autoptr(GArray) changes = g_array_new(FALSE, TRUE, sizeof(StoreChange));
    g_autofree uint64_t *epochs = g_new0(uint64_t, d->n_replicas);
    for (uint32_t r = 0; r < d->n_replicas; r++) {
        epochs[r] = jobs_next_epoch(d->jobs, d->id, r, changes);
        d->replicas[r].epoch = epochs[r];
    }
    StoreChange job = {
        .table = STORE_JOBS, .key = g_strdup(d->id), .value = deployment_record(d, epochs)};
    g_array_append_val(changes, job);
    g_ptr_array_add(d->jobs->writing, task);
    store_write(d->jobs->options.store, (StoreChange *)changes->data, changes->len,
                plan_task_durable, task);
    store_changes_clear(changes);
}

static GError *with_alternatives(const GError *error, const GPtrArray *alternatives)
{
    GError *copy = g_error_copy(error);
    if (alternatives != NULL && alternatives->len > 0) {
        g_autoptr(GString) list = g_string_new(NULL);
        for (guint i = 0; i < alternatives->len; i++) {
            g_string_append_printf(list, "%s%s", i > 0 ? " | " : "",
                                   (const char *)g_ptr_array_index(alternatives, i));
        }
        g_autofree char *message =
            g_strdup_printf("%s; possible here: %s", copy->message, list->str);
        g_free(copy->message);
        copy->message = g_steal_pointer(&message);
    }
    return copy;
}

static bool wants_memory(const PlanTask *task)
{
    for (guint i = 0; task->violations != NULL && i < task->violations->len; i++) {
        if (((const PlanViolation *)g_ptr_array_index(task->violations, i))->rule ==
            PLAN_RULE_MEMORY) {
            return true;
        }
    }
    return false;
}

static void plan_task_take(PlanTask *task, Deployment *d)
{
    deployment_clear_replicas(d);
    if (d->plan != NULL) {
        plan_free(d->plan);
    }
    d->plan = g_steal_pointer(&task->plan);
    deployment_lay_out(d);
    deployment_persist(d, task);
}

/* All replicas together; of those that are lost only nothing. */
static double tokens_per_s(const Deployment *d, const Plan *plan)
{
    uint32_t n = plan->n_replicas;
    if (plan == d->plan) {
        n = 0;
        for (uint32_t r = 0; r < d->n_replicas; r++) {
            n += d->replicas[r].live;
        }
    }
    return n * plan->predicted.decode_tokens_per_s;
}

/* Why it moves, or NULL: it stays. */
static GError *reason_to_move(const PlanTask *task, Deployment *d)
{
    const char *drains = deployment_draining(d);
    if (d->state != DEPLOYMENT_READY) {
        return NULL;
    }
    if (drains != NULL && task->plan == NULL) {
        d->stays = true;
        log_warn(d->jobs->options.log,
                 "job %s has no place without worker %s, which drains: what no other replica can "
                 "take stays there until its requests end: %s",
                 d->id, drains, task->error->message);
        deployment_kick(d);
        return NULL;
    }
    if (drains != NULL) {
        return g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST, "worker %s drains", drains);
    }
    double now = tokens_per_s(d, d->plan);
    double then = task->plan != NULL ? tokens_per_s(d, task->plan) : 0;
    if (then < now * (d->active.length > 0 ? GAIN_RUNNING : GAIN_IDLE)) {
        return NULL;
    }
    return g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST,
                       "workers came: a plan with %.0f instead of %.0f tokens/s", then, now);
}

/* Invariant 4. */
static void plan_task_move(PlanTask *task, Deployment *d)
{
    g_autoptr(GError) why = reason_to_move(task, d);
    d->task = NULL;
    if (why == NULL) {
        plan_task_free(task);
        return;
    }
    deployment_move(d, why);
    d->recovery.shrunk = deployment_draining(d) != NULL;
    d->task = task;
    d->n_attempts++;
    deployment_enter(d, DEPLOYMENT_PLANNING);
    plan_task_take(task, d);
}

static void plan_task_done(void *user)
{
    PlanTask *task = user;
    Deployment *d = task->deployment;
    if (d != NULL && task->move) {
        plan_task_move(task, d);
        return;
    }
    if (d == NULL || d->state != DEPLOYMENT_PLANNING) {
        plan_task_free(task);
        return;
    }
    if (task->plan == NULL) {
        d->task = NULL;
        if (wants_memory(task) && jobs_make_room(d->jobs, d)) {
            deployment_enter(d, DEPLOYMENT_IDLE);
            deployment_kick(d);
        } else {
            g_autoptr(GError) error = with_alternatives(task->error, task->alternatives);
            deployment_clear_replicas(d);
            deployment_fail(d, error);
        }
        plan_task_free(task);
        return;
    }
    plan_task_take(task, d);
}

/* Requests that have begun go on under the definition that they began with: those of class exact on
 * the kind of workers whose bits they have. NULL: any. */
static const char *kind_of_begun(const Deployment *d)
{
    bool begun = d->active.length > 0;
    for (GList *l = d->waiting.head; l != NULL; l = l->next) {
        begun = begun || ((const Lease *)l->data)->resumes;
    }
    return begun && d->plan != NULL && d->plan->definition.numerics == NUMERICS_EXACT
               ? d->plan->definition.exact_kind
               : NULL;
}

static PlanTask *plan_task_new(Deployment *d)
{
    Jobs *jobs = d->jobs;
    PlanTask *task = g_new0(PlanTask, 1);
    task->deployment = d;
    task->jobs = jobs;
    task->model = model_ref(d->model);
    task->job = g_strdup(d->id);
    task->kind = g_strdup(kind_of_begun(d));
    task->members = jobs_snapshot(jobs, d->id);
    task->wish =
        (PlanWish){.job = task->job,
                   .model = task->model->path,
                   .dp = d->wish.dp,
                   .pp = d->wish.pp,
                   .tp = d->wish.tp,
                   .context = d->wish.context,
                   .streams = d->wish.streams,
                   .numerics = d->plan != NULL ? d->plan->definition.numerics : d->wish.numerics,
                   .any_numerics = d->plan == NULL && d->wish.any_numerics,
                   .exact_kind = task->kind,
                   .kv_type = d->wish.kv_type,
                   .kv_memory = d->wish.kv_memory,
                   .seal_off = d->jobs->options.seal_off};
    deployment_forget_planning(d);
    d->task = task;
    return task;
}

static void plan_task_begin(PlanTask *task)
{
    work_pool_run(task->jobs->options.pool, plan_task_work, plan_task_done, plan_task_free, task);
}

void deployment_begin_planning(Deployment *d)
{
    PlanTask *task = plan_task_new(d);
    d->n_attempts++;
    deployment_enter(d, DEPLOYMENT_PLANNING);
    deployment_tell_waiting(d, d->recovery.since_us != 0 ? "planning anew" : "planning", 0, "");
    plan_task_begin(task);
}

void deployment_plan_move(Deployment *d)
{
    PlanTask *task = plan_task_new(d);
    task->move = true;
    plan_task_begin(task);
}

void deployment_forget_planning(Deployment *d)
{
    if (d->task != NULL) {
        d->task->deployment = NULL;
        d->task = NULL;
    }
}
