/* The coordinator as a whole under virtual time: members come and go, replicas and the coordinator
 * die. What requests get: test_requests.c; what becomes of a stream after a death: test_recovery.c.
 */
#include "tests/unit/coordinator/sim_streams.h"

#include "proto/base/error.h"
#include "proto/plan/plan.h"
#include "proto/base/version.h"
#include "transport/crypto/x509.h"
#include "weft/v1/join.pb-c.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

/* ---- members ---- */

static void test_attach_and_status(void **state)
{
    SimCluster *s = *state;
    FakeWorker *w = sim_worker_start(s, 0);
    sim_run_for(s, 2 * SECOND);
    assert_string_equal(state_of(s, "w0"), "ready");
    assert_int_equal(w->n_welcomes, 1);
    assert_int_equal(w->generation, 1);
}

static void test_silent_worker_is_lost_in_time(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 1);
    sim_worker_freeze(&s->workers[0], true);
    sim_run_for(s, 3900000);
    assert_string_equal(state_of(s, "w0"), "ready");
    sim_run_for(s, 700000);
    assert_string_equal(state_of(s, "w0"), "lost");
    sim_worker_freeze(&s->workers[0], false);
    sim_run_for(s, 2 * SECOND);
    assert_string_equal(state_of(s, "w0"), "ready");
}

static void test_killed_worker_is_lost_after_half_a_second(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 1);
    sim_worker_kill(&s->workers[0]);
    sim_run_for(s, 300000);
    assert_string_equal(state_of(s, "w0"), "ready");
    sim_run_for(s, 400000);
    assert_string_equal(state_of(s, "w0"), "lost");
}

/* A connection that breaks and comes back within half a second costs nothing. */
static void test_blip_is_survived(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 1);
    Answer a = {0};
    run_ok(s, &a, 1, 1);
    rpc_inproc_set_fault(s->transport, "w0", CONTROL, RPC_INPROC_CUT);
    sim_run_for(s, 100000);
    rpc_inproc_set_fault(s->transport, "w0", CONTROL, RPC_INPROC_UP);
    sim_run_for(s, 2 * SECOND);
    assert_string_equal(state_of(s, "w0"), "serving");
    assert_null(strstr(s->log->str, "lost"));
    run_ok(s, &a, 1, 1);
    assert_int_equal(s->workers[0].n_loads, 1);
    answer_clear(&a);
}

static void test_version_skew_names_both(void **state)
{
    SimCluster *s = *state;
    s->workers[0].protocol_version = 77;
    FakeWorker *w = sim_worker_start(s, 0);
    sim_run_for(s, SECOND);
    assert_non_null(w->refused);
    assert_int_equal(w->refused->code, WEFT_ERROR_VERSION);
    assert_non_null(strstr(w->refused->message, "protocol 77"));
    g_autofree char *ours = g_strdup_printf("protocol %u", WEFT_PROTOCOL_VERSION);
    assert_non_null(strstr(w->refused->message, ours));
    assert_string_equal(state_of(s, "w0"), "joined");
}

/* Class exact on a device needs the name of whose bits it gives, within bounds. */
static void test_devices_name_their_kind(void **state)
{
    SimCluster *s = *state;
    char too_long[EXACT_KIND_BYTES + 1] = "";
    char *kinds[] = {(char *)"", too_long};
    memset(too_long, 'k', EXACT_KIND_BYTES);
    for (unsigned i = 0; i < G_N_ELEMENTS(kinds); i++) {
        Weft__V1__Device device = WEFT__V1__DEVICE__INIT, *devices[] = {&device};
        device.kind = (char *)"cuda";
        device.exact_kind = kinds[i];
        s->workers[i].devices = devices;
        s->workers[i].n_devices = 1;
        FakeWorker *w = sim_worker_start(s, i);
        sim_run_for(s, SECOND);
        if (w->refused == NULL) {
            fail_msg("kind %u was let in: %s", i, s->log->str);
        }
        assert_int_equal(w->refused->code, WEFT_ERROR_VERSION);
        assert_non_null(strstr(w->refused->message, "offers numerics exact on cuda:0"));
        sim_worker_kill(w);
        s->workers[i].devices = NULL;
        s->workers[i].n_devices = 0;
    }
}

