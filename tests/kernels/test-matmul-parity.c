/* Every variant of matmul and act_quantise that this CPU runs (those named by arguments), against
 * generic, by memcmp, on awkward shapes and values. */
#include "kernels/ops/packed.h"
#include "tests/kernels/avx512/variants.h"
#include "tests/kernels/matmul_case.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <cmocka.h>

static const Variant *variant;
static Kernels table; /* of variant */

/* VDPBF16PS is in products of bf16 alone. */
static bool covers(Dtype type)
{
    return !variant->dots || type == DTYPE_BF16;
}

static void assert_same(const float *a, const float *b, size_t n, const MatmulCase *c,
                        const char *what)
{
    for (size_t i = 0; i < n; i++) {
        if (memcmp(a + i, b + i, 4) != 0) {
            fail_msg("%s %s, %u rows, %u -> %u: value %zu is %a, generic %a",
                     dtype_info(c->type)->name, what, c->rows, c->n_in, c->n_out, i, (double)a[i],
                     (double)b[i]);
        }
    }
}

/* A guard behind the output: nothing beyond n_out may be written. */
static void check_case(const MatmulCase *c, const MatmulUnit *units, uint32_t n_units,
                       uint32_t n_subtrees, const char *what)
{
    const size_t n = (size_t)n_subtrees * c->rows * c->n_out;
    float *got = case_alloc((n + 16) * 4), *want = case_alloc((n + 16) * 4);
    for (int i = 0; i < 16; i++) {
        got[n + i] = want[n + i] = 12345;
    }
    matmul_case_run(kernels_get(ISA_GENERIC), c, units, n_units, want);
    matmul_case_run(&table, c, units, n_units, got);
    assert_same(got, want, n + 16, c, what);
    free(got);
    free(want);
}

static void test_shapes(void **state)
{
    static const uint32_t rows[] = {1, 2, 3, 4, 5, 8, 23, 64, 133},
                          outs[] = {1, 15, 16, 17, 48, 100};
    static const uint32_t ins[] = {32, 64, 96, 256, 576, 1536},
                          float_ins[] = {1, 2, 7, 32, 101, 576};
    for (size_t t = 0; t < G_N_ELEMENTS(host_types); t++) {
        if (!covers(host_types[t])) {
            continue;
        }
        const uint32_t block = dtype_info(host_types[t])->block;
        for (size_t i = 0; i < G_N_ELEMENTS(ins); i++) {
            const uint32_t n_in = block == 1   ? float_ins[i]
                                  : block > 32 ? block * (uint32_t)(i / 2 + 1)
                                               : ins[i];
            /* Each shape of rows with two widths, each width with three or so: the whole product is
             * slow in generic. */
            for (size_t r = 0; r < G_N_ELEMENTS(rows); r++) {
                for (size_t o = (i + r) % 3; o < G_N_ELEMENTS(outs); o += 3) {
                    MatmulCase c;
                    if (rows[r] * outs[o] * n_in > 1500000) {
                        continue;
                    }
                    matmul_case_init(&c, host_types[t], rows[r], outs[o], n_in, VALUES_NORMAL,
                                     1000 * t + 100 * i + 10 * r + o);
                    check_case(&c, NULL, 0, 1, "normal values");
                    matmul_case_free(&c);
                }
            }
        }
    }
}

/* Prompts: more rows than a block of the wide walk holds, whose last group may be a lone row. */
static void test_prompts(void **state)
{
    static const uint32_t rows[] = {512, 257, 385};
    for (size_t t = 0; t < G_N_ELEMENTS(host_types); t++) {
        if (!covers(host_types[t])) {
            continue;
        }
        const uint32_t block = dtype_info(host_types[t])->block;
        for (size_t r = 0; r < G_N_ELEMENTS(rows); r++) {
            MatmulCase c;
            matmul_case_init(&c, host_types[t], rows[r], 17,
                             block == 1    ? 35
                             : block == 32 ? 672
                                           : 1024,
                             VALUES_NORMAL, 31 * t + r);
            check_case(&c, NULL, 0, 1, "a prompt");
            matmul_case_free(&c);
        }
    }
}

static void test_values(void **state)
{
    for (size_t t = 0; t < G_N_ELEMENTS(host_types); t++) {
        if (!covers(host_types[t])) {
            continue;
        }
        const uint64_t n_seeds = host_types[t] == DTYPE_BF16 ? 40 : 6;
        for (uint64_t seed = 0; seed < n_seeds; seed++) {
            const uint32_t n_in =
                dtype_info(host_types[t])->block == 1 ? 203 + (uint32_t)seed % 2 : 1024;
            MatmulCase c;
            matmul_case_init(&c, host_types[t],
                             seed % 3 == 0 ? 41
                             : seed % 2    ? 1
                                           : 7,
                             33, n_in, seed % 4 ? VALUES_EXTREME : VALUES_SUBNORMAL, 77 + seed);
            check_case(&c, NULL, 0, 1, "extreme values");
            matmul_case_free(&c);
        }
    }
}

