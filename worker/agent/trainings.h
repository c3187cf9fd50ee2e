/* Trainings: the ranks of training jobs on this worker, one for each open call of service Trainer:
 * of a job one on each of its devices, or one on its cores.
 * Loop thread, all of it.
 *
 *          Load            loaded          Start          all have their state
 *   (call) ───▶ LOADING ─────────▶ LOADED ─────▶ STARTED ─────────────────────▶ steps ──▶ DONE
 *                  │                  │             │                             │        │
 *                  └──────────────────┴─────────────┴─────────────────────────────┴────────┤
 *                    error, fence, newer epoch, cancel, half-close      gone ◀── CLOSING ◀─┘
 *
 * A rank lives as long as its call: a coordinator that dies takes it along, and a newer epoch of
 * its job, or a fence, ends it at once. */
#pragma once

#include "weft/v1/train.pb-c.h"
#include "worker/agent/deployments.h"

typedef struct Trainings Trainings;

/* options: as of the deployments, of which it takes what concerns both; stamps are checked against
 * `deployments` (borrowed). */
Trainings *trainings_new(const DeploymentsOptions *options, Deployments *deployments);
void trainings_shut_down(Trainings *t);
bool trainings_is_empty(const Trainings *t);
void trainings_free(Trainings *t); /* empty; NULL-safe */

/* Trainer.Train: each message of a call, NULL at its half-close. admitted: this worker may serve
 * the coordinator now. */
void trainings_on_command(Trainings *t, RpcCall *call, const Weft__V1__TrainCommand *command);
/* What this process holds apart from ranks: the least that it was asked while it had none. */
uint64_t trainings_process_bytes(Trainings *t);
/* This worker was fenced: every rank is stopped. */
void trainings_fence(Trainings *t, int64_t silent_us);
