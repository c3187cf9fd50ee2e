/* What a job asks for as a whole: missing settings, contradictions, layouts that no cluster could
 * run. Each complaint stands at the line that would be changed and says what would be possible. */
#include "proto/config/job_table.h"

#include <math.h>
#include <string.h>

#define NAME_LIMIT 100u

typedef struct Check {
    const JobSpec *spec;
    const GPtrArray *entries;
    YamlErrors *errors;
} Check;

static bool is_given(const Check *c, const char *path)
{
    return yaml_tree_find(c->entries, path) != NULL;
}

/* The line of a setting, or of the nearest section around it that is there. */
static size_t line_of(const Check *c, const char *path)
{
    g_autofree char *name = g_strdup(path);
    for (;;) {
        const YamlEntry *e = yaml_tree_find(c->entries, name);
        char *dot = strrchr(name, '.');
        if (e != NULL) {
            return e->line;
        }
        if (dot == NULL) {
            return 1;
        }
        *dot = '\0';
    }
}

#define COMPLAIN(c, path, ...) yaml_errors_add((c)->errors, line_of(c, path), __VA_ARGS__)

/* False (and a complaint) if a setting that has no default is not there. */
static bool need(const Check *c, const char *path, const char *example)
{
    const bool given = is_given(c, path);
    if (!given) {
        COMPLAIN(c, path, "%s is missing: add it, e.g. %s", path, example);
    }
    return given;
}

static void refuse_given(const Check *c, const char *path, const char *why)
{
    if (is_given(c, path)) {
        COMPLAIN(c, path, "%s %s", path, why);
    }
}

static bool is_power_of_two(double value)
{
    int exponent;
    return value > 0.0 && frexp(value, &exponent) == 0.5;
}

/* ---- name ---- */

/* Files are called after it: the log of steps, curves. */
static void check_name(const Check *c)
{
    const char *name = c->spec->name;
    const char *at = name;
    while (*at != '/' && (g_ascii_isprint(*at) || (*at & 0x80) != 0)) {
        at++;
    }
    if (*at != '\0' || name[0] == '.' || name[0] == '\0' || strlen(name) > NAME_LIMIT) {
        COMPLAIN(c, "name",
                 "name cannot be a file's: use up to %u letters, digits, '-', '_' or '.', and no "
                 "'.' first",
                 NAME_LIMIT);
    }
}

/* ---- model ---- */

/* True if a spec can be made from the numbers. */
static bool check_config(const Check *c)
{
    static const char *const needed[][2] = {{"model.config.family", "gpt2 or llama"},
                                            {"model.config.layers", "6"},
                                            {"model.config.width", "384"},
                                            {"model.config.heads", "6"},
                                            {"model.config.context", "256"}};
    const JobModel *m = &c->spec->model;
    bool complete = true;
    for (size_t i = 0; i < G_N_ELEMENTS(needed); i++) {
        complete = need(c, needed[i][0], needed[i][1]) && complete;
    }
    /* A value out of range is told already and stays 0. */
    if (!complete || m->layers == 0 || m->width == 0 || m->heads == 0 || m->context == 0) {
        return false;
    }
    const uint64_t step = m->family == JOB_LLAMA ? 2 * m->heads : m->heads;
    if (m->width % step != 0) {
        COMPLAIN(c, "model.config.width",
                 "width %" G_GUINT64_FORMAT " does not give %" G_GUINT64_FORMAT
                 " heads of %s elements: use %" G_GUINT64_FORMAT " or %" G_GUINT64_FORMAT,
                 m->width, m->heads, m->family == JOB_LLAMA ? "an even number of" : "whole",
                 MAX(m->width / step, 1) * step, (m->width / step + 1) * step);
        return false;
    }
    if (m->heads % m->kv_heads != 0) {
        COMPLAIN(c, "model.config.kv_heads",
                 "%" G_GUINT64_FORMAT " heads do not share %" G_GUINT64_FORMAT
                 " KV heads evenly: use a divisor of %" G_GUINT64_FORMAT,
                 m->heads, m->kv_heads, m->heads);
        return false;
    }
    if (m->family == JOB_GPT2) {
        refuse_given(c, "model.config.rope_base", "is for llama: gpt2 learns its positions");
        if (m->kv_heads != m->heads) {
            COMPLAIN(c, "model.config.kv_heads",
                     "gpt2 has as many KV heads as heads: leave kv_heads out");
            return false;
        }
    }
    return true;
}

