/* Sampling: the last stage's end of a step: logits of the rows that have an output, this rank's
 * vocabulary shard of each (sample.h), and on the drawing rank the merge of all shards into
 * results. Engine thread only. */
#pragma once

#include "worker/model/stage.h"
#include "worker/serve/leader.h"
#include "worker/serve/sequences.h"

typedef struct Sampling Sampling;

Sampling *sampling_new(Stage *stage, const Sequences *sequences);
void sampling_free(Sampling *sampling);

/* Candidates per shard that the first round sends for this step. */
uint32_t sampling_first_candidates(const Sampling *sampling, const Step *step);
/* True if the merge of this step may ask for a second round with more candidates (open-ended
 * filters). All ranks of the stage agree on it. */
bool sampling_may_repeat(const Sampling *sampling, const Step *step);
/* Rows of the step whose tokens the stage's device draws in its pass over the layers: all with an
 * output but the penalised, biased, scored and dumped ones, and none where the filters ask for more
 * candidates than a device keeps. For StageRun; borrowed until the next call. */
const StageDraws *sampling_draws(Sampling *sampling, const Step *step);
/* Computes and appends this rank's part of every output row, in row order. */
void sampling_part(Sampling *sampling, const Step *step, uint32_t n_candidates, GByteArray *out);
typedef enum SamplingMerge { SAMPLING_DONE, SAMPLING_MORE, SAMPLING_MALFORMED } SamplingMerge;
/* parts[r]: rank r's bytes. Results are borrowed until the next merge. */
SamplingMerge sampling_merge(Sampling *sampling, const Step *step, const GByteArray *const *parts,
                             uint32_t n_parts, const RowResult **results, uint32_t *n_results);
