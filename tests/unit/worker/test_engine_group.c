/* Tensor ranks on several devices of one host: their sums are collectives on the streams, inside
 * the decode graph, and the host takes no part in them. Over the trivial device, whose streams run
 * nothing before it is waited for. What fails is named, by rank and operation. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "kernels/kernels.h"
#include "proto/base/failpoint.h"
#include "tests/unit/worker/engine_runs.h"
#include "worker/model/device_stage.h"
#include "worker/serve/engine_state.h"

#include <math.h>
#include <string.h>

static const uint32_t PROMPT[] = {1,  17,  5,  99, 23, 4,  250, 31, 77, 8,   140,
                                  63, 201, 19, 55, 9,  12, 33,  47, 81, 180, 3};
enum { N_PROMPT = G_N_ELEMENTS(PROMPT), N_TOKENS = 9, VOCAB = 2500, DEVICES = 5 };

typedef struct Devices {
    Device *all[DEVICES];
    const Device *given[8]; /* by global rank */
} Devices;

static void devices_open(Devices *d, uint32_t n)
{
    *d = (Devices){{NULL}, {NULL}};
    for (uint32_t i = 0; i < n; i++) {
        g_autoptr(GError) error = NULL;
        d->all[i] = device_open_module(device_module_cpu(), i, &error);
        if (d->all[i] == NULL) {
            fail_msg("%s", error->message);
        }
        d->given[i] = d->all[i];
    }
}

static void devices_close(Devices *d)
{
    for (uint32_t i = 0; i < DEVICES; i++) {
        device_free(d->all[i]);
    }
}

static LocalReplica *replica(const Gguf *g, LocalLayout layout, const Devices *d)
{
    g_autoptr(GError) error = NULL;
    layout.isa = kernels_best_isa();
    layout.devices = d != NULL ? d->given : NULL;
    LocalReplica *r = local_replica_new(g, &layout, NULL, &error);
    if (r == NULL) {
        fail_msg("%s", error->message);
    }
    return r;
}

static const DeviceStage *stage_of(LocalReplica *r, uint32_t rank)
{
    return local_replica_engine(r, rank)->stage->device;
}

static void run(LocalReplica *r, LocalResult *result)
{
    const EngineRequest request = {
        .prompt = PROMPT, .n_prompt = N_PROMPT, .max_tokens = N_TOKENS, .want_logits = true};
    local_replica_run(r, &request, 1, result);
    if (result->error != NULL) {
        fail_msg("%s", result->error);
    }
}

static void assert_close(const LocalResult *a, const LocalResult *b)
{
    double largest = 0, apart = 0;
    assert_int_equal(a->n, b->n);
    assert_memory_equal(a->ids, b->ids, sizeof(uint32_t) * a->n);
    for (size_t i = 0; i < (size_t)a->n * VOCAB; i++) {
        largest = fmax(largest, fabs((double)a->logits[i]));
        apart = fmax(apart, fabs((double)a->logits[i] - (double)b->logits[i]));
    }
    if (!(apart <= 1e-3 * largest)) {
        fail_msg("logits differ by %g of %g", apart, largest);
    }
}

/* ---- the text of one ---- */

static const double UNEVEN[] = {1.0, 2.6, 0.7, 1.3};

static void test_layouts(void **state)
{
    static const struct {
        LocalLayout layout;
        uint32_t n;
    } cases[] = {{{.pp = 1, .tp = {2}}, 2},
                 {{.pp = 1, .tp = {3}, .max_rows = 8}, 3},
                 {{.pp = 1, .tp = {4}, .weight = UNEVEN}, 4},
                 {{.pp = 2, .tp = {2, 3}, .weight = UNEVEN}, 5},
                 {{.pp = 2, .tp = {1, 2}}, 3}};
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_F32);
    LocalResult host, other;
    (void)state;
    LocalReplica *r = replica(g, (LocalLayout){.pp = 1, .tp = {1}}, NULL);
    run(r, &host);
    local_replica_free(r);
    for (unsigned i = 0; i < G_N_ELEMENTS(cases); i++) {
        Devices devices;
        devices_open(&devices, cases[i].n);
        r = replica(g, cases[i].layout, &devices);
        run(r, &other);
        assert_close(&host, &other);
        for (uint32_t k = 0; k < cases[i].n; k++) {
            const DeviceStage *d = stage_of(r, k);
            assert_int_equal(d->team.joined, d->stage->plan_stage->n_ranks > 1);
            /* the sums are in the graph: made once, launched for each token after the second */
            assert_int_equal(d->n_captures, 1);
            assert_int_equal(d->n_launches, N_TOKENS - 2);
        }
        local_result_clear(&other);
        local_replica_free(r);
        devices_close(&devices);
    }
    local_result_clear(&host);
}

