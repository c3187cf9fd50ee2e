/* Filters: what stands behind "|". */
#include "proto/text/template_render.h"

#include <errno.h>
#include <math.h>
#include <string.h>

static Value list_or_none(ValueList *list)
{
    return list != NULL ? value_list(list) : value_none();
}

/* ---- text ---- */

static Value filter_trim(Render *r, Value v, const Value *a)
{
    Text text = value_to_text(r, v), characters = argument_text(r, a[0], TEXT(""));
    return render_step(r, text.length / 64)
               ? value_text(
                     text_strip(text, a[0].kind == VALUE_STRING ? &characters : NULL, true, true))
               : value_none();
}

static Value filter_upper(Render *r, Value v, const Value *a)
{
    return text_upper(r, value_to_text(r, v));
}

static Value filter_lower(Render *r, Value v, const Value *a)
{
    return text_lower(r, value_to_text(r, v));
}

static Value filter_title(Render *r, Value v, const Value *a)
{
    return text_title(r, value_to_text(r, v), false);
}

static Value filter_capitalize(Render *r, Value v, const Value *a)
{
    return text_capitalize(r, value_to_text(r, v));
}

static Value filter_string(Render *r, Value v, const Value *a)
{
    return value_text(value_to_text(r, v));
}

static Value filter_safe(Render *r, Value v, const Value *a)
{
    return value_text(value_to_text(r, v));
}

static Value filter_replace(Render *r, Value v, const Value *a)
{
    return text_replace(r, value_to_text(r, v), value_to_text(r, a[0]), value_to_text(r, a[1]),
                        argument_integer(r, a[2], -1));
}

static Value filter_indent(Render *r, Value v, const Value *a)
{
    if (v.kind != VALUE_STRING) {
        render_fail(r, "indent needs a string, not %s", value_kind_name(v));
        return value_none();
    }
    Text text = v.text, by = a[0].kind == VALUE_STRING ? a[0].text : TEXT("");
    if (a[0].kind != VALUE_STRING) {
        by = value_to_text(r, render_arithmetic(r, OPERATOR_MULTIPLY, value_text(TEXT(" ")),
                                                value_int(argument_integer(r, a[0], 4))));
    }
    GString *out = g_string_new(NULL), *ended = g_string_new(NULL);
    render_append(r, ended, text.data, text.length);
    render_append(r, ended, "\n", 1);
    const ValueList *lines = text_split_lines(r, (Text){ended->str, ended->len});
    for (size_t i = 0; lines != NULL && i < lines->n && !render_failed(r); i++) {
        Text line = lines->items[i].text;
        bool indents =
            i == 0 ? argument_truth(a[1], false) : line.length > 0 || argument_truth(a[2], false);
        render_append(r, out, "\n", i > 0);
        render_append(r, out, by.data, indents ? by.length : 0);
        render_append(r, out, line.data, line.length);
    }
    g_string_free(ended, TRUE);
    return value_take_buffer(r, out);
}

static Value filter_tojson(Render *r, Value v, const Value *a)
{
    JsonStyle style = {.ascii = argument_truth(a[1], false),
                       .sort_keys = argument_truth(a[3], false)};
    style.indent = argument_integer(r, a[0], -1);
    style.item_separator = style.indent >= 0 ? TEXT(",") : TEXT(", ");
    style.key_separator = TEXT(": ");
    if (a[2].kind == VALUE_LIST && a[2].list->n == 2) {
        style.item_separator = argument_text(r, a[2].list->items[0], style.item_separator);
        style.key_separator = argument_text(r, a[2].list->items[1], style.key_separator);
    } else if (a[2].kind != VALUE_UNDEFINED && a[2].kind != VALUE_NONE) {
        render_fail(r, "separators of tojson must be two strings");
    }
    GString *out = g_string_new(NULL);
    value_append_json(r, out, v, &style, 0);
    return value_take_buffer(r, out);
}

/* ---- numbers ---- */

