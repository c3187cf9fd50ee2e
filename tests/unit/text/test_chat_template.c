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
    return own != NULL ? own : json_object_get(golden->templates, json_string_value(json_object_get(test, "name")));
}

static char *render_case(const Golden *golden, const json_t *test, GError **error)
{
    const json_t *source = case_source(golden, test), *messages = json_object_get(test, "chat");
    g_autoptr(ChatTemplate) t = chat_template_parse(json_string_value(source), json_string_length(source), error);
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
    return chat_template_render(t, texts, n, json_is_true(json_object_get(test, "prompt")), golden->bos, golden->eos, golden->limits, error);
}

/* True if the case came out as the reference has it. */
static bool check_case(const Golden *golden, const json_t *test)
{
    const char *name = json_string_value(json_object_get(test, "name")), *source = json_string_value(case_source(golden, test));
    const char *output = json_string_value(json_object_get(test, "output")), *wanted_error = json_string_value(json_object_get(test, "error"));
    g_autoptr(GError) error = NULL;
    g_autofree char *got = render_case(golden, test, &error);
    bool ok = output != NULL ? got != NULL && g_str_equal(got, output)
                             : got == NULL && g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID) && strstr(error->message, wanted_error) != NULL;
    if (!ok) {
        print_message("%s: %.200s\n  wanted %s\n  got    %s\n", name, source, output != NULL ? output : wanted_error,
                      got != NULL ? got : error->message);
    }
    return ok;
}

static void renderings_are_the_references(void **state)
{
    g_autofree char *text = golden_read("templates.json");
    json_error_t why;
    json_t *file = json_loads(text, JSON_ALLOW_NUL, &why);
    assert_non_null(file);
    Golden golden = {.limits = CHAT_LIMITS_DEFAULT, .templates = json_object_get(file, "templates")};
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(renderings_are_the_references),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
