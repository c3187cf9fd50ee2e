/* The GGUF reader against files that are right (every weight type, split, versions) and files that
 * lie. */
#include "proto/model/gguf.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "proto/base/random.h"
#include "tests/golden/gguf_builder.h"

#include <glib/gstdio.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const Dtype all_types[] = {DTYPE_F32,  DTYPE_F16,  DTYPE_BF16, DTYPE_Q4_0,
                                  DTYPE_Q4_1, DTYPE_Q5_0, DTYPE_Q5_1, DTYPE_Q8_0,
                                  DTYPE_Q4_K, DTYPE_Q5_K, DTYPE_Q6_K};

static void wide(GgufBuilderConfig *c)
{
    gguf_builder_defaults(c);
    c->width = 256;
    c->n_heads = 4;
    c->ffn_width = 512;
    c->vocab_size = 300;
}

/* A malloc of exactly the size, so that a sanitizer sees any read beyond it. */
static Gguf *parse_exact(const uint8_t *data, size_t size, uint8_t **copy, GError **error)
{
    *copy = malloc(size > 0 ? size : 1);
    memcpy(*copy, data, size);
    return gguf_parse(*copy, size, error);
}

static void test_every_type(void **state)
{
    for (size_t i = 0; i < G_N_ELEMENTS(all_types); i++) {
        GgufBuilderConfig c;
        wide(&c);
        c.tied = i % 2 == 0;
        c.qkv_bias = i % 3 == 0;
        gguf_builder_set_type(&c, all_types[i]);
        g_autoptr(GError) error = NULL;
        g_autoptr(GBytes) bytes = gguf_builder_bytes(&c, &error);
        gsize size;
        const void *data = g_bytes_get_data(bytes, &size);
        g_autoptr(Gguf) g = gguf_parse(data, size, &error);
        assert_non_null(g);
        g_autoptr(ModelSpec) spec = gguf_model_spec(g, &error);
        assert_non_null(spec);
        assert_int_equal(spec->n_layers, 2);
        assert_int_equal(spec->width, 256);
        assert_int_equal(spec->n_heads, 4);
        assert_int_equal(spec->n_kv_heads, 2);
        assert_int_equal(spec->head_size, 64);
        assert_int_equal(spec->ffn_width, 512);
        assert_int_equal(spec->vocab_size, 300);
        assert_int_equal(spec->context, 256);
        assert_int_equal(spec->tied_output, c.tied);
        assert_int_equal(spec->rope.pairing, ROPE_ADJACENT);
        assert_int_equal(spec->rope.dims, 64);
        assert_true(spec->rope.freq_base == 10000.0);
        assert_true(spec->norm_eps == 1e-5f);
        assert_true(spec->attention_scale == 0.125f);
        assert_string_equal(spec->name, "tiny");
        assert_int_equal(model_spec_tensor(spec, ROLE_ATTN_Q, 1)->type, all_types[i]);
        assert_int_equal(model_spec_tensor(spec, ROLE_ATTN_Q_BIAS, 0) != NULL, c.qkv_bias);
    }
}

/* Slices put back where they came from give the tensor's bytes, each exactly once. */
static void test_copy_slice(void **state)
{
    GgufBuilderConfig c;
    wide(&c);
    c.vocab_size = 2300;
    gguf_builder_set_type(&c, DTYPE_Q4_1);
    g_autoptr(GBytes) bytes = gguf_builder_bytes(&c, NULL);
    gsize size;
    const uint8_t *data = g_bytes_get_data(bytes, &size);
    g_autoptr(Gguf) g = gguf_parse(data, size, NULL);
    g_autoptr(ModelSpec) spec = gguf_model_spec(g, NULL);
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        const TensorSpec *t = &spec->tensors[i];
        g_autofree uint8_t *back = g_malloc0(t->size_bytes);
        size_t row_bytes;
        assert_true(dtype_row_bytes(t->type, t->columns, &row_bytes));
        for (uint32_t s = 0; s < t->n_slices; s++) {
            size_t n = model_spec_slice_bytes(spec, t, s), before, part;
            g_autofree uint8_t *slice = g_malloc(n);
            SliceRect rect = model_spec_slice(spec, t, s);
            assert_true(gguf_copy_slice(g, spec, t, s, slice));
            assert_true(dtype_row_bytes(t->type, rect.col0, &before) &&
                        dtype_row_bytes(t->type, rect.n_cols, &part));
            for (uint32_t row = 0; row < rect.n_rows; row++) {
                memcpy(back + (rect.row0 + row) * row_bytes + before, slice + row * part, part);
            }
        }
        assert_memory_equal(back, data + t->offset, t->size_bytes);
    }
    uint8_t byte;
    TensorSpec outside = spec->tensors[0];
    outside.offset = size - outside.size_bytes + 1;
    assert_false(gguf_copy_slice(g, spec, &outside, 0, &byte));
    outside.offset = UINT64_MAX;
    assert_false(gguf_copy_slice(g, spec, &outside, 0, &byte));
    outside = spec->tensors[0];
    outside.file = 1;
    assert_false(gguf_copy_slice(g, spec, &outside, 0, &byte));
    assert_false(gguf_copy_slice(g, spec, &spec->tensors[0], spec->tensors[0].n_slices, &byte));
}

