#include "tests/unit/coordinator/sim_cluster.h"

#include "coordinator/ca/state_files.h"
#include "coordinator/message.h"
#include "proto/base/error.h"
#include "proto/base/hash.h"
#include "proto/base/version.h"
#include "proto/model/dtype.h"
#include "tests/unit/coordinator/tiny_gguf.h"
#include "tests/unit/remove_tree.h"

#include <glib/gstdio.h>
#include <stdio.h>
#include <string.h>

#define TOKEN_US 20000
#define FENCE_US 3500000

/* ---- the worker's services ---- */

typedef struct Stream {
    FakeWorker *worker;
    RpcCall *call; /* referenced */
    char *request;
    uint32_t choice, position, end, score_end, n_sent;
    size_t logits_bytes;
    uint32_t *prompt;
    LoopTimer *timer;
} Stream;

static void stream_free(void *data)
{
    Stream *s = data;
    loop_timer_cancel(s->worker->loop, s->timer);
    rpc_call_on_cancel(s->call, NULL, NULL);
    rpc_call_unref(s->call);
    g_free(s->request);
    g_free(s->prompt);
    g_free(s);
}

static void stream_end(Stream *s)
{
    g_ptr_array_remove_fast(s->worker->streams, s);
}

static void message_free_data(void *data)
{
    message_free(data);
}

static bool is_answered(const FakeWorker *w, RpcCall *call, const ProtobufCMessage *request)
{
    return w->answer != NULL && w->answer(call, request, w->answer_user);
}

static Weft__V1__Held *find_held(FakeWorker *w, const Weft__V1__Stamp *stamp)
{
    for (guint i = 0; i < w->held->len; i++) {
        Weft__V1__Held *held = g_ptr_array_index(w->held, i);
        if (strcmp(held->job, stamp->job) == 0 && held->replica == stamp->replica &&
            held->epoch == stamp->epoch) {
            return held;
        }
    }
    return NULL;
}

static void on_load(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    FakeWorker *w = user;
    const Weft__V1__LoadRequest *request = (const Weft__V1__LoadRequest *)message;
    w->n_loads++;
    if (is_answered(w, call, message)) {
        return;
    }
    if (w->fail_load) {
        g_autoptr(GError) error = g_error_new(WEFT_ERROR, WEFT_ERROR_IO, "disk full in the cache");
        rpc_call_finish(call, error);
        return;
    }
    g_assert_cmpuint(request->model->n_tensors, >, 0);
    Weft__V1__Held held = WEFT__V1__HELD__INIT;
    held.job = request->stamp->job;
    held.replica = request->stamp->replica;
    held.epoch = request->stamp->epoch;
    held.generation = request->stamp->generation;
    held.stage = request->stage;
    held.rank = request->rank;
    held.state = (char *)"loaded";
    held.unsealed = !request->seal;
    g_ptr_array_add(w->held, message_copy(&held.base));
    Weft__V1__LoadProgress progress = WEFT__V1__LOAD_PROGRESS__INIT;
    progress.bytes_done = progress.bytes_total = 100;
    progress.loaded = true;
    progress.data_address = (ProtobufCBinaryData){strlen(w->name), (uint8_t *)w->name};
    progress.boot_id = (ProtobufCBinaryData){sizeof w->boot_id, w->boot_id};
    rpc_call_send(call, &progress.base);
    rpc_call_finish(call, NULL);
}

static void on_start(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    FakeWorker *w = user;
    const Weft__V1__StartRequest *request = (const Weft__V1__StartRequest *)message;
    w->n_starts++;
    if (is_answered(w, call, message)) {
        return;
    }
    g_assert_cmpuint(request->secret.len, ==, 32);
    Weft__V1__Held *held = find_held(w, request->stamp);
    if (w->forgets && held != NULL) {
        w->forgets = false;
        g_ptr_array_remove(w->held, held);
        held = NULL;
    }
    if (held == NULL) { /* fenced since it loaded */
        g_autoptr(GError) error = g_error_new(WEFT_ERROR, WEFT_ERROR_NOT_FOUND,
                                              "nothing is loaded on worker %s", w->name);
        rpc_call_finish(call, error);
        return;
    }
    free(held->state);
    held->state = strdup("ready");
    Weft__V1__StartResponse response = WEFT__V1__START_RESPONSE__INIT;
    rpc_call_reply(call, &response.base);
}

