/* GET /metrics. The names that dashboards for vLLM ask for, with their labels, and weft's own:
 * of models, replicas, stages, workers and links. */
#include "coordinator/gateway/openai/api_internal.h"

#include "proto/base/step_rows.h"
#include "proto/base/version.h"
#include "transport/daemon/metrics.h"

#include <stdio.h>
#include <string.h>

#define PROMETHEUS_TYPE "text/plain; version=0.0.4; charset=utf-8"

/* ---- of models ---- */

typedef struct StatsFamily {
    GString *out;
    const char *name;
    size_t offset; /* of a uint64_t or a Histogram in ModelStats */
} StatsFamily;

static void put_model_counter(const ModelStats *stats, void *user)
{
    const StatsFamily *f = user;
    const uint64_t *value = (const uint64_t *)(const void *)((const char *)stats + f->offset);
    metrics_value(f->out, f->name, (double)*value, "model_name", stats->model, NULL);
}

static void put_model_histogram(const ModelStats *stats, void *user)
{
    const StatsFamily *f = user;
    metrics_histogram(f->out, f->name,
                      (const Histogram *)(const void *)((const char *)stats + f->offset),
                      "model_name", stats->model, NULL);
}

static void put_model_ended(const ModelStats *stats, void *user)
{
    const StatsFamily *f = user;
    for (unsigned i = 0; i < STATS_REASONS; i++) {
        metrics_value(f->out, f->name, (double)stats->ended[i], "model_name", stats->model,
                      "finished_reason", stats_reasons[i], NULL);
    }
}

typedef struct RequestFamily {
    const char *name, *type, *help;
    size_t offset;
} RequestFamily;

#define REQUEST_COUNTER(name, field, help)                                                         \
    {                                                                                              \
        name, "counter", help, offsetof(ModelStats, field)                                         \
    }
#define REQUEST_HISTOGRAM(name, field, help)                                                       \
    {                                                                                              \
        name, "histogram", help, offsetof(ModelStats, field)                                       \
    }
static const RequestFamily model_families[] = {
    REQUEST_COUNTER("vllm:prompt_tokens_total", prompt_tokens, "Tokens of prompts."),
    REQUEST_COUNTER("vllm:generation_tokens_total", generation_tokens, "Tokens generated."),
    REQUEST_HISTOGRAM("vllm:time_to_first_token_seconds", first_token_s,
                      "From a request to its first token."),
    REQUEST_HISTOGRAM("vllm:inter_token_latency_seconds", inter_token_s,
                      "From one token to the next."),
    REQUEST_HISTOGRAM("vllm:time_per_output_token_seconds", inter_token_s,
                      "From one token to the next."),
    REQUEST_HISTOGRAM("vllm:request_time_per_output_token_seconds", mean_token_s,
                      "Of a sequence, the mean from one token to the next."),
    REQUEST_HISTOGRAM("vllm:e2e_request_latency_seconds", whole_s, "From a request to its end."),
    REQUEST_HISTOGRAM("vllm:request_queue_time_seconds", queue_s, "From a request to its replica."),
    REQUEST_HISTOGRAM("vllm:request_prefill_time_seconds", prefill_s,
                      "From the replica to the first token."),
    REQUEST_HISTOGRAM("vllm:request_decode_time_seconds", decode_s,
                      "From the first token to the last."),
    REQUEST_HISTOGRAM("vllm:request_inference_time_seconds", inference_s,
                      "From the replica to the last token."),
    REQUEST_HISTOGRAM("vllm:request_prompt_tokens", prompt_length, "Tokens of a request's prompt."),
    REQUEST_HISTOGRAM("vllm:request_generation_tokens", generated_length, "Tokens of a sequence."),
    REQUEST_HISTOGRAM("vllm:request_max_num_generation_tokens", most_generated,
                      "Tokens of a request's longest sequence."),
    REQUEST_HISTOGRAM("vllm:request_params_max_tokens", tokens_asked,
                      "Tokens that a request asked for at most."),
    REQUEST_HISTOGRAM("vllm:request_params_n", sequences_asked,
                      "Sequences that a request asked for."),
    REQUEST_HISTOGRAM("weft_request_recovery_seconds", recovery_s,
                      "After the loss of a worker, from the last token before to the first after."),
};

