#include "worker/shard/image_file.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "proto/base/whole_io.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define CHUNKS_BEHIND ((size_t)16) /* that may wait for the disk */
#define MAX_THREADS 64u

static const char magic[8] = "weftimg1";

typedef struct Footer {
    char magic[8];
    uint64_t bytes;
    Hash128 key, sums; /* sums: of the chunks' hashes, then of everything before it */
} Footer;

static size_t n_chunks_of(size_t bytes)
{
    return (bytes + IMAGE_CHUNK_BYTES - 1) / IMAGE_CHUNK_BYTES;
}

static size_t chunk_bytes(size_t bytes, size_t chunk)
{
    return MIN(IMAGE_CHUNK_BYTES, bytes - chunk * IMAGE_CHUNK_BYTES);
}

static off_t sums_at(size_t bytes)
{
    return (off_t)((bytes + IMAGE_PADDING_BYTES - 1) / IMAGE_PADDING_BYTES * IMAGE_PADDING_BYTES);
}

static Footer footer_of(const Hash128 *key, size_t bytes, const Hash128 *sums)
{
    Footer footer = {.bytes = bytes, .key = *key};
    memcpy(footer.magic, magic, sizeof magic);
    Hasher *hasher = hasher_new();
    hasher_update(hasher, sums, n_chunks_of(bytes) * sizeof *sums);
    hasher_update(hasher, &footer, offsetof(Footer, sums));
    footer.sums = hasher_finish(hasher);
    hasher_free(hasher);
    return footer;
}

static bool stopped(const ImageWork *work, GError **error)
{
    if (atomic_load(&work->stop)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_CANCELLED, "the weights are to be freed");
        return true;
    }
    return false;
}

/* ---- writing ---- */

static bool write_part(int fd, const void *data, size_t size, off_t at, GError **error)
{
    if (!io_write_whole(fd, data, size, at)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO, "%s", g_strerror(errno));
        return false;
    }
    return true;
}

/* Writing back begins at once, and few chunks wait for the disk: a model's worth of dirty pages
 * would hold up who comes later. */
static void write_back(int fd, size_t chunk)
{
    (void)sync_file_range(fd, (off_t)(chunk * IMAGE_CHUNK_BYTES), IMAGE_CHUNK_BYTES,
                          SYNC_FILE_RANGE_WRITE);
    if (chunk >= CHUNKS_BEHIND) {
        (void)sync_file_range(
            fd, (off_t)((chunk - CHUNKS_BEHIND) * IMAGE_CHUNK_BYTES), IMAGE_CHUNK_BYTES,
            SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
    }
}

/* ---- what describes it ---- */

bool image_open(int fd, const Hash128 *key, size_t bytes, ImageFile *out, GError **error)
{
    const size_t n = n_chunks_of(bytes);
    const off_t at = sums_at(bytes), footer_at = at + (off_t)(n * sizeof(Hash128));
    *out = (ImageFile){.fd = fd, .bytes = bytes, .sums = g_new(Hash128, n)};
    Footer there;
    struct stat st;
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode) &&
        st.st_size == footer_at + (off_t)sizeof there &&
        io_read_whole(fd, out->sums, n * sizeof(Hash128), at) &&
        io_read_whole(fd, &there, sizeof there, footer_at)) {
        const Footer expected = footer_of(key, bytes, out->sums);
        if (memcmp(&there, &expected, sizeof there) == 0) {
            return true;
        }
    }
    image_close(out);
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "has another size or end");
    return false;
}

void image_close(ImageFile *image)
{
    g_clear_pointer(&image->sums, g_free);
}

/* ---- mapping ---- */

bool image_may_lock(size_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        return false;
    }
    const bool may = mlock2(p, bytes, MLOCK_ONFAULT) == 0; /* takes no page, but counts */
    munmap(p, bytes);
    return may;
}

/* Some chunks of an image, mapped and locked, that threads read in and check. */
typedef struct Region {
    const ImageFile *image;
    uint8_t *base;
    size_t first, n, mapped; /* chunks; bytes, whole pages */
    ImageWork *work;
    atomic_size_t next;
    atomic_int error; /* a WeftErrorCode */
    atomic_int why;   /* errno */
} Region;

static void give_up(Region *r, WeftErrorCode code, int why)
{
    int none = 0;
    if (atomic_compare_exchange_strong(&r->error, &none, (int)code)) {
        atomic_store(&r->why, why);
    }
}

/* Every page of it, without SIGBUS where the disk fails. */
static bool read_in(uint8_t *at, size_t bytes)
{
    int rc;
    do {
        rc = madvise(at, bytes, MADV_POPULATE_READ);
    } while (rc != 0 && errno == EINTR);
    if (rc != 0 && errno == EINVAL) { /* before Linux 5.14; locking reads them in, too */
        rc = mlock(at, bytes);
        errno = rc != 0 && errno == ENOMEM ? EIO : errno; /* its word for what cannot be read */
    }
    return rc == 0;
}

static void check_chunk(Region *r, size_t i)
{
    uint8_t *at = r->base + i * IMAGE_CHUNK_BYTES;
    if (!read_in(at, MIN(IMAGE_CHUNK_BYTES, r->mapped - i * IMAGE_CHUNK_BYTES))) {
        give_up(r, errno == ENOMEM || errno == EAGAIN ? WEFT_ERROR_MEMORY : WEFT_ERROR_IO, errno);
        return;
    }
    const Hash128 hash = hash128(at, chunk_bytes(r->image->bytes, r->first + i));
    if (!hash128_equal(&hash, &r->image->sums[r->first + i])) {
        give_up(r, WEFT_ERROR_INVALID, 0);
        return;
    }
    atomic_fetch_add(&r->work->done, chunk_bytes(r->image->bytes, r->first + i));
}

