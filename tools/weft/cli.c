#include "tools/weft/cli.h"

#include "proto/base/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int cli_fail(GError *error)
{
    const int code = weft_error_exit_code(error);
    fprintf(stderr, "weft: %s\n", error->message);
    g_error_free(error);
    return code;
}

int cli_no_plan(char *const *violations, size_t n_violations, char *const *alternatives,
                size_t n_alternatives)
{
    fprintf(stderr, "weft: no legal plan: %s",
            n_violations > 0 ? violations[0] : "the members do not suffice");
    for (size_t i = 1; i < n_violations; i++) {
        fprintf(stderr, "; %s", violations[i]);
    }
    for (size_t i = 0; i < n_alternatives; i++) {
        fprintf(stderr, "%s%s", i == 0 ? ": legal would be " : ", or ", alternatives[i]);
    }
    fprintf(stderr, "\n");
    return 2;
}

int cli_usage(const Verb *verb, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    g_autofree char *text = g_strdup_vprintf(format, args);
    va_end(args);
    fprintf(stderr, "weft: %s: usage: weft %s %s\n", text, verb->name, verb->arguments);
    return 2;
}

char *cli_state_directory(const CommonOptions *common)
{
    if (common->state != NULL) {
        return g_canonicalize_filename(common->state, NULL);
    }
    return g_build_filename(g_get_user_state_dir(), "weft", NULL);
}

/* ---- connection ---- */

static void on_signal(void *user)
{
    Client *c = user;
    c->interrupted |= interrupts_take(&c->interrupts);
    if (c->on_interrupt != NULL) {
        c->on_interrupt(c->interrupt_user);
    }
}

Client *client_new_with(const char *address, const char *ca_pem, const char *certificate_pem,
                        const char *key_pem, const char *server_name, GError **error)
{
    Interrupts interrupts;
    if (!interrupts_open(&interrupts, error)) { /* before there are threads of the channel */
        return NULL;
    }
    Client *c = g_new0(Client, 1);
    c->interrupts = interrupts;
    c->loop = main_loop_new();
    c->address = g_strdup(address);
    const RpcChannelOptions options = {
        .target = address,
        .credentials = {.ca_pem = ca_pem, .certificate_pem = certificate_pem, .key_pem = key_pem},
        .server_name = server_name};
    c->channel = rpc_channel_new(rpc_transport_grpc(), main_loop_loop(c->loop), &options, error);
    if (c->channel == NULL) {
        client_free(c);
        return NULL;
    }
    main_loop_watch_fd(c->loop, c->interrupts.fd, on_signal, c);
    return c;
}

/* What the coordinator wrote on start under this key ("control", "pid") in STATE/endpoint;
 * returned, or NULL. */
static char *endpoint_value(const char *state, const char *key)
{
    const size_t n = strlen(key);
    g_autofree char *path = g_build_filename(state, "endpoint", NULL);
    g_autofree char *text = NULL;
    if (!g_file_get_contents(path, &text, NULL, NULL)) {
        return NULL;
    }
    g_auto(GStrv) lines = g_strsplit(text, "\n", -1);
    for (char **line = lines; *line != NULL; line++) {
        if (strncmp(*line, key, n) == 0 && (*line)[n] == ' ') {
            return g_strdup(g_strstrip(*line + n + 1));
        }
    }
    return NULL;
}

/* True if a coordinator of this host wrote the endpoint file and its process is gone. */
static bool coordinator_ended(const char *state)
{
    g_autofree char *pid = endpoint_value(state, "pid");
    return pid != NULL && !local_process_exists(atoi(pid));
}

typedef struct Identity {
    char *ca, *certificate, *key, *address;
    bool ended; /* its coordinator does not run */
} Identity;

static void identity_clear(Identity *i)
{
    g_free(i->ca);
    g_free(i->certificate);
    g_free(i->key);
    g_free(i->address);
}

