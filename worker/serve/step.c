#include "worker/serve/step.h"

#include "proto/base/bytes.h"
#include "proto/base/error.h"

#include <string.h>

uint32_t step_pages_capacity(const StepLimits *limits)
{
    return limits->max_rows / 32 + 2 * limits->max_slots;
}

Step *step_new(const StepLimits *limits)
{
    Step *step = g_new0(Step, 1);
    step->admits = g_new0(StepAdmit, limits->max_slots);
    step->releases = g_new0(uint32_t, limits->max_slots);
    step->segments = g_new0(StepSegment, limits->max_slots);
    step->rows = g_new0(StepRow, limits->max_rows);
    step->pages = g_new0(uint32_t, step_pages_capacity(limits));
    return step;
}

void step_free(Step *step)
{
    if (step == NULL) {
        return;
    }
    g_free(step->admits);
    g_free(step->releases);
    g_free(step->segments);
    g_free(step->rows);
    g_free(step->pages);
    g_free(step);
}

void step_clear(Step *step)
{
    step->number = 0;
    step->n_admits = step->n_releases = step->n_segments = step->n_rows = step->n_pages = 0;
}

/* ---- encoding ---- */

enum {
    ADMIT_BYTES = 4 + 8 + 4 + 4 * 4 + 4 * 4 + 8 + 2,
    SEGMENT_BYTES = 7 * 4,
    ROW_BYTES = 12,
    HEAD_BYTES = 5 * 4
};

size_t step_wire_limit(const StepLimits *limits)
{
    return HEAD_BYTES + (size_t)limits->max_slots * (ADMIT_BYTES + 4 + SEGMENT_BYTES) +
           (size_t)limits->max_rows * ROW_BYTES + 4 * (size_t)step_pages_capacity(limits);
}

typedef struct Writer {
    uint8_t *at;
} Writer;

static void put(Writer *w, const void *value, size_t size)
{
    memcpy(w->at, value,
           size); /* x86-64 and AArch64 are little-endian; other hosts are refused at hello */
    w->at += size;
}
static void put_u32(Writer *w, uint32_t v)
{
    put(w, &v, sizeof v);
}

size_t step_encode(const Step *step, uint8_t *out)
{
    Writer w = {out};
    put_u32(&w, step->n_admits);
    put_u32(&w, step->n_releases);
    put_u32(&w, step->n_segments);
    put_u32(&w, step->n_rows);
    put_u32(&w, step->n_pages);
    for (uint32_t i = 0; i < step->n_releases; i++) {
        put_u32(&w, step->releases[i]);
    }
    for (uint32_t i = 0; i < step->n_admits; i++) {
        const StepAdmit *a = &step->admits[i];
        put_u32(&w, a->slot);
        put(&w, &a->uid, 8);
        put_u32(&w, a->n_prompt);
        put(&w, &a->temperature, 4);
        put(&w, &a->top_p, 4);
        put(&w, &a->min_p, 4);
        put(&w, &a->repeat_penalty, 4);
        put_u32(&w, a->top_k);
        put_u32(&w, a->penalty_window);
        put_u32(&w, a->choice);
        put_u32(&w, a->top_logprobs);
        put(&w, &a->seed, 8);
        put(&w, &a->want_logits, 1);
        put(&w, &a->trace, 1);
    }
    for (uint32_t i = 0; i < step->n_segments; i++) {
        const StepSegment *s = &step->segments[i];
        const uint32_t fields[7] = {s->slot,       s->position, s->row0, s->n_rows,
                                    s->page_index, s->n_pages,  s->page0};
        put(&w, fields, sizeof fields);
    }
    for (uint32_t i = 0; i < step->n_rows; i++) {
        const uint32_t fields[3] = {step->rows[i].token, step->rows[i].target,
                                    step->rows[i].output};
        put(&w, fields, sizeof fields);
    }
    put(&w, step->pages, 4 * (size_t)step->n_pages);
    return (size_t)(w.at - out);
}

/* ---- decoding ---- */

static bool refuse(GError **error, const char *what, uint64_t value, uint64_t limit)
{
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                "step message: %s %" G_GUINT64_FORMAT " exceeds %" G_GUINT64_FORMAT, what, value,
                limit);
    return false;
}

static bool refuse_rows(GError **error, uint32_t row0, uint32_t n_rows, uint32_t expected)
{
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                "step message: a segment of %u rows begins at row %u, not at %u", n_rows, row0,
                expected);
    return false;
}

static bool decode_admit(StepAdmit *a, ByteReader *r, const StepLimits *limits, GError **error)
{
    a->slot = byte_reader_u32le(r);
    a->uid = byte_reader_u64le(r);
    a->n_prompt = byte_reader_u32le(r);
    a->temperature = byte_reader_f32le(r);
    a->top_p = byte_reader_f32le(r);
    a->min_p = byte_reader_f32le(r);
    a->repeat_penalty = byte_reader_f32le(r);
    a->top_k = byte_reader_u32le(r);
    a->penalty_window = byte_reader_u32le(r);
    a->choice = byte_reader_u32le(r);
    a->top_logprobs = byte_reader_u32le(r);
    a->seed = byte_reader_u64le(r);
    a->want_logits = byte_reader_u8(r);
    a->trace = byte_reader_u8(r);
    return a->slot < limits->max_slots ||
           refuse(error, "admitted slot", a->slot, limits->max_slots);
}

