/* The server side above the wire: routes, roles, revocation, and the life of a call.
 *
 *   init ─accept─► open ─finish: handler, or refusal─► finished ─┐
 *                    │                                           ├─► closed (fill) ─► last unref
 *                    └───────── cancelled on the wire ───────────┘
 *
 * Invariants
 *   1. A call is in server->calls from rpc_call_init() to rpc_call_closed(); after that
 *      call->server is NULL.
 *   2. A status is given to the fill at most once, and never after closed.
 *   3. on_cancel runs at most once, and only if the handler did not finish the call itself.
 *   4. on_room runs only while the call is open, and once for each rpc_call_has_room() that said
 * no.
 *   5. The fill's reference lives until closed; handlers' own references may outlive the server. */
#include "transport/rpc/wire.h"

#include "proto/base/error.h"
#include "transport/rpc/descriptors.h"
#include "transport/rpc/message_text.h"

#include <string.h>

struct RpcRoute {
    const ProtobufCMethodDescriptor *method;
    RpcHandler handler; /* NULL: declared, not served here */
    unsigned roles;
    void *user;
    char *name; /* "pkg.Service/Method", for messages */
    MethodFlags flags;
};

static const struct {
    RpcRole role;
    const char *name;
} role_names[] = {
    {RPC_ROLE_WORKER, "worker"}, {RPC_ROLE_SUBMIT, "submit"},           {RPC_ROLE_ADMIN, "admin"},
    {RPC_ROLE_PROBE, "probe"},   {RPC_ROLE_COORDINATOR, "coordinator"},
};

RpcRole rpc_role_parse(const char *text)
{
    for (size_t i = 0; i < G_N_ELEMENTS(role_names); i++) {
        if (g_strcmp0(text, role_names[i].name) == 0) {
            return role_names[i].role;
        }
    }
    return RPC_ROLE_NONE;
}

static const char *role_name(RpcRole role)
{
    for (size_t i = 0; i < G_N_ELEMENTS(role_names); i++) {
        if (role == role_names[i].role) {
            return role_names[i].name;
        }
    }
    return "none";
}

static char *format_roles(unsigned roles)
{
    GString *text = g_string_new(NULL);
    for (size_t i = 0; i < G_N_ELEMENTS(role_names); i++) {
        if (roles & role_names[i].role) {
            g_string_append_printf(text, "%s%s", text->len ? " or " : "", role_names[i].name);
        }
    }
    return g_string_free(text, FALSE);
}

/* ---- the server ------------------------------------------------------------------------------ */

static void route_free(void *data)
{
    RpcRoute *route = data;
    g_free(route->name);
    g_free(route);
}

void rpc_server_init(RpcServer *server, RpcTransport *transport, Loop *loop,
                     const RpcServerOptions *options)
{
    server->transport = transport;
    server->loop = loop;
    server->log = options->log;
    server->tls = options->credentials.ca_pem != NULL;
    server->serve_reflection = options->reflection;
    server->is_revoked = options->is_revoked;
    server->revoked_user = options->revoked_user;
    server->routes = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, route_free);
    server->services = g_ptr_array_new_with_free_func(g_free);
    g_queue_init(&server->calls);
}

void rpc_server_clear(RpcServer *server)
{
    g_assert(server->calls.length == 0);
    g_clear_pointer(&server->health, rpc_health_free);
    g_clear_pointer(&server->routes, g_hash_table_unref);
    g_clear_pointer(&server->services, g_ptr_array_unref);
    g_clear_pointer(&server->address, g_free);
}

RpcServer *rpc_server_new(RpcTransport *transport, Loop *loop, const RpcServerOptions *options,
                          GError **error)
{
    RpcServer *server = transport->ops->server_new(transport, loop, options, error);
    if (server && options->health) {
        rpc_health_add(server);
    }
    return server;
}

static const RpcMethod *find_method(const RpcMethod *methods, const char *name)
{
    for (; methods->name; methods++) {
        if (strcmp(methods->name, name) == 0) {
            return methods;
        }
    }
    return NULL;
}

