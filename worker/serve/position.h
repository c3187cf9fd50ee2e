/* Position: where a rank stands in its replica and whom it exchanges messages with. Pure. */
#pragma once

#include "proto/plan/plan.h"

#include <stdbool.h>
#include <stdint.h>

/* Global rank numbers count stage by stage. */
typedef struct Position {
    uint32_t stage, rank, n_stages;
    uint32_t tp, tp_next,
        tp_previous; /* ranks of this, the next and the previous stage; 0 where there is none */
    uint32_t base, base_next, base_previous; /* global number of rank 0 of those stages */
} Position;
Position position_of(const Plan *plan, uint32_t replica, uint32_t stage, uint32_t rank);
static inline bool position_leads(const Position *p)
{
    return p->stage == 0 && p->rank == 0;
}
static inline bool position_is_last(const Position *p)
{
    return p->stage + 1 == p->n_stages;
}
static inline bool position_draws(const Position *p)
{
    return position_is_last(p) && p->rank == 0;
}

/* Whether the ranks exchange messages: the tensor group, a receiver of activations and its sender,
 * the leader and who draws. */
bool position_talks_to(const Position *p, uint32_t other_stage, uint32_t other_rank);
uint32_t position_global(const PlanReplica *replica, uint32_t stage, uint32_t rank);
/* The inverse. */
void position_split(const PlanReplica *replica, uint32_t global, uint32_t *stage, uint32_t *rank);
