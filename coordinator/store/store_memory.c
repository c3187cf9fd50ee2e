/* The simulated store: a disk of hash tables. Work happens when the posted report runs, so that a
 * crash between call and report loses the write, as with a real disk. */
#include "coordinator/store/store.h"

#include "proto/base/error.h"

#include <stdbool.h>
#include <string.h>

struct StoreDisk {
    GHashTable *tables[STORE_TABLE_COUNT]; /* key -> GBytes */
    int fail_after;
};

typedef struct StoreMemory {
    Store base;
    gatomicrefcount refs; /* the owner and every posted operation */
    bool closed;
    StoreDisk *disk;
    Loop *loop;
} StoreMemory;

typedef struct MemoryOp {
    StoreMemory *store;
    GPtrArray *changes; /* of MemoryChange; NULL = a read */
    StoreTable table;
    StoreDone done;
    StoreRows rows;
    void *user;
} MemoryOp;

typedef struct MemoryChange {
    StoreTable table;
    char *key;
    GBytes *value;
} MemoryChange;

static void memory_change_free(void *data)
{
    MemoryChange *change = data;
    g_free(change->key);
    if (change->value != NULL) {
        g_bytes_unref(change->value);
    }
    g_free(change);
}

StoreDisk *store_disk_new(void)
{
    StoreDisk *disk = g_new0(StoreDisk, 1);
    for (int i = 0; i < STORE_TABLE_COUNT; i++) {
        disk->tables[i] =
            g_hash_table_new_full(g_str_hash, g_str_equal, g_free, (GDestroyNotify)g_bytes_unref);
    }
    disk->fail_after = -1;
    return disk;
}

void store_disk_free(StoreDisk *disk)
{
    if (disk == NULL) {
        return;
    }
    for (int i = 0; i < STORE_TABLE_COUNT; i++) {
        g_hash_table_unref(disk->tables[i]);
    }
    g_free(disk);
}

void store_disk_fail_after(StoreDisk *disk, int n)
{
    disk->fail_after = n;
}

static void store_memory_unref(StoreMemory *store)
{
    if (g_atomic_ref_count_dec(&store->refs)) {
        g_free(store);
    }
}

static bool disk_apply(StoreDisk *disk, const GPtrArray *changes, GError **error)
{
    if (disk->fail_after == 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO,
                    "state could not be written: simulated disk failure: check the disk of the "
                    "state directory");
        return false;
    }
    if (disk->fail_after > 0) {
        disk->fail_after--;
    }
    for (guint i = 0; i < changes->len; i++) {
        const MemoryChange *change = g_ptr_array_index(changes, i);
        GHashTable *table = disk->tables[change->table];
        if (change->value == NULL) {
            g_hash_table_remove(table, change->key);
        } else {
            g_hash_table_replace(table, g_strdup(change->key), g_bytes_ref(change->value));
        }
    }
    return true;
}

static GPtrArray *disk_rows(StoreDisk *disk, StoreTable table)
{
    GPtrArray *rows = g_ptr_array_new_with_free_func((GDestroyNotify)store_row_free);
    g_autoptr(GList) keys =
        g_list_sort(g_hash_table_get_keys(disk->tables[table]), (GCompareFunc)strcmp);
    for (GList *k = keys; k != NULL; k = k->next) {
        StoreRow *row = g_new0(StoreRow, 1);
        row->key = g_strdup(k->data);
        row->value = g_bytes_ref(g_hash_table_lookup(disk->tables[table], k->data));
        g_ptr_array_add(rows, row);
    }
    return rows;
}

static void memory_op_run(void *user)
{
    MemoryOp *op = user;
    if (!op->store->closed) {
        if (op->changes != NULL) {
            g_autoptr(GError) error = NULL;
            disk_apply(op->store->disk, op->changes, &error);
            if (op->done != NULL) {
                op->done(error, op->user);
            }
        } else {
            g_autoptr(GPtrArray) rows = disk_rows(op->store->disk, op->table);
            op->rows(rows, NULL, op->user);
        }
    }
    if (op->changes != NULL) {
        g_ptr_array_unref(op->changes);
    }
    store_memory_unref(op->store);
    g_free(op);
}

static MemoryOp *memory_op_post(Store *base)
{
    StoreMemory *store = (StoreMemory *)base;
    MemoryOp *op = g_new0(MemoryOp, 1);
    op->store = store;
    g_atomic_ref_count_inc(&store->refs);
    loop_post(store->loop, memory_op_run, op);
    return op;
}

static void store_memory_write(Store *base, const StoreChange *changes, unsigned n, StoreDone done,
                               void *user)
{
    MemoryOp *op = memory_op_post(base);
    op->changes = g_ptr_array_new_with_free_func(memory_change_free);
    for (unsigned i = 0; i < n; i++) {
        MemoryChange *change = g_new0(MemoryChange, 1);
        change->table = changes[i].table;
        change->key = g_strdup(changes[i].key);
        change->value = changes[i].value != NULL ? g_bytes_ref(changes[i].value) : NULL;
        g_ptr_array_add(op->changes, change);
    }
    op->done = done;
    op->user = user;
}

static void store_memory_read(Store *base, StoreTable table, StoreRows done, void *user)
{
    MemoryOp *op = memory_op_post(base);
    op->table = table;
    op->rows = done;
    op->user = user;
}

static void store_memory_free(Store *base)
{
    StoreMemory *store = (StoreMemory *)base;
    store->closed = true;
    store_memory_unref(store);
}

static const StoreOps store_memory_ops = {
    .write = store_memory_write,
    .read = store_memory_read,
    .free = store_memory_free,
};

Store *store_memory_new(StoreDisk *disk, Loop *loop)
{
    StoreMemory *store = g_new0(StoreMemory, 1);
    store->base.ops = &store_memory_ops;
    g_atomic_ref_count_init(&store->refs);
    store->disk = disk;
    store->loop = loop;
    return &store->base;
}
