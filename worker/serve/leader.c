#include "worker/serve/leader.h"

#include "proto/base/error.h"
#include "proto/model/model_spec.h"
#include "worker/serve/kv_pages.h"
#include "worker/serve/trace.h"

#include <stdatomic.h>
#include <string.h>

/* ---- events: a log sized for the whole request, written by the engine thread, drained on the loop
 * ---- */

typedef struct Event {
    uint32_t position, id;
    float logprob;
    uint8_t row_hash[16];
    GBytes *logits, *trace;
    uint32_t n_top;
} Event;

typedef struct EventLog {
    atomic_int references; /* engine side, loop side */
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
    uint64_t prefill_us, decode_us, wire_bytes;
    bool done_delivered; /* loop side */
} EventLog;

static void event_log_unref(EventLog *log)
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

static void event_log_drain(void *user)
{
    EventLog *log = user;
    atomic_store(&log->posted, false);
    const bool finished =
        atomic_load(&log->finished); /* before published: nothing is published after it */
    const uint32_t n = atomic_load(&log->published);
    for (; log->drained < n; log->drained++) {
        Event *e = &log->events[log->drained];
        EngineToken token = {.position = e->position,
                             .id = e->id,
                             .logprob = e->logprob,
                             .logits = e->logits,
                             .trace = e->trace,
                             .n_top = e->n_top};
        memcpy(token.row_hash, e->row_hash, sizeof token.row_hash);
        token.top_ids =
            log->top_ids != NULL ? log->top_ids + (size_t)log->drained * log->top_stride : NULL;
        token.top_logprobs = log->top_logprobs != NULL
                                 ? log->top_logprobs + (size_t)log->drained * log->top_stride
                                 : NULL;
        log->fn(&token, log->user);
        g_clear_pointer(&e->logits, g_bytes_unref);
        g_clear_pointer(&e->trace, g_bytes_unref);
    }
    if (finished && !log->done_delivered) {
        log->done_delivered = true;
        const EngineToken token = {.done = true,
                                   .finish_reason = log->finish_reason,
                                   .error = log->error,
                                   .prefill_us = log->prefill_us,
                                   .decode_us = log->decode_us,
                                   .wire_bytes = log->wire_bytes};
        log->fn(&token, log->user);
    }
    event_log_unref(log);
}

static void event_log_wake(EventLog *log)
{
    if (!atomic_exchange(&log->posted, true)) {
        atomic_fetch_add(&log->references, 1);
        loop_post(log->loop, event_log_drain, log);
    }
}

static void event_log_push(EventLog *log, const RowResult *r, uint32_t position,
                           uint32_t vocab_size, GBytes *trace /* taken; or NULL */)
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
    event_log_wake(log);
}

static void event_log_finish(EventLog *log, const char *reason, const GError *error)
{
    log->finish_reason = reason;
    log->error = error != NULL ? g_error_copy(error) : NULL;
    atomic_store(&log->finished, true);
    event_log_wake(log);
    event_log_unref(log);
}

/* ---- sequences ---- */

struct LeaderRequest {
    uint64_t id;
    StepAdmit admit; /* slot and uid at admission */
    uint32_t kind, max_tokens, score_from;
    uint32_t *tokens; /* prompt, generated, then what is drawn; capacity n_capacity */
    uint32_t n_prompt, n_known, n_capacity;
    uint32_t n_limit; /* tokens that may be known in all */
    SampleBias *bias; /* admit.n_bias */
    uint32_t *end_ids;
    uint32_t n_end_ids;
    EventLog *log;
    /* running */
    bool running;
    uint32_t n_scheduled; /* positions put into steps */
    uint32_t *pages;
    uint32_t n_pages;
    uint64_t n_reserved; /* pages still promised */
    uint32_t n_scored;
    int64_t submitted_us, first_us;
    uint64_t wire_start;
    GByteArray *trace; /* rows since the last token; NULL = not traced */
};

