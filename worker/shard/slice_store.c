/* Slices on disk. Nothing here is trusted by being there: readers check hashes, and a cache that
 * fails in any way only costs the network again. */
#include "worker/shard/slice_store.h"

#include "proto/base/whole_io.h"
#include "proto/model/model_message.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct SliceStore {
    char *dir; /* NULL = no cache */
    Log *log;
    atomic_bool writes_off;
    atomic_uint next_aside; /* makes names of files being written differ within the process */
};

SliceStore *slice_store_new(const char *cache_dir, Log *log)
{
    SliceStore *store = g_new0(SliceStore, 1);
    store->log = log;
    if (!cache_dir) {
        return store;
    }
    if (g_mkdir_with_parents(cache_dir, 0700) != 0 || access(cache_dir, R_OK | W_OK | X_OK) != 0) {
        log_warn(log, "cache %s: %s: goes on without caching; give a writable --cache", cache_dir,
                 g_strerror(errno));
        return store;
    }
    store->dir = g_strdup(cache_dir);
    return store;
}

void slice_store_free(SliceStore *store)
{
    if (store) {
        g_free(store->dir);
        g_free(store);
    }
}

const char *slice_store_dir(const SliceStore *store)
{
    return store->dir;
}

void slice_store_retry(SliceStore *store)
{
    atomic_store(&store->writes_off, false);
}

static bool is_cacheable(const SliceStore *store, const SliceId *id)
{
    static const Hash128 zero;
    return store->dir && !hash128_equal(&id->file_hash, &zero);
}

static char *tensor_dir(const SliceStore *store, const SliceId *id)
{
    char hex[33];
    hash128_hex(&id->file_hash, hex);
    return g_strdup_printf("%s/%s/%u", store->dir, hex, id->tensor);
}

/* An open descriptor and the file's size, or -1. */
static int open_cached(SliceStore *store, const SliceId *id, size_t *size_out)
{
    if (!is_cacheable(store, id)) {
        return -1;
    }
    g_autofree char *dir = tensor_dir(store, id);
    g_autofree char *path = g_strdup_printf("%s/%u", dir, id->slice);
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    struct stat st;
    if (fd >= 0 && (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode))) {
        close(fd);
        return -1;
    }
    *size_out = fd >= 0 ? (size_t)st.st_size : 0;
    return fd;
}

static void drop_cached(SliceStore *store, const SliceId *id, const char *why)
{
    g_autofree char *dir = tensor_dir(store, id);
    g_autofree char *path = g_strdup_printf("%s/%u", dir, id->slice);
    unlink(path);
    log_warn(store->log, "cached slice %s %s: removed, is fetched again", path, why);
}

bool slice_store_read(SliceStore *store, const SliceId *id, const Hash128 *expected, void *out,
                      size_t size)
{
    size_t there;
    int fd = open_cached(store, id, &there);
    if (fd < 0) {
        return false;
    }
    bool whole = there == size && io_read_whole(fd, out, size, 0);
    close(fd);
    if (!whole) {
        drop_cached(store, id, "has another size");
        return false;
    }
    Hash128 hash = hash128(out, size);
    if (!hash128_equal(&hash, expected)) {
        drop_cached(store, id, "is corrupt");
        return false;
    }
    return true;
}

GBytes *slice_store_read_any(SliceStore *store, const SliceId *id, size_t limit)
{
    size_t size;
    int fd = open_cached(store, id, &size);
    if (fd < 0) {
        return NULL;
    }
    void *data = size > 0 && size <= limit ? g_try_malloc(size) : NULL;
    bool ok = data && io_read_whole(fd, data, size, 0);
    close(fd);
    if (!ok) {
        g_free(data);
        return NULL;
    }
    return g_bytes_new_take(data, size);
}

/* Writes `data` to `aside`; errno tells why not. Writing back begins at once: a model's worth of
 * dirty pages would hold up who comes later. */
static bool write_aside(const char *aside, const void *data, size_t size)
{
    int fd = open(aside, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0) {
        return false;
    }
    bool ok = io_write_whole(fd, data, size, 0);
    int why = errno;
    if (ok) {
        sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WRITE);
    }
    if (close(fd) != 0 && ok) {
        why = errno;
        ok = false;
    }
    errno = why;
    return ok;
}

void slice_store_write(SliceStore *store, const SliceId *id, const void *data, size_t size)
{
    if (!is_cacheable(store, id) || atomic_load(&store->writes_off)) {
        return;
    }
    g_autofree char *dir = tensor_dir(store, id);
    g_autofree char *path = g_strdup_printf("%s/%u", dir, id->slice);
    g_autofree char *aside = g_strdup_printf("%s.aside.%d.%u", path, (int)getpid(),
                                             atomic_fetch_add(&store->next_aside, 1));
    bool ok = g_mkdir_with_parents(dir, 0700) == 0 && write_aside(aside, data, size) &&
              rename(aside, path) == 0;
    if (ok) {
        return;
    }
    int why = errno;
    unlink(aside);
    if (!atomic_exchange(&store->writes_off, true)) {
        log_warn(store->log,
                 "cache %s: %s: goes on without caching; free space or give another --cache",
                 store->dir, g_strerror(why));
    }
}

/* ---- own model files ---- */

struct SliceFiles {
    size_t n_files;
    int *fds;
};

