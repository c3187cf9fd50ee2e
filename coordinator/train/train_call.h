/* TrainCall: one rank of a job's epoch on its worker: the call of service Trainer, from load to the
 * end. Loop thread. */
#pragma once

#include "coordinator/members.h"
#include "proto/base/hash.h"
#include "proto/base/random.h"
#include "proto/plan/plan.h"
#include "weft/v1/train.pb-c.h"

typedef struct TrainCall TrainCall;

/* What the job hears. Nothing after train_call_end(). */
typedef struct TrainCallEvents {
    void (*want)(TrainCall *call, const Weft__V1__TrainWant *want, void *user);
    void (*loaded)(TrainCall *call, void *user);
    void (*step)(const Weft__V1__TrainProgress *step, void *user);
    /* A part of a checkpoint begins, goes on or ends. */
    void (*save)(TrainCall *call, const Weft__V1__TrainReport *report, void *user);
    void (*trace)(TrainCall *call, const Weft__V1__TrainTrace *trace, void *user);
    void (*done)(TrainCall *call, void *user);
    void (*failed)(TrainCall *call, const GError *error, void *user); /* at most once */
    void *user;
} TrainCallEvents;

struct TrainCall {
    char *worker;
    uint32_t device; /* of the worker's */
    uint32_t index;  /* train_global() */
    bool loaded, running, done;
    bool asking; /* a question of it is open; the job's */
    GBytes *address;
    uint8_t boot_id[16];
    Hash128 digest; /* done: of the weights */
    int64_t heard_us;
    double wait_share;     /* of its last second of steps, for others; below 0: not known */
    uint64_t memory_bytes; /* that it holds; 0: not known */
    /* private */
    Loop *loop;
    TrainCallEvents events;
    RpcClientCall *call;
    bool ended;
};

/* Every worker of the plan can be called. */
bool train_calls_possible(const Plan *plan, const Members *members);
/* Calls every rank of the plan, added to calls (of TrainCall, by rank). train_calls_possible().
 * load: what all share; borrowed, its place is filled in. */
void train_calls_load(GPtrArray *calls, Loop *loop, const Plan *plan, const Members *members,
                      Weft__V1__TrainLoad *load, const TrainCallEvents *events);
/* By rank: what its worker calls its host; NULL: not known. The array is returned. */
const char **train_calls_hosts(const GPtrArray *calls, const Members *members);
/* Why the rank's worker is lost to the job, though it may say nothing: as the failure detector has
 * it, drained, or silent for stall_us while it is loading. NULL: it is not. Returned. */
GError *train_call_lost(const TrainCall *c, const Members *members, int64_t stall_us);
void train_call_answer(TrainCall *c, uint64_t want, const void *data, size_t size);
/* So many bytes of a checkpoint that it sent are written. */
void train_call_taken(TrainCall *c, uint64_t bytes);
/* All are loaded: each hears of the others, under a fresh secret. calls: of TrainCall, by rank. */
void train_calls_start(const GPtrArray *calls, Members *members, Random *random);
/* Ends the rank: at its leisure when it is done, else at once. Frees. NULL-safe. */
void train_call_end(TrainCall *c);
