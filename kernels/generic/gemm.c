#include "kernels/generic/bf16dot.h"
#include "kernels/generic/train.h"

#include "proto/model/blocks.h"

enum {
    BLOCK_FLOATS = 264 * 384,
    PACK_FLOATS = 264 * 256 + 1536 * 256,
    TILE_FLOATS = 8 * 48,
};

/* The largest blocks that a variant works on: kernels/vector/gemm.h. Tiles of one chunk have one
 * slot a level behind all columns of b, others one each behind some. */
size_t gemm_scratch_floats(uint32_t n_units)
{
    const size_t slots = PACK_FLOATS - (1536 - 192) * 256;
    size_t levels = 1;
    while (n_units > 1u << (levels - 1)) {
        levels++;
    }
    const size_t one = PACK_FLOATS + levels * TILE_FLOATS, many = slots + levels * BLOCK_FLOATS;
    return n_units > 1 && many > one ? many : one;
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

typedef enum Operands { OPERANDS_F32, OPERANDS_BF16, OPERANDS_F16 } Operands;

static float narrow(Operands kind, float x)
{
    return kind == OPERANDS_BF16  ? bf16_to_f32(f32_to_bf16(x))
           : kind == OPERANDS_F16 ? f16_to_f32(f32_to_f16(x))
                                  : x;
}

/* a(i,t), b(t,j) as they are multiplied; behind the segment's end 0. */
static float operand_a(Operands kind, const GemmSegment *g, uint32_t i, uint32_t t)
{
    return t < g->length ? narrow(kind, g->a[i * g->a_row + t * g->a_step]) : 0.0f;
}

static float operand_b(Operands kind, const GemmSegment *g, uint32_t t, uint32_t j)
{
    return t < g->length ? narrow(kind, g->b[t * g->b_step + j * g->b_column]) : 0.0f;
}

/* The chain through a segment. */
static float chain(Operands kind, const GemmSegment *g, uint32_t i, uint32_t j, float acc)
{
    if (kind == OPERANDS_BF16) {
        for (uint32_t t = 0; t < g->length; t += 2) {
            acc = fma_flushed(operand_a(kind, g, i, t + 1), operand_b(kind, g, t + 1, j), acc);
            acc = fma_flushed(operand_a(kind, g, i, t), operand_b(kind, g, t, j), acc);
        }
        return acc;
    }
    for (uint32_t t = 0; t < g->length; t++) {
        acc = fmaf(operand_a(kind, g, i, t), operand_b(kind, g, t, j), acc);
    }
    return acc;
}

static float fold(bool flushes, float a, float b)
{
    return flushes ? add_flushed(a, b) : a + b;
}

/* One element of c. */
static void element(Operands kind, const GemmArgs *args, uint32_t i, uint32_t j)
{
    const bool flushes = kind == OPERANDS_BF16 && !args->leaves;
    float stack[GEMM_LEVELS + 1];
    uint32_t depth = 0, emitted = 0;
    float *c = args->c + (size_t)i * args->ld + j;
    float acc = args->accumulate ? *c : 0.0f;
    for (uint32_t s = 0; s < args->n_segments; s++) {
        const GemmSegment *g = &args->segments[s];
        acc = chain(kind, g, i, j, acc);
        if (g->continues) {
            continue;
        }
        stack[depth++] = acc;
        acc = 0.0f;
        for (uint32_t k = 0; k < g->step.n_merges; k++) {
            depth--;
            stack[depth - 1] = fold(flushes, stack[depth - 1], stack[depth]);
        }
        if (g->step.emit) {
            c[args->subtree_stride * emitted++] = stack[--depth];
        }
    }
}

static void elements(Operands kind, const GemmArgs *args)
{
    for (uint32_t i = 0; i < args->m; i++) {
        for (uint32_t j = 0; j < args->n; j++) {
            element(kind, args, i, j);
        }
    }
}

void gemm_generic(const GemmArgs *args)
{
    elements(OPERANDS_F32, args);
}

void gemm_bf16_generic(const GemmArgs *args)
{
    elements(OPERANDS_BF16, args);
}

void gemm_f16_generic(const GemmArgs *args)
{
    elements(OPERANDS_F16, args);
}
