/* The vocabulary of kernels/vector in 8 lanes (AVX2, FMA, F16C). kernels/avx512/vec.h has the same
 * names in 16. */
#pragma once

#include "kernels/ops/math.h"
#include "kernels/ops/philox.h"

#include <immintrin.h>
#include <stdint.h>

#define VEC_LANES 8u
typedef __m256 Vec;
typedef __m256i VecInt;

#define VEC_FN static inline __attribute__((always_inline, unused))

VEC_FN Vec vec_load(const float *p)
{
    return _mm256_loadu_ps(p);
}

VEC_FN void vec_store(float *p, Vec v)
{
    _mm256_storeu_ps(p, v);
}

/* All ones in lanes [low, high), high >= 0. */
VEC_FN Vec vec_mask(int low, int high)
{
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(low), lane);
    return _mm256_castsi256_ps(
        _mm256_andnot_si256(below, _mm256_cmpgt_epi32(_mm256_set1_epi32(high), lane)));
}

/* The first n <= VEC_LANES lanes; the others are +0 and their memory is not touched. */
VEC_FN Vec vec_load_first(const float *p, uint32_t n)
{
    return _mm256_maskload_ps(p, _mm256_castps_si256(vec_mask(0, (int)n)));
}

VEC_FN void vec_store_first(float *p, Vec v, uint32_t n)
{
    _mm256_maskstore_ps(p, _mm256_castps_si256(vec_mask(0, (int)n)), v);
}

VEC_FN Vec vec_all(float x)
{
    return _mm256_set1_ps(x);
}

VEC_FN Vec vec_zero(void)
{
    return _mm256_setzero_ps();
}

VEC_FN Vec vec_add(Vec a, Vec b)
{
    return _mm256_add_ps(a, b);
}

VEC_FN Vec vec_sub(Vec a, Vec b)
{
    return _mm256_sub_ps(a, b);
}

VEC_FN Vec vec_mul(Vec a, Vec b)
{
    return _mm256_mul_ps(a, b);
}

VEC_FN Vec vec_div(Vec a, Vec b)
{
    return _mm256_div_ps(a, b);
}

VEC_FN Vec vec_sqrt(Vec a)
{
    return _mm256_sqrt_ps(a);
}

/* a * b + c, rounded once. */
VEC_FN Vec vec_fma(Vec a, Vec b, Vec c)
{
    return _mm256_fmadd_ps(a, b, c);
}

VEC_FN Vec vec_negate(Vec a)
{
    return _mm256_xor_ps(a, _mm256_set1_ps(-0.0f));
}

/* a > b ? a : b */
VEC_FN Vec vec_max(Vec a, Vec b)
{
    return _mm256_max_ps(a, b);
}

/* In lanes [low, high) a, elsewhere b. */
VEC_FN Vec vec_between(Vec a, Vec b, int low, int high)
{
    return _mm256_blendv_ps(b, a, vec_mask(low, high));
}

/* The largest lane; which of -0 and +0, and what a NaN does to it, is not defined. */
VEC_FN float vec_max_lane(Vec v)
{
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    m = _mm_max_ss(m, _mm_movehdup_ps(m));
    return _mm_cvtss_f32(m);
}

/* Whether every lane is finite. */
VEC_FN int vec_is_finite(Vec v)
{
    const __m256i exponent = _mm256_set1_epi32(0x7f800000);
    const __m256i e = _mm256_and_si256(_mm256_castps_si256(v), exponent);
    return _mm256_testz_si256(_mm256_cmpeq_epi32(e, exponent), _mm256_set1_epi32(-1));
}

/* 32 lanes in 32 / VEC_LANES vectors, folded by node(0,32): neighbours first. */
VEC_FN float vec_fold(const Vec v[32 / VEC_LANES])
{
    const __m256 quads = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const __m128 eights =
        _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1));
    const __m128 halves = _mm_hadd_ps(eights, eights);
    return _mm_cvtss_f32(_mm_add_ss(halves, _mm_movehdup_ps(halves)));
}

