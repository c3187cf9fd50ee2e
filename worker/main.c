/* weft-worker: flags, identity (from the state directory or by joining), a short measurement, and
 * one Agent on one main loop. Foreground; logs to stderr. */
#include "worker/agent/agent.h"
#include "worker/agent/join.h"
#include "worker/measure_device.h"

#include "kernels/device/group.h"
#include "proto/base/error.h"
#include "proto/base/units.h"
#include "proto/config/options.h"
#include "transport/daemon/daemon.h"
#include "transport/link/ucx_memory.h"

#include <netdb.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define LEAVE_MS 5000 /* for the coordinator to move what runs here */
#define STOP_LIMIT_S 10
#define PACKED_AFTER_US 10000000

typedef struct Settings {
    char *join, *token, *ca_hash, *name, *state, *cache, *models, *isa, *cpu_list, *numerics,
        *listen, *advertise, *health_listen, *link, *link_device, *data_port, *device, *config;
    uint64_t threads, memory;
    int64_t packed_after;
    bool version, verbose, devices, no_packed;
} Settings;

#define FIELD(name) offsetof(Settings, name)
static const Option worker_options[] = {
    {"join", 0, OPTION_STRING, FIELD(join), "ADDR:PORT",
     "the coordinator's join listener (first start only)", "WEFT_JOIN"},
    {"token", 0, OPTION_STRING, FIELD(token), "T", "join token from `weft token create`",
     "WEFT_TOKEN"},
    {"ca-hash", 0, OPTION_STRING, FIELD(ca_hash), "H",
     "sha256:... of the cluster's CA, printed beside the token", "WEFT_CA_HASH"},
    {"name", 0, OPTION_STRING, FIELD(name), "NAME", "node id to ask for (default: the host's name)",
     NULL},
    {"state", 0, OPTION_STRING, FIELD(state), "DIR",
     "key, certificate, measurements (default $XDG_STATE_HOME/weft/worker)", "WEFT_WORKER_STATE"},
    {"cache", 0, OPTION_STRING, FIELD(cache), "DIR",
     "slices of models, may be shared by the workers of a host (default $XDG_CACHE_HOME/weft)",
     "WEFT_CACHE"},
    {"packed-after", 0, OPTION_DURATION, FIELD(packed_after), "TIME",
     "weights in memory for so long are kept in the cache as they are packed, for the next start "
     "to map (default 10s)",
     "WEFT_PACKED_AFTER"},
    {"no-packed", 0, OPTION_FLAG, FIELD(no_packed), "",
     "keep and use no packed weights: read and pack slices at each start", "WEFT_NO_PACKED"},
    {"models", 0, OPTION_STRING, FIELD(models), "DIR",
     "own copies of model files, used where their bytes fit (default: none)", NULL},
    {"threads", 't', OPTION_COUNT, FIELD(threads), "N",
     "compute threads (default: the cores this process may use)", "WEFT_THREADS", 1, 1024},
    {"isa", 0, OPTION_STRING, FIELD(isa), "ISA", "instruction set", "WEFT_ISA", 0, 0,
     "auto|generic|avx2|avx512"},
    {"device", 0, OPTION_STRING, FIELD(device), "DEVICE",
     "where to compute: cpu, cuda, cuda:N, several as in cuda:0,1 or cuda:all (a rank each), or "
     "auto = a CUDA device if there is one (default: cpu)",
     "WEFT_DEVICE"},
    {"devices", 0, OPTION_FLAG, FIELD(devices), "", "print the devices of this host and exit",
     NULL},
    {"memory", 0, OPTION_SIZE, FIELD(memory), "SIZE",
     "budget for weights, KV and buffers, of several devices in equal shares (default: what is "
     "available, less a margin)",
     "WEFT_MEMORY"},
    {"cpu-list", 0, OPTION_STRING, FIELD(cpu_list), "LIST", "pin compute threads, as in 0-3,8",
     NULL},
    {"numerics", 0, OPTION_STRING, FIELD(numerics), "CLASSES", "bit contracts offered", NULL, 0, 0,
     "exact|fast|exact,fast"},
    {"listen", 0, OPTION_STRING, FIELD(listen), "ADDR:PORT",
     "control listener, mutual TLS (default 0.0.0.0:0)", NULL},
    {"advertise", 0, OPTION_STRING, FIELD(advertise), "HOST",
     "name or address by which peers reach this host", NULL},
    {"health-listen", 0, OPTION_STRING, FIELD(health_listen), "ADDR:PORT",
     "plaintext listener that serves grpc.health.v1 only (default: none)", NULL},
    {"link", 0, OPTION_STRING, FIELD(link), "KIND",
     "data plane: auto = shared memory within a host and tcp, or tcp alone", NULL, 0, 0,
     "auto|tcp"},
    {"link-device", 0, OPTION_STRING, FIELD(link_device), "DEVICE",
     "network device or own address of the data plane (default: the device that reaches the "
     "coordinator)",
     NULL},
    {"data-port", 0, OPTION_STRING, FIELD(data_port), "RANGE",
     "TCP ports of the data plane, as in 15000-15100", NULL},
    {"config", 0, OPTION_STRING, FIELD(config), "FILE", "YAML file with these options", NULL},
    {"verbose", 'v', OPTION_FLAG, FIELD(verbose), "", "log details too", NULL},
    {"version", 0, OPTION_FLAG, FIELD(version), "", "print versions and exit", NULL},
    {NULL},
};

