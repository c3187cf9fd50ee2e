#include "transport/rpc/inproc/talk.h"

#include "proto/base/error.h"

#include <string.h>

typedef struct InprocServer {
    RpcServer base;
    End *end;
} InprocServer;

typedef struct InprocCall {
    RpcCall base;
    Talk *talk;
    LoopTimer *deadline;
} InprocCall;

static InprocTransport *transport_of(const InprocServer *server)
{
    return (InprocTransport *)server->base.transport;
}

/* Port 0 is any that is free, as on a real host. */
static char *choose_name(InprocTransport *transport, const char *listen_name)
{
    if (!g_str_has_suffix(listen_name, ":0")) {
        return g_strdup(listen_name);
    }
    return g_strdup_printf("%.*s:%u", (int)strlen(listen_name) - 2, listen_name,
                           transport->next_port++);
}

RpcServer *inproc_server_new(RpcTransport *base, Loop *loop, const RpcServerOptions *options,
                             GError **error)
{
    InprocTransport *transport = (InprocTransport *)base;
    InprocServer *server = g_new0(InprocServer, 1);
    pthread_mutex_lock(&transport->mutex);
    g_autofree char *name = choose_name(transport, options->listen);
    bool taken = g_hash_table_contains(transport->servers, name);
    if (!taken) {
        server->end = end_new(loop, &options->credentials, name, server);
        server->end->server = true;
        g_hash_table_insert(transport->servers, server->end->name, server->end);
    }
    pthread_mutex_unlock(&transport->mutex);
    if (taken) {
        g_set_error(
            error, WEFT_ERROR, WEFT_ERROR_IO,
            "cannot listen on %s: Address already in use; choose another port or stop who holds it",
            name);
        g_free(server);
        return NULL;
    }
    rpc_server_init(&server->base, base, loop, options);
    server->base.address = g_strdup(name);
    return &server->base;
}

bool inproc_server_start(RpcServer *base, GError **error)
{
    InprocServer *server = (InprocServer *)base;
    pthread_mutex_lock(&transport_of(server)->mutex);
    server->end->accepting = true;
    pthread_mutex_unlock(&transport_of(server)->mutex);
    inproc_announce(transport_of(server));
    return true;
}

/* ---- calls ----------------------------------------------------------------------------------- */

static void close_call(InprocCall *call)
{
    if (call->base.closed) {
        return;
    }
    loop_timer_cancel(call->base.loop, g_steal_pointer(&call->deadline));
    call->talk->call = NULL;
    rpc_call_closed(&call->base);
}

static void on_deadline(void *user)
{
    InprocCall *call = user;
    call->deadline = NULL;
    close_call(call);
}

static void open_call(Talk *talk)
{
    InprocServer *server = talk->ends[TO_SERVER]->owner;
    InprocCall *call = g_new0(InprocCall, 1);
    call->talk = talk_ref(talk);
    talk->call = &call->base;
    Loop *loop = server->base.loop;
    int64_t deadline_us =
        talk->deadline_ms > 0 ? loop_now_us(loop) + talk->deadline_ms * 1000 : INT64_MAX;
    rpc_call_init(&call->base, &server->base, &talk->peer, deadline_us);
    if (talk->deadline_ms > 0) {
        call->deadline = loop_timer_start(loop, talk->deadline_ms * 1000, on_deadline, call);
    }
    rpc_call_accept(&call->base, talk->path);
}

void inproc_server_receive(Talk *talk, Parcel *parcel)
{
    bool open = talk->ends[TO_SERVER]->loop != NULL; /* closed only on this loop's thread */
    if (parcel->kind == PARCEL_OPEN && open) {
        open_call(talk);
        return;
    }
    InprocCall *call = (InprocCall *)talk->call;
    if (!call) {
        return;
    }
    switch (parcel->kind) {
    case PARCEL_DATA:
        rpc_call_message(&call->base, parcel->bytes, parcel->n_bytes);
        break;
    case PARCEL_HALF_CLOSE:
        rpc_call_message(&call->base, NULL, 0);
        break;
    default:
        close_call(call);
    }
}

size_t inproc_call_send(RpcCall *base, uint8_t *bytes, size_t n_bytes)
{
    return talk_send(((InprocCall *)base)->talk, TO_CLIENT, (Parcel){PARCEL_DATA, bytes, n_bytes});
}

bool inproc_call_is_behind(RpcCall *base, size_t most_waiting)
{
    return talk_is_behind(((InprocCall *)base)->talk, most_waiting);
}

void inproc_server_drained(Talk *talk)
{
    if (talk->call != NULL) {
        rpc_call_drained(talk->call);
    }
}

static void close_later(void *user)
{
    InprocCall *call = user;
    close_call(call);
    rpc_call_unref(&call->base);
}

void inproc_call_finish(RpcCall *base, int status, const char *message)
{
    InprocCall *call = (InprocCall *)base;
    talk_send(call->talk, TO_CLIENT,
              (Parcel){.kind = PARCEL_STATUS, .status = status, .text = g_strdup(message)});
    loop_post(base->loop, close_later, rpc_call_ref(base));
}

void inproc_call_free(RpcCall *base)
{
    InprocCall *call = (InprocCall *)base;
    talk_unref(call->talk);
    g_free(call);
}

/* Nothing that would end a call can arrive while this Loop is blocked here, so there is nothing to
 * wait for. */
void inproc_server_free(RpcServer *base, int grace_ms)
{
    InprocServer *server = (InprocServer *)base;
    while (base->calls.head) {
        InprocCall *call = base->calls.head->data;
        if (!call->base.finished) {
            talk_send(call->talk, TO_CLIENT,
                      (Parcel){.kind = PARCEL_STATUS,
                               .status = RPC_STATUS_UNAVAILABLE,
                               .text = g_strdup("the server shuts down")});
        }
        close_call(call);
    }
    InprocTransport *transport = transport_of(server);
    end_close(transport, server->end);
    inproc_announce(transport);
    end_unref(server->end);
    rpc_server_clear(base);
    g_free(server);
}
