/* Units (the table of NUMERICS 3), cuts, slices, dtype arithmetic, and what model_spec_finish()
 * refuses. */
#include "proto/model/model_spec.h"

#include "proto/base/error.h"
#include "tests/golden/gguf_builder.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

static ModelSpec *spec_of(uint32_t width, uint32_t heads, uint32_t kv_heads, uint32_t ffn,
                          Dtype type)
{
    GgufBuilderConfig c;
    gguf_builder_defaults(&c);
    c.width = width;
    c.n_heads = heads;
    c.n_kv_heads = kv_heads;
    c.ffn_width = ffn;
    gguf_builder_set_type(&c, type);
    g_autoptr(GError) error = NULL;
    ModelSpec *spec = gguf_builder_spec(&c, &error);
    if (spec == NULL) {
        fail_msg("%s", error->message);
    }
    return spec;
}

static void test_unit_table(void **state)
{
    static const struct {
        uint32_t width, heads, kv_heads, ffn;
        Dtype type;
        uint32_t attn, ffn_units;
    } rows[] = {
        {576, 9, 3, 1536, DTYPE_Q4_1, 9, 12},   /* SmolLM2-135M */
        {2048, 32, 8, 5632, DTYPE_Q8_0, 8, 22}, /* 1.2 B */
        {2048, 32, 8, 5632, DTYPE_F16, 8, 22},
        {4096, 32, 8, 14336, DTYPE_Q4_K, 16, 56}, /* Llama-3-8B */
        {4096, 32, 8, 14336, DTYPE_Q8_0, 16, 56},
        {4096, 32, 8, 14336, DTYPE_F16, 16, 56},
        {768, 12, 12, 3072, DTYPE_F32, 12, 12}, /* GPT-2 124M */
    };
    for (size_t i = 0; i < G_N_ELEMENTS(rows); i++) {
        g_autoptr(ModelSpec) spec =
            spec_of(rows[i].width, rows[i].heads, rows[i].kv_heads, rows[i].ffn, rows[i].type);
        assert_int_equal(spec->n_attn_units, rows[i].attn);
        assert_int_equal(spec->n_ffn_units, rows[i].ffn_units);
    }
}

/* Properties that NUMERICS 3 states, over many shapes: units cover everything once, are whole
 * blocks, at most 64. */
static void test_unit_properties(void **state)
{
    static const Dtype types[] = {DTYPE_F32, DTYPE_Q4_0, DTYPE_Q6_K};
    static const uint32_t sizes[] = {32, 64, 80, 96, 128, 256};
    for (uint32_t t = 0; t < G_N_ELEMENTS(types); t++) {
        uint32_t block = dtype_info(types[t])->block;
        for (uint32_t s = 0; s < G_N_ELEMENTS(sizes); s++) {
            for (uint32_t heads = 1; heads <= 40; heads++) {
                uint32_t width = heads * sizes[s], ffn = width * 3;
                if (width % block != 0 || heads * sizes[s] > 8192) {
                    continue;
                }
                g_autoptr(ModelSpec) spec = spec_of(width, heads, 1, ffn, types[t]);
                assert_in_range(spec->n_attn_units, 1, 64);
                assert_in_range(spec->n_ffn_units, 1, 64);
                uint32_t next = 0;
                for (uint32_t u = 0; u < spec->n_attn_units; u++) {
                    uint32_t first, count;
                    model_spec_attn_unit_heads(spec, u, &first, &count);
                    assert_int_equal(first, next);
                    assert_true(count >= 1);
                    assert_int_equal(first * spec->head_size % block, 0);
                    next += count;
                }
                assert_int_equal(next, heads);
                next = 0;
                for (uint32_t u = 0; u < spec->n_ffn_units; u++) {
                    uint32_t first, count;
                    model_spec_ffn_unit(spec, u, &first, &count);
                    assert_int_equal(first, next);
                    assert_true(count >= 1 && count % block == 0);
                    next += count;
                }
                assert_int_equal(next, ffn);
            }
        }
    }
}

/* Every element of every tensor lies in exactly one slice. */
static void test_slices_cover_once(void **state)
{
    GgufBuilderConfig c;
    gguf_builder_defaults(&c);
    c.width = 96;
    c.n_heads = 6;
    c.n_kv_heads = 3;
    c.head_size = 32;
    c.ffn_width = 288;
    c.vocab_size = 2500; /* the last chunk is short */
    c.tied = false;
    c.qkv_bias = true;
    c.rope_factors = true;
    g_autoptr(ModelSpec) spec = gguf_builder_spec(&c, NULL);
    assert_non_null(spec);
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        const TensorSpec *t = &spec->tensors[i];
        g_autofree uint8_t *seen = g_new0(uint8_t, (size_t)t->rows * t->columns);
        size_t n_bytes = 0;
        for (uint32_t s = 0; s < t->n_slices; s++) {
            SliceRect rect = model_spec_slice(spec, t, s);
            n_bytes += model_spec_slice_bytes(spec, t, s);
            assert_true(rect.n_rows >= 1 && rect.n_cols >= 1);
            for (uint32_t row = rect.row0; row < rect.row0 + rect.n_rows; row++) {
                for (uint32_t col = rect.col0; col < rect.col0 + rect.n_cols; col++) {
                    seen[(size_t)row * t->columns + col]++;
                }
            }
        }
        assert_int_equal(n_bytes, t->size_bytes);
        for (size_t k = 0; k < (size_t)t->rows * t->columns; k++) {
            assert_int_equal(seen[k], 1);
        }
    }
}

