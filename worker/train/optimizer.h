/* Optimizer: what an owner does with the folded gradient of its pieces (NUMERICS 15-17): unscale
 * and divide, squares of tiles, the norm, and the update of weights and moments. One thread, which
 * runs the pool. */
#pragma once

#include "kernels/kernels.h"
#include "worker/model/parameters.h"
#include "worker/train/ownership.h"
#include "worker/train/schedule.h"

typedef struct OptimizerOptions {
    OptimizerSettings settings;
    const Kernels *kernels; /* borrowed, like all here */
    Pool *pool;
    const Holding *holding;
    const Ownership *reduced; /* where gradients are complete after their exchange */
    const Ownership *stepped; /* what is updated here: `reduced`, or everything */
    DeviceWork *work;         /* where gradients, weights and moments lie; NULL: in host memory */
} OptimizerOptions;

typedef struct Optimizer Optimizer;

/* Returned. */
Optimizer *optimizer_new(const OptimizerOptions *options, GError **error);
void optimizer_free(Optimizer *o); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Optimizer, optimizer_free)

/* The reduced pieces of g: the lookup part is added to the head's, then g = (g * back) / tokens;
 * and of tiles that count here squares[tile] = their sum of squares. squares: [tiles of the model].
 */
void optimizer_finish(Optimizer *o, Parameters *g, float back, float tokens, float *squares);
/* The gradient's norm from all tiles' squares: tiles by node() per tensor, tensors by node(). */
float optimizer_norm(const Optimizer *o, const float *squares);
/* One step, number `step`, of the stepped pieces. */
void optimizer_update(Optimizer *o, uint64_t step, float clip, const Parameters *g,
                      Parameters *weights);

/* Moments of the stepped pieces, OwnedPiece.kept says where: [stepped->n_owned]. second: NULL for
 * SGD. Of a device: their copies in host memory. */
float *optimizer_first(Optimizer *o);
float *optimizer_second(Optimizer *o);
/* Those copies are made from the device's, or the other way round; what fails is in the work. */
void optimizer_copy_down(Optimizer *o);
void optimizer_copy_up(Optimizer *o);
