/* weft-coordinator: flags, signals, and one Coordinator on one main loop. Foreground; logs to
 * stderr. */
#include "coordinator/ca/state_files.h"
#include "coordinator/coordinator.h"
#include "proto/base/error.h"
#include "proto/config/options.h"
#include "transport/daemon/daemon.h"

#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define DAY_US (INT64_C(86400) * 1000000)
#define RECOVERY_WAIT_US (INT64_C(60) * 1000000)

typedef struct Settings {
    char *listen, *join_listen, *health_listen, *advertise, *state, *models, *seal, *config;
    int64_t recovery_wait_us;
    char *http, *http_certificate, *http_key, *http_limits, *http_cache;
    bool version, verbose;
} Settings;

#define FIELD(name) offsetof(Settings, name)
static const Option coordinator_options[] = {
    {"listen", 0, OPTION_STRING, FIELD(listen), "ADDR:PORT",
     "control listener, mutual TLS (default 0.0.0.0:7470; port 0 = any free)", "WEFT_LISTEN"},
    {"join-listen", 0, OPTION_STRING, FIELD(join_listen), "ADDR:PORT",
     "listener where workers join, open only while a token is valid (default 0.0.0.0:7471)",
     "WEFT_JOIN_LISTEN"},
    {"health-listen", 0, OPTION_STRING, FIELD(health_listen), "ADDR:PORT",
     "plaintext listener that serves grpc.health.v1 only (default: none)", "WEFT_HEALTH_LISTEN"},
    {"advertise", 0, OPTION_STRING, FIELD(advertise), "HOST",
     "name or address by which workers reach this host (default: from --listen)", "WEFT_ADVERTISE"},
    {"state", 0, OPTION_STRING, FIELD(state), "DIR",
     "what must survive a restart: CA, certificates, members, jobs (default "
     "$XDG_STATE_HOME/weft/coordinator)",
     "WEFT_COORDINATOR_STATE"},
    {"models", 0, OPTION_STRING, FIELD(models), "DIR",
     "the only directory whose files may be served (default: none)", "WEFT_MODELS"},
    {"seal", 0, OPTION_STRING, FIELD(seal), "on|off",
     "workers' payloads encrypted and authenticated (default on); off = CRC32C only, for trusted "
     "fabrics",
     "WEFT_SEAL", 0, 0, "on|off", false},
    {"recovery-wait", 0, OPTION_DURATION, FIELD(recovery_wait_us), "TIME",
     "after a loss, requests that cannot be placed wait so long for workers (default 60s, 0s = not "
     "at all)",
     "WEFT_RECOVERY_WAIT"},
    {"http", 0, OPTION_STRING, FIELD(http), "ADDR:PORT",
     "OpenAI-compatible HTTP for the models that are served (default: none)", "WEFT_HTTP"},
    {"http-certificate", 0, OPTION_STRING, FIELD(http_certificate), "FILE",
     "PEM chain: all HTTP listeners speak TLS (default: plaintext)", "WEFT_HTTP_CERTIFICATE"},
    {"http-key", 0, OPTION_STRING, FIELD(http_key), "FILE", "PEM private key to --http-certificate",
     "WEFT_HTTP_KEY"},
    {"http-limits", 0, OPTION_STRING, FIELD(http_limits), "NAME=N,...",
     "what requests and sockets may take; the names are listed below", "WEFT_HTTP_LIMITS"},
    {"http-cache", 0, OPTION_STRING, FIELD(http_cache), "shared|key",
     "whether API keys share cached prefixes (default shared)", "WEFT_HTTP_CACHE", 0, 0,
     "shared|key", false},
    {"config", 0, OPTION_STRING, FIELD(config), "FILE", "YAML file with these options", NULL},
    {"verbose", 'v', OPTION_FLAG, FIELD(verbose), NULL, "log details too", NULL},
    {"version", 0, OPTION_FLAG, FIELD(version), NULL, "print versions and exit", NULL},
    {NULL},
};

typedef struct Daemon {
    MainLoop *loop;
    Coordinator *coordinator;
    int exit_code;
} Daemon;

static int complain(const GError *error)
{
    fprintf(stderr, "weft-coordinator: %s\n", error->message);
    return weft_error_exit_code(error);
}

static void print_version(void)
{
    g_autofree char *rpc = rpc_libraries(), *store = store_sqlite_library(),
                    *libraries = g_strdup_printf("%s, %s", rpc, store);
    daemon_print_version("weft-coordinator", libraries);
}

static void print_help(void)
{
    g_autofree char *limits = api_limits_help();
    g_autoptr(GString) text = g_string_new("usage: weft-coordinator [OPTIONS]\n\nDecides which "
                                           "worker holds what, and serves clients.\n\n");
    options_help(coordinator_options, text);
    g_string_append_printf(text, "\nHTTP limits and their defaults: %s.\n", limits);
    fputs(text->str, stdout);
}

static void on_stop(void *user)
{
    Daemon *d = user;
    main_loop_quit(d->loop);
}

