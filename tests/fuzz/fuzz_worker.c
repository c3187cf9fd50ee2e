/* Everything that a worker takes from others: the coordinator's calls (Load, Start, Drop,
 * Generate), its notices on the Attach stream, peers' Fetch, and what sources answer to the
 * worker's own Fetch. The agent is the real one, on inproc, a virtual clock and one thread; it must
 * live on, serve at the end, and free everything. Kind KIND_READY makes a deployment ready the
 * honest way, so that what follows meets a running engine. */
#include "grpc/health.pb-c.h"
#include "grpc/reflection_v1.pb-c.h"
#include "proto/plan/plan_message.h"
#include "tests/fuzz/calls.h"
#include "tests/unit/worker/fake_coordinator.h"
#include "worker/agent/agent.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define SECOND 1000000ll
#define TURN_US 5000

/* Seeds name kinds by number: append, never insert. */
static const struct {
    const ProtobufCServiceDescriptor *service;
    const char *method, *role;
    bool stream;
} calls[] = {
    {&weft__v1__worker__descriptor, "Load", "coordinator", false},
    {&weft__v1__worker__descriptor, "Start", "coordinator", false},
    {&weft__v1__worker__descriptor, "Drop", "coordinator", false},
    {&weft__v1__leader__descriptor, "Generate", "coordinator", false},
    {&weft__v1__slices__descriptor, "Fetch", "worker", false},
    {&grpc__health__v1__health__descriptor, "Check", "probe", false},
    {&grpc__health__v1__health__descriptor, "Watch", "probe", false},
    {&grpc__reflection__v1__server_reflection__descriptor, "ServerReflectionInfo", "admin", true},
};
enum {
    KIND_NOTICE = G_N_ELEMENTS(calls),
    KIND_CHUNK, /* of what the coordinator answers to the next Fetch, in place of the truth */
    KIND_READY, /* loads and starts epoch 1 */
    KIND_TIME,  /* first byte x 100 ms pass */
    N_KINDS
};

const ProtobufCMessageDescriptor *record_type(uint8_t kind)
{
    kind %= N_KINDS;
    if (kind < G_N_ELEMENTS(calls)) {
        return protobuf_c_service_descriptor_get_method_by_name(calls[kind].service,
                                                                calls[kind].method)
            ->input;
    }
    return kind == KIND_NOTICE  ? &weft__v1__coordinator_notice__descriptor
           : kind == KIND_CHUNK ? &weft__v1__fetch_chunk__descriptor
                                : NULL;
}

typedef struct World {
    SimWorld *sim;
    RpcTransport *transport;
    LinkFill *fill;
    FakeCoordinator *c;
    Agent *agent;
    RpcChannel *channels[G_N_ELEMENTS(calls)];
    GPtrArray *chunks;
    bool refused, stopped;
} World;

static TinyModel *model(void)
{
    static const TinyShape shape = {1,          64,         2,          1,    32,    64,   600,
                                    DTYPE_Q8_0, DTYPE_Q8_0, DTYPE_Q8_0, true, false, false};
    static TinyModel *tiny;
    if (tiny == NULL) {
        tiny = tiny_model_new(&shape, 5);
    }
    return tiny;
}

/* ---- time ---- */

static void run(World *w, int64_t duration_us)
{
    for (int64_t at = 0; at < duration_us; at += TURN_US) {
        sim_world_run_for(w->sim, TURN_US);
        while (agent_step(w->agent)) {
        }
    }
}

static void run_until(World *w, const bool *done)
{
    for (int i = 0; i < 2000 && !*done; i++) {
        run(w, TURN_US);
    }
}

/* ---- life ---- */

static void on_refused(const GError *error, void *user)
{
    ((World *)user)->refused = true;
}

static void on_stopped(void *user)
{
    ((World *)user)->stopped = true;
}

static void free_message(void *message)
{
    protobuf_c_message_free_unpacked(message, NULL);
}

