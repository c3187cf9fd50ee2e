/* The order of an epoch is a permutation of [0, n) that can be asked at one place: a balanced
 * Feistel network of Philox words over the next even number of bits, walked along its cycle until
 * it lands below n (Black, Rogaway 2002, "Ciphers with arbitrary finite domains"). */
#include "worker/train/token_data.h"

#include "kernels/ops/sample.h"
#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "worker/model/training.h"

#include <string.h>

enum { FEISTEL_ROUNDS = 6 };

/* Documents side by side: ids [first, first + n). */
typedef struct Window {
    uint64_t first;
    uint32_t n;
} Window;

struct TokenData {
    uint32_t *ids;
    uint8_t *flags; /* DOCUMENT_*; NULL: all are learnt, one document */
    size_t n;
    uint32_t length;
    GArray *windows; /* Window; NULL: a stream */
};

static TokenData *data_new(const uint32_t *ids, const uint8_t *flags, size_t n, uint32_t length,
                           GError **error)
{
    g_autoptr(TokenData) d = g_new0(TokenData, 1);
    d->n = n;
    d->length = length;
    d->ids = weft_alloc(n, sizeof *d->ids, "training data", error);
    d->flags = d->ids != NULL && flags != NULL ? weft_alloc(n, 1, "training data", error) : NULL;
    if (d->ids == NULL || (flags != NULL && d->flags == NULL)) {
        return NULL;
    }
    memcpy(d->ids, ids, n * sizeof *ids);
    if (flags != NULL) {
        memcpy(d->flags, flags, n);
    }
    return g_steal_pointer(&d);
}

static bool check_length(size_t n, uint32_t length, GError **error)
{
    if (length < 1 || n < (size_t)length + 1) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "%zu tokens, fewer than one sequence of %u and its last target; give more text "
                    "or shorter sequences",
                    n, length);
        return false;
    }
    return true;
}

TokenData *token_data_new(const uint32_t *ids, size_t n, uint32_t length, GError **error)
{
    return check_length(n, length, error) ? data_new(ids, NULL, n, length, error) : NULL;
}

/* The end of the document that begins at `at`. */
static size_t document_end(const TokenData *d, size_t at)
{
    do {
        at++;
    } while (at < d->n && (d->flags[at] & DOCUMENT_BEGIN) == 0);
    return at;
}

/* A window is closed when the next document does not fit; one that fits into no
 * window is cut. */
static void pack(TokenData *d)
{
    Window window = {0};
    d->windows = g_array_new(FALSE, FALSE, sizeof window);
    for (size_t at = 0, end; at < d->n; at = end) {
        end = document_end(d, at);
        if (window.n > 0 && end - at > d->length - window.n) {
            g_array_append_val(d->windows, window);
            window = (Window){.first = at};
        }
        for (; end - at > d->length; at += d->length) {
            const Window whole = {at, d->length};
            g_array_append_val(d->windows, whole);
            window = (Window){.first = at + d->length};
        }
        window.n += (uint32_t)(end - at);
    }
    if (window.n > 0) {
        g_array_append_val(d->windows, window);
    }
}

TokenData *token_data_from(const Documents *documents, uint32_t length, TokenPacking packing,
                           GError **error)
{
    const bool packed = packing == TOKENS_DOCUMENTS;
    if (!check_length(packed ? (size_t)length + 1 : documents->n, length, error)) {
        return NULL;
    }
    TokenData *d = data_new(documents->ids, documents->flags, documents->n, length, error);
    if (d != NULL && packed) {
        pack(d);
    }
    return d;
}

void token_data_free(TokenData *d)
{
    if (d != NULL) {
        weft_free(d->ids);
        weft_free(d->flags);
        if (d->windows != NULL) {
            g_array_unref(d->windows);
        }
        g_free(d);
    }
}

uint64_t token_data_windows(const TokenData *d)
{
    return d->windows != NULL ? d->windows->len : (d->n - 1) / d->length;
}

static uint64_t feistel(uint64_t seed, uint64_t epoch, unsigned half_bits, uint64_t x)
{
    const uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    const uint64_t mask = ((uint64_t)1 << half_bits) - 1;
    uint64_t left = x >> half_bits, right = x & mask;
    for (uint32_t round = 0; round < FEISTEL_ROUNDS; round++) {
        const uint32_t counter[4] = {(uint32_t)right, (uint32_t)epoch, (uint32_t)(epoch >> 32),
                                     round};
        uint32_t words[4];
        philox4x32(counter, key, words);
        const uint64_t next = left ^ (words[0] & mask);
        left = right;
        right = next;
    }
    return left << half_bits | right;
}

uint64_t token_data_window_of(const TokenData *d, uint64_t seed, uint64_t sample)
{
    const uint64_t n = token_data_windows(d), epoch = sample / n;
    unsigned half_bits = 1;
    while ((uint64_t)1 << 2 * half_bits < n) {
        half_bits++;
    }
    uint64_t x = sample % n;
    do {
        x = feistel(seed, epoch, half_bits, x);
    } while (x >= n);
    return x;
}

static Window window_at(const TokenData *d, uint64_t window)
{
    return d->windows != NULL ? g_array_index(d->windows, Window, window)
                              : (Window){window * d->length, d->length};
}

/* What is learnt at position `at - 1`. */
static uint32_t target_at(const TokenData *d, size_t at)
{
    const uint8_t flags = d->flags != NULL ? d->flags[at] : DOCUMENT_LOSS;
    const bool apart = d->windows != NULL && (flags & DOCUMENT_BEGIN) != 0;
    return apart || (flags & DOCUMENT_LOSS) == 0 ? TARGET_NONE : d->ids[at];
}

void token_data_read(const TokenData *d, uint64_t window, uint32_t *tokens, uint32_t *targets)
{
    const Window w = window_at(d, window);
    memcpy(tokens, d->ids + w.first, w.n * sizeof *tokens);
    for (uint32_t i = 0; i < w.n; i++) {
        const size_t next = w.first + i + 1;
        targets[i] = next < d->n ? target_at(d, next) : TARGET_NONE;
    }
    for (uint32_t i = w.n; i < d->length; i++) {
        tokens[i] = 0;
        targets[i] = TARGET_NONE;
    }
}

void token_data_begins(const TokenData *d, uint64_t window, uint32_t *begins)
{
    const Window w = window_at(d, window);
    uint32_t begin = 0;
    for (uint32_t i = 0; i < d->length; i++) {
        if (i == w.n ||
            (i < w.n && d->flags != NULL && (d->flags[w.first + i] & DOCUMENT_BEGIN) != 0)) {
            begin = i;
        }
        begins[i] = begin;
    }
}

static uint64_t window_of(const TokenSamples *s, uint64_t sample)
{
    return s->in_order ? sample % token_data_windows(s->data)
                       : token_data_window_of(s->data, s->seed, sample);
}

static void read_sample(void *user, uint64_t sample, uint32_t *tokens, uint32_t *targets)
{
    const TokenSamples *s = user;
    token_data_read(s->data, window_of(s, sample), tokens, targets);
}

static void read_begins(void *user, uint64_t sample, uint32_t *begins)
{
    const TokenSamples *s = user;
    token_data_begins(s->data, window_of(s, sample), begins);
}

SampleSource token_samples_source(TokenSamples *samples)
{
    return (SampleSource){.user = samples,
                          .read = read_sample,
                          .begins = samples->bounds != BOUNDS_NONE ? read_begins : NULL,
                          .restart = samples->bounds == BOUNDS_POSITIONS,
                          .length = samples->data->length};
}