typedef struct Daemon {
    const Settings *settings;
    MainLoop *loop;
    Identity identity;
    Agent *agent;
    GPtrArray *devices;        /* of Device */
    const Device *computes_on; /* the first of them; NULL: on the host's cores */
    Measure *measures;         /* of each; NULL: trivial ones, which are as fast as the host */
    LinkFill *fill;
    int *cpus;
    unsigned n_cpus;
    GArray *cpu_set; /* uint32_t: where compute threads may run */
    bool joined, join_done, stopping;
    GError *error;
    int exit_code;
} Daemon;

/* ---- resources ---- */

/* "0-3,8" to numbers; INVALID for anything else. */
static bool parse_cpus(const char *text, GArray *out, GError **error)
{
    g_auto(GStrv) parts = g_strsplit(text, ",", -1);
    for (char **part = parts; *part != NULL; part++) {
        char *end;
        const long first = strtol(*part, &end, 10);
        const long last = *end == '-' ? strtol(end + 1, &end, 10) : first;
        if (end == *part || *end != '\0' || first < 0 || last < first || last > 4095) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                        "cpu-list '%s' is not understood: write it as in 0-3,8", text);
            return false;
        }
        for (long cpu = first; cpu <= last; cpu++) {
            const int number = (int)cpu;
            g_array_append_val(out, number);
        }
    }
    return true;
}

static uint64_t number_in(const char *path, const char *key)
{
    g_autofree char *text = NULL;
    if (!g_file_get_contents(path, &text, NULL, NULL)) {
        return 0;
    }
    const char *at = key != NULL ? strstr(text, key) : text;
    return at != NULL ? g_ascii_strtoull(at + (key != NULL ? strlen(key) : 0), NULL, 10) : 0;
}

/* What one memory cgroup leaves; UINT64_MAX without a limit ("max" reads as 0). */
static uint64_t left_in_cgroup(const char *folder, const char *limit_name, const char *used_name)
{
    g_autofree char *limit_file = g_build_filename(folder, limit_name, NULL);
    g_autofree char *used_file = g_build_filename(folder, used_name, NULL);
    const uint64_t limit = number_in(limit_file, NULL), used = number_in(used_file, NULL);
    return limit == 0 ? UINT64_MAX : limit > used ? limit - used : 0;
}

/* The least that is left in this process's memory cgroup and the ones around it; both generations
 * of cgroups. */
