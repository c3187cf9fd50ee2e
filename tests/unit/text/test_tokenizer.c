/* Vocabularies filled by hand: special tokens, refusals, failing allocations, long words. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "proto/text/byte_alphabet.h"
#include "proto/text/nfc.h"
#include "proto/text/tokenizer_vocab.h"
#include "proto/text/utf8.h"

#include <math.h>
#include <string.h>
#include <utf8proc.h>

typedef struct HandVocab {
    TokenizerVocab vocab;
    GArray *tokens, *merges, *kinds, *scores;
    GPtrArray *texts;
} HandVocab;

static VocabText keep(HandVocab *h, const char *text)
{
    g_ptr_array_add(h->texts, g_strdup(text));
    return (VocabText){g_ptr_array_index(h->texts, h->texts->len - 1), strlen(text)};
}

static uint32_t add_token(HandVocab *h, const char *text, TokenKind kind, double score)
{
    VocabText copy = keep(h, text);
    int64_t wide = kind;
    g_array_append_val(h->tokens, copy);
    g_array_append_val(h->kinds, wide);
    g_array_append_val(h->scores, score);
    return h->tokens->len - 1;
}

static void add_merge(HandVocab *h, const char *merge)
{
    VocabText copy = keep(h, merge);
    g_array_append_val(h->merges, copy);
}

static HandVocab *hand_new(const char *model)
{
    HandVocab *h = g_new0(HandVocab, 1);
    h->tokens = g_array_new(FALSE, FALSE, sizeof(VocabText));
    h->merges = g_array_new(FALSE, FALSE, sizeof(VocabText));
    h->kinds = g_array_new(FALSE, FALSE, sizeof(int64_t));
    h->scores = g_array_new(FALSE, FALSE, sizeof(double));
    h->texts = g_ptr_array_new_with_free_func(g_free);
    h->vocab = (TokenizerVocab){.model = model,
                                .bos = -1,
                                .eos = -1,
                                .eot = -1,
                                .eom = -1,
                                .unk = -1,
                                .adds_bos = VOCAB_DEFAULT,
                                .space_prefix = SPACE_PREFIX_DEFAULT};
    return h;
}

static void hand_free(HandVocab *h)
{
    g_array_free(h->tokens, TRUE);
    g_array_free(h->merges, TRUE);
    g_array_free(h->kinds, TRUE);
    g_array_free(h->scores, TRUE);
    g_ptr_array_unref(h->texts);
    g_free(h);
}
G_DEFINE_AUTOPTR_CLEANUP_FUNC(HandVocab, hand_free)

static Tokenizer *hand_build(HandVocab *h, GError **error)
{
    h->vocab.tokens = (const VocabText *)(void *)h->tokens->data;
    h->vocab.n_tokens = h->tokens->len;
    h->vocab.merges = (const VocabText *)(void *)h->merges->data;
    h->vocab.n_merges = h->merges->len;
    h->vocab.kinds =
        h->vocab.kinds != NULL ? h->vocab.kinds : (const int64_t *)(void *)h->kinds->data;
    h->vocab.scores =
        h->vocab.scores != NULL ? h->vocab.scores : (const double *)(void *)h->scores->data;
    return tokenizer_from_vocab(&h->vocab, error);
}

/* 256 bytes (ids 0..255), a few merges, special tokens from 260 on. */
enum {
    ID_AB = 256,
    ID_ABAB = 257,
    ID_SPACE_A = 258,
    ID_LONG = 259,
    ID_IM_START = 260,
    ID_IM = 261,
    ID_IM_END = 262,
    ID_SEP = 263,
    ID_EOT = 264
};

static HandVocab *bpe_vocab(void)
{
    HandVocab *h = hand_new("gpt2");
    h->vocab.pre = "gpt-2";
    for (unsigned byte = 0; byte < 256; byte++) {
        char text[5] = {0};
        utf8_encode(byte_alphabet_char((uint8_t)byte), text);
        add_token(h, text, TOKEN_NORMAL, 0);
    }
    add_token(h, "ab", TOKEN_NORMAL, 0);
    add_token(h, "abab", TOKEN_NORMAL, 0);
    add_token(h,
              "\xC4\xA0"
              "a",
              TOKEN_NORMAL, 0);
    add_token(h, "zzzz", TOKEN_NORMAL, 0);
    add_token(h, "<|im_start|>", TOKEN_CONTROL, 0);
    add_token(h, "<|im", TOKEN_CONTROL, 0);
    add_token(h, "<|im_end|>", TOKEN_CONTROL, 0);
    add_token(h, "<sep>", TOKEN_USER_DEFINED, 0);
    add_token(h, "<|eot_id|>", TOKEN_CONTROL, 0);
    add_merge(h, "a b");
    add_merge(h, "ab ab");
    add_merge(h, "\xC4\xA0 a");
    h->vocab.eos = ID_IM_END;
    return h;
}

