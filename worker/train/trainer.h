/* Trainer: steps of training in one process. A step reads the samples of its global batch, runs
 * them micro-batch by micro-batch and leaf by leaf, folds the leaves' gradients (NUMERICS 14),
 * divides, clips and updates (15, 17). Loss and weights after each step are functions of (initial
 * weights, data, seed, batch, leaves, optimizer) alone: not of threads, micro-batches, replicas or
 * instruction set. Owned by one thread, which runs the pool. */
#pragma once

#include "proto/base/hash.h"
#include "worker/model/training.h"
#include "worker/train/schedule.h"
#include "worker/train/token_data.h"

typedef struct TrainerOptions {
    const ModelSpec *spec; /* borrowed, like all pointers here */
    const Kernels *kernels;
    Pool *pool;
    const TokenData *data;
    uint64_t seed; /* of the order of samples */
    uint32_t sequences, length;
    uint32_t leaves;          /* 1..64: the result depends on it */
    uint32_t micro_sequences; /* at most, of a micro-batch; the result does not */
    uint32_t replicas;        /* played one after another; leaf ranges as a dp layout has them */
    OptimizerSettings optimizer;
} TrainerOptions;

typedef struct Trainer Trainer;

/* Takes `weights` on success: the initial ones. */
Trainer *trainer_new(const TrainerOptions *options, Parameters *weights, GError **error);
void trainer_free(Trainer *t); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Trainer, trainer_free)

typedef struct TrainerStep {
    uint64_t step, samples_seen; /* before and after it */
    float loss;                  /* mean over valid tokens, before the update */
    float rate, gradient_norm;
} TrainerStep;

/* One step. NUMERICS names sample or gradient when something is not finite; weights and moments are
 * then as before, and the step has not happened. */
bool trainer_step(Trainer *t, TrainerStep *out, GError **error);
/* Mean loss over the first `samples` windows of other data, in order; NaN if not finite. */
float trainer_validate(Trainer *t, const TokenData *data, uint64_t samples);

const Parameters *trainer_weights(const Trainer *t);
/* The folded, divided, unclipped gradient of the last step; the lookup part is added in. */
const Parameters *trainer_gradients(const Trainer *t);
/* weights_digest (NUMERICS 13). */
Hash128 trainer_digest(const Trainer *t);
