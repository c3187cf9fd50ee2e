/* One sequence on its replicas: the calls to their leaders, its tokens, their text.
 *
 * 1. A token is taken only for (request, choice, position) of this choice, in order of position,
 * and only from the call of the current epoch. One that comes again must be equal, id and row hash,
 * else the numerics are at fault and the run ends.
 * 2. done is set once: by the leader's last event, by a stop string, or with the run. What arrives
 * afterwards is ignored.
 * 3. Text goes out in complete characters; what may be the beginning of a stop string is held back.
 * 4. A call is made of an Attempt, which outlives its choice's interest in it: choice_detach()
 * parts the two, at the end of the epoch or of the run.
 * 5. After a loss the new leader is given all tokens that came but the last, and draws that one
 * again: so each recovery compares a row of the old layout with one of the new (invariant 1), and a
 * sequence that was just complete ends by the leader's own rule.
 * 6. A leader ends a call for which too much waits (FULL, behind what waits). That is no fault of a
 * worker: the rest is asked for in another call, if this one brought a token at all.
 */
#include "coordinator/gateway/requests/run.h"

#include "proto/base/error.h"
#include "proto/base/hash.h"

#include <string.h>

#define HASH_BYTES 16u

typedef struct Attempt {
    Run *run;
    Choice *choice; /* NULL: detached */
    RpcClientCall *call;
    bool advanced; /* a new token came */
} Attempt;

void choice_clear(Choice *c)
{
    if (c->ids != NULL) {
        g_array_unref(c->ids);
        g_array_unref(c->hashes);
    }
    if (c->detokenizer != NULL) {
        detokenizer_free(c->detokenizer);
    }
    if (c->stop != NULL) {
        stop_matcher_free(c->stop);
    }
}

static bool is_score(const Choice *c)
{
    return c->run->request->kind == WEFT__V1__REQUEST_KIND__SCORE;
}

/* ---- tokens ---- */

static uint32_t first_position(const Choice *c)
{
    return is_score(c) ? c->score_from : c->n_prompt;
}

uint64_t choice_tokens(const Choice *c)
{
    return c->done || c->ids == NULL ? 0 : is_score(c) ? c->n_prompt : c->n_prompt + c->ids->len;
}

/* The call ends by itself, or by the caller. */
static RpcClientCall *choice_part(Choice *c)
{
    Attempt *attempt = g_steal_pointer(&c->attempt);
    if (attempt == NULL) {
        return NULL;
    }
    attempt->choice = NULL;
    return attempt->call;
}

void choice_detach(Choice *c)
{
    RpcClientCall *call = choice_part(c);
    if (call != NULL) {
        rpc_client_cancel(call);
    }
}

/* True if the token is new; false if it was had before, or the run has ended. */
static bool choice_admit(Choice *c, const Weft__V1__TokenEvent *e)
{
    uint32_t first = first_position(c), expected = first + c->ids->len;
    g_autoptr(GError) error = NULL;
    if (strcmp(e->request, c->run->id) != 0 || e->choice != c->index || e->position < first ||
        e->position > expected || e->row_hash.len != HASH_BYTES) {
        g_set_error(
            &error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
            "worker %s, generate: token for position %u of choice %u where position %u was due",
            c->run->info.leader, e->position, e->choice, expected);
        run_fail(c->run, error);
        return false;
    }
    if (e->position == expected) {
        return true;
    }
    uint32_t i = e->position - first;
    bool equal =
        g_array_index(c->ids, uint32_t, i) == e->id &&
        memcmp(c->hashes->data + (size_t)i * HASH_BYTES, e->row_hash.data, HASH_BYTES) == 0;
    if (!equal) {
        g_set_error(&error, WEFT_ERROR, WEFT_ERROR_NUMERICS,
                    "position %u of request %s was computed twice with different results: run weft "
                    "verify; a worker computes wrongly",
                    e->position, c->run->id);
        run_fail(c->run, error);
    }
    return false;
}

