/* Groups of trivial devices: the contract of group.h, and what only this fill has (threads, ranks
 * that disagree, fail points). */
#include "tests/kernels/group_case.h"

#include "proto/base/failpoint.h"

static Device *case_device(uint32_t index)
{
    g_autoptr(GError) error = NULL;
    Device *device = device_open_module(device_module_cpu(), index, &error);
    if (device == NULL) {
        fail_msg("%s", error->message);
    }
    return device;
}

static void test_seats(void **state)
{
    g_autoptr(Device) a = case_device(0);
    g_autoptr(Device) b = case_device(3);
    DeviceSeat seats[3];
    char why[256];
    (void)state;
    assert_true(a->group->usable(why));
    a->group->seat(a->handle, &seats[0]);
    b->group->seat(b->handle, &seats[1]);
    seats[2] = seats[0];
    assert_int_equal(b->info.index, 3);
    assert_true(device_seats_fit(seats, 1));
    assert_true(device_seats_fit(seats, 2));
    assert_false(device_seats_fit(seats, 3)); /* two on one device */
    seats[1].domain[0]++;
    assert_false(device_seats_fit(seats, 2)); /* of two processes */
    seats[1].domain[0]--;
    strcpy(seats[1].fill, "nccl");
    assert_false(device_seats_fit(seats, 2));
    memset(seats, 0, sizeof seats);
    assert_false(device_seats_fit(seats, 1)); /* none can be made there */
    assert_false(device_seats_fit(seats, 0));
}

/* ---- a thread for each rank, as engines are ---- */

enum { ROUNDS = 50 };

typedef struct Runner {
    CaseWorld *w;
    uint32_t r;
    float *x;
} Runner;

static gpointer run_rank(gpointer user)
{
    const Runner *runner = user;
    CaseRank *rank = &runner->w->ranks[runner->r];
    for (unsigned i = 0; i < ROUNDS; i++) {
        runner->w->api->all_reduce(rank->group, rank->stream, runner->x, runner->x, CASE_N);
        if (i % 3 == runner->r) {
            rank->device->api->stream_wait(rank->stream);
        }
    }
    rank->device->api->stream_wait(rank->stream);
    return NULL;
}

static void test_threads(void **state)
{
    CaseWorld w;
    Runner runners[3];
    GThread *threads[3];
    (void)state;
    case_open(&w, 3);
    for (uint32_t r = 0; r < w.n; r++) {
        runners[r] = (Runner){&w, r, case_floats(&w, r, CASE_N)};
        for (size_t i = 0; i < CASE_N; i++) {
            runners[r].x[i] = r == 0 ? 1.0f : 0.0f;
        }
        threads[r] = g_thread_new("rank", run_rank, &runners[r]);
    }
    for (uint32_t r = 0; r < w.n; r++) {
        g_thread_join(threads[r]);
    }
    float expected = 1.0f;
    for (unsigned i = 1; i < ROUNDS; i++) {
        expected = expected + expected + expected;
    }
    for (uint32_t r = 0; r < w.n; r++) {
        assert_true(runners[r].x[CASE_N - 1] == expected);
        case_free(&w, r, runners[r].x);
    }
    case_close(&w);
}

/* ---- failures ---- */

static const char *text_of(const CaseWorld *w, uint32_t r)
{
    return w->ranks[r].device->api->error_text(w->ranks[r].device->handle);
}

static void test_ranks_that_disagree(void **state)
{
    CaseWorld w;
    float x[2][2 * CASE_N] = {{0}};
    (void)state;
    case_open(&w, 2);
    w.api->all_reduce(w.ranks[0].group, w.ranks[0].stream, x[0], x[0], CASE_N);
    w.api->all_gather(w.ranks[1].group, w.ranks[1].stream, x[1], x[1], 4);
    case_run(&w);
    for (uint32_t r = 0; r < w.n; r++) {
        assert_int_equal(w.api->poll(w.ranks[r].group), DEVICE_GROUP_FAILED);
        assert_string_equal(text_of(&w, r),
                            "rank 1 enqueued all-gather of 4, rank 0 all-reduce of 37");
    }
    case_close(&w);
}

static void test_a_rank_that_joins_twice(void **state)
{
    g_autoptr(Device) device = case_device(0);
    DeviceGroupId id;
    DeviceGroup *first, *second;
    (void)state;
    assert_int_equal(device->group->make_id(device->handle, &id), DEVICE_OK);
    assert_int_equal(device->group->begin(device->handle, &id, 2, 1, &first), DEVICE_OK);
    assert_int_equal(device->group->begin(device->handle, &id, 2, 1, &second), DEVICE_OK);
    assert_int_equal(device->group->poll(first), DEVICE_GROUP_FAILED);
    assert_string_equal(device->api->error_text(device->handle), "rank 1 joined twice");
    device->group->free(first);
    device->group->free(second);
    assert_int_equal(device->api->alloc(device->handle, 1, (void **)&first), DEVICE_OK); /* lives */
    device->api->free(device->handle, first);
}

static void test_exchanges_of_other_sizes(void **state)
{
    CaseWorld w;
    float x[2][4] = {{0}};
    const DeviceGroupPart send = {true, 1, x[0], 8}, receive = {false, 0, x[1], 4},
                          self = {true, 0, x[0], 4};
    (void)state;
    case_open(&w, 2);
    assert_int_equal(w.api->exchange(w.ranks[0].group, w.ranks[0].stream, &self, 1),
                     DEVICE_UNSUPPORTED);
    w.api->exchange(w.ranks[0].group, w.ranks[0].stream, &send, 1);
    w.api->exchange(w.ranks[1].group, w.ranks[1].stream, &receive, 1);
    case_run(&w);
    assert_int_equal(w.api->poll(w.ranks[0].group), DEVICE_GROUP_FAILED);
    assert_string_equal(text_of(&w, 0), "ranks 0 and 1 exchange 8 and 4 bytes");
    case_close(&w);
}

static void test_fail_point(void **state)
{
    CaseWorld w;
    float x[2][4] = {{0}};
    (void)state;
    case_open(&w, 2);
    failpoint_set("device-group-fail", true, 1);
    for (uint32_t r = 0; r < w.n; r++) {
        w.api->all_reduce(w.ranks[r].group, w.ranks[r].stream, x[r], x[r], 4);
    }
    case_run(&w);
    failpoint_set("device-group-fail", false, 0);
    assert_int_equal(w.api->poll(w.ranks[0].group), DEVICE_GROUP_FAILED);
    assert_string_equal(text_of(&w, 0), "rank 1: fail point device-group-fail");
    case_close(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        GROUP_CASES,
        cmocka_unit_test(test_seats),
        cmocka_unit_test(test_threads),
        cmocka_unit_test(test_ranks_that_disagree),
        cmocka_unit_test(test_a_rank_that_joins_twice),
        cmocka_unit_test(test_exchanges_of_other_sizes),
        cmocka_unit_test(test_fail_point),
    };
    return cmocka_run_group_tests_name("device-group", tests, NULL, NULL);
}
