/* clang-format off */
/* One Serving for each call: read a slice in the pool, send it in chunks, next slice.
 *
 *   READING --(bytes or NULL)--> SENDING --(slice sent)--> READING ... --(all sent | cancelled)--> freed
 *                                  |  ^
 *                                  '--' no room in the call: goes on when there is, freed when cancelled
 *
 * Invariant: at most one slice, and SEND_LIMIT bytes in the call's queue, are in memory for a call. */
/* clang-format on */
#include "worker/shard/slice_server.h"

#include "proto/base/error.h"
#include "weft/v1/cluster.pb-c.h"
#include "worker/shard/fetch.h"

#include <string.h>

#define SLICE_LIMIT (256u << 20)
#define SEND_LIMIT (4u << 20)

struct SliceServer {
    Loop *loop;
    TaskPool *pool;
    SliceStore *store;
};

typedef struct Serving {
    SliceServer *server;
    RpcCall *call; /* referenced */
    Hash128 file_hash;
    SliceRef *refs;
    uint32_t n, at;
    GBytes *slice; /* NULL = the cache does not have it */
    size_t sent;
    bool waits; /* for room in the call */
    bool cancelled;
} Serving;

static void read_next(Serving *s);

static void serving_free(Serving *s)
{
    rpc_call_on_cancel(s->call, NULL, NULL);
    rpc_call_unref(s->call);
    g_clear_pointer(&s->slice, g_bytes_unref);
    g_free(s->refs);
    g_free(s);
}

static void on_cancel(void *user)
{
    Serving *s = user;
    s->cancelled = true;
    if (s->waits) { /* which nothing ends now */
        serving_free(s);
    }
}

/* Sends one chunk of the slice at hand. */
static void send_chunk(Serving *s)
{
    Weft__V1__FetchChunk chunk = WEFT__V1__FETCH_CHUNK__INIT;
    size_t size = 0;
    const uint8_t *data = s->slice ? g_bytes_get_data(s->slice, &size) : NULL;
    size_t n = MIN(size - s->sent, FETCH_CHUNK_BYTES);
    chunk.index = s->at;
    chunk.missing = !s->slice;
    chunk.data = (ProtobufCBinaryData){n, n ? (uint8_t *)data + s->sent : NULL};
    s->sent += n;
    chunk.last = s->sent == size;
    rpc_call_send(s->call, &chunk.base);
    if (chunk.last) {
        g_clear_pointer(&s->slice, g_bytes_unref);
        s->sent = 0;
        s->at++;
    }
}

static void send_some(void *user)
{
    Serving *s = user;
    s->waits = false;
    for (const uint32_t at = s->at; s->at == at && !s->cancelled;) {
        s->waits = !rpc_call_has_room(s->call, SEND_LIMIT - FETCH_CHUNK_BYTES, send_some, s);
        if (s->waits) {
            return;
        }
        send_chunk(s);
    }
    read_next(s);
}

static void read_run(void *user)
{
    Serving *s = user;
    SliceId id = {s->file_hash, s->refs[s->at].tensor, s->refs[s->at].slice};
    s->slice = slice_store_read_any(s->server->store, &id, SLICE_LIMIT);
}

static void read_next(Serving *s)
{
    if (s->cancelled || s->at == s->n) {
        rpc_call_finish(s->call, NULL);
        serving_free(s);
        return;
    }
    task_pool_run(s->server->pool, read_run, send_some, s);
}

static void handle_fetch(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    const Weft__V1__FetchRequest *request = (const Weft__V1__FetchRequest *)message;
    if (request->file_hash.len != sizeof(Hash128) || request->n_slices > FETCH_BATCH_SLICES) {
        g_autoptr(GError) why = g_error_new(
            WEFT_ERROR, WEFT_ERROR_INVALID,
            "fetch: a file hash of %zu bytes and %zu slices: 16 bytes and at most %u are allowed",
            request->file_hash.len, request->n_slices, FETCH_BATCH_SLICES);
        rpc_call_finish(call, why);
        return;
    }
    Serving *s = g_new0(Serving, 1);
    s->server = user;
    s->call = rpc_call_ref(call);
    memcpy(s->file_hash.bytes, request->file_hash.data, sizeof s->file_hash.bytes);
    s->n = (uint32_t)request->n_slices;
    s->refs = g_new(SliceRef, s->n);
    for (uint32_t i = 0; i < s->n; i++) {
        s->refs[i] = (SliceRef){request->slices[i]->tensor, request->slices[i]->slice};
    }
    rpc_call_on_cancel(call, on_cancel, s);
    read_next(s);
}

SliceServer *slice_server_new(Loop *loop, TaskPool *pool, SliceStore *store)
{
    SliceServer *server = g_new0(SliceServer, 1);
    *server = (SliceServer){loop, pool, store};
    return server;
}

void slice_server_add_to(SliceServer *server, RpcServer *rpc)
{
    static const RpcMethod methods[] = {
        {"Fetch", handle_fetch, RPC_ROLE_WORKER | RPC_ROLE_COORDINATOR}, {NULL}};
    rpc_server_add(rpc, &weft__v1__slices__descriptor, methods, server);
}

void slice_server_free(SliceServer *server)
{
    g_free(server);
}
