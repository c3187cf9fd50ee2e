/* Device products of 8-bit floats (F8_E4M3), all of whose numbers are exact but sums and the 23rd
 * bit of an activation: against float64, code by code, by units and with neighbours; the same in
 * class fast; and the operands of a library's product. */
#include "tests/kernels/cuda_case.h"
#include "tests/kernels/matmul_case.h"
#include "proto/model/blocks.h"

enum { UNITS = 12 };

/* The device's product; out: [subtrees][rows][n_out]. */
static void device_product(const MatmulCase *c, bool fast, const MatmulUnit *units,
                           uint32_t n_units, uint32_t n_subtrees, float *out)
{
    const size_t total = (size_t)n_subtrees * c->rows * c->n_out;
    const Dtype type = weft_cuda_activation_type(DTYPE_F8_E4M3, c->rows, fast);
    PackedMatrix w = c->w;
    w.data = device_of(c->w.data, (c->n_out + 15) / 16 * c->w.panel_bytes);
    float *x = device_floats(c->x, (size_t)c->rows * c->n_in);
    void *act = device_of(NULL, weft_cuda_activation_bytes(type, c->rows, c->n_in));
    const CudaMatmul m = {.w = &w,
                          .fast = fast,
                          .activations = act,
                          .rows = c->rows,
                          .out = device_floats(NULL, total),
                          .ld = c->n_out,
                          .subtree_stride = (size_t)c->rows * c->n_out,
                          .units = units,
                          .n_units = n_units};
    run(weft_cuda_quantise(type, x, c->n_in, c->rows, c->n_in, act, NULL));
    run(weft_cuda_matmul(&m, NULL));
    device_read(out, m.out, total * sizeof *out);
    device_free_all();
}

/* ---- against float64 ---- */

/* The largest of each row's activations: a value beside it is kept to 2^-40 of it at worst. */
static double row_most(const MatmulCase *c, uint32_t row)
{
    double most = 0;
    for (uint32_t k = 0; k < c->n_in; k++) {
        most = fmax(most, fabs((double)c->x[(size_t)row * c->n_in + k]));
    }
    return most;
}

static double rounded(float value, bool to_bf16)
{
    return to_bf16 ? (double)bf16_to_f32(f32_to_bf16(value)) : (double)value;
}

static void assert_product(const MatmulCase *c, bool bf16, const float *got)
{
    float *w = malloc(c->n_in * sizeof *w);
    for (uint32_t n = 0; n < c->n_out; n++) {
        packed_get_row(&c->w, n, w);
        for (uint32_t r = 0; r < c->rows; r++) {
            double sum = 0, magnitude = 0, weights = 0;
            for (uint32_t k = 0; k < c->n_in; k++) {
                const double product =
                    rounded(w[k], bf16) * rounded(c->x[(size_t)r * c->n_in + k], bf16);
                sum += product;
                magnitude += fabs(product);
                weights += fabs((double)w[k]);
            }
            const double value = (double)got[(size_t)r * c->n_out + n],
                         most = 2e-6 * magnitude + 0x1p-38 * weights * row_most(c, r) + 1e-37;
            if (!(fabs(value - sum) <= most)) {
                fail_msg("%ux%ux%u: row %u output %u: %g, float64 %g", c->rows, c->n_out, c->n_in,
                         r, n, value, sum);
            }
        }
    }
    free(w);
}

static void close_case(uint32_t rows, uint32_t n_out, uint32_t n_in, CaseValues values, bool fast)
{
    MatmulCase c;
    matmul_case_init(&c, DTYPE_F8_E4M3, rows, n_out, n_in, values, rows * 31 + n_in);
    const size_t total = (size_t)rows * n_out;
    float *got = malloc(total * sizeof *got), *first = malloc(total * sizeof *first);
    const bool bf16 = weft_cuda_activation_type(DTYPE_F8_E4M3, rows, fast) == DTYPE_BF16;
    FOR_EACH_ORDER
    {
        if (order_ == 0 || total * n_in < 300000) { /* every order where it is cheap */
            device_product(&c, fast, NULL, 0, 1, got);
            if (order_ == 0) {
                memcpy(first, got, total * sizeof *first);
            }
            assert_bits("order", got, first, total);
        }
    }
    assert_product(&c, bf16, got);
    free(got), free(first);
    matmul_case_free(&c);
}