static void put_models(const RequestStats *stats, GString *out)
{
    for (size_t i = 0; i < G_N_ELEMENTS(model_families); i++) {
        StatsFamily f = {out, model_families[i].name, model_families[i].offset};
        metrics_family(out, f.name, model_families[i].type, model_families[i].help);
        request_stats_each(
            stats, model_families[i].type[0] == 'c' ? put_model_counter : put_model_histogram, &f);
    }
    StatsFamily f = {out, "vllm:request_success_total", 0};
    metrics_family(out, f.name, "counter", "Sequences by how they ended.");
    request_stats_each(stats, put_model_ended, &f);
}

/* ---- of open requests ---- */

typedef struct OpenFamily {
    GString *out;
    const char *name;
    bool waiting;
    GHashTable *told; /* names; borrowed */
} OpenFamily;

static void put_open(const ModelStats *stats, void *user)
{
    const OpenFamily *f = user;
    metrics_value(f->out, f->name, f->waiting ? stats->waiting : stats->running, "model_name",
                  stats->model, NULL);
    g_hash_table_add(f->told, stats->model);
}

/* A model that nobody has asked yet has a series too: a dashboard shows 0, not a gap. */
static void put_open_none(const Served *served, void *user)
{
    const OpenFamily *f = user;
    if (g_hash_table_add(f->told, (void *)served_name(served))) {
        metrics_value(f->out, f->name, 0, "model_name", served_name(served), NULL);
    }
}

static void put_requests(const ApiService *service, GString *out)
{
    unsigned running, waiting;
    requests_count(service->options.requests, &running, &waiting);
    for (int i = 0; i < 2; i++) {
        g_autoptr(GHashTable) told = g_hash_table_new(g_str_hash, g_str_equal);
        OpenFamily f = {out, i == 0 ? "vllm:num_requests_running" : "vllm:num_requests_waiting",
                        i == 1, told};
        metrics_family(out, f.name, "gauge",
                       i == 0 ? "Requests that have a replica." : "Requests that wait for one.");
        request_stats_each(requests_stats(service->options.requests), put_open, &f);
        served_each(service->served, put_open_none, &f);
    }
}

/* ---- of replicas, as their leaders report them ---- */

typedef struct LoadRow {
    const char *name, *type, *help;
    double (*value)(const Weft__V1__ReplicaLoad *load);
} LoadRow;

static double kv_usage(const Weft__V1__ReplicaLoad *l)
{
    return l->kv_pages_total > 0 ? (double)l->kv_pages_used / (double)l->kv_pages_total : 0;
}
#define LOAD_FIELD(field)                                                                          \
    static double load_##field(const Weft__V1__ReplicaLoad *l)                                     \
    {                                                                                              \
        return (double)l->field;                                                                   \
    }
LOAD_FIELD(running)
LOAD_FIELD(waiting)
LOAD_FIELD(kv_pages_total)
LOAD_FIELD(kv_pages_used)
LOAD_FIELD(kv_pages_cached)
LOAD_FIELD(prefix_query_tokens)
LOAD_FIELD(prefix_hit_tokens)
LOAD_FIELD(preemptions)
LOAD_FIELD(slots)
LOAD_FIELD(epoch)
LOAD_FIELD(prompt_tokens)
LOAD_FIELD(generation_tokens)

static const LoadRow load_rows[] = {
    {"vllm:kv_cache_usage_perc", "gauge", "Pages of the KV cache in use, 0 to 1.", kv_usage},
    {"vllm:gpu_cache_usage_perc", "gauge", "The same, under its older name.", kv_usage},
    {"vllm:prefix_cache_queries_total", "counter", "Tokens that asked the prefix cache.",
     load_prefix_query_tokens},
    {"vllm:prefix_cache_hits_total", "counter", "Tokens that it had.", load_prefix_hit_tokens},
    {"vllm:num_preemptions_total", "counter", "Sequences put back for want of pages.",
     load_preemptions},
    {"weft_replica_running", "gauge", "Sequences in a slot.", load_running},
    {"weft_replica_waiting", "gauge", "Sequences without a slot.", load_waiting},
    {"weft_replica_slots", "gauge", "Sequences that it can run at once.", load_slots},
    {"weft_replica_epoch", "gauge", "Rises with each recovery.", load_epoch},
    {"weft_replica_prompt_tokens_total", "counter", "Of admitted sequences, in this epoch.",
     load_prompt_tokens},
    {"weft_replica_generation_tokens_total", "counter", "Drawn in this epoch.",
     load_generation_tokens},
    {"weft_replica_kv_pages", "gauge", "Pages of the KV cache.", load_kv_pages_total},
    {"weft_replica_kv_pages_used", "gauge", "Pages of running sequences.", load_kv_pages_used},
    {"weft_replica_kv_pages_cached", "gauge", "Pages kept for prefixes.", load_kv_pages_cached},
};

