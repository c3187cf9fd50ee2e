#include "tests/unit/remove_tree.h"
#include "tests/unit/worker/tiny_model.h"
#include "worker/shard/slice_store.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>
#include <glib/gstdio.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct CountingLog {
    Log base;
    unsigned n_warnings;
    char last[512];
} CountingLog;

static void count_line(Log *log, LogLevel level, const char *line)
{
    CountingLog *self = (CountingLog *)log;
    self->n_warnings += level >= LOG_LEVEL_WARN;
    g_strlcpy(self->last, line, sizeof self->last);
}

static CountingLog new_log(void)
{
    return (CountingLog){.base = {.write = count_line}};
}

static SliceId some_id(void)
{
    SliceId id = {.tensor = 3, .slice = 7};
    memset(id.file_hash.bytes, 0xab, sizeof id.file_hash.bytes);
    return id;
}

static char *file_of(const char *dir, const SliceId *id)
{
    char hex[33];
    hash128_hex(&id->file_hash, hex);
    return g_strdup_printf("%s/%s/%u/%u", dir, hex, id->tensor, id->slice);
}

static void test_round_trip(void **state)
{
    (void)state;
    g_autofree char *dir = g_dir_make_tmp("weft-cache-XXXXXX", NULL);
    CountingLog log = new_log();
    SliceStore *store = slice_store_new(dir, &log.base);
    SliceId id = some_id();
    uint8_t data[1000], out[1000];
    memset(data, 5, sizeof data);
    Hash128 hash = hash128(data, sizeof data);
    assert_false(slice_store_read(store, &id, &hash, out, sizeof out));
    slice_store_write(store, &id, data, sizeof data);
    assert_true(slice_store_read(store, &id, &hash, out, sizeof out));
    assert_memory_equal(data, out, sizeof data);
    g_autoptr(GBytes) any = slice_store_read_any(store, &id, sizeof data);
    assert_int_equal(g_bytes_get_size(any), sizeof data);
    assert_null(slice_store_read_any(store, &id, sizeof data - 1));
    SliceId zero = {.tensor = 3, .slice = 7};
    slice_store_write(store, &zero, data, sizeof data); /* a file without a hash has no place */
    assert_null(slice_store_read_any(store, &zero, sizeof data));
    assert_int_equal(log.n_warnings, 0);
    slice_store_free(store);
    remove_tree(dir);
}

static void test_corrupt_is_removed(void **state)
{
    (void)state;
    g_autofree char *dir = g_dir_make_tmp("weft-cache-XXXXXX", NULL);
    CountingLog log = new_log();
    SliceStore *store = slice_store_new(dir, &log.base);
    SliceId id = some_id();
    g_autofree char *path = file_of(dir, &id);
    uint8_t data[64] = {1}, out[64];
    Hash128 hash = hash128(data, sizeof data);
    const size_t lengths[] = {64, 63, 0, 65};
    for (size_t i = 0; i < G_N_ELEMENTS(lengths); i++) {
        slice_store_write(store, &id, data, sizeof data);
        char wrong[65] = {2};
        assert_true(g_file_set_contents(path, wrong, (gssize)lengths[i], NULL));
        assert_false(slice_store_read(store, &id, &hash, out, sizeof out));
        assert_int_not_equal(access(path, F_OK), 0);
        assert_int_equal(log.n_warnings, i + 1);
    }
    slice_store_write(store, &id, data, sizeof data);
    assert_true(slice_store_read(store, &id, &hash, out, sizeof out));
    slice_store_free(store);
    remove_tree(dir);
}

/* A full disk is one warning; what is read before stays readable, and a new load tries again. */
static void test_disk_full_is_one_warning(void **state)
{
    (void)state;
    g_autofree char *dir = g_dir_make_tmp("weft-cache-XXXXXX", NULL);
    CountingLog log = new_log();
    SliceStore *store = slice_store_new(dir, &log.base);
    SliceId id = some_id(), other = some_id();
    other.slice = 8;
    uint8_t data[64] = {1}, out[64];
    Hash128 hash = hash128(data, sizeof data);
    slice_store_write(store, &id, data, sizeof data);
    /* The tensor's directory is replaced by a file: every write fails, as on a full disk. */
    g_autofree char *path = file_of(dir, &id);
    g_autofree char *tensor_dir = g_path_get_dirname(path);
    g_autofree char *aside = g_strconcat(tensor_dir, ".aside", NULL);
    assert_int_equal(g_rename(tensor_dir, aside), 0);
    assert_true(g_file_set_contents(tensor_dir, "x", 1, NULL));
    slice_store_write(store, &other, data, sizeof data);
    slice_store_write(store, &other, data, sizeof data);
    assert_int_equal(log.n_warnings, 1);
    assert_non_null(strstr(log.last, "goes on without caching"));
    g_remove(tensor_dir);
    assert_int_equal(g_rename(aside, tensor_dir), 0);
    assert_true(slice_store_read(store, &id, &hash, out, sizeof out));
    slice_store_write(store, &other, data, sizeof data);
    assert_false(slice_store_read(store, &other, &hash, out, sizeof out));
    slice_store_retry(store);
    slice_store_write(store, &other, data, sizeof data);
    assert_true(slice_store_read(store, &other, &hash, out, sizeof out));
    slice_store_free(store);
    remove_tree(dir);
}

