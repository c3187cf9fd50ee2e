/* Device kernels of norms, activations, rotation, embedding and the cache against generic, by bits,
 * on awkward shapes. */
#include "tests/kernels/cuda_case.h"
#include "tests/kernels/matmul_case.h"
#include "proto/base/crc32c.h"
#include "proto/model/blocks.h"

static const Kernels *generic;

static const uint32_t sizes[] = {1, 2, 7, 31, 32, 33, 64, 100, 255, 257, 576, 1025};
#define N_SIZES (sizeof sizes / sizeof sizes[0])

typedef struct Rows {
    uint32_t rows, n;
    size_t ld;
} Rows;

/* The device's rows against the host's, what lies between the rows included. */
static void assert_rows(const char *what, const float *device, const float *want, Rows shape)
{
    const size_t n = shape.rows * shape.ld;
    float *got = malloc(n * sizeof *got);
    device_read(got, device, n * sizeof *got);
    assert_bits(what, got, want, n);
    free(got);
}

static void test_add(void **state)
{
    Numbers numbers = {1};
    for (unsigned s = 0; s < N_SIZES; s++) {
        const Rows shape = {3, sizes[s], sizes[s] + s % 3};
        float *x = padded_rows(&numbers, 3, shape.n, shape.ld, -9, 9);
        float *y = padded_rows(&numbers, 3, shape.n, shape.ld, -9, 9);
        float *want = malloc(3 * shape.ld * sizeof *want);
        FOR_EACH_ORDER
        {
            memcpy(want, x, 3 * shape.ld * sizeof *want);
            float *dx = device_floats(x, 3 * shape.ld), *dy = device_floats(y, 3 * shape.ld);
            run(weft_cuda_add(dx, shape.ld, dy, shape.ld, 3, shape.n, NULL));
            for (unsigned r = 0; r < 3; r++) {
                generic->add(want + r * shape.ld, y + r * shape.ld, shape.n);
            }
            assert_rows("add", dx, want, shape);
            run(weft_cuda_add_bias(dx, shape.ld, dy, 3, shape.n, NULL));
            for (unsigned r = 0; r < 3; r++) {
                generic->add(want + r * shape.ld, y, shape.n);
            }
            assert_rows("add_bias", dx, want, shape);
            device_free_all();
        }
        free(x);
        free(y);
        free(want);
    }
}

static void test_activations(void **state)
{
    Numbers numbers = {2};
    for (unsigned s = 0; s < N_SIZES; s++) {
        const Rows shape = {2, sizes[s], sizes[s] + 1};
        const size_t n = 2 * shape.ld;
        float *gate = padded_rows(&numbers, 2, shape.n, shape.ld, -30, 30);
        float *up = padded_rows(&numbers, 2, shape.n, shape.ld, -3, 3);
        gate[0] = s % 2 ? 100.0f : -100.0f; /* beyond exp's ends */
        float *want = malloc(n * sizeof *want), *sum = malloc(shape.n * sizeof *sum);
        FOR_EACH_ORDER
        {
            float *dg = device_floats(gate, n), *du = device_floats(up, n);
            memcpy(want, gate, n * sizeof *want);
            for (unsigned r = 0; r < 2; r++) {
                generic->swiglu(gate + r * shape.ld, up + r * shape.ld, shape.n,
                                want + r * shape.ld);
            }
            run(weft_cuda_swiglu(dg, shape.ld, du, shape.ld, 2, shape.n, dg, shape.ld, NULL));
            assert_rows("swiglu", dg, want, shape);

            for (unsigned with_bias = 0; with_bias < 2; with_bias++) {
                dg = device_floats(gate, n);
                for (unsigned r = 0; r < 2; r++) {
                    memcpy(sum, gate + r * shape.ld, shape.n * sizeof *sum);
                    if (with_bias) {
                        generic->add(sum, up, shape.n);
                    }
                    generic->train.gelu(sum, shape.n, want + r * shape.ld);
                }
                run(weft_cuda_gelu(dg, shape.ld, with_bias ? du : NULL, 2, shape.n, dg, shape.ld,
                                   NULL));
                assert_rows("gelu", dg, want, shape);
            }
            device_free_all();
        }
        free(gate);
        free(up);
        free(want);
        free(sum);
    }
}

