/* Leases of one client's request, which ends with the first of them that fails: whoever hears of it
 * gives back the others. */
#include "coordinator/jobs/deployment.h"

#include "proto/base/error.h"
#include "tests/sim/sim_loop.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#define N 4u

typedef struct Request Request;

typedef struct Part {
    Request *request;
    Lease *lease;  /* NULL once released */
    unsigned told; /* calls while it had a lease */
} Part;

struct Request {
    SimWorld *world;
    Jobs jobs;
    Deployment *deployment;
    Part parts[N];
    unsigned ends_at; /* the part that ends the request when it hears something */
};

static void release_all(Request *r)
{
    for (unsigned i = 0; i < N; i++) {
        if (r->parts[i].lease != NULL) {
            lease_release(g_steal_pointer(&r->parts[i].lease));
        }
    }
}

/* True: the request goes on. */
static bool hear(Part *part)
{
    assert_non_null(part->lease); /* nothing is called after the release */
    part->told++;
    if (part == &part->request->parts[part->request->ends_at]) {
        release_all(part->request);
        return false;
    }
    return true;
}

static void on_progress(const char *text, double fraction, const char *worker, void *user)
{
    hear(user);
}

static bool on_interrupted(const GError *why, void *user, uint64_t *n_tokens)
{
    return hear(user);
}

static void on_failed(const GError *error, void *user)
{
    hear(user);
}

static void add_lease(Request *r, unsigned i, LeaseState state)
{
    Deployment *d = r->deployment;
    Lease *lease = g_new0(Lease, 1);
    *lease = (Lease){
        .deployment = d,
        .jobs = &r->jobs,
        .state = state,
        .callbacks = {.progress = on_progress, .interrupted = on_interrupted, .failed = on_failed},
        .user = &r->parts[i]};
    r->parts[i] = (Part){.request = r, .lease = lease};
    g_queue_push_tail(state == LEASE_ACTIVE ? &d->active : &d->waiting, lease);
    d->replicas[0].n_active += state == LEASE_ACTIVE;
}

static Request *request_new(unsigned ends_at, LeaseState state)
{
    Request *r = g_new0(Request, 1);
    r->world = sim_world_new(sim_seed(1));
    r->jobs.options = (JobsOptions){.loop = sim_world_loop(r->world), .recovery_wait_us = 60000000};
    r->deployment = deployment_new(&r->jobs, "job");
    r->deployment->replicas = g_new0(ReplicaState, 1);
    r->deployment->n_replicas = 1;
    r->ends_at = ends_at;
    for (unsigned i = 0; i < N; i++) {
        add_lease(r, i, state);
    }
    return r;
}

static void request_free(Request *r)
{
    assert_int_equal(r->deployment->waiting.length, 0);
    assert_int_equal(r->deployment->active.length, 0);
    deployment_free(r->deployment);
    sim_world_free(r->world);
    g_free(r);
}

/* Those before the one that ends the request hear of it, those after it are gone. */
static void assert_told(const Request *r)
{
    for (unsigned i = 0; i < N; i++) {
        assert_int_equal(r->parts[i].told, i <= r->ends_at);
    }
}

static void test_failed(void **state)
{
    g_autoptr(GError) error = g_error_new(WEFT_ERROR, WEFT_ERROR_NOT_READY, "nobody came");
    for (unsigned i = 0; i < N; i++) {
        Request *r = request_new(i, LEASE_WAITING);
        deployment_fail_waiting(r->deployment, error);
        assert_told(r);
        request_free(r);
    }
}

static void test_interrupted(void **state)
{
    g_autoptr(GError) why = g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST, "worker w0 lost");
    for (unsigned i = 0; i < N; i++) {
        Request *r = request_new(i, LEASE_ACTIVE);
        deployment_interrupt_leases(r->deployment, 0, why);
        assert_told(r);
        request_free(r);
    }
}

static void test_progress(void **state)
{
    for (unsigned i = 0; i < N; i++) {
        Request *r = request_new(i, LEASE_WAITING);
        deployment_tell_waiting(r->deployment, "planning", 0, "");
        assert_told(r);
        request_free(r);
    }
}

/* Who was on the replica hears of its end, in order, and who waited already does not. */
static void test_those_that_waited(void **state)
{
    g_autoptr(GError) why = g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST, "worker w0 lost");
    Request *r = request_new(N, LEASE_WAITING);
    r->ends_at = 0;
    for (unsigned i = 1; i < N; i += 2) {
        Lease *lease = r->parts[i].lease;
        g_queue_remove(&r->deployment->waiting, lease);
        g_queue_push_tail(&r->deployment->active, lease);
        lease->state = LEASE_ACTIVE;
        r->deployment->replicas[0].n_active++;
    }
    deployment_interrupt_leases(r->deployment, 0, why);
    for (unsigned i = 0; i < N; i++) {
        assert_int_equal(r->parts[i].told, i % 2);
        assert_int_equal(g_queue_index(&r->deployment->waiting, r->parts[i].lease),
                         i % 2 == 1 ? i / 2 : 2 + i / 2);
    }
    release_all(r);
    request_free(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_failed),
        cmocka_unit_test(test_interrupted),
        cmocka_unit_test(test_progress),
        cmocka_unit_test(test_those_that_waited),
    };
    return cmocka_run_group_tests_name("coordinator leases", tests, NULL, NULL);
}
