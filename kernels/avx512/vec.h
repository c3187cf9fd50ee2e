/* The vocabulary of kernels/vector in 16 lanes (AVX-512 F, BW, VL, DQ). kernels/avx2/vec.h has the
 * same names in 8 and the comments. */
#pragma once

#include "kernels/ops/math.h"
#include "kernels/ops/philox.h"

#include <immintrin.h>
#include <stdint.h>

#define VEC_LANES 16u
typedef __m512 Vec;
typedef __m512i VecInt;

#define VEC_FN static inline __attribute__((always_inline, unused))

VEC_FN Vec vec_load(const float *p)
{
    return _mm512_loadu_ps(p);
}

VEC_FN void vec_store(float *p, Vec v)
{
    _mm512_storeu_ps(p, v);
}

/* Bits [low, high), 0 <= high. */
VEC_FN __mmask16 vec_mask(int low, int high)
{
    const uint32_t below_high = high >= 16 ? 0xffffu : (1u << high) - 1u;
    const uint32_t below_low = low >= 16 ? 0xffffu : low <= 0 ? 0u : (1u << low) - 1u;
    return (__mmask16)(below_high & ~below_low);
}

VEC_FN Vec vec_load_first(const float *p, uint32_t n)
{
    return _mm512_maskz_loadu_ps(vec_mask(0, (int)n), p);
}

VEC_FN void vec_store_first(float *p, Vec v, uint32_t n)
{
    _mm512_mask_storeu_ps(p, vec_mask(0, (int)n), v);
}

VEC_FN Vec vec_all(float x)
{
    return _mm512_set1_ps(x);
}

VEC_FN Vec vec_zero(void)
{
    return _mm512_setzero_ps();
}

VEC_FN Vec vec_add(Vec a, Vec b)
{
    return _mm512_add_ps(a, b);
}

VEC_FN Vec vec_sub(Vec a, Vec b)
{
    return _mm512_sub_ps(a, b);
}

VEC_FN Vec vec_mul(Vec a, Vec b)
{
    return _mm512_mul_ps(a, b);
}

VEC_FN Vec vec_div(Vec a, Vec b)
{
    return _mm512_div_ps(a, b);
}

VEC_FN Vec vec_sqrt(Vec a)
{
    return _mm512_sqrt_ps(a);
}

VEC_FN Vec vec_fma(Vec a, Vec b, Vec c)
{
    return _mm512_fmadd_ps(a, b, c);
}

VEC_FN Vec vec_negate(Vec a)
{
    return _mm512_castsi512_ps(
        _mm512_xor_si512(_mm512_castps_si512(a), _mm512_set1_epi32(INT32_MIN)));
}

VEC_FN Vec vec_max(Vec a, Vec b)
{
    return _mm512_max_ps(a, b);
}

VEC_FN Vec vec_between(Vec a, Vec b, int low, int high)
{
    return _mm512_mask_blend_ps(vec_mask(low, high), b, a);
}

VEC_FN float vec_max_lane(Vec v)
{
    const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
    const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(v), upper);
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    m = _mm_max_ss(m, _mm_movehdup_ps(m));
    return _mm_cvtss_f32(m);
}

VEC_FN int vec_is_finite(Vec v)
{
    const __m512i exponent = _mm512_set1_epi32(0x7f800000);
    return _mm512_cmpeq_epi32_mask(_mm512_and_si512(_mm512_castps_si512(v), exponent), exponent) ==
           0;
}

VEC_FN float vec_fold(const Vec v[32 / VEC_LANES])
{
    const __m256 a = _mm512_castps512_ps256(v[0]), c = _mm512_castps512_ps256(v[1]);
    const __m256 b = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v[0]), 1));
    const __m256 d = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v[1]), 1));
    const __m256 quads = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    const __m128 eights =
        _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1));
    const __m128 halves = _mm_hadd_ps(eights, eights);
    return _mm_cvtss_f32(_mm_add_ss(halves, _mm_movehdup_ps(halves)));
}

/* The highest lane of each of four. */
VEC_FN void vec_max_lanes_4(const Vec v[4], float out[4])
{
    const Vec ab = _mm512_max_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const Vec cd = _mm512_max_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    /* in each fourth of the lanes a, b, c, d */
    const Vec all = _mm512_max_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const Vec half = _mm512_max_ps(all, _mm512_shuffle_f32x4(all, all, 0x0e));
    const Vec whole = _mm512_max_ps(half, _mm512_shuffle_f32x4(half, half, 0x01));
    _mm_storeu_ps(out, _mm512_castps512_ps128(whole));
}

