/* Choice i of prompt p is choice p * n + i of the answer.
 *
 * 1. A choice of a stream sends: (chat) its role; pieces of text; one frame with its finish reason.
 * 2. Tokens of control have no text, and no logprobs either: a client's texts and tokens fit.
 * 3. usage counts a prompt once, however many choices it has.
 * 4. A stream ends with [DONE] or with an error, never with both: who waits for [DONE] has it only
 * for a whole answer. */
#include "coordinator/gateway/openai/api_answer.h"

#include "coordinator/gateway/openai/json_text.h"
#include "coordinator/gateway/openai/logprob_text.h"

#include <string.h>

typedef struct AnswerChoice {
    GString *text;
    LogprobText logprobs;
    char *finish_reason; /* NULL: not finished */
    bool begun;
} AnswerChoice;

typedef struct AnswerPrompt {
    uint32_t n_tokens;
    LogprobText scored; /* of its own tokens, for an echo */
} AnswerPrompt;

struct ApiAnswer {
    const ApiRequest *request;
    const Tokenizer *tokenizer;
    char *id, *model;
    char fingerprint[24];
    int64_t created_s;
    AnswerPrompt *prompts;
    AnswerChoice *choices;
    guint n_prompts, n_choices;
    uint64_t n_completion;
};

ApiAnswer *api_answer_new(const ApiRequest *request, const Tokenizer *tokenizer, const char *id,
                          const char *model, int64_t created_s)
{
    ApiAnswer *a = g_new0(ApiAnswer, 1);
    bool chat = request->kind == API_CHAT;
    a->request = request;
    a->tokenizer = tokenizer;
    a->id = g_strdup(id);
    a->model = g_strdup(model);
    a->created_s = created_s;
    a->n_prompts = request->prompts->len;
    a->n_choices = a->n_prompts * request->n;
    a->prompts = g_new0(AnswerPrompt, a->n_prompts);
    a->choices = g_new0(AnswerChoice, a->n_choices);
    for (guint i = 0; i < a->n_prompts; i++) {
        logprob_text_init(&a->prompts[i].scored, chat, request->top_logprobs);
    }
    for (guint i = 0; i < a->n_choices; i++) {
        a->choices[i].text = g_string_new(NULL);
        logprob_text_init(&a->choices[i].logprobs, chat, request->top_logprobs);
    }
    return a;
}

void api_answer_free(ApiAnswer *a)
{
    if (a == NULL) {
        return;
    }
    for (guint i = 0; i < a->n_prompts; i++) {
        logprob_text_free_parts(&a->prompts[i].scored);
    }
    for (guint i = 0; i < a->n_choices; i++) {
        g_string_free(a->choices[i].text, TRUE);
        logprob_text_free_parts(&a->choices[i].logprobs);
        g_free(a->choices[i].finish_reason);
    }
    g_free(a->prompts);
    g_free(a->choices);
    g_free(a->id);
    g_free(a->model);
    g_free(a);
}

/* ---- pieces ---- */

static bool is_chat(const ApiAnswer *a)
{
    return a->request->kind == API_CHAT;
}

static void put_head(const ApiAnswer *a, const char *object, GString *out)
{
    g_string_append(out, "{\"id\":");
    json_text_string(out, a->id);
    g_string_append_printf(out,
                           ",\"object\":\"%s\",\"created\":%" G_GINT64_FORMAT ",\"model\":", object,
                           a->created_s);
    json_text_string(out, a->model);
    g_string_append(out, ",\"system_fingerprint\":");
    json_text_string(out, a->fingerprint[0] != '\0' ? a->fingerprint : NULL);
}

static void put_usage(const ApiAnswer *a, GString *out)
{
    uint64_t n_prompt = 0;
    for (guint i = 0; i < a->n_prompts; i++) {
        n_prompt += a->prompts[i].n_tokens;
    }
    g_string_append_printf(out,
                           "{\"prompt_tokens\":%" G_GUINT64_FORMAT
                           ",\"completion_tokens\":%" G_GUINT64_FORMAT
                           ",\"total_tokens\":%" G_GUINT64_FORMAT "}",
                           n_prompt, a->n_completion, n_prompt + a->n_completion);
}

static void put_logprobs(const ApiAnswer *a, const LogprobText *logprobs, GString *out)
{
    g_string_append(out, ",\"logprobs\":");
    if (a->request->logprobs) {
        logprob_text_write(logprobs, out);
    } else {
        g_string_append(out, "null");
    }
    g_string_append(out, ",\"finish_reason\":");
}

/* ---- frames of a stream ---- */

