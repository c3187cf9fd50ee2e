/* Renderings against Jinja2's (tests/golden/text/make_template.py), and the bounds. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include "proto/base/error.h"
#include "proto/text/chat_template.h"
#include "tests/unit/text/golden.h"

#include <jansson.h>

typedef struct Golden {
    const char *bos, *eos;
    const json_t *templates; /* by name */
    ChatLimits limits;
} Golden;

static const json_t *case_source(const Golden *golden, const json_t *test)
{
    const json_t *own = json_object_get(test, "source");
    return own != NULL ? own
                       : json_object_get(golden->templates,
                                         json_string_value(json_object_get(test, "name")));
}

static char *render_case(const Golden *golden, const json_t *test, GError **error)
{
    const json_t *source = case_source(golden, test), *messages = json_object_get(test, "chat");
    g_autoptr(ChatTemplate) t =
        chat_template_parse(json_string_value(source), json_string_length(source), error);
    if (t == NULL) {
        return NULL;
    }
    unsigned n = (unsigned)json_array_size(messages);
    g_autofree ChatMessageText *texts = g_new0(ChatMessageText, MAX(n, 1));
    for (unsigned i = 0; i < n; i++) {
        json_t *message = json_array_get(messages, i);
        texts[i].role = json_string_value(json_array_get(message, 0));
        texts[i].content = json_string_value(json_array_get(message, 1));
    }
    return chat_template_render(t, texts, n, json_is_true(json_object_get(test, "prompt")),
                                golden->bos, golden->eos, golden->limits, error);
}

/* True if the case came out as the reference has it. */
static bool check_case(const Golden *golden, const json_t *test)
{
    const char *name = json_string_value(json_object_get(test, "name")),
               *source = json_string_value(case_source(golden, test));
    const char *output = json_string_value(json_object_get(test, "output")),
               *wanted_error = json_string_value(json_object_get(test, "error"));
    g_autoptr(GError) error = NULL;
    g_autofree char *got = render_case(golden, test, &error);
    bool ok = output != NULL
                  ? got != NULL && g_str_equal(got, output)
                  : got == NULL && g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID) &&
                        strstr(error->message, wanted_error) != NULL;
    if (!ok) {
        print_message("# %s: %.200s\n#  wanted %s\n#  got    %s\n", name, source,
                      output != NULL ? output : wanted_error, got != NULL ? got : error->message);
    }
    return ok;
}

static void renderings_are_the_references(void **state)
{
    g_autofree char *text = golden_read("templates.json");
    json_error_t why;
    json_t *file = json_loads(text, JSON_ALLOW_NUL, &why);
    assert_non_null(file);
    Golden golden = {.limits = CHAT_LIMITS_DEFAULT,
                     .templates = json_object_get(file, "templates")};
    golden.limits.now_s = json_integer_value(json_object_get(file, "now_s"));
    golden.bos = json_string_value(json_object_get(file, "bos"));
    golden.eos = json_string_value(json_object_get(file, "eos"));
    unsigned n_failed = 0;
    size_t i;
    json_t *test;
    json_array_foreach(json_object_get(file, "cases"), i, test)
    {
        n_failed += !check_case(&golden, test);
    }
    assert_true(i > 300);
    json_decref(file);
    assert_int_equal(n_failed, 0);
}

/* ---- bounds ---- */

static char *render_text(const char *source, ChatLimits limits, GError **error)
{
    g_autoptr(ChatTemplate) t = chat_template_parse(source, strlen(source), error);
    ChatMessageText message = {.role = "user", .content = "hello \xFF\xC3 there"};
    return t != NULL ? chat_template_render(t, &message, 1, true, NULL, NULL, limits, error) : NULL;
}

static void assert_stopped(const char *source, const char *named)
{
    g_autoptr(GError) error = NULL;
    g_autofree char *got = render_text(source, CHAT_LIMITS_DEFAULT, &error);
    if (got != NULL || !g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID) ||
        strstr(error->message, named) == NULL) {
        fail_msg("%.100s: wanted %s, got %.100s", source, named,
                 got != NULL ? got : error->message);
    }
}

