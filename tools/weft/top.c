/* weft top: what replicas, workers and jobs do now. Rates are between two heartbeats of the same
 * worker, by the coordinator's clock: neither this command's pace nor the network's is in them. */
#include "tools/weft/request.h"
#include "tools/weft/training_shown.h"
#include "tools/weft/verbs.h"

#include "proto/base/units.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define PAUSE_US G_USEC_PER_SEC

typedef struct TopOptions {
    CommonOptions common;
} TopOptions;

static const Option TOP_OPTIONS[] = {COMMON_OPTIONS(TopOptions), {0}};

typedef Weft__V1__StatusResponse Status;
typedef Weft__V1__Member Member;
typedef Weft__V1__ReplicaLoad Load;

/* ---- two samples ---- */

typedef struct Sample {
    const Status *now, *before; /* before: NULL with the first */
} Sample;

static const Member *find_member(const Status *s, const char *name)
{
    for (size_t i = 0; s != NULL && i < s->n_members; i++) {
        if (strcmp(s->members[i]->name, name) == 0) {
            return s->members[i];
        }
    }
    return NULL;
}

static const Load *find_load(const Member *m, const Load *like)
{
    for (size_t i = 0; m != NULL && i < m->n_loads; i++) {
        const Load *l = m->loads[i];
        if (strcmp(l->job, like->job) == 0 && l->replica == like->replica &&
            l->epoch == like->epoch) {
            return l;
        }
    }
    return NULL;
}

/* When the coordinator heard what it says of a member. */
static double heard_s(const Status *s, const Member *m)
{
    return ((double)s->uptime_ms - (double)m->last_heartbeat_ms) / 1000;
}

/* Seconds between the two heartbeats of a member; 0: there is but one, or the coordinator was
 * started anew. */
static double between_s(const Sample *sample, const Member *m, const Member *before)
{
    if (before == NULL || sample->now->generation != sample->before->generation) {
        return 0;
    }
    const double s = heard_s(sample->now, m) - heard_s(sample->before, before);
    return s > 0.1 ? s : 0;
}

/* -1: not known. A count that fell belongs to another process. */
static double rate(uint64_t now, uint64_t before, double seconds)
{
    return seconds > 0 && now >= before ? (double)(now - before) / seconds : -1;
}

typedef struct WorkerRates {
    double compute, wait, wire, seal; /* shares of the time */
    double rows, sent, received;      /* per second */
} WorkerRates;

static WorkerRates worker_rates(const Sample *sample, const Member *m)
{
    static const Weft__V1__Counters none = WEFT__V1__COUNTERS__INIT;
    const Member *b = find_member(sample->before, m->name);
    const double s = between_s(sample, m, b);
    const Weft__V1__Counters *now = m->counters != NULL ? m->counters : &none;
    const Weft__V1__Counters *before = b != NULL && b->counters != NULL ? b->counters : &none;
    return (WorkerRates){.compute = rate(now->compute_us, before->compute_us, s * 1e6),
                         .wait = rate(now->wait_us, before->wait_us, s * 1e6),
                         .wire = rate(now->wire_us, before->wire_us, s * 1e6),
                         .seal = rate(now->seal_us, before->seal_us, s * 1e6),
                         .rows = rate(now->rows, before->rows, s),
                         .sent = rate(now->wire_bytes_sent, before->wire_bytes_sent, s),
                         .received =
                             rate(now->wire_bytes_received, before->wire_bytes_received, s)};
}

typedef struct LoadRates {
    double tokens, prompt_tokens; /* per second */
    double hits;                  /* share of the tokens that asked the prefix cache; ever */
} LoadRates;

static LoadRates load_rates(const Sample *sample, const Member *m, const Load *l)
{
    const Member *b = find_member(sample->before, m->name);
    const Load *before = find_load(b, l);
    const double s = before != NULL ? between_s(sample, m, b) : 0;
    return (LoadRates){
        .tokens = rate(l->generation_tokens, before != NULL ? before->generation_tokens : 0, s),
        .prompt_tokens = rate(l->prompt_tokens, before != NULL ? before->prompt_tokens : 0, s),
        .hits = l->prefix_query_tokens > 0
                    ? (double)l->prefix_hit_tokens / (double)l->prefix_query_tokens
                    : -1};
}

