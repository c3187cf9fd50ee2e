/* Rpc: services declared in proto/, over gRPC (transport/rpc/grpc) or within the process
 * (transport/rpc/inproc), behind one table. Everything is asynchronous; every callback runs on the
 * Loop given at creation, never inside the call that caused it. Messages are protobuf-c structures.
 * gRPC types appear only in the adapter's folder. */
#pragma once

#include "proto/base/loop.h"
#include "proto/base/log.h"

#include <glib.h>
#include <protobuf-c/protobuf-c.h>
#include <stdbool.h>
#include <stdint.h>

/* ---- identity ---- */

typedef enum RpcRole {
    RPC_ROLE_NONE = 0, /* no client certificate (Join listener, health listener) */
    RPC_ROLE_WORKER = 1,
    RPC_ROLE_SUBMIT = 2,
    RPC_ROLE_ADMIN = 4,
    RPC_ROLE_PROBE = 8,
    RPC_ROLE_COORDINATOR = 16,
} RpcRole; /* a bit each */

typedef struct RpcPeer {
    const char
        *name; /* node id from the certificate, "" without one; borrowed for the call's life */
    RpcRole role;
    const char *serial;  /* certificate serial, lower-case hex */
    const char *address; /* remote address as text */
} RpcPeer;

/* Certificates for one side. PEM texts; NULL ca = plaintext (health listener; tests). Borrowed
 * during the call. A server's certificate_pem is its leaf followed by the CA certificate:
 * x509_fetch_ca() finds the CA in the chain that the server presents. */
typedef struct RpcCredentials {
    const char *ca_pem;
    const char *certificate_pem, *key_pem; /* NULL certificate on a client: server TLS only */
    bool require_client_certificate;       /* server */
} RpcCredentials;

/* ---- server ---- */

typedef struct RpcServer RpcServer;
typedef struct RpcCall RpcCall; /* server side of one call; referenced by the server until it is
                                   finished and reported */

/* One request message has arrived (unary and server-streaming: once; client-streaming: each
 * message, then once with NULL for half-close). `request` is borrowed for the duration. The handler
 * answers now or later, from the loop thread. */
typedef void (*RpcHandler)(RpcCall *call, const ProtobufCMessage *request, void *user);

typedef struct RpcMethod {
    const char *name; /* method name as in the .proto */
    RpcHandler handler;
    /* RpcRole bits that may call; checked before the handler (PERMISSION_DENIED names role and
     * method). 0 = whoever can connect. */
    unsigned roles;
} RpcMethod;

typedef struct RpcServerOptions {
    const char *listen; /* "127.0.0.1:7470", port 0 = any free; inproc: any name */
    RpcCredentials credentials;
    bool health;     /* serve grpc.health.v1 */
    bool reflection; /* serve reflection v1 and v1alpha (role admin; with plaintext, where nobody
                        has a role, for all) */
    /* NULL = nobody is revoked; called on each new call */
    bool (*is_revoked)(const char *serial, void *user);
    void *revoked_user;
    Log *log;
} RpcServerOptions;

typedef struct RpcTransport RpcTransport; /* the table's fill: grpc or inproc */

/* Binds the port; NULL + error (port in use names address and errno text). Start with
 * rpc_server_start() after services were added. */
RpcServer *rpc_server_new(RpcTransport *transport, Loop *loop, const RpcServerOptions *options,
                          GError **error);
/* methods: array ended by {NULL}; a method of the descriptor without an entry answers
 * UNIMPLEMENTED. */
void rpc_server_add(RpcServer *server, const ProtobufCServiceDescriptor *service,
                    const RpcMethod *methods, void *user);
bool rpc_server_start(RpcServer *server, GError **error);
/* New connections get this certificate and key from now on; those that are open stay. For servers
 * with TLS. Nothing changes on false (INVALID). */
bool rpc_server_set_credentials(RpcServer *server, const RpcCredentials *credentials,
                                GError **error);
/* "host:port" with the port really bound; borrowed. */
const char *rpc_server_address(const RpcServer *server);
/* Health by service name; "" = the whole. Pushed to every Watch. Loop thread. What was not set
 * before rpc_server_start() is SERVING from then on. */
void rpc_server_set_health(RpcServer *server, const char *service, bool serving);
/* Ends every call of a peer (by certificate serial or by node name) with PERMISSION_DENIED:
 * revocation. */
void rpc_server_kick(RpcServer *server, const char *name_or_serial);
/* Health NOT_SERVING, waits at most grace_ms for live calls, cancels the rest (their on_cancel runs
 * before this returns), frees. Blocks at most grace_ms + 1 s: the Loop stands still meanwhile, so
 * handlers that answer from timers should have finished their calls before. NULL is allowed. */
