/* The AVX-512 intrinsics that kernels/avx512/matmul*.c use, lane by lane in C after the manual
 * (Intel SDM volume 2). Put before the sources in a test's build. */
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef union Emu {
    __m512 ps;
    __m512i si;
    float f32[16];
    int32_t i32[16];
    uint32_t u32[16];
    int16_t i16[32];
    uint16_t u16[32];
    int8_t i8[64];
    uint8_t u8[64];
    __m256 half[2];
} Emu;
typedef int16_t EmuBf16 __attribute__((vector_size(64), may_alias));

#define EMU static __attribute__((noinline, unused)) /* else the tiles take a minute to compile */
#define EMU_PS(name, params, expression)                                                           \
    EMU __m512 name params                                                                         \
    {                                                                                              \
        Emu out;                                                                                   \
        for (int i = 0; i < 16; i++) {                                                             \
            out.f32[i] = expression;                                                               \
        }                                                                                          \
        return out.ps;                                                                             \
    }
#define EMU_SI(name, params, n, field, expression)                                                 \
    EMU __m512i name params                                                                        \
    {                                                                                              \
        Emu out;                                                                                   \
        for (int i = 0; i < n; i++) {                                                              \
            out.field[i] = expression;                                                             \
        }                                                                                          \
        return out.si;                                                                             \
    }

/* One fma of the CPU, under the MXCSR of the moment. */
EMU float emu_fma(float a, float b, float c)
{
    float out;
    __m128 r = _mm_set_ss(c);
    __asm__ volatile("vfmadd231ss %1, %2, %0"
                     : "+x"(r)
                     : "x"(_mm_set_ss(a)), "x"(_mm_set_ss(b))
                     : "memory");
    _mm_store_ss(&out, r);
    return out;
}

EMU_PS(emu_setzero_ps, (void), 0)
EMU_PS(emu_set1_ps, (float a), a)
EMU_PS(emu_mul_ps, (__m512 a, __m512 b), ((Emu)a).f32[i] * ((Emu)b).f32[i])
EMU_PS(emu_fmadd_ps, (__m512 a, __m512 b, __m512 c),
       emu_fma(((Emu)a).f32[i], ((Emu)b).f32[i], ((Emu)c).f32[i]))
EMU_PS(emu_fnmadd_ps, (__m512 a, __m512 b, __m512 c),
       emu_fma(-((Emu)a).f32[i], ((Emu)b).f32[i], ((Emu)c).f32[i]))
EMU_PS(emu_cvtepi32_ps, (__m512i a), (float)((Emu)a).i32[i])
EMU_PS(emu_castsi512_ps, (__m512i a), ((Emu)a).f32[i])
EMU_SI(emu_setzero_si512, (void), 16, i32, 0)
EMU_SI(emu_set1_epi32, (int a), 16, i32, a)
EMU_SI(emu_set1_epi8, (char a), 64, i8, a)
EMU_SI(emu_and_si512, (__m512i a, __m512i b), 16, i32, ((Emu)a).i32[i] & ((Emu)b).i32[i])
EMU_SI(emu_or_si512, (__m512i a, __m512i b), 16, i32, ((Emu)a).i32[i] | ((Emu)b).i32[i])
EMU_SI(emu_add_epi32, (__m512i a, __m512i b), 16, u32, ((Emu)a).u32[i] + ((Emu)b).u32[i])
EMU_SI(emu_sub_epi32, (__m512i a, __m512i b), 16, u32, ((Emu)a).u32[i] - ((Emu)b).u32[i])
EMU_SI(emu_mullo_epi32, (__m512i a, __m512i b), 16, u32, ((Emu)a).u32[i] * ((Emu)b).u32[i])
EMU_SI(emu_slli_epi16, (__m512i a, unsigned n), 32, u16, (uint16_t)(((Emu)a).u16[i] << n))
EMU_SI(emu_srli_epi16, (__m512i a, unsigned n), 32, u16, (uint16_t)(((Emu)a).u16[i] >> n))
EMU_SI(emu_slli_epi32, (__m512i a, unsigned n), 16, u32, ((Emu)a).u32[i] << n)
EMU_SI(emu_srai_epi32, (__m512i a, unsigned n), 16, i32, ((Emu)a).i32[i] >> n)

EMU __m512i emu_loadu_si512(const void *p)
{
    Emu out;
    memcpy(&out, p, sizeof out);
    return out.si;
}

EMU __m512 emu_loadu_ps(const void *p)
{
    Emu out;
    memcpy(&out, p, sizeof out);
    return out.ps;
}

EMU void emu_store_ps(void *p, __m512 a)
{
    memcpy(__builtin_assume_aligned(p, 64), &a, sizeof a);
}

EMU __m512 emu_cvtph_ps(__m256i a)
{
    Emu out;
    out.half[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(a));
    out.half[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1));
    return out.ps;
}

