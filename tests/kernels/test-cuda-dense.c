/* Large products of class fast through the library, as kernels/cuda/ops.c leads it: strips of the
 * weights as plain bf16, bias, GELU and old values in its epilogue; what it refuses is done by a
 * kernel of ours. Weights of 8-bit floats with activations of 8 bits, where a host asks for it. The
 * library is a loop in float64 here; the kernels run by the emulation. Built with strips of 16 KiB.
 */
#include "tests/kernels/cuda_case.h"

#include "kernels/cuda/dense.h"
#include "kernels/cuda/module.h"
#include "kernels/device/ops.h"
#include "proto/model/blocks.h"
#include "tests/kernels/matmul_case.h"

enum { ROWS = 260, N_OUT = 200, STRIP = 16 << 10 };

static const Kernels *generic;

/* ---- what ops.c asks of its neighbours ---- */

static unsigned n_products, n_refused, refused_outputs;
static bool library_is_there, f8_refused; /* refused: of e4m3 alone */

struct CUstream_st *cuda_stream(DeviceStream *stream)
{
    (void)stream;
    return NULL;
}

DeviceStatus cuda_result(DeviceStream *stream, int error)
{
    (void)stream;
    return error == 0 ? DEVICE_OK : DEVICE_FAILED;
}

struct CudaDense *cuda_dense(DeviceStream *stream)
{
    static int one;
    (void)stream;
    return library_is_there ? (struct CudaDense *)(void *)&one : NULL;
}

static CudaDenseF8 f8;
static unsigned n_f8;
CudaDenseF8 *cuda_dense_f8(CudaDense *dense)
{
    (void)dense;
    return &f8;
}

static double element(const void *rows, size_t at)
{
    return (double)bf16_to_f32(((const uint16_t *)rows)[at]);
}

static double gelu_of(double x)
{
    return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
}

/* What the library asks of products in e4m3 is true; the same sum. */
static void f8_library(const CudaDenseProduct *a)
{
    const uint8_t *w = a->w, *x = a->x;
    assert_true(!a->w_by_in && !a->x_by_in && a->bias == NULL && !a->gelu);
    assert_true(a->rows % 4 == 0 && a->n_out % 4 == 0 && a->n_in % 128 == 0);
    assert_true((uintptr_t)w % 16 == 0 && (uintptr_t)x % 16 == 0);
    assert_true((uintptr_t)a->w_scales % 16 == 0 && (uintptr_t)a->x_scales % 16 == 0);
    for (uint32_t r = 0; r < a->rows; r++) {
        for (uint32_t n = 0; n < a->n_out; n++) {
            float *out = a->out + r * a->ld + n;
            double sum = a->accumulate ? (double)*out : 0;
            for (uint32_t b = 0; b < a->n_in / 128; b++) {
                double block = 0;
                for (uint32_t k = 128 * b; k < 128 * b + 128; k++) {
                    block += (double)e4m3_to_f32(w[n * a->w_ld + k]) *
                             (double)e4m3_to_f32(x[r * a->x_ld + k]);
                }
                sum += block * (double)a->w_scales[b * a->n_out + n] *
                       (double)a->x_scales[b * a->rows + r];
            }
            *out = (float)sum;
        }
    }
}

int cuda_dense_product(CudaDense *dense, const CudaDenseProduct *a, WeftCudaStream stream)
{
    (void)dense, (void)stream;
    assert_int_equal((uintptr_t)a->w % 256, (uintptr_t)a->workspace % 256);
    if (a->n_out == refused_outputs && (a->type == DTYPE_F8_E4M3 || !f8_refused)) {
        n_refused++;
        return 15; /* CUBLAS_STATUS_NOT_SUPPORTED */
    }
    if (a->type == DTYPE_F8_E4M3) {
        n_f8++;
        f8_library(a);
        return 0;
    }
    n_products++;
    assert_int_equal(a->type, DTYPE_BF16);
    assert_int_equal(a->n_in % 8, 0);
    for (uint32_t r = 0; r < a->rows; r++) {
        for (uint32_t n = 0; n < a->n_out; n++) {
            double sum = a->bias != NULL ? (double)a->bias[n] : 0;
            for (uint32_t k = 0; k < a->n_in; k++) {
                sum += element(a->w, n * a->w_ld + k) * element(a->x, r * a->x_ld + k);
            }
            float *out = a->out + r * a->ld + n;
            sum = a->gelu ? gelu_of(sum) : sum;
            *out = (float)(a->accumulate ? (double)*out + sum : sum);
        }
    }
    return 0;
}