static void on_drop(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    FakeWorker *w = user;
    const Weft__V1__DropRequest *request = (const Weft__V1__DropRequest *)message;
    w->n_drops++;
    w->n_full_drops += !request->keep_weights;
    Weft__V1__Held *held = find_held(w, request->stamp);
    if (held != NULL) {
        g_ptr_array_remove(w->held, held);
    }
    Weft__V1__DropResponse response = WEFT__V1__DROP_RESPONSE__INIT;
    rpc_call_reply(call, &response.base);
}

/* The fake model: the token at a position is a function of (prompt's first id, position). Printable
 * ASCII. */
static uint32_t fake_token(const Stream *s, uint32_t position)
{
    uint32_t text[2] = {s->prompt[0], position};
    return 'a' + (hash128(text, sizeof text).bytes[0] + s->worker->lies) % 26;
}

/* On resume: what the client has had must be what this model says. */
static void check_generated(const Stream *s, const Weft__V1__GenerateRequest *request)
{
    for (size_t i = 0; i < request->n_generated && !s->worker->lies; i++) {
        g_assert_cmpuint(request->generated[i], ==,
                         fake_token(s, (uint32_t)(request->n_prompt + i)));
    }
}

static void stream_send(Stream *s, uint32_t id)
{
    uint32_t row[2] = {id, s->position};
    Hash128 hash = hash128(row, sizeof row);
    Weft__V1__TokenEvent event = WEFT__V1__TOKEN_EVENT__INIT;
    event.request = s->request;
    event.choice = s->choice;
    event.position = s->position;
    event.id = id;
    event.logprob = -1;
    event.row_hash = (ProtobufCBinaryData){sizeof hash.bytes, hash.bytes};
    g_autofree uint8_t *logits = g_malloc0(s->logits_bytes);
    event.logits = (ProtobufCBinaryData){s->logits_bytes, logits};
    rpc_call_send(s->call, &event.base);
    if (s->worker->repeat == 2) {
        event.id++;
    }
    if (s->worker->repeat != 0) {
        rpc_call_send(s->call, &event.base);
    }
}

/* Too much waits for its reader: worker/agent/leader_service.c. */
static void stream_end_full(Stream *s)
{
    g_autoptr(GError) error =
        g_error_new(WEFT_ERROR, WEFT_ERROR_FULL, "request %s: the reader is too slow", s->request);
    rpc_call_on_cancel(s->call, NULL, NULL);
    rpc_call_finish(s->call, error);
    stream_end(s);
}

static void stream_tick(void *user)
{
    Stream *s = user;
    s->timer = NULL;
    bool score = s->score_end != 0;
    if (s->worker->stands) {
        s->timer = loop_timer_start(s->worker->loop, TOKEN_US, stream_tick, s);
        return;
    }
    if (s->worker->full_after > 0 && s->n_sent >= s->worker->full_after) {
        stream_end_full(s);
        return;
    }
    if (s->position < (score ? s->score_end : s->end)) {
        s->n_sent++;
        stream_send(s, score ? s->prompt[s->position] : fake_token(s, s->position));
        s->position++;
        s->timer = loop_timer_start(s->worker->loop, TOKEN_US, stream_tick, s);
        return;
    }
    Weft__V1__TokenEvent event = WEFT__V1__TOKEN_EVENT__INIT;
    event.request = s->request;
    event.done = true;
    event.finish_reason = (char *)"length";
    event.prefill_us = 1000;
    event.decode_us = 2000;
    event.wire_bytes = 64;
    rpc_call_send(s->call, &event.base);
    rpc_call_finish(s->call, NULL);
    stream_end(s);
}

static void on_stream_cancel(void *user)
{
    stream_end(user);
}