/* The model's spec where the file alone gives it; NULL otherwise. Units do not depend on the
 * vocabulary, which a tokenizer may still have to name. */
static ModelSpec *check_model(const Check *c)
{
    const bool from = is_given(c, "model.from"), config = is_given(c, "model.config");
    if (from && c->spec->model.from[0] == '\0') {
        COMPLAIN(c, "model.from", "model.from has no value: name a GGUF file or a directory");
    }
    if (from == config) {
        COMPLAIN(c, "model", "model needs %s: %s",
                 from ? "one of from and config" : "a from or a config",
                 from ? "leave one out"
                      : "from: FILE-OR-DIRECTORY, or config: {family: gpt2, ...}");
        return NULL;
    }
    if (from || !check_config(c)) {
        return NULL;
    }
    g_autoptr(GError) why = NULL;
    const ModelConfig numbers = job_spec_model_config(c->spec, VOCAB_CHUNK);
    ModelSpec *spec = model_spec_from_config(&numbers, &why);
    if (spec == NULL) {
        COMPLAIN(c, "model.config", "%s", why->message);
    }
    return spec;
}

/* ---- data ---- */

static void check_tokenizer(const Check *c)
{
    const JobSpec *s = c->spec;
    const bool train = is_given(c, "data.tokenizer.train"),
               from = is_given(c, "data.tokenizer.from");
    if (train && from) {
        COMPLAIN(c, "data.tokenizer", "data.tokenizer needs one of train and from: leave one out");
    } else if (train && s->data.format == JOB_TOKENS) {
        COMPLAIN(c, "data.tokenizer.train",
                 "data.format tokens has ids and no text to train a tokenizer on: use from, or "
                 "format text");
    } else if (train && s->model.from != NULL) {
        COMPLAIN(c, "data.tokenizer.train",
                 "model.from brings a vocabulary of its own: leave data.tokenizer out");
    }
    if (s->model.from == NULL && s->data.format == JOB_TOKENS && !from &&
        s->model.vocabulary == 0) {
        COMPLAIN(c, "model.config.vocabulary",
                 "the vocabulary is open: ids alone do not say it; add model.config.vocabulary or "
                 "data.tokenizer.from");
    }
    if (s->model.from == NULL && s->model.vocabulary != 0 &&
        s->data.tokenizer_train > s->model.vocabulary) {
        COMPLAIN(c, "model.config.vocabulary",
                 "a vocabulary of %" G_GUINT64_FORMAT
                 " does not hold the tokenizer's %" G_GUINT64_FORMAT " ids: use at least that many",
                 s->model.vocabulary, s->data.tokenizer_train);
    }
}

static void check_data(const Check *c)
{
    const JobSpec *s = c->spec;
    need(c, "data.train", "text.txt");
    check_tokenizer(c);
    if (s->data.format != JOB_TEXT) {
        refuse_given(c, "data.separator", "is for format text; rows and files end by themselves");
    }
    if (s->data.format != JOB_JSONL) {
        refuse_given(c, "data.text", "is for format jsonl");
        refuse_given(c, "data.prompt", "is for format jsonl");
        refuse_given(c, "data.response", "is for format jsonl");
    }
    if (s->data.positions == JOB_IN_DOCUMENTS && s->data.attention != JOB_IN_DOCUMENTS) {
        COMPLAIN(c, "data.positions",
                 "data.positions documents would repeat positions inside one sequence: add "
                 "data.attention: documents, or leave positions out");
    }
    if (s->data.validation == NULL) {
        refuse_given(c, "validation", "needs data.validation: name the held-out file");
    }
    const uint64_t context = s->model.from == NULL ? s->model.context : 0;
    if (context != 0 && s->length > context) {
        COMPLAIN(c, "batch.length",
                 "sequences of %" G_GUINT64_FORMAT " pass the model's context of %" G_GUINT64_FORMAT
                 ": use at most that, or a longer context",
                 s->length, context);
    }
    if (s->model.from != NULL) {
        need(c, "batch.length", "256");
    }
}

