/* kernels/cuda/nccl.c over a library with NCCL's names (cuda_emulation/fake_nccl.c, found by
 * WEFT_NCCL as the real one would be) and the trivial device's streams; the tree is added by the
 * device kernel, run by the emulation. What this does not prove is NCCL. */
#include "tests/kernels/group_case.h"

#include "kernels/cuda/module.h"
#include "kernels/cuda/nccl_library.h"
#include "kernels/device/cpu.h"
#include "kernels/kernels.h"
#include "tests/golden/gguf_builder.h"
#include "tests/kernels/cuda_emulation/fake_nccl.h"
#include "tests/sim/local_replica.h"
#include "tests/unit/worker/train_runs.h"
#include "worker/model/device_stage.h"
#include "worker/serve/engine_state.h"

#include <dlfcn.h>
#include <glib/gstdio.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static FakeNccl *fake;

/* ---- what module.h asks of kernels/cuda/device.c ---- */

static _Thread_local DeviceHandle *current;

static DeviceHandle *current_device(void)
{
    return current;
}

void cuda_use(DeviceHandle *device)
{
    current = device;
}

DeviceStatus cuda_say(DeviceHandle *device, DeviceStatus status, const char *text)
{
    return device_cpu_fail(device, status, text);
}

void cuda_bus(DeviceHandle *device, char *out, int bytes)
{
    snprintf(out, (size_t)bytes, "0000:%02x:00.0", device_cpu_index(device));
}

struct CUstream_st *cuda_stream(DeviceStream *stream)
{
    return (struct CUstream_st *)(void *)stream;
}

DeviceStatus cuda_result(DeviceStream *stream, int error)
{
    (void)stream;
    return error == 0 ? DEVICE_OK : DEVICE_FAILED;
}

/* ---- the emulation runs a kernel when it is launched: it is launched when its stream comes to
 * it ---- */

typedef struct Fold {
    DeviceGroup *group;
    DeviceTree tree;
    const float *gathered;
    size_t n;
    float *out;
} Fold;

static void run_fold(void *args)
{
    const Fold *f = args;
    cuda_group.fold(f->group, NULL, &f->tree, f->gathered, f->n, f->out);
}

static DeviceStatus later_fold(DeviceGroup *group, DeviceStream *stream, const DeviceTree *tree,
                               const float *gathered, size_t n, float *out)
{
    const Fold args = {group, *tree, gathered, n, out};
    return device_cpu_enqueue(stream, run_fold, &args, sizeof args);
}

static Device *case_device(uint32_t index)
{
    static DeviceGroupApi api;
    Device *device = device_open_module(device_module_cpu(), index, NULL);
    api = cuda_group;
    api.fold = later_fold;
    device->group = &api;
    return device;
}

static int set_up(void **state)
{
    (void)state;
    fake->slow = 0;
    fake->aborted = fake->joined = fake->registered = fake->deregistered = 0;
    return 0;
}

static int set_up_slow(void **state)
{
    set_up(state);
    fake->slow = 3;
    return 0;
}

/* Nothing was called out of turn, and nobody was left behind. */
static int tear_down(void **state)
{
    (void)state;
    fake->forget();
    if (fake->violations != 0 || fake->aborted != fake->joined) {
        print_error("%d violations, %d of %d aborted\n", fake->violations, fake->aborted,
                    fake->joined);
        return -1;
    }
    return 0;
}

/* ---- cases of this fill ---- */

static void test_usable(void **state)
{
    char why[256];
    (void)state;
    assert_true(cuda_group.usable(why));
    assert_string_equal(why, "NCCL 2.28.9");
}

static void test_seats(void **state)
{
    DeviceSeat seats[2];
    (void)state;
    for (uint32_t i = 0; i < 2; i++) {
        g_autoptr(Device) device = case_device(i);
        device->group->seat(device->handle, &seats[i]);
    }
    assert_string_equal(seats[0].fill, "nccl");
    assert_true(device_seats_fit(seats, 2));
    g_autoptr(Device) same = case_device(0);
    same->group->seat(same->handle, &seats[1]);
    assert_false(device_seats_fit(seats, 2)); /* NCCL refuses two ranks on one device */
    g_setenv("NCCL_HOSTID", "other", TRUE);
    same->group->seat(same->handle, &seats[1]);
    g_unsetenv("NCCL_HOSTID");
    assert_true(device_seats_fit(seats, 2)); /* unless it thinks of two hosts */
}

