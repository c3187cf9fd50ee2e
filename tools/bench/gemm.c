/* bench-gemm: the float products of training, in the shapes and memory orders of a step. Reads
 * lines on stdin, answers each with one on stdout:
 *   forward|dx|dw TOKENS N_IN N_OUT TIMES   "SECONDS" of one product, the least of TIMES
 *   limits                                  the f32 FMA peak of its threads: "OPERATIONS_PER_S"
 * forward is y = x W^T, dx = dy W, dw += dy^T x, W [n_out][n_in]; threads share outputs as
 * worker/model's passes do. */
#include "tools/bench/peaks.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { COLUMN_GRAIN = 48, ROW_GRAIN = 8 };

typedef struct Product {
    const Kernels *kernels;
    char kind;
    uint32_t tokens, n_in, n_out;
    float *x, *w, *y; /* dw: w is the result; dx: x is */
    float **scratch;
} Product;

static float *floats(size_t n)
{
    float *p = aligned_alloc(64, (n * sizeof *p + 63) / 64 * 64);
    if (p == NULL) {
        fprintf(stderr, "bench-gemm: no memory\n");
        exit(1);
    }
    for (size_t i = 0; i < n; i++) {
        p[i] = (float)((i * 2654435761u >> 7) % 2048) / 1024.0f - 1.0f;
    }
    return p;
}

static void multiply(void *user, unsigned t, unsigned n_threads)
{
    const Product *p = user;
    uint32_t first, last;
    GemmSegment g = {.step = {.n_merges = 0, .emit = 1}};
    GemmArgs args = {.segments = &g, .n_segments = 1, .scratch = p->scratch[t]};
    if (p->kind == 'f') {
        pool_share(p->n_out, COLUMN_GRAIN, t, n_threads, &first, &last);
        g = (GemmSegment){.a = p->x,
                          .a_row = p->n_in,
                          .a_step = 1,
                          .b = p->w + (size_t)first * p->n_in,
                          .b_step = 1,
                          .b_column = p->n_in,
                          .length = p->n_in,
                          .step = g.step};
        args.m = p->tokens;
        args.n = last - first;
        args.c = p->y + first;
        args.ld = p->n_out;
    } else if (p->kind == 'x') {
        pool_share(p->n_in, COLUMN_GRAIN, t, n_threads, &first, &last);
        g = (GemmSegment){.a = p->y,
                          .a_row = p->n_out,
                          .a_step = 1,
                          .b = p->w + first,
                          .b_step = p->n_in,
                          .b_column = 1,
                          .length = p->n_out,
                          .step = g.step};
        args.m = p->tokens;
        args.n = last - first;
        args.c = p->x + first;
        args.ld = p->n_in;
    } else {
        pool_share(p->n_out, ROW_GRAIN, t, n_threads, &first, &last);
        g = (GemmSegment){.a = p->y + first,
                          .a_row = 1,
                          .a_step = p->n_out,
                          .b = p->x,
                          .b_step = p->n_in,
                          .b_column = 1,
                          .length = p->tokens,
                          .step = g.step};
        args.m = last - first;
        args.n = p->n_in;
        args.accumulate = true;
        args.c = p->w + (size_t)first * p->n_in;
        args.ld = p->n_in;
    }
    if (first < last) {
        p->kernels->train.gemm(&args);
    }
}

static double measure(Pool *pool, Product *p, int times)
{
    double least = 1e9;
    p->x = floats((size_t)p->tokens * p->n_in);
    p->w = floats((size_t)p->n_out * p->n_in);
    p->y = floats((size_t)p->tokens * p->n_out);
    for (int i = 0; i < times; i++) {
        const double start = peaks_now_s();
        pool_run(pool, multiply, p);
        const double seconds = peaks_now_s() - start;
        least = seconds < least ? seconds : least;
    }
    free(p->x);
    free(p->w);
    free(p->y);
    return least;
}

static void answer(const char *line, Pool *pool, Product *p)
{
    char kind[16];
    int times;
    Peaks peaks;
    if (strcmp(line, "limits\n") == 0 && peaks_measure(pool, p->kernels->isa, &peaks)) {
        printf("%.0f\n", peaks.f32_ops_per_s);
    } else if (sscanf(line, "%15s %u %u %u %d", kind, &p->tokens, &p->n_in, &p->n_out, &times) ==
               5) {
        p->kind = strcmp(kind, "forward") == 0 ? 'f' : strcmp(kind, "dx") == 0 ? 'x' : 'w';
        printf("%.9f\n", measure(pool, p, times));
    } else {
        fprintf(stderr, "bench-gemm: cannot answer %s", line);
        exit(1);
    }
    fflush(stdout);
}

int main(int argc, char **argv)
{
    const int threads = argc > 1 ? atoi(argv[1]) : 2;
    int cpus[64];
    if (threads < 1 || threads > 64) {
        fprintf(stderr, "usage: bench-gemm [THREADS, 1 to 64]\n");
        return 2;
    }
    for (int i = 0; i < threads; i++) {
        cpus[i] = i;
    }
    Pool *pool = pool_new((unsigned)threads, cpus, true, 200);
    Product p = {.kernels = kernels_get(kernels_best_isa()),
                 .scratch = calloc((size_t)threads, sizeof *p.scratch)};
    if (pool == NULL || p.scratch == NULL) {
        fprintf(stderr, "bench-gemm: no threads\n");
        return 1;
    }
    for (int i = 0; i < threads; i++) {
        p.scratch[i] = floats(gemm_scratch_floats(1));
    }
    char line[128];
    while (fgets(line, sizeof line, stdin) != NULL) {
        answer(line, pool, &p);
    }
    for (int i = 0; i < threads; i++) {
        free(p.scratch[i]);
    }
    free(p.scratch);
    pool_free(pool);
    return 0;
}
