/* How many layers a stage and how many units a rank gets. */
#pragma once

#include "proto/plan/tree.h"

#include <stdint.h>

/* s_r of every range of node(0, n): searching asks for it a million times. */
typedef struct SubtreeTable {
    uint32_t n;
    uint8_t count[TREE_LEAVES_LIMIT][TREE_LEAVES_LIMIT + 1]; /* [first][end] */
} SubtreeTable;
void subtree_table_init(SubtreeTable *table, uint32_t n);

/* Contiguous ranges of table->n units over n_ranks, each at least one. A cut lasts as long as its
 * slowest rank's units x unit_s[rank] + s_r x subtree_s, where s_r is the number of maximal
 * subtrees of its range (FORMULAS 7a). Of all cuts that last at most `margin` (>= 0, a share of
 * it) longer than the shortest possible, the one with the fewest subtrees, all ranks together; of
 * such ones the shortest. Fills cuts[0..n_ranks]. */
void cut_units(const SubtreeTable *table, const double *unit_s, uint32_t n_ranks, double subtree_s,
               double margin, uint32_t *cuts);

/* Layers over stages, each at least one: layer after layer to the stage that would then be done
 * first, given what it has to do anyway (base_s) and a layer's seconds there. counts[n_stages] sum
 * to n_layers (>= n_stages). */
void cut_layers(uint32_t n_layers, const double *layer_s, const double *base_s, uint32_t n_stages,
                uint32_t *counts);
