/* Every field of a request at and beyond its limits: the message names field and value. */
#include "coordinator/gateway/requests/request_check.h"
#include "proto/base/error.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

static Weft__V1__Sampler sampler;
static Weft__V1__Layout layout;

static Weft__V1__RunRequest good(void)
{
    Weft__V1__RunRequest r = WEFT__V1__RUN_REQUEST__INIT;
    sampler = (Weft__V1__Sampler)WEFT__V1__SAMPLER__INIT;
    layout = (Weft__V1__Layout)WEFT__V1__LAYOUT__INIT;
    r.model = (char *)"m.gguf";
    r.prompt = (char *)"hi";
    r.max_tokens = 1;
    r.sampler = &sampler;
    r.layout = &layout;
    return r;
}

static void expect(const Weft__V1__RunRequest *r, const char *needle /* NULL: accepted */)
{
    g_autoptr(GError) error = NULL;
    bool ok = request_check(r, &error);
    if (needle == NULL) {
        g_assert_no_error(error);
        assert_true(ok);
        return;
    }
    assert_false(ok);
    assert_int_equal(error->code, WEFT_ERROR_INVALID);
    if (strstr(error->message, needle) == NULL) {
        fail_msg("'%s' is not in '%s'", needle, error->message);
    }
}

static void test_good(void **state)
{
    Weft__V1__RunRequest r = good();
    expect(&r, NULL);
    sampler.top_p = 1;
    sampler.min_p = 1;
    sampler.temperature = 1e6f;
    expect(&r, NULL);
    r.sampler = NULL;
    r.layout = NULL;
    expect(&r, NULL);
    r.prompt = (char *)""; /* an empty prompt is a prompt: BOS may be enough */
    expect(&r, NULL);
}

static void test_sampler(void **state)
{
    static const struct {
        size_t offset;
        float value;
        const char *needle;
    } cases[] = {
        {offsetof(Weft__V1__Sampler, temperature), -0.1f, "temperature -0.1 is out of range"},
        {offsetof(Weft__V1__Sampler, temperature), NAN, "temperature nan"},
        {offsetof(Weft__V1__Sampler, temperature), INFINITY, "temperature inf"},
        {offsetof(Weft__V1__Sampler, top_p), 1.5f, "top-p 1.5 is out of range: from 0 to 1"},
        {offsetof(Weft__V1__Sampler, top_p), -1, "top-p -1"},
        {offsetof(Weft__V1__Sampler, min_p), 2, "min-p 2"},
        {offsetof(Weft__V1__Sampler, repeat_penalty), -2, "repeat penalty -2"},
        {offsetof(Weft__V1__Sampler, repeat_penalty), NAN, "repeat penalty nan"},
        {offsetof(Weft__V1__Sampler, presence_penalty), 101, "presence penalty 101"},
        {offsetof(Weft__V1__Sampler, presence_penalty), NAN, "presence penalty nan"},
        {offsetof(Weft__V1__Sampler, frequency_penalty), -101, "frequency penalty -101"},
        {offsetof(Weft__V1__Sampler, frequency_penalty), INFINITY, "frequency penalty inf"},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        Weft__V1__RunRequest r = good();
        *(float *)(void *)((char *)&sampler + cases[i].offset) = cases[i].value;
        expect(&r, cases[i].needle);
    }
    Weft__V1__RunRequest r = good();
    sampler.penalty_window = 1u << 20;
    expect(&r, "penalty window");
}

static void test_kv_types(void **state)
{
    static const char *const names[] = {"", "f16", "bf16", "f32", "q8"};
    static const KvType types[] = {KV_F16, KV_F16, KV_BF16, KV_F32, KV_Q8};
    for (unsigned i = 0; i < G_N_ELEMENTS(names); i++) {
        KvType type;
        assert_true(request_kv_type(names[i], &type, NULL));
        assert_int_equal(type, types[i]);
    }
    Weft__V1__RunRequest r = good();
    r.kv = "q4";
    expect(&r, "kv type q4 is unknown: f16, bf16, f32 or q8");
}

static void test_logit_bias(void **state)
{
    enum { MOST = 1024 };
    static Weft__V1__LogitBias entries[MOST + 1], *pointers[MOST + 1];
    Weft__V1__RunRequest r = good();
    for (uint32_t i = 0; i <= MOST; i++) {
        entries[i] = (Weft__V1__LogitBias)WEFT__V1__LOGIT_BIAS__INIT;
        entries[i].id = i;
        pointers[i] = &entries[i];
    }
    sampler.logit_bias = pointers;
    sampler.n_logit_bias = MOST;
    expect(&r, NULL);
    sampler.n_logit_bias = MOST + 1;
    expect(&r, "1025 logit biases");
    sampler.n_logit_bias = 2;
    entries[1].id = 0;
    expect(&r, "id 0 is given twice");
    entries[1].id = 1;
    entries[1].bias = NAN;
    expect(&r, "logit bias nan");
    entries[1].bias = 1001;
    expect(&r, "logit bias 1001");
}

static void test_counts(void **state)
{
    Weft__V1__RunRequest r = good();
    r.max_tokens = 0;
    expect(&r, "number of tokens n 0");
    r = good();
    r.max_tokens = UINT32_MAX;
    expect(&r, "number of tokens n");
    r = good();
    r.streams = 100000;
    expect(&r, "streams 100000");
    r = good();
    layout.tp = 65;
    expect(&r, "tp 65");
    r = good();
    r.numerics = (char *)"sloppy";
    expect(&r, "numerics sloppy");
    r = good();
    r.kind = WEFT__V1__REQUEST_KIND__EMBED;
    expect(&r, "request kind 2");
    r = good();
    r.kind = WEFT__V1__REQUEST_KIND__SCORE;
    r.max_tokens = 0;
    expect(&r, NULL);
    r.score_window = 1;
    expect(&r, "score window 1");
    r = good();
    r.top_logprobs = 33;
    expect(&r, "top logprobs 33");
}

static void test_prompts_and_stops(void **state)
{
    Weft__V1__RunRequest r = good();
    r.random_prompt = 5;
    expect(&r, "2 are given");
    r = good();
    r.model = (char *)"";
    expect(&r, "no model");
    r = good();
    char *stops[17];
    for (size_t i = 0; i < G_N_ELEMENTS(stops); i++) {
        stops[i] = (char *)"x";
    }
    r.stop = stops;
    r.n_stop = 17;
    expect(&r, "17 stop strings");
    r.n_stop = 16;
    expect(&r, NULL);
    g_autofree char *longest = g_strnfill(257, 'x');
    stops[3] = longest;
    expect(&r, "stop string 3 has 257 bytes");
}

static void test_length(void **state)
{
    g_autoptr(GError) error = NULL;
    assert_true(request_check_length(63, 64, NULL));
    assert_false(request_check_length(64, 64, &error));
    assert_int_equal(error->code, WEFT_ERROR_TOO_LONG);
    assert_non_null(strstr(error->message, "prompt of 64 tokens does not fit the context of 64"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_good),
        cmocka_unit_test(test_sampler),
        cmocka_unit_test(test_kv_types),
        cmocka_unit_test(test_logit_bias),
        cmocka_unit_test(test_counts),
        cmocka_unit_test(test_prompts_and_stops),
        cmocka_unit_test(test_length),
    };
    return cmocka_run_group_tests_name("coordinator request check", tests, NULL, NULL);
}
