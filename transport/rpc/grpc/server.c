/* The gRPC fill's server.
 *
 * Every call has at most one operation of a kind outstanding: RECV_CLOSE_ON_SERVER for its whole
 * life (the only place where a client's cancel, its deadline or a dead connection shows), one
 * RECV_MESSAGE, one send batch. Completions arrive on the Loop, so no call needs a lock.
 *
 * Invariants
 *   1. Each outstanding batch holds a reference on the call; end_completion() of the last one gives
 *      the grpc_call back. Handlers' references may live on, without a grpc_call.
 *   2. A status is in the outgoing queue's last batch; nothing is sent after it.
 *   3. server->n_wires counts grpc_calls not given back, n_accepts outstanding request_calls: both
 *      0 before the server is destroyed. */
#include "transport/rpc/grpc/args.h"
#include "transport/rpc/grpc/engine.h"
#include "transport/rpc/grpc/server_identity.h"

#include "proto/base/error.h"
#include "transport/crypto/x509.h"

#include <errno.h>
#include <grpc/support/alloc.h>
#include <grpc/support/time.h>
#include <netdb.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define N_ACCEPTS 32
#define MAX_IDENTITIES 4096
#define END_GRACE_US G_GINT64_CONSTANT(1000000)
/* Below the clients' keepalive time, so that their pings are welcome. */
#define MIN_PING_INTERVAL_MS 1000

typedef struct Identity {
    char *name, *serial;
    RpcRole role;
} Identity;

typedef struct Accept {
    EventTag tag;
    grpc_call *call;
    grpc_call_details details;
    grpc_metadata_array metadata;
} Accept;

typedef struct GrpcServer {
    RpcServer base;
    grpc_completion_queue *queue;
    EventSink *sink;
    grpc_server *server;
    ServerIdentity *identity; /* NULL: plaintext */
    GHashTable
        *identities; /* certificate PEM -> Identity: parsed once a certificate, not once a call */
    EventTag shutdown_tag;
    Accept accepts[N_ACCEPTS];
    unsigned n_wires, n_accepts;
    bool shutting_down, shut_down;
} GrpcServer;

typedef struct GrpcCall {
    RpcCall base;
    GrpcServer *server;
    grpc_call *call; /* NULL once the wire is gone */
    EventTag close_tag, receive_tag, send_tag;
    unsigned outstanding;
    int cancelled;
    grpc_byte_buffer *received;
    GQueue outgoing; /* grpc_byte_buffer */
    size_t waiting_bytes;
    size_t sending_bytes; /* of the first of them, which is in a batch: its buffer is gRPC's until
                             then, and comes back empty */
    bool sent_initial, sending, status_given, status_sent;
    int status;
    grpc_slice details;
} GrpcCall;

/* ---- peers ----------------------------------------------------------------------------------- */

static void identity_free(void *data)
{
    Identity *identity = data;
    g_free(identity->name);
    g_free(identity->serial);
    g_free(identity);
}

static const Identity *identity_of_certificate(GrpcServer *server, const char *pem)
{
    Identity *identity = g_hash_table_lookup(server->identities, pem);
    if (identity) {
        return identity;
    }
    X509Info info;
    if (!x509_parse(pem, &info, NULL)) {
        return NULL;
    }
    identity = g_new0(Identity, 1);
    identity->name = g_steal_pointer(&info.name);
    identity->serial = g_steal_pointer(&info.serial_hex);
    identity->role = rpc_role_parse(info.role);
    x509_info_clear(&info);
    if (g_hash_table_size(server->identities) >= MAX_IDENTITIES) {
        g_hash_table_remove_all(server->identities);
    }
    g_hash_table_insert(server->identities, g_strdup(pem), identity);
    return identity;
}

/* Only a certificate that TLS verified gives an identity. */
static const Identity *identity_of_call(GrpcServer *server, grpc_call *call)
{
    grpc_auth_context *context = server->base.tls ? grpc_call_auth_context(call) : NULL;
    if (!context) {
        return NULL;
    }
    const Identity *identity = NULL;
    if (grpc_auth_context_peer_is_authenticated(context)) {
        grpc_auth_property_iterator at =
            grpc_auth_context_find_properties_by_name(context, GRPC_X509_PEM_CERT_PROPERTY_NAME);
        const grpc_auth_property *property = grpc_auth_property_iterator_next(&at);
        if (property) {
            g_autofree char *pem = g_strndup(property->value, property->value_length);
            identity = identity_of_certificate(server, pem);
        }
    }
    grpc_auth_context_release(context);
    return identity;
}

