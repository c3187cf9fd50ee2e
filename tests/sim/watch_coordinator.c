/* The coordinator's side of the watch: epochs, leases, what becomes of its calls to leaders. */
#include "tests/sim/bugs.h"
#include "tests/sim/watch.h"

#include "coordinator/gateway/requests/run.h"
#include "coordinator/jobs/deployment.h"
#include "weft/v1/serve.pb-c.h"

#include <string.h>

#define QUORUM 3u /* of fewer workers, one or two may be silent at the same time by chance */

/* One call of Generate, between the gateway and the transport. */
typedef struct LeaderCall {
    RpcCallbacks callbacks;
    void *user;
    char *job, *request; /* request: watch_sequence() */
    uint32_t replica;
    uint64_t epoch;
} LeaderCall;

static struct {
    Jobs *jobs;                 /* of the incarnation that runs; NULL: none */
    MembersListener listener;   /* its own, behind ours */
    GHashTable *newest;         /* "job/replica" -> uint64_t */
    GHashTable *taken;          /* "job/replica/epoch" -> int64_t, when */
    GHashTable *open;           /* "watch_sequence()/replica/epoch" -> int64_t, how many calls */
    GHashTable *over;           /* likewise, when the last of them ended */
    const LeaderCall *speaking; /* the call whose message is being handled */
} now;

Jobs *__wrap_jobs_new(const JobsOptions *options);
Jobs *__real_jobs_new(const JobsOptions *options);
void __wrap_jobs_free(Jobs *jobs);
void __real_jobs_free(Jobs *jobs);
uint64_t __wrap_jobs_next_epoch(Jobs *jobs, const char *job, uint32_t replica, GArray *changes);
uint64_t __real_jobs_next_epoch(Jobs *jobs, const char *job, uint32_t replica, GArray *changes);
void __wrap_members_listen(Members *members, const MembersListener *listener);
void __real_members_listen(Members *members, const MembersListener *listener);
bool __wrap_member_usable(const Member *member);
bool __real_member_usable(const Member *member);
void __wrap_deployment_begin_planning(Deployment *d);
void __real_deployment_begin_planning(Deployment *d);
void __wrap_lease_release(Lease *lease);
void __real_lease_release(Lease *lease);
bool __wrap_run_send(Run *run, Weft__V1__RunEvent *event);
bool __real_run_send(Run *run, Weft__V1__RunEvent *event);
RpcClientCall *__wrap_rpc_call_start(RpcChannel *channel, const ProtobufCServiceDescriptor *service,
                                     const char *method, const ProtobufCMessage *request,
                                     int64_t deadline_ms, bool wait_for_ready,
                                     RpcCallbacks callbacks, void *user);
RpcClientCall *__real_rpc_call_start(RpcChannel *channel, const ProtobufCServiceDescriptor *service,
                                     const char *method, const ProtobufCMessage *request,
                                     int64_t deadline_ms, bool wait_for_ready,
                                     RpcCallbacks callbacks, void *user);

/* ---- epochs ---------------------------------------------------------------------------------- */

static int64_t now_us(void)
{
    return sim_world_now_us(watch_history()->whole->world);
}

static void put_time(GHashTable *table, char *key /* taken */, int64_t at_us)
{
    g_hash_table_replace(table, key, g_memdup2(&at_us, sizeof at_us));
}

static int64_t get_time(GHashTable *table, const char *key)
{
    const int64_t *at_us = g_hash_table_lookup(table, key);
    return at_us ? *at_us : 0;
}

static char *epoch_key(const char *job, uint32_t replica, uint64_t epoch)
{
    return g_strdup_printf("%s/%u/%" G_GUINT64_FORMAT, job, replica, epoch);
}

/* The newest of a replica, as far as it was seen; 0 = none. */
static uint64_t newest_epoch(const char *job, uint32_t replica)
{
    g_autofree char *key = g_strdup_printf("%s/%u", job, replica);
    return (uint64_t)get_time(now.newest, key);
}

