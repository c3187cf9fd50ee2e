/* Order of what reaches the disk: bytes of a part, fsync of it; of all parts; manifest, fsync;
 * fsync of the folder; rename; fsync of the folder above. A crash between any two leaves either a
 * folder whose name begins with a dot, which nobody reads, or a whole checkpoint. */
#include "coordinator/train/checkpoint.h"

#include "proto/base/error.h"
#include "proto/model/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <glib/gstdio.h>
#include <string.h>
#include <unistd.h>

/* ---- disk ---- */

static ssize_t real_write(CheckpointDisk *self, int fd, const void *bytes, size_t n)
{
    return write(fd, bytes, n);
}

static int real_sync(CheckpointDisk *self, int fd)
{
    return fsync(fd);
}

CheckpointDisk *checkpoint_disk(void)
{
    static CheckpointDisk disk = {real_write, real_sync};
    return &disk;
}

static bool fail(GError **error, const char *what, const char *path)
{
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO, "checkpoint: %s %s: %s; %s", what, path,
                g_strerror(errno),
                errno == ENOSPC || errno == EDQUOT ? "free some space, the last checkpoint is kept"
                                                   : "check the folder and its disk");
    return false;
}

/* ---- one file ---- */

typedef struct Output {
    CheckpointDisk *disk;
    int fd;
    char *path;
    Hasher *hasher;
    uint64_t size;
} Output;

static bool output_open(Output *o, CheckpointDisk *disk, const char *path, GError **error)
{
    *o = (Output){.disk = disk, .path = g_strdup(path)};
    o->fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (o->fd < 0) {
        return fail(error, "cannot create", path);
    }
    o->hasher = hasher_new();
    return true;
}

static bool output_write(Output *o, const void *bytes, size_t n, GError **error)
{
    const uint8_t *at = bytes;
    hasher_update(o->hasher, bytes, n);
    o->size += n;
    while (n > 0) {
        const ssize_t done = o->disk->write(o->disk, o->fd, at, n);
        if (done < 0 && errno == EINTR) {
            continue;
        }
        if (done <= 0) {
            errno = done == 0 ? ENOSPC : errno;
            return fail(error, "cannot write", o->path);
        }
        at += done;
        n -= (size_t)done;
    }
    return true;
}

/* Closes it; ok: it is to be on the disk. */
static bool output_close(Output *o, bool ok, GError **error)
{
    if (o->fd >= 0) {
        ok = ok && (o->disk->sync(o->disk, o->fd) == 0 || fail(error, "cannot sync", o->path));
        /* Some file systems tell a full disk only here. */
        const bool closed = close(o->fd) == 0;
        ok = ok && (closed || fail(error, "cannot close", o->path));
        hasher_free(o->hasher);
    }
    g_free(o->path);
    return ok;
}

static bool sync_folder(CheckpointDisk *disk, const char *path, GError **error)
{
    const int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    const bool ok = fd >= 0 && disk->sync(disk, fd) == 0;
    if (!ok) {
        fail(error, "cannot sync", path);
    }
    if (fd >= 0) {
        close(fd);
    }
    return ok;
}

/* ---- folders ---- */

static char *unfinished_path(const char *directory, uint64_t step)
{
    g_autofree char *name = checkpoint_name(step), *hidden = g_strconcat(".", name, NULL);
    return g_build_filename(directory, hidden, NULL);
}

static void remove_folder(const char *path)
{
    g_autoptr(GDir) dir = g_dir_open(path, 0, NULL);
    for (const char *name; dir != NULL && (name = g_dir_read_name(dir)) != NULL;) {
        g_autofree char *file = g_build_filename(path, name, NULL);
        g_unlink(file);
    }
    g_rmdir(path);
}

void checkpoint_abandon(const char *directory, uint64_t step)
{
    g_autofree char *path = unfinished_path(directory, step);
    remove_folder(path);
}

/* What is older than the `keep` newest up to step `newest`, and what was left unfinished up to
 * there: a later one was passed over as damaged. Under a hidden name first: a folder that is being
 * removed is no checkpoint any more. */
static void prune(const char *directory, uint64_t newest, unsigned keep)
{
    g_autoptr(GArray) steps = checkpoint_steps(directory);
    guint n = steps->len;
    while (n > 0 && g_array_index(steps, uint64_t, n - 1) > newest) {
        n--;
    }
    for (guint i = 0; i + MAX(keep, 1) < n; i++) {
        const uint64_t step = g_array_index(steps, uint64_t, i);
        g_autofree char *name = checkpoint_name(step),
                        *path = g_build_filename(directory, name, NULL),
                        *hidden = unfinished_path(directory, step);
        remove_folder(hidden);
        g_rename(path, hidden);
    }
    g_autoptr(GDir) dir = g_dir_open(directory, 0, NULL);
    g_autoptr(GPtrArray) left = g_ptr_array_new_with_free_func(g_free);
    for (const char *name; dir != NULL && (name = g_dir_read_name(dir)) != NULL;) {
        if (g_str_has_prefix(name, ".step-") && g_ascii_strtoull(name + 6, NULL, 10) <= newest) {
            g_ptr_array_add(left, g_build_filename(directory, name, NULL));
        }
    }
    for (unsigned i = 0; i < left->len; i++) {
        remove_folder(left->pdata[i]);
    }
}

/* ---- parts ---- */

