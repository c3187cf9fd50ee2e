/* Calling built-ins: arguments to parameters; the global functions. */
#include "proto/text/template_render.h"

#include <locale.h>
#include <string.h>
#include <time.h>

const Builtin *builtin_find(const Builtin *table, size_t n, Text name)
{
    for (size_t i = 0; i < n; i++) {
        if (text_equal((Text){table[i].name, strlen(table[i].name)}, name)) {
            return &table[i];
        }
    }
    return NULL;
}

/* Index of a parameter in "a b c", -1 if it is not there. */
static int parameter_index(const char *parameters, const char *name)
{
    size_t n = strlen(name);
    int index = 0;
    for (const char *p = parameters; *p != '\0'; index++) {
        const char *end = strchrnul(p, ' ');
        if ((size_t)(end - p) == n && memcmp(p, name, n) == 0) {
            return index;
        }
        p = *end == ' ' ? end + 1 : end;
    }
    return -1;
}

static unsigned parameter_count(const char *parameters)
{
    unsigned n = parameters[0] != '\0';
    for (const char *p = parameters; *p != '\0'; p++) {
        n += *p == ' ';
    }
    return n;
}

bool arguments_bind(Render *r, const char *what, const Arguments *arguments, const char *parameters,
                    unsigned required, Value *out)
{
    unsigned n = parameter_count(parameters);
    bool given[PARAMETERS_MAX] = {false};
    g_assert(n <= PARAMETERS_MAX);
    if (arguments->n_positional > n) {
        render_fail(r, "%s takes at most %u arguments, not %u", what, n, arguments->n_positional);
        return false;
    }
    for (unsigned i = 0; i < n; i++) {
        given[i] = i < arguments->n_positional;
        out[i] = given[i] ? arguments->positional[i] : value_undefined(TEXT(""));
    }
    for (unsigned i = 0; i < arguments->n_named; i++) {
        int at = parameter_index(parameters, arguments->names[i]);
        if (at < 0 || given[at]) {
            render_fail(r, "%s has no free parameter %.64s", what, arguments->names[i]);
            return false;
        }
        given[at] = true;
        out[at] = arguments->named[i];
    }
    for (unsigned i = 0; i < required; i++) {
        if (!given[i]) {
            render_fail(r, "%s needs %u arguments", what, required);
            return false;
        }
    }
    return true;
}

Value builtin_call(Render *r, const Builtin *builtin, Value self, const Arguments *arguments)
{
    Value bound[PARAMETERS_MAX];
    if (!render_step(r, 1)) {
        return value_none();
    }
    if (builtin->call_open != NULL) {
        return builtin->call_open(r, self, arguments);
    }
    if (!arguments_bind(r, builtin->name, arguments, builtin->parameters, builtin->required,
                        bound)) {
        return value_none();
    }
    return builtin->call(r, self, bound);
}

Text argument_text(Render *r, Value v, Text fallback)
{
    if (v.kind == VALUE_UNDEFINED || v.kind == VALUE_NONE) {
        return fallback;
    }
    if (v.kind != VALUE_STRING) {
        render_fail(r, "a string is needed, not %s", value_kind_name(v));
        return fallback;
    }
    return v.text;
}

int64_t argument_integer(Render *r, Value v, int64_t fallback)
{
    if (v.kind == VALUE_UNDEFINED || v.kind == VALUE_NONE) {
        return fallback;
    }
    if (!value_is_integral(v)) {
        render_fail(r, "an integer is needed, not %s", value_kind_name(v));
        return fallback;
    }
    return value_integer(v);
}

bool argument_truth(Value v, bool fallback)
{
    return v.kind == VALUE_UNDEFINED ? fallback : value_truth(v);
}

enum { RANGE_MAX = 100000 };

