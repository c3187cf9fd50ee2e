/* Products of class exact against generic's gemm, gemm_bf16 and gemm_f16, by bits: awkward shapes,
 * both orientations of both operands, segments that continue, units and their trees, the chain that
 * starts from c, and numbers at which an order, a flush or an added 0 shows. */
#include "tests/kernels/cuda_case.h"

static const Kernels *generic;

enum { SEGMENTS = 130, GAP = 1 /* steps between segments that are of none: NaN */ };

typedef struct Case {
    uint32_t m, n;
    uint32_t n_segments, length; /* of each: length, length + 1, 0, length, ... */
    uint32_t per_unit;           /* segments */
    uint32_t first, last;        /* units: those of node(0, n_leaves); 0: all, by the whole tree */
    uint32_t n_leaves;
    bool a_by_step, b_by_step; /* steps are neighbours in memory */
    bool accumulate;
    bool tiny;      /* products around the smallest normal number */
    uint32_t tile;  /* 0: by shape */
    uint32_t slots; /* of the workspace; 0: enough */
} Case;

static const Dtype operands[] = {DTYPE_F32, DTYPE_BF16, DTYPE_F16};

static GemmFn gemm_of(Dtype type)
{
    return type == DTYPE_BF16  ? generic->train.gemm_bf16
           : type == DTYPE_F16 ? generic->train.gemm_f16
                               : generic->train.gemm;
}

static uint32_t length_of(const Case *c, uint32_t segment)
{
    const uint32_t lengths[] = {c->length, c->length + 1, 0};
    return c->n_segments == 1 ? c->length : lengths[segment % 3];
}

static uint32_t steps_of(const Case *c)
{
    uint32_t steps = 0;
    for (uint32_t s = 0; s < c->n_segments; s++) {
        steps += length_of(c, s) + GAP;
    }
    return steps;
}

/* One number of an operand. */
static float number(const Case *c, Numbers *numbers)
{
    const double x = numbers_uniform(numbers, -2, 2);
    const unsigned kind = (unsigned)(numbers_u64(numbers) % 16);
    if (c->tiny) {
        return (float)ldexp(x, -63 - (int)(numbers_u64(numbers) % 12));
    }
    return kind == 0 ? -0.0f : kind == 1 ? (float)ldexp(x, -140) : (float)x;
}

/* A matrix of `outer` rows and all steps; what is of no segment is NaN. */
static float *operand_new(const Case *c, Numbers *numbers, uint32_t outer, bool by_step, size_t *ld)
{
    const uint32_t steps = steps_of(c);
    *ld = by_step ? steps + 2 : outer + 3;
    const size_t n = (by_step ? outer : steps) * *ld;
    float *x = malloc(n * sizeof *x);
    memset(x, 0xff, n * sizeof *x);
    for (uint32_t s = 0, first = 0; s < c->n_segments; first += length_of(c, s++) + GAP) {
        for (uint32_t t = first; t < first + length_of(c, s); t++) {
            for (uint32_t i = 0; i < outer; i++) {
                x[by_step ? i * *ld + t : t * *ld + i] = number(c, numbers);
            }
        }
    }
    return x;
}

static size_t operand_floats(const Case *c, uint32_t outer, bool by_step, size_t ld)
{
    return (by_step ? outer : steps_of(c)) * ld;
}

/* The segments of matrices at a and b; returns how many subtrees they emit. */
static uint32_t segments_fill(const Case *c, const float *a, size_t a_ld, const float *b,
                              size_t b_ld, GemmSegment *out)
{
    TreeStep steps[SEGMENTS];
    const uint32_t n_units = c->n_segments / c->per_unit;
    uint32_t first = 0, n_subtrees = 1;
    if (c->n_leaves > 0) {
        assert_int_equal(c->last - c->first, n_units);
        n_subtrees = tree_program(c->n_leaves, c->first, c->last, steps);
    } else {
        gemm_whole_tree(n_units, steps);
    }
    for (uint32_t s = 0; s < c->n_segments; first += length_of(c, s++) + GAP) {
        out[s] = (GemmSegment){.a = a + (c->a_by_step ? first : first * a_ld),
                               .a_row = c->a_by_step ? a_ld : 1,
                               .a_step = c->a_by_step ? 1 : a_ld,
                               .b = b + (c->b_by_step ? first : first * b_ld),
                               .b_step = c->b_by_step ? 1 : b_ld,
                               .b_column = c->b_by_step ? b_ld : 1,
                               .length = length_of(c, s),
                               .continues = (s + 1) % c->per_unit != 0,
                               .step = steps[s / c->per_unit]};
    }
    return n_subtrees;
}

