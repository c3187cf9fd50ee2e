/* The generic kernels against float64 and against the gguf package: formats, packing, activations,
 * products, the tree. */
#include "kernels/ops/packed.h"
#include "tests/kernels/matmul_case.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

#include "tests/unit/kernels/ggml_rows.h"

static uint32_t float_bits(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

static void test_f16_conversions(void **state)
{
    for (uint32_t h = 0; h < 0x10000; h++) {
        const uint32_t exponent = h >> 10 & 31, mantissa = h & 0x3ff;
        if (exponent == 31 && mantissa != 0) {
            assert_true(isnan(f16_to_f32((uint16_t)h)));
            assert_true((f32_to_f16(f16_to_f32((uint16_t)h)) & 0x7fff) > 0x7c00);
            continue;
        }
        double value = exponent == 31 ? INFINITY
                       : exponent     ? ldexp(1024 + mantissa, (int)exponent - 25)
                                      : ldexp(mantissa, -24);
        value = h & 0x8000 ? -value : value;
        assert_int_equal(float_bits(f16_to_f32((uint16_t)h)), float_bits((float)value));
        assert_int_equal(f32_to_f16((float)value), h);
        /* Half way to the next value goes to the even one; a hair less or more to the nearer one.
         */
        if (exponent < 31 && (h & 0x7fff) < 0x7bff) {
            const double next = f16_to_f32((uint16_t)(h + 1));
            const float middle = (float)((value + next) / 2);
            assert_int_equal(f32_to_f16(middle), h & 1 ? h + 1 : h);
            assert_int_equal(f32_to_f16(nextafterf(middle, (float)value)), h);
            assert_int_equal(f32_to_f16(nextafterf(middle, (float)next)), h + 1);
        }
    }
    assert_int_equal(f32_to_f16(65519.996f), 0x7bff);
    assert_int_equal(f32_to_f16(65520.0f), 0x7c00);
    assert_int_equal(f32_to_f16(1e30f), 0x7c00);
}

static void test_bf16_conversions(void **state)
{
    for (uint32_t h = 0; h < 0x10000; h++) {
        const float f = bf16_to_f32((uint16_t)h);
        assert_int_equal(float_bits(f), h << 16);
        if (isnan(f)) {
            assert_true(isnan(bf16_to_f32(f32_to_bf16(f))));
            continue;
        }
        assert_int_equal(f32_to_bf16(f), h);
        if ((h & 0x7fff) < 0x7f80) {
            const uint32_t middle = h << 16 | 0x8000, low = middle - 1, high = middle + 1;
            float m, l, u;
            memcpy(&m, &middle, 4);
            memcpy(&l, &low, 4);
            memcpy(&u, &high, 4);
            assert_int_equal(f32_to_bf16(m), h & 1 ? h + 1 : h);
            assert_int_equal(f32_to_bf16(l), h);
            assert_int_equal(f32_to_bf16(u), h + 1);
        }
    }
    const uint32_t signalling = 0x7f800001;
    float nan;
    memcpy(&nan, &signalling, 4);
    assert_true(isnan(bf16_to_f32(f32_to_bf16(nan))));
}

/* E4M3FN: bias 7, subnormals of 2^-9, no infinities, one NaN of each sign. */
static void test_e4m3_conversions(void **state)
{
    for (uint32_t q = 0; q < 256; q++) {
        const uint32_t exponent = q >> 3 & 15, mantissa = q & 7;
        const float got = e4m3_to_f32((uint8_t)q);
        if ((q & 0x7f) == 0x7f) {
            assert_true(isnan(got));
            assert_int_equal(f32_to_e4m3(q & 0x80 ? -NAN : NAN), q);
            continue;
        }
        double value = exponent ? ldexp(8 + mantissa, (int)exponent - 10) : ldexp(mantissa, -9);
        value = q & 0x80 ? -value : value;
        assert_int_equal(float_bits(got), float_bits((float)value));
        assert_int_equal(f32_to_e4m3((float)value), q);
        if ((q & 0x7f) < 0x7e) {
            const float next = e4m3_to_f32((uint8_t)(q + 1));
            const float middle = ((float)value + next) / 2;
            assert_int_equal(f32_to_e4m3(middle), q & 1 ? q + 1 : q);
            assert_int_equal(f32_to_e4m3(nextafterf(middle, (float)value)), q);
            assert_int_equal(f32_to_e4m3(nextafterf(middle, next)), q + 1);
        }
    }
    assert_int_equal(f32_to_e4m3(449.0f), 0x7e);
    assert_int_equal(f32_to_e4m3(-INFINITY), 0xfe);
    assert_int_equal(f32_to_e4m3(0x1p-140f), 0);
}

static void test_dequantise_golden(void **state)
{
    for (size_t i = 0; i < G_N_ELEMENTS(ggml_rows); i++) {
        float out[256];
        uint64_t hash = 0xcbf29ce484222325u;
        dequantise_row(ggml_rows[i].type, ggml_rows[i].bytes, 256, out);
        for (int k = 0; k < 4; k++) {
            assert_int_equal(float_bits(out[k]), ggml_rows[i].first[k]);
        }
        for (size_t b = 0; b < sizeof out; b++) {
            hash = (hash ^ ((const uint8_t *)out)[b]) * 0x100000001b3u;
        }
        assert_true(hash == ggml_rows[i].fnv);
    }
}

/* The error of a round trip stays within half a step of the type's grid (a whole one where scales
 * are quantised too). */
static void test_quantise_close(void **state)
{
    static const double limits[DTYPE_LIMIT] = {
        [DTYPE_Q4_0] = 0.07,  [DTYPE_Q4_1] = 0.05,  [DTYPE_Q5_0] = 0.04, [DTYPE_Q5_1] = 0.025,
        [DTYPE_Q8_0] = 0.005, [DTYPE_Q4_K] = 0.06,  [DTYPE_Q5_K] = 0.03, [DTYPE_Q6_K] = 0.02,
        [DTYPE_F16] = 0.0003, [DTYPE_BF16] = 0.002, [DTYPE_F32] = 0,     [DTYPE_F8_E4M3] = 0.02};
    uint64_t seed = 3;
    for (size_t t = 0; t < G_N_ELEMENTS(host_types); t++) {
        float x[512], back[512];
        uint8_t file[2048];
        double error = 0, norm = 0;
        for (int i = 0; i < 512; i++) {
            x[i] = case_normal(&seed);
        }
        quantise_row(host_types[t], x, 512, file);
        dequantise_row(host_types[t], file, 512, back);
        for (int i = 0; i < 512; i++) {
            error += ((double)back[i] - x[i]) * ((double)back[i] - x[i]);
            norm += (double)x[i] * x[i];
        }
        assert_true(sqrt(error / norm) <= 2 * limits[host_types[t]]);
    }
}

/* Whatever way the rectangles come, a packed row is what the file's row dequantises to, bit for
 * bit. */
static void test_packed_rows(void **state)
{
    for (size_t t = 0; t < G_N_ELEMENTS(host_types); t++) {
        const Dtype type = host_types[t];
        const uint32_t block = dtype_info(type)->block, n_in = block == 1 ? 37 : 6 * block,
                       n_out = 35;
        MatmulCase c;
        matmul_case_init(&c, type, 1, n_out, n_in, VALUES_EXTREME, 11 + t);
        PackedMatrix pieces = c.w;
        pieces.data = case_alloc((n_out + 15) / 16 * c.w.panel_bytes);
        const uint32_t col_cut = block == 1 ? 13 : 2 * block, row_cuts[] = {0, 5, 16, 23, n_out};
        for (int r = 3; r >= 0; r--) {
            const uint8_t *src = c.file + row_cuts[r] * c.row_bytes;
            const size_t skip = col_cut / block * dtype_info(type)->block_bytes;
            const uint32_t n = row_cuts[r + 1] - row_cuts[r];
            packed_put(&pieces, src + skip, c.row_bytes, row_cuts[r], n, col_cut, n_in - col_cut);
            packed_put(&pieces, src, c.row_bytes, row_cuts[r], n, 0, col_cut);
        }
        assert_memory_equal(pieces.data, c.w.data, (n_out + 15) / 16 * c.w.panel_bytes);
        float *packed = case_alloc(n_in * 4), *file = case_alloc(n_in * 4);
        for (uint32_t n = 0; n < n_out; n++) {
            packed_get_row(&c.w, n, packed);
            dequantise_row(type, c.file + n * c.row_bytes, n_in, file);
            assert_memory_equal(packed, file, n_in * 4);
        }
        free(packed);
        free(file);
        free(pieces.data);
        matmul_case_free(&c);
    }
}

/* Where packed.h says that scales and quants of F8_E4M3 lie, byte by byte. */
static void test_packed_f8(void **state)
{
    const uint32_t n_in = 256, n_out = 18;
    MatmulCase c;
    matmul_case_init(&c, DTYPE_F8_E4M3, 1, n_out, n_in, VALUES_EXTREME, 4);
    for (uint32_t n = 0; n < n_out; n++) {
        for (uint32_t b = 0; b < n_in / 128; b++) {
            const uint8_t *file = c.file + n * c.row_bytes + b * 132;
            const uint8_t *record = c.w.data + n / 16 * c.w.panel_bytes + b * 2112;
            assert_memory_equal(record + 4 * (n % 16), file, 4);
            for (uint32_t k = 0; k < 128; k++) {
                assert_int_equal(record[64 + k / 2 * 32 + n % 16 * 2 + k % 2], file[4 + k]);
            }
        }
    }
    matmul_case_free(&c);
}

static void test_packed_sizes(void **state)
{
    assert_int_equal(packed_panel_bytes(DTYPE_Q4_0, 96), 16 * 18 * 3);
    assert_int_equal(packed_panel_bytes(DTYPE_Q4_0, 40), 0);
    assert_int_equal(packed_panel_bytes(DTYPE_Q4_K, 128), 0);
    assert_int_equal(packed_panel_bytes(DTYPE_BF16, 3), 128);
    assert_int_equal(packed_panel_bytes(DTYPE_F8_E4M3, 384), 16 * 132 * 3);
    assert_int_equal(packed_panel_bytes(DTYPE_F8_E4M3, 192), 0);
    assert_int_equal(packed_panel_bytes((Dtype)5, 32), 0);
    assert_int_equal(packed_block_bytes((Dtype)5), 0);
    for (size_t t = 0; t < G_N_ELEMENTS(host_types); t++) {
        const uint32_t block = dtype_info(host_types[t])->block;
        assert_int_equal(packed_panel_bytes(host_types[t], 4 * block),
                         4 * 16 * packed_block_bytes(host_types[t]));
    }
}

/* Activation quants are within half a step of x (by an f64 division), scale and sums as documented.
 */
static void test_act_quantise(void **state)
{
    const Kernels *k = kernels_get(ISA_GENERIC);
    uint64_t seed = 5;
    float x[6][512];
    for (int i = 0; i < 6 * 512; i++) {
        x[i / 512][i % 512] = case_normal(&seed) * (i % 64 < 32 ? 1e-3f : 10);
    }
    for (int kind = ACT_Q8_32; kind <= ACT_Q8_256; kind++) {
        const unsigned step = kind == ACT_Q8_32 ? 32 : 256;
        uint8_t *buffer = case_alloc(act_bytes((ActKind)kind, 6, 512));
        k->act_quantise[kind](x[0], 512, 6, 0, 4, 512, buffer);
        k->act_quantise[kind](x[0], 512, 6, 4, 6, 512, buffer);
        for (unsigned r = 0; r < 8; r++) {
            const uint8_t *group = buffer + r / 4 * 4 * act_row_bytes((ActKind)kind, 512);
            for (unsigned b = 0; b < 512 / step; b++) {
                const uint8_t *tile = group + b * 4 * act_tile_row_bytes((ActKind)kind);
                double amax = 0;
                int sum = 0, sum16 = 0;
                float d;
                memcpy(&d, tile + (step == 32 ? ACT_Q8_32_D(4) : ACT_Q8_256_D(4)) + r % 4 * 4, 4);
                for (unsigned i = 0; i < step; i++) {
                    amax = r < 6 ? fmax(amax, fabs(x[r][b * step + i])) : 0;
                }
                assert_true(fabs(d - amax / 127) <= 1e-7 * amax);
                for (unsigned i = 0; i < step; i++) {
                    const int q = (int8_t)tile[(i / 4 * 4 + r % 4) * 4 + i % 4];
                    assert_true(q >= -127 && q <= 127);
                    assert_true(r < 6 ? fabs(q * amax / 127 - x[r][b * step + i]) <=
                                            amax / 127 * 0.50001
                                      : q == 0);
                    sum += q;
                    sum16 += i >= step - 16 ? q : 0;
                }
                if (step == 32) {
                    int32_t start[3];
                    float ds;
                    memcpy(&ds, tile + ACT_Q8_32_DS(4) + r % 4 * 4, 4);
                    memcpy(&start[0], tile + ACT_Q8_32_START8(4) + r % 4 * 4, 4);
                    memcpy(&start[1], tile + ACT_Q8_32_START16(4) + r % 4 * 4, 4);
                    memcpy(&start[2], tile + ACT_Q8_32_START128(4) + r % 4 * 4, 4);
                    assert_true(ds == d * (float)sum);
                    assert_true(start[0] == -8 * sum && start[1] == -16 * sum &&
                                start[2] == -128 * sum);
                } else {
                    int16_t sums[2], last16;
                    int total = 0;
                    for (unsigned pair = 0; pair < 4; pair++) {
                        memcpy(sums, tile + ACT_Q8_256_SUM32(4) + (pair * 4 + r % 4) * 4, 4);
                        total += sums[0] + sums[1];
                    }
                    assert_int_equal(total, sum);
                    memcpy(&last16, tile + ACT_Q8_256_SUM16(4) + (7 * 4 + r % 4) * 4 + 2, 2);
                    assert_int_equal(last16, sum16);
                }
            }
        }
        free(buffer);
    }
}

/* Activations as the kernel sees them, in f64, made from the definition again. */
static void act_values(ActKind kind, const float *x, uint32_t n, double *out)
{
    const uint32_t step = kind == ACT_Q8_256 ? 256 : 32;
    for (uint32_t k = 0; k < n; k++) {
        out[k] = kind == ACT_BF16 ? (double)bf16_to_f32(f32_to_bf16(x[k])) : (double)x[k];
    }
    for (uint32_t b = 0; kind >= ACT_Q8_32 && b < n; b += step) {
        float amax = 0;
        for (uint32_t k = b; k < b + step; k++) {
            amax = fmaxf(amax, fabsf(x[k]));
        }
        const float d = amax / 127.0f, inverse = amax != 0 ? 127.0f / amax : 0;
        for (uint32_t k = b; k < b + step; k++) {
            out[k] = (double)d * rint((double)(x[k] * inverse));
        }
    }
}

static void test_product_f64(void **state)
{
    const Kernels *k = kernels_get(ISA_GENERIC);
    for (size_t t = 0; t < G_N_ELEMENTS(host_types); t++) {
        const uint32_t n_in = 1024, n_out = 19, rows = 5;
        MatmulCase c;
        matmul_case_init(&c, host_types[t], rows, n_out, n_in, VALUES_NORMAL, 100 + t);
        float *out = case_alloc(rows * n_out * 4), *w = case_alloc(n_in * 4);
        double *x = case_alloc(n_in * 8);
        matmul_case_run(k, &c, NULL, 0, out);
        for (uint32_t r = 0; r < rows; r++) {
            act_values(act_kind_of(c.type), c.x + r * n_in, n_in, x);
            for (uint32_t n = 0; n < n_out; n++) {
                double sum = 0, magnitude = 0;
                dequantise_row(c.type, c.file + n * c.row_bytes, n_in, w);
                for (uint32_t i = 0; i < n_in; i++) {
                    sum += (double)w[i] * x[i];
                    magnitude += fabs((double)w[i] * x[i]);
                }
                assert_true(fabs(out[r * n_out + n] - sum) <= 3e-6 * magnitude);
            }
        }
        free(out);
        free(w);
        free(x);
        matmul_case_free(&c);
    }
}

/* F8_E4M3 by its definition (ops/matmul.h) from the file's bytes, bit for bit: chains of fmaf in
 * each block, blocks times their scales, two units of two and one blocks. */
static void test_f8_definition(void **state)
{
    static const uint32_t rows[] = {1, 6};
    const MatmulUnit units[] = {{256, {0, false}}, {128, {1, true}}};
    for (size_t i = 0; i < 2 * G_N_ELEMENTS(rows); i++) {
        MatmulCase c;
        matmul_case_init(&c, DTYPE_F8_E4M3, rows[i / 2], 19, 384,
                         i % 2 ? VALUES_EXTREME : VALUES_SUBNORMAL, 300 + i);
        float *out = case_alloc(c.rows * c.n_out * 4);
        matmul_case_run(kernels_get(ISA_GENERIC), &c, units, 2, out);
        for (uint32_t at = 0; at < c.rows * c.n_out; at++) {
            const uint8_t *file = c.file + at % c.n_out * c.row_bytes;
            const float *x = c.x + at / c.n_out * c.n_in;
            float sums[2] = {0, 0};
            for (uint32_t b = 0; b < 3; b++, file += 132, x += 128) {
                float s = 0, scale;
                memcpy(&scale, file, 4);
                for (uint32_t k = 0; k < 128; k++) {
                    const int e = file[4 + k] >> 3 & 15, m = file[4 + k] & 7;
                    const float w = (float)(e ? ldexp(8 + m, e - 10) : ldexp(m, -9));
                    s = fmaf(file[4 + k] & 0x80 ? -w : w, x[k], s);
                }
                sums[b / 2] = fmaf(scale, s, sums[b / 2]);
            }
            assert_int_equal(float_bits(sums[0] + sums[1]), float_bits(out[at]));
        }
        free(out);
        matmul_case_free(&c);
    }
}

/* The kernel's fold equals node(0, n) over units that were computed alone. */
static void test_units_fold(void **state)
{
    const Kernels *k = kernels_get(ISA_GENERIC);
    for (uint32_t n_units = 1; n_units <= 12; n_units++) {
        MatmulCase c;
        MatmulUnit units[12];
        TreeStep steps[12];
        matmul_case_init(&c, DTYPE_Q8_0, 3, 17, 64 * n_units, VALUES_NORMAL, n_units);
        const size_t n = 3 * 17;
        /* Units alone, each its own subtree, then folded by hand as node(0, n). */
        float *leaves = case_alloc(n_units * n * 4), *whole = case_alloc(n * 4);
        for (uint32_t u = 0; u < n_units; u++) {
            units[u] = (MatmulUnit){64, {0, 1}};
        }
        matmul_case_run(k, &c, units, n_units, leaves);
        assert_int_equal(tree_program(n_units, 0, n_units, steps), 1);
        for (uint32_t u = 0; u < n_units; u++) {
            units[u].step = steps[u];
        }
        matmul_case_run(k, &c, units, n_units, whole);
        for (size_t i = 0; i < n; i++) {
            float level[12];
            /* node(a, b) by recursion on an explicit list of spans, smallest first. */
            struct {
                uint32_t a, b;
                int done;
            } spans[64] = {{0, n_units, 0}};
            float values[64];
            int top = 0, n_values = 0;
            for (uint32_t u = 0; u < n_units; u++) {
                level[u] = leaves[u * n + i];
            }
            while (top >= 0) {
                const uint32_t a = spans[top].a, b = spans[top].b, m = a + (b - a + 1) / 2;
                if (b - a == 1) {
                    values[n_values++] = level[a];
                    top--;
                } else if (spans[top].done) {
                    n_values--;
                    values[n_values - 1] += values[n_values];
                    top--;
                } else {
                    spans[top].done = 1;
                    spans[top + 1].a = m, spans[top + 1].b = b, spans[top + 1].done = 0;
                    spans[top + 2].a = a, spans[top + 2].b = m, spans[top + 2].done = 0;
                    top += 2;
                }
            }
            assert_int_equal(float_bits(values[0]), float_bits(whole[i]));
        }
        free(leaves);
        free(whole);
        matmul_case_free(&c);
    }
}

static void test_not_finite(void **state)
{
    const Kernels *k = kernels_get(ISA_GENERIC);
    const float bad[] = {NAN, INFINITY, -INFINITY};
    for (size_t t = 0; t < G_N_ELEMENTS(host_types); t++) {
        for (int b = 0; b < 3; b++) {
            MatmulCase c;
            float out[2 * 9];
            matmul_case_init(&c, host_types[t], 2, 9, 512, VALUES_NORMAL, t);
            c.x[512 + 77] = bad[b];
            matmul_case_run(k, &c, NULL, 0, out);
            for (int n = 0; n < 9; n++) {
                assert_true(isfinite(out[n]));
                assert_false(isfinite(out[9 + n]));
            }
            matmul_case_free(&c);
        }
    }
}

static void test_table(void **state)
{
    KernelIsa isa;
    assert_true(kernels_parse_isa("generic", &isa) && isa == ISA_GENERIC);
    assert_true(kernels_parse_isa("auto", &isa) && isa == kernels_best_isa());
    assert_false(kernels_parse_isa("sse9", &isa));
    assert_string_equal(kernels_report(ISA_GENERIC), "");
    assert_null(strstr(kernels_report(ISA_AVX2), "matmul"));
    assert_null(strstr(kernels_report(ISA_AVX2), "act_quantise"));
    for (int i = ISA_GENERIC; i <= ISA_AVX512; i++) {
        for (size_t t = 0; t < G_N_ELEMENTS(host_types); t++) {
            assert_non_null(kernels_get((KernelIsa)i)->matmul[host_types[t]]);
        }
        assert_null(kernels_get((KernelIsa)i)->matmul[4]);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_f16_conversions),  cmocka_unit_test(test_bf16_conversions),
        cmocka_unit_test(test_e4m3_conversions), cmocka_unit_test(test_dequantise_golden),
        cmocka_unit_test(test_quantise_close),   cmocka_unit_test(test_packed_rows),
        cmocka_unit_test(test_packed_f8),        cmocka_unit_test(test_packed_sizes),
        cmocka_unit_test(test_act_quantise),     cmocka_unit_test(test_product_f64),
        cmocka_unit_test(test_f8_definition),    cmocka_unit_test(test_units_fold),
        cmocka_unit_test(test_not_finite),       cmocka_unit_test(test_table),
    };
    return cmocka_run_group_tests_name("matmul", tests, NULL, NULL);
}
