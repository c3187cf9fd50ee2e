#include "proto/text/tokenizer_json.h"

#include "proto/base/error.h"
#include "proto/text/token_halves.h"
#include "proto/text/tokenizer_model.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#define FILE_LIMIT (64u << 20)
#define TOKENS_LIMIT (4u << 20)
#define CONFIG_NAME "tokenizer_config.json"
#define CHAT_TEMPLATE_NAME "chat_template.jinja"

struct JsonVocab {
    TokenizerVocab vocab;
    json_t *file, *config; /* what the vocabulary points into */
    GStringChunk *texts;
    const char *chat_template; /* of a file of its own; or NULL */
    VocabText *tokens, *merges;
    int64_t *kinds;
    double *scores; /* SentencePiece's */
};

/* Pre-tokenizers by what weft calls them, as a canonical text (describe_pre()) and as JSON. */
#define LLAMA3_SPLIT(numbers)                                                                      \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" numbers                          \
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
static const struct {
    const char *pre;
    bool digits;       /* each digit alone first */
    const char *split; /* NULL: ByteLevel's own pattern */
    bool nfc, ignores_merges;
} known[] = {
    {"gpt-2", false, NULL, false, false},
    {"smollm", true, NULL, false, false},
    {"llama-bpe", false, LLAMA3_SPLIT("\\p{N}{1,3}"), false, true},
    {"qwen2", false, LLAMA3_SPLIT("\\p{N}"), true, false},
};

static bool fail(GError **error, const char *format, ...) G_GNUC_PRINTF(2, 3);

static bool fail(GError **error, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    g_autofree char *what = g_strdup_vprintf(format, args);
    va_end(args);
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "tokenizer.json: %s", what);
    return false;
}

static const char *text_of(const json_t *object, const char *key)
{
    const char *text = json_string_value(json_object_get(object, key));
    return text != NULL ? text : "";
}

/* ---- pre-tokenizer ---- */

typedef struct PreRules {
    bool digits, bytes;
    const char *split; /* NULL: none, or ByteLevel's own */
    bool own_pattern;
} PreRules;

static bool read_stage(const json_t *stage, PreRules *rules, GError **error)
{
    const char *type = text_of(stage, "type");
    if (strcmp(type, "Digits") == 0 && json_is_true(json_object_get(stage, "individual_digits"))) {
        rules->digits = true;
    } else if (strcmp(type, "ByteLevel") == 0 &&
               !json_is_true(json_object_get(stage, "add_prefix_space"))) {
        rules->bytes = true;
        rules->own_pattern = !json_is_false(json_object_get(stage, "use_regex"));
    } else if (strcmp(type, "Split") == 0 && strcmp(text_of(stage, "behavior"), "Isolated") == 0 &&
               rules->split == NULL) {
        rules->split = text_of(json_object_get(stage, "pattern"), "Regex");
    } else {
        return fail(error, "pre_tokenizer %.40s is not supported; convert the model to GGUF", type);
    }
    return true;
}

static const char *find_pre(const json_t *file, GError **error)
{
    const json_t *pre = json_object_get(file, "pre_tokenizer"),
                 *list = json_object_get(pre, "pretokenizers"),
                 *normalizer = json_object_get(file, "normalizer");
    const bool has_normalizer = normalizer != NULL && !json_is_null(normalizer);
    const bool nfc = has_normalizer && strcmp(text_of(normalizer, "type"), "NFC") == 0;
    const bool ignores =
        json_is_true(json_object_get(json_object_get(file, "model"), "ignore_merges"));
    PreRules rules = {0};
    const bool sequence = strcmp(text_of(pre, "type"), "Sequence") == 0;
    for (size_t i = 0; i < (sequence ? json_array_size(list) : 1); i++) {
        if (!read_stage(sequence ? json_array_get(list, i) : pre, &rules, error)) {
            return NULL;
        }
    }
    for (size_t i = 0; i < G_N_ELEMENTS(known); i++) {
        if (rules.bytes && rules.digits == known[i].digits &&
            g_strcmp0(rules.split, known[i].split) == 0 &&
            rules.own_pattern == (known[i].split == NULL) && nfc == known[i].nfc &&
            has_normalizer == nfc && ignores == known[i].ignores_merges) {
            return known[i].pre;
        }
    }
    fail(error,
         "its normalizer and pre_tokenizer (pattern '%.60s') are none of GPT-2's, SmolLM's, "
         "Llama 3's or Qwen 2's; convert the model to GGUF",
         rules.split != NULL ? rules.split : "");
    return NULL;
}

