/* The layout of a training job over n workers.
 *
 * What the spec names is taken while there are workers for it. Else, and for what it leaves open:
 * tp 1; the fewest stages that fit, which the caller finds out (train_placing.h, which has the last
 * word on tp and the schedule of `layout: auto`); the rest are replicas, as many as have a leaf
 * each; 1F1B. Fewer workers
 * than named (after a loss): stages, then tensor ranks, are given up until a replica fits, then
 * replicas; chunks of an interleaved schedule as far as there are layers. Micro-batches: as named;
 * else with several stages four a stage, alone whole leaves. */
#pragma once

#include "proto/config/job_spec.h"
#include "proto/model/model_spec.h"

#define TRAIN_LEAST_BYTES 8u /* a parameter: its weight and one gradient */

typedef struct TrainLayoutChoice {
    uint32_t dp, pp, tp, micro_sequences;
    uint32_t chunks;   /* of layers per stage; 1: not interleaved */
    uint32_t schedule; /* JobSchedule, not AUTO */
    bool on_devices;   /* some rank, once there are seats */
} TrainLayoutChoice;

/* Fewer cannot fit: not even weights and gradients, evenly spread, on the smallest worker. */
uint32_t train_layout_least_stages(const JobSpec *job, const ModelSpec *model,
                                   uint64_t least_memory);
/* stages: taken where the spec leaves them open. shrink: the spec's layout may be undercut.
 * IMPOSSIBLE says what would be legal. */
bool train_layout_choose(const JobSpec *job, const ModelSpec *model, uint32_t n_workers,
                         uint32_t stages, bool shrink, TrainLayoutChoice *out, GError **error);
typedef struct TrainNeighbour {
    uint32_t dp, pp, tp;
    uint32_t distance; /* of the wish: factors of two, roughly; and idle workers */
} TrainNeighbour;
/* Of TrainNeighbour: the layouts that the model allows on so many workers, nearest to what the job
 * asks for first; returned. */
GArray *train_layout_legal(const JobSpec *job, const ModelSpec *model, uint32_t n_workers);
/* The first `most` of them, without this one (NULL: none is left out): texts "{dp: 1, pp: 2, tp:
 * 1}"; returned. */
GPtrArray *train_layout_neighbours(const JobSpec *job, const ModelSpec *model, uint32_t n_workers,
                                   const TrainLayoutChoice *without, uint32_t most);
/* The name of the schedule that it is run with; static. */
const char *train_layout_schedule(const TrainLayoutChoice *layout);
