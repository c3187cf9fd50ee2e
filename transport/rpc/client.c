/* The client side above the wire: packing, the one on_done of every call, and errors that say whom
 * they concern. */
#include "transport/rpc/wire.h"

#include "proto/base/error.h"
#include "transport/rpc/descriptors.h"
#include "transport/rpc/message_text.h"

#include <string.h>

/* ---- the channel ----------------------------------------------------------------------------- */

void rpc_channel_init(RpcChannel *channel, RpcTransport *transport, Loop *loop,
                      const RpcChannelOptions *options)
{
    channel->transport = transport;
    channel->loop = loop;
    channel->target = g_strdup(options->target);
    channel->on_state = options->on_state;
    channel->user = options->user;
    g_queue_init(&channel->calls);
    g_queue_init(&channel->never_started);
}

void rpc_channel_clear(RpcChannel *channel)
{
    g_assert(channel->calls.length == 0);
    while (channel->never_started.head) {
        RpcClientCall *call = channel->never_started.head->data;
        g_queue_unlink(&channel->never_started, &call->link);
        rpc_client_unref(call);
    }
    g_clear_pointer(&channel->target, g_free);
}

RpcChannel *rpc_channel_new(RpcTransport *transport, Loop *loop, const RpcChannelOptions *options,
                            GError **error)
{
    return transport->ops->channel_new(transport, loop, options, error);
}

void rpc_channel_free(RpcChannel *channel)
{
    if (channel && !channel->closing) {
        channel->closing = true;
        channel->transport->ops->channel_free(channel);
    }
}

void rpc_channel_state(RpcChannel *channel, bool ready)
{
    if (channel->ready != ready && !channel->closing) {
        channel->ready = ready;
        if (channel->on_state) {
            channel->on_state(ready, channel->user);
        }
    }
}

/* ---- a call ---------------------------------------------------------------------------------- */

RpcClientCall *rpc_client_ref(RpcClientCall *call)
{
    call->refs++;
    return call;
}

void rpc_client_unref(RpcClientCall *call)
{
    if (--call->refs == 0) {
        g_clear_error(&call->local_error);
        g_free(call->path);
        call->ops->client_free(call);
    }
}

static RpcClientCall *new_call(RpcChannel *channel, const ProtobufCServiceDescriptor *service,
                               const char *method)
{
    RpcClientCall *call = channel->transport->ops->client_new(channel);
    call->channel = channel;
    call->ops = channel->transport->ops;
    call->refs = 1;
    call->link.data = call;
    call->method = protobuf_c_service_descriptor_get_method_by_name(service, method);
    call->path = g_strdup_printf("/%s/%s", service->name, method);
    MethodFlags flags;
    if (!call->method || !descriptors_method(call->path, &flags)) {
        g_error("%s is no declared method", call->path);
    }
    call->streams_requests = flags.client_streaming;
    call->streams_responses = flags.server_streaming;
    return call;
}

/* Packs a request; NULL and a local error when it is over the limit. */
static uint8_t *pack_request(RpcClientCall *call, const ProtobufCMessage *message, size_t *n_bytes)
{
    g_assert(message->descriptor == call->method->input);
    *n_bytes = protobuf_c_message_get_packed_size(message);
    if (*n_bytes > RPC_MAX_MESSAGE_BYTES) {
        if (!call->local_error) {
            call->local_error = g_error_new(
                WEFT_ERROR, WEFT_ERROR_INVALID,
                "a request of %s has %zu bytes, over the limit of %u; send less at once",
                call->path + 1, *n_bytes, RPC_MAX_MESSAGE_BYTES);
        }
        return NULL;
    }
    uint8_t *bytes = g_malloc(MAX(*n_bytes, 1));
    protobuf_c_message_pack(message, bytes);
    return bytes;
}