static Value function_range(Render *r, Value self, const Value *a)
{
    bool one = a[1].kind == VALUE_UNDEFINED;
    if (a[0].kind == VALUE_UNDEFINED) {
        render_fail_undefined(r, a[0]);
    }
    int64_t start = one ? 0 : argument_integer(r, a[0], 0),
            stop = argument_integer(r, one ? a[0] : a[1], 0), step = argument_integer(r, a[2], 1);
    if (step == 0) {
        render_fail(r, "the step of range() is 0");
    }
    __int128 distance = step > 0 ? (__int128)stop - start : (__int128)start - stop,
             width = step > 0 ? step : -(__int128)step;
    __int128 n = distance > 0 && !render_failed(r) ? (distance - 1) / width + 1 : 0;
    if (n > RANGE_MAX) {
        render_fail(r, "range() of more than %d numbers", RANGE_MAX);
    }
    ValueList *list = render_step(r, (size_t)n) ? value_list_new(r, LIST_LIST, (size_t)n) : NULL;
    for (size_t i = 0; list != NULL && i < list->n; i++) {
        list->items[i] = value_int(start + (int64_t)i * step);
    }
    return list != NULL ? value_list(list) : value_none();
}

/* dict(a=1) and namespace(a=1); both also take one dict. */
static Value make_dict(Render *r, const Arguments *arguments, ValueKind kind)
{
    ValueDict *dict = value_dict_new(r);
    if (dict == NULL) {
        return value_none();
    }
    if (arguments->n_positional > 1 ||
        (arguments->n_positional == 1 && arguments->positional[0].kind != VALUE_DICT)) {
        render_fail(r, "dict() and namespace() take one dict and named values");
        return value_none();
    }
    const ValueDict *base = arguments->n_positional == 1 ? arguments->positional[0].dict : NULL;
    for (size_t i = 0; base != NULL && i < base->n; i++) {
        value_dict_put(r, dict, base->keys[i], base->values[i]);
    }
    for (unsigned i = 0; i < arguments->n_named; i++) {
        value_dict_put(r, dict,
                       value_text((Text){arguments->names[i], strlen(arguments->names[i])}),
                       arguments->named[i]);
    }
    return (Value){.kind = kind, .dict = dict};
}

static Value function_dict(Render *r, Value self, const Arguments *arguments)
{
    return make_dict(r, arguments, VALUE_DICT);
}

static Value function_namespace(Render *r, Value self, const Arguments *arguments)
{
    return make_dict(r, arguments, VALUE_NAMESPACE);
}

static Value function_raise_exception(Render *r, Value self, const Value *a)
{
    Text message = value_to_text(r, a[0]);
    render_fail(r, "%.*s", (int)MIN(message.length, 1024), message.data);
    return value_none();
}

/* The caller's time in UTC: two gateways in different zones must render the same prompt. */
static Value function_strftime_now(Render *r, Value self, const Value *a)
{
    Text format = argument_text(r, a[0], TEXT(""));
    g_autofree char *pattern = g_strndup(format.data, format.length);
    char out[512];
    struct tm now;
    time_t seconds = (time_t)r->limits.now_s;
    locale_t c = newlocale(LC_ALL_MASK, "C", (locale_t)0);
    size_t n = format.length > 0 && format.length < 256 && gmtime_r(&seconds, &now) != NULL
                   ? strftime_l(out, sizeof out, pattern, &now, c)
                   : 0;
    freelocale(c);
    if (n == 0 && format.length > 0) {
        render_fail(r, "time format of %zu bytes is too long", format.length);
    }
    return value_copy_text(r, out, n);
}

const Builtin *template_function(const Render *r, const char *name)
{
    static const Builtin functions[] = {
        {"range", "start stop step", 1, function_range, NULL},
        {"dict", "", 0, NULL, function_dict},
        {"namespace", "", 0, NULL, function_namespace},
        {"raise_exception", "message", 1, function_raise_exception, NULL},
        {"strftime_now", "format", 1, function_strftime_now, NULL},
    };
    size_t n = G_N_ELEMENTS(functions) - (r->limits.now_s == 0); /* strftime_now is the last */
    return builtin_find(functions, n, (Text){name, strlen(name)});
}
