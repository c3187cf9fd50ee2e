/* The AVX-512 intrinsics of kernels/avx512 from SIMDe, and in halves by AVX2 and F16C where SIMDe
 * 0.7.4 lacks them or does not mean what the instruction does. Put before the sources in a test's
 * build; emulated.h has the same intrinsics independently of it, lane by lane. */
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#define SIMDE_NO_INLINE /* inlined, the tiles take three times as long to compile */
#include <simde/x86/avx512.h>

#include <immintrin.h>
#include <stdint.h>

typedef union Halves {
    __m512 whole_ps;
    __m512i whole_si;
    __m256 ps[2];
    __m256i si[2];
    float f32[16];
} Halves;

#define HALVES static inline __attribute__((unused))
#define HALVES_PS(name, params, half)                                                              \
    HALVES __m512 name params                                                                      \
    {                                                                                              \
        Halves out;                                                                                \
        for (int h = 0; h < 2; h++) {                                                              \
            out.ps[h] = half;                                                                      \
        }                                                                                          \
        return out.whole_ps;                                                                       \
    }
#define HALVES_SI(name, params, half)                                                              \
    HALVES __m512i name params                                                                     \
    {                                                                                              \
        Halves out;                                                                                \
        for (int h = 0; h < 2; h++) {                                                              \
            out.si[h] = half;                                                                      \
        }                                                                                          \
        return out.whole_si;                                                                       \
    }

HALVES __m256 half_ps(__m512 a, int h)
{
    return ((Halves){.whole_ps = a}).ps[h];
}

HALVES __m256i half_si(__m512i a, int h)
{
    return ((Halves){.whole_si = a}).si[h];
}

HALVES __m128i half_of_256(__m256i a, int h)
{
    return h != 0 ? _mm256_extracti128_si256(a, 1) : _mm256_castsi256_si128(a);
}

HALVES __m128i half_of_128(__m128i a, int h)
{
    return h != 0 ? _mm_srli_si128(a, 8) : a;
}

HALVES_PS(halves_cvtepi32_ps, (__m512i a), _mm256_cvtepi32_ps(half_si(a, h)))
HALVES_PS(halves_cvtph_ps, (__m256i a), _mm256_cvtph_ps(half_of_256(a, h)))
HALVES_PS(halves_moveldup_ps, (__m512 a), _mm256_moveldup_ps(half_ps(a, h)))
HALVES_PS(halves_movehdup_ps, (__m512 a), _mm256_movehdup_ps(half_ps(a, h)))
HALVES_SI(halves_srai_epi32, (__m512i a, int n),
          _mm256_sra_epi32(half_si(a, h), _mm_cvtsi32_si128(n)))
HALVES_SI(halves_cvtepu8_epi32, (__m128i a), _mm256_cvtepu8_epi32(half_of_128(a, h)))
HALVES_SI(halves_cvtepi8_epi32, (__m128i a), _mm256_cvtepi8_epi32(half_of_128(a, h)))
HALVES_SI(halves_cvtepu8_epi16, (__m256i a), _mm256_cvtepu8_epi16(half_of_256(a, h)))
HALVES_SI(halves_cvtepu16_epi32, (__m256i a), _mm256_cvtepu16_epi32(half_of_256(a, h)))