static uint64_t left_in_cgroups(void)
{
    g_autofree char *text = NULL;
    uint64_t least = UINT64_MAX;
    if (!g_file_get_contents("/proc/self/cgroup", &text, NULL, NULL)) {
        return least;
    }
    g_auto(GStrv) lines = g_strsplit(text, "\n", -1);
    for (char **line = lines; *line != NULL; line++) {
        const bool unified = g_str_has_prefix(*line, "0::/");
        const char *memory = strstr(*line, ":memory:/");
        if (!unified && memory == NULL) {
            continue;
        }
        g_autofree char *path =
            g_strdup(unified ? *line + strlen("0::") : memory + strlen(":memory:"));
        while (strlen(path) > 1) {
            g_autofree char *folder =
                g_build_filename(unified ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory", path, NULL);
            least = MIN(least, unified ? left_in_cgroup(folder, "memory.max", "memory.current")
                                       : left_in_cgroup(folder, "memory.limit_in_bytes",
                                                        "memory.usage_in_bytes"));
            *strrchr(path, '/') = '\0';
        }
    }
    return least;
}

/* What is available on the host and in this process's memory cgroups, less a tenth. */
static uint64_t default_memory(void)
{
    return MIN(number_in("/proc/meminfo", "MemAvailable:") * 1024, left_in_cgroups()) / 10 * 9;
}

/* Equal for processes that may share memory: one boot of one machine, one network namespace, one
 * user. */
static char *host_identity(void)
{
    g_autofree char *boot = NULL;
    struct stat ns = {0};
    g_file_get_contents("/proc/sys/kernel/random/boot_id", &boot, NULL, NULL);
    stat("/proc/self/ns/net", &ns);
    return g_strdup_printf("%s/%" G_GUINT64_FORMAT "/%u", boot != NULL ? g_strchomp(boot) : "?",
                           (uint64_t)ns.st_ino, (unsigned)geteuid());
}

static bool take_cpus(Daemon *d, GError **error)
{
    g_autoptr(GArray) cpus = g_array_new(FALSE, FALSE, sizeof(int));
    if (d->settings->cpu_list == NULL) {
        g_array_unref(d->cpu_set);
        d->cpu_set = daemon_cpus();
        return true;
    }
    if (!parse_cpus(d->settings->cpu_list, cpus, error)) {
        return false;
    }
    d->n_cpus = cpus->len;
    g_array_append_vals(d->cpu_set, cpus->data, cpus->len); /* int and uint32_t, none negative */
    d->cpus = (int *)(void *)g_array_free(g_steal_pointer(&cpus), FALSE);
    return true;
}

/* ---- addresses ---- */

static char *host_of(const char *address)
{
    const char *colon = strrchr(address, ':');
    return colon != NULL ? g_strndup(address, (gsize)(colon - address)) : g_strdup(address);
}

static bool is_any_host(const char *host)
{
    return *host == '\0' || strcmp(host, "0.0.0.0") == 0 || strcmp(host, "[::]") == 0;
}

/* Our own address on the way to host:port (nothing is sent); returned, NULL = no way known. */
static char *address_toward(const char *peer)
{
    const char *port = strrchr(peer, ':');
    g_autofree char *host = host_of(peer);
    struct addrinfo *to = NULL, hints = {.ai_family = AF_INET, .ai_socktype = SOCK_DGRAM};
    struct sockaddr_storage own;
    socklen_t length = sizeof own;
    char text[NI_MAXHOST];
    if (port == NULL || getaddrinfo(host, port + 1, &hints, &to) != 0) {
        return NULL;
    }
    const int fd = socket(to->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    const bool found = fd >= 0 && connect(fd, to->ai_addr, to->ai_addrlen) == 0 &&
                       getsockname(fd, (struct sockaddr *)&own, &length) == 0 &&
                       getnameinfo((struct sockaddr *)&own, length, text, sizeof text, NULL, 0,
                                   NI_NUMERICHOST) == 0;
    if (fd >= 0) {
        close(fd);
    }
    freeaddrinfo(to);
    return found ? g_strdup(text) : NULL;
}

/* Where peers reach this host: as asked for, else the listen address, else our side of the way to
 * the coordinator. Returned. */
static char *own_address(const Settings *s, const char *coordinator)
{
    g_autofree char *listen_host = host_of(s->listen != NULL ? s->listen : "0.0.0.0:0");
    if (s->advertise != NULL) {
        return g_strdup(s->advertise);
    }
    if (!is_any_host(listen_host)) {
        return g_steal_pointer(&listen_host);
    }
    char *toward = coordinator != NULL ? address_toward(coordinator) : NULL;
    return toward != NULL ? toward : g_strdup("127.0.0.1");
}

/* ---- identity ---- */

static void on_joined(const Identity *identity, const GError *error, void *user)
{
    Daemon *d = user;
    d->join_done = true;
    if (identity == NULL) {
        d->error = g_error_copy(error);
        return;
    }
    identity_copy(identity, &d->identity);
    d->joined = true;
}

static bool join_cluster(Daemon *d, GError **error)
{
    const Settings *s = d->settings;
    if (s->join == NULL || s->token == NULL || s->ca_hash == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "%s holds no certificate: start once with the line that `weft token create` "
                    "prints (--join, --token, --ca-hash)",
                    s->state);
        return false;
    }
    g_autofree char *ca = join_fetch_ca(s->join, s->ca_hash, error);
    if (ca == NULL) {
        return false;
    }
    g_autofree char *own = own_address(s, s->join);
    const char *addresses[] = {own, "127.0.0.1", g_get_host_name(), NULL};
    const JoinOptions options = {.loop = main_loop_loop(d->loop),
                                 .transport = rpc_transport_grpc(),
                                 .address = s->join,
                                 .ca_pem = ca,
                                 .token = s->token,
                                 .name = s->name != NULL ? s->name : g_get_host_name(),
                                 .addresses = addresses};
    join_start(&options, on_joined, d);
    main_loop_run_until(d->loop, &d->join_done, 30 * G_USEC_PER_SEC);
    if (!d->joined) {
        g_propagate_error(error, d->error != NULL
                                     ? g_steal_pointer(&d->error)
                                     : g_error_new(WEFT_ERROR, WEFT_ERROR_DEADLINE,
                                                   "no answer from %s within 30 s", s->join));
        return false;
    }
    return identity_save(s->state, &d->identity, error);
}

static bool take_identity(Daemon *d, GError **error)
{
    g_autoptr(GError) why = NULL;
    if (identity_load(d->settings->state, &d->identity, &why)) {
        return true;
    }
    if (!g_error_matches(why, WEFT_ERROR, WEFT_ERROR_NOT_FOUND)) {
        g_propagate_error(error, g_steal_pointer(&why));
        return false;
    }
    return join_cluster(d, error);
}

/* What the data plane's device must reach, before anything else is known: the join address, or the
 * coordinator of an earlier join. */
static char *data_plane_address(const Settings *s)
{
    Identity identity = {0};
    char *own = NULL;
    if (identity_load(s->state, &identity, NULL)) {
        own = own_address(s, identity.control_address);
    } else if (s->join != NULL) {
        own = own_address(s, s->join);
    }
    identity_clear(&identity);
    return own;
}

/* ---- running ---- */

static void on_stopped(void *user)
{
    main_loop_quit(((Daemon *)user)->loop);
}

/* An engine that cannot be stopped must not hold the process: there is nothing left to write. */
static void on_stop_late(void *user)
{
    fprintf(stderr, "weft-worker: its engines did not end within %d s\n", STOP_LIMIT_S);
    _exit(1);
}

static void on_stop(void *user)
{
    Daemon *d = user;
    if (d->agent == NULL) {
        return;
    }
    if (!d->stopping) {
        d->stopping = true;
        daemon_notify("STOPPING=1");
        loop_timer_start(main_loop_loop(d->loop), STOP_LIMIT_S * G_USEC_PER_SEC, on_stop_late, d);
    }
    agent_stop(d->agent, on_stopped, d); /* asked again: at once */
}

static void on_refused(const GError *error, void *user)
{
    Daemon *d = user;
    fprintf(stderr, "weft-worker: %s\n", error->message);
    d->exit_code = weft_error_exit_code(error);
    on_stop(d);
}

/* Left to what else runs on a device; what ranks need beside weights and KV pages is in plans
 * (proto/plan/device_memory.h). */
#define DEVICE_MARGIN ((uint64_t)256 << 20)

static uint64_t device_memory(const Device *device)
{
    uint64_t left = 0, total;
    if (device->api->memory(device->handle, &left, &total) != DEVICE_OK) {
        return 0;
    }
    return left > DEVICE_MARGIN ? left - DEVICE_MARGIN : 0;
}

/* What each of several devices has for plans: the least of them all. Trivial ones share the host's.
 */
static uint64_t memory_of_each(const Daemon *d)
{
    uint64_t least = UINT64_MAX;
    if (strcmp(d->computes_on->info.kind, "cpu") == 0) {
        return default_memory() / d->devices->len;
    }
    for (guint i = 0; i < d->devices->len; i++) {
        least = MIN(least, device_memory(d->devices->pdata[i]));
    }
    return least;
}

/* The classes that are offered: both, if nothing was said, for what is exact is also fast. */
static uint32_t numerics_classes(const Settings *s)
{
    const bool fast = s->numerics == NULL || strstr(s->numerics, "fast") != NULL,
               exact = s->numerics == NULL || strstr(s->numerics, "exact") != NULL;
    return (exact ? 1u << NUMERICS_EXACT : 0) | (fast ? 1u << NUMERICS_FAST : 0);
}

/* The host's figures, links among them; of each GPU its own, one after another. */
static bool take_measures(Daemon *d, const MeasureOptions *host, Measure *out, Log *log,
                          GError **error)
{
    if (!measure_get(d->settings->state, host, out, log, error)) {
        return false;
    }
    if (d->computes_on == NULL || strcmp(d->computes_on->info.kind, "cpu") == 0) {
        return true;
    }
    d->measures = g_new(Measure, d->devices->len);
    return measure_devices((const Device *const *)d->devices->pdata, d->devices->len,
                           &measure_device_sizes, out, d->measures, error);
}

static double lag_ms(void *user)
{
    return main_loop_lag_ms(user);
}

static bool start_agent(Daemon *d, Log *log, GError **error)
{
    const Settings *s = d->settings;
    KernelIsa isa = kernels_best_isa();
    if (s->isa != NULL && !kernels_parse_isa(s->isa, &isa)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "isa %s: this CPU does not have it; auto would take %s", s->isa,
                    kernels_isa_name(kernels_best_isa()));
        return false;
    }
    const unsigned cores = d->cpu_set->len > 0 ? d->cpu_set->len : daemon_n_cpus();
    const unsigned threads = s->threads > 0  ? (unsigned)s->threads
                             : d->n_cpus > 0 ? d->n_cpus
                                             : cores;
    if (d->n_cpus > 0 && d->n_cpus != threads) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "cpu-list names %u cpus for %u threads: give as many", d->n_cpus, threads);
        return false;
    }
    const unsigned n_devices = d->computes_on != NULL ? d->devices->len : 0;
    const uint64_t memory = s->memory > 0   ? s->memory
                            : n_devices > 0 ? memory_of_each(d) * n_devices
                                            : default_memory();
    const MeasureOptions measure = {.isa = isa,
                                    .threads = threads,
                                    .cpus = d->cpus,
                                    .memory_bytes = MIN(memory, default_memory()),
                                    .turn = "weft-measure",
                                    .now_s = loop_wall_us(main_loop_loop(d->loop)) / 1000000};
    g_autofree char *host = host_identity(), *own = own_address(s, d->identity.control_address);
    AgentOptions options = {
        .loop = main_loop_loop(d->loop),
        .transport = rpc_transport_grpc(),
        .random = random_system(),
        .log = log,
        .fill = d->fill,
        .identity = &d->identity,
        .state_dir = s->state,
        .cache_dir = s->cache,
        .packed_images = !s->no_packed,
        .packed_after_us = s->packed_after,
        .models_dir = s->models,
        .listen = s->listen != NULL ? s->listen : "0.0.0.0:0",
        .advertise = own,
        .health_listen = s->health_listen,
        .host = host,
        .memory_bytes = memory,
        .threads = threads,
        .cpus = d->cpus,
        .cpu_set = (const uint32_t *)(const void *)d->cpu_set->data,
        .n_cpu_set = d->cpu_set->len,
        .isa = isa,
        .device = d->computes_on,
        .devices = (const Device *const *)d->devices->pdata,
        .n_devices = n_devices,
        .device_bytes = n_devices > 0 ? memory / n_devices : 0,
        .numerics_classes = numerics_classes(s),
        .crowded = threads > cores,
        .leave_ms = LEAVE_MS,
        .io_threads = MAX(2u, threads),
        .lag_ms = lag_ms,
        .lag_user = d->loop,
        .refused = on_refused,
        .user = d,
    };
    if (!take_measures(d, &measure, &options.measure, log, error)) {
        return false;
    }
    options.device_measures = d->measures;
    d->agent = agent_new(&options, error);
    if (d->agent == NULL) {
        return false;
    }
    log_info(log, "worker %s serves at %s, kernels of %s, bf16 by %s", d->identity.name,
             agent_address(d->agent), kernels_isa_name(isa), kernels_bf16(isa));
    return true;
}

