/* The same calls over gRPC (mutual TLS on loopback) and over inproc: each kind of method,
 * deadlines, cancellation, roles, revocation, kick, health. Server and client share one MainLoop;
 * what needs a second process is in test_rpc_peer.c. */
#include "tests/unit/rpc/probe_service.h"
#include "tests/unit/rpc/rpc_client.h"

#include "grpc/health.pb-c.h"
#include "grpc/reflection_v1.pb-c.h"
#include "proto/base/error.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

typedef struct Fixture {
    bool inproc;
    RpcTransport *transport;
    MainLoop *loop;
    TestCa ca;
    TestIdentity server_id, worker_id, admin_id;
    RpcServer *server;
    ProbeService probe;
    RpcChannel *channel; /* role worker */
    bool ready;
    int n_ready_changes;
    char *revoked_serial;
} Fixture;

static bool is_revoked(const char *serial, void *user)
{
    return g_strcmp0(serial, ((Fixture *)user)->revoked_serial) == 0;
}

static void on_state(bool ready, void *user)
{
    Fixture *f = user;
    f->ready = ready;
    f->n_ready_changes++;
}

static RpcChannel *open_channel(Fixture *f, const TestIdentity *identity)
{
    g_autoptr(GError) error = NULL;
    RpcChannelOptions options = {
        .target = rpc_server_address(f->server),
        .credentials = test_credentials(&f->ca, identity),
        .server_name = "weft-coordinator",
        .on_state = on_state,
        .user = f,
    };
    RpcChannel *channel = rpc_channel_new(f->transport, main_loop_loop(f->loop), &options, &error);
    g_assert_no_error(error);
    return channel;
}

static int set_up(void **state)
{
    Fixture *f = g_new0(Fixture, 1);
    f->inproc = *state != NULL;
    probe_declare();
    f->loop = main_loop_new();
    f->transport = f->inproc ? rpc_transport_inproc_new() : rpc_transport_grpc();
    test_ca_make(&f->ca, "test");
    test_identity_make(&f->server_id, &f->ca, "c0", "coordinator");
    test_identity_make(&f->worker_id, &f->ca, "w1", "worker");
    test_identity_make(&f->admin_id, &f->ca, "a1", "admin");
    g_autoptr(GError) error = NULL;
    RpcServerOptions options = {
        .listen = "127.0.0.1:0",
        .credentials = test_credentials(&f->ca, &f->server_id),
        .health = true,
        .reflection = true,
        .is_revoked = is_revoked,
        .revoked_user = f,
        .log = NULL,
    };
    f->server = rpc_server_new(f->transport, main_loop_loop(f->loop), &options, &error);
    g_assert_no_error(error);
    probe_service_init(&f->probe, main_loop_loop(f->loop));
    probe_service_add(&f->probe, f->server, RPC_ROLE_WORKER | RPC_ROLE_ADMIN);
    g_assert_true(rpc_server_start(f->server, &error));
    f->channel = open_channel(f, &f->worker_id);
    *state = f;
    return 0;
}

static int tear_down(void **state)
{
    Fixture *f = *state;
    rpc_channel_free(f->channel);
    rpc_server_free(f->server, 0);
    g_assert_null(f->probe.held);
    if (f->inproc) {
        rpc_transport_inproc_free(f->transport);
    }
    main_loop_free(f->loop);
    test_identity_clear(&f->server_id);
    test_identity_clear(&f->worker_id);
    test_identity_clear(&f->admin_id);
    test_ca_clear(&f->ca);
    g_free(f->revoked_serial);
    g_free(f);
    return 0;
}

/* A certificate that is exchanged while the server runs: what is open goes on, what is opened sees
 * the new one. */
