/* Load: from a request to an open engine.
 *
 *   check ─► wait until whatever is closing is gone ─┬─► the shelf has the part ──────────────┐
 *                                                    └─► map (pool) ┬─► its image is there ───┤
 *                                                                   └─► fetch (pool, network) ┤
 *                            LOADED ◄─ open engine (pool) ◄───────────────────────────────────┘
 *
 * A request of the same epoch joins the load that runs, or is answered at once; one of a failed
 * load begins it again. */
#include "worker/agent/deployment.h"

#include "kernels/device/ops.h"

#include "proto/base/error.h"
#include "proto/base/units.h"
#include "proto/base/version.h"
#include "proto/model/model_message.h"
#include "proto/plan/cpu_share.h"
#include "proto/plan/plan_message.h"
#include "transport/crypto/keys.h"

#include <malloc.h>
#include <string.h>

/* ---- checks ---- */

/* Where this worker's own rank computes, and whose exact bits it gives. */
static void imagine_place(const Deployments *table, PlanMember *m)
{
    const Device *device = deployments_device(table, m->device_index);
    m->device = device != NULL ? device->info.name : NULL;
    m->exact_kind = device != NULL ? device->info.exact_kind : NULL;
}

/* Members as plan_check() wants them: of the others we know nothing, so nothing is held against
 * them. */
static GArray *imagined_members(const Deployments *table, const Plan *plan)
{
    GArray *members = g_array_new(FALSE, TRUE, sizeof(PlanMember));
    const Kernels *kernels = kernels_get(table->o.isa);
    for (uint32_t p = 0; p < plan->n_replicas; p++) {
        for (uint32_t s = 0; s < plan->replicas[p].n_stages; s++) {
            const PlanStage *stage = &plan->replicas[p].stages[s];
            for (uint32_t r = 0; r < stage->n_ranks; r++) {
                PlanMember m = {.worker = stage->ranks[r].worker,
                                .device_index = stage->ranks[r].device,
                                .memory_bytes = UINT64_MAX,
                                .numerics_version = WEFT_NUMERICS_VERSION,
                                .numerics_classes = table->o.numerics_classes,
                                .threads = 1,
                                .read_bytes_per_s = 1e9,
                                .int8_ops_per_s = 1e9,
                                .f32_ops_per_s = 1e9,
                                .link_latency_s = 1e-5,
                                .link_bytes_per_s = 1e9,
                                .usable = true,
                                .exact_kind = plan->definition.exact_kind};
                if (strcmp(m.worker, table->o.name) == 0) {
                    imagine_place(table, &m);
                }
                for (unsigned type = 0; type < DTYPE_LIMIT; type++) {
                    const bool served = table->o.device
                                            ? table->o.device->ops->has_weight((Dtype)type)
                                            : kernels->matmul[type] != NULL;
                    m.packed_block_bytes[type] = served ? packed_block_bytes((Dtype)type) : 0;
                }
                g_array_append_val(members, m);
            }
        }
    }
    return members;
}

static bool check_plan(const Deployments *table, Plan *plan, const ModelSpec *spec, GError **error)
{
    g_autoptr(GArray) members = imagined_members(table, plan);
    const PlanMember *m = (const PlanMember *)(const void *)members->data;
    plan_measure(plan, spec, m, members->len);
    g_autoptr(GPtrArray) violations = plan_check(plan, spec, m, members->len);
    g_ptr_array_set_free_func(violations, (GDestroyNotify)plan_violation_free);
    if (violations->len > 0) {
        const PlanViolation *first = violations->pdata[0];
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "the plan is refused by worker %s (%u violations): %s", table->o.name,
                    violations->len, first->text);
        return false;
    }
    return true;
}

/* The rank that the request is about is this worker's. */
static bool check_place(const Deployments *table, const Plan *plan, uint32_t replica,
                        uint32_t stage, uint32_t rank, GError **error)
{
    const char *worker = replica < plan->n_replicas && stage < plan->replicas[replica].n_stages &&
                                 rank < plan->replicas[replica].stages[stage].n_ranks
                             ? plan->replicas[replica].stages[stage].ranks[rank].worker
                             : NULL;
    if (!worker || strcmp(worker, table->o.name) != 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                    "replica %u stage %u rank %u of the plan belongs to %s, this is worker %s",
                    replica, stage, rank, worker ? worker : "nobody", table->o.name);
        return false;
    }
    const uint32_t place = plan->replicas[replica].stages[stage].ranks[rank].device;
    if (place > 0 && place >= table->o.n_devices) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                    "replica %u stage %u rank %u is for device %u, worker %s leads %u", replica,
                    stage, rank, place, table->o.name, table->o.n_devices);
        return false;
    }
    return true;
}