static void put_delta(const ApiAnswer *a, const AnswerChoice *choice, const char *text, bool role,
                      GString *out)
{
    if (!is_chat(a)) {
        g_string_append(out, "\"text\":");
        json_text_string(out, text);
        return;
    }
    g_string_append(out, "\"delta\":{");
    if (role) {
        g_string_append(out, "\"role\":\"assistant\",");
    }
    if (choice->finish_reason == NULL || text[0] != '\0') {
        g_string_append(out, "\"content\":");
        json_text_string(out, text);
    }
    g_string_append_c(out, '}');
}

static void put_frame(ApiAnswer *a, guint index, const char *text, bool role, GString *out)
{
    AnswerChoice *choice = &a->choices[index];
    g_string_append(out, "data: ");
    put_head(a, is_chat(a) ? "chat.completion.chunk" : "text_completion", out);
    g_string_append_printf(out, ",\"choices\":[{\"index\":%u,", index);
    put_delta(a, choice, text, role, out);
    if (choice->logprobs.n > 0) {
        put_logprobs(a, &choice->logprobs, out);
        logprob_text_clear(&choice->logprobs);
    } else {
        g_string_append(out, ",\"logprobs\":null,\"finish_reason\":");
    }
    json_text_string(out, choice->finish_reason);
    g_string_append_printf(out, "}]%s}\n\n", a->request->include_usage ? ",\"usage\":null" : "");
}

/* ---- events ---- */

static void take_started(ApiAnswer *a, guint prompt, const Weft__V1__RunStarted *started)
{
    a->prompts[prompt].n_tokens = started->prompt_tokens;
    GString *text = g_string_new("fp_");
    for (size_t i = 0; i < MIN(started->definition.len, 6); i++) {
        g_string_append_printf(text, "%02x", started->definition.data[i]);
    }
    g_strlcpy(a->fingerprint, text->str, sizeof a->fingerprint);
    g_string_free(text, TRUE);
}

/* The role comes with the first token, not with the replica: until then a refusal has a status of
 * its own. */
static void begin_choice(ApiAnswer *a, guint index, GString *out)
{
    if (!a->choices[index].begun && a->request->stream && is_chat(a)) {
        put_frame(a, index, "", true, out);
    }
    a->choices[index].begun = true;
}

static void take_tokens(ApiAnswer *a, AnswerChoice *choice, const Weft__V1__RunDelta *d)
{
    a->n_completion += d->n_ids;
    for (size_t i = 0; a->request->logprobs && i < MIN(d->n_ids, d->n_logprobs); i++) {
        bool control = a->tokenizer != NULL && d->ids[i] < tokenizer_size(a->tokenizer) &&
                       tokenizer_is_control(a->tokenizer, d->ids[i]);
        if (!control) {
            logprob_text_add(&choice->logprobs, a->tokenizer, d->ids[i], &d->logprobs[i], d->top,
                             d->n_top);
        }
    }
}

static void take_delta(ApiAnswer *a, guint prompt, const Weft__V1__RunDelta *d, GString *out)
{
    guint index = prompt * a->request->n + d->choice;
    if (d->choice >= a->request->n) {
        return;
    }
    AnswerChoice *choice = &a->choices[index];
    begin_choice(a, index, out);
    take_tokens(a, choice, d);
    if (!a->request->stream) {
        g_string_append(choice->text, d->text);
    } else if (d->text[0] != '\0' || choice->logprobs.n > 0) {
        put_frame(a, index, d->text, false, out);
    }
}

static void finish_choice(ApiAnswer *a, guint index, const char *reason, GString *out)
{
    AnswerChoice *choice = &a->choices[index];
    if (choice->finish_reason == NULL) {
        begin_choice(a, index, out);
        choice->finish_reason = g_strdup(reason);
        if (a->request->stream) {
            put_frame(a, index, "", false, out);
        }
    }
}

void api_answer_event(ApiAnswer *a, guint prompt, const Weft__V1__RunEvent *e, GString *out)
{
    switch (e->event_case) {
    case WEFT__V1__RUN_EVENT__EVENT_STARTED:
        take_started(a, prompt, e->started);
        break;
    case WEFT__V1__RUN_EVENT__EVENT_DELTA:
        take_delta(a, prompt, e->delta, out);
        break;
    case WEFT__V1__RUN_EVENT__EVENT_CHOICE_DONE:
        if (e->choice_done->choice < a->request->n) {
            finish_choice(a, prompt * a->request->n + e->choice_done->choice,
                          e->choice_done->finish_reason, out);
        }
        break;
    default:
        break;
    }
}

/* ---- the echo ---- */

