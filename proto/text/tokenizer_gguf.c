/* Reads tokenizer.ggml.* of a model file into a TokenizerVocab. */
#include "proto/text/tokenizer_vocab.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"

void gguf_vocab_clear(GgufVocab *v)
{
    weft_free(v->tokens);
    weft_free(v->merges);
    weft_free(v->kinds);
    weft_free(v->scores);
    g_free(v->model);
    g_free(v->pre);
}

static bool set_bad_element(const char *key, uint64_t i, const char *wanted, GError **error)
{
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "%s[%" G_GUINT64_FORMAT "] is not %s", key,
                i, wanted);
    return false;
}

/* *out stays NULL if the key is absent. */
static bool read_strings(const Gguf *g, const char *key, VocabText **out, uint64_t *n_out,
                         GError **error)
{
    if (!gguf_array_length(g, key, n_out)) {
        *n_out = 0;
        return true;
    }
    *out = weft_alloc(MAX(*n_out, 1), sizeof **out, key, error);
    if (*out == NULL) {
        return false;
    }
    for (uint64_t i = 0; i < *n_out; i++) {
        if (!gguf_array_string(g, key, i, &(*out)[i].text, &(*out)[i].length)) {
            return set_bad_element(key, i, "a string", error);
        }
    }
    return true;
}

static bool check_length(const char *key, uint64_t n, uint64_t n_tokens, GError **error)
{
    if (n == n_tokens) {
        return true;
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                "%s has %" G_GUINT64_FORMAT " elements for %" G_GUINT64_FORMAT " tokens", key, n,
                n_tokens);
    return false;
}

static bool read_kinds(const Gguf *g, GgufVocab *v, GError **error)
{
    const char *key = "tokenizer.ggml.token_type";
    uint64_t n;
    if (!gguf_array_length(g, key, &n)) {
        return true;
    }
    if (!check_length(key, n, v->vocab.n_tokens, error) ||
        (v->kinds = weft_alloc(n, sizeof *v->kinds, key, error)) == NULL) {
        return false;
    }
    for (uint64_t i = 0; i < n; i++) {
        if (!gguf_array_i64(g, key, i, &v->kinds[i])) {
            return set_bad_element(key, i, "an integer", error);
        }
    }
    return true;
}

static bool read_scores(const Gguf *g, GgufVocab *v, GError **error)
{
    const char *key = "tokenizer.ggml.scores";
    uint64_t n;
    if (!gguf_array_length(g, key, &n)) {
        return true;
    }
    if (!check_length(key, n, v->vocab.n_tokens, error) ||
        (v->scores = weft_alloc(n, sizeof *v->scores, key, error)) == NULL) {
        return false;
    }
    for (uint64_t i = 0; i < n; i++) {
        if (!gguf_array_f64(g, key, i, &v->scores[i])) {
            return set_bad_element(key, i, "a number", error);
        }
    }
    return true;
}

static bool read_name(const Gguf *g, const char *key, char **out, GError **error)
{
    const char *text;
    size_t length;
    g_autoptr(GError) why = NULL;
    if (gguf_get_string(g, key, &text, &length, &why)) {
        *out = g_strndup(text, length);
    } else if (why != NULL) {
        g_propagate_error(error, g_steal_pointer(&why));
        return false;
    }
    return true;
}

static bool read_id(const Gguf *g, const char *key, int64_t *out, GError **error)
{
    uint64_t value;
    g_autoptr(GError) why = NULL;
    *out = -1;
    if (gguf_get_u64(g, key, &value, &why)) {
        *out = value <= INT64_MAX ? (int64_t)value : INT64_MAX;
    } else if (why != NULL) {
        g_propagate_error(error, g_steal_pointer(&why));
        return false;
    }
    return true;
}

static bool read_choice(const Gguf *g, const char *key, VocabChoice *out, GError **error)
{
    bool value;
    g_autoptr(GError) why = NULL;
    *out = VOCAB_DEFAULT;
    if (gguf_get_bool(g, key, &value, &why)) {
        *out = value ? VOCAB_YES : VOCAB_NO;
    } else if (why != NULL) {
        g_propagate_error(error, g_steal_pointer(&why));
        return false;
    }
    return true;
}

/* Text that the model's own tokenizer rewrites before it cuts it would get other ids here. */
static bool refuse_normalization(const Gguf *g, GError **error)
{
    VocabChoice squeezes;
    uint64_t n;
    if (!read_choice(g, "tokenizer.ggml.remove_extra_whitespaces", &squeezes, error)) {
        return false;
    }
    if (squeezes == VOCAB_YES ||
        (gguf_array_length(g, "tokenizer.ggml.precompiled_charsmap", &n) && n > 0)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "%s is not supported: text would have to be rewritten before it is cut",
                    squeezes == VOCAB_YES ? "tokenizer.ggml.remove_extra_whitespaces = true"
                                          : "tokenizer.ggml.precompiled_charsmap");
        return false;
    }
    return true;
}

bool gguf_vocab_read(const Gguf *g, GgufVocab *v, GError **error)
{
    TokenizerVocab *vocab = &v->vocab;
    VocabChoice prefix = VOCAB_DEFAULT;
    if (!read_name(g, "tokenizer.ggml.model", &v->model, error) ||
        !read_name(g, "tokenizer.ggml.pre", &v->pre, error)) {
        return false;
    }
    if (v->model == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "the file has no tokenizer (tokenizer.ggml.model is missing)");
        return false;
    }
    if (!read_strings(g, "tokenizer.ggml.tokens", &v->tokens, &vocab->n_tokens, error) ||
        !read_strings(g, "tokenizer.ggml.merges", &v->merges, &vocab->n_merges, error) ||
        !read_kinds(g, v, error) || !read_scores(g, v, error) ||
        !read_id(g, "tokenizer.ggml.bos_token_id", &vocab->bos, error) ||
        !read_id(g, "tokenizer.ggml.eos_token_id", &vocab->eos, error) ||
        !read_id(g, "tokenizer.ggml.eot_token_id", &vocab->eot, error) ||
        !read_id(g, "tokenizer.ggml.eom_token_id", &vocab->eom, error) ||
        !read_id(g, "tokenizer.ggml.unknown_token_id", &vocab->unk, error) ||
        !read_choice(g, "tokenizer.ggml.add_bos_token", &vocab->adds_bos, error) ||
        !read_choice(g, "tokenizer.ggml.add_space_prefix", &prefix, error) ||
        !refuse_normalization(g, error)) {
        return false;
    }
    vocab->space_prefix = prefix == VOCAB_DEFAULT ? SPACE_PREFIX_DEFAULT
                          : prefix == VOCAB_YES   ? SPACE_PREFIX_ALWAYS
                                                  : SPACE_PREFIX_NEVER;
    vocab->model = v->model;
    vocab->pre = v->pre;
    vocab->tokens = v->tokens;
    vocab->merges = v->merges;
    vocab->kinds = v->kinds;
    vocab->scores = v->scores;
    return true;
}

Tokenizer *tokenizer_from_gguf(const Gguf *g, GError **error)
{
    g_auto(GgufVocab) v = {0};
    return gguf_vocab_read(g, &v, error) ? tokenizer_from_vocab(&v.vocab, error) : NULL;
}
