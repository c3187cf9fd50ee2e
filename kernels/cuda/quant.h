/* Packed weights (ops/packed.h) as a warp reads them.
 *
 * A record's quants are 64-byte rows of 16 outputs x 4 k: what one register of a matrix
 * instruction's A fragment holds for one output. Lane (g, t) of a warp, g = lane / 4, t = lane % 4,
 * takes outputs 2g and 2g + 1 of row t (and of row t + 4, where a 32-block has 8 rows): one 64-bit
 * load a lane, 256 contiguous bytes a warp, no shuffles. Which k a lane holds is free as long as
 * both operands agree, for the sums are exact integers: t has k 8t..8t+7 of a 32-block. */
#pragma once

#include "kernels/cuda/device.h"

/* Bytes of a record and its elements of k. */
__host__ __device__ static inline RecordShape packed_shape(Dtype type)
{
    switch (type) {
    case DTYPE_F32:
        return {1, sizeof(RecordF32)};
    case DTYPE_F16:
        return {1, sizeof(RecordF16)};
    case DTYPE_BF16:
        return {2, sizeof(RecordBF16)};
    case DTYPE_Q4_0:
        return {32, sizeof(RecordQ40)};
    case DTYPE_Q4_1:
        return {32, sizeof(RecordQ41)};
    case DTYPE_Q5_0:
        return {32, sizeof(RecordQ50)};
    case DTYPE_Q5_1:
        return {32, sizeof(RecordQ51)};
    case DTYPE_Q8_0:
        return {32, sizeof(RecordQ80)};
    case DTYPE_Q4_K:
        return {256, sizeof(RecordQ4K)};
    case DTYPE_Q5_K:
        return {256, sizeof(RecordQ5K)};
    case DTYPE_Q6_K:
        return {256, sizeof(RecordQ6K)};
    case DTYPE_F8_E4M3:
        return {128, sizeof(RecordF8)};
    default:
        return {0, 0};
    }
}

/* ---- one element ---- */

/* Quant of element k (0..31) of a block whose nibble rows are q; high: 0, or its upper bits. */
__device__ static inline int nibble_of(const uint8_t (*q)[64], unsigned lane, unsigned k)
{
    return q[k / 8][4 * lane + k % 4] >> 4 * (k / 4 % 2) & 15;
}
__device__ static inline int fifth_of(const uint8_t *qh, unsigned lane, unsigned k)
{
    return (qh[4 * lane + k % 4] >> k / 4 & 1) << 4;
}

/* Element k of lane `lane` of a panel of a quantised type, as block_dequantise() does it. */
__device__ static inline float quant_element(Dtype type, const uint8_t *panel, unsigned lane,
                                             uint32_t k)
{
    const RecordShape shape = packed_shape(type);
    const uint8_t *record = panel + (size_t)(k / shape.k) * shape.bytes;
    const unsigned i = k % shape.k, b = i / 32, e = i % 32;
    switch (type) {
    case DTYPE_Q4_0: {
        const RecordQ40 *r = reinterpret_cast<const RecordQ40 *>(record);
        return f32_of_f16(r->d[lane]) * (float)(nibble_of(r->q, lane, i) - 8);
    }
    case DTYPE_Q4_1: {
        const RecordQ41 *r = reinterpret_cast<const RecordQ41 *>(record);
        const float product = f32_of_f16(r->d[lane]) * (float)nibble_of(r->q, lane, i);
        return product + f32_of_f16(r->m[lane]);
    }
    case DTYPE_Q5_0: {
        const RecordQ50 *r = reinterpret_cast<const RecordQ50 *>(record);
        const int q = nibble_of(r->q, lane, i) | fifth_of(r->qh, lane, i);
        return f32_of_f16(r->d[lane]) * (float)(q - 16);
    }
    case DTYPE_Q5_1: {
        const RecordQ51 *r = reinterpret_cast<const RecordQ51 *>(record);
        const int q = nibble_of(r->q, lane, i) | fifth_of(r->qh, lane, i);
        const float product = f32_of_f16(r->d[lane]) * (float)q;
        return product + f32_of_f16(r->m[lane]);
    }
    case DTYPE_Q8_0: {
        const RecordQ80 *r = reinterpret_cast<const RecordQ80 *>(record);
        return f32_of_f16(r->d[lane]) * (float)((int)r->q[i / 4][4 * lane + i % 4] - 128);
    }
    case DTYPE_Q4_K: {
        const RecordQ4K *r = reinterpret_cast<const RecordQ4K *>(record);
        const float scale = f32_of_f16(r->d[lane]) * (float)r->sc[b][lane];
        const float min = f32_of_f16(r->dmin[lane]) * (float)r->m[b / 2][lane][b % 2];
        const float product = scale * (float)nibble_of(r->q[b], lane, e);
        return product - min;
    }
    case DTYPE_Q5_K: {
        const RecordQ5K *r = reinterpret_cast<const RecordQ5K *>(record);
        const float scale = f32_of_f16(r->d[lane]) * (float)r->sc[b][lane];
        const float min = f32_of_f16(r->dmin[lane]) * (float)r->m[b / 2][lane][b % 2];
        const int q = nibble_of(r->q[b], lane, e) | fifth_of(r->qh[b], lane, e);
        const float product = scale * (float)q;
        return product - min;
    }
    case DTYPE_Q6_K: {
        const RecordQ6K *r = reinterpret_cast<const RecordQ6K *>(record);
        const float scale = f32_of_f16(r->d[lane]) * (float)r->sc[b][lane][e / 16];
        const int high = r->qh[b][e / 16][4 * lane + e % 4] >> 2 * (e / 4 % 4) & 3;
        return scale * (float)((nibble_of(r->q[b], lane, e) | high << 4) - 32);
    }
    case DTYPE_F8_E4M3: {
        const RecordF8 *r = reinterpret_cast<const RecordF8 *>(record);
        return r->scale[lane] * f32_of_e4m3(r->q[i / 2][lane][i % 2]);
    }
    default:
        return 0.0f;
    }
}