void api_answer_score(ApiAnswer *a, guint prompt, const Weft__V1__RunEvent *e)
{
    AnswerPrompt *p = &a->prompts[prompt];
    const ApiPrompt *asked = g_ptr_array_index(a->request->prompts, prompt);
    if (e->event_case == WEFT__V1__RUN_EVENT__EVENT_STARTED) {
        take_started(a, prompt, e->started);
        return;
    }
    if (e->event_case != WEFT__V1__RUN_EVENT__EVENT_DELTA) {
        return;
    }
    const Weft__V1__RunDelta *d = e->delta;
    if (p->scored.n == 0 && asked->ids != NULL && asked->ids->len > 0) {
        logprob_text_add(&p->scored, a->tokenizer, g_array_index(asked->ids, uint32_t, 0), NULL,
                         NULL, 0);
    }
    for (size_t i = 0; i < MIN(d->n_ids, d->n_logprobs); i++) {
        logprob_text_add(&p->scored, a->tokenizer, d->ids[i], &d->logprobs[i], d->top, d->n_top);
    }
}

static char *prompt_text(const ApiAnswer *a, const ApiPrompt *prompt)
{
    if (prompt->text != NULL || a->tokenizer == NULL || prompt->ids == NULL) {
        return g_strdup(prompt->text != NULL ? prompt->text : "");
    }
    GString *text = g_string_new(NULL);
    Detokenizer *d = detokenizer_new(a->tokenizer, true);
    for (guint i = 0; i < prompt->ids->len; i++) {
        detokenizer_push(d, g_array_index(prompt->ids, uint32_t, i), text);
    }
    detokenizer_finish(d, text);
    detokenizer_free(d);
    return g_string_free(text, FALSE);
}

void api_answer_echo(ApiAnswer *a, guint prompt, GString *out)
{
    AnswerPrompt *p = &a->prompts[prompt];
    const ApiPrompt *asked = g_ptr_array_index(a->request->prompts, prompt);
    if (asked->ids != NULL && asked->ids->len > 0 && p->scored.n == 0 && a->request->logprobs) {
        logprob_text_add(&p->scored, a->tokenizer, g_array_index(asked->ids, uint32_t, 0), NULL,
                         NULL, 0); /* one token alone is not scored */
    }
    if (p->n_tokens == 0 && asked->ids != NULL) {
        p->n_tokens = asked->ids->len;
    }
    g_autofree char *text = prompt_text(a, asked);
    for (uint32_t i = 0; i < a->request->n; i++) {
        guint index = prompt * a->request->n + i;
        logprob_text_append(&a->choices[index].logprobs, &p->scored);
        if (a->request->stream) {
            put_frame(a, index, text, false, out);
        } else {
            g_string_append(a->choices[index].text, text);
        }
    }
}

void api_answer_nothing(ApiAnswer *a, guint prompt, GString *out)
{
    for (uint32_t i = 0; i < a->request->n; i++) {
        finish_choice(a, prompt * a->request->n + i, "length", out);
    }
}

/* ---- the end ---- */

static void put_choice(const ApiAnswer *a, guint index, GString *out)
{
    const AnswerChoice *choice = &a->choices[index];
    g_string_append_printf(out, "%s{\"index\":%u,", index > 0 ? "," : "", index);
    g_string_append(out,
                    is_chat(a) ? "\"message\":{\"role\":\"assistant\",\"content\":" : "\"text\":");
    json_text_bytes(out, choice->text->str, choice->text->len);
    g_string_append(out, is_chat(a) ? ",\"refusal\":null}" : "");
    put_logprobs(a, &choice->logprobs, out);
    json_text_string(out, choice->finish_reason);
    g_string_append_c(out, '}');
}

void api_answer_end(ApiAnswer *a, GString *out)
{
    const char *object = is_chat(a) ? "chat.completion" : "text_completion";
    if (a->request->stream) {
        if (a->request->include_usage) {
            g_string_append(out, "data: ");
            put_head(a, is_chat(a) ? "chat.completion.chunk" : object, out);
            g_string_append(out, ",\"choices\":[],\"usage\":");
            put_usage(a, out);
            g_string_append(out, "}\n\n");
        }
        g_string_append(out, "data: [DONE]\n\n");
        return;
    }
    put_head(a, object, out);
    g_string_append(out, ",\"choices\":[");
    for (guint i = 0; i < a->n_choices; i++) {
        put_choice(a, i, out);
    }
    g_string_append(out, "],\"usage\":");
    put_usage(a, out);
    g_string_append_c(out, '}');
}

void api_answer_fail(ApiAnswer *a, const ApiError *error, GString *out)
{
    g_autofree char *json = api_error_json(error);
    g_string_append_printf(out, "data: %s\n\n", json);
}
