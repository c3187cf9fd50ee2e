/* The server's thread: libmicrohttpd driven from an epoll of our own.
 *
 * Problem: libmicrohttpd does not look at a connection while it is suspended, which is most of the
 * time here (an answer waits for the next token), so it would not see a client leave. Therefore
 * every socket is also in our epoll, for hang-ups alone. A client that closes its sending side has
 * left: nothing more is done for it.
 *
 *   epoll ── libmicrohttpd's own epoll descriptor: MHD_run
 *         ── wake: an exchange was kicked, the budget has a connection again, or the server stops
 *         ── the listening socket, while one more connection may be taken
 *         ── each peer's socket, EPOLLRDHUP, edge-triggered: the client left
 *
 * 1. libmicrohttpd is called by this thread only, but for its start before and its stop after. Even
 * a question changes it: MHD_get_daemon_info(CURRENT_CONNECTIONS) cleans up connections.
 * 2. An exchange is suspended exactly while there is nothing to do for it: its answer's head is not
 * there, or its stream has nothing to send. A kick resumes it.
 * 3. A client that leaves is seen while suspended (our epoll) or at the next write; then its
 * exchange is reported gone, once, when libmicrohttpd completes the request.
 * 4. A connection is taken from the kernel's queue only when this server's bound and the budget of
 * all servers of the process have room for it; its part of the budget goes back when libmicrohttpd
 * closes it.
 * 5. No request, no idle socket and no end of an answer takes longer than its bound: a sweep each
 * second shuts such sockets down, and libmicrohttpd then drops them. */
#include "coordinator/gateway/http/exchange.h"

#include "coordinator/gateway/http/listen_socket.h"
#include "proto/base/error.h"

#include <errno.h>
#include <microhttpd.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#define BLOCK_BYTES 4096u
#define EVENTS_AT_ONCE 64
#define SWEEP_US (INT64_C(1000) * 1000)
/* Of a body that is too large: then the socket closes. */
#define DISCARD_LIMIT ((size_t)256 << 20)

/* One connection. Server's thread. */
typedef struct HttpPeer {
    int fd;
    GList link;       /* of server->peers */
    int64_t since_us; /* of its phase */
    enum { PEER_READING, PEER_BUSY, PEER_DRAINING } phase;
    HttpExchange *exchange; /* handed over and not completed; borrowed */
    bool watched;
} HttpPeer;

struct HttpServer {
    gatomicrefcount refs;
    HttpServerOptions options;
    char *address;
    bool loopback;
    bool open; /* loop */
    struct MHD_Daemon *mhd;
    ConnectionBudget *budget; /* referenced */
    int listen_fd, epoll_fd, wake_fd;
    GThread *thread;

    GMutex lock;
    GQueue kicks; /* of HttpExchange, referenced */
    bool stopping;
    int64_t stop_by_us;

    /* server's thread */
    GQueue peers; /* of HttpPeer, by link */
    gint n_peers; /* of them; atomic, any thread reads it */
    int64_t swept_us;
    bool listening;          /* the listening socket is watched */
    bool connecting;         /* a connection's part of the budget is not yet a peer's */
    int64_t listen_again_us; /* not before: the system had no file or memory for one more */
    bool breaking;           /* nothing more is handed over */
};

static char wake_mark, mhd_mark, listen_mark; /* what epoll says for those that are no peers */

/* ---- references, and what the exchange asks ---- */

HttpServer *http_server_ref(HttpServer *server)
{
    g_atomic_ref_count_inc(&server->refs);
    return server;
}

void http_server_unref(HttpServer *server)
{
    if (g_atomic_ref_count_dec(&server->refs)) {
        g_mutex_clear(&server->lock);
        connection_budget_unref(server->budget);
        g_free(server->address);
        g_free(server);
    }
}

Loop *http_server_loop(const HttpServer *server)
{
    return server->options.loop;
}

bool http_server_is_open(const HttpServer *server)
{
    return server->open;
}

void http_server_handle(HttpServer *server, HttpExchange *x)
{
    server->options.handler(x, server->options.user);
}

static void wake(HttpServer *server)
{
    const uint64_t one = 1;
    if (write(server->wake_fd, &one, sizeof one) < 0) {
        g_assert(errno == EAGAIN); /* the counter is full: it is awake */
    }
}

