/* Compiled once for each meaning of the names: INTRINSICS is the table's name. */
#include "tests/kernels/avx512/intrinsics.h"

#include <immintrin.h>

/* Shift counts and choices are constants, as in the kernels. */
#define PS(x) _mm512_loadu_ps((x)->f32)
#define SI(x) _mm512_loadu_si512((x)->u8)
#define SI256(x) _mm256_loadu_si256((const __m256i *)(const void *)(x)->u8)
#define SI128(x) _mm_loadu_si128((const __m128i *)(const void *)(x)->u8)
#define PUT_PS(v) _mm512_storeu_ps(out->f32, v)
#define PUT_SI(v) _mm512_storeu_ps(out->f32, _mm512_castsi512_ps(v))
#define PUT_256(v) _mm256_storeu_si256((__m256i *)(void *)out->u8, v)
#define PUT_MASK(k) (out->u32[0] = (k))
#define MASK ((__mmask16)c->u32[0])

/* X(name, arithmetic, statement) */
#define ALL(X)                                                                                     \
    X(setzero_ps, false, PUT_PS(_mm512_setzero_ps()))                                              \
    X(set1_ps, false, PUT_PS(_mm512_set1_ps(a->f32[3])))                                           \
    X(add_ps, true, PUT_PS(_mm512_add_ps(PS(a), PS(b))))                                           \
    X(sub_ps, true, PUT_PS(_mm512_sub_ps(PS(a), PS(b))))                                           \
    X(mul_ps, true, PUT_PS(_mm512_mul_ps(PS(a), PS(b))))                                           \
    X(div_ps, true, PUT_PS(_mm512_div_ps(PS(a), PS(b))))                                           \
    X(sqrt_ps, true, PUT_PS(_mm512_sqrt_ps(PS(a))))                                                \
    X(max_ps, false, PUT_PS(_mm512_max_ps(PS(a), PS(b))))                                          \
    X(fmadd_ps, true, PUT_PS(_mm512_fmadd_ps(PS(a), PS(b), PS(c))))                                \
    X(fnmadd_ps, true, PUT_PS(_mm512_fnmadd_ps(PS(a), PS(b), PS(c))))                              \
    X(mask_blend_ps, false, PUT_PS(_mm512_mask_blend_ps(MASK, PS(a), PS(b))))                      \
    X(mask_add_ps, true, PUT_PS(_mm512_mask_add_ps(PS(a), MASK, PS(b), PS(c))))                    \
    X(maskz_add_epi32, false, PUT_SI(_mm512_maskz_add_epi32(MASK, SI(a), SI(b))))                  \
    X(moveldup_ps, false, PUT_PS(_mm512_moveldup_ps(PS(a))))                                       \
    X(movehdup_ps, false, PUT_PS(_mm512_movehdup_ps(PS(a))))                                       \
    X(permutexvar_ps, false, PUT_PS(_mm512_permutexvar_ps(SI(a), PS(b))))                          \
    X(unpacklo_ps, false, PUT_PS(_mm512_unpacklo_ps(PS(a), PS(b))))                                \
    X(unpackhi_ps, false, PUT_PS(_mm512_unpackhi_ps(PS(a), PS(b))))                                \
    X(shuffle_ps_44, false, PUT_PS(_mm512_shuffle_ps(PS(a), PS(b), 0x44)))                         \
    X(shuffle_ps_ee, false, PUT_PS(_mm512_shuffle_ps(PS(a), PS(b), 0xee)))                         \
    X(shuffle_ps_88, false, PUT_PS(_mm512_shuffle_ps(PS(a), PS(b), 0x88)))                         \
    X(shuffle_ps_dd, false, PUT_PS(_mm512_shuffle_ps(PS(a), PS(b), 0xdd)))                         \
    X(shuffle_f32x4_44, false, PUT_PS(_mm512_shuffle_f32x4(PS(a), PS(b), 0x44)))                   \
    X(shuffle_f32x4_ee, false, PUT_PS(_mm512_shuffle_f32x4(PS(a), PS(b), 0xee)))                   \
    X(shuffle_f32x4_88, false, PUT_PS(_mm512_shuffle_f32x4(PS(a), PS(b), 0x88)))                   \
    X(shuffle_f32x4_dd, false, PUT_PS(_mm512_shuffle_f32x4(PS(a), PS(b), 0xdd)))                   \
    X(shuffle_f32x4_0e, false, PUT_PS(_mm512_shuffle_f32x4(PS(a), PS(b), 0x0e)))                   \
    X(shuffle_f32x4_01, false, PUT_PS(_mm512_shuffle_f32x4(PS(a), PS(b), 0x01)))                   \
    X(shuffle_f32x4_08, false, PUT_PS(_mm512_shuffle_f32x4(PS(a), PS(b), 0x08)))                   \
    X(shuffle_f32x4_b1, false, PUT_PS(_mm512_shuffle_f32x4(PS(a), PS(b), 0xb1)))                   \
    X(castps512_ps256, false, _mm256_storeu_ps(out->f32, _mm512_castps512_ps256(PS(a))))           \
    X(castps512_ps128, false, _mm_storeu_ps(out->f32, _mm512_castps512_ps128(PS(a))))              \
    X(castps256_ps512, false,                                                                      \
      _mm256_storeu_ps(out->f32, _mm512_castps512_ps256(                                           \
                                     _mm512_castps256_ps512(_mm256_castsi256_ps(SI256(a))))))      \
    X(extractf64x4_pd, false,                                                                      \
      PUT_256(_mm256_castpd_si256(_mm512_extractf64x4_pd(_mm512_castps_pd(PS(a)), 1))))            \
    X(castps_si512, false, PUT_SI(_mm512_castps_si512(PS(a))))                                     \
    X(setzero_si512, false, PUT_SI(_mm512_setzero_si512()))                                        \
    X(set1_epi32, false, PUT_SI(_mm512_set1_epi32((int)a->u32[5])))                                \
    X(set1_epi8, false, PUT_SI(_mm512_set1_epi8((char)a->u8[5])))                                  \
    X(set_epi32, false,                                                                            \
      PUT_SI(_mm512_set_epi32((int)a->u32[0], 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, -1))) \
    X(and_si512, false, PUT_SI(_mm512_and_si512(SI(a), SI(b))))                                    \
    X(or_si512, false, PUT_SI(_mm512_or_si512(SI(a), SI(b))))                                      \
    X(xor_si512, false, PUT_SI(_mm512_xor_si512(SI(a), SI(b))))                                    \
    X(add_epi32, false, PUT_SI(_mm512_add_epi32(SI(a), SI(b))))                                    \
    X(sub_epi32, false, PUT_SI(_mm512_sub_epi32(SI(a), SI(b))))                                    \
    X(mullo_epi32, false, PUT_SI(_mm512_mullo_epi32(SI(a), SI(b))))                                \
    X(mul_epu32, false, PUT_SI(_mm512_mul_epu32(SI(a), SI(b))))                                    \
    X(slli_epi16_1, false, PUT_SI(_mm512_slli_epi16(SI(a), 1)))                                    \
    X(slli_epi16_4, false, PUT_SI(_mm512_slli_epi16(SI(a), 4)))                                    \
    X(srli_epi16_0, false, PUT_SI(_mm512_srli_epi16(SI(a), 0)))                                    \
    X(srli_epi16_3, false, PUT_SI(_mm512_srli_epi16(SI(a), 3)))                                    \
    X(srli_epi16_4, false, PUT_SI(_mm512_srli_epi16(SI(a), 4)))                                    \
    X(slli_epi32_5, false, PUT_SI(_mm512_slli_epi32(SI(a), 5)))                                    \
    X(slli_epi32_16, false, PUT_SI(_mm512_slli_epi32(SI(a), 16)))                                  \
    X(slli_epi32_23, false, PUT_SI(_mm512_slli_epi32(SI(a), 23)))                                  \
    X(srli_epi32_16, false, PUT_SI(_mm512_srli_epi32(SI(a), 16)))                                  \
    X(srai_epi32_16, false, PUT_SI(_mm512_srai_epi32(SI(a), 16)))                                  \
    X(srai_epi32_23, false, PUT_SI(_mm512_srai_epi32(SI(a), 23)))                                  \
    X(srai_epi32_31, false, PUT_SI(_mm512_srai_epi32(SI(a), 31)))                                  \
    X(slli_epi64_32, false, PUT_SI(_mm512_slli_epi64(SI(a), 32)))                                  \
    X(srli_epi64_32, false, PUT_SI(_mm512_srli_epi64(SI(a), 32)))                                  \
    X(mask_blend_epi32, false, PUT_SI(_mm512_mask_blend_epi32(MASK, SI(a), SI(b))))                \
    X(cmpeq_epi32_mask, false, PUT_MASK(_mm512_cmpeq_epi32_mask(SI(a), SI(b))))                    \
    X(cmplt_epi32_mask, false, PUT_MASK(_mm512_cmplt_epi32_mask(SI(a), SI(b))))                    \
    X(cmp_ps_mask_nle, false, PUT_MASK(_mm512_cmp_ps_mask(PS(a), PS(b), _CMP_NLE_UQ)))             \
    X(cmp_ps_mask_lt, false, PUT_MASK(_mm512_cmp_ps_mask(PS(a), PS(b), _CMP_LT_OQ)))               \
    X(cmp_ps_mask_nlt, false, PUT_MASK(_mm512_cmp_ps_mask(PS(a), PS(b), _CMP_NLT_UQ)))             \
    X(cmp_ps_mask_unord, false, PUT_MASK(_mm512_cmp_ps_mask(PS(a), PS(b), _CMP_UNORD_Q)))          \
    X(maskz_loadu_ps, false, PUT_PS(_mm512_maskz_loadu_ps(MASK, a->f32)))                          \
    X(mask_storeu_ps, false, _mm512_mask_storeu_ps(out->f32, MASK, PS(a)))                         \
    X(store_ps, false, _mm512_store_ps(out->f32, PS(a)))                                           \
    X(cvtepi32_ps, false, PUT_PS(_mm512_cvtepi32_ps(SI(a))))                                       \
    X(cvtph_ps, false, PUT_PS(_mm512_cvtph_ps(SI256(a))))                                          \
    X(cvtps_ph, false,                                                                             \
      PUT_256(_mm512_cvtps_ph(PS(a), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)))              \
    X(cvtepu8_epi32, false, PUT_SI(_mm512_cvtepu8_epi32(SI128(a))))                                \
    X(cvtepi8_epi32, false, PUT_SI(_mm512_cvtepi8_epi32(SI128(a))))                                \
    X(cvtepu8_epi16, false, PUT_SI(_mm512_cvtepu8_epi16(SI256(a))))                                \
    X(cvtepi8_epi16, false, PUT_SI(_mm512_cvtepi8_epi16(SI256(a))))                                \
    X(cvtepu16_epi32, false, PUT_SI(_mm512_cvtepu16_epi32(SI256(a))))                              \
    X(cvtepi32_epi16, false, PUT_256(_mm512_cvtepi32_epi16(SI(a))))                                \
    X(dpbusd_epi32, false, PUT_SI(_mm512_dpbusd_epi32(SI(c), SI(a), SI(b))))                       \
    X(dpwssd_epi32, false, PUT_SI(_mm512_dpwssd_epi32(SI(c), SI(a), SI(b))))                       \
    X(dpbf16_ps, true, PUT_PS(_mm512_dpbf16_ps(PS(c), (__m512bh)SI(a), (__m512bh)SI(b))))

#define DEFINE(name, arithmetic, statement)                                                        \
    static void call_##name(const Bits512 *a, const Bits512 *b, const Bits512 *c, Bits512 *out)    \
    {                                                                                              \
        statement;                                                                                 \
    }
#define LIST(name, arithmetic, statement) {#name, arithmetic, call_##name},

ALL(DEFINE)

const Intrinsic INTRINSICS[] = {ALL(LIST){0}};
