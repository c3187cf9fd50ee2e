/* Step: the executor's only input (DESIGN 7.1): rows of any mix of prefill and decode, with what
 * the ranks must know about sequences that come and go. The leader builds it; every rank of the
 * replica runs the same Steps in the same order, so their sequence tables stay equal without
 * another message.
 *
 * In a step, every row's keys and values are stored before any row of the step attends
 * (worker/model), so a segment may already read pages that another one of the same step fills.
 *
 * On the wire (little-endian, LINK_OP_STEP, before the activations): u32 n_admits, n_releases,
 * n_segments, n_rows, n_pages, n_reuses, n_copies, n_tokens, n_biases; then the arrays below, field
 * by field. Decoding checks every number against the deployment's limits: a peer's bytes never
 * index anything unchecked. */
#pragma once

#include "worker/serve/sample.h"

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum StepOutput {
    STEP_OUTPUT_NONE = 0,
    STEP_OUTPUT_SAMPLE = 1, /* draw the next token from this row */
    STEP_OUTPUT_SCORE = 2,  /* logprob of `target` under this row */
} StepOutput;

/* A sequence takes a slot; its sampler settings stay with the slot on the sampling ranks. */
typedef struct StepAdmit {
    uint32_t slot;
    uint64_t uid; /* names the sequence for ever; results of an earlier tenant of the slot are
                     dropped by it */
    uint32_t n_prompt;
    float temperature, top_p, min_p, repeat_penalty, presence_penalty, frequency_penalty;
    uint32_t top_k, penalty_window, choice, top_logprobs;
    uint64_t seed;
    uint32_t bias0, n_bias; /* of the step's biases */
    uint8_t want_logits;
    uint8_t trace; /* hash its rows after each sub-layer: trace.h */
} StepAdmit;

/* Consecutive positions of one sequence. Segments follow each other without a gap: each row of the
 * Step is of exactly one, and none is empty. */
typedef struct StepSegment {
    uint32_t slot;
    uint32_t position; /* of its first row */
    uint32_t row0, n_rows;
    uint32_t page_index, n_pages; /* table entries [page_index, page_index + n_pages) of the slot
                                     are set from pages[page0 ...] */
    uint32_t page0;
} StepSegment;

/* Whole pages that other rows filled: positions [32 x page_index, 32 x (page_index + n_pages)) of
 * the slot are computed, their ids are tokens[token0 ...]. Done after the admits. */
typedef struct StepReuse {
    uint32_t slot;
    uint32_t page_index, n_pages, page0;
    uint32_t token0;
} StepReuse;

/* The beginning of a page that another one holds too: page `to` becomes entry page_index of the
 * slot's table and gets all that page `from` has; of it positions 32 x page_index and n_positions
 * in all are the slot's, their ids are tokens[token0 ...]. Done after the reuses, one after the
 * other, before any row of the step is computed. from may be to. */
typedef struct StepCopy {
    uint32_t slot;
    uint32_t page_index, n_positions;
    uint32_t from, to;
    uint32_t token0;
} StepCopy;

typedef struct StepRow {
    uint32_t token;
    uint32_t target; /* SCORE */
    uint32_t output; /* StepOutput */
} StepRow;

typedef struct StepLimits {
    uint32_t max_rows, max_slots, max_pages /* of the deployment */, context, vocab_size;
} StepLimits;

#define STEP_REUSE_PAGES 512u /* at most, of one step; a longer prefix takes several steps */

typedef struct Step {
    uint32_t number; /* ascending from 1 in each epoch */
    uint32_t n_admits, n_releases, n_segments, n_rows, n_pages, n_reuses, n_copies, n_tokens,
        n_biases;
    StepAdmit *admits;     /* capacity max_slots */
    uint32_t *releases;    /* slots; capacity max_slots; done before the admits */
    StepSegment *segments; /* capacity max_slots */
    StepRow *rows;         /* capacity max_rows */
    uint32_t *pages;       /* capacity pages_capacity(), step.c */
    StepReuse *reuses;     /* capacity step_reuses_capacity() */
    StepCopy *copies;      /* capacity max_slots */
    uint32_t *tokens;      /* capacity 32 x STEP_REUSE_PAGES */
    SampleBias *biases;    /* capacity SAMPLE_BIAS_LIMIT, of all admits together */
} Step;

Step *step_new(const StepLimits *limits);
void step_free(Step *step);
void step_clear(Step *step);
/* Upper bound of the encoded size. */
size_t step_wire_limit(const StepLimits *limits);
/* A slot's pages that were there before the step, then those that the step's own rows fill. */
static inline uint32_t step_reuses_capacity(const StepLimits *limits)
{
    return 2 * limits->max_slots;
}
/* Encodes into out (step_wire_limit bytes); returns the size. */
size_t step_encode(const Step *step, uint8_t *out);
/* Decodes and checks; *used gets the bytes consumed. PROTOCOL error with the field and value. */
bool step_decode(Step *step, const StepLimits *limits, const uint8_t *data, size_t size,
                 size_t *used, GError **error);