static void norm_case(Numbers *numbers, uint32_t n, bool layer, bool with_residual)
{
    const Rows shape = {3, n, n + 2};
    const size_t total = 3 * shape.ld;
    float *x = padded_rows(numbers, 3, n, shape.ld, -2, 3);
    float *residual = padded_rows(numbers, 3, n, shape.ld, -2, 3);
    float *weight = padded_rows(numbers, 1, n, n, -2, 2),
          *bias = padded_rows(numbers, 1, n, n, -1, 1);
    float *want = padded_rows(numbers, 3, 0, shape.ld, 0, 0), *sum = malloc(total * sizeof *sum);
    x[shape.ld] = 1e25f; /* squares beyond the range */
    x[2 * shape.ld] = 1e-44f;
    FOR_EACH_ORDER
    {
        float *dx = device_floats(x, total), *dr = device_floats(residual, total);
        float *dw = device_floats(weight, n), *db = device_floats(bias, n);
        float *out = device_floats(NULL, total);
        memcpy(sum, x, total * sizeof *sum);
        for (unsigned r = 0; r < 3; r++) {
            float *row = sum + r * shape.ld;
            if (with_residual) {
                generic->add(row, residual + r * shape.ld, n);
            }
            if (layer) {
                generic->train.layer_norm(row, weight, bias, 1e-5f, n, want + r * shape.ld);
            } else {
                generic->rms_norm(row, weight, 1e-5f, n, want + r * shape.ld);
            }
        }
        float *added = with_residual ? dr : NULL;
        run(layer ? weft_cuda_layer_norm(dx, shape.ld, NULL, added, shape.ld, dw, db, 1e-5f, 3, n,
                                         out, shape.ld, NULL)
                  : weft_cuda_rms_norm(dx, shape.ld, NULL, added, shape.ld, dw, 1e-5f, 3, n, out,
                                       shape.ld, NULL));
        assert_rows("norm", out, want, shape);
        assert_rows("residual", dx, sum, shape);
        if (!with_residual) { /* in place */
            run(layer ? weft_cuda_layer_norm(dx, shape.ld, NULL, NULL, 0, dw, db, 1e-5f, 3, n, dx,
                                             shape.ld, NULL)
                      : weft_cuda_rms_norm(dx, shape.ld, NULL, NULL, 0, dw, 1e-5f, 3, n, dx,
                                           shape.ld, NULL));
            assert_rows("norm in place", dx, want, shape);
        }
        device_free_all();
    }
    free(x);
    free(residual);
    free(weight);
    free(bias);
    free(want);
    free(sum);
}

static void test_norms(void **state)
{
    Numbers numbers = {3};
    for (unsigned s = 0; s < N_SIZES; s++) {
        for (unsigned variety = 0; variety < 4; variety++) {
            norm_case(&numbers, sizes[s], variety & 1, variety & 2);
        }
    }
    assert_int_not_equal(
        weft_cuda_rms_norm(NULL, 0, NULL, NULL, 0, NULL, 0, 1, 16385, NULL, 0, NULL), 0);
}

static void test_norm_of_chosen_rows(void **state)
{
    enum { ROWS = 4, N = 65 };
    const uint32_t index[ROWS] = {6, 0, 6, 3};
    Numbers numbers = {31};
    float x[7 * N], weight[N], want[ROWS * N], layer[ROWS * N];
    numbers_fill(&numbers, x, 7 * N, -2, 2);
    numbers_fill(&numbers, weight, N, -2, 2);
    for (unsigned r = 0; r < ROWS; r++) {
        generic->rms_norm(x + index[r] * N, weight, 1e-6f, N, want + r * N);
        generic->train.layer_norm(x + index[r] * N, weight, x, 1e-6f, N, layer + r * N);
    }
    float *out = device_floats(NULL, ROWS * N);
    run(weft_cuda_rms_norm(device_floats(x, 7 * N), N, device_of(index, sizeof index), NULL, 0,
                           device_floats(weight, N), 1e-6f, ROWS, N, out, N, NULL));
    assert_rows("norm of chosen rows", out, want, (Rows){ROWS, N, N});
    run(weft_cuda_layer_norm(device_floats(x, 7 * N), N, device_of(index, sizeof index), NULL, 0,
                             device_floats(weight, N), device_floats(x, N), 1e-6f, ROWS, N, out, N,
                             NULL));
    assert_rows("layer norm of chosen rows", out, layer, (Rows){ROWS, N, N});
    device_free_all();
}

