/* EventLog: the tokens of one request on their way from the engine thread to the main loop. They
 * lie in blocks of EVENT_LOG_BLOCK, which the engine thread adds and the loop frees behind itself,
 * so that no lock is taken and nothing allocated for a token: an event is written, a counter
 * raised, and a drain posted to the loop if none waits.
 *
 * Invariants
 *   1. The engine thread writes events [0, published) once each and never again; the loop reads
 * them in order.
 *   2. The done event is delivered once, after all others.
 *   3. Two references: the engine's, given up by event_log_finish(), and one per posted drain.
 *   4. Held are the blocks of events that the loop has yet to read and at most one more: for a loop
 * that keeps up two, whatever the length of the request. Each has event_log_block_bytes() beside
 * logits and traces: of 64 running requests less than 3 MiB, which is in what a plan counts for a
 * process beside its buffers (proto/plan/rank_span.h). */
#pragma once

#include "worker/serve/engine.h"
#include "worker/serve/row_result.h"

#include <glib.h>

typedef struct EventLog EventLog;

typedef struct EventTimes {
    uint64_t prefill_us, decode_us, wire_bytes;
} EventTimes;

#define EVENT_LOG_BLOCK 32u

/* Any thread. top_stride: most entries of an event's top list. */
EventLog *event_log_new(uint32_t top_stride, Loop *loop, EngineTokenFn fn, void *user);

/* Engine thread from here on. */
void event_log_push(EventLog *log, const RowResult *result, uint32_t position, uint32_t vocab_size,
                    GBytes *trace /* taken; or NULL */);
/* The done event; the log is given up. reason: static. error: borrowed, or NULL. */
void event_log_finish(EventLog *log, const char *reason, const GError *error,
                      const EventTimes *times);

/* Any thread: blocks that are held (invariant 4), and the bytes of one. */
uint32_t event_log_n_blocks(const EventLog *log);
size_t event_log_block_bytes(uint32_t top_stride);
