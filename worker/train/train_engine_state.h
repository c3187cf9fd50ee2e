/* A training engine, as the files of its thread see it. Not for others.
 *
 *   train_engine.c    the thread: opening, loading, closing; what its owner asks
 *   train_greeting.c  links and hellos; messages and deaths of peers
 *   train_run.c       steps, validation, checkpoints
 *
 * Engine thread unless a line says otherwise. */
#pragma once

#include "worker/train/token_data.h"
#include "worker/train/train_engine.h"

#include <pthread.h>
#include <stdatomic.h>

enum {
    TRAIN_SPIN_US = 200,
    TRAIN_IDLE_WAIT_US = 100000,
    TRAIN_WAIT_DEADLINE_US = 120000000, /* at least */
};

typedef struct TrainGreeting {
    uint8_t secret[32], boot_id[16];
    bool seal;
    TrainPeer *peers;
    char **workers;
    uint32_t n_peers;
} TrainGreeting;

struct TrainEngine {
    TrainEngineOptions o;
    TrainPosition position;
    uint32_t own; /* train_global() */
    GThread *thread;
    uint32_t *roam; /* [n_roam], written before the greeting is given; 0: stays pinned */
    uint32_t n_roam;
    /* engine thread */
    LinkPort *port;
    Pool *pool;
    Holding *holding;
    TokenData *data, *validation;
    TokenSamples samples, validation_samples;
    SampleSource source, validation_source;
    TrainLinks *links; /* NULL: one rank, or not yet */
    TrainRank *rank;
    GArray *trace; /* of PipelineOpTime: of the last step; NULL: no step is traced */
    Link *peers[PLAN_RANKS_LIMIT];
    bool greeted[PLAN_RANKS_LIMIT], built[PLAN_RANKS_LIMIT];
    uint64_t saves[PLAN_RANKS_LIMIT]; /* checkpoints that each rank has begun; the own one's too */
    int64_t heard_us[PLAN_RANKS_LIMIT]; /* g_get_monotonic_time() of the last hello */
    int64_t wait_us;                    /* the deadline of each wait for a peer */
    bool ended;
    uint64_t resident_before; /* of the process: what TrainReport counts from */
    /* shared */
    struct {
        pthread_mutex_t mutex;
        pthread_cond_t changed; /* opened */
        LinkPort *wake;         /* the port, while it may be interrupted */
        bool open_done;
        GError *open_error;
        GBytes *address;
        TrainGreeting *greeting; /* given, not yet taken */
        GError *why;             /* the first reason to stop */
    } shared;
    atomic_bool abort, quit, crowded, snapshot_out;
};

/* The first reason stays; every wait ends. Any thread. Error is taken. */
void train_engine_stop_with(TrainEngine *e, GError *error);
/* Waits for something of the port or the owner, TRAIN_IDLE_WAIT_US at most. */
void train_engine_rest(TrainEngine *e);

/* ---- train_greeting.c ---- */

/* Connects to every rank and waits for its hello; opens e->links. */
bool train_greeting_run(TrainEngine *e, const TrainGreeting *greeting, GError **error);
/* Says that this rank has its state, and waits until every other one says so. */
bool train_greeting_built(TrainEngine *e, GError **error);
/* Says that this rank begins its next checkpoint, and waits until every other one says so; one that
 * says that it still has its last one is waited for. */
bool train_greeting_saves(TrainEngine *e, GError **error);
/* To every peer: this rank is alive and still has its last checkpoint. */
bool train_greeting_holds(TrainEngine *e, GError **error);
void train_greeting_free(TrainGreeting *g); /* NULL-safe; erases its keys; any thread */
void train_links_on_message(Link *link, const LinkHeader *header, const void *payload, void *user);
void train_links_on_dead(Link *link, const char *why, void *user);
/* Every peer: this engine has failed. */
void train_greeting_tell(TrainEngine *e, const GError *why);

/* ---- train_run.c ---- */

/* All steps; digest is of the weights after the last. */
bool train_run(TrainEngine *e, Hash128 *digest, GError **error);
