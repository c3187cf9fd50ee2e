/* Trainer.Estimate: what the ranks of a plan would hold, and how a schedule would pass its time:
 * the numbers of the runtime itself, for a coordinator that plans. */
#pragma once

#include "transport/rpc/rpc.h"
#include "weft/v1/train.pb-c.h"
#include "worker/task_pool.h"

/* Answers the call, from the pool. Loop thread. */
void train_estimate_answer(TaskPool *pool, RpcCall *call,
                           const Weft__V1__TrainEstimateRequest *request);
