#include "worker/serve/trace.h"

#include "proto/base/bytes.h"
#include "proto/plan/plan.h"

#include <string.h>

enum {
    ARRIVED_LIMIT = 32, /* more than fly at once: the rest is of steps that will not run */
    HEAD_BYTES = 8,
    ROW_HEAD_BYTES = 16,
    HASH_BYTES = 16
};

typedef struct Arrived {
    uint32_t step;
    GByteArray *bytes;
} Arrived;

struct Trace {
    StageTrace stage;
    uint32_t n_ranks;
    uint32_t *rows;
    uint32_t rows_capacity;
    Hash128 *gathered; /* [n_ranks][n_rows][n_sites] */
    GQueue arrived;    /* of Arrived, oldest first */
    GByteArray *message;
};

Trace *trace_new(uint32_t first_layer, uint32_t n_layers, bool embeds, uint32_t n_ranks)
{
    Trace *t = g_new0(Trace, 1);
    t->n_ranks = n_ranks;
    t->stage.first_site = embeds ? 0 : trace_site_attention(first_layer);
    t->stage.n_sites = 2 * n_layers + (embeds ? 1 : 0);
    g_queue_init(&t->arrived);
    return t;
}

static void arrived_free(void *data)
{
    Arrived *a = data;
    g_byte_array_unref(a->bytes);
    g_free(a);
}

void trace_free(Trace *t)
{
    if (t == NULL) {
        return;
    }
    g_queue_clear_full(&t->arrived, arrived_free);
    g_clear_pointer(&t->message, g_byte_array_unref);
    g_free(t->rows);
    g_free(t->stage.hashes);
    g_free(t->gathered);
    g_free(t);
}

static bool is_traced(const Sequences *sequences, const StepSegment *g)
{
    return sequences->slots[g->slot].admit.trace;
}

static void reserve(Trace *t, uint32_t n_rows)
{
    if (n_rows > t->rows_capacity) {
        t->rows_capacity = n_rows;
        t->rows = g_renew(uint32_t, t->rows, n_rows);
        t->stage.hashes = g_renew(Hash128, t->stage.hashes, (gsize)n_rows * t->stage.n_sites);
        t->gathered = g_renew(Hash128, t->gathered, (gsize)n_rows * t->stage.n_sites * t->n_ranks);
    }
}

StageTrace *trace_begin(Trace *t, const Step *step, const Sequences *sequences)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < step->n_segments; i++) {
        n += is_traced(sequences, &step->segments[i]) ? step->segments[i].n_rows : 0;
    }
    if (n == 0) {
        return NULL;
    }
    reserve(t, n);
    t->stage.n_rows = 0;
    for (uint32_t i = 0; i < step->n_segments; i++) {
        const StepSegment *g = &step->segments[i];
        for (uint32_t r = 0; is_traced(sequences, g) && r < g->n_rows; r++) {
            t->rows[t->stage.n_rows++] = g->row0 + r;
        }
    }
    t->stage.rows = t->rows;
    return &t->stage;
}

/* ---- the ranks of a stage ---- */

static void mark_split(Hash128 *site, uint32_t rank)
{
    const uint32_t tail[2] = {rank, 0};
    memcpy(site->bytes, TRACE_SPLIT, 8);
    memcpy(site->bytes + 8, tail, sizeof tail);
}

GroupStatus trace_compare(Trace *t, Group *group, const GroupWait *wait)
{
    const size_t n = (size_t)t->stage.n_rows * t->stage.n_sites;
    size_t sizes[PLAN_RANKS_LIMIT];
    void *out[PLAN_RANKS_LIMIT];
    for (uint32_t r = 0; r < t->n_ranks; r++) {
        sizes[r] = n * sizeof(Hash128);
        out[r] = t->gathered + r * n;
    }
    const GroupStatus status = group_all_gather(group, wait, t->stage.hashes, sizes, out);
    for (size_t i = 0; status == GROUP_OK && i < n; i++) {
        for (uint32_t r = t->n_ranks - 1; r > 0; r--) {
            if (!hash128_equal(&t->gathered[i], &t->gathered[r * n + i])) {
                mark_split(&t->stage.hashes[i], r);
            }
        }
    }
    return status;
}

