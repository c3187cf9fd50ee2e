#include "tools/weft/logits_file.h"

#include "proto/base/bytes.h"
#include "proto/base/error.h"
#include "proto/base/units.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

enum {
    HEADER_BYTES = 256,
    HEADER_HASHED = 240,
    HASH_BYTES = sizeof(Hash128),
    FORMAT_VERSION = 1,
    VOCAB_LIMIT = 1 << 24,
    WINDOW_LIMIT = 1 << 20,
    WINDOWS_LIMIT = 1 << 24,
};
#define MAGIC "weftlogi"

G_STATIC_ASSERT(G_BYTE_ORDER == G_LITTLE_ENDIAN); /* rows are written as they lie in memory */

uint64_t logits_kind_rows(const LogitsKind *k)
{
    return (uint64_t)k->n_windows * (k->window - k->window / 2);
}

static uint64_t row_bytes(const LogitsKind *k)
{
    return sizeof(float) * (uint64_t)k->vocab_size;
}

static uint64_t hashes_at(const LogitsKind *k)
{
    return HEADER_BYTES + logits_kind_rows(k) * row_bytes(k);
}

uint64_t logits_kind_bytes(const LogitsKind *k)
{
    return hashes_at(k) + (logits_kind_rows(k) + 1) * HASH_BYTES;
}

/* ---- the header ---- */

static void put_u32(uint8_t *at, uint32_t value)
{
    memcpy(at, &value, sizeof value);
}

static void encode_header(const LogitsKind *k, uint8_t out[HEADER_BYTES])
{
    memset(out, 0, HEADER_BYTES);
    memcpy(out, MAGIC, 8);
    put_u32(out + 8, FORMAT_VERSION);
    put_u32(out + 12, k->vocab_size);
    put_u32(out + 16, k->window);
    put_u32(out + 20, k->n_windows);
    put_u32(out + 24, k->numerics);
    memcpy(out + 32, k->text.bytes, HASH_BYTES);
    memcpy(out + 48, k->vocabulary.bytes, HASH_BYTES);
    memcpy(out + 64, k->windows.bytes, HASH_BYTES);
    memcpy(out + 80, k->definition.bytes, HASH_BYTES);
    memcpy(out + 96, k->model, strnlen(k->model, LOGITS_MODEL_BYTES - 1));
    const Hash128 hash = hash128(out, HEADER_HASHED);
    memcpy(out + HEADER_HASHED, hash.bytes, HASH_BYTES);
}

static Hash128 hash_at(const uint8_t *at)
{
    Hash128 hash;
    memcpy(hash.bytes, at, HASH_BYTES);
    return hash;
}

static bool refuse(GError **error, const char *path, const char *format, ...) G_GNUC_PRINTF(3, 4);
static bool refuse(GError **error, const char *path, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    g_autofree char *why = g_strdup_vprintf(format, arguments);
    va_end(arguments);
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "%s: %s", path, why);
    return false;
}

static const char WRITE_ANEW[] = "write it anew with weft perplexity --save-logits";

static bool decode_header(const char *path, const uint8_t in[HEADER_BYTES], LogitsKind *out,
                          GError **error)
{
    ByteReader r = byte_reader(in, HEADER_BYTES);
    if (memcmp(byte_reader_take(&r, 8), MAGIC, 8) != 0) {
        return refuse(error, path, "is no file of logits: %s", WRITE_ANEW);
    }
    const uint32_t version = byte_reader_u32le(&r);
    if (version != FORMAT_VERSION) {
        return refuse(error, path, "is of format version %u, known is %u: %s", version,
                      FORMAT_VERSION, WRITE_ANEW);
    }
    const Hash128 hash = hash128(in, HEADER_HASHED), stored = hash_at(in + HEADER_HASHED);
    if (!hash128_equal(&hash, &stored)) {
        return refuse(error, path, "its header is damaged: %s", WRITE_ANEW);
    }
    *out = (LogitsKind){.text = hash_at(in + 32),
                        .vocabulary = hash_at(in + 48),
                        .windows = hash_at(in + 64),
                        .definition = hash_at(in + 80)};
    out->vocab_size = byte_reader_u32le(&r);
    out->window = byte_reader_u32le(&r);
    out->n_windows = byte_reader_u32le(&r);
    out->numerics = byte_reader_u32le(&r) != 0 ? NUMERICS_FAST : NUMERICS_EXACT;
    memcpy(out->model, in + 96, LOGITS_MODEL_BYTES - 1);
    if (out->vocab_size == 0 || out->vocab_size > VOCAB_LIMIT || out->window < 2 ||
        out->window > WINDOW_LIMIT || out->n_windows == 0 || out->n_windows > WINDOWS_LIMIT) {
        return refuse(error, path, "its header has %u windows of %u tokens, vocabulary %u: %s",
                      out->n_windows, out->window, out->vocab_size, WRITE_ANEW);
    }
    return true;
}

