/* YamlTree: a YAML text that nobody trusts as a flat list of paths: what job files are read from.
 * {a: {b: 1, c: [x, y]}} is a (mapping), a.b = 1, a.c (list), a.c.0 = x, a.c.1 = y. Bounds: text
 * 256 KiB, nesting 8, entries 4,096, a value 64 KiB. Anchors, aliases, tags and a second document
 * are refused. */
#pragma once

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>

typedef enum YamlKind { YAML_TREE_VALUE, YAML_TREE_MAPPING, YAML_TREE_LIST } YamlKind;

typedef struct YamlEntry {
    char *path; /* names joined by dots; owned, as is text */
    char *text; /* of a value; NULL otherwise */
    YamlKind kind;
    size_t line; /* from 1 */
} YamlEntry;

/* Complaints with their lines, told all at once. */
typedef struct YamlErrors YamlErrors;
YamlErrors *yaml_errors_new(void);
void yaml_errors_free(YamlErrors *errors); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(YamlErrors, yaml_errors_free)
void yaml_errors_add(YamlErrors *errors, size_t line, const char *format, ...) G_GNUC_PRINTF(3, 4);
/* True if there are none; else INVALID: "ORIGIN:LINE: text; ..." by line, at most 32 of them. */
bool yaml_errors_tell(const YamlErrors *errors, const char *origin, GError **error);

/* GPtrArray of YamlEntry in order of the text, returned; NULL where it is no YAML or beyond the
 * bounds. What is wrong is added to `errors`: also a name that is given twice, which counts once,
 * the first time. */
GPtrArray *yaml_tree_read(const char *text, size_t length, YamlErrors *errors);
/* NULL if there is none. */
const YamlEntry *yaml_tree_find(const GPtrArray *entries, const char *path);
