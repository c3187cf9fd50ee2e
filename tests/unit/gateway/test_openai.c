/* Bodies to requests and events to JSON: pure. Answers are read back with jansson. */
#include "coordinator/gateway/openai/api_answer.h"
#include "coordinator/gateway/openai/api_limits.h"
#include "coordinator/gateway/openai/api_request.h"
#include "coordinator/gateway/openai/json_body.h"
#include "coordinator/gateway/openai/json_text.h"
#include "proto/base/error.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

/* ---- limits ---- */

static void test_limits_are_configuration(void **state)
{
    ApiLimits limits = api_limits_default();
    g_autoptr(GError) error = NULL;
    assert_int_equal(limits.body, 8u << 20);
    assert_int_equal(limits.n, 8);
    assert_true(api_limits_parse("n=3, body=1M,stops=0", &limits, &error));
    assert_int_equal(limits.n, 3);
    assert_int_equal(limits.body, 1u << 20);
    assert_int_equal(limits.stops, 0);
    assert_true(api_limits_parse(NULL, &limits, &error));
    assert_true(api_limits_parse("reader=64k,stall=2", &limits, &error));
    assert_false(api_limits_is_stuck(&limits, 64 << 10, INT64_MAX));     /* no more than allowed */
    assert_false(api_limits_is_stuck(&limits, (64 << 10) + 1, 2000000)); /* a burst */
    assert_true(api_limits_is_stuck(&limits, (64 << 10) + 1, 2000001));  /* nothing taken */
    assert_false(api_limits_is_stuck(&limits, 8 * (64 << 10), 0));
    assert_true(api_limits_is_stuck(&limits, 8 * (64 << 10) + 1, 0));
    static const char *const bad[] = {"n", "n=", "n=0", "n=-1", "n=9999999", "bodi=1M", "body=1"};
    for (size_t i = 0; i < G_N_ELEMENTS(bad); i++) {
        g_autoptr(GError) own = NULL;
        assert_false(api_limits_parse(bad[i], &limits, &own));
        assert_true(g_error_matches(own, WEFT_ERROR, WEFT_ERROR_INVALID));
    }
    assert_false(api_limits_parse("bodi=1M", &limits, &error));
    assert_non_null(strstr(error->message, "did you mean body"));
    g_autofree char *help = api_limits_help();
    assert_non_null(strstr(help, "queue=512"));
}

/* ---- bodies ---- */

static json_t *parse(const char *text, const ApiLimits *limits, ApiError **error)
{
    return json_body_parse(text, strlen(text), limits, error);
}

static void test_bodies_that_are_refused(void **state)
{
    static const char *const bad[] = {
        "",
        "[]",
        "\"x\"",
        "{",
        "{\"a\":1,\"a\":2}",
        "{\"a\":NaN}",
        "{\"a\":Infinity}",
        "{\"a\":1e999}",
        "{\"a\":-9223372036854775809}",
        "{\"a\":9223372036854775808}",
        "{\"a\":\"\xff\xfe\"}",
        "{\"a\":\"\xc0\xaf\"}",
        "{\"a\":\"\xed\xa0\x80\"}",
        "{\"a\":\"\\ud800\"}",
        "{\"a\":\"\\u0000\"}",
        "{\"a\":1} x",
        "{'a':1}",
    };
    ApiLimits limits = api_limits_default();
    for (size_t i = 0; i < G_N_ELEMENTS(bad); i++) {
        g_autoptr(ApiError) error = NULL;
        assert_null(parse(bad[i], &limits, &error));
        assert_int_equal(error->status, 400);
        assert_string_equal(error->type, "invalid_request_error");
    }
}

/* What else is too much is said first: it is more of a help. */
static void test_bytes_that_are_parsed(void **state)
{
    ApiLimits limits = api_limits_default();
    g_autoptr(ApiError) error = NULL, other = NULL;
    limits.json = 7;
    json_t *root = parse("{\"a\":1}", &limits, &error);
    assert_non_null(root);
    json_decref(root);
    assert_null(parse("{\"a\": 1}", &limits, &error));
    assert_int_equal(error->status, 400);
    assert_non_null(strstr(error->message, "more than 7 bytes"));
    limits.depth = 1;
    assert_null(parse("{\"a\":[1]}", &limits, &other));
    assert_non_null(strstr(other->message, "levels of nesting"));
}

