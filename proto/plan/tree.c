/* The program is a post-order walk of node(0, n): the merges after a leaf are the nodes that end
 * with that leaf and whose whole span belongs to the caller. A node that a range holds but whose
 * parent it does not is a maximal subtree. Depth is at most 6 for 64 leaves. */
#include "proto/plan/tree.h"

#include <glib.h>
#include <string.h>

static uint32_t middle(uint32_t a, uint32_t b)
{
    return a + (b - a + 1) / 2;
}

/* Writes the steps of node(a, b) restricted to [first, last); parent_inside says that the parent
 * lies wholly in the range. Returns the maximal subtrees found at or below the node. */
static uint32_t walk(uint32_t a, uint32_t b, uint32_t first, uint32_t last, int parent_inside,
                     TreeStep *steps)
{
    if (b <= first || last <= a) {
        return 0;
    }
    int inside = first <= a && b <= last;
    uint32_t n_subtrees = 0;
    if (b - a > 1) {
        uint32_t m = middle(a, b);
        n_subtrees += walk(a, m, first, last, inside, steps);
        n_subtrees += walk(m, b, first, last, inside, steps);
        if (inside) {
            steps[b - 1 - first].n_merges++;
        }
    }
    if (inside && !parent_inside) {
        steps[b - 1 - first].emit = 1;
        n_subtrees++;
    }
    return n_subtrees;
}

uint32_t tree_program(uint32_t n_leaves, uint32_t first, uint32_t last, TreeStep *steps)
{
    g_assert(n_leaves <= TREE_LEAVES_LIMIT && first <= last && last <= n_leaves);
    if (first == last) {
        return 0;
    }
    memset(steps, 0, (last - first) * sizeof *steps);
    return walk(0, n_leaves, first, last, 0, steps);
}

static uint32_t count_subtrees(uint32_t a, uint32_t b, uint32_t first, uint32_t last)
{
    if (b <= first || last <= a) {
        return 0;
    }
    if (first <= a && b <= last) {
        return 1;
    }
    return count_subtrees(a, middle(a, b), first, last) +
           count_subtrees(middle(a, b), b, first, last);
}

uint32_t tree_subtrees(uint32_t n_leaves, uint32_t first, uint32_t last)
{
    return first < last && last <= n_leaves ? count_subtrees(0, n_leaves, first, last) : 0;
}

/* The rank that holds all of [a, b), or -1. */
static int holder(const uint32_t *cuts, uint32_t n_ranks, uint32_t a, uint32_t b)
{
    for (uint32_t r = 0; r < n_ranks; r++) {
        if (cuts[r] <= a && b <= cuts[r + 1]) {
            return (int)r;
        }
    }
    return -1;
}

/* Numbers the maximal subtrees in order of their leaves and counts, for each, the nodes above it
 * that end with it. */
static void complete(uint32_t a, uint32_t b, const uint32_t *cuts, uint32_t n_ranks, uint32_t *n,
                     uint8_t *merges)
{
    if (holder(cuts, n_ranks, a, b) >= 0) {
        merges[(*n)++] = 0;
        return;
    }
    uint32_t m = middle(a, b);
    complete(a, m, cuts, n_ranks, n, merges);
    complete(m, b, cuts, n_ranks, n, merges);
    merges[*n - 1]++;
}

uint32_t tree_completion(uint32_t n_leaves, const uint32_t *cuts, uint32_t n_ranks, uint8_t *merges)
{
    g_assert(n_leaves <= TREE_LEAVES_LIMIT && cuts[0] == 0 && cuts[n_ranks] == n_leaves);
    uint32_t n = 0;
    if (n_leaves > 0) {
        complete(0, n_leaves, cuts, n_ranks, &n, merges);
    }
    return n;
}
