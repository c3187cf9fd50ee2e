#include "worker/shard/packed_images.h"

#include "proto/base/error.h"
#include "proto/base/units.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/ioprio.h>
#include <linux/magic.h>
#include <pthread.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#define LONGEST_AFTER_US (366 * 86400 * (int64_t)1000000)

struct PackedImages {
    char *dir; /* NULL = none are used */
    int64_t after_us;
    uint64_t limit;
    Log *log;
    atomic_bool told; /* why none are written: once */
};

/* "0" where all memory is one node's; a system that does not say has one. */
static bool several_memory_nodes(void)
{
    g_autofree char *nodes = NULL;
    return g_file_get_contents("/sys/devices/system/node/has_memory", &nodes, NULL, NULL) &&
           strpbrk(nodes, "-,") != NULL;
}

/* As much as this user may have. */
static void raise_lock_limit(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur < limit.rlim_max) {
        limit.rlim_cur = limit.rlim_max;
        (void)setrlimit(RLIMIT_MEMLOCK, &limit);
    }
}

PackedImages *packed_images_new(const char *dir, uint64_t limit_bytes, int64_t after_us, Log *log)
{
    PackedImages *images = g_new0(PackedImages, 1);
    images->after_us = MIN(after_us, LONGEST_AFTER_US);
    images->log = log;
    raise_lock_limit();
    images->limit = limit_bytes > 0
                        ? limit_bytes
                        : (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    if (dir && several_memory_nodes()) {
        log_info(log, "this host has several memory nodes: weights are packed anew at each start");
    } else {
        images->dir = dir ? g_build_filename(dir, "packed", NULL) : NULL;
    }
    return images;
}

void packed_images_free(PackedImages *images)
{
    if (images) {
        g_free(images->dir);
        g_free(images);
    }
}

/* ---- names ---- */

static Hash128 key_of(const char *part, const Shard *shard)
{
    const Hash128 layout = shard_layout_hash(shard);
    Hasher *hasher = hasher_new();
    hasher_update(hasher, part, strlen(part));
    hasher_update(hasher, &layout, sizeof layout);
    const Hash128 key = hasher_finish(hasher);
    hasher_free(hasher);
    return key;
}

static char *path_of(const PackedImages *images, const Hash128 *key)
{
    char hex[33];
    hash128_hex(key, hex);
    return g_build_filename(images->dir, hex, NULL);
}

static bool is_usable(const PackedImages *images, const char *part, const Shard *shard)
{
    return images && images->dir && part && !shard->device && shard->arena_bytes > 0;
}

/* ---- reading ---- */

/* A disk of this host. Memory would hold the weights twice; pages of a network's file system, or of
 * one in user space, may be dropped although they are locked. */
static bool on_own_disk(int fd)
{
    static const uint32_t others[] = {TMPFS_MAGIC,     RAMFS_MAGIC,      NFS_SUPER_MAGIC,
                                      SMB_SUPER_MAGIC, SMB2_SUPER_MAGIC, CIFS_SUPER_MAGIC,
                                      V9FS_MAGIC,      FUSE_SUPER_MAGIC, CEPH_SUPER_MAGIC,
                                      AFS_SUPER_MAGIC, AFS_FS_MAGIC,     CODA_SUPER_MAGIC};
    struct statfs fs;
    bool own = fstatfs(fd, &fs) == 0;
    for (size_t i = 0; own && i < G_N_ELEMENTS(others); i++) {
        own = (uint32_t)fs.f_type != others[i];
    }
    return own;
}

/* An image at `path` that nobody else can have written; -1: there is none. */
static int open_own(const char *path)
{
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    struct stat st;
    if (fd >= 0 && (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode) || st.st_uid != geteuid() ||
                    (st.st_mode & (S_IWGRP | S_IWOTH)) != 0 || !on_own_disk(fd))) {
        close(fd);
        return -1;
    }
    return fd;
}

/* Why images do not help on this host as long as nothing changes. */
static void tell_once(PackedImages *images, const char *why)
{
    if (!atomic_exchange(&images->told, true)) {
        log_info(images->log, "weights are packed anew at each start: %s", why);
    }
}

#define MAY_NOT_LOCK                                                                               \
    "this process may not lock as much memory: raise its limit (ulimit -l, LimitMEMLOCK=)"

/* What cannot be locked now may be right. */
static void tell_failure(PackedImages *images, const char *path, const GError *error)
{
    if (g_error_matches(error, WEFT_ERROR, WEFT_ERROR_MEMORY)) {
        tell_once(images, MAY_NOT_LOCK);
    } else if (!g_error_matches(error, WEFT_ERROR, WEFT_ERROR_CANCELLED)) {
        unlink(path);
        log_warn(images->log, "packed weights %s: %s: removed, slices are packed anew", path,
                 error->message);
    }
}

