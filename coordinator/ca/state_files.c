#include "coordinator/ca/state_files.h"

#include "proto/base/error.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

static bool fail_errno(GError **error, const char *what, const char *path)
{
    int saved = errno;
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO,
                "%s %s: %s: check the path, its owner and free space", what, path,
                g_strerror(saved));
    return false;
}

int state_dir_open(const char *dir, GError **error)
{
    if (g_mkdir_with_parents(dir, 0700) != 0) {
        fail_errno(error, "cannot make the state directory", dir);
        return -1;
    }
    g_autofree char *path = g_build_filename(dir, "lock", NULL);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0) {
        fail_errno(error, "cannot open", path);
        return -1;
    }
    if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_FAILED,
                    "state directory %s is in use by another coordinator: stop it, or give this "
                    "one its own --state",
                    dir);
        close(fd);
        return -1;
    }
    return fd;
}

bool state_file_exists(const char *dir, const char *name)
{
    g_autofree char *path = g_build_filename(dir, name, NULL);
    return g_file_test(path, G_FILE_TEST_IS_REGULAR);
}

bool state_file_read(const char *dir, const char *name, char **text_out, GError **error)
{
    g_autofree char *path = g_build_filename(dir, name, NULL);
    g_autoptr(GError) cause = NULL;
    if (!g_file_get_contents(path, text_out, NULL, &cause)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO, "cannot read %s: %s", path, cause->message);
        return false;
    }
    return true;
}

static bool write_all(int fd, const char *text, size_t size)
{
    while (size > 0) {
        ssize_t n = write(fd, text, size);
        if (n < 0 && errno != EINTR) {
            return false;
        }
        if (n > 0) {
            text += n;
            size -= (size_t)n;
        }
    }
    return fsync(fd) == 0;
}

bool state_file_write(const char *dir, const char *name, const char *text, int mode, GError **error)
{
    g_autofree char *path = g_build_filename(dir, name, NULL);
    g_autofree char *aside = g_strconcat(path, ".new", NULL);
    unlink(aside);
    int fd = open(aside, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, mode);
    if (fd < 0) {
        return fail_errno(error, "cannot create", aside);
    }
    bool ok = fchmod(fd, (mode_t)mode) == 0 && write_all(fd, text, strlen(text));
    if (!ok) {
        fail_errno(error, "cannot write", aside);
    }
    close(fd);
    if (ok && rename(aside, path) != 0) {
        ok = fail_errno(error, "cannot rename to", path);
    }
    if (!ok) {
        unlink(aside);
    }
    return ok;
}