static void test_new_certificate(void **state)
{
    Fixture *f = *state;
    TestCa other_ca;
    TestIdentity other_server, other_worker;
    test_ca_make(&other_ca, "other");
    test_identity_make(&other_server, &other_ca, "c0", "coordinator");
    test_identity_make(&other_worker, &other_ca, "w2", "worker");
    Outcome before = {0}, after = {0};
    outcome_start(&before, f->channel, "Add", 1, 5000);
    outcome_wait(&before, f->loop);
    assert_null(before.error);
    GError *error = NULL;
    RpcCredentials credentials = test_credentials(&other_ca, &other_server);
    credentials.certificate_pem = "no certificate";
    assert_false(rpc_server_set_credentials(f->server, &credentials, &error));
    assert_int_equal(error->code, WEFT_ERROR_INVALID);
    g_clear_error(&error);
    outcome_clear(&before);

    credentials = test_credentials(&other_ca, &other_server);
    assert_true(rpc_server_set_credentials(f->server, &credentials, &error));
    outcome_start(&before, f->channel, "Add", 2, 5000);
    outcome_wait(&before, f->loop);
    assert_null(before.error);
    RpcChannel *old = open_channel(f, &f->admin_id);
    outcome_start(&after, old, "Add", 3, 5000);
    outcome_wait(&after, f->loop);
    assert_int_equal(after.error->code, WEFT_ERROR_UNREACHABLE);
    outcome_clear(&after);
    rpc_channel_free(old);
    RpcChannelOptions options = {.target = rpc_server_address(f->server),
                                 .credentials = test_credentials(&other_ca, &other_worker),
                                 .server_name = "weft-coordinator"};
    RpcChannel *new = rpc_channel_new(f->transport, main_loop_loop(f->loop), &options, &error);
    outcome_start(&after, new, "Add", 4, 5000);
    outcome_wait(&after, f->loop);
    assert_null(after.error);
    assert_string_equal(f->probe.peer_name, "w2");
    rpc_channel_free(new);
    outcome_clear(&before);
    outcome_clear(&after);
    test_identity_clear(&other_server);
    test_identity_clear(&other_worker);
    test_ca_clear(&other_ca);
}

static void test_unary(void **state)
{
    Fixture *f = *state;
    Outcome outcome = {0};
    outcome_start(&outcome, f->channel, "Add", 41, 5000);
    assert_false(outcome.done); /* never inside the call that caused it */
    outcome_wait(&outcome, f->loop);
    assert_null(outcome.error);
    assert_int_equal(outcome.n_messages, 1);
    assert_int_equal(outcome.last_value, 42);
    assert_string_equal(f->probe.peer_name, "w1");
    assert_int_equal(f->probe.peer_role, RPC_ROLE_WORKER);
    assert_in_range(f->probe.time_left_ms, 1, 5100); /* gRPC's timeout header is rounded up */
    outcome_clear(&outcome);
}

typedef struct Texts {
    char answer[64];
    bool done;
} Texts;

static void keep_text(const ProtobufCMessage *message, void *user)
{
    g_strlcpy(((Texts *)user)->answer, ((const Weft__Test__Number *)message)->text, 64);
}

static void end_texts(const GError *error, void *user)
{
    g_assert_no_error(error);
    ((Texts *)user)->done = true;
}

static void test_strings_arrive_as_utf8(void **state)
{
    Fixture *f = *state;
    Texts texts = {0};
    Weft__Test__Number number = WEFT__TEST__NUMBER__INIT;
    number.text = (char *)"\xff question";
    rpc_call_start(f->channel, &weft__test__probe__descriptor, "Add", &number.base, 5000, false,
                   (RpcCallbacks){keep_text, end_texts}, &texts);
    assert_true(main_loop_run_until(f->loop, &texts.done, PATIENCE_US));
    assert_string_equal(f->probe.text, "\xef\xbf\xbd question");
    assert_string_equal(texts.answer, "\xef\xbf\xbd answer");
}

static void test_server_stream(void **state)
{
    Fixture *f = *state;
    Outcome outcome = {0};
    outcome_start(&outcome, f->channel, "Count", 1000, 5000);
    outcome_wait(&outcome, f->loop);
    assert_null(outcome.error);
    assert_int_equal(outcome.n_messages, 1000);
    assert_int_equal(outcome.last_value, 999);
    assert_int_equal(outcome.sum, 999 * 1000 / 2);
    assert_true(f->probe.most_waiting > 0); /* a producer learns what waits */
    outcome_clear(&outcome);
}