/* The device that was asked for; the CPU's where none was. */
static bool take_device(Daemon *d, Log *log, GError **error)
{
    DeviceChoice choice;
    if (!device_choice_parse(d->settings->device != NULL ? d->settings->device : "cpu", &choice,
                             error)) {
        return false;
    }
    d->devices = device_open_all(&choice, error);
    if (d->devices == NULL) {
        return false;
    }
    const Device *first = d->devices->pdata[0];
    const bool host = strcmp(first->info.kind, "cpu") == 0 && choice.n_indices == 0;
    d->computes_on = host ? NULL : first;
    if (choice.kind == DEVICE_KIND_AUTO) {
        g_autofree char *text = device_describe(&first->info);
        log_info(log, "device auto: %s", text);
    }
    return true;
}

static int serve(const Settings *s, GError **error)
{
    Daemon d = {.settings = s};
    Log *log = log_stderr();
    log->min_level = s->verbose ? LOG_LEVEL_DEBUG : LOG_LEVEL_INFO;
    if (!take_device(&d, log, error)) {
        return 0;
    }
    const int lock = identity_lock(s->state, error);
    if (lock < 0) {
        g_ptr_array_unref(d.devices);
        return 0;
    }
    d.cpu_set = g_array_new(FALSE, FALSE, sizeof(uint32_t));
    d.loop = main_loop_new();
    if (take_cpus(&d, error) && take_identity(&d, error)) {
        d.fill = link_fill_ucx();
        main_loop_on_stall(d.loop, daemon_log_stall, log);
        main_loop_on_signal(d.loop, SIGTERM, on_stop, &d);
        main_loop_on_signal(d.loop, SIGINT, on_stop, &d);
        if (start_agent(&d, log, error)) {
            daemon_notify("READY=1");
            main_loop_run(d.loop);
        }
        agent_free(d.agent);
        link_fill_free(d.fill);
    }
    g_ptr_array_unref(d.devices);
    g_free(d.measures);
    identity_clear(&d.identity);
    main_loop_free(d.loop);
    g_free(d.cpus);
    g_array_unref(d.cpu_set);
    close(lock);
    return d.exit_code;
}