/* Brackets, commas and quotes inside strings are no structure, however they are escaped. */
static void test_strings_are_no_structure(void **state)
{
    static const char *const good[] = {
        "{\"a\":\"[[[[[[[[,,,,\"}",          "{\"a\":\"\\\"[[[[[[,,,,\\\"\"}",
        "{\"a\":\"\\\\\",\"b\":\"[[[[[,\"}", "{\"[\\\\\\\"[[[[[,,,\":1}",
        "{\"a\":\"\",\"b\":\"\\\"\"}",
    };
    static const char *const bad[] = {"{\"a\":\"\\\\\",\"b\":[[[[[1]]]]]}", "{\"\\\"\":[[[[1]]]]}",
                                      "{\"a\":\"\\", "{\"a\":\"\\\"", "{\"a\":\""};
    ApiLimits limits = api_limits_default();
    limits.depth = 4;
    limits.values = 4;
    for (size_t i = 0; i < G_N_ELEMENTS(good); i++) {
        g_autoptr(ApiError) error = NULL;
        json_t *body = parse(good[i], &limits, &error);
        assert_non_null(body);
        json_decref(body);
    }
    for (size_t i = 0; i < G_N_ELEMENTS(bad); i++) {
        g_autoptr(ApiError) error = NULL;
        assert_null(parse(bad[i], &limits, &error));
    }
}

static void test_nesting_is_measured_first(void **state)
{
    ApiLimits limits = api_limits_default();
    for (unsigned depth = 60; depth <= 200000; depth = depth == 60 ? 70 : depth * 50) {
        GString *text = g_string_new("{\"a\":");
        for (unsigned i = 0; i < depth; i++) {
            g_string_append_c(text, '[');
        }
        for (unsigned i = 0; i < depth; i++) {
            g_string_append_c(text, ']');
        }
        g_string_append_c(text, '}');
        g_autoptr(ApiError) error = NULL;
        json_t *body = parse(text->str, &limits, &error);
        assert_true((body != NULL) == (depth < limits.depth));
        json_decref(body);
        g_string_free(text, TRUE);
    }
    /* brackets within strings are no nesting */
    g_autofree char *many = g_strnfill(1000, '[');
    g_autofree char *quoted = g_strdup_printf("{\"a\":\"\\\"%s\"}", many);
    g_autoptr(ApiError) error = NULL;
    json_t *body = parse(quoted, &limits, &error);
    assert_non_null(body);
    json_decref(body);
}

static void test_strings_and_names_are_counted(void **state)
{
    ApiLimits limits = api_limits_default();
    limits.strings = 100;
    for (unsigned n = 99; n <= 100; n++) { /* beside the name of the list or object */
        for (unsigned kind = 0; kind < 2; kind++) {
            GString *text = g_string_new(kind == 0 ? "{\"a\":[" : "{\"a\":{");
            for (unsigned i = 0; i < n; i++) {
                g_string_append_printf(text, kind == 0 ? "%s\"\\\"%u,\"" : "%s\"%u\":0",
                                       i > 0 ? "," : "", i);
            }
            g_string_append(text, kind == 0 ? "]}" : "}}");
            g_autoptr(ApiError) error = NULL;
            json_t *body = parse(text->str, &limits, &error);
            assert_true((body != NULL) == (n < 100));
            assert_true(body != NULL || strstr(error->message, "100 strings") != NULL);
            json_decref(body);
            g_string_free(text, TRUE);
        }
    }
}

static void test_values_are_counted(void **state)
{
    ApiLimits limits = api_limits_default();
    limits.values = 100;
    for (unsigned n = 90; n <= 110; n += 20) {
        GString *text = g_string_new("{\"a\":[0");
        for (unsigned i = 1; i < n; i++) {
            g_string_append(text, ",0");
        }
        g_string_append(text, "]}");
        g_autoptr(ApiError) error = NULL;
        json_t *body = parse(text->str, &limits, &error);
        assert_true((body != NULL) == (n < 100));
        json_decref(body);
        g_string_free(text, TRUE);
    }
}

/* ---- requests ---- */

static ApiRequest *request_of(ApiKind kind, const char *text, ApiError **error)
{
    ApiLimits limits = api_limits_default();
    json_t *body = parse(text, &limits, error);
    ApiRequest *r = body != NULL ? api_request_parse(kind, body, &limits, error) : NULL;
    json_decref(body);
    return r;
}

