#include "worker/serve/sampling.h"

#include "worker/serve/sample.h"

#include <string.h>

/* Output rows of a step in row order. */
typedef struct OutputRow {
    const Sequence *sequence;
    const StepRow *row;
    uint32_t slot, index, position;
} OutputRow;

struct Sampling {
    Stage *stage;
    const Sequences *sequences;
    RowResult *results;  /* capacity max_rows */
    SampleResult *drawn; /* beside results: owns the top lists */
    float *logits;       /* dumped rows: [n_dumped][vocab_size], grown on demand */
    size_t logits_capacity;
    SampleReader *readers;
    SampleMerger *merger;
    OutputRow *rows; /* a block's, capacity max_rows */
    /* rows of the step that the stage's device draws */
    StageDraws draws;
    uint32_t *draw_rows; /* capacity max_rows, like the next */
    DeviceDraw *draw_of;
};

Sampling *sampling_new(Stage *stage, const Sequences *sequences)
{
    Sampling *s = g_new0(Sampling, 1);
    s->stage = stage;
    s->sequences = sequences;
    s->results = g_new0(RowResult, stage->max_rows);
    s->drawn = g_new0(SampleResult, stage->max_rows);
    s->readers = g_new0(SampleReader, stage->plan_stage->n_ranks);
    s->merger = sample_merger_new();
    s->rows = g_new0(OutputRow, stage->max_rows);
    s->draw_rows = g_new0(uint32_t, stage->max_rows);
    s->draw_of = g_new0(DeviceDraw, stage->max_rows);
    return s;
}

void sampling_free(Sampling *s)
{
    if (s == NULL) {
        return;
    }
    g_free(s->results);
    g_free(s->drawn);
    g_free(s->logits);
    g_free(s->readers);
    g_free(s->rows);
    g_free(s->draw_rows);
    g_free(s->draw_of);
    sample_merger_free(s->merger);
    g_free(s);
}

static SampleSettings settings_of(const StepAdmit *a)
{
    return (SampleSettings){.temperature = a->temperature,
                            .top_p = a->top_p,
                            .min_p = a->min_p,
                            .repeat_penalty = a->repeat_penalty,
                            .presence_penalty = a->presence_penalty,
                            .frequency_penalty = a->frequency_penalty,
                            .top_k = a->top_k,
                            .choice = a->choice,
                            .top_logprobs = a->top_logprobs,
                            .seed = a->seed};
}

/* What the sampler must know of a row: a pure function of the sequence's settings and ids (NUMERICS
 * 12). */
static SampleRow row_of(const Sequence *q, const StepRow *row, uint32_t position)
{
    const uint32_t known = position + 1; /* ids 0..position */
    const uint32_t window = MIN(q->admit.penalty_window, known),
                   prompt = MIN(q->admit.n_prompt, known);
    return (SampleRow){.settings = settings_of(&q->admit),
                       .position = known,
                       .window = q->tokens + (known - window),
                       .n_window = window,
                       .generated = q->tokens + prompt,
                       .n_generated = known - prompt,
                       .bias = q->bias,
                       .n_bias = q->admit.n_bias,
                       .score = row->output == STEP_OUTPUT_SCORE,
                       .target = row->target};
}

typedef void (*OutputFn)(const OutputRow *row, void *user);

static void each_output(const Sampling *s, const Step *step, OutputFn fn, void *user)
{
    for (uint32_t i = 0; i < step->n_segments; i++) {
        const StepSegment *g = &step->segments[i];
        for (uint32_t r = g->row0; r < g->row0 + g->n_rows; r++) {
            if (step->rows[r].output != STEP_OUTPUT_NONE) {
                const OutputRow row = {&s->sequences->slots[g->slot], &step->rows[r], g->slot, r,
                                       g->position + (r - g->row0)};
                fn(&row, user);
            }
        }
    }
}

static void note_candidates(const OutputRow *row, void *user)
{
    const SampleSettings settings = settings_of(&row->sequence->admit);
    uint32_t *n = user;
    *n = MAX(*n, sample_candidates(&settings));
}

uint32_t sampling_first_candidates(const Sampling *s, const Step *step)
{
    uint32_t n = 1;
    each_output(s, step, note_candidates, &n);
    return n;
}