static void test_empty_stream(void **state)
{
    Fixture *f = *state;
    Outcome outcome = {0};
    outcome_start(&outcome, f->channel, "Count", 0, 5000);
    outcome_wait(&outcome, f->loop);
    assert_null(outcome.error);
    assert_int_equal(outcome.n_messages, 0);
}

static void test_client_stream(void **state)
{
    Fixture *f = *state;
    Outcome outcome = {0};
    outcome_open(&outcome, f->channel, "Sum", 5000);
    for (int i = 1; i <= 100; i++) {
        outcome_send(&outcome, i);
    }
    rpc_client_half_close(outcome.call);
    outcome_wait(&outcome, f->loop);
    assert_null(outcome.error);
    assert_int_equal(outcome.last_value, 5050);
    wait_for_count(f->loop, &f->probe.n_data_freed, 1);
}

static void test_client_stream_without_messages(void **state)
{
    Fixture *f = *state;
    Outcome outcome = {0};
    outcome_open(&outcome, f->channel, "Sum", 5000);
    rpc_client_half_close(outcome.call);
    outcome_wait(&outcome, f->loop);
    assert_null(outcome.error);
    assert_int_equal(outcome.last_value, 0);
}

static void test_bidi(void **state)
{
    Fixture *f = *state;
    Outcome outcome = {0};
    outcome_open(&outcome, f->channel, "Echo", 0);
    for (int i = 1; i <= 20; i++) {
        outcome_send(&outcome, i);
        wait_for_count(f->loop, &outcome.n_messages, i); /* answered before the next is sent */
        assert_int_equal(outcome.last_value, i);
    }
    assert_int_equal(f->probe.time_left_ms, INT64_MAX);
    rpc_client_half_close(outcome.call);
    outcome_wait(&outcome, f->loop);
    assert_null(outcome.error);
    assert_int_equal(outcome.n_messages, 20);
}

static void test_error_crosses_exactly(void **state)
{
    Fixture *f = *state;
    Outcome outcome = {0};
    outcome_start(&outcome, f->channel, "Fail", WEFT_ERROR_STALE, 5000);
    outcome_wait(&outcome, f->loop);
    assert_true(g_error_matches(outcome.error, WEFT_ERROR, WEFT_ERROR_STALE));
    assert_string_equal(outcome.error->message, "number 203 was asked to fail; ask for another");
    assert_int_equal(outcome.n_messages, 0);
    outcome_clear(&outcome);
}

static void test_absent_method(void **state)
{
    Fixture *f = *state;
    Outcome outcome = {0};
    outcome_start(&outcome, f->channel, "Absent", 1, 5000);
    outcome_wait(&outcome, f->loop);
    assert_true(g_error_matches(outcome.error, WEFT_ERROR, WEFT_ERROR_PROTOCOL));
    assert_non_null(strstr(outcome.error->message, "weft.test.Probe/Absent is not served"));
    outcome_clear(&outcome);
}

static void test_deadline(void **state)
{
    Fixture *f = *state;
    Outcome outcome = {0};
    outcome_start(&outcome, f->channel, "Hang", 1, 200);
    outcome_wait(&outcome, f->loop);
    assert_true(g_error_matches(outcome.error, WEFT_ERROR, WEFT_ERROR_DEADLINE));
    assert_non_null(strstr(outcome.error->message, "within 200 ms"));
    wait_for_count(f->loop, &f->probe.n_cancelled, 1); /* the server hears of it too */
    outcome_clear(&outcome);
}

static void test_cancel_is_seen_by_the_server(void **state)
{
    Fixture *f = *state;
    Outcome outcome = {0};
    outcome_start(&outcome, f->channel, "Hang", 1, 0);
    wait_for_count(f->loop, &outcome.n_messages, 1);
    assert_int_equal(f->probe.n_cancelled, 0);
    rpc_client_cancel(outcome.call);
    assert_false(outcome.done);
    outcome_wait(&outcome, f->loop);
    assert_true(g_error_matches(outcome.error, WEFT_ERROR, WEFT_ERROR_CANCELLED));
    wait_for_count(f->loop, &f->probe.n_cancelled, 1);
    assert_int_equal(outcome.n_done, 1);
    outcome_clear(&outcome);
}

