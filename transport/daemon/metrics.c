#include "transport/daemon/metrics.h"

#include <math.h>
#include <stdarg.h>

void histogram_init(Histogram *h, const double *bounds, unsigned n_bounds)
{
    g_assert(n_bounds <= HISTOGRAM_BOUNDS_LIMIT);
    *h = (Histogram){.bounds = bounds, .n_bounds = n_bounds};
}

void histogram_add(Histogram *h, double value)
{
    if (!isfinite(value) || value < 0) {
        return;
    }
    unsigned i = 0;
    while (i < h->n_bounds && value > h->bounds[i]) {
        i++;
    }
    h->counts[i]++;
    h->sum += value;
}

static void put_number(GString *out, double value)
{
    char text[G_ASCII_DTOSTR_BUF_SIZE];
    if (isfinite(value)) {
        g_string_append(out, g_ascii_formatd(text, sizeof text, "%.15g", value));
    } else {
        g_string_append(out, isnan(value) ? "NaN" : value > 0 ? "+Inf" : "-Inf");
    }
}

static void put_label(GString *out, const char *name, const char *value)
{
    g_string_append_printf(out, "%s%s=\"", out->len > 0 ? "," : "", name);
    for (const char *c = value; *c != '\0'; c++) {
        if (*c == '\\' || *c == '"') {
            g_string_append_c(out, '\\');
            g_string_append_c(out, *c);
        } else if (*c == '\n') {
            g_string_append(out, "\\n");
        } else {
            g_string_append_c(out, *c);
        }
    }
    g_string_append_c(out, '"');
}

void metrics_family(GString *out, const char *name, const char *type, const char *help)
{
    g_string_append_printf(out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

/* NAME="VALUE" of each pair, with commas between. */
static void put_labels(GString *out, va_list labels)
{
    for (const char *label; (label = va_arg(labels, const char *)) != NULL;) {
        const char *text = va_arg(labels, const char *);
        if (text != NULL) {
            put_label(out, label, text);
        }
    }
}

static void put_line(GString *out, const char *name, const char *suffix, const GString *labels,
                     double value)
{
    g_string_append(out, name);
    g_string_append(out, suffix);
    if (labels->len > 0) {
        g_string_append_printf(out, "{%s}", labels->str);
    }
    g_string_append_c(out, ' ');
    put_number(out, value);
    g_string_append_c(out, '\n');
}

void metrics_value(GString *out, const char *name, double value, ...)
{
    va_list pairs;
    g_autoptr(GString) labels = g_string_new(NULL);
    va_start(pairs, value);
    put_labels(labels, pairs);
    va_end(pairs);
    put_line(out, name, "", labels, value);
}

void metrics_histogram(GString *out, const char *name, const Histogram *h, ...)
{
    va_list pairs;
    g_autoptr(GString) labels = g_string_new(NULL);
    g_autoptr(GString) bucket = g_string_new(NULL);
    uint64_t total = 0;
    va_start(pairs, h);
    put_labels(labels, pairs);
    va_end(pairs);
    for (unsigned i = 0; i <= h->n_bounds; i++) {
        char bound[G_ASCII_DTOSTR_BUF_SIZE] = "+Inf";
        if (i < h->n_bounds) {
            g_ascii_formatd(bound, sizeof bound, "%g", h->bounds[i]);
        }
        total += h->counts[i];
        g_string_truncate(bucket, 0);
        put_label(bucket, "le", bound);
        g_string_append_printf(bucket, "%s%s", labels->len > 0 ? "," : "", labels->str);
        put_line(out, name, "_bucket", bucket, (double)total);
    }
    put_line(out, name, "_sum", labels, h->sum);
    put_line(out, name, "_count", labels, (double)total);
}
