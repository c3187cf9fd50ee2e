/* Deployment: one plan of one model on its workers. Inside jobs/ only; the state machine is
 * described in deployment.c. */
#pragma once

#include "coordinator/jobs/affinity.h"
#include "coordinator/jobs/jobs.h"

typedef enum DeploymentState {
    DEPLOYMENT_STORED,   /* found at start: its workers may still hold it */
    DEPLOYMENT_IDLE,     /* no plan in force: planned at the next request */
    DEPLOYMENT_PLANNING, /* planner at work, or its result being made durable */
    DEPLOYMENT_LOADING,
    DEPLOYMENT_STARTING,
    DEPLOYMENT_READY,
    DEPLOYMENT_FAILED,  /* as IDLE, and `error` says why the last try failed */
    DEPLOYMENT_STOPPED, /* final: about to be freed */
} DeploymentState;

typedef struct Deployment Deployment;

/* After an epoch was lost: how long is waited for workers, and what it takes. recovery.c */
typedef struct Recovery {
    LoopTimer *patience; /* running: what fails is tried again; fired: who waits hears why */
    LoopTimer *retry;    /* the next try, after one that failed */
    GError *cause;       /* why the epoch ended */
    int64_t since_us;    /* when it ended; 0: nobody waits to go on */
    double predicted_load_s;
    uint64_t n_tokens;       /* per replica, of the leases that are given out again now */
    GHashTable *held;        /* "worker part" of the ranks that were loaded last; a set */
    uint64_t load_bytes;     /* that the rank with most to get has to get */
    double load_bytes_per_s; /* seen when that was last more than nothing; 0: never */
    int64_t load_began_us, start_began_us;
    double start_s;        /* from loaded to ready, last time */
    uint64_t n_recoveries; /* with requests on them, so far; and how long they took together */
    double recovered_s;
    bool announced;  /* that it waits: logged once */
    bool shrunk;     /* planned without members that it had: a plan with them may be faster */
    LoopTimer *grow; /* a member came: such a plan is looked for */
    LoopTimer *revive;
} Recovery;

/* One rank's part in the running attempt. */
typedef struct RankState {
    Deployment *deployment;
    uint32_t replica, stage, rank;
    const char *worker;    /* borrowed from the plan */
    struct RankCall *call; /* in flight, or NULL */
    bool answered;
    uint64_t bytes_done, bytes_total;
    GBytes *data_address;
    uint8_t boot_id[16];
} RankState;

typedef struct ReplicaState {
    Deployment *deployment;
    uint32_t index;
    uint64_t epoch;
    bool live;  /* ranks may hold it under this epoch */
    bool ready; /* started on all ranks */
    uint32_t n_ranks;
    uint32_t n_active;  /* requests on it: leases, but those that only stand */
    RankState *ranks;   /* stage-major */
    LoopTimer *verdict; /* something is wrong: the detector gets a moment to name the culprit */
    GError *suspicion;
} ReplicaState;

struct Deployment {
    Jobs *jobs;
    char *id, *model_path;
    Model *model; /* NULL while STORED and nobody asked */
    JobWish wish;
    uint32_t context; /* effective */
    Hash128 file_hash;
    DeploymentState state;
    int64_t entered_us;  /* when it came into this state */
    bool restored;       /* of its wish, streams and memory for keys and values are not known */
    bool planned_before; /* shown as replanning */
    bool kept;           /* workers may keep its weights although no epoch is live */
    unsigned n_attempts; /* since somebody asked */
    GError *error;
    Plan *plan;
    ReplicaState *replicas;
    uint32_t n_replicas;
    unsigned n_pending;  /* ranks that have not answered in LOADING and STARTING */
    GQueue waiting;      /* of Lease: not yet given a replica */
    GList *next_waiting; /* of a walk over them, whose calls may release any; leases.c */
    GQueue active;       /* of Lease: on a replica */
    Affinity *affinity;  /* NULL while there is one replica */
    int64_t created_us, used_us, asked_us;
    double load_s;
    Recovery recovery;
    LoopTimer *settle; /* after a start: workers get time to come back */
    LoopTimer *kick;   /* a pump is due */
    bool pumping, pump_again;
    bool stays; /* a draining worker's part cannot be had elsewhere; until members change */
    struct PlanTask *task;
};

