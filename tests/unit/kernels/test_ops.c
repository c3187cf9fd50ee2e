/* norm, swiglu, add, kv_write, Philox, Gumbel noise and chunk statistics of `generic` against
 * double. */
#include "kernels/generic/ops.h"
#include "proto/model/blocks.h"
#include "kernels/ops/math.h"
#include "tests/unit/kernels/numbers.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

static void test_rms_norm(void **state)
{
    float x[1000], w[1000], out[1000];
    Numbers numbers = {1};
    for (uint32_t n = 1; n <= 1000; n = n * 3 + 1) {
        numbers_fill(&numbers, x, n, -3.0, 3.0);
        numbers_fill(&numbers, w, n, -2.0, 2.0);
        double sum = 0.0;
        for (uint32_t i = 0; i < n; i++) {
            sum += (double)x[i] * x[i];
        }
        rms_norm_generic(x, w, 1e-5f, n, out);
        for (uint32_t i = 0; i < n; i++) {
            const double want = x[i] / sqrt(sum / n + 1e-5) * w[i];
            assert_true(fabs(out[i] - want) <= 1e-6 * fabs(want) + 1e-30);
        }
        rms_norm_generic(x, w, 1e-5f, n, x); /* in place */
        assert_memory_equal(x, out, n * sizeof(float));
    }
}

/* Sum of squares in n_lanes lanes; neighbours first, or the halves onto each other. */
static float lane_sum(const float *x, uint32_t n, uint32_t n_lanes, bool neighbours)
{
    float lanes[32] = {0}, next[32];
    for (uint32_t i = 0; i < n; i++) {
        lanes[i % n_lanes] = fmaf(x[i], x[i], lanes[i % n_lanes]);
    }
    for (; n_lanes > 1; n_lanes /= 2) {
        for (uint32_t i = 0; i < n_lanes / 2; i++) {
            next[i] =
                neighbours ? lanes[2 * i] + lanes[2 * i + 1] : lanes[i] + lanes[i + n_lanes / 2];
        }
        memcpy(lanes, next, sizeof lanes);
    }
    return lanes[0];
}

/* The order of the sum is NUMERICS 4, not just any. */
static void test_norm_sums_in_32_lanes(void **state)
{
    enum { N = 500, ROUNDS = 300 };
    float x[N], w[N], out[N];
    unsigned differs[3] = {0};
    Numbers numbers = {7};
    for (uint32_t i = 0; i < N; i++) {
        w[i] = 1.0f;
    }
    for (unsigned round = 0; round < ROUNDS; round++) {
        numbers_fill(&numbers, x, N, -3.0, 3.0);
        rms_norm_generic(x, w, 0.0f, N, out);
        assert_true(out[0] == x[0] * (1.0f / sqrtf(lane_sum(x, N, 32, true) / (float)N)));
        differs[0] += out[0] != x[0] * (1.0f / sqrtf(lane_sum(x, N, 8, true) / (float)N));
        differs[1] += out[0] != x[0] * (1.0f / sqrtf(lane_sum(x, N, 32, false) / (float)N));
        differs[2] += out[0] != x[0] * (1.0f / sqrtf(lane_sum(x, N, 1, true) / (float)N));
    }
    for (unsigned i = 0; i < 3; i++) {
        assert_true(differs[i] > 20); /* else this test could not tell one order from another */
    }
}

static void test_swiglu_and_add(void **state)
{
    float gate[300], up[300], out[300], sum[300];
    Numbers numbers = {2};
    numbers_fill(&numbers, gate, 300, -20.0, 20.0);
    numbers_fill(&numbers, up, 300, -3.0, 3.0);
    gate[0] = -200.0f;
    gate[1] = 200.0f;
    swiglu_generic(gate, up, 300, out);
    memcpy(sum, gate, sizeof sum);
    add_generic(sum, up, 300);
    for (unsigned i = 0; i < 300; i++) {
        const double want = gate[i] / (1.0 + exp(-(double)gate[i])) * up[i];
        assert_true(fabs(out[i] - want) <= 1e-6 * fabs(want) + 1e-30);
        assert_true(sum[i] == gate[i] + up[i]);
    }
    swiglu_generic(gate, up, 300, gate);
    assert_memory_equal(gate, out, sizeof out);
    gate[0] = NAN;
    swiglu_generic(gate, up, 1, out);
    assert_true(isnan(out[0]));
}

