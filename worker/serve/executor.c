#include "worker/serve/executor.h"

#include "kernels/parallel.h"
#include "proto/base/bytes.h"
#include "proto/base/failpoint.h"
#include "worker/serve/trace.h"

#include <string.h>

/* One tensor rank's sample messages, in order of arrival: a fixed ring, buffers keep their
 * capacity. */
enum { SAMPLE_RING = 8 };
typedef struct SampleQueue {
    struct {
        uint32_t step;
        GByteArray *bytes;
    } ring[SAMPLE_RING];
    uint32_t head, tail; /* head = next to take */
    bool waiting_done;   /* set when the awaited message is there */
    bool overflow;
} SampleQueue;

struct Executor {
    ExecutorOptions o;
    Sequences sequences;
    Sampling *sampling;   /* last stage */
    SampleQueue *samples; /* drawing rank: by tensor rank; other ranks of the last stage: [0] is the
                             verdict from the drawing rank */
    const GByteArray **parts;
    GByteArray *own_part;
    uint8_t *wire; /* encoded step */
    GByteArray *token_message;
    RowResult *decoded; /* leader: results from afar */
    Trace *trace;
    const GByteArray *traced; /* of the last step, where this rank leads and draws */
    int blamed;
    const char *operation;
};

Executor *executor_new(const ExecutorOptions *options)
{
    Executor *e = g_new0(Executor, 1);
    const Position *p = &options->position;
    e->o = *options;
    e->blamed = -1;
    sequences_init(&e->sequences, &options->limits);
    const Shard *shard = options->stage->o.shard;
    e->trace = trace_new(shard->layer_first, shard->n_layers, p->stage == 0, p->tp);
    e->wire = g_malloc(step_wire_limit(&options->limits));
    e->token_message = g_byte_array_new();
    if (position_leads(p)) {
        e->decoded = g_new0(RowResult, options->limits.max_rows);
    }
    if (position_is_last(p)) {
        e->sampling = sampling_new(options->stage, &e->sequences);
        e->samples = g_new0(SampleQueue, p->tp);
        e->parts = g_new0(const GByteArray *, p->tp);
        e->own_part = g_byte_array_new();
        for (uint32_t r = 0; r < p->tp; r++) {
            for (int i = 0; i < SAMPLE_RING; i++) {
                e->samples[r].ring[i].bytes = g_byte_array_new();
            }
        }
    }
    return e;
}

void executor_free(Executor *e)
{
    if (e == NULL) {
        return;
    }
    for (uint32_t r = 0; e->samples != NULL && r < e->o.position.tp; r++) {
        for (int i = 0; i < SAMPLE_RING; i++) {
            g_byte_array_unref(e->samples[r].ring[i].bytes);
        }
    }
    sampling_free(e->sampling);
    trace_free(e->trace);
    sequences_clear(&e->sequences);
    g_free(e->samples);
    g_free(e->parts);
    g_clear_pointer(&e->own_part, g_byte_array_unref);
    g_byte_array_unref(e->token_message);
    g_free(e->wire);
    g_free(e->decoded);
    g_free(e);
}

int executor_blames(const Executor *e, const char **operation)
{
    *operation = e->operation;
    return e->blamed;
}

static ExecutorStatus blame(Executor *e, uint32_t global_rank, const char *operation,
                            ExecutorStatus status)
{
    e->blamed = (int)global_rank;
    e->operation = operation;
    return status;
}

/* The link has no room: whether to try again, as long as its peer may make some. *since_us: since
 * when, 0 at first. */
static bool try_again(Executor *e, LinkStatus status, uint32_t to, const char *operation,
                      int64_t *since_us)
{
    if (status != LINK_AGAIN) {
        return false;
    }
    *since_us = *since_us == 0 ? g_get_monotonic_time() : *since_us;
    return e->o.wait_for_room(*since_us, to, operation, e->o.user);
}