typedef enum LeaseState { LEASE_WAITING, LEASE_ACTIVE, LEASE_FAILED } LeaseState;

struct Lease {
    Deployment *deployment; /* NULL once failed */
    Jobs *jobs;
    LeaseState state;
    int64_t since_us;  /* when it came into this state */
    bool resumes;      /* it was interrupted and waits */
    bool struck;       /* it is still to hear of that */
    uint64_t n_tokens; /* that it then has to compute again */
    uint32_t replica;
    PromptPages *pages; /* of what it will ask; NULL: nothing to be found again */
    LeaseCallbacks callbacks;
    void *user;
    LeaseInfo info;
};

struct Jobs {
    JobsOptions options;
    char *cluster, *control_address;
    GPtrArray *deployments; /* of Deployment, owned */
    GPtrArray *revivals;    /* of recovery.c: models that are being opened; owned */
    GPtrArray *writing;     /* of planning.c: plans on their way to disk; owned */
    GHashTable
        *epochs; /* "job/replica" -> uint64_t *, the highest ever made durable or about to be */
    int64_t started_us;
    LoopTimer *sweep; /* something has ended: the list is to be looked through */
};

Deployment *deployment_new(Jobs *jobs, const char *id);
void deployment_free(Deployment *d); /* its leases must be gone */
/* Moves it on as far as it can go now: the one entry after anything changed. */
void deployment_pump(Deployment *d);
/* The same, later on the loop. */
void deployment_kick(Deployment *d);
/* STORED: its workers all hold it under its epoch: READY without loading. */
void deployment_try_adopt(Deployment *d);
/* Something is wrong with a replica: no new request gets it; its epoch ends now that the culprit is
 * known or, at the latest, after a moment. */
void deployment_suspect(Deployment *d, uint32_t replica, const GError *error);
/* Builds replicas and ranks from d->plan; epochs 0. */
void deployment_lay_out(Deployment *d);
/* The epoch of one replica is over: requests on it are interrupted with `why`, its ranks drop it
 * but keep their weights (a draining worker's does not). */
void deployment_end_epoch(Deployment *d, uint32_t replica, const GError *why);
/* The running attempt (PLANNING to STARTING) has failed; tried again at once when that was for a
 * worker which is gone, and for a while after a loss. */
void deployment_fail(Deployment *d, const GError *why);
/* All replicas dropped with their weights; it is not planned any more until somebody asks. */
void deployment_unload(Deployment *d);
bool deployment_uses(const Deployment *d, const char *worker);
/* Bytes that it takes (or may take) on a worker's device; DEPLOYMENT_ANY_DEVICE: on all of them. */
#define DEPLOYMENT_ANY_DEVICE UINT32_MAX
uint64_t deployment_bytes_on(const Deployment *d, const char *worker, uint32_t device);
const char *deployment_state_text(const Deployment *d);
/* Something has ended. Later on the loop: what was refused before it ever had a plan is forgotten
 * (its requests have heard why), and of the others that nobody holds the last 50 are kept. */
void jobs_sweep_soon(Jobs *jobs);
/* Tells members whether they serve something. */
void jobs_settle_members(Jobs *jobs);
/* Who waits for whom in a replica's epoch: of WaitEdge, whose texts are borrowed from the members'
 * heartbeats; returned. */
GArray *jobs_edges(const Jobs *jobs, const Deployment *d, uint32_t replica);
/* The least recently used deployment but `d` that nobody uses is dropped with its weights; false if
 * there is none. */
bool jobs_make_room(Jobs *jobs, const Deployment *d);
/* Who is waited for in the end, in words; NULL if no member of the replica reports a wait. Who is
 * named gets no new work before it is heard of. */
