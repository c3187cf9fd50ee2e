#include "proto/base/hash.h"

#include <glib.h>
#include <string.h>
#include <xxhash.h>

/* The XXH3 state wants 64-byte alignment, which XXH3_createState() provides. */
struct Hasher {
    XXH3_state_t *state;
};

static Hash128 canonical(XXH128_hash_t raw)
{
    XXH128_canonical_t c;
    Hash128 h;
    XXH128_canonicalFromHash(&c, raw);
    memcpy(h.bytes, c.digest, sizeof h.bytes);
    return h;
}

Hash128 hash128(const void *data, size_t n_bytes)
{
    return canonical(XXH3_128bits(data, n_bytes));
}

bool hash128_equal(const Hash128 *a, const Hash128 *b)
{
    return memcmp(a->bytes, b->bytes, sizeof a->bytes) == 0;
}

void hash128_hex(const Hash128 *h, char out[33])
{
    static const char digits[] = "0123456789abcdef";
    for (size_t i = 0; i < sizeof h->bytes; i++) {
        out[2 * i] = digits[h->bytes[i] >> 4];
        out[2 * i + 1] = digits[h->bytes[i] & 15];
    }
    out[32] = '\0';
}

Hasher *hasher_new(void)
{
    Hasher *h = g_new(Hasher, 1);
    h->state = XXH3_createState();
    if (h->state == NULL) {
        g_error("cannot allocate memory for a hash state");
    }
    XXH3_128bits_reset(h->state);
    return h;
}

void hasher_update(Hasher *h, const void *data, size_t n_bytes)
{
    if (n_bytes > 0) {
        XXH3_128bits_update(h->state, data, n_bytes);
    }
}

Hash128 hasher_finish(const Hasher *h)
{
    return canonical(XXH3_128bits_digest(h->state));
}

void hasher_free(Hasher *h)
{
    if (h != NULL) {
        XXH3_freeState(h->state);
        g_free(h);
    }
}
