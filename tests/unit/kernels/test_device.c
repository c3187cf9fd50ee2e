/* The seam of devices: choices, the CPU device's deferred streams, events and graphs, failures and
 * their names, and the loader of CUDA's module with what it says where there is no device.
 *
 * Argument: the module's file, or none where this build has none. */
#include "kernels/device/group.h"
#include "kernels/device/ops.h"
#include "kernels/device/use.h"
#include "proto/base/error.h"
#include "proto/base/failpoint.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>

static const char *cuda_module_file;

static Device *cpu_device(void)
{
    g_autoptr(GError) error = NULL;
    Device *device = device_open_module(device_module_cpu(), 0, &error);
    assert_non_null(device);
    return device;
}

/* ---- choices ---- */

static void test_choices(void **state)
{
    static const struct {
        const char *text;
        DeviceKind kind;
        uint32_t index;
    } good[] = {{"cpu", DEVICE_KIND_CPU, 0},       {"cuda", DEVICE_KIND_CUDA, 0},
                {"cuda:0", DEVICE_KIND_CUDA, 0},   {"cuda:7", DEVICE_KIND_CUDA, 7},
                {"cuda:3,0", DEVICE_KIND_CUDA, 3}, {"cuda:all", DEVICE_KIND_CUDA, 0},
                {"auto", DEVICE_KIND_AUTO, 0}};
    static const char *const bad[] = {"",        "gpu",    "cuda:",     "cuda:-1",  "cuda:x",
                                      "cuda:1 ", "cuda0",  "cuda:0,",   "cuda:1,1", "cuda:all,0",
                                      "cpu:-1",  "cpu:65", "cuda:1024", "CPU",      "cpu:0"};
    (void)state;
    for (unsigned i = 0; i < G_N_ELEMENTS(good); i++) {
        DeviceChoice choice;
        assert_true(device_choice_parse(good[i].text, &choice, NULL));
        assert_int_equal(choice.kind, good[i].kind);
        assert_int_equal(choice.index, good[i].index);
        assert_int_equal(choice.indexed, strchr(good[i].text, ':') != NULL);
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(bad); i++) {
        g_autoptr(GError) error = NULL;
        DeviceChoice choice;
        assert_false(device_choice_parse(bad[i], &choice, &error));
        assert_int_equal(weft_error_exit_code(error), 2);
        assert_non_null(strstr(error->message, "cuda:N"));
        assert_null(strchr(error->message, '\n'));
    }
}

/* The trivial device's exact bits are the host's; a fail point makes it say that they are not. */
static void test_kinds_of_bits(void **state)
{
    g_autoptr(Device) plain = cpu_device();
    (void)state;
    assert_string_equal(plain->info.exact_kind, "");
#ifdef WEFT_FAILPOINTS
    failpoint_set("device-kind-1", true, 7);
    g_autoptr(Device) same = cpu_device();
    g_autoptr(Device) other = device_open_module(device_module_cpu(), 1, NULL);
    failpoint_set("device-kind-1", false, 0);
    assert_string_equal(same->info.exact_kind, "");
    assert_string_equal(other->info.exact_kind, "trivial, kind 7");
#endif
}

static void test_auto_without_a_device(void **state)
{
    const DeviceChoice automatic = {.kind = DEVICE_KIND_AUTO}, cuda = {.kind = DEVICE_KIND_CUDA};
    g_autoptr(GError) error = NULL;
    (void)state;
    if (device_driver_missing() == NULL) {
        print_message("# skipped: this host has a driver\n");
        return; /* cmocka's skip() is a failure in TAP */
    }
    g_autoptr(Device) device = device_open(&automatic, &error);
    assert_non_null(device);
    assert_string_equal(device->info.kind, "cpu");
    assert_null(device_open(&cuda, &error));
    assert_true(g_str_has_prefix(error->message, "no device: "));
    assert_non_null(strstr(error->message, "libcuda.so.1"));
}

/* ---- streams ---- */

typedef struct Pair {
    Device *device;
    DeviceStream *stream;
    uint8_t *on, *pinned;
} Pair;

enum { BYTES = 64 };

static Pair pair_open(void)
{
    Pair p = {.device = cpu_device()};
    const DeviceApi *api = p.device->api;
    assert_int_equal(api->stream_new(p.device->handle, &p.stream), DEVICE_OK);
    assert_int_equal(api->alloc(p.device->handle, BYTES, (void **)&p.on), DEVICE_OK);
    assert_int_equal(api->alloc_pinned(p.device->handle, BYTES, (void **)&p.pinned), DEVICE_OK);
    return p;
}

