/* What was packed once is mapped again byte by byte, is checked, and is replaced under readers. */
#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "tests/unit/remove_tree.h"
#include "tests/unit/worker/tiny_model.h"
#include "worker/shard/packed_images.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>
#include <fcntl.h>
#include <glib/gstdio.h>
#include <linux/magic.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#define MANY_BYTES ((size_t)150 << 20 | 12345)

static const Hash128 key = {{1, 2, 3}}, other_key = {{1, 2, 4}};

/* Beside the test program: /tmp may be memory, and a test that fails leaves it. */
static char *new_dir(void)
{
    g_autofree char *self = g_file_read_link("/proc/self/exe", NULL);
    g_autofree char *beside = g_path_get_dirname(self);
    char *dir = g_build_filename(beside, "packed-images-XXXXXX", NULL);
    assert_non_null(g_mkdtemp(dir));
    return dir;
}

/* Skips where the system of this machine does not let images be. */
static void needs_images(size_t bytes)
{
    g_autofree char *dir = new_dir();
    const int fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0400);
    const bool may = fd >= 0 && image_may_lock(bytes);
    if (fd >= 0) {
        close(fd);
    }
    rmdir(dir);
    if (!may) {
        print_message("skipped: no O_TMPFILE here, or too little memory may be locked\n");
        skip();
    }
}

static void fill(uint8_t *arena, size_t bytes, uint32_t seed)
{
    for (size_t i = 0; i < bytes; i++) {
        seed = seed * 1664525u + 1013904223u;
        arena[i] = (uint8_t)(seed >> 24);
    }
}

/* The inode of the file of which one mapping, not to be written, holds all of it; 0: none. */
static unsigned long file_of(const uint8_t *arena, size_t bytes)
{
    g_autofree char *maps = NULL;
    assert_true(g_file_get_contents("/proc/self/maps", &maps, NULL, NULL));
    g_auto(GStrv) lines = g_strsplit(maps, "\n", -1);
    for (char **line = lines; *line; line++) {
        unsigned long from, to, inode;
        char rights[8];
        if (sscanf(*line, "%lx-%lx %7s %*s %*s %lu", &from, &to, rights, &inode) == 4 &&
            (uintptr_t)arena >= from && (uintptr_t)arena + bytes <= to) {
            return strcmp(rights, "r--s") == 0 ? inode : 0;
        }
    }
    return 0;
}

static bool is_file(const uint8_t *arena, size_t bytes)
{
    return file_of(arena, bytes) != 0;
}

/* Bytes that this process has locked. */
static size_t locked(void)
{
    g_autofree char *status = NULL;
    assert_true(g_file_get_contents("/proc/self/status", &status, NULL, NULL));
    const char *line = strstr(status, "VmLck:");
    assert_non_null(line);
    return (size_t)g_ascii_strtoull(line + strlen("VmLck:"), NULL, 10) << 10;
}

