/* gRPC against another process: a server that is killed, restarted, frozen; and who is not let in.
 */
#include "tests/unit/rpc/probe_service.h"
#include "tests/unit/rpc/rpc_client.h"

#include "proto/base/error.h"
#include "transport/crypto/x509.h"

#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

static const char *server_program; /* argv[1] */

typedef struct ServerProcess {
    pid_t pid;
    int stdin_fd;
    char address[64];
} ServerProcess;

static void start_process(ServerProcess *process, const char *address)
{
    int in[2], out[2];
    assert_int_equal(pipe2(in, O_CLOEXEC), 0);
    assert_int_equal(pipe2(out, O_CLOEXEC), 0);
    process->pid = fork();
    if (process->pid == 0) {
        dup2(in[0], STDIN_FILENO);
        dup2(out[1], STDOUT_FILENO);
        close(in[1]);
        close(out[0]);
        execl(server_program, server_program, address, (char *)NULL);
        _exit(127);
    }
    close(in[0]);
    close(out[1]);
    process->stdin_fd = in[1];
    FILE *lines = fdopen(out[0], "r");
    assert_non_null(fgets(process->address, sizeof process->address, lines));
    g_strchomp(process->address);
    fclose(lines);
}

static void kill_process(ServerProcess *process)
{
    if (process->pid > 0) {
        kill(process->pid, SIGKILL);
        waitpid(process->pid, NULL, 0);
        close(process->stdin_fd);
        process->pid = 0;
    }
}

typedef struct Fixture {
    MainLoop *loop;
    ServerProcess process;
    RpcChannel *channel;
    bool ready;
    int n_changes;
} Fixture;

static void on_state(bool ready, void *user)
{
    Fixture *f = user;
    f->ready = ready;
    f->n_changes++;
}

static RpcChannel *open_channel(Fixture *f, const char *target, RpcCredentials credentials,
                                const char *server_name)
{
    g_autoptr(GError) error = NULL;
    RpcChannelOptions options = {target, credentials, server_name, on_state, f};
    RpcChannel *channel =
        rpc_channel_new(rpc_transport_grpc(), main_loop_loop(f->loop), &options, &error);
    g_assert_no_error(error);
    return channel;
}

static int set_up(void **state)
{
    Fixture *f = g_new0(Fixture, 1);
    probe_declare();
    f->loop = main_loop_new();
    *state = f;
    return 0;
}

static int set_up_with_process(void **state)
{
    set_up(state);
    Fixture *f = *state;
    start_process(&f->process, "127.0.0.1:0");
    f->channel = open_channel(f, f->process.address, (RpcCredentials){0}, NULL);
    return 0;
}

static int tear_down(void **state)
{
    Fixture *f = *state;
    rpc_channel_free(f->channel);
    kill_process(&f->process);
    main_loop_free(f->loop);
    g_free(f);
    return 0;
}

static int64_t now_us(Fixture *f)
{
    return loop_now_us(main_loop_loop(f->loop));
}

static void test_server_killed_mid_stream(void **state)
{
    Fixture *f = *state;
    Outcome outcome = {0};
    outcome_start(&outcome, f->channel, "Hang", 1, 0);
    wait_for_count(f->loop, &outcome.n_messages, 1);
    int64_t killed_us = now_us(f);
    kill_process(&f->process);
    outcome_wait(&outcome, f->loop);
    assert_true(g_error_matches(outcome.error, WEFT_ERROR, WEFT_ERROR_UNREACHABLE));
    assert_non_null(strstr(outcome.error->message, f->process.address));
    assert_true(now_us(f) - killed_us < 1000000);
    outcome_clear(&outcome);
}

static void test_restart_and_reconnect(void **state)
{
    Fixture *f = *state;
    Outcome outcome = {0};
    outcome_start_waiting(&outcome, f->channel, "Add", 1, 5000);
    outcome_wait(&outcome, f->loop);
    assert_null(outcome.error);
    wait_for_count(f->loop, &f->n_changes, 1);
    kill_process(&f->process);
    wait_for_count(f->loop, &f->n_changes, 2); /* idle channel, and still it is told */
    assert_false(f->ready);

    outcome_start(&outcome, f->channel, "Add", 1,
                  5000); /* does not wait: fails now, not after 5 s */
    int64_t began_us = now_us(f);
    outcome_wait(&outcome, f->loop);
    assert_true(g_error_matches(outcome.error, WEFT_ERROR, WEFT_ERROR_UNREACHABLE));
    assert_true(now_us(f) - began_us < 4000000);

    outcome_start_waiting(&outcome, f->channel, "Add", 1, 8000);
    char address[64];
    g_strlcpy(address, f->process.address, sizeof address);
    start_process(&f->process, address);
    int64_t started_us = now_us(f);
    outcome_wait(&outcome, f->loop);
    assert_null(outcome.error);
    assert_int_equal(outcome.last_value, 2);
    assert_true(now_us(f) - started_us < 2000000);
    outcome_clear(&outcome);
}