/* int(text, base) of Python; false if it is none. */
static bool parse_integer(Text text, int64_t base, int64_t *out)
{
    text = text_strip(text, NULL, true, true);
    char digits[80];
    size_t n = 0;
    for (size_t i = 0; i < text.length; i++) {
        bool between = i > 0 && i + 1 < text.length && g_ascii_isalnum(text.data[i - 1]) &&
                       g_ascii_isalnum(text.data[i + 1]);
        if (text.data[i] == '_' && between) {
            continue;
        }
        if (n + 1 >= sizeof digits ||
            (!g_ascii_isalnum(text.data[i]) && !(i == 0 && strchr("+-", text.data[i]) != NULL))) {
            return false;
        }
        digits[n++] = text.data[i];
    }
    digits[n] = '\0';
    char *end;
    errno = 0;
    *out = g_ascii_strtoll(digits, &end, (guint)base);
    return n > 0 && *end == '\0' && end != digits && errno == 0;
}

static bool parse_real(Text text, double *out)
{
    text = text_strip(text, NULL, true, true);
    g_autofree char *copy = g_strndup(text.data, text.length);
    char *end;
    *out = g_ascii_strtod(copy, &end);
    return text.length > 0 && *end == '\0' && strpbrk(copy, "xXpP") == NULL;
}

static Value real_to_integer(Render *r, double d, Value fallback)
{
    if (!isfinite(d)) {
        return fallback;
    }
    if (fabs(d) >= 9.2e18) {
        render_fail(r, "integer arithmetic exceeds 64 bits");
        return fallback;
    }
    return value_int((int64_t)d);
}

static Value filter_int(Render *r, Value v, const Value *a)
{
    Value fallback = a[0].kind == VALUE_UNDEFINED ? value_int(0) : a[0];
    int64_t base = argument_integer(r, a[1], 10), integer;
    double real;
    if (v.kind == VALUE_UNDEFINED) {
        render_fail_undefined(r, v);
    }
    if (base != 0 && (base < 2 || base > 36)) {
        render_fail(r, "base %" G_GINT64_FORMAT " of int is not supported", base);
    }
    if (render_failed(r)) {
        return value_none();
    }
    if (value_is_integral(v)) {
        return value_int(value_integer(v));
    }
    if (v.kind == VALUE_FLOAT) {
        return real_to_integer(r, v.real, fallback);
    }
    if (v.kind != VALUE_STRING) {
        return fallback;
    }
    if (parse_integer(v.text, base, &integer)) {
        return value_int(integer);
    }
    return parse_real(v.text, &real) ? real_to_integer(r, real, fallback) : fallback;
}

static Value filter_float(Render *r, Value v, const Value *a)
{
    Value fallback = a[0].kind == VALUE_UNDEFINED ? value_float(0) : a[0];
    double real;
    if (v.kind == VALUE_UNDEFINED) {
        render_fail_undefined(r, v);
        return value_none();
    }
    if (value_is_number(v)) {
        return value_float(value_real(v));
    }
    return v.kind == VALUE_STRING && parse_real(v.text, &real) ? value_float(real) : fallback;
}

static Value filter_abs(Render *r, Value v, const Value *a)
{
    if (value_is_integral(v) && value_integer(v) != INT64_MIN) {
        return value_int(llabs(value_integer(v)));
    }
    if (v.kind == VALUE_FLOAT) {
        return value_float(fabs(v.real));
    }
    render_fail(r, "abs needs a number, not %s", value_kind_name(v));
    return value_none();
}

/* Rounding of the exact decimal value, half to even: printf does that, multiplying by a power of
 * ten does not. */
static double round_decimal(double d, int64_t precision)
{
    char text[512], pattern[16];
    if (precision < 0) {
        double scale = pow(10, (double)-precision);
        return nearbyint(d / scale) * scale;
    }
    g_snprintf(pattern, sizeof pattern, "%%.%df", (int)precision);
    g_ascii_formatd(text, sizeof text, pattern, d);
    return g_ascii_strtod(text, NULL);
}

