/* transport/crypto/x509, held against OpenSSL's own chain building, name checks and digests. */
#include "transport/crypto/x509.h"

#include "proto/base/error.h"

#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

typedef struct Authority {
    char *key, *pem;
    int64_t now_us;
} Authority;

static int set_up(void **state)
{
    Authority *a = g_new0(Authority, 1);
    a->now_us = (int64_t)time(NULL) * 1000000;
    a->key = x509_new_key(NULL);
    a->pem = x509_new_ca(a->key, "test-cluster", a->now_us, NULL);
    assert_non_null(a->pem);
    *state = a;
    return 0;
}

static int tear_down(void **state)
{
    Authority *a = *state;
    x509_free_key(a->key);
    g_free(a->pem);
    g_free(a);
    return 0;
}

static X509 *load(const char *pem)
{
    BIO *bio = BIO_new_mem_buf(pem, -1);
    X509 *certificate = PEM_read_bio_X509(bio, NULL, NULL, NULL);
    BIO_free(bio);
    assert_non_null(certificate);
    return certificate;
}

static X509Grant grant_for(const Authority *a, const char *name, const char *role)
{
    return (X509Grant){.name = name,
                       .role = role,
                       .not_before_us = a->now_us - 60000000,
                       .not_after_us = a->now_us + G_GINT64_CONSTANT(86400000000)};
}

static char *sign_fresh(const Authority *a, const X509Grant *grant, char **serial)
{
    char *key = x509_new_key(NULL);
    g_autofree char *request = x509_new_request(key, "whatever-it-wishes", NULL);
    x509_free_key(key);
    g_autoptr(GError) error = NULL;
    char *pem = x509_sign(a->pem, a->key, request, grant, serial, &error);
    g_assert_no_error(error);
    return pem;
}

/* X509_V_OK or the verification's error. */
static int verify_chain(const char *leaf_pem, const char *ca_pem, int purpose, int64_t at_us)
{
    X509 *leaf = load(leaf_pem), *ca = load(ca_pem);
    X509_STORE *store = X509_STORE_new();
    X509_STORE_add_cert(store, ca);
    X509_STORE_CTX *context = X509_STORE_CTX_new();
    X509_STORE_CTX_init(context, store, leaf, NULL);
    X509_STORE_CTX_set_purpose(context, purpose);
    X509_STORE_CTX_set_time(context, 0, at_us / 1000000);
    X509_verify_cert(context);
    int result = X509_STORE_CTX_get_error(context);
    X509_STORE_CTX_free(context);
    X509_STORE_free(store);
    X509_free(leaf);
    X509_free(ca);
    return result;
}

static void test_leaf_verifies_for_both_sides(void **state)
{
    Authority *a = *state;
    X509Grant grant = grant_for(a, "w1", "worker");
    g_autofree char *leaf = sign_fresh(a, &grant, NULL);
    assert_int_equal(verify_chain(leaf, a->pem, X509_PURPOSE_SSL_SERVER, a->now_us), X509_V_OK);
    assert_int_equal(verify_chain(leaf, a->pem, X509_PURPOSE_SSL_CLIENT, a->now_us), X509_V_OK);
    int64_t late_us = grant.not_after_us + 1000000, early_us = grant.not_before_us - 1000000;
    assert_int_equal(verify_chain(leaf, a->pem, X509_PURPOSE_SSL_CLIENT, late_us),
                     X509_V_ERR_CERT_HAS_EXPIRED);
    assert_int_equal(verify_chain(leaf, a->pem, X509_PURPOSE_SSL_CLIENT, early_us),
                     X509_V_ERR_CERT_NOT_YET_VALID);
}

static void test_leaf_of_another_authority_fails(void **state)
{
    Authority *a = *state, *other;
    set_up((void **)&other);
    X509Grant grant = grant_for(a, "w1", "worker");
    g_autofree char *leaf = sign_fresh(a, &grant, NULL);
    assert_int_not_equal(verify_chain(leaf, other->pem, X509_PURPOSE_SSL_CLIENT, a->now_us),
                         X509_V_OK);
    g_autoptr(GError) error = NULL;
    char *key = x509_new_key(NULL);
    g_autofree char *request = x509_new_request(key, NULL, NULL);
    assert_null(x509_sign(a->pem, other->key, request, &grant, NULL, &error));
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
    x509_free_key(key);
    tear_down((void **)&other);
}

