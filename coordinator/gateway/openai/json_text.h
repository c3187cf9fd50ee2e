/* Writing JSON into a GString, a token at a time: no tree is built for what is written once. */
#pragma once

#include <glib.h>
#include <stddef.h>

/* A string with quotes, or null. Bytes that are no UTF-8 become U+FFFD. */
void json_text_string(GString *out, const char *text /* NULL: null */);
void json_text_bytes(GString *out, const char *text, size_t length);
/* A number that reads back as the same float; null unless finite, for JSON has no other. */
void json_text_float(GString *out, float value);
