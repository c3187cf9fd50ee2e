/* Ranks on devices of their own, in one process: their sums go over the devices' group, or, where
 * they form none, through pinned memory over the links. Class exact gives a process's bits on every
 * layout; class fast gives its numbers. Over the trivial device, whose streams run nothing before
 * it is waited for and whose memory is NaN until it is written. */
#include "tests/unit/worker/train_runs.h"

#include "worker/model/device_team.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

enum { STEPS = 2, DEVICES = 8 };

static Device *devices[DEVICES];

static int open_devices(void **state)
{
    bool ok = true;
    for (uint32_t i = 0; i < DEVICES; i++) {
        devices[i] = device_open_module(device_module_cpu(), i, NULL);
        ok = ok && devices[i] != NULL;
    }
    return !ok;
}

static int close_devices(void **state)
{
    for (uint32_t i = 0; i < DEVICES; i++) {
        device_free(devices[i]);
    }
    return 0;
}

/* ---- where ranks are ---- */

static uint32_t global_of(const TrainRankOptions *o)
{
    const TrainPosition p = train_position(o->plan, o->replica, o->stage, o->rank);
    return train_global(&p, o->replica, o->stage, o->rank);
}

static void exact(TrainRankOptions *o)
{
    o->devices = true;
    o->device = devices[global_of(o)];
}

static void fast(TrainRankOptions *o)
{
    o->fast = true;
    o->device = devices[global_of(o)];
}

/* No two can be in one group. */
static void on_one(TrainRankOptions *o)
{
    o->devices = true;
    o->device = devices[0];
}

/* Hosts and devices in every group. */
static void on_some(TrainRankOptions *o)
{
    exact(o);
    o->device = global_of(o) % 2 == 0 ? o->device : NULL;
}

static void whole_optimizer(TrainRankOptions *o)
{
    exact(o);
    o->whole_optimizer = true;
    o->bucket_floats = 3000;
}

static void zero_bubble(TrainRankOptions *o)
{
    exact(o);
    o->schedule = PIPELINE_ZERO_BUBBLE;
}

static void full(TrainRankOptions *o)
{
    exact(o);
    o->recompute = RECOMPUTE_FULL;
}

static void selective(TrainRankOptions *o)
{
    exact(o);
    o->recompute = RECOMPUTE_SELECTIVE;
    o->bucket_floats = 3000;
}

static RunResult alone(const Toy *toy, void (*define)(TrainRankOptions *))
{
    const RunSpread one = {.isa = kernels_best_isa()};
    return run_toy(toy, &one, STEPS, define);
}

static void assert_equal_runs(const Toy *toy, const RunSpread *spreads, size_t n,
                              void (*define)(TrainRankOptions *))
{
    const RunResult want = alone(toy, define);
    for (size_t i = 0; i < n; i++) {
        RunSpread spread = spreads[i];
        spread.isa = kernels_best_isa();
        print_message("# %zu: dp %u pp %u tp %u\n", i, spread.dp, spread.pp, spread.tp);
        const RunResult got = run_toy(toy, &spread, STEPS, define);
        assert_same_run(&got, &want);
    }
}

/* ---- class exact ---- */

static const RunSpread layouts[] = {
    {.tp = 2, .change = exact},
    {.tp = 2, .micro = 2, .edit = plan_uneven, .change = exact},
    {.tp = 3, .micro = 2, .change = exact},
    {.tp = 5, .change = selective},
    {.dp = 2, .change = exact},
    {.dp = 3, .change = selective},
    {.dp = 3, .micro = 2, .change = whole_optimizer},
    {.pp = 2, .tp = 2, .change = exact},
    {.pp = 2, .tp = 2, .change = zero_bubble},
    {.dp = 2, .tp = 2, .edit = plan_uneven, .change = whole_optimizer},
    {.dp = 2, .pp = 2, .tp = 2, .micro = 2, .change = full},
};

static void test_gpt2(void **state)
{
    assert_equal_runs(&toy_wide_gpt2, layouts, G_N_ELEMENTS(layouts), NULL);
}

static void test_llama(void **state)
{
    Toy tied = toy_wide_llama;
    tied.config.untied = false;
    assert_equal_runs(&toy_wide_llama, layouts, G_N_ELEMENTS(layouts), NULL);
    assert_equal_runs(&tied, layouts + 7, G_N_ELEMENTS(layouts) - 7, NULL); /* stages, mixes */
}