static void run_case(const Case *c, Dtype type, uint64_t seed)
{
    Numbers numbers = {seed};
    GemmSegment segments[SEGMENTS];
    size_t a_ld, b_ld;
    const size_t ld = c->n + 1, stride = c->m * ld + 5;
    assert_true(c->n_segments <= SEGMENTS);
    float *a = operand_new(c, &numbers, c->m, c->a_by_step, &a_ld),
          *b = operand_new(c, &numbers, c->n, c->b_by_step, &b_ld);
    const uint32_t n_subtrees = segments_fill(c, a, a_ld, b, b_ld, segments);
    float *before = padded_rows(&numbers, c->m * n_subtrees + 1, c->n, ld, -2, 2);
    float *want = malloc(n_subtrees * stride * sizeof *want),
          *got = malloc(n_subtrees * stride * sizeof *want),
          *scratch = malloc(gemm_scratch_floats(SEGMENTS) * sizeof *scratch);
    memset(want, 0xff, n_subtrees * stride * sizeof *want);
    for (uint32_t r = 0; c->accumulate && r < c->m; r++) {
        for (uint32_t j = 0; j < c->n; j++) {
            want[r * ld + j] =
                c->tiny ? (float)ldexp((double)before[r * ld + j], -127) : before[r * ld + j];
        }
    }
    memcpy(got, want, n_subtrees * stride * sizeof *got);
    const GemmArgs args = {.m = c->m,
                           .n = c->n,
                           .segments = segments,
                           .n_segments = c->n_segments,
                           .accumulate = c->accumulate,
                           .c = want,
                           .ld = ld,
                           .subtree_stride = stride,
                           .scratch = scratch};
    gemm_of(type)(&args);
    FOR_EACH_ORDER
    {
        float *device_a = device_floats(a, operand_floats(c, c->m, c->a_by_step, a_ld)),
              *device_b = device_floats(b, operand_floats(c, c->n, c->b_by_step, b_ld)),
              *device_c = device_floats(got, n_subtrees * stride);
        segments_fill(c, device_a, a_ld, device_b, b_ld, segments);
        CudaGemm g = {.operands = type,
                      .m = c->m,
                      .n = c->n,
                      .segments = segments,
                      .n_segments = c->n_segments,
                      .accumulate = c->accumulate,
                      .c = device_c,
                      .ld = ld,
                      .subtree_stride = stride,
                      .tile = c->tile,
                      .workspace_bytes = weft_cuda_gemm_bytes(c->n_segments, c->m, c->n)};
        if (c->slots > 0) { /* at most 7 levels of tiles of 64 */
            g.workspace_bytes = (size_t)c->slots * 7 * 64 * 64 * sizeof(float);
        }
        g.workspace = device_of(NULL, g.workspace_bytes);
        run(weft_cuda_gemm(&g, NULL));
        float *result = malloc(n_subtrees * stride * sizeof *result);
        device_read(result, device_c, n_subtrees * stride * sizeof *result);
        for (size_t i = 0; i < n_subtrees * stride; i++) {
            if (float_bits(result[i]) != float_bits(want[i]) &&
                !(isnan(result[i]) && isnan(want[i]))) {
                fail_msg("%u x %u, %u segments of %u, operands %d, tile %u: float %zu is %a, "
                         "specified %a",
                         c->m, c->n, c->n_segments, c->length, (int)type, c->tile, i,
                         (double)result[i], (double)want[i]);
            }
        }
        free(result);
        device_free_all();
    }
    free(a), free(b), free(before), free(want), free(got), free(scratch);
}

static void run_cases(const Case *cases, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        for (size_t k = 0; k < sizeof operands / sizeof operands[0]; k++) {
            run_case(&cases[i], operands[k], 100 * i + k);
        }
    }
}
#define RUN(cases) run_cases(cases, sizeof cases / sizeof cases[0])

/* One chain. */
static void test_shapes(void **state)
{
    static const uint32_t sides[] = {1, 7, 23, 129}, lengths[] = {1, 2, 7, 16, 23, 33};
    for (unsigned i = 0; i < 16; i++) {
        for (unsigned k = 0; k < 6; k++) {
            const unsigned turn = i + k;
            const Case c = {.m = sides[i / 4],
                            .n = sides[i % 4],
                            .n_segments = 1,
                            .length = lengths[k],
                            .per_unit = 1,
                            .a_by_step = turn % 2 == 0,
                            .b_by_step = turn / 2 % 2 == 0,
                            .accumulate = turn % 3 == 0,
                            .tile = turn % 2 != 0 ? 64 : 128};
            run_case(&c, operands[turn % 3], 7 * i + k);
        }
    }
}

