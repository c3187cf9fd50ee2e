/* Problem: a request is read and its answer written by one thread, and thought about on another,
 * and either side may give up first.
 *
 *   server's thread:  READING ──hand over──▶ WAITING ──head ready──▶ WRITING ──▶ completed
 *   loop:                                    handler ──▶ http_reply | http_stream..http_end ──▶
 * over
 *
 * 1. The handler hears of an exchange once; it is over for the handler exactly once: by its answer
 * or by on_gone.
 * 2. What the loop writes lies in `out` under the lock until the server's thread takes it; neither
 * waits for the other.
 * 3. The server's thread frees nothing that the loop may see and the loop touches no socket. */
#include "coordinator/gateway/http/exchange.h"

#include <string.h>

static void pair_clear(void *data)
{
    HttpPair *pair = data;
    g_free(pair->name);
    g_free(pair->value);
}

HttpExchange *exchange_new(HttpServer *server)
{
    HttpExchange *x = g_new0(HttpExchange, 1);
    g_atomic_ref_count_init(&x->refs);
    g_mutex_init(&x->lock);
    x->server = http_server_ref(server);
    x->headers = g_array_new(FALSE, FALSE, sizeof(HttpPair));
    x->answer_headers = g_array_new(FALSE, FALSE, sizeof(HttpPair));
    g_array_set_clear_func(x->headers, pair_clear);
    g_array_set_clear_func(x->answer_headers, pair_clear);
    x->out = g_byte_array_new();
    return x;
}

HttpExchange *exchange_ref(HttpExchange *x)
{
    g_atomic_ref_count_inc(&x->refs);
    return x;
}

void exchange_unref(HttpExchange *x)
{
    if (!g_atomic_ref_count_dec(&x->refs)) {
        return;
    }
    g_clear_pointer(&x->upload, g_byte_array_unref);
    g_clear_pointer(&x->body, g_bytes_unref);
    g_array_unref(x->headers);
    g_array_unref(x->answer_headers);
    g_byte_array_unref(x->out);
    g_mutex_clear(&x->lock);
    g_free(x->method);
    g_free(x->path);
    g_free(x->source);
    http_server_unref(x->server);
    g_free(x);
}

/* ---- from the server's thread to the loop ---- */

/* Brings the reference that the loop has until the exchange is over. */
static void run_handler(void *user)
{
    HttpExchange *x = user;
    if (!http_server_is_open(x->server)) {
        x->over = true;
        exchange_unref(x);
        return;
    }
    http_server_handle(x->server, x);
}

void exchange_post_handler(HttpExchange *x)
{
    loop_post(http_server_loop(x->server), run_handler, exchange_ref(x));
}

static void exchange_over(HttpExchange *x)
{
    x->over = true;
    x->gone_fn = NULL;
    exchange_unref(x);
}

static void run_gone(void *user)
{
    HttpExchange *x = user;
    if (!x->over) {
        LoopFn fn = x->gone_fn;
        void *fn_user = x->gone_user;
        exchange_over(x);
        if (fn != NULL) {
            fn(fn_user);
        }
    }
    exchange_unref(x);
}

void exchange_post_gone(HttpExchange *x)
{
    loop_post(http_server_loop(x->server), run_gone, exchange_ref(x));
}

size_t exchange_take(HttpExchange *x, char *buffer, size_t max, bool *ended, bool *aborted)
{
    g_mutex_lock(&x->lock);
    size_t n = MIN(max, x->out->len - x->out_read);
    if (n > 0) {
        memcpy(buffer, x->out->data + x->out_read, n);
        x->out_read += n;
        x->moved_us = loop_now_us(http_server_loop(x->server));
    }
    if (x->out_read == x->out->len) {
        g_byte_array_set_size(x->out, 0);
        x->out_read = 0;
    } else if (x->out_read > x->out->len / 2) {
        g_byte_array_remove_range(x->out, 0, (guint)x->out_read);
        x->out_read = 0;
    }
    *ended = x->ended && x->out->len == 0;
    *aborted = x->aborted;
    g_mutex_unlock(&x->lock);
    return n;
}

