/* The gRPC fill's channel and calls.
 *
 * A connectivity watch is always outstanding on the one polled queue: it is what makes the sockets
 * of an idle channel polled, so that a dead peer is seen at once and a reconnect takes a fraction
 * of a second instead of the 5 s of gRPC's backup poller.
 *
 *   call: client_start ─► RECV_STATUS, RECV_INITIAL_METADATA + RECV_MESSAGE, sends one at a time
 *         status arrived and reading ended ─► rpc_client_closed
 *         nothing outstanding ─► grpc_call given back
 *
 * Invariants
 *   1. on_done comes after the last message: closed only when has_status and not reading.
 *   2. Each outstanding batch holds a reference on the call.
 *   3. channel->n_wires counts grpc_calls not given back: 0 before the engine is released. */
#include "transport/rpc/grpc/args.h"
#include "transport/rpc/grpc/engine.h"

#include "proto/base/error.h"

#include <grpc/support/alloc.h>
#include <grpc/support/time.h>
#include <string.h>

#define BACKOFF_MIN_MS 100
#define BACKOFF_MAX_MS 1000
/* gRPC's "min reconnect backoff" is in truth how long one attempt may take: a TLS handshake on a
 * busy host needs more than the back-off */
#define CONNECT_TIMEOUT_MS 3000
#define WATCH_MS 60000
#define END_GRACE_US G_GINT64_CONSTANT(1000000)

typedef struct GrpcChannel {
    RpcChannel base;
    grpc_completion_queue *queue;
    EventSink *sink;
    grpc_channel *channel;
    EventTag watch_tag;
    grpc_connectivity_state state;
    bool watching;
    unsigned n_wires;
} GrpcChannel;

typedef struct GrpcClientCall {
    RpcClientCall base;
    GrpcChannel *channel;
    grpc_call *call; /* NULL once the wire is gone */
    EventTag status_tag, receive_tag, send_tag;
    unsigned outstanding;
    grpc_metadata_array initial, trailing;
    grpc_byte_buffer *received;
    GQueue outgoing; /* grpc_byte_buffer */
    uint32_t initial_flags;
    bool sent_initial, sending, sending_message, half_close, sent_half_close, reading, has_status;
    grpc_status_code status;
    grpc_slice details;
} GrpcClientCall;

/* ---- one call -------------------------------------------------------------------------------- */

static void submit(GrpcClientCall *call, const grpc_op *ops, size_t n, EventTag *tag)
{
    call->outstanding++;
    rpc_client_ref(&call->base);
    TSAN_RELEASE(tag);
    grpc_call_error result = grpc_call_start_batch(call->call, ops, n, tag, NULL);
    g_assert(result == GRPC_CALL_OK);
}

static void drop_outgoing(GrpcClientCall *call)
{
    grpc_byte_buffer *buffer;
    while ((buffer = g_queue_pop_head(&call->outgoing))) {
        grpc_byte_buffer_destroy(buffer);
    }
}

static void release_wire(GrpcClientCall *call)
{
    if (call->outstanding == 0 && call->call) {
        drop_outgoing(call);
        grpc_call_unref(call->call);
        call->call = NULL;
        call->channel->n_wires--;
    }
}

/* Brackets each completion. The count goes down first, so that a callback may free the channel. */
static void begin_completion(GrpcClientCall *call)
{
    call->outstanding--;
}

static void end_completion(GrpcClientCall *call)
{
    release_wire(call);
    rpc_client_unref(&call->base);
}

static void pump(GrpcClientCall *call)
{
    bool close_due = call->half_close && !call->sent_half_close;
    if (call->sending || call->has_status || !call->call ||
        (call->sent_initial && !call->outgoing.head && !close_due)) {
        return;
    }
    grpc_op ops[3];
    size_t n = 0;
    memset(ops, 0, sizeof ops);
    if (!call->sent_initial) {
        ops[n].op = GRPC_OP_SEND_INITIAL_METADATA;
        ops[n++].flags = call->initial_flags;
        call->sent_initial = true;
    }
    if (call->outgoing.head) {
        ops[n].op = GRPC_OP_SEND_MESSAGE;
        ops[n++].data.send_message.send_message = call->outgoing.head->data;
    }
    if (close_due && call->outgoing.length <= 1) {
        ops[n++].op = GRPC_OP_SEND_CLOSE_FROM_CLIENT;
        call->sent_half_close = true;
    }
    call->sending = true;
    call->sending_message = call->outgoing.head != NULL;
    submit(call, ops, n, &call->send_tag);
}

static void on_sent(EventTag *tag, bool ok)
{
    GrpcClientCall *call = tag->owner;
    begin_completion(call);
    call->sending = false;
    if (!ok) {
        drop_outgoing(call); /* the status tells the rest */
    } else if (call->sending_message) {
        grpc_byte_buffer_destroy(g_queue_pop_head(&call->outgoing));
    }
    if (ok) {
        pump(call);
    }
    end_completion(call);
}