static ExecutorStatus sent(Executor *e, LinkStatus status, uint32_t to, const char *operation)
{
    return status == LINK_OK ? EXECUTOR_OK : blame(e, to, operation, EXECUTOR_LINK);
}

static ExecutorStatus send_flagged(Executor *e, uint32_t to, LinkOp op, uint16_t flags,
                                   uint32_t step, const LinkPart *parts, unsigned n,
                                   const char *operation)
{
    Link *link = e->o.links[to];
    LinkStatus status;
    int64_t since_us = 0;
    g_assert(link != NULL);
    do {
        status = link_send_try(link, op, flags, step, parts, n);
    } while (try_again(e, status, to, operation, &since_us));
    return sent(e, status, to, operation);
}

static ExecutorStatus send_to(Executor *e, uint32_t to, LinkOp op, uint32_t step,
                              const LinkPart *parts, unsigned n, const char *operation)
{
    return send_flagged(e, to, op, 0, step, parts, n, operation);
}

/* ---- handing on ---- */

static ExecutorStatus send_followers(Executor *e, const Step *step, size_t wire_size)
{
    const Position *p = &e->o.position;
    const LinkPart part = {e->wire, wire_size};
    ExecutorStatus status = EXECUTOR_OK;
    for (uint32_t j = 1; j < p->tp && status == EXECUTOR_OK; j++) {
        status = send_to(e, p->base + j, LINK_OP_STEP, step->number, &part, 1, "sending a step");
    }
    return status;
}

static size_t x_bytes(const Executor *e, const Step *step)
{
    return sizeof(float) * step->n_rows * (size_t)e->o.stage->o.spec->width;
}

#define SENDING_X "sending activations"

/* The step, and x behind it by itself. */
static ExecutorStatus send_apart(Executor *e, uint32_t to, const Step *step, size_t wire_size)
{
    const LinkPart part = {e->wire, wire_size};
    const ExecutorStatus head =
        send_flagged(e, to, LINK_OP_STEP, DIRECT_STEP_APART, step->number, &part, 1, SENDING_X);
    LinkStatus status;
    int64_t since_us = 0;
    if (head != EXECUTOR_OK) {
        return head;
    }
    do {
        status = direct_send(e->o.direct, to, step->number, x_bytes(e, step));
    } while (try_again(e, status, to, SENDING_X, &since_us));
    return sent(e, status, to, SENDING_X);
}

static ExecutorStatus send_next_stage(Executor *e, const Step *step, size_t wire_size)
{
    const Position *p = &e->o.position;
    const size_t size = x_bytes(e, step);
    ExecutorStatus status = EXECUTOR_OK;
    for (uint32_t j = p->rank; j < p->tp_next && status == EXECUTOR_OK; j += p->tp) {
        const uint32_t to = p->base_next + j;
        const LinkPart parts[2] = {{e->wire, wire_size}, {e->o.stage->x, size}};
        status = direct_serves(e->o.direct, to, size)
                     ? send_apart(e, to, step, wire_size)
                     : send_to(e, to, LINK_OP_STEP, step->number, parts, 2, SENDING_X);
    }
    return status;
}

/* How x of this step leaves: by itself, and whether any of it through the host. */
static void plan_leaving(const Executor *e, const Step *step, StageRun *run)
{
    const Position *p = &e->o.position;
    run->x_stays = true;
    for (uint32_t j = p->rank; j < p->tp_next; j += p->tp) {
        const bool direct = direct_serves(e->o.direct, p->base_next + j, x_bytes(e, step));
        run->x_sum |= direct;
        run->x_stays &= direct;
    }
}

/* Nothing may write x while it is still on its way from the step before. */
static ExecutorStatus wait_until_left(Executor *e)
{
    uint32_t to;
    const bool *done;
    while (e->o.direct != NULL && (done = direct_sending(e->o.direct, &to)) != NULL) {
        if (!e->o.wait(done, e->o.flight_deadline_us, to, "taking activations over", e->o.user)) {
            return blame(e, to, "taking activations over", EXECUTOR_LINK);
        }
    }
    return EXECUTOR_OK;
}

