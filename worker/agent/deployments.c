/* The table and the life of its entries; diagram and invariants: deployment.h. */
#include "worker/agent/deployment.h"

#include "proto/base/error.h"
#include "proto/plan/cpu_share.h"
#include "transport/crypto/keys.h"

#include <string.h>

#define SHELF_AGE_US 60000000

/* ---- calls that wait ---- */

static void call_cancelled(void *user)
{
    DeploymentCall *waiting = user;
    RpcCall *call = waiting->call;
    g_ptr_array_remove(waiting->list, waiting); /* frees it */
    rpc_call_unref(call);
}

GPtrArray *deployment_call_list_new(void)
{
    return g_ptr_array_new_with_free_func(g_free);
}

void deployment_add_call(GPtrArray *list, RpcCall *call)
{
    DeploymentCall *waiting = g_new0(DeploymentCall, 1);
    *waiting = (DeploymentCall){rpc_call_ref(call), list};
    g_ptr_array_add(list, waiting);
    rpc_call_on_cancel(call, call_cancelled, waiting);
}

void deployment_answer(GPtrArray *list, const ProtobufCMessage *message, const GError *error)
{
    for (guint i = 0; i < list->len; i++) {
        RpcCall *call = ((DeploymentCall *)list->pdata[i])->call;
        rpc_call_on_cancel(call, NULL, NULL);
        if (message && !error) {
            rpc_call_send(call, message);
        }
        rpc_call_finish(call, error);
        rpc_call_unref(call);
    }
    g_ptr_array_set_size(list, 0);
}

static void refuse(RpcCall *call, GError *error /* taken */)
{
    rpc_call_finish(call, error);
    g_error_free(error);
}

/* ---- the end of a deployment ---- */

const char *deployment_state_name(DeploymentState state)
{
    static const char *const names[] = {"loading", "loaded", "loaded", "ready", "failed", "failed"};
    return names[state];
}

void deployment_give_up(Deployment *d, GError *error)
{
    if (d->state == DEPLOY_FAILED || d->state == DEPLOY_CLOSING) {
        g_error_free(error);
        return;
    }
    log_warn(d->table->o.log, "job %s replica %u epoch %" G_GUINT64_FORMAT " failed: %s", d->job,
             d->replica, d->epoch, error->message);
    d->state = DEPLOY_FAILED;
    d->error = error;
    deployment_answer(d->load_calls, NULL, error);
    deployment_answer(d->start_calls, NULL, error);
    if (d->engine) {
        engine_abort(d->engine, error);
    }
}

static void deployment_free(void *data)
{
    Deployment *d = data;
    g_assert(!d->engine && !d->weights && !d->fetch && !d->task_running);
    g_ptr_array_unref(d->load_calls);
    g_ptr_array_unref(d->start_calls);
    g_array_unref(d->watches);
    g_clear_error(&d->error);
    plan_free(d->plan);
    model_spec_free(d->spec);
    if (d->request) {
        weft__v1__load_request__free_unpacked(d->request, NULL);
    }
    g_free(d->job);
    g_free(d);
}

static void engine_free_run(void *user)
{
    Deployment *d = user;
    engine_free(d->engine);
    if (d->task_unmaps) {
        weights_free(g_steal_pointer(&d->weights)); /* unmapping takes long: here */
    }
}

/* Everything that the engine posted ran before this: posts keep their order. */
static void engine_free_done(void *user)
{
    Deployment *d = user;
    Deployments *table = d->table;
    d->engine = NULL;
    d->task_running = false;
    if (d->weights && !d->keep_weights) { /* they are not to be kept after all */
        deployment_closing(d);
        return;
    }
    for (guint i = 0; i < d->watches->len; i++) {
        EndWatch *watch = &g_array_index(d->watches, EndWatch, i);
        if (watch->ended) {
            watch->ended(watch->user);
        }
    }
    if (d->weights) {
        weights_shelf_put(table->shelf, g_steal_pointer(&d->weights), loop_now_us(table->o.loop));
    }
    g_ptr_array_remove(table->all, d);
    load_continue(table);
}

