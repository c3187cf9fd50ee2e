/* Admin.Why: what requests and jobs wait for, at each point of their way. The real coordinator
 * under virtual time. */
#include "tests/unit/coordinator/sim_streams.h"

#include "proto/base/error.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

static const Weft__V1__WhyResponse *ask(SimCluster *s, Answer *a, const char *what)
{
    Weft__V1__WhyRequest request = WEFT__V1__WHY_REQUEST__INIT;
    request.what = (char *)what;
    sim_call(s, a, &weft__v1__admin__descriptor, "Why", &request);
    sim_answer(s, a, SECOND);
    return (const Weft__V1__WhyResponse *)a->message;
}

/* The one request or job that there is; borrowed from a. */
static const Weft__V1__Reason *only(SimCluster *s, Answer *a, const char *kind)
{
    const Weft__V1__WhyResponse *response = ask(s, a, "");
    const Weft__V1__Reason *found = NULL;
    g_assert_no_error(a->error);
    for (size_t i = 0; i < response->n_reasons; i++) {
        if (strcmp(response->reasons[i]->kind, kind) == 0) {
            assert_null(found);
            found = response->reasons[i];
        }
    }
    assert_non_null(found);
    return found;
}

static const Weft__V1__Wait *wait_between(const Weft__V1__Reason *r, const char *waiter,
                                          const char *waits_for)
{
    for (size_t i = 0; i < r->n_waits; i++) {
        if (strcmp(r->waits[i]->waiter, waiter) == 0 &&
            strcmp(r->waits[i]->waits_for, waits_for) == 0) {
            return r->waits[i];
        }
    }
    return NULL;
}

static void assert_has(const char *text, const char *part)
{
    if (strstr(text, part) == NULL) {
        fail_msg("'%s' lacks '%s'", text, part);
    }
}

/* ---- names ---- */

static void test_unknown(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 1);
    Answer a = {0}, run = {0};
    ask(s, &a, "r-12345678");
    assert_int_equal(a.error->code, WEFT_ERROR_NOT_FOUND);
    assert_has(a.error->message, "'r-12345678': `weft why` alone lists the 0");
    begin(s, &run, 1, 1);
    sim_run_for(s, 300000);
    g_autofree char *id = g_strdup(only(s, &a, "request")->id);
    g_autofree char *near = g_strdup(id);
    near[4] = near[4] == '0' ? '1' : '0';
    ask(s, &a, near);
    assert_int_equal(a.error->code, WEFT_ERROR_NOT_FOUND);
    g_autofree char *meant = g_strdup_printf("did you mean %s?", id);
    assert_has(a.error->message, meant);
    const Weft__V1__WhyResponse *one = ask(s, &a, id);
    assert_int_equal(one->n_reasons, 1);
    assert_string_equal(one->reasons[0]->id, id);
    sim_answer(s, &run, 10 * SECOND);
    ask(s, &a, id); /* it has ended */
    assert_int_equal(a.error->code, WEFT_ERROR_NOT_FOUND);
    answer_clear(&run);
    answer_clear(&a);
}

static void ask_as(SimCluster *s, const char *role, int code)
{
    g_autofree char *certificate = rpc_inproc_certificate("somebody", role, NULL);
    RpcChannelOptions options = {
        .target = CONTROL,
        .credentials = {.ca_pem = s->ca_pem, .certificate_pem = certificate, .key_pem = "key"},
        .server_name = "weft-coordinator"};
    RpcChannel *admin = s->admin;
    Answer a = {0};
    s->admin = rpc_channel_new(s->transport, s->client_loop, &options, NULL);
    ask(s, &a, "");
    assert_int_equal(a.error != NULL ? a.error->code : 0, code);
    rpc_channel_free(s->admin);
    s->admin = admin;
    answer_clear(&a);
}

static void test_roles(void **state)
{
    SimCluster *s = *state;
    ask_as(s, "admin", 0);
    ask_as(s, "submit", 0);
    ask_as(s, "probe", WEFT_ERROR_DENIED);
    ask_as(s, "worker", WEFT_ERROR_DENIED);
}

/* ---- on the way to a replica ---- */