/* x by itself, into the device. What was spoilt counts as not come. */
static ExecutorStatus take_apart(Executor *e, const Step *step)
{
    uint32_t from;
    DirectTaken taken = DIRECT_SPOILT;
    const int64_t end = g_get_monotonic_time() + e->o.deadline_us;
    while (taken == DIRECT_SPOILT) {
        const bool *done = direct_coming(e->o.direct, &from);
        const int64_t left = end - g_get_monotonic_time();
        if (!*done && !e->o.wait(done, left, from, "activations", e->o.user)) {
            return blame(e, from, "activations", EXECUTOR_LINK);
        }
        taken = direct_take(e->o.direct, x_bytes(e, step), e->o.deadline_us);
    }
    return taken == DIRECT_TAKEN    ? EXECUTOR_OK
           : taken == DIRECT_FAILED ? EXECUTOR_DEVICE
                                    : blame(e, from, "activations", EXECUTOR_LINK);
}

/* ---- results to the leader ---- */

static void append(GByteArray *out, const void *data, size_t size)
{
    g_byte_array_append(out, data, (guint)size);
}

static void encode_results(Executor *e, const RowResult *results, uint32_t n)
{
    GByteArray *out = e->token_message;
    g_byte_array_set_size(out, 0);
    append(out, &n, 4);
    for (uint32_t i = 0; i < n; i++) {
        const RowResult *r = &results[i];
        const uint32_t logits = r->logits != NULL ? e->o.limits.vocab_size : 0;
        append(out, &r->slot, 4);
        append(out, &r->uid, 8);
        append(out, &r->position, 4);
        append(out, &r->id, 4);
        append(out, &r->logprob, 4);
        append(out, r->row_hash, 16);
        append(out, &r->failed, 4);
        append(out, &r->n_top, 4);
        append(out, &logits, 4);
        append(out, r->top_ids, 4 * (size_t)r->n_top);
        append(out, r->top_logprobs, 4 * (size_t)r->n_top);
        append(out, r->logits, 4 * (size_t)logits);
    }
}

bool executor_decode_results(Executor *e, const void *data, size_t size, const RowResult **results,
                             uint32_t *n_results)
{
    ByteReader r = byte_reader(data, size);
    const uint32_t n = byte_reader_u32le(&r);
    if (n > e->o.limits.max_rows) {
        return false;
    }
    for (uint32_t i = 0; i < n && !r.failed; i++) {
        RowResult *row = &e->decoded[i];
        row->slot = byte_reader_u32le(&r);
        row->uid = byte_reader_u64le(&r);
        row->position = byte_reader_u32le(&r);
        row->id = byte_reader_u32le(&r);
        row->logprob = byte_reader_f32le(&r);
        const uint8_t *hash = byte_reader_take(&r, 16);
        if (hash != NULL) {
            memcpy(row->row_hash, hash, 16);
        }
        row->failed = byte_reader_u32le(&r);
        row->n_top = byte_reader_u32le(&r);
        const uint32_t logits = byte_reader_u32le(&r);
        if (row->id >= e->o.limits.vocab_size ||
            (logits != 0 && logits != e->o.limits.vocab_size)) {
            return false;
        }
        row->top_ids = (const uint32_t *)byte_reader_take(&r, 4 * (size_t)row->n_top);
        row->top_logprobs = (const float *)byte_reader_take(&r, 4 * (size_t)row->n_top);
        row->logits = logits != 0 ? (const float *)byte_reader_take(&r, 4 * (size_t)logits) : NULL;
    }
    *results = e->decoded;
    *n_results = n;
    return !r.failed;
}

/* ---- sampling over the ranks of the last stage ---- */

