/* Pipeline: the schedule of one step over the stages of a replica, as data: for each stage a list
 * of what it does, in order. One runtime executes it (micro_runner.h); pipeline_simulate() says
 * what it costs. Pure.
 *
 * Backward passes go in the order of the micro-batches in every schedule, as the chain of a leaf's
 * gradients does (NUMERICS 14): GPipe so has the same bubble and memory as in reverse order. */
#pragma once

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

typedef enum PipelineKind {
    PIPELINE_1F1B = 0,
    PIPELINE_GPIPE = 1,
    PIPELINE_ZERO_BUBBLE = 2, /* ZB-H1 (Qi et al. 2023, arXiv 2401.10241): W apart from B */
    PIPELINE_INTERLEAVED = 3, /* stages of several chunks of layers (arXiv 2104.04473, 2.2) */
} PipelineKind;
#define PIPELINE_KIND_LIMIT 4u
const char *pipeline_name(PipelineKind kind); /* static */

typedef enum PipelineOpKind {
    PIPELINE_RECEIVE_FORWARD,
    PIPELINE_FORWARD,
    PIPELINE_SEND_FORWARD,
    PIPELINE_RECEIVE_BACKWARD,
    PIPELINE_BACKWARD, /* gradients of inputs, and of weights unless there is a WEIGHTS */
    PIPELINE_SEND_BACKWARD,
    PIPELINE_WEIGHTS, /* gradients of weights */
} PipelineOpKind;

typedef struct PipelineOp {
    PipelineOpKind kind;
    uint32_t chunk, micro;
} PipelineOp;

typedef struct Pipeline {
    PipelineKind kind;
    uint32_t n_stages, n_chunks, n_micro;
    GArray **stages; /* of PipelineOp */
} Pipeline;

/* A micro-batch goes through chunk 0 of all stages, then through chunk 1 of all, and so on.
 * n_chunks: 1 unless interleaved. */
Pipeline *pipeline_new(PipelineKind kind, uint32_t n_stages, uint32_t n_chunks, uint32_t n_micro);
void pipeline_free(Pipeline *p); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Pipeline, pipeline_free)

/* Micro-batches (times chunks) that a stage keeps at once: from FORWARD to BACKWARD, or to WEIGHTS
 * where there is one. */
uint32_t pipeline_in_flight(const Pipeline *p, uint32_t stage);
/* Places for them, 0 .. pipeline_in_flight() - 1: slots[chunk x n_micro + micro]. */
void pipeline_slots(const Pipeline *p, uint32_t stage, uint32_t *slots);
/* Every forward and backward (and weights) once a micro-batch and chunk, each after what it needs,
 * of each chunk in order, no stage waiting for ever, messages between two stages received in the
 * order sent. INVALID says what is wrong. */
bool pipeline_check(const Pipeline *p, GError **error);

typedef struct PipelineTimes {
    double forward, backward, weights; /* of one stage (all its chunks) and micro-batch; weights:
                                          only where apart; else a part of backward */
    double transfer;                   /* from a send to when it can be received */
} PipelineTimes;
typedef struct PipelineCost {
    double makespan;
    double bubble; /* makespan - the time that a stage is busy: idle time of each stage */
} PipelineCost;
/* A legal schedule. */
PipelineCost pipeline_simulate(const Pipeline *p, const PipelineTimes *times);

/* What a stage did and when, by one clock for all stages. */
typedef struct PipelineOpTime {
    PipelineOp op;
    int64_t begin_us, end_us;
} PipelineOpTime;
/* A real step beside the simulator, which is given the times that its ops took and how late each
 * stage came to the step. Receives are waits; what a send takes is work. The step begins with the
 * first stage's first forward. */
typedef struct PipelineComparison {
    double makespan, idle;                     /* seconds; share of all stages' time */
    double simulated_makespan, simulated_idle; /* the same, played through */
} PipelineComparison;
/* traces[stage]: GArray of PipelineOpTime, the ops of p->stages[stage] in order. INVALID: others.
 */
bool pipeline_compare(const Pipeline *p, GArray *const *traces, PipelineComparison *out,
                      GError **error);
