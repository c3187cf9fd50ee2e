/* tokenizer.ggml.* of files made by hand: what is read, and what is refused by key. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include "proto/base/error.h"
#include "proto/text/tokenizer.h"

#include <string.h>

/* GGUF value types (ggml docs/gguf.md). */
enum { GGUF_U32 = 4, GGUF_I32 = 5, GGUF_F32 = 6, GGUF_BOOL = 7, GGUF_STRING = 8, GGUF_ARRAY = 9 };

typedef struct File {
    GByteArray *entries;
    uint64_t n;
} File;

static void put(GByteArray *bytes, const void *data, size_t n)
{
    g_byte_array_append(bytes, data, (guint)n);
}

static void put_string(GByteArray *bytes, const char *text)
{
    uint64_t n = strlen(text);
    put(bytes, &n, 8);
    put(bytes, text, n);
}

static void put_key(File *file, const char *key, uint32_t type)
{
    put_string(file->entries, key);
    put(file->entries, &type, 4);
    file->n++;
}

static void put_text(File *file, const char *key, const char *value)
{
    put_key(file, key, GGUF_STRING);
    put_string(file->entries, value);
}

static void put_u32(File *file, const char *key, uint32_t value)
{
    put_key(file, key, GGUF_U32);
    put(file->entries, &value, 4);
}

static void put_bool(File *file, const char *key, uint8_t value)
{
    put_key(file, key, GGUF_BOOL);
    put(file->entries, &value, 1);
}

static void put_array(File *file, const char *key, uint32_t type, uint64_t n)
{
    put_key(file, key, GGUF_ARRAY);
    put(file->entries, &type, 4);
    put(file->entries, &n, 8);
}

static void put_texts(File *file, const char *key, const char *const *values, uint64_t n)
{
    put_array(file, key, GGUF_STRING, n);
    for (uint64_t i = 0; i < n; i++) {
        put_string(file->entries, values[i]);
    }
}

static void put_numbers(File *file, const char *key, const int32_t *values, uint64_t n)
{
    put_array(file, key, GGUF_I32, n);
    put(file->entries, values, n * sizeof *values);
}

static void put_scores(File *file, uint64_t n)
{
    put_array(file, "tokenizer.ggml.scores", GGUF_F32, n);
    for (uint64_t i = 0; i < n; i++) {
        float score = -(float)i;
        put(file->entries, &score, 4);
    }
}

/* Takes the file always; NULL + error as tokenizer_from_gguf(). */
static Tokenizer *load(File *file, GError **error)
{
    static const char magic[4] = {'G', 'G', 'U', 'F'};
    uint32_t version = 3;
    uint64_t n_tensors = 0;
    g_autoptr(GByteArray) bytes = g_byte_array_new();
    put(bytes, magic, 4);
    put(bytes, &version, 4);
    put(bytes, &n_tensors, 8);
    put(bytes, &file->n, 8);
    put(bytes, file->entries->data, file->entries->len);
    g_byte_array_unref(file->entries);
    g_autoptr(Gguf) gguf = gguf_parse(bytes->data, bytes->len, error);
    assert_non_null(gguf);
    return tokenizer_from_gguf(gguf, error); /* which must not point into the file afterwards */
}

static File file_new(const char *model)
{
    File file = {.entries = g_byte_array_new()};
    put_text(&file, "general.architecture", "llama");
    if (model != NULL) {
        put_text(&file, "tokenizer.ggml.model", model);
    }
    return file;
}

static const char *const tokens[] = {"<unk>", "<s>", "</s>", "\xE2\x96\x81", "a", "b", "ab"};
static const int32_t kinds[] = {2, 3, 3, 1, 1, 1, 1};
enum { N = 7 };

static File spm_file(void)
{
    File file = file_new("llama");
    put_texts(&file, "tokenizer.ggml.tokens", tokens, N);
    put_numbers(&file, "tokenizer.ggml.token_type", kinds, N);
    put_scores(&file, N);
    put_u32(&file, "tokenizer.ggml.bos_token_id", 1);
    put_u32(&file, "tokenizer.ggml.eos_token_id", 2);
    return file;
}

