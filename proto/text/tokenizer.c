/* Building a tokenizer from a vocabulary that nobody trusts, and the questions about single tokens.
 */
#include "proto/text/tokenizer_model.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"

#include <string.h>

/* Control tokens that end a turn or a text, by the names model makers gave them. A file names at
 * most three of them by id. */
static const char *const end_names[] = {
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
    "<|return|>",
    "<|call|>",
    "<end_of_utterance>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "</s>",
    "<eos>",
    "<|eot|>",
    "<\xEF\xBD\x9C"
    "end\xE2\x96\x81of\xE2\x96\x81sentence\xEF\xBD\x9C>",
};

static bool vocab_check_id(const TokenizerVocab *vocab, const char *key, int64_t id, GError **error)
{
    if (id >= -1 && id < (int64_t)vocab->n_tokens) {
        return true;
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                "tokenizer.ggml.%s is %" G_GINT64_FORMAT ", but there are %" G_GUINT64_FORMAT
                " tokens",
                key, id, vocab->n_tokens);
    return false;
}

static bool vocab_check(const TokenizerVocab *vocab, GError **error)
{
    if (vocab->n_tokens == 0 || vocab->n_tokens > TOKENIZER_TOKENS_MAX ||
        vocab->n_merges > 2 * (uint64_t)TOKENIZER_TOKENS_MAX) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "vocabulary of %" G_GUINT64_FORMAT " tokens and %" G_GUINT64_FORMAT
                    " merges; 1 to %u tokens are supported",
                    vocab->n_tokens, vocab->n_merges, TOKENIZER_TOKENS_MAX);
        return false;
    }
    for (uint64_t i = 0; i < vocab->n_tokens; i++) {
        if (vocab->tokens[i].length > TOKENIZER_TOKEN_BYTES_MAX) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                        "token %" G_GUINT64_FORMAT " has %zu bytes; at most %u are supported", i,
                        vocab->tokens[i].length, TOKENIZER_TOKEN_BYTES_MAX);
            return false;
        }
        if (vocab->kinds != NULL &&
            (vocab->kinds[i] < TOKEN_NORMAL || vocab->kinds[i] > TOKEN_BYTE)) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                        "tokenizer.ggml.token_type[%" G_GUINT64_FORMAT "] is %" G_GINT64_FORMAT
                        "; 1 to 6 are known",
                        i, vocab->kinds[i]);
            return false;
        }
    }
    return vocab_check_id(vocab, "bos_token_id", vocab->bos, error) &&
           vocab_check_id(vocab, "eos_token_id", vocab->eos, error) &&
           vocab_check_id(vocab, "eot_token_id", vocab->eot, error) &&
           vocab_check_id(vocab, "eom_token_id", vocab->eom, error) &&
           vocab_check_id(vocab, "unknown_token_id", vocab->unk, error);
}

static bool tokenizer_is_special(uint8_t kind)
{
    return kind == TOKEN_CONTROL || kind == TOKEN_UNKNOWN;
}

/* Copies texts and kinds and derives the pieces. Sizes fit 32 bits: 4 M tokens of 4 KiB do not, so
 * the sum is checked. */
