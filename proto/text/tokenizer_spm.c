/* SentencePiece's BPE (Kudo and Richardson 2018, arXiv 1808.06226): spaces become U+2581,
 * characters are joined in order of the score of the token that results, and what is no token is
 * spelled in byte tokens. No word boundaries: the whole text is one list. */
#include "proto/text/tokenizer_model.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "proto/text/utf8.h"

#include <math.h>
#include <string.h>

#define SPACE_MARK "\xE2\x96\x81" /* U+2581 */
enum { SPACE_MARK_LENGTH = 3 };

static int hex_digit(char c)
{
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                  : -1;
}

int tokenizer_spm_byte(const char *text, size_t length)
{
    if (length != 6 || memcmp(text, "<0x", 3) != 0 || text[5] != '>') {
        return -1;
    }
    int high = hex_digit(text[3]), low = hex_digit(text[4]);
    return high < 0 || low < 0 ? -1 : high * 16 + low;
}

void tokenizer_spm_append_piece(const Tokenizer *t, uint32_t id, const char *text, size_t length)
{
    if (t->kinds[id] == TOKEN_BYTE) {
        guint8 byte = (guint8)tokenizer_spm_byte(
            text, length); /* checked by the build before any piece is given out */
        g_byte_array_append(t->pieces, &byte, 1);
        return;
    }
    for (size_t at = 0; at < length;) {
        if (length - at >= SPACE_MARK_LENGTH &&
            memcmp(text + at, SPACE_MARK, SPACE_MARK_LENGTH) == 0) {
            g_byte_array_append(t->pieces, (const guint8 *)" ", 1);
            at += SPACE_MARK_LENGTH;
        } else {
            g_byte_array_append(t->pieces, (const guint8 *)text + at, 1);
            at++;
        }
    }
}

static int compare_scores(gconstpointer a, gconstpointer b, gpointer user)
{
    const double *scores = user;
    double x = scores[*(const uint32_t *)a], y = scores[*(const uint32_t *)b];
    return (x < y) - (x > y);
}

static bool spm_build_order(Tokenizer *t, const TokenizerVocab *vocab, GError **error)
{
    for (uint32_t id = 0; id < t->n_tokens; id++) {
        if (!isfinite(vocab->scores[id])) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                        "tokenizer.ggml.scores[%u] is not a finite number", id);
            return false;
        }
    }
    t->score_order = weft_alloc(t->n_tokens, sizeof *t->score_order, "token scores", error);
    uint32_t *sorted = t->score_order != NULL
                           ? weft_alloc(t->n_tokens, sizeof *sorted, "token scores", error)
                           : NULL;
    if (sorted == NULL) {
        return false;
    }
    for (uint32_t i = 0; i < t->n_tokens; i++) {
        sorted[i] = i;
    }
    g_qsort_with_data(sorted, (gint)t->n_tokens, sizeof *sorted, compare_scores,
                      (gpointer)vocab->scores);
    for (uint32_t i = 1; i < t->n_tokens; i++) {
        bool lower = vocab->scores[sorted[i]] < vocab->scores[sorted[i - 1]];
        t->score_order[sorted[i]] = t->score_order[sorted[i - 1]] + lower;
    }
    weft_free(sorted);
    return true;
}

/* Control, unknown and byte tokens are never made out of text. */
static bool spm_build_lookup(Tokenizer *t, GError **error)
{
    if (!token_table_init(&t->by_text, (const char *)t->texts->data, t->text_slices, t->n_tokens,
                          error)) {
        return false;
    }
    for (uint32_t id = 0; id < t->n_tokens; id++) {
        const char *text = (const char *)t->texts->data + t->text_slices[id].offset;
        if (t->kinds[id] == TOKEN_BYTE) {
            int byte = tokenizer_spm_byte(text, t->text_slices[id].length);
            if (byte < 0) {
                g_autofree char *shown =
                    g_utf8_make_valid(text, (gssize)MIN(t->text_slices[id].length, 16));
                g_set_error(
                    error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "token %u is of type byte, but its text is \"%s\" instead of <0x00> to <0xFF>",
                    id, shown);
                return false;
            }
            t->byte_ids[byte] = t->byte_ids[byte] < 0 ? id : t->byte_ids[byte];
        } else if (t->kinds[id] != TOKEN_CONTROL && t->kinds[id] != TOKEN_UNKNOWN) {
            token_table_add(&t->by_text, id);
            t->has_unused |= t->kinds[id] == TOKEN_UNUSED;
        }
    }
    return true;
}

bool tokenizer_spm_build(Tokenizer *t, const TokenizerVocab *vocab, GError **error)
{
    if (vocab->kinds == NULL || vocab->scores == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "tokenizer.ggml.%s is missing, which model llama needs",
                    vocab->scores == NULL ? "scores" : "token_type");
        return false;
    }
    t->adds_bos = vocab->adds_bos != VOCAB_NO;
    t->space_prefix =
        vocab->space_prefix == SPACE_PREFIX_DEFAULT ? SPACE_PREFIX_ALWAYS : vocab->space_prefix;
    for (uint32_t id = 0; id < t->n_tokens && t->unk < 0; id++) {
        t->unk = t->kinds[id] == TOKEN_UNKNOWN ? (int64_t)id : -1;
    }
    return spm_build_order(t, vocab, error) && spm_build_lookup(t, error);
}