/* Whether the rank fits beside what runs already on its device. The shelf gives way. */
static bool check_memory(Deployments *table, uint32_t place, uint64_t need, GError **error)
{
    const uint64_t budget = deployments_budget(table);
    uint64_t used = 0;
    for (guint i = 0; i < table->all->len; i++) {
        const Deployment *d = table->all->pdata[i];
        const bool counts = d->state != DEPLOY_CLOSING && d->state != DEPLOY_FAILED;
        used += counts && d->place == place ? d->need_bytes : 0;
    }
    if (used <= budget && need <= budget - used) {
        return true;
    }
    g_autofree char *wants = units_format_size(need), *has = units_format_size(budget),
                    *taken = units_format_size(used);
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_IMPOSSIBLE,
                "worker %s has %s of memory, %s in use: the rank needs %s: use more workers or a "
                "smaller context",
                table->o.name, has, taken, wants);
    return false;
}

/* A deployment for the request, not yet in the table; NULL + error. */
static Deployment *deployment_from(Deployments *table, const Weft__V1__LoadRequest *request,
                                   GError **error)
{
    if (!request->plan || !request->model) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL, "load: plan or model is missing");
        return NULL;
    }
    g_autoptr(ModelSpec) spec = model_from_message(request->model, error);
    g_autoptr(Plan) plan = spec ? plan_from_message(request->plan, error) : NULL;
    if (!plan ||
        !check_place(table, plan, request->stamp->replica, request->stage, request->rank, error) ||
        !check_plan(table, plan, spec, error)) {
        return NULL;
    }
    if (!hash128_equal(&spec->file_hash, &plan->definition.file_hash)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                    "load: plan and model are of different files");
        return NULL;
    }
    const PlanRank *rank =
        &plan->replicas[request->stamp->replica].stages[request->stage].ranks[request->rank];
    if (!check_memory(table, rank->device, rank->peak_bytes, error)) {
        return NULL;
    }
    Deployment *d = g_new0(Deployment, 1);
    *d = (Deployment){.table = table,
                      .job = g_strdup(request->stamp->job),
                      .replica = request->stamp->replica,
                      .stage = request->stage,
                      .rank = request->rank,
                      .place = rank->device,
                      .epoch = request->stamp->epoch,
                      .generation = request->stamp->generation,
                      .seal = request->seal,
                      .state = DEPLOY_LOADING,
                      .need_bytes = rank->peak_bytes,
                      .plan = g_steal_pointer(&plan),
                      .spec = g_steal_pointer(&spec),
                      .load_calls = deployment_call_list_new(),
                      .start_calls = deployment_call_list_new(),
                      .watches = g_array_new(FALSE, TRUE, sizeof(EndWatch))};
    size_t size = weft__v1__load_request__get_packed_size(request);
    g_autofree uint8_t *packed = g_malloc(size);
    weft__v1__load_request__pack(request, packed);
    d->request = weft__v1__load_request__unpack(NULL, size, packed);
    return d;
}

/* ---- the way to LOADED ---- */

static void fill_progress(const Deployment *d, Weft__V1__LoadProgress *out)
{
    out->bytes_done = d->progress.bytes_done;
    out->bytes_total = d->progress.bytes_total;
    out->bytes_from_cache = d->progress.bytes_from_cache;
    out->bytes_from_disk = d->progress.bytes_from_disk;
    out->bytes_from_network = d->progress.bytes_from_network;
}

static void on_progress(const FetchProgress *progress, void *user)
{
    Deployment *d = user;
    d->progress = *progress;
    Weft__V1__LoadProgress message = WEFT__V1__LOAD_PROGRESS__INIT;
    fill_progress(d, &message);
    for (guint i = 0; i < d->load_calls->len; i++) {
        rpc_call_send(((DeploymentCall *)d->load_calls->pdata[i])->call, &message.base);
    }
}

