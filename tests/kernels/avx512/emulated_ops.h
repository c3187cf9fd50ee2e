/* The further AVX-512 intrinsics that kernels/avx512/vec.h uses, as in emulated.h. */
#pragma once

#include "tests/kernels/avx512/emulated.h"

#include <math.h>

#define F32(x) (((Emu)(x)).f32)
#define U32(x) (((Emu)(x)).u32)

EMU_PS(emu_add_ps, (__m512 a, __m512 b), F32(a)[i] + F32(b)[i])
EMU_PS(emu_sub_ps, (__m512 a, __m512 b), F32(a)[i] - F32(b)[i])
EMU_PS(emu_div_ps, (__m512 a, __m512 b), F32(a)[i] / F32(b)[i])
EMU_PS(emu_sqrt_ps, (__m512 a), sqrtf(F32(a)[i]))
EMU_PS(emu_max_ps, (__m512 a, __m512 b), F32(a)[i] > F32(b)[i] ? F32(a)[i] : F32(b)[i])
EMU_PS(emu_mask_blend_ps, (__mmask16 k, __m512 a, __m512 b),
       (k >> i & 1) != 0 ? F32(b)[i] : F32(a)[i])
EMU_PS(emu_mask_add_ps, (__m512 from, __mmask16 k, __m512 a, __m512 b),
       (k >> i & 1) != 0 ? F32(a)[i] + F32(b)[i] : F32(from)[i])
EMU_SI(emu_maskz_add_epi32, (__mmask16 k, __m512i a, __m512i b), 16, u32,
       (k >> i & 1) != 0 ? U32(a)[i] + U32(b)[i] : 0u)
EMU_PS(emu_moveldup_ps, (__m512 a), F32(a)[i & ~1])
EMU_PS(emu_movehdup_ps, (__m512 a), F32(a)[i | 1])
EMU_PS(emu_permutexvar_ps, (__m512i index, __m512 a), F32(a)[U32(index)[i] & 15])
/* In each 128-bit part: words of a and b in turns, from the lower or the upper half. */
EMU_PS(emu_unpacklo_ps, (__m512 a, __m512 b), F32((i & 1) != 0 ? b : a)[(i & ~3) + (i & 3) / 2])
EMU_PS(emu_unpackhi_ps, (__m512 a, __m512 b), F32((i & 1) != 0 ? b : a)[(i & ~3) + 2 + (i & 3) / 2])
/* In each part: words 0 and 1 chosen from a, 2 and 3 from b, two bits each. */
EMU_PS(emu_shuffle_ps, (__m512 a, __m512 b, int choice),
       F32((i & 2) != 0 ? b : a)[(i & ~3) + (choice >> 2 * (i & 3) & 3)])
/* Whole parts: 0 and 1 chosen from a, 2 and 3 from b. */
EMU_PS(emu_shuffle_f32x4, (__m512 a, __m512 b, int choice),
       F32(i >= 8 ? b : a)[4 * (choice >> 2 * (i / 4) & 3) + i % 4])

EMU_SI(emu_xor_si512, (__m512i a, __m512i b), 16, u32, U32(a)[i] ^ U32(b)[i])
EMU_SI(emu_srli_epi32, (__m512i a, unsigned n), 16, u32, U32(a)[i] >> n)
EMU_SI(emu_mask_blend_epi32, (__mmask16 k, __m512i a, __m512i b), 16, u32,
       (k >> i & 1) != 0 ? U32(b)[i] : U32(a)[i])

EMU __m512i emu_cvtepi8_epi32(__m128i a)
{
    int8_t in[16];
    Emu out;
    memcpy(in, &a, sizeof in);
    for (int i = 0; i < 16; i++) {
        out.i32[i] = in[i];
    }
    return out.si;
}

/* Lane i of eight 64-bit lanes. */
static inline uint64_t emu_u64(__m512i a, int i)
{
    return (uint64_t)U32(a)[2 * i + 1] << 32 | U32(a)[2 * i];
}
#define EMU_SI64(name, params, expression)                                                         \
    EMU __m512i name params                                                                        \
    {                                                                                              \
        Emu out;                                                                                   \
        for (int i = 0; i < 8; i++) {                                                              \
            const uint64_t lane = expression;                                                      \
            out.u32[2 * i] = (uint32_t)lane;                                                       \
            out.u32[2 * i + 1] = (uint32_t)(lane >> 32);                                           \
        }                                                                                          \
        return out.si;                                                                             \
    }
EMU_SI64(emu_mul_epu32, (__m512i a, __m512i b),
         (emu_u64(a, i) & 0xffffffffu) * (emu_u64(b, i) & 0xffffffffu))
EMU_SI64(emu_slli_epi64, (__m512i a, unsigned n), emu_u64(a, i) << n)
EMU_SI64(emu_srli_epi64, (__m512i a, unsigned n), emu_u64(a, i) >> n)

#define EMU_MASK(name, params, expression)                                                         \
    EMU __mmask16 name params                                                                      \
    {                                                                                              \
        unsigned mask = 0;                                                                         \
        for (int i = 0; i < 16; i++) {                                                             \
            mask |= (unsigned)(expression) << i;                                                   \
        }                                                                                          \
        return (__mmask16)mask;                                                                    \
    }
EMU_MASK(emu_cmpeq_epi32_mask, (__m512i a, __m512i b), U32(a)[i] == U32(b)[i])
EMU_MASK(emu_cmplt_epi32_mask, (__m512i a, __m512i b), ((Emu)a).i32[i] < ((Emu)b).i32[i])
EMU_MASK(emu_cmp_nle, (__m512 a, __m512 b), !(F32(a)[i] <= F32(b)[i]))
EMU_MASK(emu_cmp_lt, (__m512 a, __m512 b), F32(a)[i] < F32(b)[i])
EMU_MASK(emu_cmp_unordered, (__m512 a, __m512 b), F32(a)[i] != F32(a)[i] || F32(b)[i] != F32(b)[i])

