/* Jobs: deployments of models on workers, from a wish to ranks that serve, and back when one dies.
 * Loop thread only.
 *
 * A request takes a Lease: it waits until a deployment like its wish is ready (planned, loaded,
 * started if need be) and holds one replica of it while it runs. When that replica's epoch ends the
 * lease is interrupted: it waits again, first in line, until the same deployment is ready in a
 * newer epoch, or until its time to recover is over.
 *
 *              ready                     its epoch ended
 *   WAITING ────────────▶ ACTIVE ──────────────────────────┐
 *    │   ▲                  interrupted                    │
 *    │   └─────────────────────────────────────────────────┘
 *    └── it cannot be had, or not in time ──▶ FAILED
 */
#pragma once

#include "coordinator/jobs/models.h"
#include "coordinator/members.h"
#include "coordinator/work_pool.h"
#include "proto/base/random.h"
#include "proto/plan/plan.h"
#include "weft/v1/admin.pb-c.h"

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct Jobs Jobs;
typedef struct Lease Lease;

typedef struct JobsOptions {
    Loop *loop;
    Store *store;
    Log *log;
    Random *random;
    WorkPool *pool;
    Members *members; /* jobs_new becomes its listener */
    Models *models;
    const char *cluster;
    uint64_t generation;
    const char *control_address; /* where workers fetch slices from this coordinator; copied */
    bool seal_off;               /* data-plane payloads between workers travel with CRC32C only */
    int64_t recovery_wait_us; /* after a loss, what cannot be planned waits so long for workers */
} JobsOptions;

Jobs *jobs_new(const JobsOptions *options);
void jobs_free(Jobs *jobs); /* NULL-safe; leases are forgotten without a call */
/* Rows found at start: jobs, then epochs. */
bool jobs_restore(Jobs *jobs, const StoreRow *row, GError **error);
bool jobs_restore_epoch(Jobs *jobs, const StoreRow *row, GError **error);

typedef struct JobWish {
    uint32_t dp, pp, tp; /* 0 = planner's choice */
    uint32_t context;    /* 0 = min(model's, 8192) */
    uint32_t streams;    /* sequences at once; 0 = as fits */
    NumericsClass numerics;
    bool any_numerics; /* none was asked: of the first plan, which the deployment keeps */
    KvType kv_type;
    uint64_t kv_memory; /* bytes of each worker for keys and values; 0 = by streams */
} JobWish;

/* Of a lease that was interrupted: what its recovery was expected to take and took, up to ready. */
typedef struct LeaseRecovery {
    bool resumed;
    double load_s, predicted_load_s; /* from the end of the epoch until ready */
    uint64_t n_tokens;               /* of all that goes on in this replica, to be computed again */
    double predicted_prefill_s;
} LeaseRecovery;

typedef struct LeaseInfo {
    const char *job;
    const Plan *plan;
    uint32_t replica;
    uint64_t epoch;
    const char *leader;  /* node id of stage 0, rank 0 */
    RpcChannel *channel; /* to it */
    double load_s;       /* from the wish to ready; 0 if it was ready */
    LeaseRecovery recovery;
} LeaseInfo;

typedef struct LeaseCallbacks {
    void (*progress)(const char *text, double fraction, const char *worker, void *user);
    /* Once for each epoch; info is valid until interrupted() or failed() returned, or release. */
    void (*ready)(const LeaseInfo *info, void *user);
    /* The epoch of the last ready() is over; why names worker and operation. true: it waits, and
     * ready() or failed() follows; *n_tokens are to be computed again then. false: the lease was
     * released inside. */
    bool (*interrupted)(const GError *why, void *user, uint64_t *n_tokens);
    /* It could not be had, or not again in time: says what is missing. At most once, nothing
     * follows; lease_release is still due. */
    void (*failed)(const GError *error, void *user);
    /* Nothing is computed under it: it keeps the deployment from being given up for another, and
     * holds no member that drains. */
    bool stands;
} LeaseCallbacks;

/* Never calls back inside. model: a reference is taken. */
Lease *jobs_acquire(Jobs *jobs, Model *model, const JobWish *wish, LeaseCallbacks callbacks,
                    void *user);
/* The prompt that it is for, told before it is ready: among replicas one that has computed the same
 * beginning is preferred. cache_key as in prompt_pages(). */
void lease_expect(Lease *lease, const uint32_t *ids, uint32_t n_ids, const char *cache_key);
void lease_release(Lease *lease); /* always, once; nothing is called afterwards */
/* The leader's call ended with an error of a worker or peer: the replica's epoch is over.
 * interrupted() follows, with the culprit's name. */
void lease_report(Lease *lease, const GError *error);

/* Stops deployments of a model ("" = all) that no request uses; returns how many. INVALID while one
 * is in use. */
bool jobs_unload(Jobs *jobs, const char *model, uint32_t *n_out, GError **error);
/* The planner's view of the members now; names are borrowed from `strings`. */
typedef struct MemberSnapshot {
    PlanMember *members;
    uint32_t n;
    GPtrArray *strings;
} MemberSnapshot;
#define JOBS_ALL "*"
/* except_job: memory that this job holds counts as free (JOBS_ALL: that all of them hold); NULL:
 * none. */
MemberSnapshot jobs_snapshot(const Jobs *jobs, const char *except_job);
void member_snapshot_free(MemberSnapshot *snapshot);

/* The id of the job that it is of; borrowed; NULL once it failed. */
const char *lease_job(const Lease *lease);
/* What a job waits for, as weft.v1.Reason, appended to reasons (owned). id: one job's; NULL: every
 * one. */
void jobs_explain(const Jobs *jobs, const char *id, GPtrArray *reasons);
/* Adds to a request's reason where its lease stands, and what the job or the replica waits for. */
void lease_explain(const Lease *lease, Weft__V1__Reason *reason);

/* Calls fn for each deployment with a description whose strings live until fn returns. */
void jobs_describe(const Jobs *jobs,
                   void (*fn)(const Weft__V1__Job *job, const Plan *plan, void *user), void *user);
