/* What ranks exchange in a step beside the fold of gradients (gradient_stream.h): among replicas
 * what the owners made of them, and the smaller exchanges.
 *
 * Wire, dp ranks, O bytes of weights the rank's own: exchange_share() sends (dp - 1) x O (FORMULAS
 * 7a). */
#pragma once

#include "worker/model/parameters.h"
#include "worker/train/ownership.h"
#include "worker/train/train_links.h"

/* Leaves of the global batch among the replicas. */
typedef struct LeafCuts {
    uint32_t n_leaves;
    uint64_t missing;                    /* bit i: leaf i has no sample */
    uint32_t cuts[PLAN_RANKS_LIMIT + 1]; /* leaves [cuts[d], cuts[d + 1]) are replica d's */
} LeafCuts;
LeafCuts leaf_cuts(uint32_t sequences, uint32_t n_leaves, uint32_t dp);

/* Everybody's owned floats of x (weights or gradients, without a lookup part) to everybody. */
bool exchange_share(TrainLinks *l, const Ownership *o, Parameters *x, GError **error);
/* Vectors whose matrices are cut among the tensor ranks of a stage (biases of Q, K, V and of the
 * feed-forward network): each rank has the gradient of its part, and gets the others'. */
bool exchange_vectors(TrainLinks *l, Parameters *gradients, GError **error);
/* Whether tensor i is such a vector, and elements [first, last) of it that tensor rank r has; those
 * of all of them. */
bool exchange_has_vector(const Holding *h, uint32_t i, uint32_t r, uint32_t *first, uint32_t *last);
size_t exchange_vector_floats(const Holding *h, uint32_t r);
/* n own floats to the other end of a tied embedding, and its to here. */
bool exchange_tied(TrainLinks *l, const float *mine, size_t n, float *theirs, GError **error);
/* by_tile: an element of `size` bytes a tile of the model; of those that count here filled, then of
 * all ranks' (world). */
bool exchange_tiles(TrainLinks *l, const Ownership *o, void *by_tile, size_t size, GError **error);
