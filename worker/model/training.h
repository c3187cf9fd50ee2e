/* Training: the forward and backward pass of a rank's part of a model (holding.h) over
 * micro-batches of whole sequences, on f32 master weights, with what backward needs kept on tapes.
 * gpt2_training.c and llama_training.c are the families; training.c has the ends and the order of
 * the layers.
 *
 * Every op is a phase of one pool region; threads share outputs, rows or channels and meet at a
 * barrier, never splitting a sum. Gradients go on from what the caller's buffers hold, in token
 * order: so a leaf's chain goes on over micro-batches (NUMERICS 14); or whole leaves are folded.
 * Tensor ranks of a stage run the same calls; thread 0 exchanges their partial sums. Called by one
 * thread. */
#pragma once

#include "kernels/kernels.h"
#include "transport/group/turns.h"
#include "worker/model/device_work.h"
#include "worker/model/dropout.h"
#include "worker/model/parameters.h"
#include "worker/model/training_precision.h"
#include "worker/model/training_times.h"

#define TARGET_NONE UINT32_MAX /* a position without a target: no loss, no gradient */

/* How the gradients of a batch's matrices, vectors and looked up rows go into their buffers
 * (NUMERICS 14). Each leaf is a chain over its tokens; whole leaves fold as units do. */
typedef struct BatchLeaves {
    uint32_t n;                            /* leaves with sequences here */
    uint32_t first[TREE_LEAVES_LIMIT + 1]; /* leaf i: sequences [first[i], first[i + 1]) */
    TreeStep steps[TREE_LEAVES_LIMIT];     /* their fold, to one subtree; not read where n is 1 */
    bool begun; /* n is 1: the chain goes on from the buffers. Else they are written, what
                   parameters_clear_sums() clears being zero before */
} BatchLeaves;

/* Of a pass: the gradients of this layer of the model, of all later ones that the stage has, and of
 * the head are complete. */
typedef struct TrainingNotice {
    void (*complete)(void *user, uint32_t layer, unsigned thread, unsigned n_threads); /* by all */
    void (*completed)(void *user, uint32_t layer); /* by thread 0, when all have returned from it */
    void *user;
} TrainingNotice;

/* Rows are tokens, sequence after sequence. */
typedef struct TrainBatch {
    const uint32_t *tokens, *targets; /* [n_sequences][length]; ids below the vocabulary */
    /* [n_sequences][length], or NULL: the position at which the document of each position begins;
     * attention stays inside it */
    const uint32_t *begins;
    bool restart; /* positions (RoPE, learnt ones) count from there */
    uint32_t n_sequences, length;
    uint64_t first_sample;     /* number of its first sequence over all steps; the rest follow it */
    uint32_t chunk;            /* of the stage's layers (holding.h) that the pass goes through */
    Dropout dropout;           /* rate 0 where nothing is learned */
    const BatchLeaves *leaves; /* borrowed; NULL: one leaf, begun */
    const TrainingNotice *notice; /* of the pass that ends the weights' gradients; NULL: none */
} TrainBatch;

/* What of a layer's forward pass is made again before its backward pass instead of being kept:
 *   none       nothing
 *   selective  what costs little: norms, attention's inner part (softmax(q k) v) and the activation
 *              (Korthikanti et al. 2022, arXiv 2205.05198, section 5). With q, kv, f the rank's own
 *              widths, a layer keeps 2 width + q + 2 kv + f (gated: 2 f) floats a token instead of
 *              4 width + 2 q + 2 kv + 2 f (gated: 3 f)
 *   full       all of it from the layer's input: width floats a token
 * The bits are the same (NUMERICS 18). */
typedef enum Recompute { RECOMPUTE_NONE, RECOMPUTE_SELECTIVE, RECOMPUTE_FULL } Recompute;
#define RECOMPUTE_LIMIT 3u

typedef struct Training Training;

typedef struct TrainingOptions {
    const Parameters *weights; /* borrowed, like all here; may change between passes */
    const Kernels *kernels;
    Pool *pool;
    uint32_t max_sequences, length; /* of a micro-batch; length <= the model's context */
    uint32_t slots;  /* micro-batches (times chunks) between forward and backward, at most */
    float smoothing; /* of labels: the loss is (1 - s) (lse - z_target) + s (lse - mean of z) */
    Precision precision;
    bool apart; /* gradients of the layers' matrices and biases by training_weights(); not with
                   recompute */
    Recompute recompute;
    bool documents;    /* batches may have `begins`: room for them on a device */
    GroupTurns *group; /* of the stage's tensor ranks; NULL: one */
    DeviceWork *work;  /* where weights, gradients, tapes and buffers lie and ops run; NULL: the
                          host, its kernels and pool */
    DeviceTeam *team;  /* of the stage's tensor ranks, one of work's: they exchange on the stream;
                          NULL: through pinned memory and `group` */
    bool exact;        /* on a device: class exact, by ops that give it with this precision */
    const DeviceTrainOps *plan_ops; /* training_plan_bytes() of a device; NULL: the host */
    void (*progress)(void *user);   /* of links: by thread 0 between ops (DESIGN 5); NULL: none */
    void *progress_user;
    TrainTimes *times; /* NULL: not taken */
} TrainingOptions;

Training *training_new(const TrainingOptions *options, GError **error);
void training_free(Training *t); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Training, training_free)

/* Bytes of tapes and buffers. */
size_t training_bytes(const Training *t);
/* The same for a plan: of a rank of this holding with so many threads; options' weights, kernels,
 * pool and group are not read. 0: INVALID, as training_new(). */
size_t training_plan_bytes(const Holding *holding, const TrainingOptions *options, unsigned threads,
                           GError **error);

/* ---- a micro-batch, in slot `slot`; other than OK: the exchange among tensor ranks failed. On a
 * device its failure is in options.work, and what was computed is to be discarded. Pointers that
 * are given are host memory, always. ---- */

/* Where the chunk's input goes before training_forward(), unless it is the model's first: the
 * residual stream [rows][width]. */
float *training_input(Training *t, uint32_t slot);
GroupStatus training_forward(Training *t, uint32_t slot, const TrainBatch *batch);
/* Its result, [rows][width], until the next call. */
const float *training_output(Training *t, uint32_t slot);

/* Last chunk of the last stage: losses of the batch's tokens, [rows], 0 where there is no target,
 * NaN where a logit is not finite. The same on all tensor ranks. */
GroupStatus training_loss(Training *t, uint32_t slot, const TrainBatch *batch, float *losses);
/* A row of own logits of the last training_loss(), [own vocabulary], until the next call or until
 * backward uses them up. */
const float *training_logits_row(Training *t, uint32_t row);

/* The gradient of the chunk's output before training_backward() (not of the last chunk on the last
 * stage, which begins at its loss: training_loss() of the slot just before), and of its input after
 * it: [rows][width]. */
float *training_gradient(Training *t);
/* Once after training_forward(). `factor` x the gradient of the sum of losses goes into
 * `gradients`, as batch->leaves says. factor: a power of two (NUMERICS 15). */
GroupStatus training_backward(Training *t, uint32_t slot, const TrainBatch *batch, float factor,
                              Parameters *gradients);
/* Where weights are apart, once after training_backward() of the slot and before its next forward
 * pass: what backward left out of `gradients`. Talks to nobody. */
void training_weights(Training *t, uint32_t slot, const TrainBatch *batch, Parameters *gradients);
