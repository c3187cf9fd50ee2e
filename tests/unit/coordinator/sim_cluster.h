/* SimCluster: the real coordinator over inproc rpc under a virtual clock, with workers whose engine
 * is a hash: they attach, load, start, generate and die as a test says. */
#pragma once

#include "coordinator/coordinator.h"
#include "tests/sim/sim_loop.h"
#include "tests/unit/coordinator/sim_trainer.h"
#include "transport/rpc/inproc/inproc.h"
#include "weft/v1/admin.pb-c.h"
#include "weft/v1/cluster.pb-c.h"
#include "weft/v1/serve.pb-c.h"

#include <glib.h>
#include <stdbool.h>

#define SECOND INT64_C(1000000)
#define CONTROL "coordinator:1"
#define JOIN "coordinator:2"
#define WORKERS_LIMIT 8

typedef struct SimCluster SimCluster;

typedef struct FakeWorker {
    SimCluster *cluster;
    char name[16], address[32];
    Loop *loop;
    RpcServer *server;
    RpcChannel *channel;
    RpcClientCall *attach;
    LoopTimer *timer;
    bool running, welcomed;
    uint8_t boot_id[16];
    uint32_t protocol_version;
    uint32_t numerics_classes;  /* of its hello; 0: exact */
    Weft__V1__Device **devices; /* of its hello; borrowed */
    size_t n_devices;
    uint64_t memory_bytes, sequence;
    char *certificate;
    GPtrArray *held;    /* of Weft__V1__Held, owned */
    GPtrArray *waiting; /* of Weft__V1__Waiting, owned: what it reports */
    GPtrArray *streams; /* of its open generations */
    unsigned n_loads, n_starts, n_drops, n_full_drops, n_generates, n_resumed, n_keep, n_revoked,
        n_welcomes;
    uint64_t generation; /* told by welcome */
    bool draining;       /* told by an acknowledgement */
    bool fail_load;
    bool leaving;        /* told in its heartbeats */
    const char *problem; /* likewise; NULL: none */
    bool forgets;        /* what it loaded, once, when it is to start */
    /* Asked first about each call; true = it has answered in the worker's stead. NULL = nobody. */
    bool (*answer)(RpcCall *call, const ProtobufCMessage *request, void *user);
    void *answer_user;
    bool silent;      /* takes a generation and sends nothing */
    int repeat;       /* 1: sends each token twice; 2: the second differs */
    int64_t acked_us; /* when it last heard of the coordinator: it fences itself 3.5 s later */
    unsigned n_fences;
    bool stands;         /* its generations make no progress: another rank is gone */
    bool lies;           /* its tokens are none of the model's */
    unsigned full_after; /* tokens of a call: then its reader is too slow; 0: never */
    size_t logits_bytes; /* with each token of a request that wants logits */
    int fail_generate;   /* error code that each generation ends with at once; 0: none */
    GError *refused;     /* how its attachment ended */
    bool cut;
    SimTrainer *trainer;
} FakeWorker;

struct SimCluster {
    SimWorld *world;
    RpcTransport *transport;
    StoreDisk *disk;
    char *dir; /* state and models */
    Coordinator *coordinator;
    Loop *client_loop;
    RpcChannel *admin;
    char *ca_pem;
    FakeWorker workers[WORKERS_LIMIT];
    Loop *coordinator_loop;
    GString *log;
    Log log_seam;
    uint32_t recovery_wait_ms; /* of the next sim_cluster_start() */
    bool seal_off;             /* of the next sim_cluster_start() */
    SimTraining training;
};

SimCluster *sim_cluster_new(uint64_t seed);
void sim_cluster_free(SimCluster *s);
void sim_cluster_stop(SimCluster *s);  /* the coordinator dies; what was durable stays */
void sim_cluster_start(SimCluster *s); /* a new incarnation on the same state */
/* Adds worker i ("w0", ...) with a certificate and attaches it. */
FakeWorker *sim_worker_start(SimCluster *s, unsigned i);
void sim_worker_kill(FakeWorker *w); /* its process is gone: sockets reset */
void sim_worker_freeze(FakeWorker *w, bool frozen);
const char *sim_cluster_model(SimCluster *s); /* path of the tiny model */
void sim_worker_cut(FakeWorker *w, bool cut); /* its cable: nothing passes, no socket breaks */
void sim_run_for(SimCluster *s, int64_t us);

/* One unary or server-streaming call of the administrator. */
typedef struct Answer {
    bool done;
    GError *error;
    ProtobufCMessage *message; /* the last */
    /* Serve.Run: */
    GString *text;
    GArray *ids;
    Weft__V1__RunStarted *started;
    Weft__V1__RunDone *run_done;
    GArray *places; /* uint64_t: window and position of each scored token, in order of arrival */
    unsigned n_progress, n_choices_done;
    GString *notices;                  /* of progress events that are notices, a line each */
    double stall_s, predicted_stall_s; /* of the last recovery told */
    RpcClientCall *call;
    int64_t done_us;
    SimCluster *cluster;
} Answer;
void sim_call(SimCluster *s, Answer *a, const ProtobufCServiceDescriptor *service,
              const char *method, const void *request);
/* Runs the world until it is answered; asserts that it is, within `limit_us`. */
void sim_answer(SimCluster *s, Answer *a, int64_t limit_us);
void answer_clear(Answer *a);

/* A request for the tiny model in a layout, to be changed before it is sent; it points into itself.
 */
typedef struct SimRequest {
    Weft__V1__RunRequest run;
    Weft__V1__Layout layout;
} SimRequest;
void sim_request_init(SimCluster *s, SimRequest *r, const char *prompt, uint32_t max_tokens,
                      uint32_t dp, uint32_t pp, uint32_t tp);
void sim_request_begin(SimCluster *s, Answer *a, const SimRequest *r);
void sim_run_begin(SimCluster *s, Answer *a, const char *prompt, uint32_t max_tokens, uint32_t pp,
                   uint32_t tp);
/* The member as status shows it; borrowed from a. */
const Weft__V1__Member *sim_status(SimCluster *s, Answer *a, const char *name);