static void test_kv_write_touches_one_slot(void **state)
{
    enum { SIZE = 20 };
    float k[SIZE], v[SIZE];
    Numbers numbers = {3};
    numbers_fill(&numbers, k, SIZE, -2.0, 2.0);
    numbers_fill(&numbers, v, SIZE, -2.0, 2.0);
    uint16_t k16[SIZE * 32], v16[32 * SIZE];
    float k32[SIZE * 32], v32[32 * SIZE];
    memset(k16, 0xee, sizeof k16);
    memset(v16, 0xee, sizeof v16);
    memset(k32, 0xee, sizeof k32);
    memset(v32, 0xee, sizeof v32);
    kv_write_f16_generic(k, v, SIZE, 7, k16, v16);
    kv_write_f32_generic(k, v, SIZE, 7, k32, v32);
    for (unsigned d = 0; d < SIZE; d++) {
        for (unsigned slot = 0; slot < 32; slot++) {
            assert_int_equal(k16[d * 32 + slot], slot == 7 ? f32_to_f16(k[d]) : 0xeeee);
            assert_int_equal(v16[slot * SIZE + d], slot == 7 ? f32_to_f16(v[d]) : 0xeeee);
            assert_int_equal(float_bits(k32[d * 32 + slot]),
                             slot == 7 ? float_bits(k[d]) : 0xeeeeeeee);
            assert_int_equal(float_bits(v32[slot * SIZE + d]),
                             slot == 7 ? float_bits(v[d]) : 0xeeeeeeee);
        }
    }
    kv_write_bf16_generic(k, v, SIZE, 31, k16, v16);
    assert_int_equal(k16[3 * 32 + 31], f32_to_bf16(k[3]));
    assert_int_equal(v16[31 * SIZE + 3], f32_to_bf16(v[3]));
}

/* The definition at ops/attention.h: signs, ties to even, zeros, subnormals, what is not finite. */
static void test_kv_write_q8(void **state)
{
    enum { SIZE = 8 };
    _Alignas(4) int8_t k[32 * SIZE + 128], v[32 * SIZE + 128];
    const float row[SIZE] = {127.0f, -127.0f, 0.5f, 1.5f, -2.5f, 63.49f, -0.0f, 1.0f};
    static const int8_t want[SIZE] = {127, -127, 0, 2, -2, 63, 0, 1};
    memset(k, 0x5a, sizeof k);
    memset(v, 0x5a, sizeof v);
    kv_write_q8_generic(row, row, SIZE, 9, k, v);
    for (unsigned d = 0; d < SIZE; d++) {
        for (unsigned slot = 0; slot < 32; slot++) {
            assert_int_equal(k[d * 32 + slot], slot == 9 ? want[d] : 0x5a);
            assert_int_equal(v[slot * SIZE + d], slot == 9 ? want[d] : 0x5a);
        }
    }
    assert_true(kv_q8_scales(k, SIZE)[9] == 1.0f && kv_q8_scales(v, SIZE)[9] == 1.0f);
    float odd[SIZE] = {0};
    kv_write_q8_generic(odd, row, SIZE, 0, k, v);
    assert_true(kv_q8_scales(k, SIZE)[0] == 0.0f && k[0] == 0);
    for (unsigned i = 1; i < 400; i++) { /* the scale is a few units of the last place at most */
        odd[0] = (float)i * 1.4e-45f;
        odd[1] = -odd[0];
        kv_write_q8_generic(odd, odd, SIZE, 0, k, v);
        assert_true(v[0] >= 0 && v[1] == -v[0]);
    }
    odd[3] = INFINITY;
    odd[4] = 1.0f;
    kv_write_q8_generic(odd, row, SIZE, 0, k, v);
    assert_true(isnan(kv_q8_scales(k, SIZE)[0]) && !isnan(kv_q8_scales(v, SIZE)[0]));
    odd[3] = NAN;
    kv_write_q8_generic(row, odd, SIZE, 0, k, v);
    assert_true(isnan(kv_q8_scales(v, SIZE)[0]));
}

