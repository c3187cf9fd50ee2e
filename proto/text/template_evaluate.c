/* Expressions. */
#include "proto/text/template_render.h"

#include <math.h>
#include <string.h>

/* Expressions nest inside blocks and macros; the C stack holds both. */
enum { EXPRESSIONS_PER_BLOCK = 4 };

static Value fail_operands(Render *r, const char *what, Value a, Value b)
{
    if (a.kind == VALUE_UNDEFINED || b.kind == VALUE_UNDEFINED) {
        render_fail_undefined(r, a.kind == VALUE_UNDEFINED ? a : b);
    } else {
        render_fail(r, "%s of %s and %s is not possible", what, value_kind_name(a),
                    value_kind_name(b));
    }
    return value_none();
}

static Value fail_overflow(Render *r)
{
    render_fail(r, "integer arithmetic exceeds 64 bits");
    return value_none();
}

static Value join_lists(Render *r, const ValueList *a, const ValueList *b)
{
    ValueList *list =
        render_step(r, (a->n + b->n) / 16) ? value_list_new(r, a->kind, a->n + b->n) : NULL;
    if (list == NULL) {
        return value_none();
    }
    memcpy(list->items, a->items, a->n * sizeof *list->items);
    memcpy(list->items + a->n, b->items, b->n * sizeof *list->items);
    return value_list(list);
}

static Value join_texts(Render *r, Text a, Text b)
{
    GString *out = g_string_sized_new(0);
    render_append(r, out, a.data, a.length);
    render_append(r, out, b.data, b.length);
    return value_take_buffer(r, out);
}

static Value add(Render *r, Value a, Value b)
{
    int64_t sum;
    if (value_is_integral(a) && value_is_integral(b)) {
        return __builtin_add_overflow(value_integer(a), value_integer(b), &sum) ? fail_overflow(r)
                                                                                : value_int(sum);
    }
    if (value_is_number(a) && value_is_number(b)) {
        return value_float(value_real(a) + value_real(b));
    }
    if (a.kind == VALUE_STRING && b.kind == VALUE_STRING) {
        return join_texts(r, a.text, b.text);
    }
    if (a.kind == VALUE_LIST && b.kind == VALUE_LIST && a.list->kind == b.list->kind &&
        a.list->kind != LIST_GENERATOR) {
        return join_lists(r, a.list, b.list);
    }
    return fail_operands(r, "the sum", a, b);
}

static Value repeat(Render *r, Value v, int64_t times)
{
    if (v.kind == VALUE_STRING) {
        GString *out = g_string_new(NULL);
        for (int64_t i = 0; i < times && v.text.length > 0 && render_step(r, 1); i++) {
            render_append(r, out, v.text.data, v.text.length);
        }
        return value_take_buffer(r, out);
    }
    size_t n = 0;
    if (__builtin_mul_overflow(v.list->n, (size_t)MAX(times, 0), &n) || !render_step(r, n)) {
        render_fail(r, "more than %zu steps", r->limits.steps);
        return value_none();
    }
    ValueList *list = value_list_new(r, v.list->kind, n);
    for (size_t i = 0; list != NULL && i < n; i++) {
        list->items[i] = v.list->items[i % v.list->n];
    }
    return list != NULL ? value_list(list) : value_none();
}

static bool is_repeatable(Value v)
{
    return v.kind == VALUE_STRING || (v.kind == VALUE_LIST && v.list->kind != LIST_GENERATOR);
}

static Value multiply(Render *r, Value a, Value b)
{
    int64_t product;
    if (value_is_integral(a) && value_is_integral(b)) {
        return __builtin_mul_overflow(value_integer(a), value_integer(b), &product)
                   ? fail_overflow(r)
                   : value_int(product);
    }
    if (value_is_number(a) && value_is_number(b)) {
        return value_float(value_real(a) * value_real(b));
    }
    if (is_repeatable(a) && value_is_integral(b)) {
        return repeat(r, a, value_integer(b));
    }
    if (value_is_integral(a) && is_repeatable(b)) {
        return repeat(r, b, value_integer(a));
    }
    return fail_operands(r, "the product", a, b);
}

