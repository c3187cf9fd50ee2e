/* Authority: the cluster's own CA, its certificates and who is revoked. Keys stay in this object
 * (and in STATE/ca.key, 0600). */
#pragma once

#include "coordinator/store/store.h"
#include "proto/base/loop.h"
#include "transport/rpc/rpc.h"

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

#define CERTIFICATE_WORKER_LIFE_US (INT64_C(7) * 24 * 3600 * 1000000)
#define CERTIFICATE_CLIENT_LIFE_US (INT64_C(365) * 24 * 3600 * 1000000)
#define CERTIFICATE_COORDINATOR_LIFE_US (INT64_C(2) * 365 * 24 * 3600 * 1000000)

typedef struct Authority Authority;

/* The CA of `state_dir`, made there if it has none; NULL = one of its own that is kept nowhere.
 * Blocks: before serving. */
Authority *authority_new(Loop *loop, Store *store, const char *state_dir, const char *cluster,
                         GError **error);
void authority_free(Authority *a); /* NULL-safe; erases the keys */
bool authority_restore(Authority *a, const StoreRow *row, GError **error);

const char *authority_ca_pem(const Authority *a);
const uint8_t *authority_hash(const Authority *a); /* 32 bytes */

/* Signs and records a certificate. names: listen addresses ("host:port", host name or IP) that go
 * into it. done(pem, error): once it is durable. */
typedef void (*CertificateSigned)(const char *certificate_pem, const GError *error, void *user);
void authority_sign(Authority *a, const char *request_pem, const char *name, const char *role,
                    const char *const *addresses, unsigned n_addresses, CertificateSigned done,
                    void *user);
/* A key and certificate made here, for the coordinator itself or the local administrator;
 * *chain_pem is leaf + CA. Blocks: before serving. */
bool authority_issue(Authority *a, const char *name, const char *role, const char *const *addresses,
                     unsigned n_addresses, char **key_pem, char **chain_pem, GError **error);
/* The local admin credential in STATE/admin.{crt,key} and STATE/ca.crt: kept while valid and not
 * revoked, else made anew. */
bool authority_ensure_admin(Authority *a, const char *state_dir, GError **error);

bool authority_is_revoked(const Authority *a, const char *serial);
/* Every certificate of a node, durably; returns how many (0: none is known). They count as revoked
 * at once. */
unsigned authority_revoke(Authority *a, const char *name, StoreDone done, void *user);
/* Serials that must not be talked to any more and have not expired by themselves; of char *,
 * borrowed until the next change. */
const GPtrArray *authority_revoked(const Authority *a);
/* Latest expiry of a node's certificates, Unix time us; 0 if it has none. */
int64_t authority_expiry(const Authority *a, const char *name);
