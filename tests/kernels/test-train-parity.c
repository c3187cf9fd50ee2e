/* Every vector variant of the training ops against `generic`, by memcmp, on awkward shapes: tails,
 * primes, strides, unaligned pointers, in place, units, threads' shares of one product. */
#include "kernels/ops/math.h"
#include "tests/kernels/avx512/variants.h"
#include "tests/unit/kernels/numbers.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>
#include <immintrin.h>

static const TrainKernels *generic, *variant;
static Numbers numbers = {77};

static float *floats(size_t n)
{
    float *p = malloc((n + 1) * sizeof *p);
    assert_non_null(p);
    return p;
}

/* Mostly ordinary; some zeros of both signs, tiny and huge numbers. */
static void fill_values(float *out, size_t n)
{
    static const float special[] = {0.0f, -0.0f, 1e-45f, -1e-40f, 3e18f, -7e18f, 1.0f};
    for (size_t i = 0; i < n; i++) {
        const uint32_t kind = (uint32_t)numbers_u64(&numbers) % 16;
        out[i] = kind == 0 ? special[numbers_u64(&numbers) % 7]
                           : (float)numbers_uniform(&numbers, -2.0, 2.0);
    }
}

static uint32_t below(uint32_t n)
{
    return (uint32_t)(numbers_u64(&numbers) % n);
}

/* Bits equal, or both NaN. */
static void assert_same(const float *got, const float *want, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (float_bits(got[i]) != float_bits(want[i]) && !(isnan(got[i]) && isnan(want[i]))) {
            print_error("element %zu of %zu: %a, generic %a\n", i, n, (double)got[i],
                        (double)want[i]);
            fail();
        }
    }
}

static const uint32_t sizes[] = {1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 47, 63, 65, 100, 129, 576};
#define N_SIZES (sizeof sizes / sizeof sizes[0])

/* ---- gemm ---- */

typedef struct Shape {
    uint32_t m, n, k;
} Shape;

enum { SEGMENTS_MOST = 70 };

/* A product of the table and its place there: f32, bf16, f16. */
static GemmFn slot(const TrainKernels *table, unsigned kind)
{
    return kind == 0 ? table->gemm : kind == 1 ? table->gemm_bf16 : table->gemm_f16;
}

static unsigned gemm_kind;

/* One product in a random form: strides of the three shapes, units, chained segments. */
static void compare_gemm(Shape shape, bool a_turned, bool b_turned, uint32_t n_units,
                         bool accumulate)
{
    const size_t lda = (a_turned ? shape.m : shape.k) + below(3),
                 ldb = (b_turned ? shape.k : shape.n) + below(3), ld = shape.n + below(3);
    const size_t a_floats = lda * (a_turned ? shape.k : shape.m),
                 b_floats = ldb * (b_turned ? shape.n : shape.k);
    float *a = floats(a_floats), *b = floats(b_floats);
    GemmSegment segments[2 * SEGMENTS_MOST];
    TreeStep steps[SEGMENTS_MOST];
    uint32_t first = n_units > 2 ? below(2) : 0, last = n_units, n_subtrees;
    fill_values(a, a_floats);
    fill_values(b, b_floats);
    if (n_units > TREE_LEAVES_LIMIT) {
        gemm_whole_tree(n_units, steps);
        first = 0;
        n_subtrees = 1;
    } else {
        n_subtrees = tree_program(n_units, first, last, steps);
    }
    uint32_t n_segments = 0, t = 0;
    for (uint32_t u = first; u < last; u++) {
        const uint32_t end = u + 1 == last
                                 ? shape.k
                                 : (uint32_t)((uint64_t)shape.k * (u + 1 - first) / (last - first));
        const uint32_t parts = accumulate ? 1 : 1 + below(2);
        for (uint32_t part = 0; part < parts; part++) {
            const uint32_t length = part + 1 == parts ? end - t : (end - t) / 2;
            segments[n_segments++] = (GemmSegment){
                .a = a + (a_turned ? t * lda : t),
                .a_row = a_turned ? 1 : lda,
                .a_step = a_turned ? lda : 1,
                .b = b + (b_turned ? t : t * ldb),
                .b_step = b_turned ? 1 : ldb,
                .b_column = b_turned ? ldb : 1,
                .length = length,
                .continues = part + 1 < parts,
                .step = steps[u - first],
            };
            t += length;
        }
    }
    const size_t c_floats = ld * shape.m, all = c_floats * n_subtrees;
    float *want = floats(all), *got = floats(all), *scratch = floats(gemm_scratch_floats(n_units));
    fill_values(want, all);
    memcpy(got, want, all * sizeof(float));
    GemmArgs args = {.m = shape.m,
                     .n = shape.n,
                     .segments = segments,
                     .n_segments = n_segments,
                     .accumulate = accumulate,
                     .leaves = below(2) != 0,
                     .c = want,
                     .ld = ld,
                     .subtree_stride = c_floats,
                     .scratch = scratch};
    slot(generic, gemm_kind)(&args);
    args.c = got;
    slot(variant, gemm_kind)(&args);
    assert_int_equal(_mm_getcsr() & 0xffc0u, 0x1f80u); /* flush modes do not leak */
    assert_same(got, want, all);                       /* nothing between the rows either */
    free(a);
    free(b);
    free(want);
    free(got);
    free(scratch);
}