static void assert_ids(const Tokenizer *t, const char *text, bool parse_special,
                       const uint32_t *wanted, unsigned n)
{
    g_autoptr(GError) error = NULL;
    g_autoptr(GArray) ids = tokenizer_encode(t, text, strlen(text), false, parse_special, &error);
    assert_non_null(ids);
    if (ids->len != n || memcmp(ids->data, wanted, n * sizeof *wanted) != 0) {
        fail_msg("\"%s\" gave %u ids, the first %u", text, ids->len,
                 ids->len > 0 ? g_array_index(ids, uint32_t, 0) : 0);
    }
}
#define ASSERT_IDS(t, text, special, ...)                                                          \
    assert_ids(t, text, special, (const uint32_t[]){__VA_ARGS__},                                  \
               sizeof((const uint32_t[]){__VA_ARGS__}) / sizeof(uint32_t))

static void merges_go_best_first_then_leftmost(void **state)
{
    g_autoptr(HandVocab) h = bpe_vocab();
    g_autoptr(Tokenizer) t = hand_build(h, NULL);
    assert_non_null(t);
    ASSERT_IDS(t, "ab", false, ID_AB);
    ASSERT_IDS(t, "ababab", false, ID_ABAB, ID_AB);
    ASSERT_IDS(t, "aab", false, 'a', ID_AB);
    ASSERT_IDS(t, "x ab", false, 'x', ' ', ID_AB); /* "a b" stands before "Ġ a" */
    ASSERT_IDS(t, "x a", false, 'x', ID_SPACE_A);
    ASSERT_IDS(t, "zzzz", false, 'z', 'z', 'z', 'z'); /* no merge makes it */
}

static void special_tokens_are_cut_out_leftmost_longest(void **state)
{
    g_autoptr(HandVocab) h = bpe_vocab();
    g_autoptr(Tokenizer) t = hand_build(h, NULL);
    ASSERT_IDS(t, "a<|im_end|>b", true, 'a', ID_IM_END, 'b');
    ASSERT_IDS(t, "<|im_e", true, ID_IM, '_', 'e');
    ASSERT_IDS(t, "<<|im_start|>", true, '<', ID_IM_START);
    ASSERT_IDS(t, "<|im", false, '<', '|', 'i', 'm');
    ASSERT_IDS(t, "a<sep>b", false, 'a', ID_SEP, 'b');
    g_autoptr(GArray) none = tokenizer_encode(t, "", 0, true, true, NULL);
    assert_int_equal(none->len, 0);
}

static void words_that_are_tokens_ignore_merges_for_llama3(void **state)
{
    g_autoptr(HandVocab) h = bpe_vocab();
    h->vocab.pre = "llama-bpe";
    h->vocab.bos = ID_IM_START;
    g_autoptr(Tokenizer) t = hand_build(h, NULL);
    assert_true(tokenizer_adds_bos(t));
    ASSERT_IDS(t, "zzzz", false, ID_LONG);
    ASSERT_IDS(t, "zzzzz", false, 'z', 'z', 'z', 'z', 'z');
    g_autoptr(GArray) ids = tokenizer_encode(t, "x", 1, true, false, NULL);
    assert_int_equal(ids->len, 2);
    assert_int_equal(g_array_index(ids, uint32_t, 0), ID_IM_START);
}

static void end_ids_are_eos_and_named_control_tokens(void **state)
{
    g_autoptr(HandVocab) h = bpe_vocab();
    g_autoptr(Tokenizer) t = hand_build(h, NULL);
    uint32_t n;
    const uint32_t *ids = tokenizer_end_ids(t, &n);
    assert_int_equal(n, 2);
    assert_int_equal(ids[0], ID_IM_END);
    assert_int_equal(ids[1], ID_EOT);
    assert_true(tokenizer_is_control(t, ID_IM));
    assert_false(tokenizer_is_control(t, ID_SEP));
    assert_false(tokenizer_is_control(t, 100000));
    assert_int_equal(tokenizer_eos(t), ID_IM_END);
    assert_int_equal(tokenizer_bos(t), -1);
}