static Value filter_round(Render *r, Value v, const Value *a)
{
    int64_t precision = argument_integer(r, a[0], 0);
    Text method = argument_text(r, a[1], TEXT("common"));
    if (!value_is_number(v) || precision < -15 || precision > 100) {
        render_fail(
            r, "round needs a number and a precision of -15 to 100, not %s and %" G_GINT64_FORMAT,
            value_kind_name(v), precision);
        return value_none();
    }
    if (text_equal(method, TEXT("common"))) {
        return value_is_integral(v) && precision >= 0
                   ? value_int(value_integer(v))
                   : value_float(round_decimal(value_real(v), precision));
    }
    double scale = pow(10, (double)precision);
    if (text_equal(method, TEXT("ceil"))) {
        return value_float(ceil(value_real(v) * scale) / scale);
    }
    if (text_equal(method, TEXT("floor"))) {
        return value_float(floor(value_real(v) * scale) / scale);
    }
    render_fail(r, "round knows the methods common, ceil and floor");
    return value_none();
}

/* ---- sequences ---- */

static Value filter_length(Render *r, Value v, const Value *a)
{
    return value_int(value_length(r, v));
}

static Value filter_default(Render *r, Value v, const Value *a)
{
    bool replaces = v.kind == VALUE_UNDEFINED || (argument_truth(a[1], false) && !value_truth(v));
    return !replaces ? v : a[0].kind == VALUE_UNDEFINED ? value_text(TEXT("")) : a[0];
}

static Value filter_first(Render *r, Value v, const Value *a)
{
    const ValueList *items = value_iterate(r, v);
    return items != NULL && items->n > 0 ? items->items[0] : value_missing(TEXT("0"));
}

static Value filter_last(Render *r, Value v, const Value *a)
{
    if (v.kind == VALUE_LIST && v.list->kind == LIST_GENERATOR) {
        render_fail(r, "a generator has no last element; make it a list first");
    }
    const ValueList *items = value_iterate(r, v);
    return items != NULL && items->n > 0 ? items->items[items->n - 1] : value_missing(TEXT("-1"));
}

static Value filter_list(Render *r, Value v, const Value *a)
{
    const ValueList *items = value_iterate(r, v);
    ValueList *copy = items != NULL && render_step(r, items->n / 16)
                          ? value_list_new(r, LIST_LIST, items->n)
                          : NULL;
    if (copy != NULL) {
        memcpy(copy->items, items->items, items->n * sizeof(Value));
    }
    return list_or_none(copy);
}

static Value filter_items(Render *r, Value v, const Value *a)
{
    if (v.kind == VALUE_UNDEFINED) {
        return list_or_none(value_list_new(r, LIST_GENERATOR, 0));
    }
    if (v.kind != VALUE_DICT) {
        render_fail(r, "items needs a dict, not %s", value_kind_name(v));
        return value_none();
    }
    Value items = render_call(r, template_method(r, v, TEXT("items")), &(Arguments){0});
    if (items.kind == VALUE_LIST) {
        items.list->kind = LIST_GENERATOR;
    }
    return items;
}

static Value filter_reverse(Render *r, Value v, const Value *a)
{
    const ValueList *items = value_iterate(r, v);
    ValueList *list = items != NULL && render_step(r, items->n / 16)
                          ? value_list_new(r, LIST_GENERATOR, items->n)
                          : NULL;
    for (size_t i = 0; list != NULL && i < items->n; i++) {
        list->items[i] = items->items[items->n - 1 - i];
    }
    if (v.kind != VALUE_STRING || list == NULL) {
        return list_or_none(list);
    }
    GString *out = g_string_new(NULL);
    for (size_t i = 0; i < list->n; i++) {
        render_append(r, out, list->items[i].text.data, list->items[i].text.length);
    }
    return value_take_buffer(r, out);
}

/* "a.b.0": one element after the other; a number is an index. */
static Value attribute_path(Render *r, Value v, Value path)
{
    if (path.kind != VALUE_STRING) {
        return render_element(r, v, path);
    }
    Text rest = path.text;
    for (;;) {
        gssize dot = text_find(rest, TEXT("."), 0);
        Text part = {rest.data, dot >= 0 ? (size_t)dot : rest.length};
        int64_t index;
        bool numeric = part.length > 0 && strspn(part.data, "0123456789") >= part.length &&
                       parse_integer(part, 10, &index);
        v = render_element(r, v, numeric ? value_int(index) : value_text(part));
        if (dot < 0 || render_failed(r)) {
            return v;
        }
        rest = (Text){rest.data + dot + 1, rest.length - (size_t)dot - 1};
    }
}

