/* A job file's settings as ranks are told them. */
#pragma once

#include "coordinator/train/train_input.h"
#include "coordinator/train/train_layout_choice.h"
#include "weft/v1/train.pb-c.h"

/* INVALID: what training does not run in this release. */
bool train_settings_check(const JobSpec *job, GError **error);
/* out: initialised; its optimizer is *optimizer. */
void train_settings_fill(const JobSpec *job, const TrainInput *in, const TrainLayoutChoice *layout,
                         uint64_t first_step, Weft__V1__TrainSettings *out,
                         Weft__V1__TrainOptimizer *optimizer);
