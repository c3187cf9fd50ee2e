/* Training runs of a toy on any layout, a thread a rank, over inproc links: what they gave. */
#pragma once

#include "tests/unit/worker/toy_training.h"

enum { RUN_STEPS_LIMIT = 8, RUN_RANKS_LIMIT = 16, RUN_AHEAD = 4 };

/* What a checkpoint has, by logical tensor of the whole model: filled from the ranks' pieces. */
typedef struct RunState {
    Parameters *weights, *first, *second;
    uint8_t *written; /* by float of the whole arena: how often */
    TrainProgress progress;
} RunState;
RunState *run_state_new(const ModelSpec *spec);
void run_state_free(RunState *state);

typedef struct RunSpread { /* what must change no bit; zeros: one of each */
    uint32_t dp, pp, tp;
    uint32_t chunks; /* of layers per stage; 0: not interleaved */
    unsigned threads;
    uint32_t micro;
    KernelIsa isa;
    void (*edit)(Plan *plan);                  /* other cuts; NULL: even ones */
    void (*change)(TrainRankOptions *options); /* of every rank; NULL: none */
    const RunState *load;                      /* to go on from; NULL: the toy's first weights */
    RunState *save;                            /* after the last step; NULL: not */
    GArray *const *traces;                     /* by rank: TrainRankOptions.trace; NULL: none */
    bool slow_end; /* of two stages the last one validates as slowly as it can; fails if the first
                      one is more than RUN_AHEAD samples ahead */
} RunSpread;

typedef struct RunResult {
    uint32_t n_steps;
    float losses[RUN_STEPS_LIMIT], norms[RUN_STEPS_LIMIT];
    bool skipped[RUN_STEPS_LIMIT];
    float validation; /* over some samples, after the last step */
    Hash128 digest;
    TrainTraffic traffic[RUN_RANKS_LIMIT]; /* of the steps */
    uint32_t overlapped[RUN_RANKS_LIMIT];  /* train_rank_overlapped() of the last step */
    size_t floats[RUN_RANKS_LIMIT], owned[RUN_RANKS_LIMIT];
} RunResult;

/* define: of every run of a test, also of the reference (samples, leaves, optimizer). Fails the
 * test when ranks disagree or a step fails. */
RunResult run_toy(const Toy *toy, const RunSpread *spread, uint32_t n_steps,
                  void (*define)(TrainRankOptions *options));
void assert_same_run(const RunResult *got, const RunResult *want);
/* Losses, norms and the loss over validation differ by less than this share. */
void assert_close_run(const RunResult *got, const RunResult *want, double tolerance);
/* Of two tensor ranks, rank 0 has little of the attention, rank 1 little of the feed-forward and no
 * vocabulary. For RunSpread.edit, of toys as wide as toy_wide_gpt2. */
void plan_uneven(Plan *plan);
