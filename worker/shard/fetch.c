/* Getting slices from wherever they are nearest.
 *
 *   LOCAL    one pool task for each tensor tries cache and own file for its slices (fetch_start ->
 *            local_run/local_done)
 *   REMOTE   flights: a batch of missing slices asked from one source; chunks are put together on
 *            the loop, each whole slice goes to the pool (hash, pack, cache) (next_flights ->
 *            flight_* -> landed_*); between two rounds a pause (settle -> pause_over)
 *   ENDING   failed or cancelled: flights are cancelled, tasks run out (fail)
 *   done     on_done, freed (settle)
 *
 * Invariants:
 *   1. A slice is packed once, after its hash was right; `state` says how far it is.
 *   2. Tasks of one tensor never run at once (shard_put): tensor_locks.
 *   3. A flight's memory is free again before its place is used for another.
 *   4. A slice that a source did not give correctly goes to its next source; past the last one a
 * new round begins, ROUNDS in all, with a pause, so that a source that is just starting is waited
 * for and a missing slice is an error in bounded time.
 *   5. on_done comes only when no task and no flight is left. */
#include "worker/shard/fetch.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "proto/model/model_message.h"
#include "weft/v1/cluster.pb-c.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#define PROGRESS_US 100000
#define OWN_FILE_BYTES ((size_t)4 << 20) /* of a tensor, read at once */
#define SILENCE_US 10000000              /* a source that sends nothing for this long is left */
#define BATCH_DEADLINE_MS 300000
#define ROUNDS 4u
#define ROUND_PAUSE_US 500000
#define LOCKS 64u

typedef enum SliceState { SLICE_WANTED = 0, SLICE_FLYING, SLICE_LANDED, SLICE_PUT } SliceState;

typedef struct Slice {
    SliceRef ref;
    size_t bytes;
    Hash128 hash; /* the manifest's */
    SliceState state;
    uint32_t source; /* index of the one to ask next */
    uint32_t round;
} Slice;

typedef struct Flight Flight;
struct Flight {
    Fetch *fetch;
    RpcClientCall *call; /* NULL = this place is free, or only tasks are left of it */
    bool busy;
    uint32_t source, n_landing;
    GArray *indices; /* of uint32_t: the batch, into fetch->slices */
    uint32_t at;     /* index into the batch of the slice that is arriving */
    uint8_t *buffer; /* of the arriving slice */
    size_t filled;
    LoopTimer *silence;
    GError *refused; /* what we did not like about the stream */
};

struct Fetch {
    FetchOptions o;
    char **sources;
    uint32_t n_sources;
    FetchProgressFn on_progress;
    FetchDoneFn on_done;
    void *user;
    Slice *slices; /* tensors ascending, as plan_rank_slices() gives them */
    uint32_t n_slices, n_put;
    uint32_t first_open; /* every slice before it is put */
    uint32_t round;      /* flights carry slices of this one and of those before */
    SliceFiles *files;
    pthread_mutex_t tensor_locks[LOCKS];
    atomic_bool cancelled; /* read by tasks */
    atomic_uint own_file_wrong;
    uint32_t n_tasks; /* in the pool */
    Flight flights[FETCH_FLIGHTS];
    GError *error;        /* why it ends early */
    GError *source_error; /* the last failure of a source, for the message */
    FetchProgress progress;
    int64_t reported_us;
    LoopTimer *pause;
    bool remote;
};

static void settle(Fetch *f);

static void fetch_free(Fetch *f)
{
    for (unsigned i = 0; i < LOCKS; i++) {
        pthread_mutex_destroy(&f->tensor_locks[i]);
    }
    for (unsigned i = 0; i < FETCH_FLIGHTS; i++) {
        g_array_unref(f->flights[i].indices);
    }
    slice_files_free(f->files);
    g_strfreev(f->sources);
    g_clear_error(&f->error);
    g_clear_error(&f->source_error);
    weft_free(f->slices);
    g_free(f);
}

static SliceId slice_id(const Fetch *f, const Slice *s)
{
    return (SliceId){f->o.spec->file_hash, s->ref.tensor, s->ref.slice};
}