static bool read_identity(const char *directory, Identity *out)
{
    g_autofree char *ca = g_build_filename(directory, "ca.crt", NULL);
    g_autofree char *certificate = g_build_filename(directory, "admin.crt", NULL);
    g_autofree char *key = g_build_filename(directory, "admin.key", NULL);
    return g_file_get_contents(ca, &out->ca, NULL, NULL) &&
           g_file_get_contents(certificate, &out->certificate, NULL, NULL) &&
           g_file_get_contents(key, &out->key, NULL, NULL);
}

/* A coordinator's own state directory, the one `weft up` made inside --state, or what `weft login`
 * left there. */
static bool find_identity(const char *state, Identity *out)
{
    static const char *const places[] = {"coordinator", "", "client"};
    for (unsigned i = 0; i < G_N_ELEMENTS(places); i++) {
        g_autofree char *directory = g_build_filename(state, places[i], NULL);
        if (read_identity(directory, out)) {
            out->address = endpoint_value(directory, "control");
            out->ended = coordinator_ended(directory);
            return true;
        }
        identity_clear(out);
        *out = (Identity){0};
    }
    return false;
}

Client *client_new(const CommonOptions *common, GError **error)
{
    g_autofree char *state = cli_state_directory(common);
    Identity id = {0};
    if (!find_identity(state, &id)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_UNREACHABLE,
                    "no cluster is known in %s: start one with `weft up`, or name a coordinator's "
                    "--state, or `weft login`",
                    state);
        return NULL;
    }
    const char *address = common->cluster != NULL ? common->cluster : id.address;
    Client *c = NULL;
    if (address == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_UNREACHABLE,
                    "%s does not say where the coordinator is: give --cluster ADDR", state);
    } else if (common->cluster == NULL && id.ended) {
        g_set_error(
            error, WEFT_ERROR, WEFT_ERROR_UNREACHABLE,
            "the cluster in %s is not running: start it with `weft up`, or its weft-coordinator",
            state);
    } else {
        c = client_new_with(address, id.ca, id.certificate, id.key, "weft-coordinator", error);
        if (c != NULL) {
            c->verbose = common->verbose;
        }
    }
    identity_clear(&id);
    return c;
}

void client_free(Client *c)
{
    if (c == NULL) {
        return;
    }
    if (c->channel != NULL) {
        rpc_channel_free(c->channel);
    }
    main_loop_free(c->loop);
    interrupts_close(&c->interrupts);
    g_free(c->address);
    g_free(c);
}

/* ---- calls that wait ---- */

#define BUSY_TRIES 5
#define BUSY_PAUSE_US 1000000 /* gRPC's longest back-off */

typedef struct Waiting {
    const ProtobufCServiceDescriptor *service;
    const char *method;
    const ProtobufCMessage *request;
    int64_t deadline_ms;
    RpcClientCall *call;
    bool done;
    GError *error;
    ProtobufCMessage *response;
    void (*on_message)(const ProtobufCMessage *message, void *user);
    void *user;
} Waiting;

static void keep_response(const ProtobufCMessage *message, void *user)
{
    Waiting *w = user;
    const size_t size = protobuf_c_message_get_packed_size(message);
    g_autofree uint8_t *bytes = g_malloc(size + 1);
    protobuf_c_message_pack(message, bytes);
    if (w->response != NULL) {
        protobuf_c_message_free_unpacked(w->response, NULL);
    }
    w->response = protobuf_c_message_unpack(message->descriptor, NULL, size, bytes);
}

static void hand_on(const ProtobufCMessage *message, void *user)
{
    Waiting *w = user;
    w->on_message(message, w->user);
}

static void call_done(const GError *error, void *user)
{
    Waiting *w = user;
    w->error = error != NULL ? g_error_copy(error) : NULL;
    w->call = NULL;
    w->done = true;
}

static void cancel_call(void *user)
{
    Waiting *w = user;
    if (w->call != NULL) {
        rpc_client_cancel(w->call);
    }
}

/* The transport's words begin with the method (rpc.h); what the coordinator itself says does not.
 */