/* The last message of a load: where the data port is. */
static void answer_loaded(Deployment *d)
{
    Weft__V1__LoadProgress message = WEFT__V1__LOAD_PROGRESS__INIT;
    g_autoptr(GBytes) address = engine_address(d->engine);
    size_t size;
    const uint8_t *bytes = g_bytes_get_data(address, &size);
    fill_progress(d, &message);
    message.data_address = (ProtobufCBinaryData){size, (uint8_t *)bytes};
    message.boot_id = (ProtobufCBinaryData){BOOT_ID_BYTES, (uint8_t *)d->table->o.boot_id};
    message.loaded = true;
    deployment_answer(d->load_calls, &message.base, NULL);
}

typedef struct LoadTask {
    Deployment *d;
    Engine *engine;
    GError *error;
} LoadTask;

#define MAPPING_TOLD_US 1000000
#define STEP_LIMIT_S 3600.0 /* whatever a plan predicts */

/* The longest step: a full prefill chunk, or a token. */
static double predicted_step_s(const Plan *plan)
{
    const double token =
        plan->predicted.decode_tokens_per_s > 0 ? 1.0 / plan->predicted.decode_tokens_per_s : 0;
    const double chunk = plan->predicted.prefill_tokens_per_s > 0
                             ? plan->max_rows / plan->predicted.prefill_tokens_per_s
                             : 0;
    return MIN(MAX(token, chunk), STEP_LIMIT_S);
}

static void open_run(void *user)
{
    LoadTask *task = user;
    Deployment *d = task->d;
    const DeploymentsOptions *o = &d->table->o;
    EngineOptions options = {.spec = d->weights->spec,
                             .plan = d->plan,
                             .shard = d->weights->shard,
                             .replica = d->replica,
                             .stage = d->stage,
                             .rank = d->rank,
                             .generation = d->generation,
                             .epoch = d->epoch,
                             .threads = cpu_rank_threads(o->threads, o->n_devices),
                             .cpus = o->n_devices > 1 ? NULL : o->cpus,
                             .isa = (int)o->isa,
                             .fill = o->fill,
                             .crowded = o->crowded,
                             .inline_run = o->inline_engine,
                             .predicted_step_s = predicted_step_s(d->plan)};
    if (shard_finish(d->weights->shard, &task->error)) {
        task->engine = engine_new(&options, &task->error);
    }
    (void)malloc_trim(0); /* what the fetch freed goes back to the system */
}

static void open_done(void *user)
{
    LoadTask *task = user;
    Deployment *d = task->d;
    GError *error = task->error;
    d->engine = task->engine;
    g_free(task);
    d->task_running = false;
    if (deployment_closing(d)) {
        g_clear_error(&error);
        return;
    }
    if (error) {
        deployment_give_up(d, error);
        return;
    }
    d->state = DEPLOY_LOADED;
    g_autofree char *size = units_format_size(d->weights->shard->arena_bytes);
    log_info(d->table->o.log,
             "job %s replica %u epoch %" G_GUINT64_FORMAT
             " loaded: stage %u rank %u, %s of weights",
             d->job, d->replica, d->epoch, d->stage, d->rank, size);
    answer_loaded(d);
    weights_keep(d->weights, d->table->o.images);
}

static LoadTask *load_task_new(Deployment *d)
{
    LoadTask *task = g_new0(LoadTask, 1);
    task->d = d;
    d->task_running = true;
    return task;
}

static void open_engine(Deployment *d)
{
    task_pool_run(d->table->o.pool, open_run, open_done, load_task_new(d));
}

static void fetched(const GError *error, void *user)
{
    Deployment *d = user;
    d->fetch = NULL;
    d->weights->complete = !error;
    if (deployment_closing(d)) {
        return;
    }
    if (error) {
        deployment_give_up(d, g_error_copy(error));
        return;
    }
    open_engine(d);
}

