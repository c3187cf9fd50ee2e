/* Layout: dp x pp x tp ranks of a training job as a Plan, and where each stands. Every replica has
 * the same stages and every stage as many ranks. Pure. */
#pragma once

#include "proto/plan/plan.h"

typedef struct TrainPosition {
    uint32_t dp, pp, tp;           /* of the layout */
    uint32_t chunks;               /* of layers, of every stage */
    uint32_t replica, stage, rank; /* of this rank */
} TrainPosition;

/* Ranks are numbered replica by replica, stage by stage. */
static inline uint32_t train_global(const TrainPosition *p, uint32_t replica, uint32_t stage,
                                    uint32_t rank)
{
    return (replica * p->pp + stage) * p->tp + rank;
}
static inline uint32_t train_world(const TrainPosition *p)
{
    return p->dp * p->pp * p->tp;
}

/* Even cuts of layers, units and vocabulary chunks; workers are named rank-0, rank-1, ... INVALID
 * says what is too much and what is legal. Returned. */
Plan *train_plan_new(const ModelSpec *spec, uint32_t dp, uint32_t pp, uint32_t tp, GError **error);
/* Cuts the layers of a plan of two or more stages anew, into `chunks` for each stage (PlanStage),
 * for an interleaved schedule. INVALID: fewer layers or stages than that takes. */
bool train_plan_interleave(Plan *plan, const ModelSpec *spec, uint32_t chunks, GError **error);
/* INVALID where the plan is not one that training can run: the layers are not covered in order, or
 * stages, cuts or counts of ranks differ between replicas, counts of ranks or chunks between
 * stages, or the vocabulary's cut of a tied model between its first and last stage. */
bool train_plan_check(const Plan *plan, const ModelSpec *spec, GError **error);
/* The rank of number `global` (train_global()), and where it stands; borrowed. */
PlanRank *train_plan_rank(const Plan *plan, uint32_t global, TrainPosition *at);
TrainPosition train_position(const Plan *plan, uint32_t replica, uint32_t stage, uint32_t rank);