GError *jobs_culprit(const Jobs *jobs, const Deployment *d, uint32_t replica);
/* The only place that changes the state. */
void deployment_enter(Deployment *d, DeploymentState state);
/* Forgets replicas and ranks; nothing of them may be live. */
void deployment_clear_replicas(Deployment *d);
/* planning.c: from IDLE, FAILED or STORED; ends in deployment_begin_loading() or deployment_fail().
 */
void deployment_begin_planning(Deployment *d);
/* READY: another plan is sought, without a member that drains, or with one that came. If there is
 * one and, in the second case, it is so much faster, deployment_move() and then LOADING; else
 * requests go on where they are. */
void deployment_plan_move(Deployment *d);
/* A member begins to drain: an attempt that needs it is given up. */
void deployment_on_drained(Deployment *d, const char *worker);
/* Of its live ranks, one whose worker drains; NULL if none does. */
const char *deployment_draining(const Deployment *d);
/* Ends all epochs. */
void deployment_move(Deployment *d, const GError *why);
/* STORED becomes PLANNING although nobody waits; its model is open. */
void deployment_revive(Deployment *d);
/* A plan that is still to come finds nobody. */
void deployment_forget_planning(Deployment *d);
/* The plan in d->plan is durable: every rank loads its part. */
void deployment_begin_loading(Deployment *d);
Deployment *jobs_find(const Jobs *jobs, const char *id);
uint64_t jobs_epoch(const Jobs *jobs, const char *job, uint32_t replica);
/* Takes the next epoch in memory and appends its durable form to changes (of StoreChange, keys and
 * values owned). */
uint64_t jobs_next_epoch(Jobs *jobs, const char *job, uint32_t replica, GArray *changes);
void store_changes_clear(GArray *changes);

/* ---- rank_calls.c: what is said to one rank's worker ---- */
void rank_load(RankState *rank);
void rank_start(RankState *rank, const Weft__V1__StartRequest *request);
void rank_forget_call(RankState *rank); /* cancels it; no answer arrives */
/* A rank drops an epoch; nobody waits for the answer. */
void rank_drop(Deployment *d, const RankState *rank, uint64_t epoch, bool keep_weights);
/* Answers: */
void deployment_on_loaded(RankState *rank);
void deployment_on_started(RankState *rank);
void deployment_on_progress(RankState *rank);
void deployment_on_rank_error(RankState *rank, const char *operation, const GError *error);

/* ---- recovery.c: after a loss ---- */
/* An epoch with requests on it ended: from now on a deployment that cannot be planned is waited
 * for. */
void recovery_begin(Deployment *d, const GError *cause);
/* What fails now will be tried again. */
bool recovery_is_patient(const Deployment *d);
/* A try failed and another will follow later; who waits hears what is missing. */
void recovery_await(Deployment *d, const GError *missing);
/* Before and after the ranks load, and when it serves: what is expected, what it took. */
void recovery_on_loading(Deployment *d);
void recovery_on_loaded(Deployment *d);
void recovery_on_ready(Deployment *d);
/* Before and after replicas are given out. */
void recovery_on_serving(Deployment *d);
void recovery_on_served(Deployment *d);
/* A worker's process is gone, and what it held in memory. */
void recovery_forget_worker(Deployment *d, const char *worker);
/* A member can be used that could not before. */
void recovery_on_member(Deployment *d);
/* Found in the store: brought back without being asked, unless its workers still hold it. */
void recovery_revive(Deployment *d);
/* What a lease that is given a replica now is told. */
LeaseRecovery recovery_of_lease(const Deployment *d, const Lease *lease);
void recovery_clear(Deployment *d);
void recovery_revival_free(void *revival);
void plan_task_free(void *task);

/* ---- leases.c ---- */
void deployment_fail_waiting(Deployment *d, const GError *error);
/* Every waiting request hears how far it is. */
void deployment_tell_waiting(Deployment *d, const char *text, double fraction, const char *worker);
/* The epoch of a replica is over: those on it wait again, before all others, in their old order. */
void deployment_interrupt_leases(Deployment *d, uint32_t replica, const GError *why);
/* The first that waits gets a replica; false: none is ready. */
bool deployment_grant_next(Deployment *d);