static void report(Fetch *f, bool now)
{
    int64_t t = loop_now_us(f->o.loop);
    if (f->on_progress && (now || t - f->reported_us >= PROGRESS_US)) {
        f->reported_us = t;
        f->on_progress(&f->progress, f->user);
    }
}

static void put(Fetch *f, const Slice *s, const void *bytes)
{
    pthread_mutex_t *lock = &f->tensor_locks[s->ref.tensor % LOCKS];
    pthread_mutex_lock(lock);
    shard_put(f->o.shard, s->ref.tensor, s->ref.slice, bytes);
    pthread_mutex_unlock(lock);
}

/* Ends early; the first reason counts. Error is taken. */
static void fail(Fetch *f, GError *error)
{
    if (f->error) {
        g_error_free(error);
    } else {
        f->error = error;
    }
    atomic_store(&f->cancelled, true);
    for (unsigned i = 0; i < FETCH_FLIGHTS; i++) {
        if (f->flights[i].call) {
            rpc_client_cancel(f->flights[i].call);
        }
    }
}

/* ---- local ---- */

typedef struct LocalTask {
    Fetch *fetch;
    uint32_t first, last; /* slices of one tensor */
    uint64_t from_cache, from_disk;
    uint32_t n_put;
    GError *error;
} LocalTask;

/* An own file that was changed since is noticed by its hashes: after a few wrong slices it is not
 * asked again. */
static bool own_file_is_right(Fetch *f, const Slice *s, const void *bytes)
{
    Hash128 hash = hash128(bytes, s->bytes);
    if (hash128_equal(&hash, &s->hash)) {
        return true;
    }
    if (atomic_fetch_add(&f->own_file_wrong, 1) == 0) {
        log_warn(f->o.log,
                 "own copy of the model in %s differs from the coordinator's: tensor %s: slices "
                 "come from elsewhere",
                 f->o.models_dir, f->o.spec->tensors[s->ref.tensor].name);
    }
    return false;
}

static void put_own(LocalTask *task, Slice *s, const void *bytes, uint64_t *count)
{
    put(task->fetch, s, bytes);
    s->state = SLICE_PUT;
    *count += s->bytes;
    task->n_put++;
}

static void from_cache(LocalTask *task, uint8_t *buffer)
{
    Fetch *f = task->fetch;
    for (uint32_t i = task->first; i < task->last && !atomic_load(&f->cancelled); i++) {
        Slice *s = &f->slices[i];
        SliceId id = slice_id(f, s);
        if (slice_store_read(f->o.store, &id, &s->hash, buffer, s->bytes)) {
            put_own(task, s, buffer, &task->from_cache);
        }
    }
}

/* Those that the cache lacked, as many at a time as the buffer holds, at least one. */
static void from_own_file(LocalTask *task, uint8_t *buffer, size_t capacity)
{
    Fetch *f = task->fetch;
    const TensorSpec *tensor = &f->o.spec->tensors[f->slices[task->first].ref.tensor];
    const uint32_t most = task->last - task->first;
    g_autofree uint32_t *wanted = g_new(uint32_t, most), *numbers = g_new(uint32_t, most);
    g_autofree void **out = g_new(void *, most);
    for (uint32_t i = task->first, n;
         i < task->last && !atomic_load(&f->cancelled) && atomic_load(&f->own_file_wrong) < 4;) {
        size_t bytes = 0;
        for (n = 0; i < task->last && bytes + f->slices[i].bytes <= capacity; i++) {
            if (f->slices[i].state == SLICE_WANTED) {
                wanted[n] = i;
                numbers[n] = f->slices[i].ref.slice;
                out[n++] = buffer + bytes;
                bytes += f->slices[i].bytes;
            }
        }
        if (n > 0 && !slice_files_read(f->files, f->o.spec, tensor, numbers, n, out)) {
            return;
        }
        for (uint32_t k = 0; k < n; k++) {
            Slice *s = &f->slices[wanted[k]];
            if (own_file_is_right(f, s, out[k])) {
                put_own(task, s, out[k], &task->from_disk);
            }
        }
    }
}

