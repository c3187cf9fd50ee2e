/* Training data: what each format's files give as ids, targets and documents; bad rows counted and
 * named; windows of documents; long texts cut where no token changes. */
#include "proto/base/error.h"
#include "worker/model/training.h"
#include "worker/train/token_data.h"

#include <glib/gstdio.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

typedef struct World {
    char *directory, *path;
    BpeVocab *vocab;
    Tokenizer *tokenizer; /* few merges: ids of most letters are those of their bytes */
} World;

static int setup(void **state)
{
    static const char text[] = "the cat the cat that";
    World *w = g_new0(World, 1);
    g_autoptr(BpeTrainer) trainer = bpe_trainer_new(NULL);
    w->directory = g_dir_make_tmp("weft-data-XXXXXX", NULL);
    w->path = g_build_filename(w->directory, "data.u32", NULL);
    if (trainer == NULL || !bpe_trainer_add(trainer, text, sizeof text - 1, NULL)) {
        return -1;
    }
    w->vocab = bpe_trainer_finish(trainer, 260, NULL);
    w->tokenizer = tokenizer_from_vocab(bpe_vocab_get(w->vocab), NULL);
    *state = w;
    return w->tokenizer != NULL ? 0 : -1;
}

static int teardown(void **state)
{
    World *w = *state;
    g_unlink(w->path);
    g_rmdir(w->directory);
    g_free(w->directory);
    g_free(w->path);
    tokenizer_free(w->tokenizer);
    bpe_vocab_free(w->vocab);
    g_free(w);
    return 0;
}

static Documents *load(const World *w, const char *text, DocumentOptions options, GError **error)
{
    assert_true(g_file_set_contents(w->path, text, -1, NULL));
    return documents_load(w->path, &options, error);
}

static const DocumentOptions jsonl = {
    .format = DOCUMENT_JSONL, .text = "text", .prompt = "prompt", .response = "response"};

/* ids as letters, upper case where a document begins, in [] where nothing is learnt. */
static char *shown(const Documents *d)
{
    GString *text = g_string_new(NULL);
    for (size_t i = 0; i < d->n; i++) {
        const char letter = (char)d->ids[i];
        g_string_append_printf(text, (d->flags[i] & DOCUMENT_LOSS) != 0 ? "%c" : "[%c]",
                               (d->flags[i] & DOCUMENT_BEGIN) != 0 ? g_ascii_toupper(letter)
                                                                   : letter);
    }
    return g_string_free(text, FALSE);
}

static void check_shown(const World *w, const char *text, DocumentOptions options,
                        const char *wanted)
{
    g_autoptr(GError) error = NULL;
    g_autoptr(Documents) d = load(w, text, options, &error);
    assert_non_null(d);
    g_autofree char *got = shown(d);
    assert_string_equal(got, wanted);
    g_autofree char *report = documents_report(d);
    assert_null(report);
}

static void test_formats(void **state)
{
    const World *w = *state;
    const DocumentOptions plain = {.format = DOCUMENT_TEXT},
                          parted = {.format = DOCUMENT_TEXT, .separator = "--"};
    check_shown(w, "ab--cd", plain, "Ab--cd");
    check_shown(w, "ab--cd--", parted, "AbCd");
    check_shown(w, "----ab---", parted, "Ab-");
    check_shown(w, "{\"text\":\"ab\"}\n\n{\"prompt\":\"cd\",\"response\":\"e\"}\r\n", jsonl,
                "Ab[C][d]e");
    check_shown(w, "{\"prompt\":\"\",\"response\":\"xy\"}", jsonl, "Xy");
    /* Both: the text is the whole row. */
    check_shown(w, "{\"prompt\":\"q\",\"response\":\"r\",\"text\":\"t\"}", jsonl, "T");
}

