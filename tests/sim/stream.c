#include "tests/sim/stream.h"

#include "proto/base/error.h"

#include <string.h>

#define RETRY_US 300000
#define DEADLINE_SLACK_US 200000 /* messages on their way */
#define MESSAGE_US 50000         /* the last token may have taken so much longer than the error */

static void stream_submit(void *user);

static const ReferenceRequest *reference_of(const Stream *s)
{
    return &s->history->whole->foundation->requests[s->plan.request];
}

static Loop *loop_of(const Stream *s)
{
    return s->history->whole->director;
}

static int64_t now_of(const Stream *s)
{
    return sim_world_now_us(s->history->whole->world);
}

bool stream_is_over(const Stream *s)
{
    return s->state == STREAM_DONE || s->state == STREAM_CANCELLED;
}

/* ---- what the client hears ------------------------------------------------------------------- */

/* What a sequence shows, and from which position on. */
static const ReferenceSequence *expected(const Stream *s, uint32_t choice)
{
    const ReferenceRequest *r = reference_of(s);
    return s->plan.score ? &r->scores : &r->choices[choice];
}

static uint32_t first_position(const Stream *s)
{
    return s->plan.score ? 1 : reference_of(s)->n_prompt;
}

static uint32_t n_got(const Stream *s)
{
    uint32_t n = 0;
    for (uint32_t c = 0; c < s->plan.n_choices; c++) {
        n += s->n_got[c];
    }
    return n;
}

static void on_delta(Stream *s, const Weft__V1__RunDelta *delta)
{
    const uint32_t c = delta->choice;
    if (delta->n_ids == 0) {
        return; /* text that had waited for the rest of a character */
    }
    const uint32_t got = c < s->plan.n_choices ? s->n_got[c] : 0;
    if (delta->n_ids != 1 || c >= s->plan.n_choices || delta->position != first_position(s) + got) {
        history_violate(s->history, "in order, once each",
                        "stream %u got %zu ids for position %u of sequence %u where %u was due",
                        s->index, delta->n_ids, delta->position, c, first_position(s) + got);
        return;
    }
    const ReferenceSequence *r = expected(s, c);
    if (got >= s->plan.n_tokens || delta->ids[0] != r->ids[got] || delta->row_hash.len != 16 ||
        memcmp(delta->row_hash.data, r->hashes[got], 16) != 0) {
        history_violate(s->history, "the same tokens",
                        "stream %u: token %u of %u of sequence %u is %u, the undisturbed run's is "
                        "%u",
                        s->index, got, s->plan.n_tokens, c, delta->ids[0],
                        got < r->n ? r->ids[got] : 0);
    }
    if (got > 0) {
        s->stall_us = MAX(s->stall_us, now_of(s) - s->token_us[c]);
    }
    s->n_got[c]++;
    s->token_us[c] = s->newest_us = now_of(s);
    s->history->n_tokens++;
}

static void on_run_done(Stream *s, const Weft__V1__RunDone *done)
{
    uint8_t digest[16];
    reference_digest(expected(s, 0), s->plan.n_choices, s->plan.n_tokens, digest);
    const uint32_t n = s->plan.n_choices * s->plan.n_tokens;
    const uint32_t told = s->plan.score ? done->tokens_scored : done->tokens;
    if (n_got(s) != n || told != n || strcmp(done->finish_reason, "length") != 0) {
        history_violate(s->history, "no token lost",
                        "stream %u ended as %s after %u of %u tokens, %u told", s->index,
                        done->finish_reason, n_got(s), n, told);
    } else if (done->digest.len != 16 || memcmp(done->digest.data, digest, 16) != 0) {
        history_violate(s->history, "the same tokens", "stream %u has another digest", s->index);
    }
    s->state = STREAM_DONE;
}

static void on_event(const ProtobufCMessage *message, void *user)
{
    Stream *s = user;
    const Weft__V1__RunEvent *event = (const Weft__V1__RunEvent *)message;
    if (s->state != STREAM_OPEN) {
        return;
    }
    s->heard_us = now_of(s);
    switch (event->event_case) {
    case WEFT__V1__RUN_EVENT__EVENT_STARTED:
        g_strlcpy(s->run, event->started->request, sizeof s->run);
        break;
    case WEFT__V1__RUN_EVENT__EVENT_DELTA:
        on_delta(s, event->delta);
        break;
    case WEFT__V1__RUN_EVENT__EVENT_DONE:
        on_run_done(s, event->done);
        break;
    default:
        break;
    }
}

/* Before it has a replica a request may be refused for want of workers, or because those that were
 * to load died again and again. */
static bool may_be_refused(const GError *error)
{
    switch (error->code) {
    case WEFT_ERROR_WORKER_LOST:
        return strstr(error->message, "worker w") != NULL;
    case WEFT_ERROR_IO:
        return strstr(error->message, "simulated disk failure") != NULL;
    case WEFT_ERROR_UNREACHABLE:
    case WEFT_ERROR_PEER_UNREACHABLE:
    case WEFT_ERROR_IMPOSSIBLE:
    case WEFT_ERROR_NOT_READY:
    case WEFT_ERROR_STALE:
        return true;
    default:
        return false;
    }
}