/* Python's floor division and modulo: the remainder has the sign of the divisor. */
static Value divide_integers(Render *r, Operator op, int64_t a, int64_t b)
{
    if (b == -1) {
        int64_t negated;
        if (op == OPERATOR_MODULO) {
            return value_int(0);
        }
        return __builtin_sub_overflow((int64_t)0, a, &negated) ? fail_overflow(r)
                                                               : value_int(negated);
    }
    int64_t quotient = a / b, remainder = a % b;
    if (remainder != 0 && (remainder < 0) != (b < 0)) {
        quotient--;
        remainder += b;
    }
    return value_int(op == OPERATOR_MODULO ? remainder : quotient);
}

static Value divide(Render *r, Operator op, Value a, Value b)
{
    if (!value_is_number(a) || !value_is_number(b)) {
        return fail_operands(r, "the quotient", a, b);
    }
    if (value_real(b) == 0) {
        render_fail(r, "division by zero");
        return value_none();
    }
    if (op != OPERATOR_DIVIDE && value_is_integral(a) && value_is_integral(b)) {
        return divide_integers(r, op, value_integer(a), value_integer(b));
    }
    double x = value_real(a), y = value_real(b);
    if (op == OPERATOR_DIVIDE) {
        return value_float(x / y);
    }
    double remainder = fmod(x, y);
    if (remainder != 0 && (remainder < 0) != (y < 0)) {
        remainder += y;
    }
    return value_float(op == OPERATOR_MODULO ? remainder : floor((x - remainder) / y + 0.5));
}

static Value power(Render *r, Value a, Value b)
{
    if (!value_is_number(a) || !value_is_number(b)) {
        return fail_operands(r, "the power", a, b);
    }
    if (!value_is_integral(a) || !value_is_integral(b) || value_integer(b) < 0) {
        return value_float(pow(value_real(a), value_real(b)));
    }
    int64_t result = 1, base = value_integer(a), exponent = value_integer(b);
    if (base >= -1 && base <= 1) {
        return value_int(base == -1 && exponent % 2 == 0 ? 1 : exponent == 0 ? 1 : base);
    }
    for (int64_t i = 0; i < exponent; i++) {
        if (__builtin_mul_overflow(result, base, &result)) {
            return fail_overflow(r);
        }
    }
    return value_int(result);
}

static Value subtract(Render *r, Value a, Value b)
{
    int64_t difference;
    if (value_is_integral(a) && value_is_integral(b)) {
        return __builtin_sub_overflow(value_integer(a), value_integer(b), &difference)
                   ? fail_overflow(r)
                   : value_int(difference);
    }
    if (value_is_number(a) && value_is_number(b)) {
        return value_float(value_real(a) - value_real(b));
    }
    return fail_operands(r, "the difference", a, b);
}

Value render_arithmetic(Render *r, Operator op, Value a, Value b)
{
    switch (op) {
    case OPERATOR_ADD:
        return add(r, a, b);
    case OPERATOR_SUBTRACT:
        return subtract(r, a, b);
    case OPERATOR_MULTIPLY:
        return multiply(r, a, b);
    case OPERATOR_POWER:
        return power(r, a, b);
    default:
        return divide(r, op, a, b);
    }
}

static bool compare(Render *r, Operator op, Value a, Value b)
{
    switch (op) {
    case OPERATOR_EQUAL:
        return value_equal(r, a, b);
    case OPERATOR_NOT_EQUAL:
        return !value_equal(r, a, b);
    case OPERATOR_IN:
        return value_contains(r, b, a);
    case OPERATOR_NOT_IN:
        return !value_contains(r, b, a);
    default:
        break;
    }
    bool nan = (a.kind == VALUE_FLOAT && isnan(a.real)) || (b.kind == VALUE_FLOAT && isnan(b.real));
    int order = value_compare(r, a, b);
    return !nan && (op == OPERATOR_LESS         ? order < 0
                    : op == OPERATOR_LESS_EQUAL ? order <= 0
                    : op == OPERATOR_GREATER    ? order > 0
                                                : order >= 0);
}

static Value evaluate_name(Render *r, const char *name)
{
    const Value *variable = render_find(r, name);
    if (variable != NULL) {
        return *variable;
    }
    const Builtin *function = template_function(r, name);
    if (function != NULL) {
        return (Value){.kind = VALUE_FUNCTION, .function = function};
    }
    return value_undefined((Text){name, strlen(name)});
}

static Value evaluate_list(Render *r, const Expression *e)
{
    ValueList *list =
        value_list_new(r, e->kind == EXPRESSION_TUPLE ? LIST_TUPLE : LIST_LIST, e->n_operands);
    for (unsigned i = 0; list != NULL && i < e->n_operands && !render_failed(r); i++) {
        list->items[i] = render_expression(r, e->operands[i]);
    }
    return list != NULL ? value_list(list) : value_none();
}