static void test_frozen_server_meets_the_deadline(void **state)
{
    Fixture *f = *state;
    Outcome outcome = {0};
    outcome_start_waiting(&outcome, f->channel, "Add", 1, 5000);
    outcome_wait(&outcome, f->loop);
    kill(f->process.pid, SIGSTOP);
    outcome_start(&outcome, f->channel, "Add", 1, 300);
    outcome_wait(&outcome, f->loop);
    assert_true(g_error_matches(outcome.error, WEFT_ERROR, WEFT_ERROR_DEADLINE));
    outcome_clear(&outcome);
}

static void test_nobody_listens(void **state)
{
    Fixture *f = *state;
    Outcome outcome = {0};
    f->channel = open_channel(f, "127.0.0.1:1", (RpcCredentials){0}, NULL);
    outcome_start(&outcome, f->channel, "Add", 1, 5000);
    outcome_wait(&outcome, f->loop);
    assert_true(g_error_matches(outcome.error, WEFT_ERROR, WEFT_ERROR_UNREACHABLE));
    assert_non_null(strstr(outcome.error->message, "weft.test.Probe/Add at 127.0.0.1:1"));
    outcome_start_waiting(&outcome, f->channel, "Add", 1, 300);
    outcome_wait(&outcome, f->loop);
    assert_true(g_error_matches(outcome.error, WEFT_ERROR, WEFT_ERROR_DEADLINE));
    outcome_clear(&outcome);
}

/* ---- who is let in --------------------------------------------------------------------------- */

typedef struct Guard {
    TestCa ca, foreign;
    TestIdentity server, worker, stranger;
    ProbeService probe;
    RpcServer *rpc;
} Guard;

static void guard_start(Guard *guard, Fixture *f, bool require_client)
{
    test_ca_make(&guard->ca, "own");
    test_ca_make(&guard->foreign, "foreign");
    test_identity_make(&guard->server, &guard->ca, "c0", "coordinator");
    test_identity_make(&guard->worker, &guard->ca, "w1", "worker");
    test_identity_make(&guard->stranger, &guard->foreign, "w1", "worker");
    RpcServerOptions options = {.listen = "127.0.0.1:0",
                                .credentials = test_credentials(&guard->ca, &guard->server)};
    options.credentials.require_client_certificate = require_client;
    g_autoptr(GError) error = NULL;
    guard->rpc = rpc_server_new(rpc_transport_grpc(), main_loop_loop(f->loop), &options, &error);
    g_assert_no_error(error);
    probe_service_init(&guard->probe, main_loop_loop(f->loop));
    probe_service_add(&guard->probe, guard->rpc, require_client ? RPC_ROLE_WORKER : RPC_ROLE_NONE);
    rpc_server_start(guard->rpc, NULL);
}

static void guard_stop(Guard *guard)
{
    rpc_server_free(guard->rpc, 0);
    test_identity_clear(&guard->server);
    test_identity_clear(&guard->worker);
    test_identity_clear(&guard->stranger);
    test_ca_clear(&guard->ca);
    test_ca_clear(&guard->foreign);
}

/* One call through a channel of its own; the outcome's error or none. */
static int try_call(Fixture *f, Guard *guard, RpcCredentials credentials, const char *server_name)
{
    Outcome outcome = {0};
    RpcChannel *channel = open_channel(f, rpc_server_address(guard->rpc), credentials, server_name);
    outcome_start(&outcome, channel, "Add", 1, 4000);
    outcome_wait(&outcome, f->loop);
    int code = outcome.error ? outcome.error->code : 0;
    outcome_clear(&outcome);
    rpc_channel_free(channel);
    return code;
}

