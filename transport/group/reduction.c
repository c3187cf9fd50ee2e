#include "transport/group/reduction.h"

#include <glib.h>
#include <string.h>

#define BLOCK 512u /* floats: a block of every operand and the stack stay in L1 */
#define DEPTH 16u  /* a tree of 2^14 leaves holds at most 15 values at once, one of 64 at most 7 */

static void reduction_init(Reduction *reduction, uint32_t n_leaves, uint64_t missing,
                           const uint32_t *cuts, uint32_t n_ranks)
{
    memset(reduction, 0, sizeof *reduction);
    reduction->n_leaves = n_leaves;
    reduction->n_ranks = n_ranks;
    reduction->missing = missing;
    memcpy(reduction->cuts, cuts, (n_ranks + 1) * sizeof *cuts);
    uint32_t n = 0;
    for (uint32_t r = 0; r < n_ranks; r++) {
        reduction->n_subtrees[r] =
            (uint8_t)tree_subtrees_missing(n_leaves, missing, cuts[r], cuts[r + 1]);
        n += reduction->n_subtrees[r];
    }
    reduction->n_operands = tree_completion(n_leaves, missing, cuts, n_ranks, reduction->merges);
    g_assert(reduction->n_operands == n);
}

const Reduction *reduction_find(ReductionCache *cache, uint32_t n_leaves, uint64_t missing,
                                const uint32_t *cuts, uint32_t n_ranks)
{
    g_assert(n_leaves >= 1 && n_leaves <= TREE_CHUNKS_LIMIT && n_ranks <= TREE_LEAVES_LIMIT);
    for (unsigned i = 0; i < REDUCTION_CACHE; i++) {
        const Reduction *entry = &cache->entries[i];
        if (entry->n_leaves == n_leaves && entry->n_ranks == n_ranks && entry->missing == missing &&
            memcmp(entry->cuts, cuts, (n_ranks + 1) * sizeof *cuts) == 0) {
            return entry;
        }
    }
    Reduction *entry = &cache->entries[cache->next++ % REDUCTION_CACHE];
    reduction_init(entry, n_leaves, missing, cuts, n_ranks);
    return entry;
}

typedef float Float4 __attribute__((vector_size(16)));

/* to = left + right; to may be either of them. */
static void add(float *to, const float *left, const float *right, size_t n)
{
    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        Float4 a, b;
        memcpy(&a, left + i, sizeof a);
        memcpy(&b, right + i, sizeof b);
        a += b;
        memcpy(to + i, &a, sizeof a);
    }
    for (; i < n; i++) {
        to[i] = left[i] + right[i];
    }
}

/* One block: push each operand, merge as often as the tree says. The last merge writes to out, when
 * all operands have been read. */
static void sum_block(const Reduction *reduction, const float *const *operands, size_t first,
                      size_t n, float *out)
{
    float partial[DEPTH][BLOCK];
    const float *stack[DEPTH];
    unsigned depth = 0;
    for (uint32_t i = 0; i < reduction->n_operands; i++) {
        g_assert(depth < DEPTH);
        stack[depth++] = operands[i] + first;
        for (unsigned m = reduction->merges[i]; m > 0; m--) {
            bool last = m == 1 && i + 1 == reduction->n_operands;
            depth--;
            float *to = last ? out + first : partial[depth - 1];
            add(to, stack[depth - 1], stack[depth], n);
            stack[depth - 1] = to;
        }
    }
    g_assert(depth == 1);
    if (stack[0] != out + first) {
        memcpy(out + first, stack[0], n * sizeof *out);
    }
}

void reduction_sum(const Reduction *reduction, const float *const *operands, size_t n, float *out)
{
    for (size_t first = 0; first < n; first += BLOCK) {
        sum_block(reduction, operands, first, MIN(n - first, BLOCK), out);
    }
}