static char *address_of_call(grpc_call *call)
{
    char *uri = grpc_call_get_peer(call);
    const char *colon = strchr(uri, ':');
    char *address = g_uri_unescape_string(colon ? colon + 1 : uri, NULL);
    gpr_free(uri);
    return address ? address : g_strdup("");
}

/* ---- one call -------------------------------------------------------------------------------- */

static void submit(GrpcCall *call, const grpc_op *ops, size_t n, EventTag *tag)
{
    call->outstanding++;
    rpc_call_ref(&call->base);
    TSAN_RELEASE(tag);
    grpc_call_error result = grpc_call_start_batch(call->call, ops, n, tag, NULL);
    g_assert(result == GRPC_CALL_OK);
}

static void drop_outgoing(GrpcCall *call)
{
    grpc_byte_buffer *buffer;
    while ((buffer = g_queue_pop_head(&call->outgoing))) {
        grpc_byte_buffer_destroy(buffer);
    }
    call->waiting_bytes = 0;
}

/* Brackets each completion. The count goes down first, so that a handler may free the server; with
 * nothing outstanding at the end, the wire is gone. */
static void begin_completion(GrpcCall *call)
{
    call->outstanding--;
}

static void end_completion(GrpcCall *call)
{
    if (call->outstanding == 0 && call->call) {
        drop_outgoing(call);
        grpc_call_unref(call->call);
        call->call = NULL;
        call->server->n_wires--;
    }
    rpc_call_unref(&call->base);
}

static void pump(GrpcCall *call)
{
    if (call->sending || call->status_sent || call->base.closed ||
        (!call->outgoing.head && !call->status_given)) {
        return;
    }
    grpc_op ops[3];
    size_t n = 0;
    memset(ops, 0, sizeof ops);
    if (!call->sent_initial) {
        ops[n++].op = GRPC_OP_SEND_INITIAL_METADATA;
        call->sent_initial = true;
    }
    if (call->outgoing.head) {
        ops[n].op = GRPC_OP_SEND_MESSAGE;
        ops[n++].data.send_message.send_message = call->outgoing.head->data;
        call->sending_bytes = grpc_byte_buffer_length(call->outgoing.head->data);
    }
    if (call->status_given && call->outgoing.length <= 1) {
        ops[n].op = GRPC_OP_SEND_STATUS_FROM_SERVER;
        ops[n].data.send_status_from_server.status = (grpc_status_code)call->status;
        ops[n++].data.send_status_from_server.status_details = &call->details;
        call->status_sent = true;
    }
    call->sending = true;
    submit(call, ops, n, &call->send_tag);
}

static void on_sent(EventTag *tag, bool ok)
{
    GrpcCall *call = tag->owner;
    begin_completion(call);
    call->sending = false;
    if (!ok) {
        drop_outgoing(call); /* the close event tells the rest */
    }
    /* a batch without a message carried the status, and nothing is queued after that */
    grpc_byte_buffer *sent = g_queue_pop_head(&call->outgoing);
    if (sent) {
        call->waiting_bytes -= call->sending_bytes;
        grpc_byte_buffer_destroy(sent);
    }
    pump(call);
    if (ok) {
        rpc_call_drained(&call->base);
    }
    end_completion(call);
}

bool grpc_call_fill_is_behind(RpcCall *base, size_t most_waiting)
{
    return ((GrpcCall *)base)->waiting_bytes > most_waiting;
}

size_t grpc_call_fill_send(RpcCall *base, uint8_t *bytes, size_t n_bytes)
{
    GrpcCall *call = (GrpcCall *)base;
    g_queue_push_tail(&call->outgoing, buffer_take(bytes, n_bytes));
    call->waiting_bytes += n_bytes;
    pump(call);
    return call->waiting_bytes;
}

void grpc_call_fill_finish(RpcCall *base, int status, const char *message)
{
    GrpcCall *call = (GrpcCall *)base;
    call->status_given = true;
    call->status = status;
    call->details = grpc_slice_from_copied_string(message);
    pump(call);
}

void grpc_call_fill_free(RpcCall *base)
{
    GrpcCall *call = (GrpcCall *)base;
    g_assert(!call->call);
    grpc_slice_unref(call->details);
    g_free(call);
}

static void receive(GrpcCall *call)
{
    grpc_op op;
    memset(&op, 0, sizeof op);
    op.op = GRPC_OP_RECV_MESSAGE;
    op.data.recv_message.recv_message = &call->received;
    submit(call, &op, 1, &call->receive_tag);
}

