#include "coordinator/gateway/openai/api_request.h"

#include "coordinator/gateway/openai/json_field.h"

#include <string.h>

#define COMPLETION_TOKENS_DEFAULT 16u
#define TOKENS_LIMIT (1u << 20)
#define ROLE_BYTES_LIMIT 64u
#define PENALTY_WINDOW 64u
#define TOP_P_LEAST 1e-6f /* 0 would mean "off" inside; as a wish it means the likeliest token */

static void prompt_free(void *data)
{
    ApiPrompt *prompt = data;
    g_free(prompt->text);
    g_clear_pointer(&prompt->ids, g_array_unref);
    g_free(prompt);
}

static void message_free(void *data)
{
    Weft__V1__ChatMessage *message = data;
    g_free(message->role);
    g_free(message->content);
    g_free(message);
}

void api_request_free(ApiRequest *r)
{
    if (r == NULL) {
        return;
    }
    g_free(r->model);
    g_ptr_array_unref(r->prompts);
    g_ptr_array_unref(r->messages);
    g_ptr_array_unref(r->bias);
    g_ptr_array_unref(r->stop);
    g_free(r);
}

/* ---- what is not served ---- */

static bool is_empty(const json_t *v)
{
    return json_is_false(v) || (json_is_array(v) && json_array_size(v) == 0) ||
           (json_is_object(v) && json_object_size(v) == 0) ||
           (json_is_string(v) && json_string_length(v) == 0) ||
           (json_is_number(v) && json_number_value(v) == 0);
}

static bool is_text_format(const json_t *v)
{
    const char *type = json_string_value(json_object_get(v, "type"));
    return type != NULL && strcmp(type, "text") == 0;
}

static bool is_no_tool_choice(const json_t *v)
{
    const char *text = json_string_value(v);
    return text != NULL && (strcmp(text, "none") == 0 || strcmp(text, "auto") == 0);
}

static bool is_text_only(const json_t *v)
{
    const char *only = json_string_value(json_array_get(v, 0));
    return json_array_size(v) == 1 && only != NULL && strcmp(only, "text") == 0;
}

/* Fields that would change the answer and that nothing here obeys: said, never passed over. What
 * is not in this list and not known (user, metadata, ...) has no effect on an answer and is let
 * be. */
static bool check_seats(const json_t *body, ApiError **error)
{
    static const struct {
        const char *name, *what;
        bool (*harmless)(const json_t *value);
    } seats[] = {
        {"tools", "tools", is_empty},
        {"functions", "tools", is_empty},
        {"tool_choice", "tools", is_no_tool_choice},
        {"function_call", "tools", is_no_tool_choice},
        {"response_format", "structured output", is_text_format},
        {"structured_outputs", "structured output", is_empty},
        {"guided_json", "structured output", is_empty},
        {"guided_regex", "structured output", is_empty},
        {"guided_choice", "structured output", is_empty},
        {"guided_grammar", "structured output", is_empty},
        {"grammar", "structured output", is_empty},
        {"json_schema", "structured output", is_empty},
        {"modalities", "other output than text", is_text_only},
        {"audio", "other output than text", is_empty},
        {"web_search_options", "web search", is_empty},
        {"suffix", "text between a prefix and a suffix", is_empty},
        {"use_beam_search", "beam search", is_empty},
        {"min_tokens", "a least number of tokens", is_empty},
        {"bad_words", "forbidden words", is_empty},
        {"allowed_token_ids", "a list of allowed tokens", is_empty},
        {"prompt_logprobs", "logprobs of a chat's prompt", is_empty},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(seats); i++) {
        const json_t *value = json_field(body, seats[i].name);
        if (value != NULL && !seats[i].harmless(value)) {
            api_error_set(error, 400, "invalid_request_error", "unsupported", seats[i].name,
                          "%s is not served: %s is not supported by this server", seats[i].name,
                          seats[i].what);
            return false;
        }
    }
    return true;
}

/* ---- prompts ---- */

static void add_prompt(ApiRequest *r, char *text /* taken */, GArray *ids /* taken */)
{
    ApiPrompt *prompt = g_new0(ApiPrompt, 1);
    prompt->text = text;
    prompt->ids = ids;
    g_ptr_array_add(r->prompts, prompt);
}

static bool add_ids(ApiRequest *r, const json_t *array, const char *param, ApiError **error)
{
    GArray *ids = json_ids(array, param, error);
    if (ids == NULL) {
        return false;
    }
    add_prompt(r, NULL, ids);
    return true;
}

