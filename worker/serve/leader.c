#include "worker/serve/leader.h"

#include "proto/base/error.h"
#include "proto/model/model_spec.h"
#include "worker/serve/scheduler.h"
#include "worker/serve/trace.h"

typedef struct InFlight {
    uint32_t number, n_rows, n_decoding;
    int64_t built_us;
} InFlight;

struct Leader {
    LeaderOptions o;
    Scheduler *scheduler;
    uint32_t next_step;
    InFlight *in_flight; /* ring of steps_in_flight, oldest at flight_head */
    uint32_t flight_head, flight_tail;
    int64_t next_deadline_us; /* nobody's deadline is earlier */
    uint64_t n_drawn;
    bool canary; /* a step is due, whatever there is to do */
};

Leader *leader_new(const LeaderOptions *options)
{
    Leader *l = g_new0(Leader, 1);
    l->o = *options;
    l->o.n_stages = MAX(options->n_stages, 1u);
    const SchedulerOptions scheduler = {.limits = options->limits,
                                        .kv_pages = options->kv_pages,
                                        .definition = options->definition,
                                        .n_stages = l->o.n_stages,
                                        .steps_in_flight = options->steps_in_flight};
    l->scheduler = scheduler_new(&scheduler);
    l->in_flight = g_new0(InFlight, options->steps_in_flight);
    l->next_step = 1;
    l->next_deadline_us = INT64_MAX;
    return l;
}

void leader_free(Leader *l, const GError *error)
{
    if (l == NULL) {
        return;
    }
    leader_fail(l, error);
    scheduler_free(l->scheduler);
    g_free(l->in_flight);
    g_free(l);
}

size_t leader_bytes(uint64_t kv_pages)
{
    return scheduler_bytes(kv_pages);
}

void leader_set_stages_at_once(Leader *l, uint32_t n)
{
    scheduler_set_stages_at_once(l->scheduler, n);
}

static int64_t now_us(const Leader *l)
{
    return l->o.now_us != NULL ? l->o.now_us(l->o.user) : g_get_monotonic_time();
}

/* ---- the end of a request ---- */

/* What it held is free at once; the slot is given out after a step has told every rank. */
static void finish(Leader *l, LeaderRequest *q, const char *reason, const GError *error)
{
    const int64_t now = now_us(l), first = q->first_us != 0 ? q->first_us : now;
    const EventTimes times = {.prefill_us = (uint64_t)(first - q->submitted_us),
                              .decode_us = (uint64_t)(now - first),
                              .wire_bytes = l->o.wire_bytes(l->o.user) - q->wire_start};
    scheduler_remove(l->scheduler, q);
    leader_request_end(q, reason, error, &times);
}

static void expire(Leader *l)
{
    LeaderRequest *q;
    const int64_t now = now_us(l);
    while (now >= l->next_deadline_us &&
           (q = scheduler_expired(l->scheduler, now, &l->next_deadline_us)) != NULL) {
        g_autoptr(GError) error = g_error_new(
            WEFT_ERROR, WEFT_ERROR_DEADLINE,
            "the request was not done within its %" G_GUINT64_FORMAT
            " ms (%s, %u tokens drawn): give it more time, or the server less load",
            q->deadline_ms, q->running ? "running" : "waiting", q->n_known - q->n_prompt);
        l->next_deadline_us = now; /* look again */
        finish(l, q, "error", error);
    }
}

void leader_cancel(Leader *l, uint64_t request_id)
{
    LeaderRequest *q = scheduler_find(l->scheduler, request_id);
    if (q != NULL) {
        finish(l, q, "cancelled", NULL);
    }
}

void leader_fail(Leader *l, const GError *error)
{
    LeaderRequest *q;
    while ((q = scheduler_any(l->scheduler)) != NULL) {
        finish(l, q, "error", error);
    }
}

/* ---- its beginning ---- */

static uint64_t pages_for(uint32_t n_positions)
{
    return (n_positions + KV_BLOCK - 1) / KV_BLOCK;
}

