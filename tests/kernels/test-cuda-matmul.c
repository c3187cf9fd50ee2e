/* Device products of every weight type: quantised ones by the bits of generic with units of 256
 * added in order, float ones within a stated error of float64; and that a row's bits depend on
 * nothing else. */
#include "tests/kernels/cuda_case.h"
#include "tests/kernels/matmul_case.h"
#include "proto/model/blocks.h"

static const Kernels *generic;

enum { SPAN = 256, SPANS_LIMIT = 64 };

/* The device's product of the case; out: [subtrees][rows][n_out + gap]. */
static void device_product(const MatmulCase *c, const MatmulUnit *units, uint32_t n_units,
                           uint32_t n_subtrees, const float *bias, const float *old, float *out)
{
    const size_t ld = c->n_out + 3, total = n_subtrees * c->rows * ld;
    PackedMatrix w = c->w;
    w.data = device_of(c->w.data, (c->n_out + 15) / 16 * c->w.panel_bytes);
    float *x = device_floats(c->x, (size_t)c->rows * c->n_in);
    const size_t size = weft_cuda_activation_bytes(c->type, c->rows, c->n_in);
    CudaMatmul m = {.w = &w, .x = x, .x_ld = c->n_in, .rows = c->rows, .ld = ld};
    m.activations = device_of(NULL, size == 0 ? 1 : size);
    m.out = device_floats(old, total);
    m.subtree_stride = c->rows * ld;
    m.units = units;
    m.n_units = n_units;
    m.bias = bias != NULL ? device_floats(bias, c->n_out) : NULL;
    m.accumulate = old != NULL;
    run(weft_cuda_quantise(c->type, x, c->n_in, c->rows, c->n_in, (void *)m.activations, NULL));
    run(weft_cuda_matmul(&m, NULL));
    device_read(out, m.out, total * sizeof *out);
    device_free_all();
}

/* generic's spans, each a subtree of its own, added in order inside each unit; then the tree. */
static void specified_product(const MatmulCase *c, const MatmulUnit *units, uint32_t n_units,
                              float *out)
{
    const size_t n = (size_t)c->rows * c->n_out, ld = c->n_out + 3;
    MatmulUnit spans[SPANS_LIMIT];
    uint32_t n_spans = 0, depth = 0, emitted = 0, span = 0;
    for (uint32_t u = 0; u < n_units; u++) {
        for (uint32_t k = 0; k < units[u].n_in; k += SPAN) {
            const uint32_t rest = units[u].n_in - k;
            spans[n_spans++] = (MatmulUnit){rest < SPAN ? rest : SPAN, {0, 1}};
        }
    }
    float *sums = malloc(n_spans * n * sizeof *sums), *stack = malloc(8 * n * sizeof *stack);
    matmul_case_run(generic, c, spans, n_spans, sums);
    for (uint32_t u = 0; u < n_units; u++) {
        float *top = stack + depth++ * n;
        for (uint32_t k = 0; k < units[u].n_in; k += SPAN, span++) {
            for (size_t i = 0; i < n; i++) {
                top[i] = k == 0 ? sums[span * n + i] : top[i] + sums[span * n + i];
            }
        }
        for (uint32_t m = 0; m < units[u].step.n_merges; m++, depth--) {
            for (size_t i = 0; i < n; i++) {
                stack[(depth - 2) * n + i] += stack[(depth - 1) * n + i];
            }
        }
        if (units[u].step.emit) {
            depth--;
            for (uint32_t r = 0; r < c->rows; r++) {
                memcpy(out + (emitted * c->rows + r) * ld, stack + depth * n + r * c->n_out,
                       c->n_out * sizeof *out);
            }
            emitted++;
        }
    }
    free(sums);
    free(stack);
}

static void assert_quantised(Dtype type, uint32_t rows, uint32_t n_out, uint32_t n_in,
                             CaseValues values, const MatmulUnit *units, uint32_t n_units,
                             uint32_t n_subtrees)
{
    MatmulCase c;
    matmul_case_init(&c, type, rows, n_out, n_in, values, rows * 31 + n_in);
    const size_t total = n_subtrees * rows * ((size_t)n_out + 3);
    const MatmulUnit whole = {n_in, {0, 1}};
    float *want = malloc(total * sizeof *want), *got = malloc(total * sizeof *got);
    memset(want, 0xff, total * sizeof *want);
    specified_product(&c, units ? units : &whole, units ? n_units : 1, want);
    FOR_EACH_ORDER
    {
        if (order_ < 2 || rows < 10) { /* the random order where it is cheap */
            device_product(&c, units, n_units, n_subtrees, NULL, NULL, got);
            assert_bits(dtype_info(type)->name, got, want, total);
        }
    }
    free(want);
    free(got);
    matmul_case_free(&c);
}