static bool tokenizer_copy_tokens(Tokenizer *t, const TokenizerVocab *vocab, GError **error)
{
    t->n_tokens = (uint32_t)vocab->n_tokens;
    t->text_slices = weft_alloc(t->n_tokens, sizeof *t->text_slices, "token texts", error);
    t->piece_slices = t->text_slices != NULL
                          ? weft_alloc(t->n_tokens, sizeof *t->piece_slices, "token pieces", error)
                          : NULL;
    t->kinds = t->piece_slices != NULL ? weft_alloc(t->n_tokens, 1, "token kinds", error) : NULL;
    if (t->kinds == NULL) {
        return false;
    }
    for (uint32_t id = 0; id < t->n_tokens; id++) {
        VocabText text = vocab->tokens[id];
        if (t->texts->len + text.length > G_MAXINT32) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                        "the first %u tokens have more than 2 GiB of text", id);
            return false;
        }
        t->kinds[id] = vocab->kinds != NULL ? (uint8_t)vocab->kinds[id] : TOKEN_NORMAL;
        t->text_slices[id] = (TextSlice){.offset = t->texts->len, .length = (uint32_t)text.length};
        g_byte_array_append(t->texts, (const guint8 *)text.text, (guint)text.length);

        uint32_t before = t->pieces->len;
        if (tokenizer_is_special(t->kinds[id])) {
            g_byte_array_append(t->pieces, (const guint8 *)text.text, (guint)text.length);
        } else if (t->is_bpe) {
            tokenizer_bpe_append_piece(t, id, text.text, text.length);
        } else {
            tokenizer_spm_append_piece(t, id, text.text, text.length);
        }
        t->piece_slices[id] = (TextSlice){.offset = before, .length = t->pieces->len - before};
    }
    return true;
}

static int compare_pieces(gconstpointer a, gconstpointer b, gpointer user)
{
    const Tokenizer *t = user;
    TextSlice x = t->piece_slices[*(const uint32_t *)a], y = t->piece_slices[*(const uint32_t *)b];
    int order =
        memcmp(t->pieces->data + x.offset, t->pieces->data + y.offset, MIN(x.length, y.length));
    return order != 0 ? order : (x.length > y.length) - (x.length < y.length);
}

static void tokenizer_sort_specials(Tokenizer *t)
{
    GArray *always = g_array_new(FALSE, FALSE, sizeof(uint32_t)),
           *all = g_array_new(FALSE, FALSE, sizeof(uint32_t));
    for (uint32_t id = 0; id < t->n_tokens; id++) {
        if (t->piece_slices[id].length == 0) {
            continue;
        }
        if (t->kinds[id] == TOKEN_USER_DEFINED) {
            g_array_append_val(always, id);
        }
        if (t->kinds[id] == TOKEN_USER_DEFINED || tokenizer_is_special(t->kinds[id])) {
            g_array_append_val(all, id);
        }
    }
    g_array_sort_with_data(always, compare_pieces, t);
    g_array_sort_with_data(all, compare_pieces, t);
    t->n_always_special = always->len;
    t->n_all_special = all->len;
    t->always_special = (uint32_t *)(void *)g_array_free(always, FALSE);
    t->all_special = (uint32_t *)(void *)g_array_free(all, FALSE);
}

static bool tokenizer_has_end_name(const Tokenizer *t, uint32_t id)
{
    TextSlice slice = t->text_slices[id];
    for (size_t i = 0; i < G_N_ELEMENTS(end_names); i++) {
        if (strlen(end_names[i]) == slice.length &&
            memcmp(end_names[i], t->texts->data + slice.offset, slice.length) == 0) {
            return true;
        }
    }
    return false;
}

static void tokenizer_collect_end_ids(Tokenizer *t, const TokenizerVocab *vocab)
{
    GArray *ids = g_array_new(FALSE, FALSE, sizeof(uint32_t));
    for (uint32_t id = 0; id < t->n_tokens; id++) {
        bool named = id == vocab->eos || id == vocab->eot || id == vocab->eom;
        if (named || (t->kinds[id] == TOKEN_CONTROL && tokenizer_has_end_name(t, id))) {
            g_array_append_val(ids, id);
        }
    }
    t->n_end_ids = ids->len;
    t->end_ids = (uint32_t *)(void *)g_array_free(ids, FALSE);
}

static bool tokenizer_choose_model(Tokenizer *t, const TokenizerVocab *vocab, GError **error)
{
    if (g_str_equal(vocab->model, "gpt2")) {
        t->is_bpe = true;
        return true;
    }
    if (g_str_equal(vocab->model, "llama")) {
        return true;
    }
    g_autofree char *shown = g_utf8_make_valid(vocab->model, -1);
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                "tokenizer.ggml.model \"%.64s\" is not supported; gpt2 (byte-level BPE) and llama "
                "(SentencePiece) are",
                shown);
    return false;
}