/* row: the first that no segment before covers. */
static bool decode_segment(StepSegment *s, const Step *step, uint32_t row, ByteReader *r,
                           const StepLimits *limits, GError **error)
{
    s->slot = byte_reader_u32le(r);
    s->position = byte_reader_u32le(r);
    s->row0 = byte_reader_u32le(r);
    s->n_rows = byte_reader_u32le(r);
    s->page_index = byte_reader_u32le(r);
    s->n_pages = byte_reader_u32le(r);
    s->page0 = byte_reader_u32le(r);
    if (s->slot >= limits->max_slots) {
        return refuse(error, "segment slot", s->slot, limits->max_slots);
    }
    if ((uint64_t)s->position + s->n_rows > limits->context) {
        return refuse(error, "segment end position", (uint64_t)s->position + s->n_rows,
                      limits->context);
    }
    if (s->row0 != row || s->n_rows == 0) {
        return refuse_rows(error, s->row0, s->n_rows, row);
    }
    if ((uint64_t)s->row0 + s->n_rows > step->n_rows) {
        return refuse(error, "segment end row", (uint64_t)s->row0 + s->n_rows, step->n_rows);
    }
    if ((uint64_t)s->page0 + s->n_pages > step->n_pages) {
        return refuse(error, "segment end page", (uint64_t)s->page0 + s->n_pages, step->n_pages);
    }
    const uint64_t table = (limits->context + 31) / 32;
    if ((uint64_t)s->page_index + s->n_pages > table) {
        return refuse(error, "segment page table end", (uint64_t)s->page_index + s->n_pages, table);
    }
    return true;
}

static bool decode_counts(Step *step, ByteReader *r, const StepLimits *limits, GError **error)
{
    step->n_admits = byte_reader_u32le(r);
    step->n_releases = byte_reader_u32le(r);
    step->n_segments = byte_reader_u32le(r);
    step->n_rows = byte_reader_u32le(r);
    step->n_pages = byte_reader_u32le(r);
    if (step->n_admits > limits->max_slots || step->n_releases > limits->max_slots ||
        step->n_segments > limits->max_slots) {
        return refuse(error, "count of sequences",
                      MAX(step->n_admits, MAX(step->n_releases, step->n_segments)),
                      limits->max_slots);
    }
    if (step->n_rows > limits->max_rows) {
        return refuse(error, "count of rows", step->n_rows, limits->max_rows);
    }
    const uint32_t pages = step_pages_capacity(limits);
    return step->n_pages <= pages || refuse(error, "count of pages", step->n_pages, pages);
}

bool step_decode(Step *step, const StepLimits *limits, const uint8_t *data, size_t size,
                 size_t *used, GError **error)
{
    ByteReader r = byte_reader(data, size);
    if (!decode_counts(step, &r, limits, error)) {
        return false;
    }
    for (uint32_t i = 0; i < step->n_releases; i++) {
        step->releases[i] = byte_reader_u32le(&r);
        if (step->releases[i] >= limits->max_slots) {
            return refuse(error, "released slot", step->releases[i], limits->max_slots);
        }
    }
    for (uint32_t i = 0; i < step->n_admits; i++) {
        if (!decode_admit(&step->admits[i], &r, limits, error)) {
            return false;
        }
    }
    uint32_t row0 = 0;
    for (uint32_t i = 0; i < step->n_segments; i++) {
        if (!decode_segment(&step->segments[i], step, row0, &r, limits, error)) {
            return false;
        }
        row0 += step->segments[i].n_rows;
    }
    if (row0 != step->n_rows) {
        return refuse(error, "count of rows", step->n_rows, row0);
    }
    for (uint32_t i = 0; i < step->n_rows; i++) {
        StepRow *row = &step->rows[i];
        row->token = byte_reader_u32le(&r);
        row->target = byte_reader_u32le(&r);
        row->output = byte_reader_u32le(&r);
        if (row->token >= limits->vocab_size || row->target >= limits->vocab_size) {
            return refuse(error, "token id", MAX(row->token, row->target), limits->vocab_size);
        }
        if (row->output > STEP_OUTPUT_SCORE) {
            return refuse(error, "row output", row->output, STEP_OUTPUT_SCORE);
        }
    }
    for (uint32_t i = 0; i < step->n_pages; i++) {
        step->pages[i] = byte_reader_u32le(&r);
        if (step->pages[i] >= limits->max_pages) {
            return refuse(error, "page", step->pages[i], limits->max_pages);
        }
    }
    if (r.failed) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL, "step message: %zu bytes are too few",
                    size);
        return false;
    }
    *used = r.offset;
    return true;
}
