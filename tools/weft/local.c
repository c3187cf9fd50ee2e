/* A cluster on this machine: real daemons with mutual TLS on loopback, for `weft up`, `weft down`
 * and --up N.
 *
 * STATE/coordinator, STATE/worker-N: the daemons' own state; STATE/cache: slices, shared;
 * STATE/NAME.log: their logs; STATE/up: one line a process, "name pid start-time", so that `down`
 * stops what `up` started and nothing that got its number later. The last of them is the supervisor
 * (supervise.c), which starts again what ends. It alone changes the file while it lives: whoever
 * else wants to ends it first. */
#include "tools/weft/cli.h"

#include "proto/base/error.h"
#include "weft/v1/admin.pb-c.h"

#include <errno.h>
#include <arpa/inet.h>
#include <fcntl.h>
#include <glib/gstdio.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <netinet/in.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

struct LocalCluster {
    char *state;
    bool temporary;
    unsigned n_ready;   /* workers, when all had come up */
    GPtrArray *drained; /* names of those that came up drained, char * */
};

enum {
    START_TIMEOUT_US = 60000000,
    STOP_TIMEOUT_US = 8000000,
    POLL_US = 20000,
    PORT_WAIT_US = 3000000
};

/* ---- processes ---- */

typedef struct Process {
    char *name;
    pid_t pid;
    char *started; /* field 22 of /proc/PID/stat */
} Process;

static void process_free(Process *p)
{
    g_free(p->name);
    g_free(p->started);
    g_free(p);
}

static char *start_time_of(pid_t pid)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/stat", (int)pid);
    g_autofree char *text = NULL;
    if (!g_file_get_contents(path, &text, NULL, NULL)) {
        return NULL;
    }
    const char *after_name = strrchr(text, ')');
    if (after_name == NULL || after_name[1] != ' ') {
        return NULL;
    }
    g_auto(GStrv) fields = g_strsplit(after_name + 2, " ", -1); /* from field 3 on, proc(5) */
    if (g_strv_length(fields) < 20) {
        return NULL;
    }
    /* A zombie is gone but for its parent, unless other threads of it still hold its sockets. */
    const bool gone = fields[0][0] == 'Z' && strtoul(fields[17], NULL, 10) <= 1;
    return gone ? NULL : g_strdup(fields[19]);
}

bool local_process_exists(int pid)
{
    g_autofree char *started = start_time_of(pid);
    return started != NULL;
}

static bool process_alive(const Process *p)
{
    g_autofree char *now = start_time_of(p->pid);
    return now != NULL && strcmp(now, p->started) == 0;
}

static GPtrArray *read_processes(const char *state)
{
    GPtrArray *list = g_ptr_array_new_with_free_func((GDestroyNotify)process_free);
    g_autofree char *path = g_build_filename(state, "up", NULL);
    g_autofree char *text = NULL;
    if (!g_file_get_contents(path, &text, NULL, NULL)) {
        return list;
    }
    g_auto(GStrv) lines = g_strsplit(text, "\n", -1);
    for (char **line = lines; *line != NULL; line++) {
        char name[64], started[32];
        int pid;
        if (sscanf(*line, "%63s %d %31s", name, &pid, started) == 3) {
            Process *p = g_new0(Process, 1);
            *p = (Process){g_strdup(name), pid, g_strdup(started)};
            g_ptr_array_add(list, p);
        }
    }
    return list;
}

static bool write_processes(const char *state, GPtrArray *list, GError **error)
{
    g_autoptr(GString) text = g_string_new(NULL);
    for (guint i = 0; i < list->len; i++) {
        const Process *p = g_ptr_array_index(list, i);
        g_string_append_printf(text, "%s %d %s\n", p->name, (int)p->pid, p->started);
    }
    g_autofree char *path = g_build_filename(state, "up", NULL);
    return g_file_set_contents_full(path, text->str, (gssize)text->len,
                                    G_FILE_SET_CONTENTS_CONSISTENT, 0600, error);
}

