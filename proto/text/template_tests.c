/* Tests: what stands behind "is". */
#include "proto/text/template_render.h"

#include <math.h>
#include <string.h>

#define TEST(name, condition)                                                                      \
    static Value test_##name(Render *r, Value v, const Value *a)                                   \
    {                                                                                              \
        return value_bool(condition);                                                              \
    }

TEST(defined, v.kind != VALUE_UNDEFINED)
TEST(undefined, v.kind == VALUE_UNDEFINED)
TEST(none, v.kind == VALUE_NONE)
TEST(boolean, v.kind == VALUE_BOOL)
TEST(true, v.kind == VALUE_BOOL && v.boolean)
TEST(false, v.kind == VALUE_BOOL && !v.boolean)
TEST(integer, v.kind == VALUE_INT)
TEST(float, v.kind == VALUE_FLOAT)
TEST(number, value_is_number(v))
TEST(string, v.kind == VALUE_STRING)
TEST(mapping, v.kind == VALUE_DICT)
TEST(iterable, v.kind == VALUE_LIST || v.kind == VALUE_DICT || v.kind == VALUE_STRING ||
                   v.kind == VALUE_UNDEFINED)
/* An undefined value has a length (0) and can be subscripted (to an error), which is all that Jinja
 * asks. */
TEST(sequence, (v.kind == VALUE_LIST && v.list->kind != LIST_GENERATOR) || v.kind == VALUE_DICT ||
                   v.kind == VALUE_STRING || v.kind == VALUE_UNDEFINED)
/* An undefined value can be called (to an error), too. */
TEST(callable, v.kind == VALUE_UNDEFINED || v.kind == VALUE_FUNCTION || v.kind == VALUE_METHOD ||
                   v.kind == VALUE_MACRO)
TEST(equal, value_equal(r, v, a[0]))
TEST(not_equal, !value_equal(r, v, a[0]))
TEST(less, value_compare(r, v, a[0]) < 0)
TEST(less_equal, value_compare(r, v, a[0]) <= 0)
TEST(greater, value_compare(r, v, a[0]) > 0)
TEST(greater_equal, value_compare(r, v, a[0]) >= 0)
TEST(in, value_contains(r, a[0], v))

static Value is_divisible(Render *r, Value v, int64_t by, int64_t remainder)
{
    if (v.kind == VALUE_FLOAT && by != 0) {
        double rest = fmod(v.real, (double)by);
        return value_bool((rest < 0 ? rest + (double)by : rest) == (double)remainder);
    }
    if (!value_is_integral(v) || by == 0) {
        render_fail(r, "divisibility of %s by %" G_GINT64_FORMAT " is not defined",
                    value_kind_name(v), by);
        return value_none();
    }
    return value_bool(by == -1 ? remainder == 0 : llabs(value_integer(v) % by) == remainder);
}

static Value test_odd(Render *r, Value v, const Value *a)
{
    return is_divisible(r, v, 2, 1);
}

static Value test_even(Render *r, Value v, const Value *a)
{
    return is_divisible(r, v, 2, 0);
}

static Value test_divisibleby(Render *r, Value v, const Value *a)
{
    return is_divisible(r, v, argument_integer(r, a[0], 0), 0);
}

/* Identity: for values that are not containers the same kind and value. */
static Value test_sameas(Render *r, Value v, const Value *a)
{
    Value other = a[0];
    if (v.kind != other.kind) {
        return value_bool(false);
    }
    return value_bool(v.kind == VALUE_LIST   ? v.list == other.list
                      : v.kind == VALUE_DICT ? v.dict == other.dict
                                             : value_equal(r, v, other));
}

static Value case_test(Render *r, Value v, Text method)
{
    Value text = value_text(value_to_text(r, v)), bound = template_method(r, text, method);
    return render_failed(r) ? value_none() : render_call(r, bound, &(Arguments){0});
}

static Value test_lower(Render *r, Value v, const Value *a)
{
    return case_test(r, v, TEXT("islower"));
}

static Value test_upper(Render *r, Value v, const Value *a)
{
    return case_test(r, v, TEXT("isupper"));
}

static const Builtin tests[] = {
    {"defined", "", 0, test_defined, NULL},
    {"undefined", "", 0, test_undefined, NULL},
    {"none", "", 0, test_none, NULL},
    {"boolean", "", 0, test_boolean, NULL},
    {"true", "", 0, test_true, NULL},
    {"false", "", 0, test_false, NULL},
    {"integer", "", 0, test_integer, NULL},
    {"float", "", 0, test_float, NULL},
    {"number", "", 0, test_number, NULL},
    {"string", "", 0, test_string, NULL},
    {"mapping", "", 0, test_mapping, NULL},
    {"iterable", "", 0, test_iterable, NULL},
    {"sequence", "", 0, test_sequence, NULL},
    {"callable", "", 0, test_callable, NULL},
    {"odd", "", 0, test_odd, NULL},
    {"even", "", 0, test_even, NULL},
    {"divisibleby", "num", 1, test_divisibleby, NULL},
    {"sameas", "other", 1, test_sameas, NULL},
    {"lower", "", 0, test_lower, NULL},
    {"upper", "", 0, test_upper, NULL},
    {"in", "seq", 1, test_in, NULL},
    {"equalto", "other", 1, test_equal, NULL},
    {"eq", "other", 1, test_equal, NULL},
    {"==", "other", 1, test_equal, NULL},
    {"ne", "other", 1, test_not_equal, NULL},
    {"!=", "other", 1, test_not_equal, NULL},
    {"lt", "other", 1, test_less, NULL},
    {"lessthan", "other", 1, test_less, NULL},
    {"<", "other", 1, test_less, NULL},
    {"le", "other", 1, test_less_equal, NULL},
    {"<=", "other", 1, test_less_equal, NULL},
    {"gt", "other", 1, test_greater, NULL},
    {"greaterthan", "other", 1, test_greater, NULL},
    {">", "other", 1, test_greater, NULL},
    {"ge", "other", 1, test_greater_equal, NULL},
    {">=", "other", 1, test_greater_equal, NULL},
};

bool render_apply_test(Render *r, Text name, Value subject, const Arguments *arguments)
{
    const Builtin *test = builtin_find(tests, G_N_ELEMENTS(tests), name);
    if (test == NULL) {
        render_fail(r, "test %.*s is not supported", (int)MIN(name.length, 64), name.data);
        return false;
    }
    return value_truth(builtin_call(r, test, subject, arguments));
}
