/* RoPE tables against the formulas in long double, written here a second time from the papers;
 * rotation against double. */
#include "kernels/generic/ops.h"
#include "tests/unit/kernels/numbers.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

#define DIMS 64u
#define PI 3.14159265358979323846264338327950288L

static long double reference_angle(const RopeSpec *s, const float *factors, uint32_t position,
                                   uint32_t i)
{
    long double theta =
        (long double)position * powl((long double)s->freq_base, -2.0L * i / s->dims);
    theta /= factors != NULL ? (long double)factors[i] : 1.0L;
    if (s->scaling == ROPE_SCALING_LINEAR) {
        return theta / (long double)s->factor;
    }
    if (s->scaling != ROPE_SCALING_YARN) {
        return theta;
    }
    const long double base = logl((long double)s->freq_base), n = (long double)s->original_context;
    long double low =
        floorl(s->dims * logl(n / ((long double)s->yarn_beta_fast * 2 * PI)) / (2 * base));
    long double high =
        ceill(s->dims * logl(n / ((long double)s->yarn_beta_slow * 2 * PI)) / (2 * base));
    low = fmaxl(0.0L, low);
    high = fminl(s->dims - 1.0L, high);
    const long double ramp = fminl(1.0L, fmaxl(0.0L, (i - low) / fmaxl(0.001L, high - low)));
    const long double mix = (1.0L - ramp) * (long double)s->yarn_ext_factor;
    return theta / (long double)s->factor * (1.0L - mix) + theta * mix;
}

static void check(const RopeSpec *s, const float *factors, long double magnitude)
{
    static const uint32_t positions[] = {0, 1, 2, 31, 4095, 8192, 65537, 131071};
    for (unsigned p = 0; p < sizeof positions / sizeof positions[0]; p++) {
        float cos_out[2 * DIMS / 2], sin_out[2 * DIMS / 2];
        rope_table(s, factors, positions[p], 2, cos_out, sin_out);
        for (uint32_t i = 0; i < DIMS; i++) {
            const long double angle =
                reference_angle(s, factors, positions[p] + i / (DIMS / 2), i % (DIMS / 2));
            assert_true(fabsl(cos_out[i] - cosl(angle) * magnitude) < 1e-6L);
            assert_true(fabsl(sin_out[i] - sinl(angle) * magnitude) < 1e-6L);
        }
    }
}

static void test_tables(void **state)
{
    float factors[DIMS / 2];
    Numbers numbers = {4};
    numbers_fill(&numbers, factors, DIMS / 2, 1.0, 32.0);
    RopeSpec s = {.dims = DIMS, .freq_base = 10000.0, .factor = 1.0};
    check(&s, NULL, 1.0L);
    s.freq_base = 500000.0;
    s.scaling = ROPE_SCALING_FACTORS;
    check(&s, factors, 1.0L);
    s.scaling = ROPE_SCALING_LINEAR;
    s.factor = 4.0;
    check(&s, NULL, 1.0L);
    s.scaling = ROPE_SCALING_YARN;
    s.freq_base = 10000.0;
    s.original_context = 4096;
    s.factor = 16.0;
    s.yarn_ext_factor = 1.0;
    s.yarn_attn_factor = 1.0;
    s.yarn_beta_fast = 32.0;
    s.yarn_beta_slow = 1.0;
    check(&s, NULL, 1.0L + 0.1L * logl(16.0L));
    s.yarn_attn_factor = 0.75;
    check(&s, factors, 0.75L * (1.0L + 0.1L * logl(16.0L)));
    s.yarn_ext_factor = 0.0; /* interpolation alone: no stretch */
    check(&s, NULL, 0.75L);
}

/* A cut of a table is that part of the table: it never depends on the current length. */
static void test_tables_do_not_depend_on_their_cut(void **state)
{
    const RopeSpec s = {.dims = DIMS, .freq_base = 10000.0, .factor = 1.0};
    float whole[2][40 * DIMS / 2], part[2][DIMS / 2];
    rope_table(&s, NULL, 100, 40, whole[0], whole[1]);
    for (uint32_t p = 0; p < 40; p++) {
        rope_table(&s, NULL, 100 + p, 1, part[0], part[1]);
        assert_memory_equal(part[0], &whole[0][p * DIMS / 2], sizeof part[0]);
        assert_memory_equal(part[1], &whole[1][p * DIMS / 2], sizeof part[1]);
    }
}

static void test_rotation(void **state)
{
    const uint32_t head_size = 80, dims = 64, n_heads = 3;
    float x[3 * 80], before[3 * 80], c[32], s[32];
    Numbers numbers = {5};
    for (int pairing = ROPE_ADJACENT; pairing <= ROPE_HALVES; pairing++) {
        numbers_fill(&numbers, x, 3 * 80, -2.0, 2.0);
        for (uint32_t i = 0; i < 32; i++) {
            const double angle = numbers_uniform(&numbers, -3.0, 3.0);
            c[i] = (float)cos(angle);
            s[i] = (float)sin(angle);
        }
        memcpy(before, x, sizeof x);
        rope_apply_generic(x, n_heads, head_size, dims, (RopePairing)pairing, c, s);
        for (uint32_t h = 0; h < n_heads; h++) {
            for (uint32_t i = 0; i < dims / 2; i++) {
                const uint32_t a = h * head_size + (pairing == ROPE_ADJACENT ? 2 * i : i);
                const uint32_t b = pairing == ROPE_ADJACENT ? a + 1 : a + dims / 2;
                assert_float_equal(x[a], (double)before[a] * c[i] - (double)before[b] * s[i], 1e-6);
                assert_float_equal(x[b], (double)before[a] * s[i] + (double)before[b] * c[i], 1e-6);
            }
            assert_memory_equal(&x[h * head_size + dims], &before[h * head_size + dims],
                                16 * sizeof(float));
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tables),
        cmocka_unit_test(test_tables_do_not_depend_on_their_cut),
        cmocka_unit_test(test_rotation),
    };
    return cmocka_run_group_tests_name("rope", tests, NULL, NULL);
}
