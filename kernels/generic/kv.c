#include "kernels/generic/ops.h"

#include "proto/model/blocks.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define KV_WRITE(NAME, TYPE, CONVERT)                                                              \
    void NAME(const float *k, const float *v, uint32_t head_size, uint32_t slot, void *k_block,    \
              void *v_block)                                                                       \
    {                                                                                              \
        TYPE *k_out = (TYPE *)k_block + slot, *v_out = (TYPE *)v_block + (size_t)slot * head_size; \
        for (uint32_t d = 0; d < head_size; d++) {                                                 \
            k_out[(size_t)d * KV_BLOCK] = CONVERT(k[d]);                                           \
            v_out[d] = CONVERT(v[d]);                                                              \
        }                                                                                          \
    }

KV_WRITE(kv_write_f16_generic, uint16_t, f32_to_f16)
KV_WRITE(kv_write_bf16_generic, uint16_t, f32_to_bf16)
KV_WRITE(kv_write_f32_generic, float, )

/* A row's scale: NaN if it is not finite, so that whatever reads it fails (NUMERICS 11). */
static float q8_scale(const float *x, uint32_t n)
{
    float most = 0.0f;
    for (uint32_t i = 0; i < n; i++) {
        const float a = fabsf(x[i]);
        if (!(a <= FLT_MAX)) {
            return NAN;
        }
        most = a > most ? a : most;
    }
    return most / 127.0f;
}

/* Rounded to nearest even by the one addition; within +-127 also where the scale is subnormal, that
 * is coarse. */
static int8_t q8_of(float x, float scale)
{
    const float shift = 12582912.0f; /* 1.5 x 2^23 */
    if (!(scale > 0.0f)) {
        return 0;
    }
    const float ratio = x / scale, q = ratio > 127.0f ? 127.0f : ratio < -127.0f ? -127.0f : ratio;
    const float rounded = q + shift;
    return (int8_t)(rounded - shift);
}

void kv_write_q8_generic(const float *k, const float *v, uint32_t head_size, uint32_t slot,
                         void *k_block, void *v_block)
{
    const float k_scale = q8_scale(k, head_size), v_scale = q8_scale(v, head_size);
    int8_t *k_out = (int8_t *)k_block + slot, *v_out = (int8_t *)v_block + (size_t)slot * head_size;
    for (uint32_t d = 0; d < head_size; d++) {
        k_out[(size_t)d * KV_BLOCK] = q8_of(k[d], k_scale);
        v_out[d] = q8_of(v[d], v_scale);
    }
    memcpy((int8_t *)k_block + (size_t)KV_BLOCK * head_size + 4 * (size_t)slot, &k_scale, 4);
    memcpy((int8_t *)v_block + (size_t)KV_BLOCK * head_size + 4 * (size_t)slot, &v_scale, 4);
}
