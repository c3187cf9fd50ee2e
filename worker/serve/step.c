#include "worker/serve/step.h"

#include "proto/base/bytes.h"
#include "proto/base/error.h"

#include <string.h>

static uint32_t pages_capacity(const StepLimits *limits)
{
    return limits->max_rows / 32 + 2 * limits->max_slots + STEP_REUSE_PAGES;
}

Step *step_new(const StepLimits *limits)
{
    Step *step = g_new0(Step, 1);
    step->admits = g_new0(StepAdmit, limits->max_slots);
    step->releases = g_new0(uint32_t, limits->max_slots);
    step->segments = g_new0(StepSegment, limits->max_slots);
    step->rows = g_new0(StepRow, limits->max_rows);
    step->pages = g_new0(uint32_t, pages_capacity(limits));
    step->reuses = g_new0(StepReuse, step_reuses_capacity(limits));
    step->copies = g_new0(StepCopy, limits->max_slots);
    step->tokens = g_new0(uint32_t, 32 * STEP_REUSE_PAGES);
    step->biases = g_new0(SampleBias, SAMPLE_BIAS_LIMIT);
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
    g_free(step->reuses);
    g_free(step->copies);
    g_free(step->tokens);
    g_free(step->biases);
    g_free(step);
}

void step_clear(Step *step)
{
    step->number = 0;
    step->n_admits = step->n_releases = step->n_segments = step->n_rows = step->n_pages = 0;
    step->n_reuses = step->n_copies = step->n_tokens = step->n_biases = 0;
}

/* ---- encoding ---- */

enum {
    ADMIT_BYTES = 4 + 8 + 4 + 6 * 4 + 4 * 4 + 8 + 2 * 4 + 2,
    SEGMENT_BYTES = 7 * 4,
    REUSE_BYTES = 5 * 4,
    COPY_BYTES = 6 * 4,
    ROW_BYTES = 12,
    BIAS_BYTES = 8,
    HEAD_BYTES = 9 * 4
};