/* A worker that leads two devices of one kind, and a host: an exact plan is of the devices, by each
 * one's own figures; a layout that takes both kinds is refused, with what each has. */
static void test_exact_on_devices(void **state)
{
    SimCluster *s = *state;
    Weft__V1__Measured fast = WEFT__V1__MEASURED__INIT, slow = WEFT__V1__MEASURED__INIT;
    Weft__V1__Device a = WEFT__V1__DEVICE__INIT, b = WEFT__V1__DEVICE__INIT, *devices[] = {&a, &b};
    fast.read_bytes_per_s = 4e12;
    slow.read_bytes_per_s = 1e12;
    fast.int8_ops_per_s = fast.f32_ops_per_s = slow.int8_ops_per_s = slow.f32_ops_per_s = 1e14;
    a.kind = b.kind = (char *)"cuda";
    a.exact_kind = b.exact_kind = (char *)"NVIDIA H200, sm_90";
    a.budget_bytes = b.budget_bytes = (uint64_t)64 << 30;
    b.index = 1;
    a.measured = &slow;
    b.measured = &fast;
    s->workers[0].devices = devices;
    s->workers[0].n_devices = 2;
    start_workers(s, 2);
    Weft__V1__PlanRequest request = WEFT__V1__PLAN_REQUEST__INIT;
    request.model = (char *)sim_cluster_model(s);
    Answer answer = {0};
    sim_call(s, &answer, &weft__v1__admin__descriptor, "Plan", &request);
    sim_answer(s, &answer, 5 * SECOND);
    g_assert_no_error(answer.error);
    const Weft__V1__PlanResponse *r = (const Weft__V1__PlanResponse *)answer.message;
    assert_non_null(r->plan);
    assert_string_equal(r->plan->definition->exact_kind, "NVIDIA H200, sm_90");
    assert_string_equal(r->plan->replicas[0]->stages[0]->ranks[0]->worker, "w0");
    assert_int_equal(r->plan->replicas[0]->stages[0]->ranks[0]->device, 1); /* the faster one */
    answer_clear(&answer);
    Weft__V1__Layout layout = WEFT__V1__LAYOUT__INIT;
    layout.pp = 3;
    layout.tp = 1;
    request.layout = &layout;
    sim_call(s, &answer, &weft__v1__admin__descriptor, "Plan", &request);
    sim_answer(s, &answer, 5 * SECOND);
    g_assert_no_error(answer.error);
    r = (const Weft__V1__PlanResponse *)answer.message;
    assert_null(r->plan);
    assert_non_null(strstr(r->violations[0], "hosts' cores (1), NVIDIA H200, sm_90 (2)"));
    answer_clear(&answer);
    s->workers[0].devices = NULL;
    s->workers[0].n_devices = 0;
}

static void test_revoke_acts_at_once(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 2);
    Answer a = {0};
    Weft__V1__RevokeRequest request = WEFT__V1__REVOKE_REQUEST__INIT;
    request.node = (char *)"w0";
    sim_call(s, &a, &weft__v1__admin__descriptor, "Revoke", &request);
    sim_answer(s, &a, SECOND);
    g_assert_no_error(a.error);
    answer_clear(&a);
    assert_string_equal(state_of(s, "w0"), "revoked");
    sim_run_for(s, 2 * SECOND);
    assert_non_null(s->workers[0].refused);
    assert_int_equal(s->workers[0].refused->code, WEFT_ERROR_DENIED);
    request.node = (char *)"nobody";
    sim_call(s, &a, &weft__v1__admin__descriptor, "Revoke", &request);
    sim_answer(s, &a, SECOND);
    assert_int_equal(a.error->code, WEFT_ERROR_NOT_FOUND);
    answer_clear(&a);
}

/* ---- join ---- */

static char *create_token(SimCluster *s, const char *role, uint64_t ttl_ms, uint32_t uses)
{
    Answer a = {0};
    Weft__V1__CreateTokenRequest request = WEFT__V1__CREATE_TOKEN_REQUEST__INIT;
    request.role = (char *)role;
    request.ttl_ms = ttl_ms;
    request.uses = uses;
    sim_call(s, &a, &weft__v1__admin__descriptor, "CreateToken", &request);
    sim_answer(s, &a, SECOND);
    g_assert_no_error(a.error);
    char *token = g_strdup(((Weft__V1__CreateTokenResponse *)a.message)->token);
    answer_clear(&a);
    return token;
}

