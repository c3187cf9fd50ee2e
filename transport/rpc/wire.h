/* What a fill of Rpc (grpc/, inproc/) implements and what it calls back. A fill moves bytes, names,
 * deadlines and statuses; messages, roles, health and reflection are above it (server.c, client.c),
 * once for both.
 *
 * Everything here happens on the Loop of the server or channel it belongs to. Nothing
 * outside transport/rpc includes this. */
#pragma once

#include "transport/rpc/rpc.h"

/* A message on either side's receiving limit: RESOURCE_EXHAUSTED there, so the sender refuses
 * earlier, with a better message. */
#define RPC_MAX_MESSAGE_BYTES (4u << 20)

typedef struct RpcRoute RpcRoute;
typedef struct RpcHealth RpcHealth;

/* status codes of grpc/status.h that are made on this side of the adapter */
enum {
    RPC_STATUS_OK = 0,
    RPC_STATUS_CANCELLED = 1,
    RPC_STATUS_INVALID_ARGUMENT = 3,
    RPC_STATUS_DEADLINE_EXCEEDED = 4,
    RPC_STATUS_NOT_FOUND = 5,
    RPC_STATUS_PERMISSION_DENIED = 7,
    RPC_STATUS_UNIMPLEMENTED = 12,
    RPC_STATUS_INTERNAL = 13,
    RPC_STATUS_UNAVAILABLE = 14,
};

typedef struct RpcStart {
    int64_t deadline_ms; /* relative; <= 0: none */
    bool wait_for_ready;
    uint8_t *bytes; /* first request or NULL; g_malloc'ed, taken */
    size_t n_bytes;
    bool half_close; /* nothing follows */
} RpcStart;

typedef struct RpcTransportOps {
    /* The fill allocates an object that begins with the base, and calls rpc_server_init(); NULL +
     * error. */
    RpcServer *(*server_new)(RpcTransport *transport, Loop *loop, const RpcServerOptions *options,
                             GError **error);
    bool (*server_start)(RpcServer *server, GError **error);
    /* For new connections; NULL: connections have nothing of it. */
    bool (*server_set_credentials)(RpcServer *server, const RpcCredentials *credentials,
                                   GError **error);
    /* Takes no new calls, waits at most grace_ms for server->calls to become empty, ends the rest
     * (rpc_call_closed ran for each), frees everything of the fill, and the object itself after
     * rpc_server_clear(). */
    void (*server_free)(RpcServer *server, int grace_ms);

    /* bytes: g_malloc'ed, taken always. Returns bytes that wait. */
    size_t (*call_send)(RpcCall *call, uint8_t *bytes, size_t n_bytes);
    /* Whether more than most_waiting bytes wait; if so, rpc_call_drained() follows, once at least,
     * when that is no longer the case. */
    bool (*call_is_behind)(RpcCall *call, size_t most_waiting);
    void (*call_finish)(RpcCall *call, int status, const char *message);
    /* After the last reference went and rpc_call_closed ran. */
    void (*call_free)(RpcCall *call);

    RpcChannel *(*channel_new)(RpcTransport *transport, Loop *loop,
                               const RpcChannelOptions *options, GError **error);
    /* Ends every call of channel->calls with rpc_client_closed(CANCELLED), then frees, after
     * rpc_channel_clear(). */
    void (*channel_free)(RpcChannel *channel);

    RpcClientCall *(*client_new)(
        RpcChannel *channel); /* an object beginning with the base, zeroed */
    void (*client_start)(RpcClientCall *call, const RpcStart *start);
    void (*client_send)(RpcClientCall *call, uint8_t *bytes, size_t n_bytes); /* taken always */
    void (*client_half_close)(RpcClientCall *call);
    void (*client_cancel)(RpcClientCall *call);
    void (*client_free)(RpcClientCall *call); /* after rpc_client_closed and the last reference */
} RpcTransportOps;

struct RpcTransport {
    const RpcTransportOps *ops;
};

/* ---- server side ----------------------------------------------------------------------------- */

struct RpcServer {
    RpcTransport *transport;
    Loop *loop;
    Log *log;
    bool tls; /* peers have roles */
    bool serve_reflection;
    bool (*is_revoked)(const char *serial, void *user);
    void *revoked_user;
    char *address;
    GHashTable *routes;  /* "/pkg.Service/Method" -> RpcRoute */
    GPtrArray *services; /* names, in order of adding */
    GQueue calls;        /* RpcCall, live: accepted and not closed */
    RpcHealth *health;   /* NULL: not served */
};

