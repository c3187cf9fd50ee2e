/* What arrives is a chunk: a part begins, floats, a part ends. Invariants
 *   1. A rank's k-th part belongs to the epoch's k-th checkpoint. `parts[rank]` are those from the
 *      one that is being saved on: at most two.
 *   2. Chunks wait in `waiting`, in order of arrival. A task takes those of the checkpoint that is
 *      being saved; while it runs it alone touches `batch`, `files`, `texts` and `error`.
 *   3. After the first error of a checkpoint nothing more of it is written, and what was is removed
 *      at once; its ranks are heard to the end. */
#include "coordinator/train/train_saving.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "proto/base/failpoint.h"

#include <string.h>

#define PARTS_LIMIT 2u       /* of a rank: one that is saved, the next one */
#define SLOW_DISK_US 1500000 /* of the fail point */

typedef struct Chunk {
    uint32_t rank;
    const TrainPart *part; /* borrowed */
    bool begins, ends;
    void *floats; /* weft_alloc'd; NULL: none */
    size_t size;
} Chunk;

struct TrainSaving {
    TrainSavingOptions o;
    TrainSavingEvents events;
    GQueue *parts;  /* by rank: of TrainPart */
    uint64_t *held; /* by rank: bytes of floats that are not written */
    uint64_t held_bytes, most_bytes;
    GQueue waiting, batch;  /* of Chunk */
    CheckpointPart **files; /* by rank */
    GPtrArray *texts;       /* of parts that are written */
    GError *error;
    bool running, commits, telling, closing, dropped;
};

static TrainPart *part_of(const TrainSaving *s, uint32_t rank)
{
    return g_queue_peek_head(&s->parts[rank]);
}

static void chunk_free(void *chunk)
{
    Chunk *c = chunk;
    weft_free(c->floats);
    g_free(c);
}

TrainSaving *train_saving_new(const TrainSavingOptions *options, const TrainSavingEvents *events)
{
    TrainSaving *s = g_new0(TrainSaving, 1);
    s->o = *options;
    s->events = *events;
    s->parts = g_new0(GQueue, options->n_ranks);
    s->held = g_new0(uint64_t, options->n_ranks);
    s->files = g_new0(CheckpointPart *, options->n_ranks);
    s->texts = g_ptr_array_new_with_free_func(g_free);
    g_queue_init(&s->waiting);
    g_queue_init(&s->batch);
    for (uint32_t r = 0; r < options->n_ranks; r++) {
        g_queue_init(&s->parts[r]);
    }
    return s;
}

static void saving_free(TrainSaving *s)
{
    for (uint32_t r = 0; r < s->o.n_ranks; r++) {
        g_queue_clear_full(&s->parts[r], train_part_free);
        checkpoint_part_abandon(s->files[r]);
    }
    g_queue_clear_full(&s->waiting, chunk_free);
    g_queue_clear_full(&s->batch, chunk_free);
    g_ptr_array_unref(s->texts);
    g_clear_error(&s->error);
    g_free(s->parts);
    g_free(s->held);
    g_free(s->files);
    g_free(s);
}

/* ---- in the pool ---- */

static uint64_t step_of(const TrainSaving *s)
{
    return part_of(s, 0)->step;
}

/* Invariant 3. */
static void drop_files(TrainSaving *s, uint64_t step)
{
    for (uint32_t r = 0; r < s->o.n_ranks; r++) {
        checkpoint_part_abandon(g_steal_pointer(&s->files[r]));
    }
    g_ptr_array_set_size(s->texts, 0);
    checkpoint_abandon(s->o.directory, step);
}

static bool write_chunk(TrainSaving *s, const Chunk *c)
{
    const TrainPart *p = c->part;
    if (p->pieces->len == 0) {
        return true; /* its rank has nothing of its own */
    }
    if (c->begins) {
        const CheckpointPiece *pieces = (const CheckpointPiece *)(const void *)p->pieces->data;
        s->files[c->rank] = checkpoint_part_open(s->o.disk, s->o.directory, p->step, c->rank,
                                                 pieces, p->pieces->len, &s->error);
        return s->files[c->rank] != NULL;
    }
    if (!c->ends) {
        return checkpoint_part_write(s->files[c->rank], c->floats, c->size, &s->error);
    }
    char *text = checkpoint_part_close(g_steal_pointer(&s->files[c->rank]), &s->error);
    if (text != NULL) {
        g_ptr_array_add(s->texts, text);
    }
    return text != NULL;
}

