/* What a load measures with: quantiles against sorting, event streams cut in every way, what an
 * answer's events say, limits and addresses as people write them. */
#include "tools/weft/latency.h"
#include "tools/weft/load.h"
#include "tools/weft/shown.h"
#include "tools/weft/sse.h"
#include "tools/weft/stream_answer.h"

#include "proto/base/error.h"
#include "proto/base/random.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* ---- quantiles ---- */

static int by_value(const void *a, const void *b)
{
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void check_quantiles(int64_t *values, size_t n)
{
    static const double quantiles[] = {0, 0.01, 0.25, 0.5, 0.9, 0.99, 0.999, 1};
    Latency *l = latency_new();
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        latency_add(l, values[i]);
        sum += (double)values[i];
    }
    qsort(values, n, sizeof *values, by_value);
    for (size_t i = 0; i < G_N_ELEMENTS(quantiles); i++) {
        const size_t rank = (size_t)MAX(ceil(quantiles[i] * (double)n), 1);
        const double exact = (double)values[rank - 1] / 1e6,
                     got = latency_quantile_s(l, quantiles[i]);
        assert_true(fabs(got - exact) <= 0.004 * exact + 1e-12);
    }
    assert_int_equal(latency_n(l), n);
    assert_true(latency_max_s(l) == (double)values[n - 1] / 1e6);
    assert_true(fabs(latency_mean_s(l) - sum / (double)n / 1e6) < 1e-9 * (sum / (double)n));
    latency_free(l);
}

static void quantiles_are_those_of_the_sorted_values(void **state)
{
    RandomSeeded random;
    random_seeded_init(&random, 7);
    for (unsigned round = 0; round < 40; round++) {
        const size_t n = 1 + random_u64(&random.base) % 2000;
        g_autofree int64_t *values = g_new(int64_t, n);
        for (size_t i = 0; i < n; i++) { /* from microseconds to days */
            values[i] =
                1 + (int64_t)(random_u64(&random.base) >> (24 + random_u64(&random.base) % 40));
        }
        check_quantiles(values, n);
    }
}

static void small_times_are_exact_and_strange_ones_are_kept(void **state)
{
    Latency *l = latency_new();
    assert_true(latency_quantile_s(l, 0.5) == 0 && latency_mean_s(l) == 0 && latency_max_s(l) == 0);
    for (int64_t us = 0; us < 200; us++) {
        latency_add(l, us);
    }
    assert_true(latency_quantile_s(l, 0.5) == 99e-6 && latency_quantile_s(l, 1) == 199e-6);
    latency_add(l, -5);
    assert_true(latency_quantile_s(l, 0) == 0);
    latency_add(l, INT64_MAX);
    assert_true(latency_max_s(l) == (double)INT64_MAX / 1e6);
    assert_true(latency_quantile_s(l, 0.99) < 1e-3 && latency_quantile_s(l, 1) > 1e6);
    latency_free(l);
}

/* ---- event streams ---- */

static void keep_event(const char *data, size_t length, void *user)
{
    assert_int_equal(data[length], '\0');
    g_ptr_array_add(user, g_strndup(data, length));
}

static void check_events(const char *stream, const char *const *expected)
{
    const size_t length = strlen(stream);
    for (size_t cut = 1; cut <= length; cut++) { /* pieces of every size; the last is the whole */
        g_autoptr(GPtrArray) got = g_ptr_array_new_with_free_func(g_free);
        SseReader *r = sse_reader_new(1000, keep_event, got);
        for (size_t at = 0; at < length; at += cut) {
            assert_true(sse_reader_feed(r, stream + at, MIN(cut, length - at)));
        }
        assert_int_equal(got->len, g_strv_length((char **)expected));
        for (guint i = 0; i < got->len; i++) {
            assert_string_equal(got->pdata[i], expected[i]);
        }
        sse_reader_free(r);
    }
}

