#include "worker/measure.h"

#include "proto/base/failpoint.h"
#include "worker/measure_device.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>
#include <glib/gstdio.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static void assert_plausible(const Measure *m)
{
    assert_true(m->read_bytes_per_s > 1e8 && m->read_bytes_per_s < 1e13);
    assert_true(m->int8_ops_per_s > 1e6 && m->int8_ops_per_s < 1e16);
    assert_true(m->f32_ops_per_s > 1e6 && m->f32_ops_per_s < 1e16);
    for (unsigned type = 0; type < DTYPE_LIMIT; type++) {
        const bool is_there = kernels_get(kernels_best_isa())->matmul[type] != NULL;
        assert_true(is_there ? m->matmul_ops_per_s[type] > 1e6 : m->matmul_ops_per_s[type] == 0);
    }
    assert_true(m->matmul_ops_per_s[DTYPE_Q8_0] == m->int8_ops_per_s);
    assert_true(m->matmul_ops_per_s[DTYPE_F32] == m->f32_ops_per_s);
    assert_true(m->link_latency_s > 1e-7 && m->link_latency_s < 0.1);
    assert_true(m->link_bytes_per_s > 1e6 && m->link_bytes_per_s < 1e12);
}

#define NOW INT64_C(1800000000)
#define DAY INT64_C(86400)

typedef struct Fixture {
    char *dir, *path, *turn;
    MeasureOptions options;
} Fixture;

static Fixture fixture(void)
{
    Fixture f = {
        .dir = g_dir_make_tmp("weft-measure-XXXXXX", NULL),
        .options = {
            .isa = kernels_best_isa(), .threads = 1, .memory_bytes = 32u << 20, .now_s = NOW}};
    f.path = g_build_filename(f.dir, "measure", NULL);
    f.options.turn = f.turn = g_path_get_basename(f.dir); /* ours alone */
    return f;
}

static void fixture_free(Fixture *f)
{
    g_unlink(f->path);
    g_rmdir(f->dir);
    g_free(f->dir);
    g_free(f->path);
    g_free(f->turn);
}

static Measure get(const Fixture *f)
{
    Measure m;
    GError *error = NULL;
    assert_true(measure_get(f->dir, &f->options, &m, NULL, &error));
    return m;
}

/* What the file has of one figure. */
static double kept(const Fixture *f, const char *name)
{
    g_autoptr(GKeyFile) file = g_key_file_new();
    assert_true(g_key_file_load_from_file(file, f->path, G_KEY_FILE_NONE, NULL));
    return g_key_file_get_double(file, "measure", name, NULL);
}

static void keep(const Fixture *f, const char *name, double value)
{
    g_autoptr(GKeyFile) file = g_key_file_new();
    assert_true(g_key_file_load_from_file(file, f->path, G_KEY_FILE_NONE, NULL));
    g_key_file_set_double(file, "measure", name, value);
    assert_true(g_key_file_save_to_file(file, f->path, NULL));
}

static void test_the_better_of_each_figure_is_kept(void **state)
{
    (void)state;
    Fixture f = fixture();
    const Measure first = get(&f);
    assert_plausible(&first);
    assert_int_equal(first.since_s, NOW);
    /* an earlier start found the machine idle for one figure, and under load for two others */
    keep(&f, "read_bytes_per_s", 9e12);
    keep(&f, "int8_ops_per_s", 1);
    keep(&f, "matmul_Q8_0_ops_per_s", 1);
    keep(&f, "matmul_Q4_0_ops_per_s", 9e15);
    keep(&f, "link_latency_s", 1);
    f.options.now_s = NOW + 6 * DAY;
    const Measure again = get(&f);
    assert_plausible(&again);
    assert_true(again.read_bytes_per_s == 9e12);
    assert_int_equal(again.since_s, NOW);
    assert_true(kept(&f, "read_bytes_per_s") == 9e12);
    assert_true(again.matmul_ops_per_s[DTYPE_Q4_0] == 9e15);
    assert_true(kept(&f, "int8_ops_per_s") == again.int8_ops_per_s);
    assert_true(kept(&f, "link_latency_s") == again.link_latency_s);
    fixture_free(&f);
}