static void on_generate(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    FakeWorker *w = user;
    const Weft__V1__GenerateRequest *request = (const Weft__V1__GenerateRequest *)message;
    w->n_generates++;
    if (is_answered(w, call, message)) {
        return;
    }
    if (w->fail_generate != 0) {
        g_autoptr(GError) error =
            g_error_new(WEFT_ERROR, w->fail_generate, "worker %s: generation refused", w->name);
        rpc_call_finish(call, error);
        return;
    }
    if (find_held(w, request->stamp) == NULL || request->stamp->generation != w->generation) {
        g_autoptr(GError) error =
            g_error_new(WEFT_ERROR, WEFT_ERROR_STALE, "worker %s holds no epoch %" G_GUINT64_FORMAT,
                        w->name, request->stamp->epoch);
        rpc_call_finish(call, error);
        return;
    }
    Stream *s = g_new0(Stream, 1);
    s->worker = w;
    s->call = rpc_call_ref(call);
    s->request = g_strdup(request->request);
    s->choice = request->choice;
    s->prompt = g_memdup2(request->prompt, request->n_prompt * sizeof(uint32_t));
    bool score = request->kind == WEFT__V1__REQUEST_KIND__SCORE;
    s->position =
        score ? request->score_from : (uint32_t)(request->n_prompt + request->n_generated);
    check_generated(s, request);
    w->n_resumed += request->n_generated > 0;
    s->logits_bytes = request->want_logits ? w->logits_bytes : 0;
    s->score_end = score ? (uint32_t)request->n_prompt : 0;
    s->end = (uint32_t)request->n_prompt + request->max_tokens;
    g_ptr_array_add(w->streams, s);
    rpc_call_on_cancel(call, on_stream_cancel, s);
    if (!w->silent) {
        s->timer = loop_timer_start(w->loop, TOKEN_US, stream_tick, s);
    }
}

/* ---- attachment ---- */

static void send_hello(FakeWorker *w)
{
    Weft__V1__PackedSize packed = WEFT__V1__PACKED_SIZE__INIT;
    packed.type = DTYPE_F32;
    packed.block_bytes = 4;
    Weft__V1__PackedSize *packed_list[] = {&packed};
    Weft__V1__Measured measured = WEFT__V1__MEASURED__INIT;
    measured.read_bytes_per_s = 1e10;
    measured.int8_ops_per_s = 1e11;
    measured.f32_ops_per_s = 5e10;
    measured.link_latency_s = 1e-5;
    measured.link_bytes_per_s = 1e9;
    Weft__V1__Hello hello = WEFT__V1__HELLO__INIT;
    hello.protocol_version = w->protocol_version;
    hello.release = (char *)"9.9";
    hello.numerics_version = WEFT_NUMERICS_VERSION;
    hello.numerics_classes = w->numerics_classes != 0 ? w->numerics_classes : 1;
    hello.devices = w->devices;
    hello.n_devices = w->n_devices;
    hello.boot_id = (ProtobufCBinaryData){sizeof w->boot_id, w->boot_id};
    hello.control_address = w->address;
    hello.host = w->name;
    hello.isa = (char *)"generic";
    hello.threads = 1;
    hello.memory_bytes = w->memory_bytes;
    hello.packed = packed_list;
    hello.n_packed = 1;
    hello.measured = &measured;
    hello.held = (Weft__V1__Held **)w->held->pdata;
    hello.n_held = w->held->len;
    Weft__V1__WorkerReport report = WEFT__V1__WORKER_REPORT__INIT;
    report.report_case = WEFT__V1__WORKER_REPORT__REPORT_HELLO;
    report.hello = &hello;
    rpc_client_send(w->attach, &report.base);
}

/* As a worker does that was stopped or cut off (worker/agent/attach.c): the epoch's work is dropped
 * before anything else, and it says hello anew. */
static void fence(FakeWorker *w)
{
    w->n_fences++;
    while (w->streams->len > 0) {
        Stream *s = g_ptr_array_index(w->streams, 0);
        g_autoptr(GError) error = g_error_new(WEFT_ERROR, WEFT_ERROR_STALE, "fenced");
        rpc_call_on_cancel(s->call, NULL, NULL);
        rpc_call_finish(s->call, error);
        stream_end(s);
    }
    sim_trainer_fence(w->trainer);
    g_ptr_array_set_size(w->held, 0);
    w->acked_us = INT64_MAX;
    w->welcomed = false;
    if (w->attach != NULL) {
        rpc_client_cancel(w->attach);
    }
}