static char *repeated(const char *before, const char *open, const char *middle, const char *close,
                      unsigned n)
{
    GString *s = g_string_new(before);
    for (unsigned i = 0; i < n; i++) {
        g_string_append(s, open);
    }
    g_string_append(s, middle);
    for (unsigned i = 0; i < n; i++) {
        g_string_append(s, close);
    }
    g_string_append(s, before[0] == '{' && before[1] == '{'   ? " }}"
                       : before[0] == '{' && close[0] != '\0' ? " = 1 %}"
                                                              : "");
    return g_string_free(s, FALSE);
}

static void steps_output_and_memory_are_bounded(void **state)
{
    assert_stopped("{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}",
                   "more than");
    assert_stopped(
        "{% for a in range(100000) %}{{ a + a + a + a + a + a + a + a + a + a }}{% endfor %}",
        "steps");
    assert_stopped("{% for a in range(100000) %}{{ "
                   "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' }}{% endfor %}",
                   "bytes of output");
    assert_stopped("{{ 'x' * 1000000000000 }}", "steps");
    assert_stopped("{{ ('x' * 1000) * 1000000 }}", "bytes of output");
    assert_stopped("{{ [1] * 1000000000000 }}", "steps");
    assert_stopped("{{ [1] * 9223372036854775807 }}", "steps");
    assert_stopped("{% set ns = namespace(x='abcdefgh') %}{% for i in range(64) %}{% set ns.x = "
                   "ns.x + ns.x %}{% endfor %}",
                   "bytes of");
    assert_stopped("{% set ns = namespace(x=[1]) %}{% for i in range(64) %}{% set ns.x = [ns.x + "
                   "ns.x, ns.x * 2] %}{% endfor %}{{ ns.x }}",
                   "");
    assert_stopped("{{ ('x' * 100000)|replace('x', 'y' * 100000) }}", "bytes of output");
    assert_stopped("{{ range(100001) }}", "100000");
    assert_stopped("{{ range(-9223372036854775807, 9223372036854775807) }}", "100000");
    assert_stopped("{{ [1]|tojson(indent=1000000000) }}", "");
    assert_stopped("{{ 'x'|indent(9223372036854775807, true) }}", "");
    assert_stopped("{{ 9223372036854775807 + 1 }}", "64 bits");
    assert_stopped("{{ (-9223372036854775807 - 1) // -1 }}", "64 bits");
    assert_stopped("{{ -(-9223372036854775807 - 1) }}", "64 bits");
    assert_stopped("{{ 9223372036854775807 * 2 }}{{ 2 ** 64 }}", "64 bits");
    assert_stopped("{{ 99999999999999999999 }}", "64 bits");
    assert_stopped("{{ 2 ** 1000000000000 }}", "64 bits");
}