bool deployment_closing(Deployment *d)
{
    if (d->state != DEPLOY_CLOSING || d->task_running || d->fetch) {
        return d->state == DEPLOY_CLOSING;
    }
    if (d->engine) {
        reports_add_counters(d->engine, &d->table->gone);
        reports_add_links(d, d->table->gone_links);
    }
    d->task_running = true;
    d->task_unmaps = !d->keep_weights;
    task_pool_run(d->table->o.pool, engine_free_run, engine_free_done, d);
    return true;
}

void deployment_close(Deployment *d, bool keep_weights, const GError *why)
{
    if (d->state == DEPLOY_CLOSING) {
        d->keep_weights = d->keep_weights && keep_weights;
        return;
    }
    d->state = DEPLOY_CLOSING;
    atomic_store(&d->image.stop, true);
    d->keep_weights = keep_weights;
    g_clear_error(&d->error);
    d->error = g_error_copy(why);
    deployment_answer(d->load_calls, NULL, why);
    deployment_answer(d->start_calls, NULL, why);
    if (d->engine) {
        engine_abort(d->engine, why);
    }
    if (d->fetch) {
        fetch_cancel(d->fetch);
    }
    deployment_closing(d);
}

/* ---- stamps ---- */

static char *newest_key(const char *job, uint32_t replica)
{
    return g_strdup_printf("%u/%s", replica, job);
}

static uint64_t newest_epoch(Deployments *table, const char *job, uint32_t replica)
{
    g_autofree char *key = newest_key(job, replica);
    const uint64_t *newest = g_hash_table_lookup(table->newest, key);
    return newest ? *newest : 0;
}

static void set_newest_epoch(Deployments *table, const char *job, uint32_t replica, uint64_t epoch)
{
    g_hash_table_replace(table->newest, newest_key(job, replica), g_memdup2(&epoch, sizeof epoch));
}

static bool check_generation(Deployments *table, const Weft__V1__Stamp *stamp, GError **error)
{
    if (!table->cluster) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_READY,
                    "worker %s is not attached yet: try again", table->o.name);
        return false;
    }
    if (strcmp(stamp->cluster, table->cluster) != 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_DENIED,
                    "stamp of cluster %s at worker %s of cluster %s", stamp->cluster, table->o.name,
                    table->cluster);
        return false;
    }
    if (stamp->generation != table->generation) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_STALE,
                    "stamp of generation %" G_GUINT64_FORMAT
                    ", worker %s follows generation %" G_GUINT64_FORMAT ": attach and plan again",
                    stamp->generation, table->o.name, table->generation);
        return false;
    }
    return true;
}

bool deployments_check_stamp(Deployments *table, const Weft__V1__Stamp *stamp, bool may_be_newer,
                             GError **error)
{
    if (!stamp) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL, "the call has no stamp");
        return false;
    }
    if (!check_generation(table, stamp, error)) {
        return false;
    }
    uint64_t newest = newest_epoch(table, stamp->job, stamp->replica);
    if (stamp->epoch < newest || (stamp->epoch > newest && !may_be_newer)) {
        g_set_error(error, WEFT_ERROR,
                    stamp->epoch < newest ? WEFT_ERROR_STALE : WEFT_ERROR_NOT_FOUND,
                    "job %s replica %u: the call is of epoch %" G_GUINT64_FORMAT
                    ", worker %s knows epoch %" G_GUINT64_FORMAT,
                    stamp->job, stamp->replica, stamp->epoch, table->o.name, newest);
        return false;
    }
    if (may_be_newer) {
        set_newest_epoch(table, stamp->job, stamp->replica, stamp->epoch);
    }
    return true;
}

Deployment *deployments_find(Deployments *table, const char *job, uint32_t replica, uint64_t epoch)
{
    for (guint i = 0; i < table->all->len; i++) {
        Deployment *d = table->all->pdata[i];
        if (d->state != DEPLOY_CLOSING && d->epoch == epoch && d->replica == replica &&
            strcmp(d->job, job) == 0) {
            return d;
        }
    }
    return NULL;
}

