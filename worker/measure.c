/* The numbers that a planner needs are ratios between workers, so each is the best of many short
 * runs, not a benchmark: a slow run means that something else ran, never that the machine can do
 * less. */
#include "worker/measure.h"

#include "kernels/parallel.h"
#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "proto/base/version.h"
#include "worker/host_turn.h"

#include <arpa/inet.h>
#include <math.h>
#include <netinet/tcp.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define READ_BUFFER_LIMIT (256u << 20)
#define READ_BUFFER_LEAST (4u << 20)
#define READ_PIECES 2u /* each twice what the caches hold */
#define BLOCK_WORDS 16u
#define PREFETCH_BYTES 8192 /* ahead, as the kernels read weights */
#define MATMUL_OUT 512u
#define MATMUL_IN 1024u
#define MATMUL_ROWS 32u
#define MATMUL_RUN_S 0.001
#define MESSAGE_BYTES 4096u
#define PING_RUN 10u
#define STREAM_RUN_BYTES (2u << 20)
/* How long each figure is tried for: its best run of a few milliseconds finds the moments in
 * which nothing else ran, also on a busy host. */
#define TRY_S 0.1
#define TRY_TYPE_S 0.02 /* of each weight type's products */
#define TURN_WAIT_MS 3000u
#define KEPT_S (INT64_C(7) * 24 * 3600)
/* Where sockets cannot be measured (no loopback in this namespace): a modest local network. */
#define ASSUMED_LATENCY_S 50e-6
#define ASSUMED_BYTES_PER_S 1e9

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- memory ---- */

typedef uint64_t Words __attribute__((vector_size(16)));

typedef struct ReadRun {
    Words *data;
    size_t n;      /* multiple of BLOCK_WORDS */
    uint64_t sink; /* keeps the loop from being left out */
} ReadRun;

/* As the kernels read weights: lines fetched ahead, and less work for each than its way takes. */
static void read_part(void *user, unsigned thread, unsigned n_threads)
{
    ReadRun *run = user;
    const Words *data = run->data;
    const size_t first = run->n / BLOCK_WORDS * thread / n_threads * BLOCK_WORDS,
                 last = run->n / BLOCK_WORDS * (thread + 1) / n_threads * BLOCK_WORDS;
    Words sum[4] = {0};
    for (size_t i = first; i < last; i += BLOCK_WORDS) {
        for (unsigned k = 0; k < BLOCK_WORDS; k += 4) { /* a line each */
            __builtin_prefetch((const char *)(data + i + k) + PREFETCH_BYTES);
            sum[0] ^= data[i + k];
            sum[1] ^= data[i + k + 1];
            sum[2] ^= data[i + k + 2];
            sum[3] ^= data[i + k + 3];
        }
    }
    const Words all = sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
    __atomic_fetch_xor(&run->sink, all[0] ^ all[1], __ATOMIC_RELAXED);
}

static void write_part(void *user, unsigned thread, unsigned n_threads)
{
    ReadRun *run = user;
    const size_t first = run->n * thread / n_threads, last = run->n * (thread + 1) / n_threads;
    memset(run->data + first, 1, (last - first) * sizeof *run->data);
}

static bool measure_read(Pool *pool, uint64_t memory_bytes, Measure *out, GError **error)
{
    long cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
    uint64_t size = cache > 0 ? 4 * (uint64_t)cache : READ_BUFFER_LIMIT;
    size = MIN(MIN(size, READ_BUFFER_LIMIT), memory_bytes / 4);
    size = MAX(size, READ_BUFFER_LEAST) / 4096 * 4096;
    void *buffer = weft_map(size, "the memory measurement", error);
    if (!buffer) {
        return false;
    }
    ReadRun run = {buffer, size / sizeof(Words), 0};
    pool_run(pool, write_part, &run); /* pages that were never written are all the same zero page */
    /* In turns, so that each piece has left the caches when it comes again. */
    const size_t piece = size / READ_PIECES;
    double best = 1e9;
    const double end = now_s() + TRY_S;
    for (unsigned i = 0; i < READ_PIECES || now_s() < end; i++) {
        run.n = piece / sizeof(Words);
        run.data = (Words *)buffer + run.n * (i % READ_PIECES);
        const double start = now_s();
        pool_run(pool, read_part, &run);
        best = MIN(best, now_s() - start);
    }
    weft_unmap(buffer, size);
    out->read_bytes_per_s = (double)piece / MAX(best, 1e-9);
    return true;
}

