#include "coordinator/train/train_call.h"

#include "proto/base/error.h"
#include "proto/plan/cpu_share.h"
#include "proto/plan/plan_message.h"
#include "proto/plan/train_layout.h"

#include <string.h>

static void call_free(TrainCall *c)
{
    g_clear_pointer(&c->address, g_bytes_unref);
    g_free(c->worker);
    g_free(c);
}

/* Once; the job may end the call inside. */
static void call_fail(TrainCall *c, const GError *error)
{
    if (!c->ended) {
        c->events.failed(c, error, c->events.user);
    }
}

static void on_loaded(TrainCall *c, const Weft__V1__TrainLoaded *loaded)
{
    if (loaded->boot_id.len != sizeof c->boot_id || loaded->data_address.len == 0) {
        g_autoptr(GError) error = g_error_new(WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                                              "worker %s is loaded without an address", c->worker);
        call_fail(c, error);
        return;
    }
    g_clear_pointer(&c->address, g_bytes_unref);
    c->address = g_bytes_new(loaded->data_address.data, loaded->data_address.len);
    memcpy(c->boot_id, loaded->boot_id.data, sizeof c->boot_id);
    c->loaded = true;
    c->events.loaded(c, c->events.user);
}

static void on_done_report(TrainCall *c, const Weft__V1__TrainDone *done)
{
    if (done->digest.len == sizeof c->digest.bytes) {
        memcpy(c->digest.bytes, done->digest.data, sizeof c->digest.bytes);
        c->done = true;
        c->events.done(c, c->events.user);
    }
}

static void on_times(TrainCall *c, const Weft__V1__TrainTimes *times)
{
    const Weft__V1__TrainMemory *m = times->memory;
    if (times->seconds > 0) {
        c->wait_share = CLAMP(times->waited / times->seconds, 0, 1);
    }
    if (m != NULL) {
        c->memory_bytes = plan_message_train_total(m);
    }
}

static void on_message(const ProtobufCMessage *message, void *user)
{
    TrainCall *c = user;
    const Weft__V1__TrainReport *report = (const Weft__V1__TrainReport *)message;
    if (c->ended) {
        return;
    }
    c->heard_us = loop_now_us(c->loop);
    switch (report->report_case) {
    case WEFT__V1__TRAIN_REPORT__REPORT_WANT:
        c->events.want(c, report->want, c->events.user);
        break;
    case WEFT__V1__TRAIN_REPORT__REPORT_LOADED:
        on_loaded(c, report->loaded);
        break;
    case WEFT__V1__TRAIN_REPORT__REPORT_RUNNING:
        c->running = true;
        break;
    case WEFT__V1__TRAIN_REPORT__REPORT_STEP:
        c->events.step(report->step, c->events.user);
        break;
    case WEFT__V1__TRAIN_REPORT__REPORT_BEGIN:
    case WEFT__V1__TRAIN_REPORT__REPORT_PIECE:
    case WEFT__V1__TRAIN_REPORT__REPORT_PART:
        c->events.save(c, report, c->events.user);
        break;
    case WEFT__V1__TRAIN_REPORT__REPORT_TIMES:
        on_times(c, report->times);
        break;
    case WEFT__V1__TRAIN_REPORT__REPORT_TRACE:
        c->events.trace(c, report->trace, c->events.user);
        break;
    case WEFT__V1__TRAIN_REPORT__REPORT_DONE:
        on_done_report(c, report->done);
        break;
    default:
        break; /* of a newer release */
    }
}

static void on_call_done(const GError *error, void *user)
{
    TrainCall *c = user;
    c->call = NULL;
    if (c->ended) {
        call_free(c);
        return;
    }
    g_autoptr(GError) early = g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST,
                                          "worker %s ended its part of the job", c->worker);
    call_fail(c, error != NULL ? error : early);
}

/* worker: attached. load is borrowed for the call. */
static TrainCall *call_new(Loop *loop, const Member *worker, uint32_t device, uint32_t index,
                           Weft__V1__TrainLoad *load, const TrainCallEvents *events)
{
    TrainCall *c = g_new0(TrainCall, 1);
    c->worker = g_strdup(member_name(worker));
    c->device = device;
    c->index = index;
    c->loop = loop;
    c->events = *events;
    c->heard_us = loop_now_us(loop);
    c->wait_share = -1;
    const RpcCallbacks callbacks = {.on_message = on_message, .on_done = on_call_done};
    c->call = rpc_call_start(member_channel(worker), &weft__v1__trainer__descriptor, "Train", NULL,
                             0, false, callbacks, c);
    Weft__V1__TrainCommand command = WEFT__V1__TRAIN_COMMAND__INIT;
    command.command_case = WEFT__V1__TRAIN_COMMAND__COMMAND_LOAD;
    command.load = load;
    rpc_client_send(c->call, &command.base);
    return c;
}

static uint32_t n_ranks(const Plan *plan)
{
    const TrainPosition all = train_position(plan, 0, 0, 0);
    return train_world(&all);
}

bool train_calls_possible(const Plan *plan, const Members *members)
{
    TrainPosition at;
    for (uint32_t g = 0; g < n_ranks(plan); g++) {
        Member *m = members_find(members, train_plan_rank(plan, g, &at)->worker);
        if (m == NULL || member_channel(m) == NULL) {
            return false;
        }
    }
    return true;
}