static void test_values(void **state)
{
    GgufBuilderConfig c;
    gguf_builder_defaults(&c);
    g_autoptr(GBytes) bytes = gguf_builder_bytes(&c, NULL);
    gsize size;
    const uint8_t *data = g_bytes_get_data(bytes, &size);
    g_autoptr(Gguf) g = gguf_parse(data, size, NULL);
    g_autoptr(GError) error = NULL;
    uint64_t u = 0;
    double f = 0;
    bool b = true;
    const char *text;
    size_t length;
    int64_t i64;
    assert_true(gguf_get_u64(g, "llama.block_count", &u, &error) && u == 2);
    assert_true(gguf_get_f64(g, "llama.block_count", &f, &error) && f == 2.0);
    assert_true(gguf_get_f64(g, "llama.rope.freq_base", &f, &error) && f == 10000.0);
    assert_true(gguf_get_bool(g, "tokenizer.ggml.add_bos_token", &b, &error) && !b);
    assert_true(gguf_get_string(g, "general.architecture", &text, &length, &error));
    assert_int_equal(length, 5);
    assert_memory_equal(text, "llama", 5);
    assert_false(gguf_get_u64(g, "no.such.key", &u, &error));
    assert_null(error);
    assert_false(gguf_get_u64(g, "general.name", &u, &error));
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
    g_clear_error(&error);
    assert_false(gguf_get_string(g, "llama.block_count", &text, &length, &error));
    assert_non_null(error);
    g_clear_error(&error);
    assert_false(gguf_get_u64(g, "tokenizer.ggml.tokens", &u, &error));
    assert_non_null(error);
    assert_true(gguf_array_length(g, "tokenizer.ggml.tokens", &u) && u == 1500);
    assert_true(gguf_array_string(g, "tokenizer.ggml.tokens", 2, &text, &length));
    assert_int_equal(length, strlen("<|im_end|>"));
    assert_memory_equal(text, "<|im_end|>", length);
    assert_false(gguf_array_string(g, "tokenizer.ggml.tokens", 1500, &text, &length));
    assert_false(gguf_array_i64(g, "tokenizer.ggml.tokens", 0, &i64));
    assert_true(gguf_array_i64(g, "tokenizer.ggml.token_type", 0, &i64) && i64 == 3);
    assert_true(gguf_array_f64(g, "tokenizer.ggml.token_type", 5, &f) && f == 1.0);
    assert_false(gguf_array_string(g, "tokenizer.ggml.token_type", 0, &text, &length));
    assert_false(gguf_array_length(g, "general.name", &u));
    assert_non_null(gguf_find_tensor(g, "blk.1.ffn_down.weight"));
    assert_null(gguf_find_tensor(g, "blk.2.ffn_down.weight"));
    Hash128 hash = gguf_hash(g), wanted = hash128(data, size);
    assert_true(hash128_equal(&hash, &wanted));
}

/* ---- files ------------------------------------------------------------------------------------
 */

typedef struct Folder {
    char *path;
} Folder;

static char *in_folder(const Folder *folder, const char *name)
{
    return g_build_filename(folder->path, name, NULL);
}

static int make_folder(void **state)
{
    Folder *folder = g_new0(Folder, 1);
    folder->path = g_dir_make_tmp("weft-gguf-XXXXXX", NULL);
    *state = folder;
    return folder->path == NULL;
}

