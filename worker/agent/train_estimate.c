#include "worker/agent/train_estimate.h"

#include "kernels/device/use.h"
#include "proto/base/error.h"
#include "proto/model/model_message.h"
#include "proto/plan/device_memory.h"
#include "proto/plan/plan_message.h"
#include "proto/plan/train_layout.h"
#include "worker/agent/train_settings.h"

typedef struct Estimate {
    RpcCall *call;
    ModelSpec *spec;
    Plan *plan;
    TrainWork work;
    PipelineTimes times;
    uint32_t n_ranks, *threads;
    const DeviceTrainOps *device; /* of this worker; NULL: it has none */
    bool *on_device;              /* [n_ranks] */
    TrainMemory *memory;          /* [n_ranks] */
    uint64_t process_bytes;
    PlanMember seen;       /* of it what this worker's device was seen to hold */
    uint64_t beside_bytes; /* of a rank on a device, what that holds beside what is counted */
    PipelineCost cost;
    uint32_t micro_batches; /* of the replica that has most */
    GError *error;
} Estimate;

static void estimate_free(Estimate *e)
{
    rpc_call_unref(e->call);
    plan_free(e->plan);
    model_spec_free(e->spec);
    g_clear_error(&e->error);
    g_free(e->threads);
    g_free(e->on_device);
    g_free(e->memory);
    g_free(e);
}

/* Documents' bounds are there; nobody reads them. */
static void no_begins(void *user, uint64_t sample, uint32_t *out) {}

static void estimate_run(void *user)
{
    Estimate *e = user;
    const SampleSource source = {.length = e->work.length,
                                 .begins = e->work.bounds != BOUNDS_NONE ? no_begins : NULL};
    TrainPosition at;
    for (uint32_t g = 0; g < e->n_ranks; g++) {
        train_plan_rank(e->plan, g, &at);
        TrainRankOptions options =
            train_work_options(&e->work, e->spec, e->plan, at.replica, at.stage, at.rank);
        options.source = &source;
        options.plan_ops = e->on_device[g] ? e->device : NULL;
        if (!train_memory_plan(&options, e->threads[g], &e->memory[g], &e->error)) {
            return;
        }
        e->micro_batches = MAX(e->micro_batches, train_micro_batches_plan(&options));
    }
    g_autoptr(Pipeline) pipeline =
        pipeline_new(e->work.schedule, at.pp, at.chunks, e->micro_batches);
    e->cost = pipeline_simulate(pipeline, &e->times);
}

static void estimate_done(void *user)
{
    Estimate *e = user;
    if (e->error != NULL) {
        rpc_call_finish(e->call, e->error);
        estimate_free(e);
        return;
    }
    g_autofree Weft__V1__TrainMemory *ranks = g_new(Weft__V1__TrainMemory, e->n_ranks);
    g_autofree Weft__V1__TrainMemory **pointers = g_new(Weft__V1__TrainMemory *, e->n_ranks);
    for (uint32_t g = 0; g < e->n_ranks; g++) {
        weft__v1__train_memory__init(&ranks[g]);
        ranks[g].weights = e->memory[g].weights;
        ranks[g].gradients = e->memory[g].gradients;
        ranks[g].optimizer = e->memory[g].optimizer;
        ranks[g].activations = e->memory[g].activations;
        ranks[g].host = e->memory[g].host;
        ranks[g].buffers = e->memory[g].buffers;
        ranks[g].process = e->on_device[g] ? e->beside_bytes : e->process_bytes;
        pointers[g] = &ranks[g];
    }
    Weft__V1__TrainEstimate answer = WEFT__V1__TRAIN_ESTIMATE__INIT;
    answer.ranks = pointers;
    answer.n_ranks = e->n_ranks;
    answer.makespan_s = e->cost.makespan;
    answer.bubble_s = e->cost.bubble;
    answer.micro_batches = e->micro_batches;
    rpc_call_reply(e->call, &answer.base);
    estimate_free(e);
}

static bool is_time(double s)
{
    return s >= 0 && s <= 1e9;
}

/* A rank may be in a team of its stage's tensor ranks and in one of its part's replicas. */
static uint64_t beside(const Estimate *e, const TrainPosition *all)
{
    const uint64_t alone = device_beside_bytes(&e->seen, false),
                   team = device_beside_bytes(&e->seen, true) - alone;
    return alone + team * ((all->tp > 1) + (all->dp > 1));
}

static bool fill(Estimate *e, const Weft__V1__TrainEstimateRequest *r, GError **error)
{
    const Weft__V1__TrainLoad *load = r->load;
    if (load == NULL || load->plan == NULL || load->model == NULL || load->settings == NULL ||
        !is_time(r->forward_s) || !is_time(r->backward_s) || !is_time(r->weights_s) ||
        !is_time(r->transfer_s)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                    "estimate: plan, model or settings are missing, or a time is none");
        return false;
    }
    e->times = (PipelineTimes){r->forward_s, r->backward_s, r->weights_s, r->transfer_s};
    e->spec = model_from_message(load->model, error);
    e->plan = e->spec != NULL ? plan_from_message(load->plan, error) : NULL;
    if (e->plan == NULL || !train_plan_check(e->plan, e->spec, error) ||
        !train_settings_read(load->settings, e->spec, &e->work, error)) {
        return false;
    }
    const TrainPosition all = train_position(e->plan, 0, 0, 0);
    e->n_ranks = train_world(&all);
    e->memory = g_new0(TrainMemory, e->n_ranks);
    e->threads = g_new0(uint32_t, e->n_ranks);
    e->on_device = g_new0(bool, e->n_ranks);
    for (uint32_t g = 0; g < e->n_ranks; g++) {
        e->threads[g] = g < r->n_threads ? CLAMP(r->threads[g], 1, 1024) : 1;
        e->on_device[g] = g < r->n_on_device && r->on_device[g];
        if (e->on_device[g] && e->device == NULL) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                        "estimate: a rank on a device, and this worker has none");
            return false;
        }
    }
    e->beside_bytes = beside(e, &all);
    e->work.sample = (TextWish){.n_tokens = 0}; /* it borrows the message */
    return true;
}

void train_estimate_answer(TaskPool *pool, const Device *device, uint64_t process_bytes,
                           RpcCall *call, const Weft__V1__TrainEstimateRequest *request)
{
    Estimate *e = g_new0(Estimate, 1);
    g_autoptr(GError) error = NULL;
    e->call = rpc_call_ref(call);
    e->device = device != NULL ? device->train_ops : NULL;
    e->process_bytes = process_bytes;
    if (device != NULL && device->use != NULL) {
        e->seen.device_rank_bytes = atomic_load(&device->use->rank);
        e->seen.device_group_bytes = atomic_load(&device->use->group);
    }
    if (fill(e, request, &error)) {
        task_pool_run(pool, estimate_run, estimate_done, e);
    } else {
        rpc_call_finish(call, error);
        estimate_free(e);
    }
}