static void test_exact_is_close(void **state)
{
    static const uint32_t shapes[][3] = {{1, 16, 128},  {1, 5, 1152},  {3, 33, 256},  {4, 17, 384},
                                         {8, 16, 2176}, {9, 31, 128},  {23, 20, 640}, {33, 49, 256},
                                         {65, 7, 384},  {512, 18, 256}};
    (void)state;
    for (unsigned i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        const uint32_t *s = shapes[i];
        close_case(s[0], s[1], s[2], VALUES_NORMAL, false);
        if (s[0] < 40) { /* scales from 2^-63 to 2^36 with either sign and zero; all codes */
            close_case(s[0], s[1], s[2], VALUES_EXTREME, false);
        }
    }
}

static void test_fast_is_close(void **state)
{
    static const uint32_t shapes[][3] = {{1, 16, 128},  {8, 19, 384},   {32, 33, 256},
                                         {33, 18, 128}, {64, 257, 384}, {65, 35, 256},
                                         {257, 30, 128}};
    (void)state;
    for (unsigned i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        close_case(shapes[i][0], shapes[i][1], shapes[i][2], VALUES_NORMAL, true);
    }
    assert_int_equal(weft_cuda_activation_type(DTYPE_F8_E4M3, 32, true), DTYPE_F8_E4M3);
    assert_int_equal(weft_cuda_activation_type(DTYPE_F8_E4M3, 33, true), DTYPE_BF16);
    assert_int_equal(weft_cuda_activation_type(DTYPE_F8_E4M3, 999, false), DTYPE_F8_E4M3);
}

/* ---- every code, subnormal ones too, by rows with a single one ---- */

static void set_weight(MatmulCase *c, uint32_t row, uint32_t k, uint8_t code)
{
    c->file[row * c->row_bytes + k / 128 * 132 + 4 + k % 128] = code;
}

static void test_codes(void **state)
{
    enum { N_IN = 256, N_OUT = 17 };
    MatmulCase c;
    (void)state;
    matmul_case_init(&c, DTYPE_F8_E4M3, N_IN, N_OUT, N_IN, VALUES_NORMAL, 1);
    for (uint32_t n = 0; n < N_OUT; n++) {
        for (uint32_t k = 0; k < N_IN; k++) {
            const uint8_t code = (uint8_t)(k + 16 * n);
            set_weight(&c, n, k, (code & 0x7f) == 0x7f ? 0x80 : code);
        }
    }
    packed_put(&c.w, c.file, c.row_bytes, 0, N_OUT, 0, N_IN);
    memset(c.x, 0, sizeof *c.x * N_IN * N_IN);
    for (uint32_t k = 0; k < N_IN; k++) {
        c.x[k * N_IN + k] = 1;
    }
    float *got = malloc(sizeof *got * N_IN * N_OUT), want[N_IN];
    device_product(&c, false, NULL, 0, 1, got);
    for (uint32_t n = 0; n < N_OUT; n++) {
        packed_get_row(&c.w, n, want);
        for (uint32_t k = 0; k < N_IN; k++) {
            if (!(got[k * N_OUT + n] == want[k])) {
                fail_msg("output %u, k %u: %a, not %a", n, k, (double)got[k * N_OUT + n],
                         (double)want[k]);
            }
        }
    }
    free(got);
    matmul_case_free(&c);
}

/* ---- bits ---- */