static int remove_folder(void **state)
{
    Folder *folder = *state;
    GDir *dir = g_dir_open(folder->path, 0, NULL);
    for (const char *name = g_dir_read_name(dir); name != NULL; name = g_dir_read_name(dir)) {
        g_autofree char *path = in_folder(folder, name);
        g_unlink(path);
    }
    g_dir_close(dir);
    g_rmdir(folder->path);
    g_free(folder->path);
    g_free(folder);
    return 0;
}

static void test_split_files(void **state)
{
    const Folder *folder = *state;
    GgufBuilderConfig c;
    gguf_builder_defaults(&c);
    c.alignment = 64;
    g_autofree char *whole_path = in_folder(folder, "whole.gguf");
    g_autofree char *first = in_folder(folder, "parts-00001-of-00003.gguf");
    g_autofree char *second = in_folder(folder, "parts-00002-of-00003.gguf");
    g_autoptr(GError) error = NULL;
    assert_true(gguf_builder_write(&c, whole_path, &error));
    assert_true(gguf_builder_write(&c, first, &error));
    g_autoptr(Gguf) whole = gguf_open(whole_path, &error);
    g_autoptr(Gguf) split = gguf_open(first, &error);
    assert_non_null(whole);
    assert_non_null(split);
    assert_int_equal(gguf_n_files(split), 3);
    assert_string_equal(gguf_file_path(split, 1), second);
    g_autoptr(ModelSpec) a = gguf_model_spec(whole, &error);
    g_autoptr(ModelSpec) b = gguf_model_spec(split, &error);
    assert_non_null(a);
    assert_non_null(b);
    assert_int_equal(a->n_tensors, b->n_tensors);
    uint32_t last_file = 0;
    for (uint32_t i = 0; i < a->n_tensors; i++) {
        assert_string_equal(a->tensors[i].name, b->tensors[i].name);
        last_file = MAX(last_file, b->tensors[i].file);
        for (uint32_t s = 0; s < a->tensors[i].n_slices; s++) {
            size_t n = model_spec_slice_bytes(a, &a->tensors[i], s);
            g_autofree uint8_t *x = g_malloc(n), *y = g_malloc(n);
            assert_true(gguf_copy_slice(whole, a, &a->tensors[i], s, x));
            assert_true(gguf_copy_slice(split, b, &b->tensors[i], s, y));
            assert_memory_equal(x, y, n);
        }
    }
    assert_int_equal(last_file, 2);
}

static void assert_open_fails(const char *path, int code, const char *part)
{
    g_autoptr(GError) error = NULL;
    g_autoptr(Gguf) g = gguf_open(path, &error);
    assert_null(g);
    assert_true(g_error_matches(error, WEFT_ERROR, code));
    assert_non_null(strstr(error->message, part));
}

static void test_split_refusals(void **state)
{
    const Folder *folder = *state;
    GgufBuilderConfig c;
    gguf_builder_defaults(&c);
    g_autofree char *first = in_folder(folder, "x-00001-of-00003.gguf");
    g_autofree char *second = in_folder(folder, "x-00002-of-00003.gguf");
    g_autofree char *third = in_folder(folder, "x-00003-of-00003.gguf");
    assert_true(gguf_builder_write(&c, first, NULL));
    assert_open_fails(second, WEFT_ERROR_INVALID, "name the first part");
    /* part 3 in place of part 2 */
    g_autofree char *kept = NULL;
    gsize size;
    assert_true(g_file_get_contents(third, &kept, &size, NULL));
    assert_true(g_file_set_contents(second, kept, (gssize)size, NULL));
    assert_open_fails(first, WEFT_ERROR_INVALID, "part 3 of 3, not part 2 of 3");
    g_unlink(third);
    g_unlink(second);
    assert_open_fails(first, WEFT_ERROR_NOT_FOUND, "x-00002-of-00003.gguf");
    g_autofree char *absurd = in_folder(folder, "y-00001-of-99999.gguf");
    assert_open_fails(absurd, WEFT_ERROR_INVALID, "part 1 of 99999");
}

static void test_no_model_files(void **state)
{
    const Folder *folder = *state;
    g_autofree char *missing = in_folder(folder, "missing.gguf");
    g_autofree char *empty = in_folder(folder, "empty.gguf");
    g_autofree char *text = in_folder(folder, "text.gguf");
    assert_true(g_file_set_contents(empty, "", 0, NULL));
    assert_true(g_file_set_contents(text, "once upon a time there was a file", -1, NULL));
    assert_open_fails(missing, WEFT_ERROR_NOT_FOUND, "no such file");
    assert_open_fails(empty, WEFT_ERROR_INVALID, "no GGUF file");
    assert_open_fails(text, WEFT_ERROR_INVALID, "no GGUF file");
    assert_open_fails(folder->path, WEFT_ERROR_INVALID, "a directory");
}