static void *check_chunks(void *user)
{
    Region *r = user;
    for (size_t i; (i = atomic_fetch_add(&r->next, 1)) < r->n && atomic_load(&r->error) == 0;) {
        if (atomic_load(&r->work->stop)) {
            give_up(r, WEFT_ERROR_CANCELLED, 0);
        } else {
            check_chunk(r, i);
        }
    }
    return NULL;
}

static void check_all(Region *r, unsigned n_threads)
{
    pthread_t threads[MAX_THREADS];
    unsigned n = 0;
    while (n + 1 < MIN(MIN(n_threads, MAX_THREADS), r->n) &&
           pthread_create(&threads[n], NULL, check_chunks, r) == 0) {
        n++;
    }
    (void)check_chunks(r);
    for (unsigned i = 0; i < n; i++) {
        pthread_join(threads[i], NULL);
    }
}

static bool region_error(const Region *r, GError **error)
{
    const WeftErrorCode code = (WeftErrorCode)atomic_load(&r->error);
    const char *what = code == WEFT_ERROR_INVALID     ? "is damaged"
                       : code == WEFT_ERROR_CANCELLED ? "is not wanted any more"
                                                      : g_strerror(atomic_load(&r->why));
    if (code != 0) {
        g_set_error(error, WEFT_ERROR, code, "%s", what);
    }
    return code != 0;
}

/* Bytes of whole pages. */
static size_t paged(size_t bytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return (bytes + page - 1) / page * page;
}

/* What lies at `from` takes the place of what lies at `to`. The system call itself: UCX puts its
 * own mremap() in the C library's place, which forgets the new address. */
static bool move_to(uint8_t *to, uint8_t *from, size_t bytes, GError **error)
{
    unsigned char resident;
    if (syscall(SYS_mremap, from, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to) == (long)to) {
        return true;
    }
    const int why = errno;
    if (mincore(to, 1, &resident) != 0) { /* the kernel took the one and did not give the other */
        g_error("weights cannot be mapped: %s", g_strerror(why));
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_MEMORY, "%s", g_strerror(why));
    return false;
}

static bool map_locked(Region *r, GError **error)
{
    const off_t at = (off_t)(r->first * IMAGE_CHUNK_BYTES);
    if (mmap(r->base, r->mapped, PROT_READ, MAP_SHARED | MAP_FIXED, r->image->fd, at) ==
            MAP_FAILED ||
        mlock2(r->base, r->mapped, MLOCK_ONFAULT) != 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_MEMORY, "%s", g_strerror(errno));
        return false;
    }
    (void)madvise(r->base, r->mapped, MADV_HUGEPAGE); /* advice only */
    return true;
}

/* Chunks [first, +n) at their place in the arena. What is checked lies elsewhere until it is known
 * to be right, then takes the place in one step: who reads the arena sees the old bytes or the new.
 */
static bool replace(const ImageFile *image, uint8_t *arena, size_t first, size_t n,
                    unsigned n_threads, ImageWork *work, GError **error)
{
    const size_t bytes = MIN(n * IMAGE_CHUNK_BYTES, image->bytes - first * IMAGE_CHUNK_BYTES);
    Region r = {.image = image, .first = first, .n = n, .mapped = paged(bytes), .work = work};
    r.base = weft_map(bytes, "weights", error); /* aligned to huge pages */
    if (!r.base) {
        return false;
    }
    bool ok = map_locked(&r, error);
    if (ok) {
        check_all(&r, n_threads);
        ok = !region_error(&r, error);
    }
    ok = ok && move_to(arena + first * IMAGE_CHUNK_BYTES, r.base, r.mapped, error);
    if (!ok) {
        weft_unmap(r.base, r.mapped);
    }
    return ok;
}

bool image_map(const ImageFile *image, uint8_t *arena, unsigned n_threads, ImageWork *work,
               GError **error)
{
    return replace(image, arena, 0, n_chunks_of(image->bytes), n_threads, work, error);
}

bool image_take_over(const ImageFile *image, uint8_t *arena, ImageWork *work, GError **error)
{
    const size_t n = n_chunks_of(image->bytes);
    for (size_t i = 0; i < n; i++) {
        if (!replace(image, arena, i, 1, 1, work, error)) {
            return false;
        }
    }
    return true;
}

bool image_write(int fd, const Hash128 *key, uint8_t *arena, size_t bytes, ImageWork *work,
                 GError **error)
{
    const size_t n = n_chunks_of(bytes);
    g_autofree Hash128 *sums = g_new(Hash128, n);
    const ImageFile image = {.fd = fd, .bytes = bytes, .sums = sums};
    /* A disk that is full says so before pages of the file are in use. */
    if (fallocate(fd, 0, 0, sums_at(bytes)) != 0 && errno != EOPNOTSUPP && errno != ENOSYS) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO, "%s", g_strerror(errno));
        return false;
    }
    bool takes = true;
    for (size_t i = 0; i < n; i++) {
        const uint8_t *chunk = arena + i * IMAGE_CHUNK_BYTES;
        sums[i] = hash128(chunk, chunk_bytes(bytes, i));
        if (stopped(work, error) ||
            !write_part(fd, chunk, chunk_bytes(bytes, i), (off_t)(i * IMAGE_CHUNK_BYTES), error)) {
            return false;
        }
        write_back(fd, i);
        takes = takes && replace(&image, arena, i, 1, 1, work, NULL);
    }
    const Footer footer = footer_of(key, bytes, sums);
    return write_part(fd, sums, n * sizeof *sums, sums_at(bytes), error) &&
           write_part(fd, &footer, sizeof footer, sums_at(bytes) + (off_t)(n * sizeof *sums),
                      error);
}