static void rope_case(Numbers *numbers, RopeSpec spec, uint32_t head_size, bool inverse)
{
    enum { ROWS = 4, HEADS = 3, CONTEXT = 40 };
    const uint32_t half = spec.dims / 2;
    const uint32_t positions[ROWS] = {0, 39, 7, 7};
    float factors[64], *cos = malloc(CONTEXT * half * sizeof *cos);
    float *sin = malloc(CONTEXT * half * sizeof *sin), turned[64];
    numbers_fill(numbers, factors, 64, 1, 4);
    rope_table(&spec, spec.scaling == ROPE_SCALING_FACTORS ? factors : NULL, 0, CONTEXT, cos, sin);
    const Rows shape = {ROWS, HEADS * head_size, HEADS * head_size + 5};
    float *x = padded_rows(numbers, ROWS, shape.n, shape.ld, -4, 4);
    float *want = malloc(ROWS * shape.ld * sizeof *want);
    FOR_EACH_ORDER
    {
        memcpy(want, x, ROWS * shape.ld * sizeof *want);
        for (unsigned r = 0; r < ROWS; r++) {
            for (unsigned i = 0; i < half; i++) {
                const float s = sin[positions[r] * half + i];
                turned[i] = inverse ? -s : s;
            }
            generic->rope_apply(want + r * shape.ld, HEADS, head_size, spec.dims, spec.pairing,
                                cos + positions[r] * half, turned);
        }
        float *dx = device_floats(x, ROWS * shape.ld);
        run(weft_cuda_rope(dx, shape.ld, device_of(positions, sizeof positions), ROWS, HEADS,
                           head_size, spec.dims, spec.pairing, device_floats(cos, CONTEXT * half),
                           device_floats(sin, CONTEXT * half), inverse, NULL));
        assert_rows("rope", dx, want, shape);
        device_free_all();
    }
    free(cos);
    free(sin);
    free(x);
    free(want);
}

static void test_rope(void **state)
{
    Numbers numbers = {4};
    const RopeSpec specs[] = {
        {.dims = 16, .freq_base = 10000.0f, .scaling = ROPE_SCALING_NONE},
        {.dims = 32, .freq_base = 10000.0f, .scaling = ROPE_SCALING_LINEAR, .factor = 4.0f},
        {.dims = 64,
         .freq_base = 10000.0f,
         .scaling = ROPE_SCALING_YARN,
         .factor = 4.0f,
         .original_context = 16,
         .yarn_ext_factor = 1.0f,
         .yarn_attn_factor = 1.0f,
         .yarn_beta_fast = 32.0f,
         .yarn_beta_slow = 1.0f},
        {.dims = 64, .freq_base = 500000.0f, .scaling = ROPE_SCALING_FACTORS},
    };
    for (unsigned i = 0; i < sizeof specs / sizeof specs[0]; i++) {
        for (unsigned pairing = 0; pairing < 2; pairing++) {
            RopeSpec spec = specs[i];
            spec.pairing = (RopePairing)pairing;
            rope_case(&numbers, spec, spec.dims + (i == 0 ? 6 : 0), pairing == 1);
        }
    }
}

