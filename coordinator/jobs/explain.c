/* What a deployment and its leases wait for, in words and as a chain (weft.v1.Reason): read only.
 *
 *   request ──▶ job ──▶ planner, workers that load or start, workers that are missing
 *   request ──▶ leader ──▶ worker ──▶ ... ──▶ the one that all wait for (wait_graph.h)
 */
#include "coordinator/jobs/deployment.h"

#include "coordinator/reason.h"
#include "coordinator/wait_graph.h"
#include "proto/base/units.h"

#include <string.h>

static uint64_t ms_since(const Deployment *d, int64_t then_us)
{
    return (uint64_t)MAX(loop_now_us(d->jobs->options.loop) - then_us, 0) / 1000;
}

/* ---- ranks that have to answer ---- */

static void explain_load(const Deployment *d, const RankState *rank, Weft__V1__Reason *reason)
{
    g_autofree char *done = units_format_size(rank->bytes_done);
    g_autofree char *total = units_format_size(rank->bytes_total);
    char *what =
        rank->bytes_total > 0 ? g_strdup_printf("load: %s of %s", done, total) : g_strdup("load");
    reason_wait(reason, d->id, rank->worker, what, ms_since(d, d->entered_us));
}

/* LOADING and STARTING. */
static void explain_ranks(const Deployment *d, Weft__V1__Reason *reason)
{
    unsigned n_ranks = 0, n_answered = 0;
    bool loading = d->state == DEPLOYMENT_LOADING;
    for (uint32_t r = 0; r < d->n_replicas; r++) {
        for (uint32_t k = 0; k < d->replicas[r].n_ranks; k++) {
            const RankState *rank = &d->replicas[r].ranks[k];
            n_ranks++;
            n_answered += rank->answered;
            if (!rank->answered && loading) {
                explain_load(d, rank, reason);
            } else if (!rank->answered) {
                reason_wait(reason, d->id, rank->worker, g_strdup("start of its engine"),
                            ms_since(d, d->entered_us));
            }
        }
    }
    reason_set(&reason->text,
               g_strdup_printf(loading ? "%u of %u ranks are loaded" : "%u of %u ranks are started",
                               n_answered, n_ranks));
}

/* ---- workers that are missing ---- */

/* Of the plan that was last in force: they may come back. */
static void explain_missing(const Deployment *d, Weft__V1__Reason *reason)
{
    g_autoptr(GHashTable) told = g_hash_table_new(g_str_hash, g_str_equal);
    for (uint32_t r = 0; d->plan != NULL && r < d->plan->n_replicas; r++) {
        const PlanReplica *replica = &d->plan->replicas[r];
        for (uint32_t s = 0; s < replica->n_stages; s++) {
            for (uint32_t k = 0; k < replica->stages[s].n_ranks; k++) {
                const char *worker = replica->stages[s].ranks[k].worker;
                const Member *member = members_find(d->jobs->options.members, worker);
                bool missing = member == NULL || !member_attached(member);
                if (missing && g_hash_table_add(told, (void *)worker)) {
                    Weft__V1__Member m = WEFT__V1__MEMBER__INIT;
                    if (member != NULL) {
                        member_describe(member, &m);
                    }
                    reason_wait(reason, d->id, worker,
                                g_strdup_printf("it is %s%s%s", member != NULL ? m.state : "gone",
                                                m.reason[0] != '\0' ? ": " : "", m.reason),
                                member != NULL ? member_silent_ms(member) : 0);
                }
            }
        }
    }
}

static void explain_patience(const Deployment *d, Weft__V1__Reason *reason)
{
    const Recovery *r = &d->recovery;
    int64_t since_us = r->since_us != 0 ? r->since_us : d->entered_us;
    const char *missing = d->error != NULL ? d->error->message : "no try was made yet";
    reason_set(&reason->state, g_strdup("waiting"));
    reason_set(&reason->text,
               g_strdup_printf("at most %.0f s for workers: %s",
                               (double)d->jobs->options.recovery_wait_us / 1e6, missing));
    reason_wait(reason, d->id, "workers", g_strdup("a plan that fits those that are there"),
                ms_since(d, since_us));
    explain_missing(d, reason);
}

/* ---- a replica at work ---- */

static void explain_silence(const Deployment *d, const ReplicaState *replica,
                            Weft__V1__Reason *reason)
{
    for (uint32_t k = 0; k < replica->n_ranks; k++) {
        const char *worker = replica->ranks[k].worker;
        const Member *member = members_find(d->jobs->options.members, worker);
        if (member != NULL && member_silent_ms(member) >= MEMBER_SUSPECT_US / 1000) {
            reason_wait(reason, "coordinator", worker, g_strdup("a heartbeat"),
                        member_silent_ms(member));
        }
    }
}

