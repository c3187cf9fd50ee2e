#include "worker/serve/sample.h"

#include "proto/base/bytes.h"
#include "proto/base/hash.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

enum { OPEN_ENDED_FIRST = 128 };

typedef struct Candidate {
    float value; /* what is compared: tempered (and noisy without filters) */
    float raw;
    uint32_t id;
} Candidate;

static bool has_filters(const SampleSettings *s)
{
    return s->top_k > 0 || (s->top_p > 0.0f && s->top_p < 1.0f) || s->min_p > 0.0f;
}

bool sample_is_open_ended(const SampleSettings *s)
{
    return s->temperature > 0.0f && has_filters(s) && s->top_k == 0;
}

uint32_t sample_candidates(const SampleSettings *s)
{
    if (s->temperature == 0.0f || !has_filters(s)) {
        return 1;
    }
    return s->top_k > 0 ? s->top_k : OPEN_ENDED_FIRST;
}

/* ---- the best of a shard ---- */

/* True if a comes before b: larger value, then lower id. */
static bool before(const Candidate *a, const Candidate *b)
{
    return a->value > b->value || (a->value == b->value && a->id < b->id);
}

/* A heap whose root is the worst of the best n. */
typedef struct Best {
    Candidate *heap;
    uint32_t n, limit;
} Best;

static void sift_down(Best *b, uint32_t i)
{
    for (;;) {
        uint32_t worst = i;
        for (uint32_t child = 2 * i + 1; child <= 2 * i + 2 && child < b->n; child++) {
            if (before(&b->heap[worst], &b->heap[child])) {
                worst = child;
            }
        }
        if (worst == i) {
            return;
        }
        const Candidate t = b->heap[i];
        b->heap[i] = b->heap[worst];
        b->heap[worst] = t;
        i = worst;
    }
}

static void offer(Best *b, Candidate c)
{
    if (b->n < b->limit) {
        uint32_t i = b->n++;
        b->heap[i] = c;
        while (i > 0 && before(&b->heap[(i - 1) / 2], &b->heap[i])) {
            const Candidate t = b->heap[i];
            b->heap[i] = b->heap[(i - 1) / 2];
            b->heap[(i - 1) / 2] = t;
            i = (i - 1) / 2;
        }
    } else if (b->limit > 0 && before(&c, &b->heap[0])) {
        b->heap[0] = c;
        sift_down(b, 0);
    }
}

static int by_rank(const void *a, const void *b)
{
    return before(a, b) ? -1 : before(b, a) ? 1 : 0;
}

/* ---- a shard's part; on the wire: u32 failed, n_chunks, n_candidates, complete, n_top,
 * has_target; f32 target; chunks {hash, m, l, mt, lt}; candidates; top ---- */

typedef struct ChunkPart {
    uint8_t hash[16];
    float m, l;   /* raw */
    float mt, lt; /* tempered, for top_p over all ids */
} ChunkPart;

static bool penalises(const SampleSettings *s)
{
    return s->repeat_penalty > 0.0f && s->repeat_penalty != 1.0f;
}

static bool counts_generated(const SampleRow *row)
{
    const SampleSettings *s = &row->settings;
    return row->n_generated > 0 && (s->presence_penalty != 0.0f || s->frequency_penalty != 0.0f);
}

static void penalise_window(const SampleRow *row, const float *logits, uint32_t first_id,
                            uint32_t n, float *values)
{
    const float p = row->settings.repeat_penalty;
    for (uint32_t i = 0; i < row->n_window; i++) {
        const uint32_t at = row->window[i] - first_id;
        if (at < n) { /* from the raw value: a repeated id is hit once */
            const float z = logits[at];
            values[at] = z > 0.0f ? z / p : z * p;
        }
    }
}

static void penalise_generated(const SampleRow *row, uint32_t first_id, uint32_t n, float *values)
{
    const SampleSettings *s = &row->settings;
    uint32_t counts[VOCAB_CHUNK] = {0};
    for (uint32_t i = 0; i < row->n_generated; i++) {
        const uint32_t at = row->generated[i] - first_id;
        if (at < n) {
            counts[at]++;
        }
    }
    for (uint32_t i = 0; i < row->n_generated; i++) {
        const uint32_t at = row->generated[i] - first_id;
        if (at < n && counts[at] > 0) {
            const float often = (float)counts[at] * s->frequency_penalty;
            const float v = values[at] - often;
            values[at] = v - s->presence_penalty;
            counts[at] = 0; /* each id once */
        }
    }
}

