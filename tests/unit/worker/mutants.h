/* Kernel tables that break one rule of the bit contract each (NUMERICS, "Proof"): a check that
 * guards the rule must fail on them. They work on F32 weights. */
#pragma once

#include "kernels/kernels.h"

typedef enum Mutation {
    MUTATION_REVERSED_K,   /* a product's contraction runs downwards */
    MUTATION_TREE_SHAPE,   /* a rank folds its units from left to right */
    MUTATION_UNROUNDED_KV, /* keys and values of the rows in hand are read before they were rounded
                              to the cache type (f16) */
    MUTATION_ADDED_ZERO,   /* a fold is padded to a power of two by adding 0 */
    MUTATION_FLUSHED,      /* products run with FTZ and DAZ set */
    MUTATION_EIGHT_LANES,  /* the norm's sum has 8 lanes */
    MUTATION_LIBM_EXP,     /* SwiGLU takes the C library's exp */
    MUTATION_BATCH,        /* several rows are summed in another order than one */
    MUTATION_LIMIT,
} Mutation;

/* The generic table with the slots of one mutation replaced. Unrounded K/V: one engine with one
 * thread at a time. */
void mutant_table(Mutation mutation, Kernels *out);