static void local_run(void *user)
{
    LocalTask *task = user;
    Fetch *f = task->fetch;
    size_t largest = 0, all = 0;
    for (uint32_t i = task->first; i < task->last; i++) {
        largest = MAX(largest, f->slices[i].bytes);
        all += f->slices[i].bytes;
    }
    const size_t capacity = f->files ? MAX(largest, MIN(all, OWN_FILE_BYTES)) : largest;
    uint8_t *buffer = weft_alloc(1, capacity, "slices", &task->error);
    if (buffer) {
        from_cache(task, buffer);
    }
    if (buffer && f->files) {
        from_own_file(task, buffer, capacity);
    }
    weft_free(buffer);
}

static void local_done(void *user)
{
    LocalTask *task = user;
    Fetch *f = task->fetch;
    f->n_tasks--;
    f->n_put += task->n_put;
    f->progress.bytes_from_cache += task->from_cache;
    f->progress.bytes_from_disk += task->from_disk;
    f->progress.bytes_done += task->from_cache + task->from_disk;
    if (task->error) {
        fail(f, task->error);
    }
    g_free(task);
    report(f, false);
    settle(f);
}

static void start_local(void *user)
{
    Fetch *f = user;
    f->n_tasks--; /* this one */
    for (uint32_t first = 0, last; first < f->n_slices && !f->error; first = last) {
        for (last = first + 1;
             last < f->n_slices && f->slices[last].ref.tensor == f->slices[first].ref.tensor;) {
            last++;
        }
        LocalTask *task = g_new0(LocalTask, 1);
        *task = (LocalTask){.fetch = f, .first = first, .last = last};
        f->n_tasks++;
        task_pool_run(f->o.pool, local_run, local_done, task);
    }
    settle(f);
}

/* ---- a slice that came over the network ---- */

typedef struct Landed {
    Fetch *fetch;
    Flight *flight;
    Slice *slice;
    uint8_t *bytes;
    bool right;
} Landed;

static void landed_run(void *user)
{
    Landed *l = user;
    Fetch *f = l->fetch;
    Hash128 hash = hash128(l->bytes, l->slice->bytes);
    l->right = hash128_equal(&hash, &l->slice->hash);
    if (l->right && !atomic_load(&f->cancelled)) {
        put(f, l->slice, l->bytes);
        SliceId id = slice_id(f, l->slice);
        slice_store_write(f->o.store, &id, l->bytes, l->slice->bytes);
    }
}

/* The slice is to be asked from its next source. */
static void pass_on(Fetch *f, Slice *s)
{
    s->state = SLICE_WANTED;
    if (++s->source >= f->n_sources) {
        s->source = 0;
        s->round++;
    }
}

static void flight_settle(Flight *flight)
{
    if (flight->busy && !flight->call && flight->n_landing == 0) {
        flight->busy = false;
    }
}

static void landed_done(void *user)
{
    Landed *l = user;
    Fetch *f = l->fetch;
    f->n_tasks--;
    l->flight->n_landing--;
    if (l->right) {
        l->slice->state = SLICE_PUT;
        f->n_put++;
        f->progress.bytes_from_network += l->slice->bytes;
        f->progress.bytes_done += l->slice->bytes;
    } else {
        const TensorSpec *t = &f->o.spec->tensors[l->slice->ref.tensor];
        log_warn(f->o.log, "slice %u of tensor %s from %s has a wrong hash: asks the next source",
                 l->slice->ref.slice, t->name, f->sources[l->flight->source]);
        g_clear_error(&f->source_error);
        g_set_error(&f->source_error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                    "%s sent slice %u of tensor %s with a wrong hash",
                    f->sources[l->flight->source], l->slice->ref.slice, t->name);
        pass_on(f, l->slice);
    }
    weft_free(l->bytes);
    flight_settle(l->flight);
    g_free(l);
    report(f, false);
    settle(f);
}

/* ---- flights ---- */