/* ---- tokens ---- */

static bool read_id(const json_t *value, uint64_t *out)
{
    const json_int_t id = json_is_integer(value) ? json_integer_value(value) : -1;
    *out = (uint64_t)id;
    return id >= 0 && id < TOKENS_LIMIT;
}

/* 1 + the highest id; 0 + INVALID. */
static uint64_t count_tokens(const json_t *vocab, const json_t *added, GError **error)
{
    uint64_t n = 0, id;
    const char *text;
    json_t *value;
    size_t i;
    json_object_foreach((json_t *)vocab, text, value)
    {
        if (!read_id(value, &id)) {
            fail(error, "token '%.40s' has no id below %u", text, TOKENS_LIMIT);
            return 0;
        }
        n = MAX(n, id + 1);
    }
    json_array_foreach(added, i, value)
    {
        if (!read_id(json_object_get(value, "id"), &id)) {
            fail(error, "added token %zu has no id below %u", i, TOKENS_LIMIT);
            return 0;
        }
        n = MAX(n, id + 1);
    }
    if (n == 0) {
        fail(error, "it has no tokens");
    }
    return n;
}

static bool take_tokens(JsonVocab *v, const json_t *vocab, const json_t *added, GError **error)
{
    const uint64_t n = count_tokens(vocab, added, error);
    const char *text;
    json_t *value;
    size_t i;
    if (n == 0) {
        return false;
    }
    v->tokens = g_new0(VocabText, n);
    v->kinds = g_new0(int64_t, n);
    v->vocab.n_tokens = n;
    json_object_foreach((json_t *)vocab, text, value)
    {
        const json_int_t id = json_integer_value(value);
        if (v->tokens[id].text != NULL) {
            return fail(error, "two tokens have the id %lld", (long long)id);
        }
        v->tokens[id] = (VocabText){text, strlen(text)};
        v->kinds[id] = TOKEN_NORMAL;
    }
    json_array_foreach(added, i, value)
    {
        const json_int_t id = json_integer_value(json_object_get(value, "id"));
        const char *content = text_of(value, "content");
        v->tokens[id] = (VocabText){content, strlen(content)};
        v->kinds[id] =
            json_is_true(json_object_get(value, "special")) ? TOKEN_CONTROL : TOKEN_USER_DEFINED;
    }
    for (uint64_t id = 0; id < n; id++) {
        if (v->tokens[id].text == NULL) {
            g_autofree char *name = g_strdup_printf("[PAD%" G_GUINT64_FORMAT "]", id);
            v->tokens[id] = (VocabText){g_string_chunk_insert(v->texts, name), strlen(name)};
            v->kinds[id] = TOKEN_UNUSED;
        }
    }
    return true;
}

/* "a b", or newer files' ["a", "b"]. */
static bool take_merges(JsonVocab *v, const json_t *merges, GError **error)
{
    const size_t n = json_array_size(merges);
    v->merges = g_new0(VocabText, MAX(n, 1));
    v->vocab.n_merges = n;
    for (size_t i = 0; i < n; i++) {
        const json_t *merge = json_array_get(merges, i);
        const char *text = json_string_value(merge),
                   *left = json_string_value(json_array_get(merge, 0)),
                   *right = json_string_value(json_array_get(merge, 1));
        if (text == NULL && (left == NULL || right == NULL)) {
            return fail(error, "merge %zu is no pair of tokens", i);
        }
        if (text == NULL) {
            g_autofree char *joined = g_strconcat(left, " ", right, NULL);
            text = g_string_chunk_insert(v->texts, joined);
        }
        v->merges[i] = (VocabText){text, strlen(text)};
    }
    return true;
}

/* Among those that are not made of text; -1 for NULL and for what is none. */
static int64_t find_added(const JsonVocab *v, const char *text)
{
    for (uint64_t id = 0; text != NULL && id < v->vocab.n_tokens; id++) {
        if (v->kinds[id] != TOKEN_NORMAL && strcmp(v->tokens[id].text, text) == 0) {
            return (int64_t)id;
        }
    }
    return -1;
}

/* A token of the configuration: its text, or an object with it. */
static int64_t find_special(const JsonVocab *v, const char *key)
{
    const json_t *value = json_object_get(v->config, key);
    return find_added(v,
                      json_is_object(value) ? text_of(value, "content") : json_string_value(value));
}