/* ---- writing ---- */

struct LogitsWriter {
    char *path, *temporary; /* temporary: NULL once it has its name */
    int fd;
    LogitsKind kind;
    Hash128 *hashes; /* of the rows */
    uint64_t n_put;
};

static bool fail_io(GError **error, const char *path, const char *what, int code)
{
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO, "%s: %s: %s%s", path, what, g_strerror(code),
                code == ENOSPC || code == EDQUOT
                    ? ": name a file on a larger disk, or give less text"
                    : "");
    return false;
}

static bool write_at(LogitsWriter *w, const void *data, uint64_t size, uint64_t offset,
                     GError **error)
{
    const uint8_t *at = data;
    while (size > 0) {
        const ssize_t n = pwrite(w->fd, at, MIN(size, (uint64_t)1 << 30), (off_t)offset);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return fail_io(error, w->path, "cannot write", n < 0 ? errno : ENOSPC);
        }
        at += n;
        size -= (uint64_t)n;
        offset += (uint64_t)n;
    }
    return true;
}

/* Says at once that the disk is too small, where it can be known. */
static bool reserve(LogitsWriter *w, GError **error)
{
    const uint64_t need = logits_kind_bytes(&w->kind);
    struct statvfs disk = {0};
    bool full = fstatvfs(w->fd, &disk) == 0 && (uint64_t)disk.f_bavail * disk.f_frsize < need;
    if (!full && fallocate(w->fd, 0, 0, (off_t)need) != 0) {
        full = errno == ENOSPC || errno == EDQUOT || errno == EFBIG; /* else: not offered there */
    }
    if (!full) {
        return true;
    }
    g_autofree char *size = units_format_size(need);
    g_autofree char *free_size = units_format_size((uint64_t)disk.f_bavail * disk.f_frsize);
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO,
                "%s: the logits need %s, %s are free there: name a file on a larger disk, or give "
                "less text",
                w->path, size, free_size);
    return false;
}

#define OWN_FILES "/proc/self/fd"

/* Without a name where that can be: whoever is killed leaves nothing behind. */
static bool open_temporary(LogitsWriter *w, GError **error)
{
    struct stat there;
    if (stat(w->path, &there) == 0 && !S_ISREG(there.st_mode)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "%s is no regular file: name another for the logits", w->path);
        return false;
    }
    g_autofree char *folder = g_path_get_dirname(w->path);
    w->fd = access(OWN_FILES, X_OK) == 0 ? open(folder, O_TMPFILE | O_RDWR | O_CLOEXEC, 0666) : -1;
    if (w->fd >= 0) {
        return true;
    }
    w->temporary = g_strconcat(w->path, ".XXXXXX", NULL); /* not offered there */
    w->fd = g_mkstemp_full(w->temporary, O_RDWR | O_CLOEXEC, 0666);
    if (w->fd < 0) {
        const int code = errno;
        g_clear_pointer(&w->temporary, g_free);
        return fail_io(error, w->path, "cannot be made", code);
    }
    return true;
}

/* A name beside the one that it is to get: linking replaces nothing, renaming does. */
static bool name_temporary(LogitsWriter *w, GError **error)
{
    g_autofree char *own = g_strdup_printf(OWN_FILES "/%d", w->fd);
    for (int tries = 0; tries < 100; tries++) {
        g_autofree char *name = g_strdup_printf("%s.%06x", w->path, g_random_int() & 0xffffffu);
        if (linkat(AT_FDCWD, own, AT_FDCWD, name, AT_SYMLINK_FOLLOW) == 0) {
            w->temporary = g_steal_pointer(&name);
            return true;
        }
        if (errno != EEXIST) {
            break;
        }
    }
    return fail_io(error, w->path, "cannot be given a name", errno);
}

