/* weft perplexity: how well a model predicts a text; with --save-logits and --against, how far the
 * distributions of another model are from those of this one.
 *
 * The logits come row by row, as fast as they are taken: a piece of a window at a time, pieces of
 * several windows in turn (coordinator/gateway/requests/run.h), so a row says where it belongs.
 * None is kept: it goes to its place in the file, or is compared with the one from there. */
#include "tools/weft/divergence.h"
#include "tools/weft/logits_file.h"
#include "tools/weft/request.h"
#include "tools/weft/verbs.h"

#include "proto/base/error.h"
#include "proto/base/units.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

typedef struct PerplexityOptions {
    CommonOptions common;
    RequestOptions request;
    char *file, *save, *against;
    uint64_t window;
} PerplexityOptions;

static const Option PERPLEXITY_OPTIONS[] = {
    {"file", 'f', OPTION_STRING, offsetof(PerplexityOptions, file), "FILE", "the text", NULL, 0, 0,
     NULL, false},
    {"ctx", 0, OPTION_COUNT, offsetof(PerplexityOptions, window), "N",
     "tokens of a window; its second half is scored", NULL, 4, 1 << 20, NULL, true},
    {"save-logits", 0, OPTION_STRING, offsetof(PerplexityOptions, save), "FILE",
     "write the logits of every scored token: 4 bytes an id of the vocabulary and token", NULL, 0,
     0, NULL, false},
    {"against", 0, OPTION_STRING, offsetof(PerplexityOptions, against), "FILE",
     "compare with the logits that another model wrote there over the same text: KL divergence of "
     "this model from that one, same most likely token, ratio of perplexities (--json: reference, "
     "kl_mean, kl_standard_error, kl_median, kl_p99, kl_max, same_top, perplexity_ratio)",
     NULL, 0, 0, NULL, false},
    LAYOUT_OPTIONS(PerplexityOptions),
    UP_OPTION(PerplexityOptions),
    COMMON_OPTIONS_BUT_DRY_RUN(PerplexityOptions),
    {0},
};

static void perplexity_defaults(void *values)
{
    PerplexityOptions *o = values;
    request_defaults(&o->request);
    o->window = 512;
}

/* One text being scored. */
typedef struct Scoring {
    const PerplexityOptions *o;
    const char *model;
    char *text;
    Client *client;
    LogitsKind kind; /* of what comes */
    LogitsReader *reference;
    float *row; /* of the reference */
    Divergence *divergence;
    LogitsWriter *writer;
    uint64_t n_rows; /* that came */
    RunOutcome out;
} Scoring;

static void scoring_clear(Scoring *s)
{
    client_free(s->client);
    logits_reader_free(s->reference);
    logits_writer_free(s->writer);
    divergence_free(s->divergence);
    run_outcome_clear(&s->out);
    g_free(s->row);
    g_free(s->text);
}

static bool wants_logits(const Scoring *s)
{
    return s->o->save != NULL || s->o->against != NULL;
}

/* ---- the rows ---- */

static bool take_hash(const ProtobufCBinaryData *bytes, Hash128 *out)
{
    if (bytes->len != sizeof *out) {
        return false;
    }
    memcpy(out->bytes, bytes->data, sizeof *out);
    return true;
}

static bool fill_kind(Scoring *s, const Weft__V1__RunStarted *started, GError **error)
{
    LogitsKind *k = &s->kind;
    k->vocab_size = started->vocab_size;
    k->window = (uint32_t)s->o->window;
    k->n_windows = started->prompt_tokens / k->window;
    k->numerics =
        strcmp(s->out.numerics, numerics_name(NUMERICS_FAST)) == 0 ? NUMERICS_FAST : NUMERICS_EXACT;
    g_autofree char *name = g_path_get_basename(s->model);
    g_autofree char *valid = g_utf8_make_valid(name, -1);
    g_strlcpy(k->model, valid, sizeof k->model);
    if (k->vocab_size > 0 && k->n_windows > 0 && take_hash(&started->vocabulary, &k->vocabulary) &&
        take_hash(&started->windows, &k->windows) &&
        take_hash(&started->definition, &k->definition)) {
        return true;
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                "the coordinator does not say what it scores (%u windows, vocabulary %u): use one "
                "of this release",
                k->n_windows, k->vocab_size);
    return false;
}