static int new_file(void)
{
    const int fd = open(".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0400);
    assert_true(fd >= 0);
    return fd;
}

/* A file with the image of a filled arena, which is freed. */
static int written(size_t bytes, uint32_t seed)
{
    ImageWork work = {false};
    g_autoptr(GError) error = NULL;
    uint8_t *arena = weft_map(bytes, "arena", NULL);
    const int fd = new_file();
    fill(arena, bytes, seed);
    assert_true(image_write(fd, &key, arena, bytes, &work, &error));
    weft_unmap(arena, bytes);
    return fd;
}

static bool map_file(int fd, const Hash128 *of, uint8_t *arena, size_t bytes, GError **error)
{
    ImageWork work = {false};
    ImageFile image;
    bool ok = image_open(fd, of, bytes, &image, error);
    if (ok) {
        ok = image_map(&image, arena, 3, &work, error);
        assert_int_equal(ok ? atomic_load(&work.done) : 0, ok ? bytes : 0);
        image_close(&image);
    }
    return ok;
}

static void test_round_trip(void **state)
{
    const size_t sizes[] = {1, 4096, 65537, IMAGE_CHUNK_BYTES, IMAGE_CHUNK_BYTES + 1, MANY_BYTES};
    (void)state;
    needs_images(2 * MANY_BYTES);
    for (size_t i = 0; i < G_N_ELEMENTS(sizes); i++) {
        const size_t bytes = sizes[i];
        const int fd = written(bytes, (uint32_t)i);
        uint8_t *expected = g_malloc(bytes), *arena = weft_map(bytes, "arena", NULL);
        fill(expected, bytes, (uint32_t)i);
        g_autoptr(GError) error = NULL;
        assert_true(map_file(fd, &key, arena, bytes, &error));
        assert_true(is_file(arena, bytes));
        assert_memory_equal(arena, expected, bytes);
        weft_unmap(arena, bytes);
        assert_false(map_file(fd, &other_key, NULL, bytes, &error));
        assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
        g_clear_error(&error);
        assert_false(map_file(fd, &key, NULL, bytes + 1, &error));
        assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
        close(fd);
        g_free(expected);
    }
}

static void test_damage_is_seen(void **state)
{
    const size_t bytes = 3 * IMAGE_CHUNK_BYTES + 1000;
    (void)state;
    needs_images(2 * bytes);
    const int fd = written(bytes, 9);
    uint8_t *arena = weft_map(bytes, "arena", NULL);
    struct stat st;
    assert_int_equal(fstat(fd, &st), 0);
    const off_t places[] = {0,
                            (off_t)bytes - 1,
                            (off_t)IMAGE_CHUNK_BYTES * 2 + 77,
                            st.st_size - 1,
                            st.st_size - 48,
                            st.st_size - 48 - 64};
    for (size_t i = 0; i < G_N_ELEMENTS(places); i++) {
        g_autoptr(GError) error = NULL;
        uint8_t right, wrong;
        assert_int_equal(pread(fd, &right, 1, places[i]), 1);
        wrong = right ^ 0x10;
        assert_int_equal(pwrite(fd, &wrong, 1, places[i]), 1);
        assert_false(map_file(fd, &key, arena, bytes, &error));
        assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
        for (size_t k = 0; k < bytes; k += 997) { /* empty, and can be written */
            assert_int_equal(arena[k], 0);
            arena[k] = 1;
            arena[k] = 0;
        }
        assert_int_equal(pwrite(fd, &right, 1, places[i]), 1);
    }
    const off_t sizes[] = {st.st_size + 1, st.st_size - 1, 0};
    for (size_t i = 0; i < G_N_ELEMENTS(sizes); i++) {
        g_autoptr(GError) error = NULL;
        assert_int_equal(ftruncate(fd, sizes[i]), 0);
        assert_false(map_file(fd, &key, arena, bytes, &error));
        assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
    }
    assert_int_equal(locked(), 0);
    weft_unmap(arena, bytes);
    close(fd);
}

/* A page that the disk does not give is an error, not a signal. */
static void test_a_file_that_cannot_be_read(void **state)
{
    const size_t bytes = 2 * IMAGE_CHUNK_BYTES;
    (void)state;
    needs_images(2 * bytes);
    const int fd = written(bytes, 8);
    uint8_t *arena = weft_map(bytes, "arena", NULL);
    g_autoptr(GError) error = NULL;
    ImageWork work = {false};
    ImageFile image;
    assert_true(image_open(fd, &key, bytes, &image, &error));
    assert_int_equal(ftruncate(fd, (off_t)IMAGE_CHUNK_BYTES + 4096), 0);
    assert_false(image_map(&image, arena, 2, &work, &error));
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_IO));
    arena[bytes - 1] = 1;
    assert_int_equal(locked(), 0);
    image_close(&image);
    weft_unmap(arena, bytes);
    close(fd);
}

typedef struct Reader {
    const uint8_t *arena;
    size_t bytes;
    Hash128 hash;
    atomic_bool end;
    atomic_uint rounds, wrong;
} Reader;

static void *read_on(void *user)
{
    Reader *r = user;
    while (!atomic_load(&r->end)) {
        const Hash128 now = hash128(r->arena, r->bytes);
        atomic_fetch_add(&r->wrong, !hash128_equal(&now, &r->hash));
        atomic_fetch_add(&r->rounds, 1);
    }
    return NULL;
}