Deployment *deployments_find_rank(Deployments *table, const Weft__V1__Stamp *stamp, uint32_t stage,
                                  uint32_t rank)
{
    for (guint i = 0; i < table->all->len; i++) {
        Deployment *d = table->all->pdata[i];
        if (d->state != DEPLOY_CLOSING && d->epoch == stamp->epoch &&
            d->replica == stamp->replica && d->stage == stage && d->rank == rank &&
            strcmp(d->job, stamp->job) == 0) {
            return d;
        }
    }
    return NULL;
}

const Device *deployments_device(const Deployments *table, uint32_t place)
{
    const DeploymentsOptions *o = &table->o;
    return place < o->n_devices ? o->devices[place] : place == 0 ? o->device : NULL;
}

uint64_t deployments_budget(const Deployments *table)
{
    return table->o.n_devices > 1 && table->o.device_bytes > 0 ? table->o.device_bytes
                                                               : table->o.memory_bytes;
}

/* The rank of this stamp; on a worker of one rank whichever it holds. */
static Deployment *find_by_stamp(Deployments *table, const Weft__V1__Stamp *stamp, uint32_t stage,
                                 uint32_t rank, GError **error)
{
    if (!deployments_check_stamp(table, stamp, false, error)) {
        return NULL;
    }
    Deployment *d = deployments_find_rank(table, stamp, stage, rank);
    if (!d && table->o.n_devices < 2) {
        d = deployments_find(table, stamp->job, stamp->replica, stamp->epoch);
    }
    if (!d) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND,
                    "job %s replica %u epoch %" G_GUINT64_FORMAT " is not loaded on worker %s",
                    stamp->job, stamp->replica, stamp->epoch, table->o.name);
    }
    return d;
}

/* ---- start ---- */

static void started(const GError *error, void *user)
{
    Deployment *d = user;
    if (d->state != DEPLOY_STARTING) {
        return; /* closed or failed meanwhile: its calls were answered then */
    }
    if (error) {
        deployment_give_up(d, g_error_copy(error));
        return;
    }
    d->state = DEPLOY_READY;
    log_info(d->table->o.log,
             "job %s replica %u epoch %" G_GUINT64_FORMAT " ready: stage %u rank %u", d->job,
             d->replica, d->epoch, d->stage, d->rank);
    EngineStatus status;
    engine_status(d->engine, &status);
    if (status.activations != NULL) {
        log_info(d->table->o.log,
                 "job %s replica %u epoch %" G_GUINT64_FORMAT ": activations go %s", d->job,
                 d->replica, d->epoch, status.activations);
    }
    Weft__V1__StartResponse response = WEFT__V1__START_RESPONSE__INIT;
    deployment_answer(d->start_calls, &response.base, NULL);
}

/* Every rank of the replica exactly once, in order, each with address and boot id. */
static bool check_ranks(const Deployment *d, const Weft__V1__StartRequest *request, GError **error)
{
    const PlanReplica *replica = &d->plan->replicas[d->replica];
    size_t at = 0;
    for (uint32_t s = 0; s < replica->n_stages; s++) {
        for (uint32_t r = 0; r < replica->stages[s].n_ranks; r++, at++) {
            const Weft__V1__RankAddress *rank = at < request->n_ranks ? request->ranks[at] : NULL;
            if (!rank || rank->stage != s || rank->rank != r || rank->data_address.len == 0 ||
                rank->boot_id.len != BOOT_ID_BYTES) {
                g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                            "start: stage %u rank %u has no address or boot id in its place", s, r);
                return false;
            }
        }
    }
    if (at != request->n_ranks || request->secret.len != EPOCH_SECRET_BYTES) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                    "start: %zu ranks and a secret of %zu bytes for a replica of %zu ranks",
                    request->n_ranks, request->secret.len, at);
        return false;
    }
    const Weft__V1__RankAddress *own = NULL;
    for (size_t i = 0; i < at; i++) {
        own = request->ranks[i]->stage == d->stage && request->ranks[i]->rank == d->rank
                  ? request->ranks[i]
                  : own;
    }
    if (!own || memcmp(own->boot_id.data, d->table->o.boot_id, BOOT_ID_BYTES) != 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_STALE,
                    "start: worker %s was restarted since it loaded stage %u rank %u: load again",
                    d->table->o.name, d->stage, d->rank);
        return false;
    }
    return true;
}

