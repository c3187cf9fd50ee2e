/* The same expectations of both fills of the Store seam; then what only one of them can show:
 * durability and failure. */
#include "coordinator/ca/state_files.h"
#include "coordinator/store/records.h"
#include "coordinator/store/store.h"
#include "proto/base/error.h"
#include "transport/daemon/daemon.h"

#include <glib/gstdio.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#define PATIENCE_US 10000000

typedef struct Fixture {
    MainLoop *loop;
    char *dir, *path;
    StoreDisk *disk; /* NULL: SQLite */
    Store *store;
} Fixture;

static Store *open_store(Fixture *f)
{
    g_autoptr(GError) error = NULL;
    Store *store = f->disk != NULL ? store_memory_new(f->disk, main_loop_loop(f->loop))
                                   : store_sqlite_open(f->path, main_loop_loop(f->loop), &error);
    g_assert_no_error(error);
    return store;
}

static int set_up(void **state, bool memory)
{
    Fixture *f = g_new0(Fixture, 1);
    f->loop = main_loop_new();
    f->dir = g_dir_make_tmp("weft-store-XXXXXX", NULL);
    f->path = g_build_filename(f->dir, "weft.db", NULL);
    f->disk = memory ? store_disk_new() : NULL;
    f->store = open_store(f);
    *state = f;
    return 0;
}

static int set_up_sqlite(void **state)
{
    return set_up(state, false);
}

static int set_up_memory(void **state)
{
    return set_up(state, true);
}

static int tear_down(void **state)
{
    Fixture *f = *state;
    store_free(f->store);
    main_loop_free(f->loop);
    store_disk_free(f->disk);
    static const char *const names[] = {"weft.db", "weft.db-wal", "weft.db-shm", "lock", "note"};
    for (size_t i = 0; i < G_N_ELEMENTS(names); i++) {
        g_autofree char *path = g_build_filename(f->dir, names[i], NULL);
        g_unlink(path);
    }
    g_rmdir(f->dir);
    g_free(f->path);
    g_free(f->dir);
    g_free(f);
    return 0;
}

typedef struct Result {
    bool done;
    GError *error;
    GString *rows; /* "key=value;" */
} Result;

static void on_done(const GError *error, void *user)
{
    Result *r = user;
    r->done = true;
    r->error = error != NULL ? g_error_copy(error) : NULL;
}

static void on_rows(const GPtrArray *rows, const GError *error, void *user)
{
    Result *r = user;
    r->done = true;
    g_assert_no_error(error);
    r->rows = g_string_new(NULL);
    for (guint i = 0; i < rows->len; i++) {
        StoreRow *row = g_ptr_array_index(rows, i);
        gsize size;
        const char *value = g_bytes_get_data(row->value, &size);
        g_string_append_printf(r->rows, "%s=%.*s;", row->key, (int)size, size > 0 ? value : "");
    }
}

static GBytes *text(const char *t)
{
    return g_bytes_new(t, strlen(t));
}

static void put(Fixture *f, StoreTable table, const char *key, const char *value)
{
    Result r = {0};
    store_put(f->store, table, key, value != NULL ? text(value) : NULL, on_done, &r);
    assert_false(r.done); /* never inside the call */
    assert_true(main_loop_run_until(f->loop, &r.done, PATIENCE_US));
    g_assert_no_error(r.error);
}

static void expect_rows(Fixture *f, StoreTable table, const char *expected)
{
    Result r = {0};
    store_read(f->store, table, on_rows, &r);
    assert_true(main_loop_run_until(f->loop, &r.done, PATIENCE_US));
    assert_string_equal(r.rows->str, expected);
    g_string_free(r.rows, TRUE);
}

static void test_put_replace_delete(void **state)
{
    Fixture *f = *state;
    expect_rows(f, STORE_MEMBERS, "");
    put(f, STORE_MEMBERS, "b", "1");
    put(f, STORE_MEMBERS, "a", "");
    put(f, STORE_TOKENS, "b", "other table");
    put(f, STORE_MEMBERS, "b", "2");
    expect_rows(f, STORE_MEMBERS, "a=;b=2;");
    put(f, STORE_MEMBERS, "a", NULL);
    put(f, STORE_MEMBERS, "never there", NULL);
    expect_rows(f, STORE_MEMBERS, "b=2;");
    expect_rows(f, STORE_TOKENS, "b=other table;");
}

static void test_order_of_calls(void **state)
{
    Fixture *f = *state;
    Result last = {0};
    for (int i = 0; i < 50; i++) {
        g_autofree char *value = g_strdup_printf("%d", i);
        store_put(f->store, STORE_META, "k", text(value), NULL, NULL);
    }
    store_read(f->store, STORE_META, on_rows, &last);
    assert_true(main_loop_run_until(f->loop, &last.done, PATIENCE_US));
    assert_string_equal(last.rows->str, "k=49;");
    g_string_free(last.rows, TRUE);
}

