/* Deployments: the table of what this worker runs, by (job, replica, epoch) (DESIGN 7.7), and the
 * answers to Load, Start and Drop. Several models share one memory budget. Loop thread, all of it.
 *
 * Of one (job, replica) the newest epoch ever seen counts: calls for an older one are refused with
 * STALE, and a Load for a newer one ends what ran. */
#pragma once

#include "kernels/kernels.h"
#include "proto/base/log.h"
#include "proto/base/loop.h"
#include "transport/link/link.h"
#include "transport/rpc/rpc.h"
#include "weft/v1/cluster.pb-c.h"
#include "worker/serve/engine.h"
#include "worker/shard/packed_images.h"
#include "worker/shard/slice_store.h"
#include "worker/task_pool.h"

typedef struct Deployments Deployments;
typedef struct Deployment Deployment;

typedef struct DeploymentsOptions { /* everything is borrowed for the table's life */
    Loop *loop;
    TaskPool *pool;
    SliceStore *store;
    PackedImages *images; /* or NULL */
    Log *log;
    const LinkFill *fill;
    const char *name;       /* own node id */
    const uint8_t *boot_id; /* 16 bytes */
    const char *models_dir; /* or NULL */
    uint64_t memory_bytes;
    unsigned threads;
    unsigned io_threads; /* of the pool */
    const int *cpus;     /* `threads` of them or NULL */
    KernelIsa isa;
    const Device *device;         /* where shards lie and layers run; NULL = the host */
    const Device *const *devices; /* [n_devices]: as in agent.h */
    unsigned n_devices;
    uint64_t device_bytes;
    uint32_t numerics_classes;
    bool crowded;       /* engines yield instead of spinning */
    bool inline_engine; /* engines have no thread: deployments_step() */
    RpcChannel *(*channel)(const char *source, bool is_last, void *user); /* fetch.h */
    void *channel_user;
} DeploymentsOptions;

Deployments *deployments_new(const DeploymentsOptions *options);
/* Ends everything at once: calls with CANCELLED, engines stopped. The loop must run until
 * deployments_is_empty() before deployments_free(). */
void deployments_shut_down(Deployments *table);
bool deployments_is_empty(const Deployments *table);
void deployments_free(Deployments *table); /* NULL-safe */

/* The coordinator's generation, from its welcome: stamps of another one are stale. */
void deployments_set_generation(Deployments *table, const char *cluster, uint64_t generation);

/* Handlers of service Worker; each answers the call now or later. */
void deployments_load(Deployments *table, RpcCall *call, const Weft__V1__LoadRequest *request);
void deployments_start(Deployments *table, RpcCall *call, const Weft__V1__StartRequest *request);
void deployments_drop(Deployments *table, RpcCall *call, const Weft__V1__DropRequest *request);

/* This worker was fenced: every engine is aborted before this returns; weights stay. */
void deployments_fence(Deployments *table, int64_t silent_us);
/* Ack.keep of the report with this sequence: whatever that report listed and the coordinator does
 * not know is dropped; weights stay for a while. */
void deployments_keep(Deployments *table, Weft__V1__Keep *const *keep, size_t n_keep,
                      uint64_t sequence);

/* For reports; each returned array and message is freed with the message that it is put into
 * (malloc). */
Weft__V1__Held **deployments_held(Deployments *table,
                                  uint64_t sequence /* of the heartbeat, 0 = hello */,
                                  size_t *n_out);
Weft__V1__Waiting **deployments_waiting(Deployments *table, size_t *n_out);
Weft__V1__ReplicaLoad **deployments_loads(Deployments *table, size_t *n_out);
Weft__V1__Counters *deployments_counters(Deployments *table);
/* By name of the peer. */
Weft__V1__LinkLoad **deployments_links(Deployments *table, size_t *n_out);

/* Looks at every engine; every 250 ms. True: a shard is loaded, and every running engine makes
 * progress (DESIGN 7.6). */
bool deployments_serving(Deployments *table);
/* What is wrong with an engine that stands still, with its job and operation; "" = nothing.
 * Returned, malloc. */
char *deployments_problem(const Deployments *table);
/* inline_engine: one turn of each engine; true if anything was done. */
bool deployments_step(Deployments *table);

/* ---- for service Leader ---- */

/* The ready deployment of this stamp that this worker leads, or NULL + STALE, NOT_FOUND, NOT_READY,
 * INVALID, DENIED. */
Deployment *deployments_leader(Deployments *table, const Weft__V1__Stamp *stamp, GError **error);
/* engine_submit() and engine_cancel() on its engine; cancel does nothing once the deployment is
 * closing, which ends every request by itself. */
uint64_t deployment_submit(Deployment *deployment, const EngineRequest *request, EngineTokenFn fn,
                           void *user);
void deployment_cancel(Deployment *deployment, uint64_t engine_request);
const ModelSpec *deployment_spec(const Deployment *deployment);
const Plan *deployment_plan(const Deployment *deployment);
/* Why it failed or is closing; NULL while it does neither. Borrowed. */
const GError *deployment_error(const Deployment *deployment);
/* ended(user) once, when the deployment's engine is gone and no token event can come any more; the
 * id is for deployment_unwatch(). */
uint64_t deployment_watch_end(Deployment *deployment, LoopFn ended, void *user);
void deployment_unwatch(Deployment *deployment, uint64_t id);
