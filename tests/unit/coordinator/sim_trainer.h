/* SimTrainer: service Trainer of a fake worker. Its "training" is a function of the step: a rank
 * asks for its state and finds that it is what the checkpoint's step makes it, goes on while all
 * ranks of its epoch do, and saves its share of each tensor. Rows of a tensor are divided evenly
 * among all ranks, which is no layout of the real one: the coordinator must not care. */
#pragma once

#include "transport/rpc/rpc.h"

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct SimTrainer SimTrainer;
typedef struct SimRank SimRank;
struct FakeWorker;

/* What all ranks of a cluster see of each other, and count; zero at first, cleared with
 * sim_training_clear(). */
typedef struct SimTraining {
    GPtrArray *ranks;        /* of SimRank that have loaded or load, borrowed */
    uint64_t newest_epoch;   /* ever loaded */
    uint64_t steps_computed; /* by first ranks, those again included */
    unsigned n_epochs, n_restored;
    bool wrong_loss;  /* the next step told is not what it was */
    bool wrong_step;  /* the next step told is none of the job's, once */
    bool wrong_trace; /* the next trace goes on after its step */
    bool piece_twice; /* the next save sends a piece once more */
    bool ends_unsaid; /* ranks that are done do not say so */
    bool puppets;     /* ranks do nothing by themselves */
    bool other_end;   /* the last rank ends with other weights than the others */
    bool other_part;  /* it saves others, once */
    int fails;        /* error code that the last rank ends with at its next step, once; 0: none */
} SimTraining;

SimTrainer *sim_trainer_new(struct FakeWorker *w, SimTraining *training);
/* Adds service Trainer. */
void sim_trainer_serve(SimTrainer *t, RpcServer *server);
/* Its ranks end: told to their calls, or not. NULL-safe. */
void sim_trainer_fence(SimTrainer *t);
void sim_trainer_free(SimTrainer *t);
void sim_training_clear(SimTraining *training);

/* A puppet says this; or it saves all that a rank saves at this step. */
void sim_rank_say(SimRank *rank, const ProtobufCMessage *report);
void sim_rank_save(SimRank *rank, uint64_t step);

float sim_training_loss(uint64_t step);