/* What the post-processor puts before a text. */
static int64_t find_first(const JsonVocab *v)
{
    const json_t *post = json_object_get(v->file, "post_processor"),
                 *list = json_object_get(post, "processors");
    for (size_t i = 0; i < MAX(json_array_size(list), 1); i++) {
        const json_t *step = json_is_array(list) ? json_array_get(list, i) : post,
                     *first = json_array_get(json_object_get(step, "single"), 0),
                     *special = json_object_get(first, "SpecialToken");
        if (special != NULL) {
            return find_added(v, text_of(special, "id"));
        }
    }
    return -1;
}

/* The configuration says whether a text begins with a token, else the post-processor does. */
static void read_begin(JsonVocab *v)
{
    const json_t *adds = json_object_get(v->config, "add_bos_token");
    const int64_t first = find_first(v);
    TokenizerVocab *out = &v->vocab;
    out->bos = find_special(v, "bos_token");
    if (json_is_boolean(adds)) {
        out->adds_bos = json_is_true(adds) ? VOCAB_YES : VOCAB_NO;
    } else if (first >= 0) {
        out->adds_bos = VOCAB_YES;
        out->bos = first;
    } else {
        out->adds_bos = strcmp(out->model, "llama") == 0 ? VOCAB_NO : VOCAB_DEFAULT;
    }
}

/* ---- SentencePiece's BPE: one list of characters, spaces as U+2581, bytes for what is missing
 * ----
 */

#define SPACE_MARK "\xE2\x96\x81"

/* Replaces each space by the mark. */
static bool marks_spaces(const json_t *stage)
{
    return strcmp(text_of(stage, "type"), "Replace") == 0 &&
           strcmp(text_of(json_object_get(stage, "pattern"), "String"), " ") == 0 &&
           strcmp(text_of(stage, "content"), SPACE_MARK) == 0;
}

static bool is_null(const json_t *value)
{
    return value == NULL || json_is_null(value);
}

/* By a normalizer: [Prepend,] Replace. By a pre-tokenizer: Metaspace that does not split. */
static bool read_spaces(const json_t *file, SpacePrefix *out, GError **error)
{
    const json_t *pre = json_object_get(file, "pre_tokenizer"),
                 *normalizer = json_object_get(file, "normalizer"),
                 *stages = json_object_get(normalizer, "normalizers"),
                 *first = json_array_get(stages, 0);
    const char *scheme = text_of(pre, "prepend_scheme");
    if (is_null(pre) && marks_spaces(normalizer)) {
        *out = SPACE_PREFIX_NEVER;
    } else if (is_null(pre) && json_array_size(stages) == 1 && marks_spaces(first)) {
        *out = SPACE_PREFIX_NEVER;
    } else if (is_null(pre) && json_array_size(stages) == 2 &&
               strcmp(text_of(first, "type"), "Prepend") == 0 &&
               strcmp(text_of(first, "prepend"), SPACE_MARK) == 0 &&
               marks_spaces(json_array_get(stages, 1))) {
        *out = SPACE_PREFIX_ALWAYS;
    } else if (is_null(normalizer) && strcmp(text_of(pre, "type"), "Metaspace") == 0 &&
               strcmp(text_of(pre, "replacement"), SPACE_MARK) == 0 &&
               json_is_false(json_object_get(pre, "split")) &&
               (strcmp(scheme, "first") == 0 || strcmp(scheme, "never") == 0)) {
        *out = scheme[0] == 'f' ? SPACE_PREFIX_FIRST : SPACE_PREFIX_NEVER;
    } else {
        return fail(error, "its normalizer and pre_tokenizer mark spaces otherwise than Llama 2's "
                           "and Mistral's do; convert the model to GGUF");
    }
    return true;
}

static uint64_t count_halves(const json_t *vocab)
{
    g_autoptr(GArray) texts = g_array_new(FALSE, FALSE, sizeof(VocabText));
    const char *text;
    json_t *value;
    json_object_foreach((json_t *)vocab, text, value)
    {
        const VocabText one = {text, strlen(text)};
        g_array_append_val(texts, one);
    }
    return token_halves_count((const VocabText *)(const void *)texts->data, texts->len);
}

/* SentencePiece joins the two neighbours that make the token of the highest score, tokenizer.json
 * those of the first merge. That is the same where a file has a merge for every way to make a token
 * of two, and those of a token follow one another: the rank of the first is its score. */
