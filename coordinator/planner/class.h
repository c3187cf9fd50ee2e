/* What planner.c does for class.c: a plan of a class that is given. */
#pragma once

#include "coordinator/planner/planner.h"

/* planner_plan() of wish->numerics, whether or not a class was asked. */
Plan *planner_plan_class(const ModelSpec *spec, const PlanMember *members, uint32_t n_members,
                         const PlanWish *wish, GPtrArray **violations, GPtrArray **alternatives,
                         GError **error);
