/* What every kernel of this room is written with. Included by .cu files only.
 *
 * The arithmetic is that of kernels/generic: fmaf where the specification has one, no contraction
 * (nvcc --fmad=false), IEEE division and square root, subnormals kept (nvcc's defaults, stated in
 * meson.build), the one exponential of ops/math.h. So an op whose specification is a chain per
 * output gives the specification's bits here, too. */
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#define KERNEL_INLINE static __host__ __device__ inline
#define _Static_assert static_assert
extern "C" {
#include "kernels/cuda/launch.h"
#include "kernels/ops/math.h"
#include "kernels/ops/packed.h"
}

#define WARP 32u
#define ALL_LANES 0xffffffffu

#ifndef WEFT_CUDA_EMULATED
extern __shared__ __align__(128) unsigned char shared_bytes[];
#else
extern unsigned char shared_bytes[];
#endif

/* The block's shared memory, of the size that its launch asked for. */
template <typename T> __device__ __forceinline__ T *dynamic_shared(size_t offset_bytes = 0)
{
    return reinterpret_cast<T *>(shared_bytes + offset_bytes);
}

__device__ __forceinline__ unsigned lane_index()
{
    return threadIdx.x % WARP;
}
__device__ __forceinline__ unsigned warp_index()
{
    return threadIdx.x / WARP;
}

/* ---- memory ---- */

/* T is a vector type, loaded by one instruction: the address is a multiple of its size. */
template <typename T, typename P> __device__ __forceinline__ T load_vector(const P *p)
{
#ifdef WEFT_CUDA_EMULATED
    emulated_check_aligned(p, sizeof(T));
#endif
    return *reinterpret_cast<const T *>(p);
}
template <typename T, typename P> __device__ __forceinline__ void store_vector(P *p, T value)
{
#ifdef WEFT_CUDA_EMULATED
    emulated_check_aligned(p, sizeof(T));
#endif
    *reinterpret_cast<T *>(p) = value;
}

/* ---- 16-bit floats, as bits (proto/model/blocks.h has the same for the host) ---- */

__device__ __forceinline__ float f32_of_bf16(uint16_t bits)
{
    return float_of_bits((uint32_t)bits << 16);
}
/* Nearest even; a NaN stays one. */
__device__ __forceinline__ uint16_t bf16_of_f32(float f)
{
    const uint32_t bits = float_bits(f);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (uint16_t)(bits >> 16 | 0x40u);
    }
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
#ifndef WEFT_CUDA_EMULATED
#include <cuda_fp16.h>
__device__ __forceinline__ float f32_of_f16(uint16_t bits)
{
    return __half2float(__ushort_as_half(bits));
}
__device__ __forceinline__ uint16_t f16_of_f32(float f)
{
    return __half_as_ushort(__float2half_rn(f));
}
#else
static inline float f32_of_f16(uint16_t bits)
{
    return f16_to_f32(bits);
}
static inline uint16_t f16_of_f32(float f)
{
    return f32_to_f16(f);
}
#endif

/* ---- 8-bit floats: e4m3, as bits ---- */

/* Its bits in those of an f16 are its value times 2^-8, subnormals included. */
__device__ __forceinline__ float f32_of_e4m3(uint8_t bits)
{
    return f32_of_f16((uint16_t)((bits & 0x80u) << 8 | (bits & 0x7fu) << 7)) * 256.0f;
}
/* Nearest even of a finite number; beyond 448 the nearest is 448. */
__device__ __forceinline__ uint8_t e4m3_of_f32(float f)
{
    const uint32_t sign = float_bits(f) >> 24 & 0x80u;
    const float most = fabsf(f), magnitude = most < 448.0f ? most : 448.0f;
    if (magnitude < 0x1p-6f) { /* steps of 2^-9; eight of them are the bits of 2^-6 */
        return (uint8_t)(sign | (uint32_t)rintf(magnitude * 512.0f));
    }
    const uint32_t bits = float_bits(magnitude);
    const uint32_t code = ((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3);
    return (uint8_t)(sign | code);
}

/* ---- sums and maxima in a warp ---- */

/* node(0,32) of the lanes, neighbours first (NUMERICS 4); every lane gets it. */
__device__ __forceinline__ float warp_fold(float lane)
{
    for (unsigned other = 1; other < WARP; other *= 2) {
        lane += __shfl_xor_sync(ALL_LANES, lane, other);
    }
    return lane;
}

__device__ __forceinline__ float warp_max(float lane)
{
    for (unsigned other = 1; other < WARP; other *= 2) {
        const float theirs = __shfl_xor_sync(ALL_LANES, lane, other);
        lane = lane > theirs ? lane : theirs;
    }
    return lane;
}

/* ---- launches ---- */

static inline unsigned blocks_of(size_t n, unsigned per_block)
{
    return (unsigned)((n + per_block - 1) / per_block);
}

/* Starts kernel(arguments...) on the stream; returns 0 or CUDA's error number. A grid without a
 * block is no launch. */
template <typename... Parameters, typename... Arguments>
static int launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared_size,
                  WeftCudaStream stream, Arguments... arguments)
{
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) {
        return 0;
    }
    if (shared_size > 48 * 1024) {
        const cudaError_t error = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_size);
        if (error != cudaSuccess) {
            return (int)error;
        }
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_size;
    config.stream = stream;
    return (int)cudaLaunchKernelEx(&config, kernel, arguments...);
}
