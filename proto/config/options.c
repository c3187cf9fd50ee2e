#include "proto/config/options.h"

#include "proto/base/error.h"
#include "proto/base/units.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <yaml.h>

/* ---- one value ---- */

static bool refuse(GError **error, const Option *o, const char *text, const char *want)
{
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "%s '%s' is not %s", o->name, text, want);
    return false;
}

static bool in_range(const Option *o, double value, const char *text, GError **error)
{
    if ((o->least != 0 || o->most != 0) && !(value >= o->least && value <= o->most)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "%s %s is out of range: use %.10g to %.10g", o->name, text, o->least, o->most);
        return false;
    }
    return true;
}

static bool set_flag(const Option *o, bool *field, const char *text, GError **error)
{
    if (strcmp(text, "true") == 0 || strcmp(text, "yes") == 0 || strcmp(text, "on") == 0 ||
        strcmp(text, "1") == 0) {
        *field = true;
    } else if (strcmp(text, "false") == 0 || strcmp(text, "no") == 0 || strcmp(text, "off") == 0 ||
               strcmp(text, "0") == 0) {
        *field = false;
    } else {
        return refuse(error, o, text, "true or false");
    }
    return true;
}

static bool set_number(const Option *o, double *field, const char *text, GError **error)
{
    char *end;
    errno = 0;
    const double v = g_ascii_strtod(text, &end);
    if (errno != 0 || end == text || *end != '\0' || v != v) {
        return refuse(error, o, text, "a number");
    }
    if (!in_range(o, v, text, error)) {
        return false;
    }
    *field = v;
    return true;
}

static bool set_count(const Option *o, uint64_t *field, const char *text, GError **error)
{
    uint64_t v;
    if (!units_parse_count(text, &v, NULL)) {
        return refuse(error, o, text, "a count (say 128 or 32k)");
    }
    if (!in_range(o, (double)v, text, error)) {
        return false;
    }
    *field = v;
    return true;
}

/* The place of `text` in "a|b|c", -1 if it is not there. Types are written in both cases (Q8_0). */
static int choice_index(const char *choices, const char *text)
{
    g_auto(GStrv) names = g_strsplit(choices, "|", -1);
    for (int i = 0; names[i] != NULL; i++) {
        if (g_ascii_strcasecmp(names[i], text) == 0) {
            return i;
        }
    }
    return -1;
}

static char *choice_name(const char *choices, int place)
{
    g_auto(GStrv) names = g_strsplit(choices, "|", -1);
    return g_strdup(names[place]);
}

bool options_set(const Option *o, void *values, const char *text, GError **error)
{
    void *field = (char *)values + o->offset;
    const int choice = o->choices != NULL ? choice_index(o->choices, text) : 0;
    if (choice < 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "%s '%s' is unknown: use one of %s",
                    o->name, text, o->choices);
        return false;
    }
    switch (o->type) {
    case OPTION_FLAG:
        return set_flag(o, field, text, error);
    case OPTION_STRING:
        g_free(*(char **)field);
        *(char **)field = o->choices != NULL ? choice_name(o->choices, choice) : g_strdup(text);
        return true;
    case OPTION_STRINGS:
        if (*(GPtrArray **)field == NULL) {
            *(GPtrArray **)field = g_ptr_array_new_with_free_func(g_free);
        }
        g_ptr_array_add(*(GPtrArray **)field, g_strdup(text));
        return true;
    case OPTION_COUNT:
        return set_count(o, field, text, error);
    case OPTION_SIZE:
        return units_parse_size(text, field, NULL) ||
               refuse(error, o, text, "a size (say 8G or 512M)");
    case OPTION_DURATION:
        return units_parse_duration(text, field, NULL) ||
               refuse(error, o, text, "a time (say 5s, 200ms or 1h)");
    case OPTION_NUMBER:
        return set_number(o, field, text, error);
    case OPTION_CHOICE:
        *(uint32_t *)field = (uint32_t)choice;
        return true;
    }
    g_assert_not_reached();
}

void options_clear(const Option *table, void *values)
{
    for (const Option *o = table; o->name != NULL; o++) {
        void *field = (char *)values + o->offset;
        if (o->type == OPTION_STRING) {
            g_clear_pointer((char **)field, g_free);
        } else if (o->type == OPTION_STRINGS) {
            g_clear_pointer((GPtrArray **)field, g_ptr_array_unref);
        }
    }
}

/* ---- near names ---- */

static size_t edit_distance(const char *a, const char *b)
{
    const size_t n = strlen(b);
    size_t row[65];
    if (n > 64) {
        return n;
    }
    for (size_t j = 0; j <= n; j++) {
        row[j] = j;
    }
    for (size_t i = 1; a[i - 1] != '\0'; i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= n; j++) {
            const size_t change = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = MIN(change, MIN(row[j], row[j - 1]) + 1);
        }
    }
    return row[n];
}

