/* From what a client sent to the token ids of each sequence. Runs on the pool: reads what of its
 * run stays as it is (the request, the model, the context; its owner may be gone meanwhile) and
 * writes what it makes to an Encoded of its own: the loop may end or explain the run meanwhile. */
#include "coordinator/gateway/requests/run.h"

#include "proto/base/error.h"
#include "proto/base/failpoint.h"
#include "proto/plan/logits_limits.h"

#include <string.h>

static bool need_tokenizer(const Model *model, GError **error)
{
    if (model->tokenizer != NULL) {
        return true;
    }
    g_propagate_prefixed_error(error, g_error_copy(model->tokenizer_error),
                               "model %s has no usable vocabulary: ", model->name);
    return false;
}

static char *token_text(const Tokenizer *t, int64_t id)
{
    size_t length = 0;
    const char *piece = id >= 0 ? tokenizer_piece(t, (uint32_t)id, true, &length) : NULL;
    return piece != NULL ? g_strndup(piece, length) : g_strdup("");
}

static GArray *encode_text(const Model *model, const char *text, bool add_bos, bool parse_special,
                           uint32_t context, GError **error)
{
    g_autoptr(GError) own = NULL;
    GArray *ids = tokenizer_encode_most(model->tokenizer, text, strlen(text), add_bos,
                                        parse_special, context, &own);
    if (g_error_matches(own, WEFT_ERROR, WEFT_ERROR_TOO_LONG)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_TOO_LONG,
                    "prompt of more than %u tokens does not fit the context of %u: shorten it",
                    context, context);
    } else if (own != NULL) {
        g_propagate_error(error, g_steal_pointer(&own));
    }
    return ids;
}

static GArray *encode_chat(const Model *model, const Weft__V1__RunRequest *r, RequestEncoding how,
                           GError **error)
{
    const Tokenizer *t = model->tokenizer;
    if (model->chat == NULL && model->chat_error != NULL) {
        g_propagate_error(error, g_error_copy(model->chat_error));
        return NULL;
    }
    if (model->chat == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "model %s has no chat template: send a prompt", model->name);
        return NULL;
    }
    g_autofree ChatMessageText *messages = g_new0(ChatMessageText, r->n_messages);
    for (size_t i = 0; i < r->n_messages; i++) {
        messages[i] = (ChatMessageText){r->messages[i]->role, r->messages[i]->content};
    }
    g_autofree char *bos = token_text(t, tokenizer_bos(t));
    g_autofree char *eos = token_text(t, tokenizer_eos(t));
    g_autofree char *text =
        chat_template_render(model->chat, messages, (unsigned)r->n_messages, !how.no_answer_follows,
                             bos, eos, CHAT_LIMITS_DEFAULT, error);
    if (text == NULL) {
        return NULL;
    }
    bool has_bos = bos[0] != '\0' && g_str_has_prefix(text, bos);
    return encode_text(model, text, !has_bos, true, how.context, error);
}

static GArray *copy_ids(const Model *model, const Weft__V1__RunRequest *r, GError **error)
{
    for (size_t i = 0; i < r->n_prompt_ids; i++) {
        if (r->prompt_ids[i] >= model->spec->vocab_size) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                        "prompt id %u is out of range: the vocabulary has %u", r->prompt_ids[i],
                        model->spec->vocab_size);
            return NULL;
        }
    }
    GArray *ids = g_array_sized_new(FALSE, FALSE, sizeof(uint32_t), (guint)r->n_prompt_ids);
    return g_array_append_vals(ids, r->prompt_ids, (guint)r->n_prompt_ids);
}

static GArray *random_ids(const Run *run, uint32_t n)
{
    GArray *ids = g_array_sized_new(FALSE, FALSE, sizeof(uint32_t), n);
    const Tokenizer *t = run->model->tokenizer;
    RandomSeeded random;
    random_seeded_init(&random, run->ids_seed);
    while (ids->len < n) {
        uint32_t id = (uint32_t)(random_u64(&random.base) % run->model->spec->vocab_size);
        if (t == NULL || id >= tokenizer_size(t) || !tokenizer_is_control(t, id)) {
            g_array_append_val(ids, id);
        }
    }
    return ids;
}

GArray *request_encode(const Model *model, const Weft__V1__RunRequest *r, RequestEncoding how,
                       GError **error)
{
    if (r->n_prompt_ids > 0) {
        return copy_ids(model, r, error);
    }
    if (!need_tokenizer(model, error)) {
        return NULL;
    }
    return r->n_messages > 0 ? encode_chat(model, r, how, error)
                             : encode_text(model, r->prompt, !how.no_bos,
                                           r->raw_special || r->parse_special, how.context, error);
}

static void take_ids(Encoded *out, GArray *ids /* taken */)
{
    out->n_ids = ids->len;
    out->ids = (uint32_t *)(void *)g_array_free(ids, FALSE);
}

static void make_choices(Run *run, Encoded *out, uint32_t n, uint32_t length, bool same_prompt)
{
    int64_t slow_ms;
    out->n_choices = n;
    out->n_pieces = 1;
    if (failpoint("encode-slow", &slow_ms)) {
        g_usleep((gulong)slow_ms * 1000);
    }
    out->choices = g_new0(Choice, n);
    for (uint32_t i = 0; i < n; i++) {
        Choice *c = &out->choices[i];
        c->run = run;
        c->index = i;
        c->prompt = out->ids + (same_prompt ? 0 : (size_t)i * length);
        c->n_prompt = length;
        c->score_from = 1;
    }
}

