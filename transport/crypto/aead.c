#include "transport/crypto/aead.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "transport/crypto/keys.h"

#include <endian.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <string.h>

#ifdef __x86_64__
#include <intel-ipsec-mb.h>
#endif

#define AEAD_IV_BYTES 12u
/* OpenSSL takes sizes as int. */
#define AEAD_STRIDE_BYTES (1u << 30)

typedef struct AeadOps {
    const char *name;
    bool (*prepare)(AeadKey *key, const uint8_t bytes[AEAD_KEY_BYTES]);
    void (*erase)(AeadKey *key);
    void (*seal)(AeadKey *key, const uint8_t *iv, const void *associated, size_t associated_size,
                 const AeadPart *parts, unsigned n_parts, uint8_t *out, uint8_t *tag);
    bool (*open)(AeadKey *key, const uint8_t *iv, const void *associated, size_t associated_size,
                 const uint8_t *in, size_t size, uint8_t *out, const uint8_t *tag);
} AeadOps;

struct AeadKey {
#ifdef __x86_64__
    struct gcm_key_data schedule; /* 64-byte aligned by its own attribute */
#endif
    const AeadOps *ops;
    EVP_CIPHER_CTX *cipher;
};

/* ---- OpenSSL: fetched and keyed once, per message only the IV ---- */

static bool openssl_prepare(AeadKey *key, const uint8_t bytes[AEAD_KEY_BYTES])
{
    EVP_CIPHER *gcm = EVP_CIPHER_fetch(NULL, "AES-256-GCM", NULL);
    key->cipher = gcm != NULL ? EVP_CIPHER_CTX_new() : NULL;
    bool ready =
        key->cipher != NULL && EVP_CipherInit_ex2(key->cipher, gcm, bytes, NULL, 1, NULL) == 1;
    EVP_CIPHER_free(gcm);
    return ready;
}

static void openssl_erase(AeadKey *key)
{
    EVP_CIPHER_CTX_free(key->cipher); /* cleanses its key schedule */
}

static void openssl_update(EVP_CIPHER_CTX *cipher, uint8_t *out, const uint8_t *in, size_t size)
{
    for (size_t done = 0; done < size;) {
        int piece = (int)MIN(size - done, AEAD_STRIDE_BYTES), written = 0;
        int ok =
            EVP_CipherUpdate(cipher, out != NULL ? out + done : NULL, &written, in + done, piece);
        g_assert(ok == 1 && written == piece);
        done += (size_t)piece;
    }
}

static void openssl_seal(AeadKey *key, const uint8_t *iv, const void *associated,
                         size_t associated_size, const AeadPart *parts, unsigned n_parts,
                         uint8_t *out, uint8_t *tag)
{
    int ok = EVP_CipherInit_ex2(key->cipher, NULL, NULL, iv, 1, NULL);
    g_assert(ok == 1);
    openssl_update(key->cipher, NULL, associated, associated_size);
    for (unsigned i = 0; i < n_parts; i++) {
        openssl_update(key->cipher, out, parts[i].data, parts[i].size);
        out += parts[i].size;
    }
    uint8_t rest[16];
    int written = 0;
    ok = EVP_CipherFinal_ex(key->cipher, rest, &written);
    g_assert(ok == 1 && written == 0);
    ok = EVP_CIPHER_CTX_ctrl(key->cipher, EVP_CTRL_AEAD_GET_TAG, AEAD_TAG_BYTES, tag);
    g_assert(ok == 1);
}

static bool openssl_open(AeadKey *key, const uint8_t *iv, const void *associated,
                         size_t associated_size, const uint8_t *in, size_t size, uint8_t *out,
                         const uint8_t *tag)
{
    int ok = EVP_CipherInit_ex2(key->cipher, NULL, NULL, iv, 0, NULL);
    g_assert(ok == 1);
    openssl_update(key->cipher, NULL, associated, associated_size);
    openssl_update(key->cipher, out, in, size);
    ok = EVP_CIPHER_CTX_ctrl(key->cipher, EVP_CTRL_AEAD_SET_TAG, AEAD_TAG_BYTES, (void *)tag);
    g_assert(ok == 1);
    uint8_t rest[16];
    int written = 0;
    return EVP_CipherFinal_ex(key->cipher, rest, &written) == 1;
}

static const AeadOps openssl_ops = {.name = "openssl",
                                    .prepare = openssl_prepare,
                                    .erase = openssl_erase,
                                    .seal = openssl_seal,
                                    .open = openssl_open};

/* ---- intel-ipsec-mb: its manager is a table of functions here, filled once and only read after
 * ---- */

#ifdef __x86_64__
#define AEAD_CPU_FEATURES (IMB_FEATURE_AESNI | IMB_FEATURE_PCLMULQDQ | IMB_FEATURE_AVX)

static IMB_MGR *the_manager; /* written under ipsec_manager()'s once */

static void ipsec_manager_new(void)
{
    IMB_MGR *manager = alloc_mb_mgr(0);
    if (manager == NULL) {
        return;
    }
    if ((manager->features & AEAD_CPU_FEATURES) != AEAD_CPU_FEATURES) {
        free_mb_mgr(manager);
        return;
    }
    IMB_ARCH arch;
    init_mb_mgr_auto(manager, &arch);
    the_manager = manager;
}

