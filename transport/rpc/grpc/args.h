/* Channel arguments, bytes and credentials that both sides of the gRPC fill share. */
#pragma once

#include "transport/rpc/wire.h"

#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/byte_buffer_reader.h>

#define GRPC_MAX_ARGS 32

typedef struct ArgList {
    grpc_arg args[GRPC_MAX_ARGS];
    size_t n;
} ArgList;

void args_add_int(ArgList *list, const char *key, int value);
void args_add_text(ArgList *list, const char *key,
                   const char *value /* borrowed until the list was used */);
/* Keepalive 10 s + 5 s, message limits: on both sides. */
void args_add_common(ArgList *list);

/* A buffer of one slice that takes the g_malloc'ed bytes. */
grpc_byte_buffer *buffer_take(uint8_t *bytes, size_t n_bytes);
/* The bytes of a received buffer as one slice; unref it. */
grpc_slice buffer_join(grpc_byte_buffer *buffer);

/* False or NULL + INVALID naming the part that cannot be used. */
bool credentials_check(const RpcCredentials *credentials, GError **error);
grpc_channel_credentials *credentials_client(const RpcCredentials *credentials, GError **error);

RpcServer *grpc_server_fill_new(RpcTransport *transport, Loop *loop,
                                const RpcServerOptions *options, GError **error);
bool grpc_server_fill_set_credentials(RpcServer *server, const RpcCredentials *credentials,
                                      GError **error);
bool grpc_server_fill_start(RpcServer *server, GError **error);
void grpc_server_fill_free(RpcServer *server, int grace_ms);
size_t grpc_call_fill_send(RpcCall *call, uint8_t *bytes, size_t n_bytes);
bool grpc_call_fill_is_behind(RpcCall *call, size_t most_waiting);
void grpc_call_fill_finish(RpcCall *call, int status, const char *message);
void grpc_call_fill_free(RpcCall *call);
RpcChannel *grpc_channel_fill_new(RpcTransport *transport, Loop *loop,
                                  const RpcChannelOptions *options, GError **error);
void grpc_channel_fill_free(RpcChannel *channel);
RpcClientCall *grpc_client_fill_new(RpcChannel *channel);
void grpc_client_fill_start(RpcClientCall *call, const RpcStart *start);
void grpc_client_fill_send(RpcClientCall *call, uint8_t *bytes, size_t n_bytes);
void grpc_client_fill_half_close(RpcClientCall *call);
void grpc_client_fill_cancel(RpcClientCall *call);
void grpc_client_fill_free(RpcClientCall *call);
