#include "proto/base/units.h"

#include "proto/base/error.h"

#include <math.h>
#include <string.h>

typedef struct Suffix {
    const char *text;
    double factor;
} Suffix;

#define KIB 1024.0
#define MIB (1024.0 * KIB)
#define GIB (1024.0 * MIB)
#define TIB (1024.0 * GIB)

static const Suffix size_suffixes[] = {
    {"", 1},      {"b", 1},   {"k", KIB},  {"kb", KIB},  {"kib", KIB}, {"m", MIB},  {"mb", MIB},
    {"mib", MIB}, {"g", GIB}, {"gb", GIB}, {"gib", GIB}, {"t", TIB},   {"tb", TIB}, {"tib", TIB},
};
static const Suffix count_suffixes[] = {{"", 1}, {"k", KIB}, {"m", MIB}, {"g", GIB}};
static const Suffix duration_suffixes[] = {
    {"", 1e6},   {"us", 1},     {"ms", 1e3},   {"s", 1e6},
    {"m", 60e6}, {"min", 60e6}, {"h", 3600e6}, {"d", 86400e6},
};

/* A plain decimal number: digits with at most one point. Returns the end or NULL. */
static const char *number_end(const char *p)
{
    bool digit = false, point = false;
    for (;; p++) {
        if (g_ascii_isdigit(*p)) {
            digit = true;
        } else if (*p == '.' && !point) {
            point = true;
        } else {
            return digit ? p : NULL;
        }
    }
}

/* number x factor of its suffix, rounded; false if it is malformed or >= limit. Whole numbers
 * without a fraction are exact up to 2^53 and beyond that by integer arithmetic. */
static bool parse_scaled(const char *text, const Suffix *suffixes, size_t n_suffixes,
                         uint64_t limit, uint64_t *out)
{
    const char *end = text != NULL ? number_end(text) : NULL;
    if (end == NULL || end - text > 32) {
        return false;
    }
    g_autofree char *number = g_strndup(text, (gsize)(end - text));
    while (*end == ' ') {
        end++;
    }
    for (size_t i = 0; i < n_suffixes; i++) {
        if (g_ascii_strcasecmp(end, suffixes[i].text) != 0) {
            continue;
        }
        if (strchr(number, '.') == NULL) {
            guint64 whole;
            uint64_t scaled;
            if (!g_ascii_string_to_unsigned(number, 10, 0, G_MAXUINT64, &whole, NULL) ||
                __builtin_mul_overflow(whole, (uint64_t)suffixes[i].factor, &scaled) ||
                scaled > limit) {
                return false;
            }
            *out = scaled;
            return true;
        }
        double value = floor(g_ascii_strtod(number, NULL) * suffixes[i].factor + 0.5);
        if (!(value < (double)limit)) {
            return false;
        }
        *out = (uint64_t)value;
        return true;
    }
    return false;
}

bool units_parse_size(const char *text, uint64_t *bytes_out, GError **error)
{
    if (parse_scaled(text, size_suffixes, G_N_ELEMENTS(size_suffixes), G_MAXUINT64, bytes_out)) {
        return true;
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                "'%s' is no size; write bytes or a number with K, M, G or T, such as 8G",
                text != NULL ? text : "");
    return false;
}

bool units_parse_duration(const char *text, int64_t *us_out, GError **error)
{
    uint64_t us;
    if (parse_scaled(text, duration_suffixes, G_N_ELEMENTS(duration_suffixes), G_MAXINT64, &us)) {
        *us_out = (int64_t)us;
        return true;
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                "'%s' is no time; write seconds or a number with ms, s, m, h or d, such as 200ms",
                text != NULL ? text : "");
    return false;
}

bool units_parse_count(const char *text, uint64_t *out, GError **error)
{
    const size_t length = text != NULL ? strlen(text) : 0;
    const bool fraction_of_one = length > 0 && strchr(text, '.') != NULL &&
                                 (g_ascii_isdigit(text[length - 1]) || text[length - 1] == '.');
    if (!fraction_of_one &&
        parse_scaled(text, count_suffixes, G_N_ELEMENTS(count_suffixes), G_MAXUINT64, out)) {
        return true;
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                "'%s' is no count; write a whole number or one with k, such as 8192 or 32k",
                text != NULL ? text : "");
    return false;
}

char *units_format_size(uint64_t bytes)
{
    static const char *const names[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    if (bytes < 1024) {
        return g_strdup_printf("%u B", (unsigned)bytes);
    }
    double value = (double)bytes;
    size_t i = 0;
    /* 1023.5 would print as "1024": the next unit is shorter and right. */
    while (value >= 1023.5 && i + 1 < G_N_ELEMENTS(names)) {
        value /= 1024.0;
        i++;
    }
    return g_strdup_printf(value < 99.95 ? "%.1f %s" : "%.0f %s", value, names[i]);
}

char *units_format_duration(int64_t us)
{
    if (us < 0) {
        g_autofree char *positive = units_format_duration(us == G_MININT64 ? G_MAXINT64 : -us);
        return g_strdup_printf("-%s", positive);
    }
    if (us > 0 && us < 1000) {
        return g_strdup_printf("%dus", (int)us);
    }
    if (us < 1000000) {
        return g_strdup_printf("%dms", (int)(us / 1000));
    }
    int64_t s = us / 1000000;
    if (s < 60) {
        return g_strdup_printf("%ds", (int)s);
    }
    if (s < 3600) {
        return s % 60 != 0 ? g_strdup_printf("%dm%ds", (int)(s / 60), (int)(s % 60))
                           : g_strdup_printf("%dm", (int)(s / 60));
    }
    if (s < 86400) {
        int m = (int)(s % 3600 / 60);
        return m != 0 ? g_strdup_printf("%dh%dm", (int)(s / 3600), m)
                      : g_strdup_printf("%dh", (int)(s / 3600));
    }
    int h = (int)(s % 86400 / 3600);
    return h != 0 ? g_strdup_printf("%" G_GINT64_FORMAT "d%dh", s / 86400, h)
                  : g_strdup_printf("%" G_GINT64_FORMAT "d", s / 86400);
}
