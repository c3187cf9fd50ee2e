/* Metrics in Prometheus' text form (version 0.0.4): histograms, and the writing of families. Names
 * have base units; nothing here is shared between threads. */
#pragma once

#include <glib.h>
#include <stddef.h>
#include <stdint.h>

#define HISTOGRAM_BOUNDS_LIMIT 24u

typedef struct Histogram {
    const double *bounds; /* ascending; borrowed for good */
    unsigned n_bounds;
    uint64_t counts[HISTOGRAM_BOUNDS_LIMIT + 1]; /* the last: above all bounds */
    double sum;
} Histogram;

void histogram_init(Histogram *h, const double *bounds, unsigned n_bounds);
void histogram_add(Histogram *h, double value); /* not finite or negative: dropped */

/* "# HELP" and "# TYPE" lines; before the values of a family, once. type: counter, gauge or
 * histogram. */
void metrics_family(GString *out, const char *name, const char *type, const char *help);
/* labels: NAME, VALUE pairs ended by NULL; names with a NULL value are left out. */
void metrics_value(GString *out, const char *name, double value, ...) G_GNUC_NULL_TERMINATED;
void metrics_histogram(GString *out, const char *name, const Histogram *h,
                       ... /* labels, as above */) G_GNUC_NULL_TERMINATED;
