/* Submitted jobs: what is refused, what a failing disk means, and what a new coordinator finds. The
 * real coordinator under virtual time. */
#include "tests/unit/coordinator/sim_streams.h"

#include "proto/base/error.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#define SPEC "kind: serve\nname: chat\nmodel: {from: tiny.gguf}\n"

/* The error's code, or 0. */
static int submit(SimCluster *s, const char *spec, const char *message)
{
    Answer a = {0};
    Weft__V1__SubmitRequest request = WEFT__V1__SUBMIT_REQUEST__INIT;
    request.spec = (char *)spec;
    sim_call(s, &a, &weft__v1__admin__descriptor, "Submit", &request);
    sim_answer(s, &a, 5 * SECOND);
    int code = a.error != NULL ? a.error->code : 0;
    if (message != NULL && (a.error == NULL || strstr(a.error->message, message) == NULL)) {
        fail_msg("'%s' lacks '%s'", a.error != NULL ? a.error->message : "no error", message);
    }
    answer_clear(&a);
    return code;
}

static int cancel(SimCluster *s, const char *name)
{
    Answer a = {0};
    Weft__V1__CancelJobRequest request = WEFT__V1__CANCEL_JOB_REQUEST__INIT;
    request.name = (char *)name;
    sim_call(s, &a, &weft__v1__admin__descriptor, "CancelJob", &request);
    sim_answer(s, &a, 5 * SECOND);
    int code = a.error != NULL ? a.error->code : 0;
    answer_clear(&a);
    return code;
}

/* The jobs that there are; borrowed from a. */
static const Weft__V1__ListJobsResponse *list(SimCluster *s, Answer *a)
{
    Weft__V1__ListJobsRequest request = WEFT__V1__LIST_JOBS_REQUEST__INIT;
    sim_call(s, a, &weft__v1__admin__descriptor, "ListJobs", &request);
    sim_answer(s, a, SECOND);
    g_assert_no_error(a->error);
    return (const Weft__V1__ListJobsResponse *)a->message;
}

static void assert_n_jobs(SimCluster *s, size_t n)
{
    Answer a = {0};
    assert_int_equal(list(s, &a)->n_jobs, n);
    answer_clear(&a);
}

static void test_refused(void **state)
{
    SimCluster *s = *state;
    assert_int_equal(submit(s, "", "job file"), WEFT_ERROR_INVALID);
    assert_int_equal(submit(s, "kind: serve\nname: a\nmodle: {from: x}\n", "modle"),
                     WEFT_ERROR_INVALID);
    assert_int_equal(submit(s,
                            "kind: train\nname: t\nmodel: {config: {family: gpt2, layers: 1, "
                            "width: 32, heads: 2, context: 16}}\ndata: {train: x.txt, tokenizer: "
                            "{train: 300}}\nsteps: 3\noptimizer: {lr: 1e-3, groups: {norms: 0.03, "
                            "biases: 0.04}}\nbatch: {sequences: 8, "
                            "length: 16, leaves: "
                            "8}\n",
                            "optimizer.groups"),
                     WEFT_ERROR_INVALID);
    g_autofree char *filler = g_strnfill(70000, ' ');
    g_autofree char *large = g_strconcat(SPEC, "#", filler, "\n", NULL);
    assert_int_equal(submit(s, large, "too large"), WEFT_ERROR_INVALID);
    assert_int_equal(cancel(s, "chat"), WEFT_ERROR_NOT_FOUND);
    assert_n_jobs(s, 0);
}

/* A job that cannot be written down is not there, now or later. */
static void test_disk_fails(void **state)
{
    SimCluster *s = *state;
    sim_cluster_model(s);
    store_disk_fail_after(s->disk, 0);
    assert_int_equal(submit(s, SPEC, NULL), WEFT_ERROR_IO);
    assert_n_jobs(s, 0);
    store_disk_fail_after(s->disk, -1);
    sim_cluster_stop(s);
    sim_cluster_start(s);
    assert_n_jobs(s, 0);
}

static void test_restart(void **state)
{
    SimCluster *s = *state;
    Answer a = {0};
    sim_cluster_model(s);
    start_workers(s, 1);
    /* Memory for fewer streams than the file allows: the plan stays below its bound. */
    const char *spec = SPEC "limits: {streams: 500}\nkv: {memory: 1M}\n";
    assert_int_equal(submit(s, spec, NULL), 0);
    sim_run_for(s, 2 * SECOND);
    assert_string_equal(list(s, &a)->jobs[0]->state, "ready");
    assert_string_equal(list(s, &a)->jobs[0]->owner, "tester");
    g_autofree char *job = g_strdup(list(s, &a)->jobs[0]->job);
    assert_int_equal(submit(s, SPEC, "another name"), WEFT_ERROR_INVALID);
    sim_cluster_stop(s);
    sim_run_for(s, 2 * SECOND); /* shorter than workers keep what they hold */
    sim_cluster_start(s);
    sim_run_for(s, 3 * SECOND);
    const Weft__V1__Submission *again = list(s, &a)->jobs[0];
    assert_string_equal(again->state, "ready");
    assert_string_equal(again->job, job);
    assert_int_equal(s->workers[0].n_loads, 1);
    store_disk_fail_after(s->disk, 0);
    assert_int_equal(cancel(s, "chat"), WEFT_ERROR_IO);
    store_disk_fail_after(s->disk, -1);
    assert_string_equal(list(s, &a)->jobs[0]->state, "ready"); /* it goes on */
    assert_int_equal(cancel(s, job), 0);
    sim_run_for(s, SECOND);
    assert_n_jobs(s, 0);
    assert_int_equal(s->workers[0].held->len, 0);
    sim_cluster_stop(s);
    sim_cluster_start(s);
    assert_n_jobs(s, 0);
    answer_clear(&a);
}

/* No worker is there at first: the job waits, and says for what. */
static void test_waits_for_workers(void **state)
{
    SimCluster *s = *state;
    Answer a = {0};
    sim_cluster_model(s);
    assert_int_equal(submit(s, SPEC, NULL), 0);
    sim_run_for(s, 10 * SECOND);
    assert_string_equal(list(s, &a)->jobs[0]->state, "waiting");
    assert_true(list(s, &a)->jobs[0]->reason[0] != '\0');
    start_workers(s, 1);
    sim_run_for(s, 10 * SECOND);
    assert_string_equal(list(s, &a)->jobs[0]->state, "ready");
    answer_clear(&a);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_refused, cluster_set_up, cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_disk_fails, cluster_set_up, cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_restart, cluster_set_up, cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_waits_for_workers, cluster_set_up, cluster_tear_down),
    };
    return cmocka_run_group_tests_name("coordinator submissions", tests, NULL, NULL);
}
