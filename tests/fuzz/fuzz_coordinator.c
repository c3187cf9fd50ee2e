/* Everything that a coordinator takes from others, at the doors where it takes it: calls of
 * administrators, clients, workers and of whoever reaches the Join listener; reports of a worker
 * (w1); answers of another (w0) to Load and Generate. The coordinator is the real one, on inproc
 * and a virtual clock: it must live on, answer Status at the end, and free everything. */
#include "grpc/health.pb-c.h"
#include "grpc/reflection_v1.pb-c.h"
#include "tests/fuzz/calls.h"
#include "tests/unit/coordinator/sim_cluster.h"
#include "transport/crypto/x509.h"
#include "weft/v1/join.pb-c.h"

#include <glib/gstdio.h>
#include <string.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

typedef enum Caller { CALLER_ADMIN, CALLER_WORKER, CALLER_NOBODY, N_CALLERS } Caller;

/* Seeds name kinds by number: append, never insert. */
static const struct {
    const ProtobufCServiceDescriptor *service;
    const char *method;
    Caller caller;
    bool stream;
} calls[] = {
    {&weft__v1__admin__descriptor, "Status", CALLER_ADMIN, false},
    {&weft__v1__admin__descriptor, "Plan", CALLER_ADMIN, false},
    {&weft__v1__admin__descriptor, "CreateToken", CALLER_ADMIN, false},
    {&weft__v1__admin__descriptor, "Revoke", CALLER_ADMIN, false},
    {&weft__v1__admin__descriptor, "Drain", CALLER_ADMIN, false},
    {&weft__v1__admin__descriptor, "Unload", CALLER_ADMIN, false},
    {&weft__v1__admin__descriptor, "Stop", CALLER_ADMIN, false},
    {&weft__v1__serve__descriptor, "Run", CALLER_ADMIN, false},
    {&weft__v1__slices__descriptor, "Fetch", CALLER_WORKER, false},
    {&weft__v1__cluster__descriptor, "Renew", CALLER_WORKER, false},
    {&weft__v1__join__descriptor, "Join", CALLER_NOBODY, false},
    {&grpc__health__v1__health__descriptor, "Check", CALLER_ADMIN, false},
    {&grpc__health__v1__health__descriptor, "Watch", CALLER_ADMIN, false},
    {&grpc__reflection__v1__server_reflection__descriptor, "ServerReflectionInfo", CALLER_ADMIN,
     true},
};
enum {
    KIND_REPORT = G_N_ELEMENTS(calls), /* of w1 */
    KIND_END_OF_REPORTS,
    KIND_PROGRESS, /* of w0: what it will answer to Load */
    KIND_TOKEN,    /* of w0: what it will answer to Generate */
    KIND_TIME,     /* first byte x 100 ms pass */
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
    switch (kind) {
    case KIND_REPORT:
        return &weft__v1__worker_report__descriptor;
    case KIND_PROGRESS:
        return &weft__v1__load_progress__descriptor;
    case KIND_TOKEN:
        return &weft__v1__token_event__descriptor;
    default:
        return NULL;
    }
}

typedef struct World {
    SimCluster *cluster;
    RpcChannel *channels[N_CALLERS];
    RpcClientCall *reports;
    bool reports_ended;
    GPtrArray *progress, *tokens; /* messages that wait for w0's calls */
    bool has_lied; /* in tokens: the honest answer to what follows from them is none of w0's */
    char *token;   /* a valid join token */
} World;

/* ---- w0 ---- */

static void answer_all(RpcCall *call, GPtrArray *messages)
{
    for (guint i = 0; i < messages->len; i++) {
        rpc_call_send(call, messages->pdata[i]);
    }
    g_ptr_array_set_size(messages, 0);
    rpc_call_finish(call, NULL);
}

