/* Methods of strings, lists, dicts and `loop`. Those that would change their object are not there:
 * values never change (namespaces do, by assignment). */
#include "proto/text/template_render.h"

#include "proto/text/utf8.h"

#include <string.h>
#include <utf8proc.h>

static Value list_or_none(ValueList *list)
{
    return list != NULL ? value_list(list) : value_none();
}

static Value list_of(Render *r, GArray *items)
{
    ValueList *list = value_list_new(r, LIST_LIST, items->len);
    if (list != NULL && items->len > 0) {
        memcpy(list->items, items->data, items->len * sizeof(Value));
    }
    g_array_free(items, TRUE);
    return list_or_none(list);
}

static Value strip(Render *r, Value self, const Value *a, bool left, bool right)
{
    Text characters = argument_text(r, a[0], TEXT(""));
    bool given = a[0].kind == VALUE_STRING;
    return render_step(r, self.text.length / 64)
               ? value_text(text_strip(self.text, given ? &characters : NULL, left, right))
               : value_none();
}

static Value str_strip(Render *r, Value self, const Value *a)
{
    return strip(r, self, a, true, true);
}

static Value str_lstrip(Render *r, Value self, const Value *a)
{
    return strip(r, self, a, true, false);
}

static Value str_rstrip(Render *r, Value self, const Value *a)
{
    return strip(r, self, a, false, true);
}

/* Runs of white space separate; what is left after maxsplit parts keeps its trailing blanks. */
static Value split_blanks(Render *r, Text text, int64_t maximum)
{
    GArray *parts = g_array_new(FALSE, FALSE, sizeof(Value));
    text = text_strip(text, NULL, true, false);
    while (text.length > 0 && render_step(r, 1)) {
        size_t end = 0;
        bool last = maximum >= 0 && parts->len >= (guint64)maximum;
        while (end < text.length) {
            Text rest = {text.data + end, text.length - end};
            size_t step = text_step(rest, NULL);
            if (!last && text_strip((Text){rest.data, step}, NULL, true, false).length == 0) {
                break;
            }
            end += step;
        }
        Value part = value_text((Text){text.data, end});
        g_array_append_val(parts, part);
        text = text_strip((Text){text.data + end, text.length - end}, NULL, true, false);
    }
    return list_of(r, parts);
}

static Value split_at(Render *r, Text text, Text separator, int64_t maximum)
{
    GArray *parts = g_array_new(FALSE, FALSE, sizeof(Value));
    size_t at = 0;
    if (separator.length == 0) {
        render_fail(r, "the separator of split() is empty");
    }
    while (render_step(r, 1)) {
        gssize found =
            maximum >= 0 && parts->len >= (guint64)maximum ? -1 : text_find(text, separator, at);
        size_t end = found >= 0 ? (size_t)found : text.length;
        Value part = value_text((Text){text.data + at, end - at});
        g_array_append_val(parts, part);
        if (found < 0) {
            break;
        }
        at = end + separator.length;
    }
    return list_of(r, parts);
}

static Value str_split(Render *r, Value self, const Value *a)
{
    int64_t maximum = argument_integer(r, a[1], -1);
    if (!render_step(r, self.text.length / 16)) {
        return value_none();
    }
    if (a[0].kind == VALUE_UNDEFINED || a[0].kind == VALUE_NONE) {
        return split_blanks(r, self.text, maximum);
    }
    return split_at(r, self.text, argument_text(r, a[0], TEXT("")), maximum);
}

static gssize find_last(Text text, Text needle)
{
    for (size_t at = text.length >= needle.length ? text.length - needle.length + 1 : 0; at > 0;
         at--) {
        if (memcmp(text.data + at - 1, needle.data, needle.length) == 0) {
            return (gssize)at - 1;
        }
    }
    return -1;
}

static Value str_rsplit(Render *r, Value self, const Value *a)
{
    int64_t maximum = argument_integer(r, a[1], -1);
    if (maximum < 0) {
        return str_split(r, self, a);
    }
    Text separator = argument_text(r, a[0], TEXT("")), text = self.text;
    if (separator.length == 0) {
        render_fail(r, "rsplit() with a maximum needs a separator");
        return value_none();
    }
    GArray *parts = g_array_new(FALSE, FALSE, sizeof(Value));
    gssize found;
    while ((int64_t)parts->len < maximum && render_step(r, 1 + text.length / 16) &&
           (found = find_last(text, separator)) >= 0) {
        Value part = value_text((Text){text.data + found + separator.length,
                                       text.length - (size_t)found - separator.length});
        g_array_prepend_val(parts, part);
        text.length = (size_t)found;
    }
    Value first = value_text(text);
    g_array_prepend_val(parts, first);
    return list_of(r, parts);
}