RpcClientCall *rpc_call_start(RpcChannel *channel, const ProtobufCServiceDescriptor *service,
                              const char *method, const ProtobufCMessage *request,
                              int64_t deadline_ms, bool wait_for_ready, RpcCallbacks callbacks,
                              void *user)
{
    RpcClientCall *call = new_call(channel, service, method);
    g_assert(request || call->streams_requests);
    call->callbacks = callbacks;
    call->user = user;
    call->deadline_ms = deadline_ms;
    if (channel->closing) {
        call->closed = true;
        g_queue_push_tail_link(&channel->never_started, &call->link);
        return call;
    }
    g_queue_push_tail_link(&channel->calls, &call->link);
    call->half_closed = !call->streams_requests;
    RpcStart start = {deadline_ms, wait_for_ready, .half_close = call->half_closed};
    if (request) {
        start.bytes = pack_request(call, request, &start.n_bytes);
    }
    call->ops->client_start(call, &start);
    if (call->local_error) {
        call->ops->client_cancel(call);
    }
    return call;
}

void rpc_client_send(RpcClientCall *call, const ProtobufCMessage *message)
{
    if (call->closed || call->half_closed) {
        return;
    }
    size_t n_bytes;
    uint8_t *bytes = pack_request(call, message, &n_bytes);
    if (bytes) {
        call->ops->client_send(call, bytes, n_bytes);
    } else {
        call->ops->client_cancel(call);
    }
}

void rpc_client_half_close(RpcClientCall *call)
{
    if (!call->closed && !call->half_closed) {
        call->half_closed = true;
        call->ops->client_half_close(call);
    }
}

void rpc_client_cancel(RpcClientCall *call)
{
    if (!call->closed) {
        call->ops->client_cancel(call);
    }
}

/* ---- from the wire --------------------------------------------------------------------------- */

static void fail_locally(RpcClientCall *call, const char *what, size_t n_bytes)
{
    if (!call->local_error) {
        call->local_error =
            g_error_new(WEFT_ERROR, WEFT_ERROR_PROTOCOL, "the answer of %s at %s %s (%zu bytes)",
                        call->path + 1, call->channel->target, what, n_bytes);
    }
    call->ops->client_cancel(call);
}

void rpc_client_message(RpcClientCall *call, const uint8_t *bytes, size_t n_bytes)
{
    if (call->closed || call->local_error) {
        return;
    }
    if (++call->n_responses > 1 && !call->streams_responses) {
        fail_locally(call, "came twice", n_bytes);
        return;
    }
    ProtobufCMessage *response =
        protobuf_c_message_unpack(call->method->output, NULL, n_bytes, bytes);
    if (!response) {
        fail_locally(call, "cannot be decoded", n_bytes);
        return;
    }
    message_text_mend(response);
    if (call->callbacks.on_message) {
        call->callbacks.on_message(response, call->user);
    }
    protobuf_c_message_free_unpacked(response, NULL);
}

/* The peer's own words stay as they are; what the transport says gets the method and the address.
 */
static GError *error_of_status(const RpcClientCall *call, int status, const char *message)
{
    GError *error = weft_error_from_status(status, message);
    if (!error || g_str_has_prefix(message, "[weft ")) {
        return error;
    }
    if (status == RPC_STATUS_DEADLINE_EXCEEDED) {
        g_error_free(error);
        return g_error_new(WEFT_ERROR, WEFT_ERROR_DEADLINE,
                           "%s at %s gave no answer within %" G_GINT64_FORMAT " ms", call->path + 1,
                           call->channel->target, call->deadline_ms);
    }
    g_prefix_error(&error, "%s at %s: ", call->path + 1, call->channel->target);
    return error;
}

void rpc_client_closed(RpcClientCall *call, int status, const char *message)
{
    if (call->closed) {
        return;
    }
    g_autoptr(GError) error = g_steal_pointer(&call->local_error);
    if (!error) {
        error = error_of_status(call, status, message ? message : "");
    }
    if (!error && !call->streams_responses && call->n_responses == 0) {
        error = g_error_new(WEFT_ERROR, WEFT_ERROR_PROTOCOL, "%s at %s ended without an answer",
                            call->path + 1, call->channel->target);
    }
    call->closed = true;
    g_queue_unlink(&call->channel->calls, &call->link);
    call->channel = NULL;
    if (call->callbacks.on_done) {
        call->callbacks.on_done(error, call->user);
    }
    rpc_client_unref(call);
}