static void test_buffers_are_given_back(void **state)
{
    CaseWorld w;
    float x[2][4] = {{0}};
    (void)state;
    case_open(&w, 2);
    for (uint32_t r = 0; r < 2; r++) {
        assert_int_equal(w.api->register_buffer(w.ranks[r].group, x[r], sizeof x[r]), DEVICE_OK);
    }
    assert_int_equal(fake->registered, 2);
    for (uint32_t r = 0; r < 2; r++) {
        w.api->free(w.ranks[r].group);
        w.ranks[r].device->api->stream_free(w.ranks[r].stream);
        w.ranks[r].device->api->event_free(w.ranks[r].event);
        device_free(w.ranks[r].device);
    }
    assert_int_equal(fake->deregistered, 2);
}

/* What a call did not do at once is not overtaken: the seam says NOT_READY, and the caller polls.
 */
static void test_in_progress(void **state)
{
    CaseWorld w;
    float x[2][4] = {{1}, {2}};
    (void)state;
    case_open(&w, 2);
    for (uint32_t r = 0; r < 2; r++) {
        assert_int_equal(w.api->all_reduce(w.ranks[r].group, w.ranks[r].stream, x[r], x[r], 4),
                         DEVICE_NOT_READY);
        assert_int_equal(w.api->poll(w.ranks[r].group), DEVICE_NOT_READY);
        assert_int_equal(w.api->poll(w.ranks[r].group), DEVICE_NOT_READY);
        assert_int_equal(w.api->poll(w.ranks[r].group), DEVICE_OK);
    }
    case_run(&w);
    assert_true(x[0][0] == 3.0f && x[1][0] == 3.0f);
    case_close(&w);
}

/* An error that comes behind a call's back: the communicator is aborted at once, so that nothing of
 * it stays on the device, and every later call says the same. */
static void test_asynchronous_error(void **state)
{
    CaseWorld w;
    float x[4] = {0};
    (void)state;
    case_open(&w, 2);
    assert_int_equal(w.api->all_reduce(w.ranks[0].group, w.ranks[0].stream, x, x, 4), DEVICE_OK);
    case_record(&w);
    assert_int_equal(case_turn(&w.ranks[0]), DEVICE_NOT_READY);
    fake->async_error_rank = 0;
    fake->async_error = ncclRemoteError;
    assert_int_equal(w.api->poll(w.ranks[0].group), DEVICE_GROUP_FAILED);
    assert_int_equal(fake->aborted, 1);
    case_turn(&w.ranks[0]);
    case_turn(&w.ranks[0]);
    assert_int_equal(case_turn(&w.ranks[0]), DEVICE_OK);
    assert_int_equal(w.api->poll(w.ranks[0].group), DEVICE_GROUP_FAILED);
    assert_int_equal(w.api->all_gather(w.ranks[0].group, w.ranks[0].stream, x, x, 4),
                     DEVICE_GROUP_FAILED);
    assert_string_equal(w.ranks[0].device->api->error_text(w.ranks[0].device->handle),
                        "NCCL: remote process exited or there was a network error: a rank hung up");
    case_close(&w);
}

static void test_a_rank_too_many(void **state)
{
    g_autoptr(Device) device = case_device(0);
    DeviceGroupId id;
    DeviceGroup *group;
    (void)state;
    assert_int_equal(device->group->make_id(device->handle, &id), DEVICE_OK);
    assert_int_equal(device->group->begin(device->handle, &id, 1000, 0, &group),
                     DEVICE_GROUP_FAILED);
    assert_null(group);
    assert_string_equal(device->api->error_text(device->handle), "NCCL: an error of the fake");
}

/* ---- an engine over it: sums in the decode graph ---- */

static void run_engine(const Gguf *g, const Device *const *devices, LocalResult *result)
{
    static const uint32_t prompt[] = {1, 17, 5, 99, 23, 4, 250, 31, 77, 8};
    g_autoptr(GError) error = NULL;
    const LocalLayout layout = {
        .pp = 1, .tp = {devices != NULL ? 2 : 1}, .isa = kernels_best_isa(), .devices = devices};
    LocalReplica *r = local_replica_new(g, &layout, NULL, &error);
    if (r == NULL) {
        fail_msg("%s", error->message);
    }
    local_replica_greedy(r, prompt, G_N_ELEMENTS(prompt), 6, result);
    assert_null(result->error);
    for (uint32_t k = 0; devices != NULL && k < 2; k++) {
        const DeviceStage *d = local_replica_engine(r, k)->stage->device;
        assert_true(d->team.joined);
        assert_int_equal(d->n_captures, 1);
        assert_int_equal(d->n_launches, 4);
    }
    local_replica_free(r);
}

