/* What readers of a Hugging Face directory share: values of its config.json, and refusals. */
#pragma once

#include <glib.h>
#include <jansson.h>
#include <stdbool.h>

/* False; the error is INVALID and begins with the directory. */
bool hf_fail(const char *directory, GError **error, const char *format, ...) G_GNUC_PRINTF(3, 4);
/* `fallback` where there is no such number. */
double hf_number(const json_t *object, const char *key, double fallback);
