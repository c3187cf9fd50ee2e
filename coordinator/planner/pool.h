/* The members that may serve a plan, in the orders in which layouts take them. */
#pragma once

#include "coordinator/planner/layout.h"

typedef struct Pool {
    const PlanMember **order[3]; /* by speed, by host, by memory; members are the task's */
    uint32_t n;
} Pool;

/* Of the task's class and kind; pool_clear(). */
Pool pool_of(const Task *task);
void pool_clear(Pool *pool);
/* The first members of an order as the ranks of a layout: fills out[dp * pp * tp]. */
void pool_take(const Pool *pool, int order, Layout layout, const PlanMember **out);

/* Why a member cannot serve this model in wish->numerics at all; NULL: it can. Static. */
const char *planner_refusal(const PlanMember *m, const ModelSpec *spec, const PlanWish *wish);
/* For people: hosts' cores, or the kind of a device. Borrowed. */
const char *kind_text(const char *kind);
/* Class fast mixes what computes; an exact plan's members give the bits of its one kind. */
bool is_of_kind(const PlanMember *m, const Task *task);
