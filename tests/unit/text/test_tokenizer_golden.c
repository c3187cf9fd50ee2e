/* Ids and words against the references that tests/golden/text/make_tokenizer.py ran (packages
 * tokenizers and sentencepiece). */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include "proto/text/pre_tokenizer.h"
#include "proto/text/tokenizer.h"
#include "proto/text/tokenizer_json.h"
#include "tests/unit/text/golden.h"

static bool collect_word(void *user, const char *word, size_t length, GError **error)
{
    uint32_t n = (uint32_t)length;
    g_array_append_val((GArray *)user, n);
    return true;
}

static bool same_numbers(const GArray *a, const GArray *b)
{
    return a->len == b->len &&
           (a->len == 0 || memcmp(a->data, b->data, a->len * sizeof(uint32_t)) == 0);
}

static void check_words(PreTokenizer *pre, const char *name, const char *line)
{
    const char *space = strchr(line, ' ');
    g_autoptr(GBytes) text = golden_hex(line, (size_t)(space - line));
    g_autoptr(GArray) wanted = golden_numbers(space + 1),
                      got = g_array_new(FALSE, FALSE, sizeof(uint32_t));
    g_autoptr(GError) error = NULL;
    PreTokenizerScratch *scratch = pre_tokenizer_scratch_new(NULL);
    bool ok = pre_tokenizer_split(pre, scratch, g_bytes_get_data(text, NULL),
                                  g_bytes_get_size(text), collect_word, got, &error);
    pre_tokenizer_scratch_free(scratch);
    assert_true(ok);
    if (!same_numbers(got, wanted)) {
        fail_msg("%s cuts %s into other words", name, line);
    }
}

static void words_are_the_references(void **state)
{
    static const char *const names[] = {"gpt-2",          "smollm",      "llama-bpe", "qwen2",
                                        "deepseek-coder", "deepseek-v3", "default"};
    for (size_t i = 0; i < G_N_ELEMENTS(names); i++) {
        g_autofree char *file = g_strdup_printf("words-%s.txt", names[i]), *all = golden_read(file);
        g_auto(GStrv) lines = g_strsplit(all, "\n", -1);
        PreTokenizer *pre = pre_tokenizer_new(names[i], NULL);
        assert_non_null(pre);
        unsigned n = 0;
        for (char **line = lines; *line != NULL && **line != '\0'; line++, n++) {
            check_words(pre, names[i], *line);
        }
        assert_true(n > 250);
        pre_tokenizer_free(pre);
    }
}

static void check_detokenized(const Tokenizer *t, const GArray *ids, GBytes *text, const char *line)
{
    Detokenizer *d = detokenizer_new(t, true);
    g_autoptr(GString) out = g_string_new(NULL);
    for (guint i = 0; i < ids->len; i++) {
        detokenizer_push(d, g_array_index(ids, uint32_t, i), out);
    }
    detokenizer_finish(d, out);
    detokenizer_free(d);
    if (out->len != g_bytes_get_size(text) ||
        (out->len > 0 && memcmp(out->str, g_bytes_get_data(text, NULL), out->len) != 0)) {
        fail_msg("ids of %.200s do not give the text back", line);
    }
}

static void check_ids(const Tokenizer *t, const char *file, const char *line, bool round_trip)
{
    const char *space = strchr(line + 2, ' ');
    g_autoptr(GBytes) text = golden_hex(line + 2, (size_t)(space - line - 2));
    g_autoptr(GArray) wanted = golden_numbers(space + 1);
    g_autoptr(GError) error = NULL;
    const char *bytes = g_bytes_get_data(text, NULL);
    g_autoptr(GArray) got = tokenizer_encode(t, bytes != NULL ? bytes : "", g_bytes_get_size(text),
                                             false, line[0] == 'p', &error);
    assert_non_null(got);
    if (!same_numbers(got, wanted)) {
        g_autoptr(GString) shown = g_string_new(NULL);
        for (guint i = 0; i < MIN(got->len, 40); i++) {
            g_string_append_printf(shown, " %u", g_array_index(got, uint32_t, i));
        }
        fail_msg("%s: %.400s: got%s", file, line, shown->str);
    }
    if (round_trip &&
        g_utf8_validate_len(bytes != NULL ? bytes : "", g_bytes_get_size(text), NULL)) {
        check_detokenized(t, got, text, line);
    }
}

