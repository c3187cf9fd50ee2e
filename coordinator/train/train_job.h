/* TrainJob: a training job from its file to the last weights, over workers that come and go.
 *
 *   PREPARING   reads data and model
 *       │
 *       ▼
 *   PLANNING    a place that fits, newest checkpoint, an epoch that is durable; without workers
 *       │  ▲    looks again
 *       │  ▲
 *       ▼  │ a rank or its worker failed, for a while
 *   LOADING     all ranks get their data and state
 *       │  ▲
 *       ▼  │ the same, by way of PLANNING
 *   RUNNING     steps and checkpoints
 *       │
 *       ▼ all ranks done, curves written
 *     DONE
 *
 * FAILED from anywhere: what cannot be (spec, files, numbers), and 20 epochs without a new step.
 *
 * Every epoch goes on from the newest whole checkpoint, from the first weights if there is none, on
 * whatever workers are usable then; losses and weights do not depend on which (NUMERICS 14-18).
 * Loop thread; files are read and written in the pool. */
#pragma once

#include "coordinator/jobs/jobs.h"
#include "coordinator/train/train_layout_choice.h"
#include "coordinator/train/train_rate.h"
#include "proto/config/job_spec.h"

typedef struct TrainJobOptions { /* borrowed for the job's life */
    Loop *loop;
    Log *log;
    Store *store;
    Random *random;
    WorkPool *pool;
    Members *members;
    Jobs *jobs; /* epochs */
    const char *cluster;
    uint64_t generation;
    bool seal_off;
    const char *state_dir; /* NULL: steps are not kept */
    TrainRate *rates;      /* by NumericsClass: that of this job learns from its steps */
} TrainJobOptions;

typedef struct TrainJobCallbacks {
    void (*say)(const char *line,
                void *user);   /* a JSON object for a step and the end, else words */
    void (*ended)(void *user); /* DONE or FAILED; once, never inside a call */
} TrainJobCallbacks;

typedef struct TrainJob TrainJob;

/* text: of kind train; copied. submitted_us: Unix time. restored: found at the coordinator's start.
 * What is wrong shows as FAILED. Returned. */
TrainJob *train_job_new(const TrainJobOptions *options, const char *text, int64_t submitted_us,
                        bool restored, TrainJobCallbacks callbacks, void *user);
/* Ends its ranks; says nothing more. NULL-safe. */
void train_job_free(TrainJob *job);
/* preparing | planning | loading | running | done | failed */
const char *train_job_state(const TrainJob *job);
/* Why it failed, or what it waits for; NULL: nothing. Borrowed. */
const GError *train_job_problem(const TrainJob *job);
bool train_job_failed(const TrainJob *job);
bool train_job_is_over(const TrainJob *job);
/* What there is to be shown of it; borrowed until the loop turns. */
typedef struct TrainJobView {
    const JobSpec *spec;
    const ModelSpec *model; /* NULL: not yet read */
    const GArray *points;   /* of TrainPoint; NULL: none */
    uint64_t steps;         /* done */
    const Plan *plan;       /* NULL: no epoch runs */
    TrainLayoutChoice layout;
    uint64_t epoch;
    const GPtrArray *calls; /* of TrainCall, by rank */
    const char *checkpoint; /* the newest; NULL: none */
    int64_t entered_us;     /* its state */
    bool any_numerics;      /* of the spec's class nothing is settled yet */
} TrainJobView;
TrainJobView train_job_view(const TrainJob *job);
uint64_t train_job_steps(const TrainJob *job); /* done so far */
/* An SVG picture of its steps so far; returned. */
char *train_job_curves(const TrainJob *job);
/* Removes what is kept of a job that was cancelled, but its checkpoints. */
void train_job_forget(const TrainJobOptions *options, const char *name);
