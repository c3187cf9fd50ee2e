/* The program is a post-order walk of node(0, n): the merges after a leaf are the nodes that end
 * with that leaf and whose whole span belongs to the caller. A node that a range holds but whose
 * parent it does not is a maximal subtree. Depth is at most 14 for 2^14 leaves. */
#include "proto/plan/tree.h"

#include <glib.h>
#include <stdbool.h>
#include <string.h>

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
        uint32_t m = tree_middle(a, b);
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
    g_assert(n_leaves <= TREE_CHUNKS_LIMIT && first <= last && last <= n_leaves);
    if (first == last) {
        return 0;
    }
    memset(steps, 0, (last - first) * sizeof *steps);
    return walk(0, n_leaves, first, last, 0, steps);
}

/* Whether some leaf of [a, b) is there. */
static bool is_there(uint64_t missing, uint32_t a, uint32_t b)
{
    for (uint32_t leaf = a; leaf < b; leaf++) {
        if (leaf >= 64 || (missing >> leaf & 1) == 0) {
            return true;
        }
    }
    return false;
}

static uint32_t count_subtrees(uint32_t a, uint32_t b, uint64_t missing, uint32_t first,
                               uint32_t last)
{
    if (b <= first || last <= a) {
        return 0;
    }
    if (first <= a && b <= last) {
        return is_there(missing, a, b);
    }
    return count_subtrees(a, tree_middle(a, b), missing, first, last) +
           count_subtrees(tree_middle(a, b), b, missing, first, last);
}

uint32_t tree_subtrees(uint32_t n_leaves, uint32_t first, uint32_t last)
{
    return tree_subtrees_missing(n_leaves, 0, first, last);
}

uint32_t tree_subtrees_missing(uint32_t n_leaves, uint64_t missing, uint32_t first, uint32_t last)
{
    return first < last && last <= n_leaves ? count_subtrees(0, n_leaves, missing, first, last) : 0;
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

typedef struct Completion {
    uint64_t missing;
    const uint32_t *cuts;
    uint32_t n_ranks, n;
    uint8_t *merges;
} Completion;

/* Numbers the maximal subtrees that are there in order of their leaves and counts, for each, the
 * sums above it that end with it. Returns whether anything of [a, b) is there. */
static bool complete(Completion *c, uint32_t a, uint32_t b)
{
    if (holder(c->cuts, c->n_ranks, a, b) >= 0) {
        const bool there = is_there(c->missing, a, b);
        if (there) {
            c->merges[c->n++] = 0;
        }
        return there;
    }
    const uint32_t m = tree_middle(a, b);
    const bool left = complete(c, a, m), right = complete(c, m, b);
    if (left && right) {
        c->merges[c->n - 1]++;
    }
    return left || right;
}

uint32_t tree_completion(uint32_t n_leaves, uint64_t missing, const uint32_t *cuts,
                         uint32_t n_ranks, uint8_t *merges)
{
    g_assert(n_leaves <= TREE_CHUNKS_LIMIT && cuts[0] == 0 && cuts[n_ranks] == n_leaves);
    Completion c = {missing, cuts, n_ranks, 0, merges};
    if (n_leaves > 0) {
        complete(&c, 0, n_leaves);
    }
    return c.n;
}
