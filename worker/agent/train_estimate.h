/* Trainer.Estimate: what the ranks of a plan would hold, and how a schedule would pass its time:
 * the numbers of the runtime itself, for a coordinator that plans. */
#pragma once

#include "kernels/device/device.h"
#include "transport/rpc/rpc.h"
#include "weft/v1/train.pb-c.h"
#include "worker/task_pool.h"

/* Answers the call, from the pool. device: of this worker; NULL: none. process_bytes: what its
 * process holds before it has a rank. Loop thread. */
void train_estimate_answer(TaskPool *pool, const Device *device, uint64_t process_bytes,
                           RpcCall *call, const Weft__V1__TrainEstimateRequest *request);