LeaderRequest *leader_request_new(uint64_t id, const EngineRequest *r, Loop *loop, EngineTokenFn fn,
                                  void *user)
{
    LeaderRequest *q = g_new0(LeaderRequest, 1);
    q->id = id;
    q->kind = r->kind;
    q->max_tokens = r->kind == 0 ? r->max_tokens : 0;
    q->score_from = MAX(r->score_from, 1);
    q->n_prompt = r->n_prompt;
    q->n_known = r->n_prompt + r->n_generated;
    q->n_limit = r->n_prompt + q->max_tokens;
    q->n_capacity = MAX(q->n_limit, q->n_known) + 1;
    q->tokens = g_new0(uint32_t, q->n_capacity);
    if (r->n_prompt > 0) {
        memcpy(q->tokens, r->prompt, sizeof(uint32_t) * r->n_prompt);
    }
    if (r->n_generated > 0) {
        memcpy(q->tokens + r->n_prompt, r->generated, sizeof(uint32_t) * r->n_generated);
    }
    q->end_ids = g_memdup2(r->end_ids, sizeof(uint32_t) * r->n_end_ids);
    q->n_end_ids = r->n_end_ids;
    q->bias = g_memdup2(r->bias, sizeof(SampleBias) * r->n_bias);
    q->admit = (StepAdmit){.n_prompt = r->n_prompt,
                           .temperature = r->temperature,
                           .top_p = r->top_p,
                           .min_p = r->min_p,
                           .repeat_penalty = r->repeat_penalty,
                           .presence_penalty = r->presence_penalty,
                           .frequency_penalty = r->frequency_penalty,
                           .n_bias = r->n_bias,
                           .top_k = r->top_k,
                           .penalty_window = r->penalty_window,
                           .choice = r->choice,
                           .top_logprobs = r->top_logprobs,
                           .seed = r->seed,
                           .want_logits = r->want_logits,
                           .trace = r->trace && r->kind == 0};
    q->submitted_us = g_get_monotonic_time();
    EventLog *log = g_new0(EventLog, 1);
    atomic_init(&log->references, 1);
    log->capacity = (r->kind == 0 ? q->max_tokens : q->n_known) + 1;
    log->events = g_new0(Event, log->capacity);
    log->top_stride = r->top_logprobs;
    if (log->top_stride > 0) {
        log->top_ids = g_new0(uint32_t, (size_t)log->capacity * log->top_stride);
        log->top_logprobs = g_new0(float, (size_t)log->capacity * log->top_stride);
    }
    log->loop = loop;
    log->fn = fn;
    log->user = user;
    q->log = log;
    return q;
}

static void request_free(LeaderRequest *q)
{
    g_clear_pointer(&q->trace, g_byte_array_unref);
    g_free(q->tokens);
    g_free(q->end_ids);
    g_free(q->bias);
    g_free(q->pages);
    g_free(q);
}

void leader_request_fail(LeaderRequest *q, const GError *error)
{
    event_log_finish(q->log, "error", error);
    request_free(q);
}

/* ---- the leader ---- */

typedef struct InFlight {
    uint32_t number;
    int64_t built_us;
} InFlight;

struct Leader {
    LeaderOptions o;
    PageAllocator pages;
    GQueue waiting;        /* LeaderRequest *, submitted, not admitted */
    LeaderRequest **slots; /* running, by slot */
    bool *slot_taken;      /* running, or released but the release not yet in a step */
    uint32_t *releases;    /* slots to release in the next step */
    uint32_t n_releases;
    uint64_t next_uid;
    uint32_t next_step;
    InFlight *in_flight; /* ring of steps_in_flight, oldest at flight_head */
    uint32_t flight_head, flight_tail;
    uint32_t turn; /* slot that is served first next time */
};

Leader *leader_new(const LeaderOptions *options)
{
    Leader *l = g_new0(Leader, 1);
    l->o = *options;
    page_allocator_init(&l->pages, options->kv_pages);
    g_queue_init(&l->waiting);
    l->in_flight = g_new0(InFlight, options->steps_in_flight);
    l->slots = g_new0(LeaderRequest *, options->limits.max_slots);
    l->slot_taken = g_new0(bool, options->limits.max_slots);
    l->releases = g_new0(uint32_t, options->limits.max_slots);
    l->next_uid = 1;
    l->next_step = 1;
    return l;
}

/* The slot stays taken until a step has told every rank. */
static void finish(Leader *l, LeaderRequest *q, const char *reason, const GError *error)
{
    const int64_t now = g_get_monotonic_time();
    const int64_t first = q->first_us != 0 ? q->first_us : now;
    q->log->prefill_us = (uint64_t)(first - q->submitted_us);
    q->log->decode_us = (uint64_t)(now - first);
    q->log->wire_bytes = l->o.wire_bytes(l->o.user) - q->wire_start;
    event_log_finish(q->log, reason, error);
    if (q->running) {
        for (uint32_t i = 0; i < q->n_pages; i++) {
            page_allocator_unref(&l->pages, q->pages[i]);
        }
        page_allocator_unreserve(&l->pages, q->n_reserved);
        l->slots[q->admit.slot] = NULL;
        l->releases[l->n_releases++] = q->admit.slot;
    }
    request_free(q);
}

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

