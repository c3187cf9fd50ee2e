/* The project's own exp, log, pow, sin and cos against libm in long double. */
#include "kernels/ops/act.h"
#include "proto/model/blocks.h"
#include "kernels/ops/math.h"
#include "tests/unit/kernels/numbers.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

static double ulps(float got, long double want)
{
    const long double ulp = ldexpl(1.0L, (int)floorl(log2l(fabsl(want))) - 23);
    return (double)(fabsl((long double)got - want) / ulp);
}

static void test_exp32_is_within_an_ulp(void **state)
{
    double worst = 0.0;
    for (uint32_t bits = 0; bits < 0x42b17218u; bits += 997) {
        const float x = numbers_float_of(bits);
        worst = fmax(worst, ulps(exp32(x), expl((long double)x)));
        if (x < 87.3f) {
            worst = fmax(worst, ulps(exp32(-x), expl(-(long double)x)));
        }
    }
    assert_true(worst < 0.9);
}

static void test_exp32_at_its_edges(void **state)
{
    assert_int_equal(float_bits(exp32(-INFINITY)), 0);
    assert_int_equal(float_bits(exp32(-1e30f)), 0);
    assert_int_equal(float_bits(exp32(-87.34f)), 0);
    assert_true(exp32(EXP32_LOWEST) >= 0x1p-126f);
    assert_true(exp32(EXP32_HIGHEST) > 3.4e38f && isfinite(exp32(EXP32_HIGHEST)));
    assert_true(exp32(nextafterf(EXP32_HIGHEST, 100.0f)) == INFINITY);
    assert_true(exp32(INFINITY) == INFINITY);
    assert_true(exp32(0.0f) == 1.0f && exp32(-0.0f) == 1.0f);
    /* a NaN of any payload stays one: its low bits must not reach the exponent */
    for (uint32_t payload = 1; payload < 0x800000u; payload = payload * 3 + 1) {
        assert_true(isnan(exp32(numbers_float_of(0x7f800000u | payload))));
        assert_true(isnan(exp32(numbers_float_of(0xff800000u | payload))));
    }
}

static void test_log32_is_within_an_ulp(void **state)
{
    double worst = 0.0;
    for (uint32_t bits = 0x00800000u; bits < 0x7f800000u; bits += 997) {
        const float x = numbers_float_of(bits);
        if (x != 1.0f) {
            worst = fmax(worst, ulps(log32_inline(x), logl((long double)x)));
        }
    }
    assert_true(worst < 1.0);
    assert_true(log32_inline(1.0f) == 0.0f);
}

static void test_exponential_and_logarithm(void **state)
{
    Numbers numbers = {1};
    for (unsigned i = 0; i < 200000; i++) {
        const double x = numbers_uniform(&numbers, -700.0, 700.0);
        const long double want = expl((long double)x);
        assert_true(fabsl((det_exp(x) - want) / want) < 1e-15L);
        const double y = (double)want * numbers_uniform(&numbers, 0.5, 2.0);
        const long double log_want = logl((long double)y);
        assert_true(fabsl(det_log(y) - log_want) <= 4e-16L * fabsl(log_want));
        const double near = 1.0 + numbers_uniform(&numbers, -1e-3, 1e-3);
        const long double near_want = logl((long double)near);
        assert_true(fabsl(det_log(near) - near_want) <= 4e-16L * fabsl(near_want));
    }
    assert_true(det_exp(-800.0) == 0.0 && det_exp(800.0) == (double)INFINITY);
    assert_true(det_exp(1e9) == (double)INFINITY && det_exp(-1e9) == 0.0);
    assert_true(det_exp(0.0) == 1.0 && det_log(1.0) == 0.0);
    assert_true(fabs(det_exp(-740.0) - exp(-740.0)) <= 0x1p-1074);
    assert_true(isnan(det_exp((double)NAN)) && isnan(det_log(-1.0)) && isnan(det_log((double)NAN)));
    assert_true(det_log(0.0) == -(double)INFINITY && det_log((double)INFINITY) == (double)INFINITY);
    assert_true(fabs(det_log(0x1p-1074) + 744.4400719213812) < 1e-12);
}