static void flush_kicks(void *user)
{
    HttpServer *server = user;
    g_mutex_lock(&server->lock);
    if (server->wake_fd >= 0 && !g_queue_is_empty(&server->kicks)) {
        wake(server);
    }
    g_mutex_unlock(&server->lock);
    http_server_unref(server);
}

/* The thread is woken once the loop has done what is there to do: a step's tokens for all streams
 * come together. */
void http_server_kick(HttpServer *server, HttpExchange *x)
{
    g_mutex_lock(&server->lock);
    const bool is_open = server->wake_fd >= 0, first = g_queue_is_empty(&server->kicks);
    if (is_open) {
        g_queue_push_tail(&server->kicks, exchange_ref(x));
    }
    g_mutex_unlock(&server->lock);
    if (is_open && first) {
        loop_post(server->options.loop, flush_kicks, http_server_ref(server));
    }
}

/* ---- phases of a peer ---- */

static void peer_enter(HttpServer *server, HttpPeer *peer, int phase)
{
    peer->phase = (typeof(peer->phase))phase;
    peer->since_us = loop_now_us(server->options.loop);
}

static void peer_watch(HttpServer *server, HttpPeer *peer)
{
    struct epoll_event event = {.events = EPOLLRDHUP | EPOLLET, .data.ptr = peer};
    peer->watched = epoll_ctl(server->epoll_fd, EPOLL_CTL_ADD, peer->fd, &event) == 0;
}

static void peer_unwatch(HttpServer *server, HttpPeer *peer)
{
    if (peer->watched) {
        epoll_ctl(server->epoll_fd, EPOLL_CTL_DEL, peer->fd, NULL);
        peer->watched = false;
    }
}

static void on_connection(void *user, struct MHD_Connection *connection, void **slot,
                          enum MHD_ConnectionNotificationCode code)
{
    HttpServer *server = user;
    if (code == MHD_CONNECTION_NOTIFY_STARTED) {
        HttpPeer *peer = g_new0(HttpPeer, 1);
        server->connecting = false;
        peer->fd =
            MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CONNECTION_FD)->connect_fd;
        peer->link.data = peer;
        g_queue_push_tail_link(&server->peers, &peer->link);
        g_atomic_int_inc(&server->n_peers);
        peer_enter(server, peer, PEER_READING);
        peer_watch(server, peer);
        *slot = peer;
    } else {
        HttpPeer *peer = *slot;
        *slot = NULL;
        peer_unwatch(server, peer);
        g_queue_unlink(&server->peers, &peer->link);
        g_atomic_int_add(&server->n_peers, -1);
        connection_budget_give(server->budget);
        g_free(peer);
    }
}

static int64_t phase_limit_us(const HttpServer *server, const HttpPeer *peer)
{
    const HttpCaps *caps = &server->options.caps;
    switch (peer->phase) {
    case PEER_READING:
        return (int64_t)caps->request_s * G_USEC_PER_SEC;
    case PEER_DRAINING:
        return (int64_t)caps->drain_s * G_USEC_PER_SEC;
    default:
        return INT64_MAX; /* the handler's to bound */
    }
}

static void sweep(HttpServer *server)
{
    int64_t now = loop_now_us(server->options.loop);
    if (now - server->swept_us < SWEEP_US) {
        return;
    }
    server->swept_us = now;
    for (GList *l = server->peers.head; l != NULL; l = l->next) {
        HttpPeer *peer = l->data;
        if (now - peer->since_us > phase_limit_us(server, peer)) {
            shutdown(peer->fd, SHUT_RDWR);
            peer->since_us = now;
        }
    }
}

/* ---- the request ---- */

static enum MHD_Result add_header(void *user, enum MHD_ValueKind kind, const char *name,
                                  const char *value)
{
    HttpExchange *x = user;
    HttpPair pair = {g_strdup(name), g_strdup(value != NULL ? value : "")};
    g_array_append_val(x->headers, pair);
    return kind == MHD_HEADER_KIND ? MHD_YES : MHD_NO;
}