EMU __m512i emu_cvtepu8_epi32(__m128i a)
{
    uint8_t in[16];
    Emu out;
    memcpy(in, &a, sizeof in);
    for (int i = 0; i < 16; i++) {
        out.u32[i] = in[i];
    }
    return out.si;
}

EMU __m512i emu_cvtepu8_epi16(__m256i a)
{
    uint8_t in[32];
    Emu out;
    memcpy(in, &a, sizeof in);
    for (int i = 0; i < 32; i++) {
        out.u16[i] = in[i];
    }
    return out.si;
}

EMU __m512i emu_cvtepi8_epi16(__m256i a)
{
    int8_t in[32];
    Emu out;
    memcpy(in, &a, sizeof in);
    for (int i = 0; i < 32; i++) {
        out.i16[i] = in[i];
    }
    return out.si;
}

/* VPDPBUSD: unsigned bytes of a, signed bytes of b. */
EMU __m512i emu_dpbusd_epi32(__m512i src, __m512i a, __m512i b)
{
    Emu out = {.si = src}, x = {.si = a}, y = {.si = b};
    for (int i = 0; i < 64; i++) {
        out.u32[i / 4] += (uint32_t)((int32_t)x.u8[i] * y.i8[i]);
    }
    return out.si;
}

/* VPDPWSSD: signed words. */
EMU __m512i emu_dpwssd_epi32(__m512i src, __m512i a, __m512i b)
{
    Emu out = {.si = src}, x = {.si = a}, y = {.si = b};
    for (int i = 0; i < 32; i++) {
        out.u32[i / 2] += (uint32_t)((int32_t)x.i16[i] * y.i16[i]);
    }
    return out.si;
}

/* VDPBF16PS: srcdest + odd product, then + even product, each one fma with DAZ and FTZ. */
EMU __m512 emu_dpbf16_ps(__m512 src, EmuBf16 a, EmuBf16 b)
{
    Emu out = {.ps = src}, x, y;
    const unsigned saved = _mm_getcsr();
    memcpy(&x, &a, sizeof x);
    memcpy(&y, &b, sizeof y);
    __builtin_ia32_ldmxcsr(0x9fc0);
    for (int i = 0; i < 16; i++) {
        Emu w, v;
        w.u32[0] = x.u32[i] & 0xffff0000u, w.u32[1] = x.u32[i] << 16;
        v.u32[0] = y.u32[i] & 0xffff0000u, v.u32[1] = y.u32[i] << 16;
        out.f32[i] = emu_fma(w.f32[1], v.f32[1], emu_fma(w.f32[0], v.f32[0], out.f32[i]));
    }
    __builtin_ia32_ldmxcsr(saved);
    return out.ps;
}

#define __m512bh EmuBf16
#define _mm512_setzero_ps emu_setzero_ps
#define _mm512_set1_ps emu_set1_ps
#define _mm512_mul_ps emu_mul_ps
#define _mm512_fmadd_ps emu_fmadd_ps
#define _mm512_fnmadd_ps emu_fnmadd_ps
#define _mm512_cvtepi32_ps emu_cvtepi32_ps
#define _mm512_castsi512_ps emu_castsi512_ps
#define _mm512_setzero_si512 emu_setzero_si512
#define _mm512_set1_epi32 emu_set1_epi32
#define _mm512_set1_epi8 emu_set1_epi8
#define _mm512_and_si512 emu_and_si512
#define _mm512_or_si512 emu_or_si512
#define _mm512_add_epi32 emu_add_epi32
#define _mm512_sub_epi32 emu_sub_epi32
#define _mm512_mullo_epi32 emu_mullo_epi32
#undef _mm512_slli_epi16
#undef _mm512_srli_epi16
#undef _mm512_slli_epi32
#undef _mm512_srai_epi32
#define _mm512_slli_epi16 emu_slli_epi16
#define _mm512_srli_epi16 emu_srli_epi16
#define _mm512_slli_epi32 emu_slli_epi32
#define _mm512_srai_epi32 emu_srai_epi32
#define _mm512_loadu_si512 emu_loadu_si512
#define _mm512_loadu_ps emu_loadu_ps
#define _mm512_store_ps emu_store_ps
#define _mm512_cvtph_ps emu_cvtph_ps
#define _mm512_cvtepu8_epi32 emu_cvtepu8_epi32
#define _mm512_cvtepu8_epi16 emu_cvtepu8_epi16
#define _mm512_cvtepi8_epi16 emu_cvtepi8_epi16
#define _mm512_dpbusd_epi32 emu_dpbusd_epi32
#define _mm512_dpwssd_epi32 emu_dpwssd_epi32
#define _mm512_dpbf16_ps emu_dpbf16_ps