static void note_open(const OutputRow *row, void *user)
{
    const SampleSettings settings = settings_of(&row->sequence->admit);
    if (row->row->output == STEP_OUTPUT_SAMPLE && sample_is_open_ended(&settings)) {
        *(bool *)user = true;
    }
}

bool sampling_may_repeat(const Sampling *s, const Step *step)
{
    bool open = false;
    each_output(s, step, note_open, &open);
    return open;
}

/* ---- rows that a device draws ---- */

static void note_draw(const OutputRow *r, void *user)
{
    Sampling *s = user;
    const SampleRow row = row_of(r->sequence, r->row, r->position);
    if (sample_is_plain(&row) && !r->sequence->admit.want_logits) {
        s->draw_rows[s->draws.n] = r->index;
        s->draw_of[s->draws.n++] = sample_draw(&row);
        s->draws.n_top = MAX(s->draws.n_top, row.settings.top_logprobs);
    }
}

const StageDraws *sampling_draws(Sampling *s, const Step *step)
{
    const uint32_t n_candidates = sampling_first_candidates(s, step);
    s->draws = (StageDraws){.rows = s->draw_rows, .draws = s->draw_of, .keep = n_candidates};
    if (stage_draws(s->stage) && n_candidates <= DEVICE_KEEP_LIMIT) {
        each_output(s, step, note_draw, s);
    }
    return &s->draws;
}

/* The row as the stage's device has drawn it, with n_candidates at least. */
static bool drawn(const Sampling *s, const OutputRow *row, uint32_t *next, uint32_t n_candidates,
                  SampleDrawn *out)
{
    while (*next < s->draws.n && s->draw_rows[*next] < row->index) {
        ++*next;
    }
    return *next < s->draws.n && s->draw_rows[*next] == row->index &&
           stage_drawn(s->stage, *next, out) &&
           MIN(n_candidates, s->stage->o.shard->vocab_count) <= out->keep;
}

/* ---- this rank's part: logits in blocks of rows, where they are needed; each row's part, then its
 * raw logits if they are wanted ---- */

typedef struct PartPass {
    Sampling *s;
    uint32_t n_candidates;
    uint32_t n, n_logits; /* of s->rows; of these, rows whose logits are needed */
    uint32_t next, ahead; /* draw: of the block that is flushed, of the row that is collected */
    GByteArray *out;
} PartPass;

static void add_part(PartPass *p, const OutputRow *r, const float *logits)
{
    const Stage *stage = p->s->stage;
    const Shard *shard = stage->o.shard;
    const SampleRow row = row_of(r->sequence, r->row, r->position);
    sample_part(stage->o.kernels, &row, logits, shard->vocab_first, shard->vocab_count,
                p->n_candidates, p->out);
    if (r->sequence->admit.want_logits) {
        g_byte_array_append(p->out, (const guint8 *)logits,
                            (guint)(sizeof(float) * shard->vocab_count));
    }
}

static void flush_block(PartPass *p)
{
    Stage *stage = p->s->stage;
    const uint32_t vocabulary = stage->o.shard->vocab_count;
    uint32_t index[STAGE_LOGITS_ROWS], n_logits = 0, next = p->next;
    SampleDrawn of_row;
    for (uint32_t i = 0; i < p->n; i++) {
        if (!drawn(p->s, &p->s->rows[i], &next, p->n_candidates, &of_row)) {
            index[n_logits++] = p->s->rows[i].index;
        }
    }
    if (n_logits > 0) {
        stage_logits(stage, index, n_logits);
    }
    for (uint32_t i = 0, at = 0; i < p->n; i++) {
        const OutputRow *r = &p->s->rows[i];
        if (drawn(p->s, r, &p->next, p->n_candidates, &of_row)) {
            const SampleRow row = row_of(r->sequence, r->row, r->position);
            sample_part_drawn(&row, &of_row, vocabulary, p->n_candidates, p->out);
        } else {
            add_part(p, r, stage->logits + (size_t)at++ * vocabulary);
        }
    }
    p->n = p->n_logits = 0;
}

static void collect(const OutputRow *row, void *user)
{
    PartPass *p = user;
    SampleDrawn of_row;
    p->s->rows[p->n++] = *row;
    p->n_logits += !drawn(p->s, row, &p->ahead, p->n_candidates, &of_row);
    if (p->n_logits == STAGE_LOGITS_ROWS) {
        flush_block(p);
    }
}