/* ---- of workers ---- */

typedef struct WorkerRow {
    const char *name, *help;
    size_t offset; /* of a uint64_t in Counters */
    double unit;
} WorkerRow;

#define COUNTER(field) offsetof(Weft__V1__Counters, field)
static const WorkerRow worker_rows[] = {
    {"weft_worker_steps_total", "Steps computed.", COUNTER(steps), 1},
    {"weft_worker_rows_total", "Rows computed.", COUNTER(rows), 1},
    {"weft_worker_sent_bytes_total", "Sent over links.", COUNTER(wire_bytes_sent), 1},
    {"weft_worker_received_bytes_total", "Received over links.", COUNTER(wire_bytes_received), 1},
    {"weft_worker_sent_messages_total", "Sent over links.", COUNTER(wire_messages_sent), 1},
    {"weft_worker_dropped_stale_total", "Messages of an old epoch.", COUNTER(dropped_stale), 1},
    {"weft_worker_dropped_replayed_total", "Messages that came again.", COUNTER(dropped_replayed),
     1},
    {"weft_worker_dropped_corrupt_total", "Messages whose seal or CRC failed.",
     COUNTER(dropped_corrupt), 1},
    {"weft_worker_compute_seconds_total", "Spent computing.", COUNTER(compute_us), 1e-6},
    {"weft_worker_wait_seconds_total", "Spent waiting for others.", COUNTER(wait_us), 1e-6},
    {"weft_worker_wire_seconds_total", "Spent sending and receiving.", COUNTER(wire_us), 1e-6},
    {"weft_worker_seal_seconds_total", "Spent sealing and opening.", COUNTER(seal_us), 1e-6},
};

typedef struct MemberFamily {
    GString *out;
    const void *row;
    GHashTable *names; /* of models, by job */
} MemberFamily;

static void put_worker_counter(Member *member, void *user)
{
    const MemberFamily *f = user;
    const WorkerRow *row = f->row;
    const Weft__V1__Heartbeat *beat = member_heartbeat(member);
    if (beat != NULL && beat->counters != NULL) {
        const uint64_t *value =
            (const uint64_t *)(const void *)((const char *)beat->counters + row->offset);
        metrics_value(f->out, row->name, (double)*value * row->unit, "worker", member_name(member),
                      NULL);
    }
}

static void put_worker_lag(Member *member, void *user)
{
    const MemberFamily *f = user;
    const Weft__V1__Heartbeat *beat = member_heartbeat(member);
    if (beat != NULL) {
        metrics_value(f->out, "weft_worker_loop_lag_seconds", beat->loop_lag_ms / 1000, "worker",
                      member_name(member), NULL);
    }
}

/* While one epoch follows another a worker may report both: the newer one is told. */
static bool is_newest_load(const Weft__V1__Heartbeat *beat, const Weft__V1__ReplicaLoad *load)
{
    for (size_t i = 0; i < beat->n_loads; i++) {
        const Weft__V1__ReplicaLoad *l = beat->loads[i];
        if (l->replica == load->replica && strcmp(l->job, load->job) == 0 &&
            l->epoch > load->epoch) {
            return false;
        }
    }
    return true;
}

static void put_load(Member *member, void *user)
{
    const MemberFamily *f = user;
    const LoadRow *row = f->row;
    const Weft__V1__Heartbeat *beat = member_heartbeat(member);
    for (size_t i = 0; beat != NULL && member_attached(member) && i < beat->n_loads; i++) {
        const Weft__V1__ReplicaLoad *load = beat->loads[i];
        if (is_newest_load(beat, load)) {
            char replica[16];
            snprintf(replica, sizeof replica, "%u", load->replica);
            metrics_value(f->out, row->name, row->value(load), "model_name",
                          g_hash_table_lookup(f->names, load->job), "job", load->job, "replica",
                          replica, "worker", member_name(member), NULL);
        }
    }
}