static void check_fence(FakeWorker *w)
{
    if (w->acked_us != INT64_MAX && loop_now_us(w->loop) - w->acked_us >= FENCE_US) {
        fence(w);
    }
}

static void send_heartbeat(void *user)
{
    FakeWorker *w = user;
    check_fence(w);
    Weft__V1__Heartbeat heartbeat = WEFT__V1__HEARTBEAT__INIT;
    heartbeat.sequence = ++w->sequence;
    heartbeat.held = (Weft__V1__Held **)w->held->pdata;
    heartbeat.n_held = w->held->len;
    heartbeat.waiting = (Weft__V1__Waiting **)w->waiting->pdata;
    heartbeat.n_waiting = w->waiting->len;
    heartbeat.leaving = w->leaving;
    heartbeat.problem = (char *)(w->problem != NULL ? w->problem : "");
    Weft__V1__WorkerReport report = WEFT__V1__WORKER_REPORT__INIT;
    report.report_case = WEFT__V1__WORKER_REPORT__REPORT_HEARTBEAT;
    report.heartbeat = &heartbeat;
    if (w->attach != NULL && w->welcomed) {
        rpc_client_send(w->attach, &report.base);
    }
    w->timer = loop_timer_start(w->loop, SECOND / 2, send_heartbeat, w);
}

static void beat_now(FakeWorker *w)
{
    loop_timer_cancel(w->loop, w->timer);
    w->timer = loop_timer_start(w->loop, 0, send_heartbeat, w);
}

static void on_notice(const ProtobufCMessage *message, void *user)
{
    FakeWorker *w = user;
    const Weft__V1__CoordinatorNotice *notice = (const Weft__V1__CoordinatorNotice *)message;
    check_fence(w);
    bool welcome = notice->notice_case == WEFT__V1__COORDINATOR_NOTICE__NOTICE_WELCOME;
    if (!welcome && w->acked_us == INT64_MAX) {
        return;
    }
    w->acked_us = loop_now_us(w->loop);
    if (notice->notice_case == WEFT__V1__COORDINATOR_NOTICE__NOTICE_WELCOME) {
        w->n_welcomes++;
        w->generation = notice->welcome->generation;
        w->welcomed = true;
        beat_now(w);
    } else {
        w->n_keep = (unsigned)notice->ack->n_keep;
        w->n_revoked = (unsigned)notice->ack->n_revoked;
        w->draining = notice->ack->draining;
    }
}

static void worker_attach(void *user);

static void on_attach_done(const GError *error, void *user)
{
    FakeWorker *w = user;
    w->attach = NULL;
    w->welcomed = false;
    bool final =
        error != NULL && (error->code == WEFT_ERROR_VERSION || error->code == WEFT_ERROR_DENIED);
    if (final) {
        g_clear_error(&w->refused);
        w->refused = g_error_copy(error);
    } else if (w->running) {
        loop_timer_start(w->loop, SECOND / 5, worker_attach, w);
    }
}

static void worker_attach(void *user)
{
    FakeWorker *w = user;
    if (!w->running || w->attach != NULL) {
        return;
    }
    RpcCallbacks callbacks = {.on_message = on_notice, .on_done = on_attach_done};
    w->attach = rpc_call_start(w->channel, &weft__v1__cluster__descriptor, "Attach", NULL, 0, true,
                               callbacks, w);
    send_hello(w);
}

static RpcCredentials worker_credentials(FakeWorker *w)
{
    return (RpcCredentials){.ca_pem = w->cluster->ca_pem,
                            .certificate_pem = w->certificate,
                            .key_pem = "key",
                            .require_client_certificate = true};
}

