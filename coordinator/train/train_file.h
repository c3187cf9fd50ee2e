/* Files that a training job leaves for people: its curves, its trace. Any thread. */
#pragma once

#include <glib.h>
#include <stdbool.h>

/* A file with this text, whole or not at all; its folder is made if need be. IO. */
bool train_file_write(const char *path, const char *text, GError **error);
/* Before a run: whether that could be done now; the folder is made. key: of the job file, that
 * names it. INVALID. */
bool train_file_check(const char *key, const char *path, GError **error);
