/* What tests of streams share: a request of N_TOKENS, what it gives undisturbed, who leads it, and
 * harm to workers. */
#pragma once

#include "tests/unit/coordinator/sim_cluster.h"

#define N_TOKENS 50u

typedef enum Harm { KILL, FREEZE, CUT } Harm;

void start_workers(SimCluster *s, unsigned n);
/* As status shows it; valid until the next call. */
const char *state_of(SimCluster *s, const char *name);
void begin(SimCluster *s, Answer *a, uint32_t pp, uint32_t tp);
/* What an undisturbed run gives; leaves the job loaded. */
void undisturbed(SimCluster *s, Answer *want, uint32_t pp, uint32_t tp);
/* Ids, text, digest and reason. */
void assert_same(const Answer *a, const Answer *want);
FakeWorker *leader_of(SimCluster *s);   /* NULL: nobody leads */
FakeWorker *follower_of(SimCluster *s); /* holds a part of the running job and leads nothing */
void harm(FakeWorker *w, Harm how);
void heal(SimCluster *s, FakeWorker *w, Harm how);
