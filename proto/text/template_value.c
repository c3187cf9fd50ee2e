#include "proto/text/template_render.h"

#include "proto/text/utf8.h"

#include <math.h>
#include <string.h>

/* ---- text ---- */

size_t text_step(Text text, uint32_t *code_out)
{
    uint32_t code;
    int step = utf8_decode(text.data, text.length, &code);
    if (code_out != NULL) {
        *code_out = step > 0 ? code : 0xFFFD;
    }
    return step > 0 ? (size_t)step : 1;
}

static Text text_from(Text text, size_t offset)
{
    return (Text){text.data + offset, text.length - offset};
}

size_t text_count(Text text)
{
    size_t n = 0;
    for (size_t at = 0; at < text.length; n++) {
        at += text_step(text_from(text, at), NULL);
    }
    return n;
}

size_t text_offset(Text text, size_t i)
{
    size_t at = 0;
    for (; i > 0 && at < text.length; i--) {
        at += text_step(text_from(text, at), NULL);
    }
    return at;
}

bool text_equal(Text a, Text b)
{
    return a.length == b.length && (a.length == 0 || memcmp(a.data, b.data, a.length) == 0);
}

static int text_compare(Text a, Text b)
{
    size_t shared = MIN(a.length, b.length);
    int order = shared > 0 ? memcmp(a.data, b.data, shared) : 0;
    return order != 0 ? order : (a.length > b.length) - (a.length < b.length);
}

gssize text_find(Text haystack, Text needle, size_t from)
{
    if (from > haystack.length) {
        return -1;
    }
    if (needle.length == 0) {
        return (gssize)from;
    }
    const char *found =
        memmem(haystack.data + from, haystack.length - from, needle.data, needle.length);
    return found != NULL ? found - haystack.data : -1;
}

static bool text_has_character(Text set, Text character)
{
    for (size_t at = 0; at < set.length;) {
        size_t step = text_step(text_from(set, at), NULL);
        if (text_equal((Text){set.data + at, step}, character)) {
            return true;
        }
        at += step;
    }
    return false;
}

static bool text_strips(Text character, uint32_t code, const Text *characters)
{
    /* Python also strips the four separators U+001C..U+001F. */
    return characters != NULL ? text_has_character(*characters, character)
                              : utf8_is_space(code) || (code >= 0x1C && code <= 0x1F);
}

Text text_strip(Text text, const Text *characters, bool left, bool right)
{
    uint32_t code;
    while (left && text.length > 0) {
        size_t step = text_step(text, &code);
        if (!text_strips((Text){text.data, step}, code, characters)) {
            break;
        }
        text = text_from(text, step);
    }
    while (right && text.length > 0) {
        size_t start = text.length - 1;
        while (start > 0 && text.length - start < 4 && ((uint8_t)text.data[start] & 0xC0) == 0x80) {
            start--;
        }
        if (text_step(text_from(text, start), &code) != text.length - start) {
            start = text.length - 1;
            code = 0xFFFD;
        }
        if (!text_strips(text_from(text, start), code, characters)) {
            break;
        }
        text.length = start;
    }
    return text;
}

/* ---- containers ---- */

const char *value_kind_name(Value v)
{
    switch (v.kind) {
    case VALUE_UNDEFINED:
        return "undefined";
    case VALUE_NONE:
        return "NoneType";
    case VALUE_BOOL:
        return "bool";
    case VALUE_INT:
        return "int";
    case VALUE_FLOAT:
        return "float";
    case VALUE_STRING:
        return "str";
    case VALUE_LIST:
        return v.list->kind == LIST_TUPLE       ? "tuple"
               : v.list->kind == LIST_GENERATOR ? "generator"
                                                : "list";
    case VALUE_DICT:
        return "dict";
    case VALUE_NAMESPACE:
        return "namespace";
    case VALUE_FUNCTION:
    case VALUE_METHOD:
        return "function";
    case VALUE_MACRO:
        return "macro";
    case VALUE_LOOP:
        return "loop";
    }
    return "?";
}

bool value_truth(Value v)
{
    switch (v.kind) {
    case VALUE_UNDEFINED:
    case VALUE_NONE:
        return false;
    case VALUE_BOOL:
        return v.boolean;
    case VALUE_INT:
        return v.integer != 0;
    case VALUE_FLOAT:
        return v.real != 0;
    case VALUE_STRING:
        return v.text.length > 0;
    case VALUE_LIST:
        return v.list->n > 0 || v.list->kind == LIST_GENERATOR;
    case VALUE_DICT:
        return v.dict->n > 0;
    default:
        return true;
    }
}

