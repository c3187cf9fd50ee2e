#include "worker/measure.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>
#include <glib/gstdio.h>
#include <string.h>

static void assert_plausible(const Measure *m)
{
    assert_true(m->read_bytes_per_s > 1e8 && m->read_bytes_per_s < 1e13);
    assert_true(m->int8_ops_per_s > 1e6 && m->int8_ops_per_s < 1e16);
    assert_true(m->f32_ops_per_s > 1e6 && m->f32_ops_per_s < 1e16);
    assert_true(m->link_latency_s > 1e-7 && m->link_latency_s < 0.1);
    assert_true(m->link_bytes_per_s > 1e6 && m->link_bytes_per_s < 1e12);
}

static void test_is_kept_for_the_same_machine_only(void **state)
{
    (void)state;
    g_autofree char *dir = g_dir_make_tmp("weft-measure-XXXXXX", NULL);
    MeasureOptions options = {.isa = kernels_best_isa(), .threads = 1, .memory_bytes = 32u << 20};
    Measure first, again, other;
    GError *error = NULL;
    assert_true(measure_get(dir, &options, &first, NULL, &error));
    assert_plausible(&first);
    assert_true(measure_get(dir, &options, &again, NULL, &error));
    /* Two measurements never agree to the last bit: this one was read. */
    assert_memory_equal(&first, &again, sizeof first);
    options.threads = 2;
    assert_true(measure_get(dir, &options, &other, NULL, &error));
    assert_plausible(&other);
    assert_memory_not_equal(&first, &other, sizeof first);
    g_autofree char *path = g_build_filename(dir, "measure", NULL);
    /* A file of garbage is measured over, not believed. */
    assert_true(g_file_set_contents(path, "[measure]\nread_bytes_per_s=nan\n", -1, NULL));
    assert_true(measure_get(dir, &options, &other, NULL, &error));
    assert_plausible(&other);
    g_unlink(path);
    g_rmdir(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_is_kept_for_the_same_machine_only)};
    return cmocka_run_group_tests_name("measure", tests, NULL, NULL);
}
