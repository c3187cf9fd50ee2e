/* weft probe, login, doctor: a connection to somewhere, looked at from this host. */
#include "tools/weft/verbs.h"

#include "proto/base/error.h"
#include "proto/base/units.h"
#include "proto/base/version.h"
#include "transport/crypto/x509.h"

#include "grpc/health.pb-c.h"
#include "weft/v1/admin.pb-c.h"
#include "weft/v1/join.pb-c.h"

#include <errno.h>
#include <fcntl.h>
#include <glib/gstdio.h>
#include <netdb.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/statvfs.h>
#include <sys/time.h>
#include <unistd.h>

/* ---- files of an identity ---- */

static char *read_file(const char *directory, const char *name)
{
    g_autofree char *path = g_build_filename(directory, name, NULL);
    char *text = NULL;
    g_file_get_contents(path, &text, NULL, NULL);
    return text;
}

static bool write_file(const char *directory, const char *name, const char *text, int mode,
                       GError **error)
{
    g_autofree char *path = g_build_filename(directory, name, NULL);
    GError *why = NULL;
    if (!g_file_set_contents_full(path, text, -1, G_FILE_SET_CONTENTS_CONSISTENT, mode, &why)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO, "cannot write %s: %s", path, why->message);
        g_error_free(why);
        return false;
    }
    return true;
}

/* ---- probe ---- */

enum {
    PROBE_SERVING = 0,
    PROBE_ARGUMENTS = 1,
    PROBE_CONNECT = 2,
    PROBE_RPC = 3,
    PROBE_NOT_SERVING = 4
};

typedef struct ProbeOptions {
    CommonOptions common;
    char *service;
    bool plain;
    int64_t timeout_us;
} ProbeOptions;

static const Option PROBE_OPTIONS[] = {
    {"service", 0, OPTION_STRING, offsetof(ProbeOptions, service), "NAME",
     "service to ask for, empty = the whole", NULL, 0, 0, NULL, false},
    {"plain", 0, OPTION_FLAG, offsetof(ProbeOptions, plain), "", "no TLS: a --health-listen port",
     NULL, 0, 0, NULL, false},
    {"timeout", 0, OPTION_DURATION, offsetof(ProbeOptions, timeout_us), "TIME",
     "for connecting and asking", NULL, 0, 0, NULL, false},
    COMMON_OPTIONS(ProbeOptions),
    {0},
};

static void probe_defaults(void *values)
{
    ((ProbeOptions *)values)->timeout_us = 5 * G_USEC_PER_SEC;
}

static Grpc__Health__V1__HealthCheckResponse *check(const ProbeOptions *o, const char *address,
                                                    const char *server_name, GError **error)
{
    g_autofree char *state = cli_state_directory(&o->common);
    static const char *const places[] = {"coordinator", "", "client"};
    g_autofree char *ca = NULL, *certificate = NULL, *key = NULL;
    for (unsigned i = 0; !o->plain && i < G_N_ELEMENTS(places) && key == NULL; i++) {
        g_autofree char *directory = g_build_filename(state, places[i], NULL);
        g_free(ca);
        g_free(certificate);
        ca = read_file(directory, "ca.crt");
        certificate = read_file(directory, "admin.crt");
        key = read_file(directory, "admin.key");
    }
    if (!o->plain && key == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_DENIED,
                    "no certificate in %s: `weft login` first, or --plain for a health port",
                    state);
        return NULL;
    }
    Client *client = client_new_with(address, o->plain ? NULL : ca, o->plain ? NULL : certificate,
                                     o->plain ? NULL : key, server_name, error);
    if (client == NULL) {
        return NULL;
    }
    Grpc__Health__V1__HealthCheckRequest request = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    ProtobufCMessage *response = NULL;
    request.service = o->service != NULL ? o->service : "";
    client_call(client, &grpc__health__v1__health__descriptor, "Check", &request.base,
                o->timeout_us / 1000, &response, error);
    client_free(client);
    return (Grpc__Health__V1__HealthCheckResponse *)response;
}