/* Two leaves of eight have no sample, so a replica of eight has no subtree. */
static void few_samples(TrainRankOptions *o)
{
    o->leaves = 8;
    o->dropout = (Dropout){0.1f, 77};
    o->smoothing = 0.1f;
}

static void test_options(void **state)
{
    static const RunSpread spreads[] = {
        {.dp = 8, .change = exact}, {.dp = 5, .change = exact}, {.tp = 2, .change = exact}};
    assert_equal_runs(&toy_wide_gpt2, spreads, G_N_ELEMENTS(spreads), few_samples);
    assert_equal_runs(&toy_wide_llama, spreads, G_N_ELEMENTS(spreads), few_samples);
}

static void test_documents(void **state)
{
    static const RunSpread spreads[] = {{.tp = 3, .micro = 2, .change = exact},
                                        {.dp = 2, .pp = 2, .tp = 2, .change = full}};
    Toy gpt2 = toy_wide_gpt2, llama = toy_wide_llama;
    gpt2.bounds = BOUNDS_POSITIONS;
    llama.bounds = BOUNDS_ATTENTION;
    assert_equal_runs(&gpt2, spreads, G_N_ELEMENTS(spreads), NULL);
    assert_equal_runs(&llama, spreads, G_N_ELEMENTS(spreads), NULL);
}

static void bf16(TrainRankOptions *o)
{
    o->precision = PRECISION_BF16;
}

static void f16(TrainRankOptions *o)
{
    o->precision = PRECISION_F16;
    o->scaling.dynamic = true;
}

static void test_narrow_operands(void **state)
{
    static const RunSpread spreads[] = {{.tp = 3, .micro = 2, .change = exact},
                                        {.tp = 2, .edit = plan_uneven, .change = on_some},
                                        {.dp = 2, .pp = 2, .tp = 2, .change = full}};
    Toy odd = toy_wide_llama;
    odd.length--;
    assert_equal_runs(&toy_wide_gpt2, spreads, G_N_ELEMENTS(spreads), bf16);
    assert_equal_runs(&odd, spreads, G_N_ELEMENTS(spreads), bf16);
    assert_equal_runs(&toy_wide_llama, spreads, 1, f16);
}

/* More chunks than a tensor has units. */
static void test_large_vocabulary(void **state)
{
    static const RunSpread spreads[] = {{.tp = 2, .change = exact}, {.tp = 3, .change = on_one}};
    Toy toy = toy_wide_llama;
    toy.config.vocabulary = 69000;
    toy.config.width = 12;
    toy.config.layers = 1;
    assert_equal_runs(&toy, spreads, G_N_ELEMENTS(spreads), NULL);
}

/* ---- without a group ---- */

static const RunSpread staged[] = {
    {.tp = 2, .change = on_one},
    {.tp = 3, .micro = 2, .change = on_one},
    {.tp = 2, .edit = plan_uneven, .change = on_some},
    {.tp = 5, .micro = 2, .change = on_some},
    {.pp = 2, .tp = 2, .change = on_some},
    {.dp = 2, .tp = 2, .change = on_one},
    {.dp = 2, .pp = 2, .tp = 2, .micro = 2, .change = on_some},
};

static void test_staged(void **state)
{
    Toy tied = toy_wide_llama;
    tied.config.untied = false;
    assert_equal_runs(&toy_wide_gpt2, staged, G_N_ELEMENTS(staged), NULL);
    assert_equal_runs(&tied, staged, G_N_ELEMENTS(staged), NULL);
}

/* More rows than travel at once (FOLD_ROWS): hosts and devices cut alike. */
static void test_many_rows(void **state)
{
    static const RunSpread spreads[] = {{.tp = 3, .micro = 4, .change = on_some},
                                        {.tp = 3, .micro = 4, .change = on_one},
                                        {.tp = 3, .micro = 4, .change = exact}};
    Toy toy = toy_wide_gpt2;
    toy.config.layers = 1;
    toy.config.context = toy.length = 90;
    toy.sequences = 16;
    assert_equal_runs(&toy, spreads, G_N_ELEMENTS(spreads), NULL);
}

/* ---- what goes over links ---- */

