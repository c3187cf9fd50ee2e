/* TrainWorkers: the workers that a training job may run on now, in the order of their ranks. */
#pragma once

#include "coordinator/members.h"
#include "coordinator/train/train_layout_choice.h"
#include "proto/plan/plan.h"

typedef struct TrainWorkers {
    GPtrArray *members; /* of Member, borrowed: not kept over a turn of the loop */
    uint64_t least_memory;
} TrainWorkers;

/* Attached, not draining, with a channel. */
TrainWorkers train_workers_usable(Members *members);
void train_workers_clear(TrainWorkers *w);
/* The plan of a layout, its ranks named after the first of the workers, of which there are enough.
 * IMPOSSIBLE, INVALID: what the model does not allow, and what it does. Returned. */
Plan *train_workers_plan(const TrainWorkers *w, const TrainLayoutChoice *layout,
                         const ModelSpec *model, const char *job, GError **error);