/* A text, ids, texts, or lists of ids. */
static bool parse_prompt(ApiRequest *r, const json_t *body, const ApiLimits *limits,
                         ApiError **error)
{
    const json_t *value = json_field(body, "prompt");
    if (json_is_string(value)) {
        add_prompt(r, g_strdup(json_string_value(value)), NULL);
        return true;
    }
    size_t n = json_array_size(value);
    if (n == 0) {
        api_error_field(error, "prompt",
                        value == NULL ? "prompt is missing"
                                      : "prompt is neither a text nor a list of token ids");
        return false;
    }
    if (json_is_integer(json_array_get(value, 0))) {
        return add_ids(r, value, "prompt", error);
    }
    if (n > limits->prompts) {
        api_error_field(error, "prompt", "%zu prompts: at most %" G_GUINT64_FORMAT, n,
                        limits->prompts);
        return false;
    }
    for (size_t i = 0; i < n; i++) {
        const json_t *one = json_array_get(value, i);
        if (json_is_string(one)) {
            add_prompt(r, g_strdup(json_string_value(one)), NULL);
        } else if (json_array_size(one) == 0) {
            api_error_field(error, "prompt", "prompt %zu is neither a text nor a list of token ids",
                            i);
            return false;
        } else if (!add_ids(r, one, "prompt", error)) {
            return false;
        }
    }
    return true;
}

/* A text, or parts of which all are texts. Returned; NULL + error. */
static char *parse_content(const json_t *content, size_t index, ApiError **error)
{
    if (content == NULL || json_is_string(content)) {
        return g_strdup(content != NULL ? json_string_value(content) : "");
    }
    if (!json_is_array(content)) {
        api_error_field(error, "messages", "content of message %zu is %s: a string is expected",
                        index, json_kind(content));
        return NULL;
    }
    g_autoptr(GString) text = g_string_new(NULL);
    for (size_t i = 0; i < json_array_size(content); i++) {
        const json_t *part = json_array_get(content, i);
        const char *type = json_string_value(json_object_get(part, "type"));
        const char *piece = json_string_value(json_object_get(part, "text"));
        if (type == NULL || strcmp(type, "text") != 0 || piece == NULL) {
            api_error_set(error, 400, "invalid_request_error", "unsupported", "messages",
                          "part %zu of message %zu is no text: %s", i, index,
                          "only parts {\"type\":\"text\",\"text\":...} are served");
            return NULL;
        }
        g_string_append(text, piece);
    }
    return g_string_free(g_steal_pointer(&text), FALSE);
}

static bool parse_message(ApiRequest *r, const json_t *message, size_t index, ApiError **error)
{
    const char *role = json_string_value(json_object_get(message, "role"));
    if (role == NULL || role[0] == '\0' || strlen(role) > ROLE_BYTES_LIMIT) {
        api_error_field(error, "messages", "message %zu has no role of at most %u bytes", index,
                        ROLE_BYTES_LIMIT);
        return false;
    }
    static const char *const calls[] = {"tool_calls", "function_call"};
    for (size_t i = 0; i < G_N_ELEMENTS(calls); i++) {
        const json_t *value = json_field(message, calls[i]);
        if (value != NULL && !is_empty(value)) {
            api_error_set(error, 400, "invalid_request_error", "unsupported", "messages",
                          "message %zu has %s: tools are not supported by this server", index,
                          calls[i]);
            return false;
        }
    }
    char *content = parse_content(json_field(message, "content"), index, error);
    if (content == NULL) {
        return false;
    }
    Weft__V1__ChatMessage *own = g_new0(Weft__V1__ChatMessage, 1);
    weft__v1__chat_message__init(own);
    own->role = g_strdup(role);
    own->content = content;
    g_ptr_array_add(r->messages, own);
    return true;
}

static bool parse_messages(ApiRequest *r, const json_t *body, const ApiLimits *limits,
                           ApiError **error)
{
    const json_t *list = json_field(body, "messages");
    size_t n = json_array_size(list);
    if (n == 0 || n > limits->messages) {
        api_error_field(error, "messages",
                        "messages has to be a list of 1 to %" G_GUINT64_FORMAT " messages",
                        limits->messages);
        return false;
    }
    for (size_t i = 0; i < n; i++) {
        if (!parse_message(r, json_array_get(list, i), i, error)) {
            return false;
        }
    }
    return true;
}

/* ---- settings ---- */