/* A load that goes on until the test ends it. */
static bool hold_load(RpcCall *call, const ProtobufCMessage *request, void *user)
{
    RpcCall **held = user;
    if (request->descriptor != &weft__v1__load_request__descriptor) {
        return false;
    }
    *held = rpc_call_ref(call);
    Weft__V1__LoadProgress progress = WEFT__V1__LOAD_PROGRESS__INIT;
    progress.bytes_done = 30 << 20;
    progress.bytes_total = 120 << 20;
    rpc_call_send(call, &progress.base);
    return true;
}

static void test_loading(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 2);
    Answer a = {0}, first = {0}, second = {0};
    RpcCall *held = NULL;
    s->workers[1].answer = hold_load;
    s->workers[1].answer_user = &held;
    begin(s, &first, 2, 1);
    sim_run_for(s, 2 * SECOND);
    const Weft__V1__Reason *job = only(s, &a, "job");
    assert_string_equal(job->state, "loading");
    assert_string_equal(job->text, "1 of 2 ranks are loaded");
    assert_int_equal(job->n_waits, 1);
    g_autofree char *id = g_strdup(job->id);
    const Weft__V1__Wait *w = wait_between(job, id, "w1");
    assert_string_equal(w->what, "load: 30.0 MiB of 120 MiB");
    assert_in_range(w->since_ms, 1500, 2000);
    const Weft__V1__Reason *request = only(s, &a, "request");
    assert_string_equal(request->state, "waiting");
    assert_string_equal(request->job, id);
    assert_false(request->placed);
    assert_int_equal(request->n_waits, 2);
    assert_non_null(wait_between(request, request->id, id));
    assert_string_equal(wait_between(request, id, "w1")->what, "load: 30.0 MiB of 120 MiB");
    begin(s, &second, 2, 1);
    sim_run_for(s, SECOND);
    const Weft__V1__WhyResponse *all = ask(s, &a, "");
    assert_int_equal(all->n_reasons, 3);
    assert_string_equal(all->reasons[1]->waits[0]->what, "a replica, after 1 requests");
    s->workers[1].answer = NULL;
    g_autoptr(GError) broken = g_error_new(WEFT_ERROR, WEFT_ERROR_IO, "disk full");
    rpc_call_finish(held, broken);
    rpc_call_unref(held);
    sim_answer(s, &first, SECOND);
    sim_answer(s, &second, SECOND);
    job = only(s, &a, "job");
    assert_string_equal(job->state, "failed");
    assert_has(job->text, "disk full");
    answer_clear(&first);
    answer_clear(&second);
    answer_clear(&a);
}

/* ---- at work ---- */

static void test_running(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 1);
    Answer a = {0}, run = {0};
    begin(s, &run, 1, 1);
    sim_run_for(s, 500000);
    const Weft__V1__Reason *r = only(s, &a, "request");
    assert_string_equal(r->state, "running");
    assert_in_range(r->tokens, 10, N_TOKENS - 10);
    assert_true(r->placed);
    assert_int_equal(r->epoch, 1);
    assert_int_equal(r->n_waits, 1);
    g_autofree char *next = g_strdup_printf("token %u", r->tokens + 1);
    assert_string_equal(wait_between(r, r->id, "w0")->what, next);
    assert_in_range(wait_between(r, r->id, "w0")->since_ms, 0, 25);
    assert_string_equal(r->cause, "");
    r = only(s, &a, "job");
    assert_string_equal(r->state, "serving");
    assert_has(r->text, "1 requests have a replica, 0 wait for one");
    sim_answer(s, &run, 10 * SECOND);
    assert_has(only(s, &a, "job")->text, "0 requests have a replica");
    answer_clear(&run);
    answer_clear(&a);
}

/* A frozen follower: its leader waits for it; then it is silent itself; then it is lost, and the
 * request goes on as soon as there is a place. */
