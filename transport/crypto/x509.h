/* Certificates: the cluster's own CA (EC P-256), requests, roles in the subject (CN = node id, OU =
 * role), names. OpenSSL only here. PEM texts are NUL-terminated, returned strings are g_free'd;
 * keys are erased with x509_free_key(). */
#pragma once

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

/* OpenSSL's end is among exit()'s handlers from here on: those that come later run before it. Any
 * thread, any number of times. */
void x509_init(void);

/* A fresh key, PKCS#8 PEM. */
char *x509_new_key(GError **error);
void x509_free_key(char *key_pem);
/* Self-signed CA, valid 10 years from now_us (Unix time). */
char *x509_new_ca(const char *ca_key_pem, const char *cluster, int64_t now_us, GError **error);
/* PKCS#10 request for a key; the CA decides the subject. */
char *x509_new_request(const char *key_pem, const char *wished_name, GError **error);

typedef struct X509Grant {
    const char *name;                    /* CN: node id */
    const char *role;                    /* OU: worker | admin | submit | probe | coordinator */
    const char *const *dns;              /* NULL-ended; always also: the node id and "weft-ROLE" */
    const char *const *addresses;        /* NULL-ended textual IPs, may be NULL */
    int64_t not_before_us, not_after_us; /* Unix time */
} X509Grant;
/* Checks the request's signature, signs a certificate for its key. serial_hex_out may be NULL;
 * returned, g_free. */
char *x509_sign(const char *ca_pem, const char *ca_key_pem, const char *request_pem,
                const X509Grant *grant, char **serial_hex_out, GError **error);

typedef struct X509Info {
    char *name, *role, *serial_hex;
    int64_t not_before_us, not_after_us;
} X509Info;
bool x509_parse(const char *certificate_pem, X509Info *out, GError **error);
void x509_info_clear(X509Info *info);

/* SHA-256 over the certificate's DER SubjectPublicKeyInfo (as kubeadm pins). */
bool x509_public_key_hash(const char *certificate_pem, uint8_t out[32], GError **error);
/* "sha256:HEX" <-> bytes. */
char *x509_format_hash(const uint8_t hash[32]);
bool x509_parse_hash(const char *text, uint8_t out[32], GError **error);

/* A TLS handshake with host:port that trusts nobody, to take the server's CA certificate from its
 * chain; DENIED when the chain holds no certificate with this key hash, UNREACHABLE when there is
 * no TLS there. Blocks at most timeout_ms. */
char *x509_fetch_ca(const char *address, const uint8_t hash[32], int timeout_ms, GError **error);
