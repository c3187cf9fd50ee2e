/* TrainPart: a rank's pieces of a checkpoint as they arrive; and the writing of a checkpoint once
 * all ranks' parts are there. */
#pragma once

#include "coordinator/train/checkpoint.h"
#include "weft/v1/train.pb-c.h"

typedef struct TrainPart {
    bool whole;            /* its rank has sent all */
    CheckpointState state; /* with `whole`, like digest; without texts */
    Hash128 digest;
    GArray *pieces; /* of CheckpointPiece */
    GPtrArray *memory;
    size_t filled; /* floats of the last piece */
} TrainPart;

TrainPart *train_part_new(void);
void train_part_free(void *part); /* TrainPart; NULL-safe */
/* PROTOCOL: no piece of this model, or not in order; MEMORY. */
bool train_part_add(TrainPart *p, const ModelSpec *spec, const Weft__V1__TrainPiece *piece,
                    GError **error);
bool train_part_end(TrainPart *p, const Weft__V1__TrainPart *end, GError **error);

typedef struct TrainWriting { /* borrowed but `parts` */
    const char *directory, *job, *tokenizer_json;
    const ModelSpec *spec;
    unsigned keep;
    GPtrArray *parts; /* of TrainPart, by rank */
} TrainWriting;
/* Blocks on the disk. INVALID, IO: nothing of it is left. */
bool train_writing_run(const TrainWriting *w, CheckpointDisk *disk, GError **error);
