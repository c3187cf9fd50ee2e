/* The seeded bugs: faults of the product that the history checker must find, each in the way that
 * the code could have it. One at a time is planted in the functions through which watch_*.c passes.
 */
#pragma once

#include <stdbool.h>

typedef enum Bug {
    BUG_NONE,
    BUG_EPOCH_REPEATED,
    BUG_EPOCH_NOT_DURABLE,
    BUG_GENERATION_NOT_DURABLE,
    BUG_DEAD_MEMBER_KEPT,
    BUG_DRAINING_MEMBER_PLANNED,
    BUG_REQUEST_FORGOTTEN,
    BUG_LEASE_RELEASED_TWICE,
    BUG_TOKEN_SHOWN_TWICE,
    BUG_RESUMED_TOO_FAR,
    BUG_RESUMED_WITH_OTHER_DRAWS,
    BUG_FENCE_IGNORED,
    BUG_OLD_DROP_OBEYED,
    BUG_KEEP_LIST_IGNORED,
    BUG_CANCEL_LOST,
    BUG_PAGE_GIVEN_TWICE,
    BUG_WAIT_WITHOUT_END,
    BUG_DATAGRAM_DELIVERED_TWICE,
    BUG_SEQUENCES_MIXED_UP,
    BUG_SCORE_LOST,
    BUG_DISK_ERROR_IGNORED,
    BUG_COUNT,
} Bug;

typedef struct BugEntry {
    const char *name, *what;
} BugEntry;

extern const BugEntry bug_entries[BUG_COUNT];

void bug_plant(Bug bug);
bool bug_is(Bug bug);
/* True every n-th time that it is asked, while the bug is planted. */
bool bug_strikes(Bug bug, unsigned n);
Bug bug_by_name(const char *name); /* BUG_NONE: unknown */
