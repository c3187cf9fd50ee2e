/* weft bench serve: load on any OpenAI-compatible server. */
#include "tools/weft/cli.h"
#include "tools/weft/load.h"
#include "tools/weft/shown.h"
#include "tools/weft/verbs.h"

#include "proto/base/error.h"
#include "proto/base/random.h"

#include <stdio.h>
#include <string.h>

enum { MADE_PROMPTS = 1024, OPEN_CONCURRENCY = 1024 };

typedef struct BenchServeOptions {
    CommonOptions common;
    char *file, *api, *model, *key, *ca, *slo, *body;
    uint64_t requests, concurrency, max_tokens, words, seed;
    double rate;
    int64_t timeout_us;
} BenchServeOptions;

static const Option BENCH_SERVE_OPTIONS[] = {
    {"requests", 0, OPTION_COUNT, offsetof(BenchServeOptions, requests), "N", "requests in all",
     NULL, 1, 100e6, NULL, false},
    {"concurrency", 0, OPTION_COUNT, offsetof(BenchServeOptions, concurrency), "N",
     "clients, each with one request at a time (default 8; with --rate 1024)", NULL, 1, 65536, NULL,
     false},
    {"rate", 0, OPTION_NUMBER, offsetof(BenchServeOptions, rate), "R",
     "requests a second, at random times (Poisson), instead of a closed loop", NULL, 1e-3, 1e6,
     NULL, false},
    {"max-tokens", 'n', OPTION_COUNT, offsetof(BenchServeOptions, max_tokens), "N",
     "tokens of an answer at most", NULL, 1, 1 << 20, NULL, false},
    {"file", 'f', OPTION_STRING, offsetof(BenchServeOptions, file), "FILE",
     "prompts, one a line; *.jsonl: objects with \"prompt\" or \"messages\"", NULL, 0, 0, NULL,
     false},
    {"words", 0, OPTION_COUNT, offsetof(BenchServeOptions, words), "N",
     "without a file: words of a made-up prompt", NULL, 1, 1 << 20, NULL, false},
    {"api", 0, OPTION_STRING, offsetof(BenchServeOptions, api), "API", "what is asked for", NULL, 0,
     0, "chat|completions", false},
    {"model", 0, OPTION_STRING, offsetof(BenchServeOptions, model), "NAME",
     "the model's name (default: the first that the server offers)", NULL, 0, 0, NULL, false},
    {"body", 0, OPTION_STRING, offsetof(BenchServeOptions, body), "JSON",
     "fields laid over each request's body; null takes one away", NULL, 0, 0, NULL, false},
    {"slo", 0, OPTION_STRING, offsetof(BenchServeOptions, slo), "LIMITS",
     "what a good request keeps: ttft=500ms,itl=50ms,e2e=5s (itl: its mean)", NULL, 0, 0, NULL,
     false},
    {"seed", 0, OPTION_COUNT, offsetof(BenchServeOptions, seed), "N",
     "of arrivals, made-up prompts and sampling", NULL, 0, 0, NULL, false},
    {"timeout", 0, OPTION_DURATION, offsetof(BenchServeOptions, timeout_us), "TIME",
     "of one request", NULL, 0, 0, NULL, false},
    {"key", 0, OPTION_STRING, offsetof(BenchServeOptions, key), "KEY", "an API key", "WEFT_API_KEY",
     0, 0, NULL, false},
    {"ca", 0, OPTION_STRING, offsetof(BenchServeOptions, ca), "FILE",
     "certificates that the server's must come from (PEM)", NULL, 0, 0, NULL, false},
    COMMON_OPTIONS(BenchServeOptions),
    {0},
};

static void bench_serve_defaults(void *values)
{
    BenchServeOptions *o = values;
    o->requests = 100;
    o->max_tokens = 64;
    o->words = 100;
    o->seed = 1;
    o->api = g_strdup("chat");
    o->timeout_us = 300 * G_USEC_PER_SEC;
}

/* ---- prompts ---- */

static void prompt_free(void *prompt)
{
    json_decref(prompt);
}

/* {"prompt": "..."} or {"messages": [...]}; NULL: neither. */
static json_t *prompt_of_line(const char *line)
{
    json_t *object = json_loads(line, 0, NULL), *prompt = json_object_get(object, "prompt"),
           *messages = json_object_get(object, "messages");
    json_t *out = json_is_string(prompt)    ? json_incref(prompt)
                  : json_is_array(messages) ? json_incref(messages)
                                            : NULL;
    json_decref(object);
    return out;
}