/* ---- messages ---- */

void trace_receive(Trace *t, uint32_t step, const void *data, size_t size)
{
    Arrived *a = g_new(Arrived, 1);
    *a = (Arrived){step, g_byte_array_append(g_byte_array_new(), data, (guint)size)};
    g_queue_push_tail(&t->arrived, a);
    if (g_queue_get_length(&t->arrived) > ARRIVED_LIMIT) {
        arrived_free(g_queue_pop_head(&t->arrived));
    }
}

/* Drops what belongs to steps before; what belongs to this one or NULL. */
static const Arrived *arrived_for(Trace *t, uint32_t step)
{
    Arrived *a;
    while ((a = g_queue_peek_head(&t->arrived)) != NULL && a->step != step) {
        arrived_free(g_queue_pop_head(&t->arrived));
    }
    return a;
}

static void append_u32(GByteArray *out, uint32_t value)
{
    g_byte_array_append(out, (const uint8_t *)&value, sizeof value);
}

static void append_row_head(GByteArray *out, const Step *step, const Sequences *sequences,
                            uint32_t row)
{
    const StepSegment *g = step->segments;
    while (row < g->row0 || row >= g->row0 + g->n_rows) {
        g++;
    }
    append_u32(out, g->slot);
    g_byte_array_append(out, (const uint8_t *)&sequences->slots[g->slot].admit.uid, 8);
    append_u32(out, g->position + (row - g->row0));
}

const GByteArray *trace_message(Trace *t, const Step *step, const Sequences *sequences)
{
    const StageTrace *s = &t->stage;
    const uint32_t before = s->first_site;
    const size_t row_bytes = ROW_HEAD_BYTES + (size_t)before * HASH_BYTES,
                 own_bytes = (size_t)s->n_sites * HASH_BYTES;
    const Arrived *a = before > 0 ? arrived_for(t, step->number) : NULL;
    if (before > 0 && (a == NULL || a->bytes->len != HEAD_BYTES + s->n_rows * row_bytes)) {
        return NULL;
    }
    if (t->message == NULL) {
        t->message = g_byte_array_new();
    }
    g_byte_array_set_size(t->message, 0);
    append_u32(t->message, s->n_rows);
    append_u32(t->message, before + s->n_sites);
    for (uint32_t i = 0; i < s->n_rows; i++) {
        append_row_head(t->message, step, sequences, s->rows[i]);
        if (before > 0) {
            g_byte_array_append(t->message,
                                a->bytes->data + HEAD_BYTES + i * row_bytes + ROW_HEAD_BYTES,
                                (guint)(row_bytes - ROW_HEAD_BYTES));
        }
        g_byte_array_append(t->message, s->hashes[(size_t)i * s->n_sites].bytes, (guint)own_bytes);
    }
    return t->message;
}

bool trace_each_row(const void *data, size_t size, TraceRowFn fn, void *user)
{
    ByteReader r = byte_reader(data, size);
    const uint32_t n_rows = byte_reader_u32le(&r), n_sites = byte_reader_u32le(&r);
    for (uint32_t i = 0; i < n_rows && !r.failed; i++) {
        const uint32_t slot = byte_reader_u32le(&r);
        const uint64_t uid = byte_reader_u64le(&r);
        const uint32_t position = byte_reader_u32le(&r);
        const uint8_t *sites = byte_reader_take(&r, (size_t)n_sites * HASH_BYTES);
        if (sites != NULL) {
            fn(slot, uid, position, sites, n_sites, user);
        }
    }
    return !r.failed && r.offset == size;
}