/* ---- crafted headers --------------------------------------------------------------------------
 */

static void put(GByteArray *out, uint64_t value, guint n_bytes)
{
    for (guint i = 0; i < n_bytes; i++) {
        guint8 byte = (guint8)(value >> (8 * i));
        g_byte_array_append(out, &byte, 1);
    }
}

static void put_text(GByteArray *out, const char *text)
{
    put(out, strlen(text), 8);
    g_byte_array_append(out, (const guint8 *)text, (guint)strlen(text));
}

static GByteArray *header(uint32_t version, uint64_t n_tensors, uint64_t n_keys)
{
    GByteArray *out = g_byte_array_new();
    g_byte_array_append(out, (const guint8 *)"GGUF", 4);
    put(out, version, 4);
    put(out, n_tensors, 8);
    put(out, n_keys, 8);
    return out;
}

/* Parses, wants a refusal that contains `part`, frees. */
static void assert_refused(GByteArray *file /* taken */, const char *part)
{
    uint8_t *copy;
    g_autoptr(GError) error = NULL;
    g_autoptr(Gguf) g = parse_exact(file->data, file->len, &copy, &error);
    assert_null(g);
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
    if (strstr(error->message, part) == NULL) {
        fail_msg("'%s' lacks '%s'", error->message, part);
    }
    free(copy);
    g_byte_array_unref(file);
}

static void test_headers(void **state)
{
    assert_refused(header(1, 0, 0), "version 1");
    assert_refused(header(4, 0, 0), "version 4");
    assert_refused(header(0x03000000, 0, 0), "big-endian");
    assert_refused(header(3, 0, 1), "claims 1 keys");
    assert_refused(header(3, 0, UINT64_MAX), "keys");
    assert_refused(header(3, UINT64_MAX, 0), "tensors");
    assert_refused(header(3, 1, 0), "claims 1 tensors");
    GByteArray *f = header(3, 0, 70000);
    g_byte_array_set_size(f, 2 << 20);
    assert_refused(f, "claims 70000 keys");
}

static GByteArray *with_key(uint32_t type)
{
    GByteArray *f = header(3, 0, 1);
    put_text(f, "some.key");
    put(f, type, 4);
    return f;
}

static GByteArray *with_array(uint32_t element, uint64_t n)
{
    GByteArray *f = with_key(9);
    put(f, element, 4);
    put(f, n, 8);
    return f;
}

static void test_keys(void **state)
{
    GByteArray *f = with_key(13);
    put(f, 0, 8);
    assert_refused(f, "unknown value type 13");
    f = with_key(10); /* u64, four bytes left */
    put(f, 0, 4);
    assert_refused(f, "runs past the end");
    f = with_key(8); /* string */
    put(f, UINT64_MAX, 8);
    assert_refused(f, "runs past the end");
    f = with_key(8);
    put(f, 3, 8);
    put(f, 'a', 2);
    assert_refused(f, "runs past the end");
    f = with_array(4, UINT64_MAX / 4 + 1); /* the product wraps to 0 */
    assert_refused(f, "claims");
    f = with_array(10, 1ull << 61);
    assert_refused(f, "claims");
    f = with_array(8, UINT64_MAX / 8);
    assert_refused(f, "claims");
    f = with_array(8, 1);
    put(f, 100, 8);
    assert_refused(f, "string 0");
    f = with_array(9, 1);
    put(f, 0, 8);
    put(f, 0, 4);
    assert_refused(f, "array of arrays");
    f = header(3, 0, 1); /* the name's length */
    put(f, 70000, 8);
    g_byte_array_set_size(f, 80000);
    assert_refused(f, "name of key 0");
    f = header(3, 0, 2);
    for (int i = 0; i < 2; i++) {
        put_text(f, "some.key");
        put(f, 0, 4);
        put(f, 1, 1);
    }
    assert_refused(f, "'some.key' is there twice");
    static const uint32_t alignments[] = {0, 1, 7, 48, 1u << 21};
    for (size_t i = 0; i < G_N_ELEMENTS(alignments); i++) {
        f = header(3, 0, 1);
        put_text(f, "general.alignment");
        put(f, 4, 4);
        put(f, alignments[i], 4);
        assert_refused(f, "general.alignment");
    }
}