static void pieces_are_the_bytes_of_text(void **state)
{
    g_autoptr(HandVocab) h = bpe_vocab();
    g_autoptr(Tokenizer) t = hand_build(h, NULL);
    size_t n;
    assert_memory_equal(tokenizer_piece(t, ID_SPACE_A, false, &n), " a", 2);
    assert_int_equal(n, 2);
    tokenizer_piece(t, ID_IM_END, false, &n);
    assert_int_equal(n, 0);
    assert_memory_equal(tokenizer_piece(t, ID_IM_END, true, &n), "<|im_end|>", 10);
    for (unsigned byte = 0; byte < 256; byte++) {
        const char *piece = tokenizer_piece(t, byte, false, &n);
        assert_int_equal(n, 1);
        assert_int_equal((uint8_t)piece[0], byte);
        assert_int_equal(byte_alphabet_byte(byte_alphabet_char((uint8_t)byte)), byte);
    }
    tokenizer_piece(t, UINT32_MAX, true, &n);
    assert_int_equal(n, 0);
}

static HandVocab *spm_vocab(const char *byte_token)
{
    HandVocab *h = hand_new("llama");
    add_token(h, "<unk>", TOKEN_UNKNOWN, 0);
    add_token(h, "<s>", TOKEN_CONTROL, 0);
    add_token(h, "</s>", TOKEN_CONTROL, 0);
    add_token(h, "\xE2\x96\x81", TOKEN_NORMAL, -5);
    add_token(h, "a", TOKEN_NORMAL, -3);
    add_token(h,
              "\xE2\x96\x81"
              "a",
              TOKEN_NORMAL, -1);
    add_token(h, byte_token, TOKEN_BYTE, 0);
    h->vocab.bos = 1;
    h->vocab.eos = 2;
    return h;
}

static void sentencepiece_spells_missing_text_in_bytes_or_unknown(void **state)
{
    g_autoptr(HandVocab) h = spm_vocab("<0xFF>");
    g_autoptr(Tokenizer) t = hand_build(h, NULL);
    assert_non_null(t);
    ASSERT_IDS(t, "a", false, 5);
    ASSERT_IDS(t, "a a", false, 5, 5);
    ASSERT_IDS(t, "a\xFF\xFF", false, 5, 6, 6);
    ASSERT_IDS(t, "xyz", false, 3, 0); /* one unknown for the run */
    ASSERT_IDS(t, "<s>", false, 3, 0); /* text, not the control token */
}

static void sentencepiece_control_tokens_only_when_parsed(void **state)
{
    g_autoptr(HandVocab) h = spm_vocab("<0x0A>");
    g_autoptr(Tokenizer) t = hand_build(h, NULL);
    ASSERT_IDS(t, "<s>a", true, 1, 5);
    ASSERT_IDS(t, "a\n", false, 5, 6);
    g_autoptr(GArray) ids = tokenizer_encode(t, "a", 1, true, false, NULL);
    assert_int_equal(g_array_index(ids, uint32_t, 0), 1);
}

static void assert_refused(HandVocab *h, const char *named)
{
    g_autoptr(GError) error = NULL;
    g_autoptr(Tokenizer) t = hand_build(h, &error);
    assert_null(t);
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
    if (strstr(error->message, named) == NULL) {
        fail_msg("\"%s\" does not name %s", error->message, named);
    }
}

static void what_is_not_known_is_refused_by_name(void **state)
{
    static const char *const bytes[] = {"<0x-1>",  "<0xGG>", "<0x1>", "0x41",
                                        "<0x041>", "",       "<0x4 >"};
    for (size_t i = 0; i < G_N_ELEMENTS(bytes); i++) {
        g_autoptr(HandVocab) h = spm_vocab(bytes[i]);
        assert_refused(h, "type byte");
    }
    g_autoptr(HandVocab) pre = bpe_vocab();
    pre->vocab.pre = "quantum";
    assert_refused(pre, "gpt-2, smollm");
    pre->vocab.pre = NULL;
    assert_refused(pre, "tokenizer.ggml.pre");
    g_autoptr(HandVocab) model = bpe_vocab();
    model->vocab.model = "bert";
    assert_refused(model, "bert");
    g_autoptr(HandVocab) id = bpe_vocab();
    id->vocab.eos = 100000;
    assert_refused(id, "eos_token_id is 100000");
    g_autoptr(HandVocab) bos = spm_vocab("<0x00>");
    bos->vocab.bos = -1;
    assert_refused(bos, "BOS");
    g_autoptr(HandVocab) kind = bpe_vocab();
    add_token(kind, "x", 9, 0);
    assert_refused(kind, "token_type");
    g_autoptr(HandVocab) score = spm_vocab("<0x00>");
    add_token(score, "x", TOKEN_NORMAL, NAN);
    assert_refused(score, "scores[7]");
    g_autoptr(HandVocab) prefix = bpe_vocab();
    prefix->vocab.space_prefix = SPACE_PREFIX_ALWAYS;
    assert_refused(prefix, "add_space_prefix");
    g_autoptr(HandVocab) empty = hand_new("gpt2");
    assert_refused(empty, "0 tokens");
}

