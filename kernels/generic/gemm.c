#include "kernels/generic/train.h"

#include <math.h>
#include <string.h>

enum { BLOCK_FLOATS = 264 * 384, PACK_FLOATS = 264 * 256 + 256 * 384 };

/* The largest blocks that a variant works on: kernels/vector/gemm.h. */
size_t gemm_scratch_floats(uint32_t n_units)
{
    uint32_t levels = 0; /* above the lowest, which is c */
    while (n_units > 1u << levels) {
        levels++;
    }
    return PACK_FLOATS + (size_t)levels * BLOCK_FLOATS;
}

static void whole_tree(uint32_t a, uint32_t b, TreeStep *steps)
{
    if (b - a < 2) {
        return;
    }
    const uint32_t middle = a + (b - a + 1) / 2;
    whole_tree(a, middle, steps);
    whole_tree(middle, b, steps);
    steps[b - 1].n_merges++;
}

void gemm_whole_tree(uint32_t n, TreeStep *steps)
{
    memset(steps, 0, n * sizeof *steps);
    whole_tree(0, n, steps);
    if (n > 0) {
        steps[n - 1].emit = 1;
    }
}

/* One element of c. */
static void element(const GemmArgs *args, uint32_t i, uint32_t j)
{
    float stack[GEMM_LEVELS + 1];
    uint32_t depth = 0, emitted = 0;
    float *c = args->c + (size_t)i * args->ld + j;
    float acc = args->accumulate ? *c : 0.0f;
    for (uint32_t s = 0; s < args->n_segments; s++) {
        const GemmSegment *g = &args->segments[s];
        for (uint32_t t = 0; t < g->length; t++) {
            acc = fmaf(g->a[i * g->a_row + t * g->a_step], g->b[t * g->b_step + j * g->b_column],
                       acc);
        }
        if (g->continues) {
            continue;
        }
        stack[depth++] = acc;
        acc = 0.0f;
        for (uint32_t k = 0; k < g->step.n_merges; k++) {
            depth--;
            stack[depth - 1] += stack[depth];
        }
        if (g->step.emit) {
            c[args->subtree_stride * emitted++] = stack[--depth];
        }
    }
}

void gemm_generic(const GemmArgs *args)
{
    for (uint32_t i = 0; i < args->m; i++) {
        for (uint32_t j = 0; j < args->n; j++) {
            element(args, i, j);
        }
    }
}
