/* The part of weft.v1.Admin that concerns HTTP: models that are served for as long as somebody asks
 * for it, and API keys.
 *
 * A ServeModel call owns its Served and, if it asked for one, its listener; both end with it. Calls
 * are in parts->serving, so that they can be ended before what they stand on is freed. */
#include "coordinator/parts.h"

#include "proto/base/error.h"
#include "weft/v1/admin.pb-c.h"

#include <string.h>

#define LISTEN_DEFAULT "127.0.0.1:8080"

/* ---- ServeModel ---- */

typedef struct ServeCall {
    Parts *parts;
    GList link; /* of parts->serving */
    RpcCall *call;
    Served *served;
    HttpServer *listener; /* its own, or NULL */
    char *address;
} ServeCall;

static void serve_call_free(ServeCall *s)
{
    ApiService *api = s->parts->api;
    if (s->served != NULL) {
        log_info(s->parts->options.log, "model %s is no longer served", served_name(s->served));
        api_service_drop(api, s->served);
        served_remove(s->served);
    }
    if (s->listener != NULL) {
        api_service_close(api, s->listener);
    }
    g_queue_unlink(&s->parts->serving, &s->link);
    rpc_call_unref(s->call);
    g_free(s->address);
    g_free(s);
}

static void serve_call_finish(ServeCall *s, const GError *error)
{
    rpc_call_on_cancel(s->call, NULL, NULL);
    rpc_call_finish(s->call, error);
    serve_call_free(s);
}

static void on_serve_cancelled(void *user)
{
    serve_call_free(user);
}

static const HttpServer *serve_call_listener(const ServeCall *s)
{
    return s->listener != NULL ? s->listener : api_service_listener(s->parts->api);
}

static void send_event(ServeCall *s, const char *text, double fraction, const char *worker)
{
    Weft__V1__ServeModelEvent event = WEFT__V1__SERVE_MODEL_EVENT__INIT;
    event.text = (char *)text;
    event.fraction = fraction;
    event.worker = (char *)worker;
    event.ready = served_is_ready(s->served);
    event.name = (char *)served_name(s->served);
    event.address = s->address;
    event.keys_required = api_service_needs_key(s->parts->api, serve_call_listener(s));
    rpc_call_send(s->call, &event.base);
}

static void on_serve_progress(const char *text, double fraction, const char *worker, void *user)
{
    send_event(user, text, fraction, worker);
}

static void on_serve_ready(void *user)
{
    send_event(user, "ready", 1, "");
}

static void on_serve_waiting(const GError *why, bool final, void *user)
{
    if (final) {
        serve_call_finish(user, why);
    } else {
        send_event(user, why->message, 0, "");
    }
}

static bool read_wish(const Weft__V1__ServeModelRequest *r, JobWish *wish, GError **error)
{
    *wish = (JobWish){.context = r->context, .streams = r->streams};
    if (r->layout != NULL) {
        wish->dp = r->layout->dp;
        wish->pp = r->layout->pp;
        wish->tp = r->layout->tp;
    }
    return request_check_layout(wish->dp, wish->pp, wish->tp, wish->streams, error) &&
           request_numerics(r->numerics, &wish->numerics, &wish->any_numerics, error) &&
           request_kv_type(r->kv, &wish->kv_type, error);
}

/* A listener of its own where one is asked for, or where there is none yet. */
static bool serve_call_listen(ServeCall *s, const char *listen, GError **error)
{
    ApiService *api = s->parts->api;
    const HttpServer *shared = api_service_listener(api);
    if (listen[0] == '\0' && shared != NULL) {
        s->address = api_service_url(api, shared);
        return true;
    }
    s->listener = api_service_listen(api, listen[0] != '\0' ? listen : LISTEN_DEFAULT, error);
    if (s->listener == NULL) {
        return false;
    }
    s->address = api_service_url(api, s->listener);
    return true;
}

