/* The one summation tree (NUMERICS 2) as a program for a binary-counter stack.
 *
 * node(a,b): a leaf if b = a+1, else node(a,m) + node(m,b), m = a + ceil((b-a)/2). A rank that owns
 * leaves [first, last) of node(0, n) computes the maximal subtrees inside its range and hands them
 * over; whoever has all of them completes the tree. */
#pragma once

#include <stdint.h>

#define TREE_LEAVES_LIMIT 64u        /* units per cut tensor, leaves of a batch, and ranks */
#define TREE_CHUNKS_LIMIT (1u << 14) /* leaves of any tree: chunks of the largest vocabulary */
#define TREE_SUBTREES_LIMIT 28u      /* maximal subtrees of a range: two a level */
#define TREE_OPERANDS_LIMIT 1024u    /* of all ranks together: a cut makes at most one a level */

/* After leaf i (of the range, in order) was pushed: pop two and push their sum (left + right)
 * n_merges times; if emit, the top of the stack is a maximal subtree: hand it over and pop it. */
typedef struct TreeStep {
    uint8_t n_merges;
    uint8_t emit;
} TreeStep;

/* Where node(a, b) is cut. */
static inline uint32_t tree_middle(uint32_t a, uint32_t b)
{
    return a + (b - a + 1) / 2;
}

/* Fills steps[0 .. last-first) for leaves [first, last) of node(0, n_leaves); returns s_r, the
 * number of subtrees emitted. */
uint32_t tree_program(uint32_t n_leaves, uint32_t first, uint32_t last, TreeStep *steps);

/* s_r alone: the number of maximal subtrees of leaves [first, last) of node(0, n_leaves). */
uint32_t tree_subtrees(uint32_t n_leaves, uint32_t first, uint32_t last);

/* Completing the tree from everybody's subtrees, which arrive ordered by their first leaf:
 * cuts[0..n_ranks] are the rank boundaries (cuts[0] = 0, cuts[n_ranks] = n_leaves; empty ranks
 * allowed). Fills merges[i] for each subtree i in order: pops-and-adds after it was pushed. Returns
 * the number of subtrees. The last merge leaves one value: the sum. Some leaves may have no operand
 * (bit i of `missing`: leaf i < 64): a subtree without any is none, and a node with one such child
 * is the other one. The programs of ranges stay the same. */
uint32_t tree_completion(uint32_t n_leaves, uint64_t missing, const uint32_t *cuts,
                         uint32_t n_ranks, uint8_t *merges);
/* tree_subtrees() where some leaves have no operand. */
uint32_t tree_subtrees_missing(uint32_t n_leaves, uint64_t missing, uint32_t first, uint32_t last);
