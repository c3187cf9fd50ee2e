/* Training a tokenizer: the merges, tokens and ids that the tokenizers package gets from the same
 * texts (tests/golden/text/make_bpe_training.py), whatever way the text arrives. */
#include "proto/base/error.h"
#include "proto/text/bpe_train.h"

#include <jansson.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

static BpeVocab *train(const char *text, size_t length, uint32_t size)
{
    g_autoptr(GError) error = NULL;
    g_autoptr(BpeTrainer) t = bpe_trainer_new(&error);
    assert_non_null(t);
    assert_true(bpe_trainer_add(t, text, length, &error));
    return bpe_trainer_finish(t, size, &error);
}

static void check_texts(const json_t *wanted, const VocabText *texts, uint64_t n)
{
    assert_int_equal(n, json_array_size(wanted));
    for (uint64_t i = 0; i < n; i++) {
        const char *text = json_string_value(json_array_get(wanted, i));
        assert_int_equal(texts[i].length, strlen(text));
        assert_memory_equal(texts[i].text, text, strlen(text));
    }
}

static void check_golden(const char *name)
{
    g_autofree char *path = g_strdup_printf(GOLDEN_DIR "/bpe-train-%s.json", name);
    json_t *golden = json_load_file(path, 0, NULL);
    assert_non_null(golden);
    const char *text = json_string_value(json_object_get(golden, "text"));
    g_autoptr(BpeVocab) trained =
        train(text, strlen(text), (uint32_t)json_integer_value(json_object_get(golden, "size")));
    const TokenizerVocab *v = bpe_vocab_get(trained);
    check_texts(json_object_get(golden, "merges"), v->merges, v->n_merges);
    check_texts(json_object_get(golden, "tokens"), v->tokens, v->n_tokens - 1);
    assert_int_equal(v->eos, v->n_tokens - 1);

    g_autoptr(GError) error = NULL;
    g_autoptr(Tokenizer) tokenizer = tokenizer_from_vocab(v, &error);
    assert_non_null(tokenizer);
    g_autoptr(GArray) ids = tokenizer_encode(tokenizer, text, strlen(text), false, false, &error);
    const json_t *wanted = json_object_get(golden, "ids");
    assert_int_equal(ids->len, json_array_size(wanted));
    for (guint i = 0; i < ids->len; i++) {
        assert_int_equal(g_array_index(ids, uint32_t, i),
                         json_integer_value(json_array_get(wanted, i)));
    }
    json_decref(golden);
}

static void test_golden(void **state)
{
    static const char *const names[] = {"words", "scripts", "repeats", "small", "none"};
    for (size_t i = 0; i < G_N_ELEMENTS(names); i++) {
        check_golden(names[i]);
    }
}

/* Documents in another order, and bytes that are no text: nothing changes. */
static void test_order(void **state)
{
    static const char *const documents[] = {"the cat sat on the mat\n", "a hat and a cat\n",
                                            "that is the cat\n"};
    g_autoptr(GError) error = NULL;
    g_autofree char *first = NULL;
    for (int turn = 0; turn < 3; turn++) {
        g_autoptr(BpeTrainer) t = bpe_trainer_new(&error);
        for (int i = 0; i < 3; i++) {
            const char *text = documents[(i + turn) % 3];
            assert_true(bpe_trainer_add(t, text, strlen(text), &error));
            assert_true(bpe_trainer_add(t, "\xff\xfe\x80", 3, &error));
        }
        g_autoptr(BpeVocab) v = bpe_trainer_finish(t, 270, &error);
        g_autoptr(GString) merges = g_string_new(NULL);
        for (uint64_t i = 0; i < bpe_vocab_get(v)->n_merges; i++) {
            g_string_append(merges, bpe_vocab_get(v)->merges[i].text);
            g_string_append_c(merges, '\n');
        }
        assert_true(bpe_vocab_get(v)->n_merges > 5);
        if (first == NULL) {
            first = g_strdup(merges->str);
        }
        assert_string_equal(first, merges->str);
    }
}

static void test_sizes(void **state)
{
    g_autoptr(BpeVocab) bytes = train("aaaa aaaa", 9, 257);
    assert_int_equal(bpe_vocab_get(bytes)->n_tokens, 257);
    assert_int_equal(bpe_vocab_get(bytes)->n_merges, 0);
    g_autoptr(BpeVocab) nothing = train("", 0, 1000);
    assert_int_equal(bpe_vocab_get(nothing)->n_tokens, 257);
    assert_null(train("a", 1, 256));
    assert_null(train("a", 1, UINT32_MAX));
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_golden), cmocka_unit_test(test_order),
                                       cmocka_unit_test(test_sizes)};
    return cmocka_run_group_tests_name("bpe_train", tests, NULL, NULL);
}
