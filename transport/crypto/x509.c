#include "transport/crypto/x509.h"

#include "proto/base/error.h"

#include <arpa/inet.h>
#include <openssl/asn1.h>
#include <openssl/bn.h>
#include <openssl/crypto.h>
#include <openssl/ec.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/rand.h>
#include <openssl/sha.h>
#include <openssl/x509v3.h>
#include <string.h>

#define CA_YEARS 10
#define US_PER_S G_GINT64_CONSTANT(1000000)
/* RFC 5280 4.1.2.2: at most 20 octets and positive; 16 random bytes cannot collide. */
#define SERIAL_BYTES 16

G_DEFINE_AUTOPTR_CLEANUP_FUNC(EVP_PKEY, EVP_PKEY_free)
G_DEFINE_AUTOPTR_CLEANUP_FUNC(X509, X509_free)
G_DEFINE_AUTOPTR_CLEANUP_FUNC(X509_REQ, X509_REQ_free)
G_DEFINE_AUTOPTR_CLEANUP_FUNC(BIO, BIO_free_all)
G_DEFINE_AUTOPTR_CLEANUP_FUNC(X509_EXTENSION, X509_EXTENSION_free)
G_DEFINE_AUTOPTR_CLEANUP_FUNC(BIGNUM, BN_free)
G_DEFINE_AUTOPTR_CLEANUP_FUNC(GENERAL_NAMES, GENERAL_NAMES_free)

void x509_init(void)
{
    OPENSSL_init_crypto(OPENSSL_INIT_LOAD_CRYPTO_STRINGS, NULL); /* 0 does nothing */
}

/* ---- OpenSSL's errors and texts -------------------------------------------------------------- */

static void set_openssl_error(GError **error, int code, const char *what)
{
    unsigned long last = ERR_peek_last_error();
    const char *reason = last ? ERR_reason_error_string(last) : NULL;
    g_set_error(error, WEFT_ERROR, code, "%s: %s", what,
                reason ? reason : "no reason given by OpenSSL");
    ERR_clear_error();
}

static BIO *reader(const char *pem)
{
    return BIO_new_mem_buf(pem ? pem : "", -1);
}

static char *take_text(BIO *bio)
{
    char *data = NULL;
    long size = BIO_get_mem_data(bio, &data);
    return g_strndup(data, (gsize)MAX(size, 0));
}

static X509 *read_certificate(const char *pem, GError **error)
{
    g_autoptr(BIO) bio = reader(pem);
    X509 *certificate = PEM_read_bio_X509(bio, NULL, NULL, NULL);
    if (!certificate) {
        set_openssl_error(error, WEFT_ERROR_INVALID, "cannot read the certificate");
    }
    return certificate;
}

static EVP_PKEY *read_key(const char *pem, GError **error)
{
    g_autoptr(BIO) bio = reader(pem);
    EVP_PKEY *key = PEM_read_bio_PrivateKey(bio, NULL, NULL, NULL);
    if (!key) {
        set_openssl_error(error, WEFT_ERROR_INVALID, "cannot read the private key");
    }
    return key;
}

static char *write_certificate(X509 *certificate)
{
    g_autoptr(BIO) bio = BIO_new(BIO_s_mem());
    return PEM_write_bio_X509(bio, certificate) ? take_text(bio) : NULL;
}

/* ---- keys and requests ----------------------------------------------------------------------- */

char *x509_new_key(GError **error)
{
    g_autoptr(EVP_PKEY) key = EVP_EC_gen("P-256");
    g_autoptr(BIO) bio = BIO_new(BIO_s_secmem());
    if (!key || !bio || !PEM_write_bio_PKCS8PrivateKey(bio, key, NULL, NULL, 0, NULL, NULL)) {
        set_openssl_error(error, WEFT_ERROR_FAILED, "cannot make a P-256 key");
        return NULL;
    }
    return take_text(bio);
}

void x509_free_key(char *key_pem)
{
    if (key_pem) {
        OPENSSL_cleanse(key_pem, strlen(key_pem));
        g_free(key_pem);
    }
}

static bool add_name_entry(X509_NAME *name, const char *field, const char *value)
{
    return X509_NAME_add_entry_by_txt(name, field, MBSTRING_UTF8, (const unsigned char *)value, -1,
                                      -1, 0);
}