static void default_folders(Settings *s)
{
    if (s->state == NULL) {
        s->state = g_build_filename(g_get_user_state_dir(), "weft", "worker", NULL);
    }
    if (s->cache == NULL) {
        s->cache = g_build_filename(g_get_user_cache_dir(), "weft", NULL);
    }
}

static void print_help(void)
{
    g_autoptr(GString) text =
        g_string_new("usage: weft-worker --join ADDR:PORT --token T --ca-hash H [OPTIONS]\n\nDoes "
                     "its part of the cluster's work.\n\n");
    options_help(worker_options, text);
    fputs(text->str, stdout);
}

static void print_version(void)
{
    static const char *const sets[] = {"generic", "avx2", "avx512"};
    g_autofree char *rpc = rpc_libraries(), *link = link_library(),
                    *libraries = g_strdup_printf("%s, %s", rpc, link);
    daemon_print_version("weft-worker", libraries);
    printf("instruction sets:");
    for (unsigned i = 0; i < G_N_ELEMENTS(sets); i++) {
        KernelIsa isa;
        if (kernels_parse_isa(sets[i], &isa)) {
            printf(" %s", sets[i]);
        }
    }
    g_autoptr(GError) why = NULL;
    const DeviceModule *cuda = device_module_cuda(NULL, &why);
    printf("\nbf16: %s", kernels_bf16(kernels_best_isa()));
    printf("\nCUDA: %s\n", cuda != NULL ? cuda->version : why->message);
}