/* Either spelling of a token may be what an encoder cuts texts into. */
static void tokenizer_measure(Tokenizer *t)
{
    t->longest = 1;
    for (uint32_t id = 0; id < t->n_tokens; id++) {
        t->longest = MAX(t->longest, MAX(t->text_slices[id].length, t->piece_slices[id].length));
    }
    t->spells_bytes = true;
    for (unsigned byte = 0; byte < 256; byte++) {
        t->spells_bytes = t->spells_bytes && t->byte_ids[byte] >= 0;
    }
}

Tokenizer *tokenizer_from_vocab(const TokenizerVocab *vocab, GError **error)
{
    g_autoptr(Tokenizer) t = g_new0(Tokenizer, 1);
    if (!tokenizer_choose_model(t, vocab, error) || !vocab_check(vocab, error)) {
        return NULL;
    }
    t->texts = g_byte_array_new();
    t->pieces = g_byte_array_new();
    /* One byte that no slice has: a vocabulary of empty texts still has blobs to point into. */
    g_byte_array_append(t->texts, (const guint8 *)"", 1);
    g_byte_array_append(t->pieces, (const guint8 *)"", 1);
    t->bos = vocab->bos;
    t->eos = vocab->eos;
    t->unk = vocab->unk;
    memset(t->byte_ids, -1, sizeof t->byte_ids);
    if (!tokenizer_copy_tokens(t, vocab, error) ||
        !(t->is_bpe ? tokenizer_bpe_build(t, vocab, error)
                    : tokenizer_spm_build(t, vocab, error))) {
        return NULL;
    }
    if (t->adds_bos && t->bos < 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "the model wants a BOS token, but tokenizer.ggml.bos_token_id is missing");
        return NULL;
    }
    tokenizer_measure(t);
    tokenizer_sort_specials(t);
    tokenizer_collect_end_ids(t, vocab);
    return g_steal_pointer(&t);
}

static void free_bytes(GByteArray *bytes)
{
    if (bytes != NULL) {
        g_byte_array_unref(bytes);
    }
}

void tokenizer_free(Tokenizer *t)
{
    if (t == NULL) {
        return;
    }
    free_bytes(t->texts);
    free_bytes(t->pieces);
    weft_free(t->text_slices);
    weft_free(t->piece_slices);
    weft_free(t->kinds);
    weft_free(t->pairs);
    weft_free(t->score_order);
    token_table_clear(&t->by_piece);
    token_table_clear(&t->by_text);
    pre_tokenizer_free(t->pre);
    g_free(t->always_special);
    g_free(t->all_special);
    g_free(t->end_ids);
    g_free(t);
}

const char *tokenizer_piece(const Tokenizer *t, uint32_t id, bool special, size_t *length_out)
{
    *length_out = 0;
    if (id >= t->n_tokens || (!special && tokenizer_is_special(t->kinds[id]))) {
        return "";
    }
    *length_out = t->piece_slices[id].length;
    return (const char *)t->pieces->data + t->piece_slices[id].offset;
}

uint32_t tokenizer_size(const Tokenizer *t)
{
    return t->n_tokens;
}

int64_t tokenizer_bos(const Tokenizer *t)
{
    return t->bos;
}

int64_t tokenizer_eos(const Tokenizer *t)
{
    return t->eos;
}

bool tokenizer_adds_bos(const Tokenizer *t)
{
    return t->adds_bos;
}

bool tokenizer_is_control(const Tokenizer *t, uint32_t id)
{
    return id < t->n_tokens && t->kinds[id] == TOKEN_CONTROL;
}

const uint32_t *tokenizer_end_ids(const Tokenizer *t, uint32_t *n_out)
{
    *n_out = t->n_end_ids;
    return t->end_ids;
}