/* Two runs of one layout, bit by bit: the order of sums is that of ranks, whoever comes first. */
static void test_again(void **state)
{
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_BF16);
    LocalResult results[2];
    (void)state;
    for (unsigned i = 0; i < 2; i++) {
        Devices devices;
        devices_open(&devices, 3);
        LocalReplica *r = replica(g, (LocalLayout){.pp = 1, .tp = {3}}, &devices);
        run(r, &results[i]);
        local_replica_free(r);
        devices_close(&devices);
    }
    assert_true(runs_equal(&results[0], &results[1]));
    local_result_clear(&results[0]);
    local_result_clear(&results[1]);
}

/* ---- who is in no group ---- */

static void check_alone(const Gguf *g, const LocalResult *host, const Devices *devices)
{
    LocalResult other;
    LocalReplica *r = replica(g, (LocalLayout){.pp = 1, .tp = {2}}, devices);
    run(r, &other);
    assert_close(host, &other);
    for (uint32_t k = 0; k < 2; k++) {
        assert_true(stage_of(r, k) == NULL || !stage_of(r, k)->team.joined);
    }
    local_result_clear(&other);
    local_replica_free(r);
}

static void test_no_group(void **state)
{
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_F32);
    LocalResult host;
    Devices devices;
    (void)state;
    LocalReplica *r = replica(g, (LocalLayout){.pp = 1, .tp = {1}}, NULL);
    run(r, &host);
    local_replica_free(r);
    devices_open(&devices, 2);
    devices.given[1] = devices.all[0]; /* two ranks on one device */
    check_alone(g, &host, &devices);
    devices.given[1] = NULL; /* a rank on the host */
    check_alone(g, &host, &devices);
    devices.given[1] = devices.all[1]; /* switched off */
    g_setenv("WEFT_DEVICE_GROUP", "off", TRUE);
    check_alone(g, &host, &devices);
    g_unsetenv("WEFT_DEVICE_GROUP");
    devices_close(&devices);
    local_result_clear(&host);
}

/* ---- failures ---- */

static void run_to_error(LocalReplica *r, LocalResult *result)
{
    local_replica_greedy(r, PROMPT, N_PROMPT, N_TOKENS, result);
    assert_string_equal(result->finish_reason, "error");
}

static void test_a_dead_device_ends_the_epoch_by_name(void **state)
{
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_F32);
    LocalResult result;
    Devices devices;
    (void)state;
    devices_open(&devices, 3);
    LocalReplica *r = replica(g, (LocalLayout){.pp = 1, .tp = {3}}, &devices);
    failpoint_set("device-fail-2", true, -(int64_t)DEVICE_ECC);
    run_to_error(r, &result);
    failpoint_set("device-fail-2", false, 0);
    assert_non_null(strstr(result.error, "cpu:2 (host)"));
    assert_non_null(strstr(result.error, "uncorrectable memory error"));
    assert_non_null(strstr(result.error, "a step on the device"));
    local_result_clear(&result);
    local_replica_free(r);
    /* the others' devices live, and serve without it */
    r = replica(g, (LocalLayout){.pp = 1, .tp = {2}}, &devices);
    run(r, &result);
    local_result_clear(&result);
    local_replica_free(r);
    devices_close(&devices);
}

/* Two tensor ranks, the fail point on: the request ends with an error that says all of `words`. */
static void assert_ends(double predicted_step_s, const char *point, int64_t argument,
                        const char *const *words)
{
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_F32);
    const LocalLayout layout = {.pp = 1, .tp = {2}, .predicted_step_s = predicted_step_s};
    LocalResult result;
    Devices devices;
    devices_open(&devices, 2);
    LocalReplica *r = replica(g, layout, &devices);
    failpoint_set(point, true, argument);
    run_to_error(r, &result);
    failpoint_set(point, false, 0);
    for (; *words != NULL; words++) {
        assert_non_null(strstr(result.error, *words));
    }
    local_result_clear(&result);
    local_replica_free(r);
    devices_close(&devices);
}

static void test_a_group_that_ends_names_the_rank(void **state)
{
    (void)state;
    assert_ends(0, "device-group-fail", 1,
                (const char *[]){"rank 1: fail point device-group-fail",
                                 "its group of devices has ended", NULL});
}

static void test_a_rank_that_never_comes_is_named(void **state)
{
    (void)state;
    failpoint_set("engine-hold-rank", true, 1);
    assert_ends(0.1, "engine-hold", 0,
                (const char *[]){"worker node1 did not answer during a step on the device", NULL});
    failpoint_set("engine-hold-rank", false, 0);
}

/* The host lives, the stream stands: all ranks answer each other, so nobody is accused. */
static void test_a_stream_that_stands(void **state)
{
    (void)state;
    assert_ends(1, "device-group-hold", 1,
                (const char *[]){"which every rank of the group waits in", NULL});
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_layouts),
        cmocka_unit_test(test_again),
        cmocka_unit_test(test_no_group),
        cmocka_unit_test(test_a_dead_device_ends_the_epoch_by_name),
        cmocka_unit_test(test_a_group_that_ends_names_the_rank),
        cmocka_unit_test(test_a_rank_that_never_comes_is_named),
        cmocka_unit_test(test_a_stream_that_stands),
    };
    return cmocka_run_group_tests_name("engine_group", tests, NULL, NULL);
}