bool packed_images_load(PackedImages *images, const char *part, Shard *shard, unsigned n_threads,
                        ImageWork *work)
{
    if (!is_usable(images, part, shard)) {
        return false;
    }
    const Hash128 key = key_of(part, shard);
    g_autofree char *path = path_of(images, &key);
    const int fd = open_own(path);
    if (fd < 0) {
        return false;
    }
    g_autoptr(GError) error = NULL;
    ImageFile image;
    if (image_open(fd, &key, shard->arena_bytes, &image, &error)) {
        image_map(&image, shard->arena, n_threads, work, &error);
        image_close(&image);
    }
    if (error) {
        tell_failure(images, path, error);
    } else {
        (void)futimens(fd, NULL); /* used now: what is unused for longest goes first */
    }
    close(fd);
    return !error;
}

/* ---- room ---- */

typedef struct Kept {
    char *path;
    uint64_t bytes;
    struct timespec used;
} Kept;

static void kept_clear(void *data)
{
    g_free(((Kept *)data)->path);
}

static int by_use(const void *a, const void *b)
{
    const struct timespec *x = &((const Kept *)a)->used, *y = &((const Kept *)b)->used;
    return x->tv_sec != y->tv_sec ? (x->tv_sec < y->tv_sec ? -1 : 1)
                                  : (x->tv_nsec > y->tv_nsec) - (x->tv_nsec < y->tv_nsec);
}

/* What is there, unused for longest first; of Kept. */
static GArray *list_kept(const PackedImages *images)
{
    GArray *all = g_array_new(FALSE, FALSE, sizeof(Kept));
    g_array_set_clear_func(all, kept_clear);
    g_autoptr(GDir) dir = g_dir_open(images->dir, 0, NULL);
    for (const char *name; dir && (name = g_dir_read_name(dir)) != NULL;) {
        Kept kept = {.path = g_build_filename(images->dir, name, NULL)};
        struct stat st;
        if (lstat(kept.path, &st) != 0 || !S_ISREG(st.st_mode)) {
            g_free(kept.path);
            continue;
        }
        kept.bytes = (uint64_t)st.st_size;
        kept.used = st.st_mtim;
        g_array_append_val(all, kept);
    }
    g_array_sort(all, by_use);
    return all;
}

/* Removes old images until one more of `bytes` is within the limit. Who has one mapped keeps its
 * pages. */
static bool make_room(const PackedImages *images, uint64_t bytes)
{
    g_autoptr(GArray) all = list_kept(images);
    uint64_t sum = 0;
    for (guint i = 0; i < all->len; i++) {
        sum += g_array_index(all, Kept, i).bytes;
    }
    for (guint i = 0; i < all->len && sum + bytes > images->limit; i++) {
        const Kept *oldest = &g_array_index(all, Kept, i);
        sum -= unlink(oldest->path) == 0 ? oldest->bytes : 0;
    }
    return sum + bytes <= images->limit;
}

static bool disk_has(const char *dir, uint64_t bytes)
{
    struct statvfs fs;
    return statvfs(dir, &fs) == 0 && (uint64_t)fs.f_bavail * fs.f_frsize / 2 >= bytes;
}

/* ---- writing ---- */

struct ImageKeeper {
    PackedImages *images;
    Shard *shard;
    Hash128 key;
    char *path;
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    ImageWork work; /* stop: set under the mutex */
};

/* Why an image of the shard is not to be written here; NULL: it is. */
static const char *obstacle(ImageKeeper *k)
{
    const uint64_t bytes = k->shard->arena_bytes;
    if (!image_may_lock(bytes)) {
        return MAY_NOT_LOCK;
    }
    if (g_mkdir_with_parents(k->images->dir, 0700) != 0) {
        return "the cache cannot be written";
    }
    if (!make_room(k->images, bytes)) {
        return "they are larger than this host's memory, or older ones cannot be removed";
    }
    return disk_has(k->images->dir, bytes)
               ? NULL
               : "the cache's disk has less than twice the room for them";
}

/* An open file without a name, or -1: it will not be written. */
static int open_nameless(ImageKeeper *k)
{
    const char *why = obstacle(k);
    const int fd = why ? -1 : open(k->images->dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0400);
    if (!why && (fd < 0 || !on_own_disk(fd))) {
        why = "the cache's file system is no disk of this host, or knows no O_TMPFILE";
    }
    if (!why) {
        return fd;
    }
    tell_once(k->images, why);
    if (fd >= 0) {
        close(fd);
    }
    return -1;
}