#define GREETING_WAIT_MS 1000
#define HTTP2_FRAME_HEADER 9u /* RFC 9113, 4.1 */
#define HTTP2_SETTINGS 4u

static int connect_to(const char *address)
{
    const char *colon = strrchr(address, ':');
    g_autofree char *host = colon != NULL ? g_strndup(address, (gsize)(colon - address)) : NULL;
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *list = NULL;
    int fd = -1;
    if (colon == NULL || getaddrinfo(host, colon + 1, &hints, &list) != 0) {
        return -1;
    }
    for (struct addrinfo *i = list; i != NULL && fd < 0; i = i->ai_next) {
        fd = socket(i->ai_family, i->ai_socktype | SOCK_CLOEXEC, 0);
        if (fd >= 0 && connect(fd, i->ai_addr, i->ai_addrlen) != 0) {
            close(fd);
            fd = -1;
        }
    }
    freeaddrinfo(list);
    return fd;
}

/* Whether a plaintext HTTP/2 server is there: it speaks first, with a SETTINGS frame of stream 0,
 * where one with TLS waits for the client. */
static bool greets_without_tls(const char *address)
{
    uint8_t frame[HTTP2_FRAME_HEADER] = {0};
    const int fd = connect_to(address);
    if (fd < 0) {
        return false;
    }
    const struct timeval limit = {.tv_sec = GREETING_WAIT_MS / 1000};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    const bool whole = recv(fd, frame, sizeof frame, MSG_WAITALL) == (ssize_t)sizeof frame;
    close(fd);
    return whole && frame[3] == HTTP2_SETTINGS && (frame[5] | frame[6] | frame[7] | frame[8]) == 0;
}

static int probe_fail(const ProbeOptions *o, const char *address, const GError *error)
{
    const bool unreachable = g_error_matches(error, WEFT_ERROR, WEFT_ERROR_UNREACHABLE);
    if (unreachable && !o->plain && greets_without_tls(address)) {
        /* Not asked by itself: whoever sits between could answer for a daemon that is dead. */
        fprintf(stderr,
                "weft: probe of %s: it speaks without TLS: if it is a --health-listen port, "
                "ask it with --plain\n",
                address);
    } else {
        fprintf(stderr, "weft: probe of %s: %s%s\n", address, error->message,
                unreachable && o->plain ? "; only --health-listen ports are asked with --plain"
                                        : "");
    }
    return unreachable ? PROBE_CONNECT : PROBE_RPC;
}

static int probe_run(const Verb *verb, void *values, GPtrArray *rest)
{
    ProbeOptions *o = values;
    g_autoptr(GError) error = NULL;
    if (rest->len != 1) {
        cli_usage(verb, "one address is expected");
        return PROBE_ARGUMENTS;
    }
    Grpc__Health__V1__HealthCheckResponse *response =
        check(o, rest->pdata[0], "weft-coordinator", &error);
    if (response == NULL && !o->plain &&
        g_error_matches(error, WEFT_ERROR, WEFT_ERROR_UNREACHABLE)) {
        g_clear_error(&error); /* the certificate there may be a worker's */
        response = check(o, rest->pdata[0], "weft-worker", &error);
    }
    if (response == NULL) {
        return probe_fail(o, rest->pdata[0], error);
    }
    const bool serving =
        response->status == GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING;
    printf("status: %s\n", serving ? "SERVING" : "NOT_SERVING");
    protobuf_c_message_free_unpacked(&response->base, NULL);
    return serving ? PROBE_SERVING : PROBE_NOT_SERVING;
}

const Verb VERB_PROBE = {"probe",
                         "ADDR [--service S]",
                         "ask a daemon's health, with grpc_health_probe's exit codes",
                         PROBE_OPTIONS,
                         sizeof(ProbeOptions),
                         probe_defaults,
                         probe_run};

/* ---- login ---- */

typedef struct LoginOptions {
    CommonOptions common;
    char *token, *ca_hash;
} LoginOptions;

