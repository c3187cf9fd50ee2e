/* FakeReplica: what the ranks of a replica do with Steps, with arithmetic replaced: the cache holds
 * at each position a number made of all ids up to it, and a row's outcome is a function of all the
 * numbers that its sequence's page table shows. A page that is wrong, late, foreign or overwritten
 * therefore gives another token than the request would get alone, which fake_token() says.
 *
 * Applying a Step also asserts what every rank relies on (scheduler.h, leader.h): slots are free
 * when taken, positions come in order, each is backed by a page, and no row writes to a page that
 * another sequence reads. */
#pragma once

#include "worker/serve/leader.h"

typedef struct FakeReplica FakeReplica;

FakeReplica *fake_replica_new(const StepLimits *limits, uint64_t n_pages);
void fake_replica_free(FakeReplica *replica);

/* A step on its way back, with its results. */
typedef struct FakeFlight {
    uint32_t number, n;
    RowResult *results;
} FakeFlight;
/* Runs the step as it comes off the wire; freed with fake_flight_free. */
FakeFlight *fake_replica_run(FakeReplica *replica, const Step *step);
void fake_flight_free(FakeFlight *flight);
/* Rows of all steps. */
uint32_t fake_replica_rows(const FakeReplica *replica);

/* What the row of the last of n ids draws; a scored target's logprob is its number. */
uint32_t fake_token(const StepLimits *limits, const uint32_t *ids, uint32_t n);
