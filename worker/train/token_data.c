/* The order of an epoch is a permutation of [0, n) that can be asked at one place: a balanced
 * Feistel network of Philox words over the next even number of bits, walked along its cycle until
 * it lands below n (Black, Rogaway 2002, "Ciphers with arbitrary finite domains"). */
#include "worker/train/token_data.h"

#include "kernels/ops/sample.h"
#include "proto/base/checked.h"
#include "proto/base/error.h"

#include <string.h>

enum { FEISTEL_ROUNDS = 6 };

struct TokenData {
    uint32_t *ids;
    size_t n;
    uint32_t length, vocabulary;
};

TokenData *token_data_new(const uint32_t *ids, size_t n, uint32_t length, GError **error)
{
    if (length < 1 || n < (size_t)length + 1) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "training data has %zu tokens, fewer than one sequence of %u and its last "
                    "target; give more text or shorter sequences",
                    n, length);
        return NULL;
    }
    g_autoptr(TokenData) d = g_new0(TokenData, 1);
    d->ids = weft_alloc(n, sizeof *d->ids, "training data", error);
    if (d->ids == NULL) {
        return NULL;
    }
    memcpy(d->ids, ids, n * sizeof *ids);
    d->n = n;
    d->length = length;
    for (size_t i = 0; i < n; i++) {
        d->vocabulary = MAX(d->vocabulary, ids[i] + 1);
    }
    return g_steal_pointer(&d);
}

TokenData *token_data_load(const char *path, const Tokenizer *tokenizer, uint32_t length,
                           GError **error)
{
    g_autofree char *text = NULL;
    g_autoptr(GError) failed = NULL;
    gsize size;
    if (!g_file_get_contents(path, &text, &size, &failed)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND,
                    "training data %s: %s; give a text file", path, failed->message);
        return NULL;
    }
    g_autoptr(GArray) ids = NULL;
    if (tokenizer != NULL) {
        ids = tokenizer_encode(tokenizer, text, size, false, false, error);
    } else {
        ids = g_array_sized_new(FALSE, FALSE, sizeof(uint32_t), 0);
        for (size_t i = 0; i < size; i++) {
            const uint32_t id = (uint8_t)text[i];
            g_array_append_val(ids, id);
        }
    }
    return ids == NULL
               ? NULL
               : token_data_new((const uint32_t *)(void *)ids->data, ids->len, length, error);
}

void token_data_free(TokenData *d)
{
    if (d != NULL) {
        weft_free(d->ids);
        g_free(d);
    }
}

uint64_t token_data_windows(const TokenData *d)
{
    return (d->n - 1) / d->length;
}

uint32_t token_data_vocabulary(const TokenData *d)
{
    return d->vocabulary;
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

void token_data_read(const TokenData *d, uint64_t window, uint32_t *tokens, uint32_t *targets)
{
    const uint32_t *at = d->ids + window * d->length;
    memcpy(tokens, at, d->length * sizeof *tokens);
    memcpy(targets, at + 1, d->length * sizeof *targets);
}

static void read_sample(void *user, uint64_t sample, uint32_t *tokens, uint32_t *targets)
{
    const TokenSamples *s = user;
    const uint64_t window = s->in_order ? sample % token_data_windows(s->data)
                                        : token_data_window_of(s->data, s->seed, sample);
    token_data_read(s->data, window, tokens, targets);
}

SampleSource token_samples_source(TokenSamples *samples)
{
    return (SampleSource){.user = samples,
                          .read = read_sample,
                          .vocabulary = token_data_vocabulary(samples->data),
                          .length = samples->data->length};
}