/* ---- cases ---- */

typedef struct Way {
    Dtype type;
    bool bias, gelu, accumulate, same_x;
} Way;

/* bf16 operands, sums in float64. */
static void assert_product(const MatmulCase *c, const Way *way, const float *bias, const float *old,
                           const float *got)
{
    float *w = malloc(c->n_in * sizeof *w);
    for (uint32_t n = 0; n < c->n_out; n++) {
        packed_get_row(&c->w, n, w);
        for (uint32_t r = 0; r < c->rows; r++) {
            double sum = way->bias ? (double)bias[n] : 0, magnitude = 2;
            for (uint32_t k = 0; k < c->n_in; k++) {
                const double p = (double)bf16_to_f32(f32_to_bf16(w[k])) *
                                 bf16_to_f32(f32_to_bf16(c->x[r * c->n_in + k]));
                sum += p;
                magnitude += fabs(p);
            }
            sum = way->gelu ? gelu_of(sum) : sum;
            sum = way->accumulate ? old[r * c->n_out + n] + sum : sum;
            const double value = (double)got[r * c->n_out + n];
            if (!(fabs(value - sum) <= 2e-6 * magnitude)) {
                fail_msg("%s: row %u output %u: %g, float64 %g", dtype_info(way->type)->name, r, n,
                         value, sum);
            }
        }
    }
    free(w);
}

/* A product as the ops make it, with what its outputs held before. */
typedef struct Made {
    MatmulCase c;
    float *old, *got; /* [rows][n_out] */
    float bias[N_OUT];
} Made;

/* n_out <= N_OUT. `same_x`: twice, the second time from what the first left of the activations;
 * `x_goes`: they themselves are not there then. */
static void make(const Way *way, Dtype type, uint32_t rows, uint32_t n_out, uint32_t n_in,
                 bool x_goes, Made *made)
{
    Numbers numbers = {n_in};
    matmul_case_init(&made->c, type, rows, n_out, n_in, VALUES_NORMAL, n_in);
    const DeviceLimits limits = {
        .max_rows = rows, .widest_in = n_in, .widest_out = n_out, .fast = true};
    const size_t total = (size_t)rows * n_out, bytes = device_workspace_bytes(&limits);
    made->old = malloc(total * sizeof(float)), made->got = malloc(total * sizeof(float));
    numbers_fill(&numbers, made->old, total, -2, 2);
    numbers_fill(&numbers, made->bias, N_OUT, -1, 1);
    PackedMatrix w = made->c.w;
    w.data = device_of(made->c.w.data, (n_out + 15) / 16 * made->c.w.panel_bytes);
    DeviceMatmul m = {.w = &w,
                      .x = device_floats(made->c.x, (size_t)rows * n_in),
                      .x_ld = n_in,
                      .rows = rows,
                      .out = device_floats(made->old, total),
                      .out_ld = n_out,
                      .accumulate = way->accumulate,
                      .bias = way->bias ? device_floats(made->bias, n_out) : NULL,
                      .gelu = way->gelu,
                      .fast = true,
                      .workspace = device_of(NULL, bytes),
                      .workspace_bytes = bytes};
    assert_int_equal(cuda_ops.matmul(NULL, &m), DEVICE_OK);
    if (way->same_x) {
        cudaMemcpy(m.out, made->old, total * sizeof(float), cudaMemcpyHostToDevice);
        m.x = x_goes ? NULL : m.x;
        m.same_x = true;
        assert_int_equal(cuda_ops.matmul(NULL, &m), DEVICE_OK);
    }
    device_read(made->got, m.out, total * sizeof(float));
}

static void made_clear(Made *made)
{
    device_free_all();
    free(made->old), free(made->got);
    matmul_case_free(&made->c);
}

static void way_case(const Way *way, uint32_t n_in)
{
    Made made;
    make(way, way->type, ROWS, N_OUT, n_in, true, &made);
    assert_product(&made.c, way, made.bias, made.old, made.got);
    made_clear(&made);
}