static ApiRequest *good(ApiKind kind, const char *text)
{
    g_autoptr(ApiError) error = NULL;
    ApiRequest *r = request_of(kind, text, &error);
    if (error != NULL) {
        fail_msg("%s: %s", text, error->message);
    }
    return r;
}

static void bad(ApiKind kind, const char *text, const char *param)
{
    g_autoptr(ApiError) error = NULL;
    ApiRequest *r = request_of(kind, text, &error);
    if (r != NULL || error == NULL || error->status != 400 || g_strcmp0(error->param, param) != 0) {
        fail_msg("%s: expected 400 about %s, got %d about %s", text, param,
                 error != NULL ? error->status : 0, error != NULL ? error->param : "?");
    }
}

#define CHAT(more) "{\"model\":\"m\",\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]" more "}"
#define TEXT(more) "{\"model\":\"m\",\"prompt\":\"hi\"" more "}"

static void test_a_full_chat(void **state)
{
    g_autoptr(ApiRequest) r = good(
        API_CHAT,
        "{\"model\":\"m\",\"messages\":[{\"role\":\"system\",\"content\":[{\"type\":\"text\","
        "\"text\":\"a\"},{\"type\":\"text\",\"text\":\"b\"}]},{\"role\":\"assistant\",\"content\":"
        "null},{\"role\":\"user\",\"content\":\"hi\",\"name\":\"joe\"}],\"n\":2,\"seed\":-7,"
        "\"stop\":[\"x\",\"yy\"],\"max_tokens\":5,\"max_completion_tokens\":9,\"temperature\":0.5,"
        "\"top_p\":0,\"top_k\":-1,\"min_p\":0.1,\"presence_penalty\":-2,\"frequency_penalty\":2,"
        "\"repetition_penalty\":1.5,\"logit_bias\":{\"9\":-100,\"3\":1.5},\"logprobs\":true,"
        "\"top_logprobs\":4,\"stream\":true,\"stream_options\":{\"include_usage\":true},\"user\":"
        "\"u\",\"tools\":[],\"response_format\":{\"type\":\"text\"},\"tool_choice\":\"none\"}");
    Weft__V1__RunRequest out;
    api_request_generate(r, 0, &out);
    assert_string_equal(r->model, "m");
    assert_int_equal(out.n_messages, 3);
    assert_string_equal(out.messages[0]->content, "ab");
    assert_string_equal(out.messages[1]->content, "");
    assert_int_equal(out.streams, 2);
    assert_true(out.seed_given);
    assert_true(out.sampler->seed == (uint64_t)-7);
    assert_int_equal(out.n_stop, 2);
    assert_string_equal(out.stop[1], "yy");
    assert_int_equal(out.max_tokens, 9);
    assert_true(out.sampler->temperature == 0.5f);
    assert_true(out.sampler->top_p > 0 && out.sampler->top_p < 1e-5f);
    assert_int_equal(out.sampler->top_k, 0);
    assert_true(out.sampler->min_p == 0.1f);
    assert_true(out.sampler->presence_penalty == -2 && out.sampler->frequency_penalty == 2);
    assert_true(out.sampler->repeat_penalty == 1.5f);
    assert_int_equal(out.sampler->n_logit_bias, 2);
    assert_int_equal(out.sampler->logit_bias[0]->id, 3);
    assert_int_equal(out.sampler->logit_bias[1]->id, 9);
    assert_true(out.sampler->logit_bias[1]->bias == -100);
    assert_int_equal(out.top_logprobs, 4);
    assert_true(r->stream && r->include_usage && r->logprobs && !r->echo);
}

static void test_defaults_are_openais(void **state)
{
    g_autoptr(ApiRequest) chat = good(API_CHAT, CHAT(""));
    assert_true(chat->sampler.temperature == 1 && chat->sampler.top_p == 1);
    assert_false(chat->max_given);
    assert_false(chat->seed_given);
    assert_int_equal(chat->n, 1);
    g_autoptr(ApiRequest) text = good(API_COMPLETION, TEXT(",\"temperature\":null"));
    assert_int_equal(text->max_tokens, 16);
    assert_false(text->logprobs);
    g_autoptr(ApiRequest) zero = good(API_COMPLETION, TEXT(",\"logprobs\":0"));
    assert_true(zero->logprobs);
    assert_int_equal(zero->top_logprobs, 0);
    g_autoptr(ApiRequest) echo = good(API_COMPLETION, TEXT(",\"echo\":true,\"max_tokens\":0"));
    assert_int_equal(echo->max_tokens, 0);
}