char *local_find_program(const char *name)
{
    g_autofree char *self = g_file_read_link("/proc/self/exe", NULL);
    g_autofree char *here = self != NULL ? g_path_get_dirname(self) : g_strdup(".");
    const char *folder = strcmp(name, "weft-worker") == 0 ? "worker" : "coordinator";
    char *candidates[] = {g_build_filename(here, name, NULL),
                          g_build_filename(here, "..", "..", folder, name, NULL)};
    char *found = NULL;
    for (unsigned i = 0; i < G_N_ELEMENTS(candidates); i++) {
        if (found == NULL && g_file_test(candidates[i], G_FILE_TEST_IS_EXECUTABLE)) {
            found = g_canonicalize_filename(candidates[i], NULL);
        }
        g_free(candidates[i]);
    }
    return found != NULL ? found : g_find_program_in_path(name);
}

typedef struct Spawn {
    const char *log;
    bool detach;
} Spawn;

static void in_child(gpointer user)
{
    const Spawn *s = user;
    const int log = open(s->log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    const int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    dup2(null, 0);
    dup2(log, 1);
    dup2(log, 2);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL); /* the supervisor blocks what its children must hear */
    setsid();
    if (!s->detach) {
        prctl(PR_SET_PDEATHSIG, SIGTERM);
    }
    signal(SIGINT,
           SIG_IGN); /* the terminal's Ctrl-C is for the client, which ends the cluster in order */
}

/* environment: NULL = ours. */
static bool start_process(const char *state, const char *name, char **argv, char **environment,
                          bool detach, GPtrArray *list, GError **error)
{
    g_autofree char *log_name = g_strconcat(name, ".log", NULL);
    g_autofree char *log = g_build_filename(state, log_name, NULL);
    Spawn spawn = {log, detach};
    GPid pid;
    g_autofree char *program = local_find_program(argv[0]);
    if (program == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND,
                    "%s is neither beside weft nor on the PATH: build or install it", argv[0]);
        return false;
    }
    argv[0] = program;
    GError *why = NULL;
    if (!g_spawn_async(NULL, argv, environment, G_SPAWN_DO_NOT_REAP_CHILD, in_child, &spawn, &pid,
                       &why)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_FAILED, "cannot start %s: %s", name,
                    why->message);
        g_error_free(why);
        return false;
    }
    Process *p = g_new0(Process, 1);
    *p = (Process){g_strdup(name), pid, start_time_of(pid)};
    if (p->started == NULL) {
        p->started = g_strdup("0");
    }
    g_ptr_array_add(list, p);
    return true;
}

/* The last line of a daemon's log, to say why it ended. */
static char *last_words(const char *state, const char *name)
{
    g_autofree char *log_name = g_strconcat(name, ".log", NULL);
    g_autofree char *path = g_build_filename(state, log_name, NULL);
    g_autofree char *text = NULL;
    if (!g_file_get_contents(path, &text, NULL, NULL)) {
        return g_strdup("no log");
    }
    g_strchomp(text);
    const char *newline = strrchr(text, '\n');
    return g_strdup(newline != NULL ? newline + 1 : text);
}

static bool all_alive(const char *state, GPtrArray *list, GError **error)
{
    for (guint i = 0; i < list->len; i++) {
        const Process *p = g_ptr_array_index(list, i);
        if (waitpid(p->pid, NULL, WNOHANG) > 0 || !process_alive(p)) {
            g_autofree char *words = last_words(state, p->name);
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_FAILED, "%s ended at once: %s (log in %s)",
                        p->name, words, state);
            return false;
        }
    }
    return true;
}

/* ---- the steps of `up` ---- */

static bool port_is_free(unsigned port)
{
    const struct sockaddr_in at = {.sin_family = AF_INET,
                                   .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                                   .sin_port = htons((uint16_t)port)};
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    const bool is_free = fd >= 0 && bind(fd, (const struct sockaddr *)&at, sizeof at) == 0;
    close(fd);
    return is_free;
}

/* Whoever had the port may still be closing it. */
static bool port_comes_free(unsigned port)
{
    const gint64 limit = g_get_monotonic_time() + PORT_WAIT_US;
    while (!port_is_free(port)) {
        if (g_get_monotonic_time() > limit) {
            return false;
        }
        g_usleep(POLL_US);
    }
    return true;
}

/* The control port of the last time, which workers of this state directory know; any free one at
 * first, or when somebody has taken it. */