/* ---- optimizer ---- */

static void check_optimizer(const Check *c)
{
    const JobSpec *s = c->spec;
    const JobOptimizerSpec *o = &s->optimizer;
    need(c, "optimizer.lr", "6e-4");
    if (o->name == JOB_SGD) {
        refuse_given(c, "optimizer.betas", "is for adam and adamw: sgd has momentum");
        refuse_given(c, "optimizer.eps", "is for adam and adamw");
        if (o->nesterov && o->momentum == 0.0) {
            COMPLAIN(c, "optimizer.nesterov", "nesterov needs momentum: add momentum: 0.9");
        }
    } else {
        refuse_given(c, "optimizer.momentum", "is for sgd: adam and adamw have betas");
        refuse_given(c, "optimizer.nesterov", "is for sgd");
    }
    if (o->name == JOB_ADAM && (o->decay > 0.0 || o->decay_embeddings > 0.0 ||
                                o->decay_norms > 0.0 || o->decay_biases > 0.0)) {
        COMPLAIN(c, "optimizer.decay", "adam has no decoupled decay: use adamw, or decay: 0");
    }
    if (o->warmup > s->steps && s->steps != 0) {
        COMPLAIN(c, "optimizer.warmup",
                 "a warm-up of %" G_GUINT64_FORMAT
                 " steps is longer than the run's %" G_GUINT64_FORMAT ": use fewer",
                 o->warmup, s->steps);
    }
    if (is_given(c, "optimizer.floor")) {
        if (o->schedule == JOB_RATE_CONSTANT) {
            COMPLAIN(c, "optimizer.floor", "a constant rate has no floor: leave it out");
        } else if (o->floor > o->lr) {
            COMPLAIN(c, "optimizer.floor", "floor %g lies above lr %g: use less", o->floor, o->lr);
        }
    }
}

static void check_scale(const Check *c)
{
    const JobSpec *s = c->spec;
    const JobLossScale *l = &s->loss_scale;
    if (s->precision == JOB_F32 && l->policy != JOB_SCALING_NONE) {
        COMPLAIN(c, "loss_scale.policy",
                 "f32 needs no loss scale: leave loss_scale out, or use "
                 "precision: f16");
    }
    if (!is_power_of_two(l->start)) {
        COMPLAIN(c, "loss_scale.start", "a loss scale of %.17g is no power of two: use %.17g",
                 l->start, exp2(floor(log2(MAX(l->start, 1.0)))));
    }
    if (!is_power_of_two(l->least)) {
        COMPLAIN(c, "loss_scale.least", "a least loss scale of %.17g is no power of two: use 1",
                 l->least);
    } else if (l->least > l->start) {
        COMPLAIN(c, "loss_scale.least", "the least loss scale %.17g lies above the first, %.17g",
                 l->least, l->start);
    }
}

/* ---- layout ---- */

static void check_axis(const Check *c, const char *path, uint64_t value, uint64_t most,
                       const char *reason)
{
    if (value > most && most > 0) {
        COMPLAIN(c, path, "%s %" G_GUINT64_FORMAT " is impossible: %s; use 1 to %" G_GUINT64_FORMAT,
                 path, value, reason, most);
    }
}

/* Leaf i is samples [iS/L, (i+1)S/L), and a replica has at least floor(L/dp) leaves side by side
 * (NUMERICS 14). */
uint64_t job_spec_least_samples(const JobSpec *s)
{
    const uint64_t dp = MAX(s->layout.dp, 1), n = s->leaves / dp;
    uint64_t least = s->sequences;
    for (uint64_t first = 0; first + n <= s->leaves; first++) {
        const uint64_t from = first * s->sequences / s->leaves,
                       to = (first + n) * s->sequences / s->leaves;
        least = MIN(least, to - from);
    }
    return MAX(least, 1);
}

