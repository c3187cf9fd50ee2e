/* Tiles: the pieces of a tensor that one owner holds, whatever the layout (NUMERICS 17). */
#pragma once

#include "proto/model/model_spec.h"

typedef struct Tile {
    uint32_t tensor; /* index in spec->tensors */
    SliceRect rect;
} Tile;

/* All tiles of a model, tensors in canonical order, row blocks of 32 rows that no unit, head or
 * vocabulary chunk is cut by, in each the units of columns where the contraction is cut; vectors in
 * 1,024 elements. GArray of Tile, returned. */
GArray *tiles_of(const ModelSpec *spec);