static Value str_splitlines(Render *r, Value self, const Value *a)
{
    return list_or_none(text_split_lines(r, self.text));
}

static bool has_affix(Text text, Text affix, bool at_end)
{
    return affix.length <= text.length &&
           text_equal((Text){text.data + (at_end ? text.length - affix.length : 0), affix.length},
                      affix);
}

/* One string, or a tuple of which any may fit. */
static Value match_affix(Render *r, Value self, Value affixes, bool at_end)
{
    if (affixes.kind != VALUE_LIST || affixes.list->kind != LIST_TUPLE) {
        if (affixes.kind != VALUE_STRING) {
            render_fail(r, "a string is needed, not %s", value_kind_name(affixes));
            return value_none();
        }
        return value_bool(has_affix(self.text, affixes.text, at_end));
    }
    for (size_t i = 0; i < affixes.list->n && !render_failed(r); i++) {
        if (has_affix(self.text, argument_text(r, affixes.list->items[i], TEXT("")), at_end)) {
            return value_bool(true);
        }
    }
    return value_bool(false);
}

static Value str_startswith(Render *r, Value self, const Value *a)
{
    return match_affix(r, self, a[0], false);
}

static Value str_endswith(Render *r, Value self, const Value *a)
{
    return match_affix(r, self, a[0], true);
}

static Value str_removeprefix(Render *r, Value self, const Value *a)
{
    Text affix = argument_text(r, a[0], TEXT("")), text = self.text;
    return has_affix(text, affix, false)
               ? value_text((Text){text.data + affix.length, text.length - affix.length})
               : self;
}

static Value str_removesuffix(Render *r, Value self, const Value *a)
{
    Text affix = argument_text(r, a[0], TEXT(""));
    return has_affix(self.text, affix, true)
               ? value_text((Text){self.text.data, self.text.length - affix.length})
               : self;
}

static Value str_upper(Render *r, Value self, const Value *a)
{
    return text_upper(r, self.text);
}

static Value str_lower(Render *r, Value self, const Value *a)
{
    return text_lower(r, self.text);
}

static Value str_title(Render *r, Value self, const Value *a)
{
    return text_title(r, self.text, true);
}

static Value str_capitalize(Render *r, Value self, const Value *a)
{
    return text_capitalize(r, self.text);
}

static Value str_replace(Render *r, Value self, const Value *a)
{
    Text old = argument_text(r, a[0], TEXT("")), new = argument_text(r, a[1], TEXT(""));
    if (a[0].kind != VALUE_STRING || a[1].kind != VALUE_STRING) {
        render_fail(r, "replace() needs two strings");
    }
    return text_replace(r, self.text, old, new, argument_integer(r, a[2], -1));
}

static Value found_at(Text text, gssize offset)
{
    return value_int(offset < 0 ? -1 : (int64_t)text_count((Text){text.data, (size_t)offset}));
}

static Value str_find(Render *r, Value self, const Value *a)
{
    return render_step(r, self.text.length / 64)
               ? found_at(self.text, text_find(self.text, argument_text(r, a[0], TEXT("")), 0))
               : value_none();
}

static Value str_rfind(Render *r, Value self, const Value *a)
{
    return render_step(r, self.text.length / 16)
               ? found_at(self.text, find_last(self.text, argument_text(r, a[0], TEXT(""))))
               : value_none();
}

static Value str_index(Render *r, Value self, const Value *a)
{
    Value found = str_find(r, self, a);
    if (found.kind == VALUE_INT && found.integer < 0) {
        render_fail(r, "index(): the substring is not there");
    }
    return found;
}

static Value str_count(Render *r, Value self, const Value *a)
{
    Text needle = argument_text(r, a[0], TEXT(""));
    if (needle.length == 0) {
        return value_int((int64_t)text_count(self.text) + 1);
    }
    int64_t n = 0;
    for (gssize at = 0; render_step(r, 1) && (at = text_find(self.text, needle, (size_t)at)) >= 0;
         at += (gssize)needle.length) {
        n++;
    }
    return value_int(n);
}