const char *options_nearest(const char *word, const char *const *names)
{
    const char *best = NULL;
    size_t least = strlen(word) / 3 + 2;
    for (; *names != NULL; names++) {
        const size_t d = edit_distance(word, *names);
        if (d < least) {
            least = d;
            best = *names;
        }
    }
    return best;
}

static const char *nearest_option(const Option *table, const char *word)
{
    g_autoptr(GPtrArray) names = g_ptr_array_new();
    for (const Option *o = table; o->name != NULL; o++) {
        g_ptr_array_add(names, (gpointer)o->name);
    }
    g_ptr_array_add(names, NULL);
    return options_nearest(word, (const char *const *)names->pdata);
}

static const Option *find(const Option *table, const char *name, size_t length)
{
    for (const Option *o = table; o->name != NULL; o++) {
        if (strlen(o->name) == length && strncmp(o->name, name, length) == 0) {
            return o;
        }
    }
    return NULL;
}

static const Option *find_letter(const Option *table, char letter)
{
    for (const Option *o = table; o->name != NULL; o++) {
        if (o->letter == letter) {
            return o;
        }
    }
    return NULL;
}

/* ---- configuration file: one mapping of names to scalars or lists; all errors at once ---- */

typedef struct YamlReader {
    const Option *table;
    void *values;
    const char *origin;
    GString *errors;
} YamlReader;

static void yaml_complain(YamlReader *r, size_t line, const char *text)
{
    g_string_append_printf(r->errors, "%s%s:%zu: %s", r->errors->len > 0 ? "; " : "", r->origin,
                           line + 1, text);
}

static const Option *yaml_key(YamlReader *r, const yaml_node_t *key)
{
    const char *name = (const char *)key->data.scalar.value;
    const Option *o = find(r->table, name, strlen(name));
    if (o == NULL || strcmp(name, "config") == 0) {
        const char *near = nearest_option(r->table, name);
        g_autofree char *text =
            near != NULL ? g_strdup_printf("unknown key '%s': did you mean '%s'?", name, near)
                         : g_strdup_printf("unknown key '%s'", name);
        yaml_complain(r, key->start_mark.line, text);
        return NULL;
    }
    return o;
}

static void yaml_scalar(YamlReader *r, const Option *o, const yaml_node_t *node)
{
    g_autoptr(GError) error = NULL;
    if (node->type != YAML_SCALAR_NODE) {
        yaml_complain(r, node->start_mark.line, "a plain value is needed here");
    } else if (!options_set(o, r->values, (const char *)node->data.scalar.value, &error)) {
        yaml_complain(r, node->start_mark.line, error->message);
    }
}

static void yaml_pair(YamlReader *r, yaml_document_t *document, const yaml_node_pair_t *pair)
{
    const yaml_node_t *key = yaml_document_get_node(document, pair->key),
                      *value = yaml_document_get_node(document, pair->value);
    if (key->type != YAML_SCALAR_NODE) {
        yaml_complain(r, key->start_mark.line, "keys are plain names");
        return;
    }
    const Option *o = yaml_key(r, key);
    if (o == NULL) {
        return;
    }
    if (value->type == YAML_SEQUENCE_NODE && o->type == OPTION_STRINGS) {
        for (yaml_node_item_t *item = value->data.sequence.items.start;
             item < value->data.sequence.items.top; item++) {
            yaml_scalar(r, o, yaml_document_get_node(document, *item));
        }
    } else {
        yaml_scalar(r, o, value);
    }
}

/* origin: names the text in messages. */
static bool options_parse_yaml(const Option *table, void *values, const char *text, size_t length,
                               const char *origin, GError **error)
{
    yaml_parser_t parser;
    yaml_document_t document;
    YamlReader r = {table, values, origin, g_string_new(NULL)};
    yaml_parser_initialize(&parser);
    yaml_parser_set_input_string(&parser, (const unsigned char *)text, length);
    if (!yaml_parser_load(&parser, &document)) {
        yaml_complain(&r, parser.problem_mark.line,
                      parser.problem != NULL ? parser.problem : "not YAML");
    } else {
        const yaml_node_t *root = yaml_document_get_root_node(&document);
        if (root != NULL && root->type == YAML_MAPPING_NODE) {
            for (yaml_node_pair_t *pair = root->data.mapping.pairs.start;
                 pair < root->data.mapping.pairs.top; pair++) {
                yaml_pair(&r, &document, pair);
            }
        } else if (root != NULL) {
            yaml_complain(&r, root->start_mark.line,
                          "the file is to be a mapping of option names to values");
        }
        yaml_document_delete(&document);
    }
    yaml_parser_delete(&parser);
    const bool ok = r.errors->len == 0;
    if (!ok) {
        g_set_error_literal(error, WEFT_ERROR, WEFT_ERROR_INVALID, r.errors->str);
    }
    g_string_free(r.errors, TRUE);
    return ok;
}

