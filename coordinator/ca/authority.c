/* Problem: who is in the cluster is what the CA signed minus what was revoked, and both must
 * survive a crash.
 *
 * 1. A certificate leaves the coordinator only after its row is durable: whatever exists can be
 * revoked by its node's name.
 * 2. Revocation holds in memory from the call on, before the disk has it; calls and streams are
 * refused from then.
 * 3. The CA key is written once, with mode 0600, before its certificate, so that a half-made CA is
 * made again. */
#include "coordinator/ca/authority.h"

#include "coordinator/ca/state_files.h"
#include "coordinator/store/records.h"
#include "proto/base/error.h"
#include "proto/base/failpoint.h"
#include "transport/crypto/x509.h"

#include <arpa/inet.h>
#include <string.h>

#define CLOCK_SKEW_US (INT64_C(5) * 60 * 1000000)
#define ADMIN_RENEW_BEFORE_US (INT64_C(30) * 24 * 3600 * 1000000)

struct Authority {
    Loop *loop;
    Store *store;
    char *ca_pem, *ca_key_pem;
    uint8_t hash[32];
    GHashTable *certificates; /* serial -> CertificateRecord */
    GPtrArray *revoked;       /* of serial, borrowed from the table */
};

typedef struct Signing {
    char *pem;
    CertificateSigned done;
    GError *error;
    void *user;
} Signing;

static void certificate_record_free(void *data)
{
    certificate_record_clear(data);
    g_free(data);
}

/* ---- the CA itself ---- */

static bool authority_load(Authority *a, const char *state_dir, GError **error)
{
    return state_file_read(state_dir, "ca.key", &a->ca_key_pem, error) &&
           state_file_read(state_dir, "ca.crt", &a->ca_pem, error);
}

static bool authority_make(Authority *a, const char *state_dir, const char *cluster, GError **error)
{
    a->ca_key_pem = x509_new_key(error);
    if (a->ca_key_pem == NULL) {
        return false;
    }
    a->ca_pem = x509_new_ca(a->ca_key_pem, cluster, loop_wall_us(a->loop) - CLOCK_SKEW_US, error);
    if (a->ca_pem == NULL) {
        return false;
    }
    return state_dir == NULL ||
           (state_file_write(state_dir, "ca.key", a->ca_key_pem, 0600, error) &&
            state_file_write(state_dir, "ca.crt", a->ca_pem, 0644, error));
}

Authority *authority_new(Loop *loop, Store *store, const char *state_dir, const char *cluster,
                         GError **error)
{
    Authority *a = g_new0(Authority, 1);
    a->loop = loop;
    a->store = store;
    a->certificates =
        g_hash_table_new_full(g_str_hash, g_str_equal, g_free, certificate_record_free);
    a->revoked = g_ptr_array_new();
    bool there = state_dir != NULL && state_file_exists(state_dir, "ca.crt");
    bool ok =
        there ? authority_load(a, state_dir, error) : authority_make(a, state_dir, cluster, error);
    if (!ok || !x509_public_key_hash(a->ca_pem, a->hash, error)) {
        authority_free(a);
        return NULL;
    }
    return a;
}

void authority_free(Authority *a)
{
    if (a == NULL) {
        return;
    }
    if (a->ca_key_pem != NULL) {
        x509_free_key(a->ca_key_pem);
    }
    g_free(a->ca_pem);
    g_ptr_array_unref(a->revoked);
    g_hash_table_unref(a->certificates);
    g_free(a);
}

const char *authority_ca_pem(const Authority *a)
{
    return a->ca_pem;
}

const uint8_t *authority_hash(const Authority *a)
{
    return a->hash;
}

/* ---- certificates ---- */

static void authority_remember(Authority *a, const char *serial,
                               CertificateRecord *record /* taken */)
{
    char *key = g_strdup(serial);
    g_hash_table_replace(a->certificates, key, record);
    if (record->revoked && record->not_after_us > loop_wall_us(a->loop)) {
        g_ptr_array_add(a->revoked, key);
    }
}

