/* Writing checkpoints (format: proto/model/checkpoint.h). Each rank writes the pieces of logical
 * tensors that it owns into a folder without a name; the leader, once all parts are there, adds the
 * manifest and gives the folder its name. Everything is on the disk (fsync) before that, so that a
 * folder with a name is whole, and whatever happens the last good one stays. Calls block on the
 * disk: a thread of its own makes them, on a copy of the state or between steps. */
#pragma once

#include "proto/model/checkpoint.h"

#include <sys/types.h>

/* The disk: POSIX, or one of a test that fills up. */
typedef struct CheckpointDisk CheckpointDisk;
struct CheckpointDisk {
    /* As write(2) and fsync(2): -1 and errno. */
    ssize_t (*write)(CheckpointDisk *self, int fd, const void *bytes, size_t n);
    int (*sync)(CheckpointDisk *self, int fd);
};
CheckpointDisk *checkpoint_disk(void); /* the real one; any thread */

/* One rank's pieces as they come, to DIRECTORY/.step-N/part-RANK.safetensors: opened with the
 * places of all pieces (borrowed until the end; without data), then given their floats in that
 * order, rows without gaps. Folders are made as needed. NULL, false: IO. */
typedef struct CheckpointPart CheckpointPart;
CheckpointPart *checkpoint_part_open(CheckpointDisk *disk, const char *directory, uint64_t step,
                                     uint32_t rank, const CheckpointPiece *pieces, size_t n,
                                     GError **error);
bool checkpoint_part_write(CheckpointPart *p, const void *bytes, size_t size, GError **error);
/* Ends it, on the disk. Returned: what checkpoint_commit() is to be told, a text that may travel.
 * Frees in any case; NULL: nothing of it is left. */
char *checkpoint_part_close(CheckpointPart *p, GError **error);
/* Removes what there is of it. Frees; NULL-safe. */
void checkpoint_part_abandon(CheckpointPart *p);
/* Another file of the checkpoint (the tokenizer), bytes as given; returned as above. */
char *checkpoint_write_file(CheckpointDisk *disk, const char *directory, uint64_t step,
                            const char *name, const void *bytes, size_t size, GError **error);
/* All parts are there: adds the manifest, names the folder, then removes all but the `keep` newest
 * and what was left unfinished before it. state->step names it; one that is there already is
 * replaced. INVALID if the pieces do not cover their tensors exactly once; IO. Afterwards nothing
 * of it is left unless it succeeded. */
bool checkpoint_commit(CheckpointDisk *disk, const char *directory, const CheckpointState *state,
                       const ModelSpec *model, const char *const *parts, size_t n_parts,
                       unsigned keep, GError **error);
/* Removes an unfinished one. */
void checkpoint_abandon(const char *directory, uint64_t step);