static void test_frozen_worker(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 2);
    Answer want = {0}, a = {0}, run = {0};
    undisturbed(s, &want, 2, 1);
    begin(s, &run, 2, 1);
    sim_run_for(s, 500000);
    FakeWorker *frozen = follower_of(s), *leader = leader_of(s);
    sim_worker_freeze(frozen, true);
    leader->stands = true;
    report_wait(leader, frozen->name, "tokens of a step", 700, false);
    sim_run_for(s, 2 * SECOND);
    const Weft__V1__Reason *r = only(s, &a, "request");
    assert_string_equal(r->state, "running");
    assert_string_equal(wait_between(r, "coordinator", frozen->name)->what, "a heartbeat");
    assert_in_range(wait_between(r, "coordinator", frozen->name)->since_ms, 1500, 2600);
    const Weft__V1__Wait *edge = wait_between(r, leader->name, frozen->name);
    assert_string_equal(edge->what, "tokens of a step");
    assert_true(edge->sink);
    assert_in_range(edge->since_ms, 700, 1300);
    assert_in_range(wait_between(r, r->id, leader->name)->since_ms, 1900, 2100);

    sim_run_for(s, 6 * SECOND); /* lost; one worker is too few for two stages */
    r = only(s, &a, "request");
    assert_string_equal(r->state, "resuming");
    assert_has(r->cause, frozen->name);
    assert_has(r->cause, "lost during tokens of a step: no heartbeat for 4500 ms");
    assert_in_range(r->stalled_ms, 7000, 8500);
    assert_has(r->text, "its job is waiting: at most 60 s for workers: ");
    assert_true(r->tokens_again > 0);
    const char *job = r->job;
    assert_non_null(wait_between(r, r->id, job));
    assert_non_null(wait_between(r, job, "workers"));
    assert_string_equal(wait_between(r, job, frozen->name)->what,
                        "it is lost: no heartbeat for 4500 ms");
    r = only(s, &a, "job");
    assert_string_equal(r->state, "waiting");
    assert_has(r->cause, frozen->name);

    g_ptr_array_set_size(leader->waiting, 0);
    leader->stands = false;
    sim_worker_freeze(frozen, false);
    sim_answer(s, &run, 20 * SECOND);
    assert_same(&run, &want);
    answer_clear(&run);
    answer_clear(&want);
    answer_clear(&a);
}

/* w2 waits for w1, w1 for w0: the sink is w0, for both. */
static void test_chain(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 4);
    Answer a = {0}, run = {0};
    begin(s, &run, 2, 2);
    sim_run_for(s, 200000);
    report_wait(&s->workers[2], "w1", "step 7 from stage 1", 300, false);
    report_wait(&s->workers[1], "w0", "all-reduce of layer 3", 400, false);
    sim_run_for(s, 600000);
    const Weft__V1__Reason *r = only(s, &a, "request");
    assert_false(wait_between(r, "w2", "w1")->sink);
    assert_true(wait_between(r, "w1", "w0")->sink);
    assert_string_equal(wait_between(r, "w1", "w0")->what, "all-reduce of layer 3");
    g_ptr_array_set_size(s->workers[1].waiting, 0);
    g_ptr_array_set_size(s->workers[2].waiting, 0);
    sim_answer(s, &run, 10 * SECOND);
    answer_clear(&run);
    answer_clear(&a);
}

/* An engine that stands still is said by its worker; the request says so until it has a token. */
static void test_resumed_without_a_token(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 1);
    Answer a = {0}, run = {0};
    begin(s, &run, 1, 1);
    sim_run_for(s, 500000);
    Weft__V1__Held *held = g_ptr_array_index(s->workers[0].held, 0);
    s->workers[0].stands = true;
    free(held->state);
    held->state = strdup("failed");
    held->error = strdup("its engine stands still with work to do");
    sim_run_for(s, 3 * SECOND);
    const Weft__V1__Reason *r = only(s, &a, "request");
    assert_string_equal(r->state, "resuming");
    assert_string_equal(r->cause, "worker w0 failed: its engine stands still with work to do");
    assert_true(r->placed && r->epoch == 3);
    assert_true(r->predicted_s > 0);
    assert_in_range(r->stalled_ms, 2500, 3100);
    s->workers[0].stands = false;
    sim_run_for(s, 100000);
    r = only(s, &a, "request");
    assert_string_equal(r->state, "running");
    assert_string_equal(r->cause, "");
    sim_answer(s, &run, 10 * SECOND);
    answer_clear(&run);
    answer_clear(&a);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_unknown, cluster_set_up, cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_roles, cluster_set_up, cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_loading, cluster_set_up, cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_running, cluster_set_up, cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_frozen_worker, cluster_set_up, cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_chain, cluster_set_up, cluster_tear_down),
        cmocka_unit_test_setup_teardown(test_resumed_without_a_token, cluster_set_up,
                                        cluster_tear_down),
    };
    return cmocka_run_group_tests_name("coordinator why", tests, NULL, NULL);
}
