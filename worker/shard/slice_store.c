/* Slices on disk. Nothing here is trusted by being there: readers check hashes, and a cache that
 * fails in any way only costs the network again. */
#include "worker/shard/slice_store.h"

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

static bool read_whole(int fd, void *out, size_t size, off_t offset)
{
    for (size_t done = 0; done < size;) {
        ssize_t n = pread(fd, (char *)out + done, size - done, offset + (off_t)done);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return false;
        }
        done += (size_t)n;
    }
    return true;
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
    bool whole = there == size && read_whole(fd, out, size, 0);
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
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
    bool ok = data && read_whole(fd, data, size, 0);
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    close(fd);
    if (!ok) {
        g_free(data);
        return NULL;
    }
    return g_bytes_new_take(data, size);
}

static bool write_whole(int fd, const void *data, size_t size)
{
    for (size_t done = 0; done < size;) {
        ssize_t n = write(fd, (const char *)data + done, size - done);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return false;
        }
        done += (size_t)n;
    }
    return true;
}

/* Writes `data` to `aside`; errno tells why not. The pages must reach the disk before they can be
 * given back. */
static bool write_aside(const char *aside, const void *data, size_t size)
{
    int fd = open(aside, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0) {
        return false;
    }
    bool ok = write_whole(fd, data, size);
    int why = errno;
    if (ok) {
        sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WRITE);
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
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

static int open_model_file(const char *models_dir, const char *name, uint64_t *size_out)
{
    if (name[0] == '\0' || name[0] == '.' || strchr(name, '/')) {
        return -1;
    }
    g_autofree char *path = g_build_filename(models_dir, name, NULL);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat st;
    if (fd >= 0 && (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode))) {
        close(fd);
        return -1;
    }
    *size_out = fd >= 0 ? (uint64_t)st.st_size : 0;
    return fd;
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

bool slice_files_read(SliceFiles *files, const ModelSpec *spec, const TensorSpec *tensor,
                      uint32_t slice, void *out)
{
    SliceRect rect = model_spec_slice(spec, tensor, slice);
    size_t row_bytes, before, part;
    if (!dtype_row_bytes(tensor->type, tensor->columns, &row_bytes) ||
        !dtype_row_bytes(tensor->type, rect.col0, &before) ||
        !dtype_row_bytes(tensor->type, rect.n_cols, &part)) {
        return false;
    }
    int fd = files->fds[tensor->file];
    off_t at = (off_t)(tensor->offset + (uint64_t)rect.row0 * row_bytes + before);
    if (part == row_bytes) {
        return read_whole(fd, out, (size_t)rect.n_rows * row_bytes, at);
    }
    for (uint32_t r = 0; r < rect.n_rows; r++) {
        if (!read_whole(fd, (char *)out + (size_t)r * part, part,
                        at + (off_t)((uint64_t)r * row_bytes))) {
            return false;
        }
    }
    return true;
}

void slice_files_forget(SliceFiles *files, const TensorSpec *tensor)
{
    posix_fadvise(files->fds[tensor->file], (off_t)tensor->offset, (off_t)tensor->size_bytes,
                  POSIX_FADV_DONTNEED);
}
