/* Activation quantisation: the same values as generic/quant.c, whose comments define them. */
#include "kernels/avx2/matmul.h"

#include <math.h>
#include <string.h>

/* Magnitudes compare as integers, and above 0x7f7fffff there is no finite one. */
static inline uint32_t magnitude_max(__m256i max)
{
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(max), _mm256_extracti128_si256(max, 1));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
    return (uint32_t)_mm_cvtsi128_si32(m);
}

ALWAYS_INLINE void block_scale(const float *x, unsigned n, float *d, float *inverse)
{
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i max = _mm256_setzero_si256();
    float amax;
    for (unsigned i = 0; i < n; i += 8) {
        max = _mm256_max_epu32(max, _mm256_and_si256(load256(x + i), magnitude));
    }
    const uint32_t bits = magnitude_max(max);
    memcpy(&amax, &bits, sizeof amax);
    const bool finite = bits < 0x7f800000u;
    *d = finite ? amax / 127.0f : NAN;
    *inverse = finite && amax >= ACT_AMAX_MIN ? 127.0f / amax : 0;
}

/* 32 quants in order. */
ALWAYS_INLINE __m256i quants32(const float *x, float inverse)
{
    const __m256 scale = _mm256_set1_ps(inverse);
    __m256i q[4];
    if (inverse == 0) {
        return _mm256_setzero_si256();
    }
    UNROLL
    for (unsigned i = 0; i < 4; i++) {
        q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), scale));
    }
    /* The packs work in 128-bit halves: words come out as 0 2 4 6 1 3 5 7 of four elements each. */
    const __m256i bytes =
        _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

ALWAYS_INLINE void quants_store(__m256i q, unsigned R, unsigned r, uint8_t *tile)
{
    _Alignas(32) uint32_t words[8];
    _mm256_store_si256((__m256i *)words, q);
    UNROLL
    for (unsigned g = 0; g < 8; g++) {
        memcpy(tile + (g * R + r) * 4, &words[g], 4);
    }
}

/* Sums of 16 and 16 quants. */
ALWAYS_INLINE __m128i half_sums(__m256i q)
{
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), q);
    __m256i sums = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    sums = _mm256_hadd_epi32(sums, sums);
    sums = _mm256_hadd_epi32(sums, sums);
    return _mm_unpacklo_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
}

static inline void store_f32(uint8_t *p, float v)
{
    memcpy(p, &v, sizeof v);
}

static inline void store_i32(uint8_t *p, int32_t v)
{
    memcpy(p, &v, sizeof v);
}

static inline void store_i16(uint8_t *p, int v)
{
    const int16_t narrow = (int16_t)v;
    memcpy(p, &narrow, sizeof narrow);
}

ALWAYS_INLINE void tile_q8_32(const float *x, unsigned R, unsigned r, uint8_t *tile)
{
    float d, inverse;
    block_scale(x, 32, &d, &inverse);
    const __m256i q = quants32(x, inverse);
    const __m128i halves = half_sums(q);
    const int32_t sum = _mm_extract_epi32(halves, 0) + _mm_extract_epi32(halves, 1);
    quants_store(q, R, r, tile);
    store_f32(tile + ACT_Q8_32_D(R) + 4 * r, d);
    store_f32(tile + ACT_Q8_32_DS(R) + 4 * r, d * (float)sum);
    store_i32(tile + ACT_Q8_32_START8(R) + 4 * r, -8 * sum);
    store_i32(tile + ACT_Q8_32_START16(R) + 4 * r, -16 * sum);
    store_i32(tile + ACT_Q8_32_START128(R) + 4 * r, -128 * sum);
}

ALWAYS_INLINE void tile_q8_256(const float *x, unsigned R, unsigned r, uint8_t *tile)
{
    float d, inverse;
    block_scale(x, 256, &d, &inverse);
    for (unsigned b = 0; b < 8; b++) {
        const __m256i q = quants32(x + 32 * b, inverse);
        const __m128i halves = half_sums(q);
        const int s0 = _mm_extract_epi32(halves, 0), s1 = _mm_extract_epi32(halves, 1);
        quants_store(q, R, r, tile + b * 32 * R);
        store_i16(tile + ACT_Q8_256_SUM32(R) + (b / 2 * R + r) * 4 + b % 2 * 2, s0 + s1);
        store_i16(tile + ACT_Q8_256_SUM16(R) + (b * R + r) * 4, s0);
        store_i16(tile + ACT_Q8_256_SUM16(R) + (b * R + r) * 4 + 2, s1);
    }
    store_f32(tile + ACT_Q8_256_D(R) + 4 * r, d);
}

static const float zero_row[256];

