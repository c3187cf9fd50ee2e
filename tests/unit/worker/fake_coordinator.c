#include "tests/unit/worker/fake_coordinator.h"

#include "proto/base/error.h"
#include "transport/crypto/x509.h"

#include <string.h>

/* protobuf-c has no copy: pack and unpack. */
static ProtobufCMessage *copy_message(const ProtobufCMessage *message)
{
    size_t size = protobuf_c_message_get_packed_size(message);
    g_autofree uint8_t *bytes = g_malloc(size + 1);
    protobuf_c_message_pack(message, bytes);
    return protobuf_c_message_unpack(message->descriptor, NULL, size, bytes);
}

static void free_hello(Weft__V1__Hello *hello)
{
    weft__v1__hello__free_unpacked(hello, NULL);
}
static void free_heartbeat(Weft__V1__Heartbeat *heartbeat)
{
    weft__v1__heartbeat__free_unpacked(heartbeat, NULL);
}

/* ---- Cluster ---- */

static void on_attach_cancelled(void *user)
{
    FakeCoordinator *c = user;
    rpc_call_unref(g_steal_pointer(&c->attach));
}

static void send_welcome(FakeCoordinator *c)
{
    Weft__V1__Welcome welcome = WEFT__V1__WELCOME__INIT;
    Weft__V1__CoordinatorNotice notice = WEFT__V1__COORDINATOR_NOTICE__INIT;
    welcome.cluster = "test";
    welcome.generation = c->generation;
    notice.notice_case = WEFT__V1__COORDINATOR_NOTICE__NOTICE_WELCOME;
    notice.welcome = &welcome;
    rpc_call_send(c->attach, &notice.base);
}

static void send_ack(FakeCoordinator *c)
{
    Weft__V1__Ack ack = WEFT__V1__ACK__INIT;
    Weft__V1__CoordinatorNotice notice = WEFT__V1__COORDINATOR_NOTICE__INIT;
    Weft__V1__Keep keeps[16], *pointers[16];
    ack.sequence = c->heartbeat->sequence;
    ack.keep = pointers;
    ack.n_keep = c->keep ? c->keep->len : c->heartbeat->n_held;
    for (size_t i = 0; i < ack.n_keep; i++) {
        weft__v1__keep__init(&keeps[i]);
        pointers[i] = &keeps[i];
        FakeKeep k = c->keep
                         ? g_array_index(c->keep, FakeKeep, i)
                         : (FakeKeep){c->heartbeat->held[i]->job, c->heartbeat->held[i]->replica,
                                      c->heartbeat->held[i]->epoch};
        keeps[i].job = (char *)k.job;
        keeps[i].replica = k.replica;
        keeps[i].epoch = k.epoch;
    }
    ack.n_revoked = c->revoked ? 1 : 0;
    ack.revoked = (char **)&c->revoked;
    notice.notice_case = WEFT__V1__COORDINATOR_NOTICE__NOTICE_ACK;
    notice.ack = &ack;
    rpc_call_send(c->attach, &notice.base);
}

static void handle_hello(FakeCoordinator *c, RpcCall *call, const Weft__V1__Hello *hello)
{
    g_clear_pointer(&c->hello, free_hello);
    c->hello = (Weft__V1__Hello *)copy_message(&hello->base);
    if (c->attach) {
        rpc_call_on_cancel(c->attach, NULL, NULL);
        rpc_call_unref(c->attach);
    }
    c->attach = rpc_call_ref(call);
    rpc_call_on_cancel(call, on_attach_cancelled, c);
    c->n_attached++;
    if (!c->no_welcome) {
        send_welcome(c);
    }
}

static void on_attach(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    FakeCoordinator *c = user;
    const Weft__V1__WorkerReport *report = (const Weft__V1__WorkerReport *)message;
    if (c->refuse) {
        rpc_call_finish(call, c->refuse);
    } else if (report && report->report_case == WEFT__V1__WORKER_REPORT__REPORT_HELLO) {
        handle_hello(c, call, report->hello);
    } else if (report && report->report_case == WEFT__V1__WORKER_REPORT__REPORT_HEARTBEAT &&
               call == c->attach) {
        g_clear_pointer(&c->heartbeat, free_heartbeat);
        c->heartbeat = (Weft__V1__Heartbeat *)copy_message(&report->heartbeat->base);
        c->n_heartbeats++;
        if (!c->no_acks) {
            send_ack(c);
        }
    }
}