static void close_when_read(GrpcClientCall *call)
{
    if (call->has_status && !call->reading) {
        g_autofree char *details = grpc_slice_to_c_string(call->details);
        release_wire(call); /* before on_done, which may free the channel */
        rpc_client_closed(&call->base, (int)call->status, details);
    }
}

static void receive(GrpcClientCall *call, bool first)
{
    grpc_op ops[2];
    size_t n = 0;
    memset(ops, 0, sizeof ops);
    if (first) {
        ops[n].op = GRPC_OP_RECV_INITIAL_METADATA;
        ops[n++].data.recv_initial_metadata.recv_initial_metadata = &call->initial;
    }
    ops[n].op = GRPC_OP_RECV_MESSAGE;
    ops[n++].data.recv_message.recv_message = &call->received;
    call->reading = true;
    submit(call, ops, n, &call->receive_tag);
}

static void on_received(EventTag *tag, bool ok)
{
    GrpcClientCall *call = tag->owner;
    begin_completion(call);
    call->reading = false;
    grpc_byte_buffer *buffer = g_steal_pointer(&call->received);
    if (buffer) {
        grpc_slice bytes = buffer_join(buffer);
        grpc_byte_buffer_destroy(buffer);
        rpc_client_message(&call->base, GRPC_SLICE_START_PTR(bytes), GRPC_SLICE_LENGTH(bytes));
        grpc_slice_unref(bytes);
        if (!call->base.closed && call->base.streams_responses) {
            receive(call, false);
        }
    }
    if (!call->base.closed) {
        close_when_read(call);
    }
    end_completion(call);
}

static void on_status(EventTag *tag, bool ok)
{
    GrpcClientCall *call = tag->owner;
    begin_completion(call);
    call->has_status = true;
    if (!call->base.closed) {
        close_when_read(call);
    }
    end_completion(call);
}

static void await_status(GrpcClientCall *call)
{
    grpc_op op;
    memset(&op, 0, sizeof op);
    op.op = GRPC_OP_RECV_STATUS_ON_CLIENT;
    op.data.recv_status_on_client.trailing_metadata = &call->trailing;
    op.data.recv_status_on_client.status = &call->status;
    op.data.recv_status_on_client.status_details = &call->details;
    submit(call, &op, 1, &call->status_tag);
}

RpcClientCall *grpc_client_fill_new(RpcChannel *base)
{
    GrpcClientCall *call = g_new0(GrpcClientCall, 1);
    call->channel = (GrpcChannel *)base;
    call->details = grpc_empty_slice();
    grpc_metadata_array_init(&call->initial);
    grpc_metadata_array_init(&call->trailing);
    g_queue_init(&call->outgoing);
    event_tag_init(&call->status_tag, call->channel->sink, on_status, call);
    event_tag_init(&call->receive_tag, call->channel->sink, on_received, call);
    event_tag_init(&call->send_tag, call->channel->sink, on_sent, call);
    return &call->base;
}

void grpc_client_fill_start(RpcClientCall *base, const RpcStart *start)
{
    GrpcClientCall *call = (GrpcClientCall *)base;
    grpc_slice path = grpc_slice_from_copied_string(base->path);
    call->call = grpc_channel_create_call(call->channel->channel, NULL, GRPC_PROPAGATE_DEFAULTS,
                                          call->channel->queue, path, NULL,
                                          engine_deadline(start->deadline_ms), NULL);
    grpc_slice_unref(path);
    call->channel->n_wires++;
    if (start->wait_for_ready) {
        call->initial_flags = GRPC_INITIAL_METADATA_WAIT_FOR_READY |
                              GRPC_INITIAL_METADATA_WAIT_FOR_READY_EXPLICITLY_SET;
    }
    if (start->bytes) {
        g_queue_push_tail(&call->outgoing, buffer_take(start->bytes, start->n_bytes));
    }
    call->half_close = start->half_close;
    await_status(call);
    pump(call);
    receive(call, true);
}

void grpc_client_fill_send(RpcClientCall *base, uint8_t *bytes, size_t n_bytes)
{
    GrpcClientCall *call = (GrpcClientCall *)base;
    g_queue_push_tail(&call->outgoing, buffer_take(bytes, n_bytes));
    pump(call);
}

void grpc_client_fill_half_close(RpcClientCall *base)
{
    GrpcClientCall *call = (GrpcClientCall *)base;
    call->half_close = true;
    pump(call);
}

void grpc_client_fill_cancel(RpcClientCall *base)
{
    GrpcClientCall *call = (GrpcClientCall *)base;
    if (call->call) {
        grpc_call_cancel(call->call, NULL);
    }
}

void grpc_client_fill_free(RpcClientCall *base)
{
    GrpcClientCall *call = (GrpcClientCall *)base;
    g_assert(!call->call);
    drop_outgoing(call);
    grpc_metadata_array_destroy(&call->initial);
    grpc_metadata_array_destroy(&call->trailing);
    grpc_slice_unref(call->details);
    g_free(call);
}