/* ---- arithmetic ---- */

typedef struct MatmulRun {
    const Kernels *kernels;
    MatmulArgs args;
} MatmulRun;

static void matmul_part(void *user, unsigned thread, unsigned n_threads)
{
    MatmulRun *run = user;
    MatmulArgs args = run->args;
    uint32_t first, last;
    pool_share(args.w->n_out, PANEL_ROWS, thread, n_threads, &first, &last);
    args.panel0 = first / PANEL_ROWS;
    args.panel1 = (last + PANEL_ROWS - 1) / PANEL_ROWS;
    if (args.panel0 < args.panel1) {
        run->kernels->matmul[args.w->type](&args);
    }
}

static bool measure_matmul(Pool *pool, const Kernels *kernels, Dtype type, double *ops_per_s,
                           GError **error)
{
    PackedMatrix w = {.type = type,
                      .n_out = MATMUL_OUT,
                      .n_in = MATMUL_IN,
                      .panel_bytes = packed_panel_bytes(type, MATMUL_IN)};
    ActKind kind = act_kind_of(type);
    MatmulUnit unit = {MATMUL_IN, {0, 1}};
    w.data =
        weft_alloc(MATMUL_OUT / PANEL_ROWS, w.panel_bytes, "the arithmetic measurement", error);
    float *x = weft_alloc(MATMUL_ROWS * MATMUL_IN, sizeof(float), "the arithmetic measurement",
                          w.data ? error : NULL);
    float *y = weft_alloc(MATMUL_ROWS * MATMUL_OUT, sizeof(float), "the arithmetic measurement",
                          x ? error : NULL);
    void *act = weft_alloc(1, act_bytes(kind, MATMUL_ROWS, MATMUL_IN), "the arithmetic measurement",
                           y ? error : NULL);
    if (act && y && x && w.data) {
        for (uint32_t i = 0; i < MATMUL_ROWS * MATMUL_IN; i++) {
            x[i] = (float)(i % 97) - 48.0f;
        }
        kernels->act_quantise[kind](x, MATMUL_IN, MATMUL_ROWS, 0, MATMUL_ROWS, MATMUL_IN, act);
        MatmulRun run = {kernels,
                         {.w = &w,
                          .act = act,
                          .rows = MATMUL_ROWS,
                          .units = &unit,
                          .n_units = 1,
                          .out = y,
                          .ld = MATMUL_OUT,
                          .subtree_stride = MATMUL_ROWS * MATMUL_OUT}};
        double best = 0;
        const double end = now_s() + TRY_TYPE_S;
        while (best == 0 || now_s() < end) {
            unsigned n = 0;
            const double start = now_s();
            double spent;
            do {
                pool_run(pool, matmul_part, &run);
                n++;
                spent = now_s() - start;
            } while (spent < MATMUL_RUN_S);
            best = MAX(best, 2.0 * MATMUL_OUT * MATMUL_IN * MATMUL_ROWS * n / spent);
        }
        *ops_per_s = best;
    }
    bool done = act && y && x && w.data;
    weft_free(act);
    weft_free(y);
    weft_free(x);
    weft_free(w.data);
    return done;
}

static bool measure_matmuls(Pool *pool, const Kernels *kernels, Measure *out, GError **error)
{
    for (unsigned type = 0; type < DTYPE_LIMIT; type++) {
        if (kernels->matmul[type] != NULL &&
            !measure_matmul(pool, kernels, (Dtype)type, &out->matmul_ops_per_s[type], error)) {
            return false;
        }
    }
    out->int8_ops_per_s = out->matmul_ops_per_s[DTYPE_Q8_0];
    out->f32_ops_per_s = out->matmul_ops_per_s[DTYPE_F32];
    return true;
}

