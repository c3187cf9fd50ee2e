/* Load: requests to an OpenAI-compatible server, streamed, and what their answers took. One thread
 * drives all connections; memory is bounded by the clients, not by the requests. */
#pragma once

#include "tools/weft/latency.h"

#include <glib.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

/* What makes a request good; 0 = no limit. */
typedef struct LoadLimits {
    int64_t ttft_us, itl_us /* the request's mean */, e2e_us;
} LoadLimits;
/* "ttft=500ms,itl=50ms,e2e=5s", any of them. INVALID. */
bool load_limits_parse(const char *text, LoadLimits *out, GError **error);

typedef struct LoadOptions {
    char *url;          /* the API's base, as load_base_url() makes it */
    char *key;          /* NULL = none */
    char *ca;           /* PEM file; NULL = the system's */
    char *model;        /* as the requests say it */
    bool chat;          /* chat/completions, else completions */
    GPtrArray *prompts; /* of json_t *: a string or a list of messages; request i sends i mod n */
    json_t *more;       /* fields laid over each body; a null takes one away. NULL = none */
    uint64_t n_requests, max_tokens, seed;
    unsigned concurrency; /* connections at once */
    double rate;          /* requests a second, Poisson; 0: closed loop */
    int64_t timeout_us;   /* of one request */
    LoadLimits limits;
    /* About once a second; may be NULL. */
    void (*progress)(uint64_t completed, uint64_t failed, void *user);
    void *user;
} LoadOptions;

typedef struct LoadError {
    char *status; /* "429", "connect", "connection", "timeout", "truncated", "error event",
                     "malformed" */
    char *text;   /* what the first of them said; fit to be printed */
    uint64_t n;
} LoadError;

typedef struct LoadResult {
    Latency *ttft, *e2e; /* of completed requests */
    Latency *itl;        /* between events that carry text */
    uint64_t completed, failed, cancelled /* under way at SIGINT */, good;
    uint64_t prompt_tokens, output_tokens; /* of completed requests, by the server's usage... */
    uint64_t uncounted; /* ...but of so many, which had none, the events that carry text */
    double duration_s;  /* from the first request's time to the last one's end */
    GPtrArray *errors;  /* of LoadError *, in the order in which they appeared */
    char *fingerprint;  /* system_fingerprint, NULL if none was told */
    bool interrupted;
} LoadResult;

/* "host:port", "http://host:port" and "http://host:port/v1/" are the same. INVALID. Returned. */
char *load_base_url(const char *text, GError **error);
/* The first model that the server offers. Errors: UNREACHABLE, DENIED, PROTOCOL. Returned. */
char *load_first_model(const LoadOptions *o, GError **error);
/* Runs all requests, or until SIGINT or SIGTERM. Failures of requests are in the result. IO. */
LoadResult *load_run(const LoadOptions *o, GError **error);
void load_result_free(LoadResult *result); /* NULL-safe */
char *load_library(void);                  /* "libcurl 7.88.1"; returned */
