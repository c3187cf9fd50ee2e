/* Http: an HTTP/1.1 server whose requests arrive whole on a Loop and whose answers leave at the
 * client's pace. The only folder that includes <microhttpd.h>.
 *
 * Sockets, TLS, headers and bodies are the business of one thread of the server's own; handlers
 * and everything below run on the Loop's thread and never wait for a socket. */
#pragma once

#include "coordinator/gateway/http/connection_budget.h"
#include "proto/base/log.h"
#include "proto/base/loop.h"

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct HttpServer HttpServer;
typedef struct HttpExchange HttpExchange; /* one request and its answer */

typedef struct HttpCaps {
    size_t body_bytes;    /* more is 413 */
    size_t header_bytes;  /* request line and headers; more is 431 */
    unsigned connections; /* more wait in the kernel's queue */
    unsigned per_source;  /* connections of one address; 0 = any number */
    unsigned idle_s;      /* a socket on which nothing moves is closed */
    unsigned request_s;   /* from the connection, or the last answer, to a whole request */
    unsigned drain_s;     /* from the end of an answer to its last byte being taken */
} HttpCaps;
#define HTTP_CAPS_DEFAULT                                                                          \
    ((HttpCaps){.body_bytes = 8u << 20,                                                            \
                .header_bytes = 16u << 10,                                                         \
                .connections = 4096,                                                               \
                .per_source = 2048,                                                                \
                .idle_s = 30,                                                                      \
                .request_s = 60,                                                                   \
                .drain_s = 60})

/* A request has arrived. The exchange is the handler's until it is answered or gone: a handler that
 * answers later calls http_on_gone() before it returns. */
typedef void (*HttpHandler)(HttpExchange *exchange, void *user);

typedef struct HttpServerOptions {
    Loop *loop;
    Log *log;
    const char *listen;                    /* "127.0.0.1:8080", "[::1]:0", "localhost:8080" */
    const char *certificate_pem, *key_pem; /* NULL: plaintext; borrowed during the call */
    HttpCaps caps;
    /* Shared by the servers of a process; beyond it connections wait in the kernel's queue.
     * Borrowed during the call; NULL: one of its own, of what the limit of open files leaves. */
    ConnectionBudget *budget;
    HttpHandler handler;
    /* The body of an answer that the server gives by itself (a cap was passed); returned. On the
     * server's thread: pure. */
    char *(*error_page)(int status, const char *message);
    const char *error_type; /* its content type; a static string */
    void *user;
} HttpServerOptions;

/* Binds and serves. NULL + IO (the address and the system's reason) or INVALID (address, PEM). */
HttpServer *http_server_new(const HttpServerOptions *options, GError **error);
const char *http_server_address(const HttpServer *server); /* as bound, "host:port"; borrowed */
bool http_server_is_loopback(const HttpServer *server);
unsigned http_server_n_connections(const HttpServer *server); /* any thread */
/* Takes no more, lets answers that have ended leave for at most grace_ms, closes all sockets.
 * Exchanges that were not answered stay valid and hear on_gone. NULL-safe. */
void http_server_free(HttpServer *server, int grace_ms);

/* ---- the request; texts are borrowed from the exchange ---- */
const char *http_method(const HttpExchange *x);
const char *http_path(const HttpExchange *x);                     /* decoded, without the query */
const char *http_header(const HttpExchange *x, const char *name); /* NULL if absent */
const char *http_source(const HttpExchange *x);                   /* the peer's address */
GBytes *http_body(const HttpExchange *x);

/* ---- the answer ---- */
/* Before http_reply or http_stream. Texts are copied; a value with control characters is left
 * out. */
void http_add_header(HttpExchange *x, const char *name, const char *value);
/* The whole answer; the exchange is over for its handler. text: taken, of `length` bytes. */
void http_reply(HttpExchange *x, int status, const char *type, char *text, size_t length);
/* Begins an answer of unknown length. */
void http_stream(HttpExchange *x, int status, const char *type);
/* Queues a piece (copied); returns the bytes that wait for the client. */
size_t http_write(HttpExchange *x, const char *text, size_t length);
/* For how long bytes have waited of which the client took none. */
int64_t http_stalled_us(HttpExchange *x);
/* The answer ends when all of it was taken; the exchange is over for its handler. */
void http_end(HttpExchange *x);
/* Breaks the connection instead of ending the answer; over for its handler. */
void http_abort(HttpExchange *x);
/* fn(user) at most once, when the client left before http_reply, http_end or http_abort: the
 * exchange is over then. */
void http_on_gone(HttpExchange *x, LoopFn fn, void *user);