static Value filter_join(Render *r, Value v, const Value *a)
{
    const ValueList *items = value_iterate(r, v);
    Text separator = a[0].kind == VALUE_UNDEFINED ? TEXT("") : value_to_text(r, a[0]);
    GString *out = g_string_new(NULL);
    for (size_t i = 0; items != NULL && i < items->n && render_step(r, 1); i++) {
        Value item = a[1].kind == VALUE_UNDEFINED ? items->items[i]
                                                  : attribute_path(r, items->items[i], a[1]);
        Text text = render_failed(r) ? TEXT("") : value_to_text(r, item);
        render_append(r, out, separator.data, i > 0 ? separator.length : 0);
        render_append(r, out, text.data, text.length);
    }
    return value_take_buffer(r, out);
}

typedef struct SortItem {
    Value key, value;
} SortItem;

typedef struct SortOrder {
    Render *render;
    bool reverse, by_attribute;
} SortOrder;

/* The key by which values are ordered or told apart: an attribute perhaps, strings without case
 * unless it counts. */
static Value sort_key(Render *r, Value v, Value attribute, bool case_sensitive)
{
    Value key = attribute.kind == VALUE_UNDEFINED || attribute.kind == VALUE_NONE
                    ? v
                    : attribute_path(r, v, attribute);
    return key.kind == VALUE_STRING && !case_sensitive ? text_lower(r, key.text) : key;
}

static int compare_items(gconstpointer a, gconstpointer b, gpointer user)
{
    const SortOrder *order = user;
    Value x = ((const SortItem *)a)->key, y = ((const SortItem *)b)->key;
    /* Attributes are compared inside lists in Jinja, where equal ones (both missing, say) need no
     * order. */
    int result = order->by_attribute && value_equal(order->render, x, y)
                     ? 0
                     : value_compare(order->render, x, y);
    return order->reverse ? -result : result;
}

/* Stable, also in reverse. NULL after failing. */
static ValueList *sort_values(Render *r, const ValueList *items, bool reverse, bool case_sensitive,
                              Value attribute)
{
    SortItem *sorted = items != NULL ? render_alloc(r, MAX(items->n, 1), sizeof *sorted) : NULL;
    for (size_t i = 0; sorted != NULL && i < items->n && !render_failed(r); i++) {
        sorted[i] = (SortItem){.key = sort_key(r, items->items[i], attribute, case_sensitive),
                               .value = items->items[i]};
    }
    ValueList *list = sorted != NULL ? value_list_new(r, LIST_LIST, items->n) : NULL;
    if (list == NULL) {
        return NULL;
    }
    g_qsort_with_data(sorted, (gint)items->n, sizeof *sorted, compare_items,
                      &(SortOrder){.render = r,
                                   .reverse = reverse,
                                   .by_attribute = attribute.kind != VALUE_UNDEFINED});
    for (size_t i = 0; i < items->n; i++) {
        list->items[i] = sorted[i].value;
    }
    return list;
}

static Value filter_sort(Render *r, Value v, const Value *a)
{
    return list_or_none(sort_values(r, value_iterate(r, v), argument_truth(a[0], false),
                                    argument_truth(a[1], false), a[2]));
}

static Value filter_dictsort(Render *r, Value v, const Value *a)
{
    Text by = argument_text(r, a[1], TEXT("key"));
    if (v.kind == VALUE_UNDEFINED) {
        render_fail_undefined(r, v);
    }
    Value items = filter_items(r, v, a);
    if (items.kind != VALUE_LIST) {
        return value_none();
    }
    Value position = value_int(text_equal(by, TEXT("value")));
    return list_or_none(sort_values(r, items.list, argument_truth(a[2], false),
                                    argument_truth(a[0], false), position));
}

