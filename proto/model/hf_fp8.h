/* fp8 weights of Hugging Face directories: what quantization_config may say, scales as checkpoints
 * have them, and rows as F8_E4M3 blocks (dtype.h). A weight X.weight of type F8_E4M3 has its scale
 * in
 *
 * - X.weight_scale: one number ([] or [1]), one for each output ([out] or [out, 1]);
 * - X.weight_scale_inv, or X.weight_scale where weight_block_size (block_structure) is [128, 128]:
 * one for each 128 x 128 block ([ceil(out / 128), ceil(in / 128)]).
 *
 * All are factors: value = scale * e4m3. X.input_scale is for engines that round activations to
 * fp8; weft multiplies them as they come, so it is not read. */
#pragma once

#include "proto/model/safetensors.h"

#include <jansson.h>

#define F8_BLOCK_COLUMNS 128u

/* By name; NULL if there is none. Borrowed. */
typedef const SafetensorsTensor *(*HfFind)(const void *user, const char *name);

/* Method and format of quantization_config: INVALID names what is not read and what to do. */
bool hf_quantization_check(const char *directory, const json_t *config, GError **error);

/* A scale of F8_E4M3 weights; all 0 for other weights. */
typedef struct HfScale {
    const SafetensorsTensor *tensor;
    uint32_t row_step, column_step; /* rows and columns of the weight that share a number */
    uint32_t columns;               /* numbers in a row of the scale */
} HfScale;

bool hf_is_fp8(const SafetensorsTensor *t);
/* Every scale of a file has its weight. INVALID with both names. */
bool hf_scales_check(const char *directory, const Safetensors *file, HfFind find, const void *user,
                     GError **error);
/* The scale of weight, whose shape is 2-D: there, of a shape above, finite numbers. INVALID. */
bool hf_scale_bind(const char *directory, const SafetensorsTensor *weight, HfFind find,
                   const void *user, HfScale *out, GError **error);
/* Columns [column0, + n_columns) of a row as blocks {f32 scale, 128 weights}; both are multiples of
 * 128. INVALID names a weight that is no number. */
bool hf_fp8_copy(const SafetensorsTensor *weight, const HfScale *scale, uint32_t row,
                 uint32_t column0, uint32_t n_columns, uint8_t *out, GError **error);
/* One weight as f32; NaN if it is no number. */
float hf_fp8_element(const SafetensorsTensor *weight, const HfScale *scale, uint32_t row,
                     uint32_t column);
