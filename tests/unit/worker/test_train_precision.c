/* Narrow products: bf16dot and f16 against their definition written out, closeness to f32, and the
 * same bits on other layouts. */
#include "tests/unit/kernels/numbers.h"
#include "tests/unit/worker/train_runs.h"

#include "kernels/ops/math.h"
#include "proto/model/blocks.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

enum { STEPS = 3 };

static float round_operand(Precision precision, float x)
{
    return precision == PRECISION_BF16 ? bf16_to_f32(f32_to_bf16(x)) : f16_to_f32(f32_to_f16(x));
}

static float flushed(float x)
{
    return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x;
}

/* One chain, step by step: pairs of bf16dot take the odd one first, groups of `period` steps are
 * padded to an even count. */
static float chain(Precision precision, const float *a, const float *b, uint32_t n, uint32_t period,
                   float acc)
{
    for (uint32_t t = 0; t < n;) {
        const uint32_t group = period == 0 ? n : period, u = t % group;
        const bool pairs = precision == PRECISION_BF16, two = u + 1 < group && t + 1 < n;
        if (pairs && two) {
            acc = flushed(fmaf(flushed(round_operand(precision, a[t + 1])),
                               flushed(round_operand(precision, b[t + 1])), acc));
        }
        acc = fmaf(round_operand(precision, a[t]), round_operand(precision, b[t]), acc);
        acc = pairs ? flushed(acc) : acc;
        t += pairs && two ? 2 : 1;
    }
    return acc;
}

/* c = a b^T, rows of n in [count][n] each. */
static void check_product(Precision precision, KernelIsa isa, uint32_t m, uint32_t n, uint32_t k,
                          uint32_t period, bool transposed)
{
    Numbers numbers = {m * 31 + n * 7 + k};
    g_autofree float *a = g_new(float, m *k), *b = g_new(float, n *k), *c = g_new0(float, m *n),
                     *at = g_new(float, m *k), *bt = g_new(float, n *k);
    for (uint32_t i = 0; i < m * k; i++) {
        a[i] = (float)numbers_uniform(&numbers, -2.0, 2.0);
        at[i % k * m + i / k] = a[i];
    }
    for (uint32_t i = 0; i < n * k; i++) {
        b[i] = (float)numbers_uniform(&numbers, -2.0, 2.0);
        bt[i % k * n + i / k] = b[i];
    }
    for (uint32_t i = 0; i < m * n; i++) {
        c[i] = (float)i;
    }
    const Kernels *kernels = kernels_get(isa);
    g_autofree float *gemm = g_new(float, gemm_scratch_floats(1));
    GemmSegment segments[4];
    const uint32_t group = period == 0 ? k : period, n_segments = k / group;
    for (uint32_t s = 0; s < n_segments; s++) {
        segments[s] = (GemmSegment){.a = (transposed ? at : a) + s * group * (transposed ? m : 1),
                                    .a_row = transposed ? 1 : k,
                                    .a_step = transposed ? m : 1,
                                    .b = (transposed ? bt : b) + s * group * (transposed ? n : 1),
                                    .b_step = transposed ? n : 1,
                                    .b_column = transposed ? 1 : k,
                                    .length = group,
                                    .continues = s + 1 < n_segments,
                                    .step = {.emit = 1}};
    }
    const GemmArgs args = {.m = m,
                           .n = n,
                           .segments = segments,
                           .n_segments = n_segments,
                           .accumulate = true,
                           .c = c,
                           .ld = n,
                           .scratch = gemm};
    precision_gemm(kernels, precision)(&args);
    for (uint32_t i = 0; i < m * n; i++) {
        const float want = chain(precision, a + i / n * k, b + i % n * k, k, period, (float)i);
        if (memcmp(&c[i], &want, sizeof want) != 0) {
            fail_msg("%s %u x %u x %u: %a, not %a", precision_name(precision), m, n, k,
                     (double)c[i], (double)want);
        }
    }
}

static void test_products(void **state)
{
    const KernelIsa isas[] = {ISA_GENERIC, kernels_best_isa()};
    for (Precision p = PRECISION_BF16; p <= PRECISION_F16; p++) {
        for (int i = 0; i < 2; i++) {
            check_product(p, isas[i], 1, 1, 1, 0, false);
            check_product(p, isas[i], 7, 33, 50, 0, false);
            check_product(p, isas[i], 20, 17, 51, 0, true);
            check_product(p, isas[i], 9, 40, 63, 21, true); /* three samples of 21 tokens */
        }
    }
}

