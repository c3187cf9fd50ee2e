/* Problem: a job must outlive the command that submitted it, the coordinator's process and the
 * workers it runs on, and be cancelled once and for all.
 *
 *            row is durable              cancel          row is gone
 *   STORING ───────────────▶ RUNNING ─────────────▶ ENDING ─────────▶ freed
 *      │ disk fails             ▲  │ cannot be (FAILED shows in its Served)
 *      └──▶ freed               └──┘ kept, with its reason, until it is cancelled; a training that
 *                                    is over until its name is taken by another, too
 *
 * 1. The submitter hears of a job when its row is durable, the canceller when the row is gone: at
 * no time does a restart bring back what was told to be over, or lose what was told to be there.
 * 2. A Served exists in RUNNING and ENDING after its start; it tries again by itself.
 * 3. What was restored begins when the listeners are there: a job is offered where it was. A
 * training that was over, done or failed, still is: its log says how it ended.
 * 4. A training that is over stays until the row of the one that takes its name is durable. */
#include "coordinator/submissions.h"

#include "coordinator/gateway/requests/request_check.h"
#include "coordinator/reason.h"
#include "coordinator/store/records.h"
#include "coordinator/train/train_settings.h"
#include "coordinator/train/train_status.h"
#include "proto/base/error.h"
#include "proto/config/job_spec.h"
#include "proto/config/options.h"

#include <string.h>

#define LINES_LIMIT 500u
#define TRAIN_LINES_LIMIT 100000u /* a line a step */
#define SPEC_LIMIT ((size_t)64 << 10)
#define FOLLOWER_PENDING_LIMIT ((size_t)1 << 20)
#define TRAIN_PENDING_LIMIT ((size_t)64 << 20) /* all lines at once, and then some */
#define LISTEN_DEFAULT "127.0.0.1:8080"
#define LISTEN_ANY "127.0.0.1:0"

typedef enum SubmissionState { SUBMISSION_STORING, SUBMISSION_RUNNING, SUBMISSION_ENDING } State;

typedef struct Line {
    int64_t wall_us;
    char *text;
} Line;

typedef struct Submission Submission;
struct Submission {
    Submissions *owner;
    State state;
    Submission *before; /* STORING: of the same name, over; it is back if the disk fails */
    JobSpec *spec;
    char *text, *submitter; /* the job file */
    int64_t submitted_us;   /* Unix time */
    JobWish wish;
    Served *served;  /* NULL before it began, or when it could not */
    TrainJob *train; /* kind train, in place of `served` */
    bool restored;
    char *problem;    /* why it could not; NULL */
    GQueue lines;     /* of Line, the newest last */
    GQueue followers; /* of RpcCall, referenced */
    StoreDone done;   /* of the write under way; NULL: none */
    void *user;
};

struct Submissions {
    SubmissionsOptions options;
    GPtrArray *all; /* of Submission, by name; owned */
    bool started;
    TrainRate train_rates[2]; /* by NumericsClass */
};

/* ---- lines ---- */

static void line_free(void *data)
{
    Line *line = data;
    g_free(line->text);
    g_free(line);
}

static size_t send_line(RpcCall *call, const Line *line)
{
    Weft__V1__JobLine message = WEFT__V1__JOB_LINE__INIT;
    message.time_ms = (uint64_t)line->wall_us / 1000;
    message.text = line->text;
    return rpc_call_send(call, &message.base);
}

static void follower_drop(Submission *s, RpcCall *call, const GError *error)
{
    g_queue_remove(&s->followers, call);
    rpc_call_on_cancel(call, NULL, NULL);
    rpc_call_finish(call, error);
    rpc_call_unref(call);
}

static void tell_followers(Submission *s, const Line *line)
{
    const size_t limit = s->spec->kind == JOB_TRAIN ? TRAIN_PENDING_LIMIT : FOLLOWER_PENDING_LIMIT;
    for (GList *l = s->followers.head, *next; l != NULL; l = next) {
        next = l->next;
        if (send_line(l->data, line) > limit) {
            g_autoptr(GError) slow =
                g_error_new(WEFT_ERROR, WEFT_ERROR_DEADLINE,
                            "who follows job %s does not read: ask again", s->spec->name);
            follower_drop(s, l->data, slow);
        }
    }
}