/* All ranks are at one step, with the same weights. */
static bool check_parts(const TrainSaving *s, GError **error)
{
    const TrainPart *first = part_of(s, 0);
    for (uint32_t r = 1; r < s->o.n_ranks; r++) {
        const TrainPart *p = part_of(s, r);
        if (p->step != first->step || !hash128_equal(&p->digest, &first->digest)) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_NUMERICS,
                        "rank %u is at step %" G_GUINT64_FORMAT
                        " with other weights than the first, which is at step %" G_GUINT64_FORMAT,
                        r, p->step, first->step);
            return false;
        }
    }
    return true;
}

static bool write_tokenizer(TrainSaving *s, GError **error)
{
    const char *json = s->o.tokenizer_json;
    if (json == NULL) {
        return true;
    }
    char *text = checkpoint_write_file(s->o.disk, s->o.directory, step_of(s), "tokenizer.json",
                                       json, strlen(json), error);
    if (text != NULL) {
        g_ptr_array_add(s->texts, text);
    }
    return text != NULL;
}

static bool commit(TrainSaving *s, GError **error)
{
    const TrainPart *first = part_of(s, 0);
    char digest[33];
    int64_t slow_step = 0;
    if (failpoint("checkpoint-slow", &slow_step) && (uint64_t)slow_step == first->step) {
        g_usleep(SLOW_DISK_US);
    }
    hash128_hex(&first->digest, digest);
    CheckpointState state = first->state;
    state.job = (char *)s->o.job;
    state.definition = (char *)s->o.definition;
    state.weights_digest = digest;
    return check_parts(s, error) && write_tokenizer(s, error) &&
           checkpoint_commit(s->o.disk, s->o.directory, &state, s->o.spec,
                             (const char *const *)s->texts->pdata, s->texts->len, s->o.keep, error);
}

/* commits: all parts of the checkpoint are whole with this batch. */
static void saving_work(void *user)
{
    TrainSaving *s = user;
    for (GList *l = s->batch.head; l != NULL && s->error == NULL; l = l->next) {
        const Chunk *c = l->data;
        if (!write_chunk(s, c)) {
            drop_files(s, c->part->step);
        }
    }
    if (s->commits && s->error == NULL && !commit(s, &s->error)) {
        for (uint32_t r = 0; r < s->o.n_ranks; r++) {
            drop_files(s, part_of(s, r)->step);
        }
    }
}

/* ---- on the loop ---- */

static void saving_next(TrainSaving *s);

/* Of the checkpoint that is being saved. */
static bool is_current(const TrainSaving *s, const Chunk *c)
{
    return c->part == part_of(s, c->rank);
}

static bool is_whole(const TrainSaving *s)
{
    for (uint32_t r = 0; r < s->o.n_ranks; r++) {
        if (part_of(s, r) == NULL || !part_of(s, r)->whole) {
            return false;
        }
    }
    return true;
}

static void take_batch(TrainSaving *s)
{
    for (GList *l = s->waiting.head, *next; l != NULL; l = next) {
        next = l->next;
        if (is_current(s, l->data)) {
            g_queue_unlink(&s->waiting, l);
            g_queue_push_tail_link(&s->batch, l);
        }
    }
}

static void tell_taken(TrainSaving *s)
{
    for (uint32_t r = 0; r < s->o.n_ranks; r++) {
        uint64_t bytes = 0;
        for (GList *l = s->batch.head; l != NULL; l = l->next) {
            const Chunk *c = l->data;
            bytes += c->rank == r ? c->size : 0;
        }
        s->held[r] -= bytes;
        s->held_bytes -= bytes;
        if (bytes > 0 && !s->closing) {
            s->events.taken(r, bytes, s->events.user);
        }
    }
    g_queue_clear_full(&s->batch, chunk_free);
}

/* The checkpoint is saved, or nothing is left of it: its parts go. */
static void tell_saved(TrainSaving *s)
{
    const uint64_t step = step_of(s);
    g_autoptr(GError) error = g_steal_pointer(&s->error);
    for (uint32_t r = 0; r < s->o.n_ranks; r++) {
        train_part_free(g_queue_pop_head(&s->parts[r]));
    }
    g_ptr_array_set_size(s->texts, 0);
    s->events.saved(step, error, s->events.user);
}

static void closed(TrainSaving *s)
{
    const TrainSavingEvents events = s->events;
    const bool dropped = s->dropped;
    saving_free(s);
    events.closed(dropped, events.user);
}