/* exp32_inline() in every lane. */
VEC_FN Vec vec_exp(Vec x)
{
    const Vec t = vec_fma(x, vec_all(EXP32_LOG2E), vec_all(EXP32_MAGIC));
    const Vec n = vec_sub(t, vec_all(EXP32_MAGIC));
    const Vec r = vec_fma(n, vec_all(-EXP32_LN2_LO), vec_fma(n, vec_all(-EXP32_LN2_HI), x));
    Vec p = vec_fma(vec_all(EXP32_C6), r, vec_all(EXP32_C5));
    p = vec_fma(p, r, vec_all(EXP32_C4));
    p = vec_fma(p, r, vec_all(EXP32_C3));
    p = vec_fma(p, r, vec_all(EXP32_C2));
    p = vec_fma(p, r, vec_all(1.0f));
    p = vec_fma(p, r, vec_all(1.0f));
    const VecInt shifted = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
    const Vec y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), shifted));
    const Vec above = _mm256_cmp_ps(x, vec_all(EXP32_HIGHEST), _CMP_NLE_UQ);
    const Vec below = _mm256_cmp_ps(x, vec_all(EXP32_LOWEST), _CMP_LT_OQ);
    return _mm256_andnot_ps(below, _mm256_blendv_ps(y, vec_add(x, vec_all(INFINITY)), above));
}

/* log32_inline() in every lane. */
VEC_FN Vec vec_log(Vec x)
{
    const VecInt bits = _mm256_castps_si256(x);
    const VecInt e =
        _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(LOG32_SQRT_HALF_BITS)), 23);
    const Vec m = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(e, 23)));
    const Vec f = vec_sub(m, vec_all(1.0f));
    Vec p = vec_fma(vec_all(LOG32_P8), f, vec_all(LOG32_P7));
    p = vec_fma(p, f, vec_all(LOG32_P6));
    p = vec_fma(p, f, vec_all(LOG32_P5));
    p = vec_fma(p, f, vec_all(LOG32_P4));
    p = vec_fma(p, f, vec_all(LOG32_P3));
    p = vec_fma(p, f, vec_all(LOG32_P2));
    p = vec_fma(p, f, vec_all(LOG32_P1));
    p = vec_fma(p, f, vec_all(LOG32_P0));
    p = vec_fma(p, f, vec_all(-0.5f));
    const Vec y = vec_fma(p, vec_mul(f, f), f);
    const Vec k = _mm256_cvtepi32_ps(e);
    return vec_fma(k, vec_all(LOG32_LN2_HI), vec_fma(k, vec_all(LOG32_LN2_LO), y));
}

/* ---- integers ---- */

VEC_FN VecInt vec_int_all(uint32_t x)
{
    return _mm256_set1_epi32((int)x);
}

VEC_FN VecInt vec_int_iota(void)
{
    return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
}

VEC_FN VecInt vec_int_add(VecInt a, VecInt b)
{
    return _mm256_add_epi32(a, b);
}

VEC_FN VecInt vec_int_xor(VecInt a, VecInt b)
{
    return _mm256_xor_si256(a, b);
}

/* The 64-bit products of unsigned lanes with m. */
VEC_FN void vec_int_multiply(VecInt a, uint32_t m, VecInt *high, VecInt *low)
{
    const VecInt factor = _mm256_set1_epi32((int)m);
    const VecInt even = _mm256_mul_epu32(a, factor);
    const VecInt odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), factor);
    *low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}

/* gumbel_inline() of every lane's bits. */
VEC_FN Vec vec_gumbel(VecInt bits)
{
    const VecInt upper = _mm256_srai_epi32(bits, 31);
    const Vec w = _mm256_cvtepi32_ps(_mm256_xor_si256(bits, upper)),
              is_upper = _mm256_castsi256_ps(upper);
    const Vec v = vec_fma(w, vec_all(0x1p-32f), vec_all(0x1p-33f));
    const Vec y = _mm256_blendv_ps(v, vec_sub(vec_all(1.0f), v), is_upper);
    const Vec d = _mm256_and_ps(vec_sub(vec_sub(vec_all(1.0f), y), v), is_upper);
    const Vec e = vec_negate(vec_add(vec_log(y), vec_div(d, y)));
    return vec_negate(vec_log(e));
}