/* What arrived makes no sense: the call is left, its other slices go to the next source. */
static void refuse(Flight *flight, const char *what)
{
    if (!flight->refused) {
        g_set_error(&flight->refused, WEFT_ERROR, WEFT_ERROR_PROTOCOL, "%s: %s",
                    flight->fetch->sources[flight->source], what);
    }
    rpc_client_cancel(flight->call);
}

static void flight_silent(void *user)
{
    Flight *flight = user;
    flight->silence = NULL;
    if (flight->call && !flight->refused) {
        g_set_error(&flight->refused, WEFT_ERROR, WEFT_ERROR_DEADLINE, "%s sent nothing for %d s",
                    flight->fetch->sources[flight->source], SILENCE_US / 1000000);
        rpc_client_cancel(flight->call);
    }
}

static void listen_on(Flight *flight)
{
    Loop *loop = flight->fetch->o.loop;
    loop_timer_cancel(loop, flight->silence);
    flight->silence = loop_timer_start(loop, SILENCE_US, flight_silent, flight);
}

static void slice_arrived(Flight *flight, Slice *s)
{
    Fetch *f = flight->fetch;
    Landed *l = g_new0(Landed, 1);
    *l = (Landed){.fetch = f, .flight = flight, .slice = s, .bytes = flight->buffer};
    flight->buffer = NULL;
    flight->filled = 0;
    flight->at++;
    s->state = SLICE_LANDED;
    f->n_tasks++;
    flight->n_landing++;
    task_pool_run(f->o.pool, landed_run, landed_done, l);
}

static void flight_message(const ProtobufCMessage *message, void *user)
{
    Flight *flight = user;
    Fetch *f = flight->fetch;
    const Weft__V1__FetchChunk *chunk = (const Weft__V1__FetchChunk *)message;
    if (flight->refused || f->error) {
        return;
    }
    listen_on(flight);
    if (chunk->index != flight->at || chunk->index >= flight->indices->len) {
        refuse(flight, "slices out of order");
        return;
    }
    Slice *s = &f->slices[g_array_index(flight->indices, uint32_t, chunk->index)];
    if (chunk->missing) {
        weft_free(g_steal_pointer(&flight->buffer));
        flight->filled = 0;
        flight->at++;
        pass_on(f, s);
        return;
    }
    if (chunk->data.len > FETCH_CHUNK_BYTES || chunk->data.len > s->bytes - flight->filled) {
        refuse(flight, "a slice longer than its tensor");
        return;
    }
    if (!flight->buffer) {
        GError *error = NULL;
        flight->buffer = weft_alloc(1, s->bytes, "slice", &error);
        if (!flight->buffer) {
            fail(f, error);
            return;
        }
    }
    if (chunk->data.len) {
        memcpy(flight->buffer + flight->filled, chunk->data.data, chunk->data.len);
        flight->filled += chunk->data.len;
    }
    if (!chunk->last) {
        return;
    }
    if (flight->filled != s->bytes) {
        refuse(flight, "a slice shorter than its tensor");
        return;
    }
    slice_arrived(flight, s);
}

static void flight_done(const GError *error, void *user)
{
    Flight *flight = user;
    Fetch *f = flight->fetch;
    flight->call = NULL;
    loop_timer_cancel(f->o.loop, g_steal_pointer(&flight->silence));
    weft_free(g_steal_pointer(&flight->buffer));
    flight->filled = 0;
    const GError *why = flight->refused ? flight->refused : error;
    bool left = flight->at < flight->indices->len;
    for (uint32_t i = flight->at; i < flight->indices->len; i++) {
        pass_on(f, &f->slices[g_array_index(flight->indices, uint32_t, i)]);
    }
    if (why && !f->error) {
        log_warn(f->o.log, "slices from %s: %s: goes on with the next source",
                 f->sources[flight->source], why->message);
        g_clear_error(&f->source_error);
        f->source_error = g_error_copy(why);
    } else if (left && !f->error) {
        g_clear_error(&f->source_error);
        g_set_error(&f->source_error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                    "%s ended before the last slice", f->sources[flight->source]);
    }
    g_clear_error(&flight->refused);
    flight_settle(flight);
    settle(f);
}

