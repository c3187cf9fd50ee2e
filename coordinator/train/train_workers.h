/* TrainWorkers: the seats that a training job may run on now, in the order of its ranks: a worker's
 * devices, one after another, or its cores. Those on devices come first. */
#pragma once

#include "coordinator/members.h"
#include "coordinator/train/train_layout_choice.h"
#include "proto/plan/plan.h"

typedef struct TrainSeat {
    const Member *member; /* borrowed: not kept over a turn of the loop */
    uint32_t device;      /* PlanRank.device */
    bool on_device;
    uint64_t memory_bytes;
} TrainSeat;

typedef struct TrainWorkers {
    GArray *seats; /* of TrainSeat */
    uint64_t least_memory;
    uint32_t n_on_device;
    uint32_t n_left_out; /* workers: usable, but not by this class with this precision */
    NumericsClass numerics;
    uint32_t precision;
} TrainWorkers;

/* Of workers that are attached, not draining, with a channel, and offer the class: exact on devices
 * those that give hosts' bits with products of the JobPrecision. */
TrainWorkers train_workers_usable(Members *members, NumericsClass numerics, uint32_t precision);
/* The class of a job that asked for none: of where it would run now (numerics_by_place()). */
NumericsClass train_workers_class(Members *members);
/* Hosts' cores are left out: a step waits for its slowest rank. There are devices. */
void train_workers_keep_devices(TrainWorkers *w);
/* What is to be done about those left out, added to an error; static, empty if there are none. */
const char *train_workers_advice(const TrainWorkers *w);
void train_workers_clear(TrainWorkers *w);
/* The plan of a layout, its ranks on the first of the seats, of which there are enough.
 * IMPOSSIBLE, INVALID: what the model does not allow, and what it does. Returned. */
Plan *train_workers_plan(const TrainWorkers *w, const TrainLayoutChoice *layout,
                         const ModelSpec *model, const char *job, GError **error);