static void add_route(RpcServer *server, const char *service_name,
                      const ProtobufCMethodDescriptor *method, const RpcMethod *entry, void *user)
{
    RpcRoute *route = g_new0(RpcRoute, 1);
    route->method = method;
    route->handler = entry ? entry->handler : NULL;
    route->roles = entry ? entry->roles : 0;
    route->user = user;
    route->name = g_strdup_printf("%s/%s", service_name, method->name);
    char *path = g_strconcat("/", route->name, NULL);
    if (!descriptors_method(path, &route->flags)) {
        g_error(
            "%s is not in the embedded descriptor set; list its .proto in proto/grpc/meson.build",
            route->name);
    }
    g_hash_table_insert(server->routes, path, route);
}

void rpc_server_add_as(RpcServer *server, const char *service_name,
                       const ProtobufCServiceDescriptor *service, const RpcMethod *methods,
                       void *user)
{
    for (const RpcMethod *entry = methods; entry->name; entry++) {
        if (!protobuf_c_service_descriptor_get_method_by_name(service, entry->name)) {
            g_error("%s has no method %s", service->name, entry->name);
        }
    }
    for (unsigned i = 0; i < service->n_methods; i++) {
        const ProtobufCMethodDescriptor *method = &service->methods[i];
        add_route(server, service_name, method, find_method(methods, method->name), user);
    }
    g_ptr_array_add(server->services, g_strdup(service_name));
}

void rpc_server_add(RpcServer *server, const ProtobufCServiceDescriptor *service,
                    const RpcMethod *methods, void *user)
{
    rpc_server_add_as(server, service->name, service, methods, user);
}

bool rpc_server_set_credentials(RpcServer *server, const RpcCredentials *credentials,
                                GError **error)
{
    g_assert(server->tls && credentials->ca_pem != NULL);
    return server->transport->ops->server_set_credentials == NULL ||
           server->transport->ops->server_set_credentials(server, credentials, error);
}

bool rpc_server_start(RpcServer *server, GError **error)
{
    if (server->serve_reflection) {
        rpc_reflection_add(server);
    }
    rpc_health_default(server);
    return server->transport->ops->server_start(server, error);
}

const char *rpc_server_address(const RpcServer *server)
{
    return server->address;
}

void rpc_server_free(RpcServer *server, int grace_ms)
{
    if (server) {
        rpc_health_shut_down(server);
        server->transport->ops->server_free(server, grace_ms);
    }
}

/* ---- a call: from the wire ------------------------------------------------------------------- */

void rpc_call_init(RpcCall *call, RpcServer *server, const RpcPeer *peer, int64_t deadline_us)
{
    call->server = server;
    call->ops = server->transport->ops;
    call->loop = server->loop;
    call->refs = 1;
    call->peer = (RpcPeer){
        .name = g_strdup(peer->name ? peer->name : ""),
        .role = peer->role,
        .serial = g_strdup(peer->serial ? peer->serial : ""),
        .address = g_strdup(peer->address ? peer->address : ""),
    };
    call->deadline_us = deadline_us;
    call->link.data = call;
    g_queue_push_tail_link(&server->calls, &call->link);
}

static void report_cancel(RpcCall *call)
{
    LoopFn fn = call->on_cancel;
    call->on_cancel = NULL;
    if (fn) {
        fn(call->on_cancel_user);
    }
}

static void report_cancel_later(void *user)
{
    RpcCall *call = user;
    report_cancel(call);
    rpc_call_unref(call);
}

/* A bare status: also of answers that are no WEFT_ERROR, as UNIMPLEMENTED. */
static void finish_status(RpcCall *call, int status, const char *message)
{
    if (!call->finished && !call->closed) {
        call->finished = true;
        call->ops->call_finish(call, status, message ? message : "");
    }
}

