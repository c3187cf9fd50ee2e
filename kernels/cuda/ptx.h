/* The instructions that C++ has no name for, one function each, after the PTX ISA manual (8.x:
 * "Matrix multiply-accumulate", "cp.async"). A test's build has the same functions in C++
 * (tests/kernels/cuda_emulation/emulated_ptx.h).
 *
 * Fragments of m16n8k*: lane (g, t), g = lane / 4, t = lane % 4.
 *   C  c[0], c[1]: row g, columns 2t, 2t+1;  c[2], c[3]: row g + 8, the same columns
 *   A  8-bit,  k32: a[0]: row g, k 4t..4t+3;  a[1]: row g + 8;  a[2], a[3]: the same at k + 16
 *      16-bit, k16: a[0]: row g, k 2t, 2t+1;  a[1]: row g + 8;  a[2], a[3]: the same at k + 8
 *   B  8-bit,  k32: b[0]: column g, k 4t..4t+3;  b[1]: at k + 16
 *      16-bit, k16: b[0]: column g, k 2t, 2t+1;  b[1]: at k + 8
 * The element with the lowest k lies in the lowest bits of a register. */
#pragma once

#include "kernels/cuda/device.h"

#ifndef WEFT_CUDA_EMULATED

/* c += a b; a unsigned, b signed bytes; exact as long as no sum leaves int32. */
__device__ __forceinline__ void mma_u8_s8(int c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* c += a b in f32; products exact, the order of the sums is the hardware's. */
__device__ __forceinline__ void mma_bf16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_f16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Four 8 x 8 matrices of 16-bit elements out of shared memory; row r of matrix m is the 16 bytes
 * that lane 8m + r points to. r[m]: row g, columns 2t, 2t + 1. */
__device__ __forceinline__ void load_matrices(uint32_t r[4], const void *row)
{
    const unsigned from = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from));
}
/* The same; r[m]: column g, rows 2t, 2t + 1. */
__device__ __forceinline__ void load_matrices_transposed(uint32_t r[4], const void *row)
{
    const unsigned from = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from));
}

/* Two floats rounded to nearest even, `low` in the lower half. */
__device__ __forceinline__ uint32_t pack_bf16(float low, float high)
{
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ __forceinline__ uint32_t pack_f16(float low, float high)
{
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

/* Two f16 times 2^8. */
__device__ __forceinline__ uint32_t times_256(uint32_t both)
{
    uint32_t product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(both), "r"(0x5c005c00u));
    return product;
}

/* 2^x within 2 units of the last place; subnormal results are 0. Class fast only. */
__device__ __forceinline__ float fast_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 16 bytes from global to shared memory, or 16 zero bytes when not `there`; both aligned to 16. The
 * bytes are in place for this thread after wait_copies(). */
__device__ __forceinline__ void copy_to_shared(void *shared, const void *global, bool there)
{
    const unsigned to = (unsigned)__cvta_generic_to_shared(shared);
    const int size = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(size)
                 : "memory");
}
__device__ __forceinline__ void commit_copies()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}
/* Until at most N groups of commit_copies() are under way. */
template <int N> __device__ __forceinline__ void wait_copies()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#endif

/* Four e4m3 as f16, exactly: w[0] the lower two, w[1] the upper two. */
__device__ __forceinline__ void f16_of_e4m3(uint32_t four, uint32_t w[2])
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    asm("{\n.reg .b16 low, high;\n"
        "mov.b32 {low, high}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 %0, low;\n"
        "cvt.rn.f16x2.e4m3x2 %1, high;\n}"
        : "=r"(w[0]), "=r"(w[1])
        : "r"(four));
#else /* into the f16's bits, whose value is 2^-8 of it */
    const uint32_t low = __byte_perm(four, 0, 0x1404), high = __byte_perm(four, 0, 0x3424);
    w[0] = times_256((low & 0x80008000u) | (low >> 1 & 0x3f803f80u));
    w[1] = times_256((high & 0x80008000u) | (high >> 1 & 0x3f803f80u));
#endif
}
