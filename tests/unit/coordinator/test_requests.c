/* Requests to the coordinator as a whole under virtual time: what they get, what is refused, how
 * they end. */
#include "coordinator/gateway/requests/run.h"
#include "proto/base/error.h"
#include "tests/unit/coordinator/sim_streams.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

static void test_run_and_reuse(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 2);
    Answer a = {0}, b = {0};
    run_ok(s, &a, 2, 1);
    assert_string_equal(a.run_done->finish_reason, "length");
    assert_int_equal(a.run_done->digest.len, 16);
    assert_int_equal(a.started->prompt_tokens, 5);
    assert_int_equal(a.started->plan->replicas[0]->n_stages, 2);
    assert_int_equal(strlen(a.text->str), 5);
    assert_true(a.n_progress > 0);
    assert_int_equal(s->workers[0].n_loads + s->workers[1].n_loads, 2);
    assert_string_equal(state_of(s, "w0"), "serving");
    run_ok(s, &b, 2, 1);
    assert_memory_equal(a.run_done->digest.data, b.run_done->digest.data, 16);
    assert_int_equal(s->workers[0].n_loads + s->workers[1].n_loads, 2);
    sim_run_for(s, SECOND);
    assert_int_equal(s->workers[0].n_keep, 1);
    assert_null(strstr(s->log->str, "hello"));
    answer_clear(&a);
    answer_clear(&b);
}

static void expect_error(SimCluster *s, Weft__V1__RunRequest *request, int code, const char *needle)
{
    Answer a = {0};
    request->model = (char *)sim_cluster_model(s);
    sim_call(s, &a, &weft__v1__serve__descriptor, "Run", request);
    sim_answer(s, &a, 10 * SECOND);
    assert_non_null(a.error);
    assert_int_equal(a.error->code, code);
    if (strstr(a.error->message, needle) == NULL) {
        fail_msg("'%s' is not in '%s'", needle, a.error->message);
    }
    answer_clear(&a);
}

static void expect_invalid(SimCluster *s, Weft__V1__RunRequest *request, const char *needle)
{
    expect_error(s, request, WEFT_ERROR_INVALID, needle);
}

static void test_bad_requests(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 1);
    g_autofree char *text = g_strnfill(70, 'x');
    Weft__V1__RunRequest request = WEFT__V1__RUN_REQUEST__INIT;
    request.prompt = text;
    request.max_tokens = 1;
    expect_error(s, &request, WEFT_ERROR_TOO_LONG,
                 "prompt of 70 tokens does not fit the context of 64");
    request.prompt = (char *)"x";
    request.context = 1000;
    expect_invalid(s, &request, "context 1000 is beyond the model's 64");
    request.context = 0;
    request.prompt = (char *)"";
    expect_invalid(s, &request, "too short");
    uint32_t id = 5000;
    request.prompt_ids = &id;
    request.n_prompt_ids = 1;
    expect_invalid(s, &request, "id 5000");
    Answer a = {0};
    request.model = (char *)"../../etc/passwd";
    sim_call(s, &a, &weft__v1__serve__descriptor, "Run", &request);
    sim_answer(s, &a, SECOND);
    assert_true(a.error->code == WEFT_ERROR_DENIED || a.error->code == WEFT_ERROR_NOT_FOUND);
    answer_clear(&a);
}

static size_t n_jobs(SimCluster *s)
{
    Answer a = {0};
    sim_status(s, &a, "");
    const Weft__V1__StatusResponse *status = (const Weft__V1__StatusResponse *)a.message;
    size_t n = status->n_jobs;
    answer_clear(&a);
    return n;
}

static void test_no_worker_and_impossible_layout(void **state)
{
    SimCluster *s = *state;
    Answer a = {0};
    sim_run_begin(s, &a, "hello", 5, 0, 0);
    sim_answer(s, &a, 10 * SECOND);
    assert_int_equal(a.error->code, WEFT_ERROR_IMPOSSIBLE);
    start_workers(s, 1);
    sim_run_begin(s, &a, "hello", 5, 2, 1);
    sim_answer(s, &a, 10 * SECOND);
    assert_int_equal(a.error->code, WEFT_ERROR_IMPOSSIBLE);
    assert_int_equal(n_jobs(s), 0); /* what was refused is no job */
    run_ok(s, &a, 1, 1);
    assert_int_equal(n_jobs(s), 1);
    answer_clear(&a);
}