void rpc_server_free(RpcServer *server, int grace_ms);

const RpcPeer *rpc_call_peer(RpcCall *call);
/* Milliseconds to the client's deadline; INT64_MAX without one. */
int64_t rpc_call_time_left_ms(RpcCall *call);
/* Queues one response message (packed now). Returns bytes waiting to be sent, so that a producer
 * can drop a slow reader. After the call ended it does nothing. Loop thread. */
size_t rpc_call_send(RpcCall *call, const ProtobufCMessage *response);
/* For a producer that waits for its reader: true if at most most_waiting bytes wait to be sent,
 * or the call has ended. Else false, and fn(user) runs once, on the loop, when that is so; not
 * after the call ended. A later call takes the place of an earlier one. */
bool rpc_call_has_room(RpcCall *call, size_t most_waiting, LoopFn fn, void *user);
/* Ends the call: OK when error is NULL, else its status and message. Error is borrowed. Exactly
 * once; later calls do nothing. */
void rpc_call_finish(RpcCall *call, const GError *error);
/* rpc_call_send + rpc_call_finish(OK). */
void rpc_call_reply(RpcCall *call, const ProtobufCMessage *response);
/* fn(user) once when the client cancelled, its deadline passed or the connection died before the
 * call was finished. */
void rpc_call_on_cancel(RpcCall *call, LoopFn fn, void *user);
/* For handlers that answer later. */
RpcCall *rpc_call_ref(RpcCall *call);
void rpc_call_unref(RpcCall *call);
/* A slot for the handler's own state, with its destructor, run when the call is freed. */
void rpc_call_set_data(RpcCall *call, void *data, GDestroyNotify destroy);
void *rpc_call_data(RpcCall *call);

/* ---- client ---- */

typedef struct RpcChannel RpcChannel;
typedef struct RpcClientCall RpcClientCall;

typedef struct RpcChannelOptions {
    const char *target; /* "ipv4-or-name:port" */
    RpcCredentials credentials;
    const char *server_name; /* name expected in the server's certificate; NULL = target's host.
                                weft servers carry "weft" + role names */
    /* connection state changed: true = ready. Loop thread; may be NULL. The channel reconnects by
     * itself, back-off 0.1 to 1 s. */
    void (*on_state)(bool ready, void *user);
    void *user;
} RpcChannelOptions;

RpcChannel *rpc_channel_new(RpcTransport *transport, Loop *loop, const RpcChannelOptions *options,
                            GError **error);
/* Cancels what is open: every on_done runs, with CANCELLED, before this returns. A call that is
 * started meanwhile (from such an on_done) never begins and its on_done never runs. May be called
 * from a callback of the channel. NULL is allowed. */
void rpc_channel_free(RpcChannel *channel);

typedef struct RpcCallbacks {
    void (*on_message)(const ProtobufCMessage *response, void *user); /* borrowed; may be NULL */
    /* Once, last. error NULL = OK; else borrowed WEFT_ERROR (weft_error_from_status). UNREACHABLE
     * when no connection. What the peer did not say itself begins with the method's full name. */
    void (*on_done)(const GError *error, void *user);
} RpcCallbacks;

/* Starts a call of `method` of `service`. request NULL for client-streaming. deadline_ms is
 * relative; <= 0 only for long-lived streams (Attach, Watch, Generate, Run). wait_for_ready: wait
 * for a connection until the deadline instead of failing at once. */
RpcClientCall *rpc_call_start(RpcChannel *channel, const ProtobufCServiceDescriptor *service,
                              const char *method, const ProtobufCMessage *request,
                              int64_t deadline_ms, bool wait_for_ready, RpcCallbacks callbacks,
                              void *user);
void rpc_client_send(RpcClientCall *call, const ProtobufCMessage *message); /* client-streaming */
void rpc_client_half_close(RpcClientCall *call);
void rpc_client_cancel(RpcClientCall *call); /* on_done follows with CANCELLED */
/* The handle is valid until on_done returned; no unref needed. */

/* ---- fills ---- */

/* What the gRPC fill stands on, with versions: "gRPC core 29.0.0, protobuf-c 1.4.1". Returned. */
char *rpc_libraries(void);
RpcTransport *
rpc_transport_grpc(void); /* process-wide, refcounts grpc_init; never freed by callers */
RpcTransport *rpc_transport_inproc_new(
    void); /* its servers are found by listen name; credentials give the peer: see inproc.h */
void rpc_transport_inproc_free(RpcTransport *t);

/* Serialised FileDescriptorSet of all services, embedded at build time: streaming flags and
 * reflection. */
extern const uint8_t weft_descriptor_set[];
extern const size_t weft_descriptor_set_size;