static void test_answer_after_cancel_does_nothing(void **state)
{
    Fixture *f = *state;
    Outcome outcome = {0};
    outcome_start(&outcome, f->channel, "Hang", 1, 0);
    wait_for_count(f->loop, &outcome.n_messages, 1);
    RpcCall *held = rpc_call_ref(f->probe.held);
    rpc_client_cancel(outcome.call);
    wait_for_count(f->loop, &f->probe.n_cancelled, 1);
    Weft__Test__Number number = WEFT__TEST__NUMBER__INIT;
    assert_int_equal(rpc_call_send(held, &number.base), 0);
    rpc_call_finish(held, NULL);
    rpc_call_unref(held);
    outcome_wait(&outcome, f->loop);
    outcome_clear(&outcome);
}

#define MIB ((size_t)1 << 20)
enum { N_LARGE = 16 };

static void count_room(void *user)
{
    ++*(int *)user;
}

/* A call of Hang with N_LARGE MiB on their way. */
static RpcCall *begin_large(Fixture *f, Outcome *outcome)
{
    outcome_start(outcome, f->channel, "Hang", 1, 0);
    wait_for_count(f->loop, &outcome->n_messages, 1);
    RpcCall *call = rpc_call_ref(f->probe.held);
    g_autofree uint8_t *payload = g_malloc0(MIB);
    Weft__Test__Number number = WEFT__TEST__NUMBER__INIT;
    number.payload = (ProtobufCBinaryData){MIB, payload};
    for (unsigned i = 0; i < N_LARGE; i++) {
        rpc_call_send(call, &number.base);
    }
    return call;
}

/* A producer that waits for its reader is told once, when little is left to send. */
static void test_room(void **state)
{
    Fixture *f = *state;
    Outcome outcome = {0};
    int n_early = 0, n_room = 0;
    RpcCall *call = begin_large(f, &outcome);
    assert_true(rpc_call_has_room(call, (N_LARGE + 1) * MIB, count_room, &n_early));
    assert_false(rpc_call_has_room(call, 8 * MIB, count_room, &n_early));
    assert_false(rpc_call_has_room(call, 2 * MIB, count_room, &n_room)); /* takes its place */
    assert_int_equal(n_room, 0);
    wait_for_count(f->loop, &n_room, 1);
    assert_true(rpc_call_has_room(call, 2 * MIB, count_room, &n_room));
    wait_for_count(f->loop, &outcome.n_messages, N_LARGE + 1);
    assert_int_equal(n_room, 1);
    assert_int_equal(n_early, 0);
    rpc_call_on_cancel(call, NULL, NULL);
    rpc_call_finish(call, NULL);
    assert_true(rpc_call_has_room(call, 0, count_room, &n_room));
    outcome_wait(&outcome, f->loop);
    assert_null(outcome.error);
    g_clear_pointer(&f->probe.held, rpc_call_unref);
    rpc_call_unref(call);
    outcome_clear(&outcome);
}

static void test_no_room_after_the_end(void **state)
{
    Fixture *f = *state;
    Outcome outcome = {0};
    int n_room = 0;
    RpcCall *call = begin_large(f, &outcome); /* finished by the server */
    assert_false(rpc_call_has_room(call, MIB, count_room, &n_room));
    rpc_call_on_cancel(call, NULL, NULL);
    rpc_call_finish(call, NULL);
    outcome_wait(&outcome, f->loop);
    assert_null(outcome.error);
    assert_int_equal(outcome.n_messages, N_LARGE + 1);
    g_clear_pointer(&f->probe.held, rpc_call_unref);
    rpc_call_unref(call);
    outcome_clear(&outcome);
    assert_int_equal(n_room, 0);

    call = begin_large(f, &outcome); /* cancelled by the client */
    assert_false(rpc_call_has_room(call, 0, count_room, &n_room));
    rpc_client_cancel(outcome.call);
    wait_for_count(f->loop, &f->probe.n_cancelled, 1);
    const int n_before = n_room;
    assert_true(rpc_call_has_room(call, 0, count_room, &n_room));
    outcome_wait(&outcome, f->loop);
    rpc_call_unref(call);
    outcome_clear(&outcome);
    assert_int_equal(n_room, n_before);
}

