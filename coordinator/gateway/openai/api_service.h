/* ApiService: OpenAI's HTTP interface over the gateway's requests: routes, who may use them, and
 * the models that are offered. Loop thread. */
#pragma once

#include "coordinator/gateway/http/http.h"
#include "coordinator/gateway/openai/api_keys.h"
#include "coordinator/gateway/openai/api_limits.h"
#include "coordinator/gateway/openai/served.h"
#include "coordinator/gateway/requests/requests.h"

#include <glib.h>

typedef struct ApiServiceOptions {
    Loop *loop;
    Log *log;
    Random *random;
    WorkPool *pool;
    Members *members;
    Models *models;
    Jobs *jobs;
    Requests *requests;
    ApiKeys *keys;
    ApiLimits limits;
    bool isolate_keys; /* prefixes are shared within a key only */
    /* PEM texts of every listener, copied; NULL: plaintext */
    const char *certificate_pem, *key_pem;
    uint64_t generation;
    double (*lag_ms)(void *user); /* loop lag; NULL: 0 */
    void *lag_user;
} ApiServiceOptions;

typedef struct ApiService ApiService;
ApiService *api_service_new(const ApiServiceOptions *options);
/* Closes the listeners; answers that have ended leave within grace_ms. After requests_free(),
 * before the pool, models, jobs and members are freed. NULL-safe. */
void api_service_free(ApiService *service, int grace_ms);

/* One more listener; borrowed. NULL + error of http_server_new(). */
HttpServer *api_service_listen(ApiService *service, const char *listen, GError **error);
void api_service_close(ApiService *service, HttpServer *server);
/* The first one, or NULL. */
HttpServer *api_service_listener(const ApiService *service);
/* "http://host:port"; returned. */
char *api_service_url(const ApiService *service, const HttpServer *server);
bool api_service_needs_key(const ApiService *service, const HttpServer *server);

ServedBook *api_service_served(const ApiService *service);
/* Ends the requests of a model that is about to be removed. */
void api_service_drop(ApiService *service, const Served *served);
