/* matmul: y = W x for packed weights, under the bit contract (NUMERICS 1-3, 7-10).
 *
 * Source of formats: ggml block definitions (Q4_0 ... Q6_K); F8_E4M3 is weft's own (dtype.h).
 * Definition of the result, per output n and row r, acc from +0 at each unit's first k:
 *
 * - F32, F16: acc = fmaf(w[k], x[k], acc), k ascending; w converted exactly to f32.
 *
 * - BF16: bf16dot (NUMERICS 10): x rounded to bf16; per pair (k, k+1): acc = fma(x[k]*w[k] ,
 * fma(x[k+1], w[k+1], acc)) with the odd element first, FTZ and DAZ; a unit of odd length is padded
 * by a zero, and only the last unit may be odd.
 *
 * - Q4_0, Q5_0, Q8_0 (signed value q - 8, q - 16, q), per block of 32: s = exact int32 sum of
 * q_w * q_a; acc = fmaf((float)s, d_w * d_a, acc).
 *
 * - Q4_1, Q5_1: as above with unsigned q, then acc = fmaf(m_w, d_a * (float)sum_a, acc), sum_a =
 * exact sum of the block's q_a.
 *
 * - Q4_K, Q5_K, per 256: S = sum over 32-blocks of sc*idot, M = sum of m*bsum, exact int32; acc =
 * fmaf((float)S, d*d_a, acc); acc = fmaf(-(float)M, dmin*d_a, acc).
 *
 * - Q6_K, per 256: S = sum over 16-blocks of sc*idot, exact int32; acc = fmaf((float)S, d*d_a,
 * acc).
 *
 * - F8_E4M3, per block of 128: s = fmaf(e4m3(q[k]), x[k], s), k ascending, from +0; acc =
 * fmaf(scale, s, acc), blocks ascending. x is f32 as it comes: only weights are narrow.
 *
 * Scales stored as f16 are converted exactly. Activations: ops/quant in this header
 * (act_quantise). Units: the contraction of a cut tensor is a sequence of units; units fold by
 * tree_program (proto/plan/tree.h). */
#pragma once

#include "proto/model/dtype.h"
#include "proto/plan/tree.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PANEL_ROWS 16u /* outputs of one packed panel: lane l of panel p is output 16p + l */

/* A packed matrix: panels of PANEL_ROWS outputs, each one contiguous stream over k, scales inside
 * the record (KERNELS.md). The last panel's missing outputs are zero weights. The layout per type
 * is documented in kernels/README.md and is the same for every ISA. */
typedef struct PackedMatrix {
    Dtype type;
    uint32_t n_out; /* outputs held */
    uint32_t n_in;  /* contraction length held, a multiple of the type's block */
    uint8_t *data;  /* ceil(n_out/16) * panel_bytes, 64-byte aligned, owned by the caller */
    size_t panel_bytes;
} PackedMatrix;

/* Bytes of one panel over n_in; 0 if the type is not supported or n_in is no multiple of the block.
 */
size_t packed_panel_bytes(Dtype type, uint32_t n_in);
/* Packed bytes per block of the type for one output row x 16 / 16, for
 * PlanMember.packed_block_bytes: panel bytes of one block / 16, rounded up; 0 = not supported. */
uint32_t packed_block_bytes(Dtype type);
/* Packs a rectangle: n_rows x n_cols elements in file format (rows row_bytes apart) to outputs
 * [row0, ...) and columns [col0, ...) of m. col0 and n_cols are multiples of the block. Any order
 * of calls; the panel memory must have been zeroed once. */
void packed_put(PackedMatrix *m, const void *src, size_t row_bytes, uint32_t row0, uint32_t n_rows,
                uint32_t col0, uint32_t n_cols);
/* The dequantised row `row` of m as n_in floats: exactly the values that dequantising the file's
 * row gives (embedding lookup). */
void packed_get_row(const PackedMatrix *m, uint32_t row, float *out);

/* ---- activations ---- */

typedef enum ActKind {
    ACT_F32 = 0,
    ACT_BF16 = 1,
    ACT_Q8_32 = 2,
    ACT_Q8_256 = 3,
    ACT_KIND_LIMIT = 4
} ActKind;
/* What a weight type wants its activations in. */
ActKind act_kind_of(Dtype weight);
/* Bytes of an activation buffer for `rows` rows of n_in elements (any padding included). 64-byte
 * aligned memory. */
size_t act_bytes(ActKind kind, uint32_t rows, uint32_t n_in);
/* Quantises rows [row0, row1) of x ([rows][ld] floats) into the buffer, whose layout depends on
 * (kind, rows, n_in) only, not on ISA. A thread may do any range; ranges must be multiples of
 * ACT_ROW_GROUP except the last end. Q8_32: per 32: amax = max|x|; d = amax / 127; id = amax >=
 * 2^-100 ? 127 / amax : 0; q = (int8) rint(x * id) (round half to even, fits +-127; below 2^-100
 * the block is zeros, because 127 / amax may overflow) Q8_256: the same over 256, plus exact sums
 * per 32 (16 where the weight type needs them) BF16: round to nearest even; F32: copy. Non-finite
 * x: d becomes NaN and the quants 0, so that every output that depends on it is NaN (NUMERICS 11).
 */
#define ACT_ROW_GROUP 4u
typedef void (*ActQuantiseFn)(const float *x, size_t ld, uint32_t rows, uint32_t row0,
                              uint32_t row1, uint32_t n_in, void *buffer);

/* ---- the product ---- */

typedef struct MatmulUnit {
    uint32_t n_in; /* contraction elements of this unit, multiple of the block */
    TreeStep step;
} MatmulUnit;

typedef struct MatmulArgs {
    const PackedMatrix *w;
    const void *act;         /* buffer of act_kind_of(w->type) with rows x w->n_in */
    uint32_t rows;           /* >= 1 */
    const MatmulUnit *units; /* cover w->n_in; an uncut tensor has one unit {n_in, {0, 1}} */
    uint32_t n_units;
    float *out; /* subtree s, row r, output n at out[s * subtree_stride + r * ld + n]; every n <
                   n_out is written, nothing beyond */
    size_t ld, subtree_stride;
    uint32_t panel0, panel1; /* the panels of this call */
} MatmulArgs;
typedef void (*MatmulFn)(const MatmulArgs *args);
