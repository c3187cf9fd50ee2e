/* Rotary positions. The table depends on the deployment's context limit and the model alone, never
 * on the current length. */
#pragma once
#include "proto/model/model_spec.h"
#include <stddef.h>
#include <stdint.h>

/* Fills cos/sin [n_positions][dims/2] each, from det_* functions in double, rounded once to f32.
 * factors: ROPE_SCALING_FACTORS divisors [dims/2] or NULL. Yarn's magnitude factor is multiplied
 * in. */
void rope_table(const RopeSpec *spec, const float *factors, uint32_t first_position,
                uint32_t n_positions, float *cos_out, float *sin_out);
/* Rotates n_heads heads of head_size in place: per pair (a, b): a' = fmaf(a, c, -(b * s)), b' =
 * fmaf(a, s, b * c) (products rounded to f32 first). cos, sin: the position's [dims/2]. Elements
 * beyond dims stay. Backward is the same op with the sines negated: a rotation's gradient is
 * the rotation back. */
typedef void (*RopeApplyFn)(float *x, uint32_t n_heads, uint32_t head_size, uint32_t dims,
                            RopePairing pairing, const float *cos, const float *sin);
