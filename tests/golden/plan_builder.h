/* Random legal plans and the members to run them on, for tests of plans and of what reads them. */
#pragma once

#include "proto/base/random.h"
#include "proto/plan/plan.h"

/* Members named "w0", "w1", ...: 16 GiB each, every weight type at its file size, all speeds alike.
 * The names live as long as the program. */
void plan_builder_members(PlanMember *members, uint32_t n_members);

/* A plan of dp x pp stages of 1 to tp_limit ranks each, on workers w0, w1, ... in order, cut at
 * random places; empty vocabulary ranges occur. context 64, 2 streams. Needs at most dp x pp x
 * tp_limit members. Measured without members. Returned. */
Plan *plan_builder_random(Random *random, const ModelSpec *spec, uint32_t dp, uint32_t pp,
                          uint32_t tp_limit);
/* All stages with exactly tp ranks, cut evenly. */
Plan *plan_builder_even(const ModelSpec *spec, uint32_t dp, uint32_t pp, uint32_t tp);