static Value str_join(Render *r, Value self, const Value *a)
{
    const ValueList *items = value_iterate(r, a[0]);
    GString *out = g_string_new(NULL);
    for (size_t i = 0; items != NULL && i < items->n && !render_failed(r); i++) {
        if (items->items[i].kind != VALUE_STRING) {
            render_fail(r, "join() needs strings, element %zu is %s", i,
                        value_kind_name(items->items[i]));
            break;
        }
        render_append(r, out, self.text.data, i > 0 ? self.text.length : 0);
        render_append(r, out, items->items[i].text.data, items->items[i].text.length);
    }
    return value_take_buffer(r, out);
}

static bool is_alpha(utf8proc_category_t c)
{
    return c >= UTF8PROC_CATEGORY_LU && c <= UTF8PROC_CATEGORY_LO;
}

static bool is_digit(utf8proc_category_t c)
{
    return c == UTF8PROC_CATEGORY_ND;
}

static bool is_alnum(utf8proc_category_t c)
{
    return is_alpha(c) || c == UTF8PROC_CATEGORY_ND || c == UTF8PROC_CATEGORY_NL ||
           c == UTF8PROC_CATEGORY_NO;
}

static Value every(Render *r, Text text, bool (*is)(utf8proc_category_t))
{
    bool all = text.length > 0;
    for (size_t at = 0; at < text.length && all && render_step(r, 1);) {
        uint32_t code;
        at += text_step((Text){text.data + at, text.length - at}, &code);
        all = is(utf8proc_category((utf8proc_int32_t)code));
    }
    return value_bool(all);
}

static Value str_isalpha(Render *r, Value self, const Value *a)
{
    return every(r, self.text, is_alpha);
}

static Value str_isdigit(Render *r, Value self, const Value *a)
{
    return every(r, self.text, is_digit);
}

static Value str_isalnum(Render *r, Value self, const Value *a)
{
    return every(r, self.text, is_alnum);
}

static Value str_isspace(Render *r, Value self, const Value *a)
{
    return value_bool(self.text.length > 0 && render_step(r, self.text.length / 64) &&
                      text_strip(self.text, NULL, true, false).length == 0);
}

/* There is a cased letter and none has the other case. */
static Value is_case(Render *r, Text text, utf8proc_category_t wanted, utf8proc_category_t other)
{
    bool some = false;
    for (size_t at = 0; at < text.length && render_step(r, 1);) {
        uint32_t code;
        at += text_step((Text){text.data + at, text.length - at}, &code);
        utf8proc_category_t category = utf8proc_category((utf8proc_int32_t)code);
        if (category == other || category == UTF8PROC_CATEGORY_LT) {
            return value_bool(false);
        }
        some |= category == wanted;
    }
    return value_bool(some);
}

static Value str_isupper(Render *r, Value self, const Value *a)
{
    return is_case(r, self.text, UTF8PROC_CATEGORY_LU, UTF8PROC_CATEGORY_LL);
}

static Value str_islower(Render *r, Value self, const Value *a)
{
    return is_case(r, self.text, UTF8PROC_CATEGORY_LL, UTF8PROC_CATEGORY_LU);
}

static Value pair(Render *r, Value a, Value b)
{
    ValueList *list = value_list_new(r, LIST_TUPLE, 2);
    if (list == NULL) {
        return value_none();
    }
    list->items[0] = a;
    list->items[1] = b;
    return value_list(list);
}

static Value dict_items(Render *r, Value self, const Value *a)
{
    ValueList *list = value_list_new(r, LIST_LIST, self.dict->n);
    for (size_t i = 0; list != NULL && i < self.dict->n && render_step(r, 1); i++) {
        list->items[i] = pair(r, self.dict->keys[i], self.dict->values[i]);
    }
    return list_or_none(list);
}

static Value dict_keys(Render *r, Value self, const Value *a)
{
    return list_or_none(value_iterate(r, self));
}

static Value dict_values(Render *r, Value self, const Value *a)
{
    ValueList *list = value_list_new(r, LIST_LIST, self.dict->n);
    if (list != NULL && self.dict->n > 0) {
        memcpy(list->items, self.dict->values, self.dict->n * sizeof(Value));
    }
    return list_or_none(list);
}

static Value dict_get(Render *r, Value self, const Value *a)
{
    if (!value_contains(r, self, a[0])) {
        return a[1].kind == VALUE_UNDEFINED ? value_none() : a[1];
    }
    const Value *found = value_dict_find(r, self.dict, a[0]);
    return found != NULL ? *found : a[1].kind == VALUE_UNDEFINED ? value_none() : a[1];
}

static Value list_index(Render *r, Value self, const Value *a)
{
    for (size_t i = 0; i < self.list->n && !render_failed(r); i++) {
        if (value_equal(r, self.list->items[i], a[0])) {
            return value_int((int64_t)i);
        }
    }
    render_fail(r, "index(): the value is not in the list");
    return value_none();
}