static void test_prompts_in_all_forms(void **state)
{
    g_autoptr(ApiRequest) ids = good(API_COMPLETION, "{\"prompt\":[1,2,3]}");
    Weft__V1__RunRequest out;
    api_request_generate(ids, 0, &out);
    assert_int_equal(out.n_prompt_ids, 3);
    g_autoptr(ApiRequest) texts = good(API_COMPLETION, "{\"prompt\":[\"a\",\"b\"]}");
    assert_int_equal(texts->prompts->len, 2);
    api_request_generate(texts, 1, &out);
    assert_string_equal(out.prompt, "b");
    assert_true(out.parse_special);
    g_autoptr(ApiRequest) lists = good(API_COMPLETION, "{\"prompt\":[[1],[2,3]]}");
    api_request_generate(lists, 1, &out);
    assert_int_equal(out.n_prompt_ids, 2);
    api_request_score(lists, 0, &out);
    assert_int_equal(out.kind, WEFT__V1__REQUEST_KIND__SCORE);
}

static void test_fields_out_of_range(void **state)
{
    static const struct {
        const char *text, *param;
    } chats[] = {
        {CHAT(",\"n\":0"), "n"},
        {CHAT(",\"n\":9"), "n"},
        {CHAT(",\"n\":1.5"), "n"},
        {CHAT(",\"n\":\"1\""), "n"},
        {CHAT(",\"n\":-1"), "n"},
        {CHAT(",\"n\":9223372036854775807"), "n"},
        {CHAT(",\"max_tokens\":0"), "max_tokens"},
        {CHAT(",\"max_tokens\":1048577"), "max_tokens"},
        {CHAT(",\"max_completion_tokens\":-5"), "max_completion_tokens"},
        {CHAT(",\"temperature\":2.1"), "temperature"},
        {CHAT(",\"temperature\":-0.1"), "temperature"},
        {CHAT(",\"temperature\":1e300"), "temperature"},
        {CHAT(",\"temperature\":true"), "temperature"},
        {CHAT(",\"top_p\":1.01"), "top_p"},
        {CHAT(",\"min_p\":-1"), "min_p"},
        {CHAT(",\"top_k\":-2"), "top_k"},
        {CHAT(",\"top_k\":4294967296"), "top_k"},
        {CHAT(",\"presence_penalty\":2.5"), "presence_penalty"},
        {CHAT(",\"frequency_penalty\":-3"), "frequency_penalty"},
        {CHAT(",\"repetition_penalty\":0"), "repetition_penalty"},
        {CHAT(",\"seed\":1.5"), "seed"},
        {CHAT(",\"stop\":5"), "stop"},
        {CHAT(",\"stop\":\"\""), "stop"},
        {CHAT(",\"stop\":[\"a\",1]"), "stop"},
        {CHAT(",\"logit_bias\":[]"), "logit_bias"},
        {CHAT(",\"logit_bias\":{\"x\":1}"), "logit_bias"},
        {CHAT(",\"logit_bias\":{\"-1\":1}"), "logit_bias"},
        {CHAT(",\"logit_bias\":{\"4294967296\":1}"), "logit_bias"},
        {CHAT(",\"logit_bias\":{\"99999999999999999999\":1}"), "logit_bias"},
        {CHAT(",\"logit_bias\":{\"1\":101}"), "logit_bias"},
        {CHAT(",\"logit_bias\":{\"1\":\"1\"}"), "logit_bias"},
        {CHAT(",\"logit_bias\":{\"7\":1,\"07\":2}"), "logit_bias"},
        {CHAT(",\"logprobs\":3"), "logprobs"},
        {CHAT(",\"top_logprobs\":3"), "top_logprobs"},
        {CHAT(",\"logprobs\":true,\"top_logprobs\":21"), "top_logprobs"},
        {CHAT(",\"stream\":1"), "stream"},
        {CHAT(",\"stream_options\":{}"), "stream_options"},
        {CHAT(",\"stream\":true,\"stream_options\":[1]"), "stream_options"},
        {CHAT(",\"best_of\":3"), "best_of"},
        {CHAT(",\"tools\":[{}]"), "tools"},
        {CHAT(",\"tool_choice\":\"required\""), "tool_choice"},
        {CHAT(",\"response_format\":{\"type\":\"json_object\"}"), "response_format"},
        {CHAT(",\"guided_json\":{\"a\":1}"), "guided_json"},
        {CHAT(",\"modalities\":[\"text\",\"audio\"]"), "modalities"},
        {"{}", "messages"},
        {"{\"model\":5,\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}", "model"},
        {"{\"messages\":[]}", "messages"},
        {"{\"messages\":{}}", "messages"},
        {"{\"messages\":[{\"content\":\"x\"}]}", "messages"},
        {"{\"messages\":[{\"role\":\"user\",\"content\":5}]}", "messages"},
        {"{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\"}]}]}", "messages"},
        {"{\"messages\":[{\"role\":\"user\",\"tool_calls\":[{}]}]}", "messages"},
    };
    static const struct {
        const char *text, *param;
    } texts[] = {
        {TEXT(",\"logprobs\":21"), "logprobs"},
        {TEXT(",\"logprobs\":true"), "logprobs"},
        {TEXT(",\"max_tokens\":0"), "max_tokens"},
        {TEXT(",\"suffix\":\"x\""), "suffix"},
        {"{}", "prompt"},
        {"{\"prompt\":5}", "prompt"},
        {"{\"prompt\":[]}", "prompt"},
        {"{\"prompt\":[[]]}", "prompt"},
        {"{\"prompt\":[-1]}", "prompt"},
        {"{\"prompt\":[1,\"a\"]}", "prompt"},
        {"{\"prompt\":[4294967296]}", "prompt"},
        {"{\"prompt\":[{}]}", "prompt"},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(chats); i++) {
        bad(API_CHAT, chats[i].text, chats[i].param);
    }
    for (size_t i = 0; i < G_N_ELEMENTS(texts); i++) {
        bad(API_COMPLETION, texts[i].text, texts[i].param);
    }
    bad(API_TOKENIZE, "{}", "prompt");
    bad(API_TOKENIZE, "{\"prompt\":[1]}", "prompt");
    bad(API_DETOKENIZE, "{}", "tokens");
    bad(API_DETOKENIZE, "{\"tokens\":[\"a\"]}", "tokens");
}