static void refuse(RpcCall *call, int code, const char *format, ...) G_GNUC_PRINTF(3, 4);
static void refuse(RpcCall *call, int code, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    g_autoptr(GError) error = g_error_new_valist(WEFT_ERROR, code, format, arguments);
    va_end(arguments);
    rpc_call_finish(call, error);
}

static bool check_peer(RpcCall *call)
{
    const RpcServer *server = call->server;
    const RpcPeer *peer = &call->peer;
    if (*peer->serial && server->is_revoked &&
        server->is_revoked(peer->serial, server->revoked_user)) {
        log_warn(server->log, "refused %s from %s at %s: certificate %s is revoked",
                 call->route->name, peer->name, peer->address, peer->serial);
        refuse(call, WEFT_ERROR_DENIED,
               "certificate %s of %s is revoked; join the cluster again with a new token",
               peer->serial, peer->name);
        return false;
    }
    if (call->route->roles != 0 && !(call->route->roles & peer->role)) {
        g_autofree char *roles = format_roles(call->route->roles);
        log_warn(server->log, "refused %s from %s at %s: role %s", call->route->name,
                 *peer->name ? peer->name : "a peer", peer->address, role_name(peer->role));
        refuse(call, WEFT_ERROR_DENIED, "role %s may not call %s; it takes role %s",
               role_name(peer->role), call->route->name, roles);
        return false;
    }
    return true;
}

bool rpc_call_accept(RpcCall *call, const char *path)
{
    call->route = g_hash_table_lookup(call->server->routes, path);
    if (!call->route || !call->route->handler) {
        g_autofree char *message =
            g_strdup_printf("%s is not served at %s", path, call->server->address);
        finish_status(call, RPC_STATUS_UNIMPLEMENTED, message);
        return false;
    }
    return check_peer(call);
}

bool rpc_call_streams_requests(const RpcCall *call)
{
    return call->route->flags.client_streaming;
}

static void run_handler(RpcCall *call, const ProtobufCMessage *request)
{
    rpc_call_ref(call);
    call->route->handler(call, request, call->route->user);
    rpc_call_unref(call);
}

static void half_closed(RpcCall *call)
{
    if (call->half_closed) {
        return;
    }
    call->half_closed = true;
    if (call->route->flags.client_streaming) {
        run_handler(call, NULL);
    } else if (!call->got_request) {
        refuse(call, WEFT_ERROR_INVALID, "%s was called without a request message",
               call->route->name);
    }
}

void rpc_call_message(RpcCall *call, const uint8_t *bytes, size_t n_bytes)
{
    if (call->finished || call->closed) {
        return;
    }
    if (!bytes) {
        half_closed(call);
        return;
    }
    if (call->got_request && !call->route->flags.client_streaming) {
        return;
    }
    call->got_request = true;
    const ProtobufCMessageDescriptor *type = call->route->method->input;
    ProtobufCMessage *request = protobuf_c_message_unpack(type, NULL, n_bytes, bytes);
    if (!request) {
        refuse(call, WEFT_ERROR_INVALID, "the %zu bytes sent to %s are no %s", n_bytes,
               call->route->name, type->name);
        return;
    }
    message_text_mend(request);
    run_handler(call, request);
    protobuf_c_message_free_unpacked(request, NULL);
}

void rpc_call_closed(RpcCall *call)
{
    if (call->closed) {
        return;
    }
    call->closed = true;
    g_queue_unlink(&call->server->calls, &call->link);
    call->server = NULL;
    report_cancel(call);
    rpc_call_unref(call);
}

/* ---- a call: from the handler ---------------------------------------------------------------- */

const RpcPeer *rpc_call_peer(RpcCall *call)
{
    return &call->peer;
}

int64_t rpc_call_time_left_ms(RpcCall *call)
{
    if (call->deadline_us == INT64_MAX) {
        return INT64_MAX;
    }
    return MAX(0, (call->deadline_us - loop_now_us(call->loop)) / 1000);
}

