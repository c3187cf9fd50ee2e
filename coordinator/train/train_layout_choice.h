/* The layout of a training job over n workers.
 *
 * What the spec names is taken while there are workers for it. Else, and for what it leaves open:
 * tp 1; as few stages as let 16 bytes a parameter (weights, gradients, two moments) and as much
 * again fit the smallest worker; the rest are replicas, as many as have a leaf each. Fewer workers
 * than named (after a loss): stages, then tensor ranks, are given up until a replica fits, then
 * replicas; chunks of an interleaved schedule as far as there are layers. Micro-batches: as named;
 * else with several stages four a stage, alone whole leaves. */
#pragma once

#include "proto/config/job_spec.h"
#include "proto/model/model_spec.h"

#define TRAIN_STATE_BYTES 32u /* a parameter */

typedef struct TrainLayoutChoice {
    uint32_t dp, pp, tp, micro_sequences;
    uint32_t chunks; /* of layers per stage; 1: not interleaved */
} TrainLayoutChoice;

/* shrink: the spec's layout may be undercut. IMPOSSIBLE says what would be legal. */
bool train_layout_choose(const JobSpec *job, const ModelSpec *model, uint32_t n_workers,
                         uint64_t least_memory, bool shrink, TrainLayoutChoice *out,
                         GError **error);