/* text: taken. The same as the last line: nothing. */
static void submission_say(Submission *s, char *text)
{
    const Line *last = g_queue_peek_tail(&s->lines);
    if (last != NULL && strcmp(last->text, text) == 0) {
        g_free(text);
        return;
    }
    Line *line = g_new(Line, 1);
    *line = (Line){loop_wall_us(s->owner->options.loop), text};
    g_queue_push_tail(&s->lines, line);
    if (s->lines.length > (s->spec->kind == JOB_TRAIN ? TRAIN_LINES_LIMIT : LINES_LIMIT)) {
        line_free(g_queue_pop_head(&s->lines));
    }
    tell_followers(s, line);
}

/* ---- the model it serves ---- */

/* Steps of a load come by the megabyte: a line for each tenth. */
static void on_progress(const char *text, double fraction, const char *worker, void *user)
{
    Submission *s = user;
    if (fraction > 0 && fraction < 1) {
        submission_say(s, g_strdup_printf("loaded %d%%", (int)(fraction * 10) * 10));
    } else {
        submission_say(s, g_strdup(text));
    }
}

static void on_ready(void *user)
{
    Submission *s = user;
    const char *job = served_job(s->served);
    submission_say(s, g_strdup_printf("ready: job %s", job != NULL ? job : ""));
}

static void on_waiting(const GError *why, bool final, void *user)
{
    Submission *s = user;
    submission_say(s, g_strdup_printf("%s: %s", final ? "failed" : "not ready", why->message));
}

/* Where clients reach it. A coordinator without --http opens a listener of its own for its jobs:
 * the usual one, or any if that is taken. */
static const HttpServer *shared_listener(const Submissions *submissions)
{
    ApiService *api = submissions->options.api;
    const HttpServer *listener = api_service_listener(api);
    g_autoptr(GError) error = NULL;
    if (listener == NULL) {
        listener = api_service_listen(api, LISTEN_DEFAULT, &error);
    }
    if (listener == NULL) {
        log_warn(submissions->options.log, "%s: jobs are offered at another port", error->message);
        g_clear_error(&error);
        listener = api_service_listen(api, LISTEN_ANY, &error);
    }
    if (listener == NULL) {
        log_warn(submissions->options.log, "jobs are not offered over HTTP: %s", error->message);
    }
    return listener;
}

static void on_train_line(const char *line, void *user)
{
    submission_say(user, g_strdup(line));
}

/* What a follower's call ends with: a job that failed is an error. */
static const GError *train_error(const Submission *s)
{
    return s->train != NULL && train_job_failed(s->train) ? train_job_problem(s->train) : NULL;
}

static void drop_followers(Submission *s, const GError *why)
{
    while (s->followers.head != NULL) {
        follower_drop(s, s->followers.head->data, why);
    }
}

static void on_train_ended(void *user)
{
    drop_followers(user, train_error(user));
}

static void train_begin(Submission *s)
{
    static const TrainJobCallbacks callbacks = {on_train_line, on_train_ended};
    s->train = train_job_new(&s->owner->options.train, s->text, s->submitted_us, s->restored,
                             callbacks, s);
}

static void submission_begin(Submission *s)
{
    static const ServedCallbacks callbacks = {on_progress, on_ready, on_waiting};
    g_autoptr(GError) error = NULL;
    s->state = SUBMISSION_RUNNING;
    if (s->spec->kind == JOB_TRAIN) {
        train_begin(s);
        return;
    }
    shared_listener(s->owner);
    s->served = served_add(api_service_served(s->owner->options.api), s->spec->model.from,
                           s->spec->name, &s->wish, callbacks, s, &error);
    if (s->served == NULL) {
        s->problem = g_strdup(error->message);
        submission_say(s, g_strdup_printf("failed: %s", error->message));
        return;
    }
    served_set_patient(s->served);
    served_set_queue(s->served, s->spec->queue);
    submission_say(s, g_strdup("opening the model"));
}

/* ---- life ---- */

