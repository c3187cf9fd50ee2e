#include "coordinator/train/train_plot.h"

#include <math.h>
#include <stdbool.h>
#include <stddef.h>

enum {
    WIDTH = 960,
    HEIGHT = 640,
    COLUMNS = 400, /* points of a curve at most: the means of as many pieces of the run */
    TICKS = 5,
};

#define LOSS_COLOUR "#1f5fa8"
#define VALIDATION_COLOUR "#c8511b"
#define RATE_COLOUR "#2f7d4f"
#define SPEED_COLOUR "#6b4fa0"

typedef struct Scale {
    double least, most;
} Scale;

typedef struct Panel {
    GString *svg;
    const char *title;
    double left, top, width, height; /* of the area between the axes */
    Scale x, y;
} Panel;

/* ---- numbers ---- */

/* In C's notation, whatever the locale. */
static const char *number(char *buffer, const char *format, double value)
{
    return g_ascii_formatd(buffer, G_ASCII_DTOSTR_BUF_SIZE, format, value);
}

static void put(GString *svg, double value)
{
    char buffer[G_ASCII_DTOSTR_BUF_SIZE];
    g_string_append(svg, number(buffer, "%.1f", value));
}

/* As people write them: 0.003, 1.5k, 2M. */
static const char *label(char *buffer, double value)
{
    const double size = fabs(value);
    const char *unit = size >= 1e6 ? "M" : size >= 1e4 ? "k" : "";
    number(buffer, "%.4g", size >= 1e6 ? value * 1e-6 : size >= 1e4 ? value * 1e-3 : value);
    g_strlcat(buffer, unit, G_ASCII_DTOSTR_BUF_SIZE);
    return buffer;
}

/* The distance of about TICKS marks: 1, 2 or 5 times a power of ten. */
static double tick_distance(const Scale *s)
{
    const double wanted = (s->most - s->least) / TICKS, power = pow(10, floor(log10(wanted))),
                 rest = wanted / power;
    return power * (rest <= 1 ? 1 : rest <= 2 ? 2 : rest <= 5 ? 5 : 10);
}

/* ---- curves ---- */

static double value_at(const TrainPoint *p, size_t field)
{
    return *(const double *)(const void *)((const char *)p + field);
}

/* Grows by a curve's values; NaN belongs to none. */
static void scale_add(Scale *s, const TrainPoint *points, size_t n, size_t field)
{
    for (size_t i = 0; i < n; i++) {
        const double v = value_at(&points[i], field);
        if (isfinite(v)) {
            s->least = fmin(s->least, v);
            s->most = fmax(s->most, v);
        }
    }
}

/* With some air, and never empty. */
static void scale_finish(Scale *s, bool from_zero)
{
    if (!(s->least <= s->most)) {
        *s = (Scale){0, 1};
    }
    if (from_zero) {
        s->least = fmin(s->least, 0);
    }
    const double air = s->most > s->least ? (s->most - s->least) * 0.04 : fabs(s->most) * 0.1;
    s->most += air > 0 ? air : 1;
    s->least -= from_zero ? 0 : air > 0 ? air : 1;
}

static double x_of(const Panel *p, double step)
{
    return p->left + (step - p->x.least) / (p->x.most - p->x.least) * p->width;
}

static double y_of(const Panel *p, double value)
{
    return p->top + p->height - (value - p->y.least) / (p->y.most - p->y.least) * p->height;
}

/* dots: the values themselves are marked, there are few. */
static void draw_curve(const Panel *p, const TrainPoint *points, size_t n, size_t field,
                       const char *colour, bool dots)
{
    const size_t pieces = MIN(n, (size_t)COLUMNS);
    g_autoptr(GString) line = g_string_new(NULL);
    g_autoptr(GString) marks = g_string_new(NULL);
    for (size_t c = 0; c < pieces; c++) {
        double step = 0, sum = 0;
        size_t valid = 0;
        for (size_t i = c * n / pieces; i < (c + 1) * n / pieces; i++) {
            const double v = value_at(&points[i], field);
            if (isfinite(v)) {
                step += (double)points[i].step;
                sum += v;
                valid++;
            }
        }
        if (valid == 0) {
            continue;
        }
        const double x = x_of(p, step / (double)valid), y = y_of(p, sum / (double)valid);
        put(line, x);
        g_string_append_c(line, ',');
        put(line, y);
        g_string_append_c(line, ' ');
        if (dots) {
            g_string_append(marks, "<circle cx=\"");
            put(marks, x);
            g_string_append(marks, "\" cy=\"");
            put(marks, y);
            g_string_append_printf(marks, "\" r=\"3\" fill=\"%s\"/>\n", colour);
        }
    }
    if (line->len > 0) {
        g_string_append_printf(p->svg,
                               "<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"1.6\" "
                               "stroke-linejoin=\"round\" points=\"%s\"/>\n%s",
                               colour, line->str, marks->str);
    }
}

/* ---- axes ---- */

static void draw_line(GString *svg, double x1, double y1, double x2, double y2, const char *colour)
{
    g_string_append(svg, "<line x1=\"");
    put(svg, x1);
    g_string_append(svg, "\" y1=\"");
    put(svg, y1);
    g_string_append(svg, "\" x2=\"");
    put(svg, x2);
    g_string_append(svg, "\" y2=\"");
    put(svg, y2);
    g_string_append_printf(svg, "\" stroke=\"%s\"/>\n", colour);
}