/* How devices of one host and of several reach each other. */
static void print_between_devices(const DeviceModule *module)
{
    char group[256] = "this build makes no groups (no nccl.h)", direct[160];
    const bool usable = module->group != NULL && module->group->usable(group);
    printf("sums among devices of this host: %s%s\n", group,
           usable ? "" : "; they go through pinned host memory");
    link_ucx_knows_cuda(direct);
    printf("activations to other hosts: through pinned host memory; from device to device where "
           "payloads are not sealed and UCX of both hosts knows their memory: %s\n",
           direct);
}

/* A line a device; "no device: why" where there is no CUDA device. */
static void print_devices(void)
{
    g_autoptr(GError) why = NULL;
    const DeviceModule *module = device_module_cuda(NULL, &why);
    if (module == NULL) {
        printf("%s\n", why->message);
    }
    for (uint32_t i = 0; why == NULL; i++) {
        g_autoptr(Device) device = device_open_module(module, i, &why);
        if (device != NULL) {
            g_autofree char *text = device_describe(&device->info);
            printf("%s, compute capability %u.%u, bus %s, driver %" G_GUINT64_FORMAT
                   ".%" G_GUINT64_FORMAT "; exact bits of %s\n",
                   text, device->info.major, device->info.minor, device->info.bus,
                   device->info.driver / 1000, device->info.driver % 1000 / 10,
                   device->info.exact_kind);
        } else if (i == 0 || !g_error_matches(why, WEFT_ERROR, WEFT_ERROR_INVALID)) {
            printf("%s\n", why->message);
        }
    }
    if (module != NULL) {
        print_between_devices(module);
    }
}