bool authority_restore(Authority *a, const StoreRow *row, GError **error)
{
    CertificateRecord *record = g_new0(CertificateRecord, 1);
    if (!certificate_record_read(row->key, row->value, record, error)) {
        g_free(record);
        return false;
    }
    if (record->not_after_us <= loop_wall_us(a->loop)) {
        certificate_record_free(record);
        store_put(a->store, STORE_CERTIFICATES, row->key, NULL, NULL, NULL);
        return true;
    }
    authority_remember(a, row->key, record);
    return true;
}

static int64_t certificate_life_us(const char *role)
{
    if (strcmp(role, "worker") == 0) {
        return CERTIFICATE_WORKER_LIFE_US;
    }
    if (strcmp(role, "coordinator") != 0) {
        return CERTIFICATE_CLIENT_LIFE_US;
    }
    int64_t seconds;
    return failpoint("coordinator-certificate-life", &seconds) ? seconds * 1000000
                                                               : CERTIFICATE_COORDINATOR_LIFE_US;
}

/* The host part of "host:port", "[v6]:port" or a bare host; returned. */
static char *address_host(const char *address)
{
    if (address[0] == '[') {
        const char *end = strchr(address, ']');
        return end != NULL ? g_strndup(address + 1, (gsize)(end - address - 1)) : g_strdup(address);
    }
    const char *colon = strrchr(address, ':');
    bool one_colon = colon != NULL && colon == strchr(address, ':');
    return one_colon ? g_strndup(address, (gsize)(colon - address)) : g_strdup(address);
}