static void test_power(void **state)
{
    Numbers numbers = {2};
    for (unsigned i = 0; i < 200000; i++) {
        const double x = det_exp(numbers_uniform(&numbers, -30.0, 30.0));
        const double y = numbers_uniform(&numbers, -20.0, 20.0);
        const long double want = powl((long double)x, (long double)y);
        assert_true(fabsl((det_pow(x, y) - want) / want) < 1e-14L);
    }
    assert_true(det_pow(10000.0, 0.0) == 1.0 && det_pow(2.0, 10.0) == 1024.0);
    assert_true(det_pow(10.0, 400.0) == (double)INFINITY && det_pow(10.0, -400.0) == 0.0);
}

static void test_circle(void **state)
{
    Numbers numbers = {3};
    for (unsigned i = 0; i < 300000; i++) {
        const double x = numbers_uniform(&numbers, -1.0, 1.0) * (i % 3 == 0   ? 1e9
                                                                 : i % 3 == 1 ? 131072.0
                                                                              : 4.0);
        assert_true(fabsl(det_sin(x) - sinl((long double)x)) < 1e-14L);
        assert_true(fabsl(det_cos(x) - cosl((long double)x)) < 1e-14L);
    }
    assert_true(det_sin(0.0) == 0.0 && det_cos(0.0) == 1.0);
    assert_true(isnan(det_sin((double)INFINITY)) && isnan(det_cos((double)NAN)));
}

static void test_halves_round_to_even_and_keep_subnormals(void **state)
{
    for (uint32_t h = 0; h < 0x10000u; h++) {
        const float f = f16_to_f32((uint16_t)h);
        const uint32_t magnitude = h & 0x7fffu;
        if (magnitude > 0x7c00u) {
            assert_true(isnan(f));
            continue;
        }
        const double want = magnitude == 0x7c00u ? (double)INFINITY
                            : magnitude < 0x400u
                                ? magnitude * 0x1p-24
                                : ldexp(1024 + (magnitude & 1023u), (int)(magnitude >> 10) - 25);
        assert_true(f == (float)(h & 0x8000u ? -want : want));
        assert_int_equal(f32_to_f16(f), h);
        if (magnitude <
            0x7bffu) { /* halfway to the next goes to the even one, anything more to the next */
            const float next = f16_to_f32((uint16_t)(h + 1));
            const float middle = f + (next - f) * 0.5f;
            assert_int_equal(f32_to_f16(middle), (h & 1u) != 0 ? h + 1 : h);
            assert_int_equal(f32_to_f16(nextafterf(middle, next)), h + 1);
            assert_int_equal(f32_to_f16(nextafterf(middle, f)), h);
        }
    }
    assert_int_equal(f32_to_f16(65519.0f), 0x7bff);
    assert_int_equal(f32_to_f16(65520.0f), 0x7c00);
    assert_true(isnan(f16_to_f32(f32_to_f16(NAN))));
    assert_int_equal(f32_to_bf16(1.0f), 0x3f80);
    assert_int_equal(f32_to_bf16(numbers_float_of(0x3f808000u)), 0x3f80);
    assert_int_equal(f32_to_bf16(numbers_float_of(0x3f818000u)), 0x3f82);
    assert_int_equal(f32_to_bf16(numbers_float_of(0x3f808001u)), 0x3f81);
    assert_true(isnan(bf16_to_f32(f32_to_bf16(numbers_float_of(0x7f800001u)))));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exp32_is_within_an_ulp),
        cmocka_unit_test(test_exp32_at_its_edges),
        cmocka_unit_test(test_log32_is_within_an_ulp),
        cmocka_unit_test(test_exponential_and_logarithm),
        cmocka_unit_test(test_power),
        cmocka_unit_test(test_circle),
        cmocka_unit_test(test_halves_round_to_even_and_keep_subnormals),
    };
    return cmocka_run_group_tests_name("math", tests, NULL, NULL);
}