/* An event without a request is of the one that is asked for. */
static void name_requests(GPtrArray *tokens, const Weft__V1__GenerateRequest *request)
{
    for (guint i = 0; i < tokens->len; i++) {
        Weft__V1__TokenEvent *event = tokens->pdata[i];
        if (event->request[0] == '\0') {
            event->request = strdup(request->request);
        }
    }
}

static bool answer(RpcCall *call, const ProtobufCMessage *request, void *user)
{
    World *w = user;
    if (request->descriptor == &weft__v1__load_request__descriptor) {
        if (w->progress->len == 0) {
            return false;
        }
        answer_all(call, w->progress);
        return true;
    }
    if (request->descriptor == &weft__v1__generate_request__descriptor) {
        if (w->tokens->len == 0 && !w->has_lied) {
            return false;
        }
        w->has_lied = true;
        name_requests(w->tokens, (const Weft__V1__GenerateRequest *)request);
        answer_all(call, w->tokens);
        return true;
    }
    Weft__V1__StartResponse response = WEFT__V1__START_RESPONSE__INIT;
    rpc_call_reply(call, &response.base);
    return true;
}

/* ---- callers ---- */

static void no_message(const ProtobufCMessage *message, void *user) {}
static void no_end(const GError *error, void *user) {}

static void reports_over(const GError *error, void *user)
{
    ((World *)user)->reports = NULL;
}

static void free_message(void *message)
{
    protobuf_c_message_free_unpacked(message, NULL);
}

static RpcChannel *channel_as(SimCluster *s, const char *target, const char *name, const char *role)
{
    g_autofree char *certificate = role != NULL ? rpc_inproc_certificate(name, role, NULL) : NULL;
    RpcChannelOptions options = {
        .target = target,
        .credentials = {.ca_pem = s->ca_pem, .certificate_pem = certificate, .key_pem = "key"},
        .server_name = "weft-coordinator"};
    return rpc_channel_new(s->transport, s->client_loop, &options, NULL);
}

static char *valid_token(SimCluster *s)
{
    Weft__V1__CreateTokenRequest request = WEFT__V1__CREATE_TOKEN_REQUEST__INIT;
    Answer a = {0};
    request.uses = 8;
    sim_call(s, &a, &weft__v1__admin__descriptor, "CreateToken", &request);
    sim_answer(s, &a, SECOND);
    char *token = g_strdup(((const Weft__V1__CreateTokenResponse *)a.message)->token);
    answer_clear(&a);
    return token;
}

static void world_open(World *w)
{
    SimCluster *s = w->cluster = sim_cluster_new(3);
    w->progress = g_ptr_array_new_with_free_func(free_message);
    w->tokens = g_ptr_array_new_with_free_func(free_message);
    sim_cluster_model(s);
    FakeWorker *w0 = sim_worker_start(s, 0);
    w0->answer = answer;
    w0->answer_user = w;
    sim_run_for(s, SECOND);
    w->token = valid_token(s);
    w->channels[CALLER_ADMIN] = channel_as(s, CONTROL, "root", "admin");
    w->channels[CALLER_WORKER] = channel_as(s, CONTROL, "w1", "worker");
    w->channels[CALLER_NOBODY] = channel_as(s, JOIN, NULL, NULL);
}

/* Before the answers: freeing a channel ends its calls. */
static void world_close(World *w)
{
    Weft__V1__StatusRequest request = WEFT__V1__STATUS_REQUEST__INIT;
    Answer a = {0};
    sim_call(w->cluster, &a, &weft__v1__admin__descriptor, "Status", &request);
    sim_answer(w->cluster, &a, 5 * SECOND);
    g_assert_no_error(a.error);
    answer_clear(&a);
    for (int i = 0; i < N_CALLERS; i++) {
        rpc_channel_free(w->channels[i]);
    }
    sim_cluster_free(w->cluster);
    g_ptr_array_unref(w->progress);
    g_ptr_array_unref(w->tokens);
    g_free(w->token);
}

