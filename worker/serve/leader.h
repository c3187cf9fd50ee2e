/* Leader: what rank (0,0) of a replica does beside computing: it takes requests, builds Steps (by
 * scheduler.h: slots, pages, order, prefix cache), keeps the token log of each sequence from the
 * results that come back, and publishes its events (DESIGN 3). Pure bookkeeping on the engine
 * thread; requests and events cross to the main loop through lock-free logs (event_log.h).
 *
 * Invariants
 *   1. A position of a sequence is scheduled once in a tenancy of a slot, in order; a token is
 * appended only by the result of the row at the position before it, so each is drawn and told once,
 * preempted or not.
 *   2. Results name the uid of the tenancy; late ones of an earlier tenant of the slot, also of the
 * same request before it was preempted, are dropped.
 *   3. A request gets the tokens that it would get alone: what shares its steps, pages and chunks
 * decides when its rows are computed and never what they are (NUMERICS).
 *   4. Each request gets exactly one `done` event, the last; at its deadline at the latest, when
 * the leader is next called.
 *   5. At most LEADER_QUEUE_REQUESTS requests wait that never ran, and those that were submitted
 * when another one waited hold at most LEADER_QUEUE_TOKENS tokens together: what is beyond gets
 * FULL at once. A resumed request (it has generated tokens) was accepted before and always
 * waits.
 *
 *   submitted --> waiting <--> running --token at the end--> finished --step with the release-->
 * gone |           |            '------cancel, fail, deadline---^
 *        '-----------'---cancel, fail, deadline, impossible--> gone
 */
#pragma once

#include "worker/serve/engine.h"
#include "worker/serve/leader_request.h"
#include "worker/serve/row_result.h"
#include "worker/serve/step.h"

typedef struct Leader Leader;

#define LEADER_QUEUE_REQUESTS 1024u
#define LEADER_QUEUE_TOKENS (1u << 20) /* 4 MiB */

typedef struct LeaderOptions {
    StepLimits limits;
    uint64_t kv_pages;
    Hash128 definition;
    uint32_t n_stages; /* 0 = 1 */
    uint32_t steps_in_flight;
    uint64_t (*wire_bytes)(void *user); /* sent so far by this process, for the done event */
    int64_t (*now_us)(void *user);      /* NULL = CLOCK_MONOTONIC */
    void *user;
} LeaderOptions;

Leader *leader_new(const LeaderOptions *options);
/* Ends everything that is open with `error`. */
void leader_free(Leader *leader, const GError *error);
/* Bytes that leader_new() allocates for pages and their index. */
size_t leader_bytes(uint64_t kv_pages);

/* scheduler.h */
void leader_set_stages_at_once(Leader *leader, uint32_t n);

/* Takes the request. */
void leader_submit(Leader *leader, LeaderRequest *request /* taken */);
void leader_cancel(Leader *leader, uint64_t request_id);
/* The next Step is built also when nothing is to be done: without rows, admits and releases. */
void leader_canary(Leader *leader);
/* Builds the next Step; false if there is nothing to do or enough is in flight. */
bool leader_next(Leader *leader, Step *step);
/* Traced rows of a step that is about to come back (trace.h). false: malformed. */
bool leader_trace(Leader *leader, const void *data, size_t size);
/* A step came back with its results. */
void leader_result(Leader *leader, uint32_t step_number, const RowResult *results, uint32_t n);
uint32_t leader_open_requests(const Leader *leader);
uint32_t leader_steps_in_flight(const Leader *leader);
/* When the oldest step in flight was built (the leader's clock, us), 0 = none; its number in *step.
 */
int64_t leader_oldest_step_us(const Leader *leader, uint32_t *step);
/* Ends all open requests with the error; the leader is empty then. */
void leader_fail(Leader *leader, const GError *error);
void leader_load(const Leader *leader, EngineLoad *out);