static void test_embed(void **state)
{
    enum { N_OUT = 37, IDS = 6, FIRST = 100 };
    const uint32_t ids[IDS] = {FIRST, FIRST + 36, FIRST + 17, FIRST + 37, 0, FIRST + 16};
    for (unsigned t = 0; t < sizeof host_types / sizeof host_types[0]; t++) {
        const Dtype type = host_types[t];
        const uint32_t n_in = dtype_info(type)->block == 1 ? 75 : 512;
        MatmulCase c;
        matmul_case_init(&c, type, 1, N_OUT, n_in, VALUES_EXTREME, t);
        const size_t panels = (N_OUT + 15) / 16 * c.w.panel_bytes, ld = n_in + 3;
        float *want = malloc(IDS * ld * sizeof *want), *twice = malloc(IDS * ld * sizeof *twice);
        memset(want, 0xff, IDS * ld * sizeof *want);
        for (unsigned i = 0; i < IDS; i++) {
            memset(want + i * ld, 0, n_in * sizeof *want);
            if (ids[i] >= FIRST && ids[i] < FIRST + N_OUT) {
                packed_get_row(&c.w, ids[i] - FIRST, want + i * ld);
            }
        }
        for (size_t i = 0; i < IDS * ld; i++) {
            twice[i] = want[i] + want[i];
        }
        FOR_EACH_ORDER
        {
            PackedMatrix m = c.w;
            m.data = device_of(c.w.data, panels);
            float *out = device_floats(NULL, IDS * ld);
            run(weft_cuda_embed(&m, device_of(ids, sizeof ids), FIRST, IDS, false, out, ld, NULL));
            assert_rows(dtype_info(type)->name, out, want, (Rows){IDS, n_in, ld});
            run(weft_cuda_embed(&m, device_of(ids, sizeof ids), FIRST, IDS, true, out, ld, NULL));
            assert_rows("added rows", out, twice, (Rows){IDS, n_in, ld});
            device_free_all();
        }
        free(twice);
        free(want);
        matmul_case_free(&c);
    }
}

/* Panels of every type to rows of bf16. */
static void test_unpack(void **state)
{
    enum { N_OUT = 19 };
    for (unsigned t = 1; t < sizeof host_types / sizeof host_types[0]; t++) {
        const Dtype type = host_types[t];
        const uint32_t n_in = dtype_info(type)->block == 1 ? 75 : 512;
        MatmulCase c;
        matmul_case_init(&c, type, 1, N_OUT, n_in, VALUES_NORMAL, t);
        const size_t ld = weft_cuda_row_elements(n_in), size = N_OUT * ld * 2;
        uint16_t *got = malloc(size), *want = calloc(1, size);
        float *row = malloc(n_in * sizeof *row);
        for (unsigned r = 0; r < N_OUT; r++) {
            packed_get_row(&c.w, r, row);
            quantise_row(DTYPE_BF16, row, n_in, (uint8_t *)(want + r * ld));
        }
        uint16_t *rows = device_of(NULL, size);
        PackedMatrix m = c.w;
        m.data = device_of(c.w.data, (N_OUT + 15) / 16 * c.w.panel_bytes);
        run(weft_cuda_unpack(&m, rows, ld, NULL));
        device_read(got, rows, size);
        assert_memory_equal(got, want, size);
        device_free_all();
        free(got);
        free(want);
        free(row);
        matmul_case_free(&c);
    }
    PackedMatrix f32 = {.type = DTYPE_F32, .n_out = 1, .n_in = 32};
    assert_int_not_equal(weft_cuda_unpack(&f32, NULL, 32, NULL), 0);
    f32.type = DTYPE_BF16;
    assert_int_not_equal(weft_cuda_unpack(&f32, NULL, 24, NULL), 0);
}

