/* MicroRunner: runs a step's micro-batches through one stage by a schedule (pipeline.h): forward,
 * backward, messages to the neighbouring stages, and the fold of the replica's leaves. Owned and
 * called by the rank's thread. */
#pragma once

#include "worker/model/training.h"
#include "worker/train/device_exchange.h"
#include "worker/train/gradient_exchange.h"
#include "worker/train/gradient_fold.h"
#include "worker/train/gradient_stream.h"
#include "worker/train/pipeline.h"
#include "worker/train/sample_source.h"

typedef struct MicroRunnerOptions {
    const Parameters *weights; /* borrowed, like all here */
    const Kernels *kernels;
    Pool *pool;
    const SampleSource *source;
    const LeafCuts *leaves;
    TrainPosition position;
    TrainLinks *links; /* NULL: one rank */
    uint32_t sequences, micro_sequences;
    PipelineKind schedule;
    Recompute recompute;
    Precision precision;
    Dropout dropout;
    float smoothing;   /* of labels */
    GArray *trace;     /* of PipelineOpTime: what each step does is added; NULL: not */
    TrainTimes *times; /* NULL: not */
    DeviceWork *work;  /* where the weights and everything else of the passes lie; NULL: the host */
    const DeviceTrainOps *plan_ops; /* for plans of a device; NULL: the host */
    DeviceTeam
        *team;    /* of the stage's tensor ranks, on its device; NULL: they exchange over links */
    bool exact;   /* of a rank on a device: class exact */
    bool devices; /* some rank of the job computes on one: no micro-batch has several leaves */
    /* Begun in the step's last pass, with the fold's subtrees: one of the two, or NULL */
    GradientStream *stream;
    DeviceExchange *exchange; /* of a rank on a device */
} MicroRunnerOptions;

typedef struct MicroRunner MicroRunner;

/* Returned. */
MicroRunner *micro_runner_new(const MicroRunnerOptions *options, GError **error);
void micro_runner_free(MicroRunner *r); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(MicroRunner, micro_runner_free)

/* The replica's micro-batches of step number `step`: loss_factor x gradients of its leaves into the
 * fold. On the last stage, sample_losses[sample of the global batch] and *valid, the tokens with a
 * target, are those of the replica's samples. */
bool micro_runner_step(MicroRunner *r, uint64_t step, float loss_factor, GradientFold *fold,
                       float *sample_losses, uint64_t *valid, GError **error);
/* Forward alone of one sample of another source, all of them in a row from 0. On the last stage
 * *loss is its sum of losses; elsewhere 0. */
bool micro_runner_validate(MicroRunner *r, const SampleSource *source, uint64_t sample, float *loss,
                           uint64_t *valid, GError **error);
/* Forward alone of a sequence that begins with these n tokens, n from 1 to the length. On the last
 * stage *logits is what follows them: [own vocabulary], until the next pass. */
bool micro_runner_logits(MicroRunner *r, const uint32_t *tokens, uint32_t n, const float **logits,
                         GError **error);
/* The first sample of a leaf of the global batch. */
uint32_t leaf_begin(uint32_t leaf, uint32_t n_leaves, uint32_t sequences);
/* For plans, of a rank with these options (weights, kernels, pool, links are not read): bytes of
 * tapes and buffers with so many threads (0: INVALID), and sets of gradients that a step has at
 * once. */
size_t micro_runner_plan_bytes(const Holding *holding, const MicroRunnerOptions *options,
                               unsigned threads, GError **error);
uint32_t micro_runner_plan_sets(const MicroRunnerOptions *options);
/* Micro-batches of a step of the replica: of leaves, sequences, micro_sequences and devices alone.
 */
uint32_t micro_runner_plan_count(const MicroRunnerOptions *options);
/* Bytes of tapes and buffers; micro-batches of a step. */
size_t micro_runner_bytes(const MicroRunner *r);
uint32_t micro_runner_count(const MicroRunner *r);
