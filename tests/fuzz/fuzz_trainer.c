/* What a coordinator may send to service Trainer of a worker: commands on a Train call, and
 * requests for estimates. The trainings are the real ones, with engines on threads of their own; an
 * honest coordinator answers in between as far as a record says, so that what follows meets a rank
 * that loads, trains or saves. The worker must live on, answer at the end, and free everything. */
#include "proto/base/log.h"
#include "proto/model/model_message.h"
#include "tests/fuzz/calls.h"
#include "transport/daemon/daemon.h"
#include "transport/rpc/inproc/inproc.h"
#include "weft/v1/train.pb-c.h"
#include "worker/agent/train_estimate.h"
#include "worker/agent/trainings.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define TURN_US 1000
#define HONEST_US 2000000 /* no honest answer takes longer, whatever the settings: not awaited */
#define END_US (60 * INT64_C(1000000))

enum {
    KIND_COMMAND, /* on the open Train call, else on a new one */
    KIND_ESTIMATE,
    KIND_CLOSE, /* half-closes the call */
    KIND_CANCEL,
    KIND_HONEST, /* answers until [first byte] more reports have come, or the end */
    N_KINDS
};

const ProtobufCMessageDescriptor *record_type(uint8_t kind)
{
    kind %= N_KINDS;
    return kind == KIND_COMMAND    ? &weft__v1__train_command__descriptor
           : kind == KIND_ESTIMATE ? &weft__v1__train_estimate_request__descriptor
                                   : NULL;
}

typedef struct World {
    MainLoop *main;
    Loop *loop;
    RpcTransport *transport;
    LinkFill *fill;
    TaskPool *pool;
    SliceStore *store;
    Deployments *deployments;
    Trainings *trainings;
    RpcServer *server;
    RpcChannel *channel;
    uint8_t boot_id[16];
    RpcClientCall *call; /* NULL: none is open */
    GBytes *address;     /* of the rank, once it is loaded */
    unsigned due;        /* reports until the honest coordinator pauses */
    bool paused;         /* or the call ended, or nothing comes by itself: */
    bool rests;          /* the rank is loaded and not started, or done */
    unsigned open;       /* calls */
    bool answered;       /* the last estimate */
    bool quiet;          /* never */
} World;

/* ---- the worker ---- */

static void on_train(RpcCall *call, const ProtobufCMessage *command, void *user)
{
    World *w = user;
    trainings_on_command(w->trainings, call, (const Weft__V1__TrainCommand *)command);
}

static void on_estimate(RpcCall *call, const ProtobufCMessage *request, void *user)
{
    World *w = user;
    train_estimate_answer(w->pool, NULL, 0, call, (const Weft__V1__TrainEstimateRequest *)request);
}

static void open_worker(World *w)
{
    static const RpcMethod methods[] = {{"Train", on_train, RPC_ROLE_COORDINATOR},
                                        {"Estimate", on_estimate, RPC_ROLE_COORDINATOR},
                                        {NULL}};
    g_autofree char *own = rpc_inproc_certificate("w0", "worker", NULL),
                    *caller = rpc_inproc_certificate("c0", "coordinator", NULL);
    const RpcServerOptions server = {.listen = "w0", .credentials = {"ca", own, "key", true}};
    const RpcChannelOptions channel = {.target = "w0", .credentials = {"ca", caller, "key", false}};
    const DeploymentsOptions options = {.loop = w->loop,
                                        .pool = w->pool,
                                        .store = w->store,
                                        .fill = w->fill,
                                        .name = "w0",
                                        .boot_id = w->boot_id,
                                        .memory_bytes = 64u << 20,
                                        .threads = 1,
                                        .isa = ISA_GENERIC,
                                        .crowded = true};
    w->deployments = deployments_new(&options);
    deployments_set_generation(w->deployments, "test", 1);
    w->trainings = trainings_new(&options, w->deployments);
    w->server = rpc_server_new(w->transport, w->loop, &server, NULL);
    rpc_server_add(w->server, &weft__v1__trainer__descriptor, methods, w);
    g_assert_true(rpc_server_start(w->server, NULL));
    w->channel = rpc_channel_new(w->transport, w->loop, &channel, NULL);
}

