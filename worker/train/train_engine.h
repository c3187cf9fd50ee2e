/* TrainEngine: one rank of a training job at work. A thread of its own owns the link port, the
 * compute pool and the TrainRank; it runs all steps by itself and tells what comes of them. Its
 * owner (main loop) talks to it through the functions below, which never block but
 * train_engine_new() (opening a port) and train_engine_free() (a step's compute at most).
 *
 *   OPEN ──data──▶ LOADED ──train_engine_start──▶ GREETING ──hellos, weights everywhere──┐
 *    │               │                               │                                    ▼
 *    │               │                               │                        DONE ◀── RUNNING
 *    └───────────────┴── error, abort, a peer lost ──┴──▶ FAILED ◀────────────────────────┘
 */
#pragma once

#include "proto/base/loop.h"
#include "proto/plan/train_limits.h"
#include "transport/link/link.h"
#include "worker/train/token_data.h"
#include "worker/train/train_memory.h"
#include "worker/train/train_snapshot.h"

/* What all ranks of a job share. */
typedef struct TrainWork {
    uint32_t sequences, length, leaves, micro_sequences;
    uint64_t steps, seed;
    OptimizerSettings optimizer;
    Precision precision;
    LossScaleRule scaling;
    bool skip_nonfinite;
    double dropout;
    float smoothing; /* of labels */
    PipelineKind schedule;
    Recompute recompute;
    bool whole_optimizer;
    uint64_t checkpoint_every;                       /* 0: none, not even after the last step */
    uint64_t validation_every, validation_sequences; /* 0: none */
    uint64_t sample_every;                           /* 0: none */
    uint64_t trace_first, trace_steps;               /* traced are so many from that one on */
    TextWish sample; /* its prompt is borrowed for the engine's life */
    uint64_t n_tokens, n_validation_tokens;
    TokenPacking packing;
    TokenBounds bounds;
    bool fast, devices; /* numerics class; some rank computes on a device (TrainRankOptions) */
    bool given;         /* step 0 begins with weights of the feed, not from the seed */
    TrainProgress from; /* where a restored state stands; step 0: weights from the seed */
} TrainWork;

/* Of a rank that does this work; kernels, pool, source and links are left to be filled in. */
TrainRankOptions train_work_options(const TrainWork *w, const ModelSpec *spec, const Plan *plan,
                                    uint32_t replica, uint32_t stage, uint32_t rank);

/* Microseconds that a rank of this work is waited for: 120 s, or what the longest of a step, a
 * validation and a text takes at the slowest pace that is believed. Who is dead is known before,
 * by other means. */
int64_t train_work_wait_us(const TrainWork *w, const ModelSpec *spec);

/* Where the rank's data and state come from (tokens: TRAIN_ID_BITS); called on its thread, may
 * block, false when it is interrupted. */
typedef struct TrainFeed {
    bool (*tokens)(void *user, bool validation, uint64_t first, uint64_t n, uint32_t *out,
                   GError **error);
    TrainRead floats; /* of a restored state, or weights that are given */
    void *user;
} TrainFeed;

typedef struct TrainReport {
    TrainStep step;
    bool validated;
    float validation;       /* mean loss, after the step */
    const uint32_t *sample; /* [n_sample] ids, drawn after the step; NULL: none. Borrowed */
    uint32_t n_sample;
    bool traced;                 /* the step is */
    const PipelineOpTime *trace; /* [n_trace] what the rank did in it; none without samples */
    uint32_t n_trace;
    int64_t begin_us, end_us; /* link_clock_us(): of the step, without validation and checkpoint */
    double seconds;           /* of the step, without validation and checkpoint */
    double waited;            /* of these for other ranks */
    TrainMemory memory;       /* of the rank: as planned */
    uint64_t resident_bytes;  /* after the engine's first step: what the process has come to hold
                                 since before the rank was built, by whatever it did; else 0 */
} TrainReport;

/* All are posted on the loop, in order; ended() once, last. */
typedef struct TrainEvents {
    void (*loaded)(void *user);
    void (*running)(void *user);
    void (*step)(const TrainReport *report, void *user);
    /* Taken. The rank makes no other one before train_engine_taken(). */
    void (*snapshot)(TrainSnapshot *snapshot, void *user);
    /* digest: of the weights after the last step; NULL with an error, which names the worker waited
     * for, or is the one given to train_engine_abort(). The port stays open for peers that still
     * need it. */
    void (*ended)(const Hash128 *digest, const GError *error, void *user);
    void *user;
} TrainEvents;

typedef struct TrainEngineOptions {
    const ModelSpec *spec; /* borrowed for the engine's life, like plan, kernels, device and fill */
    const Plan *plan;
    uint32_t replica, stage, rank;
    uint64_t generation, epoch;
    TrainWork work;
    TrainFeed feed;
    unsigned threads;
    const int *cpus; /* `threads` cpu numbers or NULL */
    const Kernels *kernels;
    const Device *device; /* where the rank computes; NULL: the host */
    const LinkFill *fill;
    bool crowded;             /* yield instead of spinning */
    int64_t wait_deadline_us; /* of each wait for a peer; 0: train_work_wait_us() */
    Loop *loop;
    TrainEvents events;
} TrainEngineOptions;

typedef struct TrainEngine TrainEngine;

/* Bytes that this process has in memory, from the kernel; 0: not known. Any thread. */
uint64_t train_engine_resident(void);
/* Opens the port and begins to load. Returned. */
TrainEngine *train_engine_new(const TrainEngineOptions *options, GError **error);
/* Stops the thread and closes the port. No event is posted after it returns; the owner drops those
 * that were. NULL-safe. */
void train_engine_free(TrainEngine *e);
GBytes *train_engine_address(TrainEngine *e); /* the port's, returned */

typedef struct TrainPeer {
    const char *worker;
    GBytes *address;
    uint8_t boot_id[16];
} TrainPeer;
/* After loaded(). peers: by train_global(), own place included; copied. */
void train_engine_start(TrainEngine *e, const uint8_t secret[32], const uint8_t own_boot_id[16],
                        bool seal, const TrainPeer *peers, uint32_t n_peers);
/* More compute threads than cores turned out to share this host. Before train_engine_start(). */
void train_engine_set_crowded(TrainEngine *e);
/* Its threads, where pinned, are to roam over these CPUs instead (cpu_share.h). Copied. Before
 * train_engine_start(). */
void train_engine_set_roam(TrainEngine *e, const uint32_t *cpus, uint32_t n_cpus);
/* The epoch is over: every wait ends at once, ended() follows with `why`. */
void train_engine_abort(TrainEngine *e, const GError *why);
/* The last snapshot is out of the way. */
void train_engine_taken(TrainEngine *e);
