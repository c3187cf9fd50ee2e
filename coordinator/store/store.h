/* Store: what the coordinator must find again after it died. Tables of (key, value) rows with
 * atomic batches, behind one table of functions: SQLite (store_sqlite.c) and a simulated one that
 * can be made to fail (store_memory.c). Values are built and read by records.h.
 *
 * Asynchronous: the caller's loop never waits for a disk. Reports arrive on the loop in the order
 * of the calls, never inside a call, and none after store_free(). A write that was reported without
 * error is durable. */
#pragma once

#include "proto/base/loop.h"

#include <glib.h>

typedef enum StoreTable {
    STORE_META,         /* "cluster", "generation" */
    STORE_MEMBERS,      /* node id */
    STORE_TOKENS,       /* SHA-256 of the token, hex; the token itself is nowhere */
    STORE_CERTIFICATES, /* serial, hex */
    STORE_EPOCHS,       /* "job/replica" */
    STORE_JOBS,         /* job id */
    STORE_MANIFESTS,    /* path, size, mtime of a model file */
    STORE_API_KEYS,     /* SHA-256 of an HTTP key, hex; the key itself is nowhere */
    STORE_SUBMISSIONS,  /* name of a submitted job */
    STORE_TABLE_COUNT,
} StoreTable;

typedef struct StoreRow {
    char *key;
    GBytes *value;
} StoreRow;

typedef struct StoreChange {
    StoreTable table;
    const char *key; /* copied */
    GBytes *value;   /* referenced; NULL = the row is removed */
} StoreChange;

typedef void (*StoreDone)(const GError *error, void *user);
/* rows: of StoreRow, borrowed, ascending by key; NULL with an error. */
typedef void (*StoreRows)(const GPtrArray *rows, const GError *error, void *user);

typedef struct Store Store;
typedef struct StoreOps {
    void (*write)(Store *store, const StoreChange *changes, unsigned n, StoreDone done, void *user);
    void (*read)(Store *store, StoreTable table, StoreRows done, void *user);
    void (*free)(Store *store);
} StoreOps;
struct Store {
    const StoreOps *ops;
};

/* All changes or none. done may be NULL (a write whose loss costs only work). Loop thread. */
void store_write(Store *store, const StoreChange *changes, unsigned n, StoreDone done, void *user);
void store_put(Store *store, StoreTable table, const char *key, GBytes *value /* taken always */,
               StoreDone done, void *user);
void store_read(Store *store, StoreTable table, StoreRows done, void *user);
void store_free(Store *store); /* finishes writes that were asked for; NULL-safe */

void store_row_free(StoreRow *row);
const char *store_table_name(StoreTable table);

char *store_sqlite_library(void); /* "SQLite 3.40.1", as loaded; returned */
/* Opens or creates STATE/weft.db. INVALID naming both schema versions when it was written by a
 * newer weft; IO otherwise. Blocks: before serving. */
Store *store_sqlite_open(const char *path, Loop *loop, GError **error);

/* The simulated disk outlives the stores on it, as a disk does. */
typedef struct StoreDisk StoreDisk;
StoreDisk *store_disk_new(void);
void store_disk_free(StoreDisk *disk);
Store *store_memory_new(StoreDisk *disk /* borrowed */, Loop *loop);
/* The n-th write from now (0 = the next) and all later ones fail with IO; negative: none. */
void store_disk_fail_after(StoreDisk *disk, int n);