static void pair_close(Pair *p)
{
    const DeviceApi *api = p->device->api;
    api->stream_free(p->stream);
    api->free(p->device->handle, p->on);
    api->free_pinned(p->device->handle, p->pinned);
    device_free(p->device);
}

static void test_nothing_runs_before_a_wait(void **state)
{
    Pair p = pair_open();
    const DeviceApi *api = p.device->api;
    (void)state;
    memset(p.pinned, 1, BYTES);
    assert_int_equal(api->copy(p.stream, p.on, p.pinned, BYTES, DEVICE_COPY_UP), DEVICE_OK);
    memset(p.pinned, 2, BYTES); /* too early: the device sees it */
    assert_int_equal(p.on[0], 0xff);
    assert_int_equal(api->stream_wait(p.stream), DEVICE_OK);
    assert_int_equal(p.on[0], 2);
    pair_close(&p);
}

static void test_copies_of_rows_and_fills(void **state)
{
    Pair p = pair_open();
    const DeviceApi *api = p.device->api;
    (void)state;
    for (unsigned i = 0; i < BYTES; i++) {
        p.pinned[i] = (uint8_t)i;
    }
    assert_int_equal(api->fill(p.stream, p.on, 7, BYTES), DEVICE_OK);
    assert_int_equal(api->copy_rows(p.stream, p.on + 1, 16, p.pinned, 8, 4, 3, DEVICE_COPY_UP),
                     DEVICE_OK);
    assert_int_equal(api->stream_wait(p.stream), DEVICE_OK);
    for (unsigned i = 0; i < BYTES; i++) {
        const unsigned row = i / 16, column = i % 16;
        const bool copied = row < 3 && column >= 1 && column < 5;
        assert_int_equal(p.on[i], copied ? row * 8 + column - 1 : 7);
    }
    pair_close(&p);
}

static void test_events_order_streams(void **state)
{
    Pair p = pair_open();
    const DeviceApi *api = p.device->api;
    DeviceStream *other;
    DeviceEvent *event;
    (void)state;
    assert_int_equal(api->stream_new(p.device->handle, &other), DEVICE_OK);
    assert_int_equal(api->event_new(p.device->handle, &event), DEVICE_OK);
    assert_int_equal(api->event_query(event), DEVICE_OK); /* never recorded */
    assert_int_equal(api->fill(p.stream, p.on, 5, BYTES), DEVICE_OK);
    assert_int_equal(api->event_record(event, p.stream), DEVICE_OK);
    assert_int_equal(api->fill(p.stream, p.on, 6, BYTES), DEVICE_OK); /* after the event */
    assert_int_equal(api->event_query(event), DEVICE_NOT_READY);
    assert_int_equal(api->event_before(event, other), DEVICE_OK);
    assert_int_equal(api->copy(other, p.pinned, p.on, BYTES, DEVICE_COPY_DOWN), DEVICE_OK);
    assert_int_equal(api->stream_wait(other), DEVICE_OK);
    assert_int_equal(p.pinned[0], 5);
    assert_int_equal(api->event_query(event), DEVICE_OK);
    assert_int_equal(api->event_wait(event), DEVICE_OK);
    assert_int_equal(p.on[0], 5);
    assert_int_equal(api->stream_wait(p.stream), DEVICE_OK);
    assert_int_equal(p.on[0], 6);
    api->event_free(event);
    api->stream_free(other);
    pair_close(&p);
}

static void test_graphs_run_at_each_launch(void **state)
{
    Pair p = pair_open();
    const DeviceApi *api = p.device->api;
    DeviceGraph *graph;
    (void)state;
    assert_int_equal(api->graph_begin(p.stream), DEVICE_OK);
    assert_int_equal(api->copy(p.stream, p.on, p.pinned, BYTES, DEVICE_COPY_UP), DEVICE_OK);
    assert_int_equal(api->graph_end(p.stream, &graph), DEVICE_OK);
    assert_int_equal(api->stream_wait(p.stream), DEVICE_OK);
    assert_int_equal(p.on[0], 0xff); /* kept, not run */
    for (uint8_t i = 1; i < 4; i++) {
        p.pinned[0] = i; /* what addresses point to is that of the launch */
        assert_int_equal(api->graph_launch(graph, p.stream), DEVICE_OK);
        assert_int_equal(api->stream_wait(p.stream), DEVICE_OK);
        assert_int_equal(p.on[0], i);
    }
    api->graph_free(graph);
    pair_close(&p);
}

