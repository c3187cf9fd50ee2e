/* Requests: clients' runs, from their text to tokens of a replica and back, whatever carries them.
 * Knows deployments by lease, workers by RPC and clients by a sink only. Loop thread. */
#pragma once

#include "coordinator/gateway/requests/request_check.h"
#include "coordinator/gateway/requests/request_stats.h"
#include "coordinator/jobs/jobs.h"
#include "coordinator/jobs/models.h"
#include "coordinator/members.h"
#include "coordinator/work_pool.h"
#include "proto/base/random.h"
#include "transport/rpc/rpc.h"

#include <glib.h>

typedef struct RequestsOptions {
    Loop *loop;
    Log *log;
    Random *random;
    WorkPool *pool;
    Members *members;
    Models *models;
    Jobs *jobs;
    const char *cluster; /* copied */
    uint64_t generation;
} RequestsOptions;

typedef struct Requests Requests;
Requests *requests_new(const RequestsOptions *options);
/* Ends what is open. Before jobs, members and models are freed. NULL-safe. */
void requests_free(Requests *requests);

/* Where a run's events go: a gRPC call, an HTTP response. A table that outlives the run; sink_user
 * is touched until finish() returned or run_cancel() was called, never afterwards. */
typedef struct RunSink {
    /* Takes one event (borrowed). False: too much waits for a client that does not read, and the
     * run ends with an error. */
    bool (*send)(void *sink_user, const Weft__V1__RunEvent *event);
    /* The end, once: after RunDone with NULL, else with the error (borrowed). */
    void (*finish)(void *sink_user, const GError *error);
    /* Whether logits may go on: true if little waits for the client; else fn(user) runs once when
     * that is so, not after the end. NULL: always. */
    bool (*has_room)(void *sink_user, LoopFn fn, void *user);
} RunSink;

typedef struct Run Run;
/* Begins a request (copied). NULL + INVALID when it asks for what cannot be; the sink is not
 * touched inside this call. The run is valid until finish() or run_cancel(). */
typedef struct RunSetting {
    const JobWish *wish;   /* the deployment that it goes to; NULL: as the request says. Copied */
    const char *name;      /* the model's, in metrics; NULL: its own. Copied */
    const char *client_id; /* under which its client knows it too; NULL: none. Copied */
    const char *cache_key; /* prefixes are shared with equal keys only; NULL: with all. Copied */
    const char *share_key; /* whose it is: keys that wait are served in turn; NULL: nobody's. At
                              most 64 bytes are looked at. Copied */
} RunSetting;
Run *requests_start(Requests *requests, const Weft__V1__RunRequest *request,
                    const RunSetting *setting /* NULL: none */, const RunSink *sink,
                    void *sink_user, GError **error);
/* Nobody wants it any more: everything that it holds is given back at once. why: for the log; NULL:
 * its client left. */
void run_cancel(Run *run, const char *why);
const char *run_id(const Run *run); /* "r-0123abcd"; borrowed */

/* Runs that are open: those that have a replica, and those that wait for one; also into the stats
 * of each model. */
void requests_count(const Requests *requests, unsigned *running_out, unsigned *waiting_out);
/* What requests wait for, as weft.v1.Reason, appended to reasons (owned). id: a run's, or what its
 * client knows it by; NULL: every open one. */
void requests_explain(const Requests *requests, const char *id, GPtrArray *reasons);
const RequestStats *requests_stats(const Requests *requests);

/* Prompt, messages or prompt ids of a request as ids; returned, of uint32_t. INVALID. Any thread.
 */
typedef struct RequestEncoding {
    uint32_t context; /* that has to hold the prompt: one that is far too long is not read to its
                         end; 0: any length */
    bool no_bos;      /* of a prompt, where the model adds one */
    bool no_answer_follows; /* messages end as they are, without the opening of an answer */
} RequestEncoding;
GArray *request_encode(const Model *model, const Weft__V1__RunRequest *request, RequestEncoding how,
                       GError **error);

/* serve_service.c: service Serve, a run for each call. */
void requests_add(Requests *requests, RpcServer *server);
