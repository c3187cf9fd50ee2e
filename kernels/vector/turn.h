/* Rows become columns, by blocks of 8 x 8 that both instruction sets turn in registers. */
#pragma once

#include <immintrin.h>
#include <stdint.h>

/* to[k] = element k of from[0..7]. */
VEC_FN void turn_8x8(const __m256 from[8], __m256 to[8])
{
    __m256 pairs[8], quads[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* rows i, i + 4 */
        pairs[2 * i] = _mm256_unpacklo_ps(from[2 * i], from[2 * i + 1]);
        pairs[2 * i + 1] = _mm256_unpackhi_ps(from[2 * i], from[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], _MM_SHUFFLE(1, 0, 1, 0));
        quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], _MM_SHUFFLE(3, 2, 3, 2));
        quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], _MM_SHUFFLE(1, 0, 1, 0));
        quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], _MM_SHUFFLE(3, 2, 3, 2));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        to[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
        to[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
    }
}

/* out[t][c], c < 8, rows of out out_step apart: element t of row c of src; rows from n on (src is
 * not read then) are zeros. */
VEC_FN void turn_columns_8(const float *src, size_t row, uint32_t n, uint32_t length, float *out,
                           size_t out_step)
{
    uint32_t t = 0;
    for (; n == 8 && t + 8 <= length; t += 8) {
        __m256 from[8], to[8];
#pragma GCC unroll 8
        for (unsigned c = 0; c < 8; c++) {
            from[c] = _mm256_loadu_ps(src + c * row + t);
        }
        turn_8x8(from, to);
#pragma GCC unroll 8
        for (unsigned k = 0; k < 8; k++) {
            _mm256_storeu_ps(out + (t + k) * out_step, to[k]);
        }
    }
    for (; t < length; t++) {
        for (uint32_t c = 0; c < 8; c++) {
            out[t * out_step + c] = c < n ? src[c * row + t] : 0.0f;
        }
    }
}

/* out[t][r] = element t of row r of src, r < 4. */
VEC_FN void turn_rows_4(const float *src, size_t row, uint32_t length, float *out)
{
    uint32_t t = 0;
    for (; t + 8 <= length; t += 8) {
        const __m256 a = _mm256_loadu_ps(src + t), b = _mm256_loadu_ps(src + row + t),
                     c = _mm256_loadu_ps(src + 2 * row + t), d = _mm256_loadu_ps(src + 3 * row + t);
        const __m256 ab0 = _mm256_unpacklo_ps(a, b), ab1 = _mm256_unpackhi_ps(a, b),
                     cd0 = _mm256_unpacklo_ps(c, d), cd1 = _mm256_unpackhi_ps(c, d);
        /* steps 0 and 4, 1 and 5, 2 and 6, 3 and 7 */
        const __m256 p = _mm256_shuffle_ps(ab0, cd0, _MM_SHUFFLE(1, 0, 1, 0)),
                     q = _mm256_shuffle_ps(ab0, cd0, _MM_SHUFFLE(3, 2, 3, 2)),
                     u = _mm256_shuffle_ps(ab1, cd1, _MM_SHUFFLE(1, 0, 1, 0)),
                     v = _mm256_shuffle_ps(ab1, cd1, _MM_SHUFFLE(3, 2, 3, 2));
        _mm256_storeu_ps(out + 4 * t, _mm256_permute2f128_ps(p, q, 0x20));
        _mm256_storeu_ps(out + 4 * t + 8, _mm256_permute2f128_ps(u, v, 0x20));
        _mm256_storeu_ps(out + 4 * t + 16, _mm256_permute2f128_ps(p, q, 0x31));
        _mm256_storeu_ps(out + 4 * t + 24, _mm256_permute2f128_ps(u, v, 0x31));
    }
    for (; t < length; t++) {
        for (uint32_t r = 0; r < 4; r++) {
            out[4 * t + r] = src[r * row + t];
        }
    }
}