char *x509_new_request(const char *key_pem, const char *wished_name, GError **error)
{
    g_autoptr(EVP_PKEY) key = read_key(key_pem, error);
    if (!key) {
        return NULL;
    }
    g_autoptr(X509_REQ) request = X509_REQ_new();
    g_autoptr(BIO) bio = BIO_new(BIO_s_mem());
    bool named = !wished_name || !*wished_name ||
                 add_name_entry(X509_REQ_get_subject_name(request), "CN", wished_name);
    if (!named || !X509_REQ_set_version(request, X509_REQ_VERSION_1) ||
        !X509_REQ_set_pubkey(request, key) || !X509_REQ_sign(request, key, EVP_sha256()) ||
        !PEM_write_bio_X509_REQ(bio, request)) {
        set_openssl_error(error, WEFT_ERROR_INVALID, "cannot make a certificate request");
        return NULL;
    }
    return take_text(bio);
}

/* ---- signing --------------------------------------------------------------------------------- */

static bool set_serial(X509 *certificate)
{
    uint8_t bytes[SERIAL_BYTES];
    if (RAND_bytes(bytes, sizeof bytes) != 1) {
        return false;
    }
    bytes[0] = (uint8_t)((bytes[0] & 0x7F) | 0x40); /* positive, and always 32 hex digits */
    g_autoptr(BIGNUM) number = BN_bin2bn(bytes, sizeof bytes, NULL);
    return number && BN_to_ASN1_INTEGER(number, X509_get_serialNumber(certificate));
}

static bool set_validity(X509 *certificate, int64_t not_before_us, int64_t not_after_us)
{
    return ASN1_TIME_set(X509_getm_notBefore(certificate), not_before_us / US_PER_S) &&
           ASN1_TIME_set(X509_getm_notAfter(certificate), not_after_us / US_PER_S);
}

static bool add_extension(X509 *certificate, X509 *issuer, int nid, const char *value)
{
    X509V3_CTX context;
    X509V3_set_ctx(&context, issuer, certificate, NULL, NULL, 0);
    g_autoptr(X509_EXTENSION) extension = X509V3_EXT_conf_nid(NULL, &context, nid, value);
    return extension && X509_add_ext(certificate, extension, -1);
}

char *x509_new_ca(const char *ca_key_pem, const char *cluster, int64_t now_us, GError **error)
{
    g_autoptr(EVP_PKEY) key = read_key(ca_key_pem, error);
    if (!key) {
        return NULL;
    }
    g_autoptr(X509) ca = X509_new();
    X509_NAME *name = X509_get_subject_name(ca);
    int64_t end_us = now_us + CA_YEARS * G_GINT64_CONSTANT(365) * 86400 * US_PER_S;
    if (!X509_set_version(ca, X509_VERSION_3) || !set_serial(ca) ||
        !set_validity(ca, now_us, end_us) || !add_name_entry(name, "O", "weft") ||
        !add_name_entry(name, "CN", cluster) || !X509_set_issuer_name(ca, name) ||
        !X509_set_pubkey(ca, key) ||
        !add_extension(ca, ca, NID_basic_constraints, "critical,CA:TRUE,pathlen:0") ||
        !add_extension(ca, ca, NID_key_usage, "critical,keyCertSign,cRLSign") ||
        !add_extension(ca, ca, NID_subject_key_identifier, "hash") ||
        !X509_sign(ca, key, EVP_sha256())) {
        set_openssl_error(error, WEFT_ERROR_INVALID, "cannot make the cluster's CA certificate");
        return NULL;
    }
    return write_certificate(ca);
}

static bool push_dns(GENERAL_NAMES *names, const char *text)
{
    GENERAL_NAME *name = GENERAL_NAME_new();
    ASN1_IA5STRING *value = ASN1_IA5STRING_new();
    if (!name || !value || !ASN1_STRING_set(value, text, -1)) {
        GENERAL_NAME_free(name);
        ASN1_IA5STRING_free(value);
        return false;
    }
    GENERAL_NAME_set0_value(name, GEN_DNS, value);
    return sk_GENERAL_NAME_push(names, name) > 0;
}

static bool push_address(GENERAL_NAMES *names, const char *text, GError **error)
{
    ASN1_OCTET_STRING *value = a2i_IPADDRESS(text);
    GENERAL_NAME *name = GENERAL_NAME_new();
    if (!value || !name) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "\"%s\" is no IP address; give names as DNS names", text);
        ASN1_OCTET_STRING_free(value);
        GENERAL_NAME_free(name);
        return false;
    }
    GENERAL_NAME_set0_value(name, GEN_IPADD, value);
    return sk_GENERAL_NAME_push(names, name) > 0;
}