static bool begin_writing(Scoring *s, GError **error)
{
    g_autofree char *size = units_format_size(logits_kind_bytes(&s->kind));
    if (!s->o->common.quiet) {
        fprintf(stderr, "%s: %" G_GUINT64_FORMAT " rows of %u logits, %s\n", s->o->save,
                logits_kind_rows(&s->kind), s->kind.vocab_size, size);
    }
    s->writer = logits_writer_new(s->o->save, &s->kind, error);
    return s->writer != NULL;
}

static bool on_started(const Weft__V1__RunStarted *started, void *user, GError **error)
{
    Scoring *s = user;
    if (!wants_logits(s)) {
        return true;
    }
    if (!fill_kind(s, started, error)) {
        return false;
    }
    if (s->reference != NULL) {
        if (!logits_reader_fits(s->reference, &s->kind, error)) {
            return false;
        }
        s->row = g_new(float, s->kind.vocab_size);
        s->divergence = divergence_new(logits_kind_rows(&s->kind), s->kind.vocab_size);
    }
    return s->o->save == NULL || begin_writing(s, error);
}

/* Where a row belongs; what does not come as it should is the coordinator's fault. */
static bool place_row(const Scoring *s, const Weft__V1__RunDelta *d, uint64_t *row, GError **error)
{
    const LogitsKind *k = &s->kind;
    const uint32_t from = k->window / 2;
    if (d->n_ids != 1 || d->ids[0] >= k->vocab_size || d->window >= k->n_windows ||
        d->position < from || d->position >= k->window ||
        d->logits.len != sizeof(float) * (size_t)k->vocab_size ||
        s->n_rows >= logits_kind_rows(k)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                    "a row of logits with %zu bytes came for token %u of window %u, of %u windows "
                    "of %u tokens with %u ids: start the request again",
                    d->logits.len, d->position, d->window, k->n_windows, k->window, k->vocab_size);
        return false;
    }
    *row = (uint64_t)d->window * (k->window - from) + (d->position - from);
    return true;
}

static bool compare_row(Scoring *s, uint64_t row, const float *logits, uint32_t target,
                        GError **error)
{
    if (!logits_reader_row(s->reference, row, s->row, error)) {
        return false;
    }
    if (!divergence_add(s->divergence, row, s->row, logits, target)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NUMERICS,
                    "row %" G_GUINT64_FORMAT
                    " has a logit that is not finite, here or in %s: one of the two models is at "
                    "fault",
                    row, s->o->against);
        return false;
    }
    return true;
}

static bool on_row(const Weft__V1__RunDelta *d, void *user, GError **error)
{
    Scoring *s = user;
    uint64_t row;
    if (!wants_logits(s)) {
        return true;
    }
    if (!place_row(s, d, &row, error)) {
        return false;
    }
    const float *logits = (const float *)(const void *)d->logits.data;
    if ((s->reference != NULL && !compare_row(s, row, logits, d->ids[0], error)) ||
        (s->writer != NULL && !logits_writer_put(s->writer, row, logits, error))) {
        return false;
    }
    s->n_rows++;
    cli_progress(&s->o->common, "scored %" G_GUINT64_FORMAT " of %" G_GUINT64_FORMAT " tokens",
                 s->n_rows, logits_kind_rows(&s->kind));
    return true;
}

/* ---- the run ---- */

static bool score_text(Scoring *s, GError **error)
{
    Weft__V1__RunRequest message = WEFT__V1__RUN_REQUEST__INIT;
    Weft__V1__Sampler sampler;
    Weft__V1__Layout layout;
    const RequestHooks hooks = {on_started, on_row, s};
    g_autofree char *path = request_model_path(s->model);
    if (!request_fill(&message, &sampler, &layout, &s->o->request, error)) {
        return false;
    }
    message.model = path;
    message.kind = WEFT__V1__REQUEST_KIND__SCORE;
    message.prompt = s->text;
    message.score_window = (uint32_t)s->o->window;
    message.want_logits = wants_logits(s);
    s->client = client_new(&s->o->common, error);
    if (s->client == NULL ||
        !request_run_hooked(s->client, &s->o->common, &message, &hooks, &s->out, error)) {
        return false;
    }
    if (wants_logits(s) && s->n_rows != logits_kind_rows(&s->kind)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                    "%" G_GUINT64_FORMAT " rows of logits came, %" G_GUINT64_FORMAT
                    " were due: start the request again",
                    s->n_rows, logits_kind_rows(&s->kind));
        return false;
    }
    return s->writer == NULL || logits_writer_finish(s->writer, error);
}