static void on_renew(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    FakeCoordinator *c = user;
    const Weft__V1__RenewRequest *request = (const Weft__V1__RenewRequest *)message;
    g_autofree char *csr = g_strndup((const char *)request->csr_pem.data, request->csr_pem.len);
    int64_t now = loop_wall_us(c->loop);
    X509Grant grant = {.name = rpc_call_peer(call)->name,
                       .role = "worker",
                       .not_before_us = now - 1000000,
                       .not_after_us = now + c->certificate_life_us};
    g_autoptr(GError) error = NULL;
    g_autofree char *certificate = x509_sign(c->ca_pem, c->ca_key_pem, csr, &grant, NULL, &error);
    if (!certificate) {
        rpc_call_finish(call, error);
        return;
    }
    c->n_renewed++;
    Weft__V1__RenewResponse response = WEFT__V1__RENEW_RESPONSE__INIT;
    response.certificate_pem = (ProtobufCBinaryData){strlen(certificate), (uint8_t *)certificate};
    rpc_call_reply(call, &response.base);
}

/* ---- Slices ---- */

static bool send_slice(FakeCoordinator *c, RpcCall *call, uint32_t index,
                       const Weft__V1__SliceRef *ref)
{
    size_t size;
    g_autofree uint8_t *bytes = tiny_model_slice(c->model, ref->tensor, ref->slice, &size);
    if (c->corrupt_slices != 0) {
        bytes[size / 2] ^= 1;
        c->corrupt_slices -= c->corrupt_slices > 0;
    }
    for (size_t at = 0; at < size; at += 1000) { /* odd pieces */
        if (c->die_after_chunks == 0) {
            g_autoptr(GError) error = g_error_new(WEFT_ERROR, WEFT_ERROR_IO, "the source died");
            rpc_call_finish(call, error);
            c->die_after_chunks = -1;
            return false;
        }
        c->die_after_chunks -= c->die_after_chunks > 0;
        Weft__V1__FetchChunk chunk = WEFT__V1__FETCH_CHUNK__INIT;
        chunk.index = index;
        chunk.data = (ProtobufCBinaryData){MIN(1000, size - at), bytes + at};
        chunk.last = at + 1000 >= size;
        rpc_call_send(call, &chunk.base);
    }
    return true;
}

static void on_fetch(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    FakeCoordinator *c = user;
    const Weft__V1__FetchRequest *request = (const Weft__V1__FetchRequest *)message;
    c->n_fetches++;
    c->n_slices_asked += (unsigned)request->n_slices;
    if (c->silent || (c->answer_fetch != NULL && c->answer_fetch(call, c->answer_user))) {
        return;
    }
    for (uint32_t i = 0; i < request->n_slices; i++) {
        if (c->missing) {
            Weft__V1__FetchChunk chunk = WEFT__V1__FETCH_CHUNK__INIT;
            chunk.index = i;
            chunk.missing = chunk.last = true;
            rpc_call_send(call, &chunk.base);
        } else if (!send_slice(c, call, i, request->slices[i])) {
            return;
        }
    }
    rpc_call_finish(call, NULL);
}

/* ---- Join ---- */

