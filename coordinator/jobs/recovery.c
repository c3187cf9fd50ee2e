/* After a loss. Problem: when an epoch ends under running requests, a new plan may be impossible
 * for a while (too few members, too little memory), and a try may fail for the next death; who
 * waits must neither fail for that nor wait for ever, and wants to know how long it takes.
 *
 *            an epoch with requests ended      patience over, no try under way
 *   QUIET ─────────────────────────────▶ PATIENT ────────────────────▶ QUIET, who waits hears why
 *     ▲                                   │  ▲ │
 *     │     it serves, nobody waits       │  │ │ a try failed
 *     └───────────────────────────────────┘  └─┘ the next after RETRY_US, or when a member comes
 *
 * 1. The patience timer runs <=> PATIENT. Every waiting lease of the deployment, also a new one,
 * shares it: a lease is never failed before, and at the latest with the first try that fails
 * afterwards.
 * 2. A deployment that was planned anew after a loss is planned once more a while after a member
 * came (planning.c says when that plan is taken). One that the last coordinator left and that no
 * worker holds any more is planned when the workers had time to come, without being asked.
 * 3. What is predicted is said before it is known: the bytes of the rank that lacks most over the
 * rate seen when parts were last loaded (before that, the measured rate of its link), the last
 * start's time, and the tokens to compute again over the plan's prefill rate. */
#include "coordinator/jobs/deployment.h"

#include "proto/base/error.h"
#include "proto/base/units.h"

#include <string.h>

#define RETRY_US INT64_C(1000000)
#define GROW_US INT64_C(5000000)
#define REVIVE_US INT64_C(5000000)
#define REVIVE_LIMIT_US INT64_C(60000000)

bool recovery_is_patient(const Deployment *d)
{
    return d->recovery.patience != NULL;
}

static void recovery_stop(Deployment *d)
{
    Recovery *r = &d->recovery;
    loop_timer_cancel(d->jobs->options.loop, r->patience);
    loop_timer_cancel(d->jobs->options.loop, r->retry);
    r->patience = r->retry = NULL;
    r->announced = false;
}

static GError *waited_in_vain(const Deployment *d)
{
    const Recovery *r = &d->recovery;
    double waited_s = (double)d->jobs->options.recovery_wait_us / 1e6;
    return g_error_new(WEFT_ERROR, WEFT_ERROR_NOT_READY, "waited %.0f s for workers%s%s: %s",
                       waited_s, r->cause != NULL ? " after " : "",
                       r->cause != NULL ? r->cause->message : "",
                       d->error != NULL ? d->error->message : "none came");
}

/* Invariant 1. A try that is under way, or due now, is let go on: its end tells who waits. */
static void recovery_on_patience(void *user)
{
    Deployment *d = user;
    d->recovery.patience = NULL;
    recovery_stop(d);
    bool trying =
        d->kick != NULL || (d->state != DEPLOYMENT_IDLE && d->state != DEPLOYMENT_FAILED &&
                            d->state != DEPLOYMENT_STORED);
    if (!trying && d->waiting.length > 0) {
        g_autoptr(GError) error = waited_in_vain(d);
        log_warn(d->jobs->options.log, "job %s: %s", d->id, error->message);
        d->recovery.since_us = 0;
        d->n_attempts = 0;
        deployment_fail_waiting(d, error);
    }
}

static void recovery_start_patience(Deployment *d)
{
    loop_timer_cancel(d->jobs->options.loop, d->recovery.patience);
    d->recovery.patience = loop_timer_start(
        d->jobs->options.loop, d->jobs->options.recovery_wait_us, recovery_on_patience, d);
}

void recovery_begin(Deployment *d, const GError *cause)
{
    Recovery *r = &d->recovery;
    if (r->since_us == 0) {
        r->since_us = loop_now_us(d->jobs->options.loop);
        r->predicted_load_s = 0; /* until something is loaded: another replica may be there */
    }
    g_clear_error(&r->cause);
    r->cause = g_error_copy(cause);
    d->n_attempts = 0;
    d->asked_us = loop_now_us(d->jobs->options.loop);
    recovery_start_patience(d);
}

static void recovery_on_retry(void *user)
{
    Deployment *d = user;
    d->recovery.retry = NULL;
    deployment_pump(d);
}

void recovery_await(Deployment *d, const GError *missing)
{
    Recovery *r = &d->recovery;
    if (r->patience == NULL) {
        recovery_start_patience(d);
    }
    if (r->retry == NULL) {
        r->retry = loop_timer_start(d->jobs->options.loop, RETRY_US, recovery_on_retry, d);
    }
    if (!r->announced) {
        r->announced = true;
        log_warn(d->jobs->options.log, "job %s: %u requests wait at most %.0f s: %s", d->id,
                 d->waiting.length, (double)d->jobs->options.recovery_wait_us / 1e6,
                 missing->message);
        g_autofree char *text = g_strdup_printf("waiting for workers: %s", missing->message);
        deployment_tell_waiting(d, text, 0, "");
    }
}