static GPtrArray *read_prompts(const char *path, bool is_chat, GError **error)
{
    g_autofree char *text = NULL;
    g_autoptr(GError) why = NULL;
    if (!g_file_get_contents(path, &text, NULL, &why)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND, "prompts: %s", why->message);
        return NULL;
    }
    const bool is_json = g_str_has_suffix(path, ".jsonl");
    g_autoptr(GPtrArray) prompts = g_ptr_array_new_with_free_func(prompt_free);
    g_auto(GStrv) lines = g_strsplit(text, "\n", -1);
    for (unsigned i = 0; lines[i] != NULL; i++) {
        g_strchomp(lines[i]);
        if (*lines[i] == '\0') {
            continue;
        }
        json_t *prompt = is_json ? prompt_of_line(lines[i]) : json_string(lines[i]);
        if (prompt == NULL || (json_is_array(prompt) && !is_chat)) {
            json_decref(prompt);
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "prompts: %s line %u is not %s",
                        path, i + 1,
                        !is_json  ? "UTF-8"
                        : is_chat ? "an object with \"prompt\" or \"messages\""
                                  : "an object with \"prompt\"");
            return NULL;
        }
        g_ptr_array_add(prompts, prompt);
    }
    if (prompts->len == 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "prompts: %s has no line with text",
                    path);
        return NULL;
    }
    return g_steal_pointer(&prompts);
}

/* Different from their first word on, so that no cache of prefixes has them. */
static GPtrArray *make_prompts(const BenchServeOptions *o)
{
    static const char *const words[] = {
        "river",   "answer",  "seven",  "under",  "light",  "paper",  "window", "because",
        "garden",  "small",   "number", "often",  "music",  "winter", "stone",  "letter",
        "between", "morning", "table",  "change", "north",  "water",  "simple", "green",
        "island",  "carry",   "silver", "world",  "before", "quiet",  "price",  "travel"};
    GPtrArray *prompts = g_ptr_array_new_with_free_func(prompt_free);
    RandomSeeded random;
    random_seeded_init(&random, ~o->seed);
    for (uint64_t i = 0; i < MIN(o->requests, (uint64_t)MADE_PROMPTS); i++) {
        g_autoptr(GString) text = g_string_new(NULL);
        g_string_append_printf(text, "%" G_GUINT64_FORMAT, i);
        for (uint64_t w = 1; w < o->words; w++) {
            const char *word = words[random_u64(&random.base) % G_N_ELEMENTS(words)];
            g_string_append_printf(text, " %s", word);
        }
        g_ptr_array_add(prompts, json_string(text->str));
    }
    return prompts;
}

/* ---- what is printed ---- */

static json_t *latency_json(const Latency *l)
{
    return json_pack("{s:f,s:f,s:f,s:f,s:f,s:I}", "median", latency_quantile_s(l, 0.5), "p90",
                     latency_quantile_s(l, 0.9), "p99", latency_quantile_s(l, 0.99), "max",
                     latency_max_s(l), "mean", latency_mean_s(l), "n", (json_int_t)latency_n(l));
}

static double a_second(double n, const LoadResult *r)
{
    return r->duration_s > 0 ? n / r->duration_s : 0;
}

static void add_slo(json_t *object, const LoadLimits *limits, const LoadResult *r)
{
    const struct {
        const char *name;
        int64_t us;
    } rows[] = {{"ttft_s", limits->ttft_us}, {"itl_s", limits->itl_us}, {"e2e_s", limits->e2e_us}};
    json_t *slo = json_object();
    for (unsigned i = 0; i < G_N_ELEMENTS(rows); i++) {
        if (rows[i].us > 0) {
            json_object_set_new(slo, rows[i].name, json_real((double)rows[i].us / 1e6));
        }
    }
    json_object_set_new(object, "slo", slo);
    json_object_set_new(object, "good", json_integer((json_int_t)r->good));
    json_object_set_new(object, "goodput_requests_per_s", json_real(a_second((double)r->good, r)));
}

