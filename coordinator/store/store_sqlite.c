/* The durable store: SQLite, one connection owned by one thread.
 *
 * 1. Only the thread touches the connection once it runs; the loop pushes operations to a queue.
 * 2. Operations run in the order of the calls; each write is one transaction (WAL, synchronous =
 * FULL: durable when reported).
 * 3. Reports go through the core's finished list; after store_free() none is delivered, but every
 * write asked for has been tried. */
#include "coordinator/store/store.h"

#include "proto/base/error.h"

#include <sqlite3.h>
#include <stdbool.h>
#include <string.h>

#define STORE_SCHEMA_VERSION 1

typedef struct StoreSqlite StoreSqlite;
typedef struct SqliteOp {
    enum { SQLITE_OP_WRITE, SQLITE_OP_READ, SQLITE_OP_CLOSE } kind;
    StoreSqlite *store;
    StoreChange *changes; /* keys and values owned */
    unsigned n_changes;
    StoreTable table;
    StoreDone done;
    StoreRows rows_done;
    void *user;
    GPtrArray *rows;
    GError *error;
} SqliteOp;

struct StoreSqlite {
    Store base;
    gatomicrefcount refs; /* the owner and every posted report */
    GMutex lock;
    bool closed;
    Loop *loop;
    GAsyncQueue *queue;
    GThread *thread;
    sqlite3 *db;
    char *path;
};

static void store_sqlite_unref(StoreSqlite *store)
{
    if (g_atomic_ref_count_dec(&store->refs)) {
        g_mutex_clear(&store->lock);
        g_async_queue_unref(store->queue);
        g_free(store->path);
        g_free(store);
    }
}

static void sqlite_op_free(SqliteOp *op)
{
    for (unsigned i = 0; i < op->n_changes; i++) {
        g_free((char *)op->changes[i].key);
        if (op->changes[i].value != NULL) {
            g_bytes_unref(op->changes[i].value);
        }
    }
    g_free(op->changes);
    if (op->rows != NULL) {
        g_ptr_array_unref(op->rows);
    }
    g_clear_error(&op->error);
    g_free(op);
}

static bool sqlite_fail(sqlite3 *db, const char *path, const char *what, GError **error)
{
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO,
                "state %s: %s: %s: check free space and permissions of its directory", path, what,
                db != NULL ? sqlite3_errmsg(db) : "out of memory");
    return false;
}

static bool sqlite_exec(sqlite3 *db, const char *path, const char *sql, GError **error)
{
    return sqlite3_exec(db, sql, NULL, NULL, NULL) == SQLITE_OK ||
           sqlite_fail(db, path, "statement failed", error);
}

/* ---- on the store's thread ---- */

static bool sqlite_change(StoreSqlite *store, const StoreChange *change, GError **error)
{
    const char *table = store_table_name(change->table);
    g_autofree char *sql =
        change->value != NULL
            ? g_strdup_printf("INSERT INTO %s(key, value) VALUES(?1, ?2) ON CONFLICT(key) DO "
                              "UPDATE SET value = excluded.value",
                              table)
            : g_strdup_printf("DELETE FROM %s WHERE key = ?1", table);
    sqlite3_stmt *statement = NULL;
    bool ok = sqlite3_prepare_v2(store->db, sql, -1, &statement, NULL) == SQLITE_OK &&
              sqlite3_bind_text(statement, 1, change->key, -1, SQLITE_TRANSIENT) == SQLITE_OK;
    if (ok && change->value != NULL) {
        gsize size;
        const void *data = g_bytes_get_data(change->value, &size);
        ok = sqlite3_bind_blob64(statement, 2, size > 0 ? data : "", size, SQLITE_TRANSIENT) ==
             SQLITE_OK;
    }
    ok = ok && sqlite3_step(statement) == SQLITE_DONE;
    if (!ok) {
        sqlite_fail(store->db, store->path, table, error);
    }
    sqlite3_finalize(statement);
    return ok;
}

