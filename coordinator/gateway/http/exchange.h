/* HttpExchange: shared by the server's thread and the loop. Inside http/ only. */
#pragma once

#include "coordinator/gateway/http/http.h"

typedef struct HttpPair {
    char *name, *value;
} HttpPair;

/* Three parts, by who may touch them. References: the server's thread has one until the request is
 * completed, the loop one from the hand-over until the exchange is over for its handler, every
 * posted function and kick one. */
struct HttpExchange {
    gatomicrefcount refs;
    HttpServer *server; /* referenced */

    /* Immutable from the hand-over. */
    char *method, *path, *source;
    GArray *headers; /* of HttpPair */
    GByteArray *upload;
    GBytes *body;

    /* Loop. */
    bool over; /* for the handler */
    LoopFn gone_fn;
    void *gone_user;

    /* Under lock. */
    GMutex lock;
    bool head_ready, streaming, ended, aborted;
    int status;
    GArray *answer_headers; /* of HttpPair */
    GByteArray *out;        /* from out_read on: not yet taken */
    size_t out_read;
    int64_t moved_us; /* since when the first byte in out has waited */

    /* Server's thread. */
    void *connection; /* struct MHD_Connection *, NULL once completed */
    void *peer;       /* HttpPeer, of http_server.c */
    bool handed_over, suspended, refused, hung_up;
    size_t discarded;
};

HttpExchange *exchange_new(HttpServer *server /* referenced */);
HttpExchange *exchange_ref(HttpExchange *x); /* any thread */
void exchange_unref(HttpExchange *x);        /* any thread */
/* Posts the handler's call, or the news that the client left. Any thread. */
void exchange_post_handler(HttpExchange *x);
void exchange_post_gone(HttpExchange *x);
/* Up to max bytes of the answer into buffer; 0: none yet; *ended: nothing follows. Any thread. */
size_t exchange_take(HttpExchange *x, char *buffer, size_t max, bool *ended, bool *aborted);

/* http_server.c: */
HttpServer *http_server_ref(HttpServer *server);
void http_server_unref(HttpServer *server);
/* The answer has something new: the server's thread looks at it. Any thread. */
void http_server_kick(HttpServer *server, HttpExchange *x);
Loop *http_server_loop(const HttpServer *server);
/* Loop: false once http_server_free() was called. */
bool http_server_is_open(const HttpServer *server);
void http_server_handle(HttpServer *server, HttpExchange *x);