static void test_waiting_inside_a_graph_is_refused(void **state)
{
    Pair p = pair_open();
    const DeviceApi *api = p.device->api;
    DeviceGraph *graph;
    (void)state;
    assert_int_equal(api->graph_begin(p.stream), DEVICE_OK);
    assert_int_equal(api->stream_wait(p.stream), DEVICE_FAILED);
    assert_int_equal(api->graph_end(p.stream, &graph), DEVICE_FAILED);
    assert_null(graph);
    pair_close(&p);
}

/* ---- failures ---- */

static void test_failures_have_names(void **state)
{
    static const struct {
        DeviceStatus status;
        const char *name;
        bool fatal;
        int exit_code;
    } cases[] = {{DEVICE_OUT_OF_MEMORY, "out of memory", false, 1},
                 {DEVICE_UNSUPPORTED, "unsupported", false, 2},
                 {DEVICE_ILLEGAL_ADDRESS, "illegal address", true, 1},
                 {DEVICE_ECC, "uncorrectable memory error", true, 1},
                 {DEVICE_LOST, "lost from the bus", true, 1},
                 {DEVICE_STUCK, "kernel time limit", true, 1},
                 {DEVICE_FAILED, "failed", true, 1}};
    g_autoptr(Device) device = cpu_device();
    (void)state;
    assert_true(device_check(device, DEVICE_OK, "a step", NULL));
    for (unsigned i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autoptr(GError) error = NULL;
        assert_string_equal(device_status_name(cases[i].status), cases[i].name);
        assert_int_equal(device_status_is_fatal(cases[i].status), cases[i].fatal);
        assert_false(device_check(device, cases[i].status, "a step", &error));
        assert_true(g_str_has_prefix(error->message, "cpu:0 (host): a step: "));
        assert_non_null(strstr(error->message, cases[i].name));
        assert_int_equal(weft_error_exit_code(error), cases[i].exit_code);
    }
}

#ifdef WEFT_FAILPOINTS
static void test_a_failed_device_stays_failed(void **state)
{
    Pair p = pair_open();
    const DeviceApi *api = p.device->api;
    void *more = NULL;
    (void)state;
    failpoint_set("device-fail", true, -DEVICE_ECC);
    assert_int_equal(api->stream_wait(p.stream), DEVICE_ECC);
    failpoint_set("device-fail", false, 0);
    assert_int_equal(api->stream_wait(p.stream), DEVICE_ECC);
    assert_int_equal(api->fill(p.stream, p.on, 0, BYTES), DEVICE_ECC);
    assert_int_equal(api->alloc(p.device->handle, 1, &more), DEVICE_ECC);
    pair_close(&p);
}

/* What is gone beside allocations is seen after steps 1, 2, 4, ...; a group's part when it joins,
 * once; what cannot be ours is not believed. */
static void test_what_is_beside_allocations(void **state)
{
    enum { KERNELS = 5 << 20, GROUP = 3 << 20 };
    void *memory;
    (void)state;
    g_autoptr(Device) silent = cpu_device();
    device_use_note(silent);
    assert_int_equal(atomic_load(&silent->use->rank), 0);

    failpoint_set("device-beside", true, 0);
    g_autoptr(Device) device = cpu_device();
    assert_int_equal(device->api->alloc(device->handle, 1000, &memory), DEVICE_OK);
    device_use_step(device, 1);
    assert_int_equal(atomic_load(&device->use->rank), 0);
    failpoint_set("device-beside", true, KERNELS);
    device_use_step(device, 3);
    assert_int_equal(atomic_load(&device->use->rank), 0);
    device_use_step(device, 4);
    assert_int_equal(atomic_load(&device->use->rank), KERNELS);

    const uint64_t before = device_use_group_begins(device);
    failpoint_set("device-beside", true, KERNELS + GROUP);
    const uint64_t group = device_use_group_joined(device, before);
    assert_int_equal(group, GROUP);
    assert_int_equal(atomic_load(&device->use->group), GROUP);
    device_use_note(device);
    assert_int_equal(atomic_load(&device->use->rank), KERNELS);
    failpoint_set("device-beside", true, KERNELS);
    device_use_group_ended(device, group);
    device_use_note(device);
    assert_int_equal(atomic_load(&device->use->rank), KERNELS);

    failpoint_set("device-beside", true, (int64_t)DEVICE_USE_LIMIT + 1); /* another process */
    device_use_note(device);
    assert_int_equal(atomic_load(&device->use->rank), KERNELS);
    failpoint_set("device-beside", false, 0);
    device->api->free(device->handle, memory);
}

