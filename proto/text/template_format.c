/* Values as text: str(), repr() and json.dumps() of Python. */
#include "proto/text/template_render.h"

#include <math.h>
#include <string.h>
#include <utf8proc.h>

static void append(Render *r, GString *out, const char *text)
{
    render_append(r, out, text, strlen(text));
}

/* The shortest decimal that reads back as the same number, laid out as Python's repr does (exponent
 * below 1e-4 and from 1e16). */
static void append_float(Render *r, GString *out, double d, const char *infinity,
                         const char *nan_name)
{
    if (!isfinite(d)) {
        append(r, out, isnan(d) ? nan_name : d < 0 ? "-" : "");
        append(r, out, isnan(d) ? "" : infinity);
        return;
    }
    char text[64], pattern[8];
    for (int precision = 0; precision <= 16; precision++) {
        g_snprintf(pattern, sizeof pattern, "%%.%de", precision);
        g_ascii_formatd(text, sizeof text, pattern, d);
        if (g_ascii_strtod(text, NULL) == d) {
            break;
        }
    }
    char *e = strchr(text, 'e');
    int exponent = (int)g_ascii_strtoll(e + 1, NULL, 10);
    *e = '\0';
    char digits[32];
    size_t n = 0;
    for (const char *p = text; *p != '\0'; p++) {
        if (g_ascii_isdigit(*p)) {
            digits[n++] = *p;
        }
    }
    g_autoptr(GString) shown = g_string_new(text[0] == '-' ? "-" : "");
    if (exponent < -4 || exponent >= 16) {
        g_string_append_c(shown, digits[0]);
        if (n > 1) {
            g_string_append_c(shown, '.');
            g_string_append_len(shown, digits + 1, (gssize)n - 1);
        }
        g_string_append_printf(shown, "e%c%02d", exponent < 0 ? '-' : '+', ABS(exponent));
    } else if (exponent < 0) {
        g_string_append(shown, "0.");
        for (int i = -1; i > exponent; i--) {
            g_string_append_c(shown, '0');
        }
        g_string_append_len(shown, digits, (gssize)n);
    } else {
        for (int i = 0; i <= exponent; i++) {
            g_string_append_c(shown, (size_t)i < n ? digits[i] : '0');
        }
        g_string_append_c(shown, '.');
        if (n > (size_t)exponent + 1) {
            g_string_append_len(shown, digits + exponent + 1, (gssize)n - exponent - 1);
        } else {
            g_string_append_c(shown, '0');
        }
    }
    render_append(r, out, shown->str, shown->len);
}

static bool is_printable(uint32_t code)
{
    utf8proc_category_t category = utf8proc_category((utf8proc_int32_t)code);
    bool separates = category == UTF8PROC_CATEGORY_ZS || category == UTF8PROC_CATEGORY_ZL ||
                     category == UTF8PROC_CATEGORY_ZP;
    bool other = category == UTF8PROC_CATEGORY_CC || category == UTF8PROC_CATEGORY_CF ||
                 category == UTF8PROC_CATEGORY_CS || category == UTF8PROC_CATEGORY_CO ||
                 category == UTF8PROC_CATEGORY_CN;
    return code == ' ' || (!separates && !other);
}

static void append_quoted(Render *r, GString *out, Text text)
{
    bool single =
        memchr(text.data, '\'', text.length) != NULL && memchr(text.data, '"', text.length) == NULL;
    char quote = single ? '"' : '\'';
    render_append(r, out, &quote, 1);
    for (size_t at = 0; at < text.length && !render_failed(r);) {
        uint32_t code;
        size_t step = text_step((Text){text.data + at, text.length - at}, &code);
        char escape[16] = "";
        if (code == (uint32_t)quote || code == '\\') {
            g_snprintf(escape, sizeof escape, "\\%c", (char)code);
        } else if (code == '\n' || code == '\r' || code == '\t') {
            g_snprintf(escape, sizeof escape, "\\%c",
                       code == '\n'   ? 'n'
                       : code == '\r' ? 'r'
                                      : 't');
        } else if (!is_printable(code)) {
            g_snprintf(escape, sizeof escape,
                       code < 0x100     ? "\\x%02x"
                       : code < 0x10000 ? "\\u%04x"
                                        : "\\U%08x",
                       code);
        }
        if (escape[0] != '\0') {
            append(r, out, escape);
        } else {
            render_append(r, out, text.data + at, step);
        }
        at += step;
    }
    render_append(r, out, &quote, 1);
}