static bool parse_stop(ApiRequest *r, const json_t *body, const ApiLimits *limits, ApiError **error)
{
    const json_t *value = json_field(body, "stop");
    size_t n = json_is_string(value) ? 1 : json_array_size(value);
    if (value != NULL && !json_is_string(value) && !json_is_array(value)) {
        api_error_field(error, "stop", "stop is %s: a string or a list of strings is expected",
                        json_kind(value));
        return false;
    }
    if (n > limits->stops) {
        api_error_field(error, "stop", "%zu stop strings: at most %" G_GUINT64_FORMAT, n,
                        limits->stops);
        return false;
    }
    for (size_t i = 0; i < n; i++) {
        const json_t *one = json_is_string(value) ? value : json_array_get(value, i);
        size_t length = json_string_length(one);
        if (!json_is_string(one) || length == 0 || length > limits->stop_bytes) {
            api_error_field(error, "stop",
                            "stop %zu is no string of 1 to %" G_GUINT64_FORMAT " bytes", i,
                            limits->stop_bytes);
            return false;
        }
        g_ptr_array_add(r->stop, g_strdup(json_string_value(one)));
    }
    return true;
}

static bool add_bias(ApiRequest *r, const char *key, const json_t *value, ApiError **error)
{
    char *end = NULL;
    guint64 id = g_ascii_isdigit(key[0]) ? g_ascii_strtoull(key, &end, 10) : 0;
    double bias = json_is_number(value) ? json_number_value(value) : 1000;
    if (end == NULL || *end != '\0' || end - key > 10 || id > UINT32_MAX) {
        g_autofree char *shown = g_utf8_substring(key, 0, MIN(g_utf8_strlen(key, -1), 16));
        api_error_field(error, "logit_bias", "logit_bias has the key '%s', which is no token id",
                        shown);
        return false;
    }
    if (!(bias >= -100 && bias <= 100)) {
        api_error_field(error, "logit_bias",
                        "logit_bias of token %" G_GUINT64_FORMAT " is no number from -100 to 100",
                        id);
        return false;
    }
    Weft__V1__LogitBias *one = g_new0(Weft__V1__LogitBias, 1);
    weft__v1__logit_bias__init(one);
    one->id = (uint32_t)id;
    one->bias = (float)bias;
    g_ptr_array_add(r->bias, one);
    return true;
}

static int by_id(gconstpointer a, gconstpointer b)
{
    const Weft__V1__LogitBias *x = *(Weft__V1__LogitBias *const *)a,
                              *y = *(Weft__V1__LogitBias *const *)b;
    return x->id < y->id ? -1 : x->id > y->id;
}

/* By id, each once: "7" and "007" are the same token. */
static bool sort_bias(ApiRequest *r, ApiError **error)
{
    g_ptr_array_sort(r->bias, by_id);
    for (guint i = 1; i < r->bias->len; i++) {
        if (by_id(&r->bias->pdata[i - 1], &r->bias->pdata[i]) == 0) {
            api_error_field(error, "logit_bias", "logit_bias has token %u twice",
                            ((Weft__V1__LogitBias *)r->bias->pdata[i])->id);
            return false;
        }
    }
    r->sampler.logit_bias = (Weft__V1__LogitBias **)r->bias->pdata;
    r->sampler.n_logit_bias = r->bias->len;
    return true;
}

static bool parse_bias(ApiRequest *r, const json_t *body, const ApiLimits *limits, ApiError **error)
{
    json_t *map = json_field(body, "logit_bias");
    if (map != NULL && !json_is_object(map)) {
        api_error_field(error, "logit_bias", "logit_bias is %s: an object is expected",
                        json_kind(map));
        return false;
    }
    if (json_object_size(map) > limits->logit_bias) {
        api_error_field(error, "logit_bias",
                        "logit_bias has %zu entries: at most %" G_GUINT64_FORMAT,
                        json_object_size(map), limits->logit_bias);
        return false;
    }
    const char *key;
    json_t *value;
    json_object_foreach(map, key, value)
    {
        if (!add_bias(r, key, value, error)) {
            return false;
        }
    }
    return sort_bias(r, error);
}

static bool parse_top_k(ApiRequest *r, const json_t *body, ApiError **error)
{
    int64_t k = 0;
    bool given;
    if (!json_field_integer(body, "top_k", &k, &given, error)) {
        return false;
    }
    if (given && (k < -1 || k > UINT32_MAX)) {
        api_error_field(error, "top_k",
                        "top_k %" G_GINT64_FORMAT " is out of range: -1 and 0 switch it off", k);
        return false;
    }
    r->sampler.top_k = k > 0 ? (uint32_t)k : 0;
    return true;
}

