/* Attention of `generic`: against softmax in double, and the shape of its tree by numbers that tell
 * trees apart. */
#include "kernels/generic/ops.h"
#include "proto/model/blocks.h"
#include "kernels/ops/math.h"
#include "tests/unit/kernels/numbers.h"

#include <math.h>
#include <stdlib.h>
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

enum { KEYS = 300, SIZE = 20, BLOCKS = (KEYS + 31) / 32, HEADS = 3, ROWS = 40 };

typedef struct Cache {
    float k[KEYS][SIZE], v[KEYS][SIZE]; /* as written */
    uint8_t k_pages[BLOCKS][32 * SIZE * 4], v_pages[BLOCKS][32 * SIZE * 4];
    const uint8_t *k_blocks[BLOCKS], *v_blocks[BLOCKS];
} Cache;

static const KvWriteFn writers[] = {kv_write_f16_generic, kv_write_bf16_generic,
                                    kv_write_f32_generic, kv_write_q8_generic};
static const AttentionFn readers[] = {attention_f16_generic, attention_bf16_generic,
                                      attention_f32_generic, attention_q8_generic};

/* Element d of a row as the cache gives it back, in double. */
static double rounded(const float *row, unsigned d, KvType type)
{
    if (type == KV_Q8) {
        double most = 0.0;
        for (unsigned i = 0; i < SIZE; i++) {
            most = fmax(most, fabs((double)row[i]));
        }
        const float scale = (float)most / 127.0f;
        return nearbyint((double)(row[d] / scale)) * (double)scale;
    }
    return type == KV_F16    ? f16_to_f32(f32_to_f16(row[d]))
           : type == KV_BF16 ? bf16_to_f32(f32_to_bf16(row[d]))
                             : row[d];
}

/* n_keys positions written; everything else in the pages is NaN. */
static void cache_fill(Cache *cache, KvType type, uint32_t n_keys, uint64_t seed)
{
    Numbers numbers = {seed};
    memset(cache->k_pages, 0xff, sizeof cache->k_pages);
    memset(cache->v_pages, 0xff, sizeof cache->v_pages);
    for (uint32_t b = 0; b < BLOCKS; b++) {
        cache->k_blocks[b] = cache->k_pages[b];
        cache->v_blocks[b] = cache->v_pages[b];
    }
    for (uint32_t j = 0; j < n_keys; j++) {
        numbers_fill(&numbers, cache->k[j], SIZE, -2.0, 2.0);
        numbers_fill(&numbers, cache->v[j], SIZE, -2.0, 2.0);
        writers[type](cache->k[j], cache->v[j], SIZE, j % 32, cache->k_pages[j / 32],
                      cache->v_pages[j / 32]);
    }
}

static void check_row(const AttentionArgs *args, const Cache *cache, KvType type, uint32_t row,
                      uint32_t head)
{
    const uint32_t position = args->first_position + row;
    const uint32_t last = args->causal ? position : args->n_keys - 1;
    const uint32_t first =
        args->window != 0 && position + 1 > args->window ? position + 1 - args->window : 0;
    double sum = 0.0, o[SIZE] = {0}, scores[KEYS], m = -INFINITY;
    for (uint32_t j = first; j <= last; j++) {
        double dot = 0.0;
        for (unsigned d = 0; d < SIZE; d++) {
            dot +=
                (double)args->q[row * args->q_ld + head * SIZE + d] * rounded(cache->k[j], d, type);
        }
        scores[j] = dot * args->scale;
        m = fmax(m, scores[j]);
    }
    for (uint32_t j = first; j <= last; j++) {
        const double p = exp(scores[j] - m);
        sum += p;
        for (unsigned d = 0; d < SIZE; d++) {
            o[d] += p * rounded(cache->v[j], d, type);
        }
    }
    for (unsigned d = 0; d < SIZE; d++) {
        assert_true(fabs(args->out[row * args->out_ld + head * SIZE + d] - o[d] / sum) < 5e-6);
    }
}

static void test_against_double(void **state)
{
    static Cache cache;
    float *scratch = malloc(attention_scratch_floats(HEADS, SIZE) * sizeof *scratch);
    static float q[ROWS * HEADS * SIZE + 7], out[ROWS * HEADS * SIZE + 7];
    static const uint32_t starts[] = {0, 1, 30, 31, 32, 63, 64, 100, 255, 260};
    Numbers numbers = {9};
    numbers_fill(&numbers, q, ROWS * HEADS * SIZE, -2.0, 2.0);
    for (KvType type = KV_F16; type < KV_TYPE_LIMIT; type++) {
        for (unsigned i = 0; i < sizeof starts / sizeof starts[0]; i++) {
            for (unsigned variant = 0; variant < 4; variant++) {
                const uint32_t rows = 1 + (i * 13 + variant * 7) % ROWS;
                AttentionArgs args = {.q = q,
                                      .q_ld = HEADS * SIZE,
                                      .out = out,
                                      .out_ld = HEADS * SIZE,
                                      .n_rows = rows,
                                      .first_position = starts[i],
                                      .n_q = HEADS,
                                      .head_size = SIZE,
                                      .scale = 0.3f,
                                      .causal = variant != 3,
                                      .window = variant == 1   ? 40
                                                : variant == 2 ? 5
                                                               : 0,
                                      .n_keys = starts[i] + rows,
                                      .k_blocks = cache.k_blocks,
                                      .v_blocks = cache.v_blocks,
                                      .scratch = scratch};
                cache_fill(&cache, type, args.n_keys, i + 1);
                readers[type](&args);
                for (uint32_t r = 0; r < rows; r++) {
                    for (uint32_t h = 0; h < HEADS; h++) {
                        check_row(&args, &cache, type, r, h);
                    }
                }
            }
        }
    }
    free(scratch);
}