static HttpExchange *begin_exchange(HttpServer *server, struct MHD_Connection *connection,
                                    const char *url, const char *method)
{
    HttpExchange *x = exchange_new(server);
    x->connection = connection;
    x->peer =
        MHD_get_connection_info(connection, MHD_CONNECTION_INFO_SOCKET_CONTEXT)->socket_context;
    x->method = g_strdup(method);
    x->path = g_strdup(url);
    x->upload = g_byte_array_new();
    x->source = socket_address_text(
        MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CLIENT_ADDRESS)->client_addr);
    MHD_get_connection_values(connection, MHD_HEADER_KIND, add_header, x);
    return x;
}

static void suspend(HttpExchange *x)
{
    x->suspended = true;
    MHD_suspend_connection(x->connection);
}

static void resume(HttpExchange *x)
{
    if (x->suspended) {
        x->suspended = false;
        MHD_resume_connection(x->connection);
    }
}

static enum MHD_Result refuse(HttpExchange *x, int status, const char *message)
{
    const HttpServerOptions *o = &x->server->options;
    char *text = o->error_page(status, message);
    struct MHD_Response *response =
        MHD_create_response_from_buffer_with_free_callback(strlen(text), text, g_free);
    MHD_add_response_header(response, "Content-Type", o->error_type);
    MHD_add_response_header(response, "Connection", "close");
    x->refused = true;
    peer_enter(x->server, x->peer, PEER_DRAINING);
    enum MHD_Result result = MHD_queue_response(x->connection, (unsigned)status, response);
    MHD_destroy_response(response);
    return result;
}

static enum MHD_Result refuse_body(HttpExchange *x)
{
    g_autofree char *message =
        g_strdup_printf("the body is larger than %zu bytes", x->server->options.caps.body_bytes);
    return refuse(x, MHD_HTTP_CONTENT_TOO_LARGE, message);
}

/* The headers are there. A body that announces too much is refused before it is read. */
static enum MHD_Result on_headers(HttpExchange *x)
{
    const char *announced = http_header(x, MHD_HTTP_HEADER_CONTENT_LENGTH);
    if (announced != NULL &&
        g_ascii_strtoull(announced, NULL, 10) > x->server->options.caps.body_bytes) {
        return refuse_body(x);
    }
    return MHD_YES;
}

/* A piece of the body. One that grows too large without having said so is read on, to nowhere, for
 * an answer is possible only at its end. */
static enum MHD_Result on_upload(HttpExchange *x, const char *data, size_t *size)
{
    if (x->upload->len + *size > x->server->options.caps.body_bytes) {
        x->discarded += *size;
    }
    if (x->discarded == 0) {
        g_byte_array_append(x->upload, (const guint8 *)data, (guint)*size);
    }
    *size = 0;
    return x->discarded <= DISCARD_LIMIT ? MHD_YES : MHD_NO;
}

static enum MHD_Result hand_over(HttpExchange *x)
{
    if (x->server->breaking) {
        return MHD_NO;
    }
    x->handed_over = true;
    x->body = g_byte_array_free_to_bytes(g_steal_pointer(&x->upload));
    HttpPeer *peer = x->peer;
    peer->exchange = x;
    peer_enter(x->server, peer, PEER_BUSY);
    suspend(x);
    exchange_post_handler(x);
    return MHD_YES;
}

/* ---- the answer ---- */

static ssize_t read_stream(void *user, uint64_t position, char *buffer, size_t max)
{
    HttpExchange *x = user;
    bool ended, aborted;
    size_t n = exchange_take(x, buffer, max, &ended, &aborted);
    if (aborted || x->hung_up) {
        return MHD_CONTENT_READER_END_WITH_ERROR;
    }
    if (ended) {
        HttpPeer *peer = x->peer;
        if (peer->phase != PEER_DRAINING) {
            peer_enter(x->server, peer, PEER_DRAINING);
        }
    }
    if (n == 0 && ended) {
        return MHD_CONTENT_READER_END_OF_STREAM;
    }
    if (n == 0) {
        suspend(x);
    }
    return (ssize_t)n;
}

static void release_exchange(void *user)
{
    exchange_unref(user);
}