#endif

static void test_memory_that_is_not_there(void **state)
{
    g_autoptr(Device) device = cpu_device();
    void *memory = NULL;
    uint64_t left, total;
    (void)state;
    assert_int_equal(device->api->alloc(device->handle, (size_t)1 << 60, &memory),
                     DEVICE_OUT_OF_MEMORY);
    assert_null(memory);
    assert_int_equal(device->api->memory(device->handle, &left, &total), DEVICE_OK); /* it lives */
    assert_true(left <= total && total == device->info.memory_bytes);
}

/* ---- the loader ---- */

static void test_a_module_that_is_none(void **state)
{
    g_autoptr(GError) error = NULL;
    (void)state;
    assert_null(device_module_cuda("/nowhere/weft-cuda.so", &error));
    assert_true(g_str_has_prefix(error->message, "no device: /nowhere/weft-cuda.so"));
    g_clear_error(&error);
    assert_null(device_module_cuda("libm.so.6", &error)); /* loads, and is no module of ours */
    assert_non_null(strstr(error->message, DEVICE_MODULE_SYMBOL));
}

static void test_the_index_must_be_there(void **state)
{
    g_autoptr(GError) error = NULL;
    (void)state;
    assert_null(device_open_module(device_module_cpu(), 64, &error));
    assert_int_equal(weft_error_exit_code(error), 2);
    assert_non_null(strstr(error->message, "this host has 64"));
}

/* Loaded by name, so also where there is no driver; then it says so. */
static void test_the_cuda_module(void **state)
{
    g_autoptr(GError) error = NULL;
    (void)state;
    if (cuda_module_file == NULL) {
        print_message("# skipped: this build has no CUDA module (no nvcc, or -Dcuda=disabled)\n");
        return;
    }
    const DeviceModule *module = device_module_cuda(cuda_module_file, &error);
    assert_non_null(module);
    assert_null(error);
    assert_string_equal(module->api->kind, "cuda");
    assert_true(g_str_has_prefix(module->version, "CUDA 1"));
    char why[256] = "";
    if (module->api->count(why) > 0) {
        return; /* tools/gpu-check goes on from here */
    }
    assert_true(strlen(why) > 0);
    assert_null(device_open_module(module, 0, &error));
    assert_true(g_str_has_prefix(error->message, "no device: "));
    assert_int_equal(weft_error_exit_code(error), 3);
}

/* ---- on a GPU host alone: groups by the real NCCL, one rank for each of at most two devices; one
 * thread plays them, as no call of group.h waits ---- */

enum { GROUP_N = 4096, JOIN_S = 60 };

typedef struct GroupRank {
    Device *device;
    DeviceStream *stream;
    DeviceGroup *group;
    DeviceGraph *graph;
    float *x, *pinned;
} GroupRank;

static void group_settle(GroupRank *r, DeviceStatus status)
{
    const gint64 end = g_get_monotonic_time() + JOIN_S * G_USEC_PER_SEC;
    while (status == DEVICE_NOT_READY && g_get_monotonic_time() < end) {
        status = r->device->group->poll(r->group);
    }
    if (status != DEVICE_OK) {
        fail_msg("%s: %s", device_status_name(status),
                 r->device->api->error_text(r->device->handle));
    }
}

static void group_open(GroupRank *ranks, uint32_t n, const DeviceModule *module)
{
    DeviceGroupId id;
    for (uint32_t i = 0; i < n; i++) {
        GroupRank *r = &ranks[i];
        r->device = device_open_module(module, i, NULL);
        assert_non_null(r->device);
        const DeviceApi *api = r->device->api;
        DeviceHandle *h = r->device->handle;
        assert_int_equal(api->stream_new(h, &r->stream), DEVICE_OK);
        assert_int_equal(api->alloc(h, sizeof(float) * GROUP_N, (void **)&r->x), DEVICE_OK);
        assert_int_equal(api->alloc_pinned(h, sizeof(float) * GROUP_N, (void **)&r->pinned),
                         DEVICE_OK);
        if (i == 0) {
            assert_int_equal(module->group->make_id(h, &id), DEVICE_OK);
        }
        assert_int_equal(module->group->begin(h, &id, n, i, &r->group), DEVICE_OK);
    }
    for (uint32_t i = 0; i < n; i++) {
        group_settle(&ranks[i], module->group->poll(ranks[i].group));
        assert_int_equal(
            module->group->register_buffer(ranks[i].group, ranks[i].x, sizeof(float) * GROUP_N),
            DEVICE_OK);
    }
}

