/* TrainTimes: where a training step's time goes, by op. Thread 0 takes the time as its part of an
 * op ends; what it then waits for the other threads is an op of its own. Owned by the rank's
 * thread. */
#pragma once

#include <stdint.h>
#include <time.h>

typedef enum TrainOp {
    TRAIN_OP_FORWARD, /* products, y = x W^T */
    TRAIN_OP_DX,
    TRAIN_OP_DW,
    TRAIN_OP_HEAD_FORWARD, /* the same of the output head, in the same order */
    TRAIN_OP_HEAD_DX,
    TRAIN_OP_HEAD_DW,
    TRAIN_OP_ATTENTION, /* RoPE included */
    TRAIN_OP_ATTENTION_BACKWARD,
    TRAIN_OP_NORM, /* biases and residual sums included */
    TRAIN_OP_NORM_BACKWARD,
    TRAIN_OP_BIAS_BACKWARD,
    TRAIN_OP_ACTIVATION,
    TRAIN_OP_ACTIVATION_BACKWARD,
    TRAIN_OP_LOSS,          /* statistics of the logits, losses */
    TRAIN_OP_LOSS_BACKWARD, /* gradient of the logits */
    TRAIN_OP_EMBEDDING,
    TRAIN_OP_EMBEDDING_BACKWARD,
    TRAIN_OP_EXCHANGE, /* among tensor ranks */
    TRAIN_OP_WAIT,     /* for the other threads of a pass */
    TRAIN_OP_FINISH,   /* unscaling, squares, norm */
    TRAIN_OP_UPDATE,   /* of weights and moments */
    TRAIN_OP_REST,     /* reading samples, clearing buffers, folds, exchange among replicas */
    TRAIN_OP_LIMIT
} TrainOp;

typedef struct TrainTimes {
    uint64_t ns[TRAIN_OP_LIMIT];
    uint64_t last_ns;
} TrainTimes;

/* What passed since the last mark was `op`; nothing where times is NULL. */
static inline void train_times_mark(TrainTimes *times, TrainOp op)
{
    if (times != NULL) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        const uint64_t now = (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
        times->ns[op] += now - times->last_ns;
        times->last_ns = now;
    }
}
