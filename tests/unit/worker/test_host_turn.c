/* A turn is one process's, whatever ends it. */
#include "worker/host_turn.h"

#include <glib.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

static char name[64];

static void test_one_at_a_time(void **state)
{
    g_snprintf(name, sizeof name, "weft-test-turn-%d", (int)getpid());
    const int turn = host_turn_try(name);
    assert_true(turn >= 0);
    assert_int_equal(host_turn_try(name), HOST_TURN_TAKEN);
    const int other = host_turn_try("weft-test-turn-of-another-name");
    assert_true(other >= 0);
    host_turn_end(other);
    host_turn_end(turn);
    const int again = host_turn_try(name);
    assert_true(again >= 0);
    host_turn_end(again);
    host_turn_end(HOST_TURN_TAKEN);
    host_turn_end(HOST_TURN_WITHOUT);
}

/* Held by a process that is killed. */
static void test_ends_with_its_process(void **state)
{
    int ready[2];
    assert_int_equal(pipe(ready), 0);
    const pid_t child = fork();
    if (child == 0) {
        const char ok = host_turn_try(name) >= 0;
        (void)!write(ready[1], &ok, 1);
        for (;;) {
            pause();
        }
    }
    char ok = 0;
    assert_int_equal(read(ready[0], &ok, 1), 1);
    assert_true(ok);
    assert_int_equal(host_turn_try(name), HOST_TURN_TAKEN);
    kill(child, SIGKILL);
    assert_int_equal(waitpid(child, NULL, 0), child);
    const int turn = host_turn_try(name);
    assert_true(turn >= 0);
    host_turn_end(turn);
    close(ready[0]);
    close(ready[1]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_at_a_time),
        cmocka_unit_test(test_ends_with_its_process),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
