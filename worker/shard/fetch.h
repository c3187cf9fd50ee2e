/* Fetch: fills a shard with exactly its slices. Order of sources for each slice: the slice cache,
 * the worker's own copy of the model, then the sources of the load request one after another
 * (peers, last the coordinator). Nothing is packed before its hash equals the manifest's.
 *
 * All functions and callbacks: loop thread. Disk, hashes and packing run in the TaskPool. Memory
 * beyond the shard: one slice for each pool thread (4 MiB with an own file), and FETCH_FLIGHTS
 * batches of at most max(FETCH_BATCH_BYTES, one slice) on their way over the network. */
#pragma once

#include "proto/base/log.h"
#include "proto/base/loop.h"
#include "proto/plan/plan.h"
#include "transport/rpc/rpc.h"
#include "weft/v1/plan.pb-c.h"
#include "worker/shard/shard.h"
#include "worker/shard/slice_store.h"
#include "worker/task_pool.h"

#define FETCH_BATCH_BYTES (2u << 20)
#define FETCH_CHUNK_BYTES (1u << 20) /* cluster.proto, FetchChunk */
#define FETCH_BATCH_SLICES 4096u     /* cluster.proto, FetchRequest */
#define FETCH_FLIGHTS 2u

typedef struct Fetch Fetch;

typedef struct FetchOptions {
    Loop *loop;
    TaskPool *pool;
    SliceStore *store;
    Log *log;
    const ModelSpec *spec;  /* with file_hash; borrowed until done, like shard */
    Shard *shard;           /* nobody else touches it until done */
    const SliceRef *slices; /* copied */
    uint32_t n_slices;
    const Weft__V1__Model
        *manifest;              /* slice hashes and file names; read before fetch_start() returns */
    const char *models_dir;     /* or NULL */
    const char *const *sources; /* n_sources addresses, best first; copied */
    size_t n_sources;
    uint64_t slice_key;
    /* The channel to a source (the last one named is the coordinator), or NULL: skipped. Borrowed
     * until done. */
    RpcChannel *(*channel)(const char *source, bool is_last, void *user);
    void *channel_user;
} FetchOptions;

typedef struct FetchProgress {
    uint64_t bytes_total, bytes_done; /* file bytes of the slices */
    uint64_t bytes_from_cache, bytes_from_disk, bytes_from_network;
} FetchProgress;

/* At most every 100 ms, and before done. */
typedef void (*FetchProgressFn)(const FetchProgress *progress, void *user);
/* Once, last; error NULL = the shard is complete. The Fetch is freed when it returns. */
typedef void (*FetchDoneFn)(const GError *error, void *user);

/* Never calls back before it returned. */
Fetch *fetch_start(const FetchOptions *options, FetchProgressFn on_progress, FetchDoneFn on_done,
                   void *user);
/* on_done follows with CANCELLED once no thread touches the shard any more. */
void fetch_cancel(Fetch *fetch);