static void compare_gemms(unsigned kind)
{
    static const Shape shapes[] = {{1, 1, 1},    {1, 48, 7},   {4, 24, 16},  {8, 48, 33},
                                   {5, 25, 300}, {13, 97, 65}, {33, 50, 77}, {100, 200, 19},
                                   {270, 30, 9}, {3, 400, 64}, {7, 3, 600}};
    gemm_kind = kind;
    for (unsigned i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        for (unsigned form = 0; form < 4; form++) {
            const bool a_turned = (form & 1) != 0, b_turned = (form & 2) != 0;
            compare_gemm(shapes[i], a_turned, b_turned, 1, false);
            compare_gemm(shapes[i], a_turned, b_turned, 1, true);
            compare_gemm(shapes[i], a_turned, b_turned, 2 + below(9), false);
        }
    }
    /* more than one block of rows, of columns, of steps */
    static const Shape large[] = {
        {280, 400, 300}, {6, 1560, 520}, {300, 200, 1100}, {280, 60, 200}, {20, 1570, 40}};
    for (unsigned form = kind; form < 20; form += kind == 0 ? 1 : 5) {
        compare_gemm(large[form / 4], (form & 1) != 0, (form & 2) != 0, 1 + form % 3 * 3,
                     form % 3 == 0);
    }
    compare_gemm((Shape){5, 30, 640}, false, true, 64, false);
    compare_gemm((Shape){5, 30, 640}, false, false, 70, false);
}

static void test_gemm(void **state)
{
    compare_gemms(0);
}

static void test_gemm_bf16(void **state)
{
    compare_gemms(1);
}

static void test_gemm_f16(void **state)
{
    compare_gemms(2);
}

/* Sums below the normal range, out of normal ones: bf16dot flushes them in chains and where units
 * fold, not where leaves do. */
static void test_gemm_flush(void **state)
{
    enum { N = 50 };
    float a[4] = {0x1p-60f, 0x1p-60f, -0x1p-60f, -0x1p-60f}, b[4 * N], want[N], got[N];
    float *scratch = floats(gemm_scratch_floats(2));
    GemmSegment segments[2] = {{.length = 2, .step = {0, 0}}, {.length = 2, .step = {1, 1}}};
    for (int i = 0; i < 4 * N; i++) {
        b[i] = i % 4 < 2 ? 0x1.02p-66f : 0x1p-66f;
    } /* leaves of 1.0078125 x 2^-125 and -2^-125: their sum is 2^-132 */
    for (unsigned s = 0; s < 2; s++) {
        segments[s].a = a + 2 * s;
        segments[s].a_row = 4;
        segments[s].a_step = 1;
        segments[s].b = b + 2 * s;
        segments[s].b_step = 1;
        segments[s].b_column = 4;
    }
    for (unsigned leaves = 0; leaves < 2; leaves++) {
        GemmArgs args = {.m = 1,
                         .n = N,
                         .segments = segments,
                         .n_segments = 2,
                         .leaves = leaves != 0,
                         .c = want,
                         .ld = N,
                         .scratch = scratch};
        generic->gemm_bf16(&args);
        args.c = got;
        variant->gemm_bf16(&args);
        assert_same(got, want, N);
        assert_true((got[0] != 0.0f) == (leaves != 0));
    }
    free(scratch);
}

