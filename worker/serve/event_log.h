/* EventLog: the tokens of one request on their way from the engine thread to the main loop. Sized
 * for the whole request when it is admitted, so that the engine thread neither allocates nor locks
 * for a token: it writes an event, raises a counter, and posts a drain to the loop if none waits.
 *
 * Invariants
 *   1. The engine thread writes events [0, published) once each and never again; the loop reads
 * them in order.
 *   2. The done event is delivered once, after all others.
 *   3. Two references: the engine's, given up by event_log_finish(), and one per posted drain. */
#pragma once

#include "worker/serve/engine.h"
#include "worker/serve/row_result.h"

#include <glib.h>

typedef struct EventLog EventLog;

typedef struct EventTimes {
    uint64_t prefill_us, decode_us, wire_bytes;
} EventTimes;

/* Any thread. top_stride: most entries of an event's top list. */
EventLog *event_log_new(uint32_t top_stride, Loop *loop, EngineTokenFn fn, void *user);

/* Engine thread from here on. Room for `capacity` events in all; once, before the first push. */
void event_log_reserve(EventLog *log, uint32_t capacity);
void event_log_push(EventLog *log, const RowResult *result, uint32_t position, uint32_t vocab_size,
                    GBytes *trace /* taken; or NULL */);
/* The done event; the log is given up. reason: static. error: borrowed, or NULL. */
void event_log_finish(EventLog *log, const char *reason, const GError *error,
                      const EventTimes *times);