/* ---- the request ---- */

const char *http_method(const HttpExchange *x)
{
    return x->method;
}

const char *http_path(const HttpExchange *x)
{
    return x->path;
}

const char *http_source(const HttpExchange *x)
{
    return x->source;
}

GBytes *http_body(const HttpExchange *x)
{
    return x->body;
}

const char *http_header(const HttpExchange *x, const char *name)
{
    for (guint i = 0; i < x->headers->len; i++) {
        const HttpPair *pair = &g_array_index(x->headers, HttpPair, i);
        if (g_ascii_strcasecmp(pair->name, name) == 0) {
            return pair->value;
        }
    }
    return NULL;
}

/* ---- the answer ---- */

static bool is_printable(const char *text)
{
    for (const char *c = text; *c != '\0'; c++) {
        if ((unsigned char)*c < ' ' || *c == 0x7f) {
            return false;
        }
    }
    return true;
}

void http_add_header(HttpExchange *x, const char *name, const char *value)
{
    if (!is_printable(value)) {
        return;
    }
    HttpPair pair = {g_strdup(name), g_strdup(value)};
    g_mutex_lock(&x->lock);
    g_array_append_val(x->answer_headers, pair);
    g_mutex_unlock(&x->lock);
}

void http_reply(HttpExchange *x, int status, const char *type, char *text, size_t length)
{
    g_assert(!x->over);
    http_add_header(x, "Content-Type", type);
    g_mutex_lock(&x->lock);
    g_byte_array_unref(x->out);
    x->out = g_byte_array_new_take((guint8 *)text, length);
    x->status = status;
    x->head_ready = x->ended = true;
    g_mutex_unlock(&x->lock);
    http_server_kick(x->server, x);
    exchange_over(x);
}

void http_stream(HttpExchange *x, int status, const char *type)
{
    g_assert(!x->over);
    http_add_header(x, "Content-Type", type);
    g_mutex_lock(&x->lock);
    x->status = status;
    x->head_ready = x->streaming = true;
    g_mutex_unlock(&x->lock);
    http_server_kick(x->server, x);
}

size_t http_write(HttpExchange *x, const char *text, size_t length)
{
    g_assert(!x->over);
    g_mutex_lock(&x->lock);
    bool was_empty = x->out->len == x->out_read;
    if (was_empty) {
        x->moved_us = loop_now_us(http_server_loop(x->server));
    }
    g_byte_array_append(x->out, (const guint8 *)text, (guint)length);
    size_t waiting = x->out->len - x->out_read;
    g_mutex_unlock(&x->lock);
    if (was_empty && length > 0) {
        http_server_kick(x->server, x);
    }
    return waiting;
}

int64_t http_stalled_us(HttpExchange *x)
{
    g_mutex_lock(&x->lock);
    const bool waits = x->out->len > x->out_read;
    const int64_t since_us = x->moved_us;
    g_mutex_unlock(&x->lock);
    return waits ? MAX(loop_now_us(http_server_loop(x->server)) - since_us, 0) : 0;
}

void http_end(HttpExchange *x)
{
    g_assert(!x->over);
    g_mutex_lock(&x->lock);
    x->ended = true;
    g_mutex_unlock(&x->lock);
    http_server_kick(x->server, x);
    exchange_over(x);
}

void http_abort(HttpExchange *x)
{
    g_assert(!x->over);
    g_mutex_lock(&x->lock);
    x->ended = x->aborted = true;
    g_byte_array_set_size(x->out, 0);
    x->out_read = 0;
    g_mutex_unlock(&x->lock);
    http_server_kick(x->server, x);
    exchange_over(x);
}

void http_on_gone(HttpExchange *x, LoopFn fn, void *user)
{
    x->gone_fn = fn;
    x->gone_user = user;
}
