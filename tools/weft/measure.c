/* weft bench: the real worker path, measured. */
#include "tools/weft/request.h"
#include "tools/weft/verbs.h"

#include "proto/base/error.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct BenchOptions {
    CommonOptions common;
    RequestOptions request;
    uint64_t prompt, generate, depth, streams, repetitions;
    char *threads;
} BenchOptions;

static const Option BENCH_OPTIONS[] = {
    {"prompt", 'p', OPTION_COUNT, offsetof(BenchOptions, prompt), "N",
     "prompt tokens of the prefill test, 0 = none", NULL, 0, 1 << 20, NULL, false},
    {"generate", 'n', OPTION_COUNT, offsetof(BenchOptions, generate), "N",
     "tokens of the decode test, 0 = none", NULL, 0, 1 << 20, NULL, false},
    {"depth", 'd', OPTION_COUNT, offsetof(BenchOptions, depth), "N",
     "tokens in the context before the decode test", NULL, 0, 1 << 20, NULL, false},
    {"streams", 'b', OPTION_COUNT, offsetof(BenchOptions, streams), "N", "sequences at once", NULL,
     1, 1024, NULL, false},
    {"threads", 't', OPTION_STRING, offsetof(BenchOptions, threads), "LIST",
     "such as 1,2: starts workers for this command alone (--up, else one) with so many threads "
     "each, "
     "one number after the other",
     NULL, 0, 0, NULL, false},
    {"repetitions", 'r', OPTION_COUNT, offsetof(BenchOptions, repetitions), "N",
     "runs of each test; the median counts", NULL, 1, 1000, NULL, false},
    LAYOUT_OPTIONS(BenchOptions),
    UP_OPTION(BenchOptions),
    COMMON_OPTIONS_BUT_DRY_RUN(BenchOptions),
    {0},
};

static void bench_defaults(void *values)
{
    BenchOptions *o = values;
    request_defaults(&o->request);
    o->prompt = 512;
    o->generate = 128;
    o->streams = 1;
    o->repetitions = 5;
}

/* Counters of time that members tell: the four that a step's time is split into, then the ops that
 * its computing is made of. */
typedef struct Share {
    const char *name, *key;
    size_t offset;
} Share;

#define SHARE(name, field)                                                                         \
    {                                                                                              \
        name, #field "_per_token", offsetof(Weft__V1__Counters, field)                             \
    }
static const Share SHARES[] = {
    SHARE("compute", compute_us),
    SHARE("wait", wait_us),
    SHARE("wire", wire_us),
    SHARE("seal", seal_us),
    SHARE("norm", norm_us),
    SHARE("qkv", qkv_us),
    SHARE("rope", rope_us),
    SHARE("attention", attention_us),
    SHARE("attn_out", attn_out_us),
    SHARE("gate_up", gate_up_us),
    SHARE("activation", activation_us),
    SHARE("down", down_us),
    SHARE("reduce", reduce_us),
    SHARE("head", head_us),
};
enum { N_SHARES = G_N_ELEMENTS(SHARES), FIRST_OP = 4 };

typedef struct BenchRow {
    const char *test;
    char *name, *layout;
    char definition[33];
    const char *numerics; /* as RunOutcome.numerics */
    double *all, median, roof, predicted, wire_bytes_per_token;
    double us[N_SHARES]; /* per token, summed over the members, as the bytes are */
    uint64_t n, depth;
} BenchRow;

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median_of(const double *values, uint64_t n)
{
    g_autofree double *sorted = g_memdup2(values, sizeof(double) * n);
    qsort(sorted, n, sizeof(double), by_value);
    return n % 2 ? sorted[n / 2] : (sorted[n / 2 - 1] + sorted[n / 2]) / 2;
}

/* One run: a fresh random prompt, no prefix cache, end tokens ignored. */
static bool bench_once(Client *client, const BenchOptions *o, const char *path, uint64_t prompt,
                       uint64_t generate, RunOutcome *out, GError **error)
{
    Weft__V1__RunRequest message = WEFT__V1__RUN_REQUEST__INIT;
    Weft__V1__Sampler sampler;
    Weft__V1__Layout layout;
    if (!request_fill(&message, &sampler, &layout, &o->request, error)) {
        return false;
    }
    message.model = (char *)path;
    message.random_prompt = (uint32_t)prompt;
    message.max_tokens = (uint32_t)generate;
    message.ignore_end = true;
    message.fresh = true;
    message.streams = (uint32_t)o->streams;
    return request_run(client, &o->common, &message, NULL, out, error);
}

typedef struct TimeShares {
    double us[N_SHARES], wire_bytes;
} TimeShares;

