/* What the attention kernels of class fast share: 16-bit operands of f32 numbers by type, and sums
 * over the lanes that share a row of a matrix instruction's result. Included by .cu files only. */
#pragma once

#include "kernels/cuda/device.h"
#include "kernels/cuda/ptx.h"

/* bf16 where the cache is bf16, else f16. */
template <KvType T> __device__ __forceinline__ uint32_t pack(float low, float high)
{
    return T == KV_BF16 ? pack_bf16(low, high) : pack_f16(low, high);
}

template <KvType T>
__device__ __forceinline__ void multiply(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    if constexpr (T == KV_BF16) {
        mma_bf16(c, a, b0, b1);
    } else {
        mma_f16(c, a, b0, b1);
    }
}

/* Sums and maxima over the four lanes that share a row. */
__device__ __forceinline__ float quad_max(float x)
{
    for (unsigned other = 1; other < 4; other *= 2) {
        const float theirs = __shfl_xor_sync(ALL_LANES, x, other);
        x = x > theirs ? x : theirs;
    }
    return x;
}
__device__ __forceinline__ float quad_sum(float x)
{
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}