static void test_role_refused(void **state)
{
    Fixture *f = *state;
    TestIdentity probe_id;
    test_identity_make(&probe_id, &f->ca, "p1", "probe");
    RpcChannel *channel = open_channel(f, &probe_id);
    Outcome outcome = {0};
    outcome_start(&outcome, channel, "Add", 1, 5000);
    outcome_wait(&outcome, f->loop);
    assert_true(g_error_matches(outcome.error, WEFT_ERROR, WEFT_ERROR_DENIED));
    assert_string_equal(
        outcome.error->message,
        "role probe may not call weft.test.Probe/Add; it takes role worker or admin");
    assert_int_equal(f->probe.n_called, 0);
    outcome_clear(&outcome);
    rpc_channel_free(channel);
    test_identity_clear(&probe_id);
}

static void test_revoked_serial_refused(void **state)
{
    Fixture *f = *state;
    f->revoked_serial = g_strdup(f->worker_id.serial);
    Outcome outcome = {0};
    outcome_start(&outcome, f->channel, "Add", 1, 5000);
    outcome_wait(&outcome, f->loop);
    assert_true(g_error_matches(outcome.error, WEFT_ERROR, WEFT_ERROR_DENIED));
    assert_non_null(strstr(outcome.error->message, "of w1 is revoked"));
    assert_int_equal(f->probe.n_called, 0);
    outcome_clear(&outcome);
}

static void test_kick_ends_open_streams(void **state)
{
    Fixture *f = *state;
    RpcChannel *admin = open_channel(f, &f->admin_id);
    Outcome kicked = {0}, kept = {0};
    outcome_start(&kicked, f->channel, "Hang", 1, 0);
    outcome_open(&kept, admin, "Echo", 0);
    outcome_send(&kept, 7);
    wait_for_count(f->loop, &kicked.n_messages, 1);
    wait_for_count(f->loop, &kept.n_messages, 1);
    rpc_server_kick(f->server, f->worker_id.serial);
    outcome_wait(&kicked, f->loop);
    assert_true(g_error_matches(kicked.error, WEFT_ERROR, WEFT_ERROR_DENIED));
    wait_for_count(f->loop, &f->probe.n_cancelled, 1);
    outcome_send(&kept, 8); /* another peer's stream goes on */
    wait_for_count(f->loop, &kept.n_messages, 2);
    rpc_server_kick(f->server, "a1"); /* by name */
    outcome_wait(&kept, f->loop);
    assert_true(g_error_matches(kept.error, WEFT_ERROR, WEFT_ERROR_DENIED));
    outcome_clear(&kicked);
    outcome_clear(&kept);
    rpc_channel_free(admin);
}

static void test_large_messages(void **state)
{
    Fixture *f = *state;
    Outcome outcome = {0};
    Weft__Test__Number number = WEFT__TEST__NUMBER__INIT;
    for (size_t size = 1 << 20; size <= 5 << 20; size += 4 << 20) {
        number.payload.len = size;
        number.payload.data = g_malloc0(size);
        outcome_open(&outcome, f->channel, "Echo", 8000);
        rpc_client_send(outcome.call, &number.base);
        if (outcome.call) {
            rpc_client_half_close(outcome.call);
        }
        outcome_wait(&outcome, f->loop);
        if (size < 4 << 20) {
            assert_null(outcome.error);
            assert_int_equal(outcome.payload_bytes, size);
        } else {
            assert_true(g_error_matches(outcome.error, WEFT_ERROR, WEFT_ERROR_INVALID));
            assert_non_null(strstr(outcome.error->message, "over the limit of 4194304"));
        }
        outcome_clear(&outcome);
        g_free(number.payload.data);
    }
}

