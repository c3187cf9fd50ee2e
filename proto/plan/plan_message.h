/* Plan <-> weft.v1.Plan. */
#pragma once

#include "proto/plan/plan.h"
#include "weft/v1/plan.pb-c.h"
#include "weft/v1/train.pb-c.h"

#include <glib.h>

/* Returned; freed with weft__v1__plan__free_unpacked(message, NULL). */
Weft__V1__Plan *plan_to_message(const Plan *plan);

/* The most that a rank of a training job holds where it computes. */
uint64_t plan_message_train_total(const Weft__V1__TrainMemory *m);

/* Returned, or NULL + PROTOCOL naming the field. Counts, enum values and texts are checked, so that
 * the result is safe to walk; whether it fits a model and members is plan_check()'s question. */
Plan *plan_from_message(const Weft__V1__Plan *message, GError **error);
