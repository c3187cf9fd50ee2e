/* Leader: what rank (0,0) of a replica does beside computing: it admits requests, gives out slots
 * and pages, builds Steps, keeps the token log of each sequence and publishes its events (DESIGN
 * 3). Pure bookkeeping on the engine thread; requests and events cross to the main loop through
 * lock-free logs.
 *
 * Invariants
 *   1. A position of a sequence is scheduled once, in order; a token is appended only by the result
 * of the row at the position before it.
 *   2. Pages for the longest course of a sequence (prompt + max_tokens) are reserved when it is
 * admitted, so a running sequence never lacks one.
 *   3. A slot is given to a new sequence only in a Step after the one that released it; results
 * name the uid, so late ones of the former tenant are dropped.
 *   4. Each request gets exactly one `done` event, the last.
 *
 *   submitted --admit--> running --token at the end--> finished --step with the release--> gone
 *        |                  |------cancel, fail------------^
 *        '---cancel, fail, impossible---> gone
 */
#pragma once

#include "worker/serve/engine.h"
#include "worker/serve/step.h"

typedef struct Leader Leader;

typedef struct LeaderOptions {
    StepLimits limits;
    uint64_t kv_pages;
    uint32_t steps_in_flight;
    uint64_t (*wire_bytes)(void *user); /* sent so far by this process, for the done event */
    void *user;
} LeaderOptions;

/* One row's outcome, from the sampling rank. */
typedef struct RowResult {
    uint32_t slot;
    uint64_t uid;
    uint32_t position; /* of the row; a sampled token's own position is one more */
    uint32_t id;
    float logprob;
    uint8_t row_hash[16];
    uint32_t failed; /* 1: the logits were not finite */
    uint32_t n_top;
    const uint32_t *top_ids; /* borrowed */
    const float *top_logprobs;
    const float *logits; /* vocab_size floats or NULL; borrowed */
} RowResult;

Leader *leader_new(const LeaderOptions *options);
/* Ends everything that is open with `error`. */
void leader_free(Leader *leader, const GError *error);

/* A request before it meets the leader: built on the main loop, handed over by the engine's queue.
 */
typedef struct LeaderRequest LeaderRequest;
LeaderRequest *leader_request_new(uint64_t id, const EngineRequest *request, Loop *loop,
                                  EngineTokenFn fn, void *user);
/* Takes the request. */
void leader_submit(Leader *leader, LeaderRequest *request /* taken */);
/* Ends a request that never reached a leader. */
void leader_request_fail(LeaderRequest *request /* taken */, const GError *error);
void leader_cancel(Leader *leader, uint64_t request_id);
/* Builds the next Step; false if there is nothing to do or enough is in flight. */
bool leader_next(Leader *leader, Step *step);
/* Traced rows of a step that is about to come back (trace.h). false: malformed. */
bool leader_trace(Leader *leader, const void *data, size_t size);
/* A step came back with its results. */
void leader_result(Leader *leader, uint32_t step_number, const RowResult *results, uint32_t n);
uint32_t leader_open_requests(const Leader *leader);
uint32_t leader_steps_in_flight(const Leader *leader);
/* CLOCK_MONOTONIC us at which the oldest step in flight was built, 0 = none; its number in *step.
 */
int64_t leader_oldest_step_us(const Leader *leader, uint32_t *step);
/* Ends all open requests with the error; the leader is empty then. */
void leader_fail(Leader *leader, const GError *error);