ValueList *value_list_new(Render *r, ListKind kind, size_t n)
{
    ValueList *list = render_alloc(r, 1, sizeof *list);
    Value *items = list != NULL ? render_alloc(r, MAX(n, 1), sizeof *items) : NULL;
    if (items == NULL) {
        return NULL;
    }
    *list = (ValueList){.kind = kind, .items = items, .n = n};
    return list;
}

ValueDict *value_dict_new(Render *r)
{
    return render_alloc(r, 1, sizeof(ValueDict));
}

static bool value_is_hashable(Value v)
{
    return v.kind != VALUE_LIST && v.kind != VALUE_DICT;
}

const Value *value_dict_find(Render *r, const ValueDict *dict, Value key)
{
    if (!value_is_hashable(key) || !render_step(r, 1 + dict->n / 16)) {
        return NULL;
    }
    for (size_t i = 0; i < dict->n; i++) {
        if (value_equal(r, dict->keys[i], key)) {
            return &dict->values[i];
        }
    }
    return NULL;
}

void value_dict_put(Render *r, ValueDict *dict, Value key, Value value)
{
    if (!value_is_hashable(key)) {
        render_fail(r, "a %s cannot be a key", value_kind_name(key));
        return;
    }
    Value *found = (Value *)value_dict_find(r, dict, key);
    if (found != NULL) {
        *found = value;
        return;
    }
    if (dict->n == dict->capacity) {
        size_t capacity = MAX(4, 2 * dict->capacity);
        Value *keys = render_alloc(r, capacity, sizeof *keys),
              *values = render_alloc(r, capacity, sizeof *values);
        if (keys == NULL || values == NULL) {
            return;
        }
        if (dict->n > 0) {
            memcpy(keys, dict->keys, dict->n * sizeof *keys);
            memcpy(values, dict->values, dict->n * sizeof *values);
        }
        dict->keys = keys;
        dict->values = values;
        dict->capacity = capacity;
    }
    dict->keys[dict->n] = key;
    dict->values[dict->n++] = value;
}

/* ---- comparison ---- */

/* A namespace can hold itself, so equality and order need a bound of their own. */
static bool value_enter(Render *r)
{
    if (r->value_depth >= r->limits.depth) {
        render_fail(r, "a value is nested deeper than %u levels", r->limits.depth);
        return false;
    }
    r->value_depth++;
    return true;
}

static bool lists_equal(Render *r, const ValueList *a, const ValueList *b)
{
    if ((a->kind == LIST_TUPLE) != (b->kind == LIST_TUPLE) || a->n != b->n || !value_enter(r)) {
        return false;
    }
    bool equal = true;
    for (size_t i = 0; i < a->n && equal; i++) {
        equal = value_equal(r, a->items[i], b->items[i]);
    }
    r->value_depth--;
    return equal;
}

static bool dicts_equal(Render *r, const ValueDict *a, const ValueDict *b)
{
    if (a->n != b->n || !value_enter(r)) {
        return false;
    }
    bool equal = true;
    for (size_t i = 0; i < a->n && equal; i++) {
        const Value *other = value_dict_find(r, b, a->keys[i]);
        equal = other != NULL && value_equal(r, a->values[i], *other);
    }
    r->value_depth--;
    return equal;
}

bool value_equal(Render *r, Value a, Value b)
{
    if (!render_step(r, 1 + (a.kind == VALUE_STRING ? a.text.length / 256 : 0))) {
        return false;
    }
    if (value_is_integral(a) && value_is_integral(b)) {
        return value_integer(a) == value_integer(b);
    }
    if (value_is_number(a) && value_is_number(b)) {
        return value_real(a) == value_real(b);
    }
    if (a.kind != b.kind) {
        return false;
    }
    switch (a.kind) {
    case VALUE_UNDEFINED:
    case VALUE_NONE:
        return true;
    case VALUE_STRING:
        return text_equal(a.text, b.text);
    case VALUE_LIST:
        return a.list == b.list || lists_equal(r, a.list, b.list);
    case VALUE_DICT:
        return a.dict == b.dict || dicts_equal(r, a.dict, b.dict);
    case VALUE_NAMESPACE:
        return a.dict == b.dict;
    case VALUE_FUNCTION:
        return a.function == b.function;
    case VALUE_METHOD:
        return a.method == b.method;
    case VALUE_MACRO:
        return a.macro == b.macro;
    case VALUE_LOOP:
        return a.loop == b.loop;
    default:
        return false;
    }
}

