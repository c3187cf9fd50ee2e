/* Removes what a test made on disk. */
#pragma once

#include <glib.h>
#include <glib/gstdio.h>

/* A file, or a folder with all that is in it; links are not followed into. */
static inline void remove_tree(const char *path)
{
    g_autoptr(GDir) dir =
        g_file_test(path, G_FILE_TEST_IS_SYMLINK) ? NULL : g_dir_open(path, 0, NULL);
    for (const char *name; dir != NULL && (name = g_dir_read_name(dir)) != NULL;) {
        g_autofree char *child = g_build_filename(path, name, NULL);
        remove_tree(child);
    }
    g_remove(path);
}