/* ---- more members, and a new coordinator (invariant 2) ---- */

static void recovery_on_grow(void *user)
{
    Deployment *d = user;
    d->recovery.grow = NULL;
    bool known = d->model != NULL; /* else it was adopted, and nobody asked for it yet */
    if (d->state == DEPLOYMENT_READY && d->task == NULL && d->recovery.shrunk && known) {
        d->recovery.shrunk = false;
        deployment_plan_move(d);
    }
}

void recovery_on_member(Deployment *d)
{
    Recovery *r = &d->recovery;
    if (r->shrunk && r->grow == NULL) {
        r->grow = loop_timer_start(d->jobs->options.loop, GROW_US, recovery_on_grow, d);
    }
}

typedef struct Revival {
    Jobs *jobs;
    char *job;
} Revival;

void recovery_revival_free(void *user)
{
    Revival *revival = user;
    g_free(revival->job);
    g_free(revival);
}

static void on_revival_opened(Model *model, const GError *error, void *user)
{
    Revival *revival = user;
    Deployment *d = jobs_find(revival->jobs, revival->job);
    bool same = model != NULL && d != NULL && d->state == DEPLOYMENT_STORED &&
                d->waiting.length == 0 && hash128_equal(&d->file_hash, &model->spec->file_hash);
    if (error != NULL && d != NULL) {
        log_warn(d->jobs->options.log, "job %s is not brought back: %s", d->id, error->message);
    }
    if (same) {
        log_info(d->jobs->options.log, "job %s is brought back: no worker holds it any more",
                 d->id);
        d->model = d->model != NULL ? d->model : model_ref(model);
        deployment_revive(d);
    }
    g_ptr_array_remove_fast(revival->jobs->revivals, revival);
}

static void recovery_on_revive(void *user)
{
    Deployment *d = user;
    Recovery *r = &d->recovery;
    Jobs *jobs = d->jobs;
    int64_t age_us = loop_now_us(jobs->options.loop) - jobs->started_us;
    r->revive = NULL;
    if (d->state != DEPLOYMENT_STORED || d->waiting.length > 0) {
        return;
    }
    if (members_n_missing(jobs->options.members) > 0 && age_us < REVIVE_LIMIT_US) {
        recovery_revive(d);
        return;
    }
    Revival *revival = g_new(Revival, 1);
    *revival = (Revival){jobs, g_strdup(d->id)};
    g_ptr_array_add(jobs->revivals, revival);
    models_open(jobs->options.models, d->model_path, on_revival_opened, revival);
}

void recovery_revive(Deployment *d)
{
    d->recovery.revive = loop_timer_start(d->jobs->options.loop, REVIVE_US, recovery_on_revive, d);
}

void recovery_clear(Deployment *d)
{
    recovery_stop(d);
    loop_timer_cancel(d->jobs->options.loop, d->recovery.grow);
    loop_timer_cancel(d->jobs->options.loop, d->recovery.revive);
    g_clear_error(&d->recovery.cause);
    g_clear_pointer(&d->recovery.held, g_hash_table_unref);
}

/* ---- what it takes ---- */

typedef struct Part {
    char *key; /* worker and ranges */
    const char *worker;
    uint64_t bytes;
} Part;

static void part_clear(void *data)
{
    g_free(((Part *)data)->key);
}

static GArray *plan_parts(const Plan *plan)
{
    GArray *parts = g_array_new(FALSE, TRUE, sizeof(Part));
    g_array_set_clear_func(parts, part_clear);
    for (uint32_t i = 0; i < plan->n_replicas; i++) {
        for (uint32_t s = 0; s < plan->replicas[i].n_stages; s++) {
            const PlanStage *stage = &plan->replicas[i].stages[s];
            for (uint32_t k = 0; k < stage->n_ranks; k++) {
                const PlanRank *rank = &stage->ranks[k];
                Part part = {.worker = rank->worker, .bytes = rank->weight_bytes};
                part.key = g_strdup_printf("%s %u-%u a%u+%u f%u+%u v%u+%u", rank->worker,
                                           stage->layer_first, stage->layer_last, rank->attn_first,
                                           rank->attn_count, rank->ffn_first, rank->ffn_count,
                                           rank->vocab_first, rank->vocab_count);
                g_array_append_val(parts, part);
            }
        }
    }
    return parts;
}