/* Lists of one more than their cap, for each cap. */
static void test_lists_beyond_their_caps(void **state)
{
    ApiLimits limits = api_limits_default();
    limits.messages = limits.prompts = limits.stops = limits.logit_bias = 3;
    limits.stop_bytes = 5;
    static const struct {
        ApiKind kind;
        const char *text, *param;
    } cases[] = {
        {API_CHAT,
         "{\"messages\":[{\"role\":\"a\"},{\"role\":\"a\"},{\"role\":\"a\"},{\"role\":\"a\"}]}",
         "messages"},
        {API_COMPLETION, "{\"prompt\":[\"a\",\"b\",\"c\",\"d\"]}", "prompt"},
        {API_COMPLETION, TEXT(",\"stop\":[\"a\",\"b\",\"c\",\"d\"]"), "stop"},
        {API_COMPLETION, TEXT(",\"stop\":\"abcdef\""), "stop"},
        {API_COMPLETION, TEXT(",\"logit_bias\":{\"1\":1,\"2\":1,\"3\":1,\"4\":1}"), "logit_bias"},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autoptr(ApiError) error = NULL;
        json_t *body = parse(cases[i].text, &limits, &error);
        assert_null(api_request_parse(cases[i].kind, body, &limits, &error));
        assert_int_equal(error->status, 400);
        assert_string_equal(error->param, cases[i].param);
        json_decref(body);
    }
}

/* ---- answers ---- */

static Weft__V1__RunEvent event_started(Weft__V1__RunStarted *started)
{
    static uint8_t definition[16] = {0xab, 0xcd, 1, 2, 3, 4};
    weft__v1__run_started__init(started);
    started->prompt_tokens = 4;
    started->definition = (ProtobufCBinaryData){sizeof definition, definition};
    Weft__V1__RunEvent e = WEFT__V1__RUN_EVENT__INIT;
    e.event_case = WEFT__V1__RUN_EVENT__EVENT_STARTED;
    e.started = started;
    return e;
}