static void kv_case(Numbers *numbers, KvType type, uint32_t head_size)
{
    enum { HEADS = 2, ROWS = 5, PAGES = 5, TABLE = 2 };
    const uint32_t sequences[ROWS] = {0, 0, 1, 1, 0}, positions[ROWS] = {31, 32, 0, 5, 63};
    const uint32_t tables[2][TABLE] = {{4, 1}, {2, 3}};
    const size_t block = kv_block_bytes(type, head_size), page = HEADS * 2 * block;
    uint8_t *want = malloc(PAGES * page), *got = malloc(PAGES * page);
    const size_t ld = HEADS * head_size + 3;
    float *k = padded_rows(numbers, ROWS, HEADS * head_size, ld, -4, 4);
    float *v = padded_rows(numbers, ROWS, HEADS * head_size, ld, -4, 4);
    v[ld] = INFINITY; /* a row that is not finite */
    k[2 * ld] = 1e-41f;
    FOR_EACH_ORDER
    {
        memset(want, 0xff, PAGES * page);
        for (unsigned r = 0; r < ROWS; r++) {
            for (unsigned h = 0; h < HEADS; h++) {
                uint8_t *at = want + tables[sequences[r]][positions[r] / 32] * page + h * 2 * block;
                generic->kv_write[type](k + r * ld + h * head_size, v + r * ld + h * head_size,
                                        head_size, positions[r] % 32, at, at + block);
            }
        }
        const CudaKv kv = {.type = type,
                           .n_kv_heads = HEADS,
                           .head_size = head_size,
                           .base = device_of(NULL, PAGES * page),
                           .page_stride = page,
                           .head_stride = 2 * block,
                           .v_offset = block,
                           .tables = device_of(tables, sizeof tables),
                           .table_ld = TABLE};
        run(weft_cuda_kv_write(&kv, device_floats(k, ROWS * ld), device_floats(v, ROWS * ld), ld,
                               device_of(sequences, sizeof sequences),
                               device_of(positions, sizeof positions), ROWS, NULL));
        device_read(got, kv.base, PAGES * page);
        for (size_t i = 0; i < PAGES * page; i++) { /* a NaN scale may have any payload */
            if (got[i] != want[i] && !(type == KV_Q8 && i % block >= 32 * head_size)) {
                fail_msg("kv type %d: byte %zu: %d, specified %d", type, i, got[i], want[i]);
            }
        }
        for (size_t b = 0; type == KV_Q8 && b < PAGES * page; b += block) {
            float theirs[32], ours[32];
            memcpy(theirs, want + b + 32 * head_size, sizeof theirs);
            memcpy(ours, got + b + 32 * head_size, sizeof ours);
            assert_bits("scales", ours, theirs, 32);
        }
        device_free_all();
    }
    free(want);
    free(got);
    free(k);
    free(v);
}

static void test_kv_write(void **state)
{
    Numbers numbers = {5};
    for (unsigned type = 0; type < KV_TYPE_LIMIT; type++) {
        kv_case(&numbers, (KvType)type, 64);
        kv_case(&numbers, (KvType)type, 48);
        kv_case(&numbers, (KvType)type, 128);
    }
}

/* Words of none to several of each thread; a last block's that not all threads have. */
static void test_checksum(void **state)
{
    static const size_t counts[] = {0,    1,    2,    255,   256,    257,        1000,
                                    8191, 8192, 8193, 12289, 300007, 256 * 4096, 256 * 4096 + 5003};
    (void)state;
    for (unsigned c = 0; c < sizeof counts / sizeof counts[0]; c++) {
        const size_t n = counts[c];
        uint32_t *words = malloc(sizeof *words * (n + 1)), x = 1, got;
        for (size_t i = 0; i <= n; i++) {
            x = x * 1664525u + 1013904223u;
            words[i] = i % 1000 < 20 ? 0 : x;
        }
        FOR_EACH_ORDER
        {
            uint32_t *data = device_of(words, sizeof *words * (n + 1)),
                     *out = device_of(NULL, sizeof *out);
            void *workspace = device_of(NULL, WEFT_CUDA_CHECKSUM_BYTES);
            run(weft_cuda_checksum(data, n, out, workspace, NULL));
            device_read(&got, out, sizeof got);
            assert_int_equal(got, crc32c(0, words, sizeof *words * n));
            device_free_all();
        }
        free(words);
    }
}

int main(void)
{
    leave_without_device();
    generic = kernels_get(ISA_GENERIC);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_add),
        cmocka_unit_test(test_activations),
        cmocka_unit_test(test_norms),
        cmocka_unit_test(test_rope),
        cmocka_unit_test(test_embed),
        cmocka_unit_test(test_unpack),
        cmocka_unit_test(test_checksum),
        cmocka_unit_test(test_kv_write),
        cmocka_unit_test(test_norm_of_chosen_rows),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
