/* Reduction: how the subtrees of all ranks complete the one tree (NUMERICS 2 and 3), worked out
 * once per cut and then used for every vector. */
#pragma once

#include "proto/plan/tree.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct Reduction {
    uint32_t n_leaves, n_ranks; /* n_leaves 0: not in use */
    uint64_t missing;           /* bit i: leaf i has no operand */
    uint32_t cuts[TREE_LEAVES_LIMIT + 1];
    uint8_t n_subtrees[TREE_LEAVES_LIMIT]; /* s_r: by rank */
    uint8_t merges[TREE_OPERANDS_LIMIT];   /* tree_completion() */
    uint32_t n_operands;                   /* the sum of n_subtrees */
} Reduction;

#define REDUCTION_CACHE 4u /* attention, FFN and vocabulary cuts, and one more */
typedef struct ReductionCache {
    Reduction entries[REDUCTION_CACHE];
    unsigned next;
} ReductionCache;

/* Borrowed from the cache until REDUCTION_CACHE other cuts have been asked for. */
const Reduction *reduction_find(ReductionCache *cache, uint32_t n_leaves, uint64_t missing,
                                const uint32_t *cuts, uint32_t n_ranks);

/* out[i] = the tree's sum of operands[0..n_operands)[i], i < n. out may be one of the operands,
 * otherwise they do not overlap. */
void reduction_sum(const Reduction *reduction, const float *const *operands, size_t n, float *out);