/* Afterwards nothing ends it but the coordinator's death, or patience that ran out. */
static bool may_be_told(const Stream *s, const GError *error)
{
    const Whole *w = s->history->whole;
    if (w->coordinator_died_us >= s->begun_us &&
        g_error_matches(error, WEFT_ERROR, WEFT_ERROR_UNREACHABLE)) {
        return true;
    }
    const int64_t waited_us = now_of(s) - MAX(s->begun_us, s->newest_us) + MESSAGE_US;
    return (s->run[0] == '\0' || waited_us >= (int64_t)w->recovery_wait_ms * 1000) &&
           may_be_refused(error);
}

/* Not before its time, nor (when the coordinator was there all the while) much later. */
static void on_deadline(Stream *s)
{
    const int64_t took_us = now_of(s) - s->begun_us, given_us = (int64_t)s->plan.deadline_ms * 1000;
    const Whole *w = s->history->whole;
    const bool there = w->coordinator_up_us < s->begun_us &&
                       w->coordinator_frozen_us < s->begun_us && !w->coordinator_frozen;
    if (given_us == 0 || took_us < given_us || (there && took_us > given_us + DEADLINE_SLACK_US)) {
        history_violate(s->history, "deadlines hold",
                        "stream %u was told after %.3f s that its deadline of %u ms passed",
                        s->index, (double)took_us / 1e6, s->plan.deadline_ms);
    }
    s->state = STREAM_DONE;
}

static void on_done(const GError *error, void *user)
{
    Stream *s = user;
    s->call = NULL;
    s->ended_us = s->heard_us = now_of(s);
    if (s->state != STREAM_OPEN) {
        return;
    }
    if (!error) {
        history_violate(s->history, "every request is answered",
                        "stream %u was ended without an answer", s->index);
        s->state = STREAM_DONE;
        return;
    }
    log_info(&s->history->whole->log, "stream %u after %u tokens: error %d: %s", s->index, n_got(s),
             error->code, error->message);
    if (error->code == WEFT_ERROR_DEADLINE) {
        on_deadline(s);
        return;
    }
    if (!may_be_told(s, error)) {
        history_violate(s->history, "a stream goes on",
                        "stream %u was told after %u tokens (%d): %s", s->index, n_got(s),
                        error->code, error->message);
    }
    g_free(s->last_error);
    s->last_error = g_strdup(error->message);
    s->state = STREAM_WAITING;
    s->timer = loop_timer_start(loop_of(s), RETRY_US, stream_submit, s);
}

/* ---- what it does ---------------------------------------------------------------------------- */

static void stream_cancel(void *user)
{
    Stream *s = user;
    s->cancel = NULL;
    if (stream_is_over(s)) {
        return;
    }
    loop_timer_cancel(loop_of(s), s->timer);
    s->timer = NULL;
    s->state = STREAM_CANCELLED;
    s->ended_us = now_of(s);
    if (s->call) {
        rpc_client_cancel(s->call);
    }
}

static void stream_submit(void *user)
{
    Stream *s = user;
    const ReferenceRequest *r = reference_of(s);
    s->timer = NULL;
    s->state = STREAM_OPEN;
    memset(s->n_got, 0, sizeof s->n_got);
    s->run[0] = '\0';
    s->n_attempts++;
    s->heard_us = s->begun_us = now_of(s);
    Weft__V1__Layout layout = WEFT__V1__LAYOUT__INIT;
    layout.dp = s->plan.dp;
    layout.pp = s->plan.pp;
    layout.tp = s->plan.tp;
    Weft__V1__RunRequest request = WEFT__V1__RUN_REQUEST__INIT;
    request.model = (char *)s->history->whole->foundation->model;
    request.kind = s->plan.score ? WEFT__V1__REQUEST_KIND__SCORE : WEFT__V1__REQUEST_KIND__GENERATE;
    request.prompt_ids = (uint32_t *)(s->plan.score ? r->text : r->prompt);
    request.n_prompt_ids = s->plan.score ? r->n_text : r->n_prompt;
    request.max_tokens = s->plan.score ? 0 : s->plan.n_tokens;
    request.streams = s->plan.n_choices > 1 ? s->plan.n_choices : 0;
    request.sampler = (Weft__V1__Sampler *)&r->sampler;
    request.seed_given = true;
    request.ignore_end = true;
    request.deadline_ms = s->plan.deadline_ms;
    request.layout = &layout;
    const RpcCallbacks callbacks = {.on_message = on_event, .on_done = on_done};
    s->call = rpc_call_start(s->history->whole->client, &weft__v1__serve__descriptor, "Run",
                             &request.base, 0, true, callbacks, s);
}

void stream_begin(Stream *s, History *history, unsigned index, const StreamPlan *plan)
{
    *s = (Stream){.history = history, .plan = *plan, .index = index, .state = STREAM_WAITING};
    if (plan->score) {
        s->plan.n_tokens = reference_of(s)->scores.n;
    }
    s->timer = loop_timer_start(loop_of(s), plan->begin_us, stream_submit, s);
    if (plan->cancel_us > 0) {
        s->cancel =
            loop_timer_start(loop_of(s), plan->begin_us + plan->cancel_us, stream_cancel, s);
    }
}

void stream_clear(Stream *s)
{
    loop_timer_cancel(loop_of(s), s->timer);
    loop_timer_cancel(loop_of(s), s->cancel);
    s->timer = s->cancel = NULL;
    if (s->call) {
        s->state = STREAM_CANCELLED;
        rpc_client_cancel(s->call);
    }
    g_free(s->last_error);
    s->last_error = NULL;
}
