/* Problem: the only door without a client certificate should be shut when nobody is expected, and
 * must not cut off whoever is just going through.
 *
 *            a token is valid           none is valid
 *   SHUT ─────────────────────▶ OPEN ──────────────────▶ LINGERING ──┐
 *    ▲                            ▲────a token is valid─────┘        │
 *    └───────────────────────────────────── 1 s, no join under way ──┘
 *
 * 1. Every answer to a wrong token is the same DENIED; what differs is only whether it is known,
 * expired or used up.
 * 2. A token's use is durable before a certificate is signed; the certificate's row is durable
 * before it is sent.
 * 3. Tokens and requests are in no log line. */
#include "coordinator/ca/join_gate.h"

#include "proto/base/error.h"
#include "proto/base/version.h"
#include "transport/crypto/x509.h"
#include "weft/v1/join.pb-c.h"

#include <string.h>

#define LINGER_US (INT64_C(1000) * 1000)
#define ADDRESSES_LIMIT 16u
#define CSR_LIMIT 16384u

struct JoinGate {
    JoinGateOptions options;
    char *listen, *bound, *cluster, *control_address, *certificate_pem, *key_pem, *ca_pem;
    RpcServer *server;
    TokenBook *tokens;
    LoopTimer *linger;
    GQueue joining; /* of Joining */
};

/* One call on its way through. */
typedef struct Joining {
    JoinGate *gate; /* NULL: the gate is gone */
    RpcCall *call;
    char *name, *csr, *role;
    GPtrArray *addresses;
} Joining;

static void joining_free(Joining *j)
{
    if (j->gate != NULL) {
        g_queue_remove(&j->gate->joining, j);
    }
    rpc_call_unref(j->call);
    g_ptr_array_unref(j->addresses);
    g_free(j->name);
    g_free(j->csr);
    g_free(j->role);
    g_free(j);
}

/* error NULL: the gate is gone and its server has ended the call. */
static void joining_refuse(Joining *j, const GError *error)
{
    if (j->gate != NULL) {
        log_warn(j->gate->options.log, "join from %s refused: %s", rpc_call_peer(j->call)->address,
                 error->message);
        rpc_call_finish(j->call, error);
    }
    joining_free(j);
}

static void on_signed(const char *certificate_pem, const GError *error, void *user)
{
    Joining *j = user;
    JoinGate *gate = j->gate;
    if (error != NULL || gate == NULL) {
        joining_refuse(j, error);
        return;
    }
    if (strcmp(j->role, "worker") == 0) {
        members_add(gate->options.members, j->name);
    }
    Weft__V1__JoinResponse response = WEFT__V1__JOIN_RESPONSE__INIT;
    response.cluster = gate->cluster;
    response.name = j->name;
    response.role = j->role;
    response.certificate_pem =
        (ProtobufCBinaryData){strlen(certificate_pem), (uint8_t *)certificate_pem};
    response.ca_pem = (ProtobufCBinaryData){strlen(gate->ca_pem), (uint8_t *)gate->ca_pem};
    response.control_address = gate->control_address;
    rpc_call_reply(j->call, &response.base);
    log_info(gate->options.log, "%s %s joined from %s", j->role, j->name,
             rpc_call_peer(j->call)->address);
    joining_free(j);
}

static char *client_name(JoinGate *gate, const char *role, const char *wish)
{
    if (strcmp(role, "worker") == 0) {
        return members_free_name(gate->options.members, wish);
    }
    return g_strdup_printf("%s-%06x", role,
                           (unsigned)(random_u64(gate->options.random) & 0xffffff));
}

static void on_token(const char *role, const GError *error, void *user)
{
    Joining *j = user;
    if (error != NULL || j->gate == NULL) {
        joining_refuse(j, error);
        return;
    }
    char *wish = j->name;
    j->role = g_strdup(role);
    j->name = client_name(j->gate, role, wish);
    g_free(wish);
    authority_sign(j->gate->options.authority, j->csr, j->name, role,
                   (const char *const *)j->addresses->pdata, j->addresses->len, on_signed, j);
}

static bool join_check(const Weft__V1__JoinRequest *request, GError **error)
{
    if (request->protocol_version != WEFT_PROTOCOL_VERSION) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_VERSION,
                    "you (release %s) speak protocol %u, this coordinator (release %s) protocol "
                    "%u: install the same release",
                    request->release, request->protocol_version, WEFT_VERSION,
                    WEFT_PROTOCOL_VERSION);
        return false;
    }
    if (request->csr_pem.len == 0 || request->csr_pem.len > CSR_LIMIT ||
        request->n_addresses > ADDRESSES_LIMIT) {
        g_set_error(
            error, WEFT_ERROR, WEFT_ERROR_INVALID,
            "certificate request of %zu bytes for %zu addresses: at most %u bytes and %u addresses",
            request->csr_pem.len, request->n_addresses, CSR_LIMIT, ADDRESSES_LIMIT);
        return false;
    }
    return true;
}

