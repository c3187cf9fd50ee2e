/* SliceServer: Slices.Fetch from this worker's cache, so that peers need not all ask the
 * coordinator. The receiver checks hashes. Loop thread. */
#pragma once

#include "transport/rpc/rpc.h"
#include "worker/shard/slice_store.h"
#include "worker/task_pool.h"

typedef struct SliceServer SliceServer;

/* Everything is borrowed for the server's life. */
SliceServer *slice_server_new(Loop *loop, TaskPool *pool, SliceStore *store);
/* Adds the service; callable by workers and the coordinator. Before rpc_server_start(). */
void slice_server_add_to(SliceServer *server, RpcServer *rpc);
/* After the RpcServer and the pool are gone. NULL-safe. */
void slice_server_free(SliceServer *server);