void executor_receive_sample(Executor *e, uint32_t from, uint32_t step, const void *data,
                             size_t size)
{
    if (e->samples == NULL || from >= e->o.position.tp) {
        return;
    }
    SampleQueue *q = &e->samples[from];
    if (q->tail - q->head == SAMPLE_RING) {
        q->overflow =
            true; /* more steps in flight than the leader allows: the wait for it will expire */
        return;
    }
    GByteArray *bytes = q->ring[q->tail % SAMPLE_RING].bytes;
    g_byte_array_set_size(bytes, 0);
    append(bytes, data, size);
    q->ring[q->tail % SAMPLE_RING].step = step;
    q->tail++;
    q->waiting_done = true;
}

/* The next message from a tensor rank, for this step; NULL when the wait gave up. Valid until the
 * next take from that rank. */
static const GByteArray *take_sample(Executor *e, uint32_t from, uint32_t step,
                                     const char *operation)
{
    SampleQueue *q = &e->samples[from];
    if (q->head == q->tail) {
        q->waiting_done = false;
        if (!e->o.wait(&q->waiting_done, e->o.deadline_us, e->o.position.base + from, operation,
                       e->o.user)) {
            return NULL;
        }
    }
    const uint32_t i = q->head++ % SAMPLE_RING;
    return q->ring[i].step == step && !q->overflow ? q->ring[i].bytes : NULL;
}

static ExecutorStatus send_verdict(Executor *e, const Step *step, uint32_t n_candidates)
{
    const LinkPart part = {&n_candidates, sizeof n_candidates};
    ExecutorStatus status = EXECUTOR_OK;
    for (uint32_t r = 1; r < e->o.position.tp && status == EXECUTOR_OK; r++) {
        status = send_to(e, e->o.position.base + r, LINK_OP_SAMPLE, step->number, &part, 1,
                         "sending the sampling verdict");
    }
    return status;
}

static ExecutorStatus draw(Executor *e, const Step *step, const RowResult **results,
                           uint32_t *n_results)
{
    const Position *p = &e->o.position;
    uint32_t n_candidates = sampling_first_candidates(e->sampling, step);
    const bool verdicts = p->tp > 1 && sampling_may_repeat(e->sampling, step);
    for (;;) {
        g_byte_array_set_size(e->own_part, 0);
        sampling_part(e->sampling, step, n_candidates, e->own_part);
        if (e->o.stage->failure != NULL) {
            return EXECUTOR_DEVICE;
        }
        e->parts[0] = e->own_part;
        for (uint32_t r = 1; r < p->tp; r++) {
            e->parts[r] = take_sample(e, r, step->number, "vocabulary shard of a step");
            if (e->parts[r] == NULL) {
                return blame(e, p->base + r, "vocabulary shard of a step", EXECUTOR_SAMPLE_WAIT);
            }
        }
        const SamplingMerge merge =
            sampling_merge(e->sampling, step, e->parts, p->tp, results, n_results);
        if (merge == SAMPLING_MALFORMED) {
            return blame(e, p->base, "merging vocabulary shards", EXECUTOR_SAMPLE_WAIT);
        }
        const bool more = merge == SAMPLING_MORE;
        n_candidates *= 8;
        if (verdicts) {
            const ExecutorStatus status = send_verdict(e, step, more ? n_candidates : 0);
            if (status != EXECUTOR_OK) {
                return status;
            }
        }
        if (!more) {
            return EXECUTOR_OK;
        }
    }
}