int64_t watch_epoch_us(const char *job, uint32_t replica, uint64_t epoch)
{
    g_autofree char *key = epoch_key(job, replica, epoch);
    return get_time(now.taken, key);
}

uint64_t __wrap_jobs_next_epoch(Jobs *jobs, const char *job, uint32_t replica, GArray *changes)
{
    const uint64_t before = jobs_epoch(jobs, job, replica);
    if (bug_is(BUG_EPOCH_REPEATED) && before > 0) {
        return before;
    }
    const uint64_t epoch = __real_jobs_next_epoch(jobs, job, replica, changes);
    if (watch_history()) {
        put_time(now.newest, g_strdup_printf("%s/%u", job, replica), (int64_t)epoch);
        put_time(now.taken, epoch_key(job, replica, epoch), now_us());
    }
    return epoch;
}

/* ---- members and plans ----------------------------------------------------------------------- */

/* Every worker's messages to the coordinator are lost, for longer than it takes to notice. */
static bool all_are_silent(const Whole *w)
{
    for (unsigned i = 0; i < w->n_workers; i++) {
        if (w->workers[i].link != RPC_INPROC_FROZEN) {
            return false;
        }
    }
    return now_us() - w->last_fault_us > MEMBER_LOST_US;
}

static void count_attached(Member *member, void *user)
{
    *(unsigned *)user += member_attached(member);
}

/* Those that the coordinator had before this one was lost; one that died before the silence began
 * is not among them. */
static bool were_a_quorum(void)
{
    unsigned n = 1;
    members_each(now.jobs->options.members, count_attached, &n);
    return n >= QUORUM;
}

static void on_lost(Member *member, const GError *why, void *user)
{
    if (watch_history() && all_are_silent(watch_history()->whole) && were_a_quorum()) {
        history_violate(watch_history(), "silence of all convicts nobody", "%s", why->message);
    }
    if (!bug_is(BUG_DEAD_MEMBER_KEPT)) {
        now.listener.lost(member, why, user);
    }
}

void __wrap_members_listen(Members *members, const MembersListener *listener)
{
    MembersListener own = *listener;
    now.listener = *listener;
    if (own.lost) {
        own.lost = on_lost;
    }
    __real_members_listen(members, &own);
}

bool __wrap_member_usable(const Member *member)
{
    return bug_is(BUG_DRAINING_MEMBER_PLANNED) ? member_attached(member)
                                               : __real_member_usable(member);
}

void __wrap_deployment_begin_planning(Deployment *d)
{
    if (bug_is(BUG_REQUEST_FORGOTTEN) && d->waiting.length > 1) {
        g_queue_pop_tail(&d->waiting);
    }
    __real_deployment_begin_planning(d);
}

void __wrap_lease_release(Lease *lease)
{
    Deployment *d = lease->state == LEASE_ACTIVE ? lease->deployment : NULL;
    const uint32_t replica = lease->replica;
    __real_lease_release(lease);
    if (d && bug_strikes(BUG_LEASE_RELEASED_TWICE, 3)) {
        d->replicas[replica].n_active--;
    }
}

Jobs *__wrap_jobs_new(const JobsOptions *options)
{
    now.jobs = __real_jobs_new(options);
    return now.jobs;
}

void __wrap_jobs_free(Jobs *jobs)
{
    if (jobs == now.jobs) {
        now.jobs = NULL;
    }
    __real_jobs_free(jobs);
}

bool watch_is_live(const char *job, uint32_t replica, uint64_t epoch)
{
    for (guint i = 0; now.jobs && i < now.jobs->deployments->len; i++) {
        const Deployment *d = g_ptr_array_index(now.jobs->deployments, i);
        if (strcmp(d->id, job) == 0 && replica < d->n_replicas && d->replicas[replica].live &&
            d->replicas[replica].epoch == epoch) {
            return true;
        }
    }
    return false;
}

/* ---- nothing stamped with an old epoch has an effect: tokens --------------------------------- */