/* Threads take columns or rows of one product: the same bits. */
static void test_gemm_shares(void **state)
{
    enum { M = 37, N = 91, K = 50 };
    float *a = floats(M * K), *b = floats(N * K), *want = floats(M * N), *got = floats(M * N),
          *scratch = floats(gemm_scratch_floats(1));
    fill_values(a, M * K);
    fill_values(b, N * K);
    GemmSegment segment = {.a = a,
                           .a_row = K,
                           .a_step = 1,
                           .b = b,
                           .b_step = 1,
                           .b_column = K,
                           .length = K,
                           .step = {0, 1}};
    GemmArgs args = {.m = M,
                     .n = N,
                     .segments = &segment,
                     .n_segments = 1,
                     .c = want,
                     .ld = N,
                     .scratch = scratch};
    variant->gemm(&args);
    for (uint32_t cut = 1; cut < M; cut += 11) {
        memset(got, 0xff, M * N * sizeof(float));
        for (uint32_t part = 0; part < 4; part++) {
            const uint32_t i0 = part & 1 ? cut : 0, j0 = part & 2 ? cut : 0;
            segment.a = a + i0 * K;
            segment.b = b + j0 * K;
            args.m = part & 1 ? M - cut : cut;
            args.n = part & 2 ? N - cut : cut;
            args.c = got + i0 * N + j0;
            variant->gemm(&args);
        }
        assert_memory_equal(got, want, M * N * sizeof(float));
    }
    free(a);
    free(b);
    free(want);
    free(got);
    free(scratch);
}

/* ---- rows ---- */

enum { MOST = 640, ROWS = 5 };

static void compare_norm_backward(NormBackwardFn want_fn, NormBackwardFn got_fn, uint32_t n,
                                  uint32_t shift)
{
    static float x[MOST], w[MOST], dy[MOST], want[MOST], got[MOST];
    float stats[2][2];
    numbers_fill(&numbers, x, MOST, -3.0, 5.0);
    fill_values(w, MOST);
    fill_values(dy, MOST);
    fill_values(want, MOST);
    memcpy(got, want, sizeof got);
    want_fn(x + shift, w + shift, dy + shift, 1e-5f, n, want + shift, stats[0]);
    got_fn(x + shift, w + shift, dy + shift, 1e-5f, n, got + shift, stats[1]);
    assert_same(got, want, MOST);
    assert_memory_equal(stats[0], stats[1], sizeof stats[0]);
}

static void test_norms(void **state)
{
    static float x[MOST], w[MOST], b[MOST], want[MOST], got[MOST];
    for (unsigned s = 0; s < N_SIZES; s++) {
        const uint32_t n = sizes[s], shift = s % 3;
        numbers_fill(&numbers, x, MOST, -1.0, 9.0);
        fill_values(w, MOST);
        fill_values(b, MOST);
        memset(want, 0xee, sizeof want);
        memset(got, 0xee, sizeof got);
        generic->layer_norm(x + shift, w, b, 1e-5f, n, want + shift);
        variant->layer_norm(x + shift, w, b, 1e-5f, n, got + shift);
        assert_same(got, want, MOST);
        variant->layer_norm(x + shift, w, b, 1e-5f, n, x + shift);
        assert_same(x + shift, want + shift, n);
        compare_norm_backward(generic->rms_norm_backward, variant->rms_norm_backward, n, shift);
        compare_norm_backward(generic->layer_norm_backward, variant->layer_norm_backward, n, shift);
    }
}

static void test_sums_over_rows(void **state)
{
    static float x[ROWS * MOST], dy[ROWS * MOST], stats[2 * ROWS], want[2][MOST], got[2][MOST];
    for (unsigned s = 0; s < N_SIZES; s++) {
        const uint32_t n = sizes[s], ld = n + s % 3;
        fill_values(x, ROWS * MOST);
        fill_values(dy, ROWS * MOST);
        fill_values(stats, 2 * ROWS);
        fill_values(want[0], MOST);
        fill_values(want[1], MOST);
        memcpy(got, want, sizeof got);
        generic->norm_weight_backward(x, dy, ld, stats, ROWS, n, want[0], want[1]);
        variant->norm_weight_backward(x, dy, ld, stats, ROWS, n, got[0], got[1]);
        assert_same(got[0], want[0], MOST);
        assert_same(got[1], want[1], MOST);
        generic->norm_weight_backward(x, dy, ld, stats, ROWS, n, want[0], NULL);
        variant->norm_weight_backward(x, dy, ld, stats, ROWS, n, got[0], NULL);
        generic->sum_rows(dy, ld, ROWS, n, want[1]);
        variant->sum_rows(dy, ld, ROWS, n, got[1]);
        assert_same(got[0], want[0], MOST);
        assert_same(got[1], want[1], MOST);
    }
}