static void world_open(World *w)
{
    w->main = main_loop_new();
    w->loop = main_loop_loop(w->main);
    w->transport = rpc_transport_inproc_new();
    w->fill = link_fill_inproc_new();
    w->pool = task_pool_new(w->loop, 1);
    w->store = slice_store_new(NULL, NULL);
    memset(w->boot_id, 9, sizeof w->boot_id);
    open_worker(w);
}

static void turn(World *w)
{
    main_loop_run_until(w->main, &w->quiet, TURN_US);
}

/* ---- the coordinator ---- */

static void command(World *w, Weft__V1__TrainCommand__CommandCase which, void *what)
{
    Weft__V1__TrainCommand m = WEFT__V1__TRAIN_COMMAND__INIT;
    m.command_case = which;
    m.load = what; /* any member of the union */
    rpc_client_send(w->call, &m.base);
}

static void answer_want(World *w, const Weft__V1__TrainWant *want)
{
    const uint64_t n = MIN(want->n, (uint64_t)256 << 10);
    g_autofree uint32_t *data = g_new0(uint32_t, n + 1);
    Weft__V1__TrainBytes bytes = WEFT__V1__TRAIN_BYTES__INIT;
    for (uint64_t i = 0; want->rect == NULL && i < n; i++) {
        data[i] = (uint32_t)(i * i % 16) | 1u << 30;
    }
    bytes.want = want->id;
    bytes.data = (ProtobufCBinaryData){n * sizeof *data, (uint8_t *)data};
    command(w, WEFT__V1__TRAIN_COMMAND__COMMAND_BYTES, &bytes);
}

static void answer_piece(World *w, const Weft__V1__TrainPiece *piece)
{
    Weft__V1__TrainTaken taken = WEFT__V1__TRAIN_TAKEN__INIT;
    taken.bytes = piece->data.len;
    command(w, WEFT__V1__TRAIN_COMMAND__COMMAND_TAKEN, &taken);
}

static void on_report(const ProtobufCMessage *message, void *user)
{
    World *w = user;
    const Weft__V1__TrainReport *r = (const Weft__V1__TrainReport *)message;
    if (w->call == NULL) {
        return;
    }
    if (r->report_case == WEFT__V1__TRAIN_REPORT__REPORT_LOADED) {
        g_clear_pointer(&w->address, g_bytes_unref);
        w->address = g_bytes_new(r->loaded->data_address.data, r->loaded->data_address.len);
    } else if (r->report_case == WEFT__V1__TRAIN_REPORT__REPORT_WANT) {
        answer_want(w, r->want);
    } else if (r->report_case == WEFT__V1__TRAIN_REPORT__REPORT_PIECE) {
        answer_piece(w, r->piece);
    }
    w->rests = w->rests || r->report_case == WEFT__V1__TRAIN_REPORT__REPORT_LOADED ||
               r->report_case == WEFT__V1__TRAIN_REPORT__REPORT_DONE;
    w->due -= w->due > 0;
    w->paused = w->paused || w->rests || w->due == 0;
}

/* One of the calls; the last one is w->call. */
typedef struct Caller {
    World *w;
    RpcClientCall *call;
} Caller;

static void on_caller_report(const ProtobufCMessage *message, void *user)
{
    const Caller *c = user;
    if (c->call == c->w->call) {
        on_report(message, c->w);
    }
}

static void on_caller_done(const GError *error, void *user)
{
    Caller *c = user;
    if (c->call == c->w->call) {
        c->w->call = NULL;
        c->w->paused = true;
    }
    c->w->open--;
    g_free(c);
}

static void open_call(World *w)
{
    const RpcCallbacks callbacks = {on_caller_report, on_caller_done};
    Caller *c = g_new0(Caller, 1);
    c->w = w;
    w->rests = false;
    w->open++;
    w->call = c->call = rpc_call_start(w->channel, &weft__v1__trainer__descriptor, "Train", NULL, 0,
                                       true, callbacks, c);
}

static void on_estimated(const ProtobufCMessage *message, void *user) {}

