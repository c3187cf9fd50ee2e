/* The end of an exact all-reduce: every rank's subtrees, gathered, added in the order of the unit
 * tree (NUMERICS 2). One thread an element, its stack in registers or local memory; bound by memory
 * or, for a decode step's few rows, by the launch. */
#include "kernels/cuda/device.h"
extern "C" {
#include "kernels/generic/bf16dot.h"
}

enum { THREADS = 256, OPERANDS = 64, DEPTH = 8 /* a tree of 64 leaves holds at most 7 values */ };

struct FoldTree {
    uint32_t n_operands;
    bool flushes;
    uint16_t operand[OPERANDS];
    uint8_t merges[OPERANDS];
};

static __global__ void fold_kernel(const __grid_constant__ FoldTree tree, const float *gathered,
                                   size_t n, float *out)
{
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    float stack[DEPTH];
    if (i >= n) {
        return;
    }
    unsigned depth = 0;
    for (unsigned k = 0; k < tree.n_operands; k++) {
        stack[depth++] = gathered[tree.operand[k] * n + i];
        for (unsigned m = tree.merges[k]; m > 0; m--) {
            depth--;
            stack[depth - 1] = tree.flushes ? add_flushed(stack[depth - 1], stack[depth])
                                            : stack[depth - 1] + stack[depth];
        }
    }
    out[i] = stack[0];
}

/* It ends with one value and never holds more than the kernel's stack. */
static bool is_program(const FoldTree *tree)
{
    unsigned depth = 0;
    for (unsigned k = 0; k < tree->n_operands; k++) {
        if (++depth > DEPTH || tree->merges[k] >= depth) {
            return false;
        }
        depth -= tree->merges[k];
    }
    return depth == 1;
}

extern "C" int weft_cuda_fold(const uint16_t *operand, const uint8_t *merges, uint32_t n_operands,
                              bool flushes, const float *gathered, size_t n, float *out,
                              WeftCudaStream stream)
{
    FoldTree tree = {};
    if (n_operands > OPERANDS) {
        return (int)cudaErrorInvalidValue;
    }
    tree.n_operands = n_operands;
    tree.flushes = flushes;
    memcpy(tree.operand, operand, sizeof *operand * n_operands);
    memcpy(tree.merges, merges, n_operands);
    if (!is_program(&tree)) {
        return (int)cudaErrorInvalidValue;
    }
    return launch(fold_kernel, dim3(blocks_of(n, THREADS)), THREADS, 0, stream, tree, gathered, n,
                  out);
}