static void test_activations(void **state)
{
    static float x[MOST], u[MOST], dy[MOST], want[2][MOST], got[2][MOST];
    for (unsigned s = 0; s < N_SIZES; s++) {
        const uint32_t n = sizes[s], shift = s % 3;
        numbers_fill(&numbers, x, MOST, s % 2 ? -100.0 : -5.0, s % 2 ? 100.0 : 5.0);
        fill_values(u, MOST);
        fill_values(dy, MOST);
        if (n > 8) {
            x[4] = NAN;
            x[5] = -INFINITY;
            x[6] = INFINITY;
        }
        memset(want, 0xee, sizeof want);
        memset(got, 0xee, sizeof got);
        generic->gelu(x + shift, n, want[0] + shift);
        variant->gelu(x + shift, n, got[0] + shift);
        generic->gelu_backward(x + shift, dy, n, want[1] + shift);
        variant->gelu_backward(x + shift, dy, n, got[1] + shift);
        assert_same(got[0], want[0], MOST);
        assert_same(got[1], want[1], MOST);
        generic->swiglu_backward(x + shift, u, dy, n, want[0], want[1]);
        variant->swiglu_backward(x + shift, u, dy, n, got[0], got[1]);
        assert_same(got[0], want[0], MOST);
        assert_same(got[1], want[1], MOST);
        variant->swiglu_backward(x + shift, u, dy, n, x + shift, u); /* in place */
        assert_same(x + shift, want[0], n);
        assert_same(u, want[1], n);
    }
}

static void test_optimizers(void **state)
{
    static float g[MOST], m[2][MOST], v[2][MOST], w[2][MOST];
    for (unsigned s = 0; s < N_SIZES; s++) {
        const uint32_t n = sizes[s];
        fill_values(g, MOST);
        fill_values(m[0], MOST);
        numbers_fill(&numbers, v[0], MOST, 0.0, 1e-3);
        fill_values(w[0], MOST);
        memcpy(m[1], m[0], sizeof m[0]);
        memcpy(v[1], v[0], sizeof v[0]);
        memcpy(w[1], w[0], sizeof w[0]);
        const AdamwScalars a = {1e-3f, 0.9f, 0.1f, 0.95f, 0.05f, 3.0f, 7.0f, 1e-8f, 0.1f, 0.7f};
        generic->adamw(&a, n, g, m[0], v[0], w[0]);
        variant->adamw(&a, n, g, m[1], v[1], w[1]);
        for (unsigned nesterov = 0; nesterov < 2; nesterov++) {
            const SgdScalars d = {1e-2f, 0.9f, 0.01f, 0.3f, nesterov != 0};
            generic->sgd(&d, n, g, m[0], w[0]);
            variant->sgd(&d, n, g, m[1], w[1]);
        }
        assert_same(m[1], m[0], MOST);
        assert_same(v[1], v[0], MOST);
        assert_same(w[1], w[0], MOST);
        generic->gradient_finish(w[0], n, 0x1p-7f, 100.0f);
        variant->gradient_finish(w[1], n, 0x1p-7f, 100.0f);
        assert_same(w[1], w[0], MOST);
    }
}

static void test_sum_squares(void **state)
{
    static float x[40 * 130];
    numbers_fill(&numbers, x, 40 * 130, -1.0, 1.0);
    for (uint32_t rows = 1; rows < 34; rows += 8) {
        for (uint32_t columns = 1; columns < 130; columns += columns < 40 ? 1 : 8) {
            for (uint32_t more = 0; more < 2; more++) {
                const float want = generic->sum_squares(x, columns + more, rows, columns),
                            got = variant->sum_squares(x, columns + more, rows, columns);
                assert_int_equal(float_bits(got), float_bits(want));
            }
        }
    }
}

static void test_xent(void **state)
{
    static float z[MOST], want[MOST], got[MOST];
    for (unsigned s = 0; s < N_SIZES; s++) {
        const uint32_t n = sizes[s];
        for (unsigned variety = 0; variety < 3; variety++) {
            const uint32_t target = variety == 0 ? XENT_NO_TARGET : variety == 1 ? n - 1 : 0;
            numbers_fill(&numbers, z, MOST, -120.0, 4.0);
            memset(want, 0xee, sizeof want);
            memset(got, 0xee, sizeof got);
            generic->xent_backward(z, n, 4.0f, 3.25f, target, 0x1p-6f, want);
            variant->xent_backward(z, n, 4.0f, 3.25f, target, 0x1p-6f, got);
            assert_same(got, want, MOST);
            variant->xent_backward(z, n, 4.0f, 3.25f, target, 0x1p-6f, z);
            assert_same(z, want, n);
        }
    }
}

