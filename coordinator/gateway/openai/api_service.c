#include "coordinator/gateway/openai/api_internal.h"

#include "proto/base/error.h"

#include <string.h>

#define REQUEST_ID_LIMIT 128u

/* ---- answers ---- */

void api_count(ApiService *service, int status)
{
    service->n_answers[CLAMP(status / 100, 0, 5)]++;
}

void api_reply(ApiService *service, HttpExchange *x, int status, const char *type, char *text)
{
    api_count(service, status);
    http_reply(x, status, type, text, strlen(text));
}

void api_reply_error(ApiService *service, HttpExchange *x, const ApiError *error)
{
    if (error->retry_after_s > 0) {
        g_autofree char *seconds = g_strdup_printf("%d", error->retry_after_s);
        http_add_header(x, "Retry-After", seconds);
    }
    if (error->status == 401) {
        http_add_header(x, "WWW-Authenticate", "Bearer");
    }
    api_reply(service, x, error->status, JSON_TYPE, api_error_json(error));
}

/* ---- routes ---- */

typedef struct Route {
    const char *method, *path;
    bool open; /* without a key: what probes ask, and it tells names of checks only */
    void (*page)(ApiService *service, HttpExchange *x);
    ApiKind kind; /* of a POST */
} Route;

static const Route routes[] = {
    {"GET", "/health", true, api_page_health, 0},
    {"GET", "/ready", true, api_page_ready, 0},
    {"GET", "/version", false, api_page_version, 0},
    {"GET", "/metrics", false, api_page_metrics, 0},
    {"GET", "/v1/models", false, api_page_models, 0},
    {"POST", "/v1/chat/completions", false, NULL, API_CHAT},
    {"POST", "/v1/completions", false, NULL, API_COMPLETION},
    {"POST", "/tokenize", false, NULL, API_TOKENIZE},
    {"POST", "/detokenize", false, NULL, API_DETOKENIZE},
};

/* Places that are kept for what comes later. */
static const char *const seats[] = {"/v1/embeddings",   "/v1/responses",   "/v1/images/generations",
                                    "/v1/audio/speech", "/v1/moderations", "/v1/files",
                                    "/v1/batches",      "/v1/rerank",      NULL};

static bool has_method(const HttpExchange *x, const char *method)
{
    return strcmp(http_method(x), method) == 0 ||
           (strcmp(http_method(x), "HEAD") == 0 && strcmp(method, "GET") == 0);
}

static const Route *find_route(const HttpExchange *x, ApiError **error)
{
    const Route *other = NULL;
    for (size_t i = 0; i < G_N_ELEMENTS(routes); i++) {
        if (strcmp(routes[i].path, http_path(x)) == 0) {
            if (has_method(x, routes[i].method)) {
                return &routes[i];
            }
            other = &routes[i];
        }
    }
    if (other != NULL) {
        api_error_set(error, 405, "invalid_request_error", NULL, NULL, "%s is for %s, not for %s",
                      other->path, other->method, http_method(x));
    } else if (g_strv_contains(seats, http_path(x))) {
        api_error_set(error, 400, "invalid_request_error", "unsupported", NULL,
                      "%s is not served by this server", http_path(x));
    } else {
        api_error_set(error, 404, "invalid_request_error", "unknown_url", NULL,
                      "there is nothing at this address: see /v1/models, /v1/chat/completions, "
                      "/v1/completions");
    }
    return NULL;
}

bool api_service_needs_key(const ApiService *service, const HttpServer *server)
{
    return !http_server_is_loopback(server) || api_keys_any(service->options.keys);
}

/* True if the client may go on. *key: the name of its key, or NULL. */
static bool check_key(const ApiListener *listener, const HttpExchange *x, const char **key,
                      ApiError **error)
{
    ApiService *service = listener->service;
    const char *authorization = http_header(x, "Authorization");
    *key = api_keys_name(service->options.keys, authorization);
    if (*key != NULL || !api_service_needs_key(service, listener->server)) {
        return true;
    }
    service->n_refused_key++;
    api_error_set(error, 401, "authentication_error", "invalid_api_key", NULL,
                  authorization == NULL
                      ? "an API key is needed: send Authorization: Bearer KEY (weft key create "
                        "makes one)"
                      : "the API key is not known here, or was revoked");
    return false;
}

/* A form of another site's page cannot send this type without asking first. */
static bool check_type(const HttpExchange *x, ApiError **error)
{
    const char *type = http_header(x, "Content-Type");
    g_auto(GStrv) parts = g_strsplit(type != NULL ? type : "", ";", 2);
    if (parts[0] != NULL && g_ascii_strcasecmp(g_strstrip(parts[0]), JSON_TYPE) == 0) {
        return true;
    }
    api_error_set(error, 415, "invalid_request_error", NULL, NULL,
                  "the body has to be sent with Content-Type: application/json");
    return false;
}

static bool is_request_id(const char *text)
{
    size_t length = strlen(text);
    for (const char *c = text; *c != '\0'; c++) {
        if (!g_ascii_isgraph(*c)) {
            return false;
        }
    }
    return length > 0 && length <= REQUEST_ID_LIMIT;
}

/* The client's own, if it sent a usable one; it comes back in the answer and stands in the log
 * beside the request's. Returned. */
static char *tell_request_id(ApiService *service, HttpExchange *x)
{
    const char *own = http_header(x, "X-Request-Id");
    char *id = own != NULL && is_request_id(own)
                   ? g_strdup(own)
                   : g_strdup_printf("req-%016" G_GINT64_MODIFIER "x",
                                     random_u64(service->options.random));
    http_add_header(x, "X-Request-Id", id);
    return id;
}