/* ---- the channel ----------------------------------------------------------------------------- */

static void watch_state(GrpcChannel *channel)
{
    channel->watching = true;
    TSAN_RELEASE(&channel->watch_tag);
    grpc_channel_watch_connectivity_state(channel->channel, channel->state,
                                          engine_deadline(WATCH_MS), channel->queue,
                                          &channel->watch_tag);
}

static void on_state(EventTag *tag, bool ok)
{
    GrpcChannel *channel = tag->owner;
    channel->watching = false;
    if (channel->base.closing) {
        return;
    }
    /* 1: an idle channel connects again at once */
    channel->state = grpc_channel_check_connectivity_state(channel->channel, 1);
    watch_state(channel);
    rpc_channel_state(&channel->base, channel->state == GRPC_CHANNEL_READY);
}

/* Numeric addresses bypass the resolver; its re-resolution pauses would slow reconnects down. */
static char *target_uri(const char *target, GError **error)
{
    const char *colon = strrchr(target, ':');
    if (!colon || colon == target || !colon[1]) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "\"%s\" is no address; write host:port",
                    target);
        return NULL;
    }
    g_autofree char *host = g_strndup(target, (gsize)(colon - target));
    if (host[0] == '[') {
        return g_strconcat("ipv6:", target, NULL);
    }
    return g_hostname_is_ip_address(host) ? g_strconcat("ipv4:", target, NULL)
                                          : g_strconcat("dns:///", target, NULL);
}

static void fill_args(ArgList *list, const RpcChannelOptions *options)
{
    args_add_common(list);
    args_add_int(list, GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, BACKOFF_MIN_MS);
    args_add_int(list, GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, CONNECT_TIMEOUT_MS);
    args_add_int(list, GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, BACKOFF_MAX_MS);
    args_add_int(list, GRPC_ARG_DNS_MIN_TIME_BETWEEN_RESOLUTIONS_MS, BACKOFF_MAX_MS);
    args_add_int(list, GRPC_ARG_SERVICE_CONFIG_DISABLE_RESOLUTION, 1);
    args_add_int(list, GRPC_ARG_ENABLE_HTTP_PROXY, 0);
    args_add_int(list, GRPC_ARG_ENABLE_RETRIES, 0);
    args_add_int(list, GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL,
                 1); /* one channel's back-off is not another's */
    if (options->credentials.ca_pem && options->server_name) {
        args_add_text(list, GRPC_SSL_TARGET_NAME_OVERRIDE_ARG, options->server_name);
    }
}

RpcChannel *grpc_channel_fill_new(RpcTransport *transport, Loop *loop,
                                  const RpcChannelOptions *options, GError **error)
{
    g_autofree char *uri = target_uri(options->target, error);
    if (!uri) {
        return NULL;
    }
    grpc_completion_queue *queue = engine_acquire();
    grpc_channel_credentials *credentials = credentials_client(&options->credentials, error);
    if (!credentials) {
        engine_release();
        return NULL;
    }
    GrpcChannel *channel = g_new0(GrpcChannel, 1);
    rpc_channel_init(&channel->base, transport, loop, options);
    channel->queue = queue;
    channel->sink = event_sink_new(loop);
    event_tag_init(&channel->watch_tag, channel->sink, on_state, channel);
    ArgList list = {0};
    fill_args(&list, options);
    grpc_channel_args args = {list.n, list.args};
    channel->channel = grpc_channel_create(uri, credentials, &args);
    grpc_channel_credentials_release(credentials);
    channel->state = grpc_channel_check_connectivity_state(channel->channel, 1);
    watch_state(channel);
    return &channel->base;
}

static void end_calls(GrpcChannel *channel)
{
    while (channel->base.calls.head) {
        GrpcClientCall *call = channel->base.calls.head->data;
        rpc_client_ref(&call->base);
        grpc_client_fill_cancel(&call->base);
        rpc_client_closed(&call->base, RPC_STATUS_CANCELLED, "the channel was closed");
        release_wire(call);
        rpc_client_unref(&call->base);
    }
}

static bool no_wires(void *user)
{
    return ((GrpcChannel *)user)->n_wires == 0;
}
static bool not_watching(void *user)
{
    return !((GrpcChannel *)user)->watching;
}

void grpc_channel_fill_free(RpcChannel *base)
{
    GrpcChannel *channel = (GrpcChannel *)base;
    end_calls(channel);
    int64_t until_us = loop_now_us(base->loop) + END_GRACE_US;
    bool gone = event_sink_run_until(channel->sink, no_wires, channel, until_us);
    grpc_channel_destroy(channel->channel);
    if (!gone || !event_sink_run_until(channel->sink, not_watching, channel, until_us)) {
        event_sink_close(channel->sink);
        return; /* memory that gRPC may still write to is not given back */
    }
    event_sink_free(channel->sink);
    engine_release();
    rpc_channel_clear(base);
    g_free(channel);
}