static const Weft__V1__ReplicaLoad *replica_load(const Deployment *d, const ReplicaState *replica)
{
    const Member *leader = members_find(d->jobs->options.members, replica->ranks[0].worker);
    const Weft__V1__Heartbeat *beat = leader != NULL ? member_heartbeat(leader) : NULL;
    for (size_t i = 0; beat != NULL && i < beat->n_loads; i++) {
        const Weft__V1__ReplicaLoad *load = beat->loads[i];
        if (strcmp(load->job, d->id) == 0 && load->replica == replica->index &&
            load->epoch == replica->epoch) {
            return load;
        }
    }
    return NULL;
}

/* What its leader says of slots and pages; appended to text. */
static void explain_load_of(const Deployment *d, const ReplicaState *replica, GString *text)
{
    const Weft__V1__ReplicaLoad *load = replica_load(d, replica);
    if (load != NULL) {
        g_string_append_printf(text,
                               "; replica %u has %u sequences in %u slots and %u without one, "
                               "%" G_GUINT64_FORMAT " of %" G_GUINT64_FORMAT " KV pages in use",
                               replica->index, load->running, load->slots, load->waiting,
                               load->kv_pages_used, load->kv_pages_total);
    }
}

static void explain_replica(const Deployment *d, const ReplicaState *replica, GString *text,
                            Weft__V1__Reason *reason)
{
    explain_silence(d, replica, reason);
    g_autoptr(GArray) edges = jobs_edges(d->jobs, d, replica->index);
    const WaitEdge *all = (const WaitEdge *)(const void *)edges->data;
    const WaitEdge *sink = wait_graph_sink(all, edges->len, NULL);
    for (guint i = 0; i < edges->len; i++) {
        /* As of its last heartbeat; who is silent since then waits on. */
        uint64_t silent_ms =
            member_silent_ms(members_find(d->jobs->options.members, all[i].waiter));
        uint64_t more_ms = silent_ms >= MEMBER_SUSPECT_US / 1000 ? silent_ms : 0;
        reason_wait(reason, all[i].waiter, all[i].waits_for, g_strdup(all[i].operation),
                    all[i].since_ms + more_ms)
            ->sink = &all[i] == sink;
    }
    if (replica->suspicion != NULL) {
        g_string_append_printf(text, "; its epoch is about to end: %s",
                               replica->suspicion->message);
    }
    explain_load_of(d, replica, text);
}

static void explain_serving(const Deployment *d, Weft__V1__Reason *reason)
{
    g_autoptr(GString) text = g_string_new(NULL);
    const char *drains = deployment_draining(d);
    g_string_printf(text, "%u requests have a replica, %u wait for one", d->active.length,
                    d->waiting.length);
    for (uint32_t r = 0; r < d->n_replicas; r++) {
        if (d->replicas[r].live) {
            explain_replica(d, &d->replicas[r], text, reason);
        } else {
            g_string_append_printf(text, "; replica %u is lost", r);
        }
    }
    if (drains != NULL) {
        g_string_append_printf(text, "; worker %s drains: %s", drains,
                               d->stays ? "there is no place to go to, its requests end where "
                                          "they are"
                                        : "a plan without it is sought");
    }
    reason_set(&reason->text, g_string_free(g_steal_pointer(&text), FALSE));
}

/* ---- a job ---- */

static void explain_state(const Deployment *d, Weft__V1__Reason *reason, const char *state,
                          const char *text)
{
    reason_set(&reason->state, g_strdup(state));
    reason_set(&reason->text, g_strdup(text));
}

/* IDLE, FAILED or STORED. */
static void explain_unplanned(const Deployment *d, Weft__V1__Reason *reason)
{
    if (d->settle != NULL || (d->state == DEPLOYMENT_STORED && d->recovery.revive != NULL)) {
        explain_state(d, reason, "waiting", "its workers were there when the coordinator ended");
        explain_missing(d, reason);
    } else if (d->waiting.length > 0 && recovery_is_patient(d)) {
        explain_patience(d, reason);
    } else if (d->state == DEPLOYMENT_FAILED && d->error != NULL) {
        explain_state(d, reason, "failed", d->error->message);
    } else if (d->waiting.length > 0) {
        explain_state(d, reason, "planning", "it is about to be planned");
    } else {
        explain_state(d, reason, "idle", "no request asks for it: the next one has it planned");
    }
}