static struct MHD_Response *make_response(HttpExchange *x)
{
    struct MHD_Response *response;
    if (x->streaming) {
        response = MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, BLOCK_BYTES, read_stream,
                                                     exchange_ref(x), release_exchange);
    } else {
        response =
            MHD_create_response_from_buffer(x->out->len, x->out->data, MHD_RESPMEM_MUST_COPY);
        peer_enter(x->server, x->peer, PEER_DRAINING);
    }
    for (guint i = 0; i < x->answer_headers->len; i++) {
        const HttpPair *pair = &g_array_index(x->answer_headers, HttpPair, i);
        MHD_add_response_header(response, pair->name, pair->value);
    }
    return response;
}

/* Asked again after a resume: answers if the head is there. */
static enum MHD_Result answer(HttpExchange *x)
{
    g_mutex_lock(&x->lock);
    bool ready = x->head_ready, aborted = x->aborted;
    int status = x->status;
    struct MHD_Response *response = ready && !aborted ? make_response(x) : NULL;
    g_mutex_unlock(&x->lock);
    if (aborted || x->hung_up) {
        if (response != NULL) {
            MHD_destroy_response(response);
        }
        return MHD_NO;
    }
    if (!ready) {
        suspend(x);
        return MHD_YES;
    }
    enum MHD_Result result = MHD_queue_response(x->connection, (unsigned)status, response);
    MHD_destroy_response(response);
    return result;
}

static enum MHD_Result on_access(void *user, struct MHD_Connection *connection, const char *url,
                                 const char *method, const char *version, const char *upload,
                                 size_t *upload_size, void **slot)
{
    HttpExchange *x = *slot;
    if (x == NULL) {
        *slot = x = begin_exchange(user, connection, url, method);
        return on_headers(x);
    }
    if (*upload_size > 0) {
        return on_upload(x, upload, upload_size);
    }
    if (x->refused) {
        return MHD_YES;
    }
    if (x->discarded > 0) {
        return refuse_body(x);
    }
    return x->handed_over ? answer(x) : hand_over(x);
}

static void on_completed(void *user, struct MHD_Connection *connection, void **slot,
                         enum MHD_RequestTerminationCode code)
{
    HttpExchange *x = *slot;
    if (x == NULL) {
        return;
    }
    *slot = NULL;
    x->connection = NULL;
    x->suspended = false;
    HttpPeer *peer = x->peer;
    peer->exchange = NULL;
    peer_enter(x->server, peer, PEER_READING);
    if (x->handed_over) {
        exchange_post_gone(x);
    }
    exchange_unref(x);
}

/* ---- the thread ---- */

static void on_hang_up(HttpPeer *peer)
{
    HttpExchange *x = peer->exchange;
    if (x != NULL) {
        x->hung_up = true;
        resume(x);
    } else { /* libmicrohttpd would wait for the rest of the request */
        shutdown(peer->fd, SHUT_RDWR);
    }
}

static void take_kicks(HttpServer *server)
{
    uint64_t count; /* one read takes all of it */
    ssize_t n = read(server->wake_fd, &count, sizeof count);
    g_assert(n == sizeof count || errno == EAGAIN);
    g_mutex_lock(&server->lock);
    GQueue kicks = server->kicks;
    g_queue_init(&server->kicks);
    g_mutex_unlock(&server->lock);
    HttpExchange *x;
    while ((x = g_queue_pop_head(&kicks)) != NULL) {
        resume(x);
        exchange_unref(x);
    }
}

static int next_timeout_ms(HttpServer *server)
{
    MHD_UNSIGNED_LONG_LONG ms = 0;
    if (MHD_get_timeout(server->mhd, &ms) != MHD_YES || ms > SWEEP_US / 1000) {
        ms = SWEEP_US / 1000;
    }
    return (int)ms;
}

/* ---- new connections ---- */

static void set_listening(HttpServer *server, bool listening)
{
    if (server->listening != listening) {
        struct epoll_event event = {.events = listening ? EPOLLIN : 0, .data.ptr = &listen_mark};
        epoll_ctl(server->epoll_fd, EPOLL_CTL_MOD, server->listen_fd, &event);
        server->listening = listening;
    }
}

