#pragma once

#include "kernels/ops/attention.h"

/* V's row is contiguous; K's is a column of the block, one element every 32. `store` rounds
 * VEC_LANES floats to 16 bits. */
VEC_FN void kv_write_16(const float *k, const float *v, uint32_t head_size, uint32_t slot,
                        uint16_t *k_out, uint16_t *v_out, void (*store)(uint16_t *p, Vec v))
{
    v_out += (size_t)slot * head_size;
    k_out += slot;
    for (uint32_t d = 0; d < head_size; d += VEC_LANES) {
        const uint32_t n = head_size - d < VEC_LANES ? head_size - d : VEC_LANES;
        uint16_t k_row[VEC_LANES], v_row[VEC_LANES];
        store(k_row, n == VEC_LANES ? vec_load(k + d) : vec_load_first(k + d, n));
        store(v_row, n == VEC_LANES ? vec_load(v + d) : vec_load_first(v + d, n));
        memcpy(v_out + d, v_row, n * sizeof(uint16_t));
        for (uint32_t i = 0; i < n; i++) {
            k_out[(size_t)(d + i) * KV_BLOCK] = k_row[i];
        }
    }
}

static void kv_write_f16_vector(const float *k, const float *v, uint32_t head_size, uint32_t slot,
                                void *k_block, void *v_block)
{
    kv_write_16(k, v, head_size, slot, k_block, v_block, vec_store_f16);
}

static void kv_write_bf16_vector(const float *k, const float *v, uint32_t head_size, uint32_t slot,
                                 void *k_block, void *v_block)
{
    kv_write_16(k, v, head_size, slot, k_block, v_block, vec_store_bf16);
}