static bool parse_sampler(ApiRequest *r, const json_t *body, const ApiLimits *limits,
                          ApiError **error)
{
    Weft__V1__Sampler *s = &r->sampler;
    int64_t seed = 0;
    s->temperature = 1;
    s->top_p = 1;
    s->repeat_penalty = 1;
    s->penalty_window = PENALTY_WINDOW;
    if (!json_field_number(body, "temperature", 0, 2, &s->temperature, error) ||
        !json_field_number(body, "top_p", 0, 1, &s->top_p, error) ||
        !json_field_number(body, "min_p", 0, 1, &s->min_p, error) ||
        !json_field_number(body, "presence_penalty", -2, 2, &s->presence_penalty, error) ||
        !json_field_number(body, "frequency_penalty", -2, 2, &s->frequency_penalty, error) ||
        !json_field_number(body, "repetition_penalty", 0.01, 100, &s->repeat_penalty, error) ||
        !json_field_integer(body, "seed", &seed, &r->seed_given, error) ||
        !parse_top_k(r, body, error)) {
        return false;
    }
    s->top_p = MAX(s->top_p, TOP_P_LEAST);
    s->seed = (uint64_t)seed;
    return parse_bias(r, body, limits, error) && parse_stop(r, body, limits, error);
}

static bool parse_choices(ApiRequest *r, const json_t *body, const ApiLimits *limits,
                          ApiError **error)
{
    uint32_t best_of = 0;
    r->n = 1;
    if (!json_field_count(body, "n", 1, (int64_t)limits->n, &r->n, error) ||
        !json_field_count(body, "best_of", 1, UINT32_MAX, &best_of, error)) {
        return false;
    }
    if (best_of != 0 && best_of != r->n) {
        api_error_set(error, 400, "invalid_request_error", "unsupported", "best_of",
                      "best_of %u is not served: it has to equal n, %u", best_of, r->n);
        return false;
    }
    return true;
}

static bool parse_stream(ApiRequest *r, const json_t *body, ApiError **error)
{
    const json_t *options = json_field(body, "stream_options");
    if (!json_field_bool(body, "stream", &r->stream, error)) {
        return false;
    }
    if (options != NULL && (!json_is_object(options) || !r->stream)) {
        api_error_field(error, "stream_options", "stream_options is %s",
                        r->stream ? "no object" : "given without stream");
        return false;
    }
    return options == NULL || json_field_bool(options, "include_usage", &r->include_usage, error);
}

static bool parse_settings(ApiRequest *r, const json_t *body, const ApiLimits *limits,
                           ApiError **error)
{
    return check_seats(body, error) && parse_choices(r, body, limits, error) &&
           parse_stream(r, body, error) && parse_sampler(r, body, limits, error) &&
           json_field_bool(body, "ignore_eos", &r->ignore_end, error);
}

static bool parse_max_tokens(ApiRequest *r, const json_t *body, const char *name, uint32_t least,
                             ApiError **error)
{
    if (json_field(body, name) == NULL) {
        return true;
    }
    r->max_given = true;
    return json_field_count(body, name, least, TOKENS_LIMIT, &r->max_tokens, error);
}

/* ---- the four bodies ---- */

static bool parse_chat(ApiRequest *r, const json_t *body, const ApiLimits *limits, ApiError **error)
{
    add_prompt(r, NULL, NULL);
    if (!parse_messages(r, body, limits, error) || !parse_settings(r, body, limits, error) ||
        !parse_max_tokens(r, body, "max_tokens", 1, error) ||
        !parse_max_tokens(r, body, "max_completion_tokens", 1, error) ||
        !json_field_bool(body, "logprobs", &r->logprobs, error) ||
        !json_field_count(body, "top_logprobs", 0, (int64_t)limits->logprobs, &r->top_logprobs,
                          error)) {
        return false;
    }
    if (r->top_logprobs > 0 && !r->logprobs) {
        api_error_field(error, "top_logprobs", "top_logprobs is given without logprobs");
        return false;
    }
    return true;
}