static void on_received(EventTag *tag, bool ok)
{
    GrpcCall *call = tag->owner;
    begin_completion(call);
    grpc_byte_buffer *buffer = g_steal_pointer(&call->received);
    if (ok && !buffer) {
        rpc_call_message(&call->base, NULL, 0);
    } else if (ok) {
        grpc_slice bytes = buffer_join(buffer);
        rpc_call_message(&call->base, GRPC_SLICE_START_PTR(bytes), GRPC_SLICE_LENGTH(bytes));
        grpc_slice_unref(bytes);
        if (!call->base.finished && !call->base.closed && rpc_call_streams_requests(&call->base)) {
            receive(call);
        }
    }
    if (buffer) {
        grpc_byte_buffer_destroy(buffer);
    }
    end_completion(call);
}

static void on_closed(EventTag *tag, bool ok)
{
    GrpcCall *call = tag->owner;
    begin_completion(call);
    rpc_call_closed(&call->base);
    end_completion(call);
}

static void watch_close(GrpcCall *call)
{
    grpc_op op;
    memset(&op, 0, sizeof op);
    op.op = GRPC_OP_RECV_CLOSE_ON_SERVER;
    op.data.recv_close_on_server.cancelled = &call->cancelled;
    submit(call, &op, 1, &call->close_tag);
}

static int64_t deadline_on_loop(Loop *loop, gpr_timespec deadline)
{
    if (gpr_time_cmp(deadline, gpr_inf_future(deadline.clock_type)) == 0) {
        return INT64_MAX;
    }
    gpr_timespec left = gpr_time_sub(deadline, gpr_now(deadline.clock_type));
    return loop_now_us(loop) + (int64_t)left.tv_sec * 1000000 + left.tv_nsec / 1000;
}

static void take_call(GrpcServer *server, grpc_call *wire, const grpc_call_details *details)
{
    GrpcCall *call = g_new0(GrpcCall, 1);
    call->server = server;
    call->call = wire;
    call->details = grpc_empty_slice();
    g_queue_init(&call->outgoing);
    event_tag_init(&call->close_tag, server->sink, on_closed, call);
    event_tag_init(&call->receive_tag, server->sink, on_received, call);
    event_tag_init(&call->send_tag, server->sink, on_sent, call);
    server->n_wires++;

    const Identity *identity = identity_of_call(server, wire);
    g_autofree char *address = address_of_call(wire);
    RpcPeer peer = {.address = address};
    if (identity) {
        peer.name = identity->name;
        peer.serial = identity->serial;
        peer.role = identity->role;
    }
    rpc_call_init(&call->base, &server->base, &peer,
                  deadline_on_loop(server->base.loop, details->deadline));
    watch_close(call);
    g_autofree char *path = grpc_slice_to_c_string(details->method);
    if (rpc_call_accept(&call->base, path)) {
        receive(call);
    }
}

/* ---- accepting ------------------------------------------------------------------------------- */

static void request_call(GrpcServer *server, Accept *accept)
{
    accept->call = NULL;
    grpc_call_details_init(&accept->details);
    grpc_metadata_array_init(&accept->metadata);
    TSAN_RELEASE(&accept->tag);
    grpc_call_error result =
        grpc_server_request_call(server->server, &accept->call, &accept->details, &accept->metadata,
                                 server->queue, server->queue, &accept->tag);
    g_assert(result == GRPC_CALL_OK);
    server->n_accepts++;
}

static void on_new_call(EventTag *tag, bool ok)
{
    Accept *accept = (Accept *)tag;
    GrpcServer *server = tag->owner;
    server->n_accepts--;
    if (ok) {
        take_call(server, accept->call, &accept->details);
    }
    grpc_metadata_array_destroy(&accept->metadata);
    grpc_call_details_destroy(&accept->details);
    if (ok && !server->shutting_down) {
        request_call(server, accept);
    }
}

static void on_shut_down(EventTag *tag, bool ok)
{
    ((GrpcServer *)tag->owner)->shut_down = true;
}

/* ---- life ------------------------------------------------------------------------------------ */

/* gRPC only says that it could not bind; ask the kernel once more for the reason. */
static char *bind_failure(const char *listen_address)
{
    const char *colon = strrchr(listen_address, ':');
    bool bracketed = listen_address[0] == '[' && colon[-1] == ']';
    g_autofree char *host =
        g_strndup(listen_address + bracketed, (gsize)(colon - listen_address - 2 * bracketed));
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *list = NULL;
    int failure = getaddrinfo(host, colon + 1, &hints, &list);
    if (failure != 0) {
        return g_strdup(gai_strerror(failure));
    }
    int fd = socket(list->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0), yes = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    bool bound = fd >= 0 && bind(fd, list->ai_addr, list->ai_addrlen) == 0 && listen(fd, 1) == 0;
    char *reason = g_strdup(bound ? "gRPC gave no reason" : g_strerror(errno));
    close(fd);
    freeaddrinfo(list);
    return reason;
}