static void test_is_kept_for_a_week(void **state)
{
    (void)state;
    Fixture f = fixture();
    get(&f);
    keep(&f, "read_bytes_per_s", 9e12);
    f.options.now_s = NOW + 8 * DAY;
    const Measure later = get(&f);
    assert_true(later.read_bytes_per_s < 9e12);
    assert_int_equal(later.since_s, NOW + 8 * DAY);
    /* a clock that was set back: what seems to come from the future is not believed */
    keep(&f, "read_bytes_per_s", 9e12);
    f.options.now_s = NOW;
    assert_true(get(&f).read_bytes_per_s < 9e12);
    fixture_free(&f);
}

static void test_is_kept_for_the_same_machine_only(void **state)
{
    (void)state;
    Fixture f = fixture();
    get(&f);
    keep(&f, "read_bytes_per_s", 9e12);
    f.options.threads = 2;
    assert_true(get(&f).read_bytes_per_s < 9e12);
    /* A file of garbage is measured over, not believed. */
    assert_true(g_file_set_contents(f.path, "[measure]\nread_bytes_per_s=nan\n", -1, NULL));
    const Measure other = get(&f);
    assert_plausible(&other);
    fixture_free(&f);
}

static void test_what_is_kept_serves_while_another_measures(void **state)
{
    (void)state;
    Fixture f = fixture();
    get(&f);
    keep(&f, "read_bytes_per_s", 1);
    struct sockaddr_un at = {.sun_family = AF_UNIX};
    strcpy(at.sun_path + 1, f.turn);
    const int other = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const size_t size = offsetof(struct sockaddr_un, sun_path) + 1 + strlen(f.turn);
    assert_int_equal(bind(other, (struct sockaddr *)&at, (socklen_t)size), 0);
    assert_true(get(&f).read_bytes_per_s == 1);
    close(other);
    assert_true(get(&f).read_bytes_per_s > 1);
    fixture_free(&f);
}

/* The trivial device's figures are this host's: positive, and links stay what they were. */
static void test_a_device(void **state)
{
    const MeasureDeviceSizes small = {.copy_bytes = 1 << 20, .side = 64, .rows = 4, .repeats = 2};
    g_autoptr(Device) device = device_open_module(device_module_cpu(), 0, NULL);
    Measure m = {.link_latency_s = 7, .link_bytes_per_s = 8};
    (void)state;
    assert_true(measure_device(device, &small, &m, NULL));
    assert_true(m.read_bytes_per_s > 0 && m.f32_ops_per_s > 0 && m.int8_ops_per_s > 0);
    assert_true(m.link_latency_s == 7 && m.link_bytes_per_s == 8);
#ifdef WEFT_FAILPOINTS
    g_autoptr(GError) error = NULL;
    failpoint_set("device-fail", true, -(int64_t)DEVICE_ECC);
    assert_false(measure_device(device, &small, &m, &error));
    failpoint_set("device-fail", false, 0);
    assert_non_null(strstr(error->message, "measuring: uncorrectable memory error"));
#endif
}

/* Each of several: its own figures; the first one's are the worker's. */
static void test_several_devices(void **state)
{
    const MeasureDeviceSizes small = {.copy_bytes = 1 << 20, .side = 64, .rows = 4, .repeats = 2};
    g_autoptr(Device) a = device_open_module(device_module_cpu(), 0, NULL);
    g_autoptr(Device) b = device_open_module(device_module_cpu(), 1, NULL);
    const Device *devices[] = {a, b};
    Measure host = {.link_latency_s = 7}, out[2];
    (void)state;
    assert_true(measure_devices(devices, 2, &small, &host, out, NULL));
    for (unsigned i = 0; i < 2; i++) {
        assert_true(out[i].read_bytes_per_s > 0 && out[i].f32_ops_per_s > 0);
        assert_true(out[i].link_latency_s == 7);
    }
    assert_memory_equal(&host, &out[0], sizeof host);
#ifdef WEFT_FAILPOINTS
    g_autoptr(GError) error = NULL;
    failpoint_set("device-fail-1", true, -(int64_t)DEVICE_LOST);
    assert_false(measure_devices(devices, 2, &small, &host, out, &error));
    failpoint_set("device-fail-1", false, 0);
    assert_non_null(strstr(error->message, "cpu:1"));
#endif
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_device),
        cmocka_unit_test(test_several_devices),
        cmocka_unit_test(test_the_better_of_each_figure_is_kept),
        cmocka_unit_test(test_is_kept_for_a_week),
        cmocka_unit_test(test_what_is_kept_serves_while_another_measures),
        cmocka_unit_test(test_is_kept_for_the_same_machine_only),
    };
    return cmocka_run_group_tests_name("measure", tests, NULL, NULL);
}