static void saving_done(void *user)
{
    TrainSaving *s = user;
    const bool commits = s->commits;
    s->running = s->commits = false;
    s->telling = true; /* whoever is told may close this */
    tell_taken(s);
    if (commits) {
        tell_saved(s);
    }
    s->telling = false;
    saving_next(s);
}

static void saving_dropped(void *user)
{
    TrainSaving *s = user;
    s->dropped = true;
    closed(s);
}

/* Some of the checkpoint is on the disk, or is to be. */
static bool has_begun(const TrainSaving *s, uint64_t *step)
{
    for (uint32_t r = 0; r < s->o.n_ranks; r++) {
        if (part_of(s, r) != NULL) {
            *step = part_of(s, r)->step;
            return true;
        }
    }
    return false;
}

static void remove_work(void *user)
{
    TrainSaving *s = user;
    uint64_t step = 0;
    has_begun(s, &step);
    drop_files(s, step);
}

static void remove_done(void *user)
{
    closed(user);
}

/* The ranks are gone, and no whole checkpoint is here. */
static void close_now(TrainSaving *s)
{
    uint64_t step;
    if (!has_begun(s, &step)) {
        closed(s);
        return;
    }
    s->running = true;
    work_pool_run(s->o.pool, remove_work, remove_done, saving_dropped, s);
}

static void saving_next(TrainSaving *s)
{
    if (s->running || s->telling) {
        return;
    }
    if (s->closing && !is_whole(s)) {
        close_now(s);
        return;
    }
    take_batch(s);
    if (!g_queue_is_empty(&s->batch)) {
        s->running = true;
        s->commits = is_whole(s);
        work_pool_run(s->o.pool, saving_work, saving_done, saving_dropped, s);
    }
}

/* ---- what arrives ---- */

static bool refuse(GError **error, uint32_t rank, const char *what)
{
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL, "rank %u sends %s of a checkpoint", rank,
                what);
    return false;
}

static bool begin_part(TrainSaving *s, uint32_t rank, const Weft__V1__TrainPartBegin *begin,
                       GError **error)
{
    const TrainPart *last = g_queue_peek_tail(&s->parts[rank]);
    if (g_queue_get_length(&s->parts[rank]) == PARTS_LIMIT || (last != NULL && !last->whole)) {
        return refuse(error, rank, "one more part");
    }
    TrainPart *part = train_part_new(s->o.spec, begin, error);
    if (part != NULL) {
        g_queue_push_tail(&s->parts[rank], part);
    }
    return part != NULL;
}

static bool take_floats(TrainSaving *s, uint32_t rank, const Weft__V1__TrainPiece *piece,
                        Chunk *chunk, GError **error)
{
    const size_t size = piece->data.len;
    if (!train_part_add((TrainPart *)chunk->part, piece, error)) {
        return false;
    }
    if (size > TRAIN_SAVING_WINDOW - s->held[rank]) {
        return refuse(error, rank, "more than is to be on its way");
    }
    chunk->floats = weft_alloc(1, size, "a checkpoint's piece", error);
    if (chunk->floats == NULL) {
        return false;
    }
    memcpy(chunk->floats, piece->data.data, size);
    chunk->size = size;
    s->held[rank] += size;
    s->held_bytes += size;
    s->most_bytes = MAX(s->most_bytes, s->held_bytes);
    return true;
}

bool train_saving_add(TrainSaving *s, uint32_t rank, const Weft__V1__TrainReport *report,
                      GError **error)
{
    Chunk chunk = {.rank = rank,
                   .begins = report->report_case == WEFT__V1__TRAIN_REPORT__REPORT_BEGIN,
                   .ends = report->report_case == WEFT__V1__TRAIN_REPORT__REPORT_PART};
    if (chunk.begins && !begin_part(s, rank, report->begin, error)) {
        return false;
    }
    chunk.part = g_queue_peek_tail(&s->parts[rank]);
    if (chunk.ends && !train_part_end((TrainPart *)chunk.part, report->part, error)) {
        return false;
    }
    if (!chunk.begins && !chunk.ends && !take_floats(s, rank, report->piece, &chunk, error)) {
        return false;
    }
    g_queue_push_tail(&s->waiting, g_memdup2(&chunk, sizeof chunk));
    saving_next(s);
    return true;
}

bool train_saving_is_idle(const TrainSaving *s)
{
    uint64_t step;
    return !s->running && !has_begun(s, &step);
}

uint64_t train_saving_most_bytes(const TrainSaving *s)
{
    return s->most_bytes;
}

void train_saving_close(TrainSaving *s)
{
    if (s != NULL) {
        s->closing = true;
        saving_next(s);
    }
}