/* True once every usable member has told its counters since `since_us`; their sums in *out. */
static bool shares_since(Client *client, gint64 since_us, TimeShares *out, bool *all_in,
                         GError **error)
{
    Weft__V1__StatusResponse *s = request_status(client, error);
    if (s == NULL) {
        return false;
    }
    const uint64_t age_ms = (uint64_t)(g_get_monotonic_time() - since_us) / 1000;
    *out = (TimeShares){0};
    *all_in = true;
    for (size_t i = 0; i < s->n_members; i++) {
        const Weft__V1__Member *m = s->members[i];
        if (member_is_usable(m) && m->counters != NULL) {
            *all_in = *all_in && m->last_heartbeat_ms < age_ms;
            out->wire_bytes += (double)m->counters->wire_bytes_sent;
            for (unsigned k = 0; k < N_SHARES; k++) {
                out->us[k] += (double)G_STRUCT_MEMBER(uint64_t, m->counters, SHARES[k].offset);
            }
        }
    }
    protobuf_c_message_free_unpacked(&s->base, NULL);
    return true;
}

/* Members tell their counters with each heartbeat, twice a second: what they say after a moment of
 * rest holds all that was done. */
static bool read_shares(Client *client, TimeShares *out, GError **error)
{
    enum { IN_FLIGHT_US = 50000, POLL_US = 50000, GIVE_UP_US = 3000000 };
    const gint64 since_us = g_get_monotonic_time() + IN_FLIGHT_US;
    const bool never = false;
    for (bool all_in = false; !all_in;) {
        main_loop_run_until(client->loop, client->interrupted ? &client->interrupted : &never,
                            POLL_US);
        if (!shares_since(client, MIN(since_us, g_get_monotonic_time()), out, &all_in, error)) {
            return false;
        }
        all_in =
            all_in ||
            g_get_monotonic_time() >
                since_us +
                    GIVE_UP_US; /* a member went silent: the run itself says more than this would */
    }
    return true;
}

static void fill_shares(BenchRow *row, const TimeShares *from, const TimeShares *to, double tokens)
{
    for (unsigned k = 0; k < N_SHARES; k++) {
        row->us[k] = (to->us[k] - from->us[k]) / tokens;
    }
    row->wire_bytes_per_token = (to->wire_bytes - from->wire_bytes) / tokens;
}

static bool bench_test(Client *client, const BenchOptions *o, const char *path, BenchRow *row,
                       bool decode, GError **error)
{
    const uint64_t prompt = decode ? MAX(o->depth, 1u) : o->prompt,
                   generate = decode ? o->generate + 1 : 1;
    RunOutcome out;
    TimeShares before = {0}, after = {0};
    row->all = g_new0(double, o->repetitions);
    row->n = o->repetitions;
    for (uint64_t i = 0; i <= o->repetitions; i++) { /* run 0 loads and warms up */
        const bool ok = bench_once(client, o, path, prompt, generate, &out, error);
        if (ok && i > 0) {
            const double tokens = (double)(decode ? o->generate : prompt) * (double)o->streams,
                         seconds = decode ? out.decode_s : out.prefill_s;
            row->all[i - 1] = seconds > 0 ? tokens / seconds : 0;
        }
        if (ok && i == 0 && out.plan != NULL) {
            g_strlcpy(row->definition, out.definition, sizeof row->definition);
            row->numerics = out.numerics;
            row->layout = plan_message_layout(out.plan);
            row->predicted = decode ? out.plan->predicted_decode_tokens_per_s
                                    : out.plan->predicted_prefill_tokens_per_s;
        }
        run_outcome_clear(&out);
        if (!ok || (i == 0 && !read_shares(client, &before, error))) {
            return false;
        }
        cli_progress(&o->common, "%s: run %u of %u", row->name, (unsigned)i,
                     (unsigned)o->repetitions);
    }
    row->median = median_of(row->all, row->n);
    if (!read_shares(client, &after, error)) {
        return false;
    }
    /* The last token drawn is not computed any further. */
    fill_shares(row, &before, &after,
                (double)((prompt + generate - 1) * o->streams * o->repetitions));
    return true;
}

static double ask_roof(Client *client, const BenchOptions *o, const char *path)
{
    Weft__V1__PlanRequest request = WEFT__V1__PLAN_REQUEST__INIT;
    Weft__V1__Layout layout = WEFT__V1__LAYOUT__INIT;
    Weft__V1__PlanResponse *response;
    layout.dp = (uint32_t)o->request.dp;
    layout.pp = (uint32_t)o->request.pp;
    layout.tp = (uint32_t)o->request.tp;
    request.layout = &layout;
    request.model = (char *)path;
    request.context = (uint32_t)o->request.context;
    request.numerics = o->request.numerics != NULL ? o->request.numerics : "";
    request.kv = o->request.kv != NULL ? o->request.kv : "";
    if (!client_call(client, &weft__v1__admin__descriptor, "Plan", &request.base, 60000,
                     (ProtobufCMessage **)&response, NULL)) {
        return 0;
    }
    const double roof = response->roof_decode_tokens_per_s;
    protobuf_c_message_free_unpacked(&response->base, NULL);
    return roof;
}