/* What the engine is to know of CPUs that ranks of the replica share. */
static void tell_sharing(const Deployment *d, const Weft__V1__StartRequest *request)
{
    const uint32_t n = (uint32_t)request->n_ranks;
    g_autofree CpuShare *shares = g_new(CpuShare, n);
    g_autofree uint32_t *stages = g_new(uint32_t, n);
    uint32_t own = 0;
    for (uint32_t i = 0; i < n; i++) {
        const Weft__V1__RankAddress *rank = request->ranks[i];
        own = rank->stage == d->stage && rank->rank == d->rank ? i : own;
        shares[i] = (CpuShare){rank->host, rank->threads, rank->cpus, (uint32_t)rank->n_cpus};
        stages[i] = rank->stage;
    }
    if (cpu_crowding(shares, n, own) > 1.0) {
        engine_set_crowded(d->engine);
    }
    for (uint32_t i = 0; i < n; i++) {
        if (request->ranks[i]->on_device) { /* leaves the cores alone */
            shares[i] = (CpuShare){0};
        }
    }
    engine_set_stages_at_once(d->engine, cpu_stages_at_once(shares, stages, n));
    g_autofree char *turn = cpu_turn_name(shares, stages, n, own);
    engine_set_cpu_turn(d->engine, turn);
}

static void start_engine(Deployment *d, const Weft__V1__StartRequest *request)
{
    g_autofree EnginePeer *peers = g_new0(EnginePeer, request->n_ranks);
    for (size_t i = 0; i < request->n_ranks; i++) {
        const Weft__V1__RankAddress *rank = request->ranks[i];
        peers[i] = (EnginePeer){rank->stage,
                                rank->rank,
                                rank->worker,
                                g_bytes_new(rank->data_address.data, rank->data_address.len),
                                {0}};
        memcpy(peers[i].boot_id, rank->boot_id.data, BOOT_ID_BYTES);
    }
    d->state = DEPLOY_STARTING;
    tell_sharing(d, request);
    engine_start(d->engine, request->secret.data, d->table->o.boot_id, d->seal, peers,
                 (uint32_t)request->n_ranks, d->table->o.loop, started, d);
    for (size_t i = 0; i < request->n_ranks; i++) {
        g_bytes_unref(peers[i].address);
    }
    keys_erase(request->secret.data,
               request->secret.len); /* the message's copy; the engine erases its own */
}

void deployments_start(Deployments *table, RpcCall *call, const Weft__V1__StartRequest *request)
{
    GError *error = NULL;
    Deployment *d = find_by_stamp(table, request->stamp, request->stage, request->rank, &error);
    if (d && d->state == DEPLOY_FAILED) {
        error = g_error_copy(d->error);
    } else if (d && d->state == DEPLOY_LOADING) {
        error = g_error_new(WEFT_ERROR, WEFT_ERROR_NOT_READY,
                            "job %s replica %u epoch %" G_GUINT64_FORMAT
                            " is still loading on worker %s",
                            d->job, d->replica, d->epoch, table->o.name);
    } else if (d && d->state == DEPLOY_LOADED) {
        check_ranks(d, request, &error);
    }
    if (error) {
        refuse(call, error);
        return;
    }
    if (d->state == DEPLOY_READY) {
        Weft__V1__StartResponse response = WEFT__V1__START_RESPONSE__INIT;
        rpc_call_reply(call, &response.base);
        return;
    }
    deployment_add_call(d->start_calls, call);
    if (d->state == DEPLOY_LOADED) {
        start_engine(d, request);
    }
}

/* ---- drop ---- */

