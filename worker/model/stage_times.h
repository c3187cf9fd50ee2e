/* StageTimes: where a stage's time goes, by op. Thread 0 takes the time behind each barrier, so an
 * op lasts from the barrier before it to the one that ends it, waiting of the threads for one
 * another included. Owned by the engine thread. */
#pragma once

#include <stdint.h>
#include <time.h>

typedef enum StageOp {
    STAGE_OP_NORM, /* norms, residual sums, quantising for the products */
    STAGE_OP_QKV,  /* query, key and value projections */
    STAGE_OP_ROPE, /* rotation, writing keys and values */
    STAGE_OP_ATTENTION,
    STAGE_OP_ATTN_OUT,   /* output projection */
    STAGE_OP_GATE_UP,    /* both projections into the feed-forward */
    STAGE_OP_ACTIVATION, /* SwiGLU, quantising */
    STAGE_OP_DOWN,       /* projection out of the feed-forward */
    STAGE_OP_REDUCE,     /* sums over the tensor ranks, their waiting included */
    STAGE_OP_HEAD,       /* last norm, logits */
    STAGE_OP_DEVICE,     /* a whole pass over the layers on a device */
    STAGE_OP_LIMIT
} StageOp;

typedef struct StageTimes {
    uint64_t ns[STAGE_OP_LIMIT];
    uint64_t last_ns;
} StageTimes;

static inline uint64_t stage_times_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline void stage_times_begin(StageTimes *times)
{
    times->last_ns = stage_times_now();
}

/* What passed since the last mark was `op`. */
static inline void stage_times_mark(StageTimes *times, StageOp op)
{
    const uint64_t now = stage_times_now();
    times->ns[op] += now - times->last_ns;
    times->last_ns = now;
}