/* The text that became complete; true if a stop string ended it. */
static bool choice_text(Choice *c, uint32_t id, GString *out)
{
    if (c->detokenizer == NULL) {
        return false;
    }
    if (c->stop == NULL) {
        detokenizer_push(c->detokenizer, id, out);
        return false;
    }
    g_autoptr(GString) piece = g_string_new(NULL);
    detokenizer_push(c->detokenizer, id, piece);
    return stop_matcher_push(c->stop, piece->str, piece->len, out);
}

/* What was held back, at the end of the text. */
static void choice_rest(Choice *c, GString *out)
{
    if (c->detokenizer == NULL) {
        return;
    }
    g_autoptr(GString) piece = g_string_new(NULL);
    detokenizer_finish(c->detokenizer, piece);
    if (c->stop == NULL || !stop_matcher_push(c->stop, piece->str, piece->len, out)) {
        g_string_append(out, c->stop == NULL ? piece->str : "");
        if (c->stop != NULL) {
            stop_matcher_finish(c->stop, out);
        }
    }
}

/* What the leader says of the best ids at a position, with their texts: borrowed from the event and
 * the tokenizer. Returns how many. */
static size_t choice_top(const Choice *c, const Weft__V1__TokenEvent *e,
                         Weft__V1__TopLogprob top[REQUEST_TOP_LOGPROBS_LIMIT],
                         Weft__V1__TopLogprob *pointers[REQUEST_TOP_LOGPROBS_LIMIT])
{
    const Tokenizer *t = c->run->model->tokenizer;
    size_t n = MIN(e->n_top, c->run->request->top_logprobs);
    for (size_t i = 0; i < n; i++) {
        top[i] = *e->top[i];
        pointers[i] = &top[i];
        top[i].text = (ProtobufCBinaryData){0, NULL};
        if (t != NULL) {
            top[i].text.data = (uint8_t *)tokenizer_piece(t, top[i].id, true, &top[i].text.len);
        }
    }
    return n;
}

static bool choice_send(Choice *c, const char *text,
                        const Weft__V1__TokenEvent *e /* NULL: text alone */)
{
    Weft__V1__RunDelta delta = WEFT__V1__RUN_DELTA__INIT;
    delta.text = (char *)text;
    delta.choice = c->index;
    Weft__V1__TopLogprob top[REQUEST_TOP_LOGPROBS_LIMIT], *pointers[REQUEST_TOP_LOGPROBS_LIMIT];
    uint32_t id = 0;
    float logprob = 0;
    if (e != NULL) {
        id = e->id;
        logprob = e->logprob;
        delta.ids = &id;
        delta.n_ids = 1;
        delta.logprobs = &logprob;
        delta.n_logprobs = 1;
        delta.position = e->position;
        delta.row_hash = e->row_hash;
        delta.logits = e->logits;
        delta.window = is_score(c) ? c->index / c->run->encoded.n_pieces : 0;
        delta.trace = e->trace;
        delta.top = pointers;
        delta.n_top = choice_top(c, e, top, pointers);
    }
    Weft__V1__RunEvent event = WEFT__V1__RUN_EVENT__INIT;
    event.event_case = WEFT__V1__RUN_EVENT__EVENT_DELTA;
    event.delta = &delta;
    return run_send(c->run, &event);
}

static void choice_finish(Choice *c, const char *reason)
{
    choice_detach(c);
    c->done = true;
    c->finish_reason = reason;
    run_choice_done(c);
}

static void choice_take(Choice *c, const Weft__V1__TokenEvent *e)
{
    int64_t now = loop_now_us(c->run->owner->options.loop);
    c->first_us = c->first_us != 0 ? c->first_us : now;
    c->last_us = now;
    run_advanced(c->run, now);
    g_array_append_val(c->ids, e->id);
    g_array_append_vals(c->hashes, e->row_hash.data, HASH_BYTES);
    c->nll -= (double)e->logprob;
    if (is_score(c)) {
        if (c->run->request->score_window == 0 || c->run->request->want_logits) {
            choice_send(c, "", e);
        }
        return;
    }
    g_autoptr(GString) text = g_string_new(NULL);
    bool stopped = choice_text(c, e->id, text);
    if (choice_send(c, text->str, e) && stopped) {
        choice_finish(c, "stop");
    }
}