static void append_list_repr(Render *r, GString *out, const ValueList *list, unsigned depth)
{
    bool tuple = list->kind == LIST_TUPLE;
    append(r, out, tuple ? "(" : "[");
    for (size_t i = 0; i < list->n && !render_failed(r); i++) {
        append(r, out, i > 0 ? ", " : "");
        value_append_repr(r, out, list->items[i], depth + 1);
    }
    append(r, out, tuple ? list->n == 1 ? ",)" : ")" : "]");
}

static void append_dict_repr(Render *r, GString *out, const ValueDict *dict, unsigned depth)
{
    append(r, out, "{");
    for (size_t i = 0; i < dict->n && !render_failed(r); i++) {
        append(r, out, i > 0 ? ", " : "");
        value_append_repr(r, out, dict->keys[i], depth + 1);
        append(r, out, ": ");
        value_append_repr(r, out, dict->values[i], depth + 1);
    }
    append(r, out, "}");
}

void value_append_repr(Render *r, GString *out, Value v, unsigned depth)
{
    if (depth > r->limits.depth) {
        render_fail(r, "a value is nested deeper than %u levels", r->limits.depth);
    }
    if (!render_step(r, 1)) {
        return;
    }
    char number[32];
    switch (v.kind) {
    case VALUE_UNDEFINED:
        append(r, out, depth > 0 ? "Undefined" : "");
        break;
    case VALUE_NONE:
        append(r, out, "None");
        break;
    case VALUE_BOOL:
        append(r, out, v.boolean ? "True" : "False");
        break;
    case VALUE_INT:
        g_snprintf(number, sizeof number, "%" G_GINT64_FORMAT, v.integer);
        append(r, out, number);
        break;
    case VALUE_FLOAT:
        append_float(r, out, v.real, "inf", "nan");
        break;
    case VALUE_STRING:
        append_quoted(r, out, v.text);
        break;
    case VALUE_LIST:
        append_list_repr(r, out, v.list, depth);
        break;
    case VALUE_DICT:
        append_dict_repr(r, out, v.dict, depth);
        break;
    default:
        render_fail(r, "a %s cannot be written as text", value_kind_name(v));
        break;
    }
}

Text value_to_text(Render *r, Value v)
{
    if (v.kind == VALUE_STRING) {
        return v.text;
    }
    if (v.kind == VALUE_UNDEFINED) {
        return TEXT("");
    }
    GString *out = g_string_new(NULL);
    value_append_repr(r, out, v, 0);
    Value text = value_take_buffer(r, out);
    return text.kind == VALUE_STRING ? text.text : TEXT("");
}

static void append_json_text(Render *r, GString *out, Text text, bool ascii)
{
    append(r, out, "\"");
    for (size_t at = 0; at < text.length && !render_failed(r);) {
        uint32_t code;
        size_t step = text_step((Text){text.data + at, text.length - at}, &code);
        static const char from[] = "\"\\\n\r\t\f\b", to[] = "\"\\nrtfb";
        const char *simple = code != 0 && code < 0x80 ? strchr(from, (char)code) : NULL;
        char escape[16] = "";
        if (simple != NULL) {
            g_snprintf(escape, sizeof escape, "\\%c", to[simple - from]);
        } else if (code < 0x20 || (ascii && code >= 0x7F && code < 0x10000)) {
            g_snprintf(escape, sizeof escape, "\\u%04x", code);
        } else if (ascii && code >= 0x10000) {
            g_snprintf(escape, sizeof escape, "\\u%04x\\u%04x", 0xD800 + ((code - 0x10000) >> 10),
                       0xDC00 + ((code - 0x10000) & 0x3FF));
        }
        if (escape[0] != '\0') {
            append(r, out, escape);
        } else {
            render_append(r, out, text.data + at, step);
        }
        at += step;
    }
    append(r, out, "\"");
}

