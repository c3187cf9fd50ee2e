/* The cost model's parts, as far as the cuts need them too. */
#pragma once

#include "proto/plan/plan.h"

/* A member's measurements with cautious numbers where it has none. */
typedef struct Speed {
    double read_bytes_per_s, int8_ops_per_s, f32_ops_per_s;
    double link_latency_s, link_bytes_per_s;
    double matmul_ops_per_s[DTYPE_LIMIT]; /* of weights of each type */
} Speed;
Speed speed_of(const PlanMember *member /* or NULL */);
/* `speed` of a member of which 1 / crowding of its CPUs is left (cpu_share.h). */
Speed speed_shared(Speed speed, double crowding);
/* CPU crowding of each of these members when all compute at once; fills out[n_members]. NULL
 * members share with nobody. */
void crowding_of(const PlanMember *const *members, uint32_t n_members, double *out);
/* How much longer each stage takes when all stages compute at once than when it computes alone:
 * members are the ranks of stage 0, then of stage 1, ..., n_ranks[n_stages]; fills out[n_stages].
 */
void stage_crowding_of(const PlanMember *const *members, const uint32_t *n_ranks, uint32_t n_stages,
                       double *out);
/* The link between the members of a group: the slowest of them; shared memory when all are on one
 * known host. */
void link_of(const PlanMember *const *members, uint32_t n_members, double *latency_s,
             double *bytes_per_s);
/* The same for sums: devices of one host take them among themselves. */
void group_link_of(const PlanMember *const *members, uint32_t n_members, double *latency_s,
                   double *bytes_per_s);