static void join_with(SimCluster *s, Answer *a, const char *token, const char *name)
{
    answer_clear(a);
    g_autofree char *key = x509_new_key(NULL);
    g_autofree char *csr = x509_new_request(key, name, NULL);
    RpcChannelOptions options = {
        .target = JOIN, .credentials = {.ca_pem = s->ca_pem}, .server_name = "weft-coordinator"};
    RpcChannel *channel = rpc_channel_new(s->transport, s->client_loop, &options, NULL);
    Weft__V1__JoinRequest request = WEFT__V1__JOIN_REQUEST__INIT;
    request.protocol_version = WEFT_PROTOCOL_VERSION;
    request.token = (char *)token;
    request.name = (char *)name;
    request.csr_pem = (ProtobufCBinaryData){strlen(csr), (uint8_t *)csr};
    RpcChannel *admin = s->admin;
    s->admin = channel;
    sim_call(s, a, &weft__v1__join__descriptor, "Join", &request);
    s->admin = admin;
    sim_world_run_until(s->world, &a->done, 500000);
    if (!a->done) { /* nobody listens: the call waits for a connection */
        rpc_client_cancel(a->call);
        sim_answer(s, a, SECOND);
    }
    rpc_channel_free(channel);
}

static void test_join_once(void **state)
{
    SimCluster *s = *state;
    g_autofree char *token = create_token(s, "worker", 60000, 2);
    Answer a = {0};
    join_with(s, &a, token, "Node 7!");
    g_assert_no_error(a.error);
    const Weft__V1__JoinResponse *response = (const Weft__V1__JoinResponse *)a.message;
    assert_string_equal(response->name, "node7");
    assert_string_equal(response->role, "worker");
    g_autofree char *pem =
        g_strndup((char *)response->certificate_pem.data, response->certificate_pem.len);
    X509Info info = {0};
    assert_true(x509_parse(pem, &info, NULL));
    assert_string_equal(info.name, "node7");
    assert_string_equal(info.role, "worker");
    int64_t life_us = info.not_after_us - loop_wall_us(s->client_loop);
    assert_in_range(life_us / SECOND, 7 * 24 * 3600 - 10, 7 * 24 * 3600);
    x509_info_clear(&info);
    assert_string_equal(state_of(s, "node7"), "joined");
    join_with(s, &a, "weft-0000", "x");
    assert_int_equal(a.error->code, WEFT_ERROR_DENIED);
    join_with(s, &a, token, "node7");
    g_assert_no_error(a.error);
    assert_string_equal(((const Weft__V1__JoinResponse *)a.message)->name, "node7-2");
    /* Within the moment that the door stays open the token is refused by name; then nobody listens.
     */
    join_with(s, &a, token, "node7");
    assert_int_equal(a.error->code, WEFT_ERROR_DENIED);
    assert_non_null(strstr(a.error->message, "used up"));
    sim_run_for(s, 2 * SECOND);
    join_with(s, &a, token, "node7");
    assert_int_equal(a.error->code, WEFT_ERROR_CANCELLED);
    assert_null(strstr(s->log->str, token));
    answer_clear(&a);
}

static void test_token_expires(void **state)
{
    SimCluster *s = *state;
    g_autofree char *token = create_token(s, "admin", 5000, 1);
    g_autofree char *other = create_token(s, "worker", 600000, 1);
    sim_run_for(s, 6 * SECOND);
    Answer a = {0};
    join_with(s, &a, token, "");
    assert_int_equal(a.error->code, WEFT_ERROR_DENIED);
    join_with(s, &a, other, "");
    g_assert_no_error(a.error);
    assert_string_equal(((const Weft__V1__JoinResponse *)a.message)->name, "worker-1");
    answer_clear(&a);
}

static void test_token_survives_restart_but_not_its_uses(void **state)
{
    SimCluster *s = *state;
    g_autofree char *token = create_token(s, "worker", 600000, 2);
    Answer a = {0};
    join_with(s, &a, token, "a");
    g_assert_no_error(a.error);
    sim_cluster_stop(s);
    sim_cluster_start(s);
    sim_run_for(s, SECOND);
    join_with(s, &a, token, "b");
    g_assert_no_error(a.error);
    join_with(s, &a, token, "c");
    assert_int_equal(a.error->code, WEFT_ERROR_DENIED);
    assert_string_equal(state_of(s, "a"), "joined");
    answer_clear(&a);
}