static bool take_scores(JsonVocab *v, const json_t *vocab, GError **error)
{
    const uint64_t n = v->vocab.n_merges;
    uint64_t last = UINT64_MAX;
    v->scores = g_new(double, v->vocab.n_tokens);
    for (uint64_t id = 0; id < v->vocab.n_tokens; id++) {
        v->scores[id] = -(double)n;
    }
    g_autoptr(GString) joined = g_string_new(NULL);
    for (uint64_t i = 0; i < n; i++) {
        const VocabText m = v->merges[i];
        const char *space = m.length > 1 ? memchr(m.text + 1, ' ', m.length - 1) : NULL;
        g_string_truncate(joined, 0);
        g_string_append_len(joined, m.text, space != NULL ? space - m.text : 0);
        g_string_append(joined, space != NULL ? space + 1 : "");
        const json_t *made = json_object_get(vocab, joined->str);
        if (made == NULL) {
            return fail(error, "merge %" G_GUINT64_FORMAT " makes no token of the vocabulary", i);
        }
        const uint64_t id = (uint64_t)json_integer_value(made);
        if (id != last && v->scores[id] != -(double)n) {
            return fail(error,
                        "the merges that make token %" G_GUINT64_FORMAT " are apart, which "
                        "SentencePiece's are not; convert the model to GGUF",
                        id);
        }
        v->scores[id] = id != last ? -(double)i : v->scores[id];
        last = id;
    }
    const uint64_t n_halves = count_halves(vocab);
    return n_halves == n ||
           fail(error,
                "it has %" G_GUINT64_FORMAT " merges, SentencePiece's vocabulary would have "
                "%" G_GUINT64_FORMAT "; convert the model to GGUF",
                n, n_halves);
}

static bool read_sentencepiece(JsonVocab *v, const json_t *model, GError **error)
{
    const json_t *vocab = json_object_get(model, "vocab");
    const char *unknown = text_of(model, "unk_token");
    if (!read_spaces(v->file, &v->vocab.space_prefix, error) || !take_scores(v, vocab, error)) {
        return false;
    }
    for (uint64_t id = 0; id < v->vocab.n_tokens; id++) {
        const VocabText t = v->tokens[id];
        if (unknown[0] != '\0' && strcmp(t.text, unknown) == 0) {
            v->kinds[id] = TOKEN_UNKNOWN;
        } else if (v->kinds[id] == TOKEN_NORMAL && tokenizer_spm_byte(t.text, t.length) >= 0) {
            v->kinds[id] = TOKEN_BYTE;
        }
    }
    v->vocab.model = "llama";
    v->vocab.scores = v->scores;
    v->vocab.n_merges = 0; /* the scores say it */
    return true;
}

static bool read_byte_level(JsonVocab *v, GError **error)
{
    v->vocab.model = "gpt2";
    v->vocab.pre = find_pre(v->file, error);
    return v->vocab.pre != NULL;
}

static bool read_vocab(JsonVocab *v, GError **error)
{
    const json_t *model = json_object_get(v->file, "model");
    const char *type = text_of(model, "type");
    TokenizerVocab *out = &v->vocab;
    out->space_prefix = SPACE_PREFIX_DEFAULT;
    if (strcmp(type, "BPE") != 0) {
        return fail(error, "model '%.40s' is not supported, BPE is; convert it to GGUF", type);
    }
    const bool pieces = json_is_true(json_object_get(model, "byte_fallback"));
    if ((!pieces && !read_byte_level(v, error)) ||
        !take_tokens(v, json_object_get(model, "vocab"), json_object_get(v->file, "added_tokens"),
                     error) ||
        !take_merges(v, json_object_get(model, "merges"), error) ||
        (pieces && !read_sentencepiece(v, model, error))) {
        return false;
    }
    out->tokens = v->tokens;
    out->kinds = v->kinds;
    out->merges = v->merges;
    read_begin(v);
    out->eos = find_special(v, "eos_token");
    out->unk = find_special(v, "unk_token");
    out->eot = out->eom = -1;
    return true;
}