/* Text and reference, which are looked at before anything is computed. */
static bool open_files(Scoring *s, GError **error)
{
    size_t length;
    g_autoptr(GError) why = NULL;
    if (!g_file_get_contents(s->o->file, &s->text, &length, &why)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND, "text: %s", why->message);
        return false;
    }
    s->kind.text = hash128(s->text, length);
    if (s->o->against == NULL) {
        return true;
    }
    s->reference = logits_reader_new(s->o->against, error);
    return s->reference != NULL &&
           logits_reader_fits_text(s->reference, &s->kind.text, (uint32_t)s->o->window, error);
}

/* ---- what comes out ---- */

static void add_divergence(const Scoring *s, json_t *object)
{
    DivergenceSummary d;
    char definition[33];
    const LogitsKind *k = logits_reader_kind(s->reference);
    divergence_summary(s->divergence, &d);
    hash128_hex(&k->definition, definition);
    json_object_set_new(object, "reference",
                        json_pack("{s:o,s:s,s:s,s:f}", "model", cli_json_text(k->model), "numerics",
                                  numerics_name(k->numerics), "definition", definition,
                                  "perplexity", d.reference_perplexity));
    json_object_set_new(object, "kl_mean", json_real(d.kl_mean));
    json_object_set_new(object, "kl_standard_error", json_real(d.kl_standard_error));
    json_object_set_new(object, "kl_median", json_real(d.kl_median));
    json_object_set_new(object, "kl_p99", json_real(d.kl_p99));
    json_object_set_new(object, "kl_max", json_real(d.kl_max));
    json_object_set_new(object, "same_top", json_real(d.same_top));
    json_object_set_new(object, "perplexity_ratio", json_real(d.perplexity_ratio));
}

static void print_divergence(const Scoring *s)
{
    DivergenceSummary d;
    const LogitsKind *k = logits_reader_kind(s->reference);
    divergence_summary(s->divergence, &d);
    printf("against %s (%s): perplexity %.4f, ratio %.6f\n", k->model, numerics_name(k->numerics),
           d.reference_perplexity, d.perplexity_ratio);
    printf("KL divergence: mean %.6g +- %.2g, median %.6g, 99 %% %.6g, most %.6g\n", d.kl_mean,
           d.kl_standard_error, d.kl_median, d.kl_p99, d.kl_max);
    printf("same most likely token: %.3f %%\n", 100 * d.same_top);
}

static void print_perplexity(const Scoring *s)
{
    const RunOutcome *out = &s->out;
    const double mean = out->nll_sum / MAX(out->tokens_scored, 1u), perplexity = exp(mean);
    if (s->o->common.json) {
        json_t *object = cli_json_new();
        json_object_update_new(object, json_pack("{s:f,s:f,s:I,s:I,s:s,s:s}", "perplexity",
                                                 perplexity, "nll_mean", mean, "tokens_scored",
                                                 (json_int_t)out->tokens_scored, "ctx",
                                                 (json_int_t)s->o->window, "numerics",
                                                 out->numerics, "definition", out->definition));
        if (s->divergence != NULL) {
            add_divergence(s, object);
        }
        cli_print_json(object);
        return;
    }
    printf("perplexity %.4f over %u tokens (windows of %u)\n", perplexity, out->tokens_scored,
           (unsigned)s->o->window);
    if (s->divergence != NULL) {
        print_divergence(s);
    }
}

static int perplexity_run(const Verb *verb, void *values, GPtrArray *rest)
{
    PerplexityOptions *o = values;
    GError *error = NULL;
    if (rest->len != 1 || o->file == NULL) {
        return cli_usage(verb, "a model and a text are needed");
    }
    Scoring s = {.o = o, .model = rest->pdata[0]};
    bool ok = open_files(&s, &error);
    LocalCluster *cluster = ok ? local_cluster_for(&o->common, &error) : NULL;
    ok = ok && error == NULL && score_text(&s, &error);
    if (ok) {
        print_perplexity(&s);
    }
    scoring_clear(&s); /* the connection ends before the cluster does */
    local_cluster_free(cluster);
    return ok ? 0 : cli_fail(error);
}

const Verb VERB_PERPLEXITY = {"perplexity",
                              "MODEL -f FILE [--ctx N] [--save-logits FILE | --against FILE]",
                              "how well a model predicts a text, and how another one's "
                              "distributions differ",
                              PERPLEXITY_OPTIONS,
                              sizeof(PerplexityOptions),
                              perplexity_defaults,
                              perplexity_run};