/* Calls fn for each replica that is served, with its leader. */
static void each_load(const Status *s,
                      void (*fn)(const Member *leader, const Load *load, void *user), void *user)
{
    for (size_t i = 0; i < s->n_members; i++) {
        for (size_t k = 0; k < s->members[i]->n_loads; k++) {
            fn(s->members[i], s->members[i]->loads[k], user);
        }
    }
}

typedef struct JobRate {
    const Sample *sample;
    const char *job;
    double tokens; /* -1: not known */
} JobRate;

static void add_job_rate(const Member *leader, const Load *load, void *user)
{
    JobRate *r = user;
    if (strcmp(load->job, r->job) == 0) {
        const double tokens = load_rates(r->sample, leader, load).tokens;
        r->tokens = tokens < 0 ? r->tokens : MAX(r->tokens, 0) + tokens;
    }
}

static double job_rate(const Sample *sample, const char *job)
{
    JobRate r = {sample, job, -1};
    each_load(sample->now, add_job_rate, &r);
    return r.tokens;
}

/* ---- JSON ---- */

static json_t *known(double value)
{
    return value < 0 ? json_null() : json_real(value);
}

static json_t *worker_json(const Sample *sample, const Member *m)
{
    const WorkerRates r = worker_rates(sample, m);
    json_t *stalls = json_array();
    for (size_t i = 0; i < m->n_waiting; i++) {
        const Weft__V1__Waiting *w = m->waiting[i];
        json_array_append_new(stalls, json_pack("{s:s,s:s,s:s,s:I}", "job", w->job, "waits_for",
                                                w->waits_for, "operation", w->operation, "since_ms",
                                                (json_int_t)w->since_ms));
    }
    return json_pack("{s:s,s:s,s:o,s:o,s:o,s:o,s:o,s:o,s:o,s:o,s:f}", "name", m->name, "state",
                     m->state, "compute_share", known(r.compute), "wait_share", known(r.wait),
                     "wire_share", known(r.wire), "seal_share", known(r.seal), "rows_per_s",
                     known(r.rows), "sent_bytes_per_s", known(r.sent), "received_bytes_per_s",
                     known(r.received), "stalls", stalls, "loop_lag_ms", m->loop_lag_ms);
}

typedef struct JsonList {
    const Sample *sample;
    json_t *list;
} JsonList;

static void add_load_json(const Member *leader, const Load *l, void *user)
{
    const JsonList *out = user;
    const LoadRates r = load_rates(out->sample, leader, l);
    json_array_append_new(
        out->list,
        json_pack("{s:s,s:I,s:I,s:s,s:I,s:I,s:I,s:o,s:o,s:I,s:I,s:I,s:o,s:I}", "job", l->job,
                  "replica", (json_int_t)l->replica, "epoch", (json_int_t)l->epoch, "leader",
                  leader->name, "running", (json_int_t)l->running, "waiting",
                  (json_int_t)l->waiting, "slots", (json_int_t)l->slots, "tokens_per_s",
                  known(r.tokens), "prompt_tokens_per_s", known(r.prompt_tokens), "kv_pages_used",
                  (json_int_t)l->kv_pages_used, "kv_pages_cached", (json_int_t)l->kv_pages_cached,
                  "kv_pages", (json_int_t)l->kv_pages_total, "prefix_hit_share", known(r.hits),
                  "preemptions", (json_int_t)l->preemptions));
}

