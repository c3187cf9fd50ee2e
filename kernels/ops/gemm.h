/* gemm: products of float matrices in plain (row-major) memory, for training (NUMERICS 1-3, 14).
 *
 * c[i][j] = a sum over segments of sums over t of a(i,t) * b(t,j). A *chain* is
 * acc = fmaf(a(i,t), b(t,j), acc), t ascending, from +0. Segments that say `continues` hand their
 * chain on to the next one; a segment that does not ends a *unit*. Units fold by a tree program
 * (proto/plan/tree.h): node() over the units, each emitted subtree a matrix of its own.
 *
 * The three shapes of training, for y = x W^T, W [n_out][n_in], x [tokens][n_in]:
 *   forward  y  = x W^T     a = x,    b = W^T: contraction over n_in, cut into units or not
 *   dx       dx = dy W      a = dy,   b = W:   contraction over n_out; several matrices that read
 *                                     one x are segments of one chain, unit by unit
 *   dW       dW += dy^T x   a = dy^T, b = x:   contraction over tokens, from the gradient buffer
 * Lanes are columns j, so tile shape, vector width and threads (which share rows or columns of c)
 * change no bit. fmaf(a, b, c) is symmetric in a and b but for the payload of a NaN.
 *
 * That is `gemm`. Narrow products round both operands as they read them, sums are f32:
 *   gemm_f16   to f16 (what is too large becomes infinite)
 *   gemm_bf16  to bf16, multiplied by bf16dot (NUMERICS 10): steps of a segment are taken in pairs,
 *              the odd one first, a last one alone pairs with 0; subnormals are flushed at each
 *              step and where units are folded */
#pragma once

#include "proto/plan/tree.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct GemmSegment {
    const float *a; /* borrowed; a(i,t) = a[i * a_row + t * a_step]; one of the strides is 1 */
    size_t a_row, a_step;
    const float *b; /* borrowed; b(t,j) = b[t * b_step + j * b_column]; one of the strides is 1 */
    size_t b_step, b_column;
    uint32_t length; /* of the contraction; 0: an empty chain, +0 */
    bool continues;  /* the next segment goes on with this chain */
    TreeStep step;   /* after a unit; not read if the segment continues */
} GemmSegment;

typedef struct GemmArgs {
    uint32_t m, n; /* rows and columns of c */
    const GemmSegment *segments;
    uint32_t n_segments;
    bool accumulate; /* the chain starts from c instead of +0: one unit, step {0, emit 1} */
    bool leaves;     /* gemm_bf16: units are leaves (NUMERICS 14), whose fold flushes nothing */
    float *c;        /* subtree s at c + s * subtree_stride, rows ld apart; overlaps no input */
    size_t ld, subtree_stride;
    float *scratch; /* gemm_scratch_floats() of them, any alignment, this thread's own */
} GemmArgs;
typedef void (*GemmFn)(const GemmArgs *args);

/* Units that one program may have: 2^GEMM_LEVELS. */
#define GEMM_LEVELS 14u
/* Scratch for programs of up to n_units units, for every instruction set. */
size_t gemm_scratch_floats(uint32_t n_units);

/* The program of one rank that holds all n leaves of node(0, n), n <= 2^GEMM_LEVELS: steps[i] of
 * leaf i; the last step emits the root. (tree_program() serves ranges, of fewer leaves.) */
void gemm_whole_tree(uint32_t n, TreeStep *steps);