static void test_orientations(void **state)
{
    for (unsigned i = 0; i < 16; i++) {
        const Case c = {.m = 70,
                        .n = 66,
                        .n_segments = 1,
                        .length = 37,
                        .per_unit = 1,
                        .a_by_step = (i & 1) != 0,
                        .b_by_step = (i & 2) != 0,
                        .accumulate = (i & 4) != 0,
                        .tile = (i & 8) != 0 ? 64 : 128};
        run_cases(&c, 1);
    }
}

/* Gradients through several matrices, units of trees, parts of one; more segments than the
 * parameters hold; more tiles than the workspace has room for at once. */
static void test_units(void **state)
{
    static const Case cases[] = {
        {.m = 9, .n = 20, .n_segments = 3, .length = 17, .per_unit = 3, .a_by_step = true},
        {.m = 9, .n = 20, .n_segments = 3, .length = 5, .per_unit = 3, .accumulate = true},
        {.m = 12, .n = 70, .n_segments = 15, .length = 6, .per_unit = 3, .tile = 64},
        {.m = 5, .n = 9, .n_segments = 12, .length = 4, .per_unit = 1, .b_by_step = true},
        {.m = 5, .n = 9, .n_segments = 100, .length = 3, .per_unit = 1, .a_by_step = true},
        {.m = 7, .n = 3, .n_segments = 130, .length = 2, .per_unit = 2},
        {.m = 6,
         .n = 10,
         .n_segments = 9,
         .length = 8,
         .per_unit = 1,
         .n_leaves = 13,
         .first = 2,
         .last = 11},
        {.m = 6,
         .n = 10,
         .n_segments = 10,
         .length = 7,
         .per_unit = 2,
         .n_leaves = 12,
         .first = 5,
         .last = 10},
        {.m = 140,
         .n = 133,
         .n_segments = 5,
         .length = 9,
         .per_unit = 1,
         .tile = 64,
         .slots = 2,
         .a_by_step = true,
         .b_by_step = true},
        {.m = 140, .n = 133, .n_segments = 5, .length = 9, .per_unit = 1, .tile = 64, .slots = 1},
        {.m = 1, .n = 1, .n_segments = 2, .length = 0, .per_unit = 1},
    };
    RUN(cases);
}

/* So many that large tiles are taken. */
static void test_many_tiles(void **state)
{
    const Case c = {.m = 3, .n = 191 * 128 + 5, .n_segments = 2, .length = 3, .per_unit = 1};
    run_case(&c, DTYPE_F32, 9);
}

/* Around the smallest normal number: f32 keeps what is below, bf16dot does not. */
static void test_subnormals(void **state)
{
    static const Case cases[] = {
        {.m = 33, .n = 40, .n_segments = 1, .length = 24, .per_unit = 1, .tiny = true},
        {.m = 20,
         .n = 66,
         .n_segments = 1,
         .length = 15,
         .per_unit = 1,
         .tiny = true,
         .accumulate = true,
         .tile = 128},
        {.m = 20,
         .n = 17,
         .n_segments = 8,
         .length = 3,
         .per_unit = 1,
         .tiny = true,
         .b_by_step = true},
    };
    RUN(cases);
}

/* c, then one step: what an end of the range gives. */
typedef struct Edge {
    float c, a, b;
} Edge;

static void test_edges(void **state)
{
    static const Edge edges[] = {
        {0x1p-126f, 0x1.8p-76f, -0x1p-75f}, /* rounds to 2^-126, of 24 bits to less: flushed */
        {0x1p-126f, 0x1p-77f, -0x1p-75f},   /* to 2^-126 both ways: kept */
        {0x1p-126f, 0x1p-76f, -0x1p-75f},   /* a tie */
        {-0x1p-126f, 0x1.8p-76f, 0x1p-75f},
        {0x1p-126f, 0x1p-76f, 0x1p-75f},
        {0x1p-127f, 1.0f, 0x1p-127f},
        {0.0f, 0x1p-130f, 0x1p20f}, /* an operand that is flushed */
        {0.0f, -0x1p20f, 0x1p-130f},
        {-0.0f, 0.0f, 1.0f},
        {-0.0f, -0.0f, 1.0f},
        {0.0f, -0x1p-100f, 0x1p-100f},
        {1.0f, 0x1p-60f, -0x1p-90f},
        {3e38f, 3e38f, 2.0f},
        {0.0f, 70000.0f, 1.0f}, /* infinite as f16 */
        {0.0f, 1e-8f, 1.0f},    /* 0 as f16 */
        {0.0f, INFINITY, 0.0f},
        {NAN, 1.0f, 1.0f},
    };
    for (size_t i = 0; i < sizeof edges / sizeof edges[0]; i++) {
        for (size_t k = 0; k < sizeof operands / sizeof operands[0]; k++) {
            float want = edges[i].c, scratch[1], got;
            GemmSegment s = {.a = &edges[i].a,
                             .a_row = 1,
                             .a_step = 1,
                             .b = &edges[i].b,
                             .b_step = 1,
                             .b_column = 1,
                             .length = 1,
                             .step = {.emit = 1}};
            const GemmArgs args = {.m = 1,
                                   .n = 1,
                                   .segments = &s,
                                   .n_segments = 1,
                                   .accumulate = true,
                                   .c = &want,
                                   .ld = 1,
                                   .scratch = scratch};
            float *c = device_floats(&want, 1);
            gemm_of(operands[k])(&args);
            s.a = device_floats(&edges[i].a, 1);
            s.b = device_floats(&edges[i].b, 1);
            const CudaGemm g = {.operands = operands[k],
                                .m = 1,
                                .n = 1,
                                .segments = &s,
                                .n_segments = 1,
                                .accumulate = true,
                                .c = c,
                                .ld = 1};
            run(weft_cuda_gemm(&g, NULL));
            device_read(&got, c, sizeof got);
            assert_bits("an edge", &got, &want, 1);
            device_free_all();
        }
    }
}