static void flight_start(Flight *flight, RpcChannel *channel)
{
    Fetch *f = flight->fetch;
    uint32_t n = flight->indices->len;
    g_autofree Weft__V1__SliceRef *refs = g_new(Weft__V1__SliceRef, n);
    g_autofree Weft__V1__SliceRef **pointers = g_new(Weft__V1__SliceRef *, n);
    for (uint32_t i = 0; i < n; i++) {
        Slice *s = &f->slices[g_array_index(flight->indices, uint32_t, i)];
        s->state = SLICE_FLYING;
        weft__v1__slice_ref__init(&refs[i]);
        refs[i].tensor = s->ref.tensor;
        refs[i].slice = s->ref.slice;
        pointers[i] = &refs[i];
    }
    Weft__V1__FetchRequest request = WEFT__V1__FETCH_REQUEST__INIT;
    Hash128 hash = f->o.spec->file_hash;
    request.file_hash = (ProtobufCBinaryData){sizeof hash.bytes, hash.bytes};
    request.slice_key = f->o.slice_key;
    request.n_slices = n;
    request.slices = pointers;
    flight->busy = true;
    flight->at = 0;
    flight->filled = 0;
    flight->call = rpc_call_start(channel, &weft__v1__slices__descriptor, "Fetch", &request.base,
                                  BATCH_DEADLINE_MS, false,
                                  (RpcCallbacks){flight_message, flight_done}, flight);
    listen_on(flight);
}

/* Fills the flight's batch with wanted slices of the lowest (round, source); false = none. */
static bool choose_batch(Fetch *f, Flight *flight, uint32_t round, uint32_t source)
{
    size_t bytes = 0;
    g_array_set_size(flight->indices, 0);
    for (uint32_t i = f->first_open; i < f->n_slices && flight->indices->len < FETCH_BATCH_SLICES;
         i++) {
        Slice *s = &f->slices[i];
        if (s->state != SLICE_WANTED || s->round != round || s->source != source) {
            continue;
        }
        if (flight->indices->len > 0 && bytes + s->bytes > FETCH_BATCH_BYTES) {
            break;
        }
        bytes += s->bytes;
        g_array_append_val(flight->indices, i);
    }
    flight->source = source;
    return flight->indices->len > 0;
}

/* The wanted slice of the lowest (round, source), or NULL. */
static const Slice *first_wanted(Fetch *f)
{
    while (f->first_open < f->n_slices && f->slices[f->first_open].state == SLICE_PUT) {
        f->first_open++;
    }
    const Slice *best = NULL;
    for (uint32_t i = f->first_open; i < f->n_slices; i++) {
        const Slice *s = &f->slices[i];
        if (s->state == SLICE_WANTED && (!best || s->round < best->round ||
                                         (s->round == best->round && s->source < best->source))) {
            best = s;
        }
        if (best && best->round == 0 && best->source == 0) {
            break;
        }
    }
    return best;
}

static void fail_without_source(Fetch *f, const Slice *s)
{
    uint32_t wanted = 0;
    for (uint32_t i = 0; i < f->n_slices; i++) {
        wanted += f->slices[i].state != SLICE_PUT;
    }
    GError *why = NULL;
    g_set_error(&why, WEFT_ERROR, WEFT_ERROR_PEER_UNREACHABLE,
                "%u of %u slices could not be had, first slice %u of tensor %s: %s: check the "
                "sources and load again",
                wanted, f->n_slices, s->ref.slice, f->o.spec->tensors[s->ref.tensor].name,
                f->source_error ? f->source_error->message
                : f->n_sources  ? "no source has them"
                                : "no source was named");
    fail(f, why);
}

static void pause_over(void *user)
{
    Fetch *f = user;
    f->pause = NULL;
    f->round++;
    settle(f);
}

static bool any_flight(const Fetch *f)
{
    for (unsigned i = 0; i < FETCH_FLIGHTS; i++) {
        if (f->flights[i].busy) {
            return true;
        }
    }
    return false;
}

