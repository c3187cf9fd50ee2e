/* Sample: drawing a token where the logits lie (NUMERICS 6, 12, 13). Pure: one row at a time, no
 * I/O, no state.
 *
 * Each rank of the last stage makes a SamplePart of its vocabulary shard; the parts of all ranks,
 * in order, merge into the token. The result does not depend on how the vocabulary was cut, nor on
 * the number of candidates per part (a merge that cannot be sure asks for more).
 *
 * Definition, for raw logits z, every step rounded to f32:
 *   v = z; for ids in the window v = z > 0 ? z / repeat_penalty : z * repeat_penalty, once;
 *   for ids among the generated, c times: v = (v - c * frequency_penalty) - presence_penalty;
 *   for ids with a bias: v = v + bias;
 *   then v / temperature.
 * temperature 0: argmax v (of the penalised, untempered values), lowest id on ties.
 * no filter:     argmax v + noise, over all ids.
 * filters:       sort by (v descending, id ascending); keep the first top_k; of those the shortest
 *                prefix whose probabilities, summed in that order, reach top_p (probabilities
 *                exp32(v - vmax) over the sum of what top_k left, or over all ids when top_k is
 *                off); of those ids with exp32(v - vmax) >= min_p; then argmax v + noise. */
#pragma once

#include "kernels/device/sample.h"
#include "kernels/kernels.h"

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

#define SAMPLE_TOP_LIMIT 20u
#define SAMPLE_BIAS_LIMIT 1024u /* pairs of one sequence */

typedef struct SampleBias {
    uint32_t id;
    float bias;
} SampleBias;

typedef struct SampleSettings {
    float temperature, top_p, min_p, repeat_penalty, presence_penalty, frequency_penalty;
    uint32_t top_k, choice, top_logprobs;
    uint64_t seed;
} SampleSettings;

typedef struct SampleRow {
    SampleSettings settings;
    uint32_t position;      /* of the token to be drawn: keys the noise */
    const uint32_t *window; /* ids that the repeat penalty hits, duplicates allowed; borrowed */
    uint32_t n_window;
    const uint32_t *generated; /* ids drawn so far, the prompt not among them; borrowed */
    uint32_t n_generated;
    const SampleBias *bias; /* ids strictly ascending; borrowed */
    uint32_t n_bias;
    bool score; /* logprob of target instead of a draw */
    uint32_t target;
} SampleRow;

/* True when the filters keep more ids than a bound known in advance. */
bool sample_is_open_ended(const SampleSettings *s);
/* Candidates per part that suffice, or a first guess for open-ended filters. */
uint32_t sample_candidates(const SampleSettings *s);

/* Appends this shard's part to out. logits: ids [first_id, first_id + n), raw, first_id a multiple
 * of VOCAB_CHUNK. */
void sample_part(const Kernels *kernels, const SampleRow *row, const float *logits,
                 uint32_t first_id, uint32_t n, uint32_t n_candidates, GByteArray *out);

/* Whether raw logits and a DeviceDraw are all that a draw needs: no penalty, bias or score. */
bool sample_is_plain(const SampleRow *row);
/* How a device draws a plain row. */
DeviceDraw sample_draw(const SampleRow *row);
/* What a device made of one plain row and one shard, borrowed; keep and n_top: at least what is
 * asked for, or the shard's ids. */
typedef struct SampleDrawn {
    const DeviceChunk *chunks; /* [n_chunks] */
    uint32_t n_chunks;
    const DeviceCandidate *best, *top;
    uint32_t keep, n_top;
} SampleDrawn;
/* sample_part() of n ids out of it. */
void sample_part_drawn(const SampleRow *row, const SampleDrawn *drawn, uint32_t n,
                       uint32_t n_candidates, GByteArray *out);

typedef enum SampleOutcome {
    SAMPLE_DRAWN,
    SAMPLE_MORE, /* more candidates per part are needed */
    SAMPLE_NOT_FINITE,
    SAMPLE_MALFORMED,
} SampleOutcome;

typedef struct SampleResult {
    uint32_t id;
    float logprob; /* temperature 1, before penalties and filters */
    uint8_t row_hash[16];
    uint32_t n_top;
    uint32_t top_ids[SAMPLE_TOP_LIMIT];
    float top_logprobs[SAMPLE_TOP_LIMIT];
} SampleResult;

/* A cursor over the concatenated parts of one rank. */
typedef struct SampleReader {
    const uint8_t *data;
    size_t size, offset;
} SampleReader;

/* Memory of merges, grown to the largest row and kept: no allocation per token. One thread. */
typedef struct SampleMerger SampleMerger;
SampleMerger *sample_merger_new(void);
void sample_merger_free(SampleMerger *merger); /* NULL-safe */

/* Takes the next part from each reader (ranks in order) and merges them. */
SampleOutcome sample_merge(SampleMerger *merger, const Kernels *kernels, const SampleRow *row,
                           SampleReader *readers, uint32_t n_readers, SampleResult *result);