/* Hellos; a layer's biases, in each of the replica's subtrees; nothing else. */
static void test_links_are_idle(void **state)
{
    const RunSpread tensor = {.tp = 2, .isa = kernels_best_isa(), .change = exact},
                    data = {.dp = 2, .isa = kernels_best_isa(), .change = exact},
                    off = {.dp = 2, .isa = kernels_best_isa(), .change = on_one};
    const RunResult t = run_toy(&toy_wide_llama, &tensor, STEPS, NULL),
                    d = run_toy(&toy_wide_gpt2, &data, STEPS, NULL),
                    o = run_toy(&toy_wide_gpt2, &off, STEPS, NULL);
    for (uint32_t r = 0; r < 2; r++) {
        assert_int_equal(t.traffic[r].tensor, sizeof(DeviceTeamHello));
        assert_int_equal(d.traffic[r].data, sizeof(DeviceTeamHello));
        assert_true(o.traffic[r].data > sizeof(DeviceTeamHello));
    }
}

/* Buckets are exchanged while the last backward pass is still being enqueued. */
static void test_overlap(void **state)
{
    const RunSpread data = {.dp = 2, .isa = kernels_best_isa(), .change = selective};
    const RunResult d = run_toy(&toy_wide_gpt2, &data, STEPS, NULL);
    for (uint32_t r = 0; r < 2; r++) {
        assert_true(d.overlapped[r] > 0);
    }
}

/* ---- class fast ---- */

/* All ranks agree (run_toy), and two runs have the same bits. */
static void test_fast(void **state)
{
    static const RunSpread spreads[] = {
        {.tp = 2, .change = fast},
        {.tp = 3, .micro = 2, .change = fast},
        {.tp = 2, .edit = plan_uneven, .change = fast},
        {.dp = 3, .change = fast},
        {.pp = 2, .tp = 2, .change = fast},
        {.dp = 2, .pp = 2, .tp = 2, .change = fast},
    };
    const Toy *const toys[] = {&toy_wide_gpt2, &toy_wide_llama};
    for (size_t t = 0; t < G_N_ELEMENTS(toys); t++) {
        const RunResult want = alone(toys[t], NULL);
        for (size_t i = 0; i < G_N_ELEMENTS(spreads); i++) {
            RunSpread spread = spreads[i];
            spread.isa = kernels_best_isa();
            const RunResult got = run_toy(toys[t], &spread, STEPS, NULL),
                            again = run_toy(toys[t], &spread, STEPS, NULL);
            assert_close_run(&got, &want, 1e-5);
            assert_same_run(&again, &got);
        }
    }
}

/* ---- resumed ---- */

/* What tensor ranks on devices saved goes on on a host, and the other way round. */
static void test_resumed(void **state)
{
    g_autoptr(ModelSpec) spec = toy_spec(&toy_wide_gpt2);
    RunState *saved = run_state_new(spec);
    const RunSpread
        whole = {.isa = kernels_best_isa()},
        first = {.dp = 2, .tp = 2, .isa = kernels_best_isa(), .change = exact, .save = saved},
        host = {.isa = kernels_best_isa(), .load = saved},
        other = {.pp = 2, .tp = 2, .isa = kernels_best_isa(), .change = exact, .load = saved};
    const RunResult want = run_toy(&toy_wide_gpt2, &whole, 4, NULL);
    run_toy(&toy_wide_gpt2, &first, 2, NULL);
    const RunResult on_host = run_toy(&toy_wide_gpt2, &host, 2, NULL),
                    again = run_toy(&toy_wide_gpt2, &other, 2, NULL);
    assert_memory_equal(on_host.losses, want.losses + 2, 2 * sizeof *want.losses);
    assert_memory_equal(again.losses, want.losses + 2, 2 * sizeof *want.losses);
    assert_true(hash128_equal(&on_host.digest, &want.digest));
    assert_true(hash128_equal(&again.digest, &want.digest));
    run_state_free(saved);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gpt2),
        cmocka_unit_test(test_llama),
        cmocka_unit_test(test_options),
        cmocka_unit_test(test_documents),
        cmocka_unit_test(test_narrow_operands),
        cmocka_unit_test(test_large_vocabulary),
        cmocka_unit_test(test_staged),
        cmocka_unit_test(test_links_are_idle),
        cmocka_unit_test(test_fast),
        cmocka_unit_test(test_resumed),
        cmocka_unit_test(test_overlap),
        cmocka_unit_test(test_many_rows),
    };
    return cmocka_run_group_tests(tests, open_devices, close_devices);
}