static void broken_merges_and_tokens_are_refused(void **state)
{
    static const char *const merges[] = {"a",     "ab", "a  b", "a nothere", "nothere a",
                                         "z z z", " ",  "",     "a "};
    for (size_t i = 0; i < G_N_ELEMENTS(merges); i++) {
        g_autoptr(HandVocab) h = bpe_vocab();
        add_merge(h, merges[i]);
        assert_refused(h, "merges[3]");
    }
    g_autoptr(HandVocab) h = bpe_vocab();
    g_autofree char *text = g_strnfill(5000, 'x');
    add_token(h, text, TOKEN_NORMAL, 0);
    assert_refused(h, "5000 bytes");
    g_autoptr(HandVocab) ok = bpe_vocab();
    g_autoptr(Tokenizer) t = hand_build(ok, NULL);
    g_autoptr(GError) error = NULL;
    assert_null(
        tokenizer_encode(t, "x", SIZE_MAX, false, false, &error)); /* refused before it is read */
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
}

static void every_allocation_may_fail(void **state)
{
    g_autoptr(HandVocab) h = bpe_vocab();
    h->vocab.pre = "qwen2";
    unsigned n_failures = 0;
    for (int64_t nth = 0;; nth++) {
        g_autoptr(GError) error = NULL;
        weft_alloc_fail_after(nth);
        g_autoptr(Tokenizer) t = hand_build(h, &error);
        g_autoptr(GArray) ids =
            t != NULL ? tokenizer_encode(t, "ab e\xCC\x81", 6, false, false, &error) : NULL;
        weft_alloc_fail_after(-1);
        if (ids != NULL) {
            break;
        }
        assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_MEMORY));
        n_failures++;
    }
    assert_true(n_failures >= 7);
}

/* Without a heap or with recursion this takes minutes or the stack. */
static void a_megabyte_without_a_break_is_no_problem(void **state)
{
    g_autoptr(HandVocab) h = bpe_vocab(), s = spm_vocab("<0xFF>");
    g_autoptr(Tokenizer) bpe = hand_build(h, NULL), spm = hand_build(s, NULL);
    size_t n = 1 << 20;
    g_autoptr(GString) text = g_string_sized_new(n);
    while (text->len < n) {
        g_string_append(text, "ab");
    }
    g_autoptr(GArray) a = tokenizer_encode(bpe, text->str, n, false, false, NULL),
                      b = tokenizer_encode(spm, text->str, n, false, false, NULL);
    assert_int_equal(a->len, n / 4);
    assert_int_equal(b->len, n);
    memset(text->str, '\xFF', n);
    g_autoptr(GArray) c = tokenizer_encode(bpe, text->str, n, false, false, NULL),
                      d = tokenizer_encode(spm, text->str, n, false, false, NULL);
    assert_int_equal(c->len, n);
    assert_int_equal(d->len, n + 1);
}

static void assert_too_long(const Tokenizer *t, const char *text, bool parse_special, uint32_t most)
{
    g_autoptr(GError) error = NULL;
    GArray *ids = tokenizer_encode_most(t, text, strlen(text), false, parse_special, most, &error);
    assert_null(ids);
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_TOO_LONG));
}

static void assert_length(const Tokenizer *t, const char *text, uint32_t most, unsigned n)
{
    g_autoptr(GArray) ids = tokenizer_encode_most(t, text, strlen(text), false, true, most, NULL);
    assert_non_null(ids);
    assert_int_equal(ids->len, n);
}