LogitsWriter *logits_writer_new(const char *path, const LogitsKind *kind, GError **error)
{
    LogitsWriter *w = g_new0(LogitsWriter, 1);
    uint8_t header[HEADER_BYTES];
    w->path = g_strdup(path);
    w->kind = *kind;
    w->fd = -1;
    encode_header(kind, header);
    if (!open_temporary(w, error) || !reserve(w, error) ||
        !write_at(w, header, sizeof header, 0, error)) {
        logits_writer_free(w);
        return NULL;
    }
    w->hashes = g_new0(Hash128, logits_kind_rows(kind));
    return w;
}

bool logits_writer_put(LogitsWriter *w, uint64_t row, const float *logits, GError **error)
{
    const uint64_t bytes = row_bytes(&w->kind);
    g_assert(row < logits_kind_rows(&w->kind));
    w->hashes[row] = hash128(logits, bytes);
    w->n_put++;
    return write_at(w, logits, bytes, HEADER_BYTES + row * bytes, error);
}

bool logits_writer_finish(LogitsWriter *w, GError **error)
{
    const uint64_t n = logits_kind_rows(&w->kind), at = hashes_at(&w->kind);
    const Hash128 all = hash128(w->hashes, n * HASH_BYTES);
    g_assert(w->n_put == n);
    if (!write_at(w, w->hashes, n * HASH_BYTES, at, error) ||
        !write_at(w, all.bytes, HASH_BYTES, at + n * HASH_BYTES, error)) {
        return false;
    }
    if (fsync(w->fd) != 0) {
        return fail_io(error, w->path, "cannot write", errno);
    }
    if (w->temporary == NULL && !name_temporary(w, error)) {
        return false;
    }
    if (rename(w->temporary, w->path) != 0) {
        return fail_io(error, w->path, "cannot be given its name", errno);
    }
    g_clear_pointer(&w->temporary, g_free);
    return true;
}

void logits_writer_free(LogitsWriter *w)
{
    if (w == NULL) {
        return;
    }
    if (w->fd >= 0) {
        close(w->fd);
    }
    if (w->temporary != NULL) {
        unlink(w->temporary);
    }
    g_free(w->temporary);
    g_free(w->path);
    g_free(w->hashes);
    g_free(w);
}

/* ---- reading ---- */

struct LogitsReader {
    char *path;
    int fd;
    LogitsKind kind;
};

static bool read_at(const LogitsReader *r, void *out, uint64_t size, uint64_t offset,
                    GError **error)
{
    uint8_t *at = out;
    while (size > 0) {
        const ssize_t n = pread(r->fd, at, MIN(size, (uint64_t)1 << 30), (off_t)offset);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            return fail_io(error, r->path, "cannot be read", errno);
        }
        if (n == 0) {
            return refuse(error, r->path, "ends at byte %" G_GUINT64_FORMAT ": %s", offset,
                          WRITE_ANEW);
        }
        at += n;
        size -= (uint64_t)n;
        offset += (uint64_t)n;
    }
    return true;
}

/* The hashes of all rows are what was written. */
static bool check_hashes(const LogitsReader *r, GError **error)
{
    const uint64_t size = logits_kind_rows(&r->kind) * HASH_BYTES, at = hashes_at(&r->kind);
    enum { PART = 1 << 16 };
    g_autofree uint8_t *part = g_malloc(PART);
    Hasher *hasher = hasher_new();
    bool ok = true;
    for (uint64_t done = 0; ok && done < size; done += PART) {
        const uint64_t n = MIN(size - done, (uint64_t)PART);
        ok = read_at(r, part, n, at + done, error);
        hasher_update(hasher, part, ok ? n : 0);
    }
    const Hash128 hash = hasher_finish(hasher);
    hasher_free(hasher);
    Hash128 stored;
    ok = ok && read_at(r, stored.bytes, HASH_BYTES, at + size, error);
    return ok && (hash128_equal(&hash, &stored) ||
                  refuse(error, r->path, "its table of hashes is damaged: %s", WRITE_ANEW));
}