/* out[4 * lane + i] = w[i][lane] */
VEC_FN void vec_store_interleaved(float *out, const Vec w[4])
{
    const Vec a = _mm256_unpacklo_ps(w[0], w[1]), b = _mm256_unpackhi_ps(w[0], w[1]);
    const Vec c = _mm256_unpacklo_ps(w[2], w[3]), d = _mm256_unpackhi_ps(w[2], w[3]);
    const Vec l04 = _mm256_shuffle_ps(a, c, 0x44), l15 = _mm256_shuffle_ps(a, c, 0xee);
    const Vec l26 = _mm256_shuffle_ps(b, d, 0x44), l37 = _mm256_shuffle_ps(b, d, 0xee);
    vec_store(out, _mm256_permute2f128_ps(l04, l15, 0x20));
    vec_store(out + 8, _mm256_permute2f128_ps(l26, l37, 0x20));
    vec_store(out + 16, _mm256_permute2f128_ps(l04, l15, 0x31));
    vec_store(out + 24, _mm256_permute2f128_ps(l26, l37, 0x31));
}

/* ---- 16-bit floats ---- */

VEC_FN Vec vec_load_f16(const uint16_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

VEC_FN Vec vec_load_bf16(const uint16_t *p)
{
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}

/* VEC_LANES int8, converted. */
VEC_FN Vec vec_load_i8(const int8_t *p)
{
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p)));
}

VEC_FN void vec_store_f16(uint16_t *p, Vec v)
{
    _mm_storeu_si128((__m128i *)p,
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

/* The bits of v rounded to bf16 in the upper halves; in the lower ones anything. */
VEC_FN VecInt vec_bf16_bits(Vec v)
{
    const VecInt u = _mm256_castps_si256(v);
    const VecInt odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const VecInt even = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    const VecInt quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const Vec is_nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    return _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(even), _mm256_castsi256_ps(quiet), is_nan));
}

VEC_FN Vec vec_round_bf16(Vec v)
{
    return _mm256_castsi256_ps(
        _mm256_and_si256(vec_bf16_bits(v), _mm256_set1_epi32((int)0xffff0000u)));
}

VEC_FN Vec vec_round_f16(Vec v)
{
    return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

/* Lanes 4..7 before lanes 0..3. */
VEC_FN Vec vec_swap_fours(Vec v)
{
    return _mm256_permute2f128_ps(v, v, 1);
}

/* The arithmetic of *v is done before what stands behind this (a change of modes). */
VEC_FN void vec_done(Vec *v)
{
    __asm__ volatile("" : "+x"(*v) : : "memory");
}

VEC_FN void vec_store_bf16(uint16_t *p, Vec v)
{
    const VecInt r = _mm256_srli_epi32(vec_bf16_bits(v), 16);
    _mm_storeu_si128((__m128i *)p,
                     _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)));
}

/* ---- RoPE of neighbours ---- */

/* VEC_LANES / 2 pairs (a, b) at x with their cos and sin: a' = a c - (b s), b' = a s + (b c), the
 * products in brackets rounded first. */
VEC_FN void vec_rotate_pairs(float *x, const float *cos, const float *sin)
{
    const __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    const Vec c = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(cos)), twice);
    const Vec s = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(sin)), twice);
    const Vec v = vec_load(x);
    const Vec a = _mm256_moveldup_ps(v), b = _mm256_movehdup_ps(v);
    const Vec with_a = _mm256_blend_ps(c, s, 0xaa),
              with_b = _mm256_blend_ps(vec_negate(s), c, 0xaa);
    vec_store(x, vec_fma(a, with_a, vec_mul(b, with_b)));
}
