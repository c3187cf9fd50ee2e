/* Training: the forward and backward pass of a model over a micro-batch of whole sequences, on f32
 * master weights, with what backward needs kept on a tape. One rank that holds the whole model.
 * gpt2.c and llama_training.c are the families; training.c has the pieces that they are made of.
 *
 * Every op is a phase of one pool region; threads share outputs, rows or channels and meet at a
 * barrier, never splitting a sum. Gradients are added to what the caller's buffers hold, in token
 * order: so a leaf's chain goes on over micro-batches (NUMERICS 14). Called by one thread. */
#pragma once

#include "kernels/kernels.h"
#include "worker/model/parameters.h"

#define TARGET_NONE UINT32_MAX /* a position without a target: no loss, no gradient */

/* Rows are tokens, sequence after sequence. */
typedef struct TrainBatch {
    const uint32_t *tokens, *targets; /* [n_sequences][length]; ids below the vocabulary */
    uint32_t n_sequences, length;
} TrainBatch;

typedef struct Training Training;

typedef struct TrainingOptions {
    const ModelSpec *spec;     /* borrowed, like all here */
    const Parameters *weights; /* may change between passes */
    const Kernels *kernels;
    Pool *pool;
    uint32_t max_sequences, length; /* of a micro-batch; length <= the model's context */
} TrainingOptions;

Training *training_new(const TrainingOptions *options, GError **error);
void training_free(Training *t); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Training, training_free)

/* Bytes of tape and buffers. */
size_t training_bytes(const Training *t);

/* Losses of the batch's tokens: [rows], 0 where there is no target, NaN where a logit is not
 * finite.
 */
void training_forward(Training *t, const TrainBatch *batch, float *losses);
/* After training_forward() of the same batch, once. Adds `factor` x the gradient of the sum of
 * losses to `gradients`, which has a lookup part. factor: a power of two (NUMERICS 15). */
void training_backward(Training *t, const TrainBatch *batch, float factor, Parameters *gradients);
/* Logits of the last forward pass, [rows][vocabulary], until backward uses them up. */
const float *training_logits(const Training *t);
