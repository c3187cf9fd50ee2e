/* A vocabulary and a text out of any bytes. Loading ends with a tokenizer or an error; ids are in
 * range; byte-level BPE with all bytes gives the text back.
 *
 * Layout: flags, pre-tokenizer, n tokens (kind, score, length, bytes)..., n merges (length,
 * bytes)..., the text. */
#include "proto/base/bytes.h"
#include "proto/text/byte_alphabet.h"
#include "proto/text/stop.h"
#include "proto/text/tokenizer_vocab.h"
#include "proto/text/utf8.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum {
    FLAG_LLAMA = 1,
    FLAG_BYTES = 2,
    FLAG_SPECIAL = 4,
    FLAG_NO_SPACE = 8,
    FLAG_NO_KINDS = 16,
    FLAG_BOS = 32,
    FLAG_FIRST = 64,
    TOKENS_MAX = 512
};

typedef struct Input {
    ByteReader reader;
    VocabText tokens[TOKENS_MAX], merges[256];
    int64_t kinds[TOKENS_MAX];
    double scores[TOKENS_MAX];
    char byte_texts[256][8];
    TokenizerVocab vocab;
} Input;

static void add_byte_tokens(Input *in, bool llama)
{
    for (unsigned byte = 0; byte < 256; byte++) {
        char *text = in->byte_texts[byte];
        size_t n = llama ? 6 : utf8_encode(byte_alphabet_char((uint8_t)byte), text);
        if (llama) {
            g_snprintf(text, 8, "<0x%02X>", byte);
        }
        uint64_t at = in->vocab.n_tokens++;
        in->tokens[at] = (VocabText){text, n};
        in->kinds[at] = llama ? TOKEN_BYTE : TOKEN_NORMAL;
    }
}

static VocabText read_text(ByteReader *r)
{
    size_t n = byte_reader_u8(r);
    const uint8_t *bytes = byte_reader_take(r, n);
    return bytes != NULL ? (VocabText){(const char *)bytes, n} : (VocabText){"", 0};
}

static uint8_t read_input(Input *in)
{
    static const char *const names[] = {"gpt-2",          "smollm",      "llama-bpe", "qwen2",
                                        "deepseek-coder", "deepseek-v3", "default",   "unknown"};
    uint8_t flags = byte_reader_u8(&in->reader), pre = byte_reader_u8(&in->reader);
    in->vocab = (TokenizerVocab){.model = flags & FLAG_LLAMA ? "llama" : "gpt2",
                                 .pre = names[pre % G_N_ELEMENTS(names)],
                                 .tokens = in->tokens,
                                 .merges = in->merges,
                                 .scores = in->scores,
                                 .kinds = flags & FLAG_NO_KINDS ? NULL : in->kinds,
                                 .eot = -1,
                                 .eom = -1,
                                 .unk = -1};
    in->vocab.bos = flags & FLAG_BOS ? (int64_t)pre * 3 : 0;
    in->vocab.eos = -1;
    in->vocab.adds_bos = flags & FLAG_BOS ? VOCAB_YES : VOCAB_NO;
    in->vocab.space_prefix = flags & FLAG_NO_SPACE || !(flags & FLAG_LLAMA) ? SPACE_PREFIX_NEVER
                             : flags & FLAG_FIRST                           ? SPACE_PREFIX_FIRST
                                                                            : SPACE_PREFIX_ALWAYS;
    if (flags & FLAG_BYTES) {
        add_byte_tokens(in, (flags & FLAG_LLAMA) != 0);
    }
    for (unsigned n = byte_reader_u8(&in->reader); n > 0 && !in->reader.failed; n--) {
        uint64_t at = in->vocab.n_tokens++;
        in->kinds[at] = byte_reader_u8(&in->reader);
        in->scores[at] = -(double)byte_reader_u8(&in->reader);
        in->tokens[at] = read_text(&in->reader);
    }
    for (unsigned n = byte_reader_u8(&in->reader); n > 0 && !in->reader.failed; n--) {
        in->merges[in->vocab.n_merges++] = read_text(&in->reader);
    }
    return flags;
}

/* Streams the ids through detokenizer and stop matcher; returns the bytes of the pieces. */
static GString *decode(const Tokenizer *t, const GArray *ids)
{
    static const char *const stops[] = {"ab", "\xEF\xBF\xBD", "aab"};
    GString *pieces = g_string_new(NULL);
    g_autoptr(GString) shown = g_string_new(NULL), safe = g_string_new(NULL);
    Detokenizer *d = detokenizer_new(t, true);
    StopMatcher *m = stop_matcher_new(stops, G_N_ELEMENTS(stops));
    for (guint i = 0; i < ids->len; i++) {
        uint32_t id = g_array_index(ids, uint32_t, i);
        g_assert(id < tokenizer_size(t));
        size_t n, before = shown->len;
        const char *piece = tokenizer_piece(t, id, true, &n);
        g_string_append_len(pieces, piece, (gssize)n);
        detokenizer_push(d, id, shown);
        stop_matcher_push(m, shown->str + before, shown->len - before, safe);
    }
    detokenizer_finish(d, shown);
    stop_matcher_finish(m, safe);
    g_assert(utf8_valid_run(shown->str, shown->len) == shown->len);
    g_assert(safe->len <= shown->len && memcmp(safe->str, shown->str, safe->len) == 0);
    detokenizer_free(d);
    stop_matcher_free(m);
    return pieces;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    g_autofree Input *in = g_new0(Input, 1);
    in->reader = byte_reader(data, size);
    uint8_t flags = read_input(in);
    g_autoptr(GError) error = NULL;
    g_autoptr(Tokenizer) t = tokenizer_from_vocab(&in->vocab, &error);
    g_assert((t == NULL) == (error != NULL));
    if (t == NULL) {
        return 0;
    }
    const char *text = (const char *)data + in->reader.offset;
    size_t length = size - in->reader.offset;
    g_autoptr(GArray) ids =
        tokenizer_encode(t, text, length, false, (flags & FLAG_SPECIAL) != 0, &error);
    g_assert((ids == NULL) == (error != NULL));
    if (ids == NULL) {
        return 0;
    }
    g_autoptr(GString) pieces = decode(t, ids);
    bool exact =
        (flags & (FLAG_BYTES | FLAG_LLAMA)) == FLAG_BYTES && !g_str_equal(in->vocab.pre, "qwen2");
    g_assert(!exact || (pieces->len == length && memcmp(pieces->str, text, length) == 0));
    return 0;
}