struct RpcCall {
    RpcServer *server; /* NULL once closed */
    const RpcTransportOps *ops;
    int refs;
    GList link;            /* in server->calls */
    const RpcRoute *route; /* NULL until accepted */
    Loop *loop;
    RpcPeer peer;        /* its texts are owned by the call */
    int64_t deadline_us; /* loop time; INT64_MAX without */
    bool got_request, half_closed, finished, closed;
    LoopFn on_cancel;
    void *on_cancel_user;
    LoopFn on_room; /* when at most room_bytes wait; NULL = nobody waits for that */
    void *on_room_user;
    size_t room_bytes;
    void *data;
    GDestroyNotify destroy;
};

void rpc_server_init(RpcServer *server, RpcTransport *transport, Loop *loop,
                     const RpcServerOptions *options);
void rpc_server_clear(RpcServer *server);
/* A new call: sets the base with one reference (the fill's). peer's texts are copied. */
void rpc_call_init(RpcCall *call, RpcServer *server, const RpcPeer *peer, int64_t deadline_us);
/* Routes and checks revocation and role. False: the call was finished with a status; expect no
 * messages. */
bool rpc_call_accept(RpcCall *call, const char *path);
/* Whether more than one request message may come. After rpc_call_accept. */
bool rpc_call_streams_requests(const RpcCall *call);
/* bytes NULL = half-close. Borrowed. */
void rpc_call_message(RpcCall *call, const uint8_t *bytes, size_t n_bytes);
/* Once: nothing moves any more on the wire. Reports the cancellation where the handler had not
 * finished. Gives up the fill's reference. */
void rpc_call_closed(RpcCall *call);
/* Fewer bytes wait than before: tells who waits for room. */
void rpc_call_drained(RpcCall *call);
/* Reports a role from a certificate's OU; RPC_ROLE_NONE for unknown texts. */
RpcRole rpc_role_parse(const char *text);

/* Serves `service`'s methods under another full name (same messages on the wire). */
void rpc_server_add_as(RpcServer *server, const char *service_name,
                       const ProtobufCServiceDescriptor *service, const RpcMethod *methods,
                       void *user);

/* health.c */
void rpc_health_add(RpcServer *server);
void rpc_health_default(RpcServer *server);   /* serving, where nothing else was said */
void rpc_health_shut_down(RpcServer *server); /* everything NOT_SERVING, watches ended */
void rpc_health_free(RpcHealth *health);
/* reflection.c */
void rpc_reflection_add(RpcServer *server);

/* ---- client side ----------------------------------------------------------------------------- */

struct RpcChannel {
    RpcTransport *transport;
    Loop *loop;
    char *target;
    void (*on_state)(bool ready, void *user);
    void *user;
    bool ready, closing;
    GQueue calls; /* RpcClientCall, not yet closed */
    GQueue
        never_started; /* begun from an on_done inside rpc_channel_free(): handles without a life */
};

struct RpcClientCall {
    RpcChannel *channel; /* NULL once closed */
    const RpcTransportOps *ops;
    int refs;
    GList link;
    const ProtobufCMethodDescriptor *method;
    char *path; /* "/pkg.Service/Method" */
    bool streams_requests, streams_responses;
    bool half_closed, closed;
    unsigned n_responses;
    GError *local_error; /* takes precedence over the status */
    RpcCallbacks callbacks;
    void *user;
    int64_t deadline_ms;
};

void rpc_channel_init(RpcChannel *channel, RpcTransport *transport, Loop *loop,
                      const RpcChannelOptions *options);
void rpc_channel_clear(RpcChannel *channel);
void rpc_channel_state(RpcChannel *channel, bool ready);
void rpc_client_message(RpcClientCall *call, const uint8_t *bytes, size_t n_bytes);
/* Once, last: reports on_done and gives up the fill's reference. */
void rpc_client_closed(RpcClientCall *call, int status, const char *message);
/* For the fill, around callbacks after which it still touches the call. */
RpcClientCall *rpc_client_ref(RpcClientCall *call);
void rpc_client_unref(RpcClientCall *call);