/* Rows of steps: one histogram a replica. */
static void put_step_rows(Member *member, void *user)
{
    const MemberFamily *f = user;
    const Weft__V1__Heartbeat *beat = member_heartbeat(member);
    for (size_t i = 0; beat != NULL && member_attached(member) && i < beat->n_loads; i++) {
        const Weft__V1__ReplicaLoad *load = beat->loads[i];
        if (is_newest_load(beat, load) && load->n_steps_by_rows == STEP_ROWS_BOUNDS + 1) {
            char replica[16];
            snprintf(replica, sizeof replica, "%u", load->replica);
            Histogram h;
            histogram_init(&h, step_rows_bounds, STEP_ROWS_BOUNDS);
            memcpy(h.counts, load->steps_by_rows, sizeof(uint64_t) * load->n_steps_by_rows);
            h.sum = (double)load->step_rows;
            metrics_histogram(f->out, "vllm:iteration_tokens_total", &h, "model_name",
                              g_hash_table_lookup(f->names, load->job), "job", load->job, "replica",
                              replica, "worker", member_name(member), NULL);
        }
    }
}

static void put_worker_up(Member *member, void *user)
{
    const MemberFamily *f = user;
    metrics_value(f->out, "weft_worker_up", member_usable(member), "worker", member_name(member),
                  "state", member_state_text(member_state(member)), NULL);
}

static void put_worker_serving(Member *member, void *user)
{
    const MemberFamily *f = user;
    const Weft__V1__Heartbeat *beat = member_heartbeat(member);
    metrics_value(f->out, "weft_worker_serving", beat != NULL && beat->serving, "worker",
                  member_name(member), NULL);
}

static bool is_newest_wait(const Weft__V1__Heartbeat *beat, const Weft__V1__Waiting *wait)
{
    for (size_t i = 0; i < beat->n_waiting; i++) {
        const Weft__V1__Waiting *w = beat->waiting[i];
        if (w->replica == wait->replica && strcmp(w->job, wait->job) == 0 &&
            w->epoch > wait->epoch) {
            return false;
        }
    }
    return true;
}

/* Who waits for whom: a link that stands still shows here. */
static void put_waits(Member *member, void *user)
{
    const MemberFamily *f = user;
    const Weft__V1__Heartbeat *beat = member_heartbeat(member);
    for (size_t i = 0; beat != NULL && member_attached(member) && i < beat->n_waiting; i++) {
        const Weft__V1__Waiting *w = beat->waiting[i];
        if (is_newest_wait(beat, w)) {
            char replica[16];
            snprintf(replica, sizeof replica, "%u", w->replica);
            metrics_value(f->out, "weft_link_waiting_seconds", (double)w->since_ms / 1000, "worker",
                          member_name(member), "waits_for", w->waits_for, "job", w->job, "replica",
                          replica, NULL);
        }
    }
}

/* ---- of links: from one worker to another ---- */

typedef struct LinkRow {
    const char *name, *help;
    size_t offset; /* of a uint64_t in LinkLoad */
    double unit;
} LinkRow;

#define LINK(field) offsetof(Weft__V1__LinkLoad, field)
static const LinkRow link_rows[] = {
    {"weft_link_sent_bytes_total", "Payload sent to a peer.", LINK(sent_bytes), 1},
    {"weft_link_received_bytes_total", "Payload that came from a peer.", LINK(received_bytes), 1},
    {"weft_link_sent_messages_total", "Messages sent to a peer.", LINK(sent_messages), 1},
    {"weft_link_wait_seconds_total", "Waited for a peer's activations or tokens.", LINK(wait_us),
     1e-6},
    {"weft_link_stalls_total", "Waits for a peer of 100 ms and more.", LINK(stalls), 1},
};

static void put_link(Member *member, void *user)
{
    const MemberFamily *f = user;
    const LinkRow *row = f->row;
    const Weft__V1__Heartbeat *beat = member_heartbeat(member);
    for (size_t i = 0; beat != NULL && i < beat->n_links; i++) {
        const Weft__V1__LinkLoad *link = beat->links[i];
        const uint64_t *value = (const uint64_t *)(const void *)((const char *)link + row->offset);
        metrics_value(f->out, row->name, (double)*value * row->unit, "worker", member_name(member),
                      "peer", link->peer, NULL);
    }
}