/* NULL when this CPU has no use for it. */
static IMB_MGR *ipsec_manager(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT; /* ThreadSanitizer sees it, and not GLib's */
    pthread_once(&once, ipsec_manager_new);
    return the_manager;
}

static bool ipsec_prepare(AeadKey *key, const uint8_t bytes[AEAD_KEY_BYTES])
{
    IMB_AES256_GCM_PRE(ipsec_manager(), bytes, &key->schedule);
    return true;
}

static void ipsec_erase(AeadKey *key)
{
    keys_erase(&key->schedule, sizeof key->schedule);
}

static void ipsec_seal(AeadKey *key, const uint8_t *iv, const void *associated,
                       size_t associated_size, const AeadPart *parts, unsigned n_parts,
                       uint8_t *out, uint8_t *tag)
{
    IMB_MGR *manager = ipsec_manager();
    struct gcm_context_data context;
    if (n_parts == 1) {
        IMB_AES256_GCM_ENC(manager, &key->schedule, &context, out, parts[0].data, parts[0].size, iv,
                           associated, associated_size, tag, AEAD_TAG_BYTES);
        return;
    }
    IMB_AES256_GCM_INIT(manager, &key->schedule, &context, iv, associated, associated_size);
    for (unsigned i = 0; i < n_parts; i++) {
        if (parts[i].size > 0) {
            IMB_AES256_GCM_ENC_UPDATE(manager, &key->schedule, &context, out, parts[i].data,
                                      parts[i].size);
            out += parts[i].size;
        }
    }
    IMB_AES256_GCM_ENC_FINALIZE(manager, &key->schedule, &context, tag, AEAD_TAG_BYTES);
}

static bool ipsec_open(AeadKey *key, const uint8_t *iv, const void *associated,
                       size_t associated_size, const uint8_t *in, size_t size, uint8_t *out,
                       const uint8_t *tag)
{
    struct gcm_context_data context;
    uint8_t expected[AEAD_TAG_BYTES];
    IMB_AES256_GCM_DEC(ipsec_manager(), &key->schedule, &context, out, in, size, iv, associated,
                       associated_size, expected, AEAD_TAG_BYTES);
    return CRYPTO_memcmp(expected, tag, AEAD_TAG_BYTES) == 0;
}

static const AeadOps ipsec_ops = {.name = "ipsec-mb",
                                  .prepare = ipsec_prepare,
                                  .erase = ipsec_erase,
                                  .seal = ipsec_seal,
                                  .open = ipsec_open};

static const AeadOps *aead_ipsec_ops(void)
{
    return ipsec_manager() != NULL ? &ipsec_ops : NULL;
}
#else
static const AeadOps *aead_ipsec_ops(void)
{
    return NULL;
}
#endif

static const AeadOps *aead_ops(AeadKind kind)
{
    if (kind == AEAD_OPENSSL) {
        return &openssl_ops;
    }
    const AeadOps *ipsec = aead_ipsec_ops();
    return ipsec == NULL && kind == AEAD_AUTO ? &openssl_ops : ipsec;
}

const char *aead_name(void)
{
    return aead_ops(AEAD_AUTO)->name;
}

AeadKey *aead_key_new(const uint8_t key[AEAD_KEY_BYTES], AeadKind kind, GError **error)
{
    const AeadOps *ops = aead_ops(kind);
    if (ops == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IMPOSSIBLE,
                    "intel-ipsec-mb needs a CPU with AES, PCLMULQDQ and AVX: take the OpenSSL "
                    "implementation");
        return NULL;
    }
    AeadKey *self = weft_alloc(1, sizeof *self, "an AES-256-GCM key", error);
    if (self == NULL) {
        return NULL;
    }
    self->ops = ops;
    if (!ops->prepare(self, key)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_MEMORY,
                    "AES-256-GCM is not available from OpenSSL: check its memory and provider "
                    "configuration");
        aead_key_free(self);
        return NULL;
    }
    return self;
}

void aead_key_free(AeadKey *key)
{
    if (key != NULL) {
        key->ops->erase(key);
        weft_free(key);
    }
}

static void aead_iv(uint64_t nonce, uint8_t iv[AEAD_IV_BYTES])
{
    uint64_t le = htole64(nonce);
    memset(iv, 0, AEAD_IV_BYTES - sizeof le);
    memcpy(iv + AEAD_IV_BYTES - sizeof le, &le, sizeof le);
}

void aead_seal(AeadKey *key, uint64_t nonce, const void *associated, size_t associated_size,
               const AeadPart *parts, unsigned n_parts, void *out, uint8_t tag[AEAD_TAG_BYTES])
{
    uint8_t iv[AEAD_IV_BYTES];
    aead_iv(nonce, iv);
    key->ops->seal(key, iv, associated, associated_size, parts, n_parts, out, tag);
}

bool aead_open(AeadKey *key, uint64_t nonce, const void *associated, size_t associated_size,
               const void *in, size_t size, void *out, const uint8_t tag[AEAD_TAG_BYTES])
{
    uint8_t iv[AEAD_IV_BYTES];
    aead_iv(nonce, iv);
    return key->ops->open(key, iv, associated, associated_size, in, size, out, tag);
}
