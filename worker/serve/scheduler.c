#include "worker/serve/scheduler.h"

#include "proto/plan/logits_limits.h"
#include "worker/serve/fair_queue.h"

#include <stdlib.h>
#include <string.h>

struct Scheduler {
    SchedulerOptions o;
    PrefixCache cache;
    FairQueue *waiting;
    LeaderRequest **slots; /* running, by slot */
    bool *slot_taken;      /* running, or released but the release not yet in a step */
    uint32_t *releases;    /* slots to release in the next step */
    LeaderRequest **needy; /* scratch: sequences that lack a page */
    uint32_t n_releases, n_running;
    SchedulerQueue queue;
    uint64_t next_uid, next_order;
    uint64_t
        step_serial; /* entries of the cache from here on are of the step that is being built */
    uint32_t decode_turn, prompt_turn; /* slots that are served first */
    uint32_t decode_steps;             /* in flight, at most (invariant 5) */
    uint32_t logits_left;              /* rows of the step that is being built (invariant 6) */
    StepPace pace;
    EngineLoad load; /* its totals */
};

Scheduler *scheduler_new(const SchedulerOptions *options)
{
    Scheduler *s = g_new0(Scheduler, 1);
    const uint32_t n_slots = options->limits.max_slots;
    s->o = *options;
    s->decode_steps = options->n_stages;
    prefix_cache_init(&s->cache, options->kv_pages, &options->definition);
    s->waiting = fair_queue_new();
    s->slots = g_new0(LeaderRequest *, n_slots);
    s->slot_taken = g_new0(bool, n_slots);
    s->releases = g_new0(uint32_t, n_slots);
    s->needy = g_new0(LeaderRequest *, n_slots);
    s->next_uid = s->next_order = 1;
    return s;
}

void scheduler_free(Scheduler *s)
{
    if (s == NULL) {
        return;
    }
    g_assert(scheduler_any(s) == NULL);
    prefix_cache_clear(&s->cache);
    fair_queue_free(s->waiting);
    g_free(s->slots);
    g_free(s->slot_taken);
    g_free(s->releases);
    g_free(s->needy);
    g_free(s);
}

size_t scheduler_bytes(uint64_t kv_pages)
{
    return prefix_cache_bytes(kv_pages);
}

static uint32_t pages_for(uint32_t n_positions)
{
    return (n_positions + KV_BLOCK - 1) / KV_BLOCK;
}

/* ---- coming and going ---- */

void scheduler_enqueue(Scheduler *s, LeaderRequest *q)
{
    q->order = s->next_order++;
    s->queue.n_requests++;
    s->queue.n_tokens += q->n_known;
    fair_queue_join(s->waiting, q);
    fair_queue_push(s->waiting, q);
}

void scheduler_set_stages_at_once(Scheduler *s, uint32_t n)
{
    s->decode_steps = CLAMP(n, 1u, s->o.n_stages);
}

SchedulerQueue scheduler_queue(const Scheduler *s)
{
    return s->queue;
}

/* It runs for the first time, or will not. */
static void leave_queue(Scheduler *s, const LeaderRequest *q)
{
    if (!q->was_admitted) {
        s->queue.n_requests--;
        s->queue.n_tokens -= q->n_known;
    }
}

/* The page that is not full may serve as a beginning of others'. */
static void leave_tail(Scheduler *s, const LeaderRequest *q)
{
    const uint32_t first = q->n_chained * KV_BLOCK, n = q->n_scheduled - MIN(first, q->n_scheduled);
    if (q->cached && n > 0 && n < KV_BLOCK && q->n_chained < q->n_pages) {
        prefix_cache_enter_tail(&s->cache, &q->chain, q->tokens + first, n, q->pages[q->n_chained]);
    }
}

/* Pages from the end on: an idle beginning outlives what follows it, which is of no use alone. */
static void vacate(Scheduler *s, LeaderRequest *q)
{
    leave_tail(s, q);
    while (q->n_pages > 0) {
        page_pool_unref(&s->cache.pool, q->pages[--q->n_pages]);
    }
    page_pool_unreserve(&s->cache.pool, q->n_reserved);
    s->slots[q->admit.slot] = NULL;
    s->releases[s->n_releases++] = q->admit.slot;
    s->n_running--;
    q->running = false;
    q->n_reserved = 0;
    q->n_scheduled = q->n_reusable = q->n_chained = 0;
}