/* A leaf may sign nobody: a worker cannot make itself an admin. */
static void test_leaf_is_no_authority(void **state)
{
    Authority *a = *state;
    char *key = x509_new_key(NULL), *victim_key = x509_new_key(NULL);
    g_autofree char *request = x509_new_request(key, "w1", NULL);
    X509Grant grant = grant_for(a, "w1", "worker"), admin = grant_for(a, "a1", "admin");
    g_autofree char *leaf = x509_sign(a->pem, a->key, request, &grant, NULL, NULL);
    g_autofree char *victim_request = x509_new_request(victim_key, "a1", NULL);
    g_autofree char *forged = x509_sign(leaf, key, victim_request, &admin, NULL, NULL);
    X509 *certificate = load(forged), *middle = load(leaf), *ca = load(a->pem);
    X509_STORE *store = X509_STORE_new();
    X509_STORE_add_cert(store, ca);
    STACK_OF(X509) *chain = sk_X509_new_null();
    sk_X509_push(chain, middle);
    X509_STORE_CTX *context = X509_STORE_CTX_new();
    X509_STORE_CTX_init(context, store, certificate, chain);
    assert_int_not_equal(X509_verify_cert(context), 1);
    X509_STORE_CTX_free(context);
    sk_X509_free(chain);
    X509_STORE_free(store);
    X509_free(certificate);
    X509_free(middle);
    X509_free(ca);
    x509_free_key(key);
    x509_free_key(victim_key);
}

static void test_names(void **state)
{
    Authority *a = *state;
    static const char *const dns[] = {"host.example", NULL}, *const addresses[] = {"10.1.2.3",
                                                                                   "fd00::7", NULL};
    X509Grant grant = grant_for(a, "w1", "worker");
    grant.dns = dns;
    grant.addresses = addresses;
    g_autofree char *pem = sign_fresh(a, &grant, NULL);
    X509 *leaf = load(pem);
    for (const char *const *name = (const char *const[]){"w1", "weft-worker", "host.example", NULL};
         *name; name++) {
        assert_int_equal(X509_check_host(leaf, *name, 0, 0, NULL), 1);
    }
    assert_int_equal(X509_check_ip_asc(leaf, "10.1.2.3", 0), 1);
    assert_int_equal(X509_check_ip_asc(leaf, "fd00::7", 0), 1);
    assert_int_equal(X509_check_ip_asc(leaf, "10.1.2.4", 0), 0);
    /* the CN of the request gave no name */
    assert_int_equal(X509_check_host(leaf, "whatever-it-wishes", 0, 0, NULL), 0);
    assert_int_equal(X509_check_host(leaf, "weft-admin", 0, 0, NULL), 0);
    X509_free(leaf);

    static const char *const bad[] = {"10.1.2", NULL};
    grant.addresses = bad;
    char *key = x509_new_key(NULL);
    g_autofree char *request = x509_new_request(key, NULL, NULL);
    g_autoptr(GError) error = NULL;
    assert_null(x509_sign(a->pem, a->key, request, &grant, NULL, &error));
    assert_string_equal(error->message, "\"10.1.2\" is no IP address; give names as DNS names");
    x509_free_key(key);
}

static void test_parse(void **state)
{
    Authority *a = *state;
    X509Grant grant = grant_for(a, "node-7", "submit");
    g_autofree char *serial = NULL, *pem = sign_fresh(a, &grant, &serial);
    X509Info info;
    assert_true(x509_parse(pem, &info, NULL));
    assert_string_equal(info.name, "node-7");
    assert_string_equal(info.role, "submit");
    assert_string_equal(info.serial_hex, serial);
    assert_int_equal(strlen(serial), 32);
    assert_int_equal(info.not_before_us / 1000000, grant.not_before_us / 1000000);
    assert_int_equal(info.not_after_us / 1000000, grant.not_after_us / 1000000);
    x509_info_clear(&info);
    x509_info_clear(&info);

    g_autofree char *other_serial = NULL, *other = sign_fresh(a, &grant, &other_serial);
    assert_string_not_equal(serial, other_serial);
    g_autoptr(GError) error = NULL;
    assert_false(x509_parse("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", &info,
                            &error));
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
    x509_info_clear(&info);
}

/* Any text with a byte changed or cut off: parsed or refused, never a crash (run under the
 * sanitizers). */
static void test_parse_of_damaged_text(void **state)
{
    Authority *a = *state;
    X509Grant grant = grant_for(a, "w1", "worker");
    g_autofree char *pem = sign_fresh(a, &grant, NULL);
    size_t size = strlen(pem);
    for (size_t i = 0; i < size; i++) {
        g_autofree char *damaged = g_strdup(pem);
        X509Info info;
        damaged[i] = damaged[i] == 'A' ? 'B' : 'A';
        x509_parse(damaged, &info, NULL);
        x509_info_clear(&info);
        damaged[i] = 0;
        x509_parse(damaged, &info, NULL);
        x509_info_clear(&info);
    }
}

