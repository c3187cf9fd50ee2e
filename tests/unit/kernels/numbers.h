/* Reproducible test numbers. */
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct Numbers {
    uint64_t state;
} Numbers;

/* SplitMix64 (Steele, Lea, Flood 2014). */
static inline uint64_t numbers_u64(Numbers *self)
{
    uint64_t z = self->state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

/* Uniform in [low, high). */
static inline double numbers_uniform(Numbers *self, double low, double high)
{
    return low + (high - low) * (double)(numbers_u64(self) >> 11) * 0x1p-53;
}

static inline void numbers_fill(Numbers *self, float *out, size_t n, double low, double high)
{
    for (size_t i = 0; i < n; i++) {
        out[i] = (float)numbers_uniform(self, low, high);
    }
}

static inline float numbers_float_of(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}
