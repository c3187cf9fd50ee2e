/* The dimensions of a ModelSpec as JSON: what a checkpoint says about its model. */
#pragma once

#include "proto/model/model_config.h"

#include <jansson.h>

/* Returned. */
json_t *model_to_json(const ModelSpec *spec);
/* All tensors f32, with the names that GGUF files use. INVALID; returned. */
ModelSpec *model_from_json(const json_t *object, GError **error);