static bool parse_completion(ApiRequest *r, const json_t *body, const ApiLimits *limits,
                             ApiError **error)
{
    r->max_tokens = COMPLETION_TOKENS_DEFAULT;
    r->max_given = true;
    r->logprobs = json_field(body, "logprobs") != NULL;
    return parse_prompt(r, body, limits, error) && parse_settings(r, body, limits, error) &&
           json_field_bool(body, "echo", &r->echo, error) &&
           parse_max_tokens(r, body, "max_tokens", r->echo ? 0 : 1, error) &&
           json_field_count(body, "logprobs", 0, (int64_t)limits->logprobs, &r->top_logprobs,
                            error);
}

static bool parse_tokenize(ApiRequest *r, const json_t *body, const ApiLimits *limits,
                           ApiError **error)
{
    const char *text = NULL;
    r->add_special = r->add_generation_prompt = true;
    if (!json_field_bool(body, "add_special_tokens", &r->add_special, error) ||
        !json_field_bool(body, "add_generation_prompt", &r->add_generation_prompt, error)) {
        return false;
    }
    if (json_field(body, "messages") != NULL) {
        return parse_messages(r, body, limits, error);
    }
    if (!json_field_text(body, "prompt", &text, error)) {
        return false;
    }
    if (text == NULL) {
        api_error_field(error, "prompt", "neither prompt nor messages is given");
        return false;
    }
    add_prompt(r, g_strdup(text), NULL);
    return true;
}

static bool parse_detokenize(ApiRequest *r, const json_t *body, ApiError **error)
{
    const json_t *tokens = json_field(body, "tokens");
    if (!json_is_array(tokens)) {
        api_error_field(error, "tokens", "tokens is missing or no list of token ids");
        return false;
    }
    return add_ids(r, tokens, "tokens", error);
}

static bool parse_kind(ApiRequest *r, const json_t *body, const ApiLimits *limits, ApiError **error)
{
    switch (r->kind) {
    case API_CHAT:
        return parse_chat(r, body, limits, error);
    case API_COMPLETION:
        return parse_completion(r, body, limits, error);
    case API_TOKENIZE:
        return parse_tokenize(r, body, limits, error);
    default:
        return parse_detokenize(r, body, error);
    }
}

ApiRequest *api_request_parse(ApiKind kind, const json_t *body, const ApiLimits *limits,
                              ApiError **error)
{
    g_autoptr(ApiRequest) r = g_new0(ApiRequest, 1);
    const char *model = NULL;
    r->kind = kind;
    r->n = 1;
    r->prompts = g_ptr_array_new_with_free_func(prompt_free);
    r->messages = g_ptr_array_new_with_free_func(message_free);
    r->bias = g_ptr_array_new_with_free_func(g_free);
    r->stop = g_ptr_array_new_with_free_func(g_free);
    weft__v1__sampler__init(&r->sampler);
    if (!json_field_text(body, "model", &model, error) || !parse_kind(r, body, limits, error)) {
        return NULL;
    }
    r->model = g_strdup(model);
    return g_steal_pointer(&r);
}

/* ---- as requests of the gateway ---- */

static void fill_prompt(const ApiRequest *r, guint index, Weft__V1__RunRequest *out)
{
    const ApiPrompt *prompt = g_ptr_array_index(r->prompts, index);
    weft__v1__run_request__init(out);
    out->parse_special = true;
    if (r->kind == API_CHAT) {
        out->messages = (Weft__V1__ChatMessage **)r->messages->pdata;
        out->n_messages = r->messages->len;
    } else if (prompt->ids != NULL) {
        out->prompt_ids = (uint32_t *)(void *)prompt->ids->data;
        out->n_prompt_ids = prompt->ids->len;
    } else {
        out->prompt = prompt->text;
    }
}

void api_request_generate(const ApiRequest *r, guint prompt, Weft__V1__RunRequest *out)
{
    fill_prompt(r, prompt, out);
    out->kind = WEFT__V1__REQUEST_KIND__GENERATE;
    out->max_tokens = r->max_tokens;
    out->sampler = (Weft__V1__Sampler *)&r->sampler;
    out->seed_given = r->seed_given;
    out->stop = (char **)r->stop->pdata;
    out->n_stop = r->stop->len;
    out->streams = r->n;
    out->ignore_end = r->ignore_end;
    out->top_logprobs = r->top_logprobs;
}

void api_request_score(const ApiRequest *r, guint prompt, Weft__V1__RunRequest *out)
{
    fill_prompt(r, prompt, out);
    out->kind = WEFT__V1__REQUEST_KIND__SCORE;
    out->top_logprobs = r->top_logprobs;
}