static void put_members(const Members *members, GHashTable *names, GString *out)
{
    MemberFamily f = {out, NULL, names};
    metrics_family(out, "weft_worker_up", "gauge", "1: it can be given work.");
    members_each(members, put_worker_up, &f);
    metrics_family(out, "weft_worker_serving", "gauge", "1: its engines make progress.");
    members_each(members, put_worker_serving, &f);
    metrics_family(out, "weft_worker_loop_lag_seconds", "gauge",
                   "For how long at most its main loop let something wait in the last minute.");
    members_each(members, put_worker_lag, &f);
    for (size_t i = 0; i < G_N_ELEMENTS(worker_rows); i++) {
        f.row = &worker_rows[i];
        metrics_family(out, worker_rows[i].name, "counter", worker_rows[i].help);
        members_each(members, put_worker_counter, &f);
    }
    metrics_family(out, "weft_link_waiting_seconds", "gauge",
                   "How long a worker has waited for another.");
    members_each(members, put_waits, &f);
    for (size_t i = 0; i < G_N_ELEMENTS(link_rows); i++) {
        f.row = &link_rows[i];
        metrics_family(out, link_rows[i].name, "counter", link_rows[i].help);
        members_each(members, put_link, &f);
    }
    metrics_family(out, "vllm:iteration_tokens_total", "histogram",
                   "Rows of prompts and of decoding that a step had.");
    members_each(members, put_step_rows, &f);
    for (size_t i = 0; i < G_N_ELEMENTS(load_rows); i++) {
        f.row = &load_rows[i];
        metrics_family(out, load_rows[i].name, load_rows[i].type, load_rows[i].help);
        members_each(members, put_load, &f);
    }
}

/* ---- of jobs and their stages ---- */

static void put_epoch(const Weft__V1__Job *job, const Plan *plan, void *user)
{
    metrics_value(user, "weft_job_epoch", (double)job->epoch, "job", job->id, NULL);
}

static void put_state(const Weft__V1__Job *job, const Plan *plan, void *user)
{
    metrics_value(user, "weft_job_state", 1, "job", job->id, "state", job->state, NULL);
}

static void put_recovery(const Weft__V1__Job *job, const Plan *plan, void *user)
{
    metrics_value(user, "weft_job_recovery_seconds_sum", job->recovered_s, "job", job->id, NULL);
    metrics_value(user, "weft_job_recovery_seconds_count", (double)job->recoveries, "job", job->id,
                  NULL);
}

typedef struct StageRow {
    const char *name, *help;
    double (*value)(const PlanStage *stage, const PlanRank *rank);
} StageRow;

static double stage_layers(const PlanStage *stage, const PlanRank *rank)
{
    return (double)stage->layer_last - (double)stage->layer_first + 1;
}

static double stage_weights(const PlanStage *stage, const PlanRank *rank)
{
    return (double)rank->weight_bytes;
}

static double stage_peak(const PlanStage *stage, const PlanRank *rank)
{
    return (double)rank->peak_bytes;
}

static const StageRow stage_rows[] = {
    {"weft_stage_layers", "Layers of a stage; joins workers to jobs and stages.", stage_layers},
    {"weft_stage_weight_bytes", "Weights of a rank.", stage_weights},
    {"weft_stage_peak_bytes", "Memory that a rank takes at most.", stage_peak},
};

typedef struct StageFamily {
    GString *out;
    const StageRow *row;
} StageFamily;

static void put_stage(const StageFamily *f, const char *job, uint32_t r, uint32_t s,
                      const PlanStage *stage)
{
    char replica[16], number[16], rank[16];
    snprintf(replica, sizeof replica, "%u", r);
    snprintf(number, sizeof number, "%u", s);
    for (uint32_t k = 0; k < stage->n_ranks; k++) {
        snprintf(rank, sizeof rank, "%u", k);
        metrics_value(f->out, f->row->name, f->row->value(stage, &stage->ranks[k]), "job", job,
                      "replica", replica, "stage", number, "rank", rank, "worker",
                      stage->ranks[k].worker, NULL);
    }
}