static Value evaluate_dict(Render *r, const Expression *e)
{
    ValueDict *dict = value_dict_new(r);
    for (unsigned i = 0; dict != NULL && i + 1 < e->n_operands && !render_failed(r); i += 2) {
        Value key = render_expression(r, e->operands[i]),
              value = render_expression(r, e->operands[i + 1]);
        value_dict_put(r, dict, key, value);
    }
    return dict != NULL ? value_dict(dict) : value_none();
}

static Value evaluate_concat(Render *r, const Expression *e)
{
    GString *out = g_string_new(NULL);
    for (unsigned i = 0; i < e->n_operands && !render_failed(r); i++) {
        Text text = value_to_text(r, render_expression(r, e->operands[i]));
        render_append(r, out, text.data, text.length);
    }
    return value_take_buffer(r, out);
}

static Value evaluate_chain(Render *r, const Expression *e)
{
    Value value = render_expression(r, e->operands[0]);
    for (unsigned i = 1; i < e->n_operands && !render_failed(r); i++) {
        Value next = render_expression(r, e->operands[i]);
        if (render_step(r, 1)) {
            value = render_arithmetic(r, e->operators[i - 1], value, next);
        }
    }
    return value;
}

static Value evaluate_compare(Render *r, const Expression *e)
{
    Value left = render_expression(r, e->operands[0]);
    bool holds = true;
    for (unsigned i = 1; i < e->n_operands && holds && !render_failed(r); i++) {
        Value right = render_expression(r, e->operands[i]);
        holds = !render_failed(r) && compare(r, e->operators[i - 1], left, right);
        left = right;
    }
    return value_bool(holds);
}

/* The value that decides, as in Python. */
static Value evaluate_logic(Render *r, const Expression *e, bool stops_at)
{
    Value value = value_none();
    for (unsigned i = 0; i < e->n_operands && !render_failed(r); i++) {
        value = render_expression(r, e->operands[i]);
        if (value_truth(value) == stops_at) {
            break;
        }
    }
    return value;
}

static Value evaluate_sign(Render *r, Value v, bool negate)
{
    int64_t negated;
    if (value_is_integral(v)) {
        if (!negate) {
            return value_int(value_integer(v));
        }
        return __builtin_sub_overflow((int64_t)0, value_integer(v), &negated) ? fail_overflow(r)
                                                                              : value_int(negated);
    }
    if (v.kind == VALUE_FLOAT) {
        return value_float(negate ? -v.real : v.real);
    }
    return fail_operands(r, "the sign", v, v);
}

/* One bound of a slice, clamped as Python does. */
static int64_t slice_bound(Value v, int64_t n, int64_t fallback, int64_t low, int64_t high)
{
    if (v.kind == VALUE_NONE) {
        return fallback;
    }
    int64_t i = value_integer(v);
    if (i < 0) {
        i = i < -n ? -1 : i + n;
    }
    return CLAMP(i, low, high);
}

static Value evaluate_slice(Render *r, Value v, const PostfixStep *step)
{
    Value bounds[3];
    bool sliceable = is_repeatable(v);
    for (int i = 0; i < 3; i++) {
        bounds[i] =
            step->operands[i] != NULL ? render_expression(r, step->operands[i]) : value_none();
        sliceable &= bounds[i].kind == VALUE_NONE || value_is_integral(bounds[i]);
    }
    if (v.kind == VALUE_UNDEFINED) {
        render_fail_undefined(r, v);
    }
    int64_t by = value_is_integral(bounds[2]) ? value_integer(bounds[2]) : 1;
    if (by == 0 && sliceable) {
        render_fail(r, "the step of a slice is 0");
    }
    if (!sliceable) {
        render_fail(r, "%s cannot be sliced by %s, %s, %s", value_kind_name(v),
                    value_kind_name(bounds[0]), value_kind_name(bounds[1]),
                    value_kind_name(bounds[2]));
    }
    const ValueList *items = render_failed(r) ? NULL : value_iterate(r, v);
    if (items == NULL) {
        return value_none();
    }
    int64_t n = (int64_t)items->n;
    int64_t first =
        by > 0 ? slice_bound(bounds[0], n, 0, 0, n) : slice_bound(bounds[0], n, n - 1, -1, n - 1);
    int64_t last =
        by > 0 ? slice_bound(bounds[1], n, n, 0, n) : slice_bound(bounds[1], n, -1, -1, n - 1);
    int64_t distance = by > 0 ? last - first : first - last;
    uint64_t stride = by > 0 ? (uint64_t)by : 0u - (uint64_t)by;
    size_t count = distance > 0 ? (size_t)(((uint64_t)distance - 1) / stride + 1) : 0;
    ValueList *list =
        render_step(r, count)
            ? value_list_new(r, v.kind == VALUE_LIST ? v.list->kind : LIST_LIST, count)
            : NULL;
    for (size_t i = 0; list != NULL && i < count; i++) {
        list->items[i] = items->items[first + (int64_t)i * by];
    }
    if (list == NULL || v.kind == VALUE_LIST) {
        return list != NULL ? value_list(list) : value_none();
    }
    GString *out = g_string_new(NULL);
    for (size_t i = 0; i < count && !render_failed(r); i++) {
        render_append(r, out, list->items[i].text.data, list->items[i].text.length);
    }
    return value_take_buffer(r, out);
}

