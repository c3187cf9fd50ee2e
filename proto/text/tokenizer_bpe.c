/* Byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909; over bytes as in GPT-2): a word is the
 * list of its bytes' tokens; the pair that stands first in the file's merges is joined, leftmost
 * first, until no pair is in the list. */
#include "proto/text/tokenizer_model.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "proto/text/byte_alphabet.h"
#include "proto/text/nfc.h"
#include "proto/text/utf8.h"

#include <string.h>

static bool is_in_alphabet(const char *text, size_t length)
{
    for (size_t at = 0; at < length;) {
        uint32_t code;
        int step = utf8_decode(text + at, length - at, &code);
        if (step <= 0 || byte_alphabet_byte(code) < 0) {
            return false;
        }
        at += (size_t)step;
    }
    return true;
}

/* User-defined tokens are plain text; of the others those that the alphabet spells are bytes. */
void tokenizer_bpe_append_piece(const Tokenizer *t, uint32_t id, const char *text, size_t length)
{
    if (t->kinds[id] == TOKEN_USER_DEFINED || !is_in_alphabet(text, length)) {
        g_byte_array_append(t->pieces, (const guint8 *)text, (guint)length);
        return;
    }
    for (size_t at = 0; at < length;) {
        uint32_t code = 0;
        at += (size_t)utf8_decode(text + at, length - at, &code);
        guint8 byte = (guint8)byte_alphabet_byte(code);
        g_byte_array_append(t->pieces, &byte, 1);
    }
}

static MergePair *pair_slot(const Tokenizer *t, uint32_t left, uint32_t right)
{
    uint64_t mixed = ((uint64_t)left << 32 | right) * 0x9E3779B97F4A7C15u;
    uint32_t at = (uint32_t)(mixed >> 32) & t->pair_mask;
    while (t->pairs[at].order != UINT32_MAX &&
           (t->pairs[at].left != left || t->pairs[at].right != right)) {
        at = (at + 1) & t->pair_mask;
    }
    return &t->pairs[at];
}

/* The ids of "left right" and of their concatenation; false if one is no token. */
static bool merge_resolve(const TokenTable *by_text, VocabText merge, MergePair *out)
{
    char joined[2 * TOKENIZER_TOKEN_BYTES_MAX];
    const char *space = merge.length > 1 ? memchr(merge.text + 1, ' ', merge.length - 1) : NULL;
    if (space == NULL || merge.length - 1 > sizeof joined) {
        return false;
    }
    size_t left = (size_t)(space - merge.text), right = merge.length - left - 1;
    memcpy(joined, merge.text, left);
    memcpy(joined + left, space + 1, right);
    int64_t a = token_table_find(by_text, joined, left),
            b = token_table_find(by_text, joined + left, right),
            c = token_table_find(by_text, joined, left + right);
    *out = (MergePair){.left = (uint32_t)a, .right = (uint32_t)b, .id = (uint32_t)c};
    return a >= 0 && b >= 0 && c >= 0;
}

static bool bpe_build_pairs(Tokenizer *t, const TokenizerVocab *vocab, const TokenTable *by_text,
                            GError **error)
{
    uint32_t size = 16;
    while (size / 2 < vocab->n_merges) {
        size *= 2;
    }
    t->pairs = weft_alloc(size, sizeof *t->pairs, "the merge table", error);
    if (t->pairs == NULL) {
        return false;
    }
    t->pair_mask = size - 1;
    for (uint32_t i = 0; i < size; i++) {
        t->pairs[i].order = UINT32_MAX;
    }
    for (uint32_t i = 0; i < vocab->n_merges; i++) {
        MergePair pair;
        if (!merge_resolve(by_text, vocab->merges[i], &pair)) {
            g_autofree char *shown =
                g_utf8_make_valid(vocab->merges[i].text, (gssize)MIN(vocab->merges[i].length, 64));
            g_set_error(
                error, WEFT_ERROR, WEFT_ERROR_INVALID,
                "tokenizer.ggml.merges[%u] \"%s\" is not two tokens whose concatenation is a token",
                i, shown);
            return false;
        }
        MergePair *slot = pair_slot(t, pair.left, pair.right);
        if (slot->order == UINT32_MAX) {
            pair.order = i;
            *slot = pair;
        }
    }
    return true;
}

/* A byte whose character is no token is dropped from texts, as the model makers' own tokenizers do.
 */
static void bpe_build_bytes(Tokenizer *t, const TokenTable *by_text)
{
    for (unsigned byte = 0; byte < 256; byte++) {
        char text[4];
        t->byte_ids[byte] =
            token_table_find(by_text, text, utf8_encode(byte_alphabet_char((uint8_t)byte), text));
    }
}