static void put_bytes(ProtobufCBinaryData *field, const char *text)
{
    free(field->data);
    *field = (ProtobufCBinaryData){strlen(text), (uint8_t *)strdup(text)};
}

/* What no seed can hold: this cluster's token and a request signed by its own key. */
static void fill_in(World *w, ProtobufCMessage *message)
{
    static char *csr;
    if (csr == NULL) {
        g_autofree char *key = x509_new_key(NULL);
        csr = x509_new_request(key, "w1", NULL);
    }
    if (message->descriptor == &weft__v1__join_request__descriptor) {
        Weft__V1__JoinRequest *join = (Weft__V1__JoinRequest *)message;
        if (strcmp(join->token, "TOKEN") == 0) {
            free(join->token);
            join->token = strdup(w->token);
        }
        if (join->csr_pem.len == 3) {
            put_bytes(&join->csr_pem, csr);
        }
    } else if (message->descriptor == &weft__v1__renew_request__descriptor) {
        Weft__V1__RenewRequest *renew = (Weft__V1__RenewRequest *)message;
        if (renew->csr_pem.len == 3) {
            put_bytes(&renew->csr_pem, csr);
        }
    }
}

static void begin_call(World *w, unsigned kind, ProtobufCMessage *message)
{
    RpcCallbacks ignored = {no_message, no_end};
    RpcChannel *channel = w->channels[calls[kind].caller];
    fill_in(w, message);
    if (!calls[kind].stream) {
        rpc_call_start(channel, calls[kind].service, calls[kind].method, message, 5000, true,
                       ignored, w);
        return;
    }
    RpcClientCall *call = rpc_call_start(channel, calls[kind].service, calls[kind].method, NULL,
                                         5000, true, ignored, w);
    rpc_client_send(call, message);
    rpc_client_half_close(call);
}

static void report(World *w, const ProtobufCMessage *message)
{
    if (w->reports == NULL) {
        RpcCallbacks callbacks = {no_message, reports_over};
        w->reports = rpc_call_start(w->channels[CALLER_WORKER], &weft__v1__cluster__descriptor,
                                    "Attach", NULL, 0, true, callbacks, w);
        w->reports_ended = false;
    }
    if (!w->reports_ended) {
        rpc_client_send(w->reports, message);
    }
}

static void play_message(World *w, unsigned kind, ProtobufCMessage *message)
{
    if (kind == KIND_PROGRESS || kind == KIND_TOKEN) {
        g_ptr_array_add(kind == KIND_TOKEN ? w->tokens : w->progress, message);
        return;
    }
    if (kind == KIND_REPORT) {
        report(w, message);
    } else {
        begin_call(w, kind, message);
    }
    free_message(message);
}

static void play(World *w, const Record *record)
{
    const unsigned kind = record->kind % N_KINDS;
    ProtobufCMessage *message = record_unpack(record);
    if (message != NULL) {
        play_message(w, kind, message);
        sim_run_for(w->cluster, SECOND / 50);
    } else if (kind == KIND_TIME && record->size > 0) {
        sim_run_for(w->cluster, record->bytes[0] * (SECOND / 10));
    } else if (kind == KIND_END_OF_REPORTS && w->reports != NULL && !w->reports_ended) {
        w->reports_ended = true;
        rpc_client_half_close(w->reports);
    }
}

static void mute(const char *text) {}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    World w = {0};
    Record record;
    g_set_printerr_handler(mute); /* the seed of each world */
    if (g_access("/dev/shm", W_OK) == 0) {
        g_setenv("TMPDIR", "/dev/shm", FALSE); /* a world's state directory: fsync costs nothing */
    }
    world_open(&w);
    for (Records r = {data, size, 0}; records_next(&r, &record);) {
        play(&w, &record);
    }
    sim_run_for(w.cluster, 6 * SECOND);
    world_close(&w);
    return 0;
}
