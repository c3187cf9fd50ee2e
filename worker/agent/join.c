#include "worker/agent/join.h"

#include "proto/base/error.h"
#include "proto/base/version.h"
#include "transport/crypto/x509.h"
#include "weft/v1/join.pb-c.h"

#include <string.h>

#define FETCH_TIMEOUT_MS 5000
#define JOIN_DEADLINE_MS 10000

char *join_fetch_ca(const char *address, const char *ca_hash, GError **error)
{
    uint8_t hash[32];
    return x509_parse_hash(ca_hash, hash, error)
               ? x509_fetch_ca(address, hash, FETCH_TIMEOUT_MS, error)
               : NULL;
}

char *join_reachable_address(const char *told, const char *peer)
{
    const char *port = strrchr(told, ':'), *peer_port = strrchr(peer, ':');
    bool any = g_str_has_prefix(told, "0.0.0.0:") || g_str_has_prefix(told, "[::]:") ||
               g_str_has_prefix(told, ":");
    if (!port || !peer_port || !any) {
        return g_strdup(told);
    }
    return g_strdup_printf("%.*s%s", (int)(peer_port - peer), peer, port);
}

typedef struct Joining {
    Identity identity;
    char *address;
    RpcChannel *channel;
    Loop *loop;
    JoinDoneFn done;
    void *user;
    GError *error;
} Joining;

static void joining_end(void *user)
{
    Joining *j = user;
    rpc_channel_free(j->channel);
    if (!j->error && !j->identity.certificate_pem) {
        j->error = g_error_new(WEFT_ERROR, WEFT_ERROR_PROTOCOL, "join at %s gave no certificate",
                               j->address);
    }
    j->done(j->error ? NULL : &j->identity, j->error, j->user);
    identity_clear(&j->identity);
    g_clear_error(&j->error);
    g_free(j->address);
    g_free(j);
}

static void on_response(const ProtobufCMessage *message, void *user)
{
    Joining *j = user;
    const Weft__V1__JoinResponse *r = (const Weft__V1__JoinResponse *)message;
    X509Info info = {0};
    size_t n = r->certificate_pem.len;
    g_autofree char *certificate =
        n > 0 && n < (1u << 20) ? g_strndup((const char *)r->certificate_pem.data, n) : NULL;
    if (!certificate || !x509_parse(certificate, &info, NULL)) {
        j->error = g_error_new(WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                               "join at %s gave %zu bytes that are no certificate", j->address, n);
        return;
    }
    if (g_strcmp0(info.role, "worker") != 0) {
        j->error = g_error_new(
            WEFT_ERROR, WEFT_ERROR_DENIED,
            "the token is for role %s, not worker: make one with `weft token create --role worker`",
            info.role);
    } else {
        j->identity.certificate_pem = g_steal_pointer(&certificate);
        j->identity.name = g_strdup(r->name);
        j->identity.cluster = g_strdup(r->cluster);
        j->identity.control_address = join_reachable_address(r->control_address, j->address);
    }
    x509_info_clear(&info);
}

static void on_done(const GError *error, void *user)
{
    Joining *j = user;
    if (error && !j->error) {
        j->error = g_error_copy(error);
    }
    loop_post(j->loop, joining_end, j);
}

/* The call itself; false with j->error. */
static bool send_request(Joining *j, const JoinOptions *options)
{
    g_autofree char *csr = NULL;
    j->identity.key_pem = x509_new_key(&j->error);
    csr = j->identity.key_pem
              ? x509_new_request(j->identity.key_pem, options->name ? options->name : "", &j->error)
              : NULL;
    if (!csr) {
        return false;
    }
    RpcChannelOptions to = {.target = options->address,
                            .credentials = {.ca_pem = options->ca_pem},
                            .server_name = "weft-coordinator"};
    j->channel = rpc_channel_new(options->transport, options->loop, &to, &j->error);
    if (!j->channel) {
        return false;
    }
    Weft__V1__JoinRequest request = WEFT__V1__JOIN_REQUEST__INIT;
    request.caller = "worker";
    request.protocol_version = WEFT_PROTOCOL_VERSION;
    request.release = (char *)WEFT_VERSION;
    request.token = (char *)options->token;
    request.name = (char *)(options->name ? options->name : "");
    request.csr_pem = (ProtobufCBinaryData){strlen(csr), (uint8_t *)csr};
    request.n_addresses = options->addresses ? g_strv_length((char **)options->addresses) : 0;
    request.addresses = (char **)options->addresses;
    rpc_call_start(j->channel, &weft__v1__join__descriptor, "Join", &request.base, JOIN_DEADLINE_MS,
                   true, (RpcCallbacks){on_response, on_done}, j);
    return true;
}

void join_start(const JoinOptions *options, JoinDoneFn done, void *user)
{
    Joining *j = g_new0(Joining, 1);
    j->loop = options->loop;
    j->done = done;
    j->user = user;
    j->address = g_strdup(options->address);
    j->identity.ca_pem = g_strdup(options->ca_pem);
    if (!send_request(j, options)) {
        loop_post(j->loop, joining_end, j);
    }
}