/* image_write() and image_take_over() of an arena that a thread reads all the time. */
static void test_replaced_under_a_reader(void **state)
{
    (void)state;
    needs_images(2 * MANY_BYTES);
    ImageWork work = {false};
    g_autoptr(GError) error = NULL;
    const int fd = new_file();
    ImageFile image;
    for (int times = 0; times < 2; times++) {
        Reader reader = {.arena = weft_map(MANY_BYTES, "arena", NULL), .bytes = MANY_BYTES};
        uint8_t *arena = (uint8_t *)reader.arena;
        pthread_t thread;
        fill(arena, MANY_BYTES, 4);
        reader.hash = hash128(arena, MANY_BYTES);
        pthread_create(&thread, NULL, read_on, &reader);
        while (atomic_load(&reader.rounds) == 0) {
            sched_yield();
        }
        if (times == 0) {
            assert_true(image_write(fd, &key, arena, MANY_BYTES, &work, &error));
        } else {
            assert_true(image_open(fd, &key, MANY_BYTES, &image, &error));
            assert_true(image_take_over(&image, arena, &work, &error));
            image_close(&image);
        }
        assert_true(is_file(arena, MANY_BYTES));
        const unsigned before = atomic_load(&reader.rounds);
        while (atomic_load(&reader.rounds) < before + 2) {
            sched_yield();
        }
        atomic_store(&reader.end, true);
        pthread_join(thread, NULL);
        assert_int_equal(atomic_load(&reader.wrong), 0);
        weft_unmap(arena, MANY_BYTES);
    }
    close(fd);
}

static void test_stopped(void **state)
{
    const size_t bytes = IMAGE_CHUNK_BYTES + 10;
    (void)state;
    needs_images(2 * bytes);
    ImageWork work = {.stop = true};
    g_autoptr(GError) error = NULL;
    const int fd = written(bytes, 1), none = new_file();
    uint8_t *arena = weft_map(bytes, "arena", NULL);
    ImageFile image;
    arena[5] = 7;
    assert_true(image_open(fd, &key, bytes, &image, NULL));
    assert_false(image_map(&image, arena, 2, &work, &error));
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_CANCELLED));
    g_clear_error(&error);
    assert_false(image_take_over(&image, arena, &work, &error));
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_CANCELLED));
    g_clear_error(&error);
    assert_false(image_write(none, &key, arena, bytes, &work, &error));
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_CANCELLED));
    assert_int_equal(arena[5], 7);
    image_close(&image);
    weft_unmap(arena, bytes);
    close(fd);
    close(none);
}

/* ---- in a process of its own, whose limits are low ---- */

/* 0 = as it should be. */
static int in_child(int (*body)(int fd, size_t bytes), int fd, size_t bytes)
{
    fflush(NULL);
    const pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        _exit(body(fd, bytes));
    }
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 100;
}

static int without_locking(int fd, size_t bytes)
{
    const struct rlimit low = {65536, 65536};
    setrlimit(RLIMIT_MEMLOCK, &low);
    if (geteuid() == 0 && seteuid(65534) != 0) { /* root may lock what it wants */
        return 1;
    }
    ImageFile image;
    ImageWork work = {false};
    GError *error = NULL;
    uint8_t *arena = weft_map(bytes, "arena", NULL);
    arena[77] = 3;
    if (image_may_lock(bytes) || !image_open(fd, &key, bytes, &image, NULL) ||
        image_map(&image, arena, 2, &work, &error) ||
        !g_error_matches(error, WEFT_ERROR, WEFT_ERROR_MEMORY)) {
        return 2;
    }
    arena[78] = 4;
    if (arena[77] != 3 || is_file(arena, bytes)) {
        return 3;
    }
    /* It is written all the same, and the arena stays. */
    if (ftruncate(fd, 0) != 0 || !image_write(fd, &key, arena, bytes, &work, NULL) ||
        !image_open(fd, &key, bytes, &image, NULL) || is_file(arena, bytes)) {
        return 4;
    }
    arena[77] = 5;
    return 0;
}

