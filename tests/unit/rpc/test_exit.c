/* A process that exits while a channel is open ends with its own status, its output written, and
 * before exit() takes away what gRPC's threads use. */
#include "transport/daemon/daemon.h"
#include "transport/rpc/rpc.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static void say_late(void)
{
    (void)!write(STDOUT_FILENO, "late", 4);
}

/* In a child: opens a channel to nobody; gives it back or not; exits. */
static void leave(int out, bool give_back)
{
    dup2(out, STDOUT_FILENO);
    atexit(say_late); /* stands for the libraries' own ends, which run after what came later */
    MainLoop *loop = main_loop_new();
    RpcChannel *channel = rpc_channel_new(rpc_transport_grpc(), main_loop_loop(loop),
                                          &(RpcChannelOptions){.target = "127.0.0.1:1"}, NULL);
    if (give_back) {
        rpc_channel_free(channel);
    }
    printf("said,"); /* to a pipe: it waits in a buffer */
    exit(7);
}

static void assert_left(bool give_back, const char *wanted)
{
    int ends[2], status = 0;
    char said[32] = "";
    assert_int_equal(pipe(ends), 0);
    const pid_t child = fork(); /* before this process has any thread */
    if (child == 0) {
        leave(ends[1], give_back);
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
    assert_left(false, "said,");
}

static void test_given_back(void **state)
{
    (void)state;
    assert_left(true, "latesaid,"); /* stdio writes out last */
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_in_use),
                                       cmocka_unit_test(test_given_back)};
    return cmocka_run_group_tests_name("rpc_exit", tests, NULL, NULL);
}