static void test_only_own_certificates_get_in(void **state)
{
    Fixture *f = *state;
    Guard guard = {0};
    guard_start(&guard, f, true);
    RpcCredentials own = test_credentials(&guard.ca, &guard.worker);
    assert_int_equal(try_call(f, &guard, own, NULL), 0); /* by address */
    assert_int_equal(try_call(f, &guard, own, "weft-coordinator"), 0);
    assert_int_equal(try_call(f, &guard, own, "c0"), 0);
    assert_int_equal(guard.probe.n_called, 3);

    RpcCredentials plaintext = {0};
    assert_int_equal(try_call(f, &guard, plaintext, NULL), WEFT_ERROR_UNREACHABLE);
    RpcCredentials no_certificate = {.ca_pem = guard.ca.pem};
    assert_int_equal(try_call(f, &guard, no_certificate, NULL), WEFT_ERROR_UNREACHABLE);
    RpcCredentials foreign = {guard.ca.pem, guard.stranger.pem, guard.stranger.key, false};
    assert_int_equal(try_call(f, &guard, foreign, NULL), WEFT_ERROR_UNREACHABLE);
    assert_int_equal(try_call(f, &guard, own, "weft-worker"),
                     WEFT_ERROR_UNREACHABLE); /* the server is no worker */
    RpcCredentials trusts_another = test_credentials(&guard.foreign, &guard.stranger);
    assert_int_equal(try_call(f, &guard, trusts_another, NULL), WEFT_ERROR_UNREACHABLE);
    assert_int_equal(guard.probe.n_called, 3);
    guard_stop(&guard);
}

static void test_server_tls_only(void **state)
{
    Fixture *f = *state;
    Guard guard = {0};
    guard_start(&guard, f, false);
    RpcCredentials no_certificate = {.ca_pem = guard.ca.pem};
    assert_int_equal(try_call(f, &guard, no_certificate, NULL), 0);
    assert_int_equal(guard.probe.peer_role, RPC_ROLE_NONE);
    assert_string_equal(guard.probe.peer_name, "");
    RpcCredentials plaintext = {0};
    assert_int_equal(try_call(f, &guard, plaintext, NULL), WEFT_ERROR_UNREACHABLE);
    guard_stop(&guard);
}

/* The handshake needs the server's loop to do nothing, so it can run on this thread. */
static void test_fetch_ca_from_a_server(void **state)
{
    Fixture *f = *state;
    Guard guard = {0};
    guard_start(&guard, f, false);
    g_autoptr(GError) error = NULL;
    uint8_t hash[32], wrong[32];
    assert_true(x509_public_key_hash(guard.ca.pem, hash, &error));
    g_autofree char *pem = x509_fetch_ca(rpc_server_address(guard.rpc), hash, 5000, &error);
    g_assert_no_error(error);
    assert_string_equal(pem, guard.ca.pem);
    assert_true(x509_public_key_hash(guard.foreign.pem, wrong, &error));
    assert_null(x509_fetch_ca(rpc_server_address(guard.rpc), wrong, 5000, &error));
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_DENIED));
    g_clear_error(&error);
    assert_true(
        x509_public_key_hash(guard.server.pem, wrong, &error)); /* the leaf's own key is no CA */
    assert_null(x509_fetch_ca(rpc_server_address(guard.rpc), wrong, 5000, &error));
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_DENIED));
    g_clear_error(&error);
    assert_null(x509_fetch_ca("127.0.0.1:1", hash, 5000, &error));
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_UNREACHABLE));
    guard_stop(&guard);
}

static void test_fetch_ca_from_a_plaintext_server(void **state)
{
    Fixture *f = *state;
    g_autoptr(GError) error = NULL;
    uint8_t hash[32] = {0};
    assert_null(x509_fetch_ca(f->process.address, hash, 5000, &error));
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_UNREACHABLE));
}

static void test_port_in_use(void **state)
{
    Fixture *f = *state;
    RpcServerOptions options = {.listen = f->process.address};
    g_autoptr(GError) error = NULL;
    assert_null(rpc_server_new(rpc_transport_grpc(), main_loop_loop(f->loop), &options, &error));
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_IO));
    assert_non_null(strstr(error->message, f->process.address));
    assert_non_null(strstr(error->message, "Address already in use"));
}

