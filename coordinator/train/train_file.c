#include "coordinator/train/train_file.h"

#include "proto/base/error.h"

#include <errno.h>
#include <unistd.h>

char *train_file_log(const char *state_dir, const char *job)
{
    return state_dir != NULL ? g_strdup_printf("%s/train-%s.jsonl", state_dir, job) : NULL;
}

char *train_file_curves(const char *state_dir, const char *checkpoints, const char *job)
{
    return checkpoints != NULL ? g_strdup_printf("%s/%s.svg", checkpoints, job)
           : state_dir != NULL ? g_strdup_printf("%s/train-%s.svg", state_dir, job)
                               : NULL;
}

bool train_file_write(const char *path, const char *text, GError **error)
{
    g_autofree char *directory = g_path_get_dirname(path);
    g_autoptr(GError) why = NULL;
    if (g_mkdir_with_parents(directory, 0755) == 0 && g_file_set_contents(path, text, -1, &why)) {
        return true;
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO, "%s cannot be written: %s", path,
                why != NULL ? why->message : g_strerror(errno));
    return false;
}

bool train_file_check(const char *key, const char *path, GError **error)
{
    g_autofree char *directory = g_path_get_dirname(path);
    int failed = g_mkdir_with_parents(directory, 0755) == 0 ? 0 : errno;
    if (failed == 0 && g_file_test(path, G_FILE_TEST_IS_DIR)) {
        failed = EISDIR;
    } else if (failed == 0 && access(directory, W_OK | X_OK) != 0) { /* it is renamed into place */
        failed = errno;
    }
    if (failed != 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "%s %s cannot be written: %s; name another file", key, path,
                    g_strerror(failed));
    }
    return failed == 0;
}