static void run_ways(void)
{
    static const Way ways[] = {
        {.type = DTYPE_Q4_0, .bias = true, .same_x = true},
        {.type = DTYPE_BF16, .accumulate = true, .bias = true},
        {.type = DTYPE_F16, .gelu = true, .bias = true},
        {.type = DTYPE_Q8_0, .accumulate = true},
    };
    for (unsigned i = 0; i < sizeof ways / sizeof ways[0]; i++) {
        way_case(&ways[i], dtype_info(ways[i].type)->block == 1 ? 89 : 96);
    }
}

static void test_strips(void **state)
{
    (void)state;
    library_is_there = true;
    refused_outputs = 0;
    n_products = n_refused = 0;
    run_ways();
    assert_int_equal(n_products, 5 * 3); /* strips of 80 outputs: 80, 80, 40 */
    assert_int_equal(n_refused, 0);
}

static void test_refused_strips(void **state)
{
    (void)state;
    library_is_there = true;
    n_products = n_refused = 0;
    refused_outputs = 40;
    run_ways();
    assert_int_equal(n_products, 5 * 2);
    assert_int_equal(n_refused, 5);
}

static void test_without_the_library(void **state)
{
    (void)state;
    library_is_there = false;
    n_products = 0;
    run_ways();
    assert_int_equal(n_products, 0);
}

/* ---- weights of 8-bit floats ---- */

/* Activations as the library is given them: row by row as floats. */
static void f8_activations(const MatmulCase *c, float *x)
{
    for (size_t i = 0; i < (size_t)c->rows * c->n_in; i += 128) {
        float most = 0;
        for (unsigned k = 0; k < 128; k++) {
            most = fmaxf(most, fabsf(c->x[i + k]));
        }
        for (unsigned k = 0; k < 128; k++) {
            x[i + k] = e4m3_to_f32(f32_to_e4m3(c->x[i + k] * (448.0f / most))) * (most / 448.0f);
        }
    }
}

typedef enum Rounded { ROUNDED_F8, ROUNDED_BF16 } Rounded;

/* Outputs [first, last) of the product in float64, of operands rounded so; the last rows % 4 rows
 * beside a library in e4m3 are not rounded. */
static void assert_f8_outputs(const MatmulCase *c, const Way *way, const float *bias,
                              const float *old, const float *got, uint32_t first, uint32_t last,
                              Rounded rounded)
{
    float *w = malloc(c->n_in * sizeof *w), *x = malloc((size_t)c->rows * c->n_in * sizeof *x);
    f8_activations(c, x);
    for (uint32_t n = first; n < last; n++) {
        packed_get_row(&c->w, n, w);
        for (uint32_t r = 0; r < c->rows; r++) {
            double sum = way->bias ? (double)bias[n] : 0, magnitude = 2;
            for (uint32_t k = 0; k < c->n_in; k++) {
                const size_t at = (size_t)r * c->n_in + k;
                const double p =
                    rounded == ROUNDED_BF16
                        ? (double)bf16_to_f32(f32_to_bf16(w[k])) *
                              (double)bf16_to_f32(f32_to_bf16(c->x[at]))
                        : (double)w[k] * (double)(r < c->rows / 4 * 4 ? x[at] : c->x[at]);
                sum += p;
                magnitude += fabs(p);
            }
            sum = way->gelu ? gelu_of(sum) : sum;
            sum = way->accumulate ? (double)old[r * c->n_out + n] + sum : sum;
            const double value = (double)got[r * c->n_out + n];
            if (!(fabs(value - sum) <= 2e-6 * magnitude)) {
                fail_msg("row %u output %u: %g, float64 %g", r, n, value, sum);
            }
        }
    }
    free(w), free(x);
}

/* Outputs from `finished` on are in bf16. */
static void f8_case(const Way *way, uint32_t rows, uint32_t n_out, uint32_t n_in, uint32_t finished)
{
    Made made;
    make(way, DTYPE_F8_E4M3, rows, n_out, n_in, false, &made);
    assert_f8_outputs(&made.c, way, made.bias, made.old, made.got, 0, finished, ROUNDED_F8);
    assert_f8_outputs(&made.c, way, made.bias, made.old, made.got, finished, n_out, ROUNDED_BF16);
    made_clear(&made);
}