static void encode_random(Run *run, Encoded *out)
{
    uint32_t n = MAX(run->request->streams, 1), length = run->request->random_prompt;
    if (!request_check_length(length, run->context, &out->error)) {
        return;
    }
    take_ids(out, random_ids(run, n * length));
    out->n_text = length;
    make_choices(run, out, n, length, false);
}

/* Lengths and bytes of all pieces: equal for models whose ids mean the same. */
static Hash128 hash_vocabulary(const Tokenizer *t)
{
    Hasher *hasher = hasher_new();
    for (uint32_t id = 0; id < tokenizer_size(t); id++) {
        size_t length;
        const char *piece = tokenizer_piece(t, id, true, &length);
        const uint64_t told = length;
        hasher_update(hasher, &told, sizeof told);
        hasher_update(hasher, piece, length);
    }
    Hash128 hash = hasher_finish(hasher);
    hasher_free(hasher);
    return hash;
}

/* Rows of a piece of a window: those that a leader takes at once. */
static uint32_t rows_of_piece(const Run *run, uint32_t n_scored)
{
    int64_t told;
    uint32_t most = logits_rows(LOGITS_SEQUENCE_BYTES, run->model->spec->vocab_size);
    if (failpoint("score-rows", &told)) {
        most = MIN(most, (uint32_t)told);
    }
    return run->request->want_logits ? MIN(most, n_scored) : n_scored;
}

/* One choice a window; with logits, one for each piece of it (run.h). */
static void make_windows(Run *run, Encoded *out, uint32_t n_windows, uint32_t window)
{
    const uint32_t from = window / 2, n_scored = window - from, rows = rows_of_piece(run, n_scored);
    const uint32_t n_pieces = (n_scored + rows - 1) / rows;
    make_choices(run, out, n_windows * n_pieces, window, true);
    out->n_pieces = n_pieces;
    for (uint32_t i = 0; i < out->n_choices; i++) {
        Choice *c = &out->choices[i];
        const uint32_t first = i % out->n_pieces * rows;
        c->prompt = out->ids + (size_t)(i / out->n_pieces) * window;
        c->score_from = from + first;
        c->n_prompt = from + MIN(first + rows, n_scored);
    }
}

/* Non-overlapping windows, the rest is left out; the first token of each is BOS if the model adds
 * one; the second half is scored. */
static void encode_windows(Run *run, Encoded *out, GArray *ids /* taken */)
{
    uint32_t window = run->request->score_window;
    if (ids->len < window || window > run->context) {
        out->error = window > run->context
                         ? g_error_new(WEFT_ERROR, WEFT_ERROR_INVALID,
                                       "window of %u tokens does not fit the context of %u", window,
                                       run->context)
                         : g_error_new(WEFT_ERROR, WEFT_ERROR_INVALID,
                                       "text of %u tokens is shorter than one window of %u: give "
                                       "more text or a smaller window",
                                       ids->len, window);
        g_array_unref(ids);
        return;
    }
    out->n_text = ids->len;
    take_ids(out, ids);
    uint32_t n = out->n_ids / window;
    const Tokenizer *t = run->model->tokenizer;
    for (uint32_t i = 0; t != NULL && tokenizer_adds_bos(t) && tokenizer_bos(t) >= 0 && i < n;
         i++) {
        out->ids[(size_t)i * window] = (uint32_t)tokenizer_bos(t);
    }
    make_windows(run, out, n, window);
    if (run->request->want_logits && t != NULL) {
        out->vocabulary = hash_vocabulary(t);
        out->windows = hash128(out->ids, sizeof *out->ids * n * (size_t)window);
    }
}

static void encode_one(Run *run, Encoded *out, GArray *ids /* taken */)
{
    bool score = run->request->kind == WEFT__V1__REQUEST_KIND__SCORE;
    uint32_t least = score ? 2 : 1;
    if (ids->len < least) {
        out->error = g_error_new(WEFT_ERROR, WEFT_ERROR_INVALID,
                                 "prompt of %u tokens is too short: at least %u", ids->len, least);
    } else {
        request_check_length(score ? ids->len - 1 : ids->len, run->context, &out->error);
    }
    if (out->error != NULL) {
        g_array_unref(ids);
        return;
    }
    out->n_text = ids->len;
    take_ids(out, ids);
    make_choices(run, out, score ? 1 : MAX(run->request->streams, 1), out->n_ids, true);
}

/* An id that the model does not have would be a mistake of the client that nobody tells it. */
static bool check_bias(const Run *run, GError **error)
{
    const Weft__V1__Sampler *s = run->request->sampler;
    for (size_t i = 0; s != NULL && i < s->n_logit_bias; i++) {
        if (s->logit_bias[i]->id >= run->model->spec->vocab_size) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                        "logit bias id %u is out of range: the vocabulary has %u",
                        s->logit_bias[i]->id, run->model->spec->vocab_size);
            return false;
        }
    }
    return true;
}

void run_encode(Run *run, Encoded *out)
{
    const Weft__V1__RunRequest *r = run->request;
    if (!check_bias(run, &out->error)) {
        return;
    }
    if (r->random_prompt > 0 && r->kind == WEFT__V1__REQUEST_KIND__GENERATE) {
        encode_random(run, out);
        return;
    }
    const bool windows = r->kind == WEFT__V1__REQUEST_KIND__SCORE && r->score_window > 0;
    const RequestEncoding how = {.context = windows ? 0 : run->context};
    GArray *ids = request_encode(run->model, r, how, &out->error);
    if (ids == NULL) {
        return;
    }
    if (windows) {
        encode_windows(run, out, ids);
    } else {
        encode_one(run, out, ids);
    }
}