EMU __mmask16 emu_cmp_ps_mask(__m512 a, __m512 b, int predicate)
{
    return predicate == _CMP_NLE_UQ   ? emu_cmp_nle(a, b)
           : predicate == _CMP_LT_OQ  ? emu_cmp_lt(a, b)
           : predicate == _CMP_NLT_UQ ? (__mmask16)~emu_cmp_lt(a, b)
                                      : emu_cmp_unordered(a, b);
}

EMU __m512i emu_set_epi32(int f, int e, int d, int c, int b, int a, int n9, int n8, int n7, int n6,
                          int n5, int n4, int n3, int n2, int n1, int n0)
{
    const Emu out = {.i32 = {n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, a, b, c, d, e, f}};
    return out.si;
}

EMU void emu_storeu_ps(void *p, __m512 a)
{
    memcpy(p, &a, sizeof a);
}

EMU __m512 emu_maskz_loadu_ps(__mmask16 k, const float *p)
{
    Emu out;
    for (int i = 0; i < 16; i++) {
        out.f32[i] = (k >> i & 1) != 0 ? p[i] : 0.0f;
    }
    return out.ps;
}

EMU void emu_mask_storeu_ps(float *p, __mmask16 k, __m512 a)
{
    for (int i = 0; i < 16; i++) {
        if ((k >> i & 1) != 0) {
            p[i] = F32(a)[i];
        }
    }
}

EMU __m256 emu_half(__m512 a, int upper)
{
    return ((Emu)a).half[upper];
}

EMU __m512 emu_widen(__m256 a)
{
    const Emu out = {.half = {a, a}}; /* the upper half is undefined */
    return out.ps;
}

EMU __m256i emu_cvtps_ph(__m512 a)
{
    return _mm256_set_m128i(_mm256_cvtps_ph(emu_half(a, 1), _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(emu_half(a, 0), _MM_FROUND_TO_NEAREST_INT));
}

EMU __m512i emu_cvtepu16_epi32(__m256i a)
{
    uint16_t in[16];
    Emu out;
    memcpy(in, &a, sizeof in);
    for (int i = 0; i < 16; i++) {
        out.u32[i] = in[i];
    }
    return out.si;
}

EMU __m256i emu_cvtepi32_epi16(__m512i a)
{
    uint16_t out[16];
    __m256i packed;
    for (int i = 0; i < 16; i++) {
        out[i] = (uint16_t)U32(a)[i];
    }
    memcpy(&packed, out, sizeof packed);
    return packed;
}

#undef _mm512_shuffle_ps
#undef _mm512_shuffle_f32x4
#undef _mm512_cmp_ps_mask
#undef _mm512_cvtps_ph
#undef _mm512_extractf64x4_pd
#undef _mm512_slli_epi64
#undef _mm512_srli_epi64
#undef _mm512_srli_epi32
#define _mm512_cvtepi8_epi32 emu_cvtepi8_epi32
#define _mm512_add_ps emu_add_ps
#define _mm512_sub_ps emu_sub_ps
#define _mm512_div_ps emu_div_ps
#define _mm512_max_ps emu_max_ps
#define _mm512_sqrt_ps emu_sqrt_ps
#define _mm512_mask_blend_ps emu_mask_blend_ps
#define _mm512_mask_add_ps emu_mask_add_ps
#define _mm512_maskz_add_epi32 emu_maskz_add_epi32
#define _mm512_moveldup_ps emu_moveldup_ps
#define _mm512_movehdup_ps emu_movehdup_ps
#define _mm512_permutexvar_ps emu_permutexvar_ps
#define _mm512_unpacklo_ps emu_unpacklo_ps
#define _mm512_unpackhi_ps emu_unpackhi_ps
#define _mm512_shuffle_ps emu_shuffle_ps
#define _mm512_shuffle_f32x4 emu_shuffle_f32x4
#define _mm512_xor_si512 emu_xor_si512
#define _mm512_srli_epi32 emu_srli_epi32
#define _mm512_mask_blend_epi32 emu_mask_blend_epi32
#define _mm512_mul_epu32 emu_mul_epu32
#define _mm512_slli_epi64 emu_slli_epi64
#define _mm512_srli_epi64 emu_srli_epi64
#define _mm512_cmpeq_epi32_mask emu_cmpeq_epi32_mask
#define _mm512_cmplt_epi32_mask emu_cmplt_epi32_mask
#define _mm512_cmp_ps_mask emu_cmp_ps_mask
#define _mm512_set_epi32 emu_set_epi32
#define _mm512_storeu_ps emu_storeu_ps
#define _mm512_maskz_loadu_ps emu_maskz_loadu_ps
#define _mm512_mask_storeu_ps emu_mask_storeu_ps
#define _mm512_cvtps_ph(a, rounding) emu_cvtps_ph(a)
#define _mm512_cvtepu16_epi32 emu_cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emu_cvtepi32_epi16
/* casts change no bit */
#define _mm512_castps_si512(a) (((Emu){.ps = (a)}).si)
#define _mm512_castps_pd(a) (a)
#define _mm512_castps512_ps256(a) emu_half(a, 0)
#define _mm512_castps512_ps128(a) _mm256_castps256_ps128(emu_half(a, 0))
#define _mm512_extractf64x4_pd(a, upper) _mm256_castps_pd(emu_half(a, upper))
#define _mm512_castps256_ps512 emu_widen