void deployments_drop(Deployments *table, RpcCall *call, const Weft__V1__DropRequest *request)
{
    GError *error = NULL;
    const Weft__V1__Stamp *stamp = request->stamp;
    /* Dropping what is older than the newest epoch, or was never here, is done already. */
    if (!stamp) {
        error = g_error_new(WEFT_ERROR, WEFT_ERROR_PROTOCOL, "the call has no stamp");
    } else if (!check_generation(table, stamp, &error)) {
        /* refused below */
    } else if (stamp->epoch >= newest_epoch(table, stamp->job, stamp->replica)) {
        set_newest_epoch(table, stamp->job, stamp->replica, stamp->epoch);
    }
    if (error) {
        refuse(call, error);
        return;
    }
    g_autoptr(GError) why =
        g_error_new(WEFT_ERROR, WEFT_ERROR_STALE,
                    "job %s replica %u epoch %" G_GUINT64_FORMAT " was dropped by the coordinator",
                    stamp->job, stamp->replica, stamp->epoch);
    for (guint i = 0; i < table->all->len; i++) {
        Deployment *d = table->all->pdata[i];
        if (d->epoch <= stamp->epoch && d->replica == stamp->replica &&
            strcmp(d->job, stamp->job) == 0) {
            deployment_close(d, request->keep_weights, why);
        }
    }
    Weft__V1__DropResponse response = WEFT__V1__DROP_RESPONSE__INIT;
    rpc_call_reply(call, &response.base);
}

void deployments_fence(Deployments *table, int64_t silent_us)
{
    for (guint i = 0; i < table->all->len; i++) {
        Deployment *d = table->all->pdata[i];
        if (d->state != DEPLOY_FAILED && d->state != DEPLOY_CLOSING) {
            g_autoptr(GError) why =
                g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST,
                            "worker %s was fenced: no word from the coordinator for %d ms",
                            table->o.name, (int)(silent_us / 1000));
            deployment_close(d, true, why);
        }
    }
}

void deployments_keep(Deployments *table, Weft__V1__Keep *const *keep, size_t n_keep,
                      uint64_t sequence)
{
    for (guint i = 0; i < table->all->len; i++) {
        Deployment *d = table->all->pdata[i];
        bool known = d->listed_since == 0 || sequence < d->listed_since;
        for (size_t k = 0; k < n_keep && !known; k++) {
            known = keep[k]->replica == d->replica && keep[k]->epoch == d->epoch &&
                    strcmp(keep[k]->job, d->job) == 0;
        }
        if (!known && d->state != DEPLOY_CLOSING) {
            g_autoptr(GError) why = g_error_new(WEFT_ERROR, WEFT_ERROR_STALE,
                                                "job %s replica %u epoch %" G_GUINT64_FORMAT
                                                " is not known to the coordinator any more",
                                                d->job, d->replica, d->epoch);
            deployment_close(d, true, why);
        }
    }
}

/* ---- health ---- */

/* A failed engine fails its deployment; one that stands still by its own fault is reported as
 * failed (reports.c). */
static bool is_moving(Deployment *d)
{
    EngineStatus status;
    engine_status(d->engine, &status);
    if (status.failed) {
        deployment_give_up(d,
                           g_error_new_literal(WEFT_ERROR, WEFT_ERROR_WORKER_LOST, status.error));
        return false;
    }
    const bool was_still = d->pulse.still;
    pulse_look(&d->pulse, d->engine, &status, loop_now_us(d->table->o.loop));
    if (d->pulse.still != was_still) {
        log_warn(d->table->o.log, "job %s replica %u epoch %" G_GUINT64_FORMAT ": %s", d->job,
                 d->replica, d->epoch, d->pulse.still ? d->pulse.problem : "its engine goes on");
    }
    return !d->pulse.still;
}

bool deployments_serving(Deployments *table)
{
    bool loaded = false, moving = true;
    weights_shelf_expire(table->shelf, loop_now_us(table->o.loop), SHELF_AGE_US);
    for (guint i = 0; i < table->all->len; i++) {
        Deployment *d = table->all->pdata[i];
        if (d->state == DEPLOY_READY) {
            bool moves = is_moving(d);
            loaded = loaded || d->state == DEPLOY_READY;
            moving = moving && (moves || d->state != DEPLOY_READY);
        } else if (d->state == DEPLOY_CLOSING) {
            moving = moving && !d->pulse.still; /* its thread has not ended yet */
        } else if (d->state == DEPLOY_LOADED || d->state == DEPLOY_STARTING) {
            loaded = true;
        }
    }
    return loaded && moving;
}

