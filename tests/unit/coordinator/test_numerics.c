/* The numerics class of deployments: of those for which none was asked it follows the first plan,
 * and stays, whatever plans follow. The real coordinator under virtual time. */
#include "tests/unit/coordinator/sim_streams.h"

#include "proto/base/error.h"
#include "proto/plan/plan.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#define BOTH (1u << NUMERICS_EXACT | 1u << NUMERICS_FAST)

static Weft__V1__Measured measured = WEFT__V1__MEASURED__INIT;
static Weft__V1__Device gpu = WEFT__V1__DEVICE__INIT, *gpus[] = {&gpu};

/* w0 on a GPU, w1 and w2 on their cores; all offer both classes. None is started. */
static void lay_out(SimCluster *s)
{
    measured.read_bytes_per_s = 4e12;
    measured.int8_ops_per_s = measured.f32_ops_per_s = 1e14;
    gpu.kind = (char *)"cuda";
    gpu.exact_kind = (char *)"NVIDIA H200, sm_90";
    gpu.budget_bytes = (uint64_t)64 << 30;
    gpu.measured = &measured;
    s->workers[0].devices = gpus;
    s->workers[0].n_devices = 1;
    for (unsigned i = 0; i < 3; i++) {
        s->workers[i].numerics_classes = BOTH;
    }
}

static void ask(SimCluster *s, Answer *a, const char *numerics, uint32_t n_tokens)
{
    SimRequest r;
    sim_request_init(s, &r, "hello", n_tokens, 0, 0, 0);
    r.run.numerics = (char *)numerics;
    sim_request_begin(s, a, &r);
}

static uint32_t class_of(const Answer *a)
{
    assert_non_null(a->started);
    return a->started->plan->definition->numerics;
}

static const char *worker_of(const Answer *a)
{
    return a->started->plan->replicas[0]->stages[0]->ranks[0]->worker;
}

static void asked_and_ended(SimCluster *s, const char *numerics, uint32_t want, const char *worker)
{
    Answer a = {0};
    ask(s, &a, numerics, 4);
    sim_answer(s, &a, 10 * SECOND);
    g_assert_no_error(a.error);
    assert_int_equal(class_of(&a), want);
    assert_string_equal(worker_of(&a), worker);
    answer_clear(&a);
}

/* Classes of the jobs that status shows, in its order: "fast exact". */
static void assert_status(SimCluster *s, const char *want)
{
    Answer a = {0};
    sim_status(s, &a, "w1");
    const Weft__V1__StatusResponse *r = (const Weft__V1__StatusResponse *)a.message;
    g_autoptr(GString) got = g_string_new(NULL);
    for (size_t i = 0; i < r->n_jobs; i++) {
        g_string_append_printf(got, "%s%s", i > 0 ? " " : "", r->jobs[i]->numerics);
    }
    assert_string_equal(got->str, want);
    answer_clear(&a);
}

/* Where a GPU is, what asked for nothing is fast and shares what asked for fast, the other way
 * round too; exact is planned by itself. On hosts' cores it is exact, and shares that. */
static void test_follows_the_plan(void **state)
{
    SimCluster *s = *state;
    lay_out(s);
    sim_worker_start(s, 0);
    sim_worker_start(s, 1);
    sim_run_for(s, SECOND);
    asked_and_ended(s, "", NUMERICS_FAST, "w0");
    asked_and_ended(s, "fast", NUMERICS_FAST, "w0");
    asked_and_ended(s, "auto", NUMERICS_FAST, "w0");
    assert_int_equal(s->workers[0].n_loads, 1);
    assert_status(s, "fast");
    asked_and_ended(s, "exact", NUMERICS_EXACT, "w0");
    asked_and_ended(s, "", NUMERICS_FAST, "w0");
    assert_int_equal(s->workers[0].n_loads, 2);
    assert_status(s, "fast exact");
}

static void test_hosts_are_exact(void **state)
{
    SimCluster *s = *state;
    lay_out(s);
    sim_worker_start(s, 1);
    sim_run_for(s, SECOND);
    asked_and_ended(s, "exact", NUMERICS_EXACT, "w1");
    asked_and_ended(s, "", NUMERICS_EXACT, "w1");
    assert_int_equal(s->workers[1].n_loads, 1);
    asked_and_ended(s, "fast", NUMERICS_FAST, "w1");
    asked_and_ended(s, "", NUMERICS_EXACT, "w1"); /* not the fast one on the same cores */
    assert_int_equal(s->workers[1].n_loads, 2);
    assert_status(s, "exact fast");
}

/* A stream that begins fast on a GPU goes on fast on a host when that dies; so does what is asked
 * after it, and after the coordinator has started again. */
static void test_fast_stays_fast(void **state)
{
    SimCluster *s = *state;
    lay_out(s);
    start_workers(s, 2);
    Answer a = {0};
    ask(s, &a, "", N_TOKENS);
    sim_run_for(s, SECOND / 2);
    assert_int_equal(class_of(&a), NUMERICS_FAST);
    assert_string_equal(worker_of(&a), "w0");
    sim_worker_kill(&s->workers[0]);
    sim_answer(s, &a, 20 * SECOND);
    g_assert_no_error(a.error);
    assert_int_equal(a.run_done->recoveries, 1);
    assert_int_equal(a.ids->len, N_TOKENS);
    answer_clear(&a);
    asked_and_ended(s, "", NUMERICS_FAST, "w1");
    assert_status(s, "fast");
    sim_cluster_stop(s);
    sim_cluster_start(s);
    sim_run_for(s, 3 * SECOND);
    asked_and_ended(s, "", NUMERICS_FAST, "w1");
    assert_status(s, "fast");
}

/* A stream that begins exact on a host's cores is not taken over by a GPU: when the host dies it
 * ends, saying which bits are missing. */
static void test_exact_stays_exact(void **state)
{
    SimCluster *s = *state;
    sim_cluster_stop(s);
    s->recovery_wait_ms = 2000;
    sim_cluster_start(s);
    lay_out(s);
    sim_worker_start(s, 1);
    sim_run_for(s, SECOND);
    Answer a = {0};
    ask(s, &a, "", N_TOKENS);
    sim_run_for(s, SECOND / 2);
    assert_int_equal(class_of(&a), NUMERICS_EXACT);
    sim_worker_start(s, 0);
    sim_run_for(s, SECOND / 10);
    sim_worker_kill(&s->workers[1]);
    sim_answer(s, &a, 30 * SECOND);
    assert_non_null(a.error);
    assert_non_null(strstr(a.error->message, "hosts' cores"));
    answer_clear(&a);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_follows_the_plan, cluster_set_up, cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_hosts_are_exact, cluster_set_up, cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_fast_stays_fast, cluster_set_up, cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_exact_stays_exact, cluster_set_up, cluster_tear_down),
    };
    return cmocka_run_group_tests_name("coordinator-numerics", tests, NULL, NULL);
}