static const Option LOGIN_OPTIONS[] = {
    {"token", 0, OPTION_STRING, offsetof(LoginOptions, token), "T",
     "from `weft token create --role admin`", "WEFT_TOKEN", 0, 0, NULL, false},
    {"ca-hash", 0, OPTION_STRING, offsetof(LoginOptions, ca_hash), "H",
     "sha256:... printed beside the token", NULL, 0, 0, NULL, false},
    COMMON_OPTIONS(LoginOptions),
    {0},
};

static Weft__V1__JoinResponse *join(const LoginOptions *o, const char *address, const char *ca_pem,
                                    const char *key_pem, GError **error)
{
    g_autofree char *request_pem = x509_new_request(key_pem, g_get_user_name(), error);
    Client *client = request_pem != NULL
                         ? client_new_with(address, ca_pem, NULL, NULL, "weft-coordinator", error)
                         : NULL;
    if (client == NULL) {
        return NULL;
    }
    Weft__V1__JoinRequest request = WEFT__V1__JOIN_REQUEST__INIT;
    request.caller = "client";
    ProtobufCMessage *response = NULL;
    request.protocol_version = WEFT_PROTOCOL_VERSION;
    request.release = WEFT_VERSION;
    request.token = o->token;
    request.csr_pem.data = (uint8_t *)request_pem;
    request.csr_pem.len = strlen(request_pem);
    client_call(client, &weft__v1__join__descriptor, "Join", &request.base, 10000, &response,
                error);
    client_free(client);
    return (Weft__V1__JoinResponse *)response;
}

static bool keep_identity(const LoginOptions *o, const Weft__V1__JoinResponse *r,
                          const char *key_pem, GError **error)
{
    if (r->ca_pem.len == 0 || r->certificate_pem.len == 0) {
        g_set_error(
            error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
            "the coordinator's answer to join has no certificate: run the same release everywhere");
        return false;
    }
    g_autofree char *state = cli_state_directory(&o->common);
    g_autofree char *directory = g_build_filename(state, "client", NULL);
    g_autofree char *ca = g_strndup((const char *)r->ca_pem.data, r->ca_pem.len);
    g_autofree char *certificate =
        g_strndup((const char *)r->certificate_pem.data, r->certificate_pem.len);
    g_autofree char *endpoint = g_strdup_printf("control %s\n", r->control_address);
    if (g_mkdir_with_parents(directory, 0700) != 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO, "cannot make %s: %s", directory,
                    g_strerror(errno));
        return false;
    }
    return write_file(directory, "ca.crt", ca, 0644, error) &&
           write_file(directory, "admin.crt", certificate, 0644, error) &&
           write_file(directory, "admin.key", key_pem, 0600, error) &&
           write_file(directory, "endpoint", endpoint, 0644, error);
}

static int login_run(const Verb *verb, void *values, GPtrArray *rest)
{
    LoginOptions *o = values;
    GError *error = NULL;
    uint8_t hash[32];
    if (rest->len != 1 || o->token == NULL || o->ca_hash == NULL) {
        return cli_usage(verb, "the address, the token and the CA hash are needed");
    }
    const char *address = rest->pdata[0];
    g_autofree char *ca = NULL;
    char *key = NULL;
    if (o->common.dry_run) {
        printf("would log in to %s\n", address);
        return 0;
    }
    if (!x509_parse_hash(o->ca_hash, hash, &error) ||
        (ca = x509_fetch_ca(address, hash, 5000, &error)) == NULL ||
        (key = x509_new_key(&error)) == NULL) {
        return cli_fail(error);
    }
    Weft__V1__JoinResponse *response = join(o, address, ca, key, &error);
    const bool ok = response != NULL && keep_identity(o, response, key, &error);
    if (ok && !o->common.quiet) {
        fprintf(stderr, "logged in to %s as %s, role %s\n", response->control_address,
                response->name, response->role);
    }
    if (response != NULL) {
        protobuf_c_message_free_unpacked(&response->base, NULL);
    }
    x509_free_key(key);
    return ok ? 0 : cli_fail(error);
}