static Value loop_attribute(Render *r, Value v, Text name)
{
    const LoopState *loop = v.loop;
    size_t n = loop->items->n, i = loop->index;
    const struct {
        Text name;
        Value value;
    } known[] = {
        {TEXT("index"), value_int((int64_t)i + 1)},
        {TEXT("index0"), value_int((int64_t)i)},
        {TEXT("revindex"), value_int((int64_t)(n - i))},
        {TEXT("revindex0"), value_int((int64_t)(n - i) - 1)},
        {TEXT("first"), value_bool(i == 0)},
        {TEXT("last"), value_bool(i + 1 == n)},
        {TEXT("length"), value_int((int64_t)n)},
        {TEXT("depth"), value_int(1)}, /* counts recursion, which there is not */
        {TEXT("depth0"), value_int(0)},
        {TEXT("previtem"), i > 0 ? loop->items->items[i - 1] : value_missing(TEXT("previtem"))},
        {TEXT("nextitem"), i + 1 < n ? loop->items->items[i + 1] : value_missing(TEXT("nextitem"))},
    };
    for (size_t k = 0; k < G_N_ELEMENTS(known); k++) {
        if (text_equal(known[k].name, name)) {
            return known[k].value;
        }
    }
    return template_method(r, v, name);
}

/* value.name, then value["name"]. */
static Value render_attribute(Render *r, Value v, Text name)
{
    if (v.kind == VALUE_UNDEFINED) {
        render_fail_undefined(r, v);
        return value_none();
    }
    if (v.kind == VALUE_LOOP) {
        return loop_attribute(r, v, name);
    }
    Value method = template_method(r, v, name);
    if (method.kind != VALUE_UNDEFINED || (v.kind != VALUE_DICT && v.kind != VALUE_NAMESPACE)) {
        return method;
    }
    const Value *found = value_dict_find(r, v.dict, value_text(name));
    return found != NULL ? *found : method;
}

Value render_element(Render *r, Value v, Value key)
{
    if (v.kind == VALUE_UNDEFINED) {
        render_fail_undefined(r, v);
        return value_none();
    }
    if (v.kind == VALUE_DICT) {
        const Value *found = value_dict_find(r, v.dict, key);
        if (found != NULL) {
            return *found;
        }
    } else if (value_is_integral(key) && is_repeatable(v)) {
        int64_t n = v.kind == VALUE_LIST ? (int64_t)v.list->n : value_length(r, v),
                i = value_integer(key);
        i += i < 0 ? n : 0;
        if (i >= 0 && i < n && v.kind == VALUE_LIST) {
            return v.list->items[i];
        }
        if (i >= 0 && i < n) {
            size_t at = text_offset(v.text, (size_t)i);
            Text rest = {v.text.data + at, v.text.length - at};
            return value_text((Text){rest.data, text_step(rest, NULL)});
        }
    }
    return key.kind == VALUE_STRING ? render_attribute(r, v, key.text)
                                    : value_missing(value_to_text(r, key));
}

Value render_call(Render *r, Value callee, const Arguments *arguments)
{
    switch (callee.kind) {
    case VALUE_FUNCTION:
        return builtin_call(r, callee.function, value_none(), arguments);
    case VALUE_METHOD:
        return builtin_call(r, callee.method->builtin, callee.method->self, arguments);
    case VALUE_MACRO:
        return render_macro(r, callee.macro, arguments);
    case VALUE_UNDEFINED:
        render_fail_undefined(r, callee);
        return value_none();
    default:
        render_fail(r, "%s cannot be called", value_kind_name(callee));
        return value_none();
    }
}