/* Rows of a group go one after another, rows that are not there as zeros. */
ALWAYS_INLINE void quantise_groups(ActKind kind, const float *x, size_t ld, uint32_t rows,
                                   uint32_t row0, uint32_t row1, uint32_t n_in, uint8_t *buffer)
{
    const uint32_t step = kind == ACT_Q8_256 ? 256 : 32;
    const size_t row_bytes = act_row_bytes(kind, n_in), tile_bytes = act_tile_row_bytes(kind);
    for (uint32_t group = row0 / ACT_ROW_GROUP; group * ACT_ROW_GROUP < row1; group++) {
        const uint32_t R = act_group_rows(rows, group);
        for (uint32_t r = 0; r < R; r++) {
            const uint32_t row = group * ACT_ROW_GROUP + r;
            uint8_t *tile = buffer + group * ACT_ROW_GROUP * row_bytes;
            for (uint32_t k = 0; k < n_in; k += step, tile += tile_bytes * R) {
                const float *from = row < rows ? x + row * ld + k : zero_row;
                if (kind == ACT_Q8_256) {
                    tile_q8_256(from, R, r, tile);
                } else {
                    tile_q8_32(from, R, r, tile);
                }
            }
        }
    }
}

static void act_quantise_q8_32(const float *x, size_t ld, uint32_t rows, uint32_t row0,
                               uint32_t row1, uint32_t n_in, void *buffer)
{
    quantise_groups(ACT_Q8_32, x, ld, rows, row0, row1, n_in, buffer);
}

static void act_quantise_q8_256(const float *x, size_t ld, uint32_t rows, uint32_t row0,
                                uint32_t row1, uint32_t n_in, void *buffer)
{
    quantise_groups(ACT_Q8_256, x, ld, rows, row0, row1, n_in, buffer);
}

/* f32 to bf16, nearest even, NaN quiet: the integer form of f32_to_bf16(). */
ALWAYS_INLINE __m256i bf16_of(__m256i bits)
{
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_cmpgt_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)),
                                           _mm256_set1_epi32(0x7f800000));
    return _mm256_blendv_epi8(rounded, quiet, nan);
}

/* One row: pairs of k side by side in 32 bits, R words apart. */
static void row_bf16(const float *x, uint32_t n_in, unsigned R, unsigned r, uint8_t *to)
{
    uint32_t k = 0;
    to += 4 * r;
    for (; k + 8 <= n_in; k += 8) {
        const __m256i halves = bf16_of(load256(x + k));
        /* Low halves of two 32-bit elements to one: shift the odd one up into its pair. */
        const __m256i pairs = _mm256_or_si256(halves, _mm256_srli_epi64(halves, 16));
        _Alignas(32) uint64_t words[4];
        _mm256_store_si256((__m256i *)words, pairs);
        UNROLL
        for (unsigned i = 0; i < 4; i++, to += 4 * R) {
            const uint32_t pair = (uint32_t)words[i];
            memcpy(to, &pair, sizeof pair);
        }
    }
    for (; k < n_in; k += 2, to += 4 * R) {
        const uint16_t pair[2] = {f32_to_bf16(x[k]), k + 1 < n_in ? f32_to_bf16(x[k + 1]) : 0};
        memcpy(to, pair, sizeof pair);
    }
}

static void row_f32(const float *x, uint32_t n_in, unsigned R, unsigned r, uint8_t *to)
{
    float *out = (float *)to + r;
    if (R == 1) {
        memcpy(out, x, (size_t)n_in * sizeof(float));
        return;
    }
    for (uint32_t k = 0; k < n_in; k++) {
        out[(size_t)k * R] = x[k];
    }
}

ALWAYS_INLINE void copy_groups(ActKind kind, const float *x, size_t ld, uint32_t rows,
                               uint32_t row0, uint32_t row1, uint32_t n_in, uint8_t *buffer)
{
    const size_t row_bytes = act_row_bytes(kind, n_in);
    for (uint32_t group = row0 / ACT_ROW_GROUP; group * ACT_ROW_GROUP < row1; group++) {
        const uint32_t R = act_group_rows(rows, group), first = group * ACT_ROW_GROUP;
        uint8_t *to = buffer + first * row_bytes;
        if (rows - first < R) {
            memset(to, 0, R * row_bytes);
        }
        for (uint32_t r = 0; r < R && first + r < rows; r++) {
            if (kind == ACT_BF16) {
                row_bf16(x + (first + r) * ld, n_in, R, r, to);
            } else {
                row_f32(x + (first + r) * ld, n_in, R, r, to);
            }
        }
    }
}

static void act_quantise_bf16(const float *x, size_t ld, uint32_t rows, uint32_t row0,
                              uint32_t row1, uint32_t n_in, void *buffer)
{
    copy_groups(ACT_BF16, x, ld, rows, row0, row1, n_in, buffer);
}

static void act_quantise_f32(const float *x, size_t ld, uint32_t rows, uint32_t row0, uint32_t row1,
                             uint32_t n_in, void *buffer)
{
    copy_groups(ACT_F32, x, ld, rows, row0, row1, n_in, buffer);
}

void quant_fill_avx2(Kernels *kernels)
{
    kernels->act_quantise[ACT_F32] = act_quantise_f32;
    kernels->act_quantise[ACT_BF16] = act_quantise_bf16;
    kernels->act_quantise[ACT_Q8_32] = act_quantise_q8_32;
    kernels->act_quantise[ACT_Q8_256] = act_quantise_q8_256;
}
