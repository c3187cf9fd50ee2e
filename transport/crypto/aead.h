/* AES-256-GCM for the data plane (NIST SP 800-38D), one key context reused for many messages.
 *
 * Two implementations with the same bytes: intel-ipsec-mb where the CPU has AES-NI, PCLMULQDQ and
 * AVX (about four times faster, shared/WIRE.md), OpenSSL elsewhere. A context belongs to one thread
 * at a time. */
#pragma once

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define AEAD_KEY_BYTES 32u
#define AEAD_TAG_BYTES 16u

typedef enum AeadKind {
    AEAD_AUTO,    /* the fastest one that this CPU can run */
    AEAD_OPENSSL, /* runs everywhere */
    AEAD_IPSEC_MB,
} AeadKind;

typedef struct AeadKey AeadKey;

/* A piece of plaintext; data is borrowed and may be NULL where size is 0. */
typedef struct AeadPart {
    const void *data;
    size_t size;
} AeadPart;

/* A context for `key` (copied). NULL + WEFT_ERROR_IMPOSSIBLE when this CPU cannot run `kind`,
 * WEFT_ERROR_MEMORY when there is none. */
AeadKey *aead_key_new(const uint8_t key[AEAD_KEY_BYTES], AeadKind kind, GError **error);
/* Erases the key schedule; NULL-safe. */
void aead_key_free(AeadKey *key);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(AeadKey, aead_key_free)

/* Encrypts the concatenated parts to out (their total size; may be parts[0].data when there is one
 * part) and writes the tag. nonce: the 64-bit message counter, little-endian behind four zero bytes
 * = the 96-bit IV; never twice under one key. */
void aead_seal(AeadKey *key, uint64_t nonce, const void *associated, size_t associated_size,
               const AeadPart *parts, unsigned n_parts, void *out, uint8_t tag[AEAD_TAG_BYTES]);
/* Decrypts size bytes from in to out (in place or apart, not overlapping otherwise). False when the
 * tag differs (compared in constant time): out then holds nothing that may be used. */
bool aead_open(AeadKey *key, uint64_t nonce, const void *associated, size_t associated_size,
               const void *in, size_t size, void *out, const uint8_t tag[AEAD_TAG_BYTES]);

/* "ipsec-mb" or "openssl": what AEAD_AUTO chooses here. */
const char *aead_name(void);
