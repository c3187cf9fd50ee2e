/* Health is earned (pulse.h): an engine that stands still, or turns and runs no step, is told with
 * its operation, idle or not; one that is idle proves itself by canaries that change nothing. */
#include "proto/base/failpoint.h"
#include "tests/unit/worker/agent_env.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>
#include <string.h>

static Env *ready_env(void)
{
    Env *env = env_new();
    env_wait_attached(env, 1);
    env_make_ready(env, 1);
    env_run(env, SECOND);
    assert_int_equal(env_health(env, ""), SERVING);
    assert_string_equal(env->c->heartbeat->problem, "");
    return env;
}

static void assert_told(const Env *env, const char *what)
{
    const Weft__V1__Heartbeat *heartbeat = env->c->heartbeat;
    assert_false(heartbeat->serving);
    assert_non_null(strstr(heartbeat->problem, "epoch 1"));
    assert_non_null(strstr(heartbeat->problem, what));
    assert_int_equal(heartbeat->n_held, 1);
    assert_string_equal(heartbeat->held[0]->state, "failed");
    assert_non_null(strstr(heartbeat->held[0]->error, what));
}

/* Time goes on without a turn of the engine. */
static void stand_still(Env *env, int64_t duration_us)
{
    sim_world_run_for(env->world, duration_us);
}

static void test_held_engine(void **state)
{
    (void)state;
    Env *env = ready_env();
    stand_still(env, 5 * SECOND);
    assert_told(env, "its engine stands still in its turn between steps for ");
    env_run(env, SECOND);
    assert_true(env->c->heartbeat->serving); /* it goes on */
    assert_string_equal(env->c->heartbeat->problem, "");
    assert_string_equal(env->c->heartbeat->held[0]->state, "ready");
    env_free(env);
}

static void test_held_engine_with_work(void **state)
{
    (void)state;
    Env *env = ready_env();
    FakeReply *g = env_generate(env, 1, 100, 1, "coordinator");
    stand_still(env, 5 * SECOND);
    assert_told(env, "its engine stands still in ");
    env_wait_for(env, &g->done); /* nobody ended the epoch: the request goes on */
    g_assert_no_error(g->error);
    assert_int_equal(g->messages->len, 101);
    fake_reply_free(g);
    env_free(env);
}

/* An engine whose process was stopped, and which had no turn for that, is not stuck. */
static void test_stopped_process_is_not_stuck(void **state)
{
    (void)state;
    Env *env = ready_env();
    sim_loop_freeze(env->loop, true);
    sim_world_run_for(env->world, 3 * SECOND);
    sim_loop_freeze(env->loop, false);
    env_run(env, SECOND);
    assert_string_equal(env->c->heartbeat->problem, "");
    assert_int_equal(env->c->n_attached, 1);
    env_free(env);
}

static void assert_same_tokens(const FakeReply *a, const FakeReply *b)
{
    assert_int_equal(a->messages->len, b->messages->len);
    for (guint i = 0; i < a->messages->len; i++) {
        const Weft__V1__TokenEvent *x = a->messages->pdata[i], *y = b->messages->pdata[i];
        assert_int_equal(x->id, y->id);
        assert_int_equal(x->row_hash.len, y->row_hash.len);
        assert_true(x->row_hash.len == 0 || /* the end: no row */
                    memcmp(x->row_hash.data, y->row_hash.data, x->row_hash.len) == 0);
    }
}

static FakeReply *answer(Env *env)
{
    FakeReply *g = env_generate(env, 1, 40, 1, "coordinator");
    env_wait_for(env, &g->done);
    g_assert_no_error(g->error);
    return g;
}

static void test_idle_engine_earns_its_health(void **state)
{
    (void)state;
    Env *env = ready_env();
    FakeReply *before = answer(env);
    env_run(env, SECOND);
    const uint64_t steps = env->c->heartbeat->counters->steps,
                   rows = env->c->heartbeat->counters->rows;
    const Weft__V1__ReplicaLoad *load = env->c->heartbeat->loads[0];
    const uint64_t used = load->kv_pages_used, cached = load->kv_pages_cached;
    for (int s = 0; s < 60; s++) {
        env_run(env, SECOND);
        assert_true(env->c->heartbeat->serving);
    }
    const uint64_t canaries = env->c->heartbeat->counters->steps - steps;
    assert_in_range(canaries, 40, 60); /* one for each second without a step */
    assert_int_equal(env->c->heartbeat->counters->rows, rows);
    load = env->c->heartbeat->loads[0];
    assert_int_equal(load->kv_pages_used, used);
    assert_int_equal(load->kv_pages_cached, cached);
    FakeReply *after = answer(env);
    assert_same_tokens(before, after);
    fake_reply_free(before);
    fake_reply_free(after);
    env_free(env);
}

#ifdef WEFT_FAILPOINTS
/* Its counters move, and nothing comes of it: only the canary shows that. */
static void test_engine_that_turns_and_runs_nothing(void **state)
{
    (void)state;
    Env *env = ready_env();
    failpoint_set("engine-skip", true, 0);
    env_run(env, 5 * SECOND);
    assert_told(env, "its engine has run no step for ");
    failpoint_set("engine-skip", false, 0);
    env_run(env, SECOND);
    assert_true(env->c->heartbeat->serving);
    env_free(env);
}
#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_held_engine),
        cmocka_unit_test(test_held_engine_with_work),
        cmocka_unit_test(test_stopped_process_is_not_stuck),
        cmocka_unit_test(test_idle_engine_earns_its_health),
#ifdef WEFT_FAILPOINTS
        cmocka_unit_test(test_engine_that_turns_and_runs_nothing),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
