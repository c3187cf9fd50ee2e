/* libyaml's events, walked with a stack of open mappings and lists. Nothing is expanded: an alias
 * is refused where it stands, so the entries are bounded by the text. */
#include "proto/config/yaml_tree.h"

#include "proto/base/error.h"

#include <string.h>
#include <yaml.h>

#define TEXT_LIMIT (256u << 10)
#define DEPTH_LIMIT 8u
#define ENTRIES_LIMIT 4096u
#define VALUE_LIMIT (64u << 10)
#define ERRORS_SHOWN 32u
#define NAME_SHOWN 64

/* ---- complaints ---- */

typedef struct Complaint {
    size_t line;
    unsigned order;
    char *text;
} Complaint;

struct YamlErrors {
    GArray *complaints;
};

static void complaint_clear(gpointer complaint)
{
    g_free(((Complaint *)complaint)->text);
}

YamlErrors *yaml_errors_new(void)
{
    YamlErrors *errors = g_new0(YamlErrors, 1);
    errors->complaints = g_array_new(FALSE, FALSE, sizeof(Complaint));
    g_array_set_clear_func(errors->complaints, complaint_clear);
    return errors;
}

void yaml_errors_free(YamlErrors *errors)
{
    if (errors != NULL) {
        g_array_unref(errors->complaints);
        g_free(errors);
    }
}

void yaml_errors_add(YamlErrors *errors, size_t line, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    g_autofree char *text = g_strdup_vprintf(format, args);
    va_end(args);
    Complaint c = {line, errors->complaints->len, g_utf8_make_valid(text, -1)};
    for (char *at = c.text; *at != '\0'; at++) {
        if (g_ascii_iscntrl(*at)) {
            *at = ' ';
        }
    }
    g_array_append_val(errors->complaints, c);
}

static int compare_complaints(const void *a, const void *b)
{
    const Complaint *x = a, *y = b;
    return x->line != y->line ? (x->line > y->line ? 1 : -1)
                              : (x->order > y->order) - (x->order < y->order);
}

bool yaml_errors_tell(const YamlErrors *errors, const char *origin, GError **error)
{
    const GArray *all = errors->complaints;
    if (all->len == 0) {
        return true;
    }
    g_array_sort(errors->complaints, compare_complaints);
    g_autoptr(GString) text = g_string_new(NULL);
    for (unsigned i = 0; i < MIN(all->len, ERRORS_SHOWN); i++) {
        const Complaint *c = &g_array_index(all, Complaint, i);
        g_string_append_printf(text, "%s%s:%zu: %s", i > 0 ? "; " : "", origin, c->line, c->text);
    }
    if (all->len > ERRORS_SHOWN) {
        g_string_append_printf(text, "; and %u more", all->len - ERRORS_SHOWN);
    }
    g_set_error_literal(error, WEFT_ERROR, WEFT_ERROR_INVALID, text->str);
    return false;
}

/* ---- reading ---- */

typedef struct Open {
    char *path; /* owned; "" at the top */
    bool is_list;
    char *key;        /* of a mapping: read, its value not yet; owned */
    size_t key_line;  /* of it */
    unsigned n_items; /* of a list */
} Open;

typedef struct Reader {
    yaml_parser_t parser;
    YamlErrors *errors;
    GPtrArray *entries;
    GHashTable *by_path; /* path -> entry */
    Open stack[DEPTH_LIMIT];
    unsigned depth;
    unsigned skipping; /* open collections below one that is left out */
    bool has_root, stopped;
} Reader;

static void entry_free(gpointer entry)
{
    YamlEntry *e = entry;
    g_free(e->path);
    g_free(e->text);
    g_free(e);
}

static void stop(Reader *r, size_t line, const char *why)
{
    yaml_errors_add(r->errors, line, "%s", why);
    r->stopped = true;
}

/* The path of what comes next; the open mapping's key is used up. NULL: it is to be left out. */
static char *next_path(Reader *r, size_t line)
{
    if (r->depth == 0) {
        return g_strdup("");
    }
    Open *open = &r->stack[r->depth - 1];
    const char *dot = open->path[0] != '\0' ? "." : "";
    if (open->is_list) {
        return g_strdup_printf("%s%s%u", open->path, dot, open->n_items++);
    }
    g_autofree char *key = g_steal_pointer(&open->key);
    g_autofree char *path = g_strdup_printf("%s%s%s", open->path, dot, key);
    const YamlEntry *before = g_hash_table_lookup(r->by_path, path);
    if (before != NULL) {
        yaml_errors_add(r->errors, line, "'%.*s' is there twice: first in line %zu", NAME_SHOWN,
                        path, before->line);
        return NULL;
    }
    return g_steal_pointer(&path);
}

static size_t next_line(const Reader *r, size_t line)
{
    const Open *open = r->depth > 0 ? &r->stack[r->depth - 1] : NULL;
    return open != NULL && open->key != NULL ? open->key_line : line;
}

/* path: taken. */
static void add_entry(Reader *r, char *path, const char *text, YamlKind kind, size_t line)
{
    if (r->entries->len >= ENTRIES_LIMIT) {
        g_free(path);
        stop(r, line, "more than 4096 entries; a job file is a page");
        return;
    }
    YamlEntry *e = g_new0(YamlEntry, 1);
    *e = (YamlEntry){path, g_strdup(text), kind, line};
    g_ptr_array_add(r->entries, e);
    g_hash_table_insert(r->by_path, e->path, e);
}