static void sqlite_run_write(StoreSqlite *store, SqliteOp *op)
{
    bool ok = sqlite_exec(store->db, store->path, "BEGIN IMMEDIATE", &op->error);
    for (unsigned i = 0; ok && i < op->n_changes; i++) {
        ok = sqlite_change(store, &op->changes[i], &op->error);
    }
    ok = ok && sqlite_exec(store->db, store->path, "COMMIT", &op->error);
    if (!ok && !sqlite3_get_autocommit(store->db)) {
        sqlite3_exec(store->db, "ROLLBACK", NULL, NULL, NULL);
    }
}

static void sqlite_run_read(StoreSqlite *store, SqliteOp *op)
{
    g_autofree char *sql =
        g_strdup_printf("SELECT key, value FROM %s ORDER BY key", store_table_name(op->table));
    sqlite3_stmt *statement = NULL;
    int rc = sqlite3_prepare_v2(store->db, sql, -1, &statement, NULL);
    op->rows = g_ptr_array_new_with_free_func((GDestroyNotify)store_row_free);
    while (rc == SQLITE_OK || rc == SQLITE_ROW) {
        rc = sqlite3_step(statement);
        if (rc == SQLITE_ROW) {
            StoreRow *row = g_new0(StoreRow, 1);
            row->key = g_strdup((const char *)sqlite3_column_text(statement, 0));
            row->value = g_bytes_new(sqlite3_column_blob(statement, 1),
                                     (gsize)sqlite3_column_bytes(statement, 1));
            g_ptr_array_add(op->rows, row);
        }
    }
    if (rc != SQLITE_DONE) {
        sqlite_fail(store->db, store->path, store_table_name(op->table), &op->error);
    }
    sqlite3_finalize(statement);
}

/* On the loop. Holds a reference on the store. */
static void sqlite_op_report(void *user)
{
    SqliteOp *op = user;
    StoreSqlite *store = op->store;
    g_mutex_lock(&store->lock);
    bool closed = store->closed;
    g_mutex_unlock(&store->lock);
    if (!closed && op->kind == SQLITE_OP_WRITE && op->done != NULL) {
        op->done(op->error, op->user);
    }
    if (!closed && op->kind == SQLITE_OP_READ) {
        op->rows_done(op->error == NULL ? op->rows : NULL, op->error, op->user);
    }
    sqlite_op_free(op);
    store_sqlite_unref(store);
}

static void *store_sqlite_thread(void *user)
{
    StoreSqlite *store = user;
    for (;;) {
        SqliteOp *op = g_async_queue_pop(store->queue);
        if (op->kind == SQLITE_OP_CLOSE) {
            sqlite_op_free(op);
            return NULL;
        }
        if (op->kind == SQLITE_OP_WRITE) {
            sqlite_run_write(store, op);
        } else {
            sqlite_run_read(store, op);
        }
        g_atomic_ref_count_inc(&store->refs);
        loop_post(store->loop, sqlite_op_report, op);
    }
}

/* ---- on the loop ---- */

static void store_sqlite_write(Store *base, const StoreChange *changes, unsigned n, StoreDone done,
                               void *user)
{
    StoreSqlite *store = (StoreSqlite *)base;
    SqliteOp *op = g_new0(SqliteOp, 1);
    op->kind = SQLITE_OP_WRITE;
    op->store = store;
    op->changes = g_new0(StoreChange, n);
    op->n_changes = n;
    for (unsigned i = 0; i < n; i++) {
        op->changes[i] = changes[i];
        op->changes[i].key = g_strdup(changes[i].key);
        if (changes[i].value != NULL) {
            g_bytes_ref(changes[i].value);
        }
    }
    op->done = done;
    op->user = user;
    g_async_queue_push(store->queue, op);
}

