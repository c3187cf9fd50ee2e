/* Quantised weights in registers: what a lane loads of a record (quant.h tells which part) and how
 * it becomes the A fragment of a matrix instruction. Loading and unpacking are apart, so that the
 * loads of several records are under way together. */
#pragma once

#include "kernels/cuda/ptx.h"
#include "kernels/cuda/quant.h"

/* The stored quants of one 32-block of outputs 2g (x) and 2g + 1 (y). */
struct Stored {
    uint2 q, q1; /* q1: Q8_0's row 2t + 1 */
    uint2 high;  /* fifth bits, or bits 4 and 5 */
};

__device__ __forceinline__ constexpr bool is_k_type(Dtype type)
{
    return type == DTYPE_Q4_K || type == DTYPE_Q5_K || type == DTYPE_Q6_K;
}
__device__ __forceinline__ constexpr bool has_minimum(Dtype type)
{
    return type == DTYPE_Q4_1 || type == DTYPE_Q5_1 || type == DTYPE_Q4_K || type == DTYPE_Q5_K;
}
/* What is subtracted from a stored quant. */
__device__ __forceinline__ constexpr int quant_offset(Dtype type)
{
    return type == DTYPE_Q4_0   ? 8
           : type == DTYPE_Q5_0 ? 16
           : type == DTYPE_Q6_K ? 32
           : type == DTYPE_Q8_0 ? 128
                                : 0;
}

template <Dtype T> struct RecordOf;
template <> struct RecordOf<DTYPE_Q4_0> {
    typedef RecordQ40 Type;
};
template <> struct RecordOf<DTYPE_Q4_1> {
    typedef RecordQ41 Type;
};
template <> struct RecordOf<DTYPE_Q5_0> {
    typedef RecordQ50 Type;
};
template <> struct RecordOf<DTYPE_Q5_1> {
    typedef RecordQ51 Type;
};
template <> struct RecordOf<DTYPE_Q8_0> {
    typedef RecordQ80 Type;
};
template <> struct RecordOf<DTYPE_Q4_K> {
    typedef RecordQ4K Type;
};
template <> struct RecordOf<DTYPE_Q5_K> {
    typedef RecordQ5K Type;
};
template <> struct RecordOf<DTYPE_Q6_K> {
    typedef RecordQ6K Type;
};
template <> struct RecordOf<DTYPE_F8_E4M3> {
    typedef RecordF8 Type;
};
/* 32-blocks of a record. */
__device__ __forceinline__ constexpr unsigned record_blocks(Dtype type)
{
    return is_k_type(type) ? 8 : type == DTYPE_F8_E4M3 ? 4 : 1;
}

/* 32-block b of a record (0 where a record is one block). */
template <Dtype T>
__device__ __forceinline__ Stored load_stored(const uint8_t *record, unsigned b, unsigned g,
                                              unsigned t)
{
    const auto *r = reinterpret_cast<const typename RecordOf<T>::Type *>(record);
    Stored s = {};
    if constexpr (T == DTYPE_Q8_0) {
        s.q = load_vector<uint2>(r->q[2 * t] + 8 * g);
        s.q1 = load_vector<uint2>(r->q[2 * t + 1] + 8 * g);
    } else if constexpr (is_k_type(T)) {
        s.q = load_vector<uint2>(r->q[b][t] + 8 * g);
        if constexpr (T == DTYPE_Q5_K) {
            s.high = load_vector<uint2>(r->qh[b] + 8 * g);
        }
        if constexpr (T == DTYPE_Q6_K) {
            s.high = load_vector<uint2>(r->qh[b][t / 2] + 8 * g);
        }
    } else {
        s.q = load_vector<uint2>(r->q[t] + 8 * g);
        if constexpr (T == DTYPE_Q5_0 || T == DTYPE_Q5_1) {
            s.high = load_vector<uint2>(r->qh + 8 * g);
        }
    }
    return s;
}

