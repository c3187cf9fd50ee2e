/* Diagram: trainings.h. Invariants
 * 1. Trainings of a job that are not CLOSING are of one epoch, and each has a device of this
 * worker, or its cores, to itself.
 * 2. `engine`, `feed`, `plan`, `spec` and `prompt` live until the engine's thread has ended, which
 * is waited for in the pool; what it had posted ran before that is known here.
 * 3. What waits to be sent in a call is bounded by TRAIN_SAVING_WINDOW and one report: so many
 * bytes of a snapshot are on their way that the coordinator has not written, and the engine makes
 * no other one before all of it is written. */
#include "worker/agent/trainings.h"

#include "kernels/device/train_ops.h"
#include "proto/base/error.h"
#include "proto/base/units.h"
#include "proto/model/model_message.h"
#include "proto/plan/cpu_share.h"
#include "proto/plan/plan_message.h"
#include "proto/plan/train_limits.h"
#include "transport/crypto/keys.h"
#include "worker/agent/deployment.h"
#include "worker/agent/train_feed.h"
#include "worker/agent/train_settings.h"

#include <string.h>

enum {
    PIECE_FLOATS = 256 << 10,
    TIMES_US = 1000000,
};

typedef struct TrainCall {
    Trainings *owner;
    RpcCall *call;
    char *job;
    uint64_t epoch, generation;
    uint32_t device;                    /* of this worker's: PlanRank.device */
    bool seal, started, closing, first; /* first: tells the steps */
    Plan *plan;
    ModelSpec *spec;
    uint32_t *prompt; /* of sampled texts */
    TrainFeedPipe *feed;
    TrainEngine *engine;
    /* the snapshot that is sent: next piece, next float of it */
    TrainSnapshot *snapshot;
    uint32_t piece;
    size_t at;
    uint64_t on_way;            /* bytes of pieces that are not written */
    bool sent;                  /* all of a snapshot; its engine waits until it is written */
    Weft__V1__TrainTimes times; /* since they were last told */
    int64_t times_due_us;
    bool done; /* the engine ended well; told when nothing is left to send */
    Hash128 digest;
} TrainCall;

struct Trainings {
    DeploymentsOptions o;
    Deployments *deployments;
    GPtrArray *all;         /* of TrainCall, owned */
    uint64_t process_bytes; /* trainings_process_bytes(); 0: not asked yet */
};

/* ---- the end ---- */

static void train_call_free(void *data)
{
    TrainCall *t = data;
    train_snapshot_free(t->snapshot);
    train_feed_pipe_free(t->feed);
    plan_free(t->plan);
    model_spec_free(t->spec);
    g_free(t->prompt);
    g_free(t->job);
    g_free(t);
}

static void engine_end_run(void *user)
{
    train_engine_free(((TrainCall *)user)->engine);
}

static void engine_end_done(void *user)
{
    TrainCall *t = user;
    g_ptr_array_remove(t->owner->all, t);
}

/* error: why, borrowed; NULL: it is done. */
static void train_call_close(TrainCall *t, const GError *error)
{
    if (t->closing) {
        return;
    }
    t->closing = true;
    if (error != NULL) {
        log_warn(t->owner->o.log, "job %s epoch %" G_GUINT64_FORMAT ": training ended: %s", t->job,
                 t->epoch, error->message);
    }
    train_feed_pipe_close(t->feed);
    if (error != NULL) {
        train_engine_abort(t->engine, error);
    }
    rpc_call_on_cancel(t->call, NULL, NULL);
    rpc_call_set_data(t->call, NULL, NULL);
    rpc_call_finish(t->call, error);
    rpc_call_unref(t->call);
    task_pool_run(t->owner->o.pool, engine_end_run, engine_end_done, t);
}

static void on_cancelled(void *user)
{
    g_autoptr(GError) error =
        g_error_new_literal(WEFT_ERROR, WEFT_ERROR_CANCELLED, "the coordinator left the call");
    train_call_close(user, error);
}

/* ---- reports ---- */

static void send_report(TrainCall *t, Weft__V1__TrainReport *report)
{
    rpc_call_send(t->call, &report->base);
}

