/* Text as it streams: characters across tokens, stop strings across pieces. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include "proto/text/stop.h"
#include "proto/text/tokenizer_vocab.h"
#include "proto/text/utf8.h"

#include <string.h>

#define FFFD "\xEF\xBF\xBD"

/* 256 byte tokens, "</s>", "▁" and "▁a". */
static Tokenizer *byte_tokenizer(void)
{
    static char texts[256][8];
    static VocabText tokens[259];
    static int64_t kinds[259];
    static double scores[259];
    for (unsigned byte = 0; byte < 256; byte++) {
        g_snprintf(texts[byte], sizeof texts[byte], "<0x%02X>", byte);
        tokens[byte] = (VocabText){texts[byte], 6};
        kinds[byte] = TOKEN_BYTE;
    }
    tokens[256] = (VocabText){"</s>", 4};
    kinds[256] = TOKEN_CONTROL;
    tokens[257] = (VocabText){"\xE2\x96\x81", 3};
    tokens[258] = (VocabText){"\xE2\x96\x81"
                              "a",
                              4};
    kinds[257] = kinds[258] = TOKEN_NORMAL;
    TokenizerVocab vocab = {.model = "llama",
                            .n_tokens = 259,
                            .tokens = tokens,
                            .kinds = kinds,
                            .scores = scores,
                            .bos = 256,
                            .eos = 256,
                            .eot = -1,
                            .eom = -1,
                            .unk = -1,
                            .adds_bos = VOCAB_DEFAULT,
                            .space_prefix = SPACE_PREFIX_DEFAULT};
    return tokenizer_from_vocab(&vocab, NULL);
}

static void assert_decoded(const Tokenizer *t, const char *bytes, const char *wanted)
{
    Detokenizer *d = detokenizer_new(t, false);
    g_autoptr(GString) out = g_string_new(NULL);
    for (const char *b = bytes; *b != '\0'; b++) {
        detokenizer_push(d, (uint8_t)*b, out);
        assert_true(g_utf8_validate(out->str, (gssize)out->len, NULL));
        assert_true((size_t)(b - bytes) + 1 <= 3 * out->len + 3);
    }
    detokenizer_finish(d, out);
    assert_string_equal(out->str, wanted);
    detokenizer_free(d);
}

/* Unicode 15, tables 3-8 to 3-11. */
static void ill_formed_bytes_become_one_replacement_per_maximal_subpart(void **state)
{
    g_autoptr(Tokenizer) t = byte_tokenizer();
    assert_decoded(t, "\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41",
                   FFFD FFFD FFFD FFFD FFFD FFFD FFFD FFFD "A");
    assert_decoded(t, "\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41",
                   FFFD FFFD FFFD FFFD FFFD FFFD FFFD FFFD "A");
    assert_decoded(t, "\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42",
                   FFFD FFFD FFFD FFFD FFFD "A" FFFD FFFD "B");
    assert_decoded(t, "\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41", FFFD FFFD FFFD FFFD "A");
    assert_decoded(t, "\xF0\x9F\x98\x80!", "\xF0\x9F\x98\x80!");
    assert_decoded(t, "a\xF0\x9F\x98", "a" FFFD);
    assert_decoded(t, "\xE2\x82", FFFD);
}

static void every_character_round_trips(void **state)
{
    g_autoptr(Tokenizer) t = byte_tokenizer();
    Detokenizer *d = detokenizer_new(t, false);
    for (uint32_t code = 1; code <= 0x10FFFF; code += code >= 0x3000 && code < 0x10F000 ? 97 : 1) {
        char bytes[4];
        uint32_t back = 0;
        size_t n = utf8_encode(code, bytes);
        bool surrogate = code >= 0xD800 && code <= 0xDFFF;
        assert_int_equal(utf8_decode(bytes, n, &back) == (int)n && back == code, !surrogate);
        g_autoptr(GString) out = g_string_new(NULL);
        for (size_t i = 0; i < n && !surrogate && code != ' '; i++) {
            assert_int_equal(out->len, 0);
            detokenizer_push(d, (uint8_t)bytes[i], out);
        }
        if (!surrogate && code != ' ') {
            assert_int_equal(out->len, n);
            assert_memory_equal(out->str, bytes, n);
        }
    }
    detokenizer_free(d);
}