static int with_a_full_disk(int fd, size_t bytes)
{
    const struct rlimit low = {IMAGE_CHUNK_BYTES * 17, IMAGE_CHUNK_BYTES * 17};
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &low);
    ImageWork work = {false};
    GError *error = NULL;
    uint8_t *arena = weft_map(bytes, "arena", NULL);
    fill(arena, bytes, 2);
    const Hash128 before = hash128(arena, bytes);
    if (image_write(fd, &key, arena, bytes, &work, &error) ||
        !g_error_matches(error, WEFT_ERROR, WEFT_ERROR_IO)) {
        return 2;
    }
    const Hash128 after = hash128(arena, bytes);
    return hash128_equal(&before, &after) ? 0 : 3;
}

static void test_limits(void **state)
{
    (void)state;
    needs_images(2 * MANY_BYTES);
    int fd = written(IMAGE_CHUNK_BYTES + 5, 3);
    assert_int_equal(in_child(without_locking, fd, IMAGE_CHUNK_BYTES + 5), 0);
    close(fd);
    fd = new_file();
    assert_int_equal(in_child(with_a_full_disk, fd, MANY_BYTES), 0);
    close(fd);
}

/* ---- the images of shards ---- */

static const TinyShape shape = {3,          256,        6,          3,    64,    640, 2500,
                                DTYPE_Q8_0, DTYPE_Q4_1, DTYPE_Q8_0, true, false, true};

typedef struct World {
    char *dir;
    TinyModel *model;
    Plan *plan;
    struct {
        Log base;
        atomic_uint n_warnings, n_infos;
        char last[512];
    } log;
    PackedImages *images;
} World;

static void count_line(Log *log, LogLevel level, const char *line)
{
    World *w = (World *)((char *)log - offsetof(World, log));
    atomic_fetch_add(&w->log.n_warnings, level >= LOG_LEVEL_WARN);
    g_strlcpy(w->log.last, line, sizeof w->log.last);
    atomic_fetch_add(&w->log.n_infos, level == LOG_LEVEL_INFO);
}

static World *world_new(int64_t after_us)
{
    World *w = g_new0(World, 1);
    w->dir = new_dir();
    w->model = tiny_model_new(&shape, 5);
    w->plan = tiny_plan(w->model->spec, 1, (uint32_t[]){2}, (double[]){1, 2});
    w->log.base.write = count_line;
    w->images = packed_images_new(w->dir, 0, after_us, &w->log.base);
    return w;
}

/* As a worker that was started with this bound. */
static void limit_images(World *w, uint64_t bytes)
{
    packed_images_free(w->images);
    w->images = packed_images_new(w->dir, bytes, 0, &w->log.base);
}

static void world_free(World *w)
{
    packed_images_free(w->images);
    plan_free(w->plan);
    tiny_model_free(w->model);
    remove_tree(w->dir);
    g_free(w->dir);
    g_free(w);
}

static Shard *empty_shard(const World *w, uint32_t rank)
{
    Shard *shard = shard_new(NULL, w->model->spec, w->plan, 0, 0, rank, NULL);
    assert_non_null(shard);
    return shard;
}

static Shard *full_shard(const World *w, uint32_t rank)
{
    Shard *shard = empty_shard(w, rank);
    g_autoptr(GArray) refs = plan_rank_slices(w->plan, w->model->spec, 0, 0, rank);
    for (guint i = 0; i < refs->len; i++) {
        const SliceRef ref = g_array_index(refs, SliceRef, i);
        size_t size;
        g_autofree void *bytes = tiny_model_slice(w->model, ref.tensor, ref.slice, &size);
        shard_put(shard, ref.tensor, ref.slice, bytes);
    }
    return shard;
}

/* Files in the directory; the name of one of them, returned. */
static unsigned n_images(const World *w, char **one)
{
    g_autofree char *path = g_build_filename(w->dir, "packed", NULL);
    g_autoptr(GDir) dir = g_dir_open(path, 0, NULL);
    unsigned n = 0;
    for (const char *name; dir && (name = g_dir_read_name(dir)); n++) {
        if (one) {
            g_free(*one);
            *one = g_build_filename(path, name, NULL);
        }
    }
    return n;
}

