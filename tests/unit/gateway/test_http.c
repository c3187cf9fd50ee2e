/* The server over real sockets: a client thread with blocking sockets (each wait bounded) against
 * handlers on a MainLoop. */
#include "coordinator/gateway/http/http.h"

#include "proto/base/error.h"
#include "transport/daemon/daemon.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

#define GUARD_US (INT64_C(20) * 1000000)
#define CLIENT_GUARD_S 15

typedef struct Fixture {
    MainLoop *loop;
    HttpServer *server, *second;
    HttpCaps caps;
    ConnectionBudget *budget;
    bool client_done, gone;
    unsigned n_handled;
    HttpExchange *held; /* of /hold and /stream */
    size_t most_waiting;
    GString *seen; /* method path header body-length, a line each */
    int may_read;  /* eventfd: the client of /burst waits for it */
    unsigned n_stalls, n_moves;
    int64_t last_stall_us;
} Fixture;

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

enum { BURST_BYTES = 32 << 20 }; /* far more than a socket's buffers */

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

static HttpServer *open_server(Fixture *f)
{
    g_autoptr(GError) error = NULL;
    HttpServerOptions options = {.loop = main_loop_loop(f->loop),
                                 .listen = "127.0.0.1:0",
                                 .caps = f->caps,
                                 .budget = f->budget,
                                 .handler = on_request,
                                 .error_page = error_page,
                                 .error_type = "application/json",
                                 .user = f};
    HttpServer *server = http_server_new(&options, &error);
    assert_null(error);
    assert_non_null(server);
    assert_true(http_server_is_loopback(server));
    return server;
}

static void serve(Fixture *f)
{
    f->server = open_server(f);
}

static int setup(void **state)
{
    Fixture *f = g_new0(Fixture, 1);
    f->loop = main_loop_new();
    f->caps = HTTP_CAPS_DEFAULT;
    f->caps.body_bytes = 1u << 20;
    f->seen = g_string_new(NULL);
    *state = f;
    return 0;
}

static int teardown(void **state)
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

/* Runs a client against the loop; what it wrote to `out`, returned. */
static char *with_client(Fixture *f, void (*run)(Fixture *f, GString *out))
{
    ClientTask task = {f, run, g_string_new(NULL)};
    f->client_done = false;
    GThread *thread = g_thread_new("client", client_thread, &task);
    assert_true(main_loop_run_until(f->loop, &f->client_done, GUARD_US));
    g_thread_join(thread);
    return g_string_free(task.out, FALSE);
}

static int dial_to(const HttpServer *server)
{
    const char *port = strrchr(http_server_address(server), ':') + 1;
    struct sockaddr_in to = {.sin_family = AF_INET,
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                             .sin_port = htons((uint16_t)g_ascii_strtoull(port, NULL, 10))};
    struct timeval guard = {.tv_sec = CLIENT_GUARD_S};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &guard, sizeof guard);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &guard, sizeof guard);
    g_assert(connect(fd, (struct sockaddr *)&to, sizeof to) == 0);
    return fd;
}

static int dial(Fixture *f)
{
    return dial_to(f->server);
}

static void say(int fd, const char *text)
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

/* Until the other side closes or `until` has come. */
static void hear(int fd, GString *out, const char *until)
{
    char buffer[4096];
    ssize_t n;
    while ((until == NULL || strstr(out->str, until) == NULL) &&
           (n = recv(fd, buffer, sizeof buffer, 0)) > 0) {
        g_string_append_len(out, buffer, n);
    }
}

static bool is_closed_within(int fd, unsigned seconds)
{
    struct timeval guard = {.tv_sec = seconds};
    char byte;
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &guard, sizeof guard);
    ssize_t n = recv(fd, &byte, 1, 0);
    return n == 0 || (n < 0 && errno == ECONNRESET);
}

/* ---- tests ---- */

static void two_requests(Fixture *f, GString *out)
{
    int fd = dial(f);
    say(fd, "GET /a?b=c HTTP/1.1\r\nHost: x\r\nx-tag: t1\r\n\r\n");
    hear(fd, out, "hello");
    g_string_append(out, "\n");
    say(fd, "POST /b HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc");
    hear(fd, out, NULL);
    close(fd);
}

static void test_two_requests_on_one_connection(void **state)
{
    Fixture *f = *state;
    serve(f);
    g_autofree char *out = with_client(f, two_requests);
    assert_string_equal(f->seen->str, "GET /a t1 0\nPOST /b - 3\n");
    assert_non_null(strstr(out, "HTTP/1.1 200 OK"));
    assert_non_null(strstr(out, "X-Answer: yes"));
    assert_null(strstr(out, "X-Broken"));
}