/* ---- certificates ---- */

static X509Info certificate_in(const SimCluster *s, const char *name)
{
    g_autofree char *path = g_build_filename(s->dir, name, NULL), *pem = NULL;
    X509Info info = {0};
    assert_true(g_file_get_contents(path, &pem, NULL, NULL));
    assert_true(x509_parse(pem, &info, NULL));
    return info;
}

/* Nobody starts it again for three years: its own certificate (two years) and the local
 * administrator's (one) are always good, and a worker that comes then joins and serves. */
static void test_certificates_are_renewed(void **state)
{
    SimCluster *s = *state;
    X509Info first = certificate_in(s, "coordinator.crt");
    for (int month = 0; month < 36; month++) {
        sim_run_for(s, 30 * INT64_C(86400) * SECOND);
        int64_t now = loop_wall_us(s->client_loop);
        X509Info own = certificate_in(s, "coordinator.crt"), admin = certificate_in(s, "admin.crt");
        assert_true(now + 180 * INT64_C(86400) * SECOND < own.not_after_us);
        assert_true(now + 29 * INT64_C(86400) * SECOND < admin.not_after_us);
        x509_info_clear(&own);
        x509_info_clear(&admin);
    }
    X509Info last = certificate_in(s, "coordinator.crt");
    assert_string_not_equal(first.serial_hex, last.serial_hex);
    x509_info_clear(&first);
    x509_info_clear(&last);
    start_workers(s, 1);
    Answer a = {0};
    run_ok(s, &a, 1, 1);
    answer_clear(&a);
}

/* ---- death ---- */

static void run_replicated(SimCluster *s, Answer *a)
{
    SimRequest request;
    sim_request_init(s, &request, "hello", 5, 2, 1, 1);
    sim_request_begin(s, a, &request);
    sim_answer(s, a, 10 * SECOND);
    g_assert_no_error(a->error);
    assert_int_equal(a->ids->len, 5);
}

/* A request goes where its beginning is known, though another replica has less to do; one that
 * begins otherwise, or wants nothing from a cache, goes to the one with the least. */
static void test_replica_with_the_prefix(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 2);
    g_autofree char *known = g_strnfill(40, 'a'), *other = g_strnfill(40, 'b');
    g_autofree char *longer = g_strconcat(known, "more", NULL);
    const struct {
        const char *prompt;
        bool fresh, same;
    } cases[] = {
        {known, false, true}, {longer, false, true}, {other, false, false}, {known, true, false}};
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        Answer busy = {0}, next = {0};
        SimRequest request;
        sim_request_init(s, &request, known, 20, 2, 1, 1);
        request.run.streams = 8;
        sim_request_begin(s, &busy, &request);
        for (int n = 0; n < 2000 && s->workers[0].streams->len + s->workers[1].streams->len < 8;
             n++) {
            sim_run_for(s, SECOND / 200);
        }
        const unsigned first = s->workers[0].streams->len > 0 ? 0 : 1;
        assert_int_equal(s->workers[first].streams->len, 8);
        assert_int_equal(s->workers[1 - first].streams->len, 0);
        sim_request_init(s, &request, cases[i].prompt, 20, 2, 1, 1);
        request.run.streams = 8;
        request.run.fresh = cases[i].fresh;
        sim_request_begin(s, &next, &request);
        const unsigned before = s->workers[first].n_generates;
        sim_answer(s, &next, 100 * SECOND);
        assert_int_equal(s->workers[first].n_generates - before, cases[i].same ? 8 : 0);
        sim_answer(s, &busy, 100 * SECOND);
        g_assert_no_error(busy.error);
        g_assert_no_error(next.error);
        answer_clear(&busy);
        answer_clear(&next);
    }
}

/* One of two replicas dies: the other serves on, under its own epoch; when the worker is back both
 * are planned again. */
static void test_replica_dies_and_comes_back(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 2);
    Answer a = {0};
    run_replicated(s, &a);
    assert_int_equal(a.started->plan->n_replicas, 2);
    sim_worker_kill(&s->workers[0]);
    sim_run_for(s, 2 * SECOND);
    run_replicated(s, &a);
    assert_int_equal(s->workers[1].n_loads, 1);
    sim_worker_start(s, 0);
    sim_run_for(s, 2 * SECOND);
    run_replicated(s, &a);
    assert_int_equal(s->workers[0].n_loads, 2);
    assert_true(a.started->epoch >= 2);
    answer_clear(&a);
}

