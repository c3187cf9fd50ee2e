/* ApiKeys: who may use the HTTP interface. 256 random bits a key, of which only the SHA-256 is
 * kept. Loop thread. */
#pragma once

#include "coordinator/store/store.h"
#include "proto/base/loop.h"
#include "proto/base/random.h"

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct ApiKeys ApiKeys;
ApiKeys *api_keys_new(Loop *loop, Store *store, Random *random);
void api_keys_free(ApiKeys *keys); /* NULL-safe */
bool api_keys_restore(ApiKeys *keys, const StoreRow *row, GError **error);

/* key: NULL with an error; in force, and durable, before this is called. */
typedef void (*ApiKeyCreated)(const char *key, const GError *error, void *user);
/* INVALID: a name that is used or that is not 1 to 64 of [a-zA-Z0-9._-]; nothing is reported then.
 */
bool api_keys_create(ApiKeys *keys, const char *name, ApiKeyCreated done, void *user,
                     GError **error);
/* In force at once; done when durable. NOT_FOUND. */
bool api_keys_revoke(ApiKeys *keys, const char *name, StoreDone done, void *user, GError **error);

bool api_keys_any(const ApiKeys *keys);
/* The name behind the value of an Authorization header ("Bearer ..."), or NULL. Borrowed. */
const char *api_keys_name(const ApiKeys *keys, const char *authorization);
/* Calls fn for each, by name. */
void api_keys_each(const ApiKeys *keys,
                   void (*fn)(const char *name, int64_t created_us, const char *hash, void *user),
                   void *user);