/* Gives every free flight a batch of this round. */
static void next_flights(Fetch *f)
{
    for (unsigned i = 0; i < FETCH_FLIGHTS && !f->error && !f->pause; i++) {
        Flight *flight = &f->flights[i];
        const Slice *s = flight->busy ? NULL : first_wanted(f);
        if (!s) {
            continue;
        }
        if (s->round >= ROUNDS || f->n_sources == 0) {
            fail_without_source(f, s);
            return;
        }
        if (s->round > f->round) {
            return;
        }
        uint32_t round = s->round, source = s->source;
        RpcChannel *channel =
            f->o.channel(f->sources[source], source + 1 == f->n_sources, f->o.channel_user);
        if (!choose_batch(f, flight, round, source)) {
            continue;
        }
        if (!channel) {
            for (uint32_t k = 0; k < flight->indices->len; k++) {
                pass_on(f, &f->slices[g_array_index(flight->indices, uint32_t, k)]);
            }
            i--; /* the same place again, with the next source */
            continue;
        }
        flight_start(flight, channel);
    }
}

/* Decides what comes next whenever something ended. */
static void settle(Fetch *f)
{
    if (f->n_tasks > 0 && !f->remote) {
        return;
    }
    f->remote = true;
    next_flights(f);
    bool ended = f->error || f->n_put == f->n_slices;
    if (!ended && !f->pause && !any_flight(f)) { /* what is left is of the next round */
        f->pause = loop_timer_start(f->o.loop, ROUND_PAUSE_US, pause_over, f);
    }
    if (!ended || f->n_tasks > 0 || any_flight(f)) {
        return;
    }
    loop_timer_cancel(f->o.loop, f->pause);
    report(f, true);
    f->on_done(f->error, f->user);
    fetch_free(f);
}

/* ---- public ---- */

Fetch *fetch_start(const FetchOptions *options, FetchProgressFn on_progress, FetchDoneFn on_done,
                   void *user)
{
    Fetch *f = g_new0(Fetch, 1);
    f->o = *options;
    f->on_progress = on_progress;
    f->on_done = on_done;
    f->user = user;
    f->n_sources = (uint32_t)options->n_sources;
    f->sources = g_new0(char *, options->n_sources + 1);
    for (size_t i = 0; i < options->n_sources; i++) {
        f->sources[i] = g_strdup(options->sources[i]);
    }
    for (unsigned i = 0; i < LOCKS; i++) {
        pthread_mutex_init(&f->tensor_locks[i], NULL);
    }
    for (unsigned i = 0; i < FETCH_FLIGHTS; i++) {
        f->flights[i].fetch = f;
        f->flights[i].indices = g_array_new(FALSE, FALSE, sizeof(uint32_t));
    }
    f->slices = weft_alloc(options->n_slices, sizeof *f->slices, "slice table", &f->error);
    f->n_slices = f->slices ? options->n_slices : 0;
    for (uint32_t i = 0; i < f->n_slices; i++) {
        SliceRef ref = options->slices[i];
        f->slices[i].ref = ref;
        f->slices[i].bytes =
            model_spec_slice_bytes(options->spec, &options->spec->tensors[ref.tensor], ref.slice);
        f->progress.bytes_total += f->slices[i].bytes;
        if (!model_message_hash(options->manifest, ref.tensor, ref.slice, &f->slices[i].hash) &&
            !f->error) {
            g_set_error(&f->error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                        "slice %u of tensor %s has no hash in the manifest: nothing is loaded",
                        ref.slice, options->spec->tensors[ref.tensor].name);
        }
    }
    f->o.manifest = NULL;
    f->files = slice_files_open(options->models_dir, options->spec,
                                (const char *const *)options->manifest->file_names,
                                options->manifest->n_file_names);
    slice_store_retry(options->store);
    f->n_tasks = 1;
    loop_post(options->loop, start_local, f);
    return f;
}

void fetch_cancel(Fetch *fetch)
{
    fail(fetch, g_error_new(WEFT_ERROR, WEFT_ERROR_CANCELLED, "loading was cancelled"));
    if (fetch->pause) {
        loop_timer_cancel(fetch->o.loop, g_steal_pointer(&fetch->pause));
        fetch->pause = loop_timer_start(fetch->o.loop, 0, pause_over, fetch);
    }
}