/* Of jobs that no worker holds any more the last 50 are listed. */
static void test_ended_jobs_are_bounded(void **state)
{
    SimCluster *s = *state;
    s->workers[0].memory_bytes = UINT64_C(8) << 30;
    start_workers(s, 1);
    Weft__V1__RunRequest request = WEFT__V1__RUN_REQUEST__INIT;
    request.model = (char *)sim_cluster_model(s);
    request.prompt = (char *)"hello";
    request.max_tokens = 1;
    for (uint32_t i = 0; i < 55; i++) {
        Answer a = {0};
        request.context = 10 + i; /* each another job */
        sim_call(s, &a, &weft__v1__serve__descriptor, "Run", &request);
        sim_answer(s, &a, 10 * SECOND);
        g_assert_no_error(a.error);
        answer_clear(&a);
    }
    assert_int_equal(n_jobs(s), 55);
    sim_worker_kill(&s->workers[0]);
    sim_run_for(s, 2 * SECOND);
    assert_int_equal(n_jobs(s), 50);
    /* the one that was used last is still there */
    Answer a = {0};
    sim_status(s, &a, "");
    const Weft__V1__StatusResponse *status = (const Weft__V1__StatusResponse *)a.message;
    g_autofree char *last = g_strdup(status->jobs[49]->id);
    answer_clear(&a);
    sim_worker_start(s, 0);
    sim_run_for(s, 2 * SECOND);
    sim_call(s, &a, &weft__v1__serve__descriptor, "Run", &request);
    sim_answer(s, &a, 10 * SECOND);
    g_assert_no_error(a.error);
    answer_clear(&a);
    assert_int_equal(n_jobs(s), 50);
    sim_status(s, &a, "");
    status = (const Weft__V1__StatusResponse *)a.message;
    assert_string_equal(status->jobs[49]->id, last);
    assert_string_equal(status->jobs[49]->state, "ready");
    answer_clear(&a);
}

static void test_stop_string(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 1);
    Answer a = {0};
    run_ok(s, &a, 1, 1);
    char stop[3] = {a.text->str[2], a.text->str[3], 0};
    char before[3] = {a.text->str[0], a.text->str[1], 0};
    char *stops[] = {stop};
    SimRequest request;
    sim_request_init(s, &request, "hello", 20, 1, 1, 1);
    request.run.stop = stops;
    request.run.n_stop = 1;
    sim_request_begin(s, &a, &request);
    sim_answer(s, &a, 10 * SECOND);
    g_assert_no_error(a.error);
    assert_string_equal(a.text->str, before);
    assert_string_equal(a.run_done->finish_reason, "stop");
    assert_int_equal(a.ids->len, 4);
    answer_clear(&a);
}

static void test_score_windows(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 1);
    g_autofree char *text = g_strnfill(45, 'y');
    Weft__V1__RunRequest request = WEFT__V1__RUN_REQUEST__INIT;
    request.kind = WEFT__V1__REQUEST_KIND__SCORE;
    request.model = (char *)sim_cluster_model(s);
    request.prompt = text;
    request.score_window = 8;
    Answer a = {0};
    sim_call(s, &a, &weft__v1__serve__descriptor, "Run", &request);
    sim_answer(s, &a, 20 * SECOND);
    g_assert_no_error(a.error);
    assert_int_equal(a.run_done->tokens_scored,
                     5 * 4); /* five whole windows, second half of each */
    assert_true(a.run_done->nll_sum == 20.0);
    assert_int_equal(a.started->prompt_tokens, 45);
    answer_clear(&a);
    text[9] = '\0'; /* one window, on a replica that would take more at once */
    sim_call(s, &a, &weft__v1__serve__descriptor, "Run", &request);
    sim_answer(s, &a, 20 * SECOND);
    g_assert_no_error(a.error);
    assert_int_equal(a.run_done->tokens_scored, 4);
    answer_clear(&a);
}

