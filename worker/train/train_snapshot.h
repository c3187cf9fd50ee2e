/* TrainSnapshot: a rank's part of a checkpoint, copied between two steps: the pieces of weights and
 * moments whose word counts on this rank (ownership.h). The rank goes on while it is written. */
#pragma once

#include "proto/model/checkpoint.h"
#include "worker/train/train_rank.h"

typedef struct TrainSnapshot {
    TrainProgress at;
    uint64_t samples;        /* read so far */
    Hash128 digest;          /* of all weights */
    CheckpointPiece *pieces; /* weights/NAME, first/NAME, second/NAME */
    uint32_t n_pieces;
    GPtrArray *names;
    float *floats;
} TrainSnapshot;

/* Of a rank between two steps. Returned. */
TrainSnapshot *train_snapshot_take(TrainRank *rank, const ModelSpec *spec, uint64_t samples,
                                   const Hash128 *digest, GError **error);
void train_snapshot_free(TrainSnapshot *s); /* NULL-safe; any thread */

/* Where a rank gets floats of logical tensors, named as in checkpoints: row r of the rectangle to
 * out + r * ld. Called on the rank's thread; may block. */
typedef bool (*TrainRead)(void *user, const char *tensor, SliceRect rect, float *out, size_t ld,
                          GError **error);
/* The weights alone. */
bool train_snapshot_read_weights(TrainRank *rank, const ModelSpec *spec, TrainRead read, void *user,
                                 GError **error);
/* Fills a new rank with the state that a checkpoint has. */
bool train_snapshot_restore(TrainRank *rank, const ModelSpec *spec, const TrainProgress *progress,
                            TrainRead read, void *user, GError **error);
