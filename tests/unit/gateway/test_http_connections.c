/* How many connections the server takes: its bound, the budget that servers share, descriptors. */
#include "tests/unit/gateway/http_case.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

static bool is_closed_within(int fd, unsigned seconds)
{
    struct timeval guard = {.tv_sec = seconds};
    char byte;
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &guard, sizeof guard);
    ssize_t n = recv(fd, &byte, 1, 0);
    return n == 0 || (n < 0 && errno == ECONNRESET);
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

/* ---- no descriptor is left (meson.build: these stand in for what the server calls) ---- */

enum { REFUSALS = 2, ROUNDS_MOST = 100 };

static unsigned n_rounds; /* the server's thread */
static struct {
    int64_t at_us;
    unsigned round;
} refusals[REFUSALS];         /* the first: when accept4() found no descriptor */
static atomic_uint n_refused; /* may be more */

int __real_accept4(int fd, struct sockaddr *address, socklen_t *length, int flags);
int __wrap_accept4(int fd, struct sockaddr *address, socklen_t *length, int flags);
int __wrap_accept4(int fd, struct sockaddr *address, socklen_t *length, int flags)
{
    const int got = __real_accept4(fd, address, length, flags);
    if (got < 0 && errno == EMFILE) {
        const unsigned i = atomic_load(&n_refused);
        if (i < REFUSALS) {
            refusals[i].at_us = g_get_monotonic_time();
            refusals[i].round = n_rounds;
        }
        atomic_store(&n_refused, i + 1);
        errno = EMFILE;
    }
    return got;
}

int __real_epoll_wait(int fd, struct epoll_event *events, int n, int timeout_ms);
int __wrap_epoll_wait(int fd, struct epoll_event *events, int n, int timeout_ms);
int __wrap_epoll_wait(int fd, struct epoll_event *events, int n, int timeout_ms)
{
    n_rounds++;
    return __real_epoll_wait(fd, events, n, timeout_ms);
}

/* Nothing can be opened any more; returns the limit that there was. */
static rlim_t forbid_files(int any_fd)
{
    struct rlimit files;
    const int lowest_free = dup(any_fd);
    close(lowest_free);
    getrlimit(RLIMIT_NOFILE, &files);
    const struct rlimit none = {.rlim_cur = (rlim_t)lowest_free, .rlim_max = files.rlim_max};
    g_assert(setrlimit(RLIMIT_NOFILE, &none) == 0);
    return files.rlim_cur;
}

static void allow_files(rlim_t n)
{
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = n;
    g_assert(setrlimit(RLIMIT_NOFILE, &files) == 0);
}

static void ask_without_files(Fixture *f, GString *out)
{
    const int first = dial(f), second = client_socket();
    const int64_t by_us = g_get_monotonic_time() + GUARD_US;
    ask_and_hear(first, "/first");
    const rlim_t files = forbid_files(first);
    connect_to(second, f->server);
    ask_for(second, "/second");
    while (atomic_load(&n_refused) < REFUSALS && g_get_monotonic_time() < by_us) {
        g_usleep(1000);
    }
    ask_and_hear(first, "/still");
    allow_files(files);
    hear(second, out, "hello");
    close(first);
    close(second);
}

/* It tries again by itself, a second later and without turning meanwhile; who is connected is
 * served, and who waits when there are descriptors again. The part of the budget that a try took is
 * back, or there would be none for the next. */
static void test_no_descriptor_is_left(void **state)
{
    Fixture *f = *state;
    f->budget = connection_budget_new(2);
    serve(f);
    g_autofree char *out = with_client(f, ask_without_files);
    assert_true(atomic_load(&n_refused) >= REFUSALS);
    assert_true(refusals[1].at_us - refusals[0].at_us >= 900000);
    assert_in_range(refusals[1].round - refusals[0].round, 1, ROUNDS_MOST);
    assert_non_null(strstr(out, "hello"));
    assert_string_equal(f->seen->str, "GET /first - 0\nGET /still - 0\nGET /second - 0\n");
}

int main(void)
{
    daemon_prepare();
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_idle_socket_is_closed),          TEST(test_connections_of_one_source_are_bounded),
        TEST(test_connections_in_all_are_bounded), TEST(test_connections_leave_files),
        TEST(test_servers_share_a_budget),         TEST(test_budget_comes_back),
        TEST(test_no_descriptor_is_left),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