static Value extreme(Render *r, Value v, const Value *a, int sign)
{
    const ValueList *items = value_iterate(r, v);
    Value best = value_missing(TEXT("0")), best_key = best;
    for (size_t i = 0; items != NULL && i < items->n && !render_failed(r); i++) {
        Value key = sort_key(r, items->items[i], a[1], argument_truth(a[0], false));
        if (i == 0 || value_compare(r, key, best_key) * sign > 0) {
            best = items->items[i];
            best_key = key;
        }
    }
    return best;
}

static Value filter_min(Render *r, Value v, const Value *a)
{
    return extreme(r, v, a, -1);
}

static Value filter_max(Render *r, Value v, const Value *a)
{
    return extreme(r, v, a, 1);
}

static Value filter_unique(Render *r, Value v, const Value *a)
{
    const ValueList *items = value_iterate(r, v);
    ValueDict *seen = value_dict_new(r);
    ValueList *kept = items != NULL ? value_list_new(r, LIST_GENERATOR, items->n) : NULL;
    size_t n = 0;
    for (size_t i = 0; kept != NULL && seen != NULL && i < items->n && !render_failed(r); i++) {
        Value key = sort_key(r, items->items[i], a[1], argument_truth(a[0], false));
        if (value_dict_find(r, seen, key) == NULL) {
            value_dict_put(r, seen, key, value_none());
            kept->items[n++] = items->items[i];
        }
    }
    if (kept != NULL) {
        kept->n = n;
    }
    return list_or_none(kept);
}

static Value filter_sum(Render *r, Value v, const Value *a)
{
    const ValueList *items = value_iterate(r, v);
    Value total = a[1].kind == VALUE_UNDEFINED ? value_int(0) : a[1];
    for (size_t i = 0; items != NULL && i < items->n && render_step(r, 1); i++) {
        Value item = a[0].kind == VALUE_UNDEFINED || a[0].kind == VALUE_NONE
                         ? items->items[i]
                         : attribute_path(r, items->items[i], a[0]);
        total = render_failed(r) ? value_none() : render_arithmetic(r, OPERATOR_ADD, total, item);
    }
    return total;
}

/* ---- filters over elements ---- */

/* What map, select and their like go through: nothing for whatever is false, also where that cannot
 * be iterated. */
static const ValueList *iterate_unless_false(Render *r, Value v)
{
    return value_truth(v) ? value_iterate(r, v) : value_list_new(r, LIST_LIST, 0);
}

static Arguments arguments_rest(const Arguments *arguments, unsigned skip)
{
    return (Arguments){.positional = arguments->positional + skip,
                       .names = arguments->names,
                       .named = arguments->named,
                       .n_positional = arguments->n_positional - skip,
                       .n_named = arguments->n_named};
}

static Value map_one(Render *r, Value item, const Arguments *arguments)
{
    if (arguments->n_positional > 0) {
        Text name = argument_text(r, arguments->positional[0], TEXT(""));
        Arguments rest = arguments_rest(arguments, 1);
        return render_apply_filter(r, name, item, &rest);
    }
    Value bound[2];
    if (!arguments_bind(r, "map", arguments, "attribute default", 1, bound)) {
        return value_none();
    }
    Value found = attribute_path(r, item, bound[0]);
    return found.kind == VALUE_UNDEFINED && bound[1].kind != VALUE_UNDEFINED ? bound[1] : found;
}

static Value filter_map(Render *r, Value v, const Arguments *arguments)
{
    const ValueList *items = iterate_unless_false(r, v);
    ValueList *mapped = items != NULL ? value_list_new(r, LIST_GENERATOR, items->n) : NULL;
    for (size_t i = 0; mapped != NULL && i < items->n && render_step(r, 1); i++) {
        mapped->items[i] = map_one(r, items->items[i], arguments);
    }
    return list_or_none(mapped);
}

/* The elements for which a test (or, without one, their truth) has the wanted outcome; with
 * `attribute` it looks at one of theirs. */
