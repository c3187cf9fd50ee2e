/* The cost model's parts, as far as the cuts need them too. */
#pragma once

#include "proto/plan/plan.h"

/* A member's measurements with cautious numbers where it has none. */
typedef struct Speed {
    double read_bytes_per_s, int8_ops_per_s, f32_ops_per_s;
    double link_latency_s, link_bytes_per_s;
} Speed;
Speed speed_of(const PlanMember *member /* or NULL */);
/* The link between the members of a group: the slowest of them; shared memory when all are on one
 * known host. */
void link_of(const PlanMember *const *members, uint32_t n_members, double *latency_s,
             double *bytes_per_s);
const PlanMember *member_named(const PlanMember *members, uint32_t n_members, const char *worker);