/* Units that are subtrees of their own, then their tree: the same bits as the tree on the device.
 * A unit's bits are those that it has alone. */
static void test_units(void **state)
{
    enum { N_OUT = 19, ROWS = 11 };
    MatmulUnit units[UNITS], single[UNITS];
    TreeStep steps[UNITS];
    uint32_t n_in = 0, depth = 0, emitted = 0;
    (void)state;
    const uint32_t n_subtrees = tree_program(UNITS + 1, 1, UNITS + 1, steps);
    for (unsigned u = 0; u < UNITS; u++) {
        units[u] = (MatmulUnit){128 * (1 + u % 3), steps[u]};
        single[u] = (MatmulUnit){128 * (1 + u % 3), {0, 1}};
        n_in += units[u].n_in;
    }
    MatmulCase c;
    matmul_case_init(&c, DTYPE_F8_E4M3, ROWS, N_OUT, n_in, VALUES_NORMAL, 5);
    const size_t n = ROWS * N_OUT;
    float *parts = malloc(UNITS * n * sizeof *parts), *stack = malloc(UNITS * n * sizeof *stack);
    float *got = malloc(n_subtrees * n * sizeof *got);
    device_product(&c, false, single, UNITS, UNITS, parts);
    device_product(&c, false, units, UNITS, n_subtrees, got);
    for (unsigned u = 0; u < UNITS; u++) {
        memcpy(stack + depth++ * n, parts + u * n, n * sizeof *stack);
        for (uint32_t m = 0; m < steps[u].n_merges; m++, depth--) {
            for (size_t i = 0; i < n; i++) {
                stack[(depth - 2) * n + i] += stack[(depth - 1) * n + i];
            }
        }
        if (steps[u].emit) {
            assert_bits("a subtree", got + emitted++ * n, stack + --depth * n, n);
        }
    }
    assert_int_equal(emitted, n_subtrees);
    free(parts), free(stack), free(got);
    matmul_case_free(&c);
}

/* A row alone, among a few and among many. */
static void test_neighbours(void **state)
{
    enum { ROWS = 75, N_OUT = 18, N_IN = 640 };
    static const uint32_t among[] = {1, 8, 9, 33};
    MatmulCase c;
    (void)state;
    matmul_case_init(&c, DTYPE_F8_E4M3, ROWS, N_OUT, N_IN, VALUES_NORMAL, 3);
    float all[ROWS * N_OUT], some[33 * N_OUT];
    device_product(&c, false, NULL, 0, 1, all);
    for (unsigned i = 0; i < sizeof among / sizeof among[0]; i++) {
        MatmulCase part = c;
        part.rows = among[i];
        part.x = c.x + 41 * N_IN;
        device_product(&part, i == 0, NULL, 0, 1, some);
        assert_bits("rows", some, all + 41 * N_OUT, among[i] * N_OUT);
    }
    matmul_case_free(&c);
}

static void test_not_finite(void **state)
{
    enum { N_OUT = 16, N_IN = 256 };
    static const uint32_t rows[] = {2, 40};
    (void)state;
    for (unsigned i = 0; i < 2; i++) {
        MatmulCase c;
        matmul_case_init(&c, DTYPE_F8_E4M3, rows[i], N_OUT, N_IN, VALUES_NORMAL, i);
        c.x[N_IN + 3] = i == 0 ? INFINITY : NAN;
        float got[40 * N_OUT];
        device_product(&c, i == 1, NULL, 0, 1, got);
        for (unsigned n = 0; n < N_OUT; n++) {
            assert_true(isfinite(got[n]));
            assert_false(isfinite(got[N_OUT + n]));
        }
        matmul_case_free(&c);
    }
}

/* ---- operands of the library ---- */

