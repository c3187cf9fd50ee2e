/* Who is to blame: of all that wait, the one that everybody waits for in the end (DESIGN 7.6).
 * Pure. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

typedef struct WaitEdge {
    const char *waiter, *waits_for; /* node ids, borrowed */
    const char *operation;
    uint64_t since_ms; /* how long */
    bool expired;
} WaitEdge;

/* Follows the longest wait of each node from `from` (NULL: from the waiter of an expired edge, else
 * of the longest wait). Returns the edge into the node that waits for nobody; in a cycle, the edge
 * into the node that has begun to wait last; NULL when `from` waits for nobody. */
const WaitEdge *wait_graph_sink(const WaitEdge *edges, unsigned n, const char *from);