static void test_quantised(void **state)
{
    static const uint32_t rows[] = {1, 3, 8, 9, 17, 33, 65};
    for (unsigned t = 3; t < sizeof weight_types / sizeof weight_types[0]; t++) {
        const Dtype type = weight_types[t];
        const bool wide = dtype_info(type)->block == 256;
        for (unsigned r = 0; r < sizeof rows / sizeof rows[0]; r++) {
            const uint32_t n_in = wide ? 256 * (1 + r % 3) : 32 * (1 + 5 * r);
            assert_quantised(type, rows[r], r % 2 ? 49 : 16, n_in,
                             r % 3 == 1 ? VALUES_EXTREME : VALUES_NORMAL, NULL, 0, 1);
        }
        assert_quantised(type, 2, 7, wide ? 256 * 11 : 32 * 83, VALUES_EXTREME, NULL, 0, 1);
    }
}

/* Units of uneven lengths, their tree whole and in parts. */
static void test_units(void **state)
{
    for (unsigned t = 3; t < sizeof weight_types / sizeof weight_types[0]; t++) {
        const uint32_t block = dtype_info(weight_types[t])->block;
        for (unsigned n_units = 2; n_units <= 13; n_units += n_units == 3 ? 6 : 1) {
            MatmulUnit units[13];
            TreeStep steps[13];
            uint32_t n_in = 0;
            const uint32_t first = n_units > 9 ? 1 : 0; /* a range that is no subtree */
            const uint32_t n = n_units - first;
            const uint32_t n_subtrees = tree_program(n_units, first, n_units, steps);
            for (unsigned u = 0; u < n; u++) {
                units[u] = (MatmulUnit){block == 256 ? 256 * (1 + u % 2) : 32 * (7 + u), steps[u]};
                n_in += units[u].n_in;
            }
            for (unsigned rows = 1; rows < 50; rows += 33) {
                if (n_units == 2 || n_units == 12 || rows == 1) {
                    assert_quantised(weight_types[t], rows, 17, n_in, VALUES_NORMAL, units, n,
                                     n_subtrees);
                }
            }
            if (n_units == 12) {
                break;
            }
        }
    }
}

static void test_bias_and_old_values(void **state)
{
    enum { ROWS = 5, N_OUT = 20, N_IN = 96 };
    MatmulCase c;
    Numbers numbers = {9};
    matmul_case_init(&c, DTYPE_Q5_1, ROWS, N_OUT, N_IN, VALUES_NORMAL, 4);
    float bias[N_OUT], plain[ROWS * (N_OUT + 3)], got[ROWS * (N_OUT + 3)];
    float *old = padded_rows(&numbers, ROWS, N_OUT, N_OUT + 3, -9, 9);
    numbers_fill(&numbers, bias, N_OUT, -3, 3);
    device_product(&c, NULL, 0, 1, NULL, NULL, plain);
    device_product(&c, NULL, 0, 1, bias, old, got);
    for (unsigned r = 0; r < ROWS; r++) {
        for (unsigned n = 0; n < N_OUT; n++) {
            const size_t i = r * (N_OUT + 3) + n;
            plain[i] = old[i] + (plain[i] + bias[n]);
        }
    }
    assert_bits("bias and old values", got, plain, ROWS * (N_OUT + 3));
    free(old);
    matmul_case_free(&c);
}