static void on_want(const Weft__V1__TrainWant *want, void *user)
{
    TrainCall *t = user;
    Weft__V1__TrainReport report = WEFT__V1__TRAIN_REPORT__INIT;
    report.report_case = WEFT__V1__TRAIN_REPORT__REPORT_WANT;
    report.want = (Weft__V1__TrainWant *)want;
    if (!t->closing) {
        send_report(t, &report);
    }
}

static void on_loaded(void *user)
{
    TrainCall *t = user;
    Weft__V1__TrainReport report = WEFT__V1__TRAIN_REPORT__INIT;
    Weft__V1__TrainLoaded loaded = WEFT__V1__TRAIN_LOADED__INIT;
    if (t->closing) {
        return;
    }
    g_autoptr(GBytes) address = train_engine_address(t->engine);
    gsize size;
    const void *bytes = g_bytes_get_data(address, &size);
    loaded.data_address = (ProtobufCBinaryData){size, (uint8_t *)bytes};
    loaded.boot_id = (ProtobufCBinaryData){BOOT_ID_BYTES, (uint8_t *)t->owner->o.boot_id};
    report.report_case = WEFT__V1__TRAIN_REPORT__REPORT_LOADED;
    report.loaded = &loaded;
    send_report(t, &report);
}

static void on_running(void *user)
{
    TrainCall *t = user;
    Weft__V1__TrainReport report = WEFT__V1__TRAIN_REPORT__INIT;
    Weft__V1__TrainRunning running = WEFT__V1__TRAIN_RUNNING__INIT;
    report.report_case = WEFT__V1__TRAIN_REPORT__REPORT_RUNNING;
    report.running = &running;
    if (!t->closing) {
        log_info(t->owner->o.log, "job %s epoch %" G_GUINT64_FORMAT " trains", t->job, t->epoch);
        send_report(t, &report);
    }
}

/* Every rank's share of waiting and its memory, now and then. */
static void tell_times(TrainCall *t, const TrainReport *r)
{
    const int64_t now = loop_now_us(t->owner->o.loop);
    t->times.steps++;
    t->times.seconds += r->seconds;
    t->times.waited += r->waited;
    if (now < t->times_due_us) {
        return;
    }
    Weft__V1__TrainReport report = WEFT__V1__TRAIN_REPORT__INIT;
    Weft__V1__TrainMemory memory = WEFT__V1__TRAIN_MEMORY__INIT;
    memory.weights = r->memory.weights;
    memory.gradients = r->memory.gradients;
    memory.optimizer = r->memory.optimizer;
    memory.activations = r->memory.activations;
    memory.host = r->memory.host;
    memory.buffers = r->memory.buffers;
    t->times.memory = &memory;
    report.report_case = WEFT__V1__TRAIN_REPORT__REPORT_TIMES;
    report.times = &t->times;
    send_report(t, &report);
    weft__v1__train_times__init(&t->times);
    t->times_due_us = now + TIMES_US;
}

static Weft__V1__TrainTraceOp trace_op(const PipelineOpTime *time)
{
    Weft__V1__TrainTraceOp m = WEFT__V1__TRAIN_TRACE_OP__INIT;
    m.kind = time->op.kind;
    m.chunk = time->op.chunk;
    m.micro = time->op.micro;
    m.begin_us = time->begin_us;
    m.end_us = time->end_us;
    return m;
}

/* What the rank did in a step that is traced: begins at op `first`. */
static void tell_trace(TrainCall *t, const TrainReport *r, uint32_t first)
{
    const uint32_t n = MIN(r->n_trace - first, TRAIN_TRACE_OPS);
    g_autofree Weft__V1__TrainTraceOp *ops = g_new(Weft__V1__TrainTraceOp, n + 1);
    g_autofree Weft__V1__TrainTraceOp **pointers = g_new(Weft__V1__TrainTraceOp *, n + 1);
    Weft__V1__TrainReport report = WEFT__V1__TRAIN_REPORT__INIT;
    Weft__V1__TrainTrace trace = WEFT__V1__TRAIN_TRACE__INIT;
    for (uint32_t i = 0; i < n; i++) {
        ops[i] = trace_op(&r->trace[first + i]);
        pointers[i] = &ops[i];
    }
    trace.step = r->step.step;
    trace.now_us = link_clock_us();
    trace.begin_us = r->begin_us;
    trace.end_us = r->end_us;
    trace.last = first + n == r->n_trace;
    trace.ops = pointers;
    trace.n_ops = n;
    report.report_case = WEFT__V1__TRAIN_REPORT__REPORT_TRACE;
    report.trace = &trace;
    send_report(t, &report);
}

