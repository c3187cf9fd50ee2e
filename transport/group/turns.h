/* GroupTurns: numbers the collectives of one group one after another, for programs that have no
 * bound on how many there are in a step. All ranks of the group call the same ones in the same
 * order. */
#pragma once

#include "transport/group/group.h"
#include "transport/link/link_clock.h"

typedef struct GroupTurns {
    Group *group; /* borrowed; NULL: one rank alone */
    uint64_t turn;
    int64_t deadline_us; /* of each wait, from its start; 0 = none */
} GroupTurns;

/* Of a wait that begins now. */
static inline int64_t group_turn_deadline(const GroupTurns *t)
{
    return t->deadline_us > 0 ? link_clock_us() + t->deadline_us : 0;
}

static inline GroupWait group_wait_of_turn(const GroupTurns *t, uint64_t turn,
                                           const char *operation)
{
    return (GroupWait){.step = (uint32_t)(turn / GROUP_SITE_LIMIT),
                       .site = (uint16_t)(turn % GROUP_SITE_LIMIT),
                       .deadline_us = group_turn_deadline(t),
                       .operation = operation};
}

static inline GroupWait group_turn(GroupTurns *t, const char *operation)
{
    return group_wait_of_turn(t, t->turn++, operation);
}