static void submission_free(void *data)
{
    Submission *s = data;
    if (s == NULL) {
        return;
    }
    drop_followers(s, train_error(s)); /* of others it was said why */
    submission_free(s->before);
    if (s->served != NULL) {
        api_service_drop(s->owner->options.api, s->served);
        served_remove(s->served);
    }
    train_job_free(s->train);
    g_queue_clear_full(&s->lines, line_free);
    job_spec_free(s->spec);
    g_free(s->problem);
    g_free(s->submitter);
    g_free(s->text);
    g_free(s);
}

Submissions *submissions_new(const SubmissionsOptions *options)
{
    Submissions *submissions = g_new0(Submissions, 1);
    submissions->options = *options;
    submissions->options.train.rates = submissions->train_rates;
    submissions->all = g_ptr_array_new_with_free_func(submission_free);
    return submissions;
}

/* What is on its way to disk arrives there; who asked for it, or follows a job, is told to look
 * again. */
static void end_pending(Submissions *submissions)
{
    g_autoptr(GError) error =
        g_error_new(WEFT_ERROR, WEFT_ERROR_UNREACHABLE,
                    "the coordinator is stopping: weft jobs shows what is there when it is back");
    for (guint i = 0; i < submissions->all->len; i++) {
        Submission *s = g_ptr_array_index(submissions->all, i);
        if (s->done != NULL) {
            s->done(error, s->user);
        }
        if (s->train == NULL || !train_job_is_over(s->train)) {
            drop_followers(s, error);
        }
    }
}

void submissions_free(Submissions *submissions)
{
    if (submissions != NULL) {
        end_pending(submissions);
        g_ptr_array_unref(submissions->all);
        g_free(submissions);
    }
}

static Submission *find(const Submissions *submissions, const char *name)
{
    for (guint i = 0; i < submissions->all->len; i++) {
        Submission *s = g_ptr_array_index(submissions->all, i);
        const char *job = s->served != NULL ? served_job(s->served) : NULL;
        if (strcmp(s->spec->name, name) == 0 || (job != NULL && strcmp(job, name) == 0)) {
            return s;
        }
    }
    return NULL;
}

static GError *unknown(const Submissions *submissions, const char *name)
{
    g_autoptr(GPtrArray) names = g_ptr_array_new();
    for (guint i = 0; i < submissions->all->len; i++) {
        g_ptr_array_add(names, ((Submission *)g_ptr_array_index(submissions->all, i))->spec->name);
    }
    g_ptr_array_add(names, NULL);
    const char *near = options_nearest(name, (const char *const *)names->pdata);
    return g_error_new(WEFT_ERROR, WEFT_ERROR_NOT_FOUND,
                       "no submitted job is called '%s': %s%s%s`weft jobs` lists them", name,
                       near != NULL ? "did you mean " : "", near != NULL ? near : "",
                       near != NULL ? "? " : "");
}

static int by_name(const void *a, const void *b)
{
    return strcmp((*(Submission *const *)a)->spec->name, (*(Submission *const *)b)->spec->name);
}

static void submission_insert(Submissions *submissions, Submission *s)
{
    g_ptr_array_add(submissions->all, s);
    g_ptr_array_sort(submissions->all, by_name);
}

/* ---- job files ---- */

static bool read_wish(const JobSpec *spec, JobWish *wish, GError **error)
{
    static const char *const kv_names[] = {"f16", "bf16", "f32", "q8"};
    *wish = (JobWish){.dp = (uint32_t)spec->layout.dp,
                      .pp = (uint32_t)spec->layout.pp,
                      .tp = (uint32_t)spec->layout.tp,
                      .context = (uint32_t)spec->context,
                      .streams = (uint32_t)spec->streams,
                      .kv_memory = spec->kv_memory,
                      .numerics = spec->numerics == JOB_FAST ? NUMERICS_FAST : NUMERICS_EXACT,
                      .any_numerics = spec->numerics == JOB_ANY_NUMERICS};
    return request_check_layout(wish->dp, wish->pp, wish->tp, wish->streams, error) &&
           request_kv_type(kv_names[spec->kv_type], &wish->kv_type, error);
}