static void chunked_upload(Fixture *f, GString *out)
{
    int fd = dial(f);
    say(fd, "POST /b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n");
    say(fd, "4\r\ndefg\r\n0\r\n\r\n");
    hear(fd, out, "hello");
    close(fd);
}

static void test_chunked_upload(void **state)
{
    Fixture *f = *state;
    serve(f);
    g_autofree char *out = with_client(f, chunked_upload);
    assert_string_equal(f->seen->str, "POST /b - 7\n");
}

static void read_stream(Fixture *f, GString *out)
{
    int fd = dial(f);
    say(fd, "GET /stream HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    hear(fd, out, NULL);
    close(fd);
}

static void test_stream_has_everything_in_order(void **state)
{
    Fixture *f = *state;
    serve(f);
    g_autofree char *out = with_client(f, read_stream);
    const char *body = strstr(out, "\r\n\r\n");
    assert_non_null(body);
    unsigned next = 0; /* chunk frames in between: numbers with a comma behind them are ours */
    for (const char *at = body; (at = strchr(at, ',')) != NULL; at++) {
        const char *begin = at;
        while (g_ascii_isdigit(begin[-1])) {
            begin--;
        }
        assert_int_equal(g_ascii_strtoull(begin, NULL, 10), next);
        next++;
    }
    assert_int_equal(next, 1000);
    assert_non_null(strstr(out, "\r\n0\r\n"));
    assert_false(f->gone);
}

static void leave_at_once(Fixture *f, GString *out)
{
    int fd = dial(f);
    say(fd, "GET /hold HTTP/1.1\r\nHost: x\r\n\r\n");
    struct timespec pause = {.tv_nsec = 20000000};
    nanosleep(&pause, NULL);
    close(fd);
}

static void test_client_that_leaves_is_noticed_at_once(void **state)
{
    Fixture *f = *state;
    serve(f);
    g_free(with_client(f, leave_at_once));
    int64_t begun = loop_now_us(main_loop_loop(f->loop));
    assert_true(main_loop_run_until(f->loop, &f->gone, GUARD_US));
    assert_true(loop_now_us(main_loop_loop(f->loop)) - begun < 5000000);
    assert_null(f->held);
}

static int idle_client_fd;

static void never_read(Fixture *f, GString *out)
{
    idle_client_fd = dial(f);
    say(idle_client_fd, "GET /flood HTTP/1.1\r\nHost: x\r\n\r\n");
}

static bool flood_is_over(Fixture *f)
{
    return f->n_handled > 0 && f->held == NULL;
}

static void test_slow_reader_is_bounded(void **state)
{
    Fixture *f = *state;
    serve(f);
    g_free(with_client(f, never_read));
    const bool never = false;
    for (int i = 0; i < 2000 && !flood_is_over(f); i++) {
        main_loop_run_until(f->loop, &never, 10000);
    }
    assert_true(flood_is_over(f));
    assert_true(f->most_waiting <= (1u << 20) + 65536);
    close(idle_client_fd);
}

static void read_when_told(Fixture *f, GString *out)
{
    int small = 64 << 10, fd = dial(f);
    uint64_t told;
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    say(fd, "GET /burst HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    g_assert(read(f->may_read, &told, sizeof told) == sizeof told);
    g_autofree char *buffer = g_malloc(1 << 20);
    size_t total = 0;
    ssize_t n;
    while ((n = recv(fd, buffer, 1 << 20, 0)) > 0) {
        total += (size_t)n;
    }
    g_string_append_printf(out, "%s", total > BURST_BYTES ? "all" : "cut");
    close(fd);
}

static void test_a_stall_is_told_from_a_burst(void **state)
{
    Fixture *f = *state;
    f->may_read = eventfd(0, EFD_CLOEXEC);
    serve(f);
    g_autofree char *out = with_client(f, read_when_told);
    assert_string_equal(out, "all");
    assert_int_equal(f->n_stalls, 1);
    assert_true(f->n_moves > 0 && !f->gone);
    close(f->may_read);
}

static void large_announced(Fixture *f, GString *out)
{
    int fd = dial(f);
    say(fd, "POST /b HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n");
    hear(fd, out, "}");
    close(fd);
}

static void large_sent(Fixture *f, GString *out)
{
    int fd = dial(f);
    g_autofree char *block = g_strnfill(1u << 20, 'x');
    say(fd, "POST /b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n");
    for (int i = 0; i < 8; i++) {
        say(fd, "100000\r\n");
        say(fd, block);
        say(fd, "\r\n");
    }
    say(fd, "0\r\n\r\n");
    hear(fd, out, "}");
    close(fd);
}

static void test_large_bodies_are_413(void **state)
{
    Fixture *f = *state;
    serve(f);
    g_autofree char *announced = with_client(f, large_announced);
    assert_non_null(strstr(announced, "HTTP/1.1 413"));
    assert_non_null(strstr(announced, "{\"status\":413"));
    g_autofree char *sent = with_client(f, large_sent);
    assert_non_null(strstr(sent, "HTTP/1.1 413"));
    assert_int_equal(f->n_handled, 0);
}

static void large_header(Fixture *f, GString *out)
{
    int fd = dial(f);
    g_autofree char *block = g_strnfill(64u << 10, 'x');
    say(fd, "GET /b HTTP/1.1\r\nHost: x\r\nX-Long: ");
    say(fd, block);
    say(fd, "\r\n\r\n");
    hear(fd, out, "\r\n\r\n");
    close(fd);
}

static void test_large_header_is_431(void **state)
{
    Fixture *f = *state;
    serve(f);
    g_autofree char *out = with_client(f, large_header);
    assert_non_null(strstr(out, "HTTP/1.1 431"));
    assert_int_equal(f->n_handled, 0);
}

static void dribble(Fixture *f, GString *out)
{
    int fd = dial(f);
    char byte;
    say(fd, "POST /b HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n");
    for (int i = 0; i < 1000; i++) { /* ten seconds, if it were let */
        struct timespec pause = {.tv_nsec = 10000000};
        say(fd, "x");
        nanosleep(&pause, NULL);
        if (recv(fd, &byte, 1, MSG_DONTWAIT) == 0) {
            g_string_append(out, "closed");
            break;
        }
    }
    close(fd);
}

static void test_dribbled_request_is_cut_off(void **state)
{
    Fixture *f = *state;
    f->caps.request_s = 1;
    serve(f);
    g_autofree char *out = with_client(f, dribble);
    assert_string_equal(out, "closed");
    assert_int_equal(f->n_handled, 0);
}

static void garbage(Fixture *f, GString *out)
{
    static const char *const texts[] = {
        "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        "GET\r\n\r\n",
        "\r\n\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"};
    for (size_t i = 0; i < G_N_ELEMENTS(texts); i++) {
        int fd = dial(f);
        say(fd, texts[i]);
        shutdown(fd, SHUT_WR);
        g_autoptr(GString) heard = g_string_new(NULL);
        hear(fd, heard, NULL);
        close(fd);
    }
    two_requests(f, out);
}

static void test_garbage_harms_nobody(void **state)
{
    Fixture *f = *state;
    serve(f);
    g_autofree char *out = with_client(f, garbage);
    assert_non_null(strstr(out, "hello"));
}

static void idle_socket(Fixture *f, GString *out)
{
    int fd = dial(f);
    g_string_append(out, is_closed_within(fd, 10) ? "closed" : "open");
    close(fd);
}

static void test_idle_socket_is_closed(void **state)
{
    Fixture *f = *state;
    f->caps.idle_s = 1;
    serve(f);
    g_autofree char *out = with_client(f, idle_socket);
    assert_string_equal(out, "closed");
}

typedef struct Three {
    int fds[3]; /* connections, in the order in which they were made */
} Three;

static Three dial_three(Fixture *f)
{
    return (Three){{dial(f), dial(f), dial(f)}};
}

static void close_three(const Three *c)
{
    for (size_t i = 0; i < G_N_ELEMENTS(c->fds); i++) {
        close(c->fds[i]);
    }
}

static void ask_for(int fd, const char *path)
{
    g_autofree char *head =
        g_strdup_printf("GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", path);
    say(fd, head);
}

static void three_of_one_source(Fixture *f, GString *out)
{
    const Three c = dial_three(f);
    g_string_append(out, is_closed_within(c.fds[2], 10) ? "third closed," : "third open,");
    ask_for(c.fds[0], "/a");
    hear(c.fds[0], out, "hello");
    close_three(&c);
}

static void test_connections_of_one_source_are_bounded(void **state)
{
    Fixture *f = *state;
    f->caps.per_source = 2;
    serve(f);
    g_autofree char *out = with_client(f, three_of_one_source);
    assert_true(g_str_has_prefix(out, "third closed,"));
    assert_non_null(strstr(out, "hello"));
}

/* The third is taken when the first has gone, not before. */
static void wait_in_the_queue(Fixture *f, GString *out)
{
    const Three c = dial_three(f);
    ask_for(c.fds[2], "/third");
    ask_for(c.fds[0], "/first");
    hear(c.fds[0], out, "hello");
    g_string_truncate(out, 0);
    hear(c.fds[2], out, "hello");
    close_three(&c);
}

static void test_connections_in_all_are_bounded(void **state)
{
    Fixture *f = *state;
    f->caps.connections = 2;
    serve(f);
    g_autofree char *out = with_client(f, wait_in_the_queue);
    assert_non_null(strstr(out, "hello"));
    assert_string_equal(f->seen->str, "GET /first - 0\nGET /third - 0\n");
}

enum { FEW_FILES = 128, MOST = FEW_FILES / 2 };

static void one_too_many(Fixture *f, GString *out)
{
    int fds[MOST + 1];
    for (int i = 0; i <= MOST; i++) {
        fds[i] = dial(f);
    }
    ask_for(fds[MOST], "/last");
    ask_for(fds[0], "/first");
    hear(fds[0], out, "hello");
    g_string_truncate(out, 0);
    hear(fds[MOST], out, "hello");
    for (int i = 0; i <= MOST; i++) {
        close(fds[i]);
    }
}

/* Half of few descriptors is kept from clients. */
static void test_connections_leave_files(void **state)
{
    Fixture *f = *state;
    struct rlimit before, few;
    getrlimit(RLIMIT_NOFILE, &before);
    few = (struct rlimit){.rlim_cur = FEW_FILES, .rlim_max = before.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &few), 0);
    serve(f);
    setrlimit(RLIMIT_NOFILE, &before);
    g_autofree char *out = with_client(f, one_too_many);
    assert_non_null(strstr(out, "hello"));
    assert_string_equal(f->seen->str, "GET /first - 0\nGET /last - 0\n");
}

/* Asks and waits for the answer, on a connection that stays. */
static void ask_and_hear(int fd, const char *path)
{
    g_autoptr(GString) answer = g_string_new(NULL);
    g_autofree char *head = g_strdup_printf("GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path);
    say(fd, head);
    hear(fd, answer, "hello");
}

/* One connection to each of two servers is all that both may have. */
static void third_of_two_servers(Fixture *f, GString *out)
{
    const int first = dial_to(f->server), second = dial_to(f->second);
    ask_and_hear(first, "/first");
    ask_and_hear(second, "/second");
    const int third = dial_to(f->second);
    ask_for(third, "/third");
    ask_and_hear(second, "/second");
    ask_and_hear(first, "/first");
    g_string_append_printf(out, "%u and %u;", http_server_n_connections(f->server),
                           http_server_n_connections(f->second));
    close(first); /* of the other server */
    hear(third, out, "hello");
    close(second);
    close(third);
}

static void test_servers_share_a_budget(void **state)
{
    Fixture *f = *state;
    f->budget = connection_budget_new(2);
    serve(f);
    f->second = open_server(f);
    g_autofree char *out = with_client(f, third_of_two_servers);
    assert_true(g_str_has_prefix(out, "1 and 1;"));
    assert_non_null(strstr(out, "hello"));
    assert_string_equal(f->seen->str, "GET /first - 0\nGET /second - 0\nGET /second - 0\n"
                                      "GET /first - 0\nGET /third - 0\n");
}

/* Whatever way connections go, their parts of the budget come back: closed by the client, by the
 * server's bounds, with the server. */
static void test_budget_comes_back(void **state)
{
    Fixture *f = *state;
    const bool never = false;
    f->budget = connection_budget_new(3);
    f->caps.per_source = 2;
    serve(f);
    for (int i = 0; i < 3; i++) {
        g_autofree char *out = with_client(f, three_of_one_source);
        assert_non_null(strstr(out, "hello"));
        for (int n = 0; n < 4000 && http_server_n_connections(f->server) > 0; n++) {
            main_loop_run_until(f->loop, &never, 5000); /* until it has seen that they are closed */
        }
    }
    http_server_free(f->server, 100);
    f->server = NULL;
    for (int i = 0; i < 3; i++) {
        assert_true(connection_budget_take(f->budget, -1));
    }
    assert_false(connection_budget_take(f->budget, -1));
    connection_budget_forget(f->budget, -1);
}

static void ask_and_not_read(Fixture *f, GString *out)
{
    int small = 4096, fd = dial(f);
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    say(fd, "GET /large HTTP/1.1\r\nHost: x\r\n\r\n");
    struct timespec pause = {.tv_sec = 1};
    for (int i = 0; i < 10 && http_server_n_connections(f->server) > 0; i++) {
        nanosleep(&pause, NULL);
    }
    g_string_append_printf(out, "%u", http_server_n_connections(f->server));
    close(fd);
}

static void test_answer_that_is_not_taken_is_dropped(void **state)
{
    Fixture *f = *state;
    f->caps.drain_s = 1;
    serve(f);
    g_autofree char *out = with_client(f, ask_and_not_read);
    assert_string_equal(out, "0");
}

static int held_client_fd;

static void hold(Fixture *f, GString *out)
{
    held_client_fd = dial(f);
    say(held_client_fd, "GET /hold HTTP/1.1\r\nHost: x\r\n\r\n");
}

static void test_stopping_tells_who_waits(void **state)
{
    Fixture *f = *state;
    const bool never = false;
    serve(f);
    g_free(with_client(f, hold));
    for (int i = 0; i < 1000 && f->held == NULL; i++) {
        main_loop_run_until(f->loop, &never, 5000);
    }
    assert_non_null(f->held);
    http_server_free(f->server, 50);
    f->server = NULL;
    assert_true(main_loop_run_until(f->loop, &f->gone, GUARD_US));
    close(held_client_fd);
}

static void test_answers_that_ended_leave_before_the_stop(void **state)
{
    Fixture *f = *state;
    const bool never = false;
    serve(f);
    g_free(with_client(f, hold));
    for (int i = 0; i < 1000 && f->held == NULL; i++) {
        main_loop_run_until(f->loop, &never, 5000);
    }
    http_reply(f->held, 200, "text/plain", g_strdup("last words"), 10);
    f->held = NULL;
    http_server_free(f->server, 5000);
    f->server = NULL;
    g_autoptr(GString) out = g_string_new(NULL);
    hear(held_client_fd, out, NULL);
    assert_non_null(strstr(out->str, "last words"));
    close(held_client_fd);
}

static void test_port_in_use_and_bad_addresses(void **state)
{
    Fixture *f = *state;
    serve(f);
    static const char *const bad[] = {"127.0.0.1", "nowhere.invalid:80", "127.0.0.1:x", ""};
    HttpServerOptions options = {.loop = main_loop_loop(f->loop),
                                 .listen = http_server_address(f->server),
                                 .caps = HTTP_CAPS_DEFAULT,
                                 .handler = on_request,
                                 .error_page = error_page,
                                 .error_type = "application/json"};
    g_autoptr(GError) error = NULL;
    assert_null(http_server_new(&options, &error));
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_IO));
    assert_non_null(strstr(error->message, "in use"));
    for (size_t i = 0; i < G_N_ELEMENTS(bad); i++) {
        g_clear_error(&error);
        options.listen = bad[i];
        assert_null(http_server_new(&options, &error));
        assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
    }
    g_clear_error(&error);
    options.listen = "127.0.0.1:0";
    options.certificate_pem = options.key_pem = "no PEM";
    assert_null(http_server_new(&options, &error));
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
}

int main(void)
{
    daemon_prepare();
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_two_requests_on_one_connection),
        TEST(test_chunked_upload),
        TEST(test_stream_has_everything_in_order),
        TEST(test_client_that_leaves_is_noticed_at_once),
        TEST(test_slow_reader_is_bounded),
        TEST(test_a_stall_is_told_from_a_burst),
        TEST(test_large_bodies_are_413),
        TEST(test_large_header_is_431),
        TEST(test_dribbled_request_is_cut_off),
        TEST(test_garbage_harms_nobody),
        TEST(test_idle_socket_is_closed),
        TEST(test_connections_of_one_source_are_bounded),
        TEST(test_connections_in_all_are_bounded),
        TEST(test_connections_leave_files),
        TEST(test_servers_share_a_budget),
        TEST(test_budget_comes_back),
        TEST(test_answer_that_is_not_taken_is_dropped),
        TEST(test_stopping_tells_who_waits),
        TEST(test_answers_that_ended_leave_before_the_stop),
        TEST(test_port_in_use_and_bad_addresses),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