static Value list_count(Render *r, Value self, const Value *a)
{
    int64_t n = 0;
    for (size_t i = 0; i < self.list->n && !render_failed(r); i++) {
        n += value_equal(r, self.list->items[i], a[0]);
    }
    return value_int(n);
}

static Value loop_cycle(Render *r, Value self, const Arguments *arguments)
{
    if (arguments->n_positional == 0) {
        render_fail(r, "loop.cycle() needs values");
        return value_none();
    }
    return arguments->positional[self.loop->index % arguments->n_positional];
}

static Value loop_changed(Render *r, Value self, const Arguments *arguments)
{
    ValueList *now = value_list_new(r, LIST_TUPLE, arguments->n_positional);
    if (now == NULL) {
        return value_none();
    }
    for (unsigned i = 0; i < arguments->n_positional; i++) {
        now->items[i] = arguments->positional[i];
    }
    bool same = self.loop->changed.kind == VALUE_LIST &&
                value_equal(r, self.loop->changed, value_list(now));
    self.loop->changed = value_list(now);
    return value_bool(!same);
}

static const Builtin text_methods[] = {
    {"strip", "chars", 0, str_strip, NULL},
    {"lstrip", "chars", 0, str_lstrip, NULL},
    {"rstrip", "chars", 0, str_rstrip, NULL},
    {"split", "sep maxsplit", 0, str_split, NULL},
    {"rsplit", "sep maxsplit", 0, str_rsplit, NULL},
    {"splitlines", "", 0, str_splitlines, NULL},
    {"startswith", "prefix", 1, str_startswith, NULL},
    {"endswith", "suffix", 1, str_endswith, NULL},
    {"removeprefix", "prefix", 1, str_removeprefix, NULL},
    {"removesuffix", "suffix", 1, str_removesuffix, NULL},
    {"upper", "", 0, str_upper, NULL},
    {"lower", "", 0, str_lower, NULL},
    {"title", "", 0, str_title, NULL},
    {"capitalize", "", 0, str_capitalize, NULL},
    {"replace", "old new count", 2, str_replace, NULL},
    {"find", "sub", 1, str_find, NULL},
    {"rfind", "sub", 1, str_rfind, NULL},
    {"index", "sub", 1, str_index, NULL},
    {"count", "sub", 1, str_count, NULL},
    {"join", "iterable", 1, str_join, NULL},
    {"isalpha", "", 0, str_isalpha, NULL},
    {"isdigit", "", 0, str_isdigit, NULL},
    {"isalnum", "", 0, str_isalnum, NULL},
    {"isspace", "", 0, str_isspace, NULL},
    {"isupper", "", 0, str_isupper, NULL},
    {"islower", "", 0, str_islower, NULL},
};

static const Builtin dict_methods[] = {
    {"items", "", 0, dict_items, NULL},
    {"keys", "", 0, dict_keys, NULL},
    {"values", "", 0, dict_values, NULL},
    {"get", "key default", 1, dict_get, NULL},
};

static const Builtin list_methods[] = {
    {"index", "value", 1, list_index, NULL},
    {"count", "value", 1, list_count, NULL},
};

static const Builtin loop_methods[] = {
    {"cycle", "", 0, NULL, loop_cycle},
    {"changed", "", 0, NULL, loop_changed},
};

static const Builtin *method_find(Value self, Text name)
{
    switch (self.kind) {
    case VALUE_STRING:
        return builtin_find(text_methods, G_N_ELEMENTS(text_methods), name);
    case VALUE_DICT:
        return builtin_find(dict_methods, G_N_ELEMENTS(dict_methods), name);
    case VALUE_LIST:
        return self.list->kind == LIST_GENERATOR
                   ? NULL
                   : builtin_find(list_methods, G_N_ELEMENTS(list_methods), name);
    case VALUE_LOOP:
        return builtin_find(loop_methods, G_N_ELEMENTS(loop_methods), name);
    default:
        return NULL;
    }
}

Value template_method(Render *r, Value self, Text name)
{
    const Builtin *builtin = method_find(self, name);
    ValueMethod *method = builtin != NULL ? render_alloc(r, 1, sizeof *method) : NULL;
    if (method == NULL) {
        return value_missing(name);
    }
    *method = (ValueMethod){.self = self, .builtin = builtin};
    return (Value){.kind = VALUE_METHOD, .method = method};
}