static double lag_ms(void *user)
{
    return main_loop_lag_ms(user);
}

static void on_started(const GError *error, void *user)
{
    Daemon *d = user;
    if (error != NULL) {
        d->exit_code = complain(error);
        main_loop_quit(d->loop);
        return;
    }
    g_autofree char *state = g_strdup_printf("READY=1\nSTATUS=serving at %s",
                                             coordinator_control_address(d->coordinator));
    daemon_notify(state);
}

typedef struct HttpSettings {
    ApiLimits limits;
    char *certificate, *key;
} HttpSettings;

static void http_settings_clear(HttpSettings *h)
{
    g_free(h->certificate);
    g_free(h->key);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(HttpSettings, http_settings_clear)

static bool read_pem(const char *path, char **out, GError **error)
{
    g_autoptr(GError) why = NULL;
    if (path == NULL || g_file_get_contents(path, out, NULL, &why)) {
        return true;
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND, "http certificate or key: %s",
                why->message);
    return false;
}

static bool read_http(const Settings *s, HttpSettings *out, GError **error)
{
    out->limits = api_limits_default();
    if ((s->http_certificate == NULL) != (s->http_key == NULL)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "--http-certificate and --http-key belong together: give both or none");
        return false;
    }
    return api_limits_parse(s->http_limits, &out->limits, error) &&
           read_pem(s->http_certificate, &out->certificate, error) &&
           read_pem(s->http_key, &out->key, error);
}

static int serve(const Settings *s, GError **error)
{
    g_auto(HttpSettings) http = {0};
    if (!read_http(s, &http, error)) {
        return weft_error_exit_code(*error);
    }
    g_autofree char *path = g_build_filename(s->state, "weft.db", NULL);
    int lock = state_dir_open(s->state, error);
    if (lock < 0) {
        return weft_error_exit_code(*error);
    }
    Daemon d = {.loop = main_loop_new()};
    Store *store = store_sqlite_open(path, main_loop_loop(d.loop), error);
    if (store == NULL) {
        main_loop_free(d.loop);
        close(lock);
        return weft_error_exit_code(*error);
    }
    Log *log = log_stderr();
    log->min_level = s->verbose ? LOG_LEVEL_DEBUG : LOG_LEVEL_INFO;
    CoordinatorOptions options = {
        .loop = main_loop_loop(d.loop),
        .transport = rpc_transport_grpc(),
        .log = log,
        .random = random_system(),
        .store = store,
        .listen = s->listen != NULL ? s->listen : "0.0.0.0:7470",
        .join_listen = s->join_listen != NULL ? s->join_listen : "0.0.0.0:7471",
        .health_listen = s->health_listen,
        .advertise = s->advertise,
        .state_dir = s->state,
        .models_dir = s->models,
        .http_listen = s->http,
        .http_certificate_pem = http.certificate,
        .http_key_pem = http.key,
        .http_limits = &http.limits,
        .http_isolate_keys = g_strcmp0(s->http_cache, "key") == 0,
        .seal_off = g_strcmp0(s->seal, "off") == 0,
        .recovery_wait_us = MIN(s->recovery_wait_us, DAY_US),
        .threads = MAX(2u, daemon_n_cpus() / 2),
        .lag_ms = lag_ms,
        .lag_user = d.loop,
        .on_stop = on_stop,
        .stop_user = &d};
    d.coordinator = coordinator_new(&options);
    main_loop_on_stall(d.loop, daemon_log_stall, log);
    main_loop_on_signal(d.loop, SIGTERM, on_stop, &d);
    main_loop_on_signal(d.loop, SIGINT, on_stop, &d);
    coordinator_start(d.coordinator, on_started, &d);
    main_loop_run(d.loop);
    daemon_notify("STOPPING=1");
    coordinator_free(d.coordinator);
    main_loop_free(d.loop);
    close(lock);
    return d.exit_code;
}

static void default_state(Settings *s)
{
    if (s->state == NULL) {
        s->state = g_build_filename(g_get_user_state_dir(), "weft", "coordinator", NULL);
    }
}

int main(int argc, char **argv)
{
    g_autoptr(GError) error = NULL;
    g_autoptr(GPtrArray) rest = g_ptr_array_new();
    Settings s = {.recovery_wait_us = RECOVERY_WAIT_US};
    bool help = false;
    int code = 0;
    daemon_prepare();
    if (!options_parse(coordinator_options, &s, argc, argv, rest, &help, &error)) {
        code = complain(error);
    } else if (help) {
        print_help();
    } else if (s.version) {
        print_version();
    } else if (rest->len > 0) {
        fprintf(stderr, "weft-coordinator: unexpected argument %s: see --help\n",
                (const char *)g_ptr_array_index(rest, 0));
        code = 2;
    } else {
        default_state(&s);
        code = serve(&s, &error);
        if (error != NULL) {
            complain(error);
        }
    }
    options_clear(coordinator_options, &s);
    return code;
}
