/* Products of narrow operands with f32 sums, for training with f32 master weights:
 *   bf16  bf16dot (NUMERICS 10): acc = fma(even, fma(odd, acc)) over pairs of the contraction,
 *         subnormals flushed at each step, also where units are folded; an odd one out pairs with 0
 *   f16   operands rounded to f16 (too large: infinite), f32 chains as ever
 * Operands are rounded when they are read; what is kept is f32, so running forward again gives the
 * same. Everything but these products is f32. */
#pragma once

#include "kernels/kernels.h"

#include <glib.h>

typedef enum Precision { PRECISION_F32 = 0, PRECISION_BF16 = 1, PRECISION_F16 = 2 } Precision;
#define PRECISION_LIMIT 3u
const char *precision_name(Precision p);                                /* static */
Dtype precision_dtype(Precision p); /* of operands */
bool precision_parse(const char *name, Precision *out, GError **error); /* INVALID: unknown */

/* The kernel of products. For bf16, segments of a contraction over tokens hold whole samples of an
 * even length, or one: pairs never span samples (NUMERICS 14). */
GemmFn precision_gemm(const Kernels *kernels, Precision precision);

/* The floating-point modes of folds of such products on this thread; end with what begin gave. */
unsigned precision_begin(Precision precision);
void precision_end(unsigned modes);
