#include "transport/rpc/inproc/talk.h"

#include "proto/base/error.h"
#include "transport/crypto/x509.h"

#include <string.h>

typedef struct InprocChannel {
    RpcChannel base;
    End *end;
    char *serial;
    RpcRole role;
} InprocChannel;

/* A call that waits for its server has no Talk yet; what is sent meanwhile is kept in `early`. */
typedef struct InprocClientCall {
    RpcClientCall base;
    InprocChannel *channel;
    Talk *talk;
    GQueue early; /* Parcel */
    LoopTimer *deadline;
    int64_t deadline_us;
    bool ending; /* an end is posted: nothing else counts any more */
} InprocClientCall;

typedef struct Ending {
    InprocClientCall *call;
    int status;
    char *text;
} Ending;

static InprocTransport *transport_of(const InprocChannel *channel)
{
    return (InprocTransport *)channel->base.transport;
}

/* ---- one call -------------------------------------------------------------------------------- */

static void drop_parcel(void *data)
{
    Parcel *parcel = data;
    g_free(parcel->bytes);
    g_free(parcel->text);
    g_free(parcel);
}

static void close_call(InprocClientCall *call, int status, const char *text)
{
    if (call->base.closed) {
        return;
    }
    loop_timer_cancel(call->channel->base.loop, g_steal_pointer(&call->deadline));
    if (call->talk) {
        call->talk->client = NULL;
        if (status != RPC_STATUS_OK) {
            talk_send(call->talk, TO_SERVER, (Parcel){.kind = PARCEL_CANCEL});
        }
    }
    rpc_client_closed(&call->base, status, text);
}

static void end_now(void *user)
{
    Ending *ending = user;
    close_call(ending->call, ending->status, ending->text);
    rpc_client_unref(&ending->call->base);
    g_free(ending->text);
    g_free(ending);
}

/* Never inside the call that caused it. */
static void end_soon(InprocClientCall *call, int status, const char *text)
{
    if (!call->ending) {
        call->ending = true;
        Ending *ending = g_new(Ending, 1);
        *ending = (Ending){call, status, g_strdup(text)};
        rpc_client_ref(&call->base);
        loop_post(call->channel->base.loop, end_now, ending);
    }
}

static void on_deadline(void *user)
{
    InprocClientCall *call = user;
    call->deadline = NULL;
    close_call(call, RPC_STATUS_DEADLINE_EXCEEDED, "Deadline Exceeded");
}

static void send_parcel(InprocClientCall *call, Parcel parcel)
{
    if (call->talk) {
        talk_send(call->talk, TO_SERVER, parcel);
    } else {
        g_queue_push_tail(&call->early, g_memdup2(&parcel, sizeof parcel));
    }
}

static void connect_call(InprocClientCall *call, End *server)
{
    InprocChannel *channel = call->channel;
    Talk *talk = talk_new(transport_of(channel), channel->end, server);
    talk->path = g_strdup(call->base.path);
    talk->peer_name = g_strdup(channel->end->name);
    talk->peer_serial = g_strdup(channel->serial);
    talk->peer_address = g_strdup_printf("inproc:%s", channel->end->name);
    talk->peer = (RpcPeer){talk->peer_name, channel->role, talk->peer_serial, talk->peer_address};
    if (call->base.deadline_ms > 0) {
        int64_t left_us = call->deadline_us - loop_now_us(channel->base.loop);
        talk->deadline_ms = MAX(left_us / 1000, 1);
    }
    talk->client = &call->base;
    call->talk = talk;
    talk_send(talk, TO_SERVER, (Parcel){.kind = PARCEL_OPEN});
    Parcel *parcel;
    while ((parcel = g_queue_pop_head(&call->early))) {
        talk_send(talk, TO_SERVER, *parcel);
        g_free(parcel);
    }
}

RpcClientCall *inproc_client_new(RpcChannel *base)
{
    InprocClientCall *call = g_new0(InprocClientCall, 1);
    call->channel = (InprocChannel *)base;
    g_queue_init(&call->early);
    return &call->base;
}