static char *control_listen(const char *endpoint)
{
    g_autofree char *text = NULL;
    unsigned port = 0;
    if (g_file_get_contents(endpoint, &text, NULL, NULL) &&
        sscanf(text, "control 127.0.0.1:%u", &port) == 1 && port < 65536 && port_comes_free(port)) {
        return g_strdup_printf("127.0.0.1:%u", port);
    }
    return g_strdup("127.0.0.1:0");
}

/* interruptible: a signal ends the wait; the supervisor first sees the coordinator up. */
static bool start_coordinator(const char *state, bool detach, bool interruptible, GPtrArray *list,
                              GError **error)
{
    g_autofree char *own = g_build_filename(state, "coordinator", NULL);
    g_autofree char *endpoint = g_build_filename(own, "endpoint", NULL);
    g_autofree char *listen = control_listen(endpoint);
    g_unlink(endpoint);
    char *argv[] = {
        "weft-coordinator", "--listen", listen, "--join-listen", "127.0.0.1:0", "--state", own,
        "--models",         "/",        NULL};
    if (!start_process(state, "coordinator", argv, NULL, detach, list, error)) {
        return false;
    }
    const gint64 limit = g_get_monotonic_time() + START_TIMEOUT_US;
    while (!g_file_test(endpoint, G_FILE_TEST_EXISTS)) {
        if (!all_alive(state, list, error) || (interruptible && !interrupts_none_waits(error))) {
            return false;
        }
        if (g_get_monotonic_time() > limit) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_DEADLINE,
                        "the coordinator did not come up within 60 s: see %s/coordinator.log",
                        state);
            return false;
        }
        g_usleep(POLL_US);
    }
    return true;
}

static uint64_t memory_share(unsigned n_workers)
{
    g_autofree char *text = NULL;
    uint64_t available_kib = 4 << 20;
    if (g_file_get_contents("/proc/meminfo", &text, NULL, NULL)) {
        const char *line = strstr(text, "MemAvailable:");
        if (line != NULL) {
            available_kib = g_ascii_strtoull(line + strlen("MemAvailable:"), NULL, 10);
        }
    }
    return available_kib * 1024 / 10 * 9 / n_workers;
}

/* The CPUs of worker i, as --cpu-list: of those that this process may use, in equal shares or as
 * many as it is to have threads. Where they do not suffice for all, neighbours share a set: the
 * planner sees it and cuts by it (cpu_share.h). NULL where a worker has more threads than CPUs. */
static char *cpus_of(unsigned i, const LocalOptions *o, unsigned *threads)
{
    g_autoptr(GArray) cpus = daemon_cpus();
    for (uint32_t cpu = 0; cpus->len == 0 && cpu < daemon_n_cpus(); cpu++) {
        g_array_append_val(cpus, cpu);
    }
    const unsigned share = o->n_threads > 0 ? o->n_threads : MAX(1u, cpus->len / o->n_workers);
    const unsigned n_sets = MIN(cpus->len / share, o->n_workers);
    *threads = share;
    if (n_sets == 0) {
        return NULL;
    }
    const unsigned first = i * n_sets / o->n_workers * share;
    GString *text = g_string_new(NULL);
    for (unsigned k = 0; k < share; k++) {
        g_string_append_printf(text, "%s%u", k > 0 ? "," : "",
                               g_array_index(cpus, uint32_t, first + k));
    }
    return g_string_free(text, FALSE);
}