static void group_sum(GroupRank *r)
{
    group_settle(r, r->device->group->all_reduce(r->group, r->stream, r->x, r->x, GROUP_N));
}

/* x = i + rank on each; all sum it once by a call and twice by a graph. */
static void group_run(GroupRank *ranks, uint32_t n)
{
    for (uint32_t k = 0; k < n; k++) {
        GroupRank *r = &ranks[k];
        for (uint32_t i = 0; i < GROUP_N; i++) {
            r->pinned[i] = (float)(i % 97 + k);
        }
        r->device->api->copy(r->stream, r->x, r->pinned, sizeof(float) * GROUP_N, DEVICE_COPY_UP);
        group_sum(r);
    }
    for (uint32_t k = 0; k < n; k++) {
        assert_int_equal(ranks[k].device->api->stream_wait(ranks[k].stream), DEVICE_OK);
    }
    for (uint32_t k = 0; k < n; k++) {
        GroupRank *r = &ranks[k];
        assert_int_equal(r->device->api->graph_begin(r->stream), DEVICE_OK);
        group_sum(r);
        assert_int_equal(r->device->api->graph_end(r->stream, &r->graph), DEVICE_OK);
    }
    for (uint32_t k = 0; k < 2 * n; k++) {
        GroupRank *r = &ranks[k % n];
        assert_int_equal(r->device->api->graph_launch(r->graph, r->stream), DEVICE_OK);
    }
    for (uint32_t k = 0; k < n; k++) {
        GroupRank *r = &ranks[k];
        r->device->api->copy(r->stream, r->pinned, r->x, sizeof(float) * GROUP_N, DEVICE_COPY_DOWN);
        assert_int_equal(r->device->api->stream_wait(r->stream), DEVICE_OK);
    }
}

static void test_groups_of_the_cuda_module(void **state)
{
    char why[256] = "no CUDA module in this build";
    GroupRank ranks[2] = {{0}};
    (void)state;
    const DeviceModule *module =
        cuda_module_file != NULL ? device_module_cuda(cuda_module_file, NULL) : NULL;
    const uint32_t n = module != NULL ? MIN(module->api->count(why), 2u) : 0;
    if (n == 0 || module->group == NULL || !module->group->usable(why)) {
        print_message("# skipped: %s\n", why);
        return;
    }
    group_open(ranks, n, module);
    group_run(ranks, n);
    for (uint32_t k = 0; k < n; k++) {
        for (uint32_t i = 0; i < GROUP_N; i++) {
            const float once = n == 1 ? (float)(i % 97) : (float)(2 * (i % 97) + 1);
            assert_true(ranks[k].pinned[i] == once * (float)(n * n));
        }
    }
    for (uint32_t k = 0; k < n; k++) {
        GroupRank *r = &ranks[k];
        r->device->api->graph_free(r->graph);
        module->group->abort(r->group);
        r->device->api->stream_free(r->stream);
        module->group->free(r->group);
        r->device->api->free(r->device->handle, r->x);
        r->device->api->free_pinned(r->device->handle, r->pinned);
        device_free(r->device);
    }
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_choices),
        cmocka_unit_test(test_auto_without_a_device),
        cmocka_unit_test(test_kinds_of_bits),
        cmocka_unit_test(test_nothing_runs_before_a_wait),
        cmocka_unit_test(test_copies_of_rows_and_fills),
        cmocka_unit_test(test_events_order_streams),
        cmocka_unit_test(test_graphs_run_at_each_launch),
        cmocka_unit_test(test_waiting_inside_a_graph_is_refused),
        cmocka_unit_test(test_failures_have_names),
#ifdef WEFT_FAILPOINTS
        cmocka_unit_test(test_a_failed_device_stays_failed),
        cmocka_unit_test(test_what_is_beside_allocations),
#endif
        cmocka_unit_test(test_memory_that_is_not_there),
        cmocka_unit_test(test_a_module_that_is_none),
        cmocka_unit_test(test_the_index_must_be_there),
        cmocka_unit_test(test_the_cuda_module),
        cmocka_unit_test(test_groups_of_the_cuda_module),
    };
    cuda_module_file = argc > 1 ? argv[1] : NULL;
    return cmocka_run_group_tests_name("device", tests, NULL, NULL);
}