/* Known answers of Random123 1.14, kat_vectors "philox4x32 10". */
static void test_philox_reference_vectors(void **state)
{
    static const struct {
        uint32_t counter[4], key[2], want[4];
    } cases[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (unsigned i = 0; i < 3; i++) {
        uint32_t out[4];
        philox4x32(cases[i].counter, cases[i].key, out);
        assert_memory_equal(out, cases[i].want, sizeof out);
    }
}

static void test_gumbel_noise(void **state)
{
    const GumbelKey key = {.seed = 0x0123456789abcdefu, .choice = 3, .position = 77, .purpose = 1};
    float noise[1027], part[8];
    double mean = 0.0, square = 0.0;
    gumbel_generic(&key, 4096, 1027, noise);
    for (uint32_t i = 0; i < 1027; i++) {
        const uint32_t counter[4] = {77, (4096 + i) / 4, 1, 3}, k[2] = {0x89abcdef, 0x01234567};
        uint32_t bits[4];
        philox4x32(counter, k, bits);
        const double u = (bits[i % 4] + 0.5) * 0x1p-32;
        assert_true(fabs(noise[i] - -log(-log(u))) < 3e-7 * fmax(1.0, fabs((double)noise[i])));
        mean += noise[i];
        square += (double)noise[i] * noise[i];
    }
    mean /= 1027;
    assert_true(fabs(mean - 0.5772) < 0.15 && fabs(square / 1027 - mean * mean - 1.645) < 0.3);
    gumbel_generic(&key, 4096 + 512, 8, part);
    assert_memory_equal(part, &noise[512], sizeof part);
    /* the ends of the range are finite */
    for (uint32_t bits = 0; bits < 4; bits++) {
        for (int upper = 0; upper < 2; upper++) {
            const double u = ((upper ? ~bits : bits) + 0.5) * 0x1p-32;
            const double want = -log(-(upper ? log1p(-(bits + 0.5) * 0x1p-32) : log(u)));
            assert_true(fabs(gumbel_inline(upper ? ~bits : bits) - want) < 1e-6 * fabs(want));
        }
    }
    assert_true(fabs(gumbel_inline(0x7fffffffu) - 0.366512920) < 1e-6);
    assert_true(fabs(gumbel_inline(0x80000000u) - 0.366512920) < 1e-6);
}

static void test_chunk_stats(void **state)
{
    float logits[5][1024], m[5], l[5];
    Numbers numbers = {6};
    double sum = 0.0;
    static const uint32_t sizes[] = {1024, 1024, 1, 33, 1000};
    for (unsigned c = 0; c < 5; c++) {
        numbers_fill(&numbers, logits[c], sizes[c], -30.0, 10.0 + c);
        assert_true(chunk_stats_generic(logits[c], sizes[c], &m[c], &l[c]));
        for (uint32_t i = 0; i < sizes[c]; i++) {
            sum += exp((double)logits[c][i]);
            assert_true(logits[c][i] <= m[c]);
        }
    }
    chunk_stats_merge(m, l, 5);
    assert_true(fabs((log((double)l[0]) + m[0]) - log(sum)) < 1e-6);
    logits[3][32] = INFINITY;
    assert_false(chunk_stats_generic(logits[3], 33, &m[3], &l[3]));
    logits[3][32] = -INFINITY;
    assert_false(chunk_stats_generic(logits[3], 33, &m[3], &l[3]));
    logits[3][32] = NAN;
    assert_false(chunk_stats_generic(logits[3], 33, &m[3], &l[3]));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rms_norm),       cmocka_unit_test(test_norm_sums_in_32_lanes),
        cmocka_unit_test(test_swiglu_and_add), cmocka_unit_test(test_kv_write_touches_one_slot),
        cmocka_unit_test(test_kv_write_q8),    cmocka_unit_test(test_philox_reference_vectors),
        cmocka_unit_test(test_gumbel_noise),   cmocka_unit_test(test_chunk_stats),
    };
    return cmocka_run_group_tests_name("ops", tests, NULL, NULL);
}
