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

/* Of EVENT_LOG_BLOCK events; their top lists follow. */
typedef struct EventBlock {
    _Atomic(struct EventBlock *) next; /* written before the events in it are published */
    Event events[EVENT_LOG_BLOCK];
} EventBlock;

struct EventLog {
    atomic_int references; /* invariant 3 */
    atomic_bool posted;
    atomic_uint published;
    atomic_bool finished;
    atomic_uint n_blocks;
    uint32_t top_stride;
    EventBlock *first, *last; /* engine: that it made, first and last; first is written once */
    EventBlock *reading;      /* loop: of the event that it reads next, NULL before the first */
    uint32_t drained;
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

/* ---- blocks ---- */

size_t event_log_block_bytes(uint32_t top_stride)
{
    return sizeof(EventBlock) +
           (size_t)EVENT_LOG_BLOCK * top_stride * (sizeof(uint32_t) + sizeof(float));
}

uint32_t event_log_n_blocks(const EventLog *log)
{
    return atomic_load(&log->n_blocks);
}

static uint32_t *top_ids(const EventLog *log, EventBlock *block, uint32_t at)
{
    return (uint32_t *)(void *)(block + 1) + (size_t)at * log->top_stride;
}

static float *top_logprobs(const EventLog *log, EventBlock *block, uint32_t at)
{
    return (float *)(void *)(top_ids(log, block, EVENT_LOG_BLOCK)) + (size_t)at * log->top_stride;
}

/* Engine: where event i is written. */
static EventBlock *block_to_write(EventLog *log, uint32_t i)
{
    if (i % EVENT_LOG_BLOCK > 0) {
        return log->last;
    }
    EventBlock *block = g_malloc0(event_log_block_bytes(log->top_stride));
    if (log->last == NULL) {
        log->first = block;
    } else {
        atomic_store(&log->last->next, block);
    }
    log->last = block;
    atomic_fetch_add(&log->n_blocks, 1);
    return block;
}

/* Loop: where event i is, which is published and the next to be read. */
static EventBlock *block_to_read(EventLog *log, uint32_t i)
{
    if (log->reading == NULL) {
        log->reading = log->first;
    } else if (i % EVENT_LOG_BLOCK == 0) {
        EventBlock *done = log->reading;
        log->reading = atomic_load(&done->next);
        g_free(done);
        atomic_fetch_sub(&log->n_blocks, 1);
    }
    return log->reading;
}

static void unref(EventLog *log)
{
    if (atomic_fetch_sub(&log->references, 1) > 1) {
        return;
    }
    for (; log->drained < log->published; log->drained++) {
        Event *e = &block_to_read(log, log->drained)->events[log->drained % EVENT_LOG_BLOCK];
        g_clear_pointer(&e->logits, g_bytes_unref);
        g_clear_pointer(&e->trace, g_bytes_unref);
    }
    g_free(log->reading); /* the last block: whatever was published is read */
    g_clear_error(&log->error);
    g_free(log);
}

static void deliver(EventLog *log, uint32_t i)
{
    EventBlock *block = block_to_read(log, i);
    const uint32_t at = i % EVENT_LOG_BLOCK;
    Event *e = &block->events[at];
    EngineToken token = {.position = e->position,
                         .id = e->id,
                         .logprob = e->logprob,
                         .logits = e->logits,
                         .trace = e->trace,
                         .n_top = e->n_top};
    memcpy(token.row_hash, e->row_hash, sizeof token.row_hash);
    if (log->top_stride > 0) {
        token.top_ids = top_ids(log, block, at);
        token.top_logprobs = top_logprobs(log, block, at);
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
    EventBlock *block = block_to_write(log, i);
    const uint32_t at = i % EVENT_LOG_BLOCK;
    Event *e = &block->events[at];
    e->position = position;
    e->id = r->id;
    e->logprob = r->logprob;
    memcpy(e->row_hash, r->row_hash, sizeof e->row_hash);
    e->logits = r->logits != NULL ? g_bytes_new(r->logits, sizeof(float) * vocab_size) : NULL;
    e->trace = trace;
    e->n_top = MIN(r->n_top, log->top_stride);
    for (uint32_t k = 0; k < e->n_top; k++) {
        top_ids(log, block, at)[k] = r->top_ids[k];
        top_logprobs(log, block, at)[k] = r->top_logprobs[k];
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
