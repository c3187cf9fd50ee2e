/* What a request may ask for: every field that a client controls, checked before anything is done
 * with it. Pure. */
#pragma once

#include "proto/plan/plan.h"
#include "weft/v1/serve.pb-c.h"

#include <glib.h>
#include <stdbool.h>

#define REQUEST_STREAMS_LIMIT 1024u
#define REQUEST_TOKENS_LIMIT (1u << 20)
#define REQUEST_STOPS_LIMIT 16u
#define REQUEST_TOP_LOGPROBS_LIMIT 32u

/* INVALID naming field, value and range. */
bool request_check(const Weft__V1__RunRequest *request, GError **error);
/* "exact" | "fast"; "" and "auto": none is asked, *any. */
bool request_numerics(const char *text, NumericsClass *out, bool *any, GError **error);
/* "" and "f16" | "bf16" | "f32" | "q8". */
bool request_kv_type(const char *text, KvType *out, GError **error);
/* Of a wish for a deployment; 0 = as fits. INVALID. */
bool request_check_layout(uint32_t dp, uint32_t pp, uint32_t tp, uint32_t streams, GError **error);
/* The prompt against the context: TOO_LONG with both numbers. */
bool request_check_length(uint32_t n_prompt, uint32_t context, GError **error);