static void append_json_break(Render *r, GString *out, const JsonStyle *style, unsigned depth)
{
    if (style->indent < 0) {
        return;
    }
    append(r, out, "\n");
    for (int64_t i = 0; i < style->indent * depth && !render_failed(r); i++) {
        append(r, out, " ");
    }
}

static void append_json_list(Render *r, GString *out, const ValueList *list, const JsonStyle *style,
                             unsigned depth)
{
    append(r, out, "[");
    for (size_t i = 0; i < list->n && !render_failed(r); i++) {
        render_append(r, out, style->item_separator.data, i > 0 ? style->item_separator.length : 0);
        append_json_break(r, out, style, depth + 1);
        value_append_json(r, out, list->items[i], style, depth + 1);
    }
    if (list->n > 0) {
        append_json_break(r, out, style, depth);
    }
    append(r, out, "]");
}

/* Keys are strings in JSON: true, null and numbers are spelled. */
static void append_json_key(Render *r, GString *out, Value key, const JsonStyle *style)
{
    if (key.kind == VALUE_STRING) {
        append_json_text(r, out, key.text, style->ascii);
        return;
    }
    append(r, out, "\"");
    value_append_json(r, out, key, style, 0);
    append(r, out, "\"");
}

static int compare_keys(gconstpointer a, gconstpointer b, gpointer user)
{
    const Value *keys = ((void **)user)[1];
    return value_compare(((void **)user)[0], keys[*(const size_t *)a], keys[*(const size_t *)b]);
}

static void append_json_dict(Render *r, GString *out, const ValueDict *dict, const JsonStyle *style,
                             unsigned depth)
{
    size_t *order = render_alloc(r, MAX(dict->n, 1), sizeof *order);
    for (size_t i = 0; order != NULL && i < dict->n; i++) {
        order[i] = i;
    }
    if (order != NULL && style->sort_keys) {
        void *user[2] = {r, dict->keys};
        g_qsort_with_data(order, (gint)dict->n, sizeof *order, compare_keys, user);
    }
    append(r, out, "{");
    for (size_t i = 0; i < dict->n && !render_failed(r); i++) {
        render_append(r, out, style->item_separator.data, i > 0 ? style->item_separator.length : 0);
        append_json_break(r, out, style, depth + 1);
        append_json_key(r, out, dict->keys[order[i]], style);
        render_append(r, out, style->key_separator.data, style->key_separator.length);
        value_append_json(r, out, dict->values[order[i]], style, depth + 1);
    }
    if (dict->n > 0) {
        append_json_break(r, out, style, depth);
    }
    append(r, out, "}");
}

void value_append_json(Render *r, GString *out, Value v, const JsonStyle *style, unsigned depth)
{
    if (depth > r->limits.depth) {
        render_fail(r, "a value is nested deeper than %u levels", r->limits.depth);
    }
    if (!render_step(r, 1)) {
        return;
    }
    switch (v.kind) {
    case VALUE_NONE:
        append(r, out, "null");
        break;
    case VALUE_BOOL:
        append(r, out, v.boolean ? "true" : "false");
        break;
    case VALUE_INT:
        value_append_repr(r, out, v, 0);
        break;
    case VALUE_FLOAT:
        append_float(r, out, v.real, "Infinity", "NaN");
        break;
    case VALUE_STRING:
        append_json_text(r, out, v.text, style->ascii);
        break;
    case VALUE_LIST:
        if (v.list->kind == LIST_GENERATOR) {
            render_fail(r, "a generator cannot be written as JSON; make it a list first");
        } else {
            append_json_list(r, out, v.list, style, depth);
        }
        break;
    case VALUE_DICT:
        append_json_dict(r, out, v.dict, style, depth);
        break;
    default:
        render_fail(r, "%s cannot be written as JSON", value_kind_name(v));
        break;
    }
}