/* All images that are there were used last so many seconds after 1970. */
static void set_used(const World *w, time_t seconds)
{
    g_autofree char *path = g_build_filename(w->dir, "packed", NULL);
    const struct timespec times[2] = {{seconds, 0}, {seconds, 0}};
    g_autoptr(GDir) dir = g_dir_open(path, 0, NULL);
    for (const char *name; (name = g_dir_read_name(dir)) != NULL;) {
        g_autofree char *image = g_build_filename(path, name, NULL);
        assert_int_equal(utimensat(AT_FDCWD, image, times, 0), 0);
    }
}

/* A keeper's whole work; true: the shard lies in a file now. */
static bool keep_whole(World *w, const char *part, Shard *shard)
{
    const unsigned infos = atomic_load(&w->log.n_infos);
    ImageKeeper *keeper = image_keeper_start(w->images, part, shard);
    assert_non_null(keeper);
    for (int i = 0; i < 4000 && !is_file(shard->arena, shard->arena_bytes) &&
                    atomic_load(&w->log.n_infos) == infos;
         i++) {
        g_usleep(5000);
    }
    image_keeper_stop(keeper);
    return is_file(shard->arena, shard->arena_bytes);
}

/* What loading gives: NULL, and then an empty shard, or the shard. */
static Shard *loaded(World *w, const char *part, uint32_t rank)
{
    ImageWork work = {false};
    Shard *shard = empty_shard(w, rank);
    if (packed_images_load(w->images, part, shard, 2, &work)) {
        assert_int_equal(atomic_load(&work.done), shard->arena_bytes);
        return shard;
    }
    for (size_t i = 0; i < shard->arena_bytes; i++) {
        assert_int_equal(((uint8_t *)shard->arena)[i], 0);
    }
    ((uint8_t *)shard->arena)[0] = 1;
    shard_free(shard);
    return NULL;
}

static void check_loaded(World *w, const char *part, uint32_t rank)
{
    Shard *there = loaded(w, part, rank), *packed = full_shard(w, rank);
    assert_non_null(there);
    assert_memory_equal(there->arena, packed->arena, packed->arena_bytes);
    assert_ptr_equal(there->layers[1].k.data - (uintptr_t)there->arena,
                     packed->layers[1].k.data - (uintptr_t)packed->arena);
    shard_free(there);
    shard_free(packed);
}

static void test_a_shard_comes_back(void **state)
{
    (void)state;
    needs_images((size_t)64 << 20);
    World *w = world_new(0);
    Shard *shards[2] = {full_shard(w, 0), full_shard(w, 1)};
    assert_null(loaded(w, "zero", 0));
    assert_true(keep_whole(w, "zero", shards[0]));
    assert_true(keep_whole(w, "one", shards[1]));
    assert_int_equal(n_images(w, NULL), 2);
    check_loaded(w, "zero", 0);
    check_loaded(w, "one", 1);
    assert_null(loaded(w, "one", 0)); /* another layout */
    assert_null(loaded(w, "two", 1)); /* another part */
    assert_null(loaded(w, NULL, 1));
    /* A second owner of the same part takes the file that is there. */
    Shard *again = full_shard(w, 1);
    assert_true(keep_whole(w, "one", again));
    assert_non_null(strstr(w->log.last, " are used"));
    assert_int_equal(file_of(again->arena, again->arena_bytes),
                     file_of(shards[1]->arena, again->arena_bytes));
    assert_int_equal(n_images(w, NULL), 2);
    assert_memory_equal(again->arena, shards[1]->arena, again->arena_bytes);
    assert_int_equal(atomic_load(&w->log.n_warnings), 0);
    shard_free(again);
    shard_free(shards[0]);
    shard_free(shards[1]);
    world_free(w);
}

