/* TrainCall: one rank of a job's epoch on its worker: the call of service Trainer, from load to the
 * end. Loop thread. */
#pragma once

#include "coordinator/members.h"
#include "proto/base/hash.h"
#include "proto/base/random.h"
#include "weft/v1/train.pb-c.h"

typedef struct TrainCall TrainCall;

/* What the job hears. Nothing after train_call_end(). */
typedef struct TrainCallEvents {
    void (*want)(TrainCall *call, const Weft__V1__TrainWant *want, void *user);
    void (*loaded)(TrainCall *call, void *user);
    void (*step)(const Weft__V1__TrainProgress *step, void *user);
    /* A part of a checkpoint begins, goes on or ends. */
    void (*save)(TrainCall *call, const Weft__V1__TrainReport *report, void *user);
    void (*done)(TrainCall *call, void *user);
    void (*failed)(TrainCall *call, const GError *error, void *user); /* at most once */
    void *user;
} TrainCallEvents;

struct TrainCall {
    char *worker;
    uint32_t index; /* train_global() */
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

/* worker: attached. load is borrowed for the call. */
TrainCall *train_call_new(Loop *loop, const Member *worker, uint32_t index,
                          const Weft__V1__TrainLoad *load, const TrainCallEvents *events);
void train_call_answer(TrainCall *c, uint64_t want, const void *data, size_t size);
/* So many bytes of a checkpoint that it sent are written. */
void train_call_taken(TrainCall *c, uint64_t bytes);
/* All are loaded: each hears of the others, under a fresh secret. calls: of TrainCall, by rank. */
void train_calls_start(const GPtrArray *calls, Members *members, Random *random);
/* Ends the rank: at its leisure when it is done, else at once. Frees. NULL-safe. */
void train_call_end(TrainCall *c);