static void store_sqlite_read(Store *base, StoreTable table, StoreRows done, void *user)
{
    StoreSqlite *store = (StoreSqlite *)base;
    SqliteOp *op = g_new0(SqliteOp, 1);
    op->kind = SQLITE_OP_READ;
    op->store = store;
    op->table = table;
    op->rows_done = done;
    op->user = user;
    g_async_queue_push(store->queue, op);
}

static void store_sqlite_free(Store *base)
{
    StoreSqlite *store = (StoreSqlite *)base;
    g_mutex_lock(&store->lock);
    store->closed = true;
    g_mutex_unlock(&store->lock);
    SqliteOp *op = g_new0(SqliteOp, 1);
    op->kind = SQLITE_OP_CLOSE;
    g_async_queue_push(store->queue, op);
    g_thread_join(store->thread);
    sqlite3_close(store->db);
    store_sqlite_unref(store);
}

static const StoreOps store_sqlite_ops = {
    .write = store_sqlite_write,
    .read = store_sqlite_read,
    .free = store_sqlite_free,
};

/* ---- opening ---- */

static bool sqlite_schema_version(sqlite3 *db, const char *path, int *version, GError **error)
{
    sqlite3_stmt *statement = NULL;
    bool ok = sqlite3_prepare_v2(db, "PRAGMA user_version", -1, &statement, NULL) == SQLITE_OK &&
              sqlite3_step(statement) == SQLITE_ROW;
    if (ok) {
        *version = sqlite3_column_int(statement, 0);
    } else {
        sqlite_fail(db, path, "schema version", error);
    }
    sqlite3_finalize(statement);
    return ok;
}

static bool sqlite_create_schema(sqlite3 *db, const char *path, GError **error)
{
    g_autoptr(GString) sql = g_string_new("BEGIN IMMEDIATE;");
    for (int i = 0; i < STORE_TABLE_COUNT; i++) {
        g_string_append_printf(sql,
                               "CREATE TABLE IF NOT EXISTS %s(key TEXT PRIMARY KEY NOT NULL, value "
                               "BLOB NOT NULL) STRICT;",
                               store_table_name((StoreTable)i));
    }
    g_string_append_printf(sql, "PRAGMA user_version = %d; COMMIT;", STORE_SCHEMA_VERSION);
    return sqlite_exec(db, path, sql->str, error);
}

static bool sqlite_prepare(sqlite3 *db, const char *path, GError **error)
{
    int version = 0;
    if (!sqlite_exec(db, path, "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;", error) ||
        !sqlite_schema_version(db, path, &version, error)) {
        return false;
    }
    if (version > STORE_SCHEMA_VERSION) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "state %s has schema version %d, this weft-coordinator reads up to %d: use the "
                    "newer release that wrote it",
                    path, version, STORE_SCHEMA_VERSION);
        return false;
    }
    return sqlite_create_schema(db, path, error);
}

char *store_sqlite_library(void)
{
    return g_strdup_printf("SQLite %s", sqlite3_libversion());
}

Store *store_sqlite_open(const char *path, Loop *loop, GError **error)
{
    sqlite3 *db = NULL;
    if (sqlite3_open_v2(path, &db, SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_NOMUTEX,
                        NULL) != SQLITE_OK) {
        sqlite_fail(db, path, "cannot be opened", error);
        sqlite3_close(db);
        return NULL;
    }
    sqlite3_busy_timeout(db, 2000);
    if (!sqlite_prepare(db, path, error)) {
        sqlite3_close(db);
        return NULL;
    }
    StoreSqlite *store = g_new0(StoreSqlite, 1);
    store->base.ops = &store_sqlite_ops;
    g_atomic_ref_count_init(&store->refs);
    g_mutex_init(&store->lock);
    store->loop = loop;
    store->queue = g_async_queue_new();
    store->db = db;
    store->path = g_strdup(path);
    store->thread = g_thread_new("weft-store", store_sqlite_thread, store);
    return &store->base;
}