FakeWorker *sim_worker_start(SimCluster *s, unsigned i)
{
    FakeWorker *w = &s->workers[i];
    g_assert_false(w->running);
    if (w->loop == NULL) {
        w->cluster = s;
        w->loop = sim_world_loop(s->world);
        snprintf(w->name, sizeof w->name, "w%u", i);
        snprintf(w->address, sizeof w->address, "w%u:1", i);
        w->protocol_version =
            w->protocol_version != 0 ? w->protocol_version : WEFT_PROTOCOL_VERSION;
        w->memory_bytes = w->memory_bytes != 0 ? w->memory_bytes : UINT64_C(1) << 30;
        w->certificate = rpc_inproc_certificate(w->name, "worker", NULL);
    }
    w->held = g_ptr_array_new_with_free_func(message_free_data);
    w->waiting = g_ptr_array_new_with_free_func(message_free_data);
    w->streams = g_ptr_array_new_with_free_func(stream_free);
    random_fill(sim_world_random(s->world), w->boot_id, sizeof w->boot_id);
    w->trainer = sim_trainer_new(w, &s->training);
    w->running = true;
    w->leaving = false;
    w->acked_us = INT64_MAX;
    static const RpcMethod worker_methods[] = {{"Load", on_load, RPC_ROLE_COORDINATOR},
                                               {"Start", on_start, RPC_ROLE_COORDINATOR},
                                               {"Drop", on_drop, RPC_ROLE_COORDINATOR},
                                               {NULL}};
    static const RpcMethod leader_methods[] = {{"Generate", on_generate, RPC_ROLE_COORDINATOR},
                                               {NULL}};
    RpcServerOptions server = {.listen = w->address, .credentials = worker_credentials(w)};
    w->server = rpc_server_new(s->transport, w->loop, &server, NULL);
    g_assert_nonnull(w->server);
    rpc_server_add(w->server, &weft__v1__worker__descriptor, worker_methods, w);
    rpc_server_add(w->server, &weft__v1__leader__descriptor, leader_methods, w);
    sim_trainer_serve(w->trainer, w->server);
    g_assert_true(rpc_server_start(w->server, NULL));
    RpcChannelOptions channel = {
        .target = CONTROL, .credentials = worker_credentials(w), .server_name = "weft-coordinator"};
    w->channel = rpc_channel_new(s->transport, w->loop, &channel, NULL);
    worker_attach(w);
    w->timer = loop_timer_start(w->loop, SECOND / 2, send_heartbeat, w);
    return w;
}

void sim_worker_kill(FakeWorker *w)
{
    if (!w->running) {
        return;
    }
    w->running = false;
    loop_timer_cancel(w->loop, w->timer);
    w->timer = NULL;
    rpc_inproc_set_fault(w->cluster->transport, w->name, NULL, RPC_INPROC_CUT);
    rpc_inproc_set_fault(w->cluster->transport, NULL, w->address, RPC_INPROC_CUT);
    g_ptr_array_unref(w->streams);
    sim_trainer_free(g_steal_pointer(&w->trainer));
    rpc_channel_free(w->channel);
    rpc_server_free(w->server, 0);
    g_ptr_array_unref(w->held);
    g_ptr_array_unref(w->waiting);
    rpc_inproc_set_fault(w->cluster->transport, w->name, NULL, RPC_INPROC_UP);
    rpc_inproc_set_fault(w->cluster->transport, NULL, w->address, RPC_INPROC_UP);
}

void sim_worker_cut(FakeWorker *w, bool cut)
{
    RpcInprocFault fault = cut ? RPC_INPROC_FROZEN : RPC_INPROC_UP;
    w->cut = cut;
    rpc_inproc_set_fault(w->cluster->transport, w->name, NULL, fault);
    rpc_inproc_set_fault(w->cluster->transport, NULL, w->address, fault);
}

void sim_worker_freeze(FakeWorker *w, bool frozen)
{
    sim_loop_freeze(w->loop, frozen);
}

/* ---- the coordinator ---- */

typedef struct Started {
    bool done;
    GError *error;
} Started;

static void on_started(const GError *error, void *user)
{
    Started *started = user;
    started->done = true;
    started->error = error != NULL ? g_error_copy(error) : NULL;
}

static void log_write(Log *self, LogLevel level, const char *line)
{
    SimCluster *s = (SimCluster *)((char *)self - offsetof(SimCluster, log_seam));
    g_string_append_printf(s->log, "%s\n", line);
    if (g_getenv("WEFT_TEST_LOG") != NULL) {
        fprintf(stderr, "%.3f %s\n", (double)sim_world_now_us(s->world) / 1e6, line);
    }
}

