/* A wait is oldest at the culprit's direct waiter and younger the further away it is, as each
 * follower began to wait later; what one node waits for first is the reason of whatever it waits
 * for next. So each node's longest wait is followed, to the node without a wait of its own. In a
 * cycle nobody is without one: the node whose own wait is the youngest was the last to be at work.
 */
#include "coordinator/wait_graph.h"

#include <stddef.h>
#include <string.h>

static const WaitEdge *longest_wait_of(const WaitEdge *edges, unsigned n, const char *waiter)
{
    const WaitEdge *best = NULL;
    for (unsigned i = 0; i < n; i++) {
        if (strcmp(edges[i].waiter, waiter) == 0 && strcmp(edges[i].waits_for, waiter) != 0 &&
            (best == NULL || edges[i].since_ms > best->since_ms)) {
            best = &edges[i];
        }
    }
    return best;
}

static const WaitEdge *first_edge(const WaitEdge *edges, unsigned n)
{
    const WaitEdge *best = NULL;
    for (unsigned i = 0; i < n; i++) {
        bool better = best == NULL || (edges[i].expired && !best->expired) ||
                      (edges[i].expired == best->expired && edges[i].since_ms > best->since_ms);
        if (better) {
            best = &edges[i];
        }
    }
    return best;
}

/* The walk has come round: once more around the cycle that contains `start`. */
static const WaitEdge *youngest_in_cycle(const WaitEdge *edges, unsigned n, const WaitEdge *start)
{
    const WaitEdge *into = start;
    const WaitEdge *best = NULL;
    uint64_t youngest = UINT64_MAX;
    for (unsigned i = 0; i <= n; i++) {
        const WaitEdge *own = longest_wait_of(edges, n, into->waits_for);
        if (own->since_ms < youngest) {
            youngest = own->since_ms;
            best = into;
        }
        into = own;
        if (into == start) {
            break;
        }
    }
    return best;
}

const WaitEdge *wait_graph_sink(const WaitEdge *edges, unsigned n, const char *from)
{
    if (from == NULL) {
        const WaitEdge *first = first_edge(edges, n);
        if (first == NULL) {
            return NULL;
        }
        from = first->waiter;
    }
    const WaitEdge *edge = longest_wait_of(edges, n, from);
    for (unsigned steps = 0; edge != NULL && steps <= n; steps++) {
        const WaitEdge *next = longest_wait_of(edges, n, edge->waits_for);
        if (next == NULL) {
            return edge;
        }
        edge = next;
    }
    return edge != NULL ? youngest_in_cycle(edges, n, edge) : NULL;
}