static void on_join(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    FakeCoordinator *c = user;
    const Weft__V1__JoinRequest *request = (const Weft__V1__JoinRequest *)message;
    g_autoptr(GError) error = NULL;
    if (!c->token || strcmp(request->token, c->token) != 0) {
        error = g_error_new(WEFT_ERROR, WEFT_ERROR_DENIED, "the token is not valid");
        rpc_call_finish(call, error);
        return;
    }
    g_autofree char *csr = g_strndup((const char *)request->csr_pem.data, request->csr_pem.len);
    int64_t now = loop_wall_us(c->loop);
    X509Grant grant = {.name = *request->name ? request->name : "given",
                       .role = c->join_role ? c->join_role : "worker",
                       .not_before_us = now,
                       .not_after_us = now + c->certificate_life_us};
    g_autofree char *certificate = x509_sign(c->ca_pem, c->ca_key_pem, csr, &grant, NULL, &error);
    g_assert_no_error(error);
    Weft__V1__JoinResponse response = WEFT__V1__JOIN_RESPONSE__INIT;
    response.cluster = "test";
    response.name = (char *)grant.name;
    response.role = "worker";
    response.control_address = "0.0.0.0:7470";
    response.certificate_pem = (ProtobufCBinaryData){strlen(certificate), (uint8_t *)certificate};
    response.ca_pem = (ProtobufCBinaryData){strlen(c->ca_pem), (uint8_t *)c->ca_pem};
    rpc_call_reply(call, &response.base);
}

/* ---- life ---- */

static void listen_on(FakeCoordinator *c)
{
    static const RpcMethod cluster[] = {
        {"Attach", on_attach, RPC_ROLE_WORKER}, {"Renew", on_renew, RPC_ROLE_WORKER}, {NULL}};
    static const RpcMethod slices[] = {{"Fetch", on_fetch, RPC_ROLE_WORKER}, {NULL}};
    static const RpcMethod join[] = {{"Join", on_join, 0}, {NULL}};
    g_autofree char *stand_in = rpc_inproc_certificate("coordinator", "coordinator", NULL);
    RpcCredentials credentials = {c->ca_pem, c->own_certificate ? c->own_certificate : stand_in,
                                  c->own_key ? c->own_key : "key", c->own_key != NULL};
    RpcServerOptions options = {.listen = c->address, .credentials = credentials, .health = true};
    GError *error = NULL;
    c->server = rpc_server_new(c->transport, c->loop, &options, &error);
    g_assert_no_error(error);
    rpc_server_add(c->server, &weft__v1__cluster__descriptor, cluster, c);
    rpc_server_add(c->server, &weft__v1__slices__descriptor, slices, c);
    rpc_server_add(c->server, &weft__v1__join__descriptor, join, c);
    g_assert_true(rpc_server_start(c->server, &error));
    if (c->own_key) {
        g_free(c->address);
        c->address = g_strdup(rpc_server_address(c->server));
    }
}

char *fake_certificate(FakeCoordinator *c, const char *name, const char *role,
                       int64_t not_before_us, int64_t not_after_us, char **key_out)
{
    GError *error = NULL;
    *key_out = x509_new_key(&error);
    g_autofree char *csr = x509_new_request(*key_out, name, &error);
    const char *const addresses[] = {"127.0.0.1", NULL};
    X509Grant grant = {.name = name,
                       .role = role,
                       .addresses = addresses,
                       .not_before_us = not_before_us,
                       .not_after_us = not_after_us};
    char *certificate = x509_sign(c->ca_pem, c->ca_key_pem, csr, &grant, NULL, &error);
    g_assert_no_error(error);
    return certificate;
}

FakeCoordinator *fake_coordinator_new_grpc(Loop *loop)
{
    FakeCoordinator *c = g_new0(FakeCoordinator, 1);
    GError *error = NULL;
    int64_t now = loop_wall_us(loop);
    c->loop = loop;
    c->transport = rpc_transport_grpc();
    c->address = g_strdup("127.0.0.1:0");
    c->ca_key_pem = x509_new_key(&error);
    c->ca_pem = x509_new_ca(c->ca_key_pem, "test", now, &error);
    g_assert_no_error(error);
    c->generation = 1;
    c->die_after_chunks = -1;
    c->certificate_life_us = 3600000000ll;
    c->own_certificate =
        fake_certificate(c, "c0", "coordinator", now - 1000000, now + 3600000000ll, &c->own_key);
    listen_on(c);
    return c;
}

FakeCoordinator *fake_coordinator_new(SimWorld *world, RpcTransport *transport, const char *address,
                                      const char *ca_pem)
{
    FakeCoordinator *c = fake_coordinator_new_on(sim_world_loop(world), transport, address, ca_pem);
    c->world = world;
    return c;
}