static json_t *row_json(const BenchOptions *o, const BenchRow *r, uint32_t threads)
{
    json_t *all = json_array();
    for (uint64_t i = 0; i < r->n; i++) {
        json_array_append_new(all, json_real(r->all[i]));
    }
    json_t *row = json_pack(
        "{s:s,s:I,s:I,s:s,s:I,s:f,s:o,s:f,s:f}", "test", r->name, "depth", (json_int_t)r->depth,
        "streams", (json_int_t)o->streams, "layout", r->layout != NULL ? r->layout : "", "threads",
        (json_int_t)threads, "tokens_per_s", r->median, "tokens_per_s_all", all,
        "predicted_tokens_per_s", r->predicted, "wire_bytes_per_token", r->wire_bytes_per_token);
    for (unsigned k = 0; k < N_SHARES; k++) {
        json_object_set_new(row, SHARES[k].key, json_real(r->us[k]));
    }
    if (r->roof > 0) {
        json_object_set_new(row, "roof_tokens_per_s", json_real(r->roof));
        json_object_set_new(row, "roof_fraction", json_real(r->median / r->roof));
    }
    return row;
}

static void print_shares(const BenchRow *row)
{
    double rest = row->us[0];
    printf("%s, microseconds per token, all members together:", row->name);
    for (unsigned k = 0; k < FIRST_OP; k++) {
        printf("%s %s %.0f", k > 0 ? "," : "", SHARES[k].name, row->us[k]);
    }
    printf("\n  of that by op:");
    for (unsigned k = FIRST_OP; k < N_SHARES; k++) {
        printf(" %s %.1f,", SHARES[k].name, row->us[k]);
        rest -= row->us[k];
    }
    printf(" rest %.1f\n", MAX(rest, 0));
}

/* What all members are together. */
typedef struct Machine {
    const char *cpu, *isa; /* of the first, borrowed */
    uint32_t threads;
    double read_bytes_per_s;
} Machine;

static Machine machine_of(const Weft__V1__StatusResponse *s)
{
    const Weft__V1__Member *first = s->n_members > 0 ? s->members[0] : NULL;
    Machine machine = {first != NULL ? first->cpu : "", first != NULL ? first->isa : "", 0, 0};
    for (size_t i = 0; i < s->n_members; i++) {
        const Weft__V1__Member *m = s->members[i];
        if (member_is_usable(m)) {
            machine.threads += m->threads;
            machine.read_bytes_per_s += m->measured != NULL ? m->measured->read_bytes_per_s : 0;
        }
    }
    return machine;
}

/* Adds to the object's rows; machine and definition are those of the last workers. */
static void add_json(json_t *object, const BenchOptions *o, const Machine *m, const BenchRow *rows,
                     unsigned n)
{
    json_t *list = json_object_get(object, "rows");
    json_object_set_new(object, "machine",
                        json_pack("{s:s,s:s,s:I,s:f}", "cpu", m->cpu, "isa", m->isa, "threads",
                                  (json_int_t)m->threads, "read_bytes_per_s", m->read_bytes_per_s));
    for (unsigned i = 0; i < n; i++) {
        json_array_append_new(list, row_json(o, &rows[i], m->threads));
    }
    json_object_set_new(object, "numerics", json_string(rows[0].numerics));
    json_object_set_new(object, "definition", json_string(rows[0].definition));
}

static void print_bench(const BenchOptions *o, const Machine *m, const BenchRow *rows, unsigned n)
{
    TextTable *t =
        text_table_new((const char *const[]){"TEST", "LAYOUT", "STREAMS", "TOKENS/S", "PREDICTED",
                                             "ROOF", "OF ROOF", "WIRE B/TOKEN", NULL});
    for (unsigned i = 0; i < n; i++) {
        const BenchRow *r = &rows[i];
        g_autofree char *streams = g_strdup_printf("%u", (unsigned)o->streams);
        g_autofree char *median = g_strdup_printf("%.1f", r->median);
        g_autofree char *predicted = g_strdup_printf("%.1f", r->predicted);
        g_autofree char *roof = r->roof > 0 ? g_strdup_printf("%.0f", r->roof) : g_strdup("-");
        g_autofree char *fraction =
            r->roof > 0 ? g_strdup_printf("%.0f %%", 100 * r->median / r->roof) : g_strdup("-");
        g_autofree char *wire = g_strdup_printf("%.0f", r->wire_bytes_per_token);
        text_table_row(t, r->name, r->layout != NULL ? r->layout : "?", streams, median, predicted,
                       roof, fraction, wire, NULL);
    }
    text_table_print(t);
    printf("\n");
    for (unsigned i = 0; i < n; i++) {
        print_shares(&rows[i]);
    }
    printf("%s, %s, %u threads in all, %.1f GB/s read (each member measured by itself)\n", m->cpu,
           m->isa, m->threads, m->read_bytes_per_s / 1e9);
}