/* Sums of lanes 2 i and 2 i + 1: in each fourth two of a, then two of b. */
VEC_FN Vec vec_pair_sums(Vec a, Vec b)
{
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}

/* The same for fourths of a, then of b. */
VEC_FN Vec vec_pair_sums_of_fourths(Vec a, Vec b)
{
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

/* vec_fold() of each of four. */
VEC_FN void vec_fold_4(const Vec (*v)[2], float out[4])
{
    Vec fours[2]; /* fourth f: of each of the four, lanes 4 f to 4 f + 3 */
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        fours[h] = vec_pair_sums(vec_pair_sums(v[0][h], v[1][h]), vec_pair_sums(v[2][h], v[3][h]));
    }
    const Vec eights = vec_pair_sums_of_fourths(fours[0], fours[1]);
    const Vec halves = vec_pair_sums_of_fourths(eights, eights);
    const Vec whole = _mm512_add_ps(halves, _mm512_shuffle_f32x4(halves, halves, 0x01));
    _mm_storeu_ps(out, _mm512_castps512_ps128(whole));
}

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
    const VecInt shifted = _mm512_slli_epi32(_mm512_castps_si512(t), 23);
    const __mmask16 above = _mm512_cmp_ps_mask(x, vec_all(EXP32_HIGHEST), _CMP_NLE_UQ);
    const __mmask16 not_below = _mm512_cmp_ps_mask(x, vec_all(EXP32_LOWEST), _CMP_NLT_UQ);
    const Vec y =
        _mm512_castsi512_ps(_mm512_maskz_add_epi32(not_below, _mm512_castps_si512(p), shifted));
    return _mm512_mask_add_ps(y, above, x, vec_all(INFINITY));
}

VEC_FN Vec vec_log(Vec x)
{
    const VecInt bits = _mm512_castps_si512(x);
    const VecInt e =
        _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(LOG32_SQRT_HALF_BITS)), 23);
    const Vec m = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(e, 23)));
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
    const Vec k = _mm512_cvtepi32_ps(e);
    return vec_fma(k, vec_all(LOG32_LN2_HI), vec_fma(k, vec_all(LOG32_LN2_LO), y));
}

/* ---- integers ---- */

VEC_FN VecInt vec_int_all(uint32_t x)
{
    return _mm512_set1_epi32((int)x);
}

VEC_FN VecInt vec_int_iota(void)
{
    return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
}

VEC_FN VecInt vec_int_add(VecInt a, VecInt b)
{
    return _mm512_add_epi32(a, b);
}

VEC_FN VecInt vec_int_xor(VecInt a, VecInt b)
{
    return _mm512_xor_si512(a, b);
}

VEC_FN void vec_int_multiply(VecInt a, uint32_t m, VecInt *high, VecInt *low)
{
    const VecInt factor = _mm512_set1_epi32((int)m);
    const VecInt even = _mm512_mul_epu32(a, factor);
    const VecInt odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), factor);
    *low = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
    *high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
}

VEC_FN Vec vec_gumbel(VecInt bits)
{
    const VecInt upper = _mm512_srai_epi32(bits, 31);
    const __mmask16 is_upper = _mm512_cmplt_epi32_mask(bits, _mm512_setzero_si512());
    const Vec w = _mm512_cvtepi32_ps(_mm512_xor_si512(bits, upper));
    const Vec v = vec_fma(w, vec_all(0x1p-32f), vec_all(0x1p-33f));
    const Vec y = _mm512_mask_blend_ps(is_upper, v, vec_sub(vec_all(1.0f), v));
    const Vec d = _mm512_mask_blend_ps(is_upper, vec_zero(), vec_sub(vec_sub(vec_all(1.0f), y), v));
    const Vec e = vec_negate(vec_add(vec_log(y), vec_div(d, y)));
    return vec_negate(vec_log(e));
}

