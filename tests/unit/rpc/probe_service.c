#include "tests/unit/rpc/probe_service.h"

#include "proto/base/error.h"
#include "transport/crypto/x509.h"
#include "transport/rpc/descriptors.h"

#include <time.h>

extern const uint8_t probe_descriptor_set[];
extern const size_t probe_descriptor_set_size;

void probe_declare(void)
{
    static bool declared;
    if (!declared) {
        descriptors_add(probe_descriptor_set, probe_descriptor_set_size);
        declared = true;
    }
}

typedef struct CallState {
    ProbeService *probe;
    int64_t sum;
} CallState;

static void free_state(void *data)
{
    CallState *state = data;
    state->probe->n_data_freed++;
    g_free(state);
}

static void note(ProbeService *probe, RpcCall *call)
{
    probe->n_called++;
    probe->time_left_ms = rpc_call_time_left_ms(call);
    probe->peer_role = rpc_call_peer(call)->role;
    g_strlcpy(probe->peer_name, rpc_call_peer(call)->name, sizeof probe->peer_name);
}

static size_t send_number(RpcCall *call, int64_t value)
{
    Weft__Test__Number number = WEFT__TEST__NUMBER__INIT;
    number.value = value;
    return rpc_call_send(call, &number.base);
}

static void on_add(RpcCall *call, const ProtobufCMessage *request, void *user)
{
    ProbeService *probe = user;
    note(probe, call);
    Weft__Test__Number number = *(const Weft__Test__Number *)request;
    number.value++;
    if (number.text[0] != '\0') {
        g_strlcpy(probe->text, number.text, sizeof probe->text);
        number.text = (char *)"\xfe answer";
    }
    rpc_call_reply(call, &number.base);
}

static void on_count(RpcCall *call, const ProtobufCMessage *request, void *user)
{
    ProbeService *probe = user;
    note(probe, call);
    for (int64_t i = 0; i < ((const Weft__Test__Number *)request)->value; i++) {
        size_t waiting = send_number(call, i);
        probe->most_waiting = MAX(probe->most_waiting, waiting);
    }
    rpc_call_finish(call, NULL);
}

static CallState *state_of(ProbeService *probe, RpcCall *call)
{
    CallState *state = rpc_call_data(call);
    if (!state) {
        note(probe, call);
        state = g_new0(CallState, 1);
        state->probe = probe;
        rpc_call_set_data(call, state, free_state);
    }
    return state;
}

static void on_sum(RpcCall *call, const ProtobufCMessage *request, void *user)
{
    CallState *state = state_of(user, call);
    if (request) {
        state->sum += ((const Weft__Test__Number *)request)->value;
        return;
    }
    send_number(call, state->sum);
    rpc_call_finish(call, NULL);
}

static void on_echo(RpcCall *call, const ProtobufCMessage *request, void *user)
{
    state_of(user, call);
    if (request) {
        rpc_call_send(call, request);
    } else {
        rpc_call_finish(call, NULL);
    }
}

static void on_hang_ended(void *user)
{
    ProbeService *probe = user;
    probe->n_cancelled++;
    g_clear_pointer(&probe->held, rpc_call_unref);
}

static void on_hang(RpcCall *call, const ProtobufCMessage *request, void *user)
{
    ProbeService *probe = user;
    note(probe, call);
    g_clear_pointer(&probe->held, rpc_call_unref);
    probe->held = rpc_call_ref(call);
    rpc_call_on_cancel(call, on_hang_ended, probe);
    send_number(call, 1);
}

static void on_fail(RpcCall *call, const ProtobufCMessage *request, void *user)
{
    note(user, call);
    int code = (int)((const Weft__Test__Number *)request)->value;
    g_autoptr(GError) error =
        g_error_new(WEFT_ERROR, code, "number %d was asked to fail; ask for another", code);
    rpc_call_finish(call, error);
}

void probe_service_init(ProbeService *probe, Loop *loop)
{
    *probe = (ProbeService){.loop = loop};
}

void probe_service_add(ProbeService *probe, RpcServer *server, unsigned roles)
{
    const RpcMethod methods[] = {
        {"Add", on_add, roles},
        {"Count", on_count, roles},
        {"Sum", on_sum, roles},
        {"Echo", on_echo, roles},
        {"Hang", on_hang, roles},
        {"Fail", on_fail, roles},
        {NULL},
    };
    rpc_server_add(server, &weft__test__probe__descriptor, methods, probe);
}

/* ---- certificates ---------------------------------------------------------------------------- */

static int64_t now_us(void)
{
    return (int64_t)time(NULL) * 1000000;
}

void test_ca_make(TestCa *ca, const char *cluster)
{
    g_autoptr(GError) error = NULL;
    ca->key = x509_new_key(&error);
    g_assert_no_error(error);
    ca->pem = x509_new_ca(ca->key, cluster, now_us(), &error);
    g_assert_no_error(error);
}

void test_ca_clear(TestCa *ca)
{
    x509_free_key(ca->key);
    g_free(ca->pem);
}

void test_identity_make(TestIdentity *identity, const TestCa *ca, const char *name,
                        const char *role)
{
    g_autoptr(GError) error = NULL;
    static const char *const addresses[] = {"127.0.0.1", NULL};
    X509Grant grant = {
        name, role, NULL, addresses, now_us() - 60000000, now_us() + G_GINT64_CONSTANT(3600000000)};
    identity->key = x509_new_key(&error);
    g_assert_no_error(error);
    g_autofree char *request = x509_new_request(identity->key, name, &error);
    g_assert_no_error(error);
    g_autofree char *leaf = x509_sign(ca->pem, ca->key, request, &grant, &identity->serial, &error);
    g_assert_no_error(error);
    identity->pem = g_strconcat(leaf, ca->pem, NULL);
}

void test_identity_clear(TestIdentity *identity)
{
    x509_free_key(identity->key);
    g_free(identity->pem);
    g_free(identity->serial);
}

RpcCredentials test_credentials(const TestCa *ca, const TestIdentity *identity)
{
    return (RpcCredentials){
        .ca_pem = ca->pem,
        .certificate_pem = identity ? identity->pem : NULL,
        .key_pem = identity ? identity->key : NULL,
        .require_client_certificate = true,
    };
}