static void fetch_slices(Deployment *d)
{
    const DeploymentsOptions *o = &d->table->o;
    g_autoptr(GArray) slices =
        plan_rank_slices(d->plan, d->weights->spec, d->replica, d->stage, d->rank);
    FetchOptions options = {.loop = o->loop,
                            .pool = o->pool,
                            .store = o->store,
                            .log = o->log,
                            .spec = d->weights->spec,
                            .shard = d->weights->shard,
                            .slices = (const SliceRef *)(const void *)slices->data,
                            .n_slices = slices->len,
                            .manifest = d->request->model,
                            .models_dir = o->models_dir,
                            .sources = (const char *const *)d->request->sources,
                            .n_sources = d->request->n_sources,
                            .slice_key = d->request->slice_key,
                            .channel = o->channel,
                            .channel_user = o->channel_user};
    d->fetch = fetch_start(&options, on_progress, fetched, d);
    weft__v1__load_request__free_unpacked(g_steal_pointer(&d->request), NULL);
}

static void map_run(void *user)
{
    LoadTask *task = user;
    Deployment *d = task->d;
    const DeploymentsOptions *o = &d->table->o;
    Weights *w = d->weights;
    w->shard = shard_new(deployments_device(d->table, d->place), w->spec, d->plan, d->replica,
                         d->stage, d->rank, &task->error);
    w->mapped =
        w->shard && packed_images_load(o->images, w->part, w->shard, o->io_threads, &d->image);
}

/* A load that says nothing for long is given up by the coordinator. */
static void tell_mapping(void *user)
{
    Deployment *d = user;
    const size_t done = atomic_load(&d->image.done);
    d->mapping = loop_timer_start(d->table->o.loop, MAPPING_TOLD_US, tell_mapping, d);
    if (done > d->progress.bytes_done) {
        const PlanRank *own = &d->plan->replicas[d->replica].stages[d->stage].ranks[d->rank];
        const FetchProgress progress = {
            .bytes_done = done, .bytes_total = own->weight_bytes, .bytes_from_cache = done};
        on_progress(&progress, d);
    }
}

/* Nothing is left to be fetched. */
static void open_mapped(Deployment *d)
{
    const uint64_t bytes = d->weights->shard->arena_bytes;
    d->weights->complete = true;
    d->progress =
        (FetchProgress){.bytes_done = bytes, .bytes_total = bytes, .bytes_from_cache = bytes};
    weft__v1__load_request__free_unpacked(g_steal_pointer(&d->request), NULL);
    log_info(d->table->o.log,
             "job %s replica %u epoch %" G_GUINT64_FORMAT ": weights are packed on the disk",
             d->job, d->replica, d->epoch);
    open_engine(d);
}

static void map_done(void *user)
{
    LoadTask *task = user;
    Deployment *d = task->d;
    GError *error = task->error;
    g_free(task);
    d->task_running = false;
    loop_timer_cancel(d->table->o.loop, g_steal_pointer(&d->mapping));
    if (deployment_closing(d)) {
        g_clear_error(&error);
        return;
    }
    if (error) {
        deployment_give_up(d, error);
        return;
    }
    if (d->weights->mapped) {
        open_mapped(d);
    } else {
        fetch_slices(d);
    }
}

static bool any_closing(const Deployments *table)
{
    for (guint i = 0; i < table->all->len; i++) {
        if (((Deployment *)table->all->pdata[i])->state == DEPLOY_CLOSING) {
            return true;
        }
    }
    return false;
}

static bool is_waiting(const Deployment *d)
{
    return d->state == DEPLOY_LOADING && !d->weights && !d->task_running && !d->fetch;
}

/* Memory of the budget that neither runs nor is about to be loaded, on the fullest device: the
 * shelf may lie on any. */
static uint64_t memory_left(const Deployments *table)
{
    const uint64_t budget = deployments_budget(table);
    uint64_t left = budget;
    for (uint32_t place = 0; place < MAX(table->o.n_devices, 1u); place++) {
        uint64_t used = 0;
        for (guint i = 0; i < table->all->len; i++) {
            const Deployment *d = table->all->pdata[i];
            used += d->place == place ? d->need_bytes : 0;
        }
        left = MIN(left, used < budget ? budget - used : 0);
    }
    return left;
}

/* Weights stay where they lie. */
static char *part_of(const Deployment *d)
{
    g_autofree char *part = weights_part(d->spec, d->plan, d->replica, d->stage, d->rank);
    return part && d->place > 0 ? g_strdup_printf("%s device %u", part, d->place)
                                : g_steal_pointer(&part);
}

