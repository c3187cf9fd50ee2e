/* LogprobText: tokens with their logprobs as JSON, in the form of chats or of completions. */
#pragma once

#include "coordinator/gateway/openai/api_request.h"
#include "proto/text/tokenizer.h"
#include "weft/v1/serve.pb-c.h"

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>

typedef struct LogprobText {
    bool chat;
    unsigned top;      /* alternatives told */
    unsigned n;        /* tokens since the last clear */
    size_t offset;     /* of the next token, in characters; survives a clear */
    GString *parts[4]; /* chat: [0]; completion: tokens, token_logprobs, top_logprobs, offsets */
} LogprobText;

void logprob_text_init(LogprobText *t, bool chat, unsigned top);
void logprob_text_free_parts(LogprobText *t);
void logprob_text_clear(LogprobText *t);
/* One more token. logprob NULL: it has none (the first of a prompt). */
void logprob_text_add(LogprobText *t, const Tokenizer *tokenizer, uint32_t id, const float *logprob,
                      Weft__V1__TopLogprob *const *top, size_t n_top);
void logprob_text_append(LogprobText *t, const LogprobText *more);
/* The member's value: {"content":[...]}, {"tokens":[...],...}. */
void logprob_text_write(const LogprobText *t, GString *out);