/* A request that can never run: said at once. */
static bool impossible(const Leader *l, const LeaderRequest *q, GError **error)
{
    const uint32_t positions = MAX(q->n_limit, q->n_known);
    if (q->n_prompt == 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "the prompt has no tokens: give at least one");
    } else if (q->kind > 1) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "request kind %u is not served by this model: generate or score", q->kind);
    } else if (q->n_known > l->o.limits.context) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "prompt of %u tokens is longer than the context of %u: shorten it", q->n_known,
                    l->o.limits.context);
    } else if (pages_for(MIN(positions, l->o.limits.context)) > l->o.kv_pages) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IMPOSSIBLE,
                    "%u positions need %" G_GUINT64_FORMAT
                    " KV pages, the plan has %" G_GUINT64_FORMAT ": give the workers more memory",
                    positions, pages_for(positions), l->o.kv_pages);
    } else {
        return false;
    }
    return true;
}

/* Invariant 5. */
static bool refuse_full(const Leader *l, const LeaderRequest *q, GError **error)
{
    const SchedulerQueue queue = scheduler_queue(l->scheduler);
    if (q->n_known > q->n_prompt || queue.n_requests == 0) {
        return false;
    }
    if (queue.n_requests < LEADER_QUEUE_REQUESTS &&
        queue.n_tokens + q->n_known <= LEADER_QUEUE_TOKENS) {
        return false;
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_FULL,
                "the queue is full: %u requests with %" G_GUINT64_FORMAT
                " tokens wait, at most %u with %u: try again later",
                queue.n_requests, queue.n_tokens, LEADER_QUEUE_REQUESTS, LEADER_QUEUE_TOKENS);
    return true;
}

static void set_deadline(Leader *l, LeaderRequest *q)
{
    const uint64_t longest_ms = (uint64_t)(INT64_MAX - q->submitted_us) / 1000;
    if (q->deadline_ms > 0 && q->deadline_ms < longest_ms) {
        q->deadline_us = q->submitted_us + (int64_t)q->deadline_ms * 1000;
        l->next_deadline_us = MIN(l->next_deadline_us, q->deadline_us);
    }
}

void leader_submit(Leader *l, LeaderRequest *q)
{
    g_autoptr(GError) error = NULL;
    const EventTimes none = {0};
    q->wire_start = l->o.wire_bytes(l->o.user);
    q->submitted_us = now_us(l);
    if (impossible(l, q, &error)) {
        leader_request_fail(q, error);
        return;
    }
    q->n_limit = MIN(q->n_limit, l->o.limits.context);
    if (q->kind == 0 ? q->n_known >= q->n_limit
                     : q->n_known <= q->score_from) { /* nothing to draw or to score */
        leader_request_end(q, "length", NULL, &none);
        return;
    }
    if (refuse_full(l, q, &error)) {
        leader_request_fail(q, error);
        return;
    }
    set_deadline(l, q);
    scheduler_enqueue(l->scheduler, q);
}

/* ---- steps ---- */

static uint32_t decoding_steps(const Leader *l)
{
    uint32_t n = 0;
    for (uint32_t i = l->flight_head; i != l->flight_tail; i++) {
        n += l->in_flight[i % l->o.steps_in_flight].n_decoding > 0;
    }
    return n;
}

void leader_canary(Leader *l)
{
    l->canary = true;
}

bool leader_next(Leader *l, Step *step)
{
    uint32_t n_decoding;
    expire(l);
    if (leader_steps_in_flight(l) >= l->o.steps_in_flight ||
        (!scheduler_next(l->scheduler, step, decoding_steps(l), &n_decoding) && !l->canary)) {
        return false;
    }
    l->canary = false;
    step->number = l->next_step++;
    l->in_flight[l->flight_tail++ % l->o.steps_in_flight] = (InFlight){.number = step->number,
                                                                       .n_rows = step->n_rows,
                                                                       .n_decoding = n_decoding,
                                                                       .built_us = now_us(l)};
    return true;
}

/* ---- results ---- */

static bool is_end(const LeaderRequest *q, uint32_t id)
{
    for (uint32_t i = 0; i < q->n_end_ids; i++) {
        if (q->end_ids[i] == id) {
            return true;
        }
    }
    return false;
}