static void test_survives_reopening(void **state)
{
    Fixture *f = *state;
    put(f, STORE_EPOCHS, "job/0", "7");
    store_put(f->store, STORE_EPOCHS, "job/1", text("8"), NULL, NULL);
    store_put(f->store, STORE_JOBS, "job", text("x"), NULL, NULL);
    if (f->disk != NULL) { /* the simulated disk has it when the loop ran */
        expect_rows(f, STORE_JOBS, "job=x;");
    }
    store_free(f->store); /* finishes what was asked for */
    f->store = open_store(f);
    expect_rows(f, STORE_EPOCHS, "job/0=7;job/1=8;");
    expect_rows(f, STORE_JOBS, "job=x;");
}

static void test_nothing_is_reported_after_free(void **state)
{
    Fixture *f = *state;
    Result r = {0};
    store_put(f->store, STORE_META, "k", text("v"), on_done, &r);
    store_read(f->store, STORE_META, on_rows, &r);
    store_free(f->store);
    bool never = false;
    assert_false(main_loop_run_until(f->loop, &never, 20000));
    assert_false(r.done);
    f->store = open_store(f);
}

static void test_batch_is_atomic_under_failure(void **state)
{
    Fixture *f = *state;
    put(f, STORE_META, "before", "1");
    store_disk_fail_after(f->disk, 0);
    StoreChange changes[] = {{STORE_META, "a", text("1")}, {STORE_JOBS, "b", text("2")}};
    Result r = {0};
    store_write(f->store, changes, 2, on_done, &r);
    assert_true(main_loop_run_until(f->loop, &r.done, PATIENCE_US));
    assert_non_null(r.error);
    assert_int_equal(r.error->code, WEFT_ERROR_IO);
    g_error_free(r.error);
    g_bytes_unref(changes[0].value);
    g_bytes_unref(changes[1].value);
    store_disk_fail_after(f->disk, -1);
    expect_rows(f, STORE_META, "before=1;");
    expect_rows(f, STORE_JOBS, "");
}

static void test_newer_schema_is_refused(void **state)
{
    Fixture *f = *state;
    store_free(f->store);
    f->store = NULL;
    g_autofree char *command =
        g_strdup_printf("/usr/bin/python3 -c \"import sqlite3; c = sqlite3.connect('%s'); "
                        "c.execute('PRAGMA user_version = 99')\"",
                        f->path);
    int status = -1;
    if (!g_spawn_command_line_sync(command, NULL, NULL, &status, NULL) || status != 0) {
        print_message("skipped: no python3 with sqlite3 to write another schema version\n");
        skip();
    }
    g_autoptr(GError) error = NULL;
    assert_null(store_sqlite_open(f->path, main_loop_loop(f->loop), &error));
    assert_int_equal(error->code, WEFT_ERROR_INVALID);
    assert_non_null(strstr(error->message, "schema version 99"));
}

static void test_damaged_file_is_an_error(void **state)
{
    Fixture *f = *state;
    g_autofree char *path = g_build_filename(f->dir, "note", NULL);
    g_autofree char *garbage = g_strnfill(8192, 'x');
    assert_true(g_file_set_contents(path, garbage, 8192, NULL));
    g_autoptr(GError) error = NULL;
    assert_null(store_sqlite_open(path, main_loop_loop(f->loop), &error));
    assert_int_equal(error->code, WEFT_ERROR_IO);
}

/* ---- records ---- */

static void test_records_round_trip(void **state)
{
    TokenRecord token = {.role = "worker", .expires_us = -5, .uses_left = 3}, token_out = {0};
    g_autoptr(GBytes) token_bytes = token_record_pack(&token);
    assert_true(token_record_read("k", token_bytes, &token_out, NULL));
    assert_string_equal(token_out.role, "worker");
    assert_int_equal(token_out.expires_us, -5);
    assert_int_equal(token_out.uses_left, 3);
    token_record_clear(&token_out);

    MemberRecord member = {.joined_us = 9, .draining = true, .attached = true, .reason = "r"},
                 member_out = {0};
    g_autoptr(GBytes) member_bytes = member_record_pack(&member);
    assert_true(member_record_read("k", member_bytes, &member_out, NULL));
    assert_true(member_out.draining && member_out.attached && !member_out.revoked);
    assert_string_equal(member_out.reason, "r");
    member_record_clear(&member_out);

    uint64_t epochs[] = {UINT64_C(1) << 60, 2};
    JobRecord job = {.model = "/m",
                     .dp = 1,
                     .pp = 2,
                     .tp = 3,
                     .context = 4,
                     .numerics = 0,
                     .plan = text("plan bytes"),
                     .epochs = epochs,
                     .n_epochs = 2};
    JobRecord job_out = {0};
    memset(job.file_hash, 0xab, sizeof job.file_hash);
    g_autoptr(GBytes) job_bytes = job_record_pack(&job);
    assert_true(job_record_read("k", job_bytes, &job_out, NULL));
    assert_string_equal(job_out.model, "/m");
    assert_memory_equal(job_out.file_hash, job.file_hash, 16);
    assert_true(g_bytes_equal(job_out.plan, job.plan));
    assert_int_equal(job_out.n_epochs, 2);
    assert_memory_equal(job_out.epochs, epochs, sizeof epochs);
    job_record_clear(&job_out);
    g_bytes_unref(job.plan);
}