static void test_end_of_text(void **state)
{
    const World *w = *state;
    DocumentOptions options = jsonl;
    options.tokenizer = w->tokenizer;
    g_autoptr(Documents) d =
        load(w, "{\"prompt\":\"the\",\"response\":\"cat\"}\n{\"text\":\"that\"}", options, NULL);
    const uint32_t eos = (uint32_t)tokenizer_eos(w->tokenizer);
    size_t ends = 0, begins = 0;
    for (size_t i = 0; i < d->n; i++) {
        ends += d->ids[i] == eos && (d->flags[i] & DOCUMENT_LOSS) != 0;
        begins += (d->flags[i] & DOCUMENT_BEGIN) != 0;
        assert_int_equal(i > 0 && d->ids[i - 1] == eos,
                         i > 0 && (d->flags[i] & DOCUMENT_BEGIN) != 0);
    }
    assert_int_equal(ends, 2);
    assert_int_equal(begins, 2);
    assert_int_equal(d->ids[d->n - 1], eos);
    const DocumentOptions plain = {.format = DOCUMENT_TEXT, .tokenizer = w->tokenizer};
    g_autoptr(Documents) one = load(w, "the cat", plain, NULL);
    assert_int_not_equal(one->ids[one->n - 1], eos);
}

static void test_bad_rows(void **state)
{
    const World *w = *state;
    static const char rows[] = "{\"text\":\"ab\"}\n"
                               "not json\n"
                               "{\"text\":7}\n"
                               "\n"
                               "{\"prompt\":\"no response\"}\n"
                               "[\"ab\"]\n"
                               "{\"text\":\"\"}\n"
                               "{\"text\":\"\xff\"}\n"
                               "{\"text\":\"cd\"}";
    g_autoptr(GError) error = NULL;
    g_autoptr(Documents) d = load(w, rows, jsonl, &error);
    assert_non_null(d);
    assert_int_equal(d->rows, 8);
    assert_int_equal(d->bad_rows, 6);
    g_autofree char *text = shown(d), *report = documents_report(d);
    assert_string_equal(text, "AbCd");
    assert_non_null(strstr(report, "6 of 8 rows were left out: line 2: it is no JSON"));
    assert_non_null(strstr(report, "line 3: it has neither a text 'text' nor 'prompt' and "
                                   "'response'"));
    assert_non_null(strstr(report, "line 5: it has neither"));
    assert_non_null(strstr(report, "line 6: it is no JSON object"));
    assert_non_null(strstr(report, "line 7: its text is empty"));
    assert_non_null(strstr(report, "line 8: "));
    assert_null(strchr(report, '\n'));

    DocumentOptions strict = jsonl;
    strict.stop_at_bad = true;
    assert_null(load(w, rows, strict, &error));
    assert_int_equal(error->code, WEFT_ERROR_INVALID);
    assert_non_null(strstr(error->message, "line 2: it is no JSON"));
    g_clear_error(&error);
    assert_null(load(w, "x\ny\n", jsonl, &error));
    assert_non_null(strstr(error->message, "holds nothing to learn: 2 of 2 rows"));
    g_clear_error(&error);
    assert_null(load(w, "", (DocumentOptions){.format = DOCUMENT_TEXT}, &error));
    g_clear_error(&error);
    assert_null(documents_load("/nonexistent", &jsonl, &error));
    assert_int_equal(error->code, WEFT_ERROR_NOT_FOUND);
    g_autoptr(GString) many = g_string_new("{\"text\":\"a\"}\n");
    for (int i = 0; i < 100; i++) {
        g_string_append(many, "?\n");
    }
    g_autoptr(Documents) most = load(w, many->str, jsonl, NULL);
    g_autofree char *first = documents_report(most);
    assert_true(g_str_has_suffix(first, "; and 84 more"));
}