/* The same after a restart of the coordinator, which adopted the job and has not opened its model.
 */
static void test_adopted_replica_dies_and_comes_back(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 2);
    Answer a = {0};
    run_replicated(s, &a);
    sim_cluster_stop(s);
    sim_cluster_start(s);
    sim_run_for(s, 2 * SECOND);
    sim_worker_kill(&s->workers[0]);
    sim_run_for(s, 2 * SECOND);
    sim_worker_start(s, 0);
    sim_run_for(s, 8 * SECOND);
    assert_string_equal(state_of(s, "w1"), "serving");
    run_replicated(s, &a);
    sim_run_for(s, 8 * SECOND);
    assert_string_equal(state_of(s, "w0"), "serving");
    answer_clear(&a);
}

/* The client hears at once; the workers drop nothing, and the next coordinator adopts. */
static void test_coordinator_dies_during_a_request(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 1);
    Answer a = {0};
    sim_run_begin(s, &a, "hello", 40, 1, 1);
    sim_run_for(s, SECOND / 2);
    assert_int_equal(s->workers[0].streams->len, 1);
    sim_cluster_stop(s);
    sim_answer(s, &a, SECOND);
    assert_non_null(a.error);
    sim_run_for(s, SECOND);
    assert_int_equal(s->workers[0].streams->len, 0);
    sim_cluster_start(s);
    run_ok(s, &a, 1, 1);
    assert_int_equal(s->workers[0].n_loads, 1);
    answer_clear(&a);
}

static void test_drained_while_idle(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 2);
    Answer a = {0}, drain = {0};
    run_ok(s, &a, 1, 1);
    FakeWorker *busy = s->workers[0].n_generates > 0 ? &s->workers[0] : &s->workers[1];
    FakeWorker *other = busy == &s->workers[0] ? &s->workers[1] : &s->workers[0];
    Weft__V1__DrainRequest request = WEFT__V1__DRAIN_REQUEST__INIT;
    request.node = busy->name;
    sim_call(s, &drain, &weft__v1__admin__descriptor, "Drain", &request);
    sim_answer(s, &drain, SECOND);
    g_assert_no_error(drain.error);
    run_ok(s, &a, 1, 1);
    assert_int_equal(other->n_generates, 1);
    request.node = (char *)"nobody";
    sim_call(s, &drain, &weft__v1__admin__descriptor, "Drain", &request);
    sim_answer(s, &drain, SECOND);
    assert_int_equal(drain.error->code, WEFT_ERROR_NOT_FOUND);
    answer_clear(&a);
    answer_clear(&drain);
}

static void test_load_failure_names_worker_and_operation(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 1);
    s->workers[0].fail_load = true;
    Answer a = {0};
    sim_run_begin(s, &a, "hello", 5, 1, 1);
    sim_answer(s, &a, 10 * SECOND);
    assert_non_null(strstr(a.error->message, "worker w0, load: disk full"));
    s->workers[0].fail_load = false;
    run_ok(s, &a, 1, 1);
    answer_clear(&a);
}

/* A worker was fenced between its load and its start, and the coordinator has not heard of it: the
 * request is not to blame. */
static void test_worker_forgets_before_it_starts(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 2);
    s->workers[1].forgets = true;
    Answer a = {0};
    run_ok(s, &a, 2, 1);
    assert_int_equal(s->workers[0].n_loads + s->workers[1].n_loads, 4);
    answer_clear(&a);
}

/* Once, while it loads. */
static bool say_fenced(RpcCall *call, const ProtobufCMessage *request, void *user)
{
    bool *said = user;
    if (*said || request->descriptor != &weft__v1__load_request__descriptor) {
        return false;
    }
    *said = true;
    g_autoptr(GError) error =
        g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST, "worker w0 was fenced");
    rpc_call_finish(call, error);
    return true;
}

/* The same while it loads: it says so itself, and is still attached for the coordinator. */
static void test_worker_is_fenced_while_it_loads(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 1);
    bool said = false;
    Answer a = {0};
    s->workers[0].answer = say_fenced;
    s->workers[0].answer_user = &said;
    run_ok(s, &a, 1, 1);
    assert_true(said);
    assert_int_equal(s->workers[0].n_loads, 2);
    answer_clear(&a);
}

