/* The arithmetic of bf16dot (NUMERICS 10) in plain C, whatever the flush modes are. */
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef KERNEL_INLINE /* kernels/cuda compiles these for the device, too */
#define KERNEL_INLINE static inline
#endif

KERNEL_INLINE float flush_subnormal(float x)
{
    return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x;
}

/* Units of bf16dot fold so. */
KERNEL_INLINE float add_flushed(float a, float b)
{
    return flush_subnormal(flush_subnormal(a) + flush_subnormal(b));
}

/* fma(a, b, c) of bf16 a, b with subnormal operands read as zero and a subnormal result written as
 * zero; "subnormal" is decided after rounding to 24 bits with unbounded exponent, as x86 does
 * (NUMERICS 10). The product is exact in double; the sum is rounded to odd there, which makes the
 * second rounding harmless (Boldo and Melquiond 2008). */
KERNEL_INLINE float fma_flushed(float a, float b, float c)
{
    const double p = (double)flush_subnormal(a) * (double)flush_subnormal(b),
                 q = (double)flush_subnormal(c);
    double s = p + q;
    if (!isfinite(s)) {
        return (float)s;
    }
    const double back = s - p, error = (p - (s - back)) + (q - back);
    if (error != 0) {
        int64_t bits;
        memcpy(&bits, &s, sizeof bits);
        if ((bits & 1) == 0) {
            bits += (error > 0) == (s > 0) ? 1 : -1;
            memcpy(&s, &bits, sizeof s);
        }
    }
    return fabs(s) < 0x1p-126 - 0x1p-151 ? copysignf(0, (float)s) : (float)s;
}