static void read_value(Reader *r, const yaml_event_t *event, size_t line)
{
    Open *open = r->depth > 0 ? &r->stack[r->depth - 1] : NULL;
    const char *text = (const char *)event->data.scalar.value;
    const size_t length = event->data.scalar.length;
    if (r->skipping > 0) {
        return;
    }
    if (length > VALUE_LIMIT || memchr(text, '\0', length) != NULL) {
        stop(r, line, "a value is longer than 64 KiB or holds a zero byte");
    } else if (open == NULL) {
        stop(r, line, "the file is to be a mapping of names to values, kind: first");
    } else if (!open->is_list && open->key == NULL) {
        if (text[0] == '\0' || strchr(text, '.') != NULL) {
            yaml_errors_add(r->errors, line, "'%.*s' is no name of a setting", NAME_SHOWN, text);
        }
        /* A dot would make it look like a path. */
        open->key = g_strdelimit(g_strdup(text), ".", '?');
        open->key_line = line;
    } else {
        const size_t at = next_line(r, line);
        char *path = next_path(r, at);
        if (path != NULL) {
            add_entry(r, path, text, YAML_TREE_VALUE, at);
        }
    }
}

static void open_collection(Reader *r, bool is_list, size_t line)
{
    Open *open = r->depth > 0 ? &r->stack[r->depth - 1] : NULL;
    if (r->skipping > 0) {
        r->skipping++;
        return;
    }
    if (open == NULL && is_list) {
        stop(r, line, "the file is to be a mapping of names to values, not a list");
        return;
    }
    if (open != NULL && !open->is_list && open->key == NULL) {
        stop(r, line, "names of settings are plain words");
        return;
    }
    if (r->depth == DEPTH_LIMIT) {
        stop(r, line, "nested more than 8 deep; job files need 3");
        return;
    }
    const size_t at = next_line(r, line);
    char *path = next_path(r, at);
    if (path == NULL) {
        r->skipping = 1;
        return;
    }
    if (open != NULL) {
        add_entry(r, g_strdup(path), NULL, is_list ? YAML_TREE_LIST : YAML_TREE_MAPPING, at);
    }
    r->stack[r->depth++] = (Open){.path = path, .is_list = is_list};
}

static void close_collection(Reader *r)
{
    if (r->skipping > 0) {
        r->skipping--;
    } else if (r->depth > 0) {
        r->depth--;
        g_clear_pointer(&r->stack[r->depth].path, g_free);
        g_clear_pointer(&r->stack[r->depth].key, g_free);
    }
}

static bool has_properties(const yaml_event_t *event)
{
    switch (event->type) {
    case YAML_SCALAR_EVENT:
        return event->data.scalar.anchor != NULL || event->data.scalar.tag != NULL;
    case YAML_MAPPING_START_EVENT:
        return event->data.mapping_start.anchor != NULL || event->data.mapping_start.tag != NULL;
    case YAML_SEQUENCE_START_EVENT:
        return event->data.sequence_start.anchor != NULL || event->data.sequence_start.tag != NULL;
    default:
        return event->type == YAML_ALIAS_EVENT;
    }
}

static void take_event(Reader *r, const yaml_event_t *event)
{
    const size_t line = event->start_mark.line + 1;
    if (has_properties(event)) {
        stop(r, line, "anchors, aliases and tags are not read; write the value itself");
        return;
    }
    switch (event->type) {
    case YAML_DOCUMENT_START_EVENT:
        if (r->has_root) {
            stop(r, line, "a second document begins; a job file is one");
        }
        r->has_root = true;
        break;
    case YAML_SCALAR_EVENT:
        read_value(r, event, line);
        break;
    case YAML_MAPPING_START_EVENT:
    case YAML_SEQUENCE_START_EVENT:
        open_collection(r, event->type == YAML_SEQUENCE_START_EVENT, line);
        break;
    case YAML_MAPPING_END_EVENT:
    case YAML_SEQUENCE_END_EVENT:
        close_collection(r);
        break;
    default:
        break;
    }
}

static void read_events(Reader *r)
{
    for (bool ended = false; !ended && !r->stopped;) {
        yaml_event_t event;
        if (!yaml_parser_parse(&r->parser, &event)) {
            const char *problem = r->parser.problem;
            stop(r, r->parser.problem_mark.line + 1, problem != NULL ? problem : "this is no YAML");
            return;
        }
        ended = event.type == YAML_STREAM_END_EVENT;
        take_event(r, &event);
        yaml_event_delete(&event);
    }
}

GPtrArray *yaml_tree_read(const char *text, size_t length, YamlErrors *errors)
{
    Reader r = {.errors = errors, .entries = g_ptr_array_new_with_free_func(entry_free)};
    if (length > TEXT_LIMIT) {
        yaml_errors_add(errors, 1, "the file has %zu bytes; at most %u are read", length,
                        TEXT_LIMIT);
        g_ptr_array_unref(r.entries);
        return NULL;
    }
    r.by_path = g_hash_table_new(g_str_hash, g_str_equal);
    if (!yaml_parser_initialize(&r.parser)) {
        stop(&r, 1, "no memory for the YAML parser");
    } else {
        yaml_parser_set_input_string(&r.parser, (const unsigned char *)text, length);
        read_events(&r);
        yaml_parser_delete(&r.parser);
    }
    r.skipping = 0;
    while (r.depth > 0) {
        close_collection(&r);
    }
    g_hash_table_unref(r.by_path);
    if (r.stopped) {
        g_clear_pointer(&r.entries, g_ptr_array_unref);
    }
    return r.entries;
}

const YamlEntry *yaml_tree_find(const GPtrArray *entries, const char *path)
{
    for (unsigned i = 0; i < entries->len; i++) {
        const YamlEntry *e = entries->pdata[i];
        if (strcmp(e->path, path) == 0) {
            return e;
        }
    }
    return NULL;
}