static void test_server_free_ends_calls(void **state)
{
    Fixture *f = *state;
    Outcome outcome = {0};
    outcome_start(&outcome, f->channel, "Hang", 1, 0);
    wait_for_count(f->loop, &outcome.n_messages, 1);
    int64_t began_us = loop_now_us(main_loop_loop(f->loop));
    rpc_server_free(f->server, 100);
    f->server = NULL;
    int64_t took_us = loop_now_us(main_loop_loop(f->loop)) - began_us;
    assert_in_range(took_us, f->inproc ? 0 : 100000, 1100000); /* inproc has nothing to wait for */
    assert_int_equal(f->probe.n_cancelled, 1);                 /* told before the server was gone */
    outcome_wait(&outcome, f->loop);
    assert_true(g_error_matches(outcome.error, WEFT_ERROR, WEFT_ERROR_UNREACHABLE));
    outcome_clear(&outcome);
}

static void test_idle_server_frees_at_once(void **state)
{
    Fixture *f = *state;
    int64_t began_us = loop_now_us(main_loop_loop(f->loop));
    rpc_server_free(f->server, 5000);
    f->server = NULL;
    assert_true(loop_now_us(main_loop_loop(f->loop)) - began_us < 1000000);
}

static void test_channel_free_ends_calls(void **state)
{
    Fixture *f = *state;
    Outcome outcome = {0};
    outcome_start(&outcome, f->channel, "Hang", 1, 0);
    wait_for_count(f->loop, &outcome.n_messages, 1);
    rpc_channel_free(f->channel);
    f->channel = NULL;
    assert_int_equal(outcome.n_done, 1);
    assert_true(g_error_matches(outcome.error, WEFT_ERROR, WEFT_ERROR_CANCELLED));
    wait_for_count(f->loop, &f->probe.n_cancelled, 1);
    outcome_clear(&outcome);
}

static void free_channel_on_done(const GError *error, void *user)
{
    Fixture *f = user;
    Loop *loop = main_loop_loop(f->loop);
    int64_t began_us = loop_now_us(loop);
    rpc_channel_free(f->channel);
    g_assert_cmpint(loop_now_us(loop) - began_us, <, 500000); /* nothing was left behind */
    f->channel = NULL;
    f->n_ready_changes = 1000;
}

static void test_channel_freed_in_on_done(void **state)
{
    Fixture *f = *state;
    Weft__Test__Number number = WEFT__TEST__NUMBER__INIT;
    RpcCallbacks callbacks = {NULL, free_channel_on_done};
    rpc_call_start(f->channel, &weft__test__probe__descriptor, "Add", &number.base, 5000, false,
                   callbacks, f);
    wait_for_count(f->loop, &f->n_ready_changes, 1000);
    assert_null(f->channel);
}

static void start_again_on_done(const GError *error, void *user)
{
    Fixture *f = user;
    f->n_ready_changes += 100;
    Weft__Test__Number number = WEFT__TEST__NUMBER__INIT;
    RpcCallbacks callbacks = {NULL, start_again_on_done};
    if (f->channel) {
        rpc_call_start(f->channel, &weft__test__probe__descriptor, "Hang", &number.base, 0, false,
                       callbacks, f);
    }
}

/* A caller that retries from on_done must not keep a channel alive that is being freed. */
static void test_retry_while_channel_is_freed(void **state)
{
    Fixture *f = *state;
    Weft__Test__Number number = WEFT__TEST__NUMBER__INIT;
    RpcCallbacks callbacks = {NULL, start_again_on_done};
    f->n_ready_changes = 0;
    rpc_call_start(f->channel, &weft__test__probe__descriptor, "Hang", &number.base, 0, false,
                   callbacks, f);
    rpc_channel_free(f->channel);
    f->channel = NULL;
    assert_in_range(f->n_ready_changes, 100, 199);
}

/* ---- health and reflection ------------------------------------------------------------------- */

typedef struct HealthOutcome {
    bool done;
    int n, status;
    GError *error;
} HealthOutcome;

static void on_health(const ProtobufCMessage *response, void *user)
{
    HealthOutcome *health = user;
    health->n++;
    health->status = ((const Grpc__Health__V1__HealthCheckResponse *)response)->status;
}

static void on_health_done(const GError *error, void *user)
{
    HealthOutcome *health = user;
    health->done = true;
    health->error = error ? g_error_copy(error) : NULL;
}

