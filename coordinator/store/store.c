#include "coordinator/store/store.h"

void store_write(Store *store, const StoreChange *changes, unsigned n, StoreDone done, void *user)
{
    store->ops->write(store, changes, n, done, user);
}

void store_put(Store *store, StoreTable table, const char *key, GBytes *value, StoreDone done,
               void *user)
{
    StoreChange change = {.table = table, .key = key, .value = value};
    store->ops->write(store, &change, 1, done, user);
    if (value != NULL) {
        g_bytes_unref(value);
    }
}

void store_read(Store *store, StoreTable table, StoreRows done, void *user)
{
    store->ops->read(store, table, done, user);
}

void store_free(Store *store)
{
    if (store != NULL) {
        store->ops->free(store);
    }
}

void store_row_free(StoreRow *row)
{
    if (row == NULL) {
        return;
    }
    g_free(row->key);
    if (row->value != NULL) {
        g_bytes_unref(row->value);
    }
    g_free(row);
}

const char *store_table_name(StoreTable table)
{
    static const char *const names[STORE_TABLE_COUNT] = {
        "meta", "members", "tokens", "certificates", "epochs", "jobs", "manifests", "api_keys", "submissions",
    };
    return names[table];
}