/* Error bound of one output: `unit` of the sum of magnitudes of the exact products. */
static void assert_float(Dtype type, uint32_t rows, uint32_t n_out, uint32_t n_in, double unit)
{
    MatmulCase c;
    matmul_case_init(&c, type, rows, n_out, n_in, VALUES_NORMAL, n_in);
    c.x[0] *= 3000.0f;
    const size_t ld = n_out + 3, total = rows * ld;
    float *got = malloc(total * sizeof *got), *first = malloc(total * sizeof *first);
    float *w = malloc(n_in * sizeof *w);
    double largest = 0;
    FOR_EACH_ORDER
    {
        device_product(&c, NULL, 0, 1, NULL, NULL, got);
        if (order_ == 0) {
            memcpy(first, got, total * sizeof *first);
        }
        assert_bits("order", got, first, total);
    }
    for (uint32_t n = 0; n < n_out; n++) {
        packed_get_row(&c.w, n, w);
        for (uint32_t r = 0; r < rows; r++) {
            double sum = 0, magnitude = 0;
            for (uint32_t k = 0; k < n_in; k++) {
                float x = c.x[r * n_in + k];
                x = type == DTYPE_BF16 ? bf16_to_f32(f32_to_bf16(x)) : x;
                sum += (double)w[k] * x;
                magnitude += fabs((double)w[k] * x);
            }
            largest = fmax(largest, fabs(got[r * ld + n] - sum) / fmax(magnitude, 1e-30));
            if (!(fabs(got[r * ld + n] - sum) <= unit * magnitude)) {
                fail_msg("%s %ux%ux%u: row %u output %u: %g, float64 %g", dtype_info(type)->name,
                         rows, n_out, n_in, r, n, (double)got[r * ld + n], sum);
            }
        }
    }
    note_closeness("product", dtype_info(type)->name, largest, unit, "the sum of magnitudes");
    free(got);
    free(first);
    free(w);
    matmul_case_free(&c);
}

static void test_float(void **state)
{
    static const uint32_t shapes[][3] = {{1, 16, 16},  {1, 5, 1},     {3, 33, 75},
                                         {8, 16, 257}, {17, 20, 600}, {2, 16, 2400}};
    for (unsigned i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        const uint32_t *s = shapes[i];
        assert_float(DTYPE_F32, s[0], s[1], s[2], 2e-6);
        assert_float(DTYPE_F16, s[0], s[1], s[2], 2e-6);
        assert_float(DTYPE_BF16, s[0], s[1], s[2], 2e-6);
    }
}

/* Class fast with many rows: bf16 operands, f32 sums. The same operands in float64 within 2e-6 of
 * the sum of magnitudes; a row's bits are its own. */
static void fast_case(Dtype type, uint32_t rows, uint32_t n_out, uint32_t n_in)
{
    MatmulCase c;
    matmul_case_init(&c, type, rows, n_out, n_in, VALUES_NORMAL, n_in + rows);
    const size_t ld = n_out + 1, total = rows * ld;
    float *got = malloc(total * sizeof *got), *first = malloc(total * sizeof *first);
    float *w = malloc(n_in * sizeof *w), bias[64];
    double largest = 0;
    Numbers numbers = {rows};
    numbers_fill(&numbers, bias, n_out, -1, 1);
    assert_int_equal(weft_cuda_activation_type(type, rows, true), DTYPE_BF16);
    FOR_EACH_ORDER
    {
        PackedMatrix m = c.w;
        m.data = device_of(c.w.data, (n_out + 15) / 16 * c.w.panel_bytes);
        float *x = device_floats(c.x, (size_t)rows * n_in);
        CudaMatmul a = {.w = &m, .fast = true, .rows = rows, .ld = ld};
        a.activations = device_of(NULL, weft_cuda_activation_bytes(DTYPE_BF16, rows, n_in));
        a.out = device_floats(NULL, total);
        a.bias = device_floats(bias, n_out);
        run(weft_cuda_quantise(DTYPE_BF16, x, n_in, rows, n_in, (void *)a.activations, NULL));
        run(weft_cuda_matmul(&a, NULL));
        device_read(got, a.out, total * sizeof *got);
        if (order_ == 0) {
            memcpy(first, got, total * sizeof *first);
        }
        assert_bits("order", got, first, total);
        device_free_all();
    }
    for (uint32_t n = 0; n < n_out; n++) {
        packed_get_row(&c.w, n, w);
        for (uint32_t r = 0; r < rows; r++) {
            double sum = 0, magnitude = 0;
            for (uint32_t k = 0; k < n_in; k++) {
                const double product = (double)bf16_to_f32(f32_to_bf16(w[k])) *
                                       bf16_to_f32(f32_to_bf16(c.x[r * n_in + k]));
                sum += product;
                magnitude += fabs(product);
            }
            largest = fmax(largest, fabs(got[r * ld + n] - (sum + bias[n])) / (magnitude + 1));
            if (!(fabs(got[r * ld + n] - (sum + bias[n])) <= 2e-6 * (magnitude + 1))) {
                fail_msg("%s %ux%ux%u: row %u output %u: %g, float64 %g", dtype_info(type)->name,
                         rows, n_out, n_in, r, n, (double)got[r * ld + n], sum + bias[n]);
            }
        }
    }
    note_closeness("product of class fast", dtype_info(type)->name, largest, 2e-6,
                   "the sum of magnitudes");
    free(got), free(first), free(w);
    matmul_case_free(&c);
}

