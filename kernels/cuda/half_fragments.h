/* Weights as bf16 fragments: what a lane holds of a 32-block of a panel's 16 outputs. Lane (g, t)
 * has outputs 2g and 2g + 1 and k 8t..8t+7 of the block: two steps of m16n8k16, and 16 bytes of a
 * row of bf16. Class fast only. */
#pragma once

#include "kernels/cuda/fragments.h"
#include "kernels/cuda/ptx.h"

/* One 32-block as it is stored: quants and the block's numbers, or floats. */
template <Dtype T> struct HalfStored {
    Stored q;
    StoredF8 f8;
    uint32_t d, m;     /* f16 of outputs 2g (low) and 2g + 1; F8_E4M3: f32 of each */
    uint32_t sc, mins; /* K-quants: bytes of outputs 2g, 2g + 1 */
    uint32_t floats[T == DTYPE_BF16 || T == DTYPE_F16 ? 8 : 1];
};

template <Dtype T> __device__ __forceinline__ constexpr bool is_half()
{
    return T == DTYPE_BF16 || T == DTYPE_F16;
}

/* Floats of k 8t.. of block `block`; what lies behind n_in is zero. */
template <Dtype T>
__device__ __forceinline__ void load_floats(const uint8_t *panel, uint32_t block, uint32_t n_in,
                                            unsigned g, unsigned t, uint32_t floats[8])
{
    const uint32_t k = 32 * block + 8 * t;
    if constexpr (T == DTYPE_BF16) {
        const RecordBF16 *records = reinterpret_cast<const RecordBF16 *>(panel);
#pragma unroll
        for (unsigned i = 0; i < 4; i++) {
            const uint2 both = k + 2 * i < n_in ? load_vector<uint2>(records[k / 2 + i].w[2 * g])
                                                : make_uint2(0, 0);
            floats[2 * i] = both.x;
            floats[2 * i + 1] = both.y;
        }
    } else {
        const RecordF16 *records = reinterpret_cast<const RecordF16 *>(panel);
#pragma unroll
        for (unsigned i = 0; i < 8; i++) {
            floats[i] =
                k + i < n_in ? *reinterpret_cast<const uint32_t *>(records[k + i].w + 2 * g) : 0;
        }
    }
}

template <Dtype T>
__device__ __forceinline__ HalfStored<T> load_half(const uint8_t *panel, uint32_t block,
                                                   uint32_t n_in)
{
    const unsigned g = lane_index() / 4, t = lane_index() % 4;
    HalfStored<T> s = {};
    if constexpr (is_half<T>()) {
        load_floats<T>(panel, block, n_in, g, t, s.floats);
    } else {
        typedef typename RecordOf<T>::Type Record;
        const unsigned b = block % record_blocks(T);
        const Record *r = reinterpret_cast<const Record *>(panel) + block / record_blocks(T);
        if constexpr (T == DTYPE_F8_E4M3) {
            const uint2 both = load_vector<uint2>(r->scale + 2 * g);
            s.f8 = load_f8<F8_ADJACENT>(r, b, g, t);
            s.d = both.x;
            s.m = both.y;
            return s;
        } else {
            s.q = load_stored<T>(reinterpret_cast<const uint8_t *>(r), b, g, t);
            s.d = load_scales(r->d, g);
        }
        if constexpr (T == DTYPE_Q4_1 || T == DTYPE_Q5_1) {
            s.m = load_scales(r->m, g);
        }
        if constexpr (T == DTYPE_Q4_K || T == DTYPE_Q5_K) {
            s.m = load_scales(r->dmin, g);
            s.sc = *reinterpret_cast<const uint16_t *>(r->sc[b] + 2 * g);
            s.mins = r->m[b / 2][2 * g][b % 2] | (uint32_t)r->m[b / 2][2 * g + 1][b % 2] << 8;
        }
        if constexpr (T == DTYPE_Q6_K) { /* lanes t = 0, 1 have the first 16 k */
            s.sc = (uint8_t)r->sc[b][2 * g][t / 2] | (uint32_t)(uint8_t)r->sc[b][2 * g + 1][t / 2]
                                                         << 8;
        }
    }
    return s;
}