static void on_leader_message(const ProtobufCMessage *message, void *user)
{
    const LeaderCall *call = user;
    const LeaderCall *before = now.speaking;
    now.speaking = call;
    call->callbacks.on_message(message, call->user);
    now.speaking = before;
}

/* Another call of the same request may have begun before this one's end is told: it counts when
 * none is open. */
static void call_ended(const LeaderCall *call)
{
    g_autofree char *key = epoch_key(call->request, call->replica, call->epoch);
    const int64_t n_open = get_time(now.open, key) - 1;
    put_time(now.open, g_strdup(key), n_open);
    if (n_open == 0) {
        put_time(now.over, g_steal_pointer(&key), now_us());
    }
}

static void on_leader_done(const GError *error, void *user)
{
    LeaderCall *call = user;
    if (watch_history()) {
        call_ended(call);
    }
    call->callbacks.on_done(error, call->user);
    g_free(call->job);
    g_free(call->request);
    g_free(call);
}

char *watch_sequence(const Weft__V1__GenerateRequest *generate)
{
    return g_strdup_printf("%s/%u", generate->request, generate->choice);
}

static RpcCallbacks watch_call(const Weft__V1__GenerateRequest *generate, RpcCallbacks callbacks,
                               void **user)
{
    LeaderCall *call = g_new0(LeaderCall, 1);
    *call = (LeaderCall){.callbacks = callbacks,
                         .user = *user,
                         .job = g_strdup(generate->stamp->job),
                         .request = watch_sequence(generate),
                         .replica = generate->stamp->replica,
                         .epoch = generate->stamp->epoch};
    g_autofree char *key = epoch_key(call->request, call->replica, call->epoch);
    put_time(now.open, g_strdup(key), get_time(now.open, key) + 1);
    g_hash_table_remove(now.over, key);
    watch_history()->n_resumed += generate->n_generated > 0;
    *user = call;
    return (RpcCallbacks){on_leader_message, on_leader_done};
}

/* What a gateway with a bug would ask for; ids and sampler are the caller's. */
static void spoil(Weft__V1__GenerateRequest *generate, GArray *ids, Weft__V1__Sampler *sampler)
{
    if (generate->n_generated == 0) {
        return;
    }
    if (bug_is(BUG_RESUMED_TOO_FAR)) {
        g_array_append_vals(ids, generate->generated, (guint)generate->n_generated);
        g_array_append_vals(ids, generate->generated, 1);
        g_array_append_vals(ids, generate->generated, 1);
        generate->generated = (uint32_t *)(void *)ids->data;
        generate->n_generated = ids->len;
    }
    if (bug_is(BUG_SEQUENCES_MIXED_UP) && generate->choice > 0) {
        generate->choice--;
    }
    if (bug_is(BUG_RESUMED_WITH_OTHER_DRAWS) && generate->sampler) {
        *sampler = *generate->sampler;
        sampler->seed++;
        generate->sampler = sampler;
    }
}

RpcClientCall *__wrap_rpc_call_start(RpcChannel *channel, const ProtobufCServiceDescriptor *service,
                                     const char *method, const ProtobufCMessage *request,
                                     int64_t deadline_ms, bool wait_for_ready,
                                     RpcCallbacks callbacks, void *user)
{
    if (service != &weft__v1__leader__descriptor || strcmp(method, "Generate") != 0 ||
        !watch_history()) {
        return __real_rpc_call_start(channel, service, method, request, deadline_ms, wait_for_ready,
                                     callbacks, user);
    }
    Weft__V1__GenerateRequest generate = *(const Weft__V1__GenerateRequest *)request;
    Weft__V1__Sampler sampler;
    g_autoptr(GArray) ids = g_array_new(FALSE, FALSE, sizeof(uint32_t));
    const RpcCallbacks watched = watch_call(&generate, callbacks, &user);
    spoil(&generate, ids, &sampler);
    return __real_rpc_call_start(channel, service, method, &generate.base, deadline_ms,
                                 wait_for_ready, watched, user);
}

