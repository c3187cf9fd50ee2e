/* Load, Start and Drop to one rank's worker.
 *
 * 1. A rank has at most one call in flight; RankCall outlives the rank if it must (rank = NULL) and
 * frees itself in on_done.
 * 2. A Load without progress for LOAD_STALL_MS ends with an error that names the worker; Start and
 * Drop have deadlines of their own. */
#include "coordinator/jobs/deployment.h"

#include "proto/base/error.h"
#include "proto/plan/plan_message.h"

#include <string.h>

#define LOAD_DEADLINE_MS (6 * 3600 * 1000)
#define LOAD_STALL_MS 60000
#define START_DEADLINE_MS 15000
#define DROP_DEADLINE_MS 5000

typedef struct RankCall {
    RankState *rank; /* NULL: nobody listens any more */
    Loop *loop;
    RpcClientCall *call;
    LoopTimer *stall;
    bool start; /* Start, else Load */
    bool loaded;
} RankCall;

static void rank_call_stalled(void *user)
{
    RankCall *c = user;
    RankState *rank = c->rank;
    c->stall = NULL;
    if (rank == NULL) {
        return;
    }
    g_autoptr(GError) error = g_error_new(
        WEFT_ERROR, WEFT_ERROR_WORKER_LOST,
        "worker %s made no progress in load for %d s: its engine or disk hangs; look at its log",
        rank->worker, LOAD_STALL_MS / 1000);
    rank_forget_call(rank);
    deployment_on_rank_error(rank, "load", error);
}

static void rank_call_arm(RankCall *c)
{
    loop_timer_cancel(c->loop, c->stall);
    c->stall = loop_timer_start(c->loop, (int64_t)LOAD_STALL_MS * 1000, rank_call_stalled, c);
}

void rank_forget_call(RankState *rank)
{
    RankCall *c = rank->call;
    if (c == NULL) {
        return;
    }
    rank->call = NULL;
    c->rank = NULL;
    loop_timer_cancel(c->loop, c->stall);
    c->stall = NULL;
    rpc_client_cancel(c->call);
}

static void on_load_message(const ProtobufCMessage *response, void *user)
{
    const Weft__V1__LoadProgress *progress = (const Weft__V1__LoadProgress *)response;
    RankCall *c = user;
    RankState *rank = c->rank;
    if (rank == NULL) {
        return;
    }
    rank_call_arm(c);
    rank->bytes_done = progress->bytes_done;
    rank->bytes_total = progress->bytes_total;
    if (progress->loaded) {
        c->loaded = progress->boot_id.len == sizeof rank->boot_id;
        if (c->loaded) {
            memcpy(rank->boot_id, progress->boot_id.data, sizeof rank->boot_id);
        }
        g_clear_pointer(&rank->data_address, g_bytes_unref);
        rank->data_address = g_bytes_new(progress->data_address.data, progress->data_address.len);
    }
    deployment_on_progress(rank);
}

static void on_rank_done(const GError *error, void *user)
{
    RankCall *c = user;
    RankState *rank = c->rank;
    loop_timer_cancel(c->loop, c->stall);
    if (rank != NULL) {
        rank->call = NULL;
        g_autoptr(GError) incomplete = NULL;
        if (error == NULL && !c->start && !c->loaded) {
            incomplete = g_error_new(WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                                     "worker %s ended load without a data address", rank->worker);
            error = incomplete;
        }
        if (error != NULL) {
            deployment_on_rank_error(rank, c->start ? "start" : "load", error);
        } else if (c->start) {
            deployment_on_started(rank);
        } else {
            deployment_on_loaded(rank);
        }
    }
    g_free(c);
}

static void stamp_fill(Weft__V1__Stamp *stamp, const Deployment *d, uint32_t replica,
                       uint64_t epoch)
{
    stamp->cluster = d->jobs->cluster;
    stamp->generation = d->jobs->options.generation;
    stamp->job = d->id;
    stamp->replica = replica;
    stamp->epoch = epoch;
}

static RpcChannel *rank_channel(const RankState *rank)
{
    Member *member = members_find(rank->deployment->jobs->options.members, rank->worker);
    return member != NULL ? member_channel(member) : NULL;
}

