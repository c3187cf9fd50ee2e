/* The server over real sockets: requests, answers, clients that do not behave, and its end. */
#include "tests/unit/gateway/http_case.h"

#include "proto/base/error.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

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
    HttpServerOptions options = server_options(f);
    options.listen = http_server_address(f->server);
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
        TEST(test_answer_that_is_not_taken_is_dropped),
        TEST(test_stopping_tells_who_waits),
        TEST(test_answers_that_ended_leave_before_the_stop),
        TEST(test_port_in_use_and_bad_addresses),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
