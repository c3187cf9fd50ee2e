/* How a Hugging Face config.json of a Llama model scales its rotation ("rope_scaling", newer files
 * "rope_parameters"): not at all, linear, or llama3, whose divisors such directories do not hold:
 * they follow from four numbers. Source: transformers, modeling_rope_utils (rope_type "llama3"). */
#pragma once

#include "proto/model/model_spec.h"

#include <glib.h>
#include <jansson.h>

/* Fills *rope for heads of head_size; factors, [head_size / 2], returned, where *rope asks for
 * them, else NULL. INVALID names the directory and what is not understood. */
bool hf_rope_read(const char *directory, const json_t *config, uint32_t head_size, RopeSpec *rope,
                  float **factors, GError **error);