static void print_json(const Sample *sample)
{
    const Status *s = sample->now;
    json_t *workers = json_array(), *replicas = json_array(), *jobs = json_array();
    for (size_t i = 0; i < s->n_members; i++) {
        json_array_append_new(workers, worker_json(sample, s->members[i]));
    }
    JsonList list = {sample, replicas};
    each_load(s, add_load_json, &list);
    for (size_t i = 0; i < s->n_jobs; i++) {
        const Weft__V1__Job *j = s->jobs[i];
        json_array_append_new(
            jobs, json_pack("{s:s,s:s,s:s,s:s,s:I,s:I,s:o,s:s}", "id", j->id, "state", j->state,
                            "layout", j->layout, "numerics", j->numerics, "epoch",
                            (json_int_t)j->epoch, "active_requests", (json_int_t)j->active_requests,
                            "tokens_per_s", known(job_rate(sample, j->id)), "model", j->model));
    }
    json_t *object = cli_json_new();
    json_object_update_new(object,
                           json_pack("{s:s,s:I,s:I,s:{s:I,s:I},s:f,s:o,s:o,s:o}", "cluster",
                                     s->cluster, "generation", (json_int_t)s->generation,
                                     "uptime_ms", (json_int_t)s->uptime_ms, "requests", "running",
                                     (json_int_t)s->requests_running, "waiting",
                                     (json_int_t)s->requests_waiting, "loop_lag_ms", s->loop_lag_ms,
                                     "workers", workers, "replicas", replicas, "jobs", jobs));
    json_object_set_new(object, "training", training_json(s));
    cli_print_json(object);
}

/* ---- text ---- */

static char *percent(double share)
{
    return share < 0 ? g_strdup("-") : g_strdup_printf("%.0f%%", share * 100);
}

static char *number(double value)
{
    return value < 0 ? g_strdup("-") : g_strdup_printf(value < 10 ? "%.1f" : "%.0f", value);
}

static char *bytes_text(double per_s)
{
    return per_s < 0 ? g_strdup("-") : units_format_size((uint64_t)per_s);
}

/* The wait that has lasted longest. */
static char *stall_text(const Member *m)
{
    const Weft__V1__Waiting *longest = NULL;
    for (size_t i = 0; i < m->n_waiting; i++) {
        if (longest == NULL || m->waiting[i]->since_ms > longest->since_ms) {
            longest = m->waiting[i];
        }
    }
    if (longest == NULL) {
        return g_strdup("-");
    }
    g_autofree char *since = units_format_duration((int64_t)longest->since_ms * 1000);
    return g_strdup_printf("%s %s", longest->waits_for, since);
}

static void print_workers(const Sample *sample)
{
    TextTable *t =
        text_table_new((const char *const[]){"WORKER", "STATE", "COMPUTE", "WAIT", "WIRE", "SEAL",
                                             "ROWS/S", "SENT/S", "WAITS FOR", NULL});
    for (size_t i = 0; i < sample->now->n_members; i++) {
        const Member *m = sample->now->members[i];
        const WorkerRates r = worker_rates(sample, m);
        g_autofree char *compute = percent(r.compute), *wait = percent(r.wait),
                        *wire = percent(r.wire), *seal = percent(r.seal), *rows = number(r.rows),
                        *sent = bytes_text(r.sent), *stall = stall_text(m);
        text_table_row(t, m->name, m->state, compute, wait, wire, seal, rows, sent, stall, NULL);
    }
    text_table_fit(t, 8);
    text_table_print(t);
}

typedef struct LoadTable {
    const Sample *sample;
    TextTable *table;
} LoadTable;

static void add_load_row(const Member *leader, const Load *l, void *user)
{
    const LoadTable *out = user;
    const LoadRates r = load_rates(out->sample, leader, l);
    g_autofree char *name = g_strdup_printf("%s/%u", l->job, l->replica);
    g_autofree char *running = g_strdup_printf("%u/%u", l->running, l->slots);
    g_autofree char *waiting = g_strdup_printf("%u", l->waiting);
    g_autofree char *tokens = number(r.tokens), *prompt = number(r.prompt_tokens);
    g_autofree char *pages = g_strdup_printf("%" G_GUINT64_FORMAT "/%" G_GUINT64_FORMAT,
                                             l->kv_pages_used, l->kv_pages_total);
    g_autofree char *hits = percent(r.hits);
    g_autofree char *preempted = g_strdup_printf("%" G_GUINT64_FORMAT, l->preemptions);
    text_table_row(out->table, name, running, waiting, tokens, prompt, pages, hits, preempted,
                   NULL);
}