static void push_delta(ApiAnswer *a, guint prompt, uint32_t choice, const char *text, float logprob,
                       GString *out)
{
    uint32_t id = 7;
    Weft__V1__TopLogprob top = WEFT__V1__TOP_LOGPROB__INIT, *tops[] = {&top};
    top.id = 8;
    top.logprob = -2;
    Weft__V1__RunDelta delta = WEFT__V1__RUN_DELTA__INIT;
    delta.text = (char *)text;
    delta.choice = choice;
    delta.ids = &id;
    delta.logprobs = &logprob;
    delta.n_ids = delta.n_logprobs = 1;
    delta.top = tops;
    delta.n_top = 1;
    Weft__V1__RunEvent e = WEFT__V1__RUN_EVENT__INIT;
    e.event_case = WEFT__V1__RUN_EVENT__EVENT_DELTA;
    e.delta = &delta;
    api_answer_event(a, prompt, &e, out);
}

static void push_done(ApiAnswer *a, guint prompt, uint32_t choice, const char *reason, GString *out)
{
    Weft__V1__RunChoiceDone done = WEFT__V1__RUN_CHOICE_DONE__INIT;
    done.choice = choice;
    done.finish_reason = (char *)reason;
    Weft__V1__RunEvent e = WEFT__V1__RUN_EVENT__INIT;
    e.event_case = WEFT__V1__RUN_EVENT__EVENT_CHOICE_DONE;
    e.choice_done = &done;
    api_answer_event(a, prompt, &e, out);
}

static const char *text_at(json_t *root, const char *path)
{
    g_auto(GStrv) steps = g_strsplit(path, ".", -1);
    json_t *at = root;
    for (char **step = steps; *step != NULL; step++) {
        at = g_ascii_isdigit(**step) ? json_array_get(at, (size_t)g_ascii_strtoull(*step, NULL, 10))
                                     : json_object_get(at, *step);
    }
    return json_string_value(at);
}

static void test_gathered_chat(void **state)
{
    g_autoptr(ApiRequest) r = good(API_CHAT, CHAT(",\"n\":2,\"logprobs\":true,\"top_logprobs\":1"));
    ApiAnswer *a = api_answer_new(r, NULL, "id-1", "the \"model\"", 99);
    GString *out = g_string_new(NULL);
    Weft__V1__RunStarted started;
    Weft__V1__RunEvent e = event_started(&started);
    api_answer_event(a, 0, &e, out);
    push_delta(a, 0, 0, "one\n\"", -0.5f, out);
    push_delta(a, 0, 1, "two", -INFINITY, out);
    push_delta(a, 0, 0, "\xff", -1, out);
    push_done(a, 0, 0, "stop", out);
    push_done(a, 0, 1, "length", out);
    assert_int_equal(out->len, 0);
    api_answer_end(a, out);
    json_t *root = json_loadb(out->str, out->len, JSON_REJECT_DUPLICATES, NULL);
    assert_non_null(root);
    assert_string_equal(text_at(root, "object"), "chat.completion");
    assert_string_equal(text_at(root, "model"), "the \"model\"");
    assert_string_equal(text_at(root, "system_fingerprint"), "fp_abcd01020304");
    assert_string_equal(text_at(root, "choices.0.message.content"), "one\n\"\xef\xbf\xbd");
    assert_string_equal(text_at(root, "choices.1.message.role"), "assistant");
    assert_string_equal(text_at(root, "choices.1.finish_reason"), "length");
    json_t *usage = json_object_get(root, "usage");
    assert_int_equal(json_integer_value(json_object_get(usage, "prompt_tokens")), 4);
    assert_int_equal(json_integer_value(json_object_get(usage, "completion_tokens")), 3);
    assert_int_equal(json_integer_value(json_object_get(usage, "total_tokens")), 7);
    json_t *second = json_array_get(json_object_get(root, "choices"), 1);
    json_t *token =
        json_array_get(json_object_get(json_object_get(second, "logprobs"), "content"), 0);
    assert_true(json_number_value(json_object_get(token, "logprob")) == -9999);
    assert_int_equal(json_array_size(json_object_get(token, "top_logprobs")), 1);
    json_decref(root);
    g_string_free(out, TRUE);
    api_answer_free(a);
}