/* Of the worker's measured link, while nothing better is known. */
static double link_rate(const Deployment *d, const char *worker)
{
    const Member *member = members_find(d->jobs->options.members, worker);
    const Weft__V1__Hello *hello = member != NULL ? member_hello(member) : NULL;
    double rate = hello != NULL && hello->measured != NULL ? hello->measured->link_bytes_per_s : 0;
    return rate > 0 ? rate : 1e8;
}

void recovery_on_loading(Deployment *d)
{
    Recovery *r = &d->recovery;
    g_autoptr(GArray) parts = plan_parts(d->plan);
    double load_s = 0;
    r->load_bytes = 0;
    for (guint i = 0; i < parts->len; i++) {
        const Part *part = &g_array_index(parts, Part, i);
        if (r->held == NULL || !g_hash_table_contains(r->held, part->key)) {
            double rate =
                r->load_bytes_per_s > 0 ? r->load_bytes_per_s : link_rate(d, part->worker);
            load_s = MAX(load_s, (double)part->bytes / rate);
            r->load_bytes = MAX(r->load_bytes, part->bytes);
        }
    }
    r->load_began_us = loop_now_us(d->jobs->options.loop);
    r->predicted_load_s = load_s + r->start_s;
}

void recovery_on_loaded(Deployment *d)
{
    Recovery *r = &d->recovery;
    int64_t now = loop_now_us(d->jobs->options.loop);
    if (r->load_bytes > 0 && now > r->load_began_us) {
        r->load_bytes_per_s = (double)r->load_bytes * 1e6 / (double)(now - r->load_began_us);
    }
    g_autoptr(GArray) parts = plan_parts(d->plan);
    g_clear_pointer(&r->held, g_hash_table_unref);
    r->held = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL);
    for (guint i = 0; i < parts->len; i++) {
        g_hash_table_add(r->held, g_strdup(g_array_index(parts, Part, i).key));
    }
    r->start_began_us = now;
}

static gboolean is_of_worker(void *key, void *value, void *user)
{
    const char *worker = user;
    size_t length = strlen(worker);
    return strncmp(key, worker, length) == 0 && ((const char *)key)[length] == ' ';
}

void recovery_forget_worker(Deployment *d, const char *worker)
{
    if (d->recovery.held != NULL) {
        g_hash_table_foreach_remove(d->recovery.held, is_of_worker, (void *)worker);
    }
}

static uint64_t tokens_to_resume(const Deployment *d)
{
    uint64_t n = 0;
    for (GList *l = d->waiting.head; l != NULL; l = l->next) {
        n += ((const Lease *)l->data)->n_tokens;
    }
    return n;
}

void recovery_on_ready(Deployment *d)
{
    Recovery *r = &d->recovery;
    int64_t now = loop_now_us(d->jobs->options.loop);
    if (r->start_began_us != 0) {
        r->start_s = (double)(now - r->start_began_us) / 1e6;
        r->start_began_us = 0;
    }
}

void recovery_on_serving(Deployment *d)
{
    Recovery *r = &d->recovery;
    uint64_t n_tokens = tokens_to_resume(d), n_ready = 0;
    for (uint32_t i = 0; i < d->n_replicas; i++) {
        n_ready += d->replicas[i].ready;
    }
    if (n_tokens == 0 || n_ready == 0 || r->since_us == 0) {
        return;
    }
    r->n_tokens = (n_tokens + n_ready - 1) / n_ready;
    g_autofree char *bytes = units_format_size(r->load_bytes);
    log_info(d->jobs->options.log,
             "job %s goes on %.2f s after its epoch ended (predicted %.2f s): %s at most to load "
             "for one rank, %" G_GUINT64_FORMAT " tokens to compute again",
             d->id, (double)(loop_now_us(d->jobs->options.loop) - r->since_us) / 1e6,
             r->predicted_load_s, r->predicted_load_s > 0 ? bytes : "nothing", n_tokens);
}

void recovery_on_served(Deployment *d)
{
    Recovery *r = &d->recovery;
    if (d->waiting.length == 0) {
        recovery_stop(d);
        if (r->since_us != 0 && d->active.length > 0) {
            r->n_recoveries++;
            r->recovered_s += (double)(loop_now_us(d->jobs->options.loop) - r->since_us) / 1e6;
        }
        d->recovery.since_us = 0;
    }
}

LeaseRecovery recovery_of_lease(const Deployment *d, const Lease *lease)
{
    const Recovery *r = &d->recovery;
    if (!lease->resumes) {
        return (LeaseRecovery){0};
    }
    double rate = d->plan->predicted.prefill_tokens_per_s;
    return (LeaseRecovery){.resumed = true,
                           .load_s =
                               (double)(loop_now_us(d->jobs->options.loop) - r->since_us) / 1e6,
                           .predicted_load_s = r->predicted_load_s,
                           .n_tokens = r->n_tokens,
                           .predicted_prefill_s = rate > 0 ? (double)r->n_tokens / rate : 0};
}