/* Largest quants everywhere: an intermediate that saturated would show. */
static void test_saturation(void **state)
{
    static const uint8_t fills[] = {0xff, 0x00, 0x80, 0x7f, 0xf0, 0x0f};
    for (size_t t = 0; t < G_N_ELEMENTS(host_types); t++) {
        const DtypeInfo *info = dtype_info(host_types[t]);
        const uint16_t d = 0x3c00, m = 0x3800;
        if (info->block == 1 || host_types[t] == DTYPE_F8_E4M3 || !covers(host_types[t])) {
            continue;
        }
        for (size_t f = 0; f < sizeof fills; f++) {
            for (int sign = 0; sign < 3; sign++) {
                MatmulCase c;
                matmul_case_init(&c, host_types[t], sign == 1 ? 37 : 5, 17, 512, VALUES_NORMAL, 5);
                memset(c.file, fills[f], c.n_out * c.row_bytes);
                for (uint32_t b = 0; b < c.n_out * c.n_in / info->block; b++) {
                    uint8_t *block = c.file + b * info->block_bytes;
                    memcpy(block + (c.type == DTYPE_Q6_K ? 208 : 0), &d, 2);
                    if (c.type == DTYPE_Q4_1 || c.type == DTYPE_Q5_1 || c.type == DTYPE_Q4_K ||
                        c.type == DTYPE_Q5_K) {
                        memcpy(block + 2, &m, 2);
                    }
                }
                packed_put(&c.w, c.file, c.row_bytes, 0, c.n_out, 0, c.n_in);
                for (uint32_t i = 0; i < c.rows * c.n_in; i++) {
                    c.x[i] = sign == 0 || (sign == 2 && i % 3) ? 1.0f : -1.0f;
                }
                check_case(&c, NULL, 0, 1, "largest quants");
                matmul_case_free(&c);
            }
        }
    }
}

/* Unit programs of whole and partial ranges. */
static void test_units(void **state)
{
    for (size_t t = 0; t < G_N_ELEMENTS(host_types); t++) {
        if (!covers(host_types[t])) {
            continue;
        }
        const uint32_t block = dtype_info(host_types[t])->block;
        for (uint32_t n_leaves = 1; n_leaves <= 12; n_leaves++) {
            for (uint32_t first = 0; first < n_leaves; first += 1 + n_leaves / 4) {
                for (uint32_t last = first + 1; last <= n_leaves; last += 1 + n_leaves / 4) {
                    TreeStep steps[12];
                    MatmulUnit units[12];
                    const uint32_t n = last - first, width = block == 1 ? 6 : block;
                    const uint32_t short_width = block == 1 ? 3 : block;
                    const uint32_t n_subtrees = tree_program(n_leaves, first, last, steps);
                    MatmulCase c;
                    for (uint32_t u = 0; u < n; u++) {
                        units[u] = (MatmulUnit){u + 1 == n ? short_width : width, steps[u]};
                    }
                    matmul_case_init(&c, host_types[t],
                                     n_leaves % 4 == 3 ? 32 + n_leaves : 1 + n_leaves % 6,
                                     15 + n_leaves, (n - 1) * width + short_width, VALUES_NORMAL,
                                     n_leaves * 100 + first * 10 + last);
                    check_case(&c, units, n, n_subtrees, "units");
                    matmul_case_free(&c);
                }
            }
        }
    }
}

/* One call over all panels, or one panel a call; one row alone or among others: the same bits. */
static void test_split(void **state)
{
    for (size_t t = 0; t < G_N_ELEMENTS(host_types); t++) {
        if (!covers(host_types[t])) {
            continue;
        }
        const ActKind kind = act_kind_of(host_types[t]);
        const uint32_t rows = 7, n_out = 83, n_in = 512;
        MatmulCase c, one;
        matmul_case_init(&c, host_types[t], rows, n_out, n_in, VALUES_NORMAL, t);
        float *whole = case_alloc(rows * n_out * 4), *parts = case_alloc(rows * n_out * 4);
        matmul_case_run(&table, &c, NULL, 0, whole);
        for (uint32_t r = 0; r < rows; r++) {
            one = c;
            one.rows = 1;
            one.x = c.x + r * n_in;
            matmul_case_run(&table, &one, NULL, 0, parts + r * n_out);
        }
        assert_same(parts, whole, rows * n_out, &c, "row by row");
        void *act = case_alloc(act_bytes(kind, rows, n_in));
        table.act_quantise[kind](c.x, n_in, rows, 4, rows, n_in, act);
        table.act_quantise[kind](c.x, n_in, rows, 0, 4, n_in, act);
        memset(parts, 0, rows * n_out * 4);
        for (uint32_t p = 0; p < 6; p++) {
            const MatmulUnit unit = {n_in, {0, 1}};
            const MatmulArgs args = {&c.w, act, rows, &unit, 1, parts, n_out, 0, p, p + 1};
            table.matmul[c.type](&args);
        }
        assert_same(parts, whole, rows * n_out, &c, "panel by panel");
        free(act);
        free(whole);
        free(parts);
        matmul_case_free(&c);
    }
}

