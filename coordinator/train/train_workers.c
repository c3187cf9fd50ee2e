#include "coordinator/train/train_workers.h"

#include "proto/plan/train_layout.h"

static void add_seat(TrainWorkers *w, const Member *member, uint32_t device, uint64_t memory_bytes)
{
    const TrainSeat seat = {member, device, member_hello(member)->n_devices > 0, memory_bytes};
    if (w->seats->len < PLAN_RANKS_LIMIT) {
        w->n_on_device += seat.on_device;
        w->least_memory = MIN(w->least_memory, memory_bytes);
        g_array_append_val(w->seats, seat);
    }
}

static bool offers(const Weft__V1__Hello *hello, const TrainWorkers *w)
{
    bool exact = true; /* on all of its devices */
    for (size_t i = 0; i < hello->n_devices; i++) {
        exact = exact && (hello->devices[i]->exact_training >> w->precision & 1u) != 0;
    }
    return (hello->numerics_classes >> (uint32_t)w->numerics & 1u) != 0 &&
           (w->numerics == NUMERICS_FAST || exact);
}

static bool is_there(const Member *member)
{
    return member_hello(member) != NULL && member_usable(member) && member_channel(member) != NULL;
}

static void add_devices(Member *member, void *user)
{
    TrainWorkers *w = user;
    if (!is_there(member)) {
        return;
    }
    const Weft__V1__Hello *hello = member_hello(member);
    if (!offers(hello, w)) {
        w->n_left_out++;
        return;
    }
    for (size_t i = 0; i < MIN(hello->n_devices, PLAN_RANKS_LIMIT); i++) {
        const uint64_t budget = hello->devices[i]->budget_bytes;
        add_seat(w, member, (uint32_t)i, budget != 0 ? budget : hello->memory_bytes);
    }
}

static void add_cores(Member *member, void *user)
{
    TrainWorkers *w = user;
    if (is_there(member) && member_hello(member)->n_devices == 0 &&
        offers(member_hello(member), w)) {
        add_seat(w, member, 0, member_hello(member)->memory_bytes);
    }
}

TrainWorkers train_workers_usable(Members *members, NumericsClass numerics, uint32_t precision)
{
    TrainWorkers w = {.seats = g_array_new(FALSE, FALSE, sizeof(TrainSeat)),
                      .least_memory = UINT64_MAX,
                      .numerics = numerics,
                      .precision = precision};
    members_each(members, add_devices, &w);
    members_each(members, add_cores, &w);
    return w;
}

NumericsClass train_workers_class(Members *members)
{
    TrainWorkers fast = train_workers_usable(members, NUMERICS_FAST, JOB_F32);
    const NumericsClass numerics = numerics_by_place(fast.n_on_device > 0);
    train_workers_clear(&fast);
    return numerics;
}

void train_workers_keep_devices(TrainWorkers *w)
{
    g_array_set_size(w->seats, w->n_on_device);
    w->least_memory = UINT64_MAX;
    for (guint i = 0; i < w->seats->len; i++) {
        w->least_memory = MIN(w->least_memory, g_array_index(w->seats, TrainSeat, i).memory_bytes);
    }
}

const char *train_workers_advice(const TrainWorkers *w)
{
    return w->n_left_out == 0 ? ""
           : w->numerics == NUMERICS_FAST
               ? " (workers that offer numerics exact only are left out)"
           : w->precision == JOB_F32
               ? " (workers that train by numerics fast only are left out: say numerics: fast)"
               : " (workers that train by numerics fast only with this precision are left out: say "
                 "numerics: fast, or precision: f32)";
}

void train_workers_clear(TrainWorkers *w)
{
    g_clear_pointer(&w->seats, g_array_unref);
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
        const TrainSeat *seat = &g_array_index(w->seats, TrainSeat, g);
        PlanRank *rank = train_plan_rank(plan, g, &at);
        g_free(rank->worker);
        rank->worker = g_strdup(member_name(seat->member));
        rank->device = seat->device;
    }
    if (plan != NULL) {
        g_free(plan->job);
        plan->job = g_strdup(job);
    }
    return plan;
}