static void events_are_the_same_however_they_are_cut(void **state)
{
    check_events("data: {\"a\":1}\n\ndata: two\n\ndata: [DONE]\n\n",
                 (const char *[]){"{\"a\":1}", "two", "[DONE]", NULL});
    check_events(": keep-alive\n\ndata: a\n: in between\ndata: b\n\n",
                 (const char *[]){"a\nb", NULL});
    check_events("data: a\r\n\r\ndata:b\r\rdata:  c\n\n", (const char *[]){"a", "b", " c", NULL});
    check_events("\xef\xbb\xbf"
                 "data: bom\n\n",
                 (const char *[]){"bom", NULL});
    check_events("event: x\nid: 7\nretry: 10\ndata: y\n\nevent: alone\n\n",
                 (const char *[]){"y", NULL});
    check_events("data\n\ndata:\ndata:\n\n", (const char *[]){"", "\n", NULL});
    check_events("database: no\n dat: no\n\ndata: cut off\n", (const char *[]){NULL});
    check_events("data: Grü\xc3\x9f"
                 "e\n\n\n\ndata: x:y\n\n",
                 (const char *[]){"Grü\xc3\x9f"
                                  "e",
                                  "x:y", NULL});
}

static void what_is_too_long_ends_the_stream_until_the_next(void **state)
{
    g_autoptr(GPtrArray) got = g_ptr_array_new_with_free_func(g_free);
    SseReader *r = sse_reader_new(8, keep_event, got);
    assert_true(sse_reader_feed(r, "data: 12\n\n", 10));
    assert_false(sse_reader_feed(r, "data: 123", 9));
    assert_false(sse_reader_feed(r, "\n\ndata: 1\n\n", 12));
    sse_reader_reset(r);
    assert_false(
        sse_reader_feed(r, "data:1\ndata:2\ndata:3\ndata:4\ndata:5\n\n", 37)); /* lines fit */
    sse_reader_reset(r);
    assert_true(sse_reader_feed(r, "data: ok\n\n", 10));
    assert_int_equal(got->len, 2);
    assert_string_equal(got->pdata[1], "ok");
    sse_reader_free(r);
}

/* ---- answers ---- */

static bool take(StreamAnswer *a, const char *text)
{
    return stream_answer_take(a, text, strlen(text));
}

static void an_answer_counts_text_and_usage(void **state)
{
    StreamAnswer a = {0};
    assert_false(take(&a, "{\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}],"
                          "\"system_fingerprint\":\"fp_1\"}"));
    assert_true(
        take(&a, "{\"choices\":[{\"delta\":{\"content\":\"a\"}}],\"usage\":null,\"error\":null}"));
    assert_true(take(&a, "{\"choices\":[{\"delta\":{\"reasoning_content\":\"b\"}}]}"));
    assert_true(take(&a, "{\"choices\":[{\"text\":\"\"},{\"text\":\"c\"}]}"));
    assert_false(take(&a, "{\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}"));
    assert_false(a.has_usage);
    assert_false(
        take(&a, "{\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":5}}"));
    assert_false(a.done);
    assert_false(take(&a, "[DONE]"));
    assert_true(a.done && a.has_usage && a.failed == NULL);
    assert_int_equal(a.n_texts, 3);
    assert_int_equal(a.prompt_tokens, 3);
    assert_int_equal(a.output_tokens, 5);
    assert_string_equal(a.fingerprint, "fp_1");
    assert_false(take(&a, "{\"choices\":[{\"text\":\"late\"}]}"));
    assert_int_equal(a.n_texts, 3);
    stream_answer_clear(&a);
}

