/* Why a plan is what it is, for people. */
#pragma once

#include "coordinator/planner/layout.h"

/* Adds its sentences to plan->reasons: the layout and who stays idle, devices, cuts, memory,
 * sealing. The plan is one that layout_try() gave for the task. */
void explain(Plan *plan, const Task *task, const PlanWish *wish);