char *deployments_problem(const Deployments *table)
{
    for (guint i = 0; i < table->all->len; i++) {
        const Deployment *d = table->all->pdata[i];
        if (d->pulse.still && d->state != DEPLOY_FAILED) {
            return g_strdup_printf("job %s epoch %" G_GUINT64_FORMAT ": %s", d->job, d->epoch,
                                   d->pulse.problem);
        }
    }
    return g_strdup("");
}

bool deployments_step(Deployments *table)
{
    bool did = false;
    for (guint i = 0; i < table->all->len; i++) {
        Deployment *d = table->all->pdata[i];
        if (d->engine && !d->task_running && d->state != DEPLOY_LOADING) {
            did = engine_step(d->engine) || did;
        }
    }
    return did;
}

/* ---- for service Leader ---- */

Deployment *deployments_leader(Deployments *table, const Weft__V1__Stamp *stamp, GError **error)
{
    Deployment *d = find_by_stamp(table, stamp, 0, 0, error);
    if (!d) {
        return NULL;
    }
    if (d->stage != 0 || d->rank != 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "worker %s holds stage %u rank %u of job %s and does not lead the replica",
                    table->o.name, d->stage, d->rank, d->job);
        return NULL;
    }
    if (d->state == DEPLOY_FAILED) {
        g_propagate_error(error, g_error_copy(d->error));
        return NULL;
    }
    if (d->state != DEPLOY_READY) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_READY,
                    "job %s replica %u epoch %" G_GUINT64_FORMAT " is %s on worker %s, not ready",
                    d->job, d->replica, d->epoch, deployment_state_name(d->state), table->o.name);
        return NULL;
    }
    return d;
}

uint64_t deployment_submit(Deployment *d, const EngineRequest *request, EngineTokenFn fn,
                           void *user)
{
    g_assert(d->state == DEPLOY_READY);
    return engine_submit(d->engine, request, d->table->o.loop, fn, user);
}

void deployment_cancel(Deployment *d, uint64_t engine_request)
{
    if (d->state != DEPLOY_CLOSING) {
        engine_cancel(d->engine, engine_request);
    }
}

const ModelSpec *deployment_spec(const Deployment *d)
{
    return d->weights->spec;
}
const GError *deployment_error(const Deployment *d)
{
    return d->error;
}
const Plan *deployment_plan(const Deployment *d)
{
    return d->plan;
}

uint64_t deployment_watch_end(Deployment *d, LoopFn ended, void *user)
{
    EndWatch watch = {++d->next_watch, ended, user};
    g_array_append_val(d->watches, watch);
    return watch.id;
}

void deployment_unwatch(Deployment *d, uint64_t id)
{
    for (guint i = 0; i < d->watches->len; i++) {
        if (g_array_index(d->watches, EndWatch, i).id == id) {
            g_array_remove_index_fast(d->watches, i);
            return;
        }
    }
}

/* ---- the table ---- */

Deployments *deployments_new(const DeploymentsOptions *options)
{
    Deployments *table = g_new0(Deployments, 1);
    table->o = *options;
    table->all = g_ptr_array_new_with_free_func(deployment_free);
    table->newest = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, g_free);
    table->shelf = weights_shelf_new(options->pool);
    weft__v1__counters__init(&table->gone);
    table->gone_links = reports_links_new();
    return table;
}

void deployments_set_generation(Deployments *table, const char *cluster, uint64_t generation)
{
    g_free(table->cluster);
    table->cluster = g_strdup(cluster);
    table->generation = generation;
}

void deployments_shut_down(Deployments *table)
{
    g_autoptr(GError) why =
        g_error_new(WEFT_ERROR, WEFT_ERROR_CANCELLED, "worker %s is stopping", table->o.name);
    table->shutting_down = true;
    for (guint i = 0; i < table->all->len; i++) {
        deployment_close(table->all->pdata[i], false, why);
    }
}

bool deployments_is_empty(const Deployments *table)
{
    return table->all->len == 0;
}

void deployments_free(Deployments *table)
{
    if (!table) {
        return;
    }
    g_assert(deployments_is_empty(table));
    weights_shelf_free(table->shelf);
    g_ptr_array_unref(table->all);
    g_hash_table_unref(table->newest);
    g_free(table->cluster);
    g_hash_table_unref(table->gone_links);
    g_free(table);
}