const Verb VERB_LOGIN = {
    "login",       "ADDR --token T --ca-hash H", "make this account a remote client",
    LOGIN_OPTIONS, sizeof(LoginOptions),         NULL,
    login_run};

/* ---- doctor ---- */

typedef struct DoctorOptions {
    CommonOptions common;
} DoctorOptions;

static const Option DOCTOR_OPTIONS[] = {COMMON_OPTIONS(DoctorOptions), {0}};

typedef struct Doctor {
    json_t *checks;
    TextTable *table;
    unsigned failed;
} Doctor;

static void finding(Doctor *d, const char *what, bool ok, const char *format, ...)
    G_GNUC_PRINTF(4, 5);
static void finding(Doctor *d, const char *what, bool ok, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    g_autofree char *text = g_strdup_vprintf(format, args);
    va_end(args);
    d->failed += !ok;
    text_table_row(d->table, what, ok ? "ok" : "PROBLEM", text, NULL);
    json_array_append_new(d->checks,
                          json_pack("{s:s,s:b,s:s}", "check", what, "ok", ok, "text", text));
}

static void check_cpu(Doctor *d)
{
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    finding(d, "cpu", avx2, "%u cores, %s", daemon_n_cpus(),
            avx512 ? "avx512"
            : avx2 ? "avx2"
                   : "neither AVX2 nor AVX-512: generic kernels, very slow");
}

static void check_memory(Doctor *d)
{
    g_autofree char *text = NULL;
    uint64_t kib = 0;
    if (g_file_get_contents("/proc/meminfo", &text, NULL, NULL)) {
        const char *line = strstr(text, "MemAvailable:");
        kib = line != NULL ? g_ascii_strtoull(line + strlen("MemAvailable:"), NULL, 10) : 0;
    }
    g_autofree char *size = units_format_size(kib * 1024);
    finding(d, "memory", kib > (512 << 10), "%s available", size);
}

static void check_state(Doctor *d, const char *state)
{
    struct statvfs fs;
    g_autofree char *parent = g_strdup(state);
    while (!g_file_test(parent, G_FILE_TEST_IS_DIR)) {
        char *up = g_path_get_dirname(parent);
        g_free(parent);
        parent = up;
    }
    const bool writable = access(parent, W_OK) == 0;
    const uint64_t free_bytes = statvfs(parent, &fs) == 0 ? (uint64_t)fs.f_bavail * fs.f_frsize : 0;
    g_autofree char *size = units_format_size(free_bytes);
    finding(d, "state", writable && free_bytes > (1u << 30), "%s, %s free%s", state, size,
            writable ? "" : ", not writable");
}

static void check_members(Doctor *d, const Weft__V1__StatusResponse *s)
{
    for (size_t i = 0; i < s->n_members; i++) {
        const Weft__V1__Member *m = s->members[i];
        const bool ok = strcmp(m->state, "ready") == 0 || strcmp(m->state, "serving") == 0 ||
                        strcmp(m->state, "draining") == 0;
        g_autofree char *what = g_strdup_printf("member %s", m->name);
        if (m->measured == NULL) {
            finding(d, what, ok, "%s: not heard of since the coordinator started%s%s", m->state,
                    m->reason[0] != '\0' ? ": " : "", m->reason);
            continue;
        }
        finding(d, what, ok,
                "%s at %s, %u threads, %s, reads %.1f GB/s, link %.0f us %.1f GB/s, dropped "
                "%" G_GUINT64_FORMAT ", loop lag %.1f ms%s%s",
                m->state, m->address, m->threads, m->n_devices > 0 ? m->devices[0]->name : m->isa,
                m->measured->read_bytes_per_s / 1e9, m->measured->link_latency_s * 1e6,
                m->measured->link_bytes_per_s / 1e9,
                m->counters != NULL ? m->counters->dropped_stale + m->counters->dropped_replayed +
                                          m->counters->dropped_corrupt
                                    : 0,
                m->loop_lag_ms, m->reason[0] != '\0' ? ": " : "", m->reason);
    }
}