static void test_without_a_cache(void **state)
{
    (void)state;
    SliceStore *none = slice_store_new(NULL, NULL);
    CountingLog log = new_log();
    SliceStore *broken = slice_store_new("/proc/weft-cannot-be", &log.base);
    assert_int_equal(log.n_warnings, 1);
    SliceId id = some_id();
    uint8_t data[8] = {0}, out[8];
    Hash128 hash = hash128(data, sizeof data);
    slice_store_write(none, &id, data, sizeof data);
    slice_store_write(broken, &id, data, sizeof data);
    assert_false(slice_store_read(none, &id, &hash, out, sizeof out));
    assert_false(slice_store_read(broken, &id, &hash, out, sizeof out));
    assert_int_equal(log.n_warnings, 1);
    slice_store_free(none);
    slice_store_free(broken);
}

/* Every `step`-th slice of each tensor, so many at a time. */
static void check_own_slices(SliceFiles *files, const TinyModel *model, uint32_t step,
                             uint32_t most)
{
    for (uint32_t t = 0; t < model->spec->n_tensors; t++) {
        const TensorSpec *tensor = &model->spec->tensors[t];
        for (uint32_t s = 0; s < tensor->n_slices;) {
            uint32_t slices[64], n = 0;
            size_t sizes[64];
            void *expected[64], *got[64];
            for (; n < most && s < tensor->n_slices; s += step, n++) {
                slices[n] = s;
                expected[n] = tiny_model_slice(model, t, s, &sizes[n]);
                got[n] = g_malloc0(sizes[n]);
            }
            assert_true(slice_files_read(files, model->spec, tensor, slices, n, got));
            for (uint32_t i = 0; i < n; i++) {
                assert_memory_equal(expected[i], got[i], sizes[i]);
                g_free(expected[i]);
                g_free(got[i]);
            }
        }
    }
}

static void test_own_files(void **state)
{
    (void)state;
    const TinyShape shape = {2,          256,        6,         3,    64,   640,  1100,
                             DTYPE_Q8_0, DTYPE_Q4_1, DTYPE_F16, true, true, false};
    TinyModel *model = tiny_model_new(&shape, 3);
    g_autofree char *dir = g_dir_make_tmp("weft-models-XXXXXX", NULL);
    g_autofree char *path = g_build_filename(dir, "m.gguf", NULL);
    tiny_model_write(model, path);
    const char *name = "m.gguf", *other = "n.gguf";
    const char *outside[] = {"../m.gguf", "a/../m.gguf", "/m.gguf", "./m.gguf", "a//m.gguf", ""};
    assert_null(slice_files_open(NULL, model->spec, &name, 1));
    assert_null(slice_files_open(dir, model->spec, &other, 1));
    for (size_t i = 0; i < G_N_ELEMENTS(outside); i++) {
        assert_null(slice_files_open(dir, model->spec, &outside[i], 1));
    }
    g_autofree char *pipe_path = g_build_filename(dir, "p.gguf", NULL);
    const char *pipe_name = "p.gguf";
    assert_int_equal(mkfifo(pipe_path, 0600), 0);
    assert_null(slice_files_open(dir, model->spec, &pipe_name, 1)); /* nor waited for */
    SliceFiles *files = slice_files_open(dir, model->spec, &name, 1);
    assert_non_null(files);
    check_own_slices(files, model, 1, 1);
    check_own_slices(files, model, 1, 64);
    check_own_slices(files, model, 3, 2);
    /* beneath the coordinator's directory: found flat, and where it lies as there */
    const char *nested = "tiny/v1/m.gguf";
    SliceFiles *flat = slice_files_open(dir, model->spec, &nested, 1);
    assert_non_null(flat);
    slice_files_free(flat);
    g_autofree char *inner = g_build_filename(dir, "tiny", "v1", NULL);
    g_autofree char *inner_path = g_build_filename(inner, "m.gguf", NULL);
    assert_int_equal(g_mkdir_with_parents(inner, 0700), 0);
    assert_int_equal(rename(path, inner_path), 0);
    assert_null(slice_files_open(dir, model->spec, &name, 1));
    SliceFiles *same = slice_files_open(dir, model->spec, &nested, 1);
    assert_non_null(same);
    check_own_slices(same, model, 1, 5);
    slice_files_free(same);
    assert_int_equal(rename(inner_path, path), 0);
    /* Cut short while open: an error, not a crash. */
    assert_int_equal(truncate(path, 200), 0);
    g_autofree void *got = g_malloc(1 << 20);
    const uint32_t first = 0;
    assert_false(slice_files_read(
        files, model->spec, &model->spec->tensors[model->spec->n_tensors - 1], &first, 1, &got));
    slice_files_free(files);
    assert_null(slice_files_open(dir, model->spec, &name, 1));
    tiny_model_free(model);
    remove_tree(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_corrupt_is_removed),
        cmocka_unit_test(test_disk_full_is_one_warning),
        cmocka_unit_test(test_without_a_cache),
        cmocka_unit_test(test_own_files),
    };
    return cmocka_run_group_tests_name("slice store", tests, NULL, NULL);
}