static void test_restarted_coordinator_adopts(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 2);
    Answer a = {0}, b = {0};
    run_ok(s, &a, 2, 1);
    sim_cluster_stop(s);
    sim_run_for(s, 2 * SECOND);
    sim_cluster_start(s);
    run_ok(s, &b, 2, 1);
    assert_int_equal(s->workers[0].generation, 2);
    assert_int_equal(s->workers[0].n_loads + s->workers[1].n_loads,
                     2); /* nothing was loaded again */
    assert_int_equal(b.started->epoch, a.started->epoch);
    assert_memory_equal(a.run_done->digest.data, b.run_done->digest.data, 16);
    answer_clear(&a);
    answer_clear(&b);
}

static bool has_reason(const Weft__V1__Plan *plan, const char *part)
{
    for (size_t i = 0; i < plan->n_reasons; i++) {
        if (strstr(plan->reasons[i], part) != NULL) {
            return true;
        }
    }
    return false;
}

static bool holds_unsealed(const FakeWorker *w)
{
    assert_int_equal(w->held->len, 1);
    return ((const Weft__V1__Held *)g_ptr_array_index(w->held, 0))->unsealed;
}

/* Sealed unless it is said otherwise; a coordinator that comes back with another setting does not
 * adopt what runs with the old one. */
static void test_seal_setting(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 2);
    Answer a = {0};
    for (int off = 0; off < 2; off++) {
        if (off) {
            sim_cluster_stop(s);
            s->seal_off = true;
            sim_cluster_start(s);
            sim_run_for(s, 2 * SECOND);
        }
        run_ok(s, &a, 2, 1);
        assert_int_equal(holds_unsealed(&s->workers[0]), off);
        assert_int_equal(holds_unsealed(&s->workers[1]), off);
        assert_true(has_reason(a.started->plan, off ? "NOT sealed" : "are sealed"));
        answer_clear(&a);
        sim_status(s, &a, "w0");
        assert_int_equal(((const Weft__V1__StatusResponse *)a.message)->seal_off, off);
        answer_clear(&a);
        assert_int_equal(strstr(s->log->str, "not sealed") != NULL, off);
    }
    assert_int_equal(s->workers[0].n_loads, 2);
}

static void test_restarted_coordinator_and_worker(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 2);
    Answer a = {0}, b = {0};
    run_ok(s, &a, 2, 1);
    sim_cluster_stop(s);
    sim_worker_kill(&s->workers[0]);
    sim_worker_start(s, 0);
    sim_cluster_start(s);
    run_ok(s, &b, 2, 1);
    assert_true(b.started->epoch > a.started->epoch);
    assert_memory_equal(a.run_done->digest.data, b.run_done->digest.data, 16);
    answer_clear(&a);
    answer_clear(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
#define CASE(f) cmocka_unit_test_setup_teardown(f, cluster_set_up, cluster_tear_down)
        CASE(test_attach_and_status),
        CASE(test_silent_worker_is_lost_in_time),
        CASE(test_killed_worker_is_lost_after_half_a_second),
        CASE(test_blip_is_survived),
        CASE(test_version_skew_names_both),
        CASE(test_devices_name_their_kind),
        CASE(test_exact_on_devices),
        CASE(test_revoke_acts_at_once),
        CASE(test_join_once),
        CASE(test_token_expires),
        CASE(test_token_survives_restart_but_not_its_uses),
        CASE(test_certificates_are_renewed),
        CASE(test_replica_with_the_prefix),
        CASE(test_replica_dies_and_comes_back),
        CASE(test_adopted_replica_dies_and_comes_back),
        CASE(test_coordinator_dies_during_a_request),
        CASE(test_drained_while_idle),
        CASE(test_load_failure_names_worker_and_operation),
        CASE(test_worker_forgets_before_it_starts),
        CASE(test_worker_is_fenced_while_it_loads),
        CASE(test_restarted_coordinator_adopts),
        CASE(test_seal_setting),
        CASE(test_restarted_coordinator_and_worker),
    };
    return cmocka_run_group_tests_name("coordinator cluster", tests, NULL, NULL);
}
