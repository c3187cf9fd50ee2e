/* Unicode normalization form C (UAX 15), in linear time also for text that is one endless run of
 * combining marks. */
#pragma once

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>

/* Appends the normal form of well-formed UTF-8 to out (aliasing forbidden). False + MEMORY. */
bool nfc_append(const char *text, size_t length, GString *out, GError **error);