static bool none_answered(const Waiting *w)
{
    return g_error_matches(w->error, WEFT_ERROR, WEFT_ERROR_UNREACHABLE) &&
           g_str_has_prefix(w->error->message, w->service->name);
}

/* gRPC's account of a failed connection has the reason at its end; --verbose shows all of it. */
static void say_unreachable(const Client *c, GError *e)
{
    static const char *const before_reason[] = {
        "Failed to connect to remote host: ", "last error: UNKNOWN: ", "last error: "};
    const char *reason = e->message;
    for (unsigned i = 0; !c->verbose && i < G_N_ELEMENTS(before_reason); i++) {
        const char *at = strstr(e->message, before_reason[i]);
        if (at != NULL) {
            reason = at + strlen(before_reason[i]);
            break;
        }
    }
    char *message = g_strdup_printf(
        "nothing of weft answers at %s: %s: is it running, and is this its address?", c->address,
        reason);
    g_free(e->message);
    e->message = message;
}

/* The connection stood, and no handshake came about within gRPC's time for it: a host with more
 * work than it can do. Nothing was sent. */
static bool was_busy(const GError *e)
{
    return g_error_matches(e, WEFT_ERROR, WEFT_ERROR_UNREACHABLE) &&
           (strstr(e->message, "Handshake read failed") != NULL ||
            strstr(e->message, "Handshake write failed") != NULL ||
            strstr(e->message, "before receiving SETTINGS") != NULL);
}

static void call_once(Client *c, Waiting *w)
{
    w->done = false;
    w->call = rpc_call_start(
        c->channel, w->service, w->method, w->request, w->deadline_ms, false,
        (RpcCallbacks){w->on_message != NULL ? hand_on : keep_response, call_done}, w);
    c->on_interrupt = cancel_call;
    c->interrupt_user = w;
    main_loop_run_until(c->loop, &w->done, -1);
    c->on_interrupt = NULL;
}

/* An interrupt that came between two calls ends the next one before it begins. */
static bool wait_for_call(Client *c, Waiting *w, GError **error)
{
    if (c->interrupted) {
        g_set_error_literal(error, WEFT_ERROR, WEFT_ERROR_CANCELLED, "interrupted");
        return false;
    }
    call_once(c, w);
    for (int tries = 1; tries < BUSY_TRIES && !c->interrupted && was_busy(w->error); tries++) {
        g_clear_error(&w->error);
        main_loop_run_until(c->loop, &c->interrupted, BUSY_PAUSE_US);
        call_once(c, w);
    }
    if (w->error == NULL) {
        return true;
    }
    if (c->interrupted) {
        g_clear_error(&w->error);
        w->error = g_error_new_literal(WEFT_ERROR, WEFT_ERROR_CANCELLED, "interrupted");
    } else if (none_answered(w)) {
        say_unreachable(c, w->error);
    }
    g_propagate_error(error, w->error);
    return false;
}

bool client_call(Client *c, const ProtobufCServiceDescriptor *service, const char *method,
                 const ProtobufCMessage *request, int64_t deadline_ms, ProtobufCMessage **response,
                 GError **error)
{
    Waiting w = {
        .service = service, .method = method, .request = request, .deadline_ms = deadline_ms};
    if (!wait_for_call(c, &w, error)) {
        if (w.response != NULL) {
            protobuf_c_message_free_unpacked(w.response, NULL);
        }
        return false;
    }
    *response = w.response;
    if (w.response == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL, "%s answered nothing", method);
        return false;
    }
    return true;
}

bool client_stream(Client *c, const ProtobufCServiceDescriptor *service, const char *method,
                   const ProtobufCMessage *request, int64_t deadline_ms,
                   void (*on_message)(const ProtobufCMessage *message, void *user), void *user,
                   GError **error)
{
    Waiting w = {service, method, request, deadline_ms, .on_message = on_message, .user = user};
    return wait_for_call(c, &w, error);
}