/* At least one message: a replica without samples has done nothing, and says so. */
static void tell_traces(TrainCall *t, const TrainReport *r)
{
    uint32_t first = 0;
    do {
        tell_trace(t, r, first);
        first += TRAIN_TRACE_OPS;
    } while (first < r->n_trace);
}

static void on_step(const TrainReport *r, void *user)
{
    TrainCall *t = user;
    if (!t->closing) {
        tell_times(t, r);
        if (r->traced) {
            tell_traces(t, r);
        }
    }
    Weft__V1__TrainReport report = WEFT__V1__TRAIN_REPORT__INIT;
    Weft__V1__TrainProgress progress = WEFT__V1__TRAIN_PROGRESS__INIT;
    if (r->resident_bytes > 0) {
        g_autofree char *planned = units_format_size(train_memory_total(&r->memory)),
                        *resident = units_format_size(r->resident_bytes);
        log_info(t->owner->o.log,
                 "job %s epoch %" G_GUINT64_FORMAT " memory of its rank: planned %s at the highest,"
                 " with its checkpoints; resident %s after its first step",
                 t->job, t->epoch, planned, resident);
    }
    if (t->closing || !t->first) {
        return;
    }
    progress.step = r->step.step;
    progress.samples_seen = r->step.samples_seen;
    progress.loss = r->step.loss;
    progress.rate = r->step.rate;
    progress.gradient_norm = r->step.gradient_norm;
    progress.scale = r->step.scale;
    progress.skipped = r->step.skipped;
    progress.seconds = r->seconds;
    progress.waited = r->waited;
    progress.validated = r->validated;
    progress.validation = r->validation;
    progress.sample = (uint32_t *)r->sample;
    progress.n_sample = r->n_sample;
    report.report_case = WEFT__V1__TRAIN_REPORT__REPORT_STEP;
    report.step = &progress;
    send_report(t, &report);
}

static void send_done(TrainCall *t)
{
    Weft__V1__TrainReport report = WEFT__V1__TRAIN_REPORT__INIT;
    Weft__V1__TrainDone done = WEFT__V1__TRAIN_DONE__INIT;
    done.digest = (ProtobufCBinaryData){sizeof t->digest.bytes, t->digest.bytes};
    report.report_case = WEFT__V1__TRAIN_REPORT__REPORT_DONE;
    report.done = &done;
    send_report(t, &report);
}

/* ---- a checkpoint's part ---- */

static Weft__V1__TrainRect rect_message(const SliceRect *rect)
{
    Weft__V1__TrainRect m = WEFT__V1__TRAIN_RECT__INIT;
    m.row0 = rect->row0;
    m.n_rows = rect->n_rows;
    m.col0 = rect->col0;
    m.n_cols = rect->n_cols;
    return m;
}

/* Where all pieces lie. */
static void send_begin(TrainCall *t)
{
    const TrainSnapshot *s = t->snapshot;
    const uint32_t n = MAX(s->n_pieces, 1);
    g_autofree Weft__V1__TrainPlace *places = g_new(Weft__V1__TrainPlace, n);
    g_autofree Weft__V1__TrainPlace **pointers = g_new(Weft__V1__TrainPlace *, n);
    g_autofree Weft__V1__TrainRect *rects = g_new(Weft__V1__TrainRect, n);
    Weft__V1__TrainReport report = WEFT__V1__TRAIN_REPORT__INIT;
    Weft__V1__TrainPartBegin begin = WEFT__V1__TRAIN_PART_BEGIN__INIT;
    for (uint32_t i = 0; i < s->n_pieces; i++) {
        rects[i] = rect_message(&s->pieces[i].rect);
        weft__v1__train_place__init(&places[i]);
        places[i].tensor = (char *)s->pieces[i].tensor;
        places[i].rect = &rects[i];
        pointers[i] = &places[i];
    }
    begin.step = s->at.step;
    begin.places = pointers;
    begin.n_places = s->n_pieces;
    report.report_case = WEFT__V1__TRAIN_REPORT__REPORT_BEGIN;
    report.begin = &begin;
    send_report(t, &report);
}

