/* The scalars of an optimizer step: learning rate and AdamW's corrections, in double from exact
 * operations and det_* (NUMERICS 7), rounded once to f32. Pure. */
#pragma once

#include "kernels/ops/optimizer.h"
#include "proto/model/model_spec.h"

typedef enum RateSchedule { RATE_CONSTANT, RATE_LINEAR, RATE_COSINE } RateSchedule;

typedef struct OptimizerSettings {
    enum { OPTIMIZER_ADAMW, OPTIMIZER_SGD, OPTIMIZER_ADAM } kind; /* Adam: AdamW without decay */
    double rate, beta1, beta2, eps;                               /* SGD: beta1 is the momentum */
    double decay;                        /* of matrices; of the groups below by choice */
    bool decay_vectors, keep_embeddings; /* decay them too; do not */
    double clip;                         /* limit of the gradient's norm; 0 = none */
    bool nesterov;
    RateSchedule schedule;
    uint64_t warmup, steps; /* rising over the first `warmup` of `steps`, then falling to `floor` */
    double floor;
} OptimizerSettings;

/* The learning rate of step 0, 1, ...: rate * (step + 1) / warmup at first; then constant, or down
 * to `floor` at step `steps`, linearly or by half a cosine (Loshchilov, Hutter 2017). */
double schedule_rate(const OptimizerSettings *s, uint64_t step);
/* Whether the tensor is in a group that decays. */
bool schedule_decays(const OptimizerSettings *s, const TensorSpec *tensor);
/* min(1, clip / (norm + 1e-6)) (FORMULAS 13). */
float schedule_clip(const OptimizerSettings *s, float norm);
/* Scalars of step number `step` for tensors with or without decay. t = step + 1 in 1 - beta^t. */
AdamwScalars schedule_adamw(const OptimizerSettings *s, uint64_t step, float clip, bool decays);
SgdScalars schedule_sgd(const OptimizerSettings *s, uint64_t step, float clip, bool decays);