/* One description: name, dimensions, type, offset. */
static void put_tensor(GByteArray *f, const char *name, uint32_t n_dims, const uint64_t *dims,
                       uint32_t type, uint64_t offset)
{
    put_text(f, name);
    put(f, n_dims, 4);
    for (uint32_t d = 0; d < MIN(n_dims, 4); d++) {
        put(f, dims[d], 8);
    }
    put(f, type, 4);
    put(f, offset, 8);
}

static GByteArray *with_tensor(uint32_t n_dims, uint64_t d0, uint64_t d1, uint64_t d2, uint64_t d3,
                               uint32_t type, uint64_t offset)
{
    const uint64_t dims[4] = {d0, d1, d2, d3};
    GByteArray *f = header(3, 1, 0);
    put_tensor(f, "t", n_dims, dims, type, offset);
    g_byte_array_set_size(f, f->len + 64);
    return f;
}

static void test_tensors(void **state)
{
    assert_refused(with_tensor(0, 0, 0, 0, 0, 0, 0), "0 dimensions");
    assert_refused(with_tensor(5, 1, 1, 1, 1, 0, 0), "5 dimensions");
    assert_refused(with_tensor(UINT32_MAX, 1, 1, 1, 1, 0, 0), "dimensions");
    assert_refused(with_tensor(1, 0, 0, 0, 0, 0, 0), "dimension 0");
    assert_refused(with_tensor(2, 1, 0, 0, 0, 0, 0), "dimension 1");
    assert_refused(with_tensor(4, 1, 1ull << 32, 1ull << 32, 1, 0, 0), "dimension 2");
    assert_refused(with_tensor(2, 1ull << 33, 1ull << 33, 1, 1, 0, 0), "cannot hold");
    assert_refused(with_tensor(1, UINT64_MAX, 1, 1, 1, 0, 0), "cannot hold");
    assert_refused(with_tensor(1, 33, 1, 1, 1, DTYPE_Q8_0, 0), "blocks of 32");
    assert_refused(with_tensor(1, 256, 1, 1, 1, 10, 0), "Q2_K");
    assert_refused(with_tensor(1, 256, 1, 1, 1, 4, 0), "not supported");
    assert_refused(with_tensor(1, 256, 1, 1, 1, UINT32_MAX, 0), "not supported");
    assert_refused(with_tensor(1, 256, 1, 1, 1, DTYPE_F8_E4M3, 0), "not supported");
    assert_refused(with_tensor(1, 4, 1, 1, 1, 0, 16), "no multiple of 32");
    assert_refused(with_tensor(1, 17, 1, 1, 1, 0, 0), "the file ends");
    assert_refused(with_tensor(1, 4, 1, 1, 1, 0, 1ull << 63), "the file ends");
    assert_refused(with_tensor(1, 4, 1, 1, 1, 0, UINT64_MAX - 31), "the file ends");
    const uint64_t dims[4] = {9, 1, 1, 1};
    GByteArray *f = header(3, 2, 0);
    put_tensor(f, "a", 1, dims, 0, 0);
    put_tensor(f, "b", 1, dims, 0, 32); /* a needs 36 bytes */
    g_byte_array_set_size(f, f->len + 256);
    assert_refused(f, "overlap");
    f = header(3, 2, 0);
    put_tensor(f, "a", 1, dims, 0, 0);
    put_tensor(f, "a", 1, dims, 0, 64);
    g_byte_array_set_size(f, f->len + 256);
    assert_refused(f, "'a' is there twice");
}

/* ---- models that are refused ------------------------------------------------------------------
 */

/* Overwrites the first occurrence of `from` by the equally long `to`. */
static void replace_text(uint8_t *data, size_t size, const char *from, const char *to)
{
    size_t n = strlen(from);
    assert_int_equal(n, strlen(to));
    uint8_t *p = memmem(data, size, from, n);
    assert_non_null(p);
    memcpy(p, to, n);
}

