/* Keys over a simulated disk, and what /metrics is written with. */
#include "coordinator/gateway/openai/api_keys.h"
#include "proto/base/error.h"
#include "tests/sim/sim_loop.h"
#include "transport/daemon/metrics.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

typedef struct Fixture {
    SimWorld *world;
    Loop *loop;
    StoreDisk *disk;
    Store *store;
    RandomSeeded random;
    ApiKeys *keys;
    char *key;
    bool done;
    int code;
    unsigned n_rows;
} Fixture;

static void open_keys(Fixture *f)
{
    f->store = store_memory_new(f->disk, f->loop);
    f->keys = api_keys_new(f->loop, f->store, &f->random.base);
}

static void close_keys(Fixture *f)
{
    api_keys_free(f->keys);
    store_free(f->store);
}

static int setup(void **state)
{
    Fixture *f = g_new0(Fixture, 1);
    f->world = sim_world_new(1);
    f->loop = sim_world_loop(f->world);
    f->disk = store_disk_new();
    random_seeded_init(&f->random, 5);
    open_keys(f);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    Fixture *f = *state;
    close_keys(f);
    store_disk_free(f->disk);
    sim_world_free(f->world);
    g_free(f->key);
    g_free(f);
    return 0;
}

static void on_created(const char *key, const GError *error, void *user)
{
    Fixture *f = user;
    g_free(f->key);
    f->key = g_strdup(key);
    f->code = error != NULL ? error->code : 0;
    f->done = true;
}

static void on_done(const GError *error, void *user)
{
    Fixture *f = user;
    f->code = error != NULL ? error->code : 0;
    f->done = true;
}

static void create(Fixture *f, const char *name)
{
    g_autoptr(GError) error = NULL;
    f->done = false;
    assert_true(api_keys_create(f->keys, name, on_created, f, &error));
    sim_world_run_until(f->world, &f->done, 1000000);
    assert_true(f->done);
}

static const char *name_of(Fixture *f, const char *scheme)
{
    g_autofree char *header = g_strconcat(scheme, f->key, NULL);
    return api_keys_name(f->keys, header);
}

static void test_a_key_is_known_until_it_is_revoked(void **state)
{
    Fixture *f = *state;
    g_autoptr(GError) error = NULL;
    assert_false(api_keys_any(f->keys));
    create(f, "joe");
    assert_true(g_str_has_prefix(f->key, "weft-key-"));
    assert_int_equal(strlen(f->key), strlen("weft-key-") + 64);
    assert_string_equal(name_of(f, "Bearer "), "joe");
    assert_string_equal(name_of(f, "bearer   "), "joe");
    assert_null(name_of(f, "Basic "));
    assert_null(name_of(f, ""));
    assert_null(api_keys_name(f->keys, "Bearer "));
    assert_null(api_keys_name(f->keys, "Bearer weft-key-0"));
    assert_null(api_keys_name(f->keys, NULL));
    f->done = false;
    assert_true(api_keys_revoke(f->keys, "joe", on_done, f, &error));
    assert_null(name_of(f, "Bearer ")); /* before it is durable */
    sim_world_run_until(f->world, &f->done, 1000000);
    assert_int_equal(f->code, 0);
    assert_false(api_keys_any(f->keys));
    assert_false(api_keys_revoke(f->keys, "joe", on_done, f, &error));
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND));
}

static void test_names_that_are_refused(void **state)
{
    Fixture *f = *state;
    g_autofree char *longest = g_strnfill(64, 'a'), *longer = g_strnfill(65, 'a');
    const char *bad[] = {"", "a b", "a/b", "\xc3\xa4", longer, "joe"};
    create(f, "joe");
    create(f, longest);
    for (size_t i = 0; i < G_N_ELEMENTS(bad); i++) {
        g_autoptr(GError) error = NULL;
        assert_false(api_keys_create(f->keys, bad[i], on_created, f, &error));
        assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
    }
}

static void on_rows(const GPtrArray *rows, const GError *error, void *user)
{
    Fixture *f = user;
    assert_null(error);
    f->n_rows = rows->len;
    for (guint i = 0; i < rows->len; i++) {
        const StoreRow *row = g_ptr_array_index(rows, i);
        gsize size;
        const char *bytes = g_bytes_get_data(row->value, &size);
        assert_null(strstr(row->key, f->key + strlen("weft-key-")));
        assert_null(memmem(bytes, size, f->key, strlen(f->key)));
        assert_true(api_keys_restore(f->keys, row, NULL));
    }
    f->done = true;
}

static void test_keys_outlive_the_coordinator_as_hashes(void **state)
{
    Fixture *f = *state;
    create(f, "joe");
    close_keys(f);
    open_keys(f);
    assert_null(name_of(f, "Bearer "));
    f->done = false;
    store_read(f->store, STORE_API_KEYS, on_rows, f);
    sim_world_run_until(f->world, &f->done, 1000000);
    assert_int_equal(f->n_rows, 1);
    assert_string_equal(name_of(f, "Bearer "), "joe");
    StoreRow damaged = {.key = "x", .value = g_bytes_new("?", 1)};
    g_autoptr(GError) error = NULL;
    assert_false(api_keys_restore(f->keys, &damaged, &error));
    assert_non_null(error);
    g_bytes_unref(damaged.value);
}

static void test_a_key_that_is_not_durable_is_not_told(void **state)
{
    Fixture *f = *state;
    store_disk_fail_after(f->disk, 0);
    create(f, "joe");
    assert_null(f->key);
    assert_int_equal(f->code, WEFT_ERROR_IO);
    assert_false(api_keys_any(f->keys));
}

static void test_metrics_text(void **state)
{
    static const double bounds[] = {0.5, 2};
    Histogram h;
    g_autoptr(GString) out = g_string_new(NULL);
    histogram_init(&h, bounds, 2);
    const double values[] = {0.25, 0.5, 1, 100, -1, NAN, INFINITY};
    for (size_t i = 0; i < G_N_ELEMENTS(values); i++) {
        histogram_add(&h, values[i]);
    }
    metrics_family(out, "a_seconds", "histogram", "Help.");
    metrics_histogram(out, "a_seconds", &h, "m", "x\"\\\n", NULL);
    metrics_value(out, "b", 1e15, NULL);
    metrics_value(out, "c", NAN, "l", "v", "absent", NULL, "k", "w", NULL);
    assert_string_equal(out->str, "# HELP a_seconds Help.\n# TYPE a_seconds histogram\n"
                                  "a_seconds_bucket{le=\"0.5\",m=\"x\\\"\\\\\\n\"} 2\n"
                                  "a_seconds_bucket{le=\"2\",m=\"x\\\"\\\\\\n\"} 3\n"
                                  "a_seconds_bucket{le=\"+Inf\",m=\"x\\\"\\\\\\n\"} 4\n"
                                  "a_seconds_sum{m=\"x\\\"\\\\\\n\"} 101.75\n"
                                  "a_seconds_count{m=\"x\\\"\\\\\\n\"} 4\n"
                                  "b 1e+15\nc{l=\"v\",k=\"w\"} NaN\n");
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_a_key_is_known_until_it_is_revoked),
        TEST(test_names_that_are_refused),
        TEST(test_keys_outlive_the_coordinator_as_hashes),
        TEST(test_a_key_that_is_not_durable_is_not_told),
        TEST(test_metrics_text),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