/* False: there is no room for it on the way. */
static bool send_piece(TrainCall *t)
{
    const CheckpointPiece *piece = &t->snapshot->pieces[t->piece];
    const size_t total = (size_t)piece->rect.n_rows * piece->rect.n_cols,
                 n = MIN(total - t->at, (size_t)PIECE_FLOATS);
    Weft__V1__TrainReport report = WEFT__V1__TRAIN_REPORT__INIT;
    Weft__V1__TrainPiece message = WEFT__V1__TRAIN_PIECE__INIT;
    if (t->on_way + n * sizeof(float) > TRAIN_SAVING_WINDOW) {
        return false;
    }
    message.step = t->snapshot->at.step;
    message.tensor = (char *)piece->tensor;
    message.offset = t->at;
    message.data =
        (ProtobufCBinaryData){n * sizeof(float), (uint8_t *)(void *)(piece->data + t->at)};
    report.report_case = WEFT__V1__TRAIN_REPORT__REPORT_PIECE;
    report.piece = &message;
    t->on_way += message.data.len;
    t->at += n;
    if (t->at == total) {
        t->piece++;
        t->at = 0;
    }
    send_report(t, &report);
    return true;
}

/* The next snapshot may be made when nothing of this one is on the way: so a rank is at most one
 * checkpoint ahead of the one that is being saved. */
static void tell_engine(TrainCall *t)
{
    if (t->sent && t->on_way == 0) {
        t->sent = false;
        train_engine_taken(t->engine);
    }
}

static void send_part(TrainCall *t)
{
    Weft__V1__TrainReport report = WEFT__V1__TRAIN_REPORT__INIT;
    Weft__V1__TrainPart part = WEFT__V1__TRAIN_PART__INIT;
    Weft__V1__TrainState state = WEFT__V1__TRAIN_STATE__INIT;
    part.step = t->snapshot->at.step;
    part.state = &state;
    state.updates = t->snapshot->at.updates;
    state.scale = t->snapshot->at.scale.scale;
    state.good = t->snapshot->at.scale.good;
    state.hysteresis = t->snapshot->at.scale.hysteresis;
    part.samples = t->snapshot->samples;
    part.digest =
        (ProtobufCBinaryData){sizeof t->snapshot->digest.bytes, t->snapshot->digest.bytes};
    report.report_case = WEFT__V1__TRAIN_REPORT__REPORT_PART;
    report.part = &part;
    send_report(t, &report);
    train_snapshot_free(g_steal_pointer(&t->snapshot));
    t->sent = true;
    tell_engine(t);
}

static void send_pieces(TrainCall *t)
{
    while (t->piece < t->snapshot->n_pieces && send_piece(t)) {
    }
    if (t->piece < t->snapshot->n_pieces) {
        return;
    }
    send_part(t);
    if (t->done) {
        send_done(t);
    }
}

static bool on_taken(TrainCall *t, const Weft__V1__TrainTaken *taken, GError **error)
{
    if (taken->bytes > t->on_way) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                    "%" G_GUINT64_FORMAT " bytes of a checkpoint are taken and %" G_GUINT64_FORMAT
                    " were on their way",
                    taken->bytes, t->on_way);
        return false;
    }
    t->on_way -= taken->bytes;
    if (t->snapshot != NULL) {
        send_pieces(t);
    } else {
        tell_engine(t);
    }
    return true;
}

static void on_snapshot(TrainSnapshot *snapshot, void *user)
{
    TrainCall *t = user;
    if (t->closing) {
        train_snapshot_free(snapshot);
        return;
    }
    t->snapshot = snapshot;
    t->piece = 0;
    t->at = 0;
    send_begin(t);
    send_pieces(t);
}