void sampling_part(Sampling *s, const Step *step, uint32_t n_candidates, GByteArray *out)
{
    PartPass p = {.s = s, .n_candidates = n_candidates, .out = out};
    each_output(s, step, collect, &p);
    flush_block(&p);
}

/* ---- the merge on the drawing rank ---- */

typedef struct MergePass {
    Sampling *s;
    uint32_t n, n_parts, n_dumped;
    SamplingMerge outcome;
} MergePass;

static uint32_t vocab_of(const Stage *stage, uint32_t rank)
{
    const PlanRank *r = &stage->plan_stage->ranks[rank];
    const uint64_t first = (uint64_t)r->vocab_first * VOCAB_CHUNK;
    const uint64_t last =
        MIN(first + (uint64_t)r->vocab_count * VOCAB_CHUNK, stage->o.spec->vocab_size);
    return last > first ? (uint32_t)(last - first) : 0;
}

/* Puts the shards' raw logits side by side. */
static bool take_logits(MergePass *p)
{
    Sampling *s = p->s;
    const size_t vocab = s->stage->o.spec->vocab_size;
    float *row = s->logits + vocab * p->n_dumped;
    for (uint32_t i = 0; i < p->n_parts; i++) {
        SampleReader *r = &s->readers[i];
        const size_t bytes = sizeof(float) * vocab_of(s->stage, i);
        if (r->size - r->offset < bytes) {
            return false;
        }
        memcpy(row, r->data + r->offset, bytes);
        row += bytes / sizeof(float);
        r->offset += bytes;
    }
    return true;
}

static void merge_row(const OutputRow *r, void *user)
{
    MergePass *p = user;
    Sampling *s = p->s;
    if (p->outcome != SAMPLING_DONE) {
        return;
    }
    const SampleRow row = row_of(r->sequence, r->row, r->position);
    SampleResult *drawn = &s->drawn[p->n];
    const SampleOutcome outcome =
        sample_merge(s->merger, s->stage->o.kernels, &row, s->readers, p->n_parts, drawn);
    const bool dump = r->sequence->admit.want_logits;
    if (outcome == SAMPLE_MORE) {
        p->outcome = SAMPLING_MORE;
        return;
    }
    const bool drew = outcome == SAMPLE_DRAWN;
    if (outcome == SAMPLE_MALFORMED || (drew && drawn->id >= s->stage->o.spec->vocab_size) ||
        (dump && !take_logits(p))) {
        p->outcome = SAMPLING_MALFORMED;
        return;
    }
    RowResult *result = &s->results[p->n++];
    *result = (RowResult){.slot = r->slot,
                          .uid = r->sequence->admit.uid,
                          .position = r->position,
                          .id = drawn->id,
                          .logprob = drawn->logprob,
                          .failed = outcome == SAMPLE_NOT_FINITE,
                          .n_top = drawn->n_top,
                          .top_ids = drawn->top_ids,
                          .top_logprobs = drawn->top_logprobs};
    memcpy(result->row_hash, drawn->row_hash, sizeof result->row_hash);
    if (result->failed) {
        result->id = 0;
        result->n_top = 0;
    }
    if (dump) {
        result->logits = s->logits + (size_t)s->stage->o.spec->vocab_size * p->n_dumped++;
    }
}

static void count_dumped(const OutputRow *row, void *user)
{
    *(uint32_t *)user += row->sequence->admit.want_logits ? 1 : 0;
}

static void grow_logits(Sampling *s, const Step *step)
{
    uint32_t n = 0;
    each_output(s, step, count_dumped, &n);
    const size_t need = (size_t)n * s->stage->o.spec->vocab_size;
    if (need > s->logits_capacity) {
        s->logits = g_renew(float, s->logits, need);
        s->logits_capacity = need;
    }
}

SamplingMerge sampling_merge(Sampling *s, const Step *step, const GByteArray *const *parts,
                             uint32_t n_parts, const RowResult **results, uint32_t *n_results)
{
    MergePass p = {.s = s, .n_parts = n_parts, .outcome = SAMPLING_DONE};
    for (uint32_t i = 0; i < n_parts; i++) {
        s->readers[i] = (SampleReader){.data = parts[i]->data, .size = parts[i]->len};
    }
    grow_logits(s, step);
    each_output(s, step, merge_row, &p);
    *results = s->results;
    *n_results = p.n;
    return p.outcome;
}