static void test_library_weights(void **state)
{
    enum { N_OUT = 37, N_IN = 384 };
    MatmulCase c;
    uint8_t *codes = malloc(N_OUT * N_IN);
    float scales[3 * N_OUT], scale;
    (void)state;
    matmul_case_init(&c, DTYPE_F8_E4M3, 1, N_OUT, N_IN, VALUES_EXTREME, 8);
    PackedMatrix w = c.w;
    w.data = device_of(c.w.data, (N_OUT + 15) / 16 * c.w.panel_bytes);
    uint8_t *rows = device_of(NULL, N_OUT * N_IN);
    float *numbers = device_floats(NULL, 3 * N_OUT);
    run(weft_cuda_unpack_f8(&w, rows, numbers, NULL));
    device_read(codes, rows, N_OUT * N_IN);
    device_read(scales, numbers, sizeof scales);
    for (unsigned n = 0; n < N_OUT; n++) {
        for (unsigned b = 0; b < 3; b++) {
            const uint8_t *block = c.file + n * c.row_bytes + b * 132;
            memcpy(&scale, block, 4);
            assert_bits("scale", &scales[b * N_OUT + n], &scale, 1);
            assert_memory_equal(codes + n * N_IN + b * 128, block + 4, 128);
        }
    }
    w.type = DTYPE_Q8_0;
    assert_int_not_equal(weft_cuda_unpack_f8(&w, rows, numbers, NULL), 0);
    device_free_all();
    free(codes);
    matmul_case_free(&c);
}

/* As the host rounds; blocks of zeros, of tiny numbers, with an infinity. */
static void test_library_activations(void **state)
{
    enum { ROWS = 6, N_IN = 256, LD = N_IN + 3 };
    Numbers numbers = {19};
    float *x = padded_rows(&numbers, ROWS, N_IN, LD, -3, 3), scales[2 * ROWS];
    uint8_t *codes = malloc(ROWS * N_IN);
    (void)state;
    for (unsigned k = 0; k < N_IN; k++) {
        x[k] = k < 128 ? ldexpf(k % 2 ? 1 : -1, -(int)(k / 4)) * (1 + (float)(k % 16) / 16) : 0;
        x[LD + k] *= 0x1p-120f;
        x[2 * LD + k] *= 0x1p100f;
    }
    x[3 * LD + 130] = -INFINITY;
    uint8_t *rows = device_of(NULL, ROWS * N_IN);
    float *numbers_of = device_floats(NULL, 2 * ROWS);
    run(weft_cuda_quantise_f8(device_floats(x, ROWS * LD), LD, ROWS, N_IN, rows, numbers_of, NULL));
    device_read(codes, rows, ROWS * N_IN);
    device_read(scales, numbers_of, sizeof scales);
    for (unsigned i = 0; i < ROWS * 2; i++) {
        const float *block = x + i / 2 * LD + i % 2 * 128;
        const uint8_t *got = codes + i * 128;
        const float scale = scales[i % 2 * ROWS + i / 2];
        float most = 0;
        for (unsigned k = 0; k < 128; k++) {
            most = fmaxf(most, fabsf(block[k]));
        }
        assert_true(isfinite(most) ? scale == most / 448.0f : isnan(scale));
        for (unsigned k = 0; k < 128; k++) {
            const bool kept = isfinite(most) && most >= 0x1p-100f;
            assert_int_equal(got[k], kept ? f32_to_e4m3(block[k] * (448.0f / most)) : 0);
        }
    }
    assert_int_not_equal(weft_cuda_quantise_f8(x, LD, ROWS, 200, rows, numbers_of, NULL), 0);
    device_free_all();
    free(codes), free(x);
}

int main(void)
{
    leave_without_device();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exact_is_close),  cmocka_unit_test(test_fast_is_close),
        cmocka_unit_test(test_codes),           cmocka_unit_test(test_units),
        cmocka_unit_test(test_neighbours),      cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_library_weights), cmocka_unit_test(test_library_activations),
    };
    return cmocka_run_group_tests_name("cuda-f8", tests, NULL, NULL);
}