static bool start_worker(const char *state, unsigned i, const LocalOptions *o,
                         const Weft__V1__CreateTokenResponse *token, const char *ca_hash,
                         GPtrArray *list, GError **error)
{
    unsigned threads;
    g_autofree char *cpus = cpus_of(i, o, &threads);
    g_autofree char *name = g_strdup_printf("worker-%u", i + 1);
    g_autofree char *own = g_build_filename(state, name, NULL);
    g_autofree char *cache = g_build_filename(state, "cache", NULL);
    g_autofree char *thread_text = g_strdup_printf("%u", threads);
    g_autofree char *memory = g_strdup_printf(
        "%" G_GUINT64_FORMAT, o->memory_bytes > 0 ? o->memory_bytes : memory_share(o->n_workers));
    g_auto(GStrv) environment =
        g_environ_setenv(g_get_environ(), "WEFT_TOKEN", token->token,
                         TRUE); /* command lines are for all users to read */
    char *always[] = {"weft-worker", "--name",   name,          "--state",   own,
                      "--cache",     cache,      "--threads",   thread_text, "--memory",
                      memory,        "--listen", "127.0.0.1:0", "--models",  "/"};
    g_autoptr(GPtrArray) argv = g_ptr_array_new();
    for (size_t k = 0; k < G_N_ELEMENTS(always); k++) {
        g_ptr_array_add(argv, always[k]);
    }
    if (cpus != NULL) {
        g_ptr_array_add(argv, "--cpu-list");
        g_ptr_array_add(argv, cpus);
    }
    if (token->token[0] != '\0') { /* else it has its certificate */
        g_ptr_array_add(argv, "--join");
        g_ptr_array_add(argv, token->join_address);
        g_ptr_array_add(argv, "--ca-hash");
        g_ptr_array_add(argv, (char *)ca_hash);
    }
    g_ptr_array_add(argv, NULL);
    return start_process(state, name, (char **)argv->pdata, environment, o->detach, list, error);
}

static bool ask_token(Client *client, unsigned n, Weft__V1__CreateTokenResponse **token,
                      GError **error)
{
    Weft__V1__CreateTokenRequest request = WEFT__V1__CREATE_TOKEN_REQUEST__INIT;
    request.role = "worker";
    request.ttl_ms = 300000;
    request.uses = n;
    return client_call(client, &weft__v1__admin__descriptor, "CreateToken", &request.base, 10000,
                       (ProtobufCMessage **)token, error);
}

/* Who has come up: what n_ready and drained are. */
static bool look_at_members(LocalCluster *cluster, Client *client, GError **error)
{
    Weft__V1__StatusRequest request = WEFT__V1__STATUS_REQUEST__INIT;
    Weft__V1__StatusResponse *status;
    if (!client_call(client, &weft__v1__admin__descriptor, "Status", &request.base, 10000,
                     (ProtobufCMessage **)&status, error)) {
        return false;
    }
    cluster->n_ready = 0;
    g_ptr_array_set_size(cluster->drained, 0);
    for (size_t i = 0; i < status->n_members; i++) {
        const Weft__V1__Member *m = status->members[i];
        cluster->n_ready += strcmp(m->state, "ready") == 0 || strcmp(m->state, "serving") == 0;
        if (strcmp(m->state, "draining") == 0) {
            g_ptr_array_add(cluster->drained, g_strdup(m->name));
        }
    }
    protobuf_c_message_free_unpacked(&status->base, NULL);
    return true;
}

/* Until n are up: those that an administrator drained will not become ready by themselves. */
static bool wait_for_members(LocalCluster *cluster, Client *client, unsigned n, GPtrArray *list,
                             const CommonOptions *common, GError **error)
{
    const gint64 limit = g_get_monotonic_time() + START_TIMEOUT_US;
    for (unsigned shown = n + 1;;) {
        if (!all_alive(cluster->state, list, error) || !look_at_members(cluster, client, error)) {
            return false;
        }
        const unsigned up = cluster->n_ready + cluster->drained->len;
        if (up != shown) {
            cli_progress(common, "workers up: %u of %u", up, n);
            shown = up;
        }
        if (up >= n) {
            cli_progress_end(common);
            return true;
        }
        if (g_get_monotonic_time() > limit) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_DEADLINE,
                        "%u of %u workers came up within 60 s: see %s/worker-*.log", up, n,
                        cluster->state);
            return false;
        }
        g_usleep(POLL_US);
    }
}

static bool in_list(GPtrArray *list, const char *name)
{
    for (guint i = 0; i < list->len; i++) {
        if (strcmp(((const Process *)g_ptr_array_index(list, i))->name, name) == 0) {
            return true;
        }
    }
    return false;
}

/* Workers that have no certificate yet, and so need a token. */
static unsigned newcomers(const char *state, unsigned n)
{
    unsigned count = 0;
    for (unsigned i = 1; i <= n; i++) {
        g_autofree char *path = g_strdup_printf("%s/worker-%u/node.pem", state, i);
        count += !g_file_test(path, G_FILE_TEST_EXISTS);
    }
    return count;
}