/* A -0 that a chain ends with stays: nothing is added behind a segment's end, and an empty chain is
 * +0. */
static void test_ends(void **state)
{
    static const Case empty = {.m = 2, .n = 3, .n_segments = 1, .length = 0, .per_unit = 1};
    run_cases(&empty, 1);
    for (uint32_t length = 1; length < 20; length++) {
        float a[20], b[20], want = 0, scratch[1], got;
        for (uint32_t t = 0; t < length; t++) {
            a[t] = -0x1p-100f;
            b[t] = 0x1p-100f;
        }
        GemmSegment s = {.a = a,
                         .a_row = length,
                         .a_step = 1,
                         .b = b,
                         .b_step = 1,
                         .b_column = length,
                         .length = length,
                         .step = {.emit = 1}};
        const GemmArgs args = {.m = 1,
                               .n = 1,
                               .segments = &s,
                               .n_segments = 1,
                               .c = &want,
                               .ld = 1,
                               .scratch = scratch};
        generic->train.gemm(&args);
        assert_true(signbit(want));
        s.a = device_floats(a, length);
        s.b = device_floats(b, length);
        const CudaGemm g = {.operands = DTYPE_F32,
                            .m = 1,
                            .n = 1,
                            .segments = &s,
                            .n_segments = 1,
                            .c = device_floats(NULL, 1),
                            .ld = 1};
        run(weft_cuda_gemm(&g, NULL));
        device_read(&got, g.c, sizeof got);
        assert_bits("an end", &got, &want, 1);
        device_free_all();
    }
}

static void test_refused(void **state)
{
    float x[8] = {0};
    GemmSegment s[2] = {{.a = x,
                         .a_row = 1,
                         .a_step = 1,
                         .b = x,
                         .b_step = 1,
                         .b_column = 1,
                         .length = 1,
                         .step = {.n_merges = 1, .emit = 1}},
                        {.a = x,
                         .a_row = 1,
                         .a_step = 1,
                         .b = x,
                         .b_step = 1,
                         .b_column = 1,
                         .length = 1,
                         .step = {.emit = 1}}};
    CudaGemm g = {
        .operands = DTYPE_F32, .m = 1, .n = 1, .segments = s, .n_segments = 2, .c = x, .ld = 1};
    assert_int_not_equal(weft_cuda_gemm(&g, NULL), 0); /* merges nothing */
    s[0].step = (TreeStep){0};
    assert_int_not_equal(weft_cuda_gemm(&g, NULL), 0); /* leaves a unit behind */
    s[1].step = (TreeStep){1, 1};
    assert_int_not_equal(weft_cuda_gemm(&g, NULL), 0); /* has no room for one */
    s[0].a_row = s[0].a_step = 2;
    g.n_segments = 1;
    s[0].step = (TreeStep){0, 1};
    assert_int_not_equal(weft_cuda_gemm(&g, NULL), 0); /* neither stride is 1 */
    s[0].a_step = 1;
    g.operands = DTYPE_Q8_0;
    assert_int_not_equal(weft_cuda_gemm(&g, NULL), 0);
}

int main(void)
{
    leave_without_device();
    generic = kernels_get(ISA_GENERIC);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shapes),     cmocka_unit_test(test_orientations),
        cmocka_unit_test(test_units),      cmocka_unit_test(test_many_tiles),
        cmocka_unit_test(test_subnormals), cmocka_unit_test(test_edges),
        cmocka_unit_test(test_ends),       cmocka_unit_test(test_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
