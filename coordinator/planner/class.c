/* The class of a plan for which none was asked: that of where it computes (numerics_by_place()).
 * Class fast takes all that computes, so its search comes first; a plan of it without a device is
 * planned again as the exact one that it ought to be. */
#include "coordinator/planner/class.h"
#include "coordinator/planner/pool.h"

typedef struct Refusal {
    GPtrArray *violations, *alternatives;
    GError *error;
} Refusal;

static void refusal_clear(Refusal *r)
{
    g_clear_pointer(&r->violations, g_ptr_array_unref);
    g_clear_pointer(&r->alternatives, g_ptr_array_unref);
    g_clear_error(&r->error);
}

typedef struct Members {
    const ModelSpec *spec;
    const PlanMember *members;
    uint32_t n;
} Members;

static Plan *plan_of(const Members *m, const PlanWish *wish, Refusal *why)
{
    return planner_plan_class(m->spec, m->members, m->n, wish, &why->violations, &why->alternatives,
                              &why->error);
}

static bool may_use_device(const Members *m, const PlanWish *wish)
{
    for (uint32_t i = 0; i < m->n; i++) {
        if (m->members[i].device != NULL &&
            planner_refusal(&m->members[i], m->spec, wish) == NULL) {
            return true;
        }
    }
    return false;
}

static bool stage_uses_device(const Members *m, const PlanStage *stage)
{
    for (uint32_t k = 0; k < stage->n_ranks; k++) {
        const PlanRank *rank = &stage->ranks[k];
        const PlanMember *member = plan_member_find(m->members, m->n, rank->worker, rank->device);
        if (member != NULL && member->device != NULL) {
            return true;
        }
    }
    return false;
}

static bool uses_device(const Members *m, const Plan *plan)
{
    for (uint32_t r = 0; r < plan->n_replicas; r++) {
        for (uint32_t s = 0; s < plan->replicas[r].n_stages; s++) {
            if (stage_uses_device(m, &plan->replicas[r].stages[s])) {
                return true;
            }
        }
    }
    return false;
}

static void explain_class(const Members *m, Plan *plan)
{
    const char *text = plan->definition.numerics == NUMERICS_FAST
                           ? "numerics fast: so it is on GPUs unless --numerics exact is asked"
                       : uses_device(m, plan)
                           ? "numerics exact: these GPUs offer no other class"
                           : "numerics exact: so it is on hosts' cores unless --numerics fast "
                             "is asked";
    g_ptr_array_add(plan->reasons, g_strdup(text));
}

/* *why: where neither class has a plan, why fast has none if devices could take part in it, else
 * why exact has none. */
static Plan *plan_by_place(const Members *m, const PlanWish *wish, Refusal *why)
{
    PlanWish fast = *wish, exact = *wish;
    Refusal why_fast = {0};
    fast.numerics = NUMERICS_FAST;
    exact.numerics = NUMERICS_EXACT;
    Plan *plan = may_use_device(m, &fast) ? plan_of(m, &fast, &why_fast) : NULL;
    if (plan != NULL && numerics_by_place(uses_device(m, plan)) == NUMERICS_FAST) {
        *why = why_fast;
        return plan;
    }
    exact.exact_kind = plan != NULL ? "" : NULL; /* found: hosts' cores serve faster */
    plan_free(plan);
    plan = plan_of(m, &exact, why);
    if (plan == NULL && why_fast.error != NULL) {
        refusal_clear(why);
        *why = why_fast;
    } else {
        refusal_clear(&why_fast);
    }
    return plan;
}

Plan *planner_plan(const ModelSpec *spec, const PlanMember *members, uint32_t n_members,
                   const PlanWish *wish, GPtrArray **violations, GPtrArray **alternatives,
                   GError **error)
{
    const Members m = {spec, members, n_members};
    Refusal why = {0};
    Plan *plan = wish->any_numerics ? plan_by_place(&m, wish, &why) : plan_of(&m, wish, &why);
    if (plan == NULL) {
        g_propagate_error(error, g_steal_pointer(&why.error));
    } else if (wish->any_numerics) {
        explain_class(&m, plan);
    }
    if (violations != NULL) {
        *violations = g_steal_pointer(&why.violations);
    }
    if (alternatives != NULL) {
        *alternatives = g_steal_pointer(&why.alternatives);
    }
    refusal_clear(&why);
    return plan;
}