static bool start_missing(const char *state, const LocalOptions *o,
                          const Weft__V1__CreateTokenResponse *token, GPtrArray *list,
                          GError **error)
{
    g_autoptr(GString) hash = g_string_new("sha256:");
    for (size_t i = 0; i < token->ca_hash.len; i++) {
        g_string_append_printf(hash, "%02x", token->ca_hash.data[i]);
    }
    bool ok = true;
    for (unsigned i = 0; ok && i < o->n_workers; i++) {
        g_autofree char *name = g_strdup_printf("worker-%u", i + 1);
        ok = in_list(list, name) || start_worker(state, i, o, token, hash->str, list, error);
    }
    return ok;
}

static bool not_interrupted(const Client *client, GError **error)
{
    if (client->interrupted) {
        g_set_error_literal(error, WEFT_ERROR, WEFT_ERROR_CANCELLED, "interrupted");
    }
    return !client->interrupted;
}

/* The workers that are not in the list; then all must come up. */
static bool start_workers(LocalCluster *cluster, const LocalOptions *o, const CommonOptions *common,
                          GPtrArray *list, GError **error)
{
    const char *state = cluster->state;
    CommonOptions own = {.state = (char *)state, .quiet = common->quiet};
    const unsigned n_new = newcomers(state, o->n_workers);
    Weft__V1__CreateTokenResponse nobody = WEFT__V1__CREATE_TOKEN_RESPONSE__INIT, *token = NULL;
    Client *client = client_new(&own, error);
    const bool ok = client != NULL && (n_new == 0 || ask_token(client, n_new, &token, error)) &&
                    start_missing(state, o, token != NULL ? token : &nobody, list, error) &&
                    write_processes(state, list, error) &&
                    wait_for_members(cluster, client, o->n_workers, list, common, error) &&
                    not_interrupted(client, error); /* since its last call */
    if (token != NULL) {
        protobuf_c_message_free_unpacked(&token->base, NULL);
    }
    client_free(client);
    return ok;
}

/* ---- the supervisor ---- */

#define SUPERVISOR "supervisor"

static Process *find_process(GPtrArray *list, const char *name)
{
    for (guint i = 0; i < list->len; i++) {
        Process *p = g_ptr_array_index(list, i);
        if (strcmp(p->name, name) == 0) {
            return p;
        }
    }
    return NULL;
}

/* Ends it, when it is done with what it does, so that the file may be changed. */
static void stop_supervisor(const char *state)
{
    g_autoptr(GPtrArray) list = read_processes(state);
    const Process *p = find_process(list, SUPERVISOR);
    if (p == NULL || !process_alive(p) || p->pid == getpid()) {
        return;
    }
    const gint64 limit = g_get_monotonic_time() + STOP_TIMEOUT_US;
    kill(p->pid, SIGTERM);
    while (process_alive(p)) {
        waitpid(p->pid, NULL, WNOHANG);
        if (g_get_monotonic_time() > limit) {
            kill(p->pid, SIGKILL);
        }
        g_usleep(POLL_US);
    }
}

static bool start_supervisor(const char *state, const LocalOptions *o, GPtrArray *list,
                             GError **error)
{
    g_autofree char *memory = g_strdup_printf("%" G_GUINT64_FORMAT, o->memory_bytes);
    char *argv[] = {"weft",    "up",          "--supervise",
                    "--state", (char *)state, o->memory_bytes > 0 ? "--memory" : NULL,
                    memory,    NULL};
    return start_process(state, SUPERVISOR, argv, NULL, true, list, error) &&
           write_processes(state, list, error);
}

bool local_become_supervisor(const char *state, GError **error)
{
    stop_supervisor(state);
    g_autoptr(GPtrArray) list = read_processes(state);
    Process *p = find_process(list, SUPERVISOR);
    if (p != NULL && p->pid == getpid()) {
        return true;
    }
    if (p != NULL) {
        g_ptr_array_remove(list, p);
    }
    p = g_new0(Process, 1);
    *p = (Process){g_strdup(SUPERVISOR), getpid(), start_time_of(getpid())};
    g_ptr_array_add(list, p);
    return write_processes(state, list, error);
}