static void nesting_is_bounded(void **state)
{
    g_autofree char *brackets = repeated("{{ ", "[", "1", "]", 60000),
                    *negations = repeated("{{ ", "not ", "1", "", 60000),
                    *minus = repeated("{{ ", "-", "1", "", 60000),
                    *blocks = repeated("", "{% if true %}", "x", "{% endif %}", 60000),
                    *calls = repeated("{{ ", "range(", "1", ")", 60000),
                    *dicts = repeated("{{ ", "{1:", "1", "}", 60000),
                    *tests = repeated("{{ 1", " is divisibleby range(1", "", ")", 60000),
                    *targets = repeated("{% set ", "(", "a", ")", 60000);
    const char *const all[] = {brackets, negations, minus, blocks, calls, dicts, tests, targets};
    for (size_t i = 0; i < G_N_ELEMENTS(all); i++) {
        assert_stopped(all[i], "nested deeper");
    }
    assert_stopped("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "deeper");
    assert_stopped("{% macro f(n) %}{{ [[[[f(n)|trim|upper]]]]|join }}{% endmacro %}{{ f(1) }}",
                   "deeper");
    assert_stopped("{% macro f(n=f()) %}{% endmacro %}{{ f() }}", "deeper");
    assert_stopped("{% set ns = namespace() %}{% set ns.l = [ns, 1] %}{% set a = namespace(x=[]) "
                   "%}{% for i in range(1000) %}{% set a.x = [a.x] %}{% endfor %}{{ a.x }}",
                   "deeper");
    assert_stopped("{% set a = namespace(x=[]) %}{% for i in range(1000) %}{% set a.x = [a.x] %}{% "
                   "endfor %}{{ a.x|tojson }}",
                   "deeper");
    assert_stopped(
        "{% set a = namespace(x=[]) %}{% set b = namespace(x=[]) %}{% for i in range(1000) %}{% "
        "set a.x = [a.x] %}{% set b.x = [b.x] %}{% endfor %}{{ a.x == b.x }}",
        "deeper");
    g_autofree char *chain = repeated("{{ 1", " + 1", "", "", 50000),
                    *filters = repeated("{{ 'a'", "|trim", "", "", 50000),
                    *elifs = repeated("{% if 0 %}", "{% elif 0 %}", "", "", 20000);
    g_autofree char *elifs_end = g_strconcat(elifs, "x{% endif %}", NULL);
    g_autofree char *sum = render_text(chain, CHAT_LIMITS_DEFAULT, NULL),
                    *a = render_text(filters, CHAT_LIMITS_DEFAULT, NULL),
                    *none = render_text(elifs_end, CHAT_LIMITS_DEFAULT, NULL);
    assert_string_equal(sum, "50001"); /* long is not deep */
    assert_string_equal(a, "a");
    assert_string_equal(none, "");
}

static void what_is_not_supported_is_said_with_its_line(void **state)
{
    assert_stopped("a\n\n{% include 'x' %}", "line 3: statement \"include\" is not supported");
    assert_stopped("\n{% import 'x' as y %}", "line 2");
    assert_stopped("{% extends 'x' %}", "extends");
    assert_stopped("{% call f() %}{% endcall %}", "call");
    assert_stopped("{% for x in y recursive %}{% endfor %}", "recursive");
    assert_stopped("{{ f(*a) }}", "*args");
    assert_stopped("\n\n{{ 'x'|pprint }}", "line 3: filter pprint is not supported");
    assert_stopped("{{ ''.format(1) }}", "format is undefined");
    assert_stopped("{{ strftime_now('%Y') }}", "strftime_now is undefined");
    assert_stopped("{{ open('/etc/passwd') }}", "open is undefined");
    assert_stopped("{{ messages[0].__class__.__init__ }}", "__class__ is undefined");
}

static void bytes_that_are_no_text_pass_through(void **state)
{
    g_autofree char *got =
        render_text("{{ messages[0].content|trim }}{{ messages[0]['content'][6] }}|{{ "
                    "messages[0].content|length }}|{{ messages[0].content|upper }}",
                    CHAT_LIMITS_DEFAULT, NULL);
    assert_string_equal(got, "hello \xFF\xC3 there\xFF|14|HELLO \xFF\xC3 THERE");
}

static void a_template_may_be_rendered_again(void **state)
{
    const char *source = "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + "
                         "1 %}{% endfor %}{{ ns.n }}{{ bos_token is defined }}";
    g_autoptr(ChatTemplate) t = chat_template_parse(source, strlen(source), NULL);
    ChatMessageText messages[3] = {{"user", "a"}, {"assistant", "b"}, {"user", "c"}};
    for (unsigned n = 0; n <= 3; n++) {
        g_autofree char *got = chat_template_render(t, messages, n, false, n > 1 ? "<s>" : NULL,
                                                    NULL, CHAT_LIMITS_DEFAULT, NULL);
        g_autofree char *wanted = g_strdup_printf("%u%s", n, n > 1 ? "True" : "False");
        assert_string_equal(got, wanted);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(renderings_are_the_references),
        cmocka_unit_test(steps_output_and_memory_are_bounded),
        cmocka_unit_test(nesting_is_bounded),
        cmocka_unit_test(what_is_not_supported_is_said_with_its_line),
        cmocka_unit_test(bytes_that_are_no_text_pass_through),
        cmocka_unit_test(a_template_may_be_rendered_again),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