/* NULL: the sequence has no result. */
static const char *static_reason(const char *reason)
{
    return strcmp(reason, "stop") == 0 ? "stop" : strcmp(reason, "length") == 0 ? "length" : NULL;
}

static void choice_on_error(Choice *c, const GError *error)
{
    Run *run = c->run;
    g_autoptr(GError) named = g_error_copy(error);
    /* Nobody here cancelled the call: its server is going down. What is not found there is the
     * epoch: the worker was fenced, or is another process, and this coordinator has yet to hear. */
    bool final = (weft_error_group(error) == WEFT_GROUP_REQUEST &&
                  !g_error_matches(error, WEFT_ERROR, WEFT_ERROR_CANCELLED) &&
                  !g_error_matches(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND)) ||
                 g_error_matches(error, WEFT_ERROR, WEFT_ERROR_NUMERICS);
    if (final) {
        if (c->resumed) {
            g_prefix_error(&named, "request %s cannot go on after a loss: ", run->id);
        }
        run_fail(run, named);
        return;
    }
    if (strstr(named->message, "worker") == NULL) {
        g_prefix_error(&named, "worker %s, generate: ", run->info.leader);
    }
    /* The failure detector names the culprit in a moment; the lease is interrupted then. */
    lease_report(run->lease, named);
}

static void choice_take_done(Choice *c, const Weft__V1__TokenEvent *e)
{
    c->prefill_us = e->prefill_us;
    c->decode_us = e->decode_us;
    c->wire_bytes += e->wire_bytes;
    const char *reason = static_reason(e->finish_reason);
    if (reason == NULL) {
        return; /* the call's status says why */
    }
    choice_part(c);
    g_autoptr(GString) text = g_string_new(NULL);
    choice_rest(c, text);
    if (text->len == 0 || choice_send(c, text->str, NULL)) {
        choice_finish(c, reason);
    }
}

static void on_token(const ProtobufCMessage *message, void *user)
{
    Attempt *attempt = user;
    Choice *c = attempt->choice;
    const Weft__V1__TokenEvent *e = (const Weft__V1__TokenEvent *)message;
    if (c == NULL) {
        return;
    }
    if (e->done) {
        choice_take_done(c, e);
    } else if (choice_admit(c, e)) {
        attempt->advanced = true;
        choice_take(c, e);
    }
}

/* ---- the call ---- */

static void on_generate_done(const GError *error, void *user)
{
    Attempt *attempt = user;
    Choice *c = attempt->choice;
    Run *run = attempt->run;
    const bool goes_on = attempt->advanced && g_error_matches(error, WEFT_ERROR, WEFT_ERROR_FULL);
    g_free(attempt);
    if (c != NULL) {
        c->attempt = NULL;
        if (goes_on) {
            log_info(run->owner->options.log, "%s: the rest is asked for again", error->message);
            choice_submit(c);
        } else if (error != NULL) {
            choice_on_error(c, error);
        } else {
            g_autoptr(GError) cut = g_error_new(
                WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                "worker %s, generate: the stream ended without a result", run->info.leader);
            choice_on_error(c, cut);
        }
    }
    run_call_over(run);
}

static void fill_sampler(const Run *run, Weft__V1__Sampler *out)
{
    if (run->request->sampler != NULL) {
        *out = *run->request->sampler;
    }
    out->seed = run->seed;
}