static RpcClientCall *ask_health(Fixture *f, HealthOutcome *health, const char *method,
                                 const char *service)
{
    g_clear_error(&health->error);
    *health = (HealthOutcome){.status = -1};
    Grpc__Health__V1__HealthCheckRequest request = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    request.service = (char *)service;
    return rpc_call_start(f->channel, &grpc__health__v1__health__descriptor, method, &request.base,
                          strcmp(method, "Watch") ? 5000 : 0, false,
                          (RpcCallbacks){on_health, on_health_done}, health);
}

enum { SERVING = 1, NOT_SERVING = 2, SERVICE_UNKNOWN = 3 };

static void test_health_check(void **state)
{
    Fixture *f = *state;
    HealthOutcome health = {0};
    ask_health(f, &health, "Check", "");
    assert_true(main_loop_run_until(f->loop, &health.done, PATIENCE_US));
    assert_int_equal(health.status, SERVING);
    rpc_server_set_health(f->server, "weft.test.Probe", false);
    ask_health(f, &health, "Check", "weft.test.Probe");
    assert_true(main_loop_run_until(f->loop, &health.done, PATIENCE_US));
    assert_int_equal(health.status, NOT_SERVING);
    ask_health(f, &health, "Check", "no.such.Service");
    assert_true(main_loop_run_until(f->loop, &health.done, PATIENCE_US));
    assert_true(g_error_matches(health.error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND));
    g_clear_error(&health.error);
}

static void test_health_watch(void **state)
{
    Fixture *f = *state;
    HealthOutcome health = {0};
    RpcClientCall *call = ask_health(f, &health, "Watch", "later.Service");
    wait_for_count(f->loop, &health.n, 1);
    assert_int_equal(health.status, SERVICE_UNKNOWN);
    rpc_server_set_health(f->server, "later.Service", true);
    wait_for_count(f->loop, &health.n, 2);
    assert_int_equal(health.status, SERVING);
    rpc_server_set_health(f->server, "later.Service", true); /* no change, no message */
    rpc_server_set_health(f->server, "", false);             /* of another service */
    rpc_server_set_health(f->server, "later.Service", false);
    wait_for_count(f->loop, &health.n, 3);
    assert_int_equal(health.status, NOT_SERVING);
    rpc_client_cancel(call);
    assert_true(main_loop_run_until(f->loop, &health.done, PATIENCE_US));
    assert_true(g_error_matches(health.error, WEFT_ERROR, WEFT_ERROR_CANCELLED));
    g_clear_error(&health.error);
}

static void test_watch_ends_with_the_server(void **state)
{
    Fixture *f = *state;
    HealthOutcome health = {0};
    ask_health(f, &health, "Watch", "");
    wait_for_count(f->loop, &health.n, 1);
    rpc_server_free(f->server, 2000);
    f->server = NULL;
    assert_true(main_loop_run_until(f->loop, &health.done, PATIENCE_US));
    assert_int_equal(health.status, NOT_SERVING); /* said before it went */
    g_clear_error(&health.error);
}

typedef struct ReflectionOutcome {
    bool done;
    int n, n_files, error_code;
    GString *services;
    GError *error;
} ReflectionOutcome;

static void on_reflection(const ProtobufCMessage *response, void *user)
{
    ReflectionOutcome *outcome = user;
    const Grpc__Reflection__V1__ServerReflectionResponse *answer = (const void *)response;
    const unsigned files =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_FILE_DESCRIPTOR_RESPONSE;
    outcome->n++;
    if (answer->message_response_case ==
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_LIST_SERVICES_RESPONSE) {
        for (size_t i = 0; i < answer->list_services_response->n_service; i++) {
            g_string_append_printf(outcome->services, "%s ",
                                   answer->list_services_response->service[i]->name);
        }
    } else if (answer->message_response_case == files) {
        outcome->n_files = (int)answer->file_descriptor_response->n_file_descriptor_proto;
    } else {
        outcome->error_code = answer->error_response->error_code;
    }
}

static void on_reflection_done(const GError *error, void *user)
{
    ReflectionOutcome *outcome = user;
    outcome->done = true;
    outcome->error = error ? g_error_copy(error) : NULL;
}

