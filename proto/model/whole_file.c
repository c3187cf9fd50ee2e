#include "proto/model/whole_file.h"

#include "proto/base/error.h"

#include <errno.h>
#include <glib/gstdio.h>
#include <stdio.h>
#include <unistd.h>

struct WholeFile {
    char *path, *aside;
    FILE *file;
    uint64_t size;
};

static bool fail(GError **error, const char *what, const char *path)
{
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO, "cannot %s %s: %s; check the folder and its disk",
                what, path, g_strerror(errno));
    return false;
}

WholeFile *whole_file_new(const char *path, GError **error)
{
    WholeFile *f = g_new0(WholeFile, 1);
    f->path = g_strdup(path);
    f->aside = g_strconcat(path, ".part", NULL);
    f->file = fopen(f->aside, "wb");
    if (f->file == NULL) {
        fail(error, "create", f->aside);
        whole_file_finish(f, false, NULL);
        return NULL;
    }
    return f;
}

bool whole_file_write(WholeFile *f, const void *bytes, size_t n, GError **error)
{
    f->size += n;
    return fwrite(bytes, 1, n, f->file) == n || fail(error, "write", f->aside);
}

uint64_t whole_file_size(const WholeFile *f)
{
    return f->size;
}

bool whole_file_finish(WholeFile *f, bool ok, GError **error)
{
    if (f->file != NULL) {
        ok = ok && ((fflush(f->file) == 0 && fsync(fileno(f->file)) == 0) ||
                    fail(error, "write", f->aside));
        const bool closed = fclose(f->file) == 0;
        ok = ok && (closed || fail(error, "close", f->aside));
        ok = ok && (g_rename(f->aside, f->path) == 0 || fail(error, "name", f->path));
        if (!ok) {
            g_unlink(f->aside);
        }
    }
    g_free(f->path);
    g_free(f->aside);
    g_free(f);
    return ok;
}

bool whole_file_put(const char *path, const void *bytes, size_t n, GError **error)
{
    WholeFile *f = whole_file_new(path, error);
    return f != NULL && whole_file_finish(f, whole_file_write(f, bytes, n, error), error);
}