static void test_activations(void **state)
{
    static const uint32_t rows[] = {1, 2, 3, 4, 5, 6, 9, 13};
    for (int kind = 0; kind < ACT_KIND_LIMIT; kind++) {
        for (size_t r = 0; r < G_N_ELEMENTS(rows); r++) {
            for (int values = 0; values < 5; values++) {
                const uint32_t n_in = kind == ACT_F32 || kind == ACT_BF16 ? 77 + (uint32_t)values
                                                                          : 512,
                               ld = n_in + 3;
                const size_t bytes = act_bytes((ActKind)kind, rows[r], n_in);
                uint64_t random = 9 + r;
                float *x = case_alloc(rows[r] * ld * 4);
                uint8_t *got = case_alloc(bytes), *want = case_alloc(bytes);
                for (uint32_t i = 0; i < rows[r] * ld; i++) {
                    x[i] = values < 3 ? case_value((CaseValues)values, &random, i)
                                      : case_normal(&random) * 0x1p-98f;
                    if (values == 4) { /* every bit pattern, infinities and NaN among them */
                        const uint32_t bits =
                            (uint32_t)case_random(&random) | (i % 97 == 0 ? 0x7f800000u : 0);
                        memcpy(&x[i], &bits, 4);
                    }
                }
                memset(got, 0xee, bytes);
                memset(want, 0xee, bytes);
                kernels_get(ISA_GENERIC)
                    ->act_quantise[kind](x, ld, rows[r], 0, rows[r], n_in, want);
                table.act_quantise[kind](x, ld, rows[r], 0, rows[r], n_in, got);
                assert_memory_equal(got, want, bytes);
                free(x);
                free(got);
                free(want);
            }
        }
    }
}

static void test_not_finite(void **state)
{
    const float bad[] = {NAN, INFINITY, -INFINITY};
    for (size_t t = 0; t < G_N_ELEMENTS(host_types); t++) {
        if (!covers(host_types[t])) {
            continue;
        }
        for (int b = 0; b < 3; b++) {
            MatmulCase c;
            float out[6 * 19];
            matmul_case_init(&c, host_types[t], 6, 19, 512, VALUES_NORMAL, t);
            c.x[4 * 512 + 401] = bad[b];
            matmul_case_run(&table, &c, NULL, 0, out);
            for (int i = 0; i < 6 * 19; i++) {
                assert_int_equal(isfinite(out[i]) != 0, i / 19 != 4);
            }
            matmul_case_free(&c);
        }
    }
}

/* F8_E4M3 takes 2^8 times the activations where that is finite; the sums do not tell where. */
static void test_f8_large(void **state)
{
    static const uint32_t rows[] = {1, 2, 4, 21};
    static const float large[] = {0x1.fffffep119f, 0x1p120f, -0x1p122f};
    if (!covers(DTYPE_F8_E4M3)) {
        return;
    }
    for (size_t i = 0; i < G_N_ELEMENTS(rows) * G_N_ELEMENTS(large); i++) {
        MatmulCase c;
        matmul_case_init(&c, DTYPE_F8_E4M3, rows[i % 4], 21, 384, VALUES_NORMAL, i);
        for (size_t b = 0; b < c.n_out * c.row_bytes; b++) { /* below 2, so that no sum overflows */
            c.file[b] = b % 132 < 4 ? c.file[b] : c.file[b] & 0xbf;
        }
        packed_put(&c.w, c.file, c.row_bytes, 0, c.n_out, 0, c.n_in);
        for (uint32_t r = 0; r < c.rows; r += 1 + i % 3) {
            c.x[r * c.n_in + (r * 37 + 5) % 256] = large[i / 4];
        }
        check_case(&c, NULL, 0, 1, "large activations");
        matmul_case_free(&c);
    }
}

/* The caller's MXCSR is as it was: bf16dot sets flags for itself only. */
static void test_mxcsr(void **state)
{
    MatmulCase c;
    float out[64];
    const unsigned before = __builtin_ia32_stmxcsr();
    matmul_case_init(&c, DTYPE_BF16, 4, 16, 64, VALUES_NORMAL, 1);
    matmul_case_run(&table, &c, NULL, 0, out);
    assert_int_equal(__builtin_ia32_stmxcsr() & 0xffc0u, before & 0xffc0u);
    matmul_case_free(&c);
}

static int test_variant(const Variant *v, const Kernels *kernels)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shapes),      cmocka_unit_test(test_prompts),
        cmocka_unit_test(test_values),      cmocka_unit_test(test_saturation),
        cmocka_unit_test(test_units),       cmocka_unit_test(test_split),
        cmocka_unit_test(test_not_finite),  cmocka_unit_test(test_mxcsr),
        cmocka_unit_test(test_activations), cmocka_unit_test(test_f8_large),
    };
    variant = v;
    table = *kernels;
    return cmocka_run_group_tests_name(v->name, tests, NULL, NULL);
}

int main(int argc, char **argv)
{
    return variants_run(argc, argv, true, test_variant);
}