/* Every "data: " of a stream, parsed; [DONE] must be the last. Returned array. */
static json_t *frames_until(const GString *out, const char *last)
{
    g_auto(GStrv) parts = g_strsplit(out->str, "\n\n", -1);
    json_t *frames = json_array();
    guint n = g_strv_length(parts);
    assert_string_equal(parts[n - 1], "");
    if (last != NULL) {
        assert_string_equal(parts[n - 2], last);
    } else {
        assert_null(strstr(out->str, "[DONE]"));
    }
    for (guint i = 0; i + (last != NULL ? 2 : 1) < n; i++) {
        assert_true(g_str_has_prefix(parts[i], "data: "));
        json_t *frame = json_loads(parts[i] + 6, JSON_REJECT_DUPLICATES, NULL);
        assert_non_null(frame);
        json_array_append_new(frames, frame);
    }
    return frames;
}

static json_t *frames_of(const GString *out)
{
    return frames_until(out, "data: [DONE]");
}

static void test_streamed_chat(void **state)
{
    g_autoptr(ApiRequest) r =
        good(API_CHAT, CHAT(",\"stream\":true,\"stream_options\":{\"include_usage\":true}"));
    ApiAnswer *a = api_answer_new(r, NULL, "id-1", "m", 99);
    GString *out = g_string_new(NULL);
    Weft__V1__RunStarted started;
    Weft__V1__RunEvent e = event_started(&started);
    api_answer_event(a, 0, &e, out);
    api_answer_event(a, 0, &e, out); /* a stream that was resumed: nothing is said twice */
    push_delta(a, 0, 0, "one", -1, out);
    push_delta(a, 0, 0, "", -1, out); /* held back: no frame */
    push_done(a, 0, 0, "stop", out);
    push_done(a, 0, 0, "stop", out);
    push_delta(a, 0, 5, "no such choice", -1, out);
    api_answer_end(a, out);
    json_t *frames = frames_of(out);
    assert_int_equal(json_array_size(frames), 4);
    assert_string_equal(text_at(frames, "0.choices.0.delta.role"), "assistant");
    assert_string_equal(text_at(frames, "0.object"), "chat.completion.chunk");
    assert_string_equal(text_at(frames, "1.choices.0.delta.content"), "one");
    assert_null(text_at(frames, "1.choices.0.finish_reason"));
    assert_string_equal(text_at(frames, "2.choices.0.finish_reason"), "stop");
    assert_true(json_is_null(json_object_get(json_array_get(frames, 2), "usage")));
    json_t *last = json_array_get(frames, 3);
    assert_int_equal(json_array_size(json_object_get(last, "choices")), 0);
    json_t *usage = json_object_get(last, "usage");
    assert_int_equal(json_integer_value(json_object_get(usage, "completion_tokens")), 2);
    json_decref(frames);
    g_string_free(out, TRUE);
    api_answer_free(a);
}

static void test_streamed_error(void **state)
{
    g_autoptr(ApiRequest) r = good(API_COMPLETION, TEXT(",\"stream\":true"));
    ApiAnswer *a = api_answer_new(r, NULL, "id-1", "m", 99);
    GString *out = g_string_new(NULL);
    push_delta(a, 0, 0, "one", -1, out);
    g_autoptr(GError) error =
        g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST, "worker w3 lost: %s", "no heartbeat");
    g_autoptr(ApiError) said = api_error_from(error, "r-1");
    api_answer_fail(a, said, out);
    json_t *frames = frames_until(out, NULL);
    assert_string_equal(text_at(frames, "1.error.message"), "worker w3 lost: no heartbeat");
    assert_string_equal(text_at(frames, "1.error.code"), "worker_lost");
    json_decref(frames);
    g_string_free(out, TRUE);
    api_answer_free(a);
}

static void test_errors_tell_no_addresses(void **state)
{
    static const struct {
        int code, status;
        bool told;
    } cases[] = {
        {WEFT_ERROR_INVALID, 400, true},     {WEFT_ERROR_NOT_FOUND, 404, false},
        {WEFT_ERROR_IO, 500, false},         {WEFT_ERROR_UNREACHABLE, 503, false},
        {WEFT_ERROR_WORKER_LOST, 503, true}, {WEFT_ERROR_DEADLINE, 504, true},
        {WEFT_ERROR_FAILED, 500, false},     {WEFT_ERROR_IMPOSSIBLE, 503, true},
        {WEFT_ERROR_FULL, 429, true},        {WEFT_ERROR_TOO_LONG, 400, true},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autoptr(GError) error =
            g_error_new_literal(WEFT_ERROR, cases[i].code, "/srv/x at 10.0.0.1");
        g_autoptr(ApiError) said = api_error_from(error, "r-0815");
        assert_int_equal(said->status, cases[i].status);
        assert_true((strstr(said->message, "10.0.0.1") != NULL) == cases[i].told);
        assert_true(cases[i].told || strstr(said->message, "r-0815") != NULL);
        assert_true((said->status == 503 || said->status == 429) == (said->retry_after_s > 0));
    }
}

