/* One try: a given dp x pp x tp on members in a given order, cut by speed and fitted to memory. */
#pragma once

#include "coordinator/planner/cut.h"
#include "coordinator/planner/planner.h"

typedef struct Layout {
    uint32_t dp, pp, tp;
} Layout;

typedef struct Task {
    const ModelSpec *spec;
    const PlanMember *members; /* all of them, for plan_check() */
    uint32_t n_members;
    const PlanWish *wish; /* dp, pp, tp are not read; max_rows is filled in */
    uint32_t context;
    const char *kind; /* class exact: whose bits the plan's are (Definition.exact_kind) */
    /* layout_task_init() */
    SubtreeTable attn, ffn;                   /* of the model's units */
    double attn_bytes, ffn_bytes, head_bytes; /* file bytes of a layer's two parts, in the mean over
                                                 layers, and of the vocabulary projection */
} Task;
void layout_task_init(Task *task);

/* Replica r takes order[r*pp*tp ...], stage s of it the next tp. Returns a measured plan, legal or
 * not: *missing_bytes is by how much its ranks pass their members' memory in all; when by nothing,
 * the plan is predicted too. Needs dp*pp*tp members, pp <= layers, tp <= plan_tp_limit(). */
Plan *layout_try(const Task *task, Layout layout, const PlanMember *const *order,
                 uint64_t *missing_bytes);

/* For explanations: a tried plan with replica 0's units cut by measured speed alone; NULL if its
 * ranks' memory would not do. Returned, plan_free(). */
Plan *layout_by_speed(const Task *task, const Plan *plan);