static void print_json(const LoadOptions *l, const BenchServeOptions *o, const LoadResult *r)
{
    json_t *object = cli_json_new(), *errors = json_array();
    for (guint i = 0; i < r->errors->len; i++) {
        const LoadError *e = r->errors->pdata[i];
        json_array_append_new(errors, json_pack("{s:s,s:I,s:s}", "status", e->status, "count",
                                                (json_int_t)e->n, "first", e->text));
    }
    json_object_update_new(
        object, json_pack("{s:o,s:s,s:s,s:I,s:I,s:f,s:I,s:I}", "url", cli_json_text(l->url),
                          "model", l->model, "api", o->api, "requests", (json_int_t)l->n_requests,
                          "concurrency", (json_int_t)l->concurrency, "rate", l->rate, "max_tokens",
                          (json_int_t)l->max_tokens, "seed", (json_int_t)l->seed));
    json_object_update_new(
        object, json_pack("{s:f,s:b,s:I,s:I,s:I,s:I,s:I,s:I,s:f,s:f}", "duration_s", r->duration_s,
                          "interrupted", r->interrupted, "completed", (json_int_t)r->completed,
                          "failed", (json_int_t)r->failed, "cancelled", (json_int_t)r->cancelled,
                          "prompt_tokens", (json_int_t)r->prompt_tokens, "output_tokens",
                          (json_int_t)r->output_tokens, "uncounted", (json_int_t)r->uncounted,
                          "requests_per_s", a_second((double)r->completed, r),
                          "output_tokens_per_s", a_second((double)r->output_tokens, r)));
    json_object_update_new(object, json_pack("{s:o,s:o,s:o}", "ttft_s", latency_json(r->ttft),
                                             "inter_token_s", latency_json(r->itl), "e2e_s",
                                             latency_json(r->e2e)));
    if (o->slo != NULL) {
        add_slo(object, &l->limits, r);
    }
    json_object_set_new(object, "errors", errors);
    if (r->fingerprint != NULL) {
        json_object_set_new(object, "system_fingerprint", json_string(r->fingerprint));
    }
    cli_print_json(object);
}

static void add_row(TextTable *t, const char *name, const Latency *l)
{
    char cells[5][16];
    const double values[] = {latency_quantile_s(l, 0.5), latency_quantile_s(l, 0.9),
                             latency_quantile_s(l, 0.99), latency_max_s(l), latency_mean_s(l)};
    for (unsigned i = 0; i < G_N_ELEMENTS(values); i++) {
        if (latency_n(l) > 0) {
            g_snprintf(cells[i], sizeof cells[i], "%.1f", values[i] * 1e3);
        } else {
            g_strlcpy(cells[i], "-", sizeof cells[i]);
        }
    }
    text_table_row(t, name, cells[0], cells[1], cells[2], cells[3], cells[4], NULL);
}

static void print_errors(const LoadResult *r)
{
    if (r->errors->len == 0) {
        return;
    }
    TextTable *t = text_table_new((const char *const[]){"ERROR", "COUNT", "FIRST", NULL});
    for (guint i = 0; i < r->errors->len; i++) {
        const LoadError *e = r->errors->pdata[i];
        g_autofree char *n = g_strdup_printf("%" G_GUINT64_FORMAT, e->n);
        text_table_row(t, e->status, n, e->text, NULL);
    }
    text_table_fit(t, 2);
    printf("\n");
    text_table_print(t);
}

static void print_table(const LoadOptions *l, const BenchServeOptions *o, const LoadResult *r)
{
    g_autofree char *how = l->rate > 0 ? g_strdup_printf("%g requests a second asked for", l->rate)
                                       : g_strdup_printf("%u clients", l->concurrency);
    TextTable *t =
        text_table_new((const char *const[]){"MS", "MEDIAN", "P90", "P99", "MAX", "MEAN", NULL});
    add_row(t, "first token", r->ttft);
    add_row(t, "inter-token", r->itl);
    add_row(t, "end to end", r->e2e);
    text_table_print(t);
    printf("\n%s: %" G_GUINT64_FORMAT " of %" G_GUINT64_FORMAT
           " requests completed, %" G_GUINT64_FORMAT " failed, %.2f s, %s\n",
           l->model, r->completed, l->n_requests, r->failed, r->duration_s, how);
    printf("%.1f output tokens/s, %.2f requests/s; %" G_GUINT64_FORMAT
           " prompt and %" G_GUINT64_FORMAT " output tokens%s\n",
           a_second((double)r->output_tokens, r), a_second((double)r->completed, r),
           r->prompt_tokens, r->output_tokens,
           r->uncounted > 0 ? " (no usage told: events counted)" : "");
    if (o->slo != NULL) {
        printf("goodput %.2f requests/s: %" G_GUINT64_FORMAT " kept %s\n",
               a_second((double)r->good, r), r->good, o->slo);
    }
    print_errors(r);
}

/* ---- the verb ---- */

static void show_progress(uint64_t completed, uint64_t failed, void *user)
{
    const BenchServeOptions *o = user;
    cli_progress(&o->common,
                 "%" G_GUINT64_FORMAT " of %" G_GUINT64_FORMAT " completed, %" G_GUINT64_FORMAT
                 " failed",
                 completed, o->requests, failed);
}