static ExecutorStatus contribute(Executor *e, const Step *step)
{
    const Position *p = &e->o.position;
    uint32_t n_candidates = sampling_first_candidates(e->sampling, step);
    while (n_candidates != 0) {
        g_byte_array_set_size(e->own_part, 0);
        sampling_part(e->sampling, step, n_candidates, e->own_part);
        if (e->o.stage->failure != NULL) {
            return EXECUTOR_DEVICE;
        }
        const LinkPart part = {e->own_part->data, e->own_part->len};
        const ExecutorStatus status = send_to(e, p->base, LINK_OP_SAMPLE, step->number, &part, 1,
                                              "sending a vocabulary shard");
        if (status != EXECUTOR_OK) {
            return status;
        }
        if (!sampling_may_repeat(e->sampling, step)) {
            return EXECUTOR_OK;
        }
        const GByteArray *verdict = take_sample(e, 0, step->number, "sampling verdict");
        if (verdict == NULL || verdict->len != sizeof n_candidates) {
            return blame(e, p->base, "sampling verdict", EXECUTOR_SAMPLE_WAIT);
        }
        memcpy(&n_candidates, verdict->data, sizeof n_candidates);
    }
    return EXECUTOR_OK;
}

static bool has_outputs(const Step *step)
{
    for (uint32_t r = 0; r < step->n_rows; r++) {
        if (step->rows[r].output != STEP_OUTPUT_NONE) {
            return true;
        }
    }
    return false;
}

static ExecutorStatus finish_step(Executor *e, const Step *step, const RowResult **results,
                                  uint32_t *n_results)
{
    const Position *p = &e->o.position;
    const bool outputs = has_outputs(step);
    if (p->rank != 0) {
        return outputs ? contribute(e, step) : EXECUTOR_OK;
    }
    if (outputs) {
        const ExecutorStatus status = draw(e, step, results, n_results);
        if (status != EXECUTOR_OK) {
            return status;
        }
    }
    if (position_leads(p)) {
        return EXECUTOR_OK;
    }
    encode_results(e, *results, *n_results);
    const LinkPart part = {e->token_message->data, e->token_message->len};
    return send_to(e, 0, LINK_OP_TOKEN, step->number, &part, 1, "sending tokens");
}

/* ---- a step ---- */

static ExecutorStatus blame_group(Executor *e)
{
    if (e->o.stage->failure != NULL) {
        return EXECUTOR_DEVICE;
    }
    int64_t since;
    const char *operation = "collective";
    const int rank = group_waits_for(e->o.stage->group, &operation, &since);
    e->operation = operation != NULL ? operation : "a step on the device";
    e->blamed = rank < 0 ? -1 : (int)e->o.position.base + rank;
    return EXECUTOR_GROUP;
}

/* ---- tracing ---- */

const GByteArray *executor_trace(const Executor *e)
{
    return e->traced;
}

void executor_receive_trace(Executor *e, uint32_t step, const void *data, size_t size)
{
    trace_receive(e->trace, step, data, size);
}

/* The stage's sites are complete: compared by its ranks, then sent on by rank 0. */
static ExecutorStatus hand_on_trace(Executor *e, const Step *step)
{
    const Position *p = &e->o.position;
    const GroupWait wait = {.step = step->number,
                            .site = GROUP_SITE_LIMIT - 1,
                            .deadline_us = g_get_monotonic_time() + e->o.deadline_us,
                            .operation = "comparing a trace"};
    if (e->o.stage->group != NULL &&
        trace_compare(e->trace, e->o.stage->group, &wait) != GROUP_OK) {
        return blame_group(e);
    }
    if (p->rank != 0) {
        return EXECUTOR_OK;
    }
    const GByteArray *message = trace_message(e->trace, step, &e->sequences);
    if (message == NULL) {
        return blame(e, p->base_previous, "trace of a step", EXECUTOR_TRACE);
    }
    if (position_is_last(p) && position_leads(p)) {
        e->traced = message;
        return EXECUTOR_OK;
    }
    const uint32_t to = position_is_last(p) ? 0 : p->base_next;
    const LinkPart part = {message->data, message->len};
    return send_to(e, to, LINK_OP_TRACE, step->number, &part, 1, "sending a trace");
}

static int64_t flip_layer(const Executor *e)
{
    int64_t layer, rank;
    if (!failpoint("engine-flip", &layer)) {
        return -1;
    }
    return failpoint("engine-flip-rank", &rank) && rank != e->o.position.base + e->o.position.rank
               ? -1
               : layer;
}

