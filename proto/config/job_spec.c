/* A job file becomes a flat list of paths (yaml_tree.h); each path is looked up in the table of its
 * kind; what is left at its default is filled in; then job_check() looks at the whole. All of them
 * add to one list of complaints, so that a file is mended in one go. */
#include "proto/config/job_table.h"

#include "proto/base/error.h"
#include "proto/base/version.h"

#include <string.h>

#define NAME_SHOWN 64

/* ---- rows and paths ---- */

static const Option *find_row(const Option *table, const char *path)
{
    for (; table->name != NULL; table++) {
        if (strcmp(table->name, path) == 0) {
            return table;
        }
    }
    return NULL;
}

/* Whether `name` is below `section`: "a.b" and "a.b.c" below "a". */
static bool is_below(const char *name, const char *section)
{
    const size_t n = strlen(section);
    return n == 0 || (strncmp(name, section, n) == 0 && name[n] == '.');
}

static bool is_section(const Option *table, const char *path)
{
    for (; table->name != NULL; table++) {
        if (is_below(table->name, path)) {
            return true;
        }
    }
    return false;
}

static bool is_list(const Option *table, const char *path)
{
    g_autofree char *first = g_strconcat(path, ".0", NULL);
    return find_row(table, first) != NULL;
}

static char *parent_of(const char *path)
{
    const char *dot = strrchr(path, '.');
    return dot == NULL ? g_strdup("") : g_strndup(path, (gsize)(dot - path));
}

static const char *last_of(const char *path)
{
    const char *dot = strrchr(path, '.');
    return dot == NULL ? path : dot + 1;
}

/* ---- unknown names ---- */

/* The names that may stand in a section; freed by the caller, as are its elements. */
static GPtrArray *names_in(const Option *table, const char *section)
{
    GPtrArray *names = g_ptr_array_new_with_free_func(g_free);
    const size_t skip = section[0] == '\0' ? 0 : strlen(section) + 1;
    for (; table->name != NULL; table++) {
        if (!is_below(table->name, section)) {
            continue;
        }
        const char *rest = table->name + skip;
        g_autofree char *name = g_strndup(rest, strcspn(rest, "."));
        if (!g_ptr_array_find_with_equal_func(names, name, g_str_equal, NULL)) {
            g_ptr_array_add(names, g_steal_pointer(&name));
        }
    }
    return names;
}

/* The full name of a row elsewhere that ends in this word, or NULL. */
static const char *elsewhere(const Option *table, const char *word)
{
    for (; table->name != NULL; table++) {
        if (strcmp(last_of(table->name), word) == 0) {
            return table->name;
        }
    }
    return NULL;
}

static void complain_unknown(const Option *table, const YamlEntry *e, YamlErrors *errors)
{
    g_autofree char *section = parent_of(e->path);
    const char *word = last_of(e->path);
    if (is_list(table, section)) {
        yaml_errors_add(errors, e->line, "%s has too many elements", section);
        return;
    }
    g_autoptr(GPtrArray) names = names_in(table, section);
    g_autofree char *known = NULL;
    g_ptr_array_add(names, NULL);
    const char *near = options_nearest(word, (const char *const *)names->pdata);
    const char *away = elsewhere(table, word);
    const char *where = section[0] != '\0' ? " in " : "";
    if (near != NULL) {
        yaml_errors_add(errors, e->line, "unknown key '%.*s'%s%s: did you mean '%s'?", NAME_SHOWN,
                        word, where, section, near);
    } else if (away != NULL) {
        yaml_errors_add(errors, e->line, "unknown key '%.*s'%s%s: did you mean %s?", NAME_SHOWN,
                        word, where, section, away);
    } else {
        known = g_strjoinv(", ", (char **)names->pdata);
        yaml_errors_add(errors, e->line, "unknown key '%.*s'%s%s: known are %s", NAME_SHOWN, word,
                        where, section, known);
    }
}

/* ---- from entries to fields ---- */

typedef struct Reading {
    const Option *table;
    const GPtrArray *entries;
    YamlErrors *errors;
    JobSpec *spec;
} Reading;

static bool is_word_for_zero(const Option *row)
{
    return (row->type == OPTION_COUNT || row->type == OPTION_SIZE) && row->choices != NULL;
}

