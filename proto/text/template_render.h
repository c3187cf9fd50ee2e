/* The state of one rendering: arena, limits, output, scopes, the first error. Errors are sticky as
 * in ByteReader: once one is set, everything returns quickly and nothing that was computed counts.
 */
#pragma once

#include "proto/text/template_ast.h"

typedef struct Variable {
    const char *name; /* interned: compared by address */
    Value value;
} Variable;

typedef struct Scope {
    struct Scope *parent;
    Variable *variables;
    unsigned n, capacity;
} Scope;

struct MacroValue {
    const Statement *definition;
    Scope *scope; /* where it was defined */
};

/* Arguments of a call, evaluated. */
struct Arguments {
    Value *positional;
    const char **names;
    Value *named;
    unsigned n_positional, n_named;
};

struct Render {
    ChatLimits limits;
    const ChatTemplate *source;
    size_t steps; /* taken */
    unsigned block_depth, expression_depth, value_depth;
    unsigned line;
    GPtrArray *blocks; /* arena */
    char *free_at;
    size_t free_bytes, arena_bytes;
    GString *out;
    Scope *scope;
    GError *error;
};

#define render_failed(r) ((r)->error != NULL)
/* Keeps the first: INVALID, with the line. */
void render_fail(Render *r, const char *format, ...) G_GNUC_PRINTF(2, 3);
/* Fails because v is undefined, by name. */
void render_fail_undefined(Render *r, Value v);
/* Counts n steps; false once the limit is passed or the render has failed. */
bool render_step(Render *r, size_t n);
/* Zeroed memory of the arena, NULL once the render has failed (or fails by this). */
void *render_alloc(Render *r, size_t n, size_t size);
/* Appends within the output limit. */
void render_append(Render *r, GString *out, const char *data, size_t length);

Value render_expression(Render *r, const Expression *e);
void render_statements(Render *r, const Block *block);
Value render_macro(Render *r, const MacroValue *macro, const Arguments *arguments);
Value render_call(Render *r, Value callee, const Arguments *arguments);
/* value[key], then value.key. */
Value render_element(Render *r, Value v, Value key);
Value render_arithmetic(Render *r, Operator op, Value a, Value b);
void render_set(Render *r, const char *name, Value value);
Value render_apply_filter(Render *r, Text name, Value subject, const Arguments *arguments);
bool render_apply_test(Render *r, Text name, Value subject, const Arguments *arguments);

/* Evaluates the arguments of a call; what it returns does not count once the render has failed. */
Arguments render_arguments(Render *r, const CallExpressions *call);
/* The variable of the innermost scope that has it; NULL if none. */
const Value *render_find(const Render *r, const char *name);

/* A filter, test, method or function. `self` is what it is applied to. */
struct Builtin {
    const char *name;
    const char
        *parameters; /* names with a space between them; missing arguments become undefined */
    unsigned required;
    Value (*call)(Render *r, Value self, const Value *arguments); /* one per parameter */
    Value (*call_open)(Render *r, Value self,
                       const Arguments *arguments); /* instead of call: any arguments */
};

Value builtin_call(Render *r, const Builtin *builtin, Value self, const Arguments *arguments);
const Builtin *builtin_find(const Builtin *table, size_t n, Text name);
/* Distributes arguments over parameters; fails on superfluous, unknown or doubled ones, and when
 * fewer than `required` are there. */
bool arguments_bind(Render *r, const char *what, const Arguments *arguments, const char *parameters,
                    unsigned required, Value *out);
enum { PARAMETERS_MAX = 8 };

/* An argument as text, integer or truth; the fallback where it was not given (or is none). Fails on
 * other kinds. */
Text argument_text(Render *r, Value v, Text fallback);
int64_t argument_integer(Render *r, Value v, int64_t fallback);
bool argument_truth(Value v, bool fallback);

/* The method of a value by name; undefined if there is none. */
Value template_method(Render *r, Value self, Text name);
/* A global function by name, NULL if there is none. */
const Builtin *template_function(const Render *r, const char *name);

/* Case of whole texts, as Python's str methods; results in the arena. */
Value text_upper(Render *r, Text text);
Value text_lower(Render *r, Text text);
Value text_capitalize(Render *r, Text text);
/* The first letter of each word in upper case, the rest in lower: `words` as str.title() sees them,
 * else as the filter does. */
Value text_title(Render *r, Text text, bool words);
Value text_replace(Render *r, Text text, Text old, Text new, int64_t count);
ValueList *text_split_lines(Render *r, Text text);