JsonVocab *json_vocab_parse(const char *text, size_t length, const char *config,
                            size_t config_length, GError **error)
{
    g_autoptr(JsonVocab) v = g_new0(JsonVocab, 1);
    json_error_t why = {.text = "it is empty or too large"};
    v->texts = g_string_chunk_new(4096);
    if (length > 0 && length <= FILE_LIMIT) {
        v->file = json_loadb(text, length, JSON_REJECT_DUPLICATES, &why);
    }
    if (!json_is_object(v->file)) {
        fail(error, "it is no JSON object: %.80s", why.text);
        return NULL;
    }
    if (config != NULL && config_length > 0 && config_length <= FILE_LIMIT) {
        v->config = json_loadb(config, config_length, 0, &why);
        if (!json_is_object(v->config)) {
            fail(error, CONFIG_NAME " beside it is no JSON object: %.80s", why.text);
            return NULL;
        }
    }
    return read_vocab(v, error) ? g_steal_pointer(&v) : NULL;
}

JsonVocab *json_vocab_load(const char *path, GError **error)
{
    const bool is_folder = g_file_test(path, G_FILE_TEST_IS_DIR);
    g_autofree char *file =
        is_folder ? g_build_filename(path, "tokenizer.json", NULL) : g_strdup(path);
    g_autofree char *folder = g_path_get_dirname(file);
    g_autofree char *beside = g_build_filename(folder, CONFIG_NAME, NULL);
    g_autofree char *template_file = g_build_filename(folder, CHAT_TEMPLATE_NAME, NULL);
    g_autoptr(GMappedFile) text = g_mapped_file_new(file, FALSE, NULL),
                           config = g_mapped_file_new(beside, FALSE, NULL),
                           template = g_mapped_file_new(template_file, FALSE, NULL);
    if (text == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND,
                    "%s is not there; name a tokenizer.json or its directory", file);
        return NULL;
    }
    JsonVocab *v =
        json_vocab_parse(g_mapped_file_get_contents(text), g_mapped_file_get_length(text),
                         config != NULL ? g_mapped_file_get_contents(config) : NULL,
                         config != NULL ? g_mapped_file_get_length(config) : 0, error);
    if (v == NULL) {
        g_prefix_error(error, "%s: ", folder);
    } else if (template != NULL && g_mapped_file_get_length(template) > 0) {
        v->chat_template = g_string_chunk_insert_len(v->texts, g_mapped_file_get_contents(template),
                                                     (gssize)g_mapped_file_get_length(template));
    }
    return v;
}

const TokenizerVocab *json_vocab_get(const JsonVocab *v)
{
    return &v->vocab;
}

const char *json_vocab_chat_template(const JsonVocab *v)
{
    const json_t *of_config = json_object_get(v->config, "chat_template");
    if (v->chat_template != NULL || !json_is_array(of_config)) {
        return v->chat_template != NULL ? v->chat_template : json_string_value(of_config);
    }
    size_t i;
    json_t *named;
    json_array_foreach(of_config, i, named)
    {
        const char *name = json_string_value(json_object_get(named, "name"));
        if (name != NULL && strcmp(name, "default") == 0) {
            return json_string_value(json_object_get(named, "template"));
        }
    }
    return NULL;
}

void json_vocab_free(JsonVocab *v)
{
    if (v != NULL) {
        json_decref(v->file);
        json_decref(v->config);
        g_string_chunk_free(v->texts);
        g_free(v->tokens);
        g_free(v->merges);
        g_free(v->kinds);
        g_free(v->scores);
        g_free(v);
    }
}

/* ---- writing ---- */

static json_t *pre_json(size_t i)
{
    json_t *bytes = json_pack("{s:s,s:b,s:b,s:b}", "type", "ByteLevel", "add_prefix_space", 0,
                              "trim_offsets", 1, "use_regex", (int)(known[i].split == NULL));
    if (!known[i].digits && known[i].split == NULL) {
        return bytes;
    }
    json_t *first = known[i].digits
                        ? json_pack("{s:s,s:b}", "type", "Digits", "individual_digits", 1)
                        : json_pack("{s:s,s:{s:s},s:s,s:b}", "type", "Split", "pattern", "Regex",
                                    known[i].split, "behavior", "Isolated", "invert", 0);
    return json_pack("{s:s,s:[o,o]}", "type", "Sequence", "pretokenizers", first, bytes);
}

static json_t *added_json(uint64_t id, json_t *content, bool special)
{
    return json_pack("{s:I,s:o,s:b,s:b,s:b,s:b,s:b}", "id", (json_int_t)id, "content", content,
                     "single_word", 0, "lstrip", 0, "rstrip", 0, "normalized", 0, "special",
                     (int)special);
}