static void test_bad_credentials_and_addresses(void **state)
{
    Fixture *f = *state;
    Loop *loop = main_loop_loop(f->loop);
    TestCa ca;
    test_ca_make(&ca, "own");
    const RpcCredentials bad[] = {
        {.ca_pem = "no certificate"},
        {.ca_pem = ca.pem, .certificate_pem = "no certificate", .key_pem = ca.key},
        {.ca_pem = ca.pem, .certificate_pem = ca.pem},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(bad); i++) {
        g_autoptr(GError) error = NULL;
        RpcChannelOptions options = {.target = "127.0.0.1:1", .credentials = bad[i]};
        assert_null(rpc_channel_new(rpc_transport_grpc(), loop, &options, &error));
        assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
        g_clear_error(&error);
        RpcServerOptions server_options = {.listen = "127.0.0.1:0", .credentials = bad[i]};
        assert_null(rpc_server_new(rpc_transport_grpc(), loop, &server_options, &error));
        assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
    }
    g_autoptr(GError) error = NULL;
    RpcChannelOptions options = {.target = "no-port"};
    assert_null(rpc_channel_new(rpc_transport_grpc(), loop, &options, &error));
    assert_string_equal(error->message, "\"no-port\" is no address; write host:port");
    test_ca_clear(&ca);
}

/* Server and client on Loops of their own threads: completions find the right one. */
static void *serve(void *user)
{
    main_loop_run(user);
    return NULL;
}

static void free_server(void *user)
{
    rpc_server_free(user, 0);
}

static void two_threads(Fixture *f, RpcTransport *transport)
{
    MainLoop *server_loop = main_loop_new();
    RpcServerOptions options = {.listen = "127.0.0.1:0"};
    RpcServer *server = rpc_server_new(transport, main_loop_loop(server_loop), &options, NULL);
    ProbeService probe;
    probe_service_init(&probe, main_loop_loop(server_loop));
    probe_service_add(&probe, server, 0);
    rpc_server_start(server, NULL);
    RpcChannelOptions channel = {.target = rpc_server_address(server)};
    f->channel = rpc_channel_new(transport, main_loop_loop(f->loop), &channel, NULL);
    GThread *thread = g_thread_new("server", serve, server_loop);
    for (int i = 0; i < 200; i++) {
        Outcome outcome = {0}, beside = {0};
        outcome_start_waiting(&outcome, f->channel, i % 2 ? "Add" : "Count", i, 5000);
        outcome_start_waiting(&beside, f->channel, "Hang", 1, 0);
        outcome_wait(&outcome, f->loop);
        assert_null(outcome.error);
        assert_int_equal(outcome.n_messages, i % 2 ? 1 : i);
        rpc_client_cancel(beside.call);
        outcome_wait(&beside, f->loop);
        outcome_clear(&beside);
    }
    Outcome last = {0};
    outcome_start(&last, f->channel, "Hang", 1, 0);
    wait_for_count(f->loop, &last.n_messages, 1);
    loop_post(main_loop_loop(server_loop), free_server, server);
    outcome_wait(&last, f->loop);
    assert_true(g_error_matches(last.error, WEFT_ERROR, WEFT_ERROR_UNREACHABLE));
    outcome_clear(&last);
    main_loop_quit(server_loop);
    g_thread_join(thread);
    main_loop_free(server_loop);
    assert_null(probe.held);
    rpc_channel_free(g_steal_pointer(&f->channel));
}

static void test_two_threads_over_grpc(void **state)
{
    two_threads(*state, rpc_transport_grpc());
}

static void test_two_threads_over_inproc(void **state)
{
    RpcTransport *transport = rpc_transport_inproc_new();
    two_threads(*state, transport);
    rpc_transport_inproc_free(transport);
}

int main(int argc, char **argv)
{
    server_program = argc > 1 ? argv[1] : "rpc-probe-server";
    signal(SIGPIPE, SIG_IGN);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_server_killed_mid_stream, set_up_with_process,
                                        tear_down),
        cmocka_unit_test_setup_teardown(test_restart_and_reconnect, set_up_with_process, tear_down),
        cmocka_unit_test_setup_teardown(test_frozen_server_meets_the_deadline, set_up_with_process,
                                        tear_down),
        cmocka_unit_test_setup_teardown(test_nobody_listens, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_only_own_certificates_get_in, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_server_tls_only, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_fetch_ca_from_a_server, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_fetch_ca_from_a_plaintext_server, set_up_with_process,
                                        tear_down),
        cmocka_unit_test_setup_teardown(test_port_in_use, set_up_with_process, tear_down),
        cmocka_unit_test_setup_teardown(test_bad_credentials_and_addresses, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_two_threads_over_grpc, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_two_threads_over_inproc, set_up, tear_down),
    };
    return cmocka_run_group_tests_name("rpc_peer", tests, NULL, NULL);
}