static void check_pipeline(const Check *c, const ModelSpec *model)
{
    const JobSpec *s = c->spec;
    const JobLayout *l = &s->layout;
    const uint64_t stages = MAX(l->pp, 1);
    if (l->schedule == JOB_SCHEDULE_INTERLEAVED) {
        if (l->pp == 1 || l->chunks < 2) {
            COMPLAIN(c, "layout.schedule",
                     "interleaved needs pp of 2 or more and chunks of 2 or more: use 1f1b, or set "
                     "both");
        }
        if (l->micro != 0 && l->micro % stages != 0) {
            COMPLAIN(c, "layout.micro",
                     "interleaved needs micro to be a multiple of pp: use %" G_GUINT64_FORMAT,
                     (l->micro / stages + 1) * stages);
        }
        if (model != NULL && stages * l->chunks > model->n_layers) {
            COMPLAIN(
                c, "layout.chunks",
                "%" G_GUINT64_FORMAT " stages of %" G_GUINT64_FORMAT
                " chunks need as many layers, and the model has %u: use chunks %" G_GUINT64_FORMAT,
                stages, l->chunks, model->n_layers, MAX(model->n_layers / stages, 1));
        }
    } else if (l->schedule == JOB_SCHEDULE_ZERO_BUBBLE && l->recompute != JOB_RECOMPUTE_NONE) {
        COMPLAIN(c, "layout.recompute",
                 "zero-bubble needs what it would compute again for gradients of weights later: "
                 "use recompute: none, or schedule: 1f1b");
    } else if (l->chunks > 1) {
        COMPLAIN(c, "layout.chunks", "chunks are for schedule: interleaved; leave them out");
    }
}

static void check_train_layout(const Check *c, const ModelSpec *model)
{
    const JobSpec *s = c->spec;
    const JobLayout *l = &s->layout;
    if (s->leaves == 0 || s->sequences == 0) {
        return; /* told already */
    }
    check_axis(c, "layout.dp", l->dp, MIN(s->leaves, s->sequences),
               s->leaves <= s->sequences ? "a replica owns whole leaves of the batch (batch.leaves)"
                                         : "a replica needs a sequence (batch.sequences)");
    if (l->dp <= MIN(s->leaves, s->sequences)) {
        check_axis(c, "layout.micro", l->micro, job_spec_least_samples(s),
                   "a micro-batch needs a sequence of its replica");
    }
    check_pipeline(c, model);
}

static void check_model_layout(const Check *c, const ModelSpec *model)
{
    const JobLayout *l = &c->spec->layout;
    check_axis(c, "layout.pp", l->pp, model->n_layers, "a stage needs a layer");
    check_axis(c, "layout.tp", l->tp, MIN(model->n_attn_units, model->n_ffn_units),
               "a rank needs a unit of attention and of the feed-forward network");
}

static void check_trace(const Check *c)
{
    const JobSpec *s = c->spec;
    if (s->trace_file == NULL) {
        refuse_given(c, "trace.first", "needs trace.file");
        refuse_given(c, "trace.steps", "needs trace.file");
    } else if (s->trace_file[0] == '\0') {
        COMPLAIN(c, "trace.file", "trace.file has no value: name a file");
    }
    if (s->trace_first > s->steps && s->steps != 0) {
        COMPLAIN(c, "trace.first",
                 "a trace that begins with step %" G_GUINT64_FORMAT
                 " of a run of %" G_GUINT64_FORMAT ": use at most that",
                 s->trace_first, s->steps);
    }
}

void job_check(const JobSpec *spec, const GPtrArray *entries, YamlErrors *errors)
{
    const Check c = {spec, entries, errors};
    if (spec->kind == JOB_SERVE) {
        if (need(&c, "model.from", "model.gguf") && spec->model.from[0] == '\0') {
            COMPLAIN(&c, "model.from", "model.from has no value: name a GGUF file or a directory");
        }
        return;
    }
    g_autoptr(ModelSpec) model = check_model(&c);
    check_name(&c);
    need(&c, "steps", "300");
    need(&c, "batch.sequences", "32");
    check_data(&c);
    check_optimizer(&c);
    check_scale(&c);
    if (model != NULL) {
        check_model_layout(&c, model);
    }
    check_train_layout(&c, model);
    if (spec->checkpoint_directory == NULL) {
        refuse_given(&c, "checkpoint.every", "needs checkpoint.directory");
        refuse_given(&c, "checkpoint.keep", "needs checkpoint.directory");
        refuse_given(&c, "checkpoint.resume", "needs checkpoint.directory");
    }
    check_trace(&c);
}
