/* A rank of a training, as its files see it. Not for others.
 *
 *   train_rank.c      making it, a step, what a checkpoint saves and restores
 *   train_losses.c    the losses of a step on all ranks, and those of validation
 *   train_replicas.c  what a step exchanges among replicas: gradients folded, weights shared
 *   train_memory.c    bytes, planned and held
 *
 * The rank's thread. */
#pragma once

#include "worker/train/rank_device.h"
#include "worker/train/train_rank.h"

struct TrainRank {
    TrainRankOptions o;
    TrainPosition position;
    Parameters *weights; /* of a rank on a device: their copy */
    RankDevice *device;  /* or NULL */
    MicroRunner *runner;
    LeafCuts leaves;
    GradientFold *fold;
    Parameters *gradients; /* of the last step */
    Ownership *reduced, *everything;
    GradientStream *stream; /* NULL: one replica */
    Optimizer *optimizer;
    float *squares;       /* [tiles] */
    float *sample_losses; /* [sequences] of the global batch */
    float *tied;          /* the other end's part of a tied embedding: of one bucket */
    float *tied_own;      /* of a device: a copy of the own part */
    uint64_t n_steps;     /* done by this rank */
    uint64_t valid;       /* tokens with a target of the current step */
    TrainProgress at;
};

/* ---- train_rank.c ---- */

/* What is wrong with the numbers of the options: INVALID. */
bool train_rank_check(const TrainRankOptions *o, const TrainPosition *p, GError **error);
size_t train_rank_bucket_floats(const TrainRankOptions *o);
MicroRunnerOptions train_rank_runner_options(const TrainRank *t, const Parameters *weights);
DeviceExchangeOptions train_rank_exchange_options(const TrainRank *t);
/* What a restore or the first weights left in host memory is on the device, if there is one. */
bool train_rank_take_up(TrainRank *t, GError **error);
/* Of a rank on a device: rank_work_check(). */
static inline bool train_rank_check_device(const TrainRank *t, GError **error)
{
    return rank_work_check(t->device->work, t->o.links, error);
}

/* ---- train_losses.c ---- */

/* Losses of all samples and the count of valid tokens, everywhere. Collective. */
bool train_losses_gather(TrainRank *t, GError **error);
/* False: an error, or (skip_nonfinite) *skipped. */
bool train_losses_check(const TrainRank *t, bool *skipped, GError **error);

/* ---- train_replicas.c ---- */

/* The subtrees of all replicas become t->gradients, complete in what this rank owns. Collective. */
bool train_replicas_fold(TrainRank *t, GError **error);
/* The optimizer steps what this rank steps, and all weights of its part are the new ones.
 * Collective. */
bool train_replicas_update(TrainRank *t, float norm, GError **error);