static void on_join(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    JoinGate *gate = user;
    const Weft__V1__JoinRequest *request = (const Weft__V1__JoinRequest *)message;
    g_autoptr(GError) error = NULL;
    if (!join_check(request, &error)) {
        rpc_call_finish(call, error);
        return;
    }
    Joining *j = g_new0(Joining, 1);
    j->gate = gate;
    j->call = rpc_call_ref(call);
    j->name = g_strdup(request->name);
    j->csr = g_strndup((const char *)request->csr_pem.data, request->csr_pem.len);
    j->addresses = g_ptr_array_new_with_free_func(g_free);
    for (size_t i = 0; i < request->n_addresses; i++) {
        g_ptr_array_add(j->addresses, g_strdup(request->addresses[i]));
    }
    g_queue_push_tail(&gate->joining, j);
    token_book_use(gate->tokens, request->token, request->caller, on_token, j);
}

/* ---- the listener ---- */

static RpcCredentials gate_credentials(const JoinGate *gate)
{
    return (RpcCredentials){
        .ca_pem = gate->ca_pem, .certificate_pem = gate->certificate_pem, .key_pem = gate->key_pem};
}

static RpcServer *gate_bind(JoinGate *gate, GError **error)
{
    RpcServerOptions options = {.listen = gate->bound != NULL ? gate->bound : gate->listen,
                                .credentials = gate_credentials(gate),
                                .log = gate->options.log};
    RpcServer *server =
        rpc_server_new(gate->options.transport, gate->options.loop, &options, error);
    if (server != NULL) {
        static const RpcMethod methods[] = {{"Join", on_join, 0}, {NULL}};
        rpc_server_add(server, &weft__v1__join__descriptor, methods, gate);
    }
    return server;
}

JoinGate *join_gate_new(const JoinGateOptions *options, GError **error)
{
    JoinGate *gate = g_new0(JoinGate, 1);
    gate->options = *options;
    gate->listen = g_strdup(options->listen);
    gate->cluster = g_strdup(options->cluster);
    gate->control_address = g_strdup(options->control_address);
    gate->ca_pem = g_strdup(options->credentials.ca_pem);
    gate->certificate_pem = g_strdup(options->credentials.certificate_pem);
    gate->key_pem = g_strdup(options->credentials.key_pem);
    g_queue_init(&gate->joining);
    RpcServer *server = gate_bind(gate, error);
    if (server == NULL) {
        join_gate_free(gate);
        return NULL;
    }
    gate->bound = g_strdup(rpc_server_address(server));
    rpc_server_free(server, 0);
    return gate;
}

void join_gate_free(JoinGate *gate)
{
    if (gate == NULL) {
        return;
    }
    for (GList *l = gate->joining.head; l != NULL; l = l->next) {
        ((Joining *)l->data)->gate = NULL;
    }
    g_queue_clear(&gate->joining);
    loop_timer_cancel(gate->options.loop, gate->linger);
    if (gate->server != NULL) {
        rpc_server_free(gate->server, 0);
    }
    if (gate->key_pem != NULL) {
        memset(gate->key_pem, 0, strlen(gate->key_pem));
    }
    g_free(gate->key_pem);
    g_free(gate->certificate_pem);
    g_free(gate->ca_pem);
    g_free(gate->control_address);
    g_free(gate->cluster);
    g_free(gate->bound);
    g_free(gate->listen);
    g_free(gate);
}

static void gate_open(JoinGate *gate)
{
    g_autoptr(GError) error = NULL;
    gate->server = gate_bind(gate, &error);
    if (gate->server != NULL && rpc_server_start(gate->server, &error)) {
        log_info(gate->options.log, "join listener open at %s", gate->bound);
        return;
    }
    log_error(gate->options.log, "join listener cannot open: %s", error->message);
    if (gate->server != NULL) {
        rpc_server_free(gate->server, 0);
        gate->server = NULL;
    }
}

static void gate_arm(JoinGate *gate);

static void gate_on_linger(void *user)
{
    JoinGate *gate = user;
    gate->linger = NULL;
    if (gate->joining.length > 0) {
        gate_arm(gate);
        return;
    }
    rpc_server_free(gate->server, 0);
    gate->server = NULL;
    log_info(gate->options.log, "join listener closed: no token is valid");
}

static void gate_arm(JoinGate *gate)
{
    if (gate->linger == NULL) {
        gate->linger = loop_timer_start(gate->options.loop, LINGER_US, gate_on_linger, gate);
    }
}

void join_gate_update(JoinGate *gate, TokenBook *tokens)
{
    gate->tokens = tokens;
    if (token_book_any_valid(tokens)) {
        loop_timer_cancel(gate->options.loop, gate->linger);
        gate->linger = NULL;
        if (gate->server == NULL) {
            gate_open(gate);
        }
    } else if (gate->server != NULL) {
        gate_arm(gate);
    }
}

void join_gate_set_credentials(JoinGate *gate, const RpcCredentials *credentials)
{
    g_free(gate->certificate_pem);
    x509_free_key(gate->key_pem);
    gate->certificate_pem = g_strdup(credentials->certificate_pem);
    gate->key_pem = g_strdup(credentials->key_pem);
    RpcCredentials own = gate_credentials(gate);
    g_autoptr(GError) error = NULL;
    if (gate->server != NULL && !rpc_server_set_credentials(gate->server, &own, &error)) {
        log_error(gate->options.log, "join listener keeps its old certificate: %s", error->message);
    }
}

const char *join_gate_address(const JoinGate *gate)
{
    return gate->bound;
}