static void put_stages(const Weft__V1__Job *job, const Plan *plan, void *user)
{
    for (uint32_t r = 0; plan != NULL && r < plan->n_replicas; r++) {
        for (uint32_t s = 0; s < plan->replicas[r].n_stages; s++) {
            put_stage(user, job->id, r, s, &plan->replicas[r].stages[s]);
        }
    }
}

static void put_jobs(const Jobs *jobs, GString *out)
{
    metrics_family(out, "weft_job_epoch", "gauge", "Rises with each recovery.");
    jobs_describe(jobs, put_epoch, out);
    metrics_family(out, "weft_job_state", "gauge", "1 at the state that a job is in.");
    jobs_describe(jobs, put_state, out);
    metrics_family(out, "weft_job_recovery_seconds", "summary",
                   "From the end of an epoch with requests to the next that serves.");
    jobs_describe(jobs, put_recovery, out);
    for (size_t i = 0; i < G_N_ELEMENTS(stage_rows); i++) {
        StageFamily f = {out, &stage_rows[i]};
        metrics_family(out, f.row->name, "gauge", f.row->help);
        jobs_describe(jobs, put_stages, &f);
    }
}

/* ---- names of models ---- */

static void name_job(const Weft__V1__Job *job, const Plan *plan, void *user)
{
    char *name = g_path_get_basename(job->model);
    if (g_str_has_suffix(name, ".gguf")) {
        name[strlen(name) - strlen(".gguf")] = '\0';
    }
    g_hash_table_insert(user, g_strdup(job->id), name);
}

static void name_served(const Served *served, void *user)
{
    const char *job = served_job(served);
    if (job != NULL) {
        g_hash_table_insert(user, g_strdup(job), g_strdup(served_name(served)));
    }
}

/* By job: the name under which HTTP clients ask for its model, else the file's. */
static GHashTable *model_names(const ApiService *service)
{
    GHashTable *names = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, g_free);
    jobs_describe(service->options.jobs, name_job, names);
    served_each(service->served, name_served, names);
    return names;
}

/* ---- of this server ---- */

static void put_one(GString *out, const char *name, const char *type, const char *help,
                    double value)
{
    metrics_family(out, name, type, help);
    metrics_value(out, name, value, NULL);
}

static void put_http(const ApiService *service, GString *out)
{
    static const char *const classes[] = {"0xx", "1xx", "2xx", "3xx", "4xx", "5xx"};
    metrics_family(out, "weft_http_answers_total", "counter", "Answers by class of status.");
    for (size_t i = 2; i < G_N_ELEMENTS(classes); i++) {
        metrics_value(out, "weft_http_answers_total", (double)service->n_answers[i], "status",
                      classes[i], NULL);
    }
    unsigned connections = 0;
    for (guint i = 0; i < service->listeners->len; i++) {
        const ApiListener *listener = g_ptr_array_index(service->listeners, i);
        connections += http_server_n_connections(listener->server);
    }
    put_one(out, "weft_http_connections", "gauge", "Sockets that are open.", connections);
    put_one(out, "weft_http_refused_full_total", "counter", "Requests answered 429.",
            (double)service->n_refused_full);
    put_one(out, "weft_http_refused_key_total", "counter", "Requests answered 401.",
            (double)service->n_refused_key);
    put_one(out, "weft_http_gone_total", "counter", "Clients that left before their answer.",
            (double)service->n_gone);
}

void api_page_metrics(ApiService *service, HttpExchange *x)
{
    const ApiServiceOptions *o = &service->options;
    GString *out = g_string_new(NULL);
    g_autoptr(GHashTable) names = model_names(service);
    metrics_family(out, "weft_build_info", "gauge", "1, with the release.");
    metrics_value(out, "weft_build_info", 1, "version", WEFT_VERSION, NULL);
    put_requests(service, out);
    put_one(out, "weft_coordinator_loop_lag_seconds", "gauge",
            "For how long at most the main loop let something wait in the last minute.",
            o->lag_ms != NULL ? o->lag_ms(o->lag_user) / 1000 : 0);
    put_one(out, "weft_coordinator_generation", "gauge", "Rises with each start.",
            (double)o->generation);
    put_models(requests_stats(o->requests), out);
    put_members(o->members, names, out);
    put_jobs(o->jobs, out);
    put_http(service, out);
    api_reply(service, x, 200, PROMETHEUS_TYPE, g_string_free(out, FALSE));
}