static void assert_model_refused(const GgufBuilderConfig *c, const char *from, const char *to,
                                 const char *part)
{
    g_autoptr(GBytes) bytes = gguf_builder_bytes(c, NULL);
    gsize size;
    const uint8_t *data = g_bytes_get_data(bytes, &size);
    g_autofree uint8_t *copy = g_memdup2(data, size);
    if (from != NULL) {
        replace_text(copy, size, from, to);
    }
    g_autoptr(GError) error = NULL;
    g_autoptr(Gguf) g = gguf_parse(copy, size, &error);
    assert_non_null(g);
    g_autoptr(ModelSpec) spec = gguf_model_spec(g, &error);
    assert_null(spec);
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
    if (strstr(error->message, part) == NULL) {
        fail_msg("'%s' lacks '%s'", error->message, part);
    }
}

static void test_model_refusals(void **state)
{
    static const struct {
        const char *from, *to, *part;
    } names[] = {
        {"general.architecture", "general.architectura", "'general.architecture' is missing"},
        {"llama.block_count", "llama.block_cound", "'llama.block_count' is missing"},
        {"llama.context_length", "llama.context_lentgh", "'llama.context_length' is missing"},
        {"llama.attention.layer_norm_rms_epsilon", "llama.attention.layer_norm_rms_epsiloq",
         "rms_epsilon' is missing"},
        {"blk.1.attn_norm.weight", "blk.1.sub1_norm.weight", "'blk.1.sub1_norm.weight' is no part"},
        {"blk.1.attn_norm.weight", "blk.9.attn_norm.weight", "layer 9 of 2"},
        {"blk.1.attn_norm.weight", "blk.x.attn_norm.weight", "is no part"},
        {"output_norm.weight", "output_norm.weighs", "is no part"},
    };
    static const struct {
        const char *key;
        uint32_t value;
        const char *part;
    } keys[] = {
        {"llama.expert_count", 8, "8 experts"},
        {"llama.attention.key_length", 32, "keys of 32 and values of 16"},
        {"llama.rope.dimension_count", 15, "rotates 15"},
        {"llama.attention.scale", 2000000, "attention scale"},
    };
    GgufBuilderConfig c;
    gguf_builder_defaults(&c);
    for (size_t i = 0; i < G_N_ELEMENTS(names); i++) {
        assert_model_refused(&c, names[i].from, names[i].to, names[i].part);
    }
    for (size_t i = 0; i < G_N_ELEMENTS(keys); i++) {
        gguf_builder_defaults(&c);
        c.extra_key = keys[i].key;
        c.extra_value = keys[i].value;
        assert_model_refused(&c, NULL, NULL, keys[i].part);
    }
    gguf_builder_defaults(&c);
    c.rope_scaling = "longrope";
    assert_model_refused(&c, NULL, NULL, "rope scaling 'longrope'");
    c.rope_scaling = "linear";
    c.rope_factor = 4.0;
    c.rope_factors = true;
    assert_model_refused(&c, NULL, NULL, "together with the tensor rope_freqs");
    gguf_builder_defaults(&c);
    c.n_kv_heads = 3;
    assert_model_refused(&c, NULL, NULL, "4 heads do not share 3 KV heads");
}

static void test_architecture(void **state)
{
    GgufBuilderConfig c;
    gguf_builder_defaults(&c);
    g_autoptr(GBytes) bytes = gguf_builder_bytes(&c, NULL);
    gsize size;
    const uint8_t *data = g_bytes_get_data(bytes, &size);
    g_autofree uint8_t *copy = g_memdup2(data, size);
    uint8_t *key = memmem(copy, size, "general.architecture", 20);
    memcpy(key + 20 + 4 + 8, "mamba", 5); /* behind name, type and length */
    g_autoptr(GError) error = NULL;
    g_autoptr(Gguf) g = gguf_parse(copy, size, &error);
    g_autoptr(ModelSpec) spec = gguf_model_spec(g, &error);
    assert_null(spec);
    assert_non_null(strstr(error->message, "architecture 'mamba' is not supported"));
}

static ModelSpec *built(const GgufBuilderConfig *c)
{
    g_autoptr(GBytes) bytes = gguf_builder_bytes(c, NULL);
    gsize size;
    const uint8_t *data = g_bytes_get_data(bytes, &size);
    g_autoptr(GError) error = NULL;
    g_autoptr(Gguf) g = gguf_parse(data, size, &error);
    ModelSpec *spec = gguf_model_spec(g, &error);
    if (spec == NULL) {
        fail_msg("%s", error->message);
    }
    return spec;
}