/* Both find none and write; whoever is second takes the first one's. */
static void test_two_owners_at_once(void **state)
{
    (void)state;
    needs_images((size_t)64 << 20);
    for (int times = 0; times < 5; times++) {
        World *w = world_new(0);
        Shard *shards[2] = {full_shard(w, 0), full_shard(w, 0)};
        ImageKeeper *keepers[2];
        unsigned long inodes[2];
        for (int i = 0; i < 2; i++) {
            keepers[i] = image_keeper_start(w->images, "it", shards[i]);
        }
        for (int i = 0; i < 4000 && atomic_load(&w->log.n_infos) < 2; i++) {
            g_usleep(5000);
        }
        for (int i = 0; i < 2; i++) {
            image_keeper_stop(keepers[i]);
            inodes[i] = file_of(shards[i]->arena, shards[i]->arena_bytes);
        }
        assert_int_not_equal(inodes[0], 0);
        assert_int_equal(inodes[0], inodes[1]);
        assert_memory_equal(shards[0]->arena, shards[1]->arena, shards[0]->arena_bytes);
        assert_int_equal(n_images(w, NULL), 1);
        assert_int_equal(atomic_load(&w->log.n_warnings), 0);
        shard_free(shards[0]);
        shard_free(shards[1]);
        world_free(w);
    }
}

static void test_what_is_not_believed(void **state)
{
    (void)state;
    needs_images((size_t)64 << 20);
    World *w = world_new(0);
    g_autofree char *path = NULL, *aside = NULL, *name = NULL;
    Shard *shard = full_shard(w, 0);
    assert_true(keep_whole(w, "it", shard));
    shard_free(shard);
    assert_int_equal(n_images(w, &path), 1);
    const mode_t writable[] = {0420, 0402}; /* others may have written it */
    for (size_t i = 0; i < G_N_ELEMENTS(writable); i++) {
        assert_int_equal(chmod(path, writable[i]), 0);
        assert_null(loaded(w, "it", 0));
    }
    assert_int_equal(chmod(path, 0400), 0);
    if (geteuid() == 0) {
        assert_int_equal(chown(path, 65534, (gid_t)-1), 0);
        assert_null(loaded(w, "it", 0));
        assert_int_equal(chown(path, 0, (gid_t)-1), 0);
    }
    aside = g_strconcat(path, ".aside", NULL);
    name = g_path_get_basename(aside);
    assert_int_equal(rename(path, aside), 0);
    assert_int_equal(symlink(name, path), 0);
    assert_int_equal(access(path, R_OK), 0);
    assert_null(loaded(w, "it", 0));
    assert_int_equal(unlink(path), 0);
    assert_int_equal(mkfifo(path, 0400), 0);
    assert_null(loaded(w, "it", 0));
    assert_int_equal(rename(aside, path), 0);
    check_loaded(w, "it", 0);
    ImageWork stop = {.stop = true}; /* nor removed */
    shard = empty_shard(w, 0);
    assert_false(packed_images_load(w->images, "it", shard, 2, &stop));
    shard_free(shard);
    assert_int_equal(n_images(w, NULL), 1);
    assert_int_equal(atomic_load(&w->log.n_warnings), 0);

    assert_int_equal(chmod(path, 0600), 0);
    const int fd = open(path, O_RDWR | O_CLOEXEC);
    uint8_t byte;
    assert_int_equal(pread(fd, &byte, 1, 100000), 1);
    byte ^= 1;
    assert_int_equal(pwrite(fd, &byte, 1, 100000), 1);
    close(fd);
    assert_null(loaded(w, "it", 0));
    assert_int_equal(atomic_load(&w->log.n_warnings), 1);
    assert_non_null(strstr(w->log.last, "is damaged: removed"));
    assert_int_equal(n_images(w, NULL), 0);
    assert_null(loaded(w, "it", 0));
    assert_int_equal(atomic_load(&w->log.n_warnings), 1);
    shard = full_shard(w, 0);
    assert_true(keep_whole(w, "it", shard));
    shard_free(shard);
    check_loaded(w, "it", 0);
    world_free(w);
}