static void on_ended(const Hash128 *digest, const GError *error, void *user)
{
    TrainCall *t = user;
    if (error != NULL) {
        train_call_close(t, error);
        return;
    }
    t->done = true;
    t->digest = *digest;
    if (!t->closing && t->snapshot == NULL) {
        send_done(t);
    }
}

/* ---- load ---- */

static bool check_place(const Trainings *owner, const Plan *plan, const Weft__V1__TrainLoad *load,
                        GError **error)
{
    const bool inside = load->replica < plan->n_replicas &&
                        load->stage < plan->replicas[load->replica].n_stages &&
                        load->rank < plan->replicas[load->replica].stages[load->stage].n_ranks;
    const char *worker =
        inside ? plan->replicas[load->replica].stages[load->stage].ranks[load->rank].worker : "";
    if (strcmp(worker, owner->o.name) != 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                    "replica %u stage %u rank %u of the plan belongs to %s, this is worker %s",
                    load->replica, load->stage, load->rank, inside ? worker : "nobody",
                    owner->o.name);
        return false;
    }
    return true;
}

/* Invariant 1, of which a newer epoch has ended the others. */
static bool check_device(const TrainCall *t, GError **error)
{
    const DeploymentsOptions *o = &t->owner->o;
    if (t->device >= MAX(o->n_devices, 1u)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                    "a rank of job %s is for device %u, worker %s leads %u", t->job, t->device,
                    o->name, o->n_devices);
        return false;
    }
    for (guint i = 0; i < t->owner->all->len; i++) {
        const TrainCall *other = t->owner->all->pdata[i];
        if (!other->closing && strcmp(other->job, t->job) == 0 && other->device == t->device) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                        "two ranks of job %s are for device %u of worker %s", t->job, t->device,
                        o->name);
            return false;
        }
    }
    return true;
}

/* Class exact on a device wants one that has the host's bits. */
static bool check_class(const DeploymentsOptions *o, const Device *device, const TrainWork *work,
                        GError **error)
{
    if (device == NULL || work->fast ||
        device->train_ops->gives_exact(precision_dtype(work->precision))) {
        return true;
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_IMPOSSIBLE,
                "worker %s computes on %s:%u, which trains with precision %s by numerics fast "
                "only: say numerics: fast or another precision in the job file, or start it with "
                "--device cpu",
                o->name, device->info.kind, device->info.index, precision_name(work->precision));
    return false;
}

static bool open_engine(TrainCall *t, const Weft__V1__TrainLoad *load, GError **error)
{
    const DeploymentsOptions *o = &t->owner->o;
    const Device *device = deployments_device(t->owner->deployments, t->device);
    TrainEngineOptions options = {
        .spec = t->spec,
        .plan = t->plan,
        .replica = load->replica,
        .stage = load->stage,
        .rank = load->rank,
        .generation = t->generation,
        .epoch = t->epoch,
        .feed = train_feed_pipe_feed(t->feed),
        .threads = cpu_rank_threads(o->threads, o->n_devices),
        .cpus = o->n_devices > 1 ? NULL : o->cpus,
        .kernels = kernels_get(o->isa),
        .device = device,
        .fill = o->fill,
        .crowded = o->crowded,
        .loop = o->loop,
        .events = {on_loaded, on_running, on_step, on_snapshot, on_ended, t},
    };
    if (!train_settings_read(load->settings, t->spec, &options.work, error)) {
        return false;
    }
    if (!check_class(o, device, &options.work, error)) {
        return false;
    }
    TextWish *sample = &options.work.sample;
    t->prompt = g_memdup2(sample->prompt, sample->n_prompt * sizeof *t->prompt);
    sample->prompt = t->prompt;
    t->engine = train_engine_new(&options, error);
    return t->engine != NULL;
}