typedef struct SpmRun {
    EncodeRun *run;
    const char *text; /* normalized */
    GHashTable
        *splits; /* unused token id -> bytes of its left part; NULL if the vocabulary has none */
    bool after_unknown;
} SpmRun;

static bool spm_rule(void *user, const MergeSymbol *left, const MergeSymbol *right,
                     uint32_t *order_out, uint32_t *id_out)
{
    SpmRun *spm = user;
    const Tokenizer *t = spm->run->tokenizer;
    int64_t id = token_table_find(&t->by_text, spm->text + left->start,
                                  (size_t)left->length + right->length);
    if (id < 0) {
        return false;
    }
    if (t->kinds[id] == TOKEN_UNUSED) {
        g_hash_table_insert(spm->splits, GUINT_TO_POINTER((guint)id),
                            GUINT_TO_POINTER(left->length));
    }
    *order_out = t->score_order[id];
    *id_out = (uint32_t)id;
    return true;
}

static void spm_emit(SpmRun *spm, uint32_t id)
{
    g_array_append_val(spm->run->ids, id);
    spm->after_unknown = false;
}

/* Bytes that no token spells: byte tokens if there are any, else one unknown token for the whole
 * run of them. */
static void spm_emit_missing(SpmRun *spm, const char *text, size_t length)
{
    const Tokenizer *t = spm->run->tokenizer;
    for (size_t i = 0; i < length; i++) {
        int64_t id = t->byte_ids[(uint8_t)text[i]];
        if (id >= 0) {
            spm_emit(spm, (uint32_t)id);
        } else if (t->unk >= 0 && !spm->after_unknown) {
            spm_emit(spm, (uint32_t)t->unk);
            spm->after_unknown = true;
        }
    }
}

/* A token that is marked unused serves as a step of merging only and is taken apart again. Depth:
 * the bytes of a token. */
static void spm_emit_text(SpmRun *spm, const char *text, size_t length)
{
    const Tokenizer *t = spm->run->tokenizer;
    int64_t id = token_table_find(&t->by_text, text, length);
    if (id < 0) {
        spm_emit_missing(spm, text, length);
        return;
    }
    size_t left =
        t->kinds[id] == TOKEN_UNUSED
            ? GPOINTER_TO_UINT(g_hash_table_lookup(spm->splits, GUINT_TO_POINTER((guint)id)))
            : 0;
    if (left == 0) {
        spm_emit(spm, (uint32_t)id);
        return;
    }
    spm_emit_text(spm, text, left);
    spm_emit_text(spm, text + left, length - left);
}

static bool spm_gets_prefix(const EncodeRun *run, const char *text, size_t length)
{
    const SpacePrefix rule = run->tokenizer->space_prefix;
    if (rule != SPACE_PREFIX_FIRST) {
        return rule == SPACE_PREFIX_ALWAYS;
    }
    const bool marked =
        length >= SPACE_MARK_LENGTH && memcmp(text, SPACE_MARK, SPACE_MARK_LENGTH) == 0;
    return !run->begun && text[0] != ' ' && !marked;
}

static void spm_normalize(const EncodeRun *run, const char *text, size_t length, GString *out)
{
    g_string_truncate(out, 0);
    if (spm_gets_prefix(run, text, length)) {
        g_string_append_len(out, SPACE_MARK, SPACE_MARK_LENGTH);
    }
    for (size_t at = 0; at < length;) {
        const char *space = memchr(text + at, ' ', length - at);
        size_t plain = space != NULL ? (size_t)(space - text) - at : length - at;
        g_string_append_len(out, text + at, (gssize)plain);
        at += plain;
        if (space != NULL) {
            g_string_append_len(out, SPACE_MARK, SPACE_MARK_LENGTH);
            at++;
        }
    }
}

/* Bytes of the symbol that text begins with: a character, or one byte that is none. */
static uint32_t spm_symbol(const char *text, size_t length)
{
    uint32_t code;
    int step = utf8_decode(text, length, &code);
    return step > 0 ? (uint32_t)step : 1;
}

/* One symbol for each character; the room is counted first, since it costs many times the text. */
static bool spm_start(MergeQueue *queue, const GString *text, GError **error)
{
    size_t n = 0;
    for (size_t at = 0; at < text->len; n++) {
        at += spm_symbol(text->str + at, text->len - at);
    }
    if (!merge_queue_reset(queue, n, error)) {
        return false;
    }
    for (size_t at = 0; at < text->len;) {
        uint32_t bytes = spm_symbol(text->str + at, text->len - at);
        merge_queue_push(queue, (uint32_t)at, bytes, MERGE_NO_ID);
        at += bytes;
    }
    return true;
}

bool tokenizer_spm_encode(EncodeRun *run, const char *text, size_t length, GError **error)
{
    GString *normalized = run->normalized;
    spm_normalize(run, text, length, normalized);
    if (!tokenizer_has_room(run, normalized->len, error) ||
        !spm_start(&run->queue, normalized, error)) {
        return false;
    }
    SpmRun spm = {.run = run, .text = normalized->str};
    if (run->tokenizer->has_unused) {
        spm.splits = g_hash_table_new(NULL, NULL);
    }
    merge_queue_run(&run->queue, spm_rule, &spm);
    for (uint32_t i = 0; i != UINT32_MAX; i = run->queue.symbols[i].next) {
        spm_emit_text(&spm, normalized->str + run->queue.symbols[i].start,
                      run->queue.symbols[i].length);
    }
    g_clear_pointer(&spm.splits, g_hash_table_destroy);
    return true;
}