static bool is_host_port(const char *address)
{
    const char *colon = strrchr(address, ':');
    return colon != NULL && colon != address && colon[1] != '\0';
}

static bool bind_port(GrpcServer *server, const RpcServerOptions *options, GError **error)
{
    if (!is_host_port(options->listen)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "cannot listen on '%s': it is no address and port, as in 0.0.0.0:7470",
                    options->listen);
        return false;
    }
    if (options->credentials.ca_pem != NULL) {
        server->identity = server_identity_new(&options->credentials, error);
        if (server->identity == NULL) {
            return false;
        }
    }
    grpc_server_credentials *credentials = server->identity != NULL
                                               ? server_identity_credentials(server->identity)
                                               : grpc_insecure_server_credentials_create();
    engine_mute_log(true); /* our error says it in one line */
    int port = grpc_server_add_http2_port(server->server, options->listen, credentials);
    engine_mute_log(false);
    grpc_server_credentials_release(credentials);
    if (port <= 0) {
        g_autofree char *reason = bind_failure(options->listen);
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO,
                    "cannot listen on %s: %s; choose another port or stop who holds it",
                    options->listen, reason);
        return false;
    }
    const char *colon = strrchr(options->listen, ':');
    server->base.address = g_strdup_printf("%.*s:%d", (int)(colon ? colon - options->listen : 0),
                                           options->listen, port);
    return true;
}

RpcServer *grpc_server_fill_new(RpcTransport *transport, Loop *loop,
                                const RpcServerOptions *options, GError **error)
{
    GrpcServer *server = g_new0(GrpcServer, 1);
    rpc_server_init(&server->base, transport, loop, options);
    server->queue = engine_acquire();
    engine_add_log(options->log);
    server->sink = event_sink_new(loop);
    server->identities = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, identity_free);
    event_tag_init(&server->shutdown_tag, server->sink, on_shut_down, server);

    ArgList list = {0};
    args_add_common(&list);
    args_add_int(&list, GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                 MIN_PING_INTERVAL_MS);
    args_add_int(&list, GRPC_ARG_ALLOW_REUSEPORT,
                 0); /* a second daemon on the port is an error, not a twin */
    grpc_channel_args args = {list.n, list.args};
    server->server = grpc_server_create(&args, NULL);
    grpc_server_register_completion_queue(server->server, server->queue, NULL);
    if (!bind_port(server, options, error)) {
        grpc_server_fill_free(&server->base, 0);
        return NULL;
    }
    return &server->base;
}

bool grpc_server_fill_set_credentials(RpcServer *base, const RpcCredentials *credentials,
                                      GError **error)
{
    return server_identity_set(((GrpcServer *)base)->identity, credentials, error);
}

bool grpc_server_fill_start(RpcServer *base, GError **error)
{
    GrpcServer *server = (GrpcServer *)base;
    grpc_server_start(server->server);
    for (int i = 0; i < N_ACCEPTS; i++) {
        event_tag_init(&server->accepts[i].tag, server->sink, on_new_call, server);
        request_call(server, &server->accepts[i]);
    }
    return true;
}

static bool no_calls(void *user)
{
    return ((GrpcServer *)user)->base.calls.length == 0;
}

static bool all_gone(void *user)
{
    const GrpcServer *server = user;
    return server->shut_down && server->n_wires == 0 && server->n_accepts == 0;
}

void grpc_server_fill_free(RpcServer *base, int grace_ms)
{
    GrpcServer *server = (GrpcServer *)base;
    server->shutting_down = true;
    TSAN_RELEASE(&server->shutdown_tag);
    grpc_server_shutdown_and_notify(server->server, server->queue, &server->shutdown_tag);
    event_sink_run_until(server->sink, no_calls, server,
                         loop_now_us(base->loop) + (int64_t)grace_ms * 1000);
    grpc_server_cancel_all_calls(server->server);
    engine_remove_log(base->log);
    if (!event_sink_run_until(server->sink, all_gone, server,
                              loop_now_us(base->loop) + END_GRACE_US)) {
        while (base->calls.head) { /* for their handlers they end here all the same */
            rpc_call_closed(base->calls.head->data);
        }
        /* memory that gRPC may still write to is not given back */
        event_sink_close(server->sink);
        log_error(base->log, "server at %s left behind: %u calls did not end within 1 s",
                  base->address, server->n_wires);
        return;
    }
    grpc_server_destroy(server->server);
    server_identity_free(server->identity);
    event_sink_free(server->sink);
    engine_release();
    g_hash_table_unref(server->identities);
    rpc_server_clear(base);
    g_free(server);
}