void scheduler_remove(Scheduler *s, LeaderRequest *q)
{
    if (q->running) {
        vacate(s, q);
    } else {
        leave_queue(s, q);
        fair_queue_remove(s->waiting, q);
    }
    fair_queue_leave(s->waiting, q);
}

void scheduler_distrust(Scheduler *s, LeaderRequest *q)
{
    q->cached = false; /* its tail too */
    if (q->source_serial != 0) {
        prefix_cache_forget_entry(&s->cache, q->source, q->source_serial);
    }
    for (uint32_t i = 0; i < q->n_pages; i++) {
        prefix_cache_forget(&s->cache, q->pages[i]);
    }
}

static void preempt(Scheduler *s, LeaderRequest *q)
{
    vacate(s, q);
    fair_queue_push(s->waiting, q);
    s->load.preemptions++;
}

LeaderRequest *scheduler_find(Scheduler *s, uint64_t id)
{
    for (uint32_t i = 0; i < s->o.limits.max_slots; i++) {
        if (s->slots[i] != NULL && s->slots[i]->id == id) {
            return s->slots[i];
        }
    }
    for (const GList *at = fair_queue_all(s->waiting); at != NULL; at = at->next) {
        if (((const LeaderRequest *)at->data)->id == id) {
            return at->data;
        }
    }
    return NULL;
}

LeaderRequest *scheduler_at(const Scheduler *s, uint32_t slot)
{
    return slot < s->o.limits.max_slots ? s->slots[slot] : NULL;
}

LeaderRequest *scheduler_any(Scheduler *s)
{
    for (uint32_t i = 0; i < s->o.limits.max_slots; i++) {
        if (s->slots[i] != NULL) {
            return s->slots[i];
        }
    }
    return fair_queue_next(s->waiting);
}

static LeaderRequest *check_deadline(LeaderRequest *q, int64_t now_us, int64_t *next_us)
{
    if (q == NULL || q->deadline_us == 0) {
        return NULL;
    }
    if (q->deadline_us <= now_us) {
        return q;
    }
    *next_us = MIN(*next_us, q->deadline_us);
    return NULL;
}

LeaderRequest *scheduler_expired(Scheduler *s, int64_t now_us, int64_t *next_us)
{
    LeaderRequest *expired = NULL;
    *next_us = INT64_MAX;
    for (uint32_t i = 0; expired == NULL && i < s->o.limits.max_slots; i++) {
        expired = check_deadline(s->slots[i], now_us, next_us);
    }
    for (const GList *at = fair_queue_all(s->waiting); expired == NULL && at != NULL;
         at = at->next) {
        expired = check_deadline(at->data, now_us, next_us);
    }
    return expired;
}

/* ---- pages for those that run (invariant 2) ---- */

static int older_first(const void *a, const void *b)
{
    const LeaderRequest *x = *(LeaderRequest *const *)a, *y = *(LeaderRequest *const *)b;
    return (x->order > y->order) - (x->order < y->order);
}

static LeaderRequest *youngest(const Scheduler *s)
{
    LeaderRequest *found = NULL;
    for (uint32_t i = 0; i < s->o.limits.max_slots; i++) {
        LeaderRequest *q = s->slots[i];
        if (q != NULL && (found == NULL || q->order > found->order)) {
            found = q;
        }
    }
    return found;
}

static bool lacks_page(const LeaderRequest *q)
{
    return q != NULL && leader_request_pending(q) > 0 && q->n_reserved == 0 &&
           q->n_scheduled >= q->n_pages * KV_BLOCK;
}

/* Before any row of the step is chosen, so that nobody in the step is preempted. From the oldest
 * on: the youngest is never older than the one that it makes room for. */
static void find_pages(Scheduler *s)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < s->o.limits.max_slots; i++) {
        if (lacks_page(s->slots[i])) {
            s->needy[n++] = s->slots[i];
        }
    }
    qsort(s->needy, n, sizeof s->needy[0], older_first);
    for (uint32_t i = 0; i < n; i++) {
        LeaderRequest *q = s->needy[i];
        while (q->running && !page_pool_reserve(&s->cache.pool, 1)) {
            preempt(s, youngest(s));
        }
        q->n_reserved += q->running;
    }
}