static bool is_host_name(const char *host)
{
    size_t n = strlen(host);
    return n > 0 && n <= 253 &&
           strspn(host, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_") == n;
}

static void sort_names(const char *const *addresses, unsigned n, GPtrArray *dns, GPtrArray *ips)
{
    for (unsigned i = 0; i < n; i++) {
        g_autofree char *host = address_host(addresses[i]);
        uint8_t binary[16];
        if (inet_pton(AF_INET, host, binary) == 1 || inet_pton(AF_INET6, host, binary) == 1) {
            g_ptr_array_add(ips, g_steal_pointer(&host));
        } else if (is_host_name(host)) {
            g_ptr_array_add(dns, g_steal_pointer(&host));
        }
    }
    g_ptr_array_add(dns, NULL);
    g_ptr_array_add(ips, NULL);
}

static char *authority_certify(Authority *a, const char *request_pem, const char *name,
                               const char *role, const char *const *addresses, unsigned n,
                               char **serial, CertificateRecord **record, GError **error)
{
    g_autoptr(GPtrArray) dns = g_ptr_array_new_with_free_func(g_free);
    g_autoptr(GPtrArray) ips = g_ptr_array_new_with_free_func(g_free);
    sort_names(addresses, n, dns, ips);
    int64_t now = loop_wall_us(a->loop);
    X509Grant grant = {
        .name = name,
        .role = role,
        .dns = (const char *const *)dns->pdata,
        .addresses = (const char *const *)ips->pdata,
        .not_before_us = now - CLOCK_SKEW_US,
        .not_after_us = now + certificate_life_us(role),
    };
    char *pem = x509_sign(a->ca_pem, a->ca_key_pem, request_pem, &grant, serial, error);
    if (pem != NULL) {
        *record = g_new0(CertificateRecord, 1);
        (*record)->name = g_strdup(name);
        (*record)->role = g_strdup(role);
        (*record)->not_after_us = grant.not_after_us;
    }
    return pem;
}

static void signing_report(Signing *s, const GError *error)
{
    s->done(error == NULL ? s->pem : NULL, error, s->user);
    g_free(s->pem);
    g_clear_error(&s->error);
    g_free(s);
}

static void signing_written(const GError *error, void *user)
{
    signing_report(user, error);
}

static void signing_refused(void *user)
{
    Signing *s = user;
    signing_report(s, s->error);
}

void authority_sign(Authority *a, const char *request_pem, const char *name, const char *role,
                    const char *const *addresses, unsigned n_addresses, CertificateSigned done,
                    void *user)
{
    g_autofree char *serial = NULL;
    CertificateRecord *record = NULL;
    Signing *s = g_new0(Signing, 1);
    s->done = done;
    s->user = user;
    s->pem = authority_certify(a, request_pem, name, role, addresses, n_addresses, &serial, &record,
                               &s->error);
    if (s->pem == NULL) {
        loop_post(a->loop, signing_refused, s);
        return;
    }
    GBytes *row = certificate_record_pack(record);
    authority_remember(a, serial, record);
    store_put(a->store, STORE_CERTIFICATES, serial, row, signing_written, s);
}

bool authority_issue(Authority *a, const char *name, const char *role, const char *const *addresses,
                     unsigned n_addresses, char **key_pem, char **chain_pem, GError **error)
{
    g_autofree char *serial = NULL;
    CertificateRecord *record = NULL;
    char *key = x509_new_key(error);
    if (key == NULL) {
        return false;
    }
    g_autofree char *request = x509_new_request(key, name, error);
    g_autofree char *leaf = request != NULL
                                ? authority_certify(a, request, name, role, addresses, n_addresses,
                                                    &serial, &record, error)
                                : NULL;
    if (leaf == NULL) {
        x509_free_key(key);
        return false;
    }
    store_put(a->store, STORE_CERTIFICATES, serial, certificate_record_pack(record), NULL, NULL);
    authority_remember(a, serial, record);
    *key_pem = key;
    *chain_pem = g_strconcat(leaf, a->ca_pem, NULL);
    return true;
}

static bool admin_is_good(Authority *a, const char *state_dir)
{
    g_autofree char *pem = NULL;
    if (!state_file_exists(state_dir, "admin.key") ||
        !state_file_read(state_dir, "admin.crt", &pem, NULL)) {
        return false;
    }
    X509Info info = {0};
    bool good = x509_parse(pem, &info, NULL) &&
                info.not_after_us > loop_wall_us(a->loop) + ADMIN_RENEW_BEFORE_US &&
                g_hash_table_contains(a->certificates, info.serial_hex) &&
                !authority_is_revoked(a, info.serial_hex);
    x509_info_clear(&info);
    return good;
}

bool authority_ensure_admin(Authority *a, const char *state_dir, GError **error)
{
    if (admin_is_good(a, state_dir)) {
        return true;
    }
    char *key = NULL;
    g_autofree char *chain = NULL;
    if (!authority_issue(a, "local-admin", "admin", NULL, 0, &key, &chain, error)) {
        return false;
    }
    bool ok = state_file_write(state_dir, "admin.key", key, 0600, error) &&
              state_file_write(state_dir, "admin.crt", chain, 0644, error);
    x509_free_key(key);
    return ok;
}

/* ---- revocation ---- */

bool authority_is_revoked(const Authority *a, const char *serial)
{
    const CertificateRecord *record = g_hash_table_lookup(a->certificates, serial);
    return record != NULL && record->revoked;
}

unsigned authority_revoke(Authority *a, const char *name, StoreDone done, void *user)
{
    g_autoptr(GArray) changes = g_array_new(FALSE, TRUE, sizeof(StoreChange));
    GHashTableIter iter;
    void *serial, *value;
    g_hash_table_iter_init(&iter, a->certificates);
    while (g_hash_table_iter_next(&iter, &serial, &value)) {
        CertificateRecord *record = value;
        if (strcmp(record->name, name) != 0 || record->revoked) {
            continue;
        }
        record->revoked = true;
        g_ptr_array_add(a->revoked, serial);
        StoreChange change = {
            .table = STORE_CERTIFICATES, .key = serial, .value = certificate_record_pack(record)};
        g_array_append_val(changes, change);
    }
    store_write(a->store, (StoreChange *)changes->data, changes->len, done, user);
    for (guint i = 0; i < changes->len; i++) {
        g_bytes_unref(g_array_index(changes, StoreChange, i).value);
    }
    return changes->len;
}

const GPtrArray *authority_revoked(const Authority *a)
{
    return a->revoked;
}

int64_t authority_expiry(const Authority *a, const char *name)
{
    int64_t latest = 0;
    GHashTableIter iter;
    void *value;
    g_hash_table_iter_init(&iter, a->certificates);
    while (g_hash_table_iter_next(&iter, NULL, &value)) {
        const CertificateRecord *record = value;
        if (strcmp(record->name, name) == 0 && !record->revoked) {
            latest = MAX(latest, record->not_after_us);
        }
    }
    return latest;
}