static void test_fast(void **state)
{
    for (unsigned t = 1; t < sizeof weight_types / sizeof weight_types[0]; t++) {
        const Dtype type = weight_types[t];
        const uint32_t block = dtype_info(type)->block;
        fast_case(type, block == 1 ? 33 : 257, 17 + t, block == 1 ? 75 : block == 256 ? 256 : 96);
        if (block == 1 || t == 3 || t == 8) {
            fast_case(type, 300, 35, block == 1 ? 131 : block == 256 ? 512 : 288);
        }
    }
    assert_int_equal(weft_cuda_activation_type(DTYPE_F32, 999, true), DTYPE_F32);
    assert_int_equal(weft_cuda_activation_type(DTYPE_BF16, 32, true), DTYPE_BF16);
    assert_int_equal(weft_cuda_activation_type(DTYPE_Q4_0, 255, true), DTYPE_Q4_0);
    assert_int_equal(weft_cuda_activation_type(DTYPE_Q4_0, 999, false), DTYPE_Q4_0);
}

/* A row alone, and the same row among others: the kernels for few and for many rows agree. */
static void test_neighbours(void **state)
{
    enum { ROWS = 75, N_OUT = 18, N_IN = 768 };
    for (unsigned t = 0; t < sizeof weight_types / sizeof weight_types[0]; t++) {
        MatmulCase c;
        matmul_case_init(&c, weight_types[t], ROWS, N_OUT, N_IN, VALUES_NORMAL, t);
        float all[ROWS * (N_OUT + 3)], one[N_OUT + 3];
        device_product(&c, NULL, 0, 1, NULL, NULL, all);
        for (unsigned r = 0; r < ROWS; r += 37) {
            MatmulCase alone = c;
            alone.rows = 1;
            alone.x = c.x + r * N_IN;
            device_product(&alone, NULL, 0, 1, NULL, NULL, one);
            assert_bits(dtype_info(weight_types[t])->name, all + r * (N_OUT + 3), one, N_OUT);
        }
        matmul_case_free(&c);
    }
}

static void test_not_finite(void **state)
{
    static const Dtype types[] = {DTYPE_F32, DTYPE_F16, DTYPE_BF16, DTYPE_Q8_0, DTYPE_Q4_K};
    enum { N_OUT = 16, N_IN = 256 };
    for (unsigned t = 0; t < sizeof types / sizeof types[0]; t++) {
        MatmulCase c;
        matmul_case_init(&c, types[t], 2, N_OUT, N_IN, VALUES_NORMAL, t);
        c.x[N_IN + 3] = INFINITY;
        float got[2 * (N_OUT + 3)];
        device_product(&c, NULL, 0, 1, NULL, NULL, got);
        for (unsigned n = 0; n < N_OUT; n++) {
            assert_true(isfinite(got[n]));
            assert_false(isfinite(got[N_OUT + 3 + n]));
        }
        matmul_case_free(&c);
    }
}

static void test_refused(void **state)
{
    MatmulCase c;
    matmul_case_init(&c, DTYPE_Q4_0, 1, 16, 64, VALUES_NORMAL, 1);
    const MatmulUnit crooked[2] = {{16, {0, 1}}, {48, {0, 1}}}, few[1] = {{32, {0, 1}}};
    CudaMatmul m = {.w = &c.w, .rows = 1, .units = crooked, .n_units = 2};
    assert_int_not_equal(weft_cuda_matmul(&m, NULL), 0);
    m.units = few;
    m.n_units = 1;
    assert_int_not_equal(weft_cuda_matmul(&m, NULL), 0);
    m.n_units = 65;
    assert_int_not_equal(weft_cuda_matmul(&m, NULL), 0);
    matmul_case_free(&c);
}

int main(void)
{
    leave_without_device();
    generic = kernels_get(ISA_GENERIC);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_quantised),
        cmocka_unit_test(test_units),
        cmocka_unit_test(test_bias_and_old_values),
        cmocka_unit_test(test_float),
        cmocka_unit_test(test_fast),
        cmocka_unit_test(test_neighbours),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_refused),
    };
    return tell_closeness(cmocka_run_group_tests(tests, NULL, NULL));
}
