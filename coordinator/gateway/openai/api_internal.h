/* What the parts of the HTTP interface share. Inside openai/ only. */
#pragma once

#include "coordinator/gateway/openai/api_error.h"
#include "coordinator/gateway/openai/api_request.h"
#include "coordinator/gateway/openai/api_service.h"
#include "coordinator/gateway/openai/key_shares.h"

#define JSON_TYPE "application/json"
#define RETRY_AFTER_S 1

typedef struct ApiListener {
    ApiService *service;
    HttpServer *server;
} ApiListener;

struct ApiService {
    ApiServiceOptions options;
    char *certificate_pem, *key_pem;
    ServedBook *served;
    GPtrArray *listeners;          /* of ApiListener */
    ConnectionBudget *connections; /* of all of them together */
    GQueue calls;                  /* of ApiCall, api_call.c */
    KeyShares *sequences;          /* of open calls */
    uint64_t n_answers[6];         /* by the first digit of the status */
    uint64_t n_refused_full, n_refused_key, n_gone;
};

/* api_call.c: a POST with a body; answers later. key: its name, or NULL. id: X-Request-Id. */
void api_call_begin(ApiService *service, HttpExchange *x, ApiKind kind, const char *key,
                    const char *id);
/* Ends with an error what is open. */
void api_calls_drop(ApiService *service, const Served *served /* NULL: all */);

/* api_pages.c: answered at once. */
void api_page_models(ApiService *service, HttpExchange *x);
void api_page_model(ApiService *service, HttpExchange *x, const char *name);
void api_page_health(ApiService *service, HttpExchange *x);
void api_page_ready(ApiService *service, HttpExchange *x);
void api_page_version(ApiService *service, HttpExchange *x);
/* metrics_page.c */
void api_page_metrics(ApiService *service, HttpExchange *x);

/* api_service.c: every answer but a stream leaves through these. text: taken. */
void api_reply(ApiService *service, HttpExchange *x, int status, const char *type, char *text);
void api_reply_error(ApiService *service, HttpExchange *x, const ApiError *error);
void api_count(ApiService *service, int status);