static void print_replicas(const Sample *sample)
{
    LoadTable out = {sample, text_table_new((const char *const[]){"REPLICA", "RUNNING", "WAIT",
                                                                  "TOK/S", "PROMPT/S", "KV PAGES",
                                                                  "HITS", "PREEMPT", NULL})};
    each_load(sample->now, add_load_row, &out);
    text_table_fit(out.table, 0);
    text_table_print(out.table);
}

static void print_jobs(const Sample *sample)
{
    TextTable *t = text_table_new(
        (const char *const[]){"JOB", "STATE", "LAYOUT", "EPOCH", "REQUESTS", "TOK/S", "AGE", NULL});
    for (size_t i = 0; i < sample->now->n_jobs; i++) {
        const Weft__V1__Job *j = sample->now->jobs[i];
        g_autofree char *epoch = g_strdup_printf("%" G_GUINT64_FORMAT, j->epoch);
        g_autofree char *requests = g_strdup_printf("%u", j->active_requests);
        g_autofree char *tokens = number(job_rate(sample, j->id));
        g_autofree char *age = units_format_duration((int64_t)j->age_ms / 1000 * 1000000);
        g_autofree char *layout = job_layout_text(j);
        text_table_row(t, j->id, j->state, layout, epoch, requests, tokens, age, NULL);
    }
    text_table_fit(t, 2);
    text_table_print(t);
}

static void print_text(const Sample *sample)
{
    const Status *s = sample->now;
    g_autofree char *up = units_format_duration((int64_t)s->uptime_ms / 1000 * 1000000);
    printf("up %s, %u requests running, %u waiting, loop lag %.1f ms\n\n", up, s->requests_running,
           s->requests_waiting, s->loop_lag_ms);
    print_workers(sample);
    printf("\n");
    print_replicas(sample);
    printf("\n");
    print_jobs(sample);
    training_print(s, true);
}

/* ---- the verb ---- */

static void pause_for(Client *client)
{
    main_loop_run_until(client->loop, &client->interrupted, PAUSE_US);
}

static void status_free(Status *s)
{
    if (s != NULL) {
        protobuf_c_message_free_unpacked(&s->base, NULL);
    }
}

/* The next sample; what was now is before. */
static bool sample_next(Client *client, Status **before, Status **now, GError **error)
{
    status_free(*before);
    *before = *now;
    *now = request_status(client, error);
    return *now != NULL;
}

/* Once, with rates: two samples a moment apart. Live: again and again, the first without rates. */
static bool show(Client *client, const TopOptions *o, bool live, GError **error)
{
    Status *before = NULL, *now = NULL;
    bool ok = sample_next(client, &before, &now, error);
    if (ok && !live) {
        pause_for(client);
        ok = client->interrupted || sample_next(client, &before, &now, error);
    }
    while (ok && !client->interrupted) {
        const Sample sample = {now, before};
        if (o->common.json) {
            print_json(&sample);
        } else {
            printf("%s", live ? "\033[H\033[2J" : "");
            print_text(&sample);
        }
        fflush(stdout);
        if (!live) {
            break;
        }
        pause_for(client);
        ok = client->interrupted || sample_next(client, &before, &now, error);
    }
    status_free(before);
    status_free(now);
    return ok;
}

static int top_run(const Verb *verb, void *values, GPtrArray *rest)
{
    const TopOptions *o = values;
    GError *error = NULL;
    if (rest->len > 0) {
        return cli_usage(verb, "'%s' is not expected", (char *)rest->pdata[0]);
    }
    Client *client = client_new(&o->common, &error);
    const bool live = !o->common.json && isatty(STDOUT_FILENO);
    const bool ok = client != NULL && show(client, o, live, &error);
    const bool interrupted = ok && !live && client->interrupted;
    client_free(client);
    return !ok ? cli_fail(error) : interrupted ? 130 : 0;
}

const Verb VERB_TOP = {"top",
                       "",
                       "what replicas, workers and jobs do now: live on a terminal, else once",
                       TOP_OPTIONS,
                       sizeof(TopOptions),
                       NULL,
                       top_run};
