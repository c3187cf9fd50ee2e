/* Sizes, times and counts as people write them: 8G, 512M, 32k, 5s, 200ms, 1h, 7d. */
#pragma once

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

/* "8G", "8GiB", "1.5G", "123" (bytes); powers of 1024. */
bool units_parse_size(const char *text, uint64_t *bytes_out, GError **error);
/* "5s", "200ms", "1h", "2m", "7d"; a bare number is seconds. */
bool units_parse_duration(const char *text, int64_t *us_out, GError **error);
/* "32k" = 32768, "8192". */
bool units_parse_count(const char *text, uint64_t *out, GError **error);
/* At most 8 characters, e.g. "1.2 GiB"; "93 MB" style is not used. Returned string, g_free. */
char *units_format_size(uint64_t bytes);
/* e.g. "350ms", "12s", "3m12s", "2h5m", "4d3h". Returned string, g_free. */
char *units_format_duration(int64_t us);