/* False: there is none to take, or no file for it. */
static bool take_one(HttpServer *server)
{
    struct sockaddr_storage from;
    socklen_t length = sizeof from;
    struct sockaddr *address = (struct sockaddr *)&from;
    const int fd = accept4(server->listen_fd, address, &length, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) {
        if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) {
            server->listen_again_us = loop_now_us(server->options.loop) + SWEEP_US;
        }
        return false;
    }
    MHD_add_connection(server->mhd, fd, address, length); /* closes it if it cannot */
    return true;
}

/* Invariant 4. */
static void take_connections(HttpServer *server)
{
    const int most = (int)server->options.caps.connections;
    bool room = loop_now_us(server->options.loop) >= server->listen_again_us, more = room;
    for (int i = 0; more && i < EVENTS_AT_ONCE; i++) {
        room = g_atomic_int_get(&server->n_peers) < most &&
               connection_budget_take(server->budget, server->wake_fd);
        server->connecting = room;
        more = room && take_one(server);
        if (server->connecting) { /* nobody's: on_connection() was not called */
            server->connecting = false;
            connection_budget_give(server->budget);
        }
    }
    set_listening(server, room && loop_now_us(server->options.loop) >= server->listen_again_us);
}

/* ---- rounds ---- */

static void serve_round(HttpServer *server, int timeout_ms)
{
    struct epoll_event events[EVENTS_AT_ONCE];
    int n = epoll_wait(server->epoll_fd, events, EVENTS_AT_ONCE, timeout_ms);
    bool woken = false, called = !server->listening;
    for (int i = 0; i < n; i++) {
        if (events[i].data.ptr == &wake_mark) {
            woken = true;
        } else if (events[i].data.ptr == &listen_mark) {
            called = true;
        } else if (events[i].data.ptr != &mhd_mark) {
            on_hang_up(events[i].data.ptr);
        }
    }
    if (woken) {
        take_kicks(server);
    }
    MHD_run(server->mhd);
    if (called && server->listen_fd >= 0) { /* after what has gone */
        take_connections(server);
    }
    sweep(server);
}

static bool is_stopping(HttpServer *server, int64_t *by_us)
{
    g_mutex_lock(&server->lock);
    bool stopping = server->stopping;
    *by_us = server->stop_by_us;
    g_mutex_unlock(&server->lock);
    return stopping;
}

/* True while an answer has ended that was not yet taken. */
static bool is_draining(const HttpServer *server)
{
    for (GList *l = server->peers.head; l != NULL; l = l->next) {
        const HttpPeer *peer = l->data;
        bool ended = peer->phase == PEER_DRAINING;
        if (peer->exchange != NULL) {
            g_mutex_lock(&peer->exchange->lock);
            ended = ended || peer->exchange->ended;
            g_mutex_unlock(&peer->exchange->lock);
        }
        if (ended) {
            return true;
        }
    }
    return false;
}

static void break_all(HttpServer *server)
{
    server->breaking = true;
    for (GList *l = server->peers.head; l != NULL; l = l->next) {
        on_hang_up(l->data);
    }
}

static void *serve(void *user)
{
    HttpServer *server = user;
    int64_t by_us;
    while (!is_stopping(server, &by_us)) {
        serve_round(server, next_timeout_ms(server));
    }
    close(server->listen_fd);
    server->listen_fd = -1;
    while (is_draining(server) && loop_now_us(server->options.loop) < by_us) {
        serve_round(server, MIN(next_timeout_ms(server), 10));
    }
    break_all(server);
    serve_round(server, 0);
    return NULL;
}

/* ---- opening and closing ---- */

static void on_mhd_log(void *user, const char *format, va_list args)
{
    HttpServer *server = user;
    g_autofree char *text = g_strdup_vprintf(format, args);
    log_debug(server->options.log, "http: %s", g_strstrip(text));
}