static void set_row(const Reading *r, const Option *row, const YamlEntry *e)
{
    g_autoptr(GError) why = NULL;
    Option plain = *row;
    if (is_word_for_zero(row)) {
        plain.choices = NULL;
        if (strcmp(e->text, row->choices) == 0) {
            *(uint64_t *)(void *)((char *)r->spec + row->offset) = 0;
            return;
        }
    }
    if (e->text[0] == '\0' && row->type != OPTION_STRING) {
        yaml_errors_add(r->errors, e->line, "%s has no value", row->name);
    } else if (!options_set(&plain, r->spec, e->text, &why)) {
        yaml_errors_add(r->errors, e->line, "%s", why->message);
    }
}

static void complain_shape(const Reading *r, const YamlEntry *e)
{
    g_autoptr(GPtrArray) names = names_in(r->table, e->path);
    g_ptr_array_add(names, NULL);
    g_autofree char *known = g_strjoinv(", ", (char **)names->pdata);
    if (is_list(r->table, e->path)) {
        yaml_errors_add(r->errors, e->line, "%s is a list of %u values: [A, B]", e->path,
                        names->len - 1);
    } else if (names->len > 1) {
        yaml_errors_add(r->errors, e->line, "%s is a section: write its keys below it (%s)",
                        e->path, known);
    } else {
        yaml_errors_add(r->errors, e->line, "%s takes one plain value", e->path);
    }
}

/* True if what lies below the entry is to be read as well. */
static bool take_entry(const Reading *r, const YamlEntry *e)
{
    const Option *row = find_row(r->table, e->path);
    const bool section = is_section(r->table, e->path), list = is_list(r->table, e->path);
    if (row == NULL && !section) {
        complain_unknown(r->table, e, r->errors);
        return false;
    }
    if (e->kind == YAML_TREE_VALUE && row != NULL) {
        set_row(r, row, e);
    } else if (e->kind == YAML_TREE_VALUE || !section || (e->kind == YAML_TREE_LIST) != list) {
        complain_shape(r, e);
        return false;
    }
    return true;
}

static void take_entries(const Reading *r)
{
    const YamlEntry *refused = NULL;
    for (unsigned i = 0; i < r->entries->len; i++) {
        const YamlEntry *e = r->entries->pdata[i];
        if (refused != NULL && is_below(e->path, refused->path)) {
            continue;
        }
        refused = take_entry(r, e) ? NULL : e;
    }
}

/* ---- defaults ---- */

static void set_defaults(JobSpec *s)
{
    s->model.norm_eps = 1e-5;
    s->model.rope_base = 10000.0;
    s->data.text = g_strdup("text");
    s->data.prompt = g_strdup("prompt");
    s->data.response = g_strdup("response");
    s->leaves = 8;
    s->seed = 1;
    s->optimizer = (JobOptimizerSpec){
        .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .clip = 1.0, .schedule = JOB_RATE_COSINE};
    s->loss_scale =
        (JobLossScale){.start = 65536.0, .least = 1.0, .growth_steps = 1000, .hysteresis = 2};
    s->layout.chunks = 1;
    s->checkpoint_keep = 3;
    s->validation_sequences = 32;
    s->sample_prompt = g_strdup("");
    s->sample_tokens = 64;
    s->sample_temperature = 0.8;
    s->trace_steps = 8;
    s->queue = 512;
    s->numerics = JOB_ANY_NUMERICS;
}

/* What a setting is by default when that depends on others. */
static void fill_optimizer(JobOptimizerSpec *o, const GPtrArray *entries)
{
    if (o->name == JOB_ADAMW && yaml_tree_find(entries, "optimizer.decay") == NULL) {
        o->decay = 0.1;
    }
    if (yaml_tree_find(entries, "optimizer.groups.embeddings") == NULL) {
        o->decay_embeddings = o->decay;
    }
    if (o->schedule != JOB_RATE_CONSTANT && yaml_tree_find(entries, "optimizer.floor") == NULL) {
        o->floor = o->lr / 10.0;
    }
}