static bool add_alternative_names(X509 *certificate, const X509Grant *grant, GError **error)
{
    g_autoptr(GENERAL_NAMES) names = GENERAL_NAMES_new();
    g_autofree char *by_role = g_strconcat("weft-", grant->role, NULL);
    bool ok = push_dns(names, grant->name) && push_dns(names, by_role);
    for (const char *const *dns = grant->dns; ok && dns && *dns; dns++) {
        ok = push_dns(names, *dns);
    }
    for (const char *const *address = grant->addresses; ok && address && *address; address++) {
        if (!push_address(names, *address, error)) {
            return false;
        }
    }
    if (!ok ||
        X509_add1_ext_i2d(certificate, NID_subject_alt_name, names, 0, X509V3_ADD_DEFAULT) != 1) {
        set_openssl_error(error, WEFT_ERROR_INVALID, "cannot add the certificate's names");
        return false;
    }
    return true;
}

/* The request proves that its sender holds the key; nothing else of it is taken over. */
static EVP_PKEY *read_request_key(const char *request_pem, GError **error)
{
    g_autoptr(BIO) bio = reader(request_pem);
    g_autoptr(X509_REQ) request = PEM_read_bio_X509_REQ(bio, NULL, NULL, NULL);
    if (!request) {
        set_openssl_error(error, WEFT_ERROR_INVALID, "cannot read the certificate request");
        return NULL;
    }
    EVP_PKEY *key = X509_REQ_get0_pubkey(request);
    if (!key || X509_REQ_verify(request, key) != 1) {
        set_openssl_error(error, WEFT_ERROR_DENIED,
                          "the certificate request is not signed by its own key");
        return NULL;
    }
    char group[32] = "";
    EVP_PKEY_get_group_name(key, group, sizeof group, NULL);
    if (EVP_PKEY_get_base_id(key) != EVP_PKEY_EC || strcmp(group, "prime256v1") != 0) {
        g_set_error(
            error, WEFT_ERROR, WEFT_ERROR_INVALID,
            "the certificate request has a key of another kind (%s); make an EC key on P-256",
            *group ? group : "no curve");
        return NULL;
    }
    EVP_PKEY_up_ref(key);
    return key;
}

static char *serial_hex(X509 *certificate)
{
    g_autoptr(BIGNUM) number = ASN1_INTEGER_to_BN(X509_get0_serialNumber(certificate), NULL);
    char *upper = number ? BN_bn2hex(number) : NULL;
    char *lower = g_ascii_strdown(upper ? upper : "", -1);
    OPENSSL_free(upper);
    return lower;
}

static bool fill_leaf(X509 *leaf, X509 *ca, EVP_PKEY *public_key, const X509Grant *grant,
                      GError **error)
{
    X509_NAME *name = X509_get_subject_name(leaf);
    if (!X509_set_version(leaf, X509_VERSION_3) || !set_serial(leaf) ||
        !set_validity(leaf, grant->not_before_us, grant->not_after_us) ||
        !add_name_entry(name, "O", "weft") || !add_name_entry(name, "OU", grant->role) ||
        !add_name_entry(name, "CN", grant->name) ||
        !X509_set_issuer_name(leaf, X509_get_subject_name(ca)) ||
        !X509_set_pubkey(leaf, public_key) ||
        !add_extension(leaf, ca, NID_basic_constraints, "critical,CA:FALSE") ||
        !add_extension(leaf, ca, NID_key_usage, "critical,digitalSignature") ||
        !add_extension(leaf, ca, NID_ext_key_usage, "serverAuth,clientAuth") ||
        !add_extension(leaf, ca, NID_subject_key_identifier, "hash") ||
        !add_extension(leaf, ca, NID_authority_key_identifier, "keyid:always")) {
        set_openssl_error(error, WEFT_ERROR_INVALID, "cannot fill the certificate");
        return false;
    }
    return add_alternative_names(leaf, grant, error);
}

