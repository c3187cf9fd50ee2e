/* The Llama family on a device: what stage_embed(), stage_layers() and stage_logits() do where the
 * stage has one. GROUP_ABORTED with stage->failure set: the device failed. */
#pragma once

#include "worker/model/stage.h"

GroupStatus llama_device_embed(Stage *stage, const StageRun *run);
GroupStatus llama_device_layers(Stage *stage, const StageRun *run);
/* Within the deadline of the pass before it. */
void llama_device_logits(Stage *stage, const uint32_t *rows, uint32_t n);
