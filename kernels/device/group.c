/* What all fills of a group share: who may form one, and the tree over what was gathered. */
#include "kernels/device/group.h"

#include <string.h>

bool device_seats_fit(const DeviceSeat *seats, uint32_t n)
{
    if (n == 0 || n > DEVICE_GROUP_RANKS || seats[0].fill[0] == '\0') {
        return false;
    }
    for (uint32_t i = 0; i < n; i++) {
        if (strcmp(seats[i].fill, seats[0].fill) != 0 ||
            strcmp(seats[i].domain, seats[0].domain) != 0) {
            return false;
        }
        for (uint32_t k = 0; k < i; k++) {
            if (strcmp(seats[i].place, seats[k].place) == 0) {
                return false;
            }
        }
    }
    return true;
}

bool device_tree_init_missing(DeviceTree *tree, uint32_t n_leaves, uint64_t missing,
                              const uint32_t *cuts, uint32_t n_ranks)
{
    uint8_t merges[TREE_OPERANDS_LIMIT];
    uint32_t n_subtrees[DEVICE_GROUP_RANKS];
    g_assert(n_leaves <= TREE_CHUNKS_LIMIT && n_ranks <= DEVICE_GROUP_RANKS);
    *tree = (DeviceTree){.n_ranks = n_ranks};
    for (uint32_t r = 0; r < n_ranks; r++) {
        n_subtrees[r] = tree_subtrees_missing(n_leaves, missing, cuts[r], cuts[r + 1]);
        tree->most = MAX(tree->most, n_subtrees[r]);
    }
    const uint32_t n = tree_completion(n_leaves, missing, cuts, n_ranks, merges);
    if (n > TREE_LEAVES_LIMIT) {
        return false;
    }
    for (uint32_t r = 0; r < n_ranks; r++) {
        for (uint32_t k = 0; k < n_subtrees[r]; k++) {
            tree->operand[tree->n_operands++] = (uint16_t)(r * tree->most + k);
        }
    }
    g_assert(tree->n_operands == n);
    memcpy(tree->merges, merges, n);
    return true;
}

void device_tree_init(DeviceTree *tree, uint32_t n_leaves, const uint32_t *cuts, uint32_t n_ranks)
{
    const bool fits = device_tree_init_missing(tree, n_leaves, 0, cuts, n_ranks);
    g_assert(n_leaves <= TREE_LEAVES_LIMIT && fits);
}