/* ---- admission ---- */

static bool find_slot(const Scheduler *s, uint32_t *slot)
{
    for (uint32_t i = 0; i < s->o.limits.max_slots; i++) {
        if (!s->slot_taken[i]) {
            *slot = i;
            return true;
        }
    }
    return false;
}

/* Another whole page of q's known tokens that need not be computed. */
static bool next_reusable(const Scheduler *s, const LeaderRequest *q, uint32_t n_pages,
                          PrefixChain *chain, uint32_t *page)
{
    const uint32_t first = n_pages * KV_BLOCK;
    return q->cached && first + KV_BLOCK <= leader_request_silent(q) &&
           prefix_cache_find(&s->cache, chain, q->tokens + first, page);
}

/* Pages of all known tokens: what the cache has, and a promise of the rest. */
static bool claim_pages(Scheduler *s, LeaderRequest *q)
{
    PagePool *pool = &s->cache.pool;
    const uint32_t need = pages_for(q->n_known);
    uint32_t n = 0, n_idle = 0;
    if (q->pages == NULL) {
        leader_request_prepare(q);
    }
    q->chain = prefix_cache_begin(&s->cache, &q->salt);
    while (next_reusable(s, q, n, &q->chain, &q->pages[n])) {
        n_idle += page_pool_is_idle(pool, q->pages[n++]);
    }
    if (page_pool_available(pool) < (uint64_t)n_idle + (need - n) + s->n_running) {
        return false;
    }
    for (uint32_t i = 0; i < n; i++) {
        page_pool_ref(pool, q->pages[i]);
    }
    page_pool_reserve(pool, need - n);
    q->n_reserved = need - n;
    q->n_pages = q->n_chained = n;
    q->n_reusable = n * KV_BLOCK;
    return true;
}

static void count_admission(Scheduler *s, LeaderRequest *q)
{
    if (!q->was_admitted) {
        s->load.prompt_tokens += q->n_prompt;
        fair_queue_charge(q, q->n_known - q->n_reusable);
    }
    if (q->cached) {
        s->load.prefix_query_tokens += q->n_known;
        s->load.prefix_hit_tokens += q->n_reusable;
    }
    q->was_admitted = true;
}

static void seat(Scheduler *s, LeaderRequest *q, uint32_t slot, Step *step)
{
    q->running = true;
    q->admit.slot = slot;
    q->admit.uid = s->next_uid++;
    q->admit.bias0 = step->n_biases;
    if (q->admit.n_bias > 0) {
        memcpy(step->biases + step->n_biases, q->bias, sizeof(SampleBias) * q->admit.n_bias);
        step->n_biases += q->admit.n_bias;
    }
    s->slots[slot] = q;
    s->slot_taken[slot] = true;
    s->n_running++;
    step->admits[step->n_admits++] = q->admit;
    count_admission(s, q);
}

/* Invariant 1: the first that does not fit ends it. */
static void admit_waiting(Scheduler *s, Step *step)
{
    uint32_t slot;
    while (fair_queue_length(s->waiting) > 0 && find_slot(s, &slot)) {
        LeaderRequest *q = fair_queue_next(s->waiting);
        if (step->n_biases + q->admit.n_bias > SAMPLE_BIAS_LIMIT || !claim_pages(s, q)) {
            return;
        }
        fair_queue_remove(s->waiting, q);
        leave_queue(s, q);
        seat(s, q, slot, step);
    }
}

/* ---- rows ---- */

static void set_output(const LeaderRequest *q, uint32_t position, StepRow *row)
{
    row->output = STEP_OUTPUT_NONE;
    row->target = 0;
    if (q->kind == 0) {
        if (position + 1 == q->n_known) {
            row->output = STEP_OUTPUT_SAMPLE;
        }
    } else if (position + 1 < q->n_known && position >= leader_request_silent(q)) {
        row->output = STEP_OUTPUT_SCORE;
        row->target = q->tokens[position + 1];
    }
}