static void draw_text(GString *svg, double x, double y, const char *anchor, const char *more,
                      const char *text)
{
    g_autofree char *escaped = g_markup_escape_text(text, -1);
    g_string_append(svg, "<text x=\"");
    put(svg, x);
    g_string_append(svg, "\" y=\"");
    put(svg, y);
    g_string_append_printf(svg, "\" text-anchor=\"%s\"%s>%s</text>\n", anchor, more, escaped);
}

static void draw_axes(const Panel *p)
{
    const double right = p->left + p->width, bottom = p->top + p->height;
    char buffer[G_ASCII_DTOSTR_BUF_SIZE + 1];
    const double y_distance = tick_distance(&p->y), x_distance = fmax(tick_distance(&p->x), 1);
    for (double k = ceil(p->y.least / y_distance); k * y_distance <= p->y.most; k++) {
        const double y = y_of(p, k * y_distance);
        draw_line(p->svg, p->left, y, right, y, "#e4e4e4");
        draw_text(p->svg, p->left - 6, y + 4, "end", "", label(buffer, k * y_distance));
    }
    for (double k = ceil(p->x.least / x_distance); k * x_distance <= p->x.most; k++) {
        const double x = x_of(p, k * x_distance);
        draw_line(p->svg, x, bottom, x, bottom + 4, "#666666");
        draw_text(p->svg, x, bottom + 17, "middle", "", label(buffer, k * x_distance));
    }
    draw_line(p->svg, p->left, p->top, p->left, bottom, "#666666");
    draw_line(p->svg, p->left, bottom, right, bottom, "#666666");
    draw_text(p->svg, p->left, p->top - 8, "start", " font-weight=\"bold\"", p->title);
}

/* What a colour means, in the panel's upper right corner. */
static void draw_legend(const Panel *p, unsigned place, const char *colour, const char *text)
{
    const double right = p->left + p->width, y = p->top + 14 + 18.0 * place;
    draw_line(p->svg, right - 110, y - 4, right - 86, y - 4, colour);
    draw_text(p->svg, right - 80, y, "start", "", text);
}

/* ---- the picture ---- */

static Panel panel(GString *svg, const char *title, Scale x, double left, double top, double width,
                   double height)
{
    return (Panel){.svg = svg,
                   .title = title,
                   .left = left,
                   .top = top,
                   .width = width,
                   .height = height,
                   .x = x,
                   .y = {INFINITY, -INFINITY}};
}

static void draw_losses(Panel p, const TrainPoint *points, size_t n)
{
    size_t validations = 0;
    for (size_t i = 0; i < n; i++) {
        validations += isfinite(points[i].validation) ? 1 : 0;
    }
    scale_add(&p.y, points, n, offsetof(TrainPoint, loss));
    scale_add(&p.y, points, n, offsetof(TrainPoint, validation));
    scale_finish(&p.y, false);
    draw_axes(&p);
    draw_curve(&p, points, n, offsetof(TrainPoint, loss), LOSS_COLOUR, false);
    draw_curve(&p, points, n, offsetof(TrainPoint, validation), VALIDATION_COLOUR,
               validations <= COLUMNS / 4);
    draw_legend(&p, 0, LOSS_COLOUR, "training");
    if (validations > 0) {
        draw_legend(&p, 1, VALIDATION_COLOUR, "validation");
    }
}

static void draw_one(Panel p, const TrainPoint *points, size_t n, size_t field, const char *colour)
{
    scale_add(&p.y, points, n, field);
    scale_finish(&p.y, true);
    draw_axes(&p);
    draw_curve(&p, points, n, field, colour, false);
}

char *train_plot_svg(const char *title, const TrainPoint *points, size_t n)
{
    GString *svg = g_string_new(NULL);
    Scale steps = {n > 0 ? (double)points[0].step : 0, n > 0 ? (double)points[n - 1].step : 1};
    if (steps.most <= steps.least) {
        steps.most = steps.least + 1;
    }
    g_string_append_printf(svg,
                           "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" "
                           "width=\"%d\" height=\"%d\" font-family=\"sans-serif\" "
                           "font-size=\"12\" fill=\"#222222\">\n"
                           "<rect width=\"%d\" height=\"%d\" fill=\"#ffffff\"/>\n",
                           WIDTH, HEIGHT, WIDTH, HEIGHT, WIDTH, HEIGHT);
    draw_text(svg, 70, 30, "start", " font-size=\"17\"", title);
    draw_losses(panel(svg, "loss", steps, 70, 66, 850, 300), points, n);
    draw_one(panel(svg, "learning rate", steps, 70, 430, 380, 160), points, n,
             offsetof(TrainPoint, rate), RATE_COLOUR);
    draw_one(panel(svg, "tokens per second", steps, 540, 430, 380, 160), points, n,
             offsetof(TrainPoint, tokens_per_s), SPEED_COLOUR);
    draw_text(svg, 495, 628, "middle", "", "steps");
    g_string_append(svg, "</svg>\n");
    return g_string_free(svg, FALSE);
}
