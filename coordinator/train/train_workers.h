/* TrainWorkers: the workers that a training job may run on now, in the order of their ranks. */
#pragma once

#include "coordinator/members.h"
#include "coordinator/train/train_layout_choice.h"
#include "proto/plan/plan.h"

typedef struct TrainWorkers {
    GPtrArray *members; /* of Member, borrowed: not kept over a turn of the loop */
    uint64_t least_memory;
    uint32_t n_left_out; /* usable, but of another numerics class */
    NumericsClass numerics;
} TrainWorkers;

/* Attached, not draining, with a channel, and offering the class: devices offer fast alone. */
TrainWorkers train_workers_usable(Members *members, NumericsClass numerics);
/* What is to be done about those left out, added to an error; static, empty if there are none. */
const char *train_workers_advice(const TrainWorkers *w);
/* Whether a worker computes on a device. */
bool train_worker_on_device(const Member *member);
void train_workers_clear(TrainWorkers *w);
/* The plan of a layout, its ranks named after the first of the workers, of which there are enough.
 * IMPOSSIBLE, INVALID: what the model does not allow, and what it does. Returned. */
Plan *train_workers_plan(const TrainWorkers *w, const TrainLayoutChoice *layout,
                         const ModelSpec *model, const char *job, GError **error);