static bool give_name(int fd, const char *path)
{
    g_autofree char *open_file = g_strdup_printf("/proc/self/fd/%d", fd);
    return linkat(AT_FDCWD, open_file, AT_FDCWD, path, AT_SYMLINK_FOLLOW) == 0;
}

static bool take_over(ImageKeeper *k, GError **error)
{
    const int fd = open_own(k->path);
    if (fd < 0) {
        tell_once(k->images, "a file of the cache is not this user's alone");
        return false;
    }
    ImageFile image;
    bool ok = image_open(fd, &k->key, k->shard->arena_bytes, &image, error);
    if (ok) {
        ok = image_take_over(&image, k->shard->arena, &k->work, error);
        image_close(&image);
    }
    close(fd);
    return ok;
}

/* False with an error: another's file is there and does not serve; without one, it was told. */
static bool write_image(ImageKeeper *k, GError **error)
{
    const int fd = open_nameless(k);
    if (fd < 0) {
        return false;
    }
    g_autoptr(GError) why = NULL;
    const bool ok =
        image_write(fd, &k->key, k->shard->arena, k->shard->arena_bytes, &k->work, &why);
    const bool named = ok && give_name(fd, k->path), overtaken = ok && !named && errno == EEXIST;
    if (ok && !named && !overtaken) {
        g_set_error(&why, WEFT_ERROR, WEFT_ERROR_IO, "%s", g_strerror(errno));
    }
    close(fd);
    if (why && !g_error_matches(why, WEFT_ERROR, WEFT_ERROR_CANCELLED)) {
        log_warn(k->images->log, "packed weights %s: cannot be written: %s", k->path, why->message);
    }
    return overtaken ? take_over(k, error) : named; /* one file for all who hold the part */
}

static void keep(ImageKeeper *k)
{
    g_autoptr(GError) error = NULL;
    const bool there = access(k->path, F_OK) == 0;
    if (there ? take_over(k, &error) : write_image(k, &error)) {
        g_autofree char *size = units_format_size(k->shard->arena_bytes);
        log_info(k->images->log, "packed weights %s: %s %s", k->path, size,
                 there ? "are used" : "written");
    }
    if (error) {
        tell_failure(k->images, k->path, error);
    }
}

/* True: the time is over, and it goes on. */
static bool wait_for_turn(ImageKeeper *k)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    const int64_t us = until.tv_nsec / 1000 + k->images->after_us;
    until.tv_sec += us / 1000000;
    until.tv_nsec = us % 1000000 * 1000;
    pthread_mutex_lock(&k->mutex);
    while (!atomic_load(&k->work.stop) &&
           pthread_cond_timedwait(&k->changed, &k->mutex, &until) != ETIMEDOUT) {
    }
    pthread_mutex_unlock(&k->mutex);
    return !atomic_load(&k->work.stop);
}

static void *keeper_main(void *user)
{
    ImageKeeper *k = user;
    const pid_t self = (pid_t)syscall(SYS_gettid);
    (void)setpriority(PRIO_PROCESS, (id_t)self, 19);
    (void)syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, self, IOPRIO_PRIO_VALUE(IOPRIO_CLASS_BE, 7));
    if (wait_for_turn(k)) {
        keep(k);
    }
    return NULL;
}

static void keeper_free(ImageKeeper *k)
{
    pthread_cond_destroy(&k->changed);
    pthread_mutex_destroy(&k->mutex);
    g_free(k->path);
    g_free(k);
}

ImageKeeper *image_keeper_start(PackedImages *images, const char *part, Shard *shard)
{
    if (!is_usable(images, part, shard)) {
        return NULL;
    }
    ImageKeeper *k = g_new0(ImageKeeper, 1);
    k->images = images;
    k->shard = shard;
    k->key = key_of(part, shard);
    k->path = path_of(images, &k->key);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&k->mutex, NULL);
    pthread_cond_init(&k->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    if (pthread_create(&k->thread, NULL, keeper_main, k) != 0) {
        keeper_free(k); /* the next start packs again */
        return NULL;
    }
    return k;
}

void image_keeper_stop(ImageKeeper *k)
{
    if (!k) {
        return;
    }
    pthread_mutex_lock(&k->mutex);
    atomic_store(&k->work.stop, true);
    pthread_cond_signal(&k->changed);
    pthread_mutex_unlock(&k->mutex);
    pthread_join(k->thread, NULL);
    keeper_free(k);
}