static bool bpe_build_whole_words(Tokenizer *t, GError **error)
{
    if (!pre_tokenizer_ignores_merges(t->pre)) {
        return true;
    }
    if (!token_table_init(&t->by_piece, (const char *)t->pieces->data, t->piece_slices, t->n_tokens,
                          error)) {
        return false;
    }
    for (uint32_t id = 0; id < t->n_tokens; id++) {
        if (t->kinds[id] == TOKEN_NORMAL) {
            token_table_add(&t->by_piece, id);
        }
    }
    return true;
}

bool tokenizer_bpe_build(Tokenizer *t, const TokenizerVocab *vocab, GError **error)
{
    if (vocab->pre == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "tokenizer.ggml.pre is missing: how the model cuts words is not known; convert "
                    "the model with a newer converter");
        return false;
    }
    if (vocab->space_prefix > SPACE_PREFIX_NEVER) {
        g_set_error(
            error, WEFT_ERROR, WEFT_ERROR_INVALID,
            "tokenizer.ggml.add_space_prefix is true, which is not supported for model gpt2");
        return false;
    }
    t->pre = pre_tokenizer_new(vocab->pre, error);
    if (t->pre == NULL) {
        return false;
    }
    t->adds_bos = vocab->adds_bos == VOCAB_DEFAULT ? pre_tokenizer_adds_bos(t->pre)
                                                   : vocab->adds_bos == VOCAB_YES;
    TokenTable by_text;
    bool ok = token_table_init(&by_text, (const char *)t->texts->data, t->text_slices, t->n_tokens,
                               error);
    if (ok) {
        for (uint32_t id = 0; id < t->n_tokens; id++) {
            token_table_add(&by_text, id);
        }
        bpe_build_bytes(t, &by_text);
        ok = bpe_build_pairs(t, vocab, &by_text, error) && bpe_build_whole_words(t, error);
    }
    token_table_clear(&by_text);
    return ok;
}

static bool bpe_rule(void *user, const MergeSymbol *left, const MergeSymbol *right,
                     uint32_t *order_out, uint32_t *id_out)
{
    const MergePair *pair = pair_slot(user, left->id, right->id);
    *order_out = pair->order;
    *id_out = pair->id;
    return pair->order != UINT32_MAX;
}

static bool bpe_encode_word(void *user, const char *word, size_t length, GError **error)
{
    EncodeRun *run = user;
    const Tokenizer *t = run->tokenizer;
    int64_t whole = t->by_piece.slots != NULL ? token_table_find(&t->by_piece, word, length) : -1;
    if (whole >= 0) {
        uint32_t id = (uint32_t)whole;
        g_array_append_val(run->ids, id);
        return true;
    }
    if (!tokenizer_has_room(run, length, error) || !merge_queue_reset(&run->queue, length, error)) {
        return false;
    }
    for (size_t i = 0; i < length; i++) {
        int64_t id = t->byte_ids[(uint8_t)word[i]];
        if (id >= 0) {
            merge_queue_push(&run->queue, (uint32_t)i, 1, (uint32_t)id);
        }
    }
    if (run->queue.n_symbols == 0) {
        return true;
    }
    merge_queue_run(&run->queue, bpe_rule, (void *)t);
    for (uint32_t i = 0; i != UINT32_MAX; i = run->queue.symbols[i].next) {
        g_array_append_val(run->ids, run->queue.symbols[i].id);
    }
    return true;
}

static bool bpe_encode_valid(EncodeRun *run, const char *text, size_t length, GError **error)
{
    const Tokenizer *t = run->tokenizer;
    if (pre_tokenizer_normalizes(t->pre)) {
        g_string_truncate(run->normalized, 0);
        if (!nfc_append(text, length, run->normalized, error)) {
            return false;
        }
        text = run->normalized->str;
        length = run->normalized->len;
    }
    return pre_tokenizer_split(t->pre, run->scratch, text, length, bpe_encode_word, run, error);
}

/* Bytes that are no UTF-8 are words of their own: patterns see characters only. */
bool tokenizer_bpe_encode(EncodeRun *run, const char *text, size_t length, GError **error)
{
    for (size_t at = 0; at < length;) {
        size_t valid = utf8_valid_run(text + at, length - at);
        if (valid > 0 && !bpe_encode_valid(run, text + at, valid, error)) {
            return false;
        }
        at += valid;
        if (at < length && !bpe_encode_word(run, text + at, 1, error)) {
            return false;
        }
        at += at < length;
    }
    return true;
}