/* From now on the pages that are full serve others (prefix_cache.h). */
static void enter_pages(Scheduler *s, LeaderRequest *q)
{
    for (; q->cached && (q->n_chained + 1) * KV_BLOCK <= q->n_scheduled; q->n_chained++) {
        prefix_cache_enter(&s->cache, &q->chain, q->tokens + (size_t)q->n_chained * KV_BLOCK,
                           q->pages[q->n_chained]);
    }
}

/* Rows of n positions from the next on whose output is wanted with its logits. */
static uint32_t count_logits(const LeaderRequest *q, uint32_t n)
{
    const uint32_t end = q->n_scheduled + n, first = MAX(leader_request_silent(q), q->n_scheduled);
    return q->admit.want_logits && end > first ? end - first : 0;
}

/* How many of n rows may go into the step (invariant 6). */
static uint32_t within_logits(const Scheduler *s, const LeaderRequest *q, uint32_t n)
{
    const uint32_t logits = count_logits(q, n);
    return logits > s->logits_left ? n - (logits - s->logits_left) : n;
}

static void add_rows(Scheduler *s, Step *step, LeaderRequest *q, uint32_t n)
{
    s->logits_left -= count_logits(q, n);
    StepSegment *g = &step->segments[step->n_segments++];
    *g = (StepSegment){.slot = q->admit.slot,
                       .position = q->n_scheduled,
                       .row0 = step->n_rows,
                       .n_rows = n,
                       .page_index = q->n_pages,
                       .page0 = step->n_pages};
    while (q->n_pages < pages_for(q->n_scheduled + n)) {
        const uint32_t page = prefix_cache_take(&s->cache);
        q->n_reserved--;
        q->pages[q->n_pages++] = page;
        step->pages[step->n_pages++] = page;
        g->n_pages++;
    }
    for (uint32_t i = 0; i < n; i++) {
        StepRow *row = &step->rows[step->n_rows++];
        row->token = q->tokens[q->n_scheduled + i];
        set_output(q, q->n_scheduled + i, row);
    }
    q->n_scheduled += n;
    enter_pages(s, q);
}

static uint32_t count_decoding(const Scheduler *s)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < s->o.limits.max_slots; i++) {
        n += s->slots[i] != NULL && leader_request_decodes(s->slots[i]);
    }
    return n;
}

/* Invariant 5. */
static void add_decoding(Scheduler *s, Step *step, uint32_t n_decoding, uint32_t decoding_steps)
{
    const uint32_t n_slots = s->o.limits.max_slots, first = s->decode_turn;
    uint32_t room = (n_decoding + s->decode_steps - 1) / s->decode_steps;
    room = decoding_steps < s->decode_steps ? MIN(room, s->o.limits.max_rows) : 0;
    for (uint32_t i = 0; i < n_slots && room > 0; i++) {
        LeaderRequest *q = s->slots[(first + i) % n_slots];
        if (q != NULL && leader_request_decodes(q) && leader_request_pending(q) == 1 &&
            within_logits(s, q, 1) == 1) {
            add_rows(s, step, q, 1);
            fair_queue_charge(q, 1);
            s->decode_turn = (first + i + 1) % n_slots;
            room--;
        }
    }
}

/* What others of the same text have computed meanwhile. */
static void extend_reuse(Scheduler *s, LeaderRequest *q)
{
    uint32_t page;
    while (q->n_reserved > 0 && q->n_chained == q->n_pages &&
           (q->n_scheduled == q->n_pages * KV_BLOCK || q->n_reusable == q->n_pages * KV_BLOCK) &&
           next_reusable(s, q, q->n_pages, &q->chain, &page)) {
        page_pool_unreserve(&s->cache.pool, 1); /* its own page for these positions */
        page_pool_ref(&s->cache.pool, page);
        q->n_reserved--;
        q->pages[q->n_pages++] = page;
        q->n_chained++;
        q->n_reusable = q->n_pages * KV_BLOCK;
        s->load.prefix_hit_tokens += KV_BLOCK;
    }
}

