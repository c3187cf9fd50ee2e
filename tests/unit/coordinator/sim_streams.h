/* What tests of streams share: a request of N_TOKENS, what it gives undisturbed, who leads it, and
 * harm to workers. */
#pragma once

#include "tests/unit/coordinator/sim_cluster.h"

#define N_TOKENS 50u

typedef enum Harm { KILL, FREEZE, CUT } Harm;

/* Fixture of a test: *state becomes a SimCluster of its own. */
int cluster_set_up(void **state);
int cluster_tear_down(void **state);
void start_workers(SimCluster *s, unsigned n);
/* As status shows it; valid until the next call. */
const char *state_of(SimCluster *s, const char *name);
/* A request of five tokens, which it gets. */
void run_ok(SimCluster *s, Answer *a, uint32_t pp, uint32_t tp);
void begin(SimCluster *s, Answer *a, uint32_t pp, uint32_t tp);
/* What an undisturbed run gives; leaves the job loaded. */
void undisturbed(SimCluster *s, Answer *want, uint32_t pp, uint32_t tp);
/* What is wanted, and the same request half a second into its stream. */
void begin_after(SimCluster *s, Answer *want, Answer *a, uint32_t pp, uint32_t tp);
/* Ids, text, digest and reason. */
void assert_same(const Answer *a, const Answer *want);
/* Waits for the end. */
void assert_ends_same(SimCluster *s, Answer *a, const Answer *want);
/* From its next heartbeat on it says that it waits for another, in the epoch that it holds. */
void report_wait(FakeWorker *w, const char *waits_for, const char *operation, uint64_t since_ms,
                 bool expired);
FakeWorker *leader_of(SimCluster *s);   /* NULL: nobody leads */
FakeWorker *follower_of(SimCluster *s); /* holds a part of the running job and leads nothing */
void harm(FakeWorker *w, Harm how);
void heal(SimCluster *s, FakeWorker *w, Harm how);