static void on_estimate_done(const GError *error, void *user)
{
    World *w = user;
    w->answered = true;
    w->open--;
}

static void estimate(World *w, const ProtobufCMessage *request)
{
    const RpcCallbacks callbacks = {on_estimated, on_estimate_done};
    w->answered = false;
    w->open++;
    rpc_call_start(w->channel, &weft__v1__trainer__descriptor, "Estimate", request, 60000, true,
                   callbacks, w);
}

/* ---- records ---- */

static void set_binary(ProtobufCBinaryData *to, const void *bytes, size_t size)
{
    g_free(to->data); /* protobuf-c's allocator is malloc, like GLib's */
    *to = (ProtobufCBinaryData){size, g_memdup2(bytes, size)};
}

/* What no seed can hold: where the rank listens, and this process's boot id. */
static void fill_in(World *w, const Weft__V1__TrainCommand *m)
{
    if (m->command_case != WEFT__V1__TRAIN_COMMAND__COMMAND_START || m->start == NULL) {
        return;
    }
    w->rests = false;
    for (size_t i = 0; i < m->start->n_ranks; i++) {
        Weft__V1__RankAddress *rank = m->start->ranks[i];
        if (rank->boot_id.len == sizeof w->boot_id) {
            memcpy(rank->boot_id.data, w->boot_id, sizeof w->boot_id);
        }
        if (rank->data_address.len > 0 && w->address != NULL) {
            gsize size;
            const void *address = g_bytes_get_data(w->address, &size);
            set_binary(&rank->data_address, address, size);
        }
    }
}

static void go_on(World *w, unsigned reports)
{
    w->due = reports;
    w->paused = w->call == NULL || w->rests || reports == 0;
    main_loop_run_until(w->main, &w->paused, HONEST_US);
}

static void play(World *w, const Record *record)
{
    const unsigned kind = record->kind % N_KINDS;
    ProtobufCMessage *message = record_unpack(record);
    if (message != NULL && kind == KIND_COMMAND) {
        if (w->call == NULL) {
            open_call(w);
        }
        fill_in(w, (const Weft__V1__TrainCommand *)message);
        rpc_client_send(w->call, message);
    } else if (message != NULL) {
        estimate(w, message);
    } else if (kind == KIND_CLOSE && w->call != NULL) {
        rpc_client_half_close(w->call);
        w->call = NULL; /* what comes next is another call */
    } else if (kind == KIND_CANCEL && w->call != NULL) {
        rpc_client_cancel(w->call);
        w->call = NULL;
    } else if (kind == KIND_HONEST && record->size > 0) {
        go_on(w, record->bytes[0]);
    }
    if (message != NULL) {
        protobuf_c_message_free_unpacked(message, NULL);
    }
    turn(w);
}

/* ---- the end ---- */

static void world_close(World *w)
{
    const Weft__V1__TrainEstimateRequest nothing = WEFT__V1__TRAIN_ESTIMATE_REQUEST__INIT;
    estimate(w, &nothing.base);
    g_assert_true(main_loop_run_until(w->main, &w->answered, END_US)); /* refused, that is */
    trainings_shut_down(w->trainings);
    deployments_shut_down(w->deployments);
    w->call = NULL;
    rpc_channel_free(w->channel);
    for (int64_t us = 0; !trainings_is_empty(w->trainings) && us < END_US; us += TURN_US) {
        turn(w);
    }
    rpc_server_free(w->server, 0);
    turn(w);
    g_assert_true(trainings_is_empty(w->trainings));
    g_assert_true(deployments_is_empty(w->deployments));
    g_assert_cmpuint(w->open, ==, 0);
    task_pool_free(w->pool);
    turn(w);
    trainings_free(w->trainings);
    deployments_free(w->deployments);
    slice_store_free(w->store);
    rpc_transport_inproc_free(w->transport);
    main_loop_free(w->main);
    link_fill_free(w->fill);
    g_clear_pointer(&w->address, g_bytes_unref);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    World w = {0};
    Record record;
    world_open(&w);
    for (Records r = {data, size, 0}; records_next(&r, &record);) {
        play(&w, &record);
    }
    world_close(&w);
    return 0;
}