static bool check_file(LogitsReader *r, GError **error)
{
    uint8_t header[HEADER_BYTES];
    struct stat file;
    if (fstat(r->fd, &file) != 0) {
        return fail_io(error, r->path, "cannot be read", errno);
    }
    if (!S_ISREG(file.st_mode) || file.st_size < HEADER_BYTES) {
        return refuse(error, r->path, "is no file of logits: %s", WRITE_ANEW);
    }
    if (!read_at(r, header, sizeof header, 0, error) ||
        !decode_header(r->path, header, &r->kind, error)) {
        return false;
    }
    const uint64_t need = logits_kind_bytes(&r->kind);
    if ((uint64_t)file.st_size != need) {
        return refuse(error, r->path,
                      "has %" G_GUINT64_FORMAT " bytes where its header wants %" G_GUINT64_FORMAT
                      ": %s",
                      (uint64_t)file.st_size, need, WRITE_ANEW);
    }
    return check_hashes(r, error);
}

LogitsReader *logits_reader_new(const char *path, GError **error)
{
    LogitsReader *r = g_new0(LogitsReader, 1);
    r->path = g_strdup(path);
    r->fd = open(path, O_RDONLY | O_CLOEXEC);
    if (r->fd < 0) {
        g_set_error(error, WEFT_ERROR,
                    errno == ENOENT || errno == ENOTDIR ? WEFT_ERROR_NOT_FOUND : WEFT_ERROR_IO,
                    "logits %s: %s: write them with weft perplexity --save-logits", path,
                    g_strerror(errno));
        logits_reader_free(r);
        return NULL;
    }
    if (!check_file(r, error)) {
        logits_reader_free(r);
        return NULL;
    }
    return r;
}

void logits_reader_free(LogitsReader *r)
{
    if (r == NULL) {
        return;
    }
    if (r->fd >= 0) {
        close(r->fd);
    }
    g_free(r->path);
    g_free(r);
}

const LogitsKind *logits_reader_kind(const LogitsReader *r)
{
    return &r->kind;
}

bool logits_reader_fits_text(const LogitsReader *r, const Hash128 *text, uint32_t window,
                             GError **error)
{
    if (window != r->kind.window) {
        return refuse(error, r->path, "is of windows of %u tokens, not %u: give --ctx %u",
                      r->kind.window, window, r->kind.window);
    }
    return hash128_equal(text, &r->kind.text) ||
           refuse(error, r->path, "is of another text: give -f the text that it was written with");
}

bool logits_reader_fits(const LogitsReader *r, const LogitsKind *kind, GError **error)
{
    const LogitsKind *own = &r->kind;
    if (kind->vocab_size != own->vocab_size ||
        !hash128_equal(&kind->vocabulary, &own->vocabulary)) {
        return refuse(error, r->path,
                      "is of another vocabulary (%u ids, this model has %u): compare models with "
                      "the same one",
                      own->vocab_size, kind->vocab_size);
    }
    if (kind->n_windows != own->n_windows || !hash128_equal(&kind->windows, &own->windows)) {
        return refuse(error, r->path,
                      "its model cut the text into other tokens (%u windows, this one %u): compare "
                      "models with the same tokenizer",
                      own->n_windows, kind->n_windows);
    }
    return true;
}

bool logits_reader_row(const LogitsReader *r, uint64_t row, float *out, GError **error)
{
    const uint64_t bytes = row_bytes(&r->kind);
    Hash128 stored;
    g_assert(row < logits_kind_rows(&r->kind));
    if (!read_at(r, out, bytes, HEADER_BYTES + row * bytes, error) ||
        !read_at(r, stored.bytes, HASH_BYTES, hashes_at(&r->kind) + row * HASH_BYTES, error)) {
        return false;
    }
    const Hash128 hash = hash128(out, bytes);
    return hash128_equal(&hash, &stored) ||
           refuse(error, r->path, "row %" G_GUINT64_FORMAT " is damaged: %s", row, WRITE_ANEW);
}
