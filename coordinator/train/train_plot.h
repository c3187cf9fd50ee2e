/* TrainPlot: the curves of a training job as an SVG picture: loss and validation loss, learning
 * rate, tokens per second, over the steps. */
#pragma once

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct TrainPoint {
    uint64_t step;                               /* from 1 */
    double loss, validation, rate, tokens_per_s; /* NaN: there is none */
} TrainPoint;

/* points: by step, ascending. A picture of 960 x 640, whatever n is; returned. */
char *train_plot_svg(const char *title, const TrainPoint *points, size_t n);
