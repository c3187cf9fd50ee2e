/* Problem: models are larger than memory, and a reader may be slower than the disk: never more than
 * a little is on its way.
 *
 *   READING (pool: up to BATCH_BYTES) ──▶ SENDING (loop: chunks) ──all sent──▶ finished
 *      ▲                                     │ ▲ └─ no room in the call: goes on when there is
 *      └───────────── batch sent ────────────┘
 *
 * 1. A fetch is in exactly one of READING and SENDING; its batch buffer belongs to the pool in the
 * first, to the loop in the second.
 * 2. After the call was cancelled the fetch is freed: at once where it waits for room, else at its
 * next turn on the loop; the call is referenced until then. */
#include "coordinator/jobs/slices_service.h"

#include "proto/base/error.h"
#include "proto/plan/plan.h"
#include "weft/v1/cluster.pb-c.h"

#include <string.h>

#define SLICES_LIMIT 4096u
#define CHUNK_BYTES (1u << 20)
#define BATCH_BYTES (4u << 20)
#define PENDING_LIMIT ((size_t)8 << 20)

typedef struct Fetch {
    SlicesService *service;
    RpcCall *call;
    Model *model;
    SliceRef *slices;
    uint32_t n_slices, next; /* next: first of the next batch */
    /* the batch */
    uint32_t first, n_batch, index; /* index: slice being sent */
    size_t *sizes;
    uint8_t *bytes;
    size_t capacity, offset, slice_offset;
    GError *error;
    bool changed; /* the model's files have other bytes than its hashes */
    bool waits;   /* for room in the call */
    bool cancelled;
    LoopTimer *timer;
} Fetch;

static void fetch_free(void *user)
{
    Fetch *f = user;
    loop_timer_cancel(f->service->loop, f->timer);
    rpc_call_unref(f->call);
    model_unref(f->model);
    g_clear_error(&f->error);
    g_free(f->slices);
    g_free(f->sizes);
    g_free(f->bytes);
    g_free(f);
}

static void fetch_finish(Fetch *f, const GError *error)
{
    rpc_call_on_cancel(f->call, NULL, NULL);
    rpc_call_finish(f->call, error);
    fetch_free(f);
}

static bool slice_size(const Fetch *f, uint32_t i, size_t *out)
{
    const ModelSpec *spec = f->model->spec;
    const SliceRef *ref = &f->slices[i];
    if (ref->tensor >= spec->n_tensors || ref->slice >= spec->tensors[ref->tensor].n_slices) {
        return false;
    }
    *out = model_spec_slice_bytes(spec, &spec->tensors[ref->tensor], ref->slice);
    return true;
}

/* On the pool: as many whole slices as fit into the batch, at least one. */
static void fetch_read(void *user)
{
    Fetch *f = user;
    size_t total = 0, size;
    f->first = f->next;
    f->n_batch = 0;
    while (f->next < f->n_slices && slice_size(f, f->next, &size) &&
           (f->n_batch == 0 || total + size <= BATCH_BYTES)) {
        f->sizes[f->n_batch++] = size;
        total += size;
        f->next++;
    }
    if (f->capacity < total) {
        g_free(f->bytes);
        f->bytes = g_try_malloc(total);
        f->capacity = f->bytes != NULL ? total : 0;
        if (f->bytes == NULL) {
            g_set_error(&f->error, WEFT_ERROR, WEFT_ERROR_MEMORY,
                        "no memory for slices of %zu bytes", total);
            return;
        }
    }
    size_t offset = 0;
    for (uint32_t i = 0; i < f->n_batch; i++) {
        const SliceRef *ref = &f->slices[f->first + i];
        if (!model_copy_slice(f->model, ref->tensor, ref->slice, f->bytes + offset, &f->changed,
                              &f->error)) {
            return;
        }
        offset += f->sizes[i];
    }
}

static void fetch_on_batch(void *user);

static void fetch_begin_batch(Fetch *f)
{
    work_pool_run(f->service->pool, fetch_read, fetch_on_batch, fetch_free, f);
}

