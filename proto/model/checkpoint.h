/* Checkpoint: the state of a training job on disk, by logical tensor, readable by any layout.
 *
 *   DIRECTORY/step-0000000100/manifest.json     sizes, hashes, state, where each piece lies
 *                             part-000.safetensors, ...: pieces, each a rectangle of a tensor
 *                             other files (the tokenizer)
 *   DIRECTORY/.step-0000000200                  one that is being written, or was left behind
 *
 * Tensors are called weights/NAME, first/NAME and second/NAME (moments); f32. A Checkpoint exists
 * only once its manifest and all its files were found whole: sizes and hashes (XXH3-128) as
 * recorded, every tensor covered by its pieces exactly once. Immutable; any thread. */
#pragma once

#include "proto/base/hash.h"
#include "proto/model/model_spec.h"

#include <glib.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#define CHECKPOINT_MANIFEST "manifest.json"

/* Where the run stands. Texts are borrowed where it is given, owned where it is read. */
typedef struct CheckpointState {
    uint64_t step, samples; /* done and read so far: the data's position */
    uint64_t updates;       /* of the optimizer: steps that were not skipped */
    double loss_scale;
    uint64_t scale_growth;
    int64_t scale_hysteresis;
    char *job;            /* the job file as printed; NULL: none */
    char *definition;     /* hex; NULL: none */
    char *weights_digest; /* hex (NUMERICS 13); NULL: none */
} CheckpointState;

typedef struct Checkpoint Checkpoint;

/* One checkpoint by its own folder. NOT_FOUND: there is none; INVALID: damaged, with what is wrong.
 * Reads every byte. Returned. */
Checkpoint *checkpoint_open(const char *path, GError **error);
/* Called with each damaged one that is passed over. */
typedef void (*CheckpointDamage)(void *user, const char *message);
/* The newest whole one below a job's checkpoint folder; NOT_FOUND if there is none (also: no
 * folder). */
Checkpoint *checkpoint_open_newest(const char *directory, CheckpointDamage damage, void *user,
                                   GError **error);
void checkpoint_free(Checkpoint *c); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Checkpoint, checkpoint_free)

const char *checkpoint_path(const Checkpoint *c);
const CheckpointState *checkpoint_state(const Checkpoint *c);
/* All tensors f32; offsets mean nothing. */
const ModelSpec *checkpoint_model(const Checkpoint *c);
/* False: no tensor of that name, or not of these rows and columns. */
bool checkpoint_has(const Checkpoint *c, const char *tensor, uint32_t rows, uint32_t columns);
/* A rectangle of a tensor: row r of it to out + r * ld. INVALID: no such tensor, or the rectangle
 * does not lie in it. */
bool checkpoint_read(const Checkpoint *c, const char *tensor, SliceRect rect, float *out, size_t ld,
                     GError **error);

/* ---- for whoever writes them (coordinator/train/checkpoint.h) ---- */

/* "step-0000000100"; returned. */
char *checkpoint_name(uint64_t step);
/* Steps of what looks like checkpoints in a folder, ascending: GArray of uint64_t, returned. */
GArray *checkpoint_steps(const char *directory);
/* parts: JSON arrays of files and pieces as checkpoint_part_json() makes them; the manifest's text,
 * returned. INVALID: the pieces do not cover the tensors exactly once. */
char *checkpoint_manifest(const CheckpointState *state, const ModelSpec *model,
                          const char *const *parts, size_t n_parts, GError **error);
typedef struct CheckpointFile {
    const char *name; /* plain base name */
    uint64_t size;
    Hash128 hash;
} CheckpointFile;
typedef struct CheckpointPiece {
    const char *tensor;     /* logical name */
    uint32_t rows, columns; /* of the whole tensor */
    SliceRect rect;         /* this piece; nothing of it is empty */
    const float *data;      /* row r begins at data + r * ld; borrowed, unused in the manifest */
    size_t ld;
} CheckpointPiece;
/* What one writer adds: a file and its pieces, in the order of the file; returned, g_free. */
char *checkpoint_part_json(const CheckpointFile *file, const CheckpointPiece *pieces, size_t n);
/* The name of a piece inside its file: of a whole tensor the tensor's. Returned. */
char *checkpoint_piece_name(const CheckpointPiece *piece);