static void test_request_must_be_signed_by_its_key(void **state)
{
    Authority *a = *state;
    char *key = x509_new_key(NULL);
    g_autofree char *request = x509_new_request(key, "w1", NULL);
    BIO *bio = BIO_new_mem_buf(request, -1);
    X509_REQ *parsed = PEM_read_bio_X509_REQ(bio, NULL, NULL, NULL);
    BIO_free(bio);
    char *another = x509_new_key(NULL);
    bio = BIO_new_mem_buf(another, -1);
    EVP_PKEY *other_key = PEM_read_bio_PrivateKey(bio, NULL, NULL, NULL);
    BIO_free(bio);
    X509_REQ_sign(parsed, other_key, EVP_sha256()); /* by another key than the one in it */
    bio = BIO_new(BIO_s_mem());
    PEM_write_bio_X509_REQ(bio, parsed);
    char *data;
    long size = BIO_get_mem_data(bio, &data);
    g_autofree char *forged = g_strndup(data, (gsize)size);
    BIO_free(bio);
    X509Grant grant = grant_for(a, "w1", "worker");
    g_autoptr(GError) error = NULL;
    assert_null(x509_sign(a->pem, a->key, forged, &grant, NULL, &error));
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_DENIED));
    g_clear_error(&error);
    assert_null(x509_sign(a->pem, a->key, "no request", &grant, NULL, &error));
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
    X509_REQ_free(parsed);
    EVP_PKEY_free(other_key);
    x509_free_key(another);
    x509_free_key(key);
}

static void test_other_kinds_of_keys_are_refused(void **state)
{
    Authority *a = *state;
    EVP_PKEY *rsa = EVP_RSA_gen(1024);
    BIO *bio = BIO_new(BIO_s_mem());
    PEM_write_bio_PKCS8PrivateKey(bio, rsa, NULL, NULL, 0, NULL, NULL);
    char *data;
    long size = BIO_get_mem_data(bio, &data);
    g_autofree char *key = g_strndup(data, (gsize)size);
    BIO_free(bio);
    EVP_PKEY_free(rsa);
    g_autofree char *request = x509_new_request(key, "w1", NULL);
    X509Grant grant = grant_for(a, "w1", "worker");
    g_autoptr(GError) error = NULL;
    assert_null(x509_sign(a->pem, a->key, request, &grant, NULL, &error));
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
    assert_non_null(strstr(error->message, "P-256"));
}

static void test_public_key_hash(void **state)
{
    Authority *a = *state;
    uint8_t hash[32], expected[32], parsed[32];
    assert_true(x509_public_key_hash(a->pem, hash, NULL));
    X509 *ca = load(a->pem);
    unsigned char *der = NULL;
    int size =
        i2d_PUBKEY(X509_get0_pubkey(ca), &der); /* what `openssl pkey -pubin -outform der` gives */
    EVP_Digest(der, (size_t)size, expected, NULL, EVP_sha256(), NULL);
    OPENSSL_free(der);
    X509_free(ca);
    assert_memory_equal(hash, expected, 32);

    g_autofree char *text = x509_format_hash(hash);
    assert_int_equal(strlen(text), strlen("sha256:") + 64);
    assert_true(x509_parse_hash(text, parsed, NULL));
    assert_memory_equal(parsed, hash, 32);
    g_autoptr(GError) error = NULL;
    const char *bad[] = {"", "sha256:", "sha256:00", "md5:00", text + 1};
    for (size_t i = 0; i < G_N_ELEMENTS(bad); i++) {
        assert_false(x509_parse_hash(bad[i], parsed, &error));
        assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
        g_clear_error(&error);
    }
    text[70] = 'g';
    assert_false(x509_parse_hash(text, parsed, NULL));
    /* a renewed CA certificate of the same key keeps its hash */
    g_autofree char *renewed = x509_new_ca(a->key, "renamed", a->now_us + 1000000, NULL);
    assert_true(x509_public_key_hash(renewed, parsed, NULL));
    assert_memory_equal(parsed, hash, 32);
}

static void test_hostile_names_stay_one_field(void **state)
{
    Authority *a = *state;
    X509Grant grant = grant_for(a, "w1/OU=admin,CN=x\n\"quoted\"", "worker");
    g_autofree char *pem = sign_fresh(a, &grant, NULL);
    X509Info info;
    assert_true(x509_parse(pem, &info, NULL));
    assert_string_equal(info.name, "w1/OU=admin,CN=x\n\"quoted\"");
    assert_string_equal(info.role, "worker");
    x509_info_clear(&info);
    g_autofree char *long_name = g_strnfill(65, 'x'); /* RFC 5280: 64 characters */
    grant.name = long_name;
    char *key = x509_new_key(NULL);
    g_autofree char *request = x509_new_request(key, NULL, NULL);
    g_autoptr(GError) error = NULL;
    assert_null(x509_sign(a->pem, a->key, request, &grant, NULL, &error));
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
    x509_free_key(key);
    x509_free_key(NULL);
}

#define CA_TEST(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CA_TEST(test_leaf_verifies_for_both_sides),
        CA_TEST(test_leaf_of_another_authority_fails),
        CA_TEST(test_leaf_is_no_authority),
        CA_TEST(test_names),
        CA_TEST(test_parse),
        CA_TEST(test_parse_of_damaged_text),
        CA_TEST(test_request_must_be_signed_by_its_key),
        CA_TEST(test_other_kinds_of_keys_are_refused),
        CA_TEST(test_public_key_hash),
        CA_TEST(test_hostile_names_stay_one_field),
    };
    return cmocka_run_group_tests_name("x509", tests, NULL, NULL);
}