char *x509_sign(const char *ca_pem, const char *ca_key_pem, const char *request_pem,
                const X509Grant *grant, char **serial_hex_out, GError **error)
{
    g_autoptr(X509) ca = read_certificate(ca_pem, error);
    g_autoptr(EVP_PKEY) ca_key = ca ? read_key(ca_key_pem, error) : NULL;
    g_autoptr(EVP_PKEY) public_key = ca_key ? read_request_key(request_pem, error) : NULL;
    if (!public_key) {
        return NULL;
    }
    if (X509_check_private_key(ca, ca_key) != 1) {
        set_openssl_error(error, WEFT_ERROR_INVALID,
                          "the CA certificate and the CA key do not belong together");
        return NULL;
    }
    g_autoptr(X509) leaf = X509_new();
    if (!fill_leaf(leaf, ca, public_key, grant, error)) {
        return NULL;
    }
    if (!X509_sign(leaf, ca_key, EVP_sha256())) {
        set_openssl_error(error, WEFT_ERROR_FAILED, "cannot sign the certificate");
        return NULL;
    }
    if (serial_hex_out) {
        *serial_hex_out = serial_hex(leaf);
    }
    return write_certificate(leaf);
}

/* ---- reading --------------------------------------------------------------------------------- */

static char *subject_field(X509 *certificate, int nid)
{
    X509_NAME *name = X509_get_subject_name(certificate);
    int at = X509_NAME_get_index_by_NID(name, nid, -1);
    if (at < 0) {
        return g_strdup("");
    }
    unsigned char *utf8 = NULL;
    int size = ASN1_STRING_to_UTF8(&utf8, X509_NAME_ENTRY_get_data(X509_NAME_get_entry(name, at)));
    /* an embedded NUL would let "worker\0x" pass for "worker": such a name is no name */
    bool plain = size >= 0 && memchr(utf8, 0, (size_t)size) == NULL;
    char *text = plain ? g_strndup((const char *)utf8, (gsize)size) : g_strdup("");
    OPENSSL_free(utf8);
    return text;
}

static int64_t time_us(const ASN1_TIME *time)
{
    struct tm broken = {0};
    return ASN1_TIME_to_tm(time, &broken) ? (int64_t)timegm(&broken) * US_PER_S : 0;
}

bool x509_parse(const char *certificate_pem, X509Info *out, GError **error)
{
    *out = (X509Info){0};
    g_autoptr(X509) certificate = read_certificate(certificate_pem, error);
    if (!certificate) {
        return false;
    }
    out->name = subject_field(certificate, NID_commonName);
    out->role = subject_field(certificate, NID_organizationalUnitName);
    out->serial_hex = serial_hex(certificate);
    out->not_before_us = time_us(X509_get0_notBefore(certificate));
    out->not_after_us = time_us(X509_get0_notAfter(certificate));
    return true;
}

void x509_info_clear(X509Info *info)
{
    g_clear_pointer(&info->name, g_free);
    g_clear_pointer(&info->role, g_free);
    g_clear_pointer(&info->serial_hex, g_free);
}

static bool hash_of(X509 *certificate, uint8_t out[32])
{
    unsigned char *der = NULL;
    int size = i2d_X509_PUBKEY(X509_get_X509_PUBKEY(certificate), &der);
    if (size <= 0) {
        return false;
    }
    SHA256(der, (size_t)size, out);
    OPENSSL_free(der);
    return true;
}

bool x509_public_key_hash(const char *certificate_pem, uint8_t out[32], GError **error)
{
    g_autoptr(X509) certificate = read_certificate(certificate_pem, error);
    if (!certificate) {
        return false;
    }
    if (!hash_of(certificate, out)) {
        set_openssl_error(error, WEFT_ERROR_INVALID, "cannot encode the certificate's public key");
        return false;
    }
    return true;
}

char *x509_format_hash(const uint8_t hash[32])
{
    GString *text = g_string_new("sha256:");
    for (int i = 0; i < 32; i++) {
        g_string_append_printf(text, "%02x", hash[i]);
    }
    return g_string_free(text, FALSE);
}

bool x509_parse_hash(const char *text, uint8_t out[32], GError **error)
{
    const char *hex = g_str_has_prefix(text, "sha256:") ? text + strlen("sha256:") : "";
    bool ok = strlen(hex) == 64;
    for (int i = 0; ok && i < 64; i++) {
        int digit = g_ascii_xdigit_value(hex[i]);
        ok = digit >= 0;
        out[i / 2] = (uint8_t)(i % 2 ? out[i / 2] << 4 | digit : digit);
    }
    if (!ok) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "\"%s\" is no CA hash; it looks like sha256: and 64 hexadecimal digits", text);
    }
    return ok;
}