/* NULL + error. */
static Submission *submission_new(Submissions *submissions, const char *text, const char *submitter,
                                  int64_t submitted_us, GError **error)
{
    JobWish wish = {0};
    g_autoptr(JobSpec) spec =
        strlen(text) <= SPEC_LIMIT ? job_spec_parse(text, strlen(text), "job file", error) : NULL;
    if (spec == NULL) {
        if (error != NULL && *error == NULL) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                        "job file of %zu bytes is too large: at most %zu", strlen(text),
                        SPEC_LIMIT);
        }
        return NULL;
    }
    if (spec->kind == JOB_TRAIN && !train_settings_check(spec, error)) {
        return NULL;
    }
    if (spec->kind == JOB_SERVE && !read_wish(spec, &wish, error)) {
        return NULL;
    }
    Submission *s = g_new0(Submission, 1);
    s->owner = submissions;
    s->spec = g_steal_pointer(&spec);
    s->wish = wish;
    s->text = g_strdup(text);
    s->submitter = g_strdup(submitter);
    s->submitted_us = submitted_us;
    g_queue_init(&s->lines);
    g_queue_init(&s->followers);
    return s;
}

bool submissions_restore(Submissions *submissions, const StoreRow *row, GError **error)
{
    SubmissionRecord record = {0};
    if (!submission_record_read(row->key, row->value, &record, error)) {
        return false;
    }
    Submission *s =
        submission_new(submissions, record.spec, record.owner, record.submitted_us, error);
    if (s != NULL) {
        s->state = SUBMISSION_RUNNING;
        s->restored = true;
        submission_insert(submissions, s);
    }
    submission_record_clear(&record);
    return s != NULL;
}

void submissions_start(Submissions *submissions)
{
    submissions->started = true;
    for (guint i = 0; i < submissions->all->len; i++) {
        Submission *s = g_ptr_array_index(submissions->all, i);
        submission_say(s, g_strdup("found at the start of the coordinator"));
        submission_begin(s);
    }
}

/* ---- submit and cancel ---- */

static void on_stored(const GError *error, void *user)
{
    Submission *s = user;
    StoreDone done = s->done;
    void *done_user = s->user;
    s->done = NULL;
    Submission *before = g_steal_pointer(&s->before);
    if (error != NULL) {
        Submissions *submissions = s->owner;
        drop_followers(s, error);
        g_ptr_array_remove(submissions->all, s);
        if (before != NULL) {
            submission_insert(submissions, before);
        }
    } else {
        if (before != NULL) { /* whatever takes its name */
            train_job_forget(&s->owner->options.train, s->spec->name);
        }
        submission_free(before);
        log_info(s->owner->options.log, "job %s submitted by %s", s->spec->name, s->submitter);
        submission_say(s, g_strdup_printf("submitted by %s", s->submitter));
        submission_begin(s);
    }
    done(error, done_user);
}

/* The training that is over under this name, which the new one may take. NULL without an error:
 * the name is free. */
static Submission *find_before(Submissions *submissions, const char *name, const char *who,
                               bool any, GError **error)
{
    Submission *s = find(submissions, name);
    const bool over = s != NULL && strcmp(s->spec->name, name) == 0 &&
                      s->state == SUBMISSION_RUNNING && s->train != NULL &&
                      train_job_is_over(s->train);
    if ((s != NULL && !over) ||
        served_find(api_service_served(submissions->options.api), name) != NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "a job named %s is there already: give this one another name, or weft cancel "
                    "that one",
                    name);
        return NULL;
    }
    if (over && !any && strcmp(s->submitter, who) != 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_DENIED,
                    "job %s was submitted by %s: that account or an administrator may take its "
                    "name, give this one another",
                    name, s->submitter);
        return NULL;
    }
    return s;
}

