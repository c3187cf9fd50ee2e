/* A stage's pass over a step on its device: what stage_embed(), stage_layers() and stage_logits()
 * do where there is one. GROUP_ABORTED with stage->failure set: the device failed. */
#pragma once

#include "worker/model/stage.h"

GroupStatus device_forward_embed(Stage *stage, const StageRun *run);
GroupStatus device_forward_layers(Stage *stage, const StageRun *run);
/* Within the deadline of the pass before it. */
void device_forward_logits(Stage *stage, const uint32_t *rows, uint32_t n);
