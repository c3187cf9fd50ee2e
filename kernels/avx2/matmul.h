/* What the AVX2 matmul files share: the prefetch distance, small loads, the making of a slot from
 * two tile functions. */
#pragma once

#include "kernels/fill.h"
#include "kernels/ops/matmul_drive.h"
#include "kernels/ops/matmul_wide.h"

#include <immintrin.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#ifndef PREFETCH_AHEAD
#define PREFETCH_AHEAD 8192u
#endif

ALWAYS_INLINE void prefetch_line(const uint8_t *p)
{
    _mm_prefetch((const char *)p + PREFETCH_AHEAD, _MM_HINT_T0);
}

/* The cache lines of the record that lies PREFETCH_AHEAD behind this one. A line that two records
 * share is asked for twice: cheaper than finding out. Past the end of the matrix a prefetch does
 * nothing. */
ALWAYS_INLINE void prefetch_record(const uint8_t *w, unsigned bytes)
{
    UNROLL
    for (unsigned i = 0; i < (bytes + 63) / 64; i++) {
        prefetch_line(w + 64 * i);
    }
}

/* Part b of 8 of a record of whole lines. Lines ascend, or the hardware's own prefetcher loses the
 * stream (half the speed, measured). */
ALWAYS_INLINE void prefetch_part(const uint8_t *w, unsigned b, unsigned bytes)
{
    const unsigned lines = bytes / 64, first = b * lines / 8, last = (b + 1) * lines / 8;
    UNROLL
    for (unsigned i = 0; i < lines / 8; i++) {
        prefetch_line(w + 64 * (first + i));
    }
    if (last - first > lines / 8) {
        prefetch_line(w + 64 * (last - 1));
    }
}

ALWAYS_INLINE __m256i load256(const void *p)
{
    return _mm256_loadu_si256((const __m256i *)p);
}

ALWAYS_INLINE __m256 load_f16x8(const uint16_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

ALWAYS_INLINE __m256 broadcast_f32(const uint8_t *p)
{
    return _mm256_broadcast_ss((const float *)p);
}

ALWAYS_INLINE __m256i broadcast_i32(const uint8_t *p)
{
    int32_t v;
    __builtin_memcpy(&v, p, sizeof v);
    return _mm256_set1_epi32(v);
}

ALWAYS_INLINE void lanes_clear(__m256 acc[4][2], unsigned n)
{
    UNROLL
    for (unsigned i = 0; i < n; i++) {
        acc[i][0] = acc[i][1] = _mm256_setzero_ps();
    }
}

/* n rows of lanes to a level of the stack. Merges with the levels below it (apart: floats) happen
 * while the sums are in registers. Returns the level that they end up on. */
ALWAYS_INLINE float *lanes_store(__m256 acc[4][2], unsigned n, float *level, unsigned n_merges,
                                 unsigned apart)
{
    for (; n_merges > 0; n_merges--) {
        level -= apart;
        UNROLL
        for (unsigned i = 0; i < n; i++) {
            UNROLL
            for (unsigned v = 0; v < 2; v++) {
                const __m256 left = _mm256_load_ps(level + i * PANEL_ROWS + 8 * v);
                acc[i][v] = _mm256_add_ps(left, acc[i][v]);
            }
        }
    }
    UNROLL
    for (unsigned i = 0; i < n; i++) {
        _mm256_store_ps(level + i * PANEL_ROWS, acc[i][0]);
        _mm256_store_ps(level + i * PANEL_ROWS + 8, acc[i][1]);
    }
    return level;
}

ALWAYS_INLINE void tile_store(TileTo to, __m256 acc[4][2], unsigned n)
{
    lanes_store(acc, n, to.at, to.n_merges, TILE_FLOATS);
}

/* A type's products for 1 and 4 rows. */
#define MATMUL_TILES(name, body)                                                                   \
    static void tile1_##name(const uint8_t *w, size_t w_stride, const uint8_t *act,                \
                             uint32_t n_records, TileTo to)                                        \
    {                                                                                              \
        body(w, w_stride, act, n_records, to, 1);                                                  \
    }                                                                                              \
    static void tile4_##name(const uint8_t *w, size_t w_stride, const uint8_t *act,                \
                             uint32_t n_records, TileTo to)                                        \
    {                                                                                              \
        body(w, w_stride, act, n_records, to, 4);                                                  \
    }

#define MATMUL_SLOT(name, body, panels1, panels4)                                                  \
    MATMUL_TILES(name, body)                                                                       \
    static void matmul_##name(const MatmulArgs *args)                                              \
    {                                                                                              \
        matmul_drive(args, (TileKernel){tile1_##name, tile4_##name, panels1, panels4});            \
    }

ALWAYS_INLINE void wide_tile_load(__m256 acc[4][2], const float *level, bool fresh, unsigned R)
{
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        UNROLL
        for (unsigned v = 0; v < 2; v++) {
            acc[r][v] =
                fresh ? _mm256_setzero_ps() : _mm256_load_ps(level + r * PANEL_ROWS + 8 * v);
        }
    }
}

/* The merges of a wide tile; returns the level above the one that the sums end up on. */
ALWAYS_INLINE float *wide_tile_store(__m256 acc[4][2], float *level, unsigned n_merges, unsigned R)
{
    return lanes_store(acc, R, level, n_merges, WIDE_TILE_FLOATS) + WIDE_TILE_FLOATS;
}

/* A type's kernel for many rows, name_wide_kernel, from its unpacking, its tile and its tile that
 * unpacks (or NULL). */
#define WIDE_KERNEL(name, body, first, record_bytes, from)                                         \
    static void wide1_##name(const uint8_t *scratch, const uint8_t *act, const WideChunk *chunk,   \
                             float *level)                                                         \
    {                                                                                              \
        body(scratch, act, chunk, level, 1);                                                       \
    }                                                                                              \
    static void wide4_##name(const uint8_t *scratch, const uint8_t *act, const WideChunk *chunk,   \
                             float *level)                                                         \
    {                                                                                              \
        body(scratch, act, chunk, level, 4);                                                       \
    }                                                                                              \
    const WideKernel name##_wide_kernel = {                                                        \
        .unpack = name##_unpack,                                                                   \
        .row1 = {wide1_##name},                                                                    \
        .row4 = {wide4_##name},                                                                    \
        .first4 = first,                                                                           \
        .scratch_record_bytes = record_bytes,                                                      \
        .rows_from = from,                                                                         \
    };

/* A slot that takes few rows record by record, many on unpacked quants. */
#define MATMUL_SLOT_WIDE(name, body)                                                               \
    MATMUL_TILES(name, body)                                                                       \
    static void matmul_##name(const MatmulArgs *args)                                              \
    {                                                                                              \
        if (args->rows >= name##_wide_kernel.rows_from) {                                          \
            matmul_drive_wide(args, &name##_wide_kernel);                                          \
        } else {                                                                                   \
            matmul_drive(args, (TileKernel){tile1_##name, tile4_##name, 1, 1});                    \
        }                                                                                          \
    }

extern const WideKernel q4_0_wide_kernel, q4_1_wide_kernel, q5_0_wide_kernel, q5_1_wide_kernel,
    q8_0_wide_kernel, q4_k_wide_kernel, q5_k_wide_kernel, q6_k_wide_kernel, f8_wide_kernel;

void matmul_fill_avx2_float(Kernels *kernels);
void matmul_fill_avx2_f8(Kernels *kernels);
void matmul_fill_avx2_q32(Kernels *kernels);
void matmul_fill_avx2_k(Kernels *kernels);