static void add_bias(const SampleRow *row, uint32_t first_id, uint32_t n, float *values)
{
    uint32_t low = 0, high = row->n_bias;
    while (low < high) { /* the first pair of this chunk */
        const uint32_t middle = low + (high - low) / 2;
        if (row->bias[middle].id < first_id) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    for (; low < row->n_bias && row->bias[low].id - first_id < n; low++) {
        values[row->bias[low].id - first_id] += row->bias[low].bias;
    }
}

/* Penalised, biased and tempered values of one chunk: in buffer, or the logits themselves where the
 * settings change none. */
static const float *temper(const SampleRow *row, const float *logits, uint32_t first_id, uint32_t n,
                           float *buffer)
{
    const SampleSettings *s = &row->settings;
    const bool counts = counts_generated(row);
    if (!penalises(s) && !counts && row->n_bias == 0 && s->temperature == 0.0f) {
        return logits;
    }
    memcpy(buffer, logits, sizeof(float) * n);
    if (penalises(s)) {
        penalise_window(row, logits, first_id, n, buffer);
    }
    if (counts) {
        penalise_generated(row, first_id, n, buffer);
    }
    add_bias(row, first_id, n, buffer);
    if (s->temperature > 0.0f) {
        const float temperature = s->temperature;
        memset(buffer + n, 0, sizeof(float) * (VOCAB_CHUNK - n));
        for (uint32_t i = 0; i < VOCAB_CHUNK; i++) { /* the constant count lets -O2 use vectors */
            buffer[i] = buffer[i] / temperature;
        }
    }
    return buffer;
}

/* Offers one chunk. Ids come in ascending order, so that once the heap is full only a larger value
 * gets in. */
static void offer_chunk(Best *best, const float *values, const float *raw, uint32_t first_id,
                        uint32_t n)
{
    enum { AT_ONCE = 16 };
    uint32_t i = 0;
    for (; i < n && best->n < best->limit; i++) {
        offer(best, (Candidate){.value = values[i], .raw = raw[i], .id = first_id + i});
    }
    while (i < n && best->limit > 0) {
        const uint32_t count = MIN(AT_ONCE, n - i);
        const float bar = best->heap[0].value;
        unsigned above = count < AT_ONCE; /* nearly always none of 16: one branch */
        for (uint32_t j = 0; count == AT_ONCE && j < AT_ONCE; j++) {
            above |= values[i + j] > bar;
        }
        for (uint32_t j = 0; above != 0 && j < count; j++) {
            if (values[i + j] > best->heap[0].value) {
                offer(best, (Candidate){
                                .value = values[i + j], .raw = raw[i + j], .id = first_id + i + j});
            }
        }
        i += count;
    }
}

/* One chunk's share of the part; false if a logit is not finite. */
static bool add_chunk(const Kernels *k, const SampleRow *row, const float *logits,
                      uint32_t first_id, uint32_t n, ChunkPart *chunk, Best *best, Best *top)
{
    const SampleSettings *s = &row->settings;
    float buffer[VOCAB_CHUNK], noise[VOCAB_CHUNK];
    const Hash128 h = hash128(logits, sizeof(float) * n);
    *chunk = (ChunkPart){0};
    memcpy(chunk->hash, h.bytes, sizeof chunk->hash);
    bool finite = k->chunk_stats(logits, n, &chunk->m, &chunk->l);
    if (best->limit > 0) {
        const float *values = temper(row, logits, first_id, n, buffer);
        if (sample_is_open_ended(s)) {
            finite = k->chunk_stats(values, n, &chunk->mt, &chunk->lt) && finite;
        }
        if (s->temperature > 0.0f && !has_filters(s)) {
            const GumbelKey key = {
                .seed = s->seed, .choice = s->choice, .position = row->position, .purpose = 0};
            k->gumbel(&key, first_id, n, noise);
            k->add(noise, values, n);
            values = noise;
        }
        offer_chunk(best, values, logits, first_id, n);
    }
    offer_chunk(top, logits, logits, first_id, n);
    return finite;
}

/* Appends the part's head and room for the rest; returns where the head's place is. */
static guint begin_part(GByteArray *out, const uint32_t fields[6], float target)
{
    const guint head = out->len;
    const guint size = (guint)(6 * sizeof *fields + sizeof target + sizeof(ChunkPart) * fields[1] +
                               sizeof(Candidate) * (fields[2] + fields[4]));
    g_byte_array_set_size(out, head + size);
    memcpy(out->data + head, fields, 6 * sizeof *fields);
    memcpy(out->data + head + 6 * sizeof *fields, &target, sizeof target);
    return head;
}

static ChunkPart *chunks_of(const GByteArray *out, guint head)
{
    return (ChunkPart *)(void *)(out->data + head + 6 * sizeof(uint32_t) + sizeof(float));
}

static uint32_t tops_of(const SampleRow *row, uint32_t n)
{
    return MIN(MIN(row->settings.top_logprobs, SAMPLE_TOP_LIMIT), n);
}

static uint32_t chunks_in(uint32_t n)
{
    return (n + VOCAB_CHUNK - 1) / VOCAB_CHUNK;
}

void sample_part(const Kernels *kernels, const SampleRow *row, const float *logits,
                 uint32_t first_id, uint32_t n, uint32_t n_candidates, GByteArray *out)
{
    const uint32_t n_chunks = chunks_in(n), limit = row->score ? 0 : MIN(n_candidates, n);
    const uint32_t n_top = tops_of(row, n);
    const bool has_target = row->score && row->target >= first_id && row->target < first_id + n;
    const float target = has_target ? logits[row->target - first_id] : 0.0f;
    const uint32_t fields[6] = {0, n_chunks, limit, limit == n, n_top, has_target};
    const guint head = begin_part(out, fields, target);
    ChunkPart *chunks = chunks_of(out, head);
    Best best = {.heap = (Candidate *)(void *)(chunks + n_chunks), .limit = limit};
    Best top = {.heap = best.heap + limit, .limit = n_top};
    uint32_t failed = 0;
    for (uint32_t c = 0; c < n_chunks; c++) {
        const uint32_t start = c * VOCAB_CHUNK, count = MIN(VOCAB_CHUNK, n - start);
        failed |= !add_chunk(kernels, row, logits + start, first_id + start, count, &chunks[c],
                             &best, &top);
    }
    qsort(best.heap, best.n, sizeof *best.heap, by_rank);
    qsort(top.heap, top.n, sizeof *top.heap, by_rank);
    memcpy(out->data + head, &failed, sizeof failed);
}

/* ---- the same from what a device made ---- */

bool sample_is_plain(const SampleRow *row)
{
    return !row->score && row->n_bias == 0 && !counts_generated(row) &&
           (row->n_window == 0 || !penalises(&row->settings));
}

DeviceDraw sample_draw(const SampleRow *row)
{
    const SampleSettings *s = &row->settings;
    return (DeviceDraw){.seed = s->seed,
                        .choice = s->choice,
                        .position = row->position,
                        .purpose = 0,
                        .temperature = s->temperature,
                        .noise = s->temperature > 0.0f && !has_filters(s)};
}

void sample_part_drawn(const SampleRow *row, const SampleDrawn *drawn, uint32_t n,
                       uint32_t n_candidates, GByteArray *out)
{
    _Static_assert(sizeof(ChunkPart) == sizeof(DeviceChunk) &&
                       offsetof(ChunkPart, m) == offsetof(DeviceChunk, m) &&
                       offsetof(ChunkPart, lt) == offsetof(DeviceChunk, tempered_l) &&
                       sizeof(Candidate) == sizeof(DeviceCandidate) &&
                       offsetof(Candidate, raw) == offsetof(DeviceCandidate, logit) &&
                       offsetof(Candidate, id) == offsetof(DeviceCandidate, id),
                   "one layout of parts");
    const uint32_t n_chunks = chunks_in(n), limit = MIN(n_candidates, n), n_top = tops_of(row, n);
    const bool open_ended = sample_is_open_ended(&row->settings);
    uint32_t fields[6] = {0, n_chunks, limit, limit == n, n_top, 0};
    g_assert(n_chunks == drawn->n_chunks && limit <= drawn->keep && n_top <= drawn->n_top);
    for (uint32_t c = 0; c < n_chunks; c++) {
        const DeviceChunk *chunk = &drawn->chunks[c];
        fields[0] |= isnan(chunk->m) || (open_ended && isnan(chunk->tempered_m));
    }
    const guint head = begin_part(out, fields, 0.0f);
    ChunkPart *chunks = chunks_of(out, head);
    Candidate *best = (Candidate *)(void *)(chunks + n_chunks);
    memcpy(chunks, drawn->chunks, sizeof *chunks * n_chunks);
    memcpy(best, drawn->best, sizeof *best * limit);
    memcpy(best + limit, drawn->top, sizeof *best * n_top);
}

/* ---- the merge ---- */

struct SampleMerger {
    GArray *chunks;     /* ChunkPart */
    GArray *candidates; /* Candidate */
    GArray *top;        /* Candidate */
    Candidate bound;    /* nothing unseen comes before this one */
    bool bounded;       /* some part is not complete */
    bool failed, has_target;
    float target;
    GArray *ms, *ls; /* float: the chunks' pairs while they are merged */
    GByteArray *hashes;
};

static bool take_part(SampleReader *reader, SampleMerger *m)
{
    ByteReader r = {.data = reader->data, .size = reader->size, .offset = reader->offset};
    const bool failed = byte_reader_u32le(&r) != 0;
    const uint32_t n_chunks = byte_reader_u32le(&r), n_candidates = byte_reader_u32le(&r);
    const bool complete = byte_reader_u32le(&r) != 0;
    const uint32_t n_top = byte_reader_u32le(&r);
    const bool has_target = byte_reader_u32le(&r) != 0;
    const float target = byte_reader_f32le(&r);
    const uint8_t *chunks = byte_reader_take(&r, (size_t)n_chunks * sizeof(ChunkPart));
    const uint8_t *candidates = byte_reader_take(&r, (size_t)n_candidates * sizeof(Candidate));
    const uint8_t *top = byte_reader_take(&r, (size_t)n_top * sizeof(Candidate));
    if (r.failed) {
        return false;
    }
    g_array_append_vals(m->chunks, chunks, n_chunks);
    g_array_append_vals(m->candidates, candidates, n_candidates);
    g_array_append_vals(m->top, top, n_top);
    if (!complete && n_candidates > 0) {
        const Candidate *last = &g_array_index(m->candidates, Candidate, m->candidates->len - 1);
        if (!m->bounded || before(last, &m->bound)) {
            m->bound = *last;
        }
        m->bounded = true;
    }
    m->failed |= failed;
    if (has_target) {
        m->has_target = true;
        m->target = target;
    }
    reader->offset = r.offset;
    return true;
}

static float merge_lse(const SampleMerger *m, bool tempered, float *max_out)
{
    const guint n = m->chunks->len;
    g_array_set_size(m->ms, n);
    g_array_set_size(m->ls, n);
    float *ms = (float *)(void *)m->ms->data, *ls = (float *)(void *)m->ls->data;
    for (guint i = 0; i < n; i++) {
        const ChunkPart *c = &g_array_index(m->chunks, ChunkPart, i);
        ms[i] = tempered ? c->mt : c->m;
        ls[i] = tempered ? c->lt : c->l;
    }
    chunk_stats_merge(ms, ls, n);
    *max_out = ms[0];
    return ls[0];
}

static void hash_row(const SampleMerger *m, uint8_t out[16])
{
    g_byte_array_set_size(m->hashes, m->chunks->len * 16);
    uint8_t *hashes = m->hashes->data;
    for (guint i = 0; i < m->chunks->len; i++) {
        memcpy(hashes + 16 * (gsize)i, g_array_index(m->chunks, ChunkPart, i).hash, 16);
    }
    const Hash128 h = hash128(hashes, (size_t)m->chunks->len * 16);
    memcpy(out, h.bytes, 16);
}

/* How many sorted candidates are certainly the best ones in this order. */
static guint certain(const SampleMerger *m)
{
    guint n = m->candidates->len;
    if (m->bounded) {
        n = 0;
        while (n < m->candidates->len &&
               !before(&m->bound, &g_array_index(m->candidates, Candidate, n))) {
            n++;
        }
    }
    return n;
}

/* The number of sorted candidates that pass all filters; false = more are needed to know. */
static bool filter(const SampleMerger *m, const SampleSettings *s, guint *n_out)
{
    const Candidate *c = (const Candidate *)(void *)m->candidates->data;
    const guint sure = certain(m);
    const bool all = !m->bounded;
    guint n = sure;
    bool open = !all; /* the list may go on behind n */
    if (s->top_k > 0) {
        if (sure < s->top_k && !all) {
            return false;
        }
        n = MIN(sure, s->top_k);
        open = false;
    }
    const float vmax = c[0].value;
    if (s->top_p > 0.0f && s->top_p < 1.0f) {
        float total = 0.0f;
        if (s->top_k > 0) {
            for (guint i = 0; i < n; i++) {
                total += exp32(c[i].value - vmax);
            }
        } else {
            float mt;
            total = merge_lse(m, true, &mt); /* mt = vmax */
        }
        float sum = 0.0f;
        guint i = 0;
        while (i < n && sum < s->top_p * total) {
            sum += exp32(c[i++].value - vmax);
        }
        if (sum < s->top_p * total && open) {
            return false;
        }
        open = open && i == n && sum < s->top_p * total;
        n = MAX(i, 1u);
    }
    if (s->min_p > 0.0f) {
        guint i = 0;
        while (i < n && exp32(c[i].value - vmax) >= s->min_p) {
            i++;
        }
        if (i == n && open) {
            return false;
        }
        open = false;
        n = MAX(i, 1u);
    }
    *n_out = n;
    return !open;
}

static guint pick(const Kernels *k, const SampleRow *row, const SampleMerger *m, guint n)
{
    const Candidate *c = (const Candidate *)(void *)m->candidates->data;
    const SampleSettings *s = &row->settings;
    if (s->temperature == 0.0f || !has_filters(s)) {
        return 0; /* sorted: the argmax, lowest id on ties */
    }
    const GumbelKey key = {
        .seed = s->seed, .choice = s->choice, .position = row->position, .purpose = 0};
    Candidate best = {0};
    guint at = 0;
    for (guint i = 0; i < n; i++) {
        float noise[4];
        k->gumbel(&key, c[i].id & ~3u, 4, noise);
        const Candidate noisy = {.value = c[i].value + noise[c[i].id & 3u], .id = c[i].id};
        if (i == 0 || before(&noisy, &best)) {
            best = noisy;
            at = i;
        }
    }
    return at;
}

static SampleOutcome conclude(const Kernels *k, const SampleRow *row, SampleMerger *m,
                              SampleResult *out)
{
    float max;
    guint n = 1;
    hash_row(m, out->row_hash);
    if (m->failed) {
        return SAMPLE_NOT_FINITE;
    }
    const float l = merge_lse(m, false, &max);
    const double lse = (double)max + det_log((double)l);
    if (row->score) {
        if (!m->has_target) {
            return SAMPLE_MALFORMED;
        }
        out->id = row->target;
        out->logprob = (float)((double)m->target - lse);
    } else {
        if (m->candidates->len == 0) {
            return SAMPLE_MALFORMED;
        }
        qsort(m->candidates->data, m->candidates->len, sizeof(Candidate), by_rank);
        if (row->settings.temperature > 0.0f && has_filters(&row->settings) &&
            !filter(m, &row->settings, &n)) {
            return SAMPLE_MORE;
        }
        const Candidate *c = &g_array_index(m->candidates, Candidate, pick(k, row, m, n));
        out->id = c->id;
        out->logprob = (float)((double)c->raw - lse);
    }
    if (m->top->len > 0) {
        qsort(m->top->data, m->top->len, sizeof(Candidate), by_rank);
    }
    out->n_top = MIN(m->top->len, MIN(row->settings.top_logprobs, SAMPLE_TOP_LIMIT));
    for (uint32_t i = 0; i < out->n_top; i++) {
        const Candidate *c = &g_array_index(m->top, Candidate, i);
        out->top_ids[i] = c->id;
        out->top_logprobs[i] = (float)((double)c->raw - lse);
    }
    return SAMPLE_DRAWN;
}

SampleMerger *sample_merger_new(void)
{
    SampleMerger *m = g_new0(SampleMerger, 1);
    m->chunks = g_array_new(FALSE, FALSE, sizeof(ChunkPart));
    m->candidates = g_array_new(FALSE, FALSE, sizeof(Candidate));
    m->top = g_array_new(FALSE, FALSE, sizeof(Candidate));
    m->ms = g_array_new(FALSE, FALSE, sizeof(float));
    m->ls = g_array_new(FALSE, FALSE, sizeof(float));
    m->hashes = g_byte_array_new();
    return m;
}

void sample_merger_free(SampleMerger *m)
{
    if (m == NULL) {
        return;
    }
    g_array_unref(m->chunks);
    g_array_unref(m->candidates);
    g_array_unref(m->top);
    g_array_unref(m->ms);
    g_array_unref(m->ls);
    g_byte_array_unref(m->hashes);
    g_free(m);
}

SampleOutcome sample_merge(SampleMerger *m, const Kernels *kernels, const SampleRow *row,
                           SampleReader *readers, uint32_t n_readers, SampleResult *result)
{
    g_array_set_size(m->chunks, 0);
    g_array_set_size(m->candidates, 0);
    g_array_set_size(m->top, 0);
    m->bounded = m->failed = m->has_target = false;
    for (uint32_t i = 0; i < n_readers; i++) {
        if (!take_part(&readers[i], m)) {
            return SAMPLE_MALFORMED;
        }
    }
    return m->chunks->len > 0 ? conclude(kernels, row, m, result) : SAMPLE_MALFORMED;
}