static void test_rope(void **state)
{
    GgufBuilderConfig c;
    gguf_builder_defaults(&c);
    g_autoptr(ModelSpec) none = built(&c);
    assert_int_equal(none->rope.scaling, ROPE_SCALING_NONE);
    assert_true(none->rope.factor == 1.0);
    c.rope_scaling = "linear";
    c.rope_factor = 4.0;
    g_autoptr(ModelSpec) linear = built(&c);
    assert_int_equal(linear->rope.scaling, ROPE_SCALING_LINEAR);
    assert_true(linear->rope.factor == 4.0);
    c.rope_scaling = "yarn";
    c.rope_original_context = 64;
    g_autoptr(ModelSpec) yarn = built(&c);
    assert_int_equal(yarn->rope.scaling, ROPE_SCALING_YARN);
    assert_int_equal(yarn->rope.original_context, 64);
    assert_true(yarn->rope.yarn_beta_fast == 32.0 && yarn->rope.yarn_beta_slow == 1.0);
    c.rope_scaling = NULL;
    c.rope_factors = true;
    g_autoptr(ModelSpec) factors = built(&c);
    assert_int_equal(factors->rope.scaling, ROPE_SCALING_FACTORS);
    assert_non_null(model_spec_tensor(factors, ROLE_ROPE_FACTORS, -1));
    c.extra_key = "llama.rope.dimension_count";
    c.extra_value = 16;
    c.head_size = 24;
    gguf_builder_set_type(&c, DTYPE_F32);
    c.rope_factors = false;
    g_autoptr(ModelSpec) partial = built(&c);
    assert_int_equal(partial->rope.dims, 16);
    assert_int_equal(partial->head_size, 24);
}

/* ---- damage -----------------------------------------------------------------------------------
 */

/* Reads all that a reader of the file could: nothing may crash, whatever the bytes. */
static void touch_everything(const Gguf *g)
{
    static const char *const keys[] = {"tokenizer.ggml.tokens", "tokenizer.ggml.merges",
                                       "tokenizer.ggml.token_type", "general.name",
                                       "llama.block_count"};
    uint64_t sum = 0;
    for (size_t k = 0; k < G_N_ELEMENTS(keys); k++) {
        uint64_t n = 0;
        const char *text;
        size_t length;
        int64_t number;
        double real;
        gguf_array_length(g, keys[k], &n);
        for (uint64_t i = 0; i <= n; i++) {
            if (gguf_array_string(g, keys[k], i, &text, &length)) {
                for (size_t b = 0; b < length; b++) {
                    sum += (uint8_t)text[b];
                }
            }
            sum += gguf_array_i64(g, keys[k], i, &number) + gguf_array_f64(g, keys[k], i, &real);
        }
        if (gguf_get_string(g, keys[k], &text, &length, NULL)) {
            sum += length > 0 ? (uint8_t)text[length - 1] : 0;
        }
    }
    for (uint64_t i = 0; i < gguf_n_tensors(g); i++) {
        const GgufTensor *t = gguf_tensor(g, i);
        const uint8_t *data = gguf_file_data(g, t->file, NULL);
        sum += data[t->offset] + data[t->offset + t->size_bytes - 1];
    }
    g_autoptr(ModelSpec) spec = gguf_model_spec(g, NULL);
    for (uint32_t i = 0; spec != NULL && i < spec->n_tensors; i++) {
        const TensorSpec *t = &spec->tensors[i];
        size_t n = model_spec_slice_bytes(spec, t, t->n_slices - 1);
        g_autofree uint8_t *slice = g_malloc(n);
        assert_true(gguf_copy_slice(g, spec, t, t->n_slices - 1, slice));
        sum += slice[n - 1];
    }
    volatile uint64_t sink = sum;
    (void)sink;
}

static void parse_damaged(const uint8_t *data, size_t size)
{
    uint8_t *copy;
    g_autoptr(GError) error = NULL;
    g_autoptr(Gguf) g = parse_exact(data, size, &copy, &error);
    assert_int_equal(g == NULL, error != NULL);
    if (g != NULL) {
        touch_everything(g);
    }
    g_clear_pointer(&g, gguf_free);
    free(copy);
}

static GBytes *small_model(void)
{
    GgufBuilderConfig c;
    gguf_builder_defaults(&c);
    c.n_layers = 1;
    c.width = 32;
    c.n_heads = 2;
    c.n_kv_heads = 1;
    c.head_size = 16;
    c.ffn_width = 32;
    c.vocab_size = 300;
    return gguf_builder_bytes(&c, NULL);
}

