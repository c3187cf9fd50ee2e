/* TrainJob inside. train_job.c has its life: what is said, data, planning, the end; train_epoch.c
 * the time from the calls of an epoch to its end. Not for others. */
#pragma once

#include "coordinator/train/train_job.h"

#include "coordinator/train/checkpoint.h"
#include "coordinator/train/train_call.h"
#include "coordinator/train/train_input.h"
#include "coordinator/train/train_log.h"
#include "coordinator/train/train_placing.h"
#include "coordinator/train/train_saving.h"
#include "coordinator/train/train_trace.h"
#include "coordinator/train/train_want.h"

#define TRAIN_LOOK_US 500000 /* between two looks at what is waited for */

typedef enum JobState {
    JOB_PREPARING,
    JOB_PLANNING,
    JOB_LOADING,
    JOB_RUNNING,
    JOB_DONE,
    JOB_FAILED
} JobState;

struct TrainJob {
    TrainJobOptions o;
    JobSpec *spec; /* own: the pool reads it, whatever becomes of its submission */
    char *text;
    int64_t submitted_us; /* Unix time */
    TrainJobCallbacks callbacks;
    void *user;
    JobState state;
    GError *problem;
    TrainInput *input;
    TrainLog *log;
    Checkpoint *checkpoint; /* that the epoch went on from; NULL: none */
    char *saved;            /* the newest one's path */
    TrainPlacing *placing;  /* PLANNING: under way; else NULL */
    TrainLayoutChoice layout;
    TrainPace pace;
    Plan *plan;
    uint64_t epoch;
    GPtrArray *calls;    /* of TrainCall, by rank */
    TrainTrace *trace;   /* of the epoch, until it is written; NULL: there is none */
    TrainSaving *saving; /* of the epoch; NULL: no epoch, or no checkpoints */
    LoopTimer *timer;
    uint32_t working, fruitless;
    char definition[33];   /* hex, once the numerics class is settled */
    uint64_t steps_before; /* that were said when the epoch began */
    int64_t entered_us;    /* this state */
    bool dead, may_shrink, started;
    bool any_numerics; /* none was asked, and there was no place yet */
    bool tracing;      /* the trace is being written */
};

/* Work in the pool or the store, and what it makes. */
typedef struct JobTask {
    TrainJob *job;
    TrainLog *log;
    TrainInput *input;
    Checkpoint *checkpoint;
    GPtrArray *damages; /* of char * */
    TrainWant *want;
    TrainTrace *trace;
    uint64_t epoch; /* that asked, like rank */
    uint32_t rank;
    char *path, *text; /* of the curves; said of the trace */
    char *digest;
    GError *error;
} JobTask;

/* ---- train_job.c ---- */

void train_job_say(TrainJob *job, const char *line);
void train_job_sayf(TrainJob *job, const char *format, ...) G_GNUC_PRINTF(2, 3);
void train_job_enter(TrainJob *job, JobState state);
/* Ends it. error: taken. */
void train_job_fail(TrainJob *job, GError *error);
/* Another try, on other workers, cannot mend it. */
bool train_error_is_final(const GError *error);
/* All ranks are done: the curves, then the last line. */
void train_job_finish(TrainJob *job, const char *digest);
/* What runs under the epoch, its timer too. */
void train_job_end_calls(TrainJob *job);
/* PLANNING: looks for a place then. */
void train_job_plan_later(TrainJob *job, int64_t delay_us);
/* Frees what is dead once nothing works for it. */
void train_job_release(TrainJob *job);

JobTask *job_task_new(TrainJob *job);
/* Frees it. True: the job is still there. */
bool job_task_end(JobTask *task);
void job_task_dropped(void *task); /* by a pool that ends */

/* ---- train_epoch.c ---- */

/* Calls the ranks of job->plan under job->epoch, which is durable. */
void train_epoch_begin(TrainJob *job);