static void explain_deployment(const Deployment *d, Weft__V1__Reason *reason)
{
    switch (d->state) {
    case DEPLOYMENT_PLANNING:
        explain_state(d, reason, "planning", "a plan is made, and written down before it is used");
        reason_wait(reason, d->id, "coordinator", g_strdup("a plan on disk"),
                    ms_since(d, d->entered_us));
        break;
    case DEPLOYMENT_LOADING:
    case DEPLOYMENT_STARTING:
        explain_state(d, reason, d->state == DEPLOYMENT_LOADING ? "loading" : "starting", "");
        explain_ranks(d, reason);
        break;
    case DEPLOYMENT_READY:
        explain_state(d, reason, "serving", "");
        explain_serving(d, reason);
        break;
    case DEPLOYMENT_STORED:
    case DEPLOYMENT_IDLE:
    case DEPLOYMENT_FAILED:
    case DEPLOYMENT_STOPPED:
        explain_unplanned(d, reason);
        break;
    }
}

static void explain_cause(const Deployment *d, Weft__V1__Reason *reason)
{
    if (d->recovery.cause != NULL) {
        reason_set(&reason->cause, g_strdup(d->recovery.cause->message));
    }
}

void jobs_explain(const Jobs *jobs, const char *id, GPtrArray *reasons)
{
    for (guint i = 0; i < jobs->deployments->len; i++) {
        const Deployment *d = g_ptr_array_index(jobs->deployments, i);
        if (id != NULL && strcmp(id, d->id) != 0) {
            continue;
        }
        Weft__V1__Reason *reason = reason_new("job", d->id);
        reason_set(&reason->job, g_strdup(d->id));
        reason_set(&reason->model, g_strdup(d->model_path));
        reason->state_ms = ms_since(d, d->entered_us);
        reason->age_ms = ms_since(d, d->created_us);
        reason->placed = d->n_replicas > 0;
        reason->epoch = d->n_replicas > 0 ? d->replicas[0].epoch : 0;
        explain_deployment(d, reason);
        if (d->recovery.since_us != 0) {
            explain_cause(d, reason);
            reason->stalled_ms = ms_since(d, d->recovery.since_us);
            reason->predicted_s = d->recovery.predicted_load_s;
        }
        g_ptr_array_add(reasons, reason);
    }
}

/* ---- a lease ---- */

static void explain_waiting(const Lease *lease, Weft__V1__Reason *reason)
{
    const Deployment *d = lease->deployment;
    Weft__V1__Reason *of_job = reason_new("job", d->id);
    explain_deployment(d, of_job);
    reason->state_ms = ms_since(d, lease->since_us);
    int n_before = g_queue_index((GQueue *)&d->waiting, lease);
    reason_wait(reason, reason->id, d->id,
                n_before > 0 ? g_strdup_printf("a replica, after %d requests", n_before)
                             : g_strdup("a replica"),
                ms_since(d, lease->since_us));
    for (size_t i = 0; i < of_job->n_waits; i++) {
        Weft__V1__Wait *w = of_job->waits[i];
        reason_wait(reason, w->waiter, w->waits_for, g_strdup(w->what), w->since_ms)->sink =
            w->sink;
    }
    reason_set(&reason->text, g_strdup_printf("its job is %s: %s", of_job->state, of_job->text));
    weft__v1__reason__free_unpacked(of_job, NULL);
    if (lease->resumes) {
        bool known = d->state == DEPLOYMENT_LOADING || d->state == DEPLOYMENT_STARTING;
        explain_cause(d, reason);
        reason->predicted_s = known ? d->recovery.predicted_load_s : 0;
        reason->tokens_again = lease->n_tokens;
    }
}

static void explain_active(const Lease *lease, Weft__V1__Reason *reason)
{
    const Deployment *d = lease->deployment;
    const LeaseRecovery *r = &lease->info.recovery;
    g_autoptr(GString) text = g_string_new(reason->text);
    explain_replica(d, &d->replicas[lease->replica], text, reason);
    reason_set(&reason->text, g_string_free(g_steal_pointer(&text), FALSE));
    if (r->resumed) {
        explain_cause(d, reason);
        reason->predicted_s = r->predicted_load_s + r->predicted_prefill_s;
        reason->tokens_again = r->n_tokens;
    }
}

void lease_explain(const Lease *lease, Weft__V1__Reason *reason)
{
    const Deployment *d = lease->deployment;
    if (d == NULL) {
        return;
    }
    reason_set(&reason->job, g_strdup(d->id));
    if (lease->state == LEASE_WAITING) {
        explain_waiting(lease, reason);
        return;
    }
    reason->placed = true;
    reason->replica = lease->replica;
    reason->epoch = d->replicas[lease->replica].epoch;
    explain_active(lease, reason);
}