static void rank_begin(RankState *rank, const char *method, const ProtobufCMessage *request,
                       int64_t deadline_ms, bool start)
{
    RankCall *c = g_new0(RankCall, 1);
    c->rank = rank;
    c->loop = rank->deployment->jobs->options.loop;
    c->start = start;
    rank->call = c;
    if (!start) {
        rank_call_arm(c);
    }
    RpcCallbacks callbacks = {.on_message = start ? NULL : on_load_message,
                              .on_done = on_rank_done};
    c->call = rpc_call_start(rank_channel(rank), &weft__v1__worker__descriptor, method, request,
                             deadline_ms, true, callbacks, c);
}

/* Workers that hold a deployment of the same file have its slices; then this coordinator, which has
 * them all. */
static GPtrArray *slice_sources(const RankState *rank)
{
    const Deployment *d = rank->deployment;
    GPtrArray *sources = g_ptr_array_new_with_free_func(g_free);
    for (guint i = 0; i < d->jobs->deployments->len; i++) {
        const Deployment *other = g_ptr_array_index(d->jobs->deployments, i);
        bool holds = other != d && other->state == DEPLOYMENT_READY &&
                     hash128_equal(&other->file_hash, &d->file_hash);
        for (uint32_t r = 0; holds && r < other->n_replicas; r++) {
            for (uint32_t k = 0; k < other->replicas[r].n_ranks; k++) {
                const char *worker = other->replicas[r].ranks[k].worker;
                Member *member = members_find(d->jobs->options.members, worker);
                bool useful =
                    strcmp(worker, rank->worker) != 0 && member != NULL && member_usable(member);
                const char *address = useful ? member_hello(member)->control_address : NULL;
                if (address != NULL &&
                    !g_ptr_array_find_with_equal_func(sources, address, g_str_equal, NULL)) {
                    g_ptr_array_add(sources, g_strdup(address));
                }
            }
        }
    }
    g_ptr_array_add(sources, g_strdup(d->jobs->control_address));
    return sources;
}

void rank_load(RankState *rank)
{
    Deployment *d = rank->deployment;
    Weft__V1__Stamp stamp = WEFT__V1__STAMP__INIT;
    stamp_fill(&stamp, d, rank->replica, d->replicas[rank->replica].epoch);
    g_autoptr(GPtrArray) sources = slice_sources(rank);
    Weft__V1__LoadRequest request = WEFT__V1__LOAD_REQUEST__INIT;
    request.stamp = &stamp;
    request.plan = plan_to_message(d->plan);
    request.model = model_message(d->model, true);
    request.stage = rank->stage;
    request.rank = rank->rank;
    request.sources = (char **)sources->pdata;
    request.n_sources = sources->len;
    request.seal = !d->jobs->options.seal_off;
    memcpy(&request.slice_key, d->file_hash.bytes, sizeof request.slice_key);
    rank_begin(rank, "Load", &request.base, LOAD_DEADLINE_MS, false);
    weft__v1__plan__free_unpacked(request.plan, NULL);
    weft__v1__model__free_unpacked(request.model, NULL);
}

void rank_start(RankState *rank, const Weft__V1__StartRequest *request)
{
    Weft__V1__StartRequest own = *request;
    own.stage = rank->stage;
    own.rank = rank->rank;
    rank_begin(rank, "Start", &own.base, START_DEADLINE_MS, true);
}

/* A worker that does not answer Drop is told again by every heartbeat's acknowledgement, whose keep
 * list lacks the epoch. */
static void on_drop_done(const GError *error, void *user) {}

void rank_drop(Deployment *d, const RankState *rank, uint64_t epoch, bool keep_weights)
{
    RpcChannel *channel = rank_channel(rank);
    if (channel == NULL) {
        return;
    }
    Weft__V1__Stamp stamp = WEFT__V1__STAMP__INIT;
    stamp_fill(&stamp, d, rank->replica, epoch);
    Weft__V1__DropRequest request = WEFT__V1__DROP_REQUEST__INIT;
    request.stamp = &stamp;
    request.keep_weights = keep_weights;
    RpcCallbacks callbacks = {.on_done = on_drop_done};
    rpc_call_start(channel, &weft__v1__worker__descriptor, "Drop", &request.base, DROP_DEADLINE_MS,
                   false, callbacks, NULL);
}
