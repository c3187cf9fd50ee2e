/* Scalar arithmetic that every instruction set repeats step by step (NUMERICS 7): the one
 * exponential, the sampler's logarithm and the fold of 32 virtual lanes. A vector variant uses the
 * constants below in the same order of operations, so that it gives the same bits; tests/kernels
 * compares them by memcmp. */
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef KERNEL_INLINE /* kernels/cuda compiles these for the device, too */
#define KERNEL_INLINE static inline
#endif

KERNEL_INLINE uint32_t float_bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}
KERNEL_INLINE float float_of_bits(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

/* ---- exp (KERNELS.md "exp"; at most 0.88 ulp) ---- */

#define EXP32_LOG2E 0x1.715476p+0f
#define EXP32_MAGIC                                                                                \
    12582912.0f /* 1.5 * 2^23: adding it rounds to an integer that lies in the low bits */
#define EXP32_LN2_HI 0x1.62e43p-1f
#define EXP32_LN2_LO -0x1.05c61p-29f
#define EXP32_C2 0.49999994f
#define EXP32_C3 0.166665211f
#define EXP32_C4 0.0416682661f
#define EXP32_C5 0.00836867373f
#define EXP32_C6 0.00138206338f
#define EXP32_LOWEST -87.3365402f /* below: +0 (no subnormal results) */
#define EXP32_HIGHEST 88.7228317f /* above: +inf */

KERNEL_INLINE float exp32_inline(float x)
{
    const float t = fmaf(x, EXP32_LOG2E, EXP32_MAGIC);
    const float n = t - EXP32_MAGIC;
    const float r = fmaf(n, -EXP32_LN2_LO, fmaf(n, -EXP32_LN2_HI, x));
    float p = fmaf(EXP32_C6, r, EXP32_C5);
    p = fmaf(p, r, EXP32_C4);
    p = fmaf(p, r, EXP32_C3);
    p = fmaf(p, r, EXP32_C2);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    const float y = float_of_bits(float_bits(p) + (float_bits(t) << 23));
    if (!(x <= EXP32_HIGHEST)) {
        return x + INFINITY; /* +inf, or the NaN that x is */
    }
    return x < EXP32_LOWEST ? 0.0f : y;
}

/* ---- log of a positive normal number (at most 0.75 ulp) ---- */

#define LOG32_SQRT_HALF_BITS 0x3f3504f3u /* mantissas lie in [sqrt(1/2), sqrt(2)) */
#define LOG32_LN2_HI 0x1.62e4p-1f        /* 16 bits: exponent * hi is exact */
#define LOG32_LN2_LO 0x1.7f7d1cp-20f
/* log(1 + f) = f + f^2 (f P(f) - 1/2), P minimax on that range */
#define LOG32_P0 0.33333313f
#define LOG32_P1 -0.2500001f
#define LOG32_P2 0.20002119f
#define LOG32_P3 -0.16667996f
#define LOG32_P4 0.14219551f
#define LOG32_P5 -0.12405592f
#define LOG32_P6 0.11888178f
#define LOG32_P7 -0.11675639f
#define LOG32_P8 0.06746592f

KERNEL_INLINE float log32_inline(float x)
{
    const int32_t e = (int32_t)(float_bits(x) - LOG32_SQRT_HALF_BITS) >> 23;
    const float f = float_of_bits(float_bits(x) - ((uint32_t)e << 23)) - 1.0f;
    float p = fmaf(LOG32_P8, f, LOG32_P7);
    p = fmaf(p, f, LOG32_P6);
    p = fmaf(p, f, LOG32_P5);
    p = fmaf(p, f, LOG32_P4);
    p = fmaf(p, f, LOG32_P3);
    p = fmaf(p, f, LOG32_P2);
    p = fmaf(p, f, LOG32_P1);
    p = fmaf(p, f, LOG32_P0);
    p = fmaf(p, f, -0.5f);
    const float y = fmaf(p, f * f, f);
    const float k = (float)e;
    return fmaf(k, LOG32_LN2_HI, fmaf(k, LOG32_LN2_LO, y));
}

/* ---- Gumbel noise of 32 random bits ---- */

/* -log(-log(u)), u = (bits + 1/2) / 2^32. The upper half goes through 1 - u, where log(1 - v) =
 * log(y) + d / y with y + d = 1 - v exactly: large noise (u near 1) keeps its resolution. */
KERNEL_INLINE float gumbel_inline(uint32_t bits)
{
    const uint32_t upper = (uint32_t)((int32_t)bits >> 31); /* all ones in the upper half */
    const float w = (float)(int32_t)(bits ^ upper);
    const float v = fmaf(w, 0x1p-32f, 0x1p-33f);
    const float y = upper ? 1.0f - v : v;
    const float d = upper ? (1.0f - y) - v : 0.0f;
    const float e = -(log32_inline(y) + d / y);
    return -log32_inline(e);
}

/* ---- 32 virtual lanes (NUMERICS 4) ---- */

/* node(0,32): neighbours first. Destroys the lanes. */
KERNEL_INLINE float lanes_fold(float lanes[32])
{
    for (unsigned n = 16; n > 0; n /= 2) {
        for (unsigned i = 0; i < n; i++) {
            lanes[i] = lanes[2 * i] + lanes[2 * i + 1];
        }
    }
    return lanes[0];
}