/* Tells the ranks of reused pages, as many as fit into the step; true if none is left untold. */
static bool announce_reuse(Step *step, LeaderRequest *q)
{
    if (q->n_scheduled >= q->n_reusable) {
        return true;
    }
    const uint32_t first = q->n_scheduled / KV_BLOCK,
                   n = MIN(q->n_reusable / KV_BLOCK - first,
                           STEP_REUSE_PAGES - step->n_tokens / KV_BLOCK);
    if (n > 0) {
        step->reuses[step->n_reuses++] = (StepReuse){.slot = q->admit.slot,
                                                     .page_index = first,
                                                     .n_pages = n,
                                                     .page0 = step->n_pages,
                                                     .token0 = step->n_tokens};
        memcpy(step->pages + step->n_pages, q->pages + first, sizeof(uint32_t) * n);
        memcpy(step->tokens + step->n_tokens, q->tokens + q->n_scheduled,
               sizeof(uint32_t) * KV_BLOCK * n);
        step->n_pages += n;
        step->n_tokens += KV_BLOCK * n;
        q->n_scheduled += KV_BLOCK * n;
    }
    return q->n_scheduled >= q->n_reusable;
}

typedef enum CopyOf { COPY_ANY, COPY_ALL_BUT_ONE } CopyOf;

/* The beginning of the next page, where another page has it: of what was there before this step.
 * COPY_ALL_BUT_ONE: only what leaves one row, for who copies less cannot share the whole page that
 * another one may compute in this step. */
static void copy_beginning(Scheduler *s, Step *step, LeaderRequest *q, CopyOf what)
{
    const uint32_t at = q->n_scheduled, silent = leader_request_silent(q);
    if (!q->cached || q->n_reserved == 0 || q->n_chained != q->n_pages ||
        at != q->n_pages * KV_BLOCK || at >= silent) {
        return;
    }
    const uint32_t most =
        MIN(MIN(silent - at, KV_BLOCK - 1), KV_BLOCK * STEP_REUSE_PAGES - step->n_tokens);
    uint32_t page;
    uint64_t serial;
    const uint32_t n = prefix_cache_common(&s->cache, &q->chain, q->tokens + at, most,
                                           s->step_serial, &page, &serial);
    if (n == 0 || (what == COPY_ALL_BUT_ONE && at + n < silent)) {
        return;
    }
    page_pool_touch(&s->cache.pool, page);
    q->source = page;
    q->source_serial = serial;
    q->pages[q->n_pages] = prefix_cache_take(&s->cache);
    q->n_reserved--;
    step->copies[step->n_copies++] = (StepCopy){.slot = q->admit.slot,
                                                .page_index = q->n_pages,
                                                .n_positions = n,
                                                .from = page,
                                                .to = q->pages[q->n_pages],
                                                .token0 = step->n_tokens};
    memcpy(step->tokens + step->n_tokens, q->tokens + at, sizeof(uint32_t) * n);
    step->n_tokens += n;
    q->n_pages++;
    q->n_scheduled += n;
    s->load.prefix_hit_tokens += n;
}

/* A chunk that is not the last ends with a page where it can, so that whole pages are shared,
 * unless that would halve it. */
static uint32_t chunk_of(const LeaderRequest *q, uint32_t budget)
{
    const uint32_t pending = leader_request_pending(q);
    if (pending <= budget) {
        return pending;
    }
    const uint32_t end = (q->n_scheduled + budget) / KV_BLOCK * KV_BLOCK;
    return end > q->n_scheduled + budget / 2 ? end - q->n_scheduled : budget;
}

static bool reads(const LeaderRequest *q)
{
    return q != NULL && !leader_request_decodes(q) && leader_request_pending(q) > 0;
}

/* Takes what the cache has before any row is chosen: a prompt that it has but for one row decodes
 * from then on (invariant 4). */
static void settle_prompts(Scheduler *s, Step *step)
{
    const uint32_t n_slots = s->o.limits.max_slots, first = s->prompt_turn;
    for (uint32_t i = 0; i < n_slots; i++) {
        LeaderRequest *q = s->slots[(first + i) % n_slots];
        if (reads(q)) {
            extend_reuse(s, q);
            if (announce_reuse(step, q)) {
                copy_beginning(s, step, q, COPY_ALL_BUT_ONE);
            }
        }
    }
}

