/* 1. The clear key exists only in its creator's reply; rows and log lines have at most its hash.
 * 2. A key is looked up by its hash, so that how long it takes says nothing about a key.
 * 3. A new key is durable before it is told; a revoked one is out of force before its row is gone.
 */
#include "coordinator/gateway/openai/api_keys.h"

#include "coordinator/store/records.h"
#include "proto/base/error.h"
#include "transport/crypto/keys.h"

#include <string.h>

#define KEY_BYTES 32u
#define KEY_PREFIX "weft-key-"
#define NAME_LIMIT 64u

struct ApiKeys {
    Loop *loop;
    Store *store;
    Random *random;
    GHashTable *by_hash; /* hex -> ApiKeyRecord */
};

typedef struct KeyCreation {
    ApiKeys *keys;
    char *key, *hash;
    ApiKeyRecord record;
    ApiKeyCreated done;
    void *user;
} KeyCreation;

static void record_free(void *data)
{
    api_key_record_clear(data);
    g_free(data);
}

ApiKeys *api_keys_new(Loop *loop, Store *store, Random *random)
{
    ApiKeys *keys = g_new0(ApiKeys, 1);
    keys->loop = loop;
    keys->store = store;
    keys->random = random;
    keys->by_hash = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, record_free);
    return keys;
}

void api_keys_free(ApiKeys *keys)
{
    if (keys != NULL) {
        g_hash_table_unref(keys->by_hash);
        g_free(keys);
    }
}

bool api_keys_restore(ApiKeys *keys, const StoreRow *row, GError **error)
{
    ApiKeyRecord *record = g_new0(ApiKeyRecord, 1);
    if (!api_key_record_read(row->key, row->value, record, error)) {
        g_free(record);
        return false;
    }
    g_hash_table_replace(keys->by_hash, g_strdup(row->key), record);
    return true;
}

static char *key_hash(const char *key)
{
    return g_compute_checksum_for_string(G_CHECKSUM_SHA256, key, -1);
}

static const char *hash_of_name(const ApiKeys *keys, const char *name)
{
    GHashTableIter iter;
    void *hash, *record;
    g_hash_table_iter_init(&iter, keys->by_hash);
    while (g_hash_table_iter_next(&iter, &hash, &record)) {
        if (strcmp(((ApiKeyRecord *)record)->name, name) == 0) {
            return hash;
        }
    }
    return NULL;
}

static bool check_name(const ApiKeys *keys, const char *name, GError **error)
{
    size_t length =
        strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-");
    if (length == 0 || length > NAME_LIMIT || name[length] != '\0') {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "key name '%.64s' is unusable: 1 to %u of a-z, A-Z, 0-9, '.', '_' and '-'",
                    name, NAME_LIMIT);
        return false;
    }
    if (hash_of_name(keys, name) != NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "there is a key %s already: take another name, or revoke it first", name);
        return false;
    }
    return true;
}

static void on_key_written(const GError *error, void *user)
{
    KeyCreation *c = user;
    if (error == NULL) {
        g_hash_table_replace(c->keys->by_hash, g_strdup(c->hash),
                             g_memdup2(&c->record, sizeof c->record));
        c->record.name = NULL;
        c->done(c->key, NULL, c->user);
    } else {
        c->done(NULL, error, c->user);
    }
    keys_erase(c->key, strlen(c->key));
    g_free(c->key);
    g_free(c->hash);
    api_key_record_clear(&c->record);
    g_free(c);
}

bool api_keys_create(ApiKeys *keys, const char *name, ApiKeyCreated done, void *user,
                     GError **error)
{
    if (!check_name(keys, name, error)) {
        return false;
    }
    uint8_t secret[KEY_BYTES];
    random_fill(keys->random, secret, sizeof secret);
    GString *text = g_string_new(KEY_PREFIX);
    for (size_t i = 0; i < sizeof secret; i++) {
        g_string_append_printf(text, "%02x", secret[i]);
    }
    keys_erase(secret, sizeof secret);
    KeyCreation *c = g_new0(KeyCreation, 1);
    c->keys = keys;
    c->key = g_string_free(text, FALSE);
    c->hash = key_hash(c->key);
    c->record = (ApiKeyRecord){g_strdup(name), loop_wall_us(keys->loop)};
    c->done = done;
    c->user = user;
    store_put(keys->store, STORE_API_KEYS, c->hash, api_key_record_pack(&c->record), on_key_written,
              c);
    return true;
}

bool api_keys_revoke(ApiKeys *keys, const char *name, StoreDone done, void *user, GError **error)
{
    const char *hash = hash_of_name(keys, name);
    if (hash == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND,
                    "there is no key %s: `weft key list` shows them", name);
        return false;
    }
    store_put(keys->store, STORE_API_KEYS, hash, NULL, done, user);
    g_hash_table_remove(keys->by_hash, hash);
    return true;
}

bool api_keys_any(const ApiKeys *keys)
{
    return g_hash_table_size(keys->by_hash) > 0;
}

const char *api_keys_name(const ApiKeys *keys, const char *authorization)
{
    static const char scheme[] = "Bearer ";
    if (authorization == NULL ||
        g_ascii_strncasecmp(authorization, scheme, sizeof scheme - 1) != 0) {
        return NULL;
    }
    const char *key = authorization + sizeof scheme - 1;
    g_autofree char *hash = key_hash(key + strspn(key, " "));
    const ApiKeyRecord *record = g_hash_table_lookup(keys->by_hash, hash);
    return record != NULL ? record->name : NULL;
}

static int by_record_name(gconstpointer a, gconstpointer b, gpointer user)
{
    GHashTable *table = user;
    const ApiKeyRecord *x = g_hash_table_lookup(table, a), *y = g_hash_table_lookup(table, b);
    return strcmp(x->name, y->name);
}

void api_keys_each(const ApiKeys *keys,
                   void (*fn)(const char *name, int64_t created_us, const char *hash, void *user),
                   void *user)
{
    GList *hashes =
        g_list_sort_with_data(g_hash_table_get_keys(keys->by_hash), by_record_name, keys->by_hash);
    for (GList *l = hashes; l != NULL; l = l->next) {
        const ApiKeyRecord *record = g_hash_table_lookup(keys->by_hash, l->data);
        fn(record->name, record->created_us, l->data, user);
    }
    g_list_free(hashes);
}