static const Way f8_ways[] = {
    {.same_x = true}, {.accumulate = true, .bias = true}, {.gelu = true, .bias = true}};
enum { N_F8_WAYS = sizeof f8_ways / sizeof f8_ways[0] };

static void begin_f8(bool wanted, uint32_t refused)
{
    library_is_there = true;
    f8 = (CudaDenseF8){.wanted = wanted};
    n_products = n_refused = n_f8 = 0;
    refused_outputs = refused;
    f8_refused = true;
}

/* Not asked for: bf16, as all types. Strips of 64 outputs: 64, 64, 64, 8. */
static void test_f8_weights(void **state)
{
    (void)state;
    begin_f8(false, 0);
    for (unsigned i = 0; i < N_F8_WAYS; i++) {
        f8_case(&f8_ways[i], ROWS, N_OUT, 128, 0);
    }
    assert_int_equal(n_products, 4 * 4);
    assert_int_equal(n_f8, 0);
}

/* Asked for: e4m3, but the rows that are no multiple of 4. */
static void test_f8_activations(void **state)
{
    (void)state;
    begin_f8(true, 0);
    for (unsigned i = 0; i < N_F8_WAYS; i++) {
        f8_case(&f8_ways[i], ROWS + i, N_OUT, i == 1 ? 384 : 128, N_OUT);
    }
    assert_int_equal(n_products, 0);
    assert_int_equal(n_f8, 3 * 4 + 13); /* of rows of 768 bytes 16 outputs fit a strip */
    assert_true(f8.wanted);
}

/* What is refused is in bf16, and e4m3 is not tried again. */
static void test_f8_refused(void **state)
{
    (void)state;
    begin_f8(true, 8);
    f8_case(&f8_ways[1], ROWS + 3, N_OUT, 128, 192);
    assert_int_equal(n_f8, 3);
    assert_int_equal(n_refused, 1);
    assert_int_equal(n_products, 1);
    assert_false(f8.wanted);
    f8_case(&f8_ways[0], ROWS, N_OUT, 128, 0);
    assert_int_equal(n_f8, 3);
    begin_f8(true, 64);
    f8_case(&f8_ways[0], ROWS, N_OUT, 128, 0);
    assert_int_equal(n_f8, 0);
    assert_int_equal(n_refused, 1);
    assert_int_equal(n_products, 8);
}

/* Products of one x whose outputs the library takes in e4m3, then in bf16, then in e4m3. */
static void test_f8_turns(void **state)
{
    enum { N_IN = 128 };
    static const uint32_t outputs[] = {64, 63, 64};
    const Way plain = {.type = DTYPE_F8_E4M3};
    MatmulCase c;
    (void)state;
    begin_f8(true, 0);
    matmul_case_init(&c, DTYPE_F8_E4M3, ROWS, 64, N_IN, VALUES_NORMAL, 9);
    const DeviceLimits limits = {
        .max_rows = ROWS, .widest_in = N_IN, .widest_out = 64, .fast = true};
    const size_t bytes = device_workspace_bytes(&limits);
    PackedMatrix w = c.w;
    w.data = device_of(c.w.data, 4 * c.w.panel_bytes);
    DeviceMatmul m = {.w = &w,
                      .x = device_floats(c.x, ROWS * N_IN),
                      .x_ld = N_IN,
                      .rows = ROWS,
                      .fast = true,
                      .workspace = device_of(NULL, bytes),
                      .workspace_bytes = bytes};
    float *got = malloc(sizeof *got * ROWS * 64);
    for (unsigned i = 0; i < 3; i++) {
        w.n_out = c.n_out = outputs[i];
        m.out_ld = outputs[i];
        m.out = device_floats(NULL, ROWS * 64);
        m.same_x = i > 0;
        assert_int_equal(cuda_ops.matmul(NULL, &m), DEVICE_OK);
        device_read(got, m.out, sizeof *got * ROWS * outputs[i]);
        assert_f8_outputs(&c, &plain, NULL, NULL, got, 0, outputs[i],
                          outputs[i] % 4 == 0 ? ROUNDED_F8 : ROUNDED_BF16);
    }
    assert_int_equal(n_f8, 2);
    assert_int_equal(n_products, 1);
    device_free_all();
    free(got);
    matmul_case_free(&c);
}

