/* What a group holds, for plans: the slots of arriving subtrees to the byte; of messages what is
 * kept for reuse, and what a peer is usually ahead. */
#include "transport/group/group_state.h"

static uint32_t subtrees_of(const GroupCut *cut, uint32_t rank)
{
    return tree_subtrees_missing(cut->n_leaves, cut->missing, cut->cuts[rank], cut->cuts[rank + 1]);
}

uint32_t group_arriving(const GroupCut *cut)
{
    uint32_t n = 0;
    for (uint32_t r = 0; r < cut->n_ranks; r++) {
        n += r == cut->rank ? 0 : subtrees_of(cut, r);
    }
    return n;
}

uint64_t group_message_bytes(uint64_t size)
{
    return MIN(size, (uint64_t)BUFFER_POOL_KEPT * PIECE_BYTES);
}

uint64_t group_all_reduce_bytes(const GroupCut *cut, size_t n, size_t two_shot_bytes)
{
    const uint32_t n_arriving = group_arriving(cut), own = subtrees_of(cut, cut->rank);
    const bool two_shots = group_two_shots_pay(cut->n_ranks, n_arriving + own, n, two_shot_bytes);
    const uint64_t part = (two_shots ? n / cut->n_ranks : n) * sizeof(float);
    return n_arriving * part + (cut->n_ranks - 1) * group_message_bytes(own * part);
}

uint64_t group_scatter_bytes(const GroupCut *cut, const size_t *first, uint32_t window)
{
    const size_t own = first[cut->rank + 1] - first[cut->rank];
    const uint64_t sent =
        subtrees_of(cut, cut->rank) * (uint64_t)(first[cut->n_ranks] - first[0] - own);
    return window * group_arriving(cut) * own * sizeof(float) +
           (cut->n_ranks - 1) *
               group_message_bytes(window * sent / (cut->n_ranks - 1) * sizeof(float));
}
