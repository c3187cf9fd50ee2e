/* TrainCost: how long a training step takes, from measured speeds of the members and counts of
 * operations and bytes (FORMULAS 7, 9, 17); the schedule's own time is the runtime's word
 * (Trainer.Estimate). Pure. */
#pragma once

#include "coordinator/train/train_layout_choice.h"
#include "proto/plan/plan.h"

typedef struct TrainCost {
    double efficiency;                                   /* of measured f32 rates (train_rate.h) */
    double flops;                                        /* of a step, all ranks together */
    double forward_s, backward_s, weights_s, transfer_s; /* of a micro-batch in the slowest stage */
    double exchange_s, update_s;                         /* of a step */
} TrainCost;

/* members: of every rank, by number, [dp x pp x tp]. */
TrainCost train_cost(const JobSpec *job, const ModelSpec *model, const TrainLayoutChoice *layout,
                     const Plan *plan, const PlanMember *const *members, double efficiency);
/* Multiply-adds x 2 of a forward and backward pass over one token, recomputation not counted: what
 * MFU is held to. */
double train_flops_per_token(const ModelSpec *model, uint32_t length);