static void test_tokens(void **state)
{
    const World *w = *state;
    const uint32_t eos = (uint32_t)tokenizer_eos(w->tokenizer);
    const uint32_t ids[] = {70000, 5, eos, 6, eos};
    const DocumentOptions options = {.format = DOCUMENT_TOKENS, .tokenizer = w->tokenizer};
    g_autoptr(GError) error = NULL;
    assert_true(g_file_set_contents(w->path, (const char *)ids, sizeof ids, NULL));
    g_autoptr(Documents) d = documents_load(w->path, &options, &error);
    assert_int_equal(d->n, 5);
    assert_memory_equal(d->ids, ids, sizeof ids);
    static const uint8_t flags[] = {3, 1, 1, 3, 1};
    assert_memory_equal(d->flags, flags, sizeof flags);
    assert_true(g_file_set_contents(w->path, (const char *)ids, 7, NULL));
    assert_null(documents_load(w->path, &options, &error));
    assert_int_equal(error->code, WEFT_ERROR_INVALID);

    g_autofree char *narrow = g_build_filename(w->directory, "data.bin", NULL);
    assert_true(g_file_set_contents(narrow, "\x01\x02\xff\x00", 4, NULL));
    g_autoptr(Documents) small = documents_load(narrow, &options, NULL);
    assert_int_equal(small->n, 2);
    assert_int_equal(small->ids[0], 0x0201);
    assert_int_equal(small->ids[1], 0xff);
    g_unlink(narrow);
    g_autoptr(BpeTrainer) trainer = bpe_trainer_new(NULL);
    assert_false(documents_count_words(w->path, &options, trainer, NULL));
}

/* ---- windows ---- */

static void check_window(const TokenData *d, uint64_t window, const char *tokens,
                         const char *targets, const char *begins)
{
    uint32_t t[4], y[4], s[4];
    token_data_read(d, window, t, y);
    token_data_begins(d, window, s);
    for (int i = 0; i < 4; i++) {
        assert_int_equal(t[i], tokens[i] == '.' ? 0 : (uint32_t)tokens[i]);
        assert_int_equal(y[i], targets[i] == '.' ? TARGET_NONE : (uint32_t)targets[i]);
        assert_int_equal(s[i], begins[i] - '0');
    }
}

static void test_packing(void **state)
{
    const World *w = *state;
    const DocumentOptions parted = {.format = DOCUMENT_TEXT, .separator = "-"};
    g_autoptr(Documents) d = load(w, "ab-cd-efg-hijklmno-p-q", parted, NULL);
    g_autoptr(TokenData) packed = token_data_from(d, 4, TOKENS_DOCUMENTS, NULL);
    assert_int_equal(token_data_windows(packed), 5);
    check_window(packed, 0, "abcd", "b.d.", "0022");
    check_window(packed, 1, "efg.", "fg..", "0003");
    check_window(packed, 2, "hijk", "ijkl", "0000");
    check_window(packed, 3, "lmno", "mno.", "0000");
    check_window(packed, 4, "pq..", "....", "0122");

    g_autoptr(TokenData) stream = token_data_from(d, 4, TOKENS_STREAM, NULL);
    assert_int_equal(token_data_windows(stream), (d->n - 1) / 4);
    check_window(stream, 0, "abcd", "bcde", "0022");
    check_window(stream, 1, "efgh", "fghi", "0003");

    g_autoptr(Documents) masked =
        load(w, "{\"prompt\":\"ab\",\"response\":\"cd\"}\n{\"prompt\":\"e\",\"response\":\"f\"}",
             jsonl, NULL);
    g_autoptr(TokenData) m = token_data_from(masked, 4, TOKENS_DOCUMENTS, NULL);
    check_window(m, 0, "abcd", ".cd.", "0000");
    check_window(m, 1, "ef..", "f...", "0022");
    g_autoptr(TokenData) s = token_data_from(masked, 4, TOKENS_STREAM, NULL);
    check_window(s, 0, "abcd", ".cd.", "0000");
    g_autoptr(GError) error = NULL;
    assert_null(token_data_from(masked, 6, TOKENS_STREAM, &error));
    assert_int_equal(error->code, WEFT_ERROR_INVALID);
    assert_null(token_data_from(masked, 0, TOKENS_DOCUMENTS, NULL));
}

