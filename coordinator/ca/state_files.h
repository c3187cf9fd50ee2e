/* Small files of the state directory: written aside, synced and renamed, so that a reader sees the
 * old or the new one, whole. */
#pragma once

#include <glib.h>
#include <stdbool.h>

/* Makes the directory (0700) if needed and takes its lock: INVALID when another coordinator has it.
 * Returns a descriptor, -1 on error. */
int state_dir_open(const char *dir, GError **error);
bool state_file_exists(const char *dir, const char *name);
bool state_file_read(const char *dir, const char *name, char **text_out, GError **error);
bool state_file_write(const char *dir, const char *name, const char *text, int mode,
                      GError **error);