/* False if a text is no UTF-8. Tokens that nothing means are left out. */
static bool fill_tokens(const TokenizerVocab *v, json_t *vocab, json_t *added)
{
    for (uint64_t id = 0; id < v->n_tokens; id++) {
        const int64_t kind = v->kinds != NULL ? v->kinds[id] : TOKEN_NORMAL;
        json_t *text = json_stringn(v->tokens[id].text, v->tokens[id].length);
        if (text == NULL) {
            return false;
        }
        if (kind == TOKEN_NORMAL) {
            json_object_set_new(vocab, json_string_value(text), json_integer((json_int_t)id));
            json_decref(text);
        } else if (kind == TOKEN_UNUSED) {
            json_decref(text);
        } else {
            json_array_append_new(added, added_json(id, text, kind != TOKEN_USER_DEFINED));
        }
    }
    return true;
}

static bool fill_merges(const TokenizerVocab *v, json_t *merges)
{
    for (uint64_t i = 0; i < v->n_merges; i++) {
        const VocabText m = v->merges[i];
        const char *space = m.length > 1 ? memchr(m.text + 1, ' ', m.length - 1) : NULL;
        const size_t left = space != NULL ? (size_t)(space - m.text) : 0;
        json_t *pair = space == NULL
                           ? NULL
                           : json_pack("[s%,s%]", m.text, left, space + 1, m.length - left - 1);
        if (pair == NULL) {
            return false;
        }
        json_array_append_new(merges, pair);
    }
    return true;
}

static char *take_dump(json_t *object)
{
    char *text = json_dumps(object, JSON_INDENT(1)), *copy = g_strdup(text);
    free(text);
    json_decref(object);
    return copy;
}

char *json_vocab_write(const TokenizerVocab *v, GError **error)
{
    size_t i = 0;
    while (i < G_N_ELEMENTS(known) && g_strcmp0(known[i].pre, v->pre) != 0) {
        i++;
    }
    if (strcmp(v->model, "gpt2") != 0 || i == G_N_ELEMENTS(known)) {
        fail(error,
             "a vocabulary of model '%.40s' with the pre-tokenizer '%.40s' cannot be "
             "written as one; export to GGUF",
             v->model, v->pre != NULL ? v->pre : "");
        return NULL;
    }
    json_t *vocab = json_object(), *merges = json_array(), *added = json_array();
    const bool ok = fill_tokens(v, vocab, added) && fill_merges(v, merges);
    json_t *bytes = json_pack("{s:s,s:b,s:b,s:b}", "type", "ByteLevel", "add_prefix_space", 0,
                              "trim_offsets", 1, "use_regex", 1);
    json_t *file =
        json_pack("{s:s,s:n,s:n,s:o,s:o,s:o,s:O,s:o,s:{s:s,s:n,s:n,s:n,s:n,s:b,s:b,s:b,s:o,s:o}}",
                  "version", "1.0", "truncation", "padding", "added_tokens", added, "normalizer",
                  known[i].nfc ? json_pack("{s:s}", "type", "NFC") : json_null(), "pre_tokenizer",
                  pre_json(i), "post_processor", bytes, "decoder", bytes, "model", "type", "BPE",
                  "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                  "fuse_unk", 0, "byte_fallback", 0, "ignore_merges", (int)known[i].ignores_merges,
                  "vocab", vocab, "merges", merges);
    if (!ok) {
        json_decref(file);
        fail(error, "a token or merge is no UTF-8 text; export to GGUF");
        return NULL;
    }
    return take_dump(file);
}

static void set_token(json_t *config, const char *key, const TokenizerVocab *v, int64_t id)
{
    if (id >= 0) {
        json_object_set_new(config, key, json_stringn(v->tokens[id].text, v->tokens[id].length));
    }
}

char *json_vocab_write_config(const TokenizerVocab *v, const char *chat_template)
{
    json_t *config = json_pack("{s:s,s:b}", "tokenizer_class", "PreTrainedTokenizerFast",
                               "clean_up_tokenization_spaces", 0);
    set_token(config, "bos_token", v, v->bos);
    set_token(config, "eos_token", v, v->eos);
    set_token(config, "unk_token", v, v->unk);
    if (v->adds_bos != VOCAB_DEFAULT) {
        json_object_set_new(config, "add_bos_token", json_boolean(v->adds_bos == VOCAB_YES));
    }
    if (chat_template != NULL) {
        json_object_set_new(config, "chat_template", json_string(chat_template));
    }
    return take_dump(config);
}