/* Sums below the normal range are flushed at each step, and only in bf16. */
static void test_flush(void **state)
{
    const float a[4] = {0x1p-70f, 0x1p-70f, 0x1p-60f, 0x1p-60f},
                b[4] = {0x1p-70f, 0x1p-70f, 0x1p-60f, -0x1p-60f};
    float c[2] = {-0.0f, -0.0f};
    g_autofree float *gemm = g_new(float, gemm_scratch_floats(1));
    const GemmSegment segment = {.a = a,
                                 .a_row = 4,
                                 .a_step = 1,
                                 .b = b,
                                 .b_step = 1,
                                 .b_column = 4,
                                 .length = 2,
                                 .step = {.emit = 1}};
    const GemmArgs args = {
        .m = 1, .n = 1, .segments = &segment, .n_segments = 1, .c = c, .ld = 1, .scratch = gemm};
    const unsigned before = precision_begin(PRECISION_F32);
    precision_gemm(kernels_get(kernels_best_isa()), PRECISION_BF16)(&args);
    assert_true(c[0] == 0.0f); /* 2^-139 is a number that f32 has */
    const unsigned after = precision_begin(PRECISION_F32);
    assert_int_equal(before & 0xffc0u, after & 0xffc0u);
}

/* ---- whole runs ---- */

static void bf16(TrainRankOptions *options)
{
    options->precision = PRECISION_BF16;
}

static void f16(TrainRankOptions *options)
{
    options->precision = PRECISION_F16;
    options->scaling.dynamic = true;
}

static void test_close_to_f32(void **state)
{
    void (*const changes[])(TrainRankOptions *) = {bf16, f16};
    const Toy *const toys[] = {&toy_gpt2, &toy_llama};
    const RunSpread one = {.isa = kernels_best_isa()};
    for (int t = 0; t < 2; t++) {
        const RunResult want = run_toy(toys[t], &one, STEPS, NULL);
        for (int i = 0; i < 2; i++) {
            const RunResult got = run_toy(toys[t], &one, STEPS, changes[i]);
            assert_false(hash128_equal(&got.digest, &want.digest));
            for (int s = 0; s < STEPS; s++) {
                assert_true(fabsf(got.losses[s] - want.losses[s]) < (i == 0 ? 1e-2f : 1e-3f));
                assert_true(fabsf(got.norms[s] / want.norms[s] - 1.0f) < (i == 0 ? 2e-2f : 2e-3f));
            }
        }
    }
}

static void recompute(TrainRankOptions *options)
{
    options->recompute = RECOMPUTE_FULL;
}

static void selective(TrainRankOptions *options)
{
    options->recompute = RECOMPUTE_SELECTIVE;
}

static void zero_bubble(TrainRankOptions *options)
{
    options->schedule = PIPELINE_ZERO_BUBBLE;
}

static void test_same_on_other_layouts(void **state)
{
    void (*const definitions[])(TrainRankOptions *) = {bf16, f16};
    const Toy *const toys[] = {&toy_gpt2, &toy_llama};
    const KernelIsa best = kernels_best_isa();
    const RunSpread spreads[] = {{.threads = 2, .micro = 2, .isa = ISA_GENERIC},
                                 {.dp = 2, .pp = 2, .isa = best, .change = recompute},
                                 {.tp = 2, .dp = 2, .micro = 2, .isa = best, .change = selective},
                                 {.pp = 2, .tp = 2, .isa = best, .change = zero_bubble}};
    for (int i = 0; i < 4; i++) {
        const RunResult want =
            run_toy(toys[i % 2], &(const RunSpread){.isa = best}, STEPS, definitions[i / 2]);
        for (size_t s = 0; s < G_N_ELEMENTS(spreads); s++) {
            const RunResult got = run_toy(toys[i % 2], &spreads[s], STEPS, definitions[i / 2]);
            assert_same_run(&got, &want);
        }
    }
}

static void test_names(void **state)
{
    Precision precision;
    g_autoptr(GError) error = NULL;
    for (Precision p = PRECISION_F32; p < PRECISION_LIMIT; p++) {
        assert_true(precision_parse(precision_name(p), &precision, &error));
        assert_int_equal(precision, p);
    }
    assert_false(precision_parse("fp8", &precision, &error));
    assert_non_null(strstr(error->message, "choose f32, bf16 or f16"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_products),     cmocka_unit_test(test_flush),
        cmocka_unit_test(test_close_to_f32), cmocka_unit_test(test_same_on_other_layouts),
        cmocka_unit_test(test_names),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