void sim_cluster_start(SimCluster *s)
{
    Loop *loop = sim_world_loop(s->world);
    s->coordinator_loop = loop;
    CoordinatorOptions options = {.loop = loop,
                                  .transport = s->transport,
                                  .log = &s->log_seam,
                                  .random = sim_world_random(s->world),
                                  .store = store_memory_new(s->disk, loop),
                                  .listen = CONTROL,
                                  .join_listen = JOIN,
                                  .state_dir = s->dir,
                                  .models_dir = s->dir,
                                  .seal_off = s->seal_off,
                                  .recovery_wait_us = (int64_t)s->recovery_wait_ms * 1000};
    Started started = {0};
    s->coordinator = coordinator_new(&options);
    coordinator_start(s->coordinator, on_started, &started);
    g_assert_true(sim_world_run_until(s->world, &started.done, SECOND));
    g_assert_no_error(started.error);
    g_free(s->ca_pem);
    g_assert_true(state_file_read(s->dir, "ca.crt", &s->ca_pem, NULL));
}

void sim_cluster_stop(SimCluster *s)
{
    coordinator_free(s->coordinator);
    s->coordinator = NULL;
}

SimCluster *sim_cluster_new(uint64_t seed)
{
    SimCluster *s = g_new0(SimCluster, 1);
    s->world = sim_world_new(sim_seed(seed));
    s->transport = rpc_transport_inproc_new();
    rpc_inproc_set_delay(s->transport, 200);
    s->disk = store_disk_new();
    s->recovery_wait_ms = 60000;
    s->dir = g_dir_make_tmp("weft-coordinator-XXXXXX", NULL);
    s->log = g_string_new(NULL);
    s->log_seam = (Log){.min_level = LOG_LEVEL_DEBUG, .write = log_write};
    sim_cluster_start(s);
    s->client_loop = sim_world_loop(s->world);
    g_autofree char *certificate = rpc_inproc_certificate("tester", "admin", NULL);
    RpcChannelOptions channel = {
        .target = CONTROL,
        .credentials = {.ca_pem = s->ca_pem, .certificate_pem = certificate, .key_pem = "key"},
        .server_name = "weft-coordinator"};
    s->admin = rpc_channel_new(s->transport, s->client_loop, &channel, NULL);
    return s;
}

void sim_cluster_free(SimCluster *s)
{
    for (unsigned i = 0; i < WORKERS_LIMIT; i++) {
        sim_worker_kill(&s->workers[i]);
        g_free(s->workers[i].certificate);
        g_clear_error(&s->workers[i].refused);
    }
    rpc_channel_free(s->admin);
    sim_cluster_stop(s);
    sim_world_run_for(s->world, SECOND);
    sim_world_free(s->world);
    rpc_transport_inproc_free(s->transport);
    store_disk_free(s->disk);
    remove_tree(s->dir);
    sim_training_clear(&s->training);
    g_string_free(s->log, TRUE);
    g_free(s->ca_pem);
    g_free(s->dir);
    g_free(s);
}

const char *sim_cluster_model(SimCluster *s)
{
    g_autofree char *path = g_build_filename(s->dir, "tiny.gguf", NULL);
    if (!g_file_test(path, G_FILE_TEST_EXISTS)) {
        tiny_gguf_write(path);
    }
    return "tiny.gguf";
}

void sim_run_for(SimCluster *s, int64_t us)
{
    sim_world_run_for(s->world, us);
}

/* ---- calls ---- */

static void take_run_event(Answer *a, const Weft__V1__RunEvent *event)
{
    switch (event->event_case) {
    case WEFT__V1__RUN_EVENT__EVENT_PROGRESS:
        a->n_progress++;
        if (event->progress->notice) {
            g_string_append_printf(a->notices, "%s\n", event->progress->text);
        }
        if (event->progress->stall_s > 0) {
            a->stall_s = event->progress->stall_s;
            a->predicted_stall_s = event->progress->predicted_stall_s;
        }
        break;
    case WEFT__V1__RUN_EVENT__EVENT_STARTED:
        message_replace(&a->started, event->started);
        break;
    case WEFT__V1__RUN_EVENT__EVENT_DELTA:
        g_string_append(a->text, event->delta->text);
        g_array_append_vals(a->ids, event->delta->ids, (guint)event->delta->n_ids);
        g_array_append_vals(
            a->places, &(uint64_t){(uint64_t)event->delta->window << 32 | event->delta->position},
            1);
        break;
    case WEFT__V1__RUN_EVENT__EVENT_DONE:
        message_replace(&a->run_done, event->done);
        break;
    case WEFT__V1__RUN_EVENT__EVENT_CHOICE_DONE:
        g_assert_cmpuint(event->choice_done->tokens, <=, a->ids->len);
        a->n_choices_done++;
        break;
    default:
        g_assert_not_reached();
    }
}