static void test_echo_with_logprobs(void **state)
{
    g_autoptr(ApiRequest) r =
        good(API_COMPLETION, "{\"prompt\":[5,6],\"echo\":true,\"logprobs\":1,\"n\":2}");
    ApiAnswer *a = api_answer_new(r, NULL, "id-1", "m", 99);
    GString *out = g_string_new(NULL);
    uint32_t id = 6;
    float logprob = -0.25f;
    Weft__V1__RunDelta delta = WEFT__V1__RUN_DELTA__INIT;
    delta.ids = &id;
    delta.logprobs = &logprob;
    delta.n_ids = delta.n_logprobs = 1;
    Weft__V1__RunEvent e = WEFT__V1__RUN_EVENT__INIT;
    e.event_case = WEFT__V1__RUN_EVENT__EVENT_DELTA;
    e.delta = &delta;
    api_answer_score(a, 0, &e);
    api_answer_echo(a, 0, out);
    for (uint32_t i = 0; i < 2; i++) {
        push_delta(a, 0, i, "x", -1, out);
        push_done(a, 0, i, "length", out);
    }
    api_answer_end(a, out);
    json_t *root = json_loads(out->str, JSON_REJECT_DUPLICATES, NULL);
    assert_non_null(root);
    for (size_t i = 0; i < 2; i++) {
        json_t *choice = json_array_get(json_object_get(root, "choices"), i);
        json_t *logprobs = json_object_get(choice, "logprobs");
        json_t *values = json_object_get(logprobs, "token_logprobs");
        assert_int_equal(json_array_size(values), 3);
        assert_int_equal(json_array_size(json_object_get(logprobs, "tokens")), 3);
        assert_int_equal(json_array_size(json_object_get(logprobs, "text_offset")), 3);
        assert_true(json_is_null(json_array_get(values, 0)));
        assert_true(json_number_value(json_array_get(values, 1)) == -0.25);
        assert_true(json_is_null(json_array_get(json_object_get(logprobs, "top_logprobs"), 0)));
    }
    json_decref(root);
    g_string_free(out, TRUE);
    api_answer_free(a);
}

static void test_any_bytes_become_json(void **state)
{
    for (unsigned seed = 0; seed < 2000; seed++) {
        char bytes[24];
        uint64_t x = (seed + 1) * UINT64_C(0x9e3779b97f4a7c15);
        for (size_t i = 0; i < sizeof bytes; i++) {
            x ^= x << 13, x ^= x >> 7, x ^= x << 17;
            bytes[i] = (char)(x >> 32);
        }
        GString *out = g_string_new(NULL);
        json_text_bytes(out, bytes, sizeof bytes);
        json_t *back = json_loadb(out->str, out->len, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
        assert_non_null(back);
        json_decref(back);
        g_string_free(out, TRUE);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_limits_are_configuration),
        cmocka_unit_test(test_bodies_that_are_refused),
        cmocka_unit_test(test_bytes_that_are_parsed),
        cmocka_unit_test(test_strings_are_no_structure),
        cmocka_unit_test(test_nesting_is_measured_first),
        cmocka_unit_test(test_values_are_counted),
        cmocka_unit_test(test_strings_and_names_are_counted),
        cmocka_unit_test(test_a_full_chat),
        cmocka_unit_test(test_defaults_are_openais),
        cmocka_unit_test(test_prompts_in_all_forms),
        cmocka_unit_test(test_fields_out_of_range),
        cmocka_unit_test(test_lists_beyond_their_caps),
        cmocka_unit_test(test_gathered_chat),
        cmocka_unit_test(test_streamed_chat),
        cmocka_unit_test(test_streamed_error),
        cmocka_unit_test(test_errors_tell_no_addresses),
        cmocka_unit_test(test_echo_with_logprobs),
        cmocka_unit_test(test_any_bytes_become_json),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