static void fill_train(JobSpec *s, const GPtrArray *entries)
{
    JobModel *m = &s->model;
    if (m->from == NULL) {
        const bool llama = m->family == JOB_LLAMA;
        m->kv_heads = m->kv_heads != 0 ? m->kv_heads : m->heads;
        m->ffn = m->ffn != 0 ? m->ffn : llama ? (m->width * 8 / 3 + 31) / 32 * 32 : 4 * m->width;
        if (s->data.format != JOB_TOKENS && s->data.tokenizer_from == NULL &&
            s->data.tokenizer_train == 0) {
            s->data.tokenizer_train = 257; /* bytes and the end of a text */
        }
        if (m->vocabulary == 0) {
            m->vocabulary = s->data.tokenizer_train;
        }
    }
    if (s->length == 0 && m->from == NULL) {
        s->length = m->context;
    }
    fill_optimizer(&s->optimizer, entries);
    if (s->loss_scale.policy == JOB_SCALING_AUTO) {
        s->loss_scale.policy = s->precision == JOB_F16 ? JOB_SCALING_DYNAMIC : JOB_SCALING_NONE;
    }
    if (s->checkpoint_every == 0) {
        s->checkpoint_every = MAX(s->steps / 10, 1);
    }
    if (s->validation_every == 0 && s->data.validation != NULL) {
        s->validation_every = MAX(s->steps / 10, 1);
    }
    if (s->trace_first == 0) { /* the first step of a run finds nothing in its place */
        s->trace_first = MIN(MAX(s->steps, 1), 2);
    }
    if (s->layout.schedule == JOB_SCHEDULE_AUTO && s->layout.pp == 1) {
        s->layout.schedule = JOB_SCHEDULE_1F1B;
    }
}

static void fill_defaults(JobSpec *s, const GPtrArray *entries)
{
    if (s->name == NULL) {
        g_autofree char *base = s->model.from != NULL ? g_path_get_basename(s->model.from) : NULL;
        s->name = base != NULL ? g_strdelimit(g_strdup(base), ". ", '-')
                               : g_strdup(s->kind == JOB_TRAIN ? "train" : "serve");
    }
    s->layout.automatic = 0;
    if (s->kind == JOB_TRAIN) {
        fill_train(s, entries);
    }
}

/* ---- reading ---- */

/* The table of the file's kind; NULL (and a complaint) if it names none. */
static const Option *choose_table(const GPtrArray *entries, YamlErrors *errors)
{
    const YamlEntry *kind = yaml_tree_find(entries, "kind");
    if (kind == NULL) {
        yaml_errors_add(errors, 1, "kind is missing: add 'kind: train' or 'kind: serve'");
    } else if (g_strcmp0(kind->text, "train") == 0) {
        return JOB_TRAIN_TABLE;
    } else if (g_strcmp0(kind->text, "serve") == 0) {
        return JOB_SERVE_TABLE;
    } else {
        yaml_errors_add(errors, kind->line, "kind '%.*s' is unknown: use train or serve",
                        NAME_SHOWN, kind->text != NULL ? kind->text : "");
    }
    return NULL;
}

JobSpec *job_spec_parse(const char *text, size_t length, const char *origin, GError **error)
{
    g_autoptr(YamlErrors) errors = yaml_errors_new();
    g_autoptr(GPtrArray) entries = yaml_tree_read(text, length, errors);
    g_autoptr(JobSpec) spec = g_new0(JobSpec, 1);
    const Option *table = entries != NULL ? choose_table(entries, errors) : NULL;
    set_defaults(spec);
    if (table != NULL) {
        take_entries(&(const Reading){table, entries, errors, spec});
        fill_defaults(spec, entries);
        job_check(spec, entries, errors);
    }
    return yaml_errors_tell(errors, origin, error) ? g_steal_pointer(&spec) : NULL;
}

JobSpec *job_spec_load(const char *path, GError **error)
{
    g_autofree char *text = NULL;
    gsize length = 0;
    g_autoptr(GError) why = NULL;
    if (!g_file_get_contents(path, &text, &length, &why)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND, "job file: %s; name a YAML file",
                    why->message);
        return NULL;
    }
    return job_spec_parse(text, length, path, error);
}

void job_spec_free(JobSpec *spec)
{
    if (spec != NULL) {
        options_clear(JOB_TRAIN_TABLE, spec);
        g_free(spec);
    }
}