/* Two of three fit: the one unused for longest goes, which its use decides, not its making. */
static void test_room(void **state)
{
    (void)state;
    needs_images((size_t)64 << 20);
    World *w = world_new(0);
    Shard *shard = full_shard(w, 0);
    limit_images(w, shard->arena_bytes * 5 / 2);
    assert_true(keep_whole(w, "a", shard));
    shard_free(shard);
    shard = full_shard(w, 0);
    assert_true(keep_whole(w, "b", shard));
    shard_free(shard);
    set_used(w, 1000000000); /* clocks of files are coarse: what follows is later than this */
    check_loaded(w, "a", 0);
    shard = full_shard(w, 0);
    assert_true(keep_whole(w, "c", shard));
    assert_int_equal(n_images(w, NULL), 2);
    check_loaded(w, "a", 0);
    check_loaded(w, "c", 0);
    assert_null(loaded(w, "b", 0));
    shard_free(shard);

    shard = full_shard(w, 0);
    limit_images(w, shard->arena_bytes / 2);
    assert_false(keep_whole(w, "d", shard));
    assert_non_null(strstr(w->log.last, "packed anew at each start: they are larger"));
    shard_free(shard);
    assert_int_equal(atomic_load(&w->log.n_warnings), 0);
    world_free(w);
}

/* The disk takes less than there is: a warning, and the shard stays what and where it is. */
static void test_a_disk_that_fails(void **state)
{
    (void)state;
    needs_images((size_t)64 << 20);
    struct rlimit before;
    World *w = world_new(0);
    Shard *shard = full_shard(w, 0);
    const Hash128 right = hash128(shard->arena, shard->arena_bytes);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    const struct rlimit low = {shard->arena_bytes / 2, before.rlim_max};
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &low), 0);
    ImageKeeper *keeper = image_keeper_start(w->images, "it", shard);
    for (int i = 0; i < 4000 && atomic_load(&w->log.n_warnings) == 0; i++) {
        g_usleep(5000);
    }
    image_keeper_stop(keeper);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
    signal(SIGXFSZ, SIG_DFL);
    assert_int_equal(atomic_load(&w->log.n_warnings), 1);
    assert_non_null(strstr(w->log.last, ": cannot be written: File too large"));
    assert_int_equal(n_images(w, NULL), 0);
    assert_false(is_file(shard->arena, shard->arena_bytes));
    const Hash128 after = hash128(shard->arena, shard->arena_bytes);
    assert_true(hash128_equal(&right, &after));
    shard_free(shard);
    world_free(w);
}

static void test_a_keeper_that_is_stopped(void **state)
{
    (void)state;
    needs_images((size_t)64 << 20);
    World *w = world_new(3600 * (int64_t)1000000);
    Shard *shard = full_shard(w, 0);
    ImageKeeper *keeper = image_keeper_start(w->images, "it", shard);
    assert_non_null(keeper);
    g_usleep(20000);
    image_keeper_stop(keeper);
    assert_int_equal(n_images(w, NULL), 0);
    assert_null(image_keeper_start(w->images, NULL, shard));
    assert_null(image_keeper_start(NULL, "it", shard));
    image_keeper_stop(NULL);
    shard_free(shard);
    world_free(w);
}

/* The disk is full before an image is whole: nobody finds half of one. */
static int kept_with_a_full_disk(int fd, size_t bytes)
{
    (void)fd;
    (void)bytes;
    World *w = world_new(0);
    Shard *shard = full_shard(w, 0);
    const Hash128 before = hash128(shard->arena, shard->arena_bytes);
    const struct rlimit low = {shard->arena_bytes / 2, shard->arena_bytes / 2};
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &low);
    ImageKeeper *keeper = image_keeper_start(w->images, "it", shard);
    while (atomic_load(&w->log.n_warnings) == 0) {
        g_usleep(1000);
    }
    image_keeper_stop(keeper);
    const Hash128 after = hash128(shard->arena, shard->arena_bytes);
    const bool ok = n_images(w, NULL) == 0 && hash128_equal(&before, &after);
    shard_free(shard);
    world_free(w);
    return ok ? 0 : 1;
}

