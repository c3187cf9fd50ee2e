/* A process that exits while a channel is open ends with its own status, its output written, and
 * before exit() takes away what gRPC's threads use. A channel or server that gRPC lets go too late
 * leaves its loop alone. */
#include "proto/base/failpoint.h"
#include "tests/unit/rpc/probe_service.h"
#include "tests/unit/rpc/rpc_client.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <openssl/crypto.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static void say_late(void)
{
    (void)!write(STDOUT_FILENO, "late", 4);
}

static void say_openssl(void)
{
    (void)!write(STDOUT_FILENO, "openssl,", 8);
}

/* In a child: opens a channel to nobody; gives it back or not; exits. */
static void leave(int out, bool give_back)
{
    dup2(out, STDOUT_FILENO);
    atexit(say_late); /* stands for the libraries' own ends, which run after what came later */
    MainLoop *loop = main_loop_new();
    RpcChannel *channel = rpc_channel_new(rpc_transport_grpc(), main_loop_loop(loop),
                                          &(RpcChannelOptions){.target = "127.0.0.1:1"}, NULL);
    OPENSSL_init_crypto(OPENSSL_INIT_ADD_ALL_CIPHERS, NULL); /* as a first handshake does */
    OPENSSL_atexit(say_openssl);
    if (give_back) {
        rpc_channel_free(channel);
    }
    printf("said,"); /* to a pipe: it waits in a buffer */
    exit(7);
}

/* A loop that counts who comes when it is gone. */
typedef struct GoneLoop {
    Loop base;
    Loop *real;
    atomic_bool gone;
    atomic_int n_late;
} GoneLoop;

static int64_t gone_now_us(Loop *loop)
{
    return loop_now_us(((GoneLoop *)loop)->real);
}

static void gone_post(Loop *loop, LoopFn fn, void *user)
{
    GoneLoop *l = (GoneLoop *)loop;
    if (atomic_load(&l->gone)) {
        atomic_fetch_add(&l->n_late, 1);
    } else {
        loop_post(l->real, fn, user);
    }
}

/* In a child: what is outstanding completes when the channel and its loop are gone. */
static void leave_late(int out, bool give_back)
{
    static const LoopOps ops = {.now_us = gone_now_us, .post = gone_post};
    dup2(out, STDOUT_FILENO);
    MainLoop *loop = main_loop_new();
    GoneLoop l = {.base = {&ops}, .real = main_loop_loop(loop)};
    const RpcChannelOptions options = {.target = "127.0.0.1:1"};
#ifdef WEFT_FAILPOINTS
    failpoint_set("grpc-late", true, 0);
#endif
    rpc_channel_free(rpc_channel_new(rpc_transport_grpc(), &l.base, &options, NULL));
    atomic_store(&l.gone, true);
#ifdef WEFT_FAILPOINTS
    failpoint_set("grpc-late", false, 0);
#endif
    /* one thread completes in order: what another channel waits for comes after it */
    rpc_channel_free(rpc_channel_new(rpc_transport_grpc(), l.real, &options, NULL));
    printf("%d late", atomic_load(&l.n_late));
    exit(7);
}

#ifdef WEFT_FAILPOINTS
typedef struct Said {
    Log base;
    char line[256];
} Said;

static void note_line(Log *log, LogLevel level, const char *line)
{
    (void)level;
    g_strlcpy(((Said *)log)->line, line, sizeof((Said *)log)->line);
}

/* In a child: nothing that a server with an open call waits for completes before the server and its
 * loop are gone. The call's handler has heard of its end, and who answers late does nothing. */
static void leave_server_late(int out, bool give_back)
{
    static const LoopOps ops = {.now_us = gone_now_us, .post = gone_post};
    dup2(out, STDOUT_FILENO);
    probe_declare();
    MainLoop *loop = main_loop_new();
    GoneLoop l = {.base = {&ops}, .real = main_loop_loop(loop)};
    Said said = {.base = {.min_level = LOG_LEVEL_ERROR, .write = note_line}};
    const RpcServerOptions options = {.listen = "127.0.0.1:0", .log = &said.base};
    RpcServer *server = rpc_server_new(rpc_transport_grpc(), &l.base, &options, NULL);
    ProbeService probe;
    probe_service_init(&probe, &l.base);
    probe_service_add(&probe, server, 0);
    rpc_server_start(server, NULL);
    RpcChannel *channel =
        rpc_channel_new(rpc_transport_grpc(), l.real,
                        &(RpcChannelOptions){.target = rpc_server_address(server)}, NULL);
    Outcome outcome = {0};
    outcome_start(&outcome, channel, "Hang", 1, 0);
    wait_for_count(loop, &outcome.n_messages, 1);
    RpcCall *held = rpc_call_ref(probe.held);
    failpoint_set("grpc-late", true, 0);
    rpc_server_free(server, 0);
    atomic_store(&l.gone, true);
    Weft__Test__Number number = WEFT__TEST__NUMBER__INIT;
    number.value = 2;
    const size_t waiting = rpc_call_send(held, &number.base);
    rpc_call_finish(held, NULL);
    rpc_call_unref(held);
    failpoint_set("grpc-late", false, 0);
    rpc_channel_free(channel);
    printf("%s;%d cancelled,%zu wait,%d late", strstr(said.line, "left behind: "),
           probe.n_cancelled, waiting, atomic_load(&l.n_late));
    exit(7);
}
#endif

static void assert_left(void (*leave_by)(int out, bool give_back), bool give_back,
                        const char *wanted)
{
    int ends[2], status = 0;
    char said[128] = "";
    assert_int_equal(pipe(ends), 0);
    const pid_t child = fork(); /* before this process has any thread */
    if (child == 0) {
        leave_by(ends[1], give_back);
    }
    close(ends[1]);
    size_t n = 0;
    for (ssize_t got; (got = read(ends[0], said + n, sizeof said - 1 - n)) > 0;) {
        n += (size_t)got;
    }
    close(ends[0]);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 7);
    assert_string_equal(said, wanted);
}

static void test_in_use(void **state)
{
    (void)state;
    assert_left(leave, false, "said,");
}

static void test_given_back(void **state)
{
    (void)state;
    assert_left(leave, true, "openssl,latesaid,"); /* stdio writes out last */
}

static void test_let_go_late(void **state)
{
    (void)state;
    assert_left(leave_late, true, "0 late");
}

static void test_server_let_go_late(void **state)
{
    (void)state;
#ifdef WEFT_FAILPOINTS
    assert_left(leave_server_late, true,
                "left behind: 1 calls did not end within 1 s;1 cancelled,0 wait,0 late");
#else
    skip();
#endif
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_in_use), cmocka_unit_test(test_given_back),
        cmocka_unit_test(test_let_go_late), cmocka_unit_test(test_server_let_go_late)};
    return cmocka_run_group_tests_name("rpc_exit", tests, NULL, NULL);
}