static void choice_begin(Choice *c)
{
    const Weft__V1__RunRequest *r = c->run->request;
    const Tokenizer *t = c->run->model->tokenizer;
    c->begun_us = loop_now_us(c->run->owner->options.loop);
    c->ids = g_array_new(FALSE, FALSE, sizeof(uint32_t));
    c->hashes = g_array_new(FALSE, FALSE, 1);
    if (t == NULL || is_score(c)) {
        return;
    }
    c->detokenizer = detokenizer_new(t, r->raw_special);
    if (c->n_prompt > 0) { /* a continuation: SentencePiece's leading space belongs to the prompt's
                              first piece, not to ours */
        g_autoptr(GString) shown_before = g_string_new(NULL);
        detokenizer_push(c->detokenizer, c->prompt[c->n_prompt - 1], shown_before);
    }
    c->stop =
        r->n_stop > 0 ? stop_matcher_new((const char *const *)r->stop, (unsigned)r->n_stop) : NULL;
}

/* Invariant 5. */
static void fill_progress(const Choice *c, Weft__V1__GenerateRequest *g)
{
    uint32_t n_known = c->ids->len > 0 ? c->ids->len - 1 : 0;
    g->score_from = c->score_from;
    if (is_score(c)) {
        g->score_from += n_known;
    } else {
        g->generated = (uint32_t *)(void *)c->ids->data;
        g->n_generated = n_known;
    }
}

/* What is left of the run's time, 0: it has no end. The run's own timer comes first; a leader that
 * nobody cancels any more ends it by this. */
static uint64_t time_left_ms(const Run *run)
{
    if (run->deadline == NULL) {
        return 0;
    }
    const int64_t end_us = run->begun_us + (int64_t)run->request->deadline_ms * 1000,
                  left_us = end_us - loop_now_us(run->owner->options.loop);
    return (uint64_t)MAX(1, (left_us + 999) / 1000);
}

void choice_submit(Choice *c)
{
    Run *run = c->run;
    const Weft__V1__RunRequest *r = run->request;
    const Tokenizer *t = run->model->tokenizer;
    if (c->ids == NULL) {
        choice_begin(c);
    } else {
        c->resumed = true;
    }
    Weft__V1__Stamp stamp = WEFT__V1__STAMP__INIT;
    stamp.cluster = run->owner->cluster;
    stamp.generation = run->owner->options.generation;
    stamp.job = (char *)run->info.job;
    stamp.replica = run->info.replica;
    stamp.epoch = run->info.epoch;
    Weft__V1__Sampler sampler = WEFT__V1__SAMPLER__INIT;
    fill_sampler(run, &sampler);
    Weft__V1__GenerateRequest g = WEFT__V1__GENERATE_REQUEST__INIT;
    g.stamp = &stamp;
    g.request = run->id;
    g.choice = c->index;
    g.kind = r->kind;
    g.prompt = (uint32_t *)c->prompt;
    g.n_prompt = c->n_prompt;
    g.max_tokens = r->max_tokens;
    g.sampler = &sampler;
    fill_progress(c, &g);
    g.want_logits = r->want_logits;
    g.top_logprobs = r->top_logprobs;
    g.trace = r->trace;
    g.fresh = r->fresh;
    g.deadline_ms = time_left_ms(run);
    if (run->cache_key != NULL) {
        g.cache_key = (ProtobufCBinaryData){strlen(run->cache_key), (uint8_t *)run->cache_key};
    }
    if (run->share_key != NULL) {
        g.share_key = (ProtobufCBinaryData){strlen(run->share_key), (uint8_t *)run->share_key};
    }
    if (t != NULL && !r->ignore_end) {
        uint32_t n = 0;
        g.end_ids = (uint32_t *)tokenizer_end_ids(t, &n);
        g.n_end_ids = n;
    }
    c->submitted_us = loop_now_us(run->owner->options.loop);
    Attempt *attempt = g_new0(Attempt, 1);
    attempt->run = run;
    attempt->choice = c;
    c->attempt = attempt;
    run->n_calls++;
    RpcCallbacks callbacks = {.on_message = on_token, .on_done = on_generate_done};
    attempt->call = rpc_call_start(run->info.channel, &weft__v1__leader__descriptor, "Generate",
                                   &g.base, 0, false, callbacks, attempt);
}
