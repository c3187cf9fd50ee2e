/* write_part(): a rank's part of a checkpoint, of pieces that are all there. */
#pragma once

#include "coordinator/train/checkpoint.h"

static inline bool write_rows(CheckpointPart *p, const CheckpointPiece *piece, GError **error)
{
    const SliceRect r = piece->rect;
    for (uint32_t row = 0; row < r.n_rows; row++) {
        if (!checkpoint_part_write(p, piece->data + row * piece->ld, r.n_cols * sizeof(float),
                                   error)) {
            return false;
        }
    }
    return true;
}

/* As checkpoint_part_close(). */
static inline char *write_part(CheckpointDisk *disk, const char *directory, uint64_t step,
                               uint32_t rank, const CheckpointPiece *pieces, size_t n,
                               GError **error)
{
    CheckpointPart *p = checkpoint_part_open(disk, directory, step, rank, pieces, n, error);
    for (size_t i = 0; p != NULL && i < n; i++) {
        if (!write_rows(p, &pieces[i], error)) {
            checkpoint_part_abandon(p);
            return NULL;
        }
    }
    return p != NULL ? checkpoint_part_close(p, error) : NULL;
}
