/* Ownership: which data-parallel replica steps which part of a rank's parameters (ZeRO-1), and
 * which rank's word counts for a tile that several hold. Cuts are at rows of tiles (NUMERICS 17).
 * A pure function of the layout, the same on all ranks; immutable. */
#pragma once

#include "worker/model/holding.h"
#include "proto/plan/train_layout.h"
#include "worker/train/tiles.h"

/* A stretch of the rank's arena that is exchanged at once: replica d owns floats [first[d], first[d
 * + 1]). The token embedding has buckets of its own, which come first. */
typedef struct Bucket {
    size_t first[PLAN_RANKS_LIMIT + 1];
    bool is_embedding;
} Bucket;

/* Whole rows of one tensor, or elements of a vector, that this rank steps. */
typedef struct OwnedPiece {
    uint32_t tensor;
    SliceRect rect; /* of the tensor */
    size_t at, n;   /* floats in the arena */
    size_t kept;    /* where they lie among all that are owned: the moments' arena */
    bool counts;    /* this rank's word counts: no other rank's piece has these elements and says
                       so. What a checkpoint is written from */
} OwnedPiece;

typedef struct Ownership {
    TrainPosition position;
    GArray *tiles;        /* of Tile, of the whole model */
    uint16_t *counted_by; /* by tile: the rank (train_global()) whose word counts */
    GArray *buckets;      /* of Bucket */
    GArray *pieces;       /* of OwnedPiece, ascending */
    size_t n_owned;       /* floats */
} Ownership;

/* sharded: false: every replica owns everything (buckets are cut nevertheless). bucket_floats:
 * least of a bucket but the last. Returned. */
Ownership *ownership_new(const ModelSpec *spec, const Plan *plan, const TrainPosition *position,
                         const Holding *holding, bool sharded, size_t bucket_floats);
void ownership_free(Ownership *o); /* NULL-safe */
/* Whether this rank's word counts for the tile. */
static inline bool ownership_counts(const Ownership *o, uint32_t tile)
{
    const TrainPosition *p = &o->position;
    return o->counted_by[tile] == train_global(p, p->replica, p->stage, p->rank);
}
