/* In how many ways tokens are made of two others: as looking every cut up says, and of a vocabulary
 * whose longest token no such look-up would get through. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include "proto/text/token_halves.h"
#include "proto/text/tokenizer_json.h"

#include <string.h>

/* Every cut of every token, each half looked up: what the vocabulary says by definition. */
static uint64_t count_by_looking_up(GHashTable *tokens)
{
    GHashTableIter i;
    gpointer token;
    uint64_t n = 0;
    g_hash_table_iter_init(&i, tokens);
    while (g_hash_table_iter_next(&i, &token, NULL)) {
        const char *text = token;
        for (size_t at = 1; at < strlen(text); at++) {
            g_autofree char *head = g_strndup(text, at);
            n += g_hash_table_contains(tokens, head) && g_hash_table_contains(tokens, text + at);
        }
    }
    return n;
}

static uint64_t count(GHashTable *tokens)
{
    g_autoptr(GArray) texts = g_array_new(FALSE, FALSE, sizeof(VocabText));
    GHashTableIter i;
    gpointer token;
    g_hash_table_iter_init(&i, tokens);
    while (g_hash_table_iter_next(&i, &token, NULL)) {
        const VocabText text = {token, strlen(token)};
        g_array_append_val(texts, text);
    }
    return token_halves_count((const VocabText *)(const void *)texts->data, texts->len);
}

/* Few letters (bytes above 127 among them), so that most short texts are tokens and many tokens
 * begin and end with others. */
static void test_random_vocabularies(void **state)
{
    static const char *const letters[] = {"a", "ab", "\xE2\x96\x81", "ba"};
    const guint32 seed = g_random_int();
    g_autoptr(GRand) random = g_rand_new_with_seed(seed);
    uint64_t n_all = 0;
    print_message("# seed %u\n", seed);
    for (int round = 0; round < 300; round++) {
        g_autoptr(GHashTable) tokens = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL);
        const int n_tokens = g_rand_int_range(random, 0, 80),
                  n_letters = g_rand_int_range(random, 1, G_N_ELEMENTS(letters) + 1),
                  longest = g_rand_int_range(random, 1, 12);
        for (int i = 0; i < n_tokens; i++) {
            GString *text = g_string_new(NULL);
            for (int left = g_rand_int_range(random, 0, longest + 1); left > 0; left--) {
                g_string_append(text, letters[g_rand_int_range(random, 0, n_letters)]);
            }
            g_hash_table_add(tokens, g_string_free(text, FALSE));
        }
        const uint64_t wanted = count_by_looking_up(tokens);
        assert_int_equal(count(tokens), wanted);
        n_all += wanted;
    }
    assert_true(n_all > 1000);
}

static void test_few(void **state)
{
    static const VocabText none[] = {{"ab", 2}, {"b", 1}, {"", 0}},
                           both[] = {{"a", 1}, {"aa", 2}, {"aaa", 3}, {"", 0}};
    assert_int_equal(token_halves_count(NULL, 0), 0);
    assert_int_equal(token_halves_count(none, G_N_ELEMENTS(none)), 0);
    assert_int_equal(token_halves_count(both, G_N_ELEMENTS(both)), 3); /* a a, a aa, aa a */
}

enum { LONG = 8 << 20 };

/* Tokens of 8 MiB in a file: two merges say all. */
static void test_long_token(void **state)
{
    GString *file = g_string_new("{\"model\":{\"type\":\"BPE\",\"byte_fallback\":true,\"vocab\":"
                                 "{\"a\":0,\"b\":1,\"ab\":2,\"");
    g_autofree char *as = g_strnfill(LONG, 'a');
    g_string_append_printf(file, "%s\":3,\"%sb\":4},\"merges\":[\"a b\",\"%s b\"]},", as, as, as);
    g_string_append(file, "\"normalizer\":{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},"
                          "\"content\":\"\xE2\x96\x81\"}}");
    g_autoptr(GError) error = NULL;
    g_autoptr(JsonVocab) v = json_vocab_parse(file->str, file->len, NULL, 0, &error);
    if (v == NULL) {
        fail_msg("%s", error->message);
    }
    assert_int_equal(json_vocab_get(v)->n_tokens, 5);
    g_string_free(file, TRUE);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_few),
        cmocka_unit_test(test_random_vocabularies),
        cmocka_unit_test(test_long_token),
    };
    return cmocka_run_group_tests_name("token_halves", tests, NULL, NULL);
}