/* Blocks meet as ((0 1)(2 3)) 4, and with a window that hides block 0 as (1 (2 3)) 4: recomputed
 * here from single blocks. */
static void merge(const float left[3], float right[3])
{
    const float m = fmaxf(left[0], right[0]), a = exp32(left[0] - m), b = exp32(right[0] - m);
    right[0] = m;
    right[1] = fmaf(left[1], a, right[1] * b);
    right[2] = fmaf(left[2], a, right[2] * b);
}

static void test_growing_tree(void **state)
{
    enum { N = 5 * 32 };
    float k[5][32], v[5][32], q[5] = {0, 0, 0, 0, 1.0f}, out[5];
    const uint8_t *k_blocks[5], *v_blocks[5];
    float *scratch = malloc(attention_scratch_floats(1, 1) * sizeof *scratch);
    Numbers numbers = {10};
    for (unsigned window = 0; window <= 128; window += 128) {
        unsigned differs = 0;
        for (unsigned round = 0; round < 50; round++) {
            numbers_fill(&numbers, k[0], N, -3.0, 3.0);
            numbers_fill(&numbers, v[0], N, -3.0, 3.0);
            float part[5][3], chain[3];
            for (unsigned b = 0; b < 5; b++) {
                k_blocks[b] = (const uint8_t *)k[b];
                v_blocks[b] = (const uint8_t *)v[b];
                float p[32], m = k[b][0], o = 0.0f;
                for (unsigned j = 0; j < 32; j++) {
                    m = fmaxf(m, k[b][j]);
                }
                for (unsigned j = 0; j < 32; j++) {
                    p[j] = exp32(k[b][j] - m);
                    o = fmaf(p[j], v[b][j], o);
                }
                part[b][0] = m;
                part[b][1] = lanes_fold(p);
                part[b][2] = o;
            }
            memcpy(chain, part[window != 0], sizeof chain);
            for (unsigned b = window != 0 ? 2 : 1; b < 5; b++) {
                float next[3] = {part[b][0], part[b][1], part[b][2]};
                merge(chain, next);
                memcpy(chain, next, sizeof chain);
            }
            if (window == 0) {
                merge(part[0], part[1]);
            }
            merge(part[2], part[3]);
            merge(part[1], part[3]);
            merge(part[3], part[4]);
            const AttentionArgs args = {.q = &q[4],
                                        .q_ld = 1,
                                        .out = out,
                                        .out_ld = 1,
                                        .n_rows = 1,
                                        .first_position = N - 1,
                                        .n_q = 1,
                                        .head_size = 1,
                                        .scale = 1.0f,
                                        .causal = true,
                                        .window = window,
                                        .n_keys = N,
                                        .k_blocks = k_blocks,
                                        .v_blocks = v_blocks,
                                        .scratch = scratch};
            attention_f32_generic(&args);
            assert_true(out[0] == part[4][2] / part[4][1]);
            differs += out[0] != chain[2] / chain[1];
        }
        assert_true(differs > 10); /* else this test could not tell the tree from a chain */
    }
    free(scratch);
}

static void test_no_visible_key_gives_zero(void **state)
{
    static Cache cache;
    float *scratch = malloc(attention_scratch_floats(1, SIZE) * sizeof *scratch);
    float q[SIZE] = {1.0f}, out[SIZE];
    cache_fill(&cache, KV_F32, 35, 1);
    memset(out, 0xff, sizeof out);
    const AttentionArgs args = {.q = q,
                                .q_ld = SIZE,
                                .out = out,
                                .out_ld = SIZE,
                                .n_rows = 1,
                                .first_position = 200,
                                .n_q = 1,
                                .head_size = SIZE,
                                .scale = 1.0f,
                                .window = 10,
                                .n_keys = 35,
                                .k_blocks = cache.k_blocks,
                                .v_blocks = cache.v_blocks,
                                .scratch = scratch};
    attention_f32_generic(&args);
    for (unsigned d = 0; d < SIZE; d++) {
        assert_int_equal(float_bits(out[d]), 0);
    }
    free(scratch);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_against_double),
        cmocka_unit_test(test_growing_tree),
        cmocka_unit_test(test_no_visible_key_gives_zero),
    };
    return cmocka_run_group_tests_name("attention", tests, NULL, NULL);
}
