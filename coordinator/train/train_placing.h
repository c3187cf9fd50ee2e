/* TrainPlacing: where a training job would run now: its layout over the workers at hand, what each
 * rank would hold, and how long a step would take. Memory and the schedule's time are the runtime's
 * own numbers, asked of one of the workers (Trainer.Estimate); where the job leaves the number of
 * stages open, the fewest that fit are asked for one after another.
 *
 * Where there are devices, the job's ranks are on them alone, as long as its layout and its memory
 * allow that; else hosts' cores take part.
 *
 *   layout of the fewest stages ──▶ cost ──▶ Estimate ──▶ fits, or no more stages ──▶ told
 *          ▲                                     │
 *          └────────── one stage more ◀──────────┘ some worker would hold too much
 *
 * If none fits, legal layouts are asked for in the same way: `layout: auto` takes the first that
 * does, else who is told of it hears them. Where `layout: auto` has stages, zero-bubble is asked
 * for too, and taken if its step is 5 % shorter.
 *
 * Loop thread. */
#pragma once

#include "coordinator/jobs/jobs.h"
#include "coordinator/train/train_cost.h"
#include "coordinator/train/train_input.h"
#include "coordinator/train/train_rate.h"
#include "proto/plan/plan.h"
#include "weft/v1/train.pb-c.h"

typedef struct TrainPlacingOptions { /* borrowed for its life */
    Members *members;
    Jobs *jobs;
    const JobSpec *spec; /* its class is settled: train_workers_class() */
    const TrainInput *input;
    const TrainRate *rate;
    bool shrink; /* the spec's layout may be undercut; then no other layouts are looked for */
} TrainPlacingOptions;

/* Valid while the placing is, from `done` on. */
typedef struct TrainPlace {
    TrainLayoutChoice layout;
    Plan *plan;
    uint32_t n_ranks, n_workers;       /* seats that were usable: devices, workers' cores */
    uint32_t n_on_device;              /* ranks that compute on a device */
    TrainCost cost;                    /* by the rate as it was known */
    Weft__V1__TrainEstimate *estimate; /* of n_ranks */
    uint64_t limits[PLAN_RANKS_LIMIT]; /* memory of each rank's worker, bytes */
    double step_s;                     /* predicted */
    GPtrArray *too_large; /* of char *: who would hold more than it has; none: it fits */
    GPtrArray *fitting;   /* of char *, "{dp: 1, pp: 2, tp: 1}": layouts that would fit instead;
                             NULL: not looked for */
} TrainPlace;

typedef struct TrainPlacing TrainPlacing;
/* error NULL: there is a place. NOT_READY: no worker is usable; IMPOSSIBLE, INVALID: no legal
 * layout; either tells of workers that the numerics class leaves out. Else why a worker did not
 * answer. Once, perhaps inside train_placing_new(); the placing may be freed inside. */
typedef void (*TrainPlaced)(TrainPlacing *p, const GError *error, void *user);

void train_placing_new(const TrainPlacingOptions *options, TrainPlacing **out, TrainPlaced done,
                       void *user); /* *out is set before `done` */
/* IMPOSSIBLE: who would hold too much, and what would fit; NULL: nobody. Returned. */
GError *train_place_error(const TrainPlace *place);
const TrainPlace *train_placing_place(const TrainPlacing *p);
Plan *train_placing_take_plan(TrainPlacing *p); /* returned */
void train_placing_free(TrainPlacing *p);       /* what is asked is cancelled; NULL-safe */
