/* weft.v1.Cluster: what workers call. */
#include "coordinator/parts.h"

#include "proto/base/error.h"
#include "weft/v1/cluster.pb-c.h"

#include <string.h>

#define CSR_LIMIT 16384u

typedef struct Renewal {
    Parts *parts;
    RpcCall *call;
} Renewal;

static void on_attach(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    Parts *parts = user;
    members_on_report(parts->members, call, (const Weft__V1__WorkerReport *)message);
}

static void on_renewed(const char *certificate_pem, const GError *error, void *user)
{
    Renewal *r = user;
    if (error == NULL) {
        const char *ca = authority_ca_pem(r->parts->authority);
        Weft__V1__RenewResponse response = WEFT__V1__RENEW_RESPONSE__INIT;
        response.certificate_pem =
            (ProtobufCBinaryData){strlen(certificate_pem), (uint8_t *)certificate_pem};
        response.ca_pem = (ProtobufCBinaryData){strlen(ca), (uint8_t *)ca};
        rpc_call_reply(r->call, &response.base);
        log_info(r->parts->options.log, "certificate of worker %s renewed",
                 rpc_call_peer(r->call)->name);
    } else {
        rpc_call_finish(r->call, error);
    }
    rpc_call_unref(r->call);
    g_free(r);
}

static void on_renew(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    Parts *parts = user;
    const Weft__V1__RenewRequest *request = (const Weft__V1__RenewRequest *)message;
    const char *name = rpc_call_peer(call)->name;
    const Member *member = members_find(parts->members, name);
    const Weft__V1__Hello *hello = member != NULL ? member_hello(member) : NULL;
    g_autoptr(GError) error = NULL;
    if (hello == NULL) {
        g_set_error(&error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "worker %s renews without having attached: attach first", name);
    } else if (request->csr_pem.len == 0 || request->csr_pem.len > CSR_LIMIT) {
        g_set_error(&error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "certificate request of %zu bytes: at most %u", request->csr_pem.len,
                    CSR_LIMIT);
    }
    if (error != NULL) {
        rpc_call_finish(call, error);
        return;
    }
    Renewal *r = g_new0(Renewal, 1);
    r->parts = parts;
    r->call = rpc_call_ref(call);
    g_autofree char *csr = g_strndup((const char *)request->csr_pem.data, request->csr_pem.len);
    const char *address = hello->control_address;
    authority_sign(parts->authority, csr, name, "worker", &address, 1, on_renewed, r);
}

void cluster_service_add(RpcServer *server, Parts *parts)
{
    static const RpcMethod methods[] = {
        {"Attach", on_attach, RPC_ROLE_WORKER}, {"Renew", on_renew, RPC_ROLE_WORKER}, {NULL}};
    rpc_server_add(server, &weft__v1__cluster__descriptor, methods, parts);
}