void leader_submit(Leader *l, LeaderRequest *q)
{
    g_autoptr(GError) error = NULL;
    q->wire_start = l->o.wire_bytes(l->o.user);
    if (impossible(l, q, &error)) {
        leader_request_fail(q, error);
        return;
    }
    q->n_limit = MIN(q->n_limit, l->o.limits.context);
    if (q->kind == 0 ? q->n_known >= q->n_limit
                     : q->n_known <= q->score_from) { /* nothing to draw or to score */
        event_log_finish(q->log, "length", NULL);
        request_free(q);
        return;
    }
    g_queue_push_tail(&l->waiting, q);
}

static gint same_id(gconstpointer a, gconstpointer id)
{
    return ((const LeaderRequest *)a)->id == *(const uint64_t *)id ? 0 : 1;
}

void leader_cancel(Leader *l, uint64_t request_id)
{
    GList *found = g_queue_find_custom(&l->waiting, &request_id, same_id);
    if (found != NULL) {
        LeaderRequest *q = found->data;
        g_queue_delete_link(&l->waiting, found);
        finish(l, q, "cancelled", NULL);
        return;
    }
    for (uint32_t i = 0; i < l->o.limits.max_slots; i++) {
        if (l->slots[i] != NULL && l->slots[i]->id == request_id) {
            finish(l, l->slots[i], "cancelled", NULL);
            return;
        }
    }
}

static bool find_slot(const Leader *l, uint32_t *slot)
{
    for (uint32_t i = 0; i < l->o.limits.max_slots; i++) {
        if (!l->slot_taken[i]) {
            *slot = i;
            return true;
        }
    }
    return false;
}

/* Invariant 2. */
static void admit(Leader *l, Step *step)
{
    uint32_t slot;
    while (!g_queue_is_empty(&l->waiting) && find_slot(l, &slot)) {
        LeaderRequest *q = g_queue_peek_head(&l->waiting);
        const uint64_t need = pages_for(MAX(q->n_limit, q->n_known));
        if (step->n_biases + q->admit.n_bias > SAMPLE_BIAS_LIMIT ||
            !page_allocator_reserve(&l->pages, need)) {
            return; /* in order: the next one does not overtake */
        }
        g_queue_pop_head(&l->waiting);
        q->n_reserved = need;
        q->pages = g_new0(uint32_t, need);
        q->running = true;
        q->admit.slot = slot;
        q->admit.uid = l->next_uid++;
        l->slots[slot] = q;
        l->slot_taken[slot] = true;
        q->admit.bias0 = step->n_biases;
        if (q->admit.n_bias > 0) {
            memcpy(step->biases + step->n_biases, q->bias, sizeof(SampleBias) * q->admit.n_bias);
            step->n_biases += q->admit.n_bias;
        }
        step->admits[step->n_admits++] = q->admit;
    }
}

static bool wants_output(const LeaderRequest *q, uint32_t position, StepRow *row)
{
    row->output = STEP_OUTPUT_NONE;
    row->target = 0;
    if (q->kind == 0) {
        if (position + 1 == q->n_known) {
            row->output = STEP_OUTPUT_SAMPLE;
        }
    } else if (position + 1 < q->n_known && position + 1 >= q->score_from) {
        row->output = STEP_OUTPUT_SCORE;
        row->target = q->tokens[position + 1];
    }
    return row->output != STEP_OUTPUT_NONE;
}

static void add_rows(Leader *l, Step *step, LeaderRequest *q, uint32_t n)
{
    StepSegment *g = &step->segments[step->n_segments++];
    *g = (StepSegment){.slot = q->admit.slot,
                       .position = q->n_scheduled,
                       .row0 = step->n_rows,
                       .n_rows = n,
                       .page_index = q->n_pages,
                       .page0 = step->n_pages};
    const uint32_t need = (uint32_t)pages_for(q->n_scheduled + n);
    while (q->n_pages < need) {
        const uint32_t page = page_allocator_take(&l->pages);
        q->n_reserved--;
        q->pages[q->n_pages++] = page;
        step->pages[step->n_pages++] = page;
        g->n_pages++;
    }
    for (uint32_t i = 0; i < n; i++) {
        StepRow *row = &step->rows[step->n_rows++];
        const uint32_t position = q->n_scheduled + i;
        row->token = q->tokens[position];
        wants_output(q, position, row);
    }
    q->n_scheduled += n;
}

/* Positions that can be computed now; the last token of a scored text predicts nothing. */
static uint32_t pending(const LeaderRequest *q)
{
    const uint32_t last = q->kind == 0 ? q->n_known : q->n_known - 1;
    return last - q->n_scheduled;
}

