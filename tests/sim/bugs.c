#include "tests/sim/bugs.h"

#include <string.h>

const BugEntry bug_entries[BUG_COUNT] = {
    [BUG_NONE] = {"none", "the product as it is"},
    [BUG_EPOCH_REPEATED] = {"epoch-repeated", "a new plan takes the epoch of the one before"},
    [BUG_EPOCH_NOT_DURABLE] = {"epoch-not-durable",
                               "epochs are used and ended without a word to the disk"},
    [BUG_GENERATION_NOT_DURABLE] = {"generation-not-durable",
                                    "a coordinator speaks before its generation is on disk"},
    [BUG_DEAD_MEMBER_KEPT] = {"dead-member-kept",
                              "a member is declared dead, and its shards still count as owned"},
    [BUG_DRAINING_MEMBER_PLANNED] = {"draining-member-planned",
                                     "the planner takes members that drain or are silent"},
    [BUG_REQUEST_FORGOTTEN] = {"request-forgotten",
                               "one of several waiting requests is lost when a plan is made"},
    [BUG_LEASE_RELEASED_TWICE] = {"lease-released-twice", "a request gives its place back twice"},
    [BUG_TOKEN_SHOWN_TWICE] = {"token-shown-twice", "a token goes out to the client twice"},
    [BUG_RESUMED_TOO_FAR] = {"resumed-too-far",
                             "the new leader is told of a token that was never drawn"},
    [BUG_RESUMED_WITH_OTHER_DRAWS] = {"resumed-with-other-draws",
                                      "the new leader draws with another seed"},
    [BUG_FENCE_IGNORED] = {"fence-ignored", "a worker without a coordinator goes on serving"},
    [BUG_OLD_DROP_OBEYED] = {"old-drop-obeyed",
                             "a Drop of an old epoch ends whatever the worker holds now"},
    [BUG_KEEP_LIST_IGNORED] = {"keep-list-ignored",
                               "a worker holds on to what the coordinator does not know"},
    [BUG_CANCEL_LOST] = {"cancel-lost", "a cancelled request computes on"},
    [BUG_PAGE_GIVEN_TWICE] = {"page-given-twice", "a KV page in use is given out again"},
    [BUG_WAIT_WITHOUT_END] = {"wait-without-end", "the waits inside a step have no deadline"},
    [BUG_DATAGRAM_DELIVERED_TWICE] = {"datagram-delivered-twice",
                                      "the link hands up what it has handed up before"},
    [BUG_SEQUENCES_MIXED_UP] = {"sequences-mixed-up",
                                "the new leader is given another sequence of the same request"},
    [BUG_DISK_ERROR_IGNORED] = {"disk-error-ignored", "a write that failed is taken for durable"},
    [BUG_SCORE_LOST] = {"score-lost", "a score of a row does not go out to the client"},
};

static Bug planted;
static unsigned n_asked;

void bug_plant(Bug bug)
{
    planted = bug;
    n_asked = 0;
}

bool bug_is(Bug bug)
{
    return planted == bug;
}

bool bug_strikes(Bug bug, unsigned n)
{
    return planted == bug && ++n_asked % n == 0;
}

Bug bug_by_name(const char *name)
{
    for (int i = 0; i < BUG_COUNT; i++) {
        if (strcmp(bug_entries[i].name, name) == 0) {
            return (Bug)i;
        }
    }
    return BUG_NONE;
}
