/* Bytes that a client sends instead of a request: to a real server on loopback, which must close or
 * answer, and must serve the next client. The server and its loop live as long as the process. */
#include "coordinator/gateway/http/http.h"
#include "coordinator/gateway/openai/api_error.h"
#include "coordinator/gateway/openai/api_keys.h"
#include "proto/base/random.h"
#include "transport/daemon/daemon.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define GUARD_S 20
#define SENT_LIMIT (1u << 20)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint16_t port;
static ApiKeys *keys;

/* Reads all that a handler may read. */
static void on_request(HttpExchange *x, void *user)
{
    const char *names[] = {"Authorization", "Content-Type", "X-Request-Id", "Content-Length"};
    size_t total = strlen(http_method(x)) + strlen(http_path(x)) + strlen(http_source(x)) +
                   g_bytes_get_size(http_body(x));
    for (size_t i = 0; i < G_N_ELEMENTS(names); i++) {
        const char *value = http_header(x, names[i]);
        total += value != NULL ? strlen(value) : 0;
        if (value != NULL) {
            http_add_header(x, "X-Back", value);
        }
    }
    g_assert(api_keys_name(keys, http_header(x, "Authorization")) == NULL);
    char *text = g_strdup_printf("%zu", total);
    http_reply(x, 200, "text/plain", text, strlen(text));
}

static void *run_loop(void *user)
{
    main_loop_run(user);
    return NULL;
}

static void start(void)
{
    daemon_prepare();
    MainLoop *loop = main_loop_new();
    HttpServerOptions options = {.loop = main_loop_loop(loop),
                                 .listen = "127.0.0.1:0",
                                 .caps = HTTP_CAPS_DEFAULT,
                                 .handler = on_request,
                                 .error_page = api_error_page,
                                 .error_type = "application/json"};
    keys = api_keys_new(main_loop_loop(loop), NULL, random_system());
    HttpServer *server = http_server_new(&options, NULL);
    g_assert(server != NULL);
    port = (uint16_t)g_ascii_strtoull(strrchr(http_server_address(server), ':') + 1, NULL, 10);
    g_thread_new("loop", run_loop, loop);
}

/* What comes back until the server closes; asserts that it does. */
static size_t exchange(const void *bytes, size_t size, char *answer, size_t most)
{
    struct sockaddr_in to = {
        .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK), .sin_port = htons(port)};
    struct timeval guard = {.tv_sec = GUARD_S};
    char rest[4096];
    size_t length = 0;
    ssize_t n;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &guard, sizeof guard);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &guard, sizeof guard);
    g_assert(connect(fd, (struct sockaddr *)&to, sizeof to) == 0);
    for (size_t at = 0;
         at < size && (n = send(fd, (const char *)bytes + at, size - at, MSG_NOSIGNAL)) > 0;
         at += (size_t)n) {
    }
    if (most == 0) {
        shutdown(fd, SHUT_WR);
    }
    while ((n = recv(fd, most > length ? answer + length : rest,
                     most > length ? most - length : sizeof rest, 0)) > 0) {
        length += (size_t)n;
    }
    g_assert(n == 0 || errno == ECONNRESET);
    close(fd);
    return length;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char good[] = "GET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    char answer[1024] = "";
    if (port == 0) {
        start();
    }
    exchange(data, MIN(size, SENT_LIMIT), NULL, 0);
    exchange(good, sizeof good - 1, answer, sizeof answer - 1);
    g_assert(strstr(answer, "200 OK") != NULL);
    return 0;
}