bool leader_next(Leader *l, Step *step)
{
    if (leader_steps_in_flight(l) >= l->o.steps_in_flight) {
        return false;
    }
    step_clear(step);
    step->n_releases = l->n_releases;
    memcpy(step->releases, l->releases, sizeof(uint32_t) * l->n_releases);
    admit(l, step); /* slots of this step's releases are given out from the next step on */
    uint32_t budget = l->o.limits.max_rows;
    const uint32_t n_slots = l->o.limits.max_slots;
    for (int decode = 1; decode >= 0;
         decode--) { /* single rows first: a long prompt never stalls the others */
        for (uint32_t i = 0; i < n_slots && budget > 0; i++) {
            LeaderRequest *q = l->slots[(l->turn + i) % n_slots];
            const uint32_t n = q != NULL ? pending(q) : 0;
            if (n > 0 && (n == 1) == decode) {
                const uint32_t take = MIN(n, budget);
                add_rows(l, step, q, take);
                budget -= take;
            }
        }
    }
    if (step->n_rows == 0 && step->n_releases == 0) {
        return false; /* admits without rows do not happen: a fresh sequence has pending rows or the
                         budget is spent on others */
    }
    l->turn = (l->turn + 1) % n_slots;
    for (uint32_t i = 0; i < step->n_releases; i++) {
        l->slot_taken[step->releases[i]] = false;
    }
    l->n_releases = 0;
    step->number = l->next_step++;
    l->in_flight[l->flight_tail++ % l->o.steps_in_flight] =
        (InFlight){.number = step->number, .built_us = g_get_monotonic_time()};
    return true;
}

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
    event_log_push(q->log, r, r->position + 1, l->o.limits.vocab_size, NULL);
    q->n_scored++;
    if (q->n_scored == q->n_known - q->score_from) {
        finish(l, q, "length", NULL);
    }
}

static void take_row(Leader *l, const RowResult *r)
{
    if (r->slot >= l->o.limits.max_slots) {
        return;
    }
    LeaderRequest *q = l->slots[r->slot];
    if (q == NULL || q->admit.uid != r->uid) {
        return; /* invariant 3 */
    }
    if (q->first_us == 0) {
        q->first_us = g_get_monotonic_time();
    }
    if (r->failed) {
        g_autoptr(GError) error = g_error_new(WEFT_ERROR, WEFT_ERROR_NUMERICS,
                                              "logits of position %u are not finite: the model's "
                                              "weights or its numeric type do not fit",
                                              r->position);
        finish(l, q, "error", error);
    } else if (q->kind == 0) {
        take_sampled(l, q, r);
    } else {
        take_scored(l, q, r);
    }
}

static void keep_traced_row(uint32_t slot, uint64_t uid, uint32_t position, const uint8_t *sites,
                            uint32_t n_sites, void *user)
{
    Leader *l = user;
    LeaderRequest *q = slot < l->o.limits.max_slots ? l->slots[slot] : NULL;
    if (q == NULL || q->admit.uid != uid || !q->admit.trace) {
        return; /* invariant 3 */
    }
    if (q->trace == NULL) {
        q->trace = g_byte_array_new();
    }
    g_byte_array_append(q->trace, (const uint8_t *)&position, sizeof position);
    g_byte_array_append(q->trace, sites, n_sites * sizeof(Hash128));
}

bool leader_trace(Leader *l, const void *data, size_t size)
{
    return trace_each_row(data, size, keep_traced_row, l);
}

void leader_result(Leader *l, uint32_t step_number, const RowResult *results, uint32_t n)
{
    if (leader_steps_in_flight(l) == 0 ||
        l->in_flight[l->flight_head % l->o.steps_in_flight].number != step_number) {
        return; /* not one of ours: steps come back in order */
    }
    l->flight_head++;
    for (uint32_t i = 0; i < n; i++) {
        take_row(l, &results[i]);
    }
}

uint32_t leader_open_requests(const Leader *l)
{
    uint32_t n = g_queue_get_length((GQueue *)&l->waiting);
    for (uint32_t i = 0; i < l->o.limits.max_slots; i++) {
        n += l->slots[i] != NULL;
    }
    return n;
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

void leader_fail(Leader *l, const GError *error)
{
    LeaderRequest *q;
    while ((q = g_queue_pop_head(&l->waiting)) != NULL) {
        leader_request_fail(q, error);
    }
    for (uint32_t i = 0; i < l->o.limits.max_slots; i++) {
        if (l->slots[i] != NULL) {
            finish(l, l->slots[i], "error", error);
        }
    }
    l->n_releases = 0;
}

void leader_free(Leader *l, const GError *error)
{
    if (l == NULL) {
        return;
    }
    leader_fail(l, error);
    g_free(l->in_flight);
    page_allocator_clear(&l->pages);
    g_free(l->slots);
    g_free(l->slot_taken);
    g_free(l->releases);
    g_free(l);
}
