/* One sequence on its replica: the call to the leader, its tokens, their text.
 *
 * 1. A token is taken only for (request, choice, position) of this choice, in order of position.
 * One that comes again must be equal, id and row hash, else the numerics are at fault and the run
 * ends.
 * 2. done is set once: by the leader's last event, by a stop string, or with the run. What arrives
 * afterwards is ignored.
 * 3. Text goes out in complete characters; what may be the beginning of a stop string is held back.
 */
#include "coordinator/gateway/requests/run.h"

#include "proto/base/error.h"
#include "proto/base/hash.h"

#include <string.h>

#define HASH_BYTES 16u

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
    return is_score(c) ? c->run->score_from : c->n_prompt;
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
    c->done = true;
    c->finish_reason = reason;
    run_choice_done(c);
}

static void choice_take(Choice *c, const Weft__V1__TokenEvent *e)
{
    int64_t now = loop_now_us(c->run->owner->options.loop);
    c->first_us = c->first_us != 0 ? c->first_us : now;
    c->last_us = now;
    g_array_append_val(c->ids, e->id);
    g_array_append_vals(c->hashes, e->row_hash.data, HASH_BYTES);
    c->nll -= (double)e->logprob;
    if (is_score(c)) {
        if (c->run->request->score_window == 0) {
            choice_send(c, "", e);
        }
        return;
    }
    g_autoptr(GString) text = g_string_new(NULL);
    bool stopped = choice_text(c, e->id, text);
    if (choice_send(c, text->str, e) && stopped) {
        rpc_client_cancel(c->call);
        choice_finish(c, "stop");
    }
}

static const char *static_reason(const char *reason)
{
    static const char *const reasons[] = {"stop", "length", "cancelled", "error"};
    for (size_t i = 0; i < G_N_ELEMENTS(reasons); i++) {
        if (strcmp(reason, reasons[i]) == 0) {
            return reasons[i];
        }
    }
    return "error";
}

static void choice_take_done(Choice *c, const Weft__V1__TokenEvent *e)
{
    c->prefill_us = e->prefill_us;
    c->decode_us = e->decode_us;
    c->wire_bytes = e->wire_bytes;
    c->finish_reason = static_reason(e->finish_reason);
}

static void on_token(const ProtobufCMessage *message, void *user)
{
    Choice *c = user;
    const Weft__V1__TokenEvent *e = (const Weft__V1__TokenEvent *)message;
    if (c->done || c->run->state != RUN_RUNNING) {
        return;
    }
    if (e->done) {
        choice_take_done(c, e);
    } else if (choice_admit(c, e)) {
        choice_take(c, e);
    }
}

/* ---- the call ---- */

static void choice_on_error(Choice *c, const GError *error)
{
    Run *run = c->run;
    if (weft_error_group(error) == WEFT_GROUP_REQUEST || run->lease == NULL) {
        run_fail(run, error);
    } else {
        /* The failure detector names the culprit in a moment; the run ends then. */
        g_autoptr(GError) named = g_error_copy(error);
        if (strstr(named->message, "worker") == NULL) {
            g_prefix_error(&named, "worker %s, generate: ", run->info.leader);
        }
        lease_report(run->lease, named);
    }
}

static void on_generate_done(const GError *error, void *user)
{
    Choice *c = user;
    Run *run = c->run;
    c->call = NULL;
    if (!c->done && run->state == RUN_RUNNING) {
        if (error != NULL) {
            choice_on_error(c, error);
        } else if (c->finish_reason == NULL || strcmp(c->finish_reason, "error") == 0) {
            g_autoptr(GError) cut = g_error_new(
                WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                "worker %s, generate: the stream ended without a result", run->info.leader);
            choice_on_error(c, cut);
        } else {
            g_autoptr(GString) text = g_string_new(NULL);
            choice_rest(c, text);
            if (text->len == 0 || choice_send(c, text->str, NULL)) {
                choice_finish(c, c->finish_reason);
            }
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

void choice_begin(Choice *c)
{
    Run *run = c->run;
    const Weft__V1__RunRequest *r = run->request;
    const Tokenizer *t = run->model->tokenizer;
    c->ids = g_array_new(FALSE, FALSE, sizeof(uint32_t));
    c->hashes = g_array_new(FALSE, FALSE, 1);
    if (t != NULL && !is_score(c)) {
        c->detokenizer = detokenizer_new(t, r->raw_special);
        if (c->n_prompt > 0) { /* a continuation: SentencePiece's leading space belongs to the
                                  prompt's first piece, not to ours */
            g_autoptr(GString) shown_before = g_string_new(NULL);
            detokenizer_push(c->detokenizer, c->prompt[c->n_prompt - 1], shown_before);
        }
        c->stop = r->n_stop > 0
                      ? stop_matcher_new((const char *const *)r->stop, (unsigned)r->n_stop)
                      : NULL;
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
    g.score_from = run->score_from;
    g.want_logits = r->want_logits;
    g.top_logprobs = r->top_logprobs;
    g.trace = r->trace;
    g.fresh = r->fresh;
    if (run->cache_key != NULL) {
        g.cache_key = (ProtobufCBinaryData){strlen(run->cache_key), (uint8_t *)run->cache_key};
    }
    if (t != NULL && !r->ignore_end) {
        uint32_t n = 0;
        g.end_ids = (uint32_t *)tokenizer_end_ids(t, &n);
        g.n_end_ids = n;
    }
    c->begun_us = loop_now_us(run->owner->options.loop);
    run->n_calls++;
    RpcCallbacks callbacks = {.on_message = on_token, .on_done = on_generate_done};
    c->call = rpc_call_start(run->info.channel, &weft__v1__leader__descriptor, "Generate", &g.base,
                             0, false, callbacks, c);
}