static RpcChannel *channel_as(World *w, const char *role)
{
    g_autofree char *certificate = rpc_inproc_certificate("caller", role, "99");
    RpcChannelOptions options = {.target = agent_address(w->agent),
                                 .credentials = {"ca", certificate, "key", false}};
    return rpc_channel_new(w->transport, w->c->loop, &options, NULL);
}

static bool answer_fetch(RpcCall *call, void *user)
{
    World *w = user;
    if (w->chunks->len == 0) {
        return false;
    }
    for (guint i = 0; i < w->chunks->len; i++) {
        rpc_call_send(call, w->chunks->pdata[i]);
    }
    g_ptr_array_set_size(w->chunks, 0);
    rpc_call_finish(call, NULL);
    return true;
}

static void world_open(World *w)
{
    w->sim = sim_world_new(sim_seed(1));
    w->transport = rpc_transport_inproc_new();
    w->fill = link_fill_inproc_new();
    w->chunks = g_ptr_array_new_with_free_func(free_message);
    w->c = fake_coordinator_new(w->sim, w->transport, "coordinator", "ca");
    w->c->model = model();
    w->c->answer_fetch = answer_fetch;
    w->c->answer_user = w;
    Identity identity = fake_identity(w->c, "w0");
    AgentOptions options = {.loop = sim_world_loop(w->sim),
                            .transport = w->transport,
                            .random = sim_world_random(w->sim),
                            .fill = w->fill,
                            .identity = &identity,
                            .listen = "w0-listen",
                            .host = "host",
                            .memory_bytes = 64u << 20,
                            .threads = 1,
                            .isa = ISA_GENERIC,
                            .numerics_classes = 1,
                            .measure = {1, 2, 3, {0}, 4, 5},
                            .refused = on_refused,
                            .user = w};
    w->agent = agent_new(&options, NULL);
    g_assert_nonnull(w->agent);
    identity_clear(&identity);
    for (unsigned i = 0; i < G_N_ELEMENTS(calls); i++) {
        w->channels[i] = channel_as(w, calls[i].role);
    }
    run(w, SECOND / 10);
}

static void world_close(World *w)
{
    g_assert(!w->refused);
    Grpc__Health__V1__HealthCheckRequest request = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    FakeReply *reply = fake_call(w->c, agent_address(w->agent), "probe",
                                 &grpc__health__v1__health__descriptor, "Check", &request.base);
    run_until(w, &reply->done);
    g_assert(reply->done); /* refused where a notice has revoked the caller */
    fake_reply_free(reply);
    for (unsigned i = 0; i < G_N_ELEMENTS(calls); i++) {
        rpc_channel_free(w->channels[i]);
    }
    agent_stop(w->agent, on_stopped, w);
    run_until(w, &w->stopped);
    g_assert(w->stopped);
    agent_free(w->agent);
    fake_coordinator_free(w->c);
    sim_world_run_for(w->sim, SECOND);
    rpc_transport_inproc_free(w->transport);
    sim_world_free(w->sim);
    link_fill_free(w->fill);
    g_ptr_array_unref(w->chunks);
}

/* ---- an honest deployment ---- */

static FakeReply *load(World *w)
{
    const double even[] = {1};
    const char *source = "coordinator";
    Weft__V1__Stamp stamp = fake_stamp(w->c, 1);
    Weft__V1__LoadRequest request = WEFT__V1__LOAD_REQUEST__INIT;
    g_autoptr(Plan) plan = tiny_plan(model()->spec, 1, (uint32_t[]){1}, even);
    request.stamp = &stamp;
    request.plan = plan_to_message(plan);
    request.model = tiny_model_message(model(), "tiny.gguf");
    request.sources = (char **)&source;
    request.n_sources = 1;
    FakeReply *reply = fake_call(w->c, agent_address(w->agent), "coordinator",
                                 &weft__v1__worker__descriptor, "Load", &request.base);
    weft__v1__plan__free_unpacked(request.plan, NULL);
    weft__v1__model__free_unpacked(request.model, NULL);
    return reply;
}