static Value choose(Render *r, Value v, const Arguments *arguments, bool attribute, bool wanted)
{
    const ValueList *items = iterate_unless_false(r, v);
    ValueList *kept = items != NULL ? value_list_new(r, LIST_GENERATOR, items->n) : NULL;
    size_t n = 0;
    if (attribute && arguments->n_positional == 0) {
        render_fail(r, "selectattr and rejectattr need the name of an attribute");
    }
    for (size_t i = 0; kept != NULL && i < items->n && render_step(r, 1); i++) {
        Value looked = attribute ? attribute_path(r, items->items[i], arguments->positional[0])
                                 : items->items[i];
        bool holds;
        if (arguments->n_positional > attribute && !render_failed(r)) {
            Arguments rest = arguments_rest(arguments, attribute + 1u);
            holds = render_apply_test(
                r, argument_text(r, arguments->positional[attribute], TEXT("")), looked, &rest);
        } else {
            holds = value_truth(looked);
        }
        if (holds == wanted) {
            kept->items[n++] = items->items[i];
        }
    }
    if (kept != NULL) {
        kept->n = n;
    }
    return list_or_none(kept);
}

static Value filter_select(Render *r, Value v, const Arguments *arguments)
{
    return choose(r, v, arguments, false, true);
}

static Value filter_reject(Render *r, Value v, const Arguments *arguments)
{
    return choose(r, v, arguments, false, false);
}

static Value filter_selectattr(Render *r, Value v, const Arguments *arguments)
{
    return choose(r, v, arguments, true, true);
}

static Value filter_rejectattr(Render *r, Value v, const Arguments *arguments)
{
    return choose(r, v, arguments, true, false);
}

static const Builtin filters[] = {
    {"trim", "chars", 0, filter_trim, NULL},
    {"upper", "", 0, filter_upper, NULL},
    {"lower", "", 0, filter_lower, NULL},
    {"title", "", 0, filter_title, NULL},
    {"capitalize", "", 0, filter_capitalize, NULL},
    {"string", "", 0, filter_string, NULL},
    {"safe", "", 0, filter_safe, NULL},
    {"replace", "old new count", 2, filter_replace, NULL},
    {"indent", "width first blank", 0, filter_indent, NULL},
    {"tojson", "indent ensure_ascii separators sort_keys", 0, filter_tojson, NULL},
    {"int", "default base", 0, filter_int, NULL},
    {"float", "default", 0, filter_float, NULL},
    {"abs", "", 0, filter_abs, NULL},
    {"round", "precision method", 0, filter_round, NULL},
    {"length", "", 0, filter_length, NULL},
    {"count", "", 0, filter_length, NULL},
    {"default", "default_value boolean", 0, filter_default, NULL},
    {"d", "default_value boolean", 0, filter_default, NULL},
    {"first", "", 0, filter_first, NULL},
    {"last", "", 0, filter_last, NULL},
    {"list", "", 0, filter_list, NULL},
    {"items", "", 0, filter_items, NULL},
    {"reverse", "", 0, filter_reverse, NULL},
    {"join", "d attribute", 0, filter_join, NULL},
    {"sort", "reverse case_sensitive attribute", 0, filter_sort, NULL},
    {"dictsort", "case_sensitive by reverse", 0, filter_dictsort, NULL},
    {"min", "case_sensitive attribute", 0, filter_min, NULL},
    {"max", "case_sensitive attribute", 0, filter_max, NULL},
    {"unique", "case_sensitive attribute", 0, filter_unique, NULL},
    {"sum", "attribute start", 0, filter_sum, NULL},
    {"map", "", 0, NULL, filter_map},
    {"select", "", 0, NULL, filter_select},
    {"reject", "", 0, NULL, filter_reject},
    {"selectattr", "", 0, NULL, filter_selectattr},
    {"rejectattr", "", 0, NULL, filter_rejectattr},
};

Value render_apply_filter(Render *r, Text name, Value subject, const Arguments *arguments)
{
    const Builtin *filter = builtin_find(filters, G_N_ELEMENTS(filters), name);
    if (filter == NULL) {
        render_fail(r, "filter %.*s is not supported", (int)MIN(name.length, 64), name.data);
        return value_none();
    }
    return builtin_call(r, filter, subject, arguments);
}
