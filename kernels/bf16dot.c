/* Which instruction multiplies bf16 on this CPU: both give the same bits, so the faster one is
 * taken. Measured on a product whose operands lie in the second-level cache, where only arithmetic
 * counts, the fastest of several runs in turn. */
#include "kernels/bf16dot.h"

#include <glib.h>
#include <string.h>
#include <time.h>

enum { ROWS = 64, COLUMNS = 192, STEPS = 512, TIMES = 5 };

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Operations per second. */
static double speed(GemmFn gemm, const GemmArgs *args)
{
    const double start = now_s();
    gemm(args);
    return 2.0 * ROWS * COLUMNS * STEPS / (now_s() - start);
}

Bf16Choice bf16_choose(GemmFn fma, GemmFn dots)
{
    const size_t a = ROWS * STEPS, b = COLUMNS * STEPS, c = ROWS * COLUMNS;
    g_autofree float *floats = g_new0(float, a + b + c + gemm_scratch_floats(1));
    const GemmSegment segment = {.a = floats,
                                 .a_row = STEPS,
                                 .a_step = 1,
                                 .b = floats + a,
                                 .b_step = 1,
                                 .b_column = STEPS,
                                 .length = STEPS,
                                 .step = {.emit = 1}};
    const GemmArgs args = {.m = ROWS,
                           .n = COLUMNS,
                           .segments = &segment,
                           .n_segments = 1,
                           .c = floats + a + b,
                           .ld = COLUMNS,
                           .scratch = floats + a + b + c};
    Bf16Choice best = {0};
    for (int i = 0; i < TIMES; i++) {
        best.fma_ops_per_s = MAX(best.fma_ops_per_s, speed(fma, &args));
        best.dots_ops_per_s = MAX(best.dots_ops_per_s, speed(dots, &args));
    }
    best.dots = best.dots_ops_per_s > best.fma_ops_per_s;
    return best;
}

char *bf16_text(bool has_dots, const Bf16Choice *choice)
{
    const double dots = 1e-9 * choice->dots_ops_per_s, fma = 1e-9 * choice->fma_ops_per_s;
    if (!has_dots) {
        return g_strdup("two f32 fma a pair (no vdpbf16ps here)");
    }
    return choice->dots
               ? g_strdup_printf("vdpbf16ps (%.0f GFLOP/s a thread, two fma %.0f)", dots, fma)
               : g_strdup_printf("two f32 fma a pair (%.0f GFLOP/s a thread, vdpbf16ps %.0f)", fma,
                                 dots);
}