static void start(World *w, const Weft__V1__LoadProgress *of)
{
    uint8_t secret[32] = {7};
    Weft__V1__Stamp stamp = fake_stamp(w->c, 1);
    Weft__V1__RankAddress rank = WEFT__V1__RANK_ADDRESS__INIT, *ranks = &rank;
    Weft__V1__StartRequest request = WEFT__V1__START_REQUEST__INIT;
    rank.worker = "w0";
    rank.data_address = of->data_address;
    rank.boot_id = of->boot_id;
    request.stamp = &stamp;
    request.secret = (ProtobufCBinaryData){sizeof secret, secret};
    request.n_ranks = 1;
    request.ranks = &ranks;
    FakeReply *reply = fake_call(w->c, agent_address(w->agent), "coordinator",
                                 &weft__v1__worker__descriptor, "Start", &request.base);
    run_until(w, &reply->done);
    fake_reply_free(reply);
}

static void make_ready(World *w)
{
    FakeReply *reply = load(w);
    run_until(w, &reply->done);
    if (reply->done && reply->error == NULL) {
        start(w, (const Weft__V1__LoadProgress *)fake_reply_last(reply));
    }
    fake_reply_free(reply);
}

/* ---- records ---- */

static void no_message(const ProtobufCMessage *message, void *user) {}
static void no_end(const GError *error, void *user) {}

/* What no seed can hold: this process's boot id and port. */
static void fill_in(World *w, ProtobufCMessage *message)
{
    if (message->descriptor != &weft__v1__start_request__descriptor || w->c->hello == NULL) {
        return;
    }
    Weft__V1__StartRequest *request = (Weft__V1__StartRequest *)message;
    for (size_t i = 0; i < request->n_ranks; i++) {
        ProtobufCBinaryData *boot_id = &request->ranks[i]->boot_id;
        if (boot_id->len == w->c->hello->boot_id.len) {
            memcpy(boot_id->data, w->c->hello->boot_id.data, boot_id->len);
        }
    }
}

static void begin_call(World *w, unsigned kind, ProtobufCMessage *message)
{
    RpcCallbacks ignored = {no_message, no_end};
    fill_in(w, message);
    if (!calls[kind].stream) {
        rpc_call_start(w->channels[kind], calls[kind].service, calls[kind].method, message, 3000,
                       true, ignored, w);
        return;
    }
    RpcClientCall *call = rpc_call_start(w->channels[kind], calls[kind].service, calls[kind].method,
                                         NULL, 3000, true, ignored, w);
    rpc_client_send(call, message);
    rpc_client_half_close(call);
}

static void play_message(World *w, unsigned kind, ProtobufCMessage *message)
{
    if (kind == KIND_CHUNK) {
        g_ptr_array_add(w->chunks, message);
        return;
    }
    if (kind != KIND_NOTICE) {
        begin_call(w, kind, message);
    } else if (w->c->attach != NULL) {
        rpc_call_send(w->c->attach, message);
    }
    free_message(message);
}

static void play(World *w, const Record *record)
{
    const unsigned kind = record->kind % N_KINDS;
    ProtobufCMessage *message = record_unpack(record);
    if (message != NULL) {
        play_message(w, kind, message);
        run(w, SECOND / 20);
    } else if (kind == KIND_READY) {
        make_ready(w);
    } else if (kind == KIND_TIME && record->size > 0) {
        run(w, record->bytes[0] * (SECOND / 10));
    }
}

static void mute(const char *text) {}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    World w = {0};
    Record record;
    g_set_printerr_handler(mute); /* the seed of each world */
    world_open(&w);
    for (Records r = {data, size, 0}; records_next(&r, &record);) {
        play(&w, &record);
    }
    run(&w, 4 * SECOND);
    world_close(&w);
    return 0;
}