FakeCoordinator *fake_coordinator_new_on(Loop *loop, RpcTransport *transport, const char *address,
                                         const char *ca_pem)
{
    FakeCoordinator *c = g_new0(FakeCoordinator, 1);
    c->loop = loop;
    c->transport = transport;
    c->address = g_strdup(address);
    c->ca_pem = g_strdup(ca_pem);
    c->generation = 1;
    c->die_after_chunks = -1;
    c->certificate_life_us = 86400000000ll;
    listen_on(c);
    return c;
}

void fake_coordinator_down(FakeCoordinator *c)
{
    rpc_server_free(g_steal_pointer(&c->server), 0);
    if (c->attach) {
        on_attach_cancelled(c);
    }
}

void fake_coordinator_up(FakeCoordinator *c)
{
    c->generation++;
    listen_on(c);
}

void fake_coordinator_free(FakeCoordinator *c)
{
    if (c->server) {
        fake_coordinator_down(c);
    }
    g_clear_pointer(&c->hello, free_hello);
    g_clear_pointer(&c->heartbeat, free_heartbeat);
    g_clear_error(&c->refuse);
    g_clear_pointer(&c->keep, g_array_unref);
    g_free(c->address);
    g_free(c->ca_pem);
    x509_free_key(c->ca_key_pem);
    x509_free_key(c->own_key);
    g_free(c->own_certificate);
    g_free(c);
}

/* ---- calls at a worker ---- */

static void free_message(void *message)
{
    protobuf_c_message_free_unpacked(message, NULL);
}

static void on_message(const ProtobufCMessage *message, void *user)
{
    FakeReply *reply = user;
    g_ptr_array_add(reply->messages, copy_message(message));
}

static void on_done(const GError *error, void *user)
{
    FakeReply *reply = user;
    reply->error = error ? g_error_copy(error) : NULL;
    reply->call = NULL;
    reply->done = true;
}

FakeReply *fake_call(FakeCoordinator *c, const char *address, const char *role,
                     const ProtobufCServiceDescriptor *service, const char *method,
                     const ProtobufCMessage *request)
{
    FakeReply *reply = g_new0(FakeReply, 1);
    reply->messages = g_ptr_array_new_with_free_func(free_message);
    g_autofree char *stand_in = rpc_inproc_certificate("caller", role, "99");
    RpcChannelOptions options = {.target = address,
                                 .credentials = {c->ca_pem,
                                                 c->own_certificate ? c->own_certificate : stand_in,
                                                 c->own_key ? c->own_key : "key", false},
                                 .server_name = c->own_key ? "weft-worker" : NULL};
    GError *error = NULL;
    reply->channel = rpc_channel_new(c->transport, c->loop, &options, &error);
    g_assert_no_error(error);
    reply->call = rpc_call_start(reply->channel, service, method, request, 0, true,
                                 (RpcCallbacks){on_message, on_done}, reply);
    return reply;
}

const ProtobufCMessage *fake_reply_last(const FakeReply *reply)
{
    return reply->messages->len ? reply->messages->pdata[reply->messages->len - 1] : NULL;
}

void fake_reply_free(FakeReply *reply)
{
    rpc_channel_free(reply->channel);
    g_ptr_array_unref(reply->messages);
    g_clear_error(&reply->error);
    g_free(reply);
}

Weft__V1__Stamp fake_stamp(const FakeCoordinator *c, uint64_t epoch)
{
    Weft__V1__Stamp stamp = WEFT__V1__STAMP__INIT;
    stamp.cluster = "test";
    stamp.generation = c->generation;
    stamp.job = "job";
    stamp.replica = 0;
    stamp.epoch = epoch;
    return stamp;
}

Identity fake_identity(const FakeCoordinator *c, const char *name)
{
    return (Identity){g_strdup("test"),
                      g_strdup(name),
                      g_strdup(c->address),
                      g_strdup(c->ca_pem),
                      rpc_inproc_certificate(name, "worker", "01"),
                      g_strdup("key")};
}
