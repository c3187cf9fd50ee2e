/* What config.json says of the rotation, held to libm's powers in double. */
#include "proto/base/error.h"
#include "proto/model/hf_rope.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>

static bool read_rope(const char *config, uint32_t head_size, RopeSpec *rope, float **factors,
                      GError **error)
{
    json_t *object = json_loads(config, 0, NULL);
    assert_non_null(object);
    const bool ok = hf_rope_read("directory", object, head_size, rope, factors, error);
    json_decref(object);
    return ok;
}

static void assert_factors(const float *got, uint32_t dims, double base, double factor, double low,
                           double high, double context)
{
    unsigned kept = 0, between = 0, stretched = 0;
    for (uint32_t i = 0; i < dims / 2; i++) {
        const double speed = pow(base, -2.0 * i / dims), wave = 2 * acos(-1.0) / speed;
        double wanted = speed;
        if (wave > context / low) {
            wanted = speed / factor;
            stretched++;
        } else if (wave >= context / high) {
            const double smooth = (context / wave - low) / (high - low);
            wanted = (1 - smooth) * speed / factor + smooth * speed;
            between++;
        } else {
            kept++;
        }
        assert_true(fabs((double)got[i] / (speed / wanted) - 1) < 1e-6);
    }
    assert_true(kept > 0 && between > 0 && stretched > 0);
}

static void test_llama3(void **state)
{
    RopeSpec rope;
    float *factors;
    (void)state;
    /* Llama 3.1 8B; then Llama 3.2 1B; then heads whose half is no power of two, in newer words */
    assert_true(
        read_rope("{\"rope_theta\": 500000.0, \"rope_scaling\": {\"rope_type\": \"llama3\", "
                  "\"factor\": 8.0, \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0, "
                  "\"original_max_position_embeddings\": 8192}}",
                  128, &rope, &factors, NULL));
    assert_int_equal(rope.scaling, ROPE_SCALING_FACTORS);
    assert_int_equal(rope.dims, 128);
    assert_true(rope.freq_base == 500000.0 && rope.factor == 1.0);
    assert_factors(factors, 128, 500000, 8, 1, 4, 8192);
    g_free(factors);
    assert_true(read_rope("{\"rope_theta\": 500000.0, \"rope_scaling\": {\"type\": \"llama3\", "
                          "\"factor\": 32, \"low_freq_factor\": 1, \"high_freq_factor\": 4, "
                          "\"original_max_position_embeddings\": 8192}}",
                          64, &rope, &factors, NULL));
    assert_factors(factors, 64, 500000, 32, 1, 4, 8192);
    g_free(factors);
    assert_true(
        read_rope("{\"rope_parameters\": {\"rope_theta\": 10000, \"rope_type\": \"llama3\", "
                  "\"factor\": 4, \"low_freq_factor\": 1, \"high_freq_factor\": 8, "
                  "\"original_max_position_embeddings\": 2048}}",
                  80, &rope, &factors, NULL));
    assert_factors(factors, 80, 10000, 4, 1, 8, 2048);
    g_free(factors);
}

static void test_plain_and_linear(void **state)
{
    RopeSpec rope;
    float *factors;
    (void)state;
    static const char *const plain[] = {"{\"rope_theta\": 20000}",
                                        "{\"rope_theta\": 20000, \"rope_scaling\": null}",
                                        "{\"rope_parameters\": {\"rope_type\": \"default\", "
                                        "\"rope_theta\": 20000}}"};
    for (size_t i = 0; i < G_N_ELEMENTS(plain); i++) {
        assert_true(read_rope(plain[i], 64, &rope, &factors, NULL));
        assert_int_equal(rope.scaling, ROPE_SCALING_NONE);
        assert_true(rope.freq_base == 20000 && rope.factor == 1 && rope.dims == 64);
        assert_null(factors);
    }
    assert_true(read_rope("{\"rope_scaling\": {\"type\": \"linear\", \"factor\": 2.5}}", 64, &rope,
                          &factors, NULL));
    assert_int_equal(rope.scaling, ROPE_SCALING_LINEAR);
    assert_true(rope.factor == 2.5 && rope.freq_base == 10000);
    assert_null(factors);
}

static void test_refused(void **state)
{
    static const struct {
        const char *config, *word;
    } cases[] = {
        {"{\"rope_scaling\": {\"rope_type\": \"longrope\"}}", "longrope"},
        {"{\"rope_scaling\": {\"type\": \"linear\"}}", "linear"},
        {"{\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8}}", "llama3"},
        {"{\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 4, "
         "\"high_freq_factor\": 4, \"original_max_position_embeddings\": 8192}}",
         "out of range"},
    };
    (void)state;
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autoptr(GError) error = NULL;
        RopeSpec rope;
        float *factors;
        assert_false(read_rope(cases[i].config, 64, &rope, &factors, &error));
        assert_int_equal(error->code, WEFT_ERROR_INVALID);
        assert_non_null(strstr(error->message, cases[i].word));
        assert_null(factors);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_llama3),
                                       cmocka_unit_test(test_plain_and_linear),
                                       cmocka_unit_test(test_refused)};
    return cmocka_run_group_tests_name("model-hf_rope", tests, NULL, NULL);
}