static void an_error_event_fails_the_answer(void **state)
{
    static const struct {
        const char *data, *failed, *error;
    } cases[] = {
        {"{\"error\":{\"message\":\"no\\u001b[31m room\"}}", "error event", "no [31m room"},
        {"{\"error\":\"plain\"}", "error event", "plain"},
        {"{\"error\":{\"code\":5}}", "error event", "{\"error\":{\"code\":5}}"},
        {"[1]", "malformed", "an event is no JSON object: [1]"},
        {"{\"choices\":", "malformed", "an event is no JSON object: {\"choices\":"},
        {"\xff\xfe", "malformed", "an event is no JSON object: \xef\xbf\xbd\xef\xbf\xbd"},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        StreamAnswer a = {0};
        assert_false(take(&a, cases[i].data));
        assert_string_equal(a.failed, cases[i].failed);
        assert_string_equal(a.error, cases[i].error);
        take(&a, "[DONE]");
        assert_false(a.done);
        stream_answer_clear(&a);
    }
    StreamAnswer odd = {0}; /* JSON of other shapes than expected is no failure and no text */
    assert_false(take(&odd, "{\"choices\":{\"text\":\"x\"},\"usage\":[1]}"));
    assert_false(take(
        &odd,
        "{\"choices\":[null,1,{\"delta\":\"x\"},{\"text\":7}],\"usage\":{\"prompt_tokens\":-1}}"));
    assert_true(odd.failed == NULL && !odd.has_usage && odd.n_texts == 0);
    stream_answer_clear(&odd);
}

static void lines_are_shown_safely(void **state)
{
    static const struct {
        const char *text, *shown;
        glong most;
    } cases[] = {
        {"plain", "plain", 10}, {"a\nb\tc\x1b", "a b c ", 10}, {"\xc3\x28", "\xef\xbf\xbd(", 10},
        {"12345", "12345", 5},  {"123456", "12345...", 5},     {"ääää", "ää...", 2},
        {"\xc2\x9b", " ", 4}, /* a control character of two bytes */
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autofree char *shown = shown_line(cases[i].text, -1, cases[i].most);
        assert_string_equal(shown, cases[i].shown);
    }
}

/* ---- what people write ---- */

static void addresses(void **state)
{
    static const char *const same[] = {"h:80", "http://h:80", "http://h:80/", "http://h:80/v1",
                                       "h:80/v1//"};
    for (size_t i = 0; i < G_N_ELEMENTS(same); i++) {
        g_autofree char *url = load_base_url(same[i], NULL);
        assert_string_equal(url, "http://h:80/v1");
    }
    g_autofree char *other = load_base_url("https://[::1]:8080/api/", NULL);
    assert_string_equal(other, "https://[::1]:8080/api");
    static const char *const bad[] = {"",           "ftp://h",       "file:///etc/passwd",
                                      "http://",    "http://h:port", "http://h?a=b",
                                      "http://h/#x"};
    for (size_t i = 0; i < G_N_ELEMENTS(bad); i++) {
        g_autoptr(GError) error = NULL;
        assert_null(load_base_url(bad[i], &error));
        assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
    }
}

static void limits(void **state)
{
    LoadLimits l = {0};
    assert_true(load_limits_parse("ttft=500ms,e2e=5s", &l, NULL));
    assert_true(l.ttft_us == 500000 && l.itl_us == 0 && l.e2e_us == 5000000);
    assert_true(load_limits_parse("itl=1", &l, NULL));
    assert_true(l.itl_us == 1000000);
    static const char *const bad[] = {"", "ttft", "ttft=", "ttft=x", "tpot=5s", "ttft=1s,,", "=5s"};
    for (size_t i = 0; i < G_N_ELEMENTS(bad); i++) {
        g_autoptr(GError) error = NULL;
        assert_false(load_limits_parse(bad[i], &l, &error));
        assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(quantiles_are_those_of_the_sorted_values),
        cmocka_unit_test(small_times_are_exact_and_strange_ones_are_kept),
        cmocka_unit_test(events_are_the_same_however_they_are_cut),
        cmocka_unit_test(what_is_too_long_ends_the_stream_until_the_next),
        cmocka_unit_test(an_answer_counts_text_and_usage),
        cmocka_unit_test(an_error_event_fails_the_answer),
        cmocka_unit_test(lines_are_shown_safely),
        cmocka_unit_test(addresses),
        cmocka_unit_test(limits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