bool submissions_submit(Submissions *submissions, const char *spec, const char *owner, bool any,
                        StoreDone done, void *user, GError **error)
{
    GError *taken = NULL;
    Submission *s =
        submission_new(submissions, spec, owner, loop_wall_us(submissions->options.loop), error);
    if (s == NULL) {
        return false;
    }
    const char *name = s->spec->name;
    guint at;
    s->before = find_before(submissions, name, owner, any, &taken);
    if (taken != NULL) {
        g_propagate_error(error, taken);
        submission_free(s);
        return false;
    }
    if (s->before != NULL && g_ptr_array_find(submissions->all, s->before, &at)) {
        g_ptr_array_steal_index(submissions->all, at);
    }
    s->done = done;
    s->user = user;
    submission_insert(submissions, s);
    SubmissionRecord record = {
        .spec = s->text, .owner = s->submitter, .submitted_us = s->submitted_us};
    store_put(submissions->options.store, STORE_SUBMISSIONS, name, submission_record_pack(&record),
              on_stored, s);
    return true;
}

static void on_removed(const GError *error, void *user)
{
    Submission *s = user;
    Submissions *submissions = s->owner;
    StoreDone done = s->done;
    void *done_user = s->user;
    s->done = NULL;
    if (error != NULL) {
        s->state = SUBMISSION_RUNNING;
        submission_say(s, g_strdup_printf("could not be cancelled: %s", error->message));
    } else {
        const char *job = s->served != NULL ? served_job(s->served) : NULL;
        g_autofree char *id = g_strdup(job);
        uint32_t n;
        g_autoptr(GError) why =
            g_error_new(WEFT_ERROR, WEFT_ERROR_CANCELLED, "job %s was cancelled", s->spec->name);
        submission_say(s, g_strdup("cancelled"));
        drop_followers(s, why);
        if (s->train != NULL) {
            train_job_forget(&submissions->options.train, s->spec->name);
        }
        log_info(submissions->options.log, "job %s cancelled", s->spec->name);
        g_ptr_array_remove(submissions->all, s);
        if (id != NULL) { /* while others use the deployment it stays */
            jobs_unload(submissions->options.jobs, id, &n, NULL);
        }
    }
    done(error, done_user);
}

bool submissions_cancel(Submissions *submissions, const char *name, const char *who, bool any,
                        StoreDone done, void *user, GError **error)
{
    Submission *s = find(submissions, name);
    if (s == NULL) {
        g_propagate_error(error, unknown(submissions, name));
        return false;
    }
    if (!any && strcmp(s->submitter, who) != 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_DENIED,
                    "job %s was submitted by %s: that account or an administrator cancels it",
                    s->spec->name, s->submitter);
        return false;
    }
    if (s->state != SUBMISSION_RUNNING) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_READY,
                    "job %s is being %s: ask again in a moment", s->spec->name,
                    s->state == SUBMISSION_STORING ? "written down" : "cancelled");
        return false;
    }
    s->state = SUBMISSION_ENDING;
    s->done = done;
    s->user = user;
    store_put(submissions->options.store, STORE_SUBMISSIONS, s->spec->name, NULL, on_removed, s);
    return true;
}

/* ---- reading ---- */

static const char *state_text(const Submission *s)
{
    return s->train != NULL     ? train_job_state(s->train)
           : s->served != NULL  ? served_state_text(s->served)
           : s->problem != NULL ? "failed"
                                : "submitted";
}

static char *model_text(const Submission *s)
{
    return s->spec->model.from != NULL ? s->spec->model.from : (char *)"";
}

static const char *problem_text(const Submission *s)
{
    if (s->train != NULL) {
        const GError *problem = train_job_problem(s->train);
        return problem != NULL ? problem->message : "";
    }
    if (s->served == NULL) {
        return s->problem != NULL ? s->problem : "";
    }
    return served_is_ready(s->served) ? "" : served_problem(s->served);
}

