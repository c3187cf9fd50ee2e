#include "coordinator/planner/cut.h"

#include <glib.h>
#include <math.h>
#include <stdbool.h>

typedef struct Best {
    double slowest;    /* of the ranks so far; INFINITY: they cannot end here */
    uint32_t subtrees; /* of all of them */
    uint32_t from;     /* where the last one begins */
} Best;

typedef struct Search {
    const SubtreeTable *table;
    const double *unit_s;
    uint32_t n_ranks;
    double subtree_s;
    Best *best; /* [n_ranks + 1][table->n + 1]: of so many ranks that end there */
} Search;

/* Where any duration will do, the shortest; else the fewest subtrees. */
static bool is_better(double slowest, uint32_t subtrees, double limit, const Best *than)
{
    if (isinf(limit) || subtrees == than->subtrees || isinf(than->slowest)) {
        return slowest < than->slowest;
    }
    return subtrees < than->subtrees;
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

/* Dynamic programme over (rank, end of its range), of cuts without a rank slower than the limit.
 * Returns how long the best one lasts. */
static double search(const Search *c, double limit)
{
    uint32_t n = c->table->n, width = n + 1;
    for (uint32_t i = 0; i < (c->n_ranks + 1) * width; i++) {
        c->best[i] = (Best){INFINITY, 0, 0};
    }
    c->best[0] = (Best){0.0, 0, 0};
    for (uint32_t first = 0; first < n; first++) {
        for (uint32_t end = first + 1; end <= n; end++) {
            uint32_t subtrees = c->table->count[first][end];
            for (uint32_t r = 0; r < c->n_ranks; r++) {
                const Best *before = &c->best[r * width + first];
                Best *after = &c->best[(r + 1) * width + end];
                double slowest =
                    MAX(before->slowest, (end - first) * c->unit_s[r] + subtrees * c->subtree_s);
                if (!isinf(slowest) && slowest <= limit &&
                    is_better(slowest, before->subtrees + subtrees, limit, after)) {
                    *after = (Best){slowest, before->subtrees + subtrees, first};
                }
            }
        }
    }
    return c->best[c->n_ranks * width + n].slowest;
}

void cut_units(const SubtreeTable *table, const double *unit_s, uint32_t n_ranks, double subtree_s,
               double margin, uint32_t *cuts)
{
    uint32_t n = table->n;
    g_assert(n_ranks >= 1 && n_ranks <= n);
    g_autofree Best *best = g_new(Best, (gsize)(n_ranks + 1) * (n + 1));
    const Search c = {table, unit_s, n_ranks, subtree_s, best};
    search(&c, search(&c, INFINITY) * (1.0 + margin));
    cuts[n_ranks] = n;
    for (uint32_t r = n_ranks; r > 0; r--) {
        cuts[r - 1] = best[r * (n + 1) + cuts[r]].from;
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