static void take_sampled(Leader *l, LeaderRequest *q, const RowResult *r)
{
    if (r->position + 1 != q->n_known) {
        return; /* invariant 1: only the row of the last known token draws */
    }
    q->tokens[q->n_known++] = r->id;
    l->n_drawn++;
    GBytes *trace =
        q->trace != NULL ? g_byte_array_free_to_bytes(g_steal_pointer(&q->trace)) : NULL;
    event_log_push(q->log, r, r->position + 1, l->o.limits.vocab_size, trace);
    if (is_end(q, r->id)) {
        finish(l, q, "stop", NULL);
    } else if (q->n_known >= q->n_limit) {
        finish(l, q, "length", NULL);
    }
}

static void take_scored(Leader *l, LeaderRequest *q, const RowResult *r)
{
    if (r->position != leader_request_silent(q)) {
        return; /* invariant 1: scores come in order, once */
    }
    event_log_push(q->log, r, r->position + 1, l->o.limits.vocab_size, NULL);
    q->n_scored++;
    if (q->n_scored == q->n_known - q->score_from) {
        finish(l, q, "length", NULL);
    }
}

static void take_row(Leader *l, const RowResult *r)
{
    LeaderRequest *q = scheduler_at(l->scheduler, r->slot);
    if (q == NULL || q->admit.uid != r->uid) {
        return; /* invariant 2 */
    }
    if (q->first_us == 0) {
        q->first_us = now_us(l);
    }
    if (r->failed) {
        g_autoptr(GError) error = g_error_new(WEFT_ERROR, WEFT_ERROR_NUMERICS,
                                              "logits of position %u are not finite: the model's "
                                              "weights or its numeric type do not fit",
                                              r->position);
        scheduler_distrust(l->scheduler, q);
        finish(l, q, "error", error);
    } else if (q->kind == 0) {
        take_sampled(l, q, r);
    } else {
        take_scored(l, q, r);
    }
}

/* Rows that are computed again after a preemption are there already. */
static void keep_traced_row(uint32_t slot, uint64_t uid, uint32_t position, const uint8_t *sites,
                            uint32_t n_sites, void *user)
{
    Leader *l = user;
    LeaderRequest *q = scheduler_at(l->scheduler, slot);
    if (q == NULL || q->admit.uid != uid || !q->admit.trace || position < q->n_traced) {
        return; /* invariant 2 */
    }
    if (q->trace == NULL) {
        q->trace = g_byte_array_new();
    }
    q->n_traced = position + 1;
    g_byte_array_append(q->trace, (const uint8_t *)&position, sizeof position);
    g_byte_array_append(q->trace, sites, n_sites * sizeof(Hash128));
}

bool leader_trace(Leader *l, const void *data, size_t size)
{
    return trace_each_row(data, size, keep_traced_row, l);
}

void leader_result(Leader *l, uint32_t step_number, const RowResult *results, uint32_t n)
{
    const InFlight *oldest = &l->in_flight[l->flight_head % l->o.steps_in_flight];
    if (leader_steps_in_flight(l) == 0 || oldest->number != step_number) {
        return; /* not one of ours: steps come back in order */
    }
    scheduler_note(l->scheduler, oldest->n_rows, oldest->n_decoding, oldest->built_us, now_us(l));
    l->flight_head++;
    for (uint32_t i = 0; i < n; i++) {
        take_row(l, &results[i]);
    }
}

/* ---- what others ask ---- */

uint32_t leader_open_requests(const Leader *l)
{
    EngineLoad load;
    scheduler_load(l->scheduler, &load);
    return load.running + load.waiting;
}

uint32_t leader_steps_in_flight(const Leader *l)
{
    return l->flight_tail - l->flight_head;
}

int64_t leader_oldest_step_us(const Leader *l, uint32_t *step)
{
    const InFlight *oldest = &l->in_flight[l->flight_head % l->o.steps_in_flight];
    if (leader_steps_in_flight(l) == 0) {
        return 0;
    }
    *step = oldest->number;
    return oldest->built_us;
}

void leader_load(const Leader *l, EngineLoad *out)
{
    scheduler_load(l->scheduler, out);
    out->generation_tokens = l->n_drawn;
}
