/* Values of a chat template while it is rendered: Python's, as far as templates can see them. They
 * live in the render's arena and die with it. */
#pragma once

#include "proto/text/chat_template.h"

#include <stdint.h>

typedef enum ValueKind {
    VALUE_UNDEFINED,
    VALUE_NONE,
    VALUE_BOOL,
    VALUE_INT,
    VALUE_FLOAT,
    VALUE_STRING,
    VALUE_LIST,
    VALUE_DICT,
    VALUE_NAMESPACE, /* namespace(): the one thing that can be changed */
    VALUE_FUNCTION,
    VALUE_METHOD,
    VALUE_MACRO,
    VALUE_LOOP, /* the variable `loop` */
} ValueKind;

/* Bytes, UTF-8 by convention; a byte that is not counts as one character. Not NUL-terminated. */
typedef struct Text {
    const char *data;
    size_t length;
} Text;
#define TEXT(literal) ((Text){(literal), sizeof(literal) - 1})

typedef struct ValueList ValueList;
typedef struct ValueDict ValueDict;
typedef struct ValueMethod ValueMethod;
typedef struct MacroValue MacroValue;
typedef struct LoopState LoopState;
typedef struct Render Render;
typedef struct Arguments Arguments;
typedef struct Builtin Builtin;
typedef struct Value Value;

struct Value {
    ValueKind kind;
    bool of_attribute; /* undefined: what is missing is an attribute or element */
    union {
        bool boolean;
        int64_t integer;
        double real;
        Text text; /* string; undefined: the name that was looked for */
        ValueList *list;
        ValueDict *dict; /* dict, namespace */
        const Builtin *function;
        ValueMethod *method;
        MacroValue *macro;
        LoopState *loop;
    };
};

typedef enum ListKind {
    LIST_LIST,
    LIST_TUPLE,
    LIST_GENERATOR /* of a filter: always true, has no length */
} ListKind;

struct ValueList {
    ListKind kind;
    Value *items;
    size_t n;
};

/* In order of insertion. */
struct ValueDict {
    Value *keys, *values;
    size_t n, capacity;
};

struct ValueMethod {
    Value self;
    const Builtin *builtin;
};

struct LoopState {
    const ValueList *items;
    size_t index;  /* from 0 */
    Value changed; /* last value given to loop.changed() */
};

static inline Value value_undefined(Text name)
{
    return (Value){.kind = VALUE_UNDEFINED, .text = name};
}
static inline Value value_missing(Text name)
{
    return (Value){.kind = VALUE_UNDEFINED, .of_attribute = true, .text = name};
}
static inline Value value_none(void)
{
    return (Value){.kind = VALUE_NONE};
}
static inline Value value_bool(bool b)
{
    return (Value){.kind = VALUE_BOOL, .boolean = b};
}
static inline Value value_int(int64_t i)
{
    return (Value){.kind = VALUE_INT, .integer = i};
}
static inline Value value_float(double d)
{
    return (Value){.kind = VALUE_FLOAT, .real = d};
}
static inline Value value_text(Text text)
{
    return (Value){.kind = VALUE_STRING, .text = text};
}
static inline Value value_list(ValueList *list)
{
    return (Value){.kind = VALUE_LIST, .list = list};
}
static inline Value value_dict(ValueDict *dict)
{
    return (Value){.kind = VALUE_DICT, .dict = dict};
}
static inline bool value_is_integral(Value v)
{
    return v.kind == VALUE_INT || v.kind == VALUE_BOOL;
}
static inline bool value_is_number(Value v)
{
    return value_is_integral(v) || v.kind == VALUE_FLOAT;
}
static inline int64_t value_integer(Value v)
{
    return v.kind == VALUE_BOOL ? v.boolean : v.integer;
}
static inline double value_real(Value v)
{
    return v.kind == VALUE_FLOAT ? v.real : (double)value_integer(v);
}

/* The kind as Python names it: "str", "list", ... */
const char *value_kind_name(Value v);
bool value_truth(Value v);
/* A list of n undefined values; NULL once the render has failed. */
ValueList *value_list_new(Render *r, ListKind kind, size_t n);
ValueDict *value_dict_new(Render *r);
/* Adds or replaces; keys are strings, numbers, bools or none (else the render fails). */
void value_dict_put(Render *r, ValueDict *dict, Value key, Value value);
/* NULL if absent. */
const Value *value_dict_find(Render *r, const ValueDict *dict, Value key);
/* == of Python. */
bool value_equal(Render *r, Value a, Value b);
/* < 0, 0, > 0; fails for kinds that have no order among them. */
int value_compare(Render *r, Value a, Value b);
/* x in container. */
bool value_contains(Render *r, Value container, Value x);
/* What iterating gives: elements, keys, characters. NULL after failing for what cannot be iterated.
 */
ValueList *value_iterate(Render *r, Value v);
/* len(); -1 after failing. */
int64_t value_length(Render *r, Value v);
/* A copy of bytes in the arena. */
Value value_copy_text(Render *r, const char *data, size_t length);
/* Takes the buffer always. */
Value value_take_buffer(Render *r, GString *buffer);

/* str(): a string as it is. */
Text value_to_text(Render *r, Value v);
/* repr() into a buffer. */
void value_append_repr(Render *r, GString *out, Value v, unsigned depth);

typedef struct JsonStyle {
    bool ascii, sort_keys;
    int64_t indent; /* spaces; < 0: one line */
    Text item_separator, key_separator;
} JsonStyle;
/* json.dumps() into a buffer. */
void value_append_json(Render *r, GString *out, Value v, const JsonStyle *style, unsigned depth);

/* Bytes of the character that text begins with (length > 0). */
size_t text_step(Text text, uint32_t *code_out /* may be NULL; an invalid byte is U+FFFD */);
size_t text_count(Text text);
/* Byte offset of the i-th character, at most text.length. */
size_t text_offset(Text text, size_t i);
bool text_equal(Text a, Text b);
/* Offset of the first occurrence at or after `from`; -1 if none. */
gssize text_find(Text haystack, Text needle, size_t from);
Text text_strip(Text text, const Text *characters /* NULL: white space */, bool left, bool right);
