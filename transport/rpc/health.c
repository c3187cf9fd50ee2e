/* grpc.health.v1: Check answers at once, Watch answers at once and then at each change
 * (doc/health-checking.md of gRPC). A watch of a service that is not known yet says SERVICE_UNKNOWN
 * and goes on: the service may be added later. */
#include "transport/rpc/wire.h"

#include "grpc/health.pb-c.h"
#include "proto/base/error.h"

struct RpcHealth {
    GHashTable *states; /* service name -> ServingStatus */
    GQueue watches;     /* RpcCall, referenced; data = HealthWatch */
};

typedef struct HealthWatch {
    RpcHealth *health;
    RpcCall *call;
    char *service;
} HealthWatch;

static Grpc__Health__V1__HealthCheckResponse__ServingStatus state_of(RpcHealth *health,
                                                                     const char *service)
{
    void *state;
    if (!g_hash_table_lookup_extended(health->states, service, NULL, &state)) {
        return GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVICE_UNKNOWN;
    }
    return GPOINTER_TO_INT(state);
}

static void send_state(RpcCall *call, RpcHealth *health, const char *service)
{
    Grpc__Health__V1__HealthCheckResponse response = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    response.status = state_of(health, service);
    rpc_call_send(call, &response.base);
}

static void on_check(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    RpcHealth *health = user;
    const Grpc__Health__V1__HealthCheckRequest *request = (const void *)message;
    if (!g_hash_table_contains(health->states, request->service)) {
        g_autoptr(GError) error = g_error_new(WEFT_ERROR, WEFT_ERROR_NOT_FOUND,
                                              "service \"%s\" is not known here", request->service);
        rpc_call_finish(call, error);
        return;
    }
    send_state(call, health, request->service);
    rpc_call_finish(call, NULL);
}

static void drop_watch(HealthWatch *watch)
{
    g_queue_remove(&watch->health->watches, watch);
    rpc_call_unref(watch->call);
    g_free(watch->service);
    g_free(watch);
}

static void on_watch_cancelled(void *user)
{
    drop_watch(user);
}

static void on_watch(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    RpcHealth *health = user;
    const Grpc__Health__V1__HealthCheckRequest *request = (const void *)message;
    HealthWatch *watch = g_new0(HealthWatch, 1);
    watch->health = health;
    watch->call = rpc_call_ref(call);
    watch->service = g_strdup(request->service);
    g_queue_push_tail(&health->watches, watch);
    rpc_call_on_cancel(call, on_watch_cancelled, watch);
    send_state(call, health, watch->service);
}

void rpc_health_add(RpcServer *server)
{
    static const RpcMethod methods[] = {{"Check", on_check, 0}, {"Watch", on_watch, 0}, {NULL}};
    RpcHealth *health = g_new0(RpcHealth, 1);
    health->states = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL);
    g_queue_init(&health->watches);
    server->health = health;
    rpc_server_add(server, &grpc__health__v1__health__descriptor, methods, health);
}

void rpc_server_set_health(RpcServer *server, const char *service, bool serving)
{
    RpcHealth *health = server->health;
    if (!health) {
        return;
    }
    int state = serving ? GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING
                        : GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING;
    bool changed = (int)state_of(health, service) != state;
    g_hash_table_insert(health->states, g_strdup(service), GINT_TO_POINTER(state));
    for (GList *at = health->watches.head; changed && at; at = at->next) {
        HealthWatch *watch = at->data;
        if (g_str_equal(watch->service, service)) {
            send_state(watch->call, health, service);
        }
    }
}

void rpc_health_default(RpcServer *server)
{
    if (!server->health) {
        return;
    }
    if (!g_hash_table_contains(server->health->states, "")) {
        rpc_server_set_health(server, "", true);
    }
    for (unsigned i = 0; i < server->services->len; i++) {
        const char *service = g_ptr_array_index(server->services, i);
        if (!g_hash_table_contains(server->health->states, service)) {
            rpc_server_set_health(server, service, true);
        }
    }
}

void rpc_health_shut_down(RpcServer *server)
{
    RpcHealth *health = server->health;
    if (!health) {
        return;
    }
    g_autoptr(GPtrArray) services = g_ptr_array_new_with_free_func(g_free);
    GHashTableIter iter;
    void *service;
    g_hash_table_iter_init(&iter, health->states);
    while (g_hash_table_iter_next(&iter, &service, NULL)) {
        g_ptr_array_add(services, g_strdup(service));
    }
    for (unsigned i = 0; i < services->len; i++) {
        rpc_server_set_health(server, g_ptr_array_index(services, i), false);
    }
    g_autoptr(GError) error =
        g_error_new_literal(WEFT_ERROR, WEFT_ERROR_UNREACHABLE, "the server shuts down");
    while (health->watches.head) {
        HealthWatch *watch = health->watches.head->data;
        rpc_call_finish(watch->call, error);
        drop_watch(watch);
    }
}

void rpc_health_free(RpcHealth *health)
{
    g_assert(health->watches.length == 0);
    g_hash_table_unref(health->states);
    g_free(health);
}
