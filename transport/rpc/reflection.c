/* grpc.reflection v1 and v1alpha (doc/server-reflection.md of gRPC) from the embedded descriptor
 * set. The two protocols are the same bytes under two names, so one handler serves both. */
#include "transport/rpc/wire.h"

#include "grpc/reflection_v1.pb-c.h"
#include "transport/rpc/descriptors.h"

typedef Grpc__Reflection__V1__ServerReflectionRequest Request;
typedef Grpc__Reflection__V1__ServerReflectionResponse Response;

static void send_error(RpcCall *call, Response *response, int status, const char *text)
{
    Grpc__Reflection__V1__ErrorResponse error = GRPC__REFLECTION__V1__ERROR_RESPONSE__INIT;
    error.error_code = status;
    error.error_message = (char *)text;
    response->message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ERROR_RESPONSE;
    response->error_response = &error;
    rpc_call_send(call, &response->base);
}

static void send_files(RpcCall *call, Response *response, GPtrArray *files, const char *asked_for)
{
    if (!files) {
        g_autofree char *text = g_strdup_printf("\"%s\" is not declared here", asked_for);
        send_error(call, response, RPC_STATUS_NOT_FOUND, text);
        return;
    }
    Grpc__Reflection__V1__FileDescriptorResponse answer =
        GRPC__REFLECTION__V1__FILE_DESCRIPTOR_RESPONSE__INIT;
    g_autofree ProtobufCBinaryData *list = g_new(ProtobufCBinaryData, files->len);
    for (unsigned i = 0; i < files->len; i++) {
        list[i].data = (uint8_t *)g_bytes_get_data(g_ptr_array_index(files, i), &list[i].len);
    }
    answer.n_file_descriptor_proto = files->len;
    answer.file_descriptor_proto = list;
    response->message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_FILE_DESCRIPTOR_RESPONSE;
    response->file_descriptor_response = &answer;
    rpc_call_send(call, &response->base);
    g_ptr_array_unref(files);
}

static void send_services(RpcCall *call, Response *response, const RpcServer *server)
{
    unsigned n = server->services->len;
    g_autofree Grpc__Reflection__V1__ServiceResponse *services =
        g_new(Grpc__Reflection__V1__ServiceResponse, n);
    g_autofree Grpc__Reflection__V1__ServiceResponse **list =
        g_new(Grpc__Reflection__V1__ServiceResponse *, n);
    for (unsigned i = 0; i < n; i++) {
        services[i] =
            (Grpc__Reflection__V1__ServiceResponse)GRPC__REFLECTION__V1__SERVICE_RESPONSE__INIT;
        services[i].name = g_ptr_array_index(server->services, i);
        list[i] = &services[i];
    }
    Grpc__Reflection__V1__ListServiceResponse answer =
        GRPC__REFLECTION__V1__LIST_SERVICE_RESPONSE__INIT;
    answer.n_service = n;
    answer.service = list;
    response->message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_LIST_SERVICES_RESPONSE;
    response->list_services_response = &answer;
    rpc_call_send(call, &response->base);
}

static void on_request(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    const Request *request = (const void *)message;
    if (!request) {
        rpc_call_finish(call, NULL);
        return;
    }
    Response response = GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__INIT;
    response.valid_host = request->host;
    response.original_request = (Request *)request;
    switch (request->message_request_case) {
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_BY_FILENAME:
        send_files(call, &response, descriptors_file(request->file_by_filename),
                   request->file_by_filename);
        return;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_SYMBOL:
        send_files(call, &response, descriptors_symbol(request->file_containing_symbol),
                   request->file_containing_symbol);
        return;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_LIST_SERVICES:
        send_services(call, &response, user);
        return;
    default: /* extensions: proto3 has none */
        send_error(call, &response, RPC_STATUS_UNIMPLEMENTED, "proto3 messages have no extensions");
    }
}

void rpc_reflection_add(RpcServer *server)
{
    const RpcMethod methods[] = {
        {"ServerReflectionInfo", on_request, server->tls ? RPC_ROLE_ADMIN : RPC_ROLE_NONE},
        {NULL},
    };
    const ProtobufCServiceDescriptor *service =
        &grpc__reflection__v1__server_reflection__descriptor;
    rpc_server_add(server, service, methods, server);
    rpc_server_add_as(server, "grpc.reflection.v1alpha.ServerReflection", service, methods, server);
}
