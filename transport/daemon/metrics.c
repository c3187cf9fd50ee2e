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

static void put_label(GString *out, char before, const char *name, const char *value)
{
    g_string_append_printf(out, "%c%s=\"", before, name);
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

void metrics_value(GString *out, const char *name, double value, ...)
{
    va_list labels;
    char before = '{';
    g_string_append(out, name);
    va_start(labels, value);
    for (const char *label; (label = va_arg(labels, const char *)) != NULL;) {
        const char *text = va_arg(labels, const char *);
        if (text != NULL) {
            put_label(out, before, label, text);
            before = ',';
        }
    }
    va_end(labels);
    g_string_append(out, before == ',' ? "} " : " ");
    put_number(out, value);
    g_string_append_c(out, '\n');
}

void metrics_histogram(GString *out, const char *name, const Histogram *h, const char *label,
                       const char *label_value)
{
    g_autofree char *bucket = g_strconcat(name, "_bucket", NULL);
    g_autofree char *sum = g_strconcat(name, "_sum", NULL);
    g_autofree char *count = g_strconcat(name, "_count", NULL);
    uint64_t total = 0;
    for (unsigned i = 0; i <= h->n_bounds; i++) {
        char bound[G_ASCII_DTOSTR_BUF_SIZE] = "+Inf";
        if (i < h->n_bounds) {
            g_ascii_formatd(bound, sizeof bound, "%g", h->bounds[i]);
        }
        total += h->counts[i];
        metrics_value(out, bucket, (double)total, "le", bound, label != NULL ? label : NULL,
                      label_value, NULL);
    }
    metrics_value(out, sum, h->sum, label != NULL ? label : NULL, label_value, NULL);
    metrics_value(out, count, (double)total, label != NULL ? label : NULL, label_value, NULL);
}