static bool check_key(const char *key, GError **error)
{
    for (const char *c = key; c != NULL && *c != '\0'; c++) {
        if (*c < 0x21 || *c > 0x7e) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                        "the API key has a character that no key can have: give one line");
            return false;
        }
    }
    return true;
}

static bool check_model(const char *name, GError **error)
{
    if (name != NULL && !g_utf8_validate(name, -1, NULL)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "the model's name is not UTF-8: no server can have it");
        return false;
    }
    return true;
}

static bool check_body(const char *text, json_t **out, GError **error)
{
    json_error_t why;
    *out = text != NULL ? json_loads(text, 0, &why) : NULL;
    if (text == NULL || json_is_object(*out)) {
        return true;
    }
    json_decref(*out);
    *out = NULL;
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                "body '%s' is no JSON object: as in '{\"ignore_eos\":true}'", text);
    return false;
}

static bool fill_options(const BenchServeOptions *o, const char *url, LoadOptions *l,
                         GError **error)
{
    const uint64_t clients = o->concurrency > 0 ? o->concurrency
                             : o->rate > 0      ? OPEN_CONCURRENCY
                                                : 8;
    *l = (LoadOptions){.key = o->key,
                       .ca = o->ca,
                       .chat = strcmp(o->api, "chat") == 0,
                       .n_requests = o->requests,
                       .max_tokens = o->max_tokens,
                       .seed = o->seed,
                       .concurrency = (unsigned)MIN(clients, o->requests),
                       .rate = o->rate,
                       .timeout_us = o->timeout_us,
                       .progress = show_progress,
                       .user = (void *)o};
    if ((l->url = load_base_url(url, error)) == NULL || !check_key(o->key, error) ||
        !check_model(o->model, error) || !check_body(o->body, &l->more, error) ||
        (o->slo != NULL && !load_limits_parse(o->slo, &l->limits, error))) {
        return false;
    }
    l->prompts = o->file != NULL ? read_prompts(o->file, l->chat, error) : make_prompts(o);
    return l->prompts != NULL;
}

static void options_free(LoadOptions *l)
{
    g_free(l->url);
    g_free(l->model);
    json_decref(l->more);
    if (l->prompts != NULL) {
        g_ptr_array_unref(l->prompts);
    }
}

/* All of them failing is a failure; the first reason decides which. */
static int exit_code(const LoadResult *r)
{
    const LoadError *first = r->errors->len > 0 ? r->errors->pdata[0] : NULL;
    if (r->interrupted) {
        return 130;
    }
    if (r->completed > 0 || first == NULL) {
        return 0;
    }
    return strcmp(first->status, "connect") == 0                                    ? 5
           : strcmp(first->status, "401") == 0 || strcmp(first->status, "403") == 0 ? 6
                                                                                    : 1;
}

static bool bench_serve(const BenchServeOptions *o, LoadOptions *l, int *code, GError **error)
{
    l->model = o->model != NULL ? g_strdup(o->model) : load_first_model(l, error);
    LoadResult *r = l->model != NULL ? load_run(l, error) : NULL;
    cli_progress_end(&o->common);
    if (r == NULL) {
        return false;
    }
    if (o->common.json) {
        print_json(l, o, r);
    } else {
        print_table(l, o, r);
    }
    *code = exit_code(r);
    load_result_free(r);
    return true;
}

static int bench_serve_run(const Verb *verb, void *values, GPtrArray *rest)
{
    const BenchServeOptions *o = values;
    GError *error = NULL;
    LoadOptions l;
    int code = 0;
    if (rest->len != 1) {
        return cli_usage(verb, "one address is expected");
    }
    if (!fill_options(o, rest->pdata[0], &l, &error)) {
        code = cli_fail(error);
    } else if (o->common.dry_run) {
        printf("would send %" G_GUINT64_FORMAT " requests to %s\n", l.n_requests, l.url);
    } else if (!bench_serve(o, &l, &code, &error)) {
        code = cli_fail(error);
    }
    options_free(&l);
    return code;
}

const Verb VERB_BENCH_SERVE = {"bench serve",
                               "URL [--requests N] [--concurrency N | --rate R] [-n 64] [-f FILE]",
                               "load on any OpenAI-compatible server",
                               BENCH_SERVE_OPTIONS,
                               sizeof(BenchServeOptions),
                               bench_serve_defaults,
                               bench_serve_run};