static void test_canonical_order(void **state)
{
    GgufBuilderConfig c;
    gguf_builder_defaults(&c);
    c.tied = false;
    g_autoptr(ModelSpec) spec = gguf_builder_spec(&c, NULL);
    assert_int_equal(spec->tensors[0].role, ROLE_TOKEN_EMBD);
    assert_int_equal(spec->tensors[spec->n_tensors - 2].role, ROLE_OUTPUT_NORM);
    assert_int_equal(spec->tensors[spec->n_tensors - 1].role, ROLE_OUTPUT);
    for (uint32_t i = 2; i + 2 < spec->n_tensors; i++) {
        const TensorSpec *a = &spec->tensors[i - 1], *b = &spec->tensors[i];
        assert_true(a->layer < b->layer || (a->layer == b->layer && a->role < b->role));
    }
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        assert_ptr_equal(model_spec_tensor(spec, spec->tensors[i].role, spec->tensors[i].layer),
                         &spec->tensors[i]);
    }
    assert_null(model_spec_tensor(spec, ROLE_ATTN_Q, 2));
    assert_null(model_spec_tensor(spec, ROLE_ATTN_Q, -1));
}

static void test_kv_heads(void **state)
{
    g_autoptr(ModelSpec) spec = spec_of(576, 9, 3, 1536, DTYPE_Q4_1);
    for (uint32_t first = 0; first < 9; first++) {
        for (uint32_t count = 1; first + count <= 9; count++) {
            uint32_t kv_first, kv_count;
            model_spec_kv_heads_of(spec, first, count, &kv_first, &kv_count);
            for (uint32_t kv = 0; kv < 3; kv++) {
                bool needed = false;
                for (uint32_t head = first; head < first + count; head++) {
                    needed = needed || head / 3 == kv;
                }
                assert_int_equal(needed, kv >= kv_first && kv < kv_first + kv_count);
            }
        }
    }
}

static void test_dtypes(void **state)
{
    static const struct {
        Dtype type;
        uint32_t n;
        size_t bytes; /* ggml's type sizes */
    } rows[] = {
        {DTYPE_F32, 1, 4},      {DTYPE_F16, 1, 2},      {DTYPE_BF16, 1, 2},
        {DTYPE_Q4_0, 32, 18},   {DTYPE_Q4_1, 32, 20},   {DTYPE_Q5_0, 32, 22},
        {DTYPE_Q5_1, 32, 24},   {DTYPE_Q8_0, 32, 34},   {DTYPE_Q4_K, 256, 144},
        {DTYPE_Q5_K, 256, 176}, {DTYPE_Q6_K, 256, 210},
    };
    size_t bytes;
    for (size_t i = 0; i < G_N_ELEMENTS(rows); i++) {
        assert_true(dtype_row_bytes(rows[i].type, rows[i].n * 3, &bytes));
        assert_int_equal(bytes, rows[i].bytes * 3);
        if (rows[i].n > 1) {
            assert_false(dtype_row_bytes(rows[i].type, rows[i].n * 3 + 1, &bytes));
        }
    }
    assert_null(dtype_info(4)->name);
    assert_null(dtype_info(31)->name);
    assert_null(dtype_info(UINT32_MAX)->name);
    assert_false(dtype_row_bytes(5, 32, &bytes));
    assert_false(dtype_row_bytes(DTYPE_F32, UINT64_MAX / 2, &bytes));
}

/* ---- refusals ---------------------------------------------------------------------------------
 */

typedef void (*BreakFn)(ModelSpec *spec);

static TensorSpec *find(ModelSpec *spec, TensorRole role, int32_t layer)
{
    return (TensorSpec *)model_spec_tensor(spec, role, layer);
}

