/* A job file's settings as ranks are told them. */
#pragma once

#include "coordinator/train/train_input.h"
#include "coordinator/train/train_layout_choice.h"
#include "proto/model/checkpoint.h"
#include "weft/v1/train.pb-c.h"

/* INVALID: what training does not run in this release. */
bool train_settings_check(const JobSpec *job, GError **error);
typedef struct TrainSettingsMessage { /* its parts point at each other */
    Weft__V1__TrainSettings settings;
    Weft__V1__TrainOptimizer optimizer;
    Weft__V1__TrainState state;
    Weft__V1__TrainScaling scaling;
} TrainSettingsMessage;
/* from: the state of the checkpoint to go on from; NULL: none. */
void train_settings_fill(const JobSpec *job, const TrainInput *in, const TrainLayoutChoice *layout,
                         const CheckpointState *from, TrainSettingsMessage *out);
/* The checkpoint is of this model and may be gone on from. started: it is the job's own. INVALID.
 */
bool train_checkpoint_check(const JobSpec *job, const ModelSpec *model, const Checkpoint *c,
                            bool started, GError **error);
