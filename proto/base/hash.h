/* XXH3-128 as one value type: slices, files, digests (NUMERICS 13). */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct Hash128 {
    uint8_t bytes[16]; /* XXH128_canonicalFromHash order (big endian) */
} Hash128;

Hash128 hash128(const void *data, size_t n_bytes);
bool hash128_equal(const Hash128 *a, const Hash128 *b);
/* out: 33 bytes, lower-case hex and NUL. */
void hash128_hex(const Hash128 *h, char out[33]);

/* Streaming form; the state is owned by the caller. */
typedef struct Hasher Hasher;
Hasher *hasher_new(void);
void hasher_update(Hasher *h, const void *data, size_t n_bytes);
Hash128 hasher_finish(const Hasher *h);
void hasher_free(Hasher *h);
