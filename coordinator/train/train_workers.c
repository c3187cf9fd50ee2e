#include "coordinator/train/train_workers.h"

#include "proto/plan/train_layout.h"

static void add_usable(Member *member, void *user)
{
    TrainWorkers *w = user;
    const Weft__V1__Hello *hello = member_hello(member);
    if (hello == NULL || !member_usable(member) || member_channel(member) == NULL) {
        return;
    }
    if ((hello->numerics_classes >> (uint32_t)w->numerics & 1u) == 0 ||
        (w->numerics == NUMERICS_EXACT && hello->n_devices > 0)) {
        w->n_left_out++;
    } else {
        g_ptr_array_add(w->members, member);
        w->least_memory = MIN(w->least_memory, hello->memory_bytes);
    }
}

TrainWorkers train_workers_usable(Members *members, NumericsClass numerics)
{
    TrainWorkers w = {g_ptr_array_new(), UINT64_MAX, 0, numerics};
    members_each(members, add_usable, &w);
    return w;
}

const char *train_workers_advice(const TrainWorkers *w)
{
    return w->n_left_out == 0 ? ""
           : w->numerics == NUMERICS_EXACT
               ? " (workers that offer numerics fast only, as training on devices does, are left "
                 "out: say numerics: fast)"
               : " (workers that offer numerics exact only are left out)";
}

bool train_worker_on_device(const Member *member)
{
    const Weft__V1__Hello *hello = member_hello(member);
    return hello != NULL && hello->n_devices > 0;
}

void train_workers_clear(TrainWorkers *w)
{
    g_clear_pointer(&w->members, g_ptr_array_unref);
}

Plan *train_workers_plan(const TrainWorkers *w, const TrainLayoutChoice *layout,
                         const ModelSpec *model, const char *job, GError **error)
{
    Plan *plan = train_plan_new(model, layout->dp, layout->pp, layout->tp, error);
    TrainPosition at;
    if (plan != NULL && layout->chunks > 1 &&
        !train_plan_interleave(plan, model, layout->chunks, error)) {
        plan_free(g_steal_pointer(&plan));
    }
    for (uint32_t g = 0; plan != NULL && g < layout->dp * layout->pp * layout->tp; g++) {
        PlanRank *rank = train_plan_rank(plan, g, &at);
        g_free(rank->worker);
        rank->worker = g_strdup(member_name(w->members->pdata[g]));
    }
    if (plan != NULL) {
        g_free(plan->job);
        plan->job = g_strdup(job);
    }
    return plan;
}
