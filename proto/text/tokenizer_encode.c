/* Text to ids: special tokens are cut out first (leftmost, then longest), what lies between goes to
 * the model's own encoder. */
#include "proto/text/tokenizer_model.h"

#include "proto/base/error.h"

/* The first index in sorted[low..high) whose piece has a byte >= `byte` (or > with `above`) at
 * `depth`; all share the bytes before it. */
static uint32_t special_bound(const Tokenizer *t, const uint32_t *sorted, uint32_t low,
                              uint32_t high, uint32_t depth, uint8_t byte, bool above)
{
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        TextSlice slice = t->piece_slices[sorted[middle]];
        int here = depth < slice.length ? t->pieces->data[slice.offset + depth] : -1;
        if (here < byte || (above && here == byte)) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

/* The longest special token that text begins with; -1 if none. */
static int64_t special_at(const Tokenizer *t, const uint32_t *sorted, uint32_t n, const char *text,
                          size_t length)
{
    int64_t best = -1;
    uint32_t low = 0, high = n;
    for (uint32_t depth = 0; depth < length && low < high; depth++) {
        uint8_t byte = (uint8_t)text[depth];
        low = special_bound(t, sorted, low, high, depth, byte, false);
        high = special_bound(t, sorted, low, high, depth, byte, true);
        if (low < high && t->piece_slices[sorted[low]].length == depth + 1) {
            best = sorted[low];
        }
    }
    return best;
}

/* As many as these times `most` are counted out. */
#define COUNTED 4u

bool tokenizer_has_room(const EncodeRun *run, size_t length, GError **error)
{
    const Tokenizer *t = run->tokenizer;
    const size_t least = t->spells_bytes ? length / t->longest : 0;
    if (run->most == 0 || (least <= run->most && run->ids->len <= (size_t)COUNTED * run->most)) {
        return true;
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_TOO_LONG, "text of more than %u tokens", run->most);
    return false;
}

static bool encode_plain(EncodeRun *run, const char *text, size_t length, GError **error)
{
    if (length == 0) {
        return true;
    }
    return run->tokenizer->is_bpe ? tokenizer_bpe_encode(run, text, length, error)
                                  : tokenizer_spm_encode(run, text, length, error);
}

static bool encode_text(EncodeRun *run, const char *text, size_t length, bool parse_special,
                        GError **error)
{
    const Tokenizer *t = run->tokenizer;
    const uint32_t *sorted = parse_special ? t->all_special : t->always_special;
    uint32_t n = parse_special ? t->n_all_special : t->n_always_special;
    bool begins[256] = {false};
    for (uint32_t i = 0; i < n; i++) {
        begins[t->pieces->data[t->piece_slices[sorted[i]].offset]] = true;
    }
    size_t plain = 0;
    for (size_t at = 0; at < length;) {
        int64_t special =
            begins[(uint8_t)text[at]] ? special_at(t, sorted, n, text + at, length - at) : -1;
        if (special < 0) {
            at++;
            continue;
        }
        run->begun = plain > 0;
        if (!encode_plain(run, text + plain, at - plain, error) ||
            !tokenizer_has_room(run, 0, error)) {
            return false;
        }
        uint32_t id = (uint32_t)special;
        g_array_append_val(run->ids, id);
        at += t->piece_slices[id].length;
        plain = at;
    }
    run->begun = plain > 0;
    return encode_plain(run, text + plain, length - plain, error);
}

GArray *tokenizer_encode(const Tokenizer *t, const char *text, size_t length, bool add_bos,
                         bool parse_special, GError **error)
{
    return tokenizer_encode_most(t, text, length, add_bos, parse_special, 0, error);
}

GArray *tokenizer_encode_most(const Tokenizer *t, const char *text, size_t length, bool add_bos,
                              bool parse_special, uint32_t most, GError **error)
{
    if (length > TOKENIZER_TEXT_MAX) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "text of %zu bytes is too long to tokenize; at most %u bytes", length,
                    TOKENIZER_TEXT_MAX);
        return NULL;
    }
    EncodeRun run = {.tokenizer = t, .most = most};
    if (t->is_bpe) {
        run.scratch = pre_tokenizer_scratch_new(error);
        if (run.scratch == NULL) {
            return NULL;
        }
    }
    run.ids = g_array_new(FALSE, FALSE, sizeof(uint32_t));
    run.normalized = g_string_new(NULL);
    if (add_bos && t->adds_bos) {
        uint32_t bos = (uint32_t)t->bos;
        g_array_append_val(run.ids, bos);
    }
    bool ok = encode_text(&run, text, length, parse_special, error);
    merge_queue_clear(&run.queue);
    pre_tokenizer_scratch_free(run.scratch);
    g_string_free(run.normalized, TRUE);
    if (!ok) {
        g_array_free(run.ids, TRUE);
        return NULL;
    }
    return run.ids;
}