Arguments render_arguments(Render *r, const CallExpressions *call)
{
    Arguments arguments = {
        .n_positional = call->n_positional, .n_named = call->n_named, .names = call->names};
    arguments.positional =
        call->n_positional > 0 ? render_alloc(r, call->n_positional, sizeof(Value)) : NULL;
    arguments.named = call->n_named > 0 ? render_alloc(r, call->n_named, sizeof(Value)) : NULL;
    for (unsigned i = 0; i < call->n_positional && !render_failed(r); i++) {
        arguments.positional[i] = render_expression(r, call->positional[i]);
    }
    for (unsigned i = 0; i < call->n_named && !render_failed(r); i++) {
        arguments.named[i] = render_expression(r, call->named[i]);
    }
    return arguments;
}

static Value evaluate_step(Render *r, Value v, const PostfixStep *step)
{
    switch (step->kind) {
    case STEP_ATTRIBUTE:
        return render_attribute(r, v, step->name);
    case STEP_ELEMENT: {
        Value key = render_expression(r, step->operands[0]);
        return render_failed(r) ? value_none() : render_element(r, v, key);
    }
    case STEP_SLICE:
        return evaluate_slice(r, v, step);
    default:
        break;
    }
    Arguments arguments = render_arguments(r, &step->arguments);
    if (render_failed(r)) {
        return value_none();
    }
    if (step->kind == STEP_CALL) {
        return render_call(r, v, &arguments);
    }
    if (step->kind == STEP_FILTER) {
        return render_apply_filter(r, step->name, v, &arguments);
    }
    return value_bool(render_apply_test(r, step->name, v, &arguments) != step->negated);
}

static Value evaluate_postfix(Render *r, const Expression *e)
{
    Value value = render_expression(r, e->operands[0]);
    for (unsigned i = 0; i < e->n_steps && render_step(r, 1); i++) {
        value = evaluate_step(r, value, &e->steps[i]);
    }
    return value;
}

static Value evaluate_condition(Render *r, const Expression *e)
{
    if (value_truth(render_expression(r, e->operands[0]))) {
        return render_expression(r, e->operands[1]);
    }
    return e->operands[2] != NULL ? render_expression(r, e->operands[2])
                                  : value_undefined(TEXT("the missing else of an inline if"));
}

static Value evaluate(Render *r, const Expression *e)
{
    switch (e->kind) {
    case EXPRESSION_CONSTANT:
        return e->constant;
    case EXPRESSION_NAME:
        return evaluate_name(r, e->name);
    case EXPRESSION_LIST:
    case EXPRESSION_TUPLE:
        return evaluate_list(r, e);
    case EXPRESSION_DICT:
        return evaluate_dict(r, e);
    case EXPRESSION_NOT:
        return value_bool(!value_truth(render_expression(r, e->operands[0])));
    case EXPRESSION_NEGATE:
    case EXPRESSION_PLUS: {
        Value operand = render_expression(r, e->operands[0]);
        return render_failed(r) ? value_none()
                                : evaluate_sign(r, operand, e->kind == EXPRESSION_NEGATE);
    }
    case EXPRESSION_CHAIN:
        return evaluate_chain(r, e);
    case EXPRESSION_CONCAT:
        return evaluate_concat(r, e);
    case EXPRESSION_AND:
        return evaluate_logic(r, e, false);
    case EXPRESSION_OR:
        return evaluate_logic(r, e, true);
    case EXPRESSION_COMPARE:
        return evaluate_compare(r, e);
    case EXPRESSION_CONDITION:
        return evaluate_condition(r, e);
    case EXPRESSION_POSTFIX:
        return evaluate_postfix(r, e);
    }
    return value_none();
}

Value render_expression(Render *r, const Expression *e)
{
    if (!render_step(r, 1)) {
        return value_none();
    }
    r->line = e->line;
    if (r->expression_depth >= EXPRESSIONS_PER_BLOCK * r->limits.depth) {
        render_fail(r, "expressions are nested deeper than %u levels",
                    EXPRESSIONS_PER_BLOCK * r->limits.depth);
        return value_none();
    }
    r->expression_depth++;
    Value value = evaluate(r, e);
    r->expression_depth--;
    return value;
}
