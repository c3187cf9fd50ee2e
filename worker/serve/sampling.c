#include "worker/serve/sampling.h"

#include "worker/serve/sample.h"

#include <string.h>

struct Sampling {
    Stage *stage;
    const Sequences *sequences;
    RowResult *results;  /* capacity max_rows */
    SampleResult *drawn; /* beside results: owns the top lists */
    float *logits;       /* dumped rows: [n_dumped][vocab_size], grown on demand */
    size_t logits_capacity;
    SampleReader *readers;
    SampleMerger *merger;
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

/* Output rows of a step in row order. */
typedef struct OutputRow {
    const Sequence *sequence;
    const StepRow *row;
    uint32_t slot, index, position;
} OutputRow;

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

/* ---- this rank's part: logits in blocks of rows; each row's part, then its raw logits if they are
 * wanted ---- */

typedef struct PartPass {
    Sampling *s;
    uint32_t n_candidates, n;
    OutputRow rows[STAGE_LOGITS_ROWS];
    GByteArray *out;
} PartPass;

static void flush_block(PartPass *p)
{
    Stage *stage = p->s->stage;
    const Shard *shard = stage->o.shard;
    uint32_t index[STAGE_LOGITS_ROWS];
    for (uint32_t i = 0; i < p->n; i++) {
        index[i] = p->rows[i].index;
    }
    if (p->n > 0) {
        stage_logits(stage, index, p->n);
    }
    for (uint32_t i = 0; i < p->n; i++) {
        const OutputRow *r = &p->rows[i];
        const SampleRow row = row_of(r->sequence, r->row, r->position);
        const float *logits = stage->logits + (size_t)i * shard->vocab_count;
        sample_part(stage->o.kernels, &row, logits, shard->vocab_first, shard->vocab_count,
                    p->n_candidates, p->out);
        if (r->sequence->admit.want_logits) {
            g_byte_array_append(p->out, (const guint8 *)logits,
                                (guint)(sizeof(float) * shard->vocab_count));
        }
    }
    p->n = 0;
}

static void collect(const OutputRow *row, void *user)
{
    PartPass *p = user;
    p->rows[p->n++] = *row;
    if (p->n == STAGE_LOGITS_ROWS) {
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
