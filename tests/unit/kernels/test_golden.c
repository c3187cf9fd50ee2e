/* Digests of what `generic` gives for fixed inputs. They are part of the definition: a change here
 * changes tokens, and requires another numerics_version (NUMERICS, "Definition"). */
#include "kernels/generic/ops.h"
#include "proto/base/hash.h"
#include "tests/unit/kernels/numbers.h"

#include <stdlib.h>
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

static void expect(const char *want, const void *data, size_t n_bytes)
{
    char hex[33];
    const Hash128 h = hash128(data, n_bytes);
    hash128_hex(&h, hex);
    assert_string_equal(hex, want);
}

static void test_elements(void **state)
{
    static float x[1001], y[1001], out[3][1001];
    Numbers numbers = {1};
    numbers_fill(&numbers, x, 1001, -8.0, 8.0);
    numbers_fill(&numbers, y, 1001, -2.0, 2.0);
    rms_norm_generic(x, y, 1e-5f, 1001, out[0]);
    swiglu_generic(x, y, 1001, out[1]);
    for (unsigned i = 0; i < 1001; i++) {
        out[2][i] = exp32(x[i] * 12.0f);
    }
    expect("776898bb09a4a7ee5c9518aae7321534", out, sizeof out);
}

static void test_rope(void **state)
{
    static float c[64 * 32], s[64 * 32], x[5 * 64];
    RopeSpec spec = {.dims = 64, .freq_base = 10000.0, .factor = 1.0};
    Numbers numbers = {2};
    numbers_fill(&numbers, x, 5 * 64, -2.0, 2.0);
    rope_table(&spec, NULL, 8128, 64, c, s);
    rope_apply_generic(x, 5, 64, 64, ROPE_ADJACENT, c + 31 * 32, s + 31 * 32);
    expect("f24688bb5e1f8f1c1017fcf83e31abed", c, sizeof c);
    expect("d60103fd7c6e0ab8a18a1a4d54a18bd1", s, sizeof s);
    expect("35817cdfac4b64cc314b631651c9561f", x, sizeof x);
    spec.scaling = ROPE_SCALING_YARN;
    spec.factor = 8.0;
    spec.original_context = 4096;
    spec.yarn_ext_factor = spec.yarn_attn_factor = spec.yarn_beta_slow = 1.0;
    spec.yarn_beta_fast = 32.0;
    rope_table(&spec, NULL, 30000, 64, c, s);
    expect("44db2d1286ef14cae6f6ae0433b2d550", c, sizeof c);
}

static void test_attention(void **state)
{
    enum { KEYS = 200, SIZE = 48, HEADS = 2, ROWS = 7, BLOCKS = 7 };
    static uint16_t k_pages[BLOCKS][SIZE * 32], v_pages[BLOCKS][32 * SIZE];
    static float q[ROWS * HEADS * SIZE], out[3][ROWS * HEADS * SIZE], k[SIZE], v[SIZE];
    const uint8_t *k_blocks[BLOCKS], *v_blocks[BLOCKS];
    float *scratch = malloc(attention_scratch_floats(HEADS, SIZE) * sizeof *scratch);
    Numbers numbers = {3};
    numbers_fill(&numbers, q, ROWS * HEADS * SIZE, -2.0, 2.0);
    for (unsigned b = 0; b < BLOCKS; b++) {
        k_blocks[b] = (const uint8_t *)k_pages[b];
        v_blocks[b] = (const uint8_t *)v_pages[b];
    }
    for (unsigned j = 0; j < KEYS; j++) {
        numbers_fill(&numbers, k, SIZE, -2.0, 2.0);
        numbers_fill(&numbers, v, SIZE, -2.0, 2.0);
        kv_write_f16_generic(k, v, SIZE, j % 32, k_pages[j / 32], v_pages[j / 32]);
    }
    AttentionArgs args = {.q = q,
                          .q_ld = HEADS * SIZE,
                          .out = out[0],
                          .out_ld = HEADS * SIZE,
                          .n_rows = ROWS,
                          .first_position = KEYS - ROWS,
                          .n_q = HEADS,
                          .head_size = SIZE,
                          .scale = 0.25f,
                          .causal = true,
                          .n_keys = KEYS,
                          .k_blocks = k_blocks,
                          .v_blocks = v_blocks,
                          .scratch = scratch};
    attention_f16_generic(&args);
    args.window = 70;
    args.out = out[1];
    attention_f16_generic(&args);
    args.causal = false;
    args.window = 0;
    args.out = out[2];
    attention_f16_generic(&args);
    expect("8769d27c3b6ed484df788946cae60421", out, sizeof out);
    free(scratch);
}

static void test_sampling(void **state)
{
    static float noise[1000], logits[1000];
    float stats[2];
    const GumbelKey key = {
        .seed = 0x123456789abcdef0u, .choice = 2, .position = 1234, .purpose = 0};
    Numbers numbers = {4};
    gumbel_generic(&key, 2048, 1000, noise);
    expect("97b67d222c3501853b33f96d71ce0af6", noise, sizeof noise);
    numbers_fill(&numbers, logits, 1000, -20.0, 20.0);
    assert_true(chunk_stats_generic(logits, 1000, &stats[0], &stats[1]));
    expect("4c2b77f569fc02c91406231707f3ffaa", stats, sizeof stats);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_elements),
        cmocka_unit_test(test_rope),
        cmocka_unit_test(test_attention),
        cmocka_unit_test(test_sampling),
    };
    return cmocka_run_group_tests_name("golden", tests, NULL, NULL);
}