size_t rpc_call_send(RpcCall *call, const ProtobufCMessage *response)
{
    if (call->finished || call->closed) {
        return 0;
    }
    g_assert(response->descriptor == call->route->method->output);
    size_t n_bytes = protobuf_c_message_get_packed_size(response);
    if (n_bytes > RPC_MAX_MESSAGE_BYTES) {
        log_error(call->server->log, "answer of %s is too large: %zu bytes", call->route->name,
                  n_bytes);
        refuse(call, WEFT_ERROR_FAILED,
               "the answer of %s has %zu bytes, over the limit of %u; ask for less at once",
               call->route->name, n_bytes, RPC_MAX_MESSAGE_BYTES);
        return 0;
    }
    uint8_t *bytes = g_malloc(MAX(n_bytes, 1));
    protobuf_c_message_pack(response, bytes);
    return call->ops->call_send(call, bytes, n_bytes);
}

bool rpc_call_has_room(RpcCall *call, size_t most_waiting, LoopFn fn, void *user)
{
    call->on_room = NULL;
    if (call->finished || call->closed || !call->ops->call_is_behind(call, most_waiting)) {
        return true;
    }
    call->on_room = fn;
    call->on_room_user = user;
    call->room_bytes = most_waiting;
    return false;
}

void rpc_call_drained(RpcCall *call)
{
    if (call->on_room == NULL || call->finished || call->closed ||
        call->ops->call_is_behind(call, call->room_bytes)) {
        return;
    }
    LoopFn fn = call->on_room;
    call->on_room = NULL;
    fn(call->on_room_user);
}

void rpc_call_finish(RpcCall *call, const GError *error)
{
    call->on_cancel = NULL;
    if (!error) {
        finish_status(call, RPC_STATUS_OK, "");
        return;
    }
    g_autofree char *message = NULL;
    int status = weft_error_to_status(error, &message);
    finish_status(call, status, message);
}

void rpc_call_reply(RpcCall *call, const ProtobufCMessage *response)
{
    rpc_call_send(call, response);
    rpc_call_finish(call, NULL);
}

void rpc_call_on_cancel(RpcCall *call, LoopFn fn, void *user)
{
    call->on_cancel = fn;
    call->on_cancel_user = user;
    if (call->closed && !call->finished && fn) {
        loop_post(call->loop, report_cancel_later, rpc_call_ref(call));
    }
}

RpcCall *rpc_call_ref(RpcCall *call)
{
    call->refs++;
    return call;
}

void rpc_call_unref(RpcCall *call)
{
    if (!call || --call->refs > 0) {
        return;
    }
    if (call->destroy) {
        call->destroy(call->data);
    }
    g_free((char *)call->peer.name);
    g_free((char *)call->peer.serial);
    g_free((char *)call->peer.address);
    call->ops->call_free(call);
}

void rpc_call_set_data(RpcCall *call, void *data, GDestroyNotify destroy)
{
    if (call->destroy) {
        call->destroy(call->data);
    }
    call->data = data;
    call->destroy = destroy;
}

void *rpc_call_data(RpcCall *call)
{
    return call->data;
}

/* ---- revocation ------------------------------------------------------------------------------ */

static bool is_peer(const RpcCall *call, const char *name_or_serial)
{
    return *name_or_serial && (strcmp(call->peer.name, name_or_serial) == 0 ||
                               strcmp(call->peer.serial, name_or_serial) == 0);
}

void rpc_server_kick(RpcServer *server, const char *name_or_serial)
{
    g_autoptr(GError) error =
        g_error_new(WEFT_ERROR, WEFT_ERROR_DENIED,
                    "the certificate of %s was revoked; join the cluster again with a new token",
                    name_or_serial);
    g_autofree char *message = NULL;
    int status = weft_error_to_status(error, &message);
    for (GList *at = server->calls.head; at;) {
        RpcCall *call = at->data;
        at = at->next;
        if (is_peer(call, name_or_serial) && !call->finished) {
            finish_status(call, status, message);
            loop_post(server->loop, report_cancel_later, rpc_call_ref(call));
        }
    }
}