void train_calls_load(GPtrArray *calls, Loop *loop, const Plan *plan, const Members *members,
                      Weft__V1__TrainLoad *load, const TrainCallEvents *events)
{
    for (uint32_t g = 0; g < n_ranks(plan); g++) {
        TrainPosition at;
        const PlanRank *rank = train_plan_rank(plan, g, &at);
        load->replica = at.replica;
        load->stage = at.stage;
        load->rank = at.rank;
        g_ptr_array_add(calls, call_new(loop, members_find(members, rank->worker), rank->device, g,
                                        load, events));
    }
}

const char **train_calls_hosts(const GPtrArray *calls, const Members *members)
{
    const char **hosts = g_new0(const char *, calls->len + 1);
    for (guint i = 0; i < calls->len; i++) {
        const TrainCall *c = calls->pdata[i];
        const Member *m = members_find(members, c->worker);
        const Weft__V1__Hello *hello = m != NULL ? member_hello(m) : NULL;
        hosts[i] = hello != NULL && hello->host[0] != '\0' ? hello->host : NULL;
    }
    return hosts;
}

GError *train_call_lost(const TrainCall *c, const Members *members, int64_t stall_us)
{
    const Member *member = members_find(members, c->worker);
    if (member == NULL) {
        return g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST, "worker %s is gone", c->worker);
    }
    if (!member_attached(member)) {
        return member_lost_error(member, "training");
    }
    if (member_state(member) == MEMBER_DRAINING) {
        return g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST, "worker %s is drained", c->worker);
    }
    if (!c->loaded && loop_now_us(c->loop) - c->heard_us > stall_us) {
        return g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST,
                           "worker %s said nothing for %d s while it was loading", c->worker,
                           (int)(stall_us / 1000000));
    }
    return NULL;
}

void train_call_answer(TrainCall *c, uint64_t want, const void *data, size_t size)
{
    Weft__V1__TrainCommand command = WEFT__V1__TRAIN_COMMAND__INIT;
    Weft__V1__TrainBytes bytes = WEFT__V1__TRAIN_BYTES__INIT;
    bytes.want = want;
    bytes.data = (ProtobufCBinaryData){size, (uint8_t *)data};
    command.command_case = WEFT__V1__TRAIN_COMMAND__COMMAND_BYTES;
    command.bytes = &bytes;
    if (c->call != NULL) {
        rpc_client_send(c->call, &command.base);
    }
}

void train_call_taken(TrainCall *c, uint64_t bytes)
{
    Weft__V1__TrainCommand command = WEFT__V1__TRAIN_COMMAND__INIT;
    Weft__V1__TrainTaken taken = WEFT__V1__TRAIN_TAKEN__INIT;
    taken.bytes = bytes;
    command.command_case = WEFT__V1__TRAIN_COMMAND__COMMAND_TAKEN;
    command.taken = &taken;
    if (c->call != NULL) {
        rpc_client_send(c->call, &command.base);
    }
}

static void call_start(TrainCall *c, const Weft__V1__TrainStart *start)
{
    Weft__V1__TrainCommand command = WEFT__V1__TRAIN_COMMAND__INIT;
    command.command_case = WEFT__V1__TRAIN_COMMAND__COMMAND_START;
    command.start = (Weft__V1__TrainStart *)start;
    if (c->call != NULL) {
        rpc_client_send(c->call, &command.base);
    }
}

/* Where a rank is to be found; borrows. */
static void fill_address(Weft__V1__RankAddress *out, const TrainCall *c, Members *members)
{
    const Member *member = members_find(members, c->worker);
    const Weft__V1__Hello *hello = member != NULL ? member_hello(member) : NULL;
    gsize size;
    const void *address = g_bytes_get_data(c->address, &size);
    weft__v1__rank_address__init(out);
    out->rank = c->index;
    out->worker = c->worker;
    out->data_address = (ProtobufCBinaryData){size, (uint8_t *)address};
    out->boot_id = (ProtobufCBinaryData){sizeof c->boot_id, (uint8_t *)c->boot_id};
    if (hello != NULL) {
        out->host = hello->host;
        out->threads = cpu_rank_threads(hello->threads, hello->n_devices);
        out->cpus = hello->cpus;
        out->n_cpus = hello->n_cpus;
    }
}

void train_calls_start(const GPtrArray *calls, Members *members, Random *random)
{
    uint8_t secret[32];
    random_fill(random, secret, sizeof secret);
    g_autofree Weft__V1__RankAddress *ranks = g_new0(Weft__V1__RankAddress, calls->len);
    g_autofree Weft__V1__RankAddress **pointers = g_new0(Weft__V1__RankAddress *, calls->len);
    for (guint i = 0; i < calls->len; i++) {
        fill_address(&ranks[i], calls->pdata[i], members);
        pointers[i] = &ranks[i];
    }
    Weft__V1__TrainStart start = WEFT__V1__TRAIN_START__INIT;
    start.secret = (ProtobufCBinaryData){sizeof secret, secret};
    start.ranks = pointers;
    start.n_ranks = calls->len;
    for (guint i = 0; i < calls->len; i++) {
        call_start(calls->pdata[i], &start);
    }
    memset(secret, 0, sizeof secret);
}

void train_call_end(TrainCall *c)
{
    if (c == NULL) {
        return;
    }
    c->ended = true;
    if (c->call == NULL) {
        call_free(c);
    } else if (c->done) {
        rpc_client_half_close(c->call);
    } else {
        rpc_client_cancel(c->call);
    }
}