static void begin(Deployment *d)
{
    Deployments *table = d->table;
    g_autofree char *part = part_of(d);
    d->weights = weights_shelf_take(table->shelf, part);
    weights_shelf_shrink(table->shelf, memory_left(table));
    if (d->weights) {
        model_spec_free(g_steal_pointer(&d->spec));
        weft__v1__load_request__free_unpacked(g_steal_pointer(&d->request), NULL);
        log_info(table->o.log,
                 "job %s replica %u epoch %" G_GUINT64_FORMAT ": weights are in memory already",
                 d->job, d->replica, d->epoch);
        open_engine(d);
        return;
    }
    d->weights = g_new0(Weights, 1);
    d->weights->spec = g_steal_pointer(&d->spec);
    d->weights->part = g_steal_pointer(&part);
    d->mapping = loop_timer_start(table->o.loop, MAPPING_TOLD_US, tell_mapping, d);
    task_pool_run(table->o.pool, map_run, map_done, load_task_new(d));
}

void load_continue(Deployments *table)
{
    if (any_closing(table)) {
        return; /* its memory, or its weights, may be what is wanted */
    }
    for (guint i = 0; i < table->all->len; i++) {
        if (is_waiting(table->all->pdata[i])) {
            begin(table->all->pdata[i]);
        }
    }
}

/* ---- the request ---- */

/* Ends what a load of this rank replaces: every older epoch, and a failed attempt at the same one.
 */
static void end_others(Deployments *table, const Weft__V1__Stamp *stamp, uint32_t stage,
                       uint32_t rank)
{
    g_autoptr(GError) why = g_error_new(WEFT_ERROR, WEFT_ERROR_STALE,
                                        "job %s replica %u: epoch %" G_GUINT64_FORMAT " takes over",
                                        stamp->job, stamp->replica, stamp->epoch);
    for (guint i = 0; i < table->all->len; i++) {
        Deployment *d = table->all->pdata[i];
        const bool same = d->replica == stamp->replica && strcmp(d->job, stamp->job) == 0,
                   failed = d->state == DEPLOY_FAILED && d->stage == stage && d->rank == rank;
        if (same && (d->epoch < stamp->epoch || failed)) {
            deployment_close(d, true, why);
        }
    }
}

/* The epoch is here already; true if the call was answered or waits. */
static bool join_existing(Deployment *d, RpcCall *call, const Weft__V1__LoadRequest *request)
{
    if (!d || d->state == DEPLOY_FAILED) {
        return false;
    }
    if (d->stage != request->stage || d->rank != request->rank) {
        g_autoptr(GError) error =
            g_error_new(WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                        "job %s replica %u epoch %" G_GUINT64_FORMAT
                        " holds stage %u rank %u on worker %s, not stage %u rank %u",
                        d->job, d->replica, d->epoch, d->stage, d->rank, d->table->o.name,
                        request->stage, request->rank);
        rpc_call_finish(call, error);
        return true;
    }
    deployment_add_call(d->load_calls, call);
    if (d->state != DEPLOY_LOADING) {
        answer_loaded(d);
    }
    return true;
}

/* The rank that is asked for, or what a worker of one rank has of this epoch. */
static Deployment *here(Deployments *table, const Weft__V1__LoadRequest *request)
{
    const Weft__V1__Stamp *stamp = request->stamp;
    Deployment *own = deployments_find_rank(table, stamp, request->stage, request->rank);
    return own || table->o.n_devices > 1
               ? own
               : deployments_find(table, stamp->job, stamp->replica, stamp->epoch);
}

void deployments_load(Deployments *table, RpcCall *call, const Weft__V1__LoadRequest *request)
{
    g_autoptr(GError) error = NULL;
    if (table->shutting_down) {
        error =
            g_error_new(WEFT_ERROR, WEFT_ERROR_NOT_READY, "worker %s is stopping", table->o.name);
    } else {
        deployments_check_stamp(table, request->stamp, true, &error);
    }
    if (!error) {
        if (join_existing(here(table, request), call, request)) {
            return;
        }
        end_others(table, request->stamp, request->stage, request->rank);
    }
    Deployment *d = error ? NULL : deployment_from(table, request, &error);
    if (!d) {
        log_warn(table->o.log, "load refused: %s", error->message);
        rpc_call_finish(call, error);
        return;
    }
    g_ptr_array_add(table->all, d);
    deployment_add_call(d->load_calls, call);
    load_continue(table);
}
