/* One deployment, as the files of the table see it (deployments.c: table and life; load.c: Load;
 * reports.c: what is told). Not for others.
 *
 *            Load          slices in, engine open        Start            all hellos
 *   (absent) ────▶ LOADING ──────────────────────▶ LOADED ─────▶ STARTING ───────────▶ READY
 *                     │                               │              │                   │
 *                     └─────────── error ─────────────┴──────────────┴──▶ FAILED ◀───────┘
 *                                                                   engine failed, fenced
 *   any ── Drop, newer epoch, keep ──▶ CLOSING ── task, fetch and engine gone ──▶ (absent)
 *                                                 weights to the shelf or freed
 *
 * Invariants
 *   1. At most one deployment of a (job, replica, stage, rank) is not CLOSING: the one of the
 * newest epoch. A worker of several devices holds several ranks of a replica, one on each.
 *   2. While `fetch` or `task_running`, a pool thread may use weights, plan and engine: nothing of
 * them is freed before both ended.
 *   3. An engine's plan, model and shard live until engine_free() returned (it runs in the pool).
 *   4. Every call in `load_calls` and `start_calls` is answered when the state leaves LOADING or
 * STARTING.
 *   5. `listed_since` is the first heartbeat that listed it: an acknowledgement of an older one
 * says nothing about it. */
#pragma once

#include "worker/agent/deployments.h"
#include "worker/agent/pulse.h"
#include "worker/agent/weights.h"
#include "worker/shard/fetch.h"

typedef enum DeploymentState {
    DEPLOY_LOADING,
    DEPLOY_LOADED,
    DEPLOY_STARTING,
    DEPLOY_READY,
    DEPLOY_FAILED,
    DEPLOY_CLOSING
} DeploymentState;

typedef struct EndWatch {
    uint64_t id;
    LoopFn ended;
    void *user;
} EndWatch;

struct Deployment {
    Deployments *table;
    char *job;
    uint32_t replica, stage, rank;
    uint32_t place; /* which of the worker's devices */
    uint64_t epoch, generation;
    bool seal;
    DeploymentState state;
    GError *error; /* FAILED, CLOSING: why */
    Plan *plan;
    ModelSpec *spec;                /* until it went into weights */
    Weft__V1__LoadRequest *request; /* until the fetch began */
    Weights *weights;
    Engine *engine;
    uint64_t need_bytes; /* of the memory budget */
    Fetch *fetch;
    FetchProgress progress;
    bool task_running, keep_weights;
    ImageWork image;    /* of the task that maps weights */
    LoopTimer *mapping; /* tells how far it is */
    bool task_unmaps;   /* what the task that frees the engine was told: it may not look above */
    GPtrArray *load_calls, *start_calls; /* of DeploymentCall */
    GArray *watches;                     /* of EndWatch */
    uint64_t next_watch, listed_since;
    Pulse pulse; /* of the engine; CLOSING: as it was last */
};

struct Deployments {
    DeploymentsOptions o;
    char *cluster;
    uint64_t generation;
    GPtrArray *all;     /* of Deployment, owned */
    GHashTable *newest; /* "job/replica" -> uint64_t *: the newest epoch seen */
    WeightsShelf *shelf;
    bool shutting_down;
    Weft__V1__Counters gone; /* counters of engines that are gone: what is reported never falls */
    GHashTable *gone_links;  /* the same: of Weft__V1__LinkLoad by peer, owned */
};

typedef struct DeploymentCall {
    RpcCall *call; /* referenced */
    GPtrArray *list;
} DeploymentCall;

/* The call waits in `list` (load_calls or start_calls) until it is answered or cancelled. */
void deployment_add_call(GPtrArray *list, RpcCall *call);
GPtrArray *deployment_call_list_new(void);
/* Ends every call in the list, with `message` before OK when error is NULL. */
void deployment_answer(GPtrArray *list, const ProtobufCMessage *message, const GError *error);

/* Error is taken. */
void deployment_give_up(Deployment *d, GError *error);
/* Begins CLOSING; idempotent, keep_weights only falls. Error is borrowed. */
void deployment_close(Deployment *d, bool keep_weights, const GError *why);
/* After a task or fetch ended: goes on with closing if that was waited for; true = it did, and `d`
 * may be gone. */
bool deployment_closing(Deployment *d);
const char *deployment_state_name(DeploymentState state);

/* load.c: tries to go on with every deployment that waits for others to be closed. */
void load_continue(Deployments *table);

/* Checks cluster, generation and epoch; STALE names both numbers. */
bool deployments_check_stamp(Deployments *table, const Weft__V1__Stamp *stamp, bool may_be_newer,
                             GError **error);
/* Any rank of it. */
Deployment *deployments_find(Deployments *table, const char *job, uint32_t replica, uint64_t epoch);
/* The rank's own. */
Deployment *deployments_find_rank(Deployments *table, const Weft__V1__Stamp *stamp, uint32_t stage,
                                  uint32_t rank);
/* The worker's device at this place, NULL: the host; and what it has for ranks. */
const Device *deployments_device(const Deployments *table, uint32_t place);
uint64_t deployments_budget(const Deployments *table);
/* Engine counters of `engine` added to `sum`. */
void reports_add_counters(Engine *engine, Weft__V1__Counters *sum);
GHashTable *reports_links_new(void); /* of Weft__V1__LinkLoad by peer; returned */
void reports_add_links(const Deployment *d, GHashTable *links);