void job_spec_resolve(JobSpec *spec, const char *directory)
{
    char **paths[] = {&spec->model.from,           &spec->data.train,
                      &spec->data.validation,      &spec->data.tokenizer_from,
                      &spec->checkpoint_directory, &spec->trace_file};
    for (size_t i = 0; i < G_N_ELEMENTS(paths); i++) {
        char *path = *paths[i];
        if (path != NULL && !g_path_is_absolute(path)) {
            *paths[i] = g_build_filename(directory, path, NULL);
            g_free(path);
        }
    }
}

ModelConfig job_spec_model_config(const JobSpec *spec, uint32_t vocabulary)
{
    const JobModel *m = &spec->model;
    return (ModelConfig){
        .family = m->family == JOB_GPT2 ? FAMILY_GPT2 : FAMILY_LLAMA,
        .layers = (uint32_t)m->layers,
        .width = (uint32_t)m->width,
        .heads = (uint32_t)m->heads,
        .kv_heads = (uint32_t)m->kv_heads,
        .ffn_width = (uint32_t)m->ffn,
        .vocabulary = m->vocabulary != 0 ? (uint32_t)m->vocabulary : vocabulary,
        .context = (uint32_t)m->context,
        .untied = m->untied,
        .norm_eps = (float)m->norm_eps,
        .rope_base = m->rope_base,
    };
}

/* ---- printing ---- */

/* The shortest decimal that reads as the same number. */
static void print_number(double value, GString *out)
{
    char text[G_ASCII_DTOSTR_BUF_SIZE];
    const char *const formats[] = {"%.6g", "%.15g", "%.16g", "%.17g"};
    for (size_t i = 0; i < G_N_ELEMENTS(formats); i++) {
        g_ascii_formatd(text, sizeof text, formats[i], value);
        if (g_ascii_strtod(text, NULL) == value) {
            break;
        }
    }
    g_string_append(out, text);
}

static void print_text(const char *text, GString *out)
{
    bool plain = g_ascii_isalpha(text[0]) || text[0] == '/' || text[0] == '_';
    for (const char *at = text; *at != '\0'; at++) {
        plain = plain && (g_ascii_isalnum(*at) || strchr("/_.+-", *at) != NULL);
    }
    if (plain) {
        g_string_append(out, text);
        return;
    }
    g_string_append_c(out, '"');
    for (const char *at = text; *at != '\0'; at++) {
        if (*at == '"' || *at == '\\') {
            g_string_append_printf(out, "\\%c", *at);
        } else if ((unsigned char)*at < 0x20 || *at == 0x7f) {
            g_string_append_printf(out, "\\x%02x", (unsigned char)*at);
        } else {
            g_string_append_c(out, *at);
        }
    }
    g_string_append_c(out, '"');
}

static void print_value(const JobSpec *spec, const Option *row, GString *out)
{
    const void *field = (const char *)spec + row->offset;
    switch (row->type) {
    case OPTION_FLAG:
        g_string_append(out, *(const bool *)field ? "true" : "false");
        break;
    case OPTION_STRING:
        print_text(*(char *const *)field, out);
        break;
    case OPTION_NUMBER:
        print_number(*(const double *)field, out);
        break;
    case OPTION_CHOICE: {
        g_auto(GStrv) names = g_strsplit(row->choices, "|", -1);
        g_string_append(out, names[*(const uint32_t *)field]);
        break;
    }
    case OPTION_COUNT:
    case OPTION_SIZE:
        if (is_word_for_zero(row) && *(const uint64_t *)field == 0) {
            g_string_append(out, row->choices);
        } else {
            g_string_append_printf(out, "%" G_GUINT64_FORMAT, *(const uint64_t *)field);
        }
        break;
    case OPTION_STRINGS:
    case OPTION_DURATION:
        g_assert_not_reached(); /* no row has them */
    }
}