/* Invariant 4. */
static void add_prompts(Scheduler *s, Step *step, uint32_t budget)
{
    const uint32_t n_slots = s->o.limits.max_slots, first = s->prompt_turn;
    bool turned = false;
    for (uint32_t i = 0; i < n_slots && budget > 0; i++) {
        LeaderRequest *q = s->slots[(first + i) % n_slots];
        if (!reads(q)) {
            continue;
        }
        extend_reuse(s, q); /* also what this step's rows give */
        if (announce_reuse(step, q)) {
            copy_beginning(s, step, q, COPY_ANY);
            const uint32_t n = within_logits(s, q, chunk_of(q, budget));
            if (n > 0) {
                add_rows(s, step, q, n);
                budget -= n;
            }
        }
        if (!turned) {
            s->prompt_turn = (first + i + 1) % n_slots;
            turned = true;
        }
    }
}

/* Invariant 5. */
static uint32_t pipeline_chunk(const Scheduler *s)
{
    const uint32_t behind = s->o.n_stages - 1;
    uint64_t n = 0; /* also what is read of them already: the steps stay alike */
    for (uint32_t i = 0; i < s->o.limits.max_slots; i++) {
        const LeaderRequest *q = s->slots[i];
        n += reads(q) ? q->n_known - q->n_reusable : 0;
    }
    const uint64_t pages = (n / (PIPELINE_CHUNKS * behind) + KV_BLOCK / 2) / KV_BLOCK,
                   rows = n < PIPELINE_FEW_PAGES * KV_BLOCK * behind ? KV_BLOCK / 2
                                                                     : MAX(pages, 1) * KV_BLOCK;
    return (uint32_t)MIN(rows, s->o.limits.max_rows);
}

static uint32_t prompt_budget(const Scheduler *s, const Step *step, uint32_t n_decoding)
{
    const uint32_t left = s->o.limits.max_rows - step->n_rows;
    if (n_decoding > 0) {
        const uint32_t steps = s->o.n_stages == 1 ? 1 : s->o.steps_in_flight;
        return MIN(left, step_pace_chunk(&s->pace, steps));
    }
    return s->o.n_stages == 1 ? left : MIN(left, pipeline_chunk(s));
}

bool scheduler_next(Scheduler *s, Step *step, uint32_t decoding_steps, uint32_t *n_decoding_rows)
{
    step_clear(step);
    find_pages(s);
    step->n_releases = s->n_releases;
    memcpy(step->releases, s->releases, sizeof(uint32_t) * s->n_releases);
    s->step_serial = s->cache.next_serial;
    s->logits_left = logits_rows(LOGITS_STEP_BYTES, s->o.limits.vocab_size);
    admit_waiting(s, step); /* slots of this step's releases are given out from the next step on */
    settle_prompts(s, step);
    const uint32_t n_decoding = count_decoding(s);
    add_decoding(s, step, n_decoding, decoding_steps);
    *n_decoding_rows = step->n_rows;
    add_prompts(s, step, prompt_budget(s, step, n_decoding));
    for (uint32_t i = 0; i < step->n_releases; i++) {
        s->slot_taken[step->releases[i]] = false;
    }
    s->n_releases = 0;
    return step->n_rows > 0 || step->n_releases > 0 || step->n_admits > 0 || step->n_reuses > 0 ||
           step->n_copies > 0;
}

void scheduler_note(Scheduler *s, uint32_t n_rows, uint32_t n_decoding, int64_t built_us,
                    int64_t now_us)
{
    step_pace_note(&s->pace, n_decoding, n_rows - n_decoding, built_us, now_us);
    unsigned at = 0;
    while (at < STEP_ROWS_BOUNDS && n_rows > step_rows_bounds[at]) {
        at++;
    }
    s->load.steps_by_rows[at] += n_rows > 0;
    s->load.step_rows += n_rows;
}

void scheduler_load(const Scheduler *s, EngineLoad *out)
{
    const PagePool *pool = &s->cache.pool;
    *out = s->load;
    out->running = s->n_running;
    out->waiting = fair_queue_length(s->waiting);
    out->slots = s->o.limits.max_slots;
    out->kv_pages_total = pool->n_pages;
    out->kv_pages_cached = pool->n_idle;
    out->kv_pages_used = pool->n_pages - pool->n_free - pool->n_idle;
}