static bool train_call_fill(TrainCall *t, const Weft__V1__TrainLoad *load, GError **error)
{
    if (load->plan == NULL || load->model == NULL || load->settings == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                    "load: plan, model or settings are missing");
        return false;
    }
    t->spec = model_from_message(load->model, error);
    t->plan = t->spec != NULL ? plan_from_message(load->plan, error) : NULL;
    if (t->plan == NULL || !train_plan_check(t->plan, t->spec, error) ||
        !check_place(t->owner, t->plan, load, error)) {
        return false;
    }
    t->device = t->plan->replicas[load->replica].stages[load->stage].ranks[load->rank].device;
    if (!check_device(t, error)) {
        return false;
    }
    t->feed = train_feed_pipe_new(t->owner->o.loop, on_want, t);
    t->first = load->replica == 0 && load->stage == 0 && load->rank == 0;
    return open_engine(t, load, error);
}

static void end_older(Trainings *owner, const char *job, uint64_t epoch)
{
    g_autoptr(GError) why =
        g_error_new(WEFT_ERROR, WEFT_ERROR_STALE, "job %s: a newer epoch takes over", job);
    for (guint i = 0; i < owner->all->len; i++) {
        TrainCall *t = owner->all->pdata[i];
        if (strcmp(t->job, job) == 0 && t->epoch < epoch) {
            train_call_close(t, why);
        }
    }
}

static void train_call_load(Trainings *owner, RpcCall *call, const Weft__V1__TrainLoad *load)
{
    g_autoptr(GError) error = NULL;
    if (!deployments_check_stamp(owner->deployments, load->stamp, true, &error)) {
        rpc_call_finish(call, error);
        return;
    }
    end_older(owner, load->stamp->job, load->stamp->epoch);
    TrainCall *t = g_new0(TrainCall, 1);
    t->owner = owner;
    weft__v1__train_times__init(&t->times);
    t->job = g_strdup(load->stamp->job);
    t->epoch = load->stamp->epoch;
    t->generation = load->stamp->generation;
    t->seal = load->seal;
    if (!train_call_fill(t, load, &error)) {
        log_warn(owner->o.log, "training refused: %s", error->message);
        rpc_call_finish(call, error);
        train_call_free(t);
        return;
    }
    t->call = rpc_call_ref(call);
    rpc_call_set_data(call, t, NULL);
    rpc_call_on_cancel(call, on_cancelled, t);
    g_ptr_array_add(owner->all, t);
}

/* ---- start ---- */

/* Every rank of the plan in order, each with an address and a boot id. */
static bool check_ranks(const TrainCall *t, const Weft__V1__TrainStart *start, GError **error)
{
    const TrainPosition p = train_position(t->plan, 0, 0, 0);
    bool ok = start->n_ranks == train_world(&p) && start->secret.len == EPOCH_SECRET_BYTES;
    for (size_t i = 0; ok && i < start->n_ranks; i++) {
        ok = start->ranks[i]->data_address.len > 0 && start->ranks[i]->boot_id.len == BOOT_ID_BYTES;
    }
    if (!ok) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                    "start: %zu ranks and a secret of %zu bytes for a layout of %u ranks, or one "
                    "without address or boot id",
                    start->n_ranks, start->secret.len, train_world(&p));
    }
    return ok;
}

/* What the engine is to know of CPUs that ranks of the job share. Training cuts evenly. */
static void tell_sharing(const TrainCall *t, const Weft__V1__TrainStart *start)
{
    const uint32_t n = (uint32_t)start->n_ranks;
    g_autofree CpuShare *shares = g_new(CpuShare, n);
    uint32_t own = 0, cpus[CPU_LIMIT];
    for (size_t i = 0; i < start->n_ranks; i++) {
        const Weft__V1__RankAddress *rank = start->ranks[i];
        own = strcmp(rank->worker, t->owner->o.name) == 0 ? (uint32_t)i : own;
        shares[i] = (CpuShare){rank->host, rank->threads, rank->cpus, (uint32_t)rank->n_cpus};
    }
    if (cpu_crowding(shares, n, own) > 1.0) {
        train_engine_set_crowded(t->engine);
    }
    train_engine_set_roam(t->engine, cpus, cpu_roam(shares, n, own, cpus));
}

