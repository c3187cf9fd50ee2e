/* A worker that is asked to stop tells the coordinator and gives it time to move its work
 * (agent_stop()); it never waits for a coordinator that is not there, nor for ever. */
#include "proto/base/error.h"
#include "tests/unit/worker/agent_env.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>

enum { LEAVE_MS = 5000 };

static Env *ready_env(void)
{
    Env *env = env_new_leaving(LEAVE_MS);
    env_wait_attached(env, 1);
    env_make_ready(env, 1);
    env_run(env, SECOND);
    assert_false(env->c->heartbeat->leaving);
    return env;
}

static void stop(Env *env)
{
    agent_stop(env->agent, env_stopped, env);
}

static void test_leaves_when_its_work_has_moved(void **state)
{
    (void)state;
    Env *env = ready_env();
    FakeReply *g = env_generate(env, 1, 100, 1, "coordinator");
    stop(env);
    sim_world_run_for(env->world, 10000);
    assert_true(env->c->heartbeat->leaving); /* at once, not with the next heartbeat */
    env_run(env, SECOND);
    assert_false(env->stopped);
    assert_true(env->c->heartbeat->leaving);
    assert_true(g->done); /* meanwhile requests go on */
    g_assert_no_error(g->error);
    assert_int_equal(g->messages->len, 101);
    FakeReply *d = env_drop(env, 1, false);
    env_wait_for(env, &d->done);
    env_run(env, SECOND / 10);
    assert_true(env->stopped);
    fake_reply_free(d);
    fake_reply_free(g);
    env_free(env);
}

static void test_leaves_at_once_with_nothing_to_move(void **state)
{
    (void)state;
    Env *env = env_new_leaving(LEAVE_MS);
    env_wait_attached(env, 1);
    env_run(env, SECOND);
    stop(env);
    env_run(env, SECOND / 10);
    assert_true(env->stopped);
    assert_true(env->c->heartbeat->leaving); /* it was heard */
    env_free(env);
}

static void test_does_not_wait_for_ever(void **state)
{
    (void)state;
    Env *env = ready_env();
    FakeReply *g = env_generate_with(env, 1, 60, 1, false, "coordinator");
    stop(env);
    sim_world_run_for(env->world, LEAVE_MS * 1000 - 100000); /* its engine has no turn */
    assert_false(env->stopped);
    sim_world_run_for(env->world, 200000);
    assert_true(env->stopped);
    env_assert_fails(env, g, WEFT_ERROR_CANCELLED, "w0", "stopping");
    env_free(env);
}

static void test_does_not_wait_for_nobody(void **state)
{
    (void)state;
    Env *env = ready_env();
    fake_coordinator_down(env->c);
    env_run(env, SECOND / 10);
    assert_false(agent_is_attached(env->agent));
    stop(env);
    env_run(env, SECOND / 10);
    assert_true(env->stopped);
    fake_coordinator_up(env->c);
    env_free(env);
}

static void test_asked_twice_goes_at_once(void **state)
{
    (void)state;
    Env *env = ready_env();
    stop(env);
    env_run(env, SECOND);
    assert_false(env->stopped);
    stop(env);
    env_run(env, SECOND / 10);
    assert_true(env->stopped);
    env_free(env);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_leaves_when_its_work_has_moved),
        cmocka_unit_test(test_leaves_at_once_with_nothing_to_move),
        cmocka_unit_test(test_does_not_wait_for_ever),
        cmocka_unit_test(test_does_not_wait_for_nobody),
        cmocka_unit_test(test_asked_twice_goes_at_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