/* ---- sockets ---- */

static bool move(int fd, void *data, size_t size, bool send_it)
{
    for (size_t done = 0; done < size;) {
        ssize_t n = send_it ? send(fd, (char *)data + done, size - done, MSG_NOSIGNAL)
                            : recv(fd, (char *)data + done, size - done, 0);
        if (n <= 0) {
            return false;
        }
        done += (size_t)n;
    }
    return true;
}

/* The other end: messages of MESSAGE_BYTES, whose first byte says whether one is answered by
 * itself, by one byte, or not. */
enum { SWALLOW, ANSWER, ACKNOWLEDGE };

static void *echo(void *user)
{
    int fd = *(int *)user;
    uint8_t buffer[MESSAGE_BYTES];
    while (move(fd, buffer, sizeof buffer, false)) {
        if (buffer[0] != SWALLOW &&
            !move(fd, buffer, buffer[0] == ANSWER ? sizeof buffer : 1, true)) {
            break;
        }
    }
    return NULL;
}

/* Two connected TCP sockets of this host. */
static bool socket_pair(int fds[2])
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof at;
    struct timeval limit = {.tv_sec = 1};
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
    fds[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    fds[1] = -1;
    bool ok = listener >= 0 && fds[0] >= 0 && bind(listener, (struct sockaddr *)&at, length) == 0 &&
              listen(listener, 1) == 0 &&
              getsockname(listener, (struct sockaddr *)&at, &length) == 0 &&
              connect(fds[0], (struct sockaddr *)&at, length) == 0 &&
              (fds[1] = accept4(listener, NULL, NULL, SOCK_CLOEXEC)) >= 0;
    for (unsigned i = 0; ok && i < 2; i++) {
        setsockopt(fds[i], IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        setsockopt(fds[i], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
        setsockopt(fds[i], SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    }
    if (listener >= 0) {
        close(listener);
    }
    return ok;
}

/* Seconds of one message there, the best run's; 0 if the sockets failed. */
static double measure_latency(int fd)
{
    uint8_t buffer[MESSAGE_BYTES] = {ANSWER};
    double best = 0;
    const double end = now_s() + TRY_S;
    do {
        const double start = now_s();
        for (unsigned i = 0; i < PING_RUN; i++) {
            if (!move(fd, buffer, sizeof buffer, true) || !move(fd, buffer, sizeof buffer, false)) {
                return 0;
            }
        }
        const double one = (now_s() - start) / PING_RUN / 2;
        best = best > 0 ? MIN(best, one) : one;
    } while (now_s() < end);
    return best;
}

/* Bytes a second, the best run's; 0 if the sockets failed. */
static double measure_stream(int fd)
{
    uint8_t buffer[MESSAGE_BYTES] = {SWALLOW}, last[MESSAGE_BYTES] = {ACKNOWLEDGE};
    double best = 0;
    const double end = now_s() + TRY_S;
    do {
        const double start = now_s();
        for (size_t sent = sizeof last; sent < STREAM_RUN_BYTES; sent += sizeof buffer) {
            if (!move(fd, buffer, sizeof buffer, true)) {
                return 0;
            }
        }
        if (!move(fd, last, sizeof last, true) || !move(fd, last, 1, false)) {
            return 0;
        }
        last[0] = ACKNOWLEDGE;
        best = MAX(best, STREAM_RUN_BYTES / MAX(now_s() - start, 1e-9));
    } while (now_s() < end);
    return best;
}

static void measure_link(Measure *out)
{
    out->link_latency_s = ASSUMED_LATENCY_S;
    out->link_bytes_per_s = ASSUMED_BYTES_PER_S;
    int fds[2];
    if (socket_pair(fds)) {
        GThread *peer = g_thread_new("measure", echo, &fds[1]);
        const double latency = measure_latency(fds[0]);
        const double stream = latency > 0 ? measure_stream(fds[0]) : 0;
        if (stream > 0) {
            out->link_latency_s = latency;
            out->link_bytes_per_s = stream;
        }
        shutdown(fds[0], SHUT_RDWR);
        g_thread_join(peer);
    }
    for (unsigned i = 0; i < 2; i++) {
        if (fds[i] >= 0) {
            close(fds[i]);
        }
    }
}

/* ---- public ---- */

/* Workers of one host that start together would measure each other's noise. HOST_TURN_TAKEN after
 * wait_ms. */
static int take_turn(const char *name, unsigned wait_ms)
{
    int turn = host_turn_try(name);
    for (unsigned waited = 0; turn == HOST_TURN_TAKEN && waited < wait_ms; waited += 10) {
        g_usleep(10000);
        turn = host_turn_try(name);
    }
    return turn;
}

static bool measure_now(const MeasureOptions *options, Measure *out, GError **error)
{
    *out = (Measure){.since_s = options->now_s};
    const Kernels *kernels = kernels_get(options->isa);
    Pool *pool = pool_new(options->threads, options->cpus, false, 50);
    if (!pool) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_MEMORY,
                    "no %u compute threads could be started: lower --threads", options->threads);
        return false;
    }
    bool ok = measure_read(pool, options->memory_bytes, out, error) &&
              measure_matmuls(pool, kernels, out, error);
    pool_free(pool);
    if (ok) {
        measure_link(out);
    }
    return ok;
}

char *measure_cpu_name(void)
{
    g_autofree char *text = NULL;
    if (!g_file_get_contents("/proc/cpuinfo", &text, NULL, NULL)) {
        return g_strdup("unknown");
    }
    const char *at = strstr(text, "model name");
    at = at ? strchr(at, ':') : NULL;
    if (!at) {
        return g_strdup("unknown");
    }
    const char *end = strchr(at, '\n');
    return g_strstrip(g_strndup(at + 1, end ? (gsize)(end - at - 1) : strlen(at + 1)));
}

static char *measure_key(const MeasureOptions *options)
{
    g_autofree char *cpu = measure_cpu_name();
    GString *key = g_string_new(NULL);
    g_string_printf(key, "%s, %u threads, %s, release %s, numerics %u, on", cpu, options->threads,
                    kernels_isa_name(options->isa), WEFT_VERSION, WEFT_NUMERICS_VERSION);
    for (unsigned i = 0; options->cpus && i < options->threads; i++) {
        g_string_append_printf(key, " %d", options->cpus[i]);
    }
    return g_string_free(key, FALSE);
}

static const struct {
    const char *name;
    size_t offset;
} fields[] = {
    {"read_bytes_per_s", offsetof(Measure, read_bytes_per_s)},
    {"int8_ops_per_s", offsetof(Measure, int8_ops_per_s)},
    {"f32_ops_per_s", offsetof(Measure, f32_ops_per_s)},
    {"link_latency_s", offsetof(Measure, link_latency_s)},
    {"link_bytes_per_s", offsetof(Measure, link_bytes_per_s)},
};

static double *field(Measure *measure, size_t i)
{
    return (double *)(void *)((char *)measure + fields[i].offset);
}

static bool is_figure(double value)
{
    return value > 0 && isfinite(value);
}

/* The name of a type's figure; NULL: the type has no products. */
static const char *matmul_name(const Kernels *kernels, unsigned type, char name[32])
{
    g_snprintf(name, 32, "matmul_%s_ops_per_s", dtype_info(type)->name);
    return kernels->matmul[type] != NULL ? name : NULL;
}

static bool load(const char *path, const char *key, const Kernels *kernels, int64_t now,
                 Measure *out)
{
    char name[32];
    g_autoptr(GKeyFile) file = g_key_file_new();
    if (!g_key_file_load_from_file(file, path, G_KEY_FILE_NONE, NULL)) {
        return false;
    }
    g_autofree char *kept = g_key_file_get_string(file, "measure", "machine", NULL);
    out->since_s = g_key_file_get_int64(file, "measure", "since_s", NULL);
    if (g_strcmp0(kept, key) != 0 || out->since_s > now || out->since_s < now - KEPT_S) {
        return false;
    }
    for (unsigned type = 0; type < DTYPE_LIMIT; type++) {
        double *rate = &out->matmul_ops_per_s[type];
        const bool is_there = matmul_name(kernels, type, name) != NULL;
        *rate = is_there ? g_key_file_get_double(file, "measure", name, NULL) : 0;
        if (is_there && !is_figure(*rate)) {
            return false;
        }
    }
    for (size_t i = 0; i < G_N_ELEMENTS(fields); i++) {
        *field(out, i) = g_key_file_get_double(file, "measure", fields[i].name, NULL);
        if (!is_figure(*field(out, i))) {
            return false;
        }
    }
    return true;
}

static void save(const char *path, const char *key, const Kernels *kernels, const Measure *measure)
{
    char name[32];
    g_autoptr(GKeyFile) file = g_key_file_new();
    g_key_file_set_string(file, "measure", "machine", key);
    g_key_file_set_int64(file, "measure", "since_s", measure->since_s);
    Measure copy = *measure;
    for (size_t i = 0; i < G_N_ELEMENTS(fields); i++) {
        g_key_file_set_double(file, "measure", fields[i].name, *field(&copy, i));
    }
    for (unsigned type = 0; type < DTYPE_LIMIT; type++) {
        if (matmul_name(kernels, type, name) != NULL) {
            g_key_file_set_double(file, "measure", name, measure->matmul_ops_per_s[type]);
        }
    }
    /* an unwritable directory only costs the next start what this one had found */
    g_key_file_save_to_file(file, path, NULL);
}

static void take_better(Measure *out, const Measure *kept)
{
    out->read_bytes_per_s = MAX(out->read_bytes_per_s, kept->read_bytes_per_s);
    out->int8_ops_per_s = MAX(out->int8_ops_per_s, kept->int8_ops_per_s);
    out->f32_ops_per_s = MAX(out->f32_ops_per_s, kept->f32_ops_per_s);
    out->link_latency_s = MIN(out->link_latency_s, kept->link_latency_s);
    out->link_bytes_per_s = MAX(out->link_bytes_per_s, kept->link_bytes_per_s);
    for (unsigned type = 0; type < DTYPE_LIMIT; type++) {
        out->matmul_ops_per_s[type] =
            MAX(out->matmul_ops_per_s[type], kept->matmul_ops_per_s[type]);
    }
    out->since_s = kept->since_s;
}

bool measure_get(const char *state_dir, const MeasureOptions *options, Measure *out, Log *log,
                 GError **error)
{
    g_autofree char *path = g_build_filename(state_dir, "measure", NULL);
    g_autofree char *key = measure_key(options);
    const Kernels *kernels = kernels_get(options->isa);
    Measure kept;
    const bool known = load(path, key, kernels, options->now_s, &kept);
    const int turn = take_turn(options->turn, known ? 0 : TURN_WAIT_MS);
    if (known && turn < 0) {
        *out = kept;
        return true;
    }
    bool ok = measure_now(options, out, known ? NULL : error);
    host_turn_end(turn);
    if (ok && known) {
        take_better(out, &kept);
    } else if (known) { /* there is no memory to measure with now */
        *out = kept;
        ok = true;
    }
    if (ok) {
        log_info(
            log,
            "measured: reads %.1f GB/s, int8 %.0f G/s, f32 %.0f G/s, messages %.0f us and %.1f "
            "GB/s, the best since %" G_GINT64_FORMAT " s ago",
            out->read_bytes_per_s / 1e9, out->int8_ops_per_s / 1e9, out->f32_ops_per_s / 1e9,
            out->link_latency_s * 1e6, out->link_bytes_per_s / 1e9, options->now_s - out->since_s);
        save(path, key, kernels, out);
    }
    return ok;
}