static void train_call_start(TrainCall *t, const Weft__V1__TrainStart *start)
{
    g_autoptr(GError) error = NULL;
    if (t->started || !check_ranks(t, start, &error)) {
        if (error == NULL) {
            error = g_error_new(WEFT_ERROR, WEFT_ERROR_PROTOCOL, "start: it was started already");
        }
        train_call_close(t, error);
        return;
    }
    g_autofree TrainPeer *peers = g_new0(TrainPeer, start->n_ranks);
    for (size_t i = 0; i < start->n_ranks; i++) {
        const Weft__V1__RankAddress *rank = start->ranks[i];
        peers[i].worker = rank->worker;
        peers[i].address = g_bytes_new(rank->data_address.data, rank->data_address.len);
        memcpy(peers[i].boot_id, rank->boot_id.data, BOOT_ID_BYTES);
    }
    t->started = true;
    tell_sharing(t, start);
    train_engine_start(t->engine, start->secret.data, t->owner->o.boot_id, t->seal, peers,
                       (uint32_t)start->n_ranks);
    for (size_t i = 0; i < start->n_ranks; i++) {
        g_bytes_unref(peers[i].address);
    }
    keys_erase(start->secret.data, start->secret.len); /* the message's copy */
}

/* ---- commands ---- */

static void train_call_command(TrainCall *t, const Weft__V1__TrainCommand *command)
{
    g_autoptr(GError) error = NULL;
    switch (command->command_case) {
    case WEFT__V1__TRAIN_COMMAND__COMMAND_BYTES:
        train_feed_pipe_answer(t->feed, command->bytes, &error);
        break;
    case WEFT__V1__TRAIN_COMMAND__COMMAND_START:
        train_call_start(t, command->start);
        break;
    case WEFT__V1__TRAIN_COMMAND__COMMAND_TAKEN:
        on_taken(t, command->taken, &error);
        break;
    default:
        error = g_error_new(WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                            "a command that this worker does not know: run the same release");
    }
    if (error != NULL) {
        train_call_close(t, error);
    }
}

void trainings_on_command(Trainings *owner, RpcCall *call, const Weft__V1__TrainCommand *command)
{
    TrainCall *t = rpc_call_data(call);
    if (t != NULL && command != NULL) {
        train_call_command(t, command);
    } else if (t != NULL) {
        train_call_close(t, NULL);
    } else if (command != NULL && command->command_case == WEFT__V1__TRAIN_COMMAND__COMMAND_LOAD) {
        train_call_load(owner, call, command->load);
    } else {
        g_autoptr(GError) error =
            g_error_new_literal(WEFT_ERROR, WEFT_ERROR_PROTOCOL, "training begins with a load");
        rpc_call_finish(call, error); /* nothing, when it has ended before */
    }
}

uint64_t trainings_process_bytes(Trainings *owner)
{
    const uint64_t now = train_engine_resident();
    if (owner->all->len == 0 && deployments_is_empty(owner->deployments)) {
        owner->process_bytes = owner->process_bytes > 0 ? MIN(owner->process_bytes, now) : now;
    }
    return owner->process_bytes > 0 ? owner->process_bytes : now;
}

void trainings_fence(Trainings *owner, int64_t silent_us)
{
    g_autoptr(GError) why =
        g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST,
                    "worker %s was fenced: no word from the coordinator for %d ms", owner->o.name,
                    (int)(silent_us / 1000));
    for (guint i = 0; i < owner->all->len; i++) {
        train_call_close(owner->all->pdata[i], why);
    }
}

/* ---- the table ---- */

Trainings *trainings_new(const DeploymentsOptions *options, Deployments *deployments)
{
    Trainings *owner = g_new0(Trainings, 1);
    owner->o = *options;
    owner->deployments = deployments;
    owner->all = g_ptr_array_new_with_free_func(train_call_free);
    return owner;
}

void trainings_shut_down(Trainings *owner)
{
    g_autoptr(GError) why =
        g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST, "worker %s is stopping", owner->o.name);
    for (guint i = 0; i < owner->all->len; i++) {
        train_call_close(owner->all->pdata[i], why);
    }
}

bool trainings_is_empty(const Trainings *owner)
{
    return owner->all->len == 0;
}

void trainings_free(Trainings *owner)
{
    if (owner != NULL) {
        g_assert(trainings_is_empty(owner));
        g_ptr_array_unref(owner->all);
        g_free(owner);
    }
}