/* The longest token has 12 bytes. */
static void far_too_many_tokens_are_not_counted(void **state)
{
    g_autoptr(HandVocab) h = bpe_vocab(), s = spm_vocab("<0xFF>");
    for (unsigned byte = 0; byte < 255; byte++) {
        g_autofree char *name = g_strdup_printf("<0x%02X>", byte);
        add_token(s, name, TOKEN_BYTE, 0);
    }
    g_autoptr(Tokenizer) bpe = hand_build(h, NULL), spm = hand_build(s, NULL);
    assert_length(bpe, "x1x1x", 3, 5); /* a few too many are */
    assert_length(bpe, "x1x1x1x1x1x1x", 3, 13);
    assert_too_long(bpe, "x1x1x1x1x1x1x1", false, 3);
    assert_length(bpe, "x1x1x1x1x1x1x1", 0, 14);
    g_autofree char *word = g_strnfill(47, 'x'), *longer = g_strnfill(48, 'x');
    assert_length(bpe, word, 3, 47);
    assert_too_long(bpe, longer, false, 3); /* before it is merged */
    assert_too_long(bpe, "<sep><sep><sep><sep><sep><sep><sep><sep><sep><sep><sep><sep><sep><sep>",
                    true, 3);
    assert_too_long(spm, longer, false, 3);
    assert_length(spm, longer, 0, 49);
}

/* Where bytes are dropped a long text may be few tokens. */
static void dropped_bytes_are_no_tokens(void **state)
{
    g_autoptr(HandVocab) h = bpe_vocab();
    g_array_index(h->tokens, VocabText, 'q') = keep(h, "other");
    g_autoptr(Tokenizer) t = hand_build(h, NULL);
    g_autofree char *word = g_strnfill(1000, 'q');
    assert_length(t, word, 3, 0);
}

static void assert_nfc(const char *text)
{
    g_autoptr(GString) out = g_string_new(NULL);
    assert_true(nfc_append(text, strlen(text), out, NULL));
    utf8proc_uint8_t *wanted = utf8proc_NFC((const utf8proc_uint8_t *)text);
    assert_string_equal(out->str, (const char *)wanted);
    free(wanted);
}

static void normal_form_is_the_unicode_one(void **state)
{
    static const uint32_t codes[] = {'a',    'e',     0x301,  0x316,  0x327,  0x345, 0x1F82,
                                     0x390,  0x1112,  0x1161, 0x11AB, 0xD55C, 0x958, 0x2126,
                                     0x212B, 0x1D160, 0xF900, 0x3042, 0x3099, 0x5B0, 0x5C1};
    GRand *random = g_rand_new_with_seed(5);
    for (unsigned round = 0; round < 2000; round++) {
        g_autoptr(GString) text = g_string_new(NULL);
        for (int i = g_rand_int_range(random, 1, 12); i > 0; i--) {
            char bytes[4];
            g_string_append_len(
                text, bytes,
                (gssize)utf8_encode(codes[g_rand_int_range(random, 0, G_N_ELEMENTS(codes))],
                                    bytes));
        }
        assert_nfc(text->str);
    }
    g_rand_free(random);
    g_autoptr(GString) marks = g_string_new("a"), out = g_string_new(NULL);
    for (unsigned i = 0; i < 300000; i++) { /* quadratic when sorted by exchange */
        g_string_append(marks, i % 2 == 0 ? "\xCC\x81" : "\xCC\x96");
    }
    assert_true(nfc_append(marks->str, marks->len, out, NULL));
    assert_int_equal(out->len,
                     marks->len - 1); /* "a" and one acute became one letter of two bytes */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(merges_go_best_first_then_leftmost),
        cmocka_unit_test(special_tokens_are_cut_out_leftmost_longest),
        cmocka_unit_test(words_that_are_tokens_ignore_merges_for_llama3),
        cmocka_unit_test(end_ids_are_eos_and_named_control_tokens),
        cmocka_unit_test(pieces_are_the_bytes_of_text),
        cmocka_unit_test(sentencepiece_spells_missing_text_in_bytes_or_unknown),
        cmocka_unit_test(sentencepiece_control_tokens_only_when_parsed),
        cmocka_unit_test(what_is_not_known_is_refused_by_name),
        cmocka_unit_test(broken_merges_and_tokens_are_refused),
        cmocka_unit_test(every_allocation_may_fail),
        cmocka_unit_test(a_megabyte_without_a_break_is_no_problem),
        cmocka_unit_test(far_too_many_tokens_are_not_counted),
        cmocka_unit_test(dropped_bytes_are_no_tokens),
        cmocka_unit_test(normal_form_is_the_unicode_one),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