/* Whether a row says anything about this job. */
static bool applies(const JobSpec *s, const Option *row)
{
    const void *field = (const char *)s + row->offset;
    const bool adam = s->optimizer.name != JOB_SGD, from = s->model.from != NULL;
    if (row->type == OPTION_STRING && *(char *const *)field == NULL) {
        return false;
    }
    /* Zero in a count without "auto" and below its range: not asked for. */
    if (row->type == OPTION_COUNT && row->choices == NULL && row->least > 0 &&
        *(const uint64_t *)field == 0) {
        return false;
    }
    const struct {
        const char *rows; /* a row or a section */
        bool holds;
    } conditions[] = {
        {"layout", false}, /* the word; written as a section */
        {"model.config", !from},
        {"model.config.rope_base", s->model.family == JOB_LLAMA},
        {"data.separator", s->data.format == JOB_TEXT},
        {"data.text", s->data.format == JOB_JSONL},
        {"data.prompt", s->data.format == JOB_JSONL},
        {"data.response", s->data.format == JOB_JSONL},
        {"data.tokenizer.train", s->data.tokenizer_train != 0},
        {"optimizer.betas", adam},
        {"optimizer.eps", adam},
        {"optimizer.momentum", !adam},
        {"optimizer.nesterov", !adam},
        {"optimizer.floor", s->optimizer.schedule != JOB_RATE_CONSTANT},
        {"loss_scale.start", s->loss_scale.policy != JOB_SCALING_NONE},
        {"loss_scale.least", s->loss_scale.policy == JOB_SCALING_DYNAMIC},
        {"loss_scale.growth_steps", s->loss_scale.policy == JOB_SCALING_DYNAMIC},
        {"loss_scale.hysteresis", s->loss_scale.policy == JOB_SCALING_DYNAMIC},
        {"layout.chunks", s->layout.schedule == JOB_SCHEDULE_INTERLEAVED},
        {"checkpoint", s->checkpoint_directory != NULL},
        {"validation", s->data.validation != NULL},
        {"sample", s->sample_every != 0},
        {"trace", s->trace_file != NULL},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(conditions); i++) {
        const char *rows = conditions[i].rows;
        const bool meant = strcmp(row->name, rows) == 0 ||
                           (strcmp(rows, "layout") != 0 && is_below(row->name, rows));
        if (meant && !conditions[i].holds) {
            return false;
        }
    }
    return true;
}

/* Opens the sections of `name` that `before` (the row printed last, or "") does not lie in.
 * Returns the depth of the row itself. */
static int print_sections(const char *name, const char *before, GString *out)
{
    int depth = 0;
    const char *at = name;
    for (const char *dot; (dot = strchr(at, '.')) != NULL; at = dot + 1, depth++) {
        const size_t length = (size_t)(dot - name) + 1;
        if (strncmp(name, before, length) != 0) {
            g_string_append_printf(out, "%*s%.*s:\n", 2 * depth, "", (int)(dot - at), at);
        }
    }
    return depth;
}

static const Option *table_of(const JobSpec *spec)
{
    return spec->kind == JOB_TRAIN ? JOB_TRAIN_TABLE : JOB_SERVE_TABLE;
}

void job_spec_print(const JobSpec *spec, GString *out)
{
    const char *before = "";
    for (const Option *row = table_of(spec); row->name != NULL; row++) {
        if (!applies(spec, row)) {
            continue;
        }
        const bool first = g_str_has_suffix(row->name, ".0"),
                   second = g_str_has_suffix(row->name, ".1");
        if (second) {
            g_string_append(out, ", ");
        } else {
            g_autofree char *list = first ? parent_of(row->name) : g_strdup(row->name);
            const int depth = print_sections(list, before, out);
            g_string_append_printf(out, "%*s%s: %s", 2 * depth, "", last_of(list),
                                   first ? "[" : "");
        }
        print_value(spec, row, out);
        g_string_append(out, first ? "" : second ? "]\n" : "\n");
        before = row->name;
    }
}

Hash128 job_spec_definition(const JobSpec *spec)
{
    g_autoptr(GString) text = g_string_new(NULL);
    g_string_printf(text, "numerics_version: %u\n", WEFT_NUMERICS_VERSION);
    for (const Option *row = table_of(spec); row->name != NULL; row++) {
        if (row->defines_result && applies(spec, row)) {
            g_string_append_printf(text, "%s: ", row->name);
            print_value(spec, row, text);
            g_string_append_c(text, '\n');
        }
    }
    return hash128(text->str, text->len);
}