/* ---- attention ---- */

static void compare_attention(uint32_t n_rows, uint32_t n_q, uint32_t hd, uint32_t first,
                              uint32_t of)
{
    const size_t q_ld = n_q * hd + below(4), kv_ld = hd + below(4), nq = q_ld * n_rows,
                 nk = kv_ld * n_rows;
    TreeStep steps[8];
    const uint32_t subtrees = tree_program(of, first, first + n_q, steps);
    float *q = floats(nq), *dout = floats(nq), *k = floats(nk), *v = floats(nk);
    float *want = floats(nq + 2 * nk * subtrees), *got = floats(nq + 2 * nk * subtrees);
    float *scratch = floats(attention_backward_scratch_floats(n_rows, hd, n_q));
    numbers_fill(&numbers, q, nq, -2.0, 2.0);
    numbers_fill(&numbers, dout, nq, -2.0, 2.0);
    numbers_fill(&numbers, k, nk, -2.0, 2.0);
    numbers_fill(&numbers, v, nk, -2.0, 2.0);
    memset(want, 0xee, (nq + 2 * nk * subtrees) * sizeof(float));
    memset(got, 0xee, (nq + 2 * nk * subtrees) * sizeof(float));
    AttentionBackwardArgs args = {.q = q,
                                  .dout = dout,
                                  .k = k,
                                  .v = v,
                                  .q_ld = q_ld,
                                  .kv_ld = kv_ld,
                                  .subtree_stride = nk,
                                  .n_rows = n_rows,
                                  .n_q = n_q,
                                  .head_size = hd,
                                  .steps = steps,
                                  .scale = 0.3f,
                                  .scratch = scratch};
    args.dq = want;
    args.dk = want + nq;
    args.dv = args.dk + nk * subtrees;
    generic->attention_backward(&args);
    args.dq = got;
    args.dk = got + nq;
    args.dv = args.dk + nk * subtrees;
    variant->attention_backward(&args);
    assert_memory_equal(got, want, (nq + 2 * nk * subtrees) * sizeof(float));
    args.dq = dout; /* in place */
    variant->attention_backward(&args);
    for (uint32_t i = 0; i < n_rows; i++) {
        assert_memory_equal(dout + i * q_ld, want + i * q_ld, n_q * hd * sizeof(float));
    }
    free(q);
    free(dout);
    free(k);
    free(v);
    free(want);
    free(got);
    free(scratch);
}

static void test_attention_backward(void **state)
{
    static const uint32_t rows[] = {1, 2, 3, 4, 5, 31, 32, 33, 36, 63, 64, 65, 97};
    static const uint32_t head_sizes[] = {1, 4, 8, 20, 24, 32, 48, 64};
    for (unsigned i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        for (unsigned h = 0; h < sizeof head_sizes / sizeof head_sizes[0]; h++) {
            compare_attention(rows[i], 1 + (i + h) % 3, head_sizes[h], 0, 1 + (i + h) % 3);
        }
    }
    compare_attention(40, 3, 16, 1, 5); /* a rank that holds heads 1..3 of 5: two subtrees */
}

static int test_variant(const Variant *v, const Kernels *table)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gemm),           cmocka_unit_test(test_gemm_bf16),
        cmocka_unit_test(test_gemm_f16),       cmocka_unit_test(test_gemm_flush),
        cmocka_unit_test(test_gemm_shares),    cmocka_unit_test(test_norms),
        cmocka_unit_test(test_sums_over_rows), cmocka_unit_test(test_activations),
        cmocka_unit_test(test_optimizers),     cmocka_unit_test(test_sum_squares),
        cmocka_unit_test(test_xent),           cmocka_unit_test(test_attention_backward),
    };
    const struct CMUnitTest products[] = {cmocka_unit_test(test_gemm_bf16),
                                          cmocka_unit_test(test_gemm_flush)};
    variant = &table->train;
    return v->dots ? cmocka_run_group_tests_name(v->name, products, NULL, NULL)
                   : cmocka_run_group_tests_name(v->name, tests, NULL, NULL);
}

int main(int argc, char **argv)
{
    generic = &kernels_get(ISA_GENERIC)->train;
    return variants_run(argc, argv, true, test_variant);
}