void http_admin_serve_model(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    Parts *parts = user;
    const Weft__V1__ServeModelRequest *r = (const Weft__V1__ServeModelRequest *)message;
    ServedCallbacks callbacks = {on_serve_progress, on_serve_ready, on_serve_waiting};
    g_autoptr(GError) error = NULL;
    JobWish wish;
    if (!read_wish(r, &wish, &error)) {
        rpc_call_finish(call, error);
        return;
    }
    ServeCall *s = g_new0(ServeCall, 1);
    s->parts = parts;
    s->call = rpc_call_ref(call);
    s->link.data = s;
    g_queue_push_tail_link(&parts->serving, &s->link);
    if (r->model[0] == '\0') {
        g_set_error(&error, WEFT_ERROR, WEFT_ERROR_INVALID, "a request names no model");
    } else if (serve_call_listen(s, r->listen, &error)) {
        s->served = served_add(api_service_served(parts->api), r->model, r->name, &wish, callbacks,
                               s, &error);
    }
    if (s->served == NULL) {
        serve_call_finish(s, error);
        return;
    }
    rpc_call_on_cancel(call, on_serve_cancelled, s);
    log_info(parts->options.log, "model %s is served at %s, asked by %s", served_name(s->served),
             s->address, rpc_call_peer(call)->name);
    send_event(s, "opening the model", 0, "");
}

void http_admin_free(Parts *parts)
{
    g_autoptr(GError) error =
        g_error_new(WEFT_ERROR, WEFT_ERROR_UNREACHABLE, "the coordinator is stopping");
    while (parts->serving.head != NULL) {
        serve_call_finish(parts->serving.head->data, error);
    }
}

/* ---- keys ---- */

static void on_key_created(const char *key, const GError *error, void *user)
{
    RpcCall *call = user;
    if (error == NULL) {
        Weft__V1__CreateKeyResponse response = WEFT__V1__CREATE_KEY_RESPONSE__INIT;
        response.key = (char *)key;
        rpc_call_reply(call, &response.base);
    } else {
        rpc_call_finish(call, error);
    }
    rpc_call_unref(call);
}

void http_admin_create_key(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    Parts *parts = user;
    const Weft__V1__CreateKeyRequest *r = (const Weft__V1__CreateKeyRequest *)message;
    g_autoptr(GError) error = NULL;
    if (!api_keys_create(parts->keys, r->name, on_key_created, rpc_call_ref(call), &error)) {
        rpc_call_finish(call, error);
        rpc_call_unref(call);
        return;
    }
    log_info(parts->options.log, "http key %s created by %s", r->name, rpc_call_peer(call)->name);
}

static void on_key_revoked(const GError *error, void *user)
{
    RpcCall *call = user;
    if (error == NULL) {
        Weft__V1__RevokeKeyResponse response = WEFT__V1__REVOKE_KEY_RESPONSE__INIT;
        rpc_call_reply(call, &response.base);
    } else {
        rpc_call_finish(call, error);
    }
    rpc_call_unref(call);
}

void http_admin_revoke_key(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    Parts *parts = user;
    const Weft__V1__RevokeKeyRequest *r = (const Weft__V1__RevokeKeyRequest *)message;
    g_autoptr(GError) error = NULL;
    if (!api_keys_revoke(parts->keys, r->name, on_key_revoked, rpc_call_ref(call), &error)) {
        rpc_call_finish(call, error);
        rpc_call_unref(call);
        return;
    }
    log_info(parts->options.log, "http key %s revoked by %s", r->name, rpc_call_peer(call)->name);
}

#define HASH_SHOWN 12

static void add_key(const char *name, int64_t created_us, const char *hash, void *user)
{
    Weft__V1__ApiKey *key = g_new0(Weft__V1__ApiKey, 1);
    weft__v1__api_key__init(key);
    key->name = (char *)name;
    key->created = (uint64_t)(created_us / G_USEC_PER_SEC);
    key->hash = g_strndup(hash, HASH_SHOWN);
    g_ptr_array_add(user, key);
}

static void free_key(void *data)
{
    Weft__V1__ApiKey *key = data;
    g_free(key->hash);
    g_free(key);
}

void http_admin_list_keys(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    Parts *parts = user;
    g_autoptr(GPtrArray) keys = g_ptr_array_new_with_free_func(free_key);
    api_keys_each(parts->keys, add_key, keys);
    Weft__V1__ListKeysResponse response = WEFT__V1__LIST_KEYS_RESPONSE__INIT;
    response.keys = (Weft__V1__ApiKey **)keys->pdata;
    response.n_keys = keys->len;
    rpc_call_reply(call, &response.base);
}