int64_t watch_call_over_us(const char *sequence, uint32_t replica, uint64_t epoch)
{
    g_autofree char *key = epoch_key(sequence, replica, epoch);
    return get_time(now.over, key);
}

bool __wrap_run_send(Run *run, Weft__V1__RunEvent *event)
{
    const bool token =
        event->event_case == WEFT__V1__RUN_EVENT__EVENT_DELTA && event->delta->n_ids > 0;
    const LeaderCall *call = now.speaking;
    if (token && call && watch_history()) {
        const uint64_t newest = newest_epoch(call->job, call->replica);
        if (newest > call->epoch) {
            history_violate(watch_history(), "nothing of an old epoch has an effect",
                            "request %s: a token of epoch %" G_GUINT64_FORMAT
                            " was taken, job %s replica %u is at epoch %" G_GUINT64_FORMAT,
                            call->request, call->epoch, call->job, call->replica, newest);
        }
    }
    if (token && run->request->kind == WEFT__V1__REQUEST_KIND__SCORE &&
        bug_strikes(BUG_SCORE_LOST, 50)) {
        return true;
    }
    if (token && bug_strikes(BUG_TOKEN_SHOWN_TWICE, 17)) {
        __real_run_send(run, event);
    }
    return __real_run_send(run, event);
}

/* ---- the dead own nothing -------------------------------------------------------------------- */

static void check_owners(History *h, const Deployment *d)
{
    for (uint32_t r = 0; d->state == DEPLOYMENT_READY && r < d->n_replicas; r++) {
        const ReplicaState *replica = &d->replicas[r];
        for (uint32_t k = 0; replica->live && k < replica->n_ranks; k++) {
            const Member *member =
                members_find(now.jobs->options.members, replica->ranks[k].worker);
            if (!member || !member_attached(member)) {
                history_violate(h, "the dead own nothing",
                                "job %s replica %u epoch %" G_GUINT64_FORMAT
                                " is in force, and its worker %s is not there",
                                d->id, r, replica->epoch, replica->ranks[k].worker);
            }
        }
    }
}

void watch_coordinator_look(History *h)
{
    for (guint i = 0; now.jobs && i < now.jobs->deployments->len; i++) {
        check_owners(h, g_ptr_array_index(now.jobs->deployments, i));
    }
}

/* ---- quiet ----------------------------------------------------------------------------------- */

static void check_deployment(History *h, const Deployment *d)
{
    const bool asleep = d->state == DEPLOYMENT_IDLE || d->state == DEPLOYMENT_FAILED;
    if (d->state != DEPLOYMENT_READY && !asleep) {
        history_violate(h, "deployments return by themselves",
                        "job %s is %s, with every worker there and nothing to do: %s", d->id,
                        deployment_state_text(d), d->error ? d->error->message : "no error");
    }
    if (d->active.length > 0 || d->waiting.length > 0) {
        history_violate(h, "no request is forgotten",
                        "job %s keeps %u requests on replicas and %u waiting, and no client is "
                        "there",
                        d->id, d->active.length, d->waiting.length);
    }
    for (uint32_t r = 0; r < d->n_replicas; r++) {
        if (d->replicas[r].n_active != 0) {
            history_violate(h, "places are given back once",
                            "job %s replica %u counts %d requests, and there is none", d->id, r,
                            (int)d->replicas[r].n_active);
        }
    }
}

void watch_coordinator_quiet(History *h)
{
    for (guint i = 0; now.jobs && i < now.jobs->deployments->len; i++) {
        check_deployment(h, g_ptr_array_index(now.jobs->deployments, i));
    }
}

void watch_coordinator_begin(void)
{
    now.newest = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, g_free);
    now.taken = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, g_free);
    now.open = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, g_free);
    now.over = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, g_free);
}

void watch_coordinator_end(void)
{
    g_clear_pointer(&now.newest, g_hash_table_unref);
    g_clear_pointer(&now.taken, g_hash_table_unref);
    g_clear_pointer(&now.open, g_hash_table_unref);
    g_clear_pointer(&now.over, g_hash_table_unref);
}