static const char models_prefix[] = "/v1/models/";

static void on_request(HttpExchange *x, void *user)
{
    const ApiListener *listener = user;
    ApiService *service = listener->service;
    g_autoptr(ApiError) error = NULL;
    const char *key = NULL;
    g_autofree char *id = tell_request_id(service, x);
    bool one_model = has_method(x, "GET") && g_str_has_prefix(http_path(x), models_prefix);
    const Route *route = one_model ? NULL : find_route(x, &error);
    bool open = route != NULL && route->open;
    if (!open) {
        g_autoptr(ApiError) refusal = NULL;
        if (!check_key(listener, x, &key, &refusal)) { /* also of what is not there: no map of it */
            api_reply_error(service, x, refusal);
            return;
        }
    }
    if (one_model) {
        api_page_model(service, x, http_path(x) + strlen(models_prefix));
    } else if (route == NULL || (route->page == NULL && !check_type(x, &error))) {
        api_reply_error(service, x, error);
    } else if (route->page != NULL) {
        route->page(service, x);
    } else {
        api_call_begin(service, x, route->kind, key, id);
    }
}

/* ---- listeners ---- */

static void listener_free(ApiListener *listener, int grace_ms)
{
    http_server_free(listener->server, grace_ms);
    g_free(listener);
}

static HttpCaps caps_of(const ApiLimits *limits)
{
    return (HttpCaps){.body_bytes = limits->body,
                      .header_bytes = limits->header,
                      .connections = (unsigned)limits->connections,
                      .per_source = (unsigned)limits->source,
                      .idle_s = (unsigned)limits->idle_s,
                      .request_s = (unsigned)limits->request_s,
                      .drain_s = (unsigned)limits->request_s};
}

/* Clients never take the last file descriptors, however many listeners there are. */
static void say_bounded(const ApiService *service)
{
    const unsigned most = connection_budget_size(service->connections);
    if (service->listeners->len == 0 && most < service->options.limits.connections) {
        log_warn(service->options.log,
                 "http takes %u connections at once instead of %u: this process may not open more "
                 "files (raise the hard limit: LimitNOFILE= in systemd, ulimit -Hn)",
                 most, (unsigned)service->options.limits.connections);
    }
}

HttpServer *api_service_listen(ApiService *service, const char *listen, GError **error)
{
    const ApiServiceOptions *o = &service->options;
    ApiListener *listener = g_new0(ApiListener, 1);
    HttpServerOptions options = {.loop = o->loop,
                                 .log = o->log,
                                 .listen = listen,
                                 .certificate_pem = service->certificate_pem,
                                 .key_pem = service->key_pem,
                                 .caps = caps_of(&o->limits),
                                 .budget = service->connections,
                                 .handler = on_request,
                                 .error_page = api_error_page,
                                 .error_type = JSON_TYPE,
                                 .user = listener};
    say_bounded(service);
    listener->service = service;
    listener->server = http_server_new(&options, error);
    if (listener->server == NULL) {
        g_free(listener);
        return NULL;
    }
    g_ptr_array_add(service->listeners, listener);
    g_autofree char *url = api_service_url(service, listener->server);
    log_info(o->log, "http at %s, keys %s", url,
             api_service_needs_key(service, listener->server) ? "needed" : "not needed");
    if (!http_server_is_loopback(listener->server) && service->certificate_pem == NULL) {
        log_warn(o->log, "http at %s is not encrypted: keys and texts can be read on the way", url);
    }
    return listener->server;
}

void api_service_close(ApiService *service, HttpServer *server)
{
    for (guint i = 0; i < service->listeners->len; i++) {
        ApiListener *listener = g_ptr_array_index(service->listeners, i);
        if (listener->server == server) {
            g_ptr_array_remove_index(service->listeners, i);
            listener_free(listener, 0);
            return;
        }
    }
}

HttpServer *api_service_listener(const ApiService *service)
{
    return service->listeners->len > 0
               ? ((ApiListener *)g_ptr_array_index(service->listeners, 0))->server
               : NULL;
}

char *api_service_url(const ApiService *service, const HttpServer *server)
{
    return g_strdup_printf("%s://%s", service->certificate_pem != NULL ? "https" : "http",
                           http_server_address(server));
}

ServedBook *api_service_served(const ApiService *service)
{
    return service->served;
}

void api_service_drop(ApiService *service, const Served *served)
{
    api_calls_drop(service, served);
}

ApiService *api_service_new(const ApiServiceOptions *options)
{
    ApiService *service = g_new0(ApiService, 1);
    service->options = *options;
    service->certificate_pem = g_strdup(options->certificate_pem);
    service->key_pem = g_strdup(options->key_pem);
    service->served = served_book_new(options->loop, options->log, options->models, options->jobs);
    service->listeners = g_ptr_array_new();
    service->connections = connection_budget_new(connection_budget_of_files());
    service->sequences = key_shares_new();
    g_queue_init(&service->calls);
    return service;
}

void api_service_free(ApiService *service, int grace_ms)
{
    if (service == NULL) {
        return;
    }
    api_calls_drop(service, NULL);
    for (guint i = 0; i < service->listeners->len; i++) {
        listener_free(g_ptr_array_index(service->listeners, i), grace_ms);
    }
    g_ptr_array_unref(service->listeners);
    connection_budget_unref(service->connections);
    served_book_free(service->served);
    key_shares_free(service->sequences);
    g_free(service->certificate_pem);
    g_free(service->key_pem);
    g_free(service);
}