HALVES __m256i halves_cvtps_ph(__m512 a)
{
    return _mm256_set_m128i(_mm256_cvtps_ph(half_ps(a, 1), _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(half_ps(a, 0), _MM_FROUND_TO_NEAREST_INT));
}

HALVES __m256i halves_cvtepi32_epi16(__m512i a)
{
    const __m256i words = _mm256_set1_epi32(0xffff);
    const __m256i packed = _mm256_packus_epi32(_mm256_and_si256(half_si(a, 0), words),
                                               _mm256_and_si256(half_si(a, 1), words));
    return _mm256_permute4x64_epi64(packed, _MM_SHUFFLE(3, 1, 2, 0));
}

HALVES __mmask16 halves_cmplt_epi32_mask(__m512i a, __m512i b)
{
    unsigned mask = 0;
    for (int h = 0; h < 2; h++) {
        const __m256i less = _mm256_cmpgt_epi32(half_si(b, h), half_si(a, h));
        mask |= (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(less)) << 8 * h;
    }
    return (__mmask16)mask;
}

/* Lane by lane, so that AddressSanitizer sees each. */
HALVES __m512 halves_maskz_loadu_ps(__mmask16 k, const float *p)
{
    Halves out;
    for (int i = 0; i < 16; i++) {
        out.f32[i] = (k >> i & 1) != 0 ? p[i] : 0.0f;
    }
    return out.whole_ps;
}

HALVES void halves_mask_storeu_ps(float *p, __mmask16 k, __m512 a)
{
    const Halves from = {.whole_ps = a};
    for (int i = 0; i < 16; i++) {
        if ((k >> i & 1) != 0) {
            p[i] = from.f32[i];
        }
    }
}

/* acc = acc + a * b in one rounding. As assembly, in its place among changes of modes. */
HALVES __m256 halves_fma(__m256 a, __m256 b, __m256 acc)
{
    __asm__ volatile("vfmadd231ps %1, %2, %0" : "+x"(acc) : "x"(a), "x"(b) : "memory");
    return acc;
}

/* VDPBF16PS rounds and flushes at each of two steps, the odd element's first; SIMDe's neither fuses
 * nor flushes, and its order is the compiler's. */
HALVES __m512 halves_dpbf16_ps(__m512 acc, __m512i a, __m512i b)
{
    Halves out;
    const unsigned saved = _mm_getcsr(), flush = 0x9fc0;
    const __m256i upper = _mm256_set1_epi32((int)0xffff0000u);
    __asm__ volatile("ldmxcsr %0" : : "m"(flush) : "memory");
    for (int h = 0; h < 2; h++) {
        const __m256i x = half_si(a, h), y = half_si(b, h);
        const __m256 odd =
            halves_fma(_mm256_castsi256_ps(_mm256_and_si256(x, upper)),
                       _mm256_castsi256_ps(_mm256_and_si256(y, upper)), half_ps(acc, h));
        out.ps[h] = halves_fma(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)),
                               _mm256_castsi256_ps(_mm256_slli_epi32(y, 16)), odd);
    }
    __asm__ volatile("ldmxcsr %0" : : "m"(saved) : "memory");
    return out.whole_ps;
}

#undef _mm512_cvtepi32_ps
#undef _mm512_cvtph_ps
#undef _mm512_cvtps_ph
#undef _mm512_moveldup_ps
#undef _mm512_movehdup_ps
#undef _mm512_srai_epi32
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtepu8_epi16
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepi32_epi16
#undef _mm512_cmplt_epi32_mask
#undef _mm512_maskz_loadu_ps
#undef _mm512_mask_storeu_ps
#undef _mm512_dpbf16_ps
#undef _mm512_shuffle_f32x4
#define _mm512_cvtepi32_ps halves_cvtepi32_ps
#define _mm512_cvtph_ps halves_cvtph_ps
#define _mm512_cvtps_ph(a, rounding) halves_cvtps_ph(a)
#define _mm512_moveldup_ps halves_moveldup_ps
#define _mm512_movehdup_ps halves_movehdup_ps
#define _mm512_srai_epi32 halves_srai_epi32
#define _mm512_cvtepu8_epi32 halves_cvtepu8_epi32
#define _mm512_cvtepi8_epi32 halves_cvtepi8_epi32
#define _mm512_cvtepu8_epi16 halves_cvtepu8_epi16
#define _mm512_cvtepu16_epi32 halves_cvtepu16_epi32
#define _mm512_cvtepi32_epi16 halves_cvtepi32_epi16
#define _mm512_cmplt_epi32_mask halves_cmplt_epi32_mask
#define _mm512_maskz_loadu_ps halves_maskz_loadu_ps
#define _mm512_mask_storeu_ps halves_mask_storeu_ps
#define _mm512_shuffle_f32x4 simde_mm512_shuffle_f32x4
#define _mm512_dpbf16_ps(acc, a, b) halves_dpbf16_ps(acc, (__m512i)(a), (__m512i)(b))
