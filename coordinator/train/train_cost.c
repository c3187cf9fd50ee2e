#include "coordinator/train/train_cost.h"

#include "coordinator/planner/cost.h"
#include "proto/plan/train_layout.h"

#define FLOAT_BYTES 4.0
#define UPDATE_BYTES                                                                               \
    (7 * FLOAT_BYTES) /* an element: gradient, two moments, weight, read and written */

/* Of one layer, or of the head (layer -1). */
static uint64_t matrix_elements(const ModelSpec *model, int32_t layer)
{
    uint64_t n = 0;
    for (uint32_t i = 0; i < model->n_tensors; i++) {
        const TensorSpec *t = &model->tensors[i];
        const bool is_head =
            t->role == ROLE_OUTPUT || (t->role == ROLE_TOKEN_EMBD && model->tied_output);
        if (t->layer == layer && t->rows > 1 && (layer >= 0 || is_head)) {
            n += (uint64_t)t->rows * t->columns;
        }
    }
    return n;
}

/* Of a forward pass over one token: products, and attention over the half of the keys that a
 * causal mask leaves. */
static double layer_flops(const ModelSpec *model, uint32_t length)
{
    const double keys = (double)(length + 1) / 2;
    return 2.0 * (double)matrix_elements(model, 0) +
           4.0 * keys * (double)model->n_heads * model->head_size;
}

static double head_flops(const ModelSpec *model)
{
    return 2.0 * (double)matrix_elements(model, -1);
}

double train_flops_per_token(const ModelSpec *model, uint32_t length)
{
    return 3.0 * (model->n_layers * layer_flops(model, length) + head_flops(model));
}

/* A micro-batch forward through one stage, in its slowest rank. */
static double stage_forward_s(const JobSpec *job, const ModelSpec *model, double rows,
                              const PlanStage *stage, uint32_t n_layers, bool has_head,
                              const PlanMember *const *members, const double *crowding,
                              double efficiency)
{
    const double flops = rows * (n_layers * layer_flops(model, (uint32_t)job->length) +
                                 (has_head ? head_flops(model) : 0));
    double slowest = 0, latency, bytes_per_s;
    for (uint32_t r = 0; r < stage->n_ranks; r++) {
        const double share = (double)stage->ranks[r].ffn_count / model->n_ffn_units,
                     speed = speed_shared(speed_of(members[r]), crowding[r]).f32_ops_per_s;
        slowest = MAX(slowest, flops * share / (speed * efficiency));
    }
    if (stage->n_ranks > 1) { /* two sums a layer */
        const double width_bytes = rows * model->width * FLOAT_BYTES,
                     part = 2.0 * (stage->n_ranks - 1) / stage->n_ranks;
        link_of(members, stage->n_ranks, &latency, &bytes_per_s);
        slowest += n_layers * 2 * (part * width_bytes / bytes_per_s + latency);
    }
    return slowest;
}

static uint32_t layers_of(const ModelSpec *model, const PlanReplica *replica, uint32_t stage,
                          const TrainLayoutChoice *layout)
{
    return layout->chunks > 1
               ? model->n_layers / layout->pp
               : replica->stages[stage].layer_last - replica->stages[stage].layer_first + 1;
}

/* The data exchange of the rank with most, and its update: gradients to owners, weights back. */
static void step_ends(const ModelSpec *model, const TrainLayoutChoice *layout, bool zero,
                      const PlanMember *const *members, const double *crowding, TrainCost *out)
{
    const double elements = (double)model_spec_parameters(model) / (layout->pp * layout->tp),
                 others = (double)(layout->dp - 1) / layout->dp;
    const uint32_t n = layout->dp * layout->pp * layout->tp;
    double latency, bytes_per_s, slowest = 0;
    link_of(members, n, &latency, &bytes_per_s);
    out->exchange_s =
        layout->dp > 1 ? 2 * (others * elements * FLOAT_BYTES / bytes_per_s + latency) : 0;
    for (uint32_t g = 0; g < n; g++) {
        const double read = speed_shared(speed_of(members[g]), crowding[g]).read_bytes_per_s;
        slowest = MAX(slowest, elements / (zero ? layout->dp : 1) * UPDATE_BYTES / read);
    }
    out->update_s = slowest;
}

TrainCost train_cost(const JobSpec *job, const ModelSpec *model, const TrainLayoutChoice *layout,
                     const Plan *plan, const PlanMember *const *members, double efficiency)
{
    const uint32_t n = layout->dp * layout->pp * layout->tp;
    const double rows = (double)layout->micro_sequences * (double)job->length;
    const bool apart = layout->schedule == JOB_SCHEDULE_ZERO_BUBBLE,
               again = job->layout.recompute == JOB_RECOMPUTE_FULL;
    g_autofree double *crowding = g_new(double, n);
    double latency, bytes_per_s;
    TrainCost c = {.efficiency = efficiency,
                   .flops = (double)(job->sequences * job->length) *
                            train_flops_per_token(model, (uint32_t)job->length)};
    crowding_of(members, n, crowding);
    for (uint32_t g = 0; g < n; g += layout->tp) {
        TrainPosition at;
        train_plan_rank(plan, g, &at);
        const PlanReplica *replica = &plan->replicas[at.replica];
        const double s =
            stage_forward_s(job, model, rows, &replica->stages[at.stage],
                            layers_of(model, replica, at.stage, layout), at.stage + 1 == layout->pp,
                            members + g, crowding + g, efficiency);
        c.forward_s = MAX(c.forward_s, s);
    }
    c.backward_s = c.forward_s * ((apart ? 1 : 2) + (again ? 1 : 0));
    c.weights_s = apart ? c.forward_s : 0;
    link_of(members, n, &latency, &bytes_per_s);
    c.transfer_s = layout->pp > 1 ? latency + rows * model->width * FLOAT_BYTES / bytes_per_s : 0;
    step_ends(model, layout, job->layout.zero != 0, members, crowding, &c);
    return c;
}