static void no_layers(ModelSpec *s)
{
    s->n_layers = 0;
}
static void more_layers(ModelSpec *s)
{
    s->n_layers++;
}
static void fewer_layers(ModelSpec *s)
{
    s->n_layers--;
}
static void huge_width(ModelSpec *s)
{
    s->width = UINT32_MAX;
}
static void odd_groups(ModelSpec *s)
{
    s->n_kv_heads = 3;
}
static void many_kv_heads(ModelSpec *s)
{
    s->n_kv_heads = 8;
}
static void no_eps(ModelSpec *s)
{
    s->norm_eps = 0.0f;
}
static void nan_eps(ModelSpec *s)
{
    s->norm_eps = 0.0f / 0.0f;
}
static void odd_rope(ModelSpec *s)
{
    s->rope.dims = 7;
}
static void wide_rope(ModelSpec *s)
{
    s->rope.dims = 64;
}
static void nan_rope(ModelSpec *s)
{
    s->rope.freq_base = 0.0 / 0.0;
}
static void strange_scaling(ModelSpec *s)
{
    s->rope.scaling = (RopeScaling)9;
}
static void missing_factors(ModelSpec *s)
{
    s->rope.scaling = ROPE_SCALING_FACTORS;
}
static void yarn_without_context(ModelSpec *s)
{
    s->rope.scaling = ROPE_SCALING_YARN;
}
static void experts(ModelSpec *s)
{
    s->n_experts = 8;
}
static void other_family(ModelSpec *s)
{
    s->family = FAMILY_BERT;
}
static void no_cache(ModelSpec *s)
{
    s->cache = CACHE_NONE;
}
static void missing_tensor(ModelSpec *s)
{
    g_free(s->tensors[3].name);
    s->tensors[3] = s->tensors[--s->n_tensors];
}
static void same_tensor_twice(ModelSpec *s)
{
    find(s, ROLE_ATTN_K, 0)->role = ROLE_ATTN_V;
}
static void wrong_shape(ModelSpec *s)
{
    find(s, ROLE_FFN_UP, 1)->rows--;
}
static void wrong_size(ModelSpec *s)
{
    find(s, ROLE_FFN_UP, 1)->size_bytes++;
}
static void quantised_norm(ModelSpec *s)
{
    find(s, ROLE_ATTN_NORM, 1)->type = DTYPE_Q8_0;
}
static void unknown_type(ModelSpec *s)
{
    find(s, ROLE_ATTN_Q, 1)->type = (Dtype)5;
}
static void huge_type(ModelSpec *s)
{
    find(s, ROLE_ATTN_Q, 1)->type = (Dtype)4000000000u;
}
static void unknown_role(ModelSpec *s)
{
    find(s, ROLE_ATTN_Q, 1)->role = (TensorRole)77;
}
static void negative_layer(ModelSpec *s)
{
    find(s, ROLE_ATTN_Q, 1)->layer = -5;
}
static void global_in_layer(ModelSpec *s)
{
    find(s, ROLE_OUTPUT_NORM, -1)->layer = 0;
}
static void overlap(ModelSpec *s)
{
    find(s, ROLE_ATTN_Q, 1)->offset += 32;
}
static void wrapping_offset(ModelSpec *s)
{
    find(s, ROLE_ATTN_Q, 1)->offset = UINT64_MAX - 8;
}
static void untied_without_output(ModelSpec *s)
{
    s->tied_output = false;
}
static void no_tensors(ModelSpec *s)
{
    for (uint32_t i = 0; i < s->n_tensors; i++) {
        g_free(s->tensors[i].name);
    }
    s->n_tensors = 0;
}

static void test_refusals(void **state)
{
    static const BreakFn breaks[] = {
        no_layers,
        more_layers,
        fewer_layers,
        huge_width,
        odd_groups,
        many_kv_heads,
        no_eps,
        nan_eps,
        odd_rope,
        wide_rope,
        nan_rope,
        strange_scaling,
        missing_factors,
        yarn_without_context,
        experts,
        other_family,
        no_cache,
        missing_tensor,
        same_tensor_twice,
        wrong_shape,
        wrong_size,
        quantised_norm,
        unknown_type,
        huge_type,
        unknown_role,
        negative_layer,
        global_in_layer,
        overlap,
        wrapping_offset,
        untied_without_output,
        no_tensors,
    };
    for (size_t i = 0; i < G_N_ELEMENTS(breaks); i++) {
        g_autoptr(ModelSpec) spec = spec_of(64, 4, 2, 128, DTYPE_Q8_0);
        g_autoptr(GError) error = NULL;
        assert_true(model_spec_finish(spec, &error)); /* again is fine */
        breaks[i](spec);
        bool accepted = model_spec_finish(spec, &error);
        if (accepted) {
            fail_msg("break %zu was accepted", i);
        }
        assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
    }
    model_spec_free(NULL);
}

/* More than 64 attention units cannot be folded by the tree. */
static void test_too_many_units(void **state)
{
    GgufBuilderConfig c;
    gguf_builder_defaults(&c);
    c.width = 67 * 256;
    c.n_heads = 67; /* prime: heads cannot be paired */
    c.n_kv_heads = 1;
    g_autoptr(GError) error = NULL;
    assert_null(gguf_builder_spec(&c, &error));
    assert_non_null(strstr(error->message, "67 attention units"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_unit_table),        cmocka_unit_test(test_unit_properties),
        cmocka_unit_test(test_slices_cover_once), cmocka_unit_test(test_canonical_order),
        cmocka_unit_test(test_kv_heads),          cmocka_unit_test(test_dtypes),
        cmocka_unit_test(test_refusals),          cmocka_unit_test(test_too_many_units),
    };
    return cmocka_run_group_tests_name("model-spec", tests, NULL, NULL);
}
