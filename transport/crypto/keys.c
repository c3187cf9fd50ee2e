#include "transport/crypto/keys.h"

#include <endian.h>
#include <glib.h>
#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/kdf.h>
#include <openssl/params.h>
#include <stdbool.h>
#include <string.h>

void keys_erase(void *data, size_t size)
{
    if (data != NULL) {
        OPENSSL_cleanse(data, size);
    }
}

/* HKDF (RFC 5869) with SHA-256 and no salt: the secret is already uniform. OpenSSL fails here only
 * without memory or with a provider configuration that lacks HKDF; going on without a key would
 * mean sending in the clear, so the process ends. */
static void keys_hkdf(const uint8_t secret[EPOCH_SECRET_BYTES], const GByteArray *info,
                      uint8_t *out, size_t size)
{
    EVP_KDF *kdf = EVP_KDF_fetch(NULL, "HKDF", NULL);
    EVP_KDF_CTX *context = kdf != NULL ? EVP_KDF_CTX_new(kdf) : NULL;
    OSSL_PARAM parameters[] = {
        OSSL_PARAM_construct_utf8_string(OSSL_KDF_PARAM_DIGEST, (char *)"SHA256", 0),
        OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_KEY, (void *)secret, EPOCH_SECRET_BYTES),
        OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_INFO, info->data, info->len),
        OSSL_PARAM_construct_end(),
    };
    bool derived = context != NULL && EVP_KDF_derive(context, out, size, parameters) == 1;
    EVP_KDF_CTX_free(context);
    EVP_KDF_free(kdf);
    if (!derived) {
        g_error("HKDF-SHA256 is not available from OpenSSL: check its provider configuration");
    }
}

static void info_u32(GByteArray *info, uint32_t value)
{
    uint32_t le = htole32(value);
    g_byte_array_append(info, (const uint8_t *)&le, sizeof le);
}

static void info_u64(GByteArray *info, uint64_t value)
{
    uint64_t le = htole64(value);
    g_byte_array_append(info, (const uint8_t *)&le, sizeof le);
}

/* Every field has a fixed width but the job, which follows its length: two scopes never give the
 * same bytes. */
static GByteArray *info_new(const char *label, const KeyScope *scope)
{
    GByteArray *info = g_byte_array_new();
    g_byte_array_append(info, (const uint8_t *)label, (guint)strlen(label) + 1);
    info_u64(info, scope->generation);
    info_u32(info, (uint32_t)strlen(scope->job));
    g_byte_array_append(info, (const uint8_t *)scope->job, (guint)strlen(scope->job));
    info_u32(info, scope->replica);
    info_u64(info, scope->epoch);
    return info;
}

void keys_derive(const uint8_t secret[EPOCH_SECRET_BYTES], const KeyScope *scope,
                 const uint8_t sender_boot[BOOT_ID_BYTES],
                 const uint8_t receiver_boot[BOOT_ID_BYTES], uint32_t sender_rank,
                 uint32_t receiver_rank, uint8_t key_out[32])
{
    g_autoptr(GByteArray) info = info_new("weft link", scope);
    g_byte_array_append(info, sender_boot, BOOT_ID_BYTES);
    g_byte_array_append(info, receiver_boot, BOOT_ID_BYTES);
    info_u32(info, sender_rank);
    info_u32(info, receiver_rank);
    keys_hkdf(secret, info, key_out, 32);
}

uint64_t keys_handle(const uint8_t secret[EPOCH_SECRET_BYTES], const KeyScope *scope,
                     uint32_t rank_a, uint32_t rank_b)
{
    g_autoptr(GByteArray) info = info_new("weft handle", scope);
    info_u32(info, MIN(rank_a, rank_b));
    info_u32(info, MAX(rank_a, rank_b));
    uint64_t handle;
    keys_hkdf(secret, info, (uint8_t *)&handle, sizeof handle);
    return le64toh(handle);
}