/* Class exact, few rows and cut contractions never come to it. */
static void test_what_is_not_dense(void **state)
{
    MatmulCase c;
    const MatmulUnit units[2] = {{32, {0, 1}}, {64, {0, 1}}};
    (void)state;
    library_is_there = true;
    n_products = 0;
    matmul_case_init(&c, DTYPE_Q8_0, ROWS, 16, 96, VALUES_NORMAL, 1);
    const DeviceLimits limits = {.max_rows = ROWS, .widest_in = 96, .widest_out = 16, .fast = true};
    const size_t bytes = device_workspace_bytes(&limits);
    PackedMatrix w = c.w;
    w.data = device_of(c.w.data, c.w.panel_bytes);
    DeviceMatmul m = {.w = &w,
                      .x = device_floats(c.x, ROWS * 96),
                      .x_ld = 96,
                      .rows = ROWS,
                      .out = device_floats(NULL, 2 * ROWS * 16),
                      .out_ld = 16,
                      .workspace = device_of(NULL, bytes),
                      .workspace_bytes = bytes};
    assert_int_equal(cuda_ops.matmul(NULL, &m), DEVICE_OK);
    m.fast = true;
    m.rows = 255;
    assert_int_equal(cuda_ops.matmul(NULL, &m), DEVICE_OK);
    m.rows = ROWS;
    m.units = units;
    m.n_units = 2;
    m.subtree_stride = ROWS * 16;
    assert_int_equal(cuda_ops.matmul(NULL, &m), DEVICE_OK);
    assert_int_equal(n_products, 0);
    device_free_all();
    matmul_case_free(&c);
}

/* What plans count for a device's workspace is enough for every kernel that works in it. */
static void test_workspace(void **state)
{
    Numbers numbers = {77};
    (void)state;
    for (unsigned i = 0; i < 2000; i++) {
        float f[8];
        numbers_fill(&numbers, f, 8, 0, 1);
        const DeviceLimits l = {.max_rows = 1 + (uint32_t)(f[0] * 700),
                                .max_keys = 1 + (uint32_t)(f[1] * 40000),
                                .max_segments = 1 + (uint32_t)(f[0] * 700),
                                .n_heads = 1 + (uint32_t)(f[2] * 64),
                                .n_kv_heads = 1 + (uint32_t)(f[3] * 8),
                                .head_size = 8 + (uint32_t)(f[4] * 248),
                                .widest_in = 256 + 256 * (uint32_t)(f[5] * 40),
                                .widest_out = 16 + (uint32_t)(f[6] * 40000),
                                .sampled_rows = i % 129,
                                .vocabulary = 1024 + (uint32_t)(f[7] * 150000),
                                .fast = i % 2 == 0};
        const uint64_t bytes = device_workspace_bytes(&l);
        const CudaAttention one_row = {.kv = {.n_kv_heads = l.n_kv_heads},
                                       .n_heads = l.n_heads,
                                       .head_size = l.head_size,
                                       .heads_per_kv = (l.n_heads - 1) / l.n_kv_heads + 1,
                                       .n_segments = 1,
                                       .longest_segment = 1,
                                       .max_keys = l.max_keys};
        assert_true(weft_cuda_attention_bytes(&one_row) <= bytes);
        assert_true(weft_cuda_candidates_bytes(l.sampled_rows, l.vocabulary, DEVICE_KEEP_LIMIT) <=
                    bytes);
        for (int type = 0; type < (int)DTYPE_LIMIT; type++) {
            if (cuda_ops.has_weight((Dtype)type)) {
                assert_true(weft_cuda_activation_bytes((Dtype)type, l.max_rows, l.widest_in) <=
                            bytes);
            }
        }
    }
}

int main(void)
{
    generic = kernels_get(ISA_GENERIC);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_workspace),         cmocka_unit_test(test_strips),
        cmocka_unit_test(test_refused_strips),    cmocka_unit_test(test_without_the_library),
        cmocka_unit_test(test_what_is_not_dense), cmocka_unit_test(test_f8_weights),
        cmocka_unit_test(test_f8_activations),    cmocka_unit_test(test_f8_refused),
        cmocka_unit_test(test_f8_turns),
    };
    return cmocka_run_group_tests_name("cuda-dense", tests, NULL, NULL);
}
