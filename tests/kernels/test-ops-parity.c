/* Every vector variant of norm, act, rope, kv, sample and attention against `generic`, by memcmp,
 * on awkward shapes: tails, primes, unaligned pointers, in place, huge and tiny numbers, NaN in
 * whatever is not visible. */
#include "kernels/ops/math.h"
#include "tests/kernels/avx512/variants.h"
#include "tests/unit/kernels/numbers.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

enum { MOST = 2200, GUARD = 40 };

static const Kernels *generic, *variant;

static uint32_t number_bits(Numbers *numbers)
{
    return (uint32_t)numbers_u64(numbers);
}

/* A third each: ordinary, any magnitude, a few special values; never NaN. */
static void fill_wild(Numbers *numbers, float *out, size_t n)
{
    static const float special[] = {0.0f,   -0.0f, 1e-45f, -1e-40f, 3e38f,
                                    -3e38f, 88.7f, -87.4f, 1.0f};
    for (size_t i = 0; i < n; i++) {
        const uint32_t kind = number_bits(numbers) % 8;
        float x = (float)numbers_uniform(numbers, -4.0, 4.0);
        if (kind == 0) {
            x = special[number_bits(numbers) % (sizeof special / sizeof special[0])];
        } else if (kind < 3) {
            x *= (float)ldexp(1.0, (int)(number_bits(numbers) % 200) - 100);
        }
        out[i] = x;
    }
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

static const uint32_t sizes[] = {1,  2,  3,  7,  8,   9,   15,  16,  17,   31,   32,  33,
                                 47, 63, 64, 65, 100, 127, 576, 960, 1023, 1024, 1537};
#define N_SIZES (sizeof sizes / sizeof sizes[0])

static void test_norm(void **state)
{
    static float x[MOST], w[MOST], got[MOST], want[MOST];
    Numbers numbers = {1};
    for (unsigned s = 0; s < N_SIZES; s++) {
        for (unsigned shift = 0; shift < 3; shift++) {
            const uint32_t n = sizes[s];
            numbers_fill(&numbers, x, MOST, -1e-3 * (s + 1), 1e3);
            numbers_fill(&numbers, w, MOST, -2.0, 2.0);
            x[shift] = shift == 1 ? 1e-44f : shift == 2 ? 1e25f : x[0];
            memset(got, 0xee, sizeof got);
            memset(want, 0xee, sizeof want);
            generic->rms_norm(x + shift, w + shift, 1e-5f, n, want + shift);
            variant->rms_norm(x + shift, w + shift, 1e-5f, n, got + shift);
            assert_memory_equal(got, want, sizeof got); /* nothing beyond n either */
            variant->rms_norm(x + shift, w + shift, 1e-5f, n, x + shift);
            assert_memory_equal(x + shift, want + shift, n * sizeof(float));
        }
    }
    x[3] = NAN;
    generic->rms_norm(x, w, 1e-5f, 100, want);
    variant->rms_norm(x, w, 1e-5f, 100, got);
    assert_same(got, want, 100);
}

static void test_swiglu_and_add(void **state)
{
    static float g[MOST], u[MOST], got[MOST], want[MOST];
    Numbers numbers = {2};
    for (unsigned s = 0; s < N_SIZES; s++) {
        const uint32_t n = sizes[s], shift = s % 3;
        fill_wild(&numbers, g, MOST);
        fill_wild(&numbers, u, MOST);
        if (s > 5) {
            g[4] = NAN;
            g[5] = -INFINITY;
            g[6] = INFINITY;
        }
        memset(got, 0xee, sizeof got);
        memset(want, 0xee, sizeof want);
        generic->swiglu(g + shift, u + shift, n, want + shift);
        variant->swiglu(g + shift, u + shift, n, got + shift);
        assert_same(got, want, MOST);
        generic->add(want + shift, u + shift, n);
        variant->add(got + shift, u + shift, n);
        assert_same(got, want, MOST);
        memcpy(want, g, sizeof want);
        memcpy(got, g, sizeof got);
        generic->swiglu(want + shift, u + shift, n, want + shift);
        variant->swiglu(got + shift, u + shift, n, got + shift);
        assert_same(got, want, MOST);
    }
}

/* swiglu of (x, 1 + e^-x ...) shows exp at every exponent: 40 million bit patterns are too many,
 * every 509th is not. */
static void test_exp_over_all_floats(void **state)
{
    enum { AT_ONCE = 1024 };
    static float g[AT_ONCE], u[AT_ONCE], got[AT_ONCE], want[AT_ONCE];
    uint64_t bits = 0;
    for (unsigned i = 0; i < AT_ONCE; i++) {
        u[i] = 1.0f;
    }
    while (bits < 0x100000000u) {
        for (unsigned i = 0; i < AT_ONCE; i++, bits += 509) {
            g[i] = numbers_float_of((uint32_t)bits);
        }
        generic->swiglu(g, u, AT_ONCE, want);
        variant->swiglu(g, u, AT_ONCE, got);
        assert_same(got, want, AT_ONCE);
    }
}

static void test_rope(void **state)
{
    static const uint32_t dims[] = {2, 4, 6, 14, 16, 18, 30, 32, 48, 64, 80, 96, 128, 256};
    static float want[3 * 260 + GUARD], got[3 * 260 + GUARD], c[128], s[128];
    Numbers numbers = {3};
    for (unsigned i = 0; i < sizeof dims / sizeof dims[0]; i++) {
        for (unsigned variety = 0; variety < 4; variety++) {
            const uint32_t head_size = dims[i] + (variety & 1u) * 4;
            const RopePairing pairing = (variety & 2u) != 0 ? ROPE_HALVES : ROPE_ADJACENT;
            fill_wild(&numbers, want, sizeof want / sizeof want[0]);
            memcpy(got, want, sizeof got);
            numbers_fill(&numbers, c, 128, -1.0, 1.0);
            numbers_fill(&numbers, s, 128, -1.0, 1.0);
            generic->rope_apply(want + variety, 3, head_size, dims[i], pairing, c, s);
            variant->rope_apply(got + variety, 3, head_size, dims[i], pairing, c, s);
            assert_same(got, want, sizeof want / sizeof want[0]);
        }
    }
}

static void test_kv_write(void **state)
{
    static const uint32_t head_sizes[] = {1, 5, 8, 16, 20, 32, 64, 80, 96, 128, 256};
    static uint8_t want[2][32 * 256 * 4], got[2][32 * 256 * 4];
    static float k[260], v[260];
    Numbers numbers = {4};
    for (KvType type = KV_F16; type < KV_TYPE_LIMIT; type++) {
        for (unsigned i = 0; i < sizeof head_sizes / sizeof head_sizes[0]; i++) {
            memset(want, 0xee, sizeof want);
            memset(got, 0xee, sizeof got);
            for (uint32_t slot = 0; slot < 32; slot += 1 + i % 3) {
                for (unsigned d = 0; d < 260;
                     d++) { /* any pattern: subnormals, halfway cases, infinities, NaN */
                    k[d] = d % 2 ? (float)numbers_uniform(&numbers, -9.0, 9.0)
                                 : numbers_float_of(number_bits(&numbers));
                    v[d] =
                        d % 3
                            ? numbers_float_of(0x38000000u + (number_bits(&numbers) & 0x87fff000u))
                            : (float)numbers_uniform(&numbers, -7e-5, 7e-5);
                }
                generic->kv_write[type](k + 1, v + 3, head_sizes[i], slot, want[0], want[1]);
                variant->kv_write[type](k + 1, v + 3, head_sizes[i], slot, got[0], got[1]);
            }
            assert_memory_equal(got, want, sizeof want);
        }
    }
}

static void test_sampling_ops(void **state)
{
    static float x[1024 + 3], got[MOST], want[MOST];
    Numbers numbers = {5};
    for (unsigned s = 0; s < N_SIZES; s++) {
        const uint32_t n = sizes[s] < 1024 ? sizes[s] : 1024;
        for (unsigned variety = 0; variety < 8; variety++) {
            float m[2], l[2];
            numbers_fill(&numbers, x, 1027, variety < 2 ? -100.0 : -5.0, variety == 3 ? -1.0 : 5.0);
            if (variety == 4) {
                x[n / 2] = NAN;
            } else if (variety == 5) {
                x[n - 1] = INFINITY;
            } else if (variety == 6) {
                x[0] = -INFINITY;
            } else if (variety == 7) { /* a maximum that is -0 and +0 */
                for (uint32_t i = 0; i < n; i++) {
                    x[i] = i % 3 == 0 ? -0.0f : i % 3 == 1 ? 0.0f : -1.0f;
                }
            }
            x[n] = variety < 4 ? NAN : 1e30f; /* not part of the chunk */
            const bool finite = generic->chunk_stats(x, n, &m[0], &l[0]);
            assert_int_equal(variant->chunk_stats(x, n, &m[1], &l[1]), finite);
            assert_int_equal(finite, variety < 4 || variety == 7);
            if (finite) {
                assert_memory_equal(&m[0], &m[1], sizeof m[0]);
                assert_memory_equal(&l[0], &l[1], sizeof l[0]);
            }
        }
        const GumbelKey key = {numbers_u64(&numbers), number_bits(&numbers), number_bits(&numbers),
                               1};
        memset(got, 0xee, sizeof got);
        memset(want, 0xee, sizeof want);
        generic->gumbel(&key, s * 1024, sizes[s], want + s % 2);
        variant->gumbel(&key, s * 1024, sizes[s], got + s % 2);
        assert_memory_equal(got, want, sizeof got);
    }
}

/* ---- attention ---- */

enum { MOST_KEYS = 1056, MOST_BLOCKS = 160, MOST_SIZE = 256, MOST_QUERIES = 40 * 9 * 256 + 8 };

typedef struct Bench {
    uint8_t *k,
        *v; /* pages, one after another, each one byte off any alignment but its element's */
    const uint8_t *k_blocks[MOST_BLOCKS], *v_blocks[MOST_BLOCKS];
    float *q, *got, *want, *scratch;
} Bench;

static int bench_setup(void **state)
{
    Bench *b = calloc(1, sizeof *b);
    b->k = malloc((size_t)MOST_KEYS * MOST_SIZE * 4 + 64);
    b->v = malloc((size_t)MOST_KEYS * MOST_SIZE * 4 + 64);
    b->q = malloc(MOST_QUERIES * sizeof(float));
    b->got = malloc(MOST_QUERIES * sizeof(float));
    b->want = malloc(MOST_QUERIES * sizeof(float));
    b->scratch = malloc((attention_scratch_floats(9, MOST_SIZE) + 1) * sizeof(float));
    *state = b;
    return 0;
}

static int bench_teardown(void **state)
{
    Bench *b = *state;
    free(b->k);
    free(b->v);
    free(b->q);
    free(b->got);
    free(b->want);
    free(b->scratch);
    free(b);
    return 0;
}

/* Writes n_keys positions; the rest of the pages is NaN. */
static void bench_fill(Bench *b, KvType type, uint32_t head_size, uint32_t n_keys, Numbers *numbers)
{
    const size_t bytes = kv_block_bytes(type, head_size);
    const uint32_t n_blocks = (n_keys + 31) / 32;
    float k[MOST_SIZE], v[MOST_SIZE];
    memset(b->k, 0xff, n_blocks * bytes + 8);
    memset(b->v, 0xff, n_blocks * bytes + 8);
    for (uint32_t i = 0; i < n_blocks; i++) {
        b->k_blocks[i] = b->k + 4 + i * bytes;
        b->v_blocks[i] = b->v + 4 + i * bytes;
    }
    for (uint32_t j = 0; j < n_keys; j++) {
        const double spread = j % 97 == 5 ? 30.0 : 2.0; /* now and then a key that dominates */
        numbers_fill(numbers, k, head_size, -spread, spread);
        numbers_fill(numbers, v, head_size, -2.0, 2.0);
        generic->kv_write[type](k, v, head_size, j % 32, (void *)b->k_blocks[j / 32],
                                (void *)b->v_blocks[j / 32]);
    }
}

/* The last n_rows of n_keys positions, causal, no window; results go to b->want. */
static AttentionArgs bench_args(Bench *b, uint32_t head_size, uint32_t n_q, uint32_t n_rows,
                                uint32_t n_keys)
{
    const size_t ld = (size_t)n_q * head_size;
    return (AttentionArgs){.q = b->q,
                           .q_ld = ld,
                           .out = b->want,
                           .out_ld = ld,
                           .n_rows = n_rows,
                           .first_position = n_keys - n_rows,
                           .n_q = n_q,
                           .head_size = head_size,
                           .scale = 0.125f,
                           .causal = true,
                           .n_keys = n_keys,
                           .k_blocks = b->k_blocks,
                           .v_blocks = b->v_blocks,
                           .scratch = b->scratch};
}

static void compare(Bench *b, KvType type, uint32_t head_size, uint32_t n_q, uint32_t n_rows,
                    uint32_t n_keys, bool causal, uint32_t window, Numbers *numbers)
{
    const size_t ld = (size_t)n_q * head_size;
    numbers_fill(numbers, b->q, n_rows * ld + 4, -2.0, 2.0);
    memset(b->got, 0xee, (n_rows * ld + 8) * sizeof(float));
    memset(b->want, 0xee, (n_rows * ld + 8) * sizeof(float));
    memset(b->scratch, 0xff, (attention_scratch_floats(n_q, head_size) + 1) * sizeof(float));
    AttentionArgs args = bench_args(b, head_size, n_q, n_rows, n_keys);
    args.q = b->q + 1;
    args.out = b->want + 3;
    args.scratch = b->scratch + 1;
    args.scale = 1.0f / sqrtf((float)head_size);
    args.window = window;
    args.causal = causal;
    generic->attention[type](&args);
    args.out = b->got + 3;
    memset(b->scratch, 0xff, (attention_scratch_floats(n_q, head_size) + 1) * sizeof(float));
    variant->attention[type](&args);
    if (memcmp(b->got, b->want, (n_rows * ld + 8) * sizeof(float)) != 0) {
        print_error("type %d, head size %u, %u heads, %u rows, %u keys, causal %d, window %u\n",
                    type, head_size, n_q, n_rows, n_keys, causal, window);
        assert_same(b->got, b->want, n_rows * ld + 8);
        fail();
    }
}

static const uint32_t head_sizes[] = {16, 32, 64, 80, 96, 128, 256, 20, 4, 72};
static const uint32_t group_sizes[] = {1, 2, 3, 4, 7, 8, 9};
static const uint32_t key_counts[] = {1, 31, 32, 33, 63, 64, 65, 1000};

/* One row over many keys. */
static void test_attention_decode(void **state)
{
    Bench *b = *state;
    Numbers numbers = {6};
    for (KvType type = KV_F16; type < KV_TYPE_LIMIT; type++) {
        for (unsigned h = 0; h < sizeof head_sizes / sizeof head_sizes[0]; h++) {
            for (unsigned k = 0; k < sizeof key_counts / sizeof key_counts[0]; k++) {
                const uint32_t n_q = group_sizes[(h + k + type) % 7];
                if (key_counts[k] == 1000 && h % KV_TYPE_LIMIT != (unsigned)type) {
                    continue; /* generic takes its time */
                }
                bench_fill(b, type, head_sizes[h], key_counts[k], &numbers);
                compare(b, type, head_sizes[h], n_q, 1, key_counts[k], true, 0, &numbers);
                compare(b, type, head_sizes[h], n_q, 1, key_counts[k], true, 1 + key_counts[k] / 3,
                        &numbers);
            }
        }
    }
}

/* Chunks of 1..40 rows, causal or not, with and without a window. */
static void test_attention_prefill(void **state)
{
    Bench *b = *state;
    Numbers numbers = {7};
    for (uint32_t rows = 1; rows <= 40; rows++) {
        const KvType type = (KvType)(rows % KV_TYPE_LIMIT);
        const uint32_t head_size = head_sizes[rows % 8], n_q = group_sizes[rows % 7];
        for (unsigned k = 0; k < 7; k += 1 + rows % 2) {
            const uint32_t n_keys = key_counts[k] + rows - 1;
            bench_fill(b, type, head_size, n_keys, &numbers);
            compare(b, type, head_size, n_q, rows, n_keys, true, 0, &numbers);
            compare(b, type, head_size, n_q, rows, n_keys, true, 1 + rows % 5 * 13, &numbers);
            compare(b, type, head_size, n_q, rows, n_keys, false, 0, &numbers);
        }
    }
    bench_fill(b, KV_F16, 64, 300, &numbers);
    compare(b, KV_F16, 64, 3, 40, 300, true, 100, &numbers);
    compare(b, KV_F16, 64, 9, 40, 300, true, 40, &numbers);
    compare(b, KV_F16, 16, 60, 3, 140, true, 0,
            &numbers); /* more heads than a tile holds; the same pages read as 16 wide */
}

/* Runs of keys computed apart and combined give the bits of the whole, and so does every mixture of
 * variants. */
static void test_attention_runs(void **state)
{
    Bench *b = *state;
    Numbers numbers = {9};
    static const uint32_t counts[] = {1, 511, 512, 513, 1000, 1024, 1056, 3600, 5000};
    static const uint32_t windows[] = {0, 3, 300, 530};
    static float partials[10][3 * 4 * 258], one[10 * 258];
    for (unsigned c = 0; c < sizeof counts / sizeof counts[0]; c++) {
        for (unsigned w = 0; w < 4; w++) {
            const uint32_t head_size = counts[c] > MOST_KEYS ? 20 : head_sizes[(c + w) % 10],
                           n_keys = counts[c], rows = MIN(3u, n_keys), n_q = 4;
            const uint32_t n_runs = attention_runs(n_keys);
            const size_t ld = (size_t)n_q * head_size, stride = attention_partial_floats(head_size);
            bench_fill(b, KV_BF16, head_size, n_keys, &numbers);
            numbers_fill(&numbers, b->q, rows * ld, -2.0, 2.0);
            AttentionArgs args = bench_args(b, head_size, n_q, rows, n_keys);
            args.window = windows[w];
            args.causal = c % 2 == 0;
            generic->attention[KV_BF16](&args);
            args.out = NULL;
            for (args.run = 0; args.run < n_runs; args.run++) {
                args.partial = partials[args.run];
                (args.run == 1 ? generic : variant)->attention[KV_BF16](&args);
            }
            for (uint32_t i = 0; i < rows * n_q; i++) {
                for (uint32_t r = 0; r < n_runs; r++) {
                    memcpy(one + r * stride, partials[r] + i * stride, stride * sizeof(float));
                }
                (i % 2 ? generic : variant)
                    ->attention_combine(one, stride, n_runs, head_size, b->got + i * head_size);
            }
            assert_memory_equal(b->got, b->want, rows * ld * sizeof(float));
        }
    }
}

/* Chunk size and neighbours change nothing: a row alone gives the bits that it has in a chunk. */
static void test_attention_rows_are_independent(void **state)
{
    Bench *b = *state;
    Numbers numbers = {8};
    const uint32_t head_size = 64, n_q = 3, rows = 37, n_keys = 133, ld = n_q * head_size;
    bench_fill(b, KV_F16, head_size, n_keys, &numbers);
    numbers_fill(&numbers, b->q, rows * ld, -2.0, 2.0);
    AttentionArgs args = bench_args(b, head_size, n_q, rows, n_keys);
    variant->attention[KV_F16](&args);
    for (uint32_t r = 0; r < rows; r++) {
        for (uint32_t h = 0; h < n_q; h++) {
            AttentionArgs one = args;
            one.q = b->q + r * ld + h * head_size;
            one.out = b->got;
            one.n_rows = one.n_q = 1;
            one.first_position += r;
            variant->attention[KV_F16](&one);
            assert_memory_equal(b->got, b->want + r * ld + h * head_size,
                                head_size * sizeof(float));
        }
    }
}

static int test_variant(const Variant *v, const Kernels *table)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_norm),
        cmocka_unit_test(test_swiglu_and_add),
        cmocka_unit_test(test_exp_over_all_floats),
        cmocka_unit_test(test_rope),
        cmocka_unit_test(test_kv_write),
        cmocka_unit_test(test_sampling_ops),
        cmocka_unit_test_setup_teardown(test_attention_decode, bench_setup, bench_teardown),
        cmocka_unit_test_setup_teardown(test_attention_prefill, bench_setup, bench_teardown),
        cmocka_unit_test_setup_teardown(test_attention_runs, bench_setup, bench_teardown),
        cmocka_unit_test_setup_teardown(test_attention_rows_are_independent, bench_setup,
                                        bench_teardown),
    };
    variant = table;
    return cmocka_run_group_tests_name(v->name, tests, NULL, NULL);
}

int main(int argc, char **argv)
{
    generic = kernels_get(ISA_GENERIC);
    return variants_run(argc, argv, false, test_variant);
}
