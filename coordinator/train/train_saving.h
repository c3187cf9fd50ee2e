/* TrainSaving: the checkpoints of one epoch, from what its ranks send to the disk, as it comes.
 *
 * Each rank sends its part of a checkpoint and, when its pieces are written, its part of the next
 * one. Floats go to the part's file as they arrive, and its rank is told so, for more: a rank has
 * at most TRAIN_SAVING_WINDOW bytes here that are not written. What is held is bounded by that and
 * the number of ranks, however large the model is. When all parts of a checkpoint are whole it gets
 * its manifest and its name, and what came of the next one meanwhile follows.
 *
 * Loop thread; files are written in the pool, by one task at a time. */
#pragma once

#include "coordinator/train/checkpoint.h"
#include "coordinator/train/train_part.h"
#include "coordinator/work_pool.h"
#include "proto/plan/train_limits.h"

typedef struct TrainSavingOptions { /* borrowed for its life */
    WorkPool *pool;
    CheckpointDisk *disk;
    const char *directory, *job, *tokenizer_json; /* the job's text; NULL: no such file */
    const char *definition;
    const ModelSpec *spec;
    unsigned keep;
    uint32_t n_ranks;
} TrainSavingOptions;

/* Never inside a call but train_saving_close(). */
typedef struct TrainSavingEvents {
    void (*taken)(uint32_t rank, uint64_t bytes, void *user); /* not after train_saving_close() */
    /* The checkpoint of `step` is there, or why it is not: then nothing of it is left. */
    void (*saved)(uint64_t step, const GError *error, void *user);
    /* Once, last: nothing is written any more, and it is freed. dropped: the pool is gone. */
    void (*closed)(bool dropped, void *user);
    void *user;
} TrainSavingEvents;

typedef struct TrainSaving TrainSaving;
/* Freed by train_saving_close(). */
TrainSaving *train_saving_new(const TrainSavingOptions *options, const TrainSavingEvents *events);
/* A report of a rank that is a part's begin, a piece or a part's end. PROTOCOL: no such thing can
 * come now; the epoch is to end. */
bool train_saving_add(TrainSaving *s, uint32_t rank, const Weft__V1__TrainReport *report,
                      GError **error);
/* Nothing that came is unwritten. */
bool train_saving_is_idle(const TrainSaving *s);
/* The most bytes of floats that were held at once. */
uint64_t train_saving_most_bytes(const TrainSaving *s);
/* The ranks are gone. A checkpoint that has come whole is still saved; another one is removed. */
void train_saving_close(TrainSaving *s); /* NULL-safe */
