#include "kernels/generic/ops.h"

#include "kernels/ops/embed.h"

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
