#include "coordinator/gateway/requests/request_check.h"

#include "proto/base/error.h"

#include <math.h>
#include <string.h>

#define PENALTY_WINDOW_LIMIT 65536u
#define STOP_BYTES_LIMIT 256u
#define PENALTY_LIMIT 100.0
#define BIAS_LIMIT 1000.0
#define BIAS_ENTRIES_LIMIT 1024u

static bool in_range(const char *what, double value, double least, double most, GError **error)
{
    if (isfinite(value) && value >= least && value <= most) {
        return true;
    }
    if (isinf(most)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "%s %g is out of range: at least %g",
                    what, value, least);
    } else {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "%s %g is out of range: from %g to %g",
                    what, value, least, most);
    }
    return false;
}

static bool check_bias(const Weft__V1__Sampler *s, GError **error)
{
    if (s->n_logit_bias > BIAS_ENTRIES_LIMIT) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "%zu logit biases: at most %u",
                    s->n_logit_bias, BIAS_ENTRIES_LIMIT);
        return false;
    }
    g_autoptr(GHashTable) seen = g_hash_table_new(NULL, NULL);
    for (size_t i = 0; i < s->n_logit_bias; i++) {
        const Weft__V1__LogitBias *b = s->logit_bias[i];
        if (!in_range("logit bias", b->bias, -BIAS_LIMIT, BIAS_LIMIT, error)) {
            return false;
        }
        if (!g_hash_table_add(seen, GUINT_TO_POINTER(b->id))) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "logit bias of id %u is given twice",
                        b->id);
            return false;
        }
    }
    return true;
}

static bool check_sampler(const Weft__V1__Sampler *s, GError **error)
{
    return s == NULL ||
           (in_range("temperature", s->temperature, 0, (double)INFINITY, error) &&
            in_range("top-p", s->top_p, 0, 1, error) && in_range("min-p", s->min_p, 0, 1, error) &&
            in_range("repeat penalty", s->repeat_penalty, 0, 1000, error) &&
            in_range("penalty window", s->penalty_window, 0, PENALTY_WINDOW_LIMIT, error) &&
            in_range("presence penalty", s->presence_penalty, -PENALTY_LIMIT, PENALTY_LIMIT,
                     error) &&
            in_range("frequency penalty", s->frequency_penalty, -PENALTY_LIMIT, PENALTY_LIMIT,
                     error) &&
            check_bias(s, error));
}

static bool check_prompt(const Weft__V1__RunRequest *r, GError **error)
{
    unsigned given = (r->prompt[0] != '\0') + (r->n_messages > 0) + (r->n_prompt_ids > 0) +
                     (r->random_prompt > 0);
    if (given > 1) {
        g_set_error(
            error, WEFT_ERROR, WEFT_ERROR_INVALID,
            "a request has one of prompt, messages, prompt ids and random prompt: %u are given",
            given);
        return false;
    }
    return in_range("random prompt", r->random_prompt, 0, REQUEST_TOKENS_LIMIT, error);
}

static bool check_stops(const Weft__V1__RunRequest *r, GError **error)
{
    if (r->n_stop > REQUEST_STOPS_LIMIT) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "%zu stop strings: at most %u",
                    r->n_stop, REQUEST_STOPS_LIMIT);
        return false;
    }
    for (size_t i = 0; i < r->n_stop; i++) {
        if (strlen(r->stop[i]) > STOP_BYTES_LIMIT) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                        "stop string %zu has %zu bytes: at most %u", i, strlen(r->stop[i]),
                        STOP_BYTES_LIMIT);
            return false;
        }
    }
    return true;
}

static bool check_layout(const Weft__V1__Layout *layout, GError **error)
{
    return layout == NULL || (in_range("dp", layout->dp, 0, PLAN_RANKS_LIMIT, error) &&
                              in_range("pp", layout->pp, 0, PLAN_RANKS_LIMIT, error) &&
                              in_range("tp", layout->tp, 0, PLAN_RANKS_LIMIT, error));
}

static bool check_kind(const Weft__V1__RunRequest *r, GError **error)
{
    switch (r->kind) {
    case WEFT__V1__REQUEST_KIND__GENERATE:
        return in_range("number of tokens n", r->max_tokens, 1, REQUEST_TOKENS_LIMIT, error);
    case WEFT__V1__REQUEST_KIND__SCORE:
        if (r->score_window == 1) {
            g_set_error(
                error, WEFT_ERROR, WEFT_ERROR_INVALID,
                "score window 1 is out of range: at least 2 tokens, as the first is not scored");
            return false;
        }
        return true;
    default:
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "request kind %d is not served: generate or score", (int)r->kind);
        return false;
    }
}

bool request_numerics(const char *text, NumericsClass *out, bool *any, GError **error)
{
    *any = text[0] == '\0' || strcmp(text, "auto") == 0;
    *out = strcmp(text, "fast") == 0 ? NUMERICS_FAST : NUMERICS_EXACT;
    if (*any || strcmp(text, numerics_name(*out)) == 0) {
        return true;
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                "numerics %s is unknown: auto, exact or fast", text);
    return false;
}

bool request_kv_type(const char *text, KvType *out, GError **error)
{
    static const char *const names[KV_TYPE_LIMIT] = {
        [KV_F16] = "f16", [KV_BF16] = "bf16", [KV_F32] = "f32", [KV_Q8] = "q8"};
    *out = KV_F16;
    for (unsigned i = 0; i < KV_TYPE_LIMIT; i++) {
        if (strcmp(text, names[i]) == 0) {
            *out = (KvType)i;
            return true;
        }
    }
    if (text[0] == '\0') {
        return true;
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                "kv type %s is unknown: f16, bf16, f32 or q8", text);
    return false;
}

bool request_check(const Weft__V1__RunRequest *r, GError **error)
{
    NumericsClass numerics;
    bool any_numerics;
    KvType kv_type;
    if (r->model[0] == '\0') {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "a request names no model");
        return false;
    }
    return check_prompt(r, error) && check_kind(r, error) && check_sampler(r->sampler, error) &&
           check_stops(r, error) && check_layout(r->layout, error) &&
           request_numerics(r->numerics, &numerics, &any_numerics, error) &&
           request_kv_type(r->kv, &kv_type, error) &&
           in_range("streams", r->streams, 0, REQUEST_STREAMS_LIMIT, error) &&
           in_range("top logprobs", r->top_logprobs, 0, REQUEST_TOP_LOGPROBS_LIMIT, error);
}

bool request_check_length(uint32_t n_prompt, uint32_t context, GError **error)
{
    if (n_prompt < context) {
        return true;
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_TOO_LONG,
                "prompt of %u tokens does not fit the context of %u: shorten it, or ask for a "
                "larger context",
                n_prompt, context);
    return false;
}

bool request_check_layout(uint32_t dp, uint32_t pp, uint32_t tp, uint32_t streams, GError **error)
{
    if (streams > REQUEST_STREAMS_LIMIT) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "streams %u is out of range: at most %u",
                    streams, REQUEST_STREAMS_LIMIT);
        return false;
    }
    if (MAX(dp, MAX(pp, tp)) > PLAN_RANKS_LIMIT) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "layout dp %u pp %u tp %u is out of range: at most %u each", dp, pp, tp,
                    PLAN_RANKS_LIMIT);
        return false;
    }
    return true;
}
