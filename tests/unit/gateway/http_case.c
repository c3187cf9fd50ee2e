#include "tests/unit/gateway/http_case.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

#define CLIENT_GUARD_S 15

/* ---- handlers ---- */

static void on_gone(void *user)
{
    Fixture *f = user;
    f->gone = true;
    f->held = NULL;
}

static void fill(void *user)
{
    Fixture *f = user;
    static char block[65536];
    if (f->held == NULL) {
        return;
    }
    size_t waiting = http_write(f->held, block, sizeof block);
    f->most_waiting = MAX(f->most_waiting, waiting);
    if (waiting > (1u << 20)) {
        http_abort(f->held);
        f->held = NULL;
        return;
    }
    loop_timer_start(main_loop_loop(f->loop), 100, fill, f);
}

/* Once nothing of the burst has moved for a while the client is let read; then it is seen moving,
 * and in the end nothing waits. */
static void watch_burst(void *user)
{
    Fixture *f = user;
    if (f->held == NULL) {
        return;
    }
    const int64_t stalled_us = http_stalled_us(f->held);
    f->n_moves += f->n_stalls > 0 && stalled_us < f->last_stall_us;
    f->last_stall_us = stalled_us;
    if (f->n_stalls == 0 && stalled_us > 50000) {
        const uint64_t one = 1;
        f->n_stalls++;
        g_assert(write(f->may_read, &one, sizeof one) == sizeof one);
    } else if (f->n_stalls > 0 && stalled_us == 0) {
        http_end(f->held);
        f->held = NULL;
        return;
    }
    loop_timer_start(main_loop_loop(f->loop), 1000, watch_burst, f);
}

static void begin_burst(Fixture *f)
{
    g_autofree char *bytes = g_strnfill(BURST_BYTES, 'x');
    assert_int_equal(http_stalled_us(f->held), 0); /* nothing waits yet */
    http_write(f->held, bytes, BURST_BYTES);
    watch_burst(f);
}

static void count_up(void *user)
{
    Fixture *f = user;
    static unsigned i;
    if (f->held == NULL) {
        return;
    }
    g_autofree char *text = g_strdup_printf("%u,", i++);
    http_write(f->held, text, strlen(text));
    if (i < 1000) {
        loop_post(main_loop_loop(f->loop), count_up, f);
    } else {
        http_end(f->held);
        f->held = NULL;
    }
}

static void on_request(HttpExchange *x, void *user)
{
    Fixture *f = user;
    f->n_handled++;
    const char *tag = http_header(x, "X-Tag");
    g_string_append_printf(f->seen, "%s %s %s %zu\n", http_method(x), http_path(x),
                           tag != NULL ? tag : "-", g_bytes_get_size(http_body(x)));
    if (strcmp(http_path(x), "/hold") == 0) {
        f->held = x;
        http_on_gone(x, on_gone, f);
    } else if (strcmp(http_path(x), "/flood") == 0 || strcmp(http_path(x), "/stream") == 0) {
        f->held = x;
        http_on_gone(x, on_gone, f);
        http_stream(x, 200, "text/event-stream");
        loop_post(main_loop_loop(f->loop), strcmp(http_path(x), "/flood") == 0 ? fill : count_up,
                  f);
    } else if (strcmp(http_path(x), "/burst") == 0) {
        f->held = x;
        http_on_gone(x, on_gone, f);
        http_stream(x, 200, "text/event-stream");
        begin_burst(f);
    } else if (strcmp(http_path(x), "/large") == 0) {
        http_reply(x, 200, "text/plain", g_strnfill(16u << 20, 'x'), 16u << 20);
    } else {
        http_add_header(x, "X-Answer", "yes");
        http_add_header(x, "X-Broken", "a\r\nb");
        http_reply(x, 200, "text/plain", g_strdup("hello"), 5);
    }
}

static char *error_page(int status, const char *message)
{
    return g_strdup_printf("{\"status\":%d,\"message\":\"%s\"}", status, message);
}

HttpServerOptions server_options(Fixture *f)
{
    return (HttpServerOptions){.loop = main_loop_loop(f->loop),
                               .listen = "127.0.0.1:0",
                               .caps = f->caps,
                               .budget = f->budget,
                               .handler = on_request,
                               .error_page = error_page,
                               .error_type = "application/json",
                               .user = f};
}

HttpServer *open_server(Fixture *f)
{
    g_autoptr(GError) error = NULL;
    const HttpServerOptions options = server_options(f);
    HttpServer *server = http_server_new(&options, &error);
    assert_null(error);
    assert_non_null(server);
    assert_true(http_server_is_loopback(server));
    return server;
}

void serve(Fixture *f)
{
    f->server = open_server(f);
}

int setup(void **state)
{
    Fixture *f = g_new0(Fixture, 1);
    f->loop = main_loop_new();
    f->caps = HTTP_CAPS_DEFAULT;
    f->caps.body_bytes = 1u << 20;
    f->seen = g_string_new(NULL);
    *state = f;
    return 0;
}

int teardown(void **state)
{
    Fixture *f = *state;
    http_server_free(f->server, 100);
    http_server_free(f->second, 100);
    connection_budget_unref(f->budget);
    main_loop_free(f->loop);
    g_string_free(f->seen, TRUE);
    g_free(f);
    return 0;
}

/* ---- the client's side ---- */

typedef struct ClientTask {
    Fixture *f;
    void (*run)(Fixture *f, GString *out);
    GString *out;
} ClientTask;

static void client_finished(void *user)
{
    ((Fixture *)user)->client_done = true;
}

static void *client_thread(void *user)
{
    ClientTask *task = user;
    task->run(task->f, task->out);
    loop_post(main_loop_loop(task->f->loop), client_finished, task->f);
    return NULL;
}

char *with_client(Fixture *f, void (*run)(Fixture *f, GString *out))
{
    ClientTask task = {f, run, g_string_new(NULL)};
    f->client_done = false;
    GThread *thread = g_thread_new("client", client_thread, &task);
    assert_true(main_loop_run_until(f->loop, &f->client_done, GUARD_US));
    g_thread_join(thread);
    return g_string_free(task.out, FALSE);
}

int client_socket(void)
{
    struct timeval guard = {.tv_sec = CLIENT_GUARD_S};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &guard, sizeof guard);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &guard, sizeof guard);
    return fd;
}

void connect_to(int fd, const HttpServer *server)
{
    const char *port = strrchr(http_server_address(server), ':') + 1;
    struct sockaddr_in to = {.sin_family = AF_INET,
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                             .sin_port = htons((uint16_t)g_ascii_strtoull(port, NULL, 10))};
    g_assert(connect(fd, (struct sockaddr *)&to, sizeof to) == 0);
}

int dial_to(const HttpServer *server)
{
    const int fd = client_socket();
    connect_to(fd, server);
    return fd;
}

int dial(Fixture *f)
{
    return dial_to(f->server);
}

void say(int fd, const char *text)
{
    size_t length = strlen(text);
    while (length > 0) {
        ssize_t n = send(fd, text, length, MSG_NOSIGNAL);
        if (n <= 0) {
            return;
        }
        text += n;
        length -= (size_t)n;
    }
}

void hear(int fd, GString *out, const char *until)
{
    char buffer[4096];
    ssize_t n;
    while ((until == NULL || strstr(out->str, until) == NULL) &&
           (n = recv(fd, buffer, sizeof buffer, 0)) > 0) {
        g_string_append_len(out, buffer, n);
    }
}
