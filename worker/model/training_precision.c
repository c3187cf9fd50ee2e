/* The chain of bf16dot is an f32 chain over the same operands with each pair turned round, in flush
 * modes: so operands are copied, rounded and turned, and the f32 kernel multiplies. */
#include "worker/model/training_precision.h"

#include "proto/base/error.h"
#include "proto/model/blocks.h"

#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FLUSH 0x8040u           /* FTZ and DAZ */
#define BLOCK_FLOATS (2u << 20) /* of an operand that is copied at once */
enum { LEAST_ROWS = 16 };

static const char *const names[PRECISION_LIMIT] = {"f32", "bf16", "f16"};

const char *precision_name(Precision p)
{
    return names[p];
}

bool precision_parse(const char *name, Precision *out, GError **error)
{
    for (uint32_t i = 0; i < PRECISION_LIMIT; i++) {
        if (strcmp(name, names[i]) == 0) {
            *out = (Precision)i;
            return true;
        }
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                "precision %s is unknown; choose f32, bf16 or f16", name);
    return false;
}

#if defined(__x86_64__)
unsigned precision_begin(Precision precision)
{
    const unsigned modes = _mm_getcsr();
    if (precision == PRECISION_BF16) {
        _mm_setcsr(modes | FLUSH);
    }
    return modes;
}

void precision_end(unsigned modes)
{
    _mm_setcsr(modes);
}
#else
#error "bf16dot wants the flush modes of x86"
#endif

/* ---- rounding ---- */

static inline float round_bf16(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    u = nan ? u | 0x400000u : u + 0x7fffu + (u >> 16 & 1u);
    u &= 0xffff0000u;
    memcpy(&x, &u, sizeof x);
    return x;
}

static inline float round_to(Precision precision, float x)
{
    return precision == PRECISION_BF16 ? round_bf16(x) : f16_to_f32(f32_to_f16(x));
}

/* ---- operands ---- */

static uint32_t even(uint32_t n)
{
    return (n + 1) / 2 * 2;
}

/* Steps of a contraction with its padding. */
static uint32_t padded(Precision precision, uint32_t length, uint32_t period)
{
    return precision != PRECISION_BF16 ? length
           : period == 0               ? even(length)
                                       : length / period * even(period) + even(length % period);
}

/* Where step t of the contraction goes. */
static uint32_t place(Precision precision, uint32_t t, uint32_t period)
{
    return precision != PRECISION_BF16 ? t
           : period == 0               ? t ^ 1u
                                       : t / period * even(period) + (t % period ^ 1u);
}

/* An operand of n rows or columns, `outer` apart, with steps `step` apart. */
typedef struct Operand {
    const float *x;
    size_t outer, step;
    uint32_t n, length;
} Operand;

/* Steps side by side as in the source: [n][padded]; else [padded][n]. Returns the floats used. */
static size_t copy_operand(Precision precision, const Operand *o, uint32_t period, float *to)
{
    const uint32_t steps = padded(precision, o->length, period);
    const bool along = o->step == 1;
    const size_t to_outer = along ? steps : 1, to_step = along ? 1 : o->n;
    if (steps != o->length) {
        memset(to, 0, (size_t)steps * o->n * sizeof *to);
    }
    if (along) {
        for (uint32_t i = 0; i < o->n; i++) {
            for (uint32_t t = 0; t < o->length; t++) {
                to[i * to_outer + place(precision, t, period)] =
                    round_to(precision, o->x[i * o->outer + t]);
            }
        }
        return (size_t)steps * o->n;
    }
    for (uint32_t t = 0; t < o->length; t++) {
        float *row = to + place(precision, t, period) * to_step;
        for (uint32_t i = 0; i < o->n; i++) {
            row[i] = round_to(precision, o->x[i * o->outer + t * o->step]);
        }
    }
    return (size_t)steps * o->n;
}

/* ---- products ---- */

typedef struct Narrow {
    const Kernels *kernels;
    Precision precision;
    const GemmArgs *args;
    uint32_t period;
    const PrecisionScratch *scratch;
    uint64_t steps; /* of the whole contraction, padded */
} Narrow;

/* Rows or columns that are copied at once. */
static uint32_t block_of(uint64_t steps, uint32_t n)
{
    const uint64_t fit = BLOCK_FLOATS / MAX(steps, 1);
    return (uint32_t)MIN(MAX(fit, LEAST_ROWS), n);
}

size_t precision_floats(uint64_t longest)
{
    return 2 * (size_t)MAX((uint64_t)BLOCK_FLOATS, 2 * longest * LEAST_ROWS);
}

/* Rows [first, first + n) of a, all segments, into the first half of the scratch. */
static void copy_rows(const Narrow *w, uint32_t first, uint32_t n)
{
    float *to = w->scratch->floats;
    for (uint32_t s = 0; s < w->args->n_segments; s++) {
        const GemmSegment *g = &w->args->segments[s];
        GemmSegment *narrow = &w->scratch->segments[s];
        const Operand a = {g->a + first * g->a_row, g->a_row, g->a_step, n, g->length};
        const uint32_t steps = padded(w->precision, g->length, w->period);
        narrow->a = to;
        narrow->a_row = g->a_step == 1 ? steps : 1;
        narrow->a_step = g->a_step == 1 ? 1 : n;
        narrow->length = steps;
        narrow->continues = g->continues;
        narrow->step = g->step;
        to += copy_operand(w->precision, &a, w->period, to);
    }
}

/* Columns [first, first + n) of b, behind them. */
static void copy_columns(const Narrow *w, uint32_t first, uint32_t n, float *to)
{
    for (uint32_t s = 0; s < w->args->n_segments; s++) {
        const GemmSegment *g = &w->args->segments[s];
        GemmSegment *narrow = &w->scratch->segments[s];
        const Operand b = {g->b + first * g->b_column, g->b_column, g->b_step, n, g->length};
        narrow->b = to;
        narrow->b_column = g->b_step == 1 ? narrow->length : 1;
        narrow->b_step = g->b_step == 1 ? 1 : n;
        to += copy_operand(w->precision, &b, w->period, to);
    }
}

static void multiply_block(const Narrow *w, uint32_t row, uint32_t n_rows, uint32_t column,
                           uint32_t n_columns)
{
    GemmArgs args = *w->args;
    args.m = n_rows;
    args.n = n_columns;
    args.segments = w->scratch->segments;
    args.c += row * args.ld + column;
    const unsigned modes = precision_begin(w->precision);
    w->kernels->train.gemm(&args);
    precision_end(modes);
}

void precision_gemm(const Kernels *kernels, Precision precision, const GemmArgs *args,
                    uint32_t period, const PrecisionScratch *scratch)
{
    Narrow w = {kernels, precision, args, period, scratch, 0};
    if (precision == PRECISION_F32) {
        kernels->train.gemm(args);
        return;
    }
    for (uint32_t s = 0; s < args->n_segments; s++) {
        w.steps += padded(precision, args->segments[s].length, period);
    }
    const uint32_t rows = block_of(w.steps, args->m), columns = block_of(w.steps, args->n);
    float *behind = scratch->floats + rows * w.steps;
    for (uint32_t i = 0; i < args->m; i += rows) {
        const uint32_t n_rows = MIN(rows, args->m - i);
        copy_rows(&w, i, n_rows);
        for (uint32_t j = 0; j < args->n; j += columns) {
            const uint32_t n_columns = MIN(columns, args->n - j);
            copy_columns(&w, j, n_columns, behind);
            multiply_block(&w, i, n_rows, j, n_columns);
        }
    }
}