GPtrArray *local_cluster_ended(const char *state)
{
    while (waitpid(-1, NULL, WNOHANG) > 0) {
    }
    g_autoptr(GPtrArray) list = read_processes(state);
    const Process *own = find_process(list, SUPERVISOR);
    if (own == NULL || own->pid != getpid()) {
        return NULL;
    }
    GPtrArray *ended = g_ptr_array_new_with_free_func(g_free);
    for (guint i = 0; i < list->len; i++) {
        const Process *p = g_ptr_array_index(list, i);
        if (!process_alive(p)) {
            g_ptr_array_add(ended, g_strdup(p->name));
        }
    }
    return ended;
}

static unsigned count_workers(GPtrArray *list)
{
    unsigned n = 0;
    for (guint i = 0; i < list->len; i++) {
        n += g_str_has_prefix(((const Process *)g_ptr_array_index(list, i))->name, "worker-");
    }
    return n;
}

/* Only its own entry is replaced: others that ended meanwhile stay to be found. */
bool local_cluster_revive(const char *state, const char *name, const LocalOptions *wish,
                          GError **error)
{
    g_autoptr(GPtrArray) all = read_processes(state);
    g_autoptr(GPtrArray) fresh = g_ptr_array_new_with_free_func((GDestroyNotify)process_free);
    LocalOptions o = *wish;
    o.n_workers = count_workers(all);
    Weft__V1__CreateTokenResponse nobody = WEFT__V1__CREATE_TOKEN_RESPONSE__INIT;
    unsigned i = 0;
    bool ok = sscanf(name, "worker-%u", &i) == 1
                  ? start_worker(state, i - 1, &o, &nobody, "", fresh, error)
                  : start_coordinator(state, true, false, fresh, error);
    Process *old = find_process(all, name);
    if (fresh->len > 0 && old != NULL) { /* also when it did not come up in time */
        const Process *now = g_ptr_array_index(fresh, 0);
        old->pid = now->pid;
        g_free(old->started);
        old->started = g_strdup(now->started);
        ok = write_processes(state, all, ok ? error : NULL) && ok;
    }
    return ok;
}

/* ---- the outside ---- */

LocalState local_cluster_state(const char *state)
{
    g_autoptr(GPtrArray) list = read_processes(state);
    guint n = 0;
    for (guint i = 0; i < list->len; i++) {
        n += process_alive(g_ptr_array_index(list, i));
    }
    return n == 0 ? LOCAL_NONE : n < list->len ? LOCAL_PART : LOCAL_WHOLE;
}

/* Removes what has ended; returns how many workers there were. */
static unsigned keep_alive_only(GPtrArray *list)
{
    unsigned n_workers = 0;
    for (guint i = list->len; i-- > 0;) {
        const Process *p = g_ptr_array_index(list, i);
        n_workers += g_str_has_prefix(p->name, "worker-");
        if (!process_alive(p)) {
            g_ptr_array_remove_index(list, i);
        }
    }
    return n_workers;
}

static void signal_all(GPtrArray *list, int signal_number)
{
    for (guint i = list->len; i-- > 0;) { /* workers before the coordinator */
        const Process *p = g_ptr_array_index(list, i);
        if (process_alive(p)) {
            kill(p->pid, signal_number);
        }
    }
}

static bool wait_for_end(GPtrArray *list, gint64 timeout_us)
{
    const gint64 limit = g_get_monotonic_time() + timeout_us;
    for (;;) {
        bool alive = false;
        for (guint i = 0; i < list->len; i++) {
            const Process *p = g_ptr_array_index(list, i);
            waitpid(p->pid, NULL, WNOHANG);
            alive |= process_alive(p);
        }
        if (!alive || g_get_monotonic_time() > limit) {
            return !alive;
        }
        g_usleep(POLL_US);
    }
}

