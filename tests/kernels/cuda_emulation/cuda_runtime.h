/* CUDA's execution model on one CPU thread, so that kernels/cuda/<name>.cu compile with g++ and
 * run: threads of a block are fibers (emulation.cc) that change place at barriers and warp-wide
 * operations only. What is checked: every thread of a block meets the same barrier, every thread of
 * a warp the same warp-wide operation; accesses outside shared memory and buffers (built with
 * AddressSanitizer); vector loads are aligned; shared memory is full of NaN when a block starts.
 * What is not: the memory model, timing, and what real instructions do. */
#pragma once

#include "cuda_runtime_api.h"

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>

#define WEFT_CUDA_EMULATED 1
#define __global__
#define __device__
#define __host__
#define __shared__ /* dynamic only: kernels/cuda/device.h, dynamic_shared() */
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

/* ---- vectors ---- */

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
static inline uint2 make_uint2(unsigned x, unsigned y)
{
    return {x, y};
}
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w)
{
    return {x, y, z, w};
}
static inline int2 make_int2(int x, int y)
{
    return {x, y};
}
static inline float2 make_float2(float x, float y)
{
    return {x, y};
}
static inline float4 make_float4(float x, float y, float z, float w)
{
    return {x, y, z, w};
}

/* ---- where a thread is ---- */

struct EmulatedThread {
    uint3 index;
    unsigned lane, warp;
};
extern EmulatedThread *emulated_thread;
extern uint3 emulated_block;
extern dim3 emulated_block_dim, emulated_grid_dim;
#define threadIdx (emulated_thread->index)
#define blockIdx emulated_block
#define blockDim emulated_block_dim
#define gridDim emulated_grid_dim
#define warpSize 32

/* ---- barriers and warp-wide operations ---- */

enum { EMULATED_SLOT_BYTES = 32 };
typedef unsigned char EmulatedSlot[EMULATED_SLOT_BYTES];
void emulated_barrier(const char *site);
/* Gives `size` bytes of this lane to its warp and returns those of all 32 lanes, valid until the
 * lane's next call. */
const EmulatedSlot *emulated_gather(const char *site, unsigned mask, const void *value,
                                    size_t size);
void emulated_check_aligned(const void *pointer, size_t alignment);

#define EMULATED_TEXT_(x) #x
#define EMULATED_TEXT(x) EMULATED_TEXT_(x)
#define __syncthreads() emulated_barrier(__FILE__ ":" EMULATED_TEXT(__LINE__))
#define __syncwarp() (void)emulated_gather(__FILE__ ":" EMULATED_TEXT(__LINE__), ~0u, "", 1)

template <typename T>
static inline T emulated_shuffle(const char *site, unsigned mask, T value, unsigned from)
{
    const EmulatedSlot *slots = emulated_gather(site, mask, &value, sizeof value);
    T out;
    std::memcpy(&out, slots[from & 31u], sizeof out);
    return out;
}
#define EMULATED_SITE __FILE__ ":" EMULATED_TEXT(__LINE__)
#define __shfl_sync(mask, value, from) emulated_shuffle(EMULATED_SITE, mask, value, from)
#define __shfl_xor_sync(mask, value, other)                                                        \
    emulated_shuffle(EMULATED_SITE, mask, value, emulated_thread->lane ^ (unsigned)(other))
static inline unsigned emulated_ballot(const char *site, unsigned mask, bool predicate)
{
    const EmulatedSlot *slots = emulated_gather(site, mask, &predicate, 1);
    unsigned out = 0;
    for (unsigned lane = 0; lane < 32; lane++) {
        out |= (unsigned)(slots[lane][0] != 0) << lane;
    }
    return out;
}
#define __ballot_sync(mask, predicate) emulated_ballot(EMULATED_SITE, mask, (predicate) != 0)

/* ---- arithmetic ---- */

static inline int __float_as_int(float f)
{
    int i;
    std::memcpy(&i, &f, sizeof i);
    return i;
}
static inline float __int_as_float(int i)
{
    float f;
    std::memcpy(&f, &i, sizeof f);
    return f;
}
static inline unsigned __umulhi(unsigned a, unsigned b)
{
    return (unsigned)((uint64_t)a * b >> 32);
}
static inline uint64_t __umul64hi(uint64_t a, uint64_t b)
{
    return (uint64_t)((unsigned __int128)a * b >> 64);
}
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector)
{
    const uint64_t bytes = (uint64_t)b << 32 | a;
    unsigned out = 0;
    for (unsigned i = 0; i < 4; i++) {
        out |= (unsigned)(bytes >> 8 * (selector >> 4 * i & 7u) & 255u) << 8 * i;
    }
    return out;
}

/* ---- launches ---- */

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    void *attrs;
    unsigned numAttrs;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <typename Kernel>
static inline cudaError_t cudaFuncSetAttribute(Kernel *, cudaFuncAttribute, int bytes)
{
    return bytes <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t emulated_launch(const cudaLaunchConfig_t *config, const std::function<void()> &body);
template <typename... Parameters, typename... Arguments>
static inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config,
                                             void (*kernel)(Parameters...), Arguments... arguments)
{
    const std::tuple<Parameters...> copy(arguments...);
    return emulated_launch(config, [&] { std::apply(kernel, copy); });
}

#include "emulated_ptx.h"