/* Scale and minimum of outputs 2g and 2g + 1: a value is scale * (q - offset) + minimum. */
template <Dtype T>
__device__ __forceinline__ void numbers_of(const HalfStored<T> &s, Pair *scale, Pair *minimum)
{
    *scale = scales_of(s.d);
    *minimum = scales_of(s.m);
    if constexpr (T == DTYPE_Q4_K || T == DTYPE_Q5_K) {
        scale->x *= (float)(s.sc & 255u);
        scale->y *= (float)(s.sc >> 8);
        minimum->x *= -(float)(s.mins & 255u);
        minimum->y *= -(float)(s.mins >> 8);
    }
    if constexpr (T == DTYPE_Q6_K) {
        scale->x *= (float)(int8_t)s.sc;
        scale->y *= (float)(int8_t)(s.sc >> 8);
    }
}

/* Quant i of four, as a float without its offset: 2^23 + q out of a byte, less what is too much. */
template <Dtype T> __device__ __forceinline__ float quant_float(uint32_t four, unsigned i)
{
    const uint32_t bits = __byte_perm(four, 0x4b000000u, 0x7440u | i);
    return __int_as_float((int)bits) - (8388608.0f + (float)quant_offset(T));
}

/* Four values of one output as two registers of pairs. */
template <Dtype T>
__device__ __forceinline__ void four_values(uint32_t four, float scale, float minimum,
                                            uint32_t w[2])
{
    float v[4];
#pragma unroll
    for (unsigned i = 0; i < 4; i++) {
        v[i] = scale * quant_float<T>(four, i);
        if constexpr (has_minimum(T)) {
            v[i] = v[i] + minimum;
        }
    }
    w[0] = pack_bf16(v[0], v[1]);
    w[1] = pack_bf16(v[2], v[3]);
}

__device__ __forceinline__ uint32_t bf16_of_two_f16(uint32_t first, uint32_t second, unsigned shift)
{
    return pack_bf16(f32_of_f16((uint16_t)(first >> shift)),
                     f32_of_f16((uint16_t)(second >> shift)));
}

/* Both f16 times the scale. */
__device__ __forceinline__ uint32_t bf16_of_scaled(uint32_t both, float scale)
{
    return pack_bf16(scale * f32_of_f16((uint16_t)both),
                     scale * f32_of_f16((uint16_t)(both >> 16)));
}

/* w[o][i]: output 2g + o, k 8t + 2i and + 1, rounded to nearest even. */
template <Dtype T>
__device__ __forceinline__ void half_values(const HalfStored<T> &s, uint32_t w[2][4])
{
    if constexpr (T == DTYPE_BF16) {
#pragma unroll
        for (unsigned i = 0; i < 4; i++) {
            w[0][i] = s.floats[2 * i];
            w[1][i] = s.floats[2 * i + 1];
        }
    } else if constexpr (T == DTYPE_F16) {
#pragma unroll
        for (unsigned i = 0; i < 4; i++) {
            w[0][i] = bf16_of_two_f16(s.floats[2 * i], s.floats[2 * i + 1], 0);
            w[1][i] = bf16_of_two_f16(s.floats[2 * i], s.floats[2 * i + 1], 16);
        }
    } else if constexpr (T == DTYPE_F8_E4M3) {
        widen_f8(s.f8, w);
#pragma unroll
        for (unsigned i = 0; i < 4; i++) {
            w[0][i] = bf16_of_scaled(w[0][i], float_of_bits(s.d));
            w[1][i] = bf16_of_scaled(w[1][i], float_of_bits(s.m));
        }
    } else {
        uint32_t a[4];
        Pair scale, minimum;
        unpack<T>(s.q, lane_index() % 4, a);
        numbers_of<T>(s, &scale, &minimum);
        four_values<T>(a[0], scale.x, minimum.x, w[0]);
        four_values<T>(a[2], scale.x, minimum.x, w[0] + 2);
        four_values<T>(a[1], scale.y, minimum.y, w[1]);
        four_values<T>(a[3], scale.y, minimum.y, w[1] + 2);
    }
}