static void test_engine(void **state)
{
    g_autoptr(GError) error = NULL;
    LocalResult host, other;
    GgufBuilderConfig config;
    (void)state;
    gguf_builder_defaults(&config);
    config.n_layers = 2;
    config.seed = 3;
    g_autofree char *path =
        g_strdup_printf("%s/weft-cuda-nccl-%d.gguf", g_get_tmp_dir(), (int)getpid());
    assert_true(gguf_builder_write(&config, path, &error));
    g_autoptr(Gguf) g = gguf_open(path, &error);
    g_unlink(path);
    assert_non_null(g);
    g_autoptr(Device) first = case_device(0);
    g_autoptr(Device) second = case_device(1);
    const Device *devices[2] = {first, second};
    run_engine(g, NULL, &host);
    run_engine(g, devices, &other);
    assert_int_equal(host.n, other.n);
    assert_memory_equal(host.ids, other.ids, sizeof(uint32_t) * host.n);
    assert_int_equal(fake->registered, 2);
    local_result_clear(&host);
    local_result_clear(&other);
}

/* ---- ranks in training over it: tensor ranks, replicas, and both ---- */

static Device *ranks[4];

static void on_ranks(TrainRankOptions *o)
{
    const TrainPosition p = train_position(o->plan, o->replica, o->stage, o->rank);
    o->devices = true;
    o->device = ranks[train_global(&p, o->replica, o->stage, o->rank)];
}

/* Class fast: the sums are the library's. */
static void on_fast_ranks(TrainRankOptions *o)
{
    on_ranks(o);
    o->fast = true;
}

static void test_training(void **state)
{
    static const RunSpread host = {.micro = 1},
                           spreads[] = {{.tp = 2, .micro = 2, .change = on_ranks},
                                        {.dp = 2, .micro = 1, .change = on_ranks},
                                        {.dp = 2, .tp = 2, .micro = 2, .change = on_ranks}},
                           fast = {.dp = 2, .tp = 2, .micro = 2, .change = on_fast_ranks};
    const RunResult want = run_toy(&toy_gpt2, &host, 2, NULL);
    (void)state;
    for (uint32_t i = 0; i < G_N_ELEMENTS(ranks); i++) {
        ranks[i] = case_device(i);
    }
    for (size_t i = 0; i < G_N_ELEMENTS(spreads); i++) {
        const RunResult got = run_toy(&toy_gpt2, &spreads[i], 2, NULL);
        assert_same_run(&got, &want);
    }
    const RunResult got = run_toy(&toy_gpt2, &fast, 2, NULL);
    assert_true(fabsf(got.losses[1] / want.losses[1] - 1.0f) < 1e-5f);
    assert_true(fabsf(got.norms[1] / want.norms[1] - 1.0f) < 1e-5f);
    fake->forget();
    for (uint32_t i = 0; i < G_N_ELEMENTS(ranks); i++) {
        device_free(ranks[i]);
    }
}

#define CASE(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)
#define SLOW_CASE(test) cmocka_unit_test_setup_teardown(test, set_up_slow, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(case_all_reduce),
        CASE(case_gather_and_scatter),
        CASE(case_exchange),
        CASE(case_tree),
        CASE(case_graphs),
        CASE(case_abort),
        SLOW_CASE(case_all_reduce),
        SLOW_CASE(case_gather_and_scatter),
        SLOW_CASE(case_exchange),
        SLOW_CASE(case_tree),
        SLOW_CASE(case_graphs),
        CASE(test_usable),
        CASE(test_seats),
        CASE(test_buffers_are_given_back),
        SLOW_CASE(test_in_progress),
        CASE(test_asynchronous_error),
        CASE(test_a_rank_too_many),
        CASE(test_engine),
        SLOW_CASE(test_engine),
        CASE(test_training),
        SLOW_CASE(test_training),
    };
    void *library = dlopen(getenv("WEFT_NCCL"), RTLD_NOW | RTLD_LOCAL);
    fake = library != NULL ? dlsym(library, "fake_nccl") : NULL;
    if (fake == NULL) {
        fprintf(stderr, "WEFT_NCCL names no fake: %s\n", dlerror());
        return 1;
    }
    fake->cpu = &device_cpu_group;
    fake->current = current_device;
    return cmocka_run_group_tests_name("cuda-nccl", tests, NULL, NULL);
}