/* Waits for the line that says why nothing is kept. */
static bool is_refused(World *w, const char *why)
{
    Shard *shard = full_shard(w, 0);
    ImageKeeper *keeper = image_keeper_start(w->images, "it", shard);
    while (atomic_load(&w->log.n_infos) == 0) {
        g_usleep(1000);
    }
    image_keeper_stop(keeper);
    shard_free(shard);
    return strstr(w->log.last, why) && n_images(w, NULL) == 0;
}

/* What cannot be mapped later is not written, for nothing, at each start. */
static int kept_without_locking(int fd, size_t bytes)
{
    (void)fd;
    (void)bytes;
    World *w = world_new(0);
    const struct rlimit low = {65536, 65536};
    const uid_t own = geteuid();
    setrlimit(RLIMIT_MEMLOCK, &low);
    if (chmod(w->dir, 0777) != 0 || (own == 0 && seteuid(65534) != 0)) {
        return 1;
    }
    const bool ok = is_refused(w, "may not lock");
    if (own == 0 && seteuid(0) != 0) {
        return 2;
    }
    world_free(w);
    return ok ? 0 : 3;
}

static void test_limits_of_a_keeper(void **state)
{
    (void)state;
    needs_images((size_t)64 << 20);
    assert_int_equal(in_child(kept_with_a_full_disk, -1, 0), 0);
    assert_int_equal(in_child(kept_without_locking, -1, 0), 0);
}

/* Each of the places that the hash is of. */
static void test_layout_hash(void **state)
{
    (void)state;
    World *w = world_new(0);
    Shard *shard = empty_shard(w, 0), *same = full_shard(w, 0);
    const Hash128 hash = shard_layout_hash(shard), other = shard_layout_hash(same);
    PackedMatrix *k = &shard->layers[1].k;
    float **norm = &shard->layers[1].ffn_norm;
    Hash128 moved[4];
    assert_true(hash128_equal(&hash, &other));
    k->data += 64;
    moved[0] = shard_layout_hash(shard);
    k->data -= 64;
    k->panel_bytes += 64;
    moved[1] = shard_layout_hash(shard);
    k->panel_bytes -= 64;
    *norm += 16;
    moved[2] = shard_layout_hash(shard);
    *norm -= 16;
    shard->arena_bytes += 64;
    moved[3] = shard_layout_hash(shard);
    shard->arena_bytes -= 64;
    for (size_t i = 0; i < G_N_ELEMENTS(moved); i++) {
        assert_false(hash128_equal(&moved[i], &hash));
    }
    const Hash128 again = shard_layout_hash(shard);
    assert_true(hash128_equal(&again, &hash));
    shard_free(shard);
    shard_free(same);
    world_free(w);
}

static void test_memory_is_no_disk(void **state)
{
    (void)state;
    needs_images((size_t)64 << 20);
    char dir[] = "/dev/shm/packed-images-XXXXXX";
    struct statfs fs;
    if (!g_mkdtemp(dir) || statfs(dir, &fs) != 0 || fs.f_type != TMPFS_MAGIC) {
        rmdir(dir);
        print_message("skipped: no file system in memory at /dev/shm\n");
        skip();
    }
    World *w = world_new(0);
    packed_images_free(w->images);
    w->images = packed_images_new(dir, 0, 0, &w->log.base);
    assert_true(is_refused(w, "no disk of this host"));
    remove_tree(dir);
    world_free(w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_damage_is_seen),
        cmocka_unit_test(test_a_file_that_cannot_be_read),
        cmocka_unit_test(test_replaced_under_a_reader),
        cmocka_unit_test(test_stopped),
        cmocka_unit_test(test_limits),
        cmocka_unit_test(test_a_shard_comes_back),
        cmocka_unit_test(test_two_owners_at_once),
        cmocka_unit_test(test_what_is_not_believed),
        cmocka_unit_test(test_room),
        cmocka_unit_test(test_a_disk_that_fails),
        cmocka_unit_test(test_a_keeper_that_is_stopped),
        cmocka_unit_test(test_limits_of_a_keeper),
        cmocka_unit_test(test_layout_hash),
        cmocka_unit_test(test_memory_is_no_disk),
    };
    return cmocka_run_group_tests_name("packed images", tests, NULL, NULL);
}
