/* TrainPart: a rank's part of a checkpoint as it is told: first the places of all its pieces, then
 * their floats in that order, then where the run stands. Holds no floats. Loop thread. */
#pragma once

#include "proto/model/checkpoint.h"
#include "weft/v1/train.pb-c.h"

/* A message of floats ends its piece or has at least so many bytes: messages are few. */
#define TRAIN_PIECE_LEAST (64u << 10)

typedef struct TrainPart {
    uint64_t step;
    GArray *pieces;        /* of CheckpointPiece, without data */
    bool whole;            /* its rank has sent all */
    CheckpointState state; /* with `whole`, like digest; without texts */
    Hash128 digest;
    /* private */
    guint at;      /* the piece that arrives */
    size_t filled; /* floats of it */
} TrainPart;

/* PROTOCOL: pieces that do not lie in the model. Returned. */
TrainPart *train_part_new(const ModelSpec *spec, const Weft__V1__TrainPartBegin *begin,
                          GError **error);
void train_part_free(void *part); /* TrainPart; NULL-safe */
/* PROTOCOL: these are not the next floats; `part` may be NULL. */
bool train_part_add(TrainPart *part, const Weft__V1__TrainPiece *piece, GError **error);
bool train_part_end(TrainPart *part, const Weft__V1__TrainPart *end, GError **error);
