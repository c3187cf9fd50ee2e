/* TrainCall: one rank of a job's epoch on its worker: the call of service Trainer, from load to the
 * end. Loop thread. */
#pragma once

#include "coordinator/members.h"
#include "coordinator/train/train_part.h"
#include "proto/base/random.h"

typedef struct TrainCall TrainCall;

/* What the job hears. Nothing after train_call_end(). */
typedef struct TrainCallEvents {
    void (*want)(TrainCall *call, const Weft__V1__TrainWant *want, void *user);
    void (*loaded)(TrainCall *call, void *user);
    void (*step)(const Weft__V1__TrainProgress *step, void *user);
    void (*part)(TrainCall *call, void *user); /* train_call_take_part() is whole */
    void (*done)(TrainCall *call, void *user);
    void (*failed)(TrainCall *call, const GError *error, void *user); /* at most once */
    void *user;
} TrainCallEvents;

struct TrainCall {
    char *worker;
    uint32_t index; /* train_global() */
    bool loaded, running, done;
    GBytes *address;
    uint8_t boot_id[16];
    Hash128 digest; /* done: of the weights */
    int64_t heard_us;
    double wait_share;     /* of its last second of steps, for others; below 0: not known */
    uint64_t memory_bytes; /* that it holds; 0: not known */
    /* private */
    Loop *loop;
    const ModelSpec *spec; /* borrowed */
    TrainCallEvents events;
    RpcClientCall *call;
    TrainPart *part;
    bool ended;
};

/* worker: attached. load is borrowed for the call. */
TrainCall *train_call_new(Loop *loop, const Member *worker, uint32_t index, const ModelSpec *spec,
                          const Weft__V1__TrainLoad *load, const TrainCallEvents *events);
void train_call_answer(TrainCall *c, uint64_t want, const void *data, size_t size);
/* All are loaded: each hears of the others, under a fresh secret. calls: of TrainCall, by rank. */
void train_calls_start(const GPtrArray *calls, Members *members, Random *random);
TrainPart *train_call_take_part(TrainCall *c);
/* Ends the rank: at its leisure when it is done, else at once. Frees. NULL-safe. */
void train_call_end(TrainCall *c);