void client_stop(Client *c)
{
    if (c->on_interrupt != NULL) {
        c->on_interrupt(c->interrupt_user);
    }
}

/* ---- output ---- */

json_t *cli_json_new(void)
{
    return json_pack("{s:i}", "version", 1);
}

json_t *cli_json_text(const char *text)
{
    g_autofree char *valid = g_utf8_make_valid(text, -1);
    return json_string(valid);
}

void cli_print_json(json_t *object)
{
    char *text = json_dumps(object, JSON_PRESERVE_ORDER | JSON_COMPACT | JSON_REAL_PRECISION(9));
    printf("%s\n", text);
    fflush(stdout);
    free(text);
    json_decref(object);
}

static bool progress_shown;
static gint64 progress_last_us;

void cli_progress(const CommonOptions *common, const char *format, ...)
{
    if (common->quiet) {
        return;
    }
    va_list args;
    va_start(args, format);
    g_autofree char *text = g_strdup_vprintf(format, args);
    va_end(args);
    if (isatty(STDERR_FILENO)) {
        fprintf(stderr, "\r%s\033[K", text);
        progress_shown = true;
    } else if (g_get_monotonic_time() - progress_last_us >
               G_USEC_PER_SEC) { /* a file or pipe: a line a second at most */
        progress_last_us = g_get_monotonic_time();
        fprintf(stderr, "%s\n", text);
    }
    fflush(stderr);
}

void cli_progress_end(const CommonOptions *common)
{
    if (progress_shown) {
        fprintf(stderr, "\r\033[K");
        progress_shown = false;
    }
}

/* ---- tables ---- */

struct TextTable {
    GPtrArray *rows; /* char ** */
    unsigned columns;
};

TextTable *text_table_new(const char *const *header)
{
    TextTable *t = g_new0(TextTable, 1);
    t->rows = g_ptr_array_new_with_free_func((GDestroyNotify)g_strfreev);
    t->columns = g_strv_length((char **)header);
    g_ptr_array_add(t->rows, g_strdupv((char **)header));
    return t;
}

void text_table_row(TextTable *t, ...)
{
    char **row = g_new0(char *, t->columns + 1);
    va_list args;
    va_start(args, t);
    for (unsigned i = 0; i < t->columns; i++) {
        row[i] = g_strdup(va_arg(args, const char *));
    }
    va_end(args);
    g_ptr_array_add(t->rows, row);
}

static glong column_width(const TextTable *t, unsigned column)
{
    glong width = 0;
    for (guint i = 0; i < t->rows->len; i++) {
        width = MAX(width, g_utf8_strlen(((char **)g_ptr_array_index(t->rows, i))[column], -1));
    }
    return width;
}

void text_table_fit(TextTable *t, unsigned column)
{
    enum { SCREEN = 80, GAP = 2, LEAST = 8 };
    glong left = SCREEN;
    for (unsigned c = 0; c < t->columns; c++) {
        left -= c == column ? 0 : column_width(t, c) + GAP;
    }
    left = MAX(left, LEAST);
    for (guint r = 0; r < t->rows->len; r++) {
        char **cell = &((char **)g_ptr_array_index(t->rows, r))[column];
        if (g_utf8_strlen(*cell, -1) > left) {
            g_autofree char *kept = g_utf8_substring(*cell, 0, left - 3);
            g_free(*cell);
            *cell = g_strconcat(kept, "...", NULL);
        }
    }
}

void text_table_print(TextTable *t)
{
    for (guint r = 0; r < t->rows->len; r++) {
        char **row = g_ptr_array_index(t->rows, r);
        for (unsigned c = 0; c < t->columns; c++) {
            const glong width = column_width(t, c);
            printf(c + 1 < t->columns ? "%s%*s  " : "%s\n", row[c],
                   (int)(width - g_utf8_strlen(row[c], -1)), "");
        }
    }
    text_table_free(t);
}

void text_table_free(TextTable *t)
{
    g_ptr_array_unref(t->rows);
    g_free(t);
}
