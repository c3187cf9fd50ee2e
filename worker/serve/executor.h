/* clang-format off */
/* Executor: runs Steps on one rank: keeps the table of sequences that all ranks share, computes the
 * stage's part, hands activations to the next stage, draws tokens on the last (DESIGN 3). Engine
 * thread only.
 *
 * Who sends what, stage s with t ranks, next stage with t' ranks:
 *   leader (0,0)     -> (0,j), j > 0            LINK_OP_STEP    encoded Step
 *   (s,i)            -> (s+1,j), j mod t = i    LINK_OP_STEP    encoded Step + x [rows][width] f32,
 *                                               or x apart as LINK_OP_ACTIVATIONS (direct.h)
 *   (last,i), i > 0  -> (last,0)                LINK_OP_SAMPLE  its vocabulary shard's part of each
 *                                               drawn row
 *   (last,0)         -> (last,i), i > 0         LINK_OP_SAMPLE  the verdict, where a draw may need
 *                                               more candidates
 *   (last,0)         -> leader                  LINK_OP_TOKEN   results of the step, empty for a
 *                                               step without outputs
 *   (s,0)            -> (s+1,0) or leader       LINK_OP_TRACE   ahead of these, when rows of the
 *                                               step are traced (trace.h) */
/* clang-format on */
#pragma once

#include "transport/link/link.h"
#include "worker/model/stage.h"
#include "worker/serve/direct.h"
#include "worker/serve/leader.h"
#include "worker/serve/position.h"
#include "worker/serve/sampling.h"
#include "worker/serve/sequences.h"
#include "worker/serve/step.h"

typedef struct Executor Executor;

typedef enum ExecutorStatus {
    EXECUTOR_OK = 0,
    EXECUTOR_GROUP,
    EXECUTOR_LINK,
    EXECUTOR_SAMPLE_WAIT,
    EXECUTOR_TRACE,
    EXECUTOR_DEVICE /* stage->failure */
} ExecutorStatus;

typedef struct ExecutorOptions {
    Stage *stage;
    StepLimits limits;
    Position position;
    Link *const *links; /* by global rank; NULL where there is none; borrowed */
    Direct *direct;     /* borrowed; NULL: activations go through the host */
    /* Waits until *done or the deadline; false = gave up (deadline, abort, dead peer). Progresses
     * the port. */
    bool (*wait)(const bool *done, int64_t deadline_us, uint32_t global_rank, const char *operation,
                 void *user);
    /* A link has had no room since then: progresses the port a little; false = gave up, as wait. */
    bool (*wait_for_room)(int64_t since_us, uint32_t global_rank, const char *operation,
                          void *user);
    void *user;
    int64_t deadline_us;        /* of each wait, relative */
    int64_t flight_deadline_us; /* of all steps that may fly at once */
} ExecutorOptions;

Executor *executor_new(const ExecutorOptions *options);
void executor_free(Executor *executor);

/* Runs one step. activations: x as it arrived ([rows][width], any alignment of 16), NULL on the
 * first stage and where they come apart (direct_is_due()). On the drawing rank *results and
 * *n_results (borrowed until the next run) are filled when it is also the leader; else they are
 * sent to it. */
ExecutorStatus executor_run(Executor *executor, const Step *step, const float *activations,
                            const RowResult **results, uint32_t *n_results);
/* Whom the failing operation waited for: global rank, or -1. */
int executor_blames(const Executor *executor, const char **operation);

/* The traced rows of the last step, for the leader of a single stage; NULL = none. Borrowed until
 * the next run. */
const GByteArray *executor_trace(const Executor *executor);
/* A LINK_OP_TRACE message from the stage before. */
void executor_receive_trace(Executor *executor, uint32_t step, const void *data, size_t size);
/* A LINK_OP_SAMPLE message for the drawing rank, from tensor rank `from`. */
void executor_receive_sample(Executor *executor, uint32_t from, uint32_t step, const void *data,
                             size_t size);
/* Decodes a LINK_OP_TOKEN message; borrowed until the next call. false: malformed. */
bool executor_decode_results(Executor *executor, const void *data, size_t size,
                             const RowResult **results, uint32_t *n_results);
