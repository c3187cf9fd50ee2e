/* What a rank's worker holds in host memory beside weights, gradients, moments, tapes and buffers:
 * its data, what is under way between ranks, what libraries take, and its part of a checkpoint.
 * For plans; pure. */
#pragma once

#include "worker/train/gradient_exchange.h"

typedef struct TrainBuffersOptions { /* borrowed */
    const Holding *holding;
    const LeafCuts *leaves;
    const Ownership *reduced, *stepped; /* OptimizerOptions */
    size_t rows;                        /* of a micro-batch */
    uint32_t sequences;                 /* of the global batch */
    uint32_t moments;                   /* of the optimizer: 1 or 2 */
    uint64_t data_bytes;
    bool saves; /* checkpoints are made: the part of one is a copy */
} TrainBuffersOptions;

uint64_t train_buffers_bytes(const TrainBuffersOptions *options);
/* Floats of the own parts of a tied embedding that are exchanged at once between the first and the
 * last stage; 0: it is not tied, or on one stage. */
size_t train_tied_floats(const Ownership *reduced, const ModelSpec *spec);