VEC_FN void vec_store_interleaved(float *out, const Vec w[4])
{
    const Vec a = _mm512_unpacklo_ps(w[0], w[1]), b = _mm512_unpackhi_ps(w[0], w[1]);
    const Vec c = _mm512_unpacklo_ps(w[2], w[3]), d = _mm512_unpackhi_ps(w[2], w[3]);
    /* 128-bit part i of q_j is lane 4i + j's four words */
    const Vec q0 = _mm512_shuffle_ps(a, c, 0x44), q1 = _mm512_shuffle_ps(a, c, 0xee);
    const Vec q2 = _mm512_shuffle_ps(b, d, 0x44), q3 = _mm512_shuffle_ps(b, d, 0xee);
    /* a 4x4 transposition of the parts */
    const Vec s = _mm512_shuffle_f32x4(q0, q1, 0x44), t = _mm512_shuffle_f32x4(q2, q3, 0x44);
    const Vec u = _mm512_shuffle_f32x4(q0, q1, 0xee), v = _mm512_shuffle_f32x4(q2, q3, 0xee);
    vec_store(out, _mm512_shuffle_f32x4(s, t, 0x88));
    vec_store(out + 16, _mm512_shuffle_f32x4(s, t, 0xdd));
    vec_store(out + 32, _mm512_shuffle_f32x4(u, v, 0x88));
    vec_store(out + 48, _mm512_shuffle_f32x4(u, v, 0xdd));
}

/* ---- 16-bit floats ---- */

VEC_FN Vec vec_load_f16(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

VEC_FN Vec vec_load_bf16(const uint16_t *p)
{
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}

/* VEC_LANES int8, converted. */
VEC_FN Vec vec_load_i8(const int8_t *p)
{
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)));
}

VEC_FN void vec_store_f16(uint16_t *p, Vec v)
{
    _mm256_storeu_si256((__m256i *)p,
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

/* The bits of v rounded to bf16 in the upper halves; in the lower ones anything. */
VEC_FN VecInt vec_bf16_bits(Vec v)
{
    const VecInt u = _mm512_castps_si512(v);
    const VecInt odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const VecInt even = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    const VecInt quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_mask_blend_epi32(is_nan, even, quiet);
}

VEC_FN Vec vec_round_bf16(Vec v)
{
    return _mm512_castsi512_ps(
        _mm512_and_si512(vec_bf16_bits(v), _mm512_set1_epi32((int)0xffff0000u)));
}

VEC_FN Vec vec_round_f16(Vec v)
{
    return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

/* Pairs of bf16 out of vec_bf16_bits() of their even and odd elements. */
VEC_FN Vec vec_pairs_bf16(VecInt even, VecInt odd)
{
    return _mm512_castsi512_ps(_mm512_or_si512(
        _mm512_srli_epi32(even, 16), _mm512_and_si512(odd, _mm512_set1_epi32((int)0xffff0000u))));
}

/* Lanes 0..3 and 8..11. */
VEC_FN void vec_store_even_fours(float *p, Vec v)
{
    _mm256_storeu_ps(p, _mm512_castps512_ps256(_mm512_shuffle_f32x4(v, v, 0x08)));
}

/* In each half of eight lanes: 4..7 before 0..3. */
VEC_FN Vec vec_swap_fours(Vec v)
{
    return _mm512_shuffle_f32x4(v, v, 0xb1);
}

/* The arithmetic of *v is done before what stands behind this (a change of modes). */
VEC_FN void vec_done(Vec *v)
{
#ifdef WEFT_EMULATE_AVX512
    __asm__ volatile("" : "+m"(*v) : : "memory");
#else
    __asm__ volatile("" : "+v"(*v) : : "memory");
#endif
}

VEC_FN void vec_store_bf16(uint16_t *p, Vec v)
{
    const VecInt r = _mm512_srli_epi32(vec_bf16_bits(v), 16);
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(r));
}

/* ---- RoPE of neighbours ---- */

VEC_FN void vec_rotate_pairs(float *x, const float *cos, const float *sin)
{
    const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const Vec c = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(cos)));
    const Vec s = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(sin)));
    const Vec v = vec_load(x);
    const Vec a = _mm512_moveldup_ps(v), b = _mm512_movehdup_ps(v);
    const Vec with_a = _mm512_mask_blend_ps(0xaaaa, c, s),
              with_b = _mm512_mask_blend_ps(0xaaaa, vec_negate(s), c);
    vec_store(x, vec_fma(a, with_a, vec_mul(b, with_b)));
}