static void assert_refused(File file, const char *named)
{
    g_autoptr(GError) error = NULL;
    g_autoptr(Tokenizer) t = load(&file, &error);
    assert_null(t);
    if (!g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID) ||
        strstr(error->message, named) == NULL) {
        fail_msg("\"%s\" does not name %s", error->message, named);
    }
}

static void defaults_and_choices_of_the_file(void **state)
{
    for (int choice = -1; choice < 2; choice++) {
        File file = spm_file();
        if (choice >= 0) {
            put_bool(&file, "tokenizer.ggml.add_bos_token", (uint8_t)choice);
            put_bool(&file, "tokenizer.ggml.add_space_prefix", (uint8_t)choice);
        }
        g_autoptr(Tokenizer) t = load(&file, NULL);
        assert_non_null(t);
        assert_int_equal(tokenizer_adds_bos(t), choice != 0);
        g_autoptr(GArray) ids = tokenizer_encode(t, "ab", 2, true, false, NULL);
        static const uint32_t with[] = {1, 3, 6}, without[] = {6};
        assert_int_equal(ids->len, choice != 0 ? 3 : 1);
        assert_memory_equal(ids->data, choice != 0 ? with : without, ids->len * sizeof(uint32_t));
    }
}

static void extra_end_ids_are_read(void **state)
{
    File file = spm_file();
    put_u32(&file, "tokenizer.ggml.eot_token_id", 4);
    put_u32(&file, "tokenizer.ggml.eom_token_id", 5);
    g_autoptr(Tokenizer) t = load(&file, NULL);
    uint32_t n;
    const uint32_t *ids = tokenizer_end_ids(t, &n);
    assert_int_equal(n, 3);
    assert_int_equal(ids[0], 2);
    assert_int_equal(ids[1], 4);
    assert_int_equal(ids[2], 5);
}

static void broken_keys_are_refused_by_name(void **state)
{
    assert_refused(file_new(NULL), "tokenizer.ggml.model");
    File file = file_new("llama");
    assert_refused(file, "0 tokens");
    file = file_new("llama");
    put_texts(&file, "tokenizer.ggml.tokens", tokens, N);
    assert_refused(file, "tokenizer.ggml.scores");
    file = file_new("llama");
    put_texts(&file, "tokenizer.ggml.tokens", tokens, N);
    put_scores(&file, N);
    assert_refused(file, "tokenizer.ggml.token_type");
    file = file_new("llama");
    put_texts(&file, "tokenizer.ggml.tokens", tokens, N);
    put_scores(&file, N - 1);
    assert_refused(file, "tokenizer.ggml.scores has 6 elements for 7 tokens");
    file = file_new("llama");
    put_texts(&file, "tokenizer.ggml.tokens", tokens, N);
    put_texts(&file, "tokenizer.ggml.token_type", tokens, N);
    assert_refused(file, "tokenizer.ggml.token_type[0]");
    file = file_new("gpt2");
    put_numbers(&file, "tokenizer.ggml.tokens", kinds, N);
    assert_refused(file, "tokenizer.ggml.tokens[0]");
    file = spm_file();
    put_text(&file, "tokenizer.ggml.unknown_token_id", "x");
    assert_refused(file, "tokenizer.ggml.unknown_token_id");
    file = spm_file();
    put_bool(&file, "tokenizer.ggml.remove_extra_whitespaces", 1);
    assert_refused(file, "remove_extra_whitespaces");
    file = spm_file();
    put_numbers(&file, "tokenizer.ggml.precompiled_charsmap", kinds, N);
    assert_refused(file, "precompiled_charsmap");
    file = file_new("bert");
    put_texts(&file, "tokenizer.ggml.tokens", tokens, N);
    assert_refused(file, "\"bert\" is not supported; gpt2");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(defaults_and_choices_of_the_file),
        cmocka_unit_test(extra_end_ids_are_read),
        cmocka_unit_test(broken_keys_are_refused_by_name),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
