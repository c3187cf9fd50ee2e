/* WholeFile: a file that is there whole or not at all: written aside, synced and renamed. */
#pragma once

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct WholeFile WholeFile;
/* IO. Returned. */
WholeFile *whole_file_new(const char *path, GError **error);
bool whole_file_write(WholeFile *f, const void *bytes, size_t n, GError **error);
/* Bytes so far. */
uint64_t whole_file_size(const WholeFile *f);
/* ok: it gets its name, what had it before is replaced; else it is removed. Frees it always. False
 * unless the file is there. */
bool whole_file_finish(WholeFile *f, bool ok, GError **error);
/* All at once. */
bool whole_file_put(const char *path, const void *bytes, size_t n, GError **error);
