/* Activations of a block for products with F8_E4M3 weights. Bits of e4m3, moved to where f16 has
 * them, mean 2^-8 of their value, subnormals included; 2^8 times the activations make the same
 * products of them, exactly, and so the same sums. For AVX2 and AVX-512 kernels. */
#pragma once

#include <immintrin.h>
#include <stdbool.h>
#include <stdint.h>

#define F8_BLOCK 128u

/* n floats (a multiple of 8) of a block, 2^8 times. False if one of them is too large for that
 * (from 2^120 on) or not finite: `to` is of no use then. */
static inline bool f8_act_scale(const uint8_t *act, unsigned n, float *to)
{
    const __m256 scale = _mm256_set1_ps(0x1p8f);
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i largest = _mm256_setzero_si256();
    for (unsigned i = 0; i < n; i += 8) {
        const __m256 x = _mm256_loadu_ps((const float *)(const void *)act + i);
        _mm256_store_ps(to + i, _mm256_mul_ps(x, scale));
        largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(x), magnitude));
    }
    const __m256i limit = _mm256_set1_epi32(0x7b7fffff); /* the last float below 2^120 */
    return _mm256_movemask_epi8(_mm256_cmpgt_epi32(largest, limit)) == 0;
}

/* Of 16 pairs of weights (a row of RecordF8) those of the even and the odd k, as f16. */
static inline __m256i f8_odd(__m256i pairs)
{
    return _mm256_and_si256(_mm256_srai_epi16(pairs, 1), _mm256_set1_epi16((short)0xbf80));
}

static inline __m256i f8_even(__m256i pairs)
{
    return f8_odd(_mm256_slli_epi16(pairs, 8));
}
