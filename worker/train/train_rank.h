/* TrainRank: one rank of a dp x pp x tp layout, step after step; 1x1x1 is a process alone. A step
 * reads the samples of its replica, runs them micro-batch by micro-batch and leaf by leaf, folds
 * the leaves' gradients over all replicas (NUMERICS 14), and each owner divides, clips and updates
 * (15, 17). Loss and weights after each step are functions of (initial weights, data, batch,
 * leaves, optimizer) alone: not of the layout, threads, micro-batches or instruction set.
 *
 * Owned by one thread, which runs the pool and owns the port of the links. All ranks call the same
 * functions that say *collective*, in the same order. */
#pragma once

#include "proto/base/hash.h"
#include "worker/train/loss_scale.h"
#include "worker/train/micro_runner.h"
#include "worker/train/optimizer.h"
#include "worker/train/sample_source.h"
#include "worker/train/text_sampler.h"
#include "worker/train/train_links.h"

typedef struct TrainRankOptions {
    const ModelSpec *spec; /* borrowed, like all pointers here */
    const Kernels *kernels;
    Pool *pool;
    const SampleSource *source;
    uint32_t sequences;       /* of the global batch */
    uint32_t leaves;          /* 1..64: the result depends on it */
    uint32_t micro_sequences; /* at most, of a micro-batch; the result does not */
    OptimizerSettings optimizer;
    Precision precision;   /* of products; weights, moments and the rest are f32 */
    LossScaleRule scaling; /* f16 wants a dynamic one */
    bool skip_nonfinite;   /* a loss or gradient that is not finite skips the step: no error */
    Dropout dropout;
    float smoothing;  /* of labels, 0 to less than 1 */
    const Plan *plan; /* NULL: this rank alone */
    uint32_t replica, stage, rank;
    TrainLinks *links;    /* NULL: this rank alone */
    bool whole_optimizer; /* every replica steps everything, instead of its own part (ZeRO-1) */
    PipelineKind schedule;
    Recompute recompute;
    size_t bucket_floats; /* gradients are exchanged in pieces of about so many; 0: 1 Mi */
    GArray *trace;        /* of PipelineOpTime: what each step does is added; NULL: not */
    TrainTimes *times;    /* of its ops; NULL: not */
    bool fast; /* of all ranks alike: numerics class fast, for which `devices` is taken as said */
    bool devices; /* likewise: some compute on a device, and micro-batches are cut at leaves; in
                     class exact on devices whose ops give it (DeviceTrainOps.gives_exact()) */
    const Device *device; /* where the rank computes; NULL: the host, by kernels and pool */
    const DeviceTrainOps *plan_ops; /* train_memory_plan() of a rank on a device; NULL: the host */
    uint64_t data_bytes; /* of its data, and whether checkpoints are made of it: what it counts */
    bool saves;
} TrainRankOptions;

typedef struct TrainRank TrainRank;

/* Takes `weights` on success: the initial ones, of the holding of this rank in the plan. INVALID
 * names the number that is wrong. */
TrainRank *train_rank_new(const TrainRankOptions *options, Parameters *weights, GError **error);
void train_rank_free(TrainRank *t); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(TrainRank, train_rank_free)

typedef struct TrainStep {
    uint64_t step, samples_seen; /* before and after it */
    float loss;                  /* mean over valid tokens, before the update; on every rank */
    float rate, gradient_norm;
    bool skipped; /* something was not finite somewhere: nothing was updated anywhere */
    float scale;  /* of the loss, in this step */
} TrainStep;

/* One step; collective. NUMERICS names sample or gradient when something is not finite: on all
 * ranks alike, weights and moments are then as before, and the step has not happened. (With a
 * dynamic loss scale a gradient that overflows is no error, with skip_nonfinite neither is a loss:
 * the step is skipped, its samples are used up, and the optimizer's own count stands still.) Any
 * other error: the exchange broke off;
 * the ranks are to be built anew from a checkpoint. */
bool train_rank_step(TrainRank *t, TrainStep *out, GError **error);
/* Mean loss over samples 0 .. samples-1 of another source, in order; NaN if not finite. Collective.
 */
bool train_rank_validate(TrainRank *t, const SampleSource *source, uint64_t samples, float *out,
                         GError **error);
/* Text from the weights as they stand, on every rank: text_sampler_run(). Collective. */
bool train_rank_sample(TrainRank *t, const TextWish *wish, uint32_t *out, uint32_t *n,
                       GError **error);
/* weights_digest (NUMERICS 13). Collective. */
bool train_rank_digest(TrainRank *t, Hash128 *out, GError **error);

/* ---- state: what a checkpoint saves and restores ----
 *
 * The logical tensors are spec->tensors. A rank's pieces of them (OwnedPiece) that say `counts`
 * are, over all ranks, every element exactly once: written from there, by any layout. Piece i has
 * its rectangle of the tensor row by row: weights at train_rank_weights()->floats + piece.at,
 * moments at optimizer_first() and optimizer_second() + piece.kept, all with rows of rect.n_cols
 * floats. To restore: fill the weights of every tensor that the holding has, the moments of all
 * pieces (counting or not), then train_rank_restore(). */
typedef struct TrainProgress {
    uint64_t step;    /* the next one: sample number step x sequences comes first */
    uint64_t updates; /* of the optimizer: steps that were not skipped */
    LossScale scale;
} TrainProgress;
/* Weights and moments that lie on a device are copied to where they are given; before them. */
bool train_rank_settle(TrainRank *t, GError **error);
const Ownership *train_rank_ownership(const TrainRank *t);
const Parameters *train_rank_weights(const TrainRank *t);
Parameters *train_rank_weights_to_restore(TrainRank *t);
Optimizer *train_rank_optimizer(TrainRank *t);
const TrainProgress *train_rank_progress(const TrainRank *t);
void train_rank_restore(TrainRank *t, const TrainProgress *progress); /* loss_scale_resume() */

/* Pieces of the last step's exchange of gradients that were sent while its backward pass ran. */
uint32_t train_rank_overlapped(const TrainRank *t);
/* The folded, divided, unclipped gradient of the last step where this rank owns it; the lookup part
 * is added in. NULL: it lies on a device that failed. */
const Parameters *train_rank_gradients(TrainRank *t);