size_t step_wire_limit(const StepLimits *limits)
{
    return HEAD_BYTES + REUSE_BYTES * (size_t)step_reuses_capacity(limits) +
           (size_t)limits->max_slots * (ADMIT_BYTES + 4 + SEGMENT_BYTES + COPY_BYTES) +
           (size_t)limits->max_rows * ROW_BYTES + 4 * (size_t)pages_capacity(limits) +
           4 * 32 * (size_t)STEP_REUSE_PAGES + BIAS_BYTES * (size_t)SAMPLE_BIAS_LIMIT;
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

static void put_admit(Writer *w, const StepAdmit *a)
{
    put_u32(w, a->slot);
    put(w, &a->uid, 8);
    put_u32(w, a->n_prompt);
    put(w, &a->temperature, 4);
    put(w, &a->top_p, 4);
    put(w, &a->min_p, 4);
    put(w, &a->repeat_penalty, 4);
    put(w, &a->presence_penalty, 4);
    put(w, &a->frequency_penalty, 4);
    put_u32(w, a->top_k);
    put_u32(w, a->penalty_window);
    put_u32(w, a->choice);
    put_u32(w, a->top_logprobs);
    put(w, &a->seed, 8);
    put_u32(w, a->bias0);
    put_u32(w, a->n_bias);
    put(w, &a->want_logits, 1);
    put(w, &a->trace, 1);
}

size_t step_encode(const Step *step, uint8_t *out)
{
    Writer w = {out};
    const uint32_t counts[9] = {step->n_admits, step->n_releases, step->n_segments,
                                step->n_rows,   step->n_pages,    step->n_reuses,
                                step->n_copies, step->n_tokens,   step->n_biases};
    put(&w, counts, sizeof counts);
    put(&w, step->releases, 4 * (size_t)step->n_releases);
    for (uint32_t i = 0; i < step->n_admits; i++) {
        put_admit(&w, &step->admits[i]);
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
    for (uint32_t i = 0; i < step->n_reuses; i++) {
        const StepReuse *u = &step->reuses[i];
        const uint32_t fields[5] = {u->slot, u->page_index, u->n_pages, u->page0, u->token0};
        put(&w, fields, sizeof fields);
    }
    for (uint32_t i = 0; i < step->n_copies; i++) {
        const StepCopy *c = &step->copies[i];
        const uint32_t fields[6] = {c->slot, c->page_index, c->n_positions,
                                    c->from, c->to,         c->token0};
        put(&w, fields, sizeof fields);
    }
    put(&w, step->tokens, 4 * (size_t)step->n_tokens);
    for (uint32_t i = 0; i < step->n_biases; i++) {
        put_u32(&w, step->biases[i].id);
        put(&w, &step->biases[i].bias, 4);
    }
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

static bool decode_admit(StepAdmit *a, const Step *step, ByteReader *r, const StepLimits *limits,
                         GError **error)
{
    a->slot = byte_reader_u32le(r);
    a->uid = byte_reader_u64le(r);
    a->n_prompt = byte_reader_u32le(r);
    a->temperature = byte_reader_f32le(r);
    a->top_p = byte_reader_f32le(r);
    a->min_p = byte_reader_f32le(r);
    a->repeat_penalty = byte_reader_f32le(r);
    a->presence_penalty = byte_reader_f32le(r);
    a->frequency_penalty = byte_reader_f32le(r);
    a->top_k = byte_reader_u32le(r);
    a->penalty_window = byte_reader_u32le(r);
    a->choice = byte_reader_u32le(r);
    a->top_logprobs = byte_reader_u32le(r);
    a->seed = byte_reader_u64le(r);
    a->bias0 = byte_reader_u32le(r);
    a->n_bias = byte_reader_u32le(r);
    a->want_logits = byte_reader_u8(r);
    a->trace = byte_reader_u8(r);
    if ((uint64_t)a->bias0 + a->n_bias > step->n_biases) {
        return refuse(error, "admit's bias end", (uint64_t)a->bias0 + a->n_bias, step->n_biases);
    }
    if (a->n_prompt > limits->context) {
        return refuse(error, "prompt length", a->n_prompt, limits->context);
    }
    return a->slot < limits->max_slots ||
           refuse(error, "admitted slot", a->slot, limits->max_slots);
}

static bool decode_reuse(StepReuse *u, const Step *step, ByteReader *r, const StepLimits *limits,
                         GError **error)
{
    u->slot = byte_reader_u32le(r);
    u->page_index = byte_reader_u32le(r);
    u->n_pages = byte_reader_u32le(r);
    u->page0 = byte_reader_u32le(r);
    u->token0 = byte_reader_u32le(r);
    if (u->slot >= limits->max_slots) {
        return refuse(error, "reusing slot", u->slot, limits->max_slots);
    }
    if (((uint64_t)u->page_index + u->n_pages) * 32 > limits->context) {
        return refuse(error, "reused end position", ((uint64_t)u->page_index + u->n_pages) * 32,
                      limits->context);
    }
    if ((uint64_t)u->page0 + u->n_pages > step->n_pages) {
        return refuse(error, "reused end page", (uint64_t)u->page0 + u->n_pages, step->n_pages);
    }
    const uint64_t end = u->token0 + (uint64_t)u->n_pages * 32;
    return end <= step->n_tokens || refuse(error, "reused end token", end, step->n_tokens);
}

static bool decode_copy(StepCopy *c, const Step *step, ByteReader *r, const StepLimits *limits,
                        GError **error)
{
    c->slot = byte_reader_u32le(r);
    c->page_index = byte_reader_u32le(r);
    c->n_positions = byte_reader_u32le(r);
    c->from = byte_reader_u32le(r);
    c->to = byte_reader_u32le(r);
    c->token0 = byte_reader_u32le(r);
    if (c->slot >= limits->max_slots) {
        return refuse(error, "copying slot", c->slot, limits->max_slots);
    }
    if (c->n_positions - 1 >= 31) { /* also none */
        return refuse(error, "count of copied positions less one", c->n_positions - 1, 30);
    }
    const uint64_t position = (uint64_t)c->page_index * 32 + c->n_positions;
    if (position > limits->context) {
        return refuse(error, "copied end position", position, limits->context);
    }
    if (MAX(c->from, c->to) >= limits->max_pages) {
        return refuse(error, "copied page", MAX(c->from, c->to), limits->max_pages);
    }
    const uint64_t end = (uint64_t)c->token0 + c->n_positions;
    return end <= step->n_tokens || refuse(error, "copied end token", end, step->n_tokens);
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
    step->n_reuses = byte_reader_u32le(r);
    step->n_copies = byte_reader_u32le(r);
    step->n_tokens = byte_reader_u32le(r);
    step->n_biases = byte_reader_u32le(r);
    const uint32_t sequences =
        MAX(MAX(step->n_admits, step->n_releases), MAX(step->n_segments, step->n_copies));
    if (sequences > limits->max_slots) {
        return refuse(error, "count of sequences", sequences, limits->max_slots);
    }
    if (step->n_reuses > step_reuses_capacity(limits)) {
        return refuse(error, "count of reuses", step->n_reuses, step_reuses_capacity(limits));
    }
    if (step->n_tokens > 32 * STEP_REUSE_PAGES) {
        return refuse(error, "count of reused tokens", step->n_tokens, 32 * STEP_REUSE_PAGES);
    }
    if (step->n_biases > SAMPLE_BIAS_LIMIT) {
        return refuse(error, "count of biases", step->n_biases, SAMPLE_BIAS_LIMIT);
    }
    if (step->n_rows > limits->max_rows) {
        return refuse(error, "count of rows", step->n_rows, limits->max_rows);
    }
    const uint32_t pages = pages_capacity(limits);
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
        if (!decode_admit(&step->admits[i], step, &r, limits, error)) {
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
    for (uint32_t i = 0; i < step->n_reuses; i++) {
        if (!decode_reuse(&step->reuses[i], step, &r, limits, error)) {
            return false;
        }
    }
    for (uint32_t i = 0; i < step->n_copies; i++) {
        if (!decode_copy(&step->copies[i], step, &r, limits, error)) {
            return false;
        }
    }
    for (uint32_t i = 0; i < step->n_tokens; i++) {
        step->tokens[i] = byte_reader_u32le(&r);
        if (step->tokens[i] >= limits->vocab_size) {
            return refuse(error, "reused token id", step->tokens[i], limits->vocab_size);
        }
    }
    for (uint32_t i = 0; i < step->n_biases; i++) {
        step->biases[i].id = byte_reader_u32le(&r);
        step->biases[i].bias = byte_reader_f32le(&r);
        if (step->biases[i].id >= limits->vocab_size) {
            return refuse(error, "biased id", step->biases[i].id, limits->vocab_size);
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