/* Every truncation and every single flipped byte of a row is read without a crash; truncations are
 * refused. */
static void test_damaged_records(void **state)
{
    uint64_t epochs[] = {7};
    JobRecord job = {.model = "/m", .plan = text("p"), .epochs = epochs, .n_epochs = 1};
    g_autoptr(GBytes) good = job_record_pack(&job);
    g_bytes_unref(job.plan);
    gsize size;
    const uint8_t *data = g_bytes_get_data(good, &size);
    for (gsize n = 0; n < size; n++) {
        g_autoptr(GBytes) cut = g_bytes_new(data, n);
        g_autoptr(GError) error = NULL;
        JobRecord out = {0};
        assert_false(job_record_read("row", cut, &out, &error));
        assert_int_equal(error->code, WEFT_ERROR_IO);
        assert_non_null(strstr(error->message, "row"));
    }
    for (gsize i = 0; i < size; i++) {
        uint8_t *copy = g_memdup2(data, size);
        copy[i] ^= 0x55;
        g_autoptr(GBytes) flipped = g_bytes_new_take(copy, size);
        JobRecord out = {0};
        if (job_record_read("row", flipped, &out, NULL)) {
            job_record_clear(&out);
        }
    }
}

/* ---- the state directory ---- */

static void test_state_directory_has_one_owner(void **state)
{
    Fixture *f = *state;
    g_autoptr(GError) error = NULL;
    int first = state_dir_open(f->dir, &error);
    assert_true(first >= 0);
    assert_int_equal(state_dir_open(f->dir, &error), -1);
    assert_non_null(strstr(error->message, "in use"));
    g_close(first, NULL);
    int again = state_dir_open(f->dir, NULL);
    assert_true(again >= 0);
    g_close(again, NULL);
}

static void test_state_file_modes(void **state)
{
    Fixture *f = *state;
    GStatBuf st;
    g_autofree char *path = g_build_filename(f->dir, "note", NULL);
    g_autofree char *read = NULL;
    assert_true(state_file_write(f->dir, "note", "one", 0600, NULL));
    assert_true(state_file_write(f->dir, "note", "two", 0600, NULL));
    assert_true(state_file_read(f->dir, "note", &read, NULL));
    assert_string_equal(read, "two");
    assert_int_equal(g_stat(path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    g_autoptr(GError) error = NULL;
    assert_false(state_file_write("/nonexistent/dir", "note", "x", 0600, &error));
    assert_int_equal(error->code, WEFT_ERROR_IO);
}

#define BOTH(test)                                                                                 \
    {#test " (sqlite)", test, set_up_sqlite, tear_down, NULL},                                     \
    {                                                                                              \
#test " (memory)", test, set_up_memory, tear_down, NULL                                    \
    }

int main(void)
{
    const struct CMUnitTest tests[] = {
        BOTH(test_put_replace_delete),
        BOTH(test_order_of_calls),
        BOTH(test_survives_reopening),
        BOTH(test_nothing_is_reported_after_free),
        cmocka_unit_test_setup_teardown(test_batch_is_atomic_under_failure, set_up_memory,
                                        tear_down),
        cmocka_unit_test_setup_teardown(test_newer_schema_is_refused, set_up_sqlite, tear_down),
        cmocka_unit_test_setup_teardown(test_damaged_file_is_an_error, set_up_sqlite, tear_down),
        cmocka_unit_test(test_records_round_trip),
        cmocka_unit_test(test_damaged_records),
        cmocka_unit_test_setup_teardown(test_state_directory_has_one_owner, set_up_memory,
                                        tear_down),
        cmocka_unit_test_setup_teardown(test_state_file_modes, set_up_memory, tear_down),
    };
    return cmocka_run_group_tests_name("coordinator store", tests, NULL, NULL);
}
