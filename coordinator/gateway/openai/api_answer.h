/* ApiAnswer: the gateway's events as OpenAI's JSON: gathered into one body, or as server-sent
 * events while they come. Pure; one thread. */
#pragma once

#include "coordinator/gateway/openai/api_error.h"
#include "coordinator/gateway/openai/api_request.h"
#include "proto/text/tokenizer.h"
#include "weft/v1/serve.pb-c.h"

#include <glib.h>
#include <stdint.h>

typedef struct ApiAnswer ApiAnswer;

/* request and tokenizer are borrowed for the answer's life; tokenizer may be NULL (then tokens have
 * no texts). */
ApiAnswer *api_answer_new(const ApiRequest *request, const Tokenizer *tokenizer, const char *id,
                          const char *model, int64_t created_s);
void api_answer_free(ApiAnswer *answer); /* NULL-safe */

/* The events of the run that scores one prompt for its echo. */
void api_answer_score(ApiAnswer *answer, guint prompt, const Weft__V1__RunEvent *event);
/* Before the first event of a prompt that is echoed; its ids must be known when logprobs are asked
 * for. */
void api_answer_echo(ApiAnswer *answer, guint prompt, GString *out);
/* The events of the run that generates for one prompt. With a stream, frames are appended. */
void api_answer_event(ApiAnswer *answer, guint prompt, const Weft__V1__RunEvent *event,
                      GString *out);
/* A prompt for which nothing is generated (max_tokens 0) ends. */
void api_answer_nothing(ApiAnswer *answer, guint prompt, GString *out);
/* Everything is there: the whole body, or the stream's last frames. */
void api_answer_end(ApiAnswer *answer, GString *out);
/* A stream that has begun ends with an error. */
void api_answer_fail(ApiAnswer *answer, const ApiError *error, GString *out);