/* Every prefix of the description, and one each KiB of the data, is refused: data end where the
 * last tensor does. */
static void test_truncations(void **state)
{
    g_autoptr(GBytes) bytes = small_model();
    gsize size;
    const uint8_t *data = g_bytes_get_data(bytes, &size);
    for (size_t n = 0; n < size - 32; n += n < 1024 ? 1 : n < 16384 ? 13 : 1024) {
        uint8_t *copy;
        g_autoptr(GError) error = NULL;
        g_autoptr(Gguf) g = parse_exact(data, n, &copy, &error);
        assert_null(g);
        assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
        free(copy);
    }
}

static void test_bit_flips(void **state)
{
    g_autoptr(GBytes) bytes = small_model();
    gsize size;
    const uint8_t *data = g_bytes_get_data(bytes, &size);
    g_autofree uint8_t *copy = g_memdup2(data, size);
    RandomSeeded random;
    random_seeded_init(&random, 20240);
    size_t description =
        (size_t)((const uint8_t *)memmem(data, size, "output_norm.weight", 18) - data) + 64;
    for (int i = 0; i < 3000; i++) {
        uint32_t n_flips = 1 + (uint32_t)(random_u64(&random.base) % 4);
        for (uint32_t k = 0; k < n_flips; k++) {
            copy[random_u64(&random.base) % description] ^=
                (uint8_t)(1u << random_u64(&random.base) % 8);
        }
        parse_damaged(copy, size);
        memcpy(copy, data, description);
    }
}

/* Counts, lengths and offsets overwritten by the numbers that break arithmetic. */
static void test_hostile_numbers(void **state)
{
    static const uint64_t numbers[] = {
        0,          1,          0x7f,       0xff,       0xffff,          0x7fffffff, 0x80000000,
        0xffffffff, 1ull << 32, 1ull << 61, 1ull << 63, UINT64_MAX - 31, UINT64_MAX};
    g_autoptr(GBytes) bytes = small_model();
    gsize size;
    const uint8_t *data = g_bytes_get_data(bytes, &size);
    g_autofree uint8_t *copy = g_memdup2(data, size);
    const uint8_t *tensors = memmem(data, size, "token_embd.weight", 17);
    size_t end =
        (size_t)((const uint8_t *)memmem(data, size, "output_norm.weight", 18) - data) + 48;
    for (size_t at = 4; at + 8 < end; at++) {
        if (at == 700) { /* the vocabulary's thousand strings are all alike */
            at = (size_t)(tensors - data) - 8;
        }
        for (size_t i = 0; i < G_N_ELEMENTS(numbers); i++) {
            uint64_t value = GUINT64_TO_LE(numbers[i]);
            memcpy(copy + at, &value, 8);
            parse_damaged(copy, size);
            memcpy(copy + at, data + at, 8);
        }
    }
}

static void test_failing_allocations(void **state)
{
    g_autoptr(GBytes) bytes = small_model();
    gsize size;
    const uint8_t *data = g_bytes_get_data(bytes, &size);
    int n_failures = 0;
    for (int n = 0;; n++) {
        g_autoptr(GError) error = NULL;
        weft_alloc_fail_after(n);
        g_autoptr(Gguf) g = gguf_parse(data, size, &error);
        g_autoptr(ModelSpec) spec = g != NULL ? gguf_model_spec(g, &error) : NULL;
        weft_alloc_fail_after(-1);
        if (spec != NULL) {
            break;
        }
        assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_MEMORY));
        n_failures++;
    }
    assert_true(n_failures >= 5);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_type),
        cmocka_unit_test(test_copy_slice),
        cmocka_unit_test(test_values),
        cmocka_unit_test_setup_teardown(test_split_files, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(test_split_refusals, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(test_no_model_files, make_folder, remove_folder),
        cmocka_unit_test(test_headers),
        cmocka_unit_test(test_keys),
        cmocka_unit_test(test_tensors),
        cmocka_unit_test(test_model_refusals),
        cmocka_unit_test(test_architecture),
        cmocka_unit_test(test_rope),
        cmocka_unit_test(test_truncations),
        cmocka_unit_test(test_bit_flips),
        cmocka_unit_test(test_hostile_numbers),
        cmocka_unit_test(test_failing_allocations),
    };
    return cmocka_run_group_tests_name("gguf", tests, NULL, NULL);
}