/* On one cluster. object NULL: as text. */
static bool bench_all(const BenchOptions *o, const char *model, json_t *object, GError **error)
{
    g_autofree char *path = request_model_path(model);
    BenchRow rows[2] = {0};
    unsigned n = 0;
    bool ok = true;
    Client *client = client_new(&o->common, error);
    if (client == NULL) {
        return false;
    }
    if (o->prompt > 0) {
        rows[n] = (BenchRow){.name = g_strdup_printf("pp%u", (unsigned)o->prompt)};
        ok = bench_test(client, o, path, &rows[n++], false, error);
    }
    if (ok && o->generate > 0) {
        rows[n] =
            (BenchRow){.name = g_strdup_printf("tg%u", (unsigned)o->generate), .depth = o->depth};
        ok = bench_test(client, o, path, &rows[n], true, error);
        rows[n++].roof = o->streams == 1 ? ask_roof(client, o, path) : 0;
    }
    cli_progress_end(&o->common);
    Weft__V1__StatusResponse *status = ok ? request_status(client, error) : NULL;
    if (status != NULL) {
        const Machine machine = machine_of(status);
        if (object != NULL) {
            add_json(object, o, &machine, rows, n);
        } else {
            print_bench(o, &machine, rows, n);
        }
        protobuf_c_message_free_unpacked(&status->base, NULL);
    }
    for (unsigned i = 0; i < n; i++) {
        g_free(rows[i].name);
        g_free(rows[i].layout);
        g_free(rows[i].all);
    }
    client_free(client);
    return status != NULL;
}

/* Numbers of threads; NULL: one of them is none that this machine's CPUs allow. */
static GArray *thread_list(const char *text)
{
    g_autoptr(GArray) list = g_array_new(FALSE, FALSE, sizeof(unsigned));
    g_auto(GStrv) words = g_strsplit(text, ",", -1);
    for (char **word = words; *word != NULL; word++) {
        guint64 value;
        if (!g_ascii_string_to_unsigned(*word, 10, 1, daemon_n_cpus(), &value, NULL)) {
            return NULL;
        }
        const unsigned n = (unsigned)value;
        g_array_append_val(list, n);
    }
    return list->len > 0 ? g_steal_pointer(&list) : NULL;
}

/* With workers of its own for each number of threads, or (threads NULL) on the cluster that there
 * is or that --up starts. */
static bool bench_each(BenchOptions *o, const GArray *threads, const char *model, json_t *object,
                       GError **error)
{
    bool ok = true;
    for (guint i = 0; ok && i < (threads != NULL ? threads->len : 1); i++) {
        GError *why = NULL;
        LocalCluster *cluster =
            threads != NULL
                ? local_cluster_with(&o->common, g_array_index(threads, unsigned, i), &why)
                : local_cluster_for(&o->common, &why);
        ok = why == NULL && bench_all(o, model, object, &why);
        local_cluster_free(cluster);
        if (why != NULL) {
            g_propagate_error(error, why);
        }
    }
    return ok;
}

static int bench_run(const Verb *verb, void *values, GPtrArray *rest)
{
    BenchOptions *o = values;
    GError *error = NULL;
    g_autoptr(GArray) threads = o->threads != NULL ? thread_list(o->threads) : NULL;
    if (rest->len != 1) {
        return cli_usage(verb, "one model file is expected");
    }
    if (o->prompt == 0 && o->generate == 0) {
        return cli_usage(verb, "there is nothing to measure with -p 0 and -n 0");
    }
    if (o->threads != NULL && threads == NULL) {
        return cli_usage(verb, "--threads %s: numbers from 1 to %u are expected, such as 1,2",
                         o->threads, daemon_n_cpus());
    }
    if (threads != NULL && o->common.up == 0) {
        o->common.up = 1;
    }
    json_t *object = o->common.json ? cli_json_new() : NULL;
    if (object != NULL) {
        json_object_set_new(object, "rows", json_array());
    }
    const bool ok = bench_each(o, threads, rest->pdata[0], object, &error);
    if (ok && object != NULL) {
        cli_print_json(object);
    } else {
        json_decref(object);
    }
    return ok ? 0 : cli_fail(error);
}

const Verb VERB_BENCH = {"bench",
                         "MODEL [-p 512] [-n 128] [-d 0] [-b STREAMS] [-t THREADS] [-r 5]",
                         "speed on the real worker path",
                         BENCH_OPTIONS,
                         sizeof(BenchOptions),
                         bench_defaults,
                         bench_run};