static void the_tokenizers_own_leading_space_is_dropped_once(void **state)
{
    g_autoptr(Tokenizer) t = byte_tokenizer();
    for (int special = 0; special < 2; special++) {
        Detokenizer *d = detokenizer_new(t, special == 1);
        g_autoptr(GString) out = g_string_new(NULL);
        static const uint32_t ids[] = {256, 258, 258, 257, 'b', 256};
        for (size_t i = 0; i < G_N_ELEMENTS(ids); i++) {
            detokenizer_push(d, ids[i], out);
        }
        detokenizer_finish(d, out);
        assert_string_equal(out->str, special ? "</s>a a b</s>" : "a a b");
        detokenizer_free(d);
    }
}

/* ---- stop strings ---- */

/* The definition: the text up to the earliest occurrence of any stop string. */
static size_t stop_position(const char *text, const char *const *stops, unsigned n)
{
    size_t best = strlen(text);
    for (unsigned i = 0; i < n; i++) {
        const char *found = stops[i][0] != '\0' ? strstr(text, stops[i]) : NULL;
        best = found != NULL ? MIN(best, (size_t)(found - text)) : best;
    }
    return best;
}

static void check_stream(GRand *random, const char *text, const char *const *stops, unsigned n)
{
    StopMatcher *m = stop_matcher_new(stops, n);
    g_autoptr(GString) out = g_string_new(NULL);
    size_t length = strlen(text), wanted = stop_position(text, stops, n), longest = 0;
    bool stopped = false;
    for (unsigned i = 0; i < n; i++) {
        longest = MAX(longest, strlen(stops[i]));
    }
    for (size_t at = 0; at < length && !stopped;) {
        size_t piece = (size_t)g_rand_int_range(random, 1, 6);
        piece = MIN(piece, length - at);
        stopped = stop_matcher_push(m, text + at, piece, out);
        at += piece;
        assert_true(
            stopped ||
            out->len + 2 * longest >=
                MIN(at, wanted)); /* no more is held back than may belong to a stop string */
        assert_true(out->len <= wanted);
    }
    assert_true(!stopped || wanted < length);
    stop_matcher_finish(m, out);
    if (out->len != wanted || memcmp(out->str, text, wanted) != 0) {
        fail_msg("\"%s\" gave \"%s\", wanted %zu bytes", text, out->str, wanted);
    }
    stop_matcher_finish(m, out);
    assert_int_equal(stop_matcher_push(m, "x", 1, out), stopped || wanted < length);
    stop_matcher_free(m);
}

static void stop_strings_do_not_depend_on_how_the_stream_is_cut(void **state)
{
    GRand *random = g_rand_new_with_seed(17);
    for (unsigned round = 0; round < 20000; round++) {
        char text[40] = {0}, words[4][8] = {{0}};
        const char *stops[4];
        unsigned n = (unsigned)g_rand_int_range(random, 0, 5);
        for (int i = g_rand_int_range(random, 0, 39) - 1; i >= 0; i--) {
            text[i] = (char)('a' + g_rand_int_range(random, 0, 3));
        }
        for (unsigned s = 0; s < n; s++) {
            for (int i = g_rand_int_range(random, 0, 7) - 1; i >= 0; i--) {
                words[s][i] = (char)('a' + g_rand_int_range(random, 0, 3));
            }
            stops[s] = words[s];
        }
        check_stream(random, text, stops, n);
    }
    g_rand_free(random);
}

static void text_is_given_out_as_soon_as_it_cannot_be_a_stop(void **state)
{
    static const char *const stops[] = {"\n\nUser:", "</s>"};
    StopMatcher *m = stop_matcher_new(stops, 2);
    g_autoptr(GString) out = g_string_new(NULL);
    assert_false(stop_matcher_push(m, "Hi\n", 3, out));
    assert_string_equal(out->str, "Hi");
    assert_false(stop_matcher_push(m, "\nUs", 3, out));
    assert_string_equal(out->str, "Hi");
    assert_false(stop_matcher_push(m, "age", 3, out));
    assert_string_equal(out->str, "Hi\n\nUsage");
    assert_true(stop_matcher_push(m, "</s>more", 8, out));
    assert_true(stop_matcher_push(m, "and more", 8, out));
    stop_matcher_finish(m, out);
    assert_string_equal(out->str, "Hi\n\nUsage");
    stop_matcher_free(m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ill_formed_bytes_become_one_replacement_per_maximal_subpart),
        cmocka_unit_test(every_character_round_trips),
        cmocka_unit_test(the_tokenizers_own_leading_space_is_dropped_once),
        cmocka_unit_test(stop_strings_do_not_depend_on_how_the_stream_is_cut),
        cmocka_unit_test(text_is_given_out_as_soon_as_it_cannot_be_a_stop),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