static void take_part(void *user, unsigned thread, unsigned n_threads)
{
    (void)user;
    (void)thread;
    (void)n_threads;
}

/* A step without rows has no collective of its own, so that a rank could run ahead of the others of
 * its stage by any number of them, and its messages overflow their inboxes. Every compute thread
 * takes part: such steps are also how an idle replica shows that it would serve. */
static ExecutorStatus meet(Executor *e, const Step *step)
{
    uint8_t mine = 0, all[PLAN_RANKS_LIMIT];
    size_t sizes[PLAN_RANKS_LIMIT];
    void *out[PLAN_RANKS_LIMIT];
    const GroupWait wait = {.step = step->number,
                            .site = GROUP_SITE_LIMIT - 1,
                            .deadline_us = g_get_monotonic_time() + e->o.deadline_us,
                            .operation = "meeting at a step without rows"};
    for (uint32_t r = 0; r < e->o.position.tp; r++) {
        sizes[r] = sizeof mine;
        out[r] = &all[r];
    }
    pool_run(e->o.stage->o.pool, take_part, NULL);
    return e->o.stage->group == NULL ||
                   group_all_gather(e->o.stage->group, &wait, &mine, sizes, out) == GROUP_OK
               ? EXECUTOR_OK
               : blame_group(e);
}

/* x before the first layer: embedded, or from the stage before. */
static ExecutorStatus begin_x(Executor *e, const StageRun *run, const float *activations)
{
    Stage *stage = e->o.stage;
    const Step *step = run->step;
    const ExecutorStatus status = wait_until_left(e);
    if (status != EXECUTOR_OK) {
        return status;
    }
    if (run->x_here) {
        return take_apart(e, step);
    }
    if (e->o.position.stage > 0) {
        memcpy(stage->x, activations, x_bytes(e, step));
    } else if (stage_embed(stage, run) != GROUP_OK) {
        return blame_group(e);
    } else if (run->trace != NULL) {
        stage_trace_rows(run->trace, 0, stage->x, stage->o.spec->width, 0, step->n_rows);
    }
    return EXECUTOR_OK;
}

ExecutorStatus executor_run(Executor *e, const Step *step, const float *activations,
                            const RowResult **results, uint32_t *n_results)
{
    const Position *p = &e->o.position;
    const bool first = p->stage == 0, last = position_is_last(p);
    const size_t wire_size = position_leads(p) || !last ? step_encode(step, e->wire) : 0;
    ExecutorStatus status = EXECUTOR_OK;
    *results = NULL;
    *n_results = 0;
    if (position_leads(p)) {
        status = send_followers(e, step, wire_size);
    }
    if (status != EXECUTOR_OK) {
        return status;
    }
    sequences_apply(&e->sequences, step);
    e->traced = NULL;
    stage_copy_pages(e->o.stage, step);
    StageRun run = {.step = step,
                    .page_tables = e->sequences.page_tables,
                    .deadline_us = e->o.deadline_us,
                    .draws = last ? sampling_draws(e->sampling, step) : NULL,
                    .trace = trace_begin(e->trace, step, &e->sequences),
                    .x_here = !first && activations == NULL,
                    .flip_layer = flip_layer(e)};
    if (step->n_rows > 0) {
        plan_leaving(e, step, &run);
        status = begin_x(e, &run, activations);
        if (status != EXECUTOR_OK) {
            return status;
        }
        if (stage_layers(e->o.stage, &run) != GROUP_OK) {
            return blame_group(e);
        }
        status = run.trace != NULL ? hand_on_trace(e, step) : EXECUTOR_OK;
    } else {
        status = meet(e, step);
    }
    if (status != EXECUTOR_OK) {
        return status;
    }
    return last ? finish_step(e, step, results, n_results) : send_next_stage(e, step, wire_size);
}
