#include "coordinator/planner/cut.h"

#include <glib.h>
#include <math.h>
#include <stdbool.h>

typedef struct Best {
    double slowest;    /* of the ranks so far */
    uint32_t subtrees; /* in all */
    uint32_t from;     /* where the last rank begins */
} Best;

static bool is_better(double slowest, uint32_t subtrees, const Best *than)
{
    return slowest < than->slowest || (slowest == than->slowest && subtrees < than->subtrees);
}

void subtree_table_init(SubtreeTable *table, uint32_t n)
{
    g_assert(n <= TREE_LEAVES_LIMIT);
    table->n = n;
    for (uint32_t first = 0; first < n; first++) {
        for (uint32_t end = first; end <= n; end++) {
            table->count[first][end] = (uint8_t)tree_subtrees(n, first, end);
        }
    }
}

/* Dynamic programme over (rank, end of its range). */
void cut_units(const SubtreeTable *table, const double *unit_s, uint32_t n_ranks, double subtree_s,
               uint32_t *cuts)
{
    uint32_t n = table->n, width = n + 1;
    g_assert(n_ranks >= 1 && n_ranks <= n);
    g_autofree Best *best = g_new(Best, (gsize)(n_ranks + 1) * width);
    for (uint32_t i = 0; i < (n_ranks + 1) * width; i++) {
        best[i] = (Best){INFINITY, 0, 0};
    }
    best[0] = (Best){0.0, 0, 0};
    for (uint32_t first = 0; first < n; first++) {
        for (uint32_t end = first + 1; end <= n; end++) {
            uint32_t subtrees = table->count[first][end];
            for (uint32_t r = 0; r < n_ranks; r++) {
                const Best *before = &best[r * width + first];
                Best *after = &best[(r + 1) * width + end];
                double slowest =
                    MAX(before->slowest, (end - first) * unit_s[r] + subtrees * subtree_s);
                if (!isinf(before->slowest) &&
                    is_better(slowest, before->subtrees + subtrees, after)) {
                    *after = (Best){slowest, before->subtrees + subtrees, first};
                }
            }
        }
    }
    cuts[n_ranks] = n;
    for (uint32_t r = n_ranks; r > 0; r--) {
        cuts[r - 1] = best[r * width + cuts[r]].from;
    }
}

void cut_layers(uint32_t n_layers, const double *layer_s, const double *base_s, uint32_t n_stages,
                uint32_t *counts)
{
    g_assert(n_stages >= 1 && n_stages <= n_layers);
    for (uint32_t s = 0; s < n_stages; s++) {
        counts[s] = 1;
    }
    for (uint32_t left = n_layers - n_stages; left > 0; left--) {
        uint32_t best = 0;
        double best_s = INFINITY;
        for (uint32_t s = 0; s < n_stages; s++) {
            double done = base_s[s] + (counts[s] + 1) * layer_s[s];
            if (done < best_s) {
                best_s = done;
                best = s;
            }
        }
        counts[best]++;
    }
}
