/* Files that a training job leaves for people: its curves, its trace. Any thread. */
#pragma once

#include <glib.h>
#include <stdbool.h>

/* Paths, returned; state_dir NULL: nowhere. Of the steps; of the curves, which go beside the
 * checkpoints if there are any (NULL: none). */
char *train_file_log(const char *state_dir, const char *job);
char *train_file_curves(const char *state_dir, const char *checkpoints, const char *job);
/* A file with this text, whole or not at all; its folder is made if need be. IO. */
bool train_file_write(const char *path, const char *text, GError **error);
/* Before a run: whether that could be done now; the folder is made. key: of the job file, that
 * names it. INVALID. */
bool train_file_check(const char *key, const char *path, GError **error);