int main(int argc, char **argv)
{
    g_autoptr(GError) error = NULL;
    g_autoptr(GPtrArray) rest = g_ptr_array_new();
    Settings s = {.packed_after = PACKED_AFTER_US};
    bool help = false;
    int code = 0;
    if (!options_parse(worker_options, &s, argc, argv, rest, &help, &error)) {
        code = weft_error_exit_code(error);
    } else if (help) {
        print_help();
    } else if (s.version) {
        print_version();
    } else if (s.devices) {
        print_devices();
    } else if (rest->len > 0) {
        fprintf(stderr, "weft-worker: unexpected argument %s: see --help\n",
                (const char *)g_ptr_array_index(rest, 0));
        code = 2;
    } else {
        if (s.data_port != NULL) {
            g_setenv("UCX_TCP_PORT_RANGE", s.data_port, FALSE);
        }
        default_folders(&s);
        g_autofree char *device =
            s.link_device != NULL ? g_strdup(s.link_device) : data_plane_address(&s);
        link_ucx_environment(argc, argv,
                             s.link != NULL && strcmp(s.link, "tcp") == 0 ? "tcp" : NULL, device);
        daemon_prepare();
        code = serve(&s, &error);
    }
    if (error != NULL) {
        fprintf(stderr, "weft-worker: %s\n", error->message);
        code = code != 0 ? code : weft_error_exit_code(error);
    }
    options_clear(worker_options, &s);
    return code;
}