/* What stands before the pieces in their file. */
static bool write_header(Output *o, const CheckpointPiece *pieces, size_t n, GError **error)
{
    g_autofree SafetensorsEntry *entries = g_new0(SafetensorsEntry, MAX(n, 1));
    g_autoptr(GPtrArray) names = g_ptr_array_new_with_free_func(g_free);
    for (size_t i = 0; i < n; i++) {
        const SliceRect r = pieces[i].rect;
        g_ptr_array_add(names, checkpoint_piece_name(&pieces[i]));
        entries[i] = (SafetensorsEntry){names->pdata[i], DTYPE_F32, 2, {r.n_rows, r.n_cols}};
        if (pieces[i].rows == 1) { /* a vector */
            entries[i].n_dims = 1;
            entries[i].dims[0] = r.n_cols;
        }
    }
    const char *const metadata[] = {"format", "pt", "producer", "weft " WEFT_VERSION, NULL};
    g_autoptr(GBytes) header = safetensors_header(entries, n, metadata, error);
    gsize size = 0;
    const void *bytes = header != NULL ? g_bytes_get_data(header, &size) : NULL;
    return header != NULL && output_write(o, bytes, size, error);
}

/* A file of the checkpoint of `step`. */
static bool open_file(Output *o, CheckpointDisk *disk, const char *directory, uint64_t step,
                      const char *name, GError **error)
{
    g_autofree char *folder = unfinished_path(directory, step),
                    *path = g_build_filename(folder, name, NULL);
    if (g_mkdir_with_parents(folder, 0755) != 0) {
        return fail(error, "cannot create", folder);
    }
    return output_open(o, disk, path, error);
}

/* Closes it; what was not written whole is removed, which gives the space back. */
static bool close_file(Output *o, bool ok, Hash128 *hash, GError **error)
{
    g_autofree char *path = g_strdup(o->path);
    if (ok) {
        *hash = hasher_finish(o->hasher);
    }
    ok = output_close(o, ok, error);
    if (!ok && path != NULL) {
        g_unlink(path);
    }
    return ok;
}

struct CheckpointPart {
    Output file;
    char *name;
    const CheckpointPiece *pieces; /* borrowed */
    size_t n;
};

static void part_free(CheckpointPart *p)
{
    g_free(p->name);
    g_free(p);
}

CheckpointPart *checkpoint_part_open(CheckpointDisk *disk, const char *directory, uint64_t step,
                                     uint32_t rank, const CheckpointPiece *pieces, size_t n,
                                     GError **error)
{
    CheckpointPart *p = g_new0(CheckpointPart, 1);
    p->name = g_strdup_printf("part-%03u.safetensors", rank);
    p->pieces = pieces;
    p->n = n;
    p->file.fd = -1;
    if (!open_file(&p->file, disk, directory, step, p->name, error) ||
        !write_header(&p->file, pieces, n, error)) {
        checkpoint_part_abandon(p);
        return NULL;
    }
    return p;
}

bool checkpoint_part_write(CheckpointPart *p, const void *bytes, size_t size, GError **error)
{
    return output_write(&p->file, bytes, size, error);
}

char *checkpoint_part_close(CheckpointPart *p, GError **error)
{
    CheckpointFile file = {.name = p->name, .size = p->file.size};
    const bool ok = close_file(&p->file, true, &file.hash, error);
    char *text = ok ? checkpoint_part_json(&file, p->pieces, p->n) : NULL;
    part_free(p);
    return text;
}

void checkpoint_part_abandon(CheckpointPart *p)
{
    if (p != NULL) {
        close_file(&p->file, false, NULL, NULL);
        part_free(p);
    }
}

char *checkpoint_write_file(CheckpointDisk *disk, const char *directory, uint64_t step,
                            const char *name, const void *bytes, size_t size, GError **error)
{
    Output o = {.fd = -1};
    CheckpointFile file = {.name = name};
    bool ok = open_file(&o, disk, directory, step, name, error);
    ok = ok && output_write(&o, bytes, size, error);
    file.size = o.size;
    return close_file(&o, ok, &file.hash, error) ? checkpoint_part_json(&file, NULL, 0) : NULL;
}

/* ---- commit ---- */

static bool publish(CheckpointDisk *disk, const char *directory, const char *folder,
                    const char *path, GError **error)
{
    if (!sync_folder(disk, folder, error)) {
        return false;
    }
    /* One of the same step: of a run that went on from an earlier one. */
    g_autofree char *old = g_strconcat(folder, "-old", NULL);
    remove_folder(old);
    const bool replaces = g_rename(path, old) == 0;
    const bool named = g_rename(folder, path) == 0 || fail(error, "cannot name", path);
    if (named && sync_folder(disk, directory, error)) {
        return true;
    }
    if (named) {
        g_rename(path, folder);
    }
    if (replaces) {
        g_rename(old, path);
    }
    return false;
}

bool checkpoint_commit(CheckpointDisk *disk, const char *directory, const CheckpointState *state,
                       const ModelSpec *model, const char *const *parts, size_t n_parts,
                       unsigned keep, GError **error)
{
    g_autofree char *folder = unfinished_path(directory, state->step),
                    *name = checkpoint_name(state->step),
                    *path = g_build_filename(directory, name, NULL),
                    *manifest = checkpoint_manifest(state, model, parts, n_parts, error);
    g_autofree char *written =
        manifest != NULL ? checkpoint_write_file(disk, directory, state->step, CHECKPOINT_MANIFEST,
                                                 manifest, strlen(manifest), error)
                         : NULL;
    if (written == NULL || !publish(disk, directory, folder, path, error)) {
        checkpoint_abandon(directory, state->step);
        return false;
    }
    prune(directory, state->step, keep);
    return true;
}