static void test_duplicate_tokens(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 1);
    Answer a = {0};
    s->workers[0].repeat = 1;
    run_ok(s, &a, 1, 1);
    s->workers[0].repeat = 2;
    sim_run_begin(s, &a, "hello", 5, 1, 1);
    sim_answer(s, &a, 10 * SECOND);
    assert_int_equal(a.error->code, WEFT_ERROR_NUMERICS);
    answer_clear(&a);
}

static void test_cancel_reaches_the_leader(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 1);
    s->workers[0].silent = true;
    Answer a = {0};
    sim_run_begin(s, &a, "hello", 5, 1, 1);
    sim_run_for(s, 2 * SECOND);
    assert_int_equal(s->workers[0].streams->len, 1);
    rpc_client_cancel(a.call);
    sim_run_for(s, SECOND);
    assert_int_equal(s->workers[0].streams->len, 0);
    s->workers[0].silent = false;
    run_ok(s, &a, 1, 1);
    answer_clear(&a);
}

/* Notes the deadline that a leader is told; answers nothing itself. */
static bool note_deadline(RpcCall *call, const ProtobufCMessage *request, void *user)
{
    if (request->descriptor == &weft__v1__generate_request__descriptor) {
        *(uint64_t *)user = ((const Weft__V1__GenerateRequest *)request)->deadline_ms;
    }
    return false;
}

static void test_deadline(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 1);
    uint64_t told = 1;
    Answer a = {0};
    s->workers[0].answer = note_deadline;
    s->workers[0].answer_user = &told;
    run_ok(s, &a, 1, 1);
    answer_clear(&a);
    assert_true(told == 0);
    s->workers[0].silent = true;
    SimRequest request;
    sim_request_init(s, &request, "x", 3, 0, 0, 0);
    request.run.deadline_ms = 1500;
    a = (Answer){0};
    sim_request_begin(s, &a, &request);
    sim_answer(s, &a, 2 * SECOND);
    assert_int_equal(a.error->code, WEFT_ERROR_DEADLINE);
    assert_in_range(told, 1, 1500); /* what was left when it was asked */
    sim_run_for(s, SECOND);
    assert_int_equal(s->workers[0].streams->len, 0);
    answer_clear(&a);
    s->workers[0].silent = false;
    request.run.deadline_ms = INT64_MAX / 1000 - 1; /* later than the clock can say: none */
    sim_request_begin(s, &a, &request);
    sim_answer(s, &a, 20 * SECOND);
    g_assert_no_error(a.error);
    answer_clear(&a);
}

/* The pool is still at it when the requests are freed, and the random source with them; or when the
 * run is counted, explained or ended: it has no choices then. */
static void test_random_prompt_of_an_orphan(void **state)
{
    Weft__V1__RunRequest request = WEFT__V1__RUN_REQUEST__INIT;
    ModelSpec spec = {.vocab_size = 100};
    Model model = {.spec = &spec};
    request.random_prompt = 40;
    request.streams = 3;
    Run run = {.owner = NULL, .request = &request, .model = &model, .context = 64, .ids_seed = 5};
    Encoded out = {0};
    run_encode(&run, &out);
    assert_true(run.encoded.n_choices == 0 && run.encoded.error == NULL);
    g_assert_no_error(out.error);
    assert_int_equal(out.n_choices, 3);
    assert_int_equal(out.n_ids, 120);
    assert_memory_not_equal(out.choices[0].prompt, out.choices[1].prompt, 40 * sizeof(uint32_t));
    for (uint32_t i = 0; i < out.n_ids; i++) {
        assert_true(out.ids[i] < spec.vocab_size);
    }
    g_free(out.choices);
    g_free(out.ids);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
#define CASE(f) cmocka_unit_test_setup_teardown(f, cluster_set_up, cluster_tear_down)
        CASE(test_run_and_reuse),
        CASE(test_bad_requests),
        CASE(test_no_worker_and_impossible_layout),
        CASE(test_ended_jobs_are_bounded),
        CASE(test_stop_string),
        CASE(test_score_windows),
        CASE(test_duplicate_tokens),
        CASE(test_cancel_reaches_the_leader),
        CASE(test_deadline),
        cmocka_unit_test(test_random_prompt_of_an_orphan),
    };
    return cmocka_run_group_tests_name("coordinator requests", tests, NULL, NULL);
}