/* ---- command line ---- */

typedef struct Line {
    const Option *table;
    void *values;
    int argc, at;
    char **argv;
    bool dry; /* only look for config and help */
    const char *config;
    bool help;
} Line;

static bool take(Line *l, const Option *o, const char *inline_value, const char *shown,
                 GError **error)
{
    const char *value = inline_value;
    if (value == NULL && o->type == OPTION_FLAG) {
        value = "true";
    } else if (value == NULL) {
        if (l->at + 1 >= l->argc) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "%s needs a value: %s %s", shown,
                        shown, o->argument);
            return false;
        }
        value = l->argv[++l->at];
    }
    if (strcmp(o->name, "config") == 0) {
        l->config = value;
    }
    return l->dry || options_set(o, l->values, value, error);
}

static bool take_long(Line *l, const char *word, GError **error)
{
    const char *equals = strchr(word, '=');
    const size_t length = equals != NULL ? (size_t)(equals - word) : strlen(word);
    const Option *o = find(l->table, word, length);
    if (o == NULL) {
        g_autofree char *name = g_strndup(word, length);
        const char *near = nearest_option(l->table, name);
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "unknown option --%s%s%s%s", name,
                    near != NULL ? ": did you mean --" : ": see --help", near != NULL ? near : "",
                    near != NULL ? "?" : "");
        return false;
    }
    g_autofree char *shown = g_strdup_printf("--%s", o->name);
    return take(l, o, equals != NULL ? equals + 1 : NULL, shown, error);
}

static bool take_letter(Line *l, const char *word, GError **error)
{
    const char shown[3] = {'-', word[0], '\0'};
    const Option *o = find_letter(l->table, word[0]);
    if (o == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "unknown option -%s: see --help", word);
        return false;
    }
    if (o->type == OPTION_FLAG && word[1] != '\0') {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "-%s: write the letters apart", word);
        return false;
    }
    return take(l, o, word[1] != '\0' ? word + 1 : NULL, shown, error);
}

static bool walk(Line *l, GPtrArray *rest, GError **error)
{
    bool plain = false;
    for (l->at = 1; l->at < l->argc; l->at++) {
        char *word = l->argv[l->at];
        if (plain || word[0] != '-' || word[1] == '\0') {
            if (rest != NULL) {
                g_ptr_array_add(rest, word);
            }
        } else if (strcmp(word, "--") == 0) {
            plain = true;
        } else if (strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0) {
            l->help = true;
            return true;
        } else if (word[1] == '-' ? !take_long(l, word + 2, error)
                                  : !take_letter(l, word + 1, error)) {
            return false;
        }
    }
    return true;
}

static bool take_environment(const Option *table, void *values, GError **error)
{
    for (const Option *o = table; o->name != NULL; o++) {
        const char *text = o->environment != NULL ? g_getenv(o->environment) : NULL;
        if (text != NULL && text[0] != '\0' && !options_set(o, values, text, error)) {
            g_prefix_error(error, "%s: ", o->environment);
            return false;
        }
    }
    return true;
}

bool options_parse(const Option *table, void *values, int argc, char **argv, GPtrArray *rest,
                   bool *help_out, GError **error)
{
    Line look = {.table = table, .values = values, .argc = argc, .argv = argv, .dry = true};
    *help_out = false;
    if (!walk(&look, NULL, error)) {
        return false;
    }
    if (look.help) {
        *help_out = true;
        return true;
    }
    if (look.config != NULL) {
        g_autofree char *text = NULL;
        gsize length;
        g_autoptr(GError) why = NULL;
        if (!g_file_get_contents(look.config, &text, &length, &why)) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND, "configuration file: %s",
                        why->message);
            return false;
        }
        if (!options_parse_yaml(table, values, text, length, look.config, error)) {
            return false;
        }
    }
    Line line = {.table = table, .values = values, .argc = argc, .argv = argv};
    return take_environment(table, values, error) && walk(&line, rest, error);
}

void options_help(const Option *table, GString *out)
{
    for (const Option *o = table; o->name != NULL; o++) {
        g_autofree char *name = o->type == OPTION_FLAG
                                    ? g_strdup_printf("--%s", o->name)
                                    : g_strdup_printf("--%s %s", o->name, o->argument);
        g_autofree char *letter =
            o->letter != 0 ? g_strdup_printf("-%c, ", o->letter) : g_strdup("    ");
        g_string_append_printf(out, "  %s%-24s %s", letter, name, o->help);
        if (o->choices != NULL) {
            g_string_append_printf(out, " (%s)", o->choices);
        }
        if (o->environment != NULL) {
            g_string_append_printf(out, " [%s]", o->environment);
        }
        g_string_append_c(out, '\n');
    }
}