static bool start_mhd(HttpServer *server, GError **error)
{
    const HttpServerOptions *o = &server->options;
    bool tls = o->certificate_pem != NULL;
    struct MHD_OptionItem items[] = {
        {MHD_OPTION_EXTERNAL_LOGGER, (intptr_t)on_mhd_log, server},
        {MHD_OPTION_CONNECTION_LIMIT, (intptr_t)o->caps.connections, NULL},
        {MHD_OPTION_PER_IP_CONNECTION_LIMIT, (intptr_t)o->caps.per_source, NULL},
        {MHD_OPTION_CONNECTION_TIMEOUT, (intptr_t)o->caps.idle_s, NULL},
        {MHD_OPTION_CONNECTION_MEMORY_LIMIT, (intptr_t)o->caps.header_bytes, NULL},
        {MHD_OPTION_NOTIFY_COMPLETED, (intptr_t)on_completed, server},
        {MHD_OPTION_NOTIFY_CONNECTION, (intptr_t)on_connection, server},
        {MHD_OPTION_STRICT_FOR_CLIENT, 1, NULL},
        {tls ? MHD_OPTION_HTTPS_MEM_CERT : MHD_OPTION_END, 0, (void *)o->certificate_pem},
        {tls ? MHD_OPTION_HTTPS_MEM_KEY : MHD_OPTION_END, 0, (void *)o->key_pem},
        {MHD_OPTION_END, 0, NULL},
    };
    unsigned flags = MHD_USE_EPOLL | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ERROR_LOG |
                     MHD_USE_NO_LISTEN_SOCKET | (tls ? MHD_USE_TLS : MHD_NO_FLAG);
    server->mhd = MHD_start_daemon(flags, 0, NULL, NULL, on_access, server, MHD_OPTION_ARRAY, items,
                                   MHD_OPTION_END);
    if (server->mhd == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    tls ? "http at %s cannot be served: are certificate and key PEM texts that "
                          "belong together?"
                        : "http at %s cannot be served: libmicrohttpd did not start",
                    server->address);
        return false;
    }
    return true;
}

static void watch(HttpServer *server, int fd, void *mark)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = mark};
    int rc = epoll_ctl(server->epoll_fd, EPOLL_CTL_ADD, fd, &event);
    g_assert(rc == 0);
}

HttpServer *http_server_new(const HttpServerOptions *options, GError **error)
{
    HttpServer *server = g_new0(HttpServer, 1);
    g_atomic_ref_count_init(&server->refs);
    g_mutex_init(&server->lock);
    server->options = *options;
    server->budget = options->budget != NULL ? connection_budget_ref(options->budget)
                                             : connection_budget_new(connection_budget_of_files());
    server->epoll_fd = server->wake_fd = -1;
    server->listen_fd =
        listen_socket_open(options->listen, &server->address, &server->loopback, error);
    if (server->listen_fd < 0 || !start_mhd(server, error)) {
        if (server->listen_fd >= 0) {
            close(server->listen_fd);
        }
        http_server_unref(server);
        return NULL;
    }
    server->options.listen = server->options.certificate_pem = server->options.key_pem = NULL;
    server->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    server->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    watch(server, server->wake_fd, &wake_mark);
    watch(server, server->listen_fd, &listen_mark);
    server->listening = true;
    watch(server, MHD_get_daemon_info(server->mhd, MHD_DAEMON_INFO_EPOLL_FD)->epoll_fd, &mhd_mark);
    server->open = true;
    server->thread = g_thread_new("weft-http", serve, server);
    return server;
}

const char *http_server_address(const HttpServer *server)
{
    return server->address;
}

bool http_server_is_loopback(const HttpServer *server)
{
    return server->loopback;
}

unsigned http_server_n_connections(const HttpServer *server)
{
    return (unsigned)g_atomic_int_get(&server->n_peers);
}

void http_server_free(HttpServer *server, int grace_ms)
{
    if (server == NULL) {
        return;
    }
    server->open = false;
    g_mutex_lock(&server->lock);
    server->stopping = true;
    server->stop_by_us = loop_now_us(server->options.loop) + (int64_t)grace_ms * 1000;
    wake(server);
    g_mutex_unlock(&server->lock);
    g_thread_join(server->thread);
    MHD_stop_daemon(server->mhd); /* closes the sockets that are left */
    take_kicks(server);
    connection_budget_forget(server->budget, server->wake_fd);
    close(server->epoll_fd);
    g_mutex_lock(&server->lock);
    close(server->wake_fd);
    server->wake_fd = -1;
    g_mutex_unlock(&server->lock);
    http_server_unref(server);
}