/* One chunk of the batch. */
static void fetch_send_chunk(Fetch *f)
{
    size_t left = f->sizes[f->index] - f->slice_offset;
    size_t n = MIN(left, CHUNK_BYTES);
    Weft__V1__FetchChunk chunk = WEFT__V1__FETCH_CHUNK__INIT;
    chunk.index = f->first + f->index;
    chunk.data.data = f->bytes + f->offset;
    chunk.data.len = n;
    chunk.last = n == left;
    rpc_call_send(f->call, &chunk.base);
    f->offset += n;
    f->slice_offset += n;
    if (chunk.last) {
        f->index++;
        f->slice_offset = 0;
    }
}

static void fetch_send(void *user)
{
    Fetch *f = user;
    f->timer = NULL;
    f->waits = false;
    if (f->cancelled) {
        fetch_free(f);
        return;
    }
    /* At most one batch a turn: 4 MiB are packed in about a millisecond. */
    while (f->index < f->n_batch) {
        f->waits = !rpc_call_has_room(f->call, PENDING_LIMIT - CHUNK_BYTES, fetch_send, f);
        if (f->waits) {
            return;
        }
        fetch_send_chunk(f);
    }
    size_t size;
    if (f->next == f->n_slices) {
        fetch_finish(f, NULL);
    } else if (!slice_size(f, f->next, &size)) {
        /* Not in this model: said for each such slice, so that the asker can go elsewhere. */
        Weft__V1__FetchChunk chunk = WEFT__V1__FETCH_CHUNK__INIT;
        chunk.index = f->next++;
        chunk.missing = true;
        chunk.last = true;
        rpc_call_send(f->call, &chunk.base);
        f->timer = loop_timer_start(f->service->loop, 0, fetch_send, f);
    } else {
        fetch_begin_batch(f);
    }
}

/* The model's files have changed: the batch again from another file of the same bytes, if one is
 * open. */
static void fetch_turn(Fetch *f)
{
    models_mark_stale(f->service->models, f->model);
    Model *other = models_by_hash(f->service->models, f->model->spec->file_hash.bytes, &f->error);
    if (other == NULL) {
        fetch_finish(f, f->error);
        return;
    }
    model_unref(f->model);
    f->model = model_ref(other);
    f->next = f->first;
    fetch_begin_batch(f);
}

static void fetch_on_batch(void *user)
{
    Fetch *f = user;
    f->index = 0;
    f->offset = 0;
    f->slice_offset = 0;
    if (f->cancelled) {
        fetch_free(f);
    } else if (f->changed) {
        fetch_turn(f);
    } else if (f->error != NULL) {
        fetch_finish(f, f->error);
    } else {
        fetch_send(f);
    }
}

static void fetch_on_cancel(void *user)
{
    Fetch *f = user;
    f->cancelled = true;
    if (f->waits) { /* which nothing ends now */
        fetch_free(f);
    }
}

static void on_fetch(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    SlicesService *service = user;
    const Weft__V1__FetchRequest *request = (const Weft__V1__FetchRequest *)message;
    g_autoptr(GError) error = NULL;
    Model *model = NULL;
    if (request->n_slices > SLICES_LIMIT) {
        g_set_error(&error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "fetch of %zu slices: at most %u at once", request->n_slices, SLICES_LIMIT);
    } else if (request->file_hash.len != 16) {
        g_set_error(&error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "fetch: the hash of a file has 16 bytes, not %zu", request->file_hash.len);
    } else {
        model = models_by_hash(service->models, request->file_hash.data, &error);
    }
    if (error != NULL) {
        rpc_call_finish(call, error);
        return;
    }
    Fetch *f = g_new0(Fetch, 1);
    f->service = service;
    f->call = rpc_call_ref(call);
    f->model = model_ref(model);
    f->n_slices = (uint32_t)request->n_slices;
    f->slices = g_new(SliceRef, f->n_slices + 1);
    f->sizes = g_new(size_t, f->n_slices + 1);
    for (uint32_t i = 0; i < f->n_slices; i++) {
        f->slices[i] = (SliceRef){request->slices[i]->tensor, request->slices[i]->slice};
    }
    rpc_call_on_cancel(call, fetch_on_cancel, f);
    f->timer = loop_timer_start(service->loop, 0, fetch_send, f);
}

void slices_service_add(RpcServer *server, SlicesService *service)
{
    static const RpcMethod methods[] = {{"Fetch", on_fetch, RPC_ROLE_WORKER | RPC_ROLE_COORDINATOR},
                                        {NULL}};
    rpc_server_add(server, &weft__v1__slices__descriptor, methods, service);
}