static int lists_compare(Render *r, const ValueList *a, const ValueList *b)
{
    if (!value_enter(r)) {
        return 0;
    }
    int order = 0;
    for (size_t i = 0; i < MIN(a->n, b->n) && order == 0; i++) {
        order = value_equal(r, a->items[i], b->items[i])
                    ? 0
                    : value_compare(r, a->items[i], b->items[i]);
    }
    r->value_depth--;
    return order != 0 ? order : (a->n > b->n) - (a->n < b->n);
}

int value_compare(Render *r, Value a, Value b)
{
    if (!render_step(r, 1 + (a.kind == VALUE_STRING ? a.text.length / 256 : 0))) {
        return 0;
    }
    if (value_is_integral(a) && value_is_integral(b)) {
        return (value_integer(a) > value_integer(b)) - (value_integer(a) < value_integer(b));
    }
    if (value_is_number(a) && value_is_number(b)) {
        return (value_real(a) > value_real(b)) - (value_real(a) < value_real(b));
    }
    if (a.kind == VALUE_STRING && b.kind == VALUE_STRING) {
        return text_compare(a.text, b.text);
    }
    if (a.kind == VALUE_LIST && b.kind == VALUE_LIST && a.list->kind == b.list->kind) {
        return lists_compare(r, a.list, b.list);
    }
    if (a.kind == VALUE_UNDEFINED || b.kind == VALUE_UNDEFINED) {
        render_fail_undefined(r, a.kind == VALUE_UNDEFINED ? a : b);
    } else {
        render_fail(r, "%s and %s have no order", value_kind_name(a), value_kind_name(b));
    }
    return 0;
}

bool value_contains(Render *r, Value container, Value x)
{
    switch (container.kind) {
    case VALUE_STRING:
        if (x.kind != VALUE_STRING) {
            render_fail(r, "'in' of a string needs a string on its left, not %s",
                        value_kind_name(x));
            return false;
        }
        return render_step(r, 1 + container.text.length / 64) &&
               text_find(container.text, x.text, 0) >= 0;
    case VALUE_DICT:
        if (!value_is_hashable(x)) {
            render_fail(r, "a %s cannot be a key", value_kind_name(x));
        }
        return value_dict_find(r, container.dict, x) != NULL;
    case VALUE_LIST:
        for (size_t i = 0; i < container.list->n && !render_failed(r); i++) {
            if (value_equal(r, container.list->items[i], x)) {
                return true;
            }
        }
        return false;
    case VALUE_UNDEFINED:
        return false;
    default:
        render_fail(r, "'in' needs a string, list or dict on its right, not %s",
                    value_kind_name(container));
        return false;
    }
}

static ValueList *text_characters(Render *r, Text text)
{
    size_t n = text_count(text), at = 0;
    ValueList *list = render_step(r, n) ? value_list_new(r, LIST_LIST, n) : NULL;
    for (size_t i = 0; list != NULL && i < n; i++) {
        size_t step = text_step(text_from(text, at), NULL);
        list->items[i] = value_text((Text){text.data + at, step});
        at += step;
    }
    return list;
}

ValueList *value_iterate(Render *r, Value v)
{
    switch (v.kind) {
    case VALUE_LIST:
        return v.list;
    case VALUE_UNDEFINED:
        return value_list_new(r, LIST_LIST, 0);
    case VALUE_STRING:
        return text_characters(r, v.text);
    case VALUE_DICT: {
        ValueList *list = value_list_new(r, LIST_LIST, v.dict->n);
        if (list != NULL && v.dict->n > 0) {
            memcpy(list->items, v.dict->keys, v.dict->n * sizeof *list->items);
        }
        return list;
    }
    default:
        render_fail(r, "%s cannot be iterated over", value_kind_name(v));
        return NULL;
    }
}

int64_t value_length(Render *r, Value v)
{
    switch (v.kind) {
    case VALUE_STRING:
        return render_step(r, v.text.length / 64) ? (int64_t)text_count(v.text) : -1;
    case VALUE_LIST:
        if (v.list->kind != LIST_GENERATOR) {
            return (int64_t)v.list->n;
        }
        break;
    case VALUE_DICT:
        return (int64_t)v.dict->n;
    case VALUE_UNDEFINED:
        return 0;
    default:
        break;
    }
    render_fail(r, "%s has no length", value_kind_name(v));
    return -1;
}

Value value_copy_text(Render *r, const char *data, size_t length)
{
    char *copy = render_alloc(r, length + 1, 1);
    if (copy == NULL) {
        return value_none();
    }
    if (length > 0) {
        memcpy(copy, data, length);
    }
    return value_text((Text){copy, length});
}

Value value_take_buffer(Render *r, GString *buffer)
{
    Value v = value_copy_text(r, buffer->str, buffer->len);
    g_string_free(buffer, TRUE);
    return v;
}