void slice_files_free(SliceFiles *files)
{
    if (!files) {
        return;
    }
    for (size_t i = 0; i < files->n_files; i++) {
        if (files->fds[i] >= 0) {
            close(files->fds[i]);
        }
    }
    g_free(files->fds);
    g_free(files);
}

static int open_regular(const char *models_dir, const char *name, uint64_t *size_out)
{
    g_autofree char *path = g_build_filename(models_dir, name, NULL);
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe is refused, not waited for */
    struct stat st;
    if (fd >= 0 && (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode))) {
        close(fd);
        return -1;
    }
    *size_out = fd >= 0 ? (uint64_t)st.st_size : 0;
    return fd;
}

/* Where the coordinator has it beneath its own directory, or in the directory itself. */
static int open_model_file(const char *models_dir, const char *name, uint64_t *size_out)
{
    if (!model_file_path_is_inner(name)) {
        return -1;
    }
    const int fd = open_regular(models_dir, name, size_out);
    const char *slash = strrchr(name, '/');
    return fd < 0 && slash ? open_regular(models_dir, slash + 1, size_out) : fd;
}

SliceFiles *slice_files_open(const char *models_dir, const ModelSpec *spec,
                             const char *const *file_names, size_t n_files)
{
    if (!models_dir || n_files == 0) {
        return NULL;
    }
    SliceFiles *files = g_new0(SliceFiles, 1);
    g_autofree uint64_t *sizes = g_new0(uint64_t, n_files);
    files->fds = g_new(int, n_files);
    bool all = true;
    for (files->n_files = 0; files->n_files < n_files && all; files->n_files++) {
        size_t i = files->n_files;
        files->fds[i] = open_model_file(models_dir, file_names[i], &sizes[i]);
        all = files->fds[i] >= 0;
    }
    for (uint32_t i = 0; i < spec->n_tensors && all; i++) {
        const TensorSpec *t = &spec->tensors[i];
        all = t->file < n_files && t->size_bytes <= sizes[t->file] &&
              t->offset <= sizes[t->file] - t->size_bytes;
    }
    if (!all) {
        slice_files_free(files);
        return NULL;
    }
    return files;
}

/* Bytes of each row that go to one slice. */
typedef struct Columns {
    size_t before, n;
    uint8_t *out; /* rows packed */
} Columns;

#define STRIP_BYTES ((size_t)256 << 10)

/* Columns of n_rows rows from `at` on: rows are read whole, many at a time, where half of them is
 * wanted, else the stretch that is. */
static bool read_columns(int fd, off_t at, size_t row_bytes, uint32_t n_rows,
                         const Columns *columns, uint32_t n)
{
    size_t from = row_bytes, to = 0;
    for (uint32_t i = 0; i < n; i++) {
        from = MIN(from, columns[i].before);
        to = MAX(to, columns[i].before + columns[i].n);
    }
    if (2 * (to - from) >= row_bytes) {
        from = 0;
        to = row_bytes;
    }
    const size_t span = to - from, rows_at_once = MAX(STRIP_BYTES / span, 1);
    g_autofree uint8_t *strip = g_try_malloc(rows_at_once * span);
    for (uint32_t row = 0, rows; strip && row < n_rows; row += rows) {
        rows = (uint32_t)MIN(rows_at_once, n_rows - row);
        bool ok = span == row_bytes && io_read_whole(fd, strip, rows * span, at);
        for (uint32_t r = 0; span != row_bytes && r < rows; r++) {
            ok = io_read_whole(fd, strip + r * span, span, at + (off_t)(r * row_bytes + from));
            if (!ok) {
                break;
            }
        }
        if (!ok) {
            return false;
        }
        at += (off_t)(rows * row_bytes);
        for (uint32_t i = 0; i < n; i++) {
            const Columns *c = &columns[i];
            for (uint32_t r = 0; r < rows; r++) {
                memcpy(c->out + (row + r) * c->n, strip + r * span + c->before - from, c->n);
            }
        }
    }
    return strip != NULL;
}

bool slice_files_read(SliceFiles *files, const ModelSpec *spec, const TensorSpec *tensor,
                      const uint32_t *slices, uint32_t n, void *const *out)
{
    const int fd = files->fds[tensor->file];
    size_t row_bytes;
    if (!dtype_row_bytes(tensor->type, tensor->columns, &row_bytes)) {
        return false;
    }
    g_autofree Columns *columns = g_new(Columns, n + 1);
    for (uint32_t i = 0, same; i < n; i += same) {
        const SliceRect first = model_spec_slice(spec, tensor, slices[i]);
        for (same = 0; i + same < n; same++) { /* slices of the same rows */
            const SliceRect rect = model_spec_slice(spec, tensor, slices[i + same]);
            Columns *c = &columns[same];
            c->out = out[i + same];
            if (rect.row0 != first.row0 || rect.n_rows != first.n_rows) {
                break;
            }
            if (!dtype_row_bytes(tensor->type, rect.col0, &c->before) ||
                !dtype_row_bytes(tensor->type, rect.n_cols, &c->n)) {
                return false;
            }
        }
        const off_t at = (off_t)(tensor->offset + (uint64_t)first.row0 * row_bytes);
        if (!(columns[0].n == row_bytes
                  ? io_read_whole(fd, columns[0].out, (size_t)first.n_rows * row_bytes, at)
                  : read_columns(fd, at, row_bytes, first.n_rows, columns, same))) {
            return false;
        }
    }
    return true;
}
