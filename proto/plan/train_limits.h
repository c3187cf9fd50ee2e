/* Numbers of training jobs that the coordinator and workers agree on: bounds of what a job file
 * says, which workers hold what they are sent to, and how much is on its way between the two
 * (weft/v1/train.proto). */
#pragma once

#include "proto/plan/tree.h"

#define TRAIN_SEQUENCES_LIMIT (1u << 20) /* of a step, a micro-batch, a validation */
#define TRAIN_LEAVES_LIMIT TREE_LEAVES_LIMIT
#define TRAIN_STEPS_LIMIT UINT64_C(1000000000000)
#define TRAIN_SAMPLE_LIMIT (1u << 16) /* tokens of a text, and of what it goes on from */
#define TRAIN_TRACE_STEPS_LIMIT 1000u /* that are traced */

/* A token on its way: its id in so many bits, above them DOCUMENT_LOSS and DOCUMENT_BEGIN. */
#define TRAIN_ID_BITS 30u
/* Elements of an answer to a TrainWant. */
#define TRAIN_WANT_LIMIT (UINT64_C(256) << 10)
/* Bytes of a rank's part of a checkpoint that are on their way and not written. */
#define TRAIN_SAVING_WINDOW (4u << 20)
/* Operations of a TrainTrace. */
#define TRAIN_TRACE_OPS 4096u