/* Upper bits of k group `group` (4t.. of a 32-block), in place above the nibble. */
template <Dtype T> __device__ __forceinline__ uint32_t upper_bits(uint32_t high, unsigned group)
{
    if constexpr (T == DTYPE_Q5_0 || T == DTYPE_Q5_1 || T == DTYPE_Q5_K) {
        return (high >> group & 0x01010101u) << 4;
    }
    if constexpr (T == DTYPE_Q6_K) {
        return (high >> 2 * (group % 4) & 0x03030303u) << 4;
    }
    return 0;
}

/* A fragment: rows are outputs 2g and 2g + 1 (for g and g + 8), k groups 2t and 2t + 1. */
template <Dtype T>
__device__ __forceinline__ void unpack(const Stored &s, unsigned t, uint32_t a[4])
{
    if constexpr (T == DTYPE_Q8_0) {
        a[0] = s.q.x;
        a[1] = s.q.y;
        a[2] = s.q1.x;
        a[3] = s.q1.y;
    } else {
        a[0] = (s.q.x & 0x0f0f0f0fu) | upper_bits<T>(s.high.x, 2 * t);
        a[1] = (s.q.y & 0x0f0f0f0fu) | upper_bits<T>(s.high.y, 2 * t);
        a[2] = (s.q.x >> 4 & 0x0f0f0f0fu) | upper_bits<T>(s.high.x, 2 * t + 1);
        a[3] = (s.q.y >> 4 & 0x0f0f0f0fu) | upper_bits<T>(s.high.y, 2 * t + 1);
    }
}

/* ---- 8-bit floats ----
 * Rows of a record are 32 bytes: pairs of k of 16 outputs; a lane's four bytes of one are two k of
 * outputs 2g and 2g + 1. Of a 32-block's 16 rows it has four: t, t + 4, ..., so that a warp's load
 * is one line of the cache; or 4t, 4t + 1, ...: k 8t..8t+7. */
struct StoredF8 {
    uint32_t q[4];
};
enum F8Rows { F8_LINES, F8_ADJACENT };

template <F8Rows R>
__device__ __forceinline__ StoredF8 load_f8(const RecordF8 *r, unsigned b, unsigned g, unsigned t)
{
    StoredF8 s;
#pragma unroll
    for (unsigned i = 0; i < 4; i++) {
        const unsigned row = 16 * b + (R == F8_LINES ? 4 * i + t : 4 * t + i);
        s.q[i] = *reinterpret_cast<const uint32_t *>(r->q[row][2 * g]);
    }
    return s;
}

/* Where those who load lines find element k of an activation row: a lane's eight are adjacent. */
__host__ __device__ static inline uint32_t f8_position(uint32_t k)
{
    const uint32_t pair = k % 32 / 2;
    return k / 32 * 32 + pair % 4 * 8 + pair / 4 * 2 + k % 2;
}

/* w[o][i]: output 2g + o, the lane's pair i, as f16. */
__device__ __forceinline__ void widen_f8(const StoredF8 &s, uint32_t w[2][4])
{
#pragma unroll
    for (unsigned i = 0; i < 4; i++) {
        uint32_t both[2];
        f16_of_e4m3(s.q[i], both);
        w[0][i] = both[0];
        w[1][i] = both[1];
    }
}

/* Two numbers, of outputs 2g and 2g + 1 or of rows 2t and 2t + 1. */
struct Pair {
    float x, y;
};
/* Scales of outputs 2g and 2g + 1 as they are stored, and as numbers. */
__device__ __forceinline__ uint32_t load_scales(const uint16_t *scales, unsigned g)
{
    return *reinterpret_cast<const uint32_t *>(scales + 2 * g);
}
__device__ __forceinline__ Pair scales_of(uint32_t both)
{
    return {f32_of_f16((uint16_t)both), f32_of_f16((uint16_t)(both >> 16))};
}