void submissions_each(const Submissions *submissions,
                      void (*fn)(const Weft__V1__Submission *job, void *user), void *user)
{
    int64_t now = loop_wall_us(submissions->options.loop);
    const HttpServer *listener = api_service_listener(submissions->options.api);
    g_autofree char *url =
        listener != NULL ? api_service_url(submissions->options.api, listener) : g_strdup("");
    for (guint i = 0; i < submissions->all->len; i++) {
        const Submission *s = g_ptr_array_index(submissions->all, i);
        const char *job = s->served != NULL ? served_job(s->served) : NULL;
        Weft__V1__Submission message = WEFT__V1__SUBMISSION__INIT;
        message.name = s->spec->name;
        message.kind = (char *)(s->spec->kind == JOB_TRAIN ? "train" : "serve");
        message.state = (char *)state_text(s);
        message.reason = (char *)problem_text(s);
        message.job = job != NULL ? (char *)job : (char *)"";
        message.model = model_text(s);
        message.owner = s->submitter;
        message.submitted = (uint64_t)s->submitted_us / G_USEC_PER_SEC;
        message.age_ms = (uint64_t)MAX(now - s->submitted_us, 0) / 1000;
        message.address = s->spec->kind == JOB_SERVE ? url : (char *)"";
        message.spec = s->text;
        fn(&message, user);
    }
}

static void on_follower_left(void *user)
{
    RpcCall *call = user;
    Submission *s = rpc_call_data(call);
    g_queue_remove(&s->followers, call);
    rpc_call_unref(call);
}

void submissions_logs(Submissions *submissions, const char *name, bool follow, RpcCall *call)
{
    Submission *s = find(submissions, name);
    if (s == NULL) {
        g_autoptr(GError) error = unknown(submissions, name);
        rpc_call_finish(call, error);
        return;
    }
    for (GList *l = s->lines.head; l != NULL; l = l->next) {
        send_line(call, l->data);
    }
    if (!follow || (s->train != NULL && train_job_is_over(s->train))) {
        rpc_call_finish(call, train_error(s));
        return;
    }
    g_queue_push_tail(&s->followers, rpc_call_ref(call));
    rpc_call_set_data(call, s, NULL);
    rpc_call_on_cancel(call, on_follower_left, call);
}

char *submissions_plot(const Submissions *submissions, const char *name, uint64_t *steps,
                       GError **error)
{
    const Submission *s = find(submissions, name);
    if (s == NULL) {
        g_propagate_error(error, unknown(submissions, name));
        return NULL;
    }
    if (s->train == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "job %s does not train: only the steps of a training have curves", name);
        return NULL;
    }
    *steps = train_job_steps(s->train);
    return train_job_curves(s->train);
}

const TrainRate *submissions_train_rate(const Submissions *submissions, uint32_t numerics)
{
    return &submissions->train_rates[numerics];
}

void submissions_training(const Submissions *submissions, GPtrArray *out)
{
    for (guint i = 0; i < submissions->all->len; i++) {
        const Submission *s = g_ptr_array_index(submissions->all, i);
        if (s->train != NULL) {
            g_ptr_array_add(out, train_status(s->train, &submissions->options.train));
        }
    }
}

/* What there is to say of one that has no deployment. */
static void explain_alone(const Submission *s, GPtrArray *reasons)
{
    const SubmissionsOptions *o = &s->owner->options;
    const int64_t age_us = loop_wall_us(o->loop) - s->submitted_us;
    Weft__V1__Reason *reason = s->train != NULL ? train_status_reason(s->train, &o->train)
                                                : reason_new("job", s->spec->name);
    reason->age_ms = (uint64_t)MAX(age_us, 0) / 1000;
    reason_set(&reason->model, g_strdup(model_text(s)));
    if (s->train == NULL) {
        reason_set(&reason->state, g_strdup(state_text(s)));
        reason_set(&reason->text, g_strdup(problem_text(s)));
        reason->state_ms = reason->age_ms;
    }
    g_ptr_array_add(reasons, reason);
}

bool submissions_explain(const Submissions *submissions, const char *name, GPtrArray *reasons)
{
    for (guint i = 0; name == NULL && i < submissions->all->len; i++) {
        const Submission *s = g_ptr_array_index(submissions->all, i);
        if (s->train != NULL && !train_job_is_over(s->train)) {
            explain_alone(s, reasons);
        }
    }
    const Submission *s = name != NULL ? find(submissions, name) : NULL;
    const char *job = s != NULL && s->served != NULL ? served_job(s->served) : NULL;
    if (job != NULL) {
        jobs_explain(submissions->options.jobs, job, reasons);
    } else if (s != NULL) {
        explain_alone(s, reasons);
    }
    return name == NULL || s != NULL;
}