static void test_reflection(void **state)
{
    Fixture *f = *state;
    RpcChannel *admin = open_channel(f, &f->admin_id);
    ReflectionOutcome outcome = {.services = g_string_new(NULL)};
    RpcCallbacks callbacks = {on_reflection, on_reflection_done};
    RpcClientCall *call =
        rpc_call_start(admin, &grpc__reflection__v1__server_reflection__descriptor,
                       "ServerReflectionInfo", NULL, 5000, false, callbacks, &outcome);
    Grpc__Reflection__V1__ServerReflectionRequest request =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    request.message_request_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_LIST_SERVICES;
    request.list_services = "";
    rpc_client_send(call, &request.base);
    request.message_request_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_SYMBOL;
    request.file_containing_symbol = "weft.v1.Admin.Status";
    rpc_client_send(call, &request.base);
    wait_for_count(f->loop, &outcome.n, 2);
    request.file_containing_symbol = "no.Symbol";
    rpc_client_send(call, &request.base);
    rpc_client_half_close(call);
    assert_true(main_loop_run_until(f->loop, &outcome.done, PATIENCE_US));
    assert_null(outcome.error);
    assert_string_equal(outcome.services->str,
                        "grpc.health.v1.Health weft.test.Probe grpc.reflection.v1.ServerReflection "
                        "grpc.reflection.v1alpha.ServerReflection ");
    assert_int_equal(outcome.n_files,
                     5); /* admin.proto, and what it imports: plan, cluster, serve, train */
    assert_int_equal(outcome.error_code, 5);
    rpc_channel_free(admin);

    /* not for workers when peers have roles */
    outcome.done = false;
    rpc_call_start(f->channel, &grpc__reflection__v1__server_reflection__descriptor,
                   "ServerReflectionInfo", NULL, 5000, false, callbacks, &outcome);
    assert_true(main_loop_run_until(f->loop, &outcome.done, PATIENCE_US));
    assert_true(g_error_matches(outcome.error, WEFT_ERROR, WEFT_ERROR_DENIED));
    g_clear_error(&outcome.error);
    g_string_free(outcome.services, TRUE);
}

static void test_state_callback(void **state)
{
    Fixture *f = *state;
    wait_for_count(f->loop, &f->n_ready_changes, 1);
    assert_true(f->ready);
    rpc_server_free(f->server, 0);
    f->server = NULL;
    wait_for_count(f->loop, &f->n_ready_changes, 2); /* with no call in flight */
    assert_false(f->ready);
}

#define OVER(test, kind)                                                                           \
    {                                                                                              \
#test " over " #kind, test, set_up, tear_down, kind                                        \
    }
#define BOTH(test) OVER(test, grpc), OVER(test, inproc)

int main(void)
{
    void *grpc = NULL, *inproc = "inproc";
    const struct CMUnitTest tests[] = {
        BOTH(test_unary),
        BOTH(test_strings_arrive_as_utf8),
        cmocka_unit_test_setup_teardown(test_new_certificate, set_up, tear_down),
        BOTH(test_server_stream),
        BOTH(test_empty_stream),
        BOTH(test_client_stream),
        BOTH(test_client_stream_without_messages),
        BOTH(test_bidi),
        BOTH(test_error_crosses_exactly),
        BOTH(test_absent_method),
        BOTH(test_deadline),
        BOTH(test_cancel_is_seen_by_the_server),
        BOTH(test_answer_after_cancel_does_nothing),
        BOTH(test_room),
        BOTH(test_no_room_after_the_end),
        BOTH(test_role_refused),
        BOTH(test_revoked_serial_refused),
        BOTH(test_kick_ends_open_streams),
        BOTH(test_large_messages),
        BOTH(test_server_free_ends_calls),
        BOTH(test_idle_server_frees_at_once),
        BOTH(test_channel_free_ends_calls),
        BOTH(test_channel_freed_in_on_done),
        BOTH(test_retry_while_channel_is_freed),
        BOTH(test_health_check),
        BOTH(test_health_watch),
        BOTH(test_watch_ends_with_the_server),
        BOTH(test_reflection),
        BOTH(test_state_callback),
    };
    return cmocka_run_group_tests_name("rpc", tests, NULL, NULL);
}
