#include "worker/serve/event_log.h"

#include <stdatomic.h>
#include <string.h>

typedef struct Event {
    uint32_t position, id;
    float logprob;
    uint8_t row_hash[16];
    GBytes *logits, *trace;
    uint32_t n_top;
} Event;

struct EventLog {
    atomic_int references; /* invariant 3 */
    atomic_bool posted;
    atomic_uint published;
    atomic_bool finished;
    uint32_t drained, capacity, top_stride;
    Event *events;
    uint32_t *top_ids;
    float *top_logprobs;
    Loop *loop;
    EngineTokenFn fn;
    void *user;
    /* written before finished */
    const char *finish_reason;
    GError *error;
    EventTimes times;
    bool done_delivered; /* loop side */
};

EventLog *event_log_new(uint32_t top_stride, Loop *loop, EngineTokenFn fn, void *user)
{
    EventLog *log = g_new0(EventLog, 1);
    atomic_init(&log->references, 1);
    log->top_stride = top_stride;
    log->loop = loop;
    log->fn = fn;
    log->user = user;
    return log;
}

void event_log_reserve(EventLog *log, uint32_t capacity)
{
    g_assert(log->events == NULL);
    log->capacity = capacity;
    log->events = g_new0(Event, capacity);
    if (log->top_stride > 0) {
        log->top_ids = g_new0(uint32_t, (size_t)capacity * log->top_stride);
        log->top_logprobs = g_new0(float, (size_t)capacity * log->top_stride);
    }
}

static void unref(EventLog *log)
{
    if (atomic_fetch_sub(&log->references, 1) > 1) {
        return;
    }
    for (uint32_t i = log->drained; i < log->published; i++) {
        g_clear_pointer(&log->events[i].logits, g_bytes_unref);
        g_clear_pointer(&log->events[i].trace, g_bytes_unref);
    }
    g_free(log->events);
    g_free(log->top_ids);
    g_free(log->top_logprobs);
    g_clear_error(&log->error);
    g_free(log);
}

static void deliver(EventLog *log, uint32_t i)
{
    Event *e = &log->events[i];
    EngineToken token = {.position = e->position,
                         .id = e->id,
                         .logprob = e->logprob,
                         .logits = e->logits,
                         .trace = e->trace,
                         .n_top = e->n_top};
    memcpy(token.row_hash, e->row_hash, sizeof token.row_hash);
    if (log->top_stride > 0) {
        token.top_ids = log->top_ids + (size_t)i * log->top_stride;
        token.top_logprobs = log->top_logprobs + (size_t)i * log->top_stride;
    }
    log->fn(&token, log->user);
    g_clear_pointer(&e->logits, g_bytes_unref);
    g_clear_pointer(&e->trace, g_bytes_unref);
}

static void drain(void *user)
{
    EventLog *log = user;
    atomic_store(&log->posted, false);
    const bool finished =
        atomic_load(&log->finished); /* before published: nothing is published after it */
    const uint32_t n = atomic_load(&log->published);
    for (; log->drained < n; log->drained++) {
        deliver(log, log->drained);
    }
    if (finished && !log->done_delivered) {
        log->done_delivered = true;
        const EngineToken token = {.done = true,
                                   .finish_reason = log->finish_reason,
                                   .error = log->error,
                                   .prefill_us = log->times.prefill_us,
                                   .decode_us = log->times.decode_us,
                                   .wire_bytes = log->times.wire_bytes};
        log->fn(&token, log->user);
    }
    unref(log);
}

static void wake(EventLog *log)
{
    if (!atomic_exchange(&log->posted, true)) {
        atomic_fetch_add(&log->references, 1);
        loop_post(log->loop, drain, log);
    }
}

void event_log_push(EventLog *log, const RowResult *r, uint32_t position, uint32_t vocab_size,
                    GBytes *trace)
{
    const uint32_t i = atomic_load(&log->published);
    g_assert(i < log->capacity);
    Event *e = &log->events[i];
    e->position = position;
    e->id = r->id;
    e->logprob = r->logprob;
    memcpy(e->row_hash, r->row_hash, sizeof e->row_hash);
    e->logits = r->logits != NULL ? g_bytes_new(r->logits, sizeof(float) * vocab_size) : NULL;
    e->trace = trace;
    e->n_top = MIN(r->n_top, log->top_stride);
    for (uint32_t k = 0; k < e->n_top; k++) {
        log->top_ids[(size_t)i * log->top_stride + k] = r->top_ids[k];
        log->top_logprobs[(size_t)i * log->top_stride + k] = r->top_logprobs[k];
    }
    atomic_store(&log->published, i + 1);
    wake(log);
}

void event_log_finish(EventLog *log, const char *reason, const GError *error,
                      const EventTimes *times)
{
    log->finish_reason = reason;
    log->error = error != NULL ? g_error_copy(error) : NULL;
    log->times = *times;
    atomic_store(&log->finished, true);
    wake(log);
    unref(log);
}
