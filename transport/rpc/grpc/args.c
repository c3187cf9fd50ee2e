#include "transport/rpc/grpc/args.h"

#include "proto/base/error.h"
#include "transport/crypto/x509.h"

#include <grpc/slice.h>

#define KEEPALIVE_TIME_MS 10000
#define KEEPALIVE_TIMEOUT_MS 5000

void args_add_int(ArgList *list, const char *key, int value)
{
    g_assert(list->n < GRPC_MAX_ARGS);
    list->args[list->n++] =
        (grpc_arg){.type = GRPC_ARG_INTEGER, .key = (char *)key, .value.integer = value};
}

void args_add_text(ArgList *list, const char *key, const char *value)
{
    g_assert(list->n < GRPC_MAX_ARGS);
    list->args[list->n++] =
        (grpc_arg){.type = GRPC_ARG_STRING, .key = (char *)key, .value.string = (char *)value};
}

void args_add_common(ArgList *list)
{
    args_add_int(list, GRPC_ARG_KEEPALIVE_TIME_MS, KEEPALIVE_TIME_MS);
    args_add_int(list, GRPC_ARG_KEEPALIVE_TIMEOUT_MS, KEEPALIVE_TIMEOUT_MS);
    args_add_int(list, GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
    args_add_int(list, GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
    args_add_int(list, GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, (int)RPC_MAX_MESSAGE_BYTES);
    args_add_int(list, GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, (int)RPC_MAX_MESSAGE_BYTES);
}

grpc_byte_buffer *buffer_take(uint8_t *bytes, size_t n_bytes)
{
    grpc_slice slice = grpc_slice_new_with_user_data(bytes, n_bytes, g_free, bytes);
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    return buffer;
}

grpc_slice buffer_join(grpc_byte_buffer *buffer)
{
    grpc_byte_buffer_reader reader;
    if (!grpc_byte_buffer_reader_init(&reader, buffer)) {
        return grpc_empty_slice();
    }
    grpc_slice joined = grpc_byte_buffer_reader_readall(&reader);
    grpc_byte_buffer_reader_destroy(&reader);
    return joined;
}

static bool check_certificate(const char *pem, const char *what, GError **error)
{
    X509Info info;
    bool ok = x509_parse(pem, &info, error);
    x509_info_clear(&info);
    if (!ok) {
        g_prefix_error(error, "%s: ", what);
    }
    return ok;
}

bool credentials_check(const RpcCredentials *credentials, GError **error)
{
    if (!check_certificate(credentials->ca_pem, "the CA certificate", error)) {
        return false;
    }
    if (credentials->certificate_pem &&
        !check_certificate(credentials->certificate_pem, "the certificate", error)) {
        return false;
    }
    if (credentials->certificate_pem && !credentials->key_pem) {
        g_set_error_literal(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                            "the certificate came without its key; give both");
        return false;
    }
    return true;
}

grpc_channel_credentials *credentials_client(const RpcCredentials *credentials, GError **error)
{
    if (!credentials->ca_pem) {
        return grpc_insecure_credentials_create();
    }
    if (!credentials_check(credentials, error)) {
        return NULL;
    }
    grpc_ssl_pem_key_cert_pair pair = {credentials->key_pem, credentials->certificate_pem};
    return grpc_ssl_credentials_create_ex(credentials->ca_pem,
                                          credentials->certificate_pem ? &pair : NULL, NULL, NULL);
}

/* ---- the table ------------------------------------------------------------------------------- */

static const RpcTransportOps *grpc_ops(void)
{
    static const RpcTransportOps ops = {
        .server_new = grpc_server_fill_new,
        .server_start = grpc_server_fill_start,
        .server_set_credentials = grpc_server_fill_set_credentials,
        .server_free = grpc_server_fill_free,
        .call_send = grpc_call_fill_send,
        .call_is_behind = grpc_call_fill_is_behind,
        .call_finish = grpc_call_fill_finish,
        .call_free = grpc_call_fill_free,
        .channel_new = grpc_channel_fill_new,
        .channel_free = grpc_channel_fill_free,
        .client_new = grpc_client_fill_new,
        .client_start = grpc_client_fill_start,
        .client_send = grpc_client_fill_send,
        .client_half_close = grpc_client_fill_half_close,
        .client_cancel = grpc_client_fill_cancel,
        .client_free = grpc_client_fill_free,
    };
    return &ops;
}

char *rpc_libraries(void)
{
    return g_strdup_printf("gRPC core %s, protobuf-c %s", grpc_version_string(),
                           protobuf_c_version());
}

RpcTransport *rpc_transport_grpc(void)
{
    static RpcTransport transport;
    static gsize once;
    if (g_once_init_enter(&once)) {
        transport.ops = grpc_ops();
        g_once_init_leave(&once, 1);
    }
    return &transport;
}
