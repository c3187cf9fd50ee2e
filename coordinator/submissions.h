/* Submissions: jobs that were handed over with a job file. One of kind serve is deployed and
 * offered over HTTP until it is cancelled, whoever comes and goes; one of kind train runs to its
 * end and is then kept, with its log, until it is cancelled. The row is durable before the
 * submitter hears of it, and the next coordinator takes it up again. Loop thread. */
#pragma once

#include "coordinator/gateway/openai/api_service.h"
#include "coordinator/jobs/jobs.h"
#include "coordinator/store/store.h"
#include "coordinator/train/train_job.h"
#include "proto/base/log.h"
#include "weft/v1/admin.pb-c.h"

#include <glib.h>
#include <stdbool.h>

typedef struct SubmissionsOptions {
    Loop *loop;
    Log *log;
    Store *store;
    Jobs *jobs;
    ApiService *api;
    TrainJobOptions train; /* what training jobs get */
} SubmissionsOptions;

typedef struct Submissions Submissions;
Submissions *submissions_new(const SubmissionsOptions *options);
/* Ends the calls that follow. Before api, jobs and the control server are freed. NULL-safe. */
void submissions_free(Submissions *submissions);
/* A row found at start; its job begins with submissions_start(). */
bool submissions_restore(Submissions *submissions, const StoreRow *row, GError **error);
/* The HTTP listeners are there: what was restored is taken up. */
void submissions_start(Submissions *submissions);

/* spec: a job file. done(NULL) once it is durable; never inside this call. It takes the name of a
 * training that is over, which then goes with its log; any: it may be somebody else's. INVALID for
 * what cannot be (a kind that this release does not run, a name that is taken), DENIED: then done
 * is not called. */
bool submissions_submit(Submissions *submissions, const char *spec, const char *owner, bool any,
                        StoreDone done, void *user, GError **error);
/* Ends it for good; done once that is durable. name: the job's, or that of its deployment. any: it
 * may be somebody else's. NOT_FOUND with the nearest name; DENIED. */
bool submissions_cancel(Submissions *submissions, const char *name, const char *who, bool any,
                        StoreDone done, void *user, GError **error);
/* Calls fn for each, by name, with a description whose strings live until fn returns. */
void submissions_each(const Submissions *submissions,
                      void (*fn)(const Weft__V1__Submission *job, void *user), void *user);
/* What happened to it so far, and with `follow` from now on: lines go into the call, which then
 * ends with the job: without an error when it is done, else with what ended it (CANCELLED), or why
 * it is not told further (UNREACHABLE: the coordinator stops). The call is finished in any case. */
void submissions_logs(Submissions *submissions, const char *name, bool follow, RpcCall *call);
/* Curves of a training job, an SVG picture of *steps steps; returned. NOT_FOUND with the nearest
 * name; INVALID: it does not train. */
char *submissions_plot(const Submissions *submissions, const char *name, uint64_t *steps,
                       GError **error);
/* What training jobs of a NumericsClass have shown of the workers' rate. Borrowed. */
const TrainRate *submissions_train_rate(const Submissions *submissions, uint32_t numerics);
/* Appends a message (message_free()) for each training job. */
void submissions_training(const Submissions *submissions, GPtrArray *out);
/* As jobs_explain() does, of the job of this name; false: there is none. NULL: of every training
 * job that is not over. */
bool submissions_explain(const Submissions *submissions, const char *name, GPtrArray *reasons);
