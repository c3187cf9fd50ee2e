#include "worker/serve/position.h"

Position position_of(const Plan *plan, uint32_t replica, uint32_t stage, uint32_t rank)
{
    const PlanReplica *r = &plan->replicas[replica];
    Position p = {
        .stage = stage, .rank = rank, .n_stages = r->n_stages, .tp = r->stages[stage].n_ranks};
    uint32_t base = 0;
    for (uint32_t s = 0; s < r->n_stages; s++) {
        if (s + 1 == stage) {
            p.base_previous = base;
            p.tp_previous = r->stages[s].n_ranks;
        } else if (s == stage) {
            p.base = base;
        } else if (s == stage + 1) {
            p.base_next = base;
            p.tp_next = r->stages[s].n_ranks;
        }
        base += r->stages[s].n_ranks;
    }
    return p;
}

bool position_talks_to(const Position *p, uint32_t other_stage, uint32_t other_rank)
{
    const bool first_or_last =
        (position_leads(p) && other_stage + 1 == p->n_stages && other_rank == 0) ||
        (position_draws(p) && other_stage == 0 && other_rank == 0);
    if (other_stage == p->stage) {
        return other_rank != p->rank;
    }
    if (other_stage == p->stage + 1) {
        return other_rank % p->tp == p->rank || first_or_last;
    }
    if (other_stage + 1 == p->stage) {
        return p->rank % p->tp_previous == other_rank || first_or_last;
    }
    return first_or_last;
}

uint32_t position_global(const PlanReplica *replica, uint32_t stage, uint32_t rank)
{
    for (uint32_t s = 0; s < stage; s++) {
        rank += replica->stages[s].n_ranks;
    }
    return rank;
}

void position_split(const PlanReplica *replica, uint32_t global, uint32_t *stage, uint32_t *rank)
{
    for (*stage = 0; *stage + 1 < replica->n_stages && global >= replica->stages[*stage].n_ranks;
         (*stage)++) {
        global -= replica->stages[*stage].n_ranks;
    }
    *rank = global;
}
