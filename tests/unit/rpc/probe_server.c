/* rpc-probe-server ADDRESS [CERTIFICATE KEY CA]: serves Probe, health and reflection over gRPC in a
 * process of its own, so that tests can kill it. Prints its address and ends when its standard
 * input does. */
#include "tests/unit/rpc/probe_service.h"
#include "transport/daemon/daemon.h"

#include <stdio.h>
#include <unistd.h>

static char *read_file(const char *path)
{
    char *text = NULL;
    g_autoptr(GError) error = NULL;
    if (!g_file_get_contents(path, &text, NULL, &error)) {
        g_printerr("%s\n", error->message);
    }
    return text;
}

static void on_input(void *user)
{
    char byte;
    if (read(STDIN_FILENO, &byte, 1) <= 0) {
        main_loop_quit(user);
    }
}

int main(int argc, char **argv)
{
    if (argc != 2 && argc != 5) {
        g_printerr("usage: %s ADDRESS [CERTIFICATE KEY CA]\n", argv[0]);
        return 2;
    }
    probe_declare();
    MainLoop *loop = main_loop_new();
    g_autofree char *certificate = argc == 5 ? read_file(argv[2]) : NULL;
    g_autofree char *key = argc == 5 ? read_file(argv[3]) : NULL;
    g_autofree char *ca = argc == 5 ? read_file(argv[4]) : NULL;
    RpcServerOptions options = {
        .listen = argv[1],
        .credentials = {ca, certificate, key, ca != NULL},
        .health = true,
        .reflection = true,
        .log = log_stderr(),
    };
    g_autoptr(GError) error = NULL;
    RpcServer *server =
        rpc_server_new(rpc_transport_grpc(), main_loop_loop(loop), &options, &error);
    if (!server) {
        g_printerr("%s\n", error->message);
        return 1;
    }
    ProbeService probe;
    probe_service_init(&probe, main_loop_loop(loop));
    probe_service_add(&probe, server, 0);
    rpc_server_start(server, NULL);
    printf("%s\n", rpc_server_address(server));
    fflush(stdout);
    main_loop_watch_fd(loop, STDIN_FILENO, on_input, loop);
    main_loop_run(loop);
    rpc_server_free(server, 200);
    main_loop_free(loop);
    return 0;
}