static void on_answer(const ProtobufCMessage *message, void *user)
{
    Answer *a = user;
    message_replace(&a->message, message);
    if (message->descriptor == &weft__v1__run_event__descriptor) {
        take_run_event(a, (const Weft__V1__RunEvent *)message);
    }
}

static void on_answer_done(const GError *error, void *user)
{
    Answer *a = user;
    a->done = true;
    a->call = NULL;
    a->error = error != NULL ? g_error_copy(error) : NULL;
    a->done_us = sim_world_now_us(a->cluster->world);
}

void sim_call(SimCluster *s, Answer *a, const ProtobufCServiceDescriptor *service,
              const char *method, const void *request)
{
    answer_clear(a);
    a->cluster = s;
    a->text = g_string_new(NULL);
    a->notices = g_string_new(NULL);
    a->ids = g_array_new(FALSE, FALSE, sizeof(uint32_t));
    a->places = g_array_new(FALSE, FALSE, sizeof(uint64_t));
    RpcCallbacks callbacks = {.on_message = on_answer, .on_done = on_answer_done};
    a->call = rpc_call_start(s->admin, service, method, request, 0, true, callbacks, a);
}

void sim_answer(SimCluster *s, Answer *a, int64_t limit_us)
{
    g_assert_true(sim_world_run_until(s->world, &a->done, limit_us));
}

void answer_clear(Answer *a)
{
    g_clear_error(&a->error);
    message_free(a->message);
    message_free(a->started);
    message_free(a->run_done);
    if (a->text != NULL) {
        g_string_free(a->text, TRUE);
        g_string_free(a->notices, TRUE);
        g_array_unref(a->ids);
        g_array_unref(a->places);
    }
    memset(a, 0, sizeof *a);
}

void sim_request_init(SimCluster *s, SimRequest *r, const char *prompt, uint32_t max_tokens,
                      uint32_t dp, uint32_t pp, uint32_t tp)
{
    r->run = (Weft__V1__RunRequest)WEFT__V1__RUN_REQUEST__INIT;
    r->layout = (Weft__V1__Layout)WEFT__V1__LAYOUT__INIT;
    r->layout.dp = dp;
    r->layout.pp = pp;
    r->layout.tp = tp;
    r->run.model = (char *)sim_cluster_model(s);
    r->run.prompt = (char *)prompt;
    r->run.max_tokens = max_tokens;
    r->run.layout = &r->layout;
}

void sim_request_begin(SimCluster *s, Answer *a, const SimRequest *r)
{
    sim_call(s, a, &weft__v1__serve__descriptor, "Run", &r->run);
}

void sim_run_begin(SimCluster *s, Answer *a, const char *prompt, uint32_t max_tokens, uint32_t pp,
                   uint32_t tp)
{
    SimRequest r;
    sim_request_init(s, &r, prompt, max_tokens, 1, pp, tp);
    sim_request_begin(s, a, &r);
}

const Weft__V1__Member *sim_status(SimCluster *s, Answer *a, const char *name)
{
    Weft__V1__StatusRequest request = WEFT__V1__STATUS_REQUEST__INIT;
    sim_call(s, a, &weft__v1__admin__descriptor, "Status", &request);
    sim_answer(s, a, SECOND);
    g_assert_no_error(a->error);
    const Weft__V1__StatusResponse *status = (const Weft__V1__StatusResponse *)a->message;
    for (size_t i = 0; i < status->n_members; i++) {
        if (strcmp(status->members[i]->name, name) == 0) {
            return status->members[i];
        }
    }
    return NULL;
}