static void check_all_ids(const Tokenizer *t, const char *ids_name, bool round_trip)
{
    g_autofree char *all = golden_read(ids_name);
    g_auto(GStrv) lines = g_strsplit(all, "\n", -1);
    unsigned n = 0;
    for (char **line = lines; *line != NULL && **line != '\0'; line++, n++) {
        check_ids(t, ids_name, *line, round_trip);
    }
    assert_true(n > 100);
}

static void check_file(const char *gguf_path, const char *ids_name, bool round_trip)
{
    g_autoptr(GError) error = NULL;
    g_autoptr(Gguf) gguf = gguf_open(gguf_path, &error);
    if (gguf == NULL) {
        fail_msg("%s: %s", gguf_path, error->message);
    }
    g_autoptr(Tokenizer) t = tokenizer_from_gguf(gguf, &error);
    if (t == NULL) {
        fail_msg("%s: %s", gguf_path, error->message);
    }
    check_all_ids(t, ids_name, round_trip);
}

static void ids_are_the_references(void **state)
{
    static const struct {
        const char *name;
        bool round_trip; /* not where texts are normalized or characters become unknown */
    } models[] = {{"bpe-gpt-2", true},       {"bpe-llama-bpe", true}, {"bpe-qwen2", false},
                  {"bpe-deepseek-v3", true}, {"spm-bytes", false},    {"spm-unknown", false},
                  {"spm-unused", false}};
    for (size_t i = 0; i < G_N_ELEMENTS(models); i++) {
        g_autofree char *gguf = g_strdup_printf("%s/%s.gguf", GOLDEN_DIR, models[i].name),
                        *ids = g_strdup_printf("%s.ids", models[i].name);
        check_file(gguf, ids, models[i].round_trip);
    }
}

/* SentencePiece's vocabularies as tokenizer.json has them, by how spaces are marked. */
static void ids_of_json_are_the_references(void **state)
{
    static const char *const rules[] = {"prepend", "replace", "first"};
    for (size_t i = 0; i < G_N_ELEMENTS(rules); i++) {
        g_autofree char *path = g_strdup_printf("%s/spm-json-%s.json", GOLDEN_DIR, rules[i]),
                        *ids = g_strdup_printf("spm-json-%s.ids", rules[i]);
        g_autoptr(GError) error = NULL;
        g_autoptr(JsonVocab) v = json_vocab_load(path, &error);
        g_autoptr(Tokenizer) t = v != NULL ? tokenizer_from_vocab(json_vocab_get(v), &error) : NULL;
        if (t == NULL) {
            fail_msg("%s: %s", path, error->message);
        }
        check_all_ids(t, ids, false);
    }
}

static const char *model_path, *model_ids;

static void model_file_ids(void **state)
{
    check_file(model_path, model_ids, false);
}

enum { EXIT_SKIP = 77 };

/* The run with an argument: a real model's ids, if there is a model. cmocka's own skip reads as a
 * failure in TAP, so this run goes by its exit code. */
static int real_model_ids_are_the_references(void)
{
    const char *path =
        g_getenv("WEFT_TEST_MODEL") != NULL ? g_getenv("WEFT_TEST_MODEL") : g_getenv("WEFT_MODEL");
    if (path == NULL) {
        print_message("skipped: neither WEFT_TEST_MODEL nor WEFT_MODEL names a model file\n");
        return EXIT_SKIP;
    }
    g_autofree char *base = g_path_get_basename(path);
    g_autofree char *ids =
        g_strdup_printf("%.*s.ids", (int)(strlen(base) - MIN(strlen(base), strlen(".gguf"))), base);
    g_autofree char *golden = g_build_filename(GOLDEN_DIR, ids, NULL);
    if (!g_file_test(golden, G_FILE_TEST_EXISTS)) {
        print_message(
            "skipped: no golden ids for %s; tests/golden/text/make_tokenizer.py makes them\n",
            base);
        return EXIT_SKIP;
    }
    model_path = path;
    model_ids = ids;
    const struct CMUnitTest tests[] = {cmocka_unit_test(model_file_ids)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}

int main(int argc, char **argv)
{
    if (argc > 1) {
        return real_model_ids_are_the_references();
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(words_are_the_references),
        cmocka_unit_test(ids_are_the_references),
        cmocka_unit_test(ids_of_json_are_the_references),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
