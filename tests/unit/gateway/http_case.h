/* What tests of the HTTP server share: handlers on a MainLoop, and a client thread with blocking
 * sockets, each of whose waits is bounded. */
#pragma once

#include "coordinator/gateway/http/http.h"
#include "transport/daemon/daemon.h"

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

#define GUARD_US (INT64_C(20) * 1000000)
enum { BURST_BYTES = 32 << 20 }; /* of /burst: far more than a socket's buffers */

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

int setup(void **state); /* cmocka's; a Fixture */
int teardown(void **state);
HttpServerOptions server_options(Fixture *f);
HttpServer *open_server(Fixture *f);
void serve(Fixture *f); /* f->server */

/* Runs a client against the loop; what it wrote to `out`, returned. */
char *with_client(Fixture *f, void (*run)(Fixture *f, GString *out));
int client_socket(void);
void connect_to(int fd, const HttpServer *server);
int dial_to(const HttpServer *server); /* both */
int dial(Fixture *f);                  /* to f->server */
void say(int fd, const char *text);
/* Until the other side closes or `until` has come. */
void hear(int fd, GString *out, const char *until);