static void check_cluster(Doctor *d, const CommonOptions *common)
{
    g_autoptr(GError) error = NULL;
    Client *client = client_new(common, &error);
    Weft__V1__StatusRequest request = WEFT__V1__STATUS_REQUEST__INIT;
    ProtobufCMessage *response = NULL;
    request.details = true;
    if (client == NULL || !client_call(client, &weft__v1__admin__descriptor, "Status",
                                       &request.base, 5000, &response, &error)) {
        finding(d, "coordinator", false, "%s", error->message);
    } else {
        const Weft__V1__StatusResponse *s = (const Weft__V1__StatusResponse *)response;
        finding(d, "coordinator", strcmp(s->release, WEFT_VERSION) == 0,
                "release %s (this is %s), generation %" G_GUINT64_FORMAT
                ", at %s, loop lag %.1f ms",
                s->release, WEFT_VERSION, s->generation, s->control_address, s->loop_lag_ms);
        check_members(d, s);
        protobuf_c_message_free_unpacked(response, NULL);
    }
    client_free(client);
}

/* The lines that the worker of this release prints with an option; NULL where it is not here. */
static GStrv ask_worker(const char *option)
{
    g_autofree char *worker = local_find_program("weft-worker");
    g_autofree char *text = NULL;
    char *argv[] = {worker, (char *)option, NULL};
    int status = 0;
    if (worker == NULL ||
        !g_spawn_sync(NULL, argv, NULL, G_SPAWN_STDERR_TO_DEV_NULL, NULL, NULL, &text, NULL,
                      &status, NULL) ||
        status != 0) {
        return NULL;
    }
    return g_strsplit(g_strchomp(text), "\n", -1);
}

/* Which instruction multiplies bf16 here: the worker measures it. */
static void check_bf16(Doctor *d)
{
    g_auto(GStrv) lines = ask_worker("--version");
    for (char **line = lines; line != NULL && *line != NULL; line++) {
        if (g_str_has_prefix(*line, "bf16: ")) {
            finding(d, "bf16", true, "%s", *line + strlen("bf16: "));
        }
    }
}

/* What the worker of this release finds. A host without a device is no problem; a card whose device
 * the worker cannot have is one. */
static void check_devices(Doctor *d)
{
    g_auto(GStrv) lines = ask_worker("--devices");
    if (lines == NULL) {
        finding(d, "gpu", true, "no device: weft-worker is not here to look for one");
        return;
    }
    const bool card = g_file_test("/dev/nvidiactl", G_FILE_TEST_EXISTS);
    for (char **line = lines; *line != NULL; line++) {
        finding(d, "gpu", !card || !g_str_has_prefix(*line, "no device"), "%s", *line);
    }
}

static int doctor_run(const Verb *verb, void *values, GPtrArray *rest)
{
    if (rest->len > 0) {
        return cli_usage(verb, "'%s' is not expected", (char *)rest->pdata[0]);
    }
    DoctorOptions *o = values;
    Doctor d = {.checks = json_array(),
                .table = text_table_new((const char *const[]){"CHECK", "RESULT", "FOUND", NULL})};
    g_autofree char *state = cli_state_directory(&o->common);
    check_cpu(&d);
    check_bf16(&d);
    check_memory(&d);
    check_state(&d, state);
    check_cluster(&d, &o->common);
    check_devices(&d);
    if (o->common.json) {
        json_t *object = cli_json_new();
        json_object_set(object, "checks", d.checks);
        json_object_set_new(object, "problems", json_integer(d.failed));
        cli_print_json(object);
        text_table_free(d.table);
    } else {
        text_table_print(d.table);
    }
    json_decref(d.checks);
    return d.failed == 0 ? 0 : 4;
}

const Verb VERB_DOCTOR = {"doctor",
                          "",
                          "look at this host, the cluster and every link",
                          DOCTOR_OPTIONS,
                          sizeof(DoctorOptions),
                          NULL,
                          doctor_run};
