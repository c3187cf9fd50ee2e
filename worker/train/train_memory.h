/* Bytes that a rank of a training holds: planned, before it exists, and as it stands. */
#pragma once

#include "worker/train/train_rank.h"

typedef struct TrainMemory {
    uint64_t weights, gradients, optimizer, activations; /* activations: tapes and buffers */
    uint64_t buffers; /* data, what is under way between ranks, a checkpoint's part: the most of it
                         (train_buffers.h) */
    uint64_t host;    /* of a rank on a device, which holds the rest: buffers and copies in host
                         memory, of weights and moments and, where replicas exchange gradients over
                         links, of these (a plan counts them always); else 0 */
} TrainMemory;
/* Where the rank computes. */
static inline uint64_t train_memory_total(const TrainMemory *m)
{
    return m->weights + m->gradients + m->optimizer + m->activations + m->buffers;
}
/* For a plan: of the rank that the options name (options->plan is there; kernels, pool and links
 * are not read) with so many threads. INVALID: as train_rank_new(). */
bool train_memory_plan(const TrainRankOptions *options, unsigned threads, TrainMemory *out,
                       GError **error);
/* Micro-batches of a step of the rank's replica: as of train_memory_plan(), which has said yes. */
uint32_t train_micro_batches_plan(const TrainRankOptions *options);
/* What it holds now: after a step equal to the plan. */
TrainMemory train_rank_memory(const TrainRank *t);