bool local_cluster_stop(const char *state, GError **error)
{
    stop_supervisor(state);
    g_autoptr(GPtrArray) list = read_processes(state);
    g_autofree char *path = g_build_filename(state, "up", NULL);
    signal_all(list, SIGCONT);
    signal_all(list, SIGTERM);
    if (!wait_for_end(list, STOP_TIMEOUT_US)) {
        signal_all(list, SIGKILL);
        wait_for_end(list, STOP_TIMEOUT_US);
    }
    if (g_unlink(path) != 0 && errno != ENOENT) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO, "cannot remove %s: %s", path,
                    g_strerror(errno));
        return false;
    }
    return true;
}

LocalCluster *local_cluster_start(const char *state, const LocalOptions *wish,
                                  const CommonOptions *common, GError **error)
{
    interrupts_hold();
    stop_supervisor(state);
    g_autoptr(GPtrArray) list = read_processes(state);
    LocalOptions o = *wish;
    const unsigned n_before = keep_alive_only(list);
    const bool part = list->len > 0;
    if (part) {
        o.n_workers = n_before; /* their cores and memory are shared out already */
    }
    if (g_mkdir_with_parents(state, 0700) != 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO,
                    "cannot make the state directory %s: %s: name a writable one with --state",
                    state, g_strerror(errno));
        return NULL;
    }
    LocalCluster *cluster = g_new0(LocalCluster, 1);
    cluster->state = g_strdup(state);
    cluster->temporary = !o.detach;
    cluster->drained = g_ptr_array_new_with_free_func(g_free);
    if ((!in_list(list, "coordinator") && !start_coordinator(state, o.detach, true, list, error)) ||
        !write_processes(state, list, error) || !start_workers(cluster, &o, common, list, error) ||
        (o.detach && !o.unsupervised && !start_supervisor(state, wish, list, error))) {
        write_processes(state, list, NULL);
        if (!part) {
            local_cluster_stop(state, NULL);
        }
        cluster->temporary = false;
        local_cluster_free(cluster);
        return NULL;
    }
    return cluster;
}

static void remove_tree(const char *path)
{
    GDir *dir = g_file_test(path, G_FILE_TEST_IS_SYMLINK) ? NULL : g_dir_open(path, 0, NULL);
    if (dir != NULL) {
        const char *name;
        while ((name = g_dir_read_name(dir)) != NULL) {
            g_autofree char *child = g_build_filename(path, name, NULL);
            remove_tree(child);
        }
        g_dir_close(dir);
    }
    g_remove(path);
}

void local_cluster_free(LocalCluster *cluster)
{
    if (cluster == NULL) {
        return;
    }
    if (cluster->temporary) {
        local_cluster_stop(cluster->state, NULL);
        remove_tree(cluster->state);
    }
    g_ptr_array_unref(cluster->drained);
    g_free(cluster->state);
    g_free(cluster);
}

const GPtrArray *local_cluster_drained(const LocalCluster *cluster)
{
    return cluster->drained;
}

bool local_cluster_can_work(const LocalCluster *cluster, GError **error)
{
    const bool can = cluster->n_ready > 0 || cluster->drained->len == 0;
    if (!can) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_READY,
                    "the cluster in %s is up, and all of its workers (%u) are drained: "
                    "`weft undrain %s` gives one back",
                    cluster->state, cluster->drained->len, (char *)cluster->drained->pdata[0]);
    }
    return can;
}

LocalCluster *local_cluster_for(CommonOptions *common, GError **error)
{
    return local_cluster_with(common, 0, error);
}

LocalCluster *local_cluster_with(CommonOptions *common, unsigned n_threads, GError **error)
{
    if (common->up == 0) {
        return NULL;
    }
    interrupts_hold(); /* before there is something to remove */
    g_autofree char *template = g_build_filename(g_get_tmp_dir(), "weft-up-XXXXXX", NULL);
    if (g_mkdtemp(template) == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO, "cannot make a directory in %s: %s",
                    g_get_tmp_dir(), g_strerror(errno));
        return NULL;
    }
    const LocalOptions options = {.n_workers = (unsigned)common->up, .n_threads = n_threads};
    LocalCluster *cluster = local_cluster_start(template, &options, common, error);
    if (cluster == NULL) {
        remove_tree(template);
        return NULL;
    }
    g_free(common->state);
    common->state = g_steal_pointer(&template);
    g_clear_pointer(&common->cluster, g_free);
    return cluster;
}
