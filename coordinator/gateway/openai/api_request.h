/* ApiRequest: what a client asked for, checked against the limits, and as the gateway's requests.
 * Pure; any thread. */
#pragma once

#include "coordinator/gateway/openai/api_error.h"
#include "coordinator/gateway/openai/api_limits.h"
#include "weft/v1/serve.pb-c.h"

#include <glib.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

typedef enum ApiKind { API_CHAT, API_COMPLETION, API_TOKENIZE, API_DETOKENIZE } ApiKind;

typedef struct ApiPrompt {
    char *text;  /* NULL: ids */
    GArray *ids; /* of uint32_t; NULL: text. Filled for a text too where an echo needs them */
} ApiPrompt;

typedef struct ApiRequest {
    ApiKind kind;
    char *model;        /* NULL: not named */
    GPtrArray *prompts; /* of ApiPrompt: COMPLETION, TOKENIZE, DETOKENIZE. CHAT: one without text */
    GPtrArray *messages; /* of Weft__V1__ChatMessage: CHAT, TOKENIZE */
    uint32_t n;          /* choices of each prompt */
    bool max_given;
    uint32_t max_tokens; /* 0 with echo alone */
    Weft__V1__Sampler sampler;
    GPtrArray *bias; /* of Weft__V1__LogitBias; what sampler.logit_bias points to */
    bool seed_given;
    GPtrArray *stop; /* of char * */
    bool stream, include_usage;
    bool echo;
    bool logprobs;
    uint32_t top_logprobs;
    bool ignore_end;
    bool add_special;           /* TOKENIZE: BOS if the model adds one */
    bool add_generation_prompt; /* TOKENIZE of messages */
} ApiRequest;

/* Returned, or NULL + 400 naming the field. */
ApiRequest *api_request_parse(ApiKind kind, const json_t *body, const ApiLimits *limits,
                              ApiError **error);
void api_request_free(ApiRequest *request); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(ApiRequest, api_request_free)

/* The n choices of one prompt as a request to the gateway; everything in *out is borrowed from the
 * request. model and context are left to the caller. */
void api_request_generate(const ApiRequest *request, guint prompt, Weft__V1__RunRequest *out);
/* The logprobs of one prompt's own tokens (echo with logprobs). */
void api_request_score(const ApiRequest *request, guint prompt, Weft__V1__RunRequest *out);