void inproc_client_start(RpcClientCall *base, const RpcStart *start)
{
    InprocClientCall *call = (InprocClientCall *)base;
    Loop *loop = call->channel->base.loop;
    if (start->bytes) {
        send_parcel(call, (Parcel){PARCEL_DATA, start->bytes, start->n_bytes});
    }
    if (start->half_close) {
        send_parcel(call, (Parcel){.kind = PARCEL_HALF_CLOSE});
    }
    if (start->deadline_ms > 0) {
        call->deadline_us = loop_now_us(loop) + start->deadline_ms * 1000;
        call->deadline = loop_timer_start(loop, start->deadline_ms * 1000, on_deadline, call);
    }
    const char *why;
    End *server = inproc_find(transport_of(call->channel), call->channel->end,
                              call->channel->base.target, &why);
    if (server) {
        connect_call(call, server);
        end_unref(server);
    } else if (!start->wait_for_ready) {
        end_soon(call, RPC_STATUS_UNAVAILABLE, why);
    }
}

void inproc_client_send(RpcClientCall *base, uint8_t *bytes, size_t n_bytes)
{
    send_parcel((InprocClientCall *)base, (Parcel){PARCEL_DATA, bytes, n_bytes});
}

void inproc_client_half_close(RpcClientCall *base)
{
    send_parcel((InprocClientCall *)base, (Parcel){.kind = PARCEL_HALF_CLOSE});
}

void inproc_client_cancel(RpcClientCall *base)
{
    end_soon((InprocClientCall *)base, RPC_STATUS_CANCELLED, "cancelled by the caller");
}

void inproc_client_free(RpcClientCall *base)
{
    InprocClientCall *call = (InprocClientCall *)base;
    g_queue_clear_full(&call->early, drop_parcel);
    talk_unref(call->talk);
    g_free(call);
}

void inproc_client_receive(Talk *talk, Parcel *parcel)
{
    InprocClientCall *call = (InprocClientCall *)talk->client;
    if (!call || call->ending) {
        return;
    }
    rpc_client_ref(&call->base);
    if (parcel->kind == PARCEL_DATA) {
        rpc_client_message(&call->base, parcel->bytes, parcel->n_bytes);
    } else {
        close_call(call, parcel->status, parcel->text);
    }
    rpc_client_unref(&call->base);
}

/* ---- the channel ----------------------------------------------------------------------------- */

static bool read_identity(InprocChannel *channel, const char *certificate, char **name,
                          GError **error)
{
    if (!certificate) {
        *name = g_strdup("");
        return true;
    }
    g_auto(GStrv) words = g_strsplit(certificate, " ", -1);
    if (g_strv_length(words) == 4 && strcmp(words[0], "inproc") == 0) {
        *name = g_strdup(words[1]);
        channel->role = rpc_role_parse(words[2]);
        channel->serial = g_strdup(strcmp(words[3], "-") ? words[3] : "");
        return true;
    }
    X509Info info;
    if (!x509_parse(certificate, &info, error)) {
        return false;
    }
    *name = g_steal_pointer(&info.name);
    channel->serial = g_steal_pointer(&info.serial_hex);
    channel->role = rpc_role_parse(info.role);
    x509_info_clear(&info);
    return true;
}

RpcChannel *inproc_channel_new(RpcTransport *base, Loop *loop, const RpcChannelOptions *options,
                               GError **error)
{
    InprocTransport *transport = (InprocTransport *)base;
    InprocChannel *channel = g_new0(InprocChannel, 1);
    g_autofree char *name = NULL;
    if (!read_identity(channel, options->credentials.certificate_pem, &name, error)) {
        g_free(channel);
        return NULL;
    }
    rpc_channel_init(&channel->base, base, loop, options);
    channel->end = end_new(loop, &options->credentials, name, channel);
    pthread_mutex_lock(&transport->mutex);
    g_ptr_array_add(transport->channels, channel->end);
    pthread_mutex_unlock(&transport->mutex);
    inproc_announce(transport);
    return &channel->base;
}

/* Calls that wait begin, and the state is reported. The callback comes last: it may free the
 * channel. */
void inproc_channel_look(void *user)
{
    InprocChannel *channel = user;
    const char *why;
    End *server = inproc_find(transport_of(channel), channel->end, channel->base.target, &why);
    for (GList *at = channel->base.calls.head; server && at; at = at->next) {
        InprocClientCall *call = at->data;
        if (!call->talk && !call->ending) {
            connect_call(call, server);
        }
    }
    bool ready = server != NULL;
    end_unref(server);
    rpc_channel_state(&channel->base, ready);
}

void inproc_channel_free(RpcChannel *base)
{
    InprocChannel *channel = (InprocChannel *)base;
    while (base->calls.head) {
        close_call(base->calls.head->data, RPC_STATUS_CANCELLED, "the channel was closed");
    }
    end_close(transport_of(channel), channel->end);
    end_unref(channel->end);
    g_free(channel->serial);
    rpc_channel_clear(base);
    g_free(channel);
}