/* Each window once an epoch, whatever the packing; no order twice. */
static void test_order(void **state)
{
    const World *w = *state;
    const DocumentOptions parted = {.format = DOCUMENT_TEXT, .separator = "-"};
    g_autoptr(Documents) d = load(w, "abc-def-ghi-jkl-mno-pqr-stu-vwx-yz", parted, NULL);
    g_autoptr(TokenData) packed = token_data_from(d, 4, TOKENS_DOCUMENTS, NULL);
    const uint64_t n = token_data_windows(packed);
    assert_int_equal(n, 9);
    for (uint64_t epoch = 0; epoch < 20; epoch++) {
        uint64_t seen = 0;
        for (uint64_t i = 0; i < n; i++) {
            seen |= UINT64_C(1) << token_data_window_of(packed, 3, epoch * n + i);
        }
        assert_int_equal(seen, (UINT64_C(1) << n) - 1);
    }
}

/* ---- long texts ---- */

static void test_cuts_change_no_token(void **state)
{
    const World *w = *state;
    g_autoptr(GRand) random = g_rand_new_with_seed(5);
    static const char *const pieces[] = {"the", " cat", "that", "\n",   "\n",  "\n\n", " ",   "  ",
                                         ".\n", "\r\n", "é",    "it's", " 12", "\t",   "a\nb"};
    for (int turn = 0; turn < 50; turn++) {
        g_autoptr(GString) text = g_string_new(NULL);
        while (text->len < 600) {
            g_string_append(text, pieces[g_rand_int_range(random, 0, G_N_ELEMENTS(pieces))]);
            g_string_append(text, g_rand_int_range(random, 0, 8) == 0 ? "x\ny" : "");
        }
        g_autoptr(GArray) whole =
            tokenizer_encode(w->tokenizer, text->str, text->len, false, false, NULL);
        g_autoptr(GArray) parts = g_array_new(FALSE, FALSE, sizeof(uint32_t));
        unsigned cuts = 0;
        for (size_t at = 0, n; at < text->len; at += n) {
            n = documents_cut(text->str + at, text->len - at, 300);
            cuts += at > 0;
            g_autoptr(GArray) ids =
                tokenizer_encode(w->tokenizer, text->str + at, n, false, false, NULL);
            g_array_append_vals(parts, ids->data, ids->len);
        }
        assert_true(cuts > 0);
        assert_int_equal(parts->len, whole->len);
        assert_memory_equal(parts->data, whole->data, whole->len * sizeof(uint32_t));
    }
    /* Without a line's end: at a character. */
    g_autofree char *accents = g_strnfill(9, '\xc3');
    for (int i = 1; i < 9; i += 2) {
        accents[i] = '\xa9';
    }
    assert_int_equal(documents_cut(accents, 8, 5), 4);
    assert_int_equal(documents_cut("abc", 3, 5), 3);
}

static void test_words(void **state)
{
    const World *w = *state;
    g_autoptr(BpeTrainer) a = bpe_trainer_new(NULL), b = bpe_trainer_new(NULL);
    static const char text[] = "the cat\nthe hat\nthe cat\n";
    assert_true(g_file_set_contents(w->path, text, -1, NULL));
    const DocumentOptions plain = {.format = DOCUMENT_TEXT};
    assert_true(documents_count_words(w->path, &plain, a, NULL));
    assert_true(bpe_trainer_add(b, text, sizeof text - 1, NULL));
    g_autoptr(BpeVocab) x = bpe_trainer_finish(a, 300, NULL), y = bpe_trainer_finish(b, 300, NULL);
    assert_int_equal(bpe_vocab_get(x)->n_merges, bpe_vocab_get(y)->n_merges);
    assert_true(bpe_vocab_get(x)->n_merges > 0);
}

#define CASE(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(test_formats),
        CASE(test_end_of_text),
        CASE(test_bad_rows),
        CASE(test_tokens),
        CASE(test_packing),
        CASE(test_order),
        CASE(test_cuts_change_no_token),
        CASE(test_words),
    };
    return cmocka_run_group_tests_name("train_data", tests, NULL, NULL);
}
