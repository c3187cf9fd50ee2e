/* What the AVX-512 matmul files share. A tile is R rows x P panels, one vector of 16 lanes a panel:
 * up to two panels on packed records (few rows), three on unpacked ones (many rows: 12 sums cover
 * the latency of two ports, and 7 loads serve 12 products).
 */
#pragma once

#define WIDE_ACT_BYTES (768u * 1024u) /* CPUs with AVX-512 have 1 MB and more */
#define WIDE_PANELS 3u
#define WIDE_SCRATCH_BYTES 8320u /* 128 k of f32, and their scales */
#include "kernels/fill.h"
#include "kernels/ops/matmul_wide.h"

#include <immintrin.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
/* Bytes: fits one thread's stream from DRAM for all types (measured). */
#define PREFETCH_AHEAD 8192

/* Loop bounds are constants after inlining, array dimensions are literally so: gcc 12 keeps the
 * arrays in registers only then. */
typedef struct Sums {
    __m512i v[4][WIDE_PANELS];
} Sums;
typedef struct Accs {
    __m512 v[4][WIDE_PANELS];
} Accs;

/* The cache lines of the record that lies PREFETCH_AHEAD behind this one; past the end of the
 * matrix a prefetch does nothing. */
ALWAYS_INLINE void prefetch_record(const uint8_t *w, unsigned bytes)
{
    UNROLL
    for (unsigned i = 0; i < (bytes + 63) / 64; i++) {
        _mm_prefetch((const char *)w + PREFETCH_AHEAD + 64 * i, _MM_HINT_T0);
    }
}

ALWAYS_INLINE __m512i load512(const void *p)
{
    return _mm512_loadu_si512(p);
}

ALWAYS_INLINE void store512(void *p, __m512i v)
{
    _mm512_store_ps(p, _mm512_castsi512_ps(v));
}

ALWAYS_INLINE __m512 load_f16x16(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

ALWAYS_INLINE __m512 broadcast_f32(const uint8_t *p)
{
    float v;
    __builtin_memcpy(&v, p, sizeof v);
    return _mm512_set1_ps(v);
}

ALWAYS_INLINE __m512i broadcast_i32(const uint8_t *p)
{
    int32_t v;
    __builtin_memcpy(&v, p, sizeof v);
    return _mm512_set1_epi32(v);
}

ALWAYS_INLINE __m512i shift16(__m512i x, int left)
{
    return left >= 0 ? _mm512_slli_epi16(x, (unsigned)left) : _mm512_srli_epi16(x, (unsigned)-left);
}

ALWAYS_INLINE void sums_clear(Sums *s, unsigned P, unsigned R)
{
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            s->v[r][p] = _mm512_setzero_si512();
        }
    }
}

/* start: offset of the start values in the activation tile, -1 = zero. */
ALWAYS_INLINE void sums_start(Sums *s, int start, const uint8_t *act, unsigned P, unsigned R)
{
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        const __m512i from =
            start >= 0 ? broadcast_i32(act + (unsigned)start + 4 * r) : _mm512_setzero_si512();
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            s->v[r][p] = from;
        }
    }
}

/* s += the products of group g, whose quants are w[p]. */
ALWAYS_INLINE void group_add(Sums *s, const __m512i *w, unsigned g, const uint8_t *act, unsigned P,
                             unsigned R)
{
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        const __m512i a = broadcast_i32(act + (g * R + r) * 4);
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            s->v[r][p] = _mm512_dpbusd_epi32(s->v[r][p], w[p], a);
        }
    }
}

ALWAYS_INLINE void accs_clear(Accs *a, unsigned P, unsigned R)
{
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            a->v[r][p] = _mm512_setzero_ps();
        }
    }
}

/* To a level of the stack, [p][r][lane]. Merges with the levels below it (apart: floats) happen
 * while the sums are in registers. Returns the level that they end up on. */
ALWAYS_INLINE float *levels_store(Accs *a, float *level, unsigned n_merges, unsigned apart,
                                  unsigned P, unsigned R)
{
    for (; n_merges > 0; n_merges--) {
        level -= apart;
        UNROLL
        for (unsigned r = 0; r < R; r++) {
            UNROLL
            for (unsigned p = 0; p < P; p++) {
                const __m512 left = _mm512_loadu_ps(level + (p * R + r) * PANEL_ROWS);
                a->v[r][p] = _mm512_add_ps(left, a->v[r][p]);
            }
        }
    }
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            _mm512_store_ps(level + (p * R + r) * PANEL_ROWS, a->v[r][p]);
        }
    }
    return level;
}

ALWAYS_INLINE void accs_store(TileTo to, Accs *a, unsigned P, unsigned R)
{
    levels_store(a, to.at, to.n_merges, TILE_FLOATS, P, R);
}

/* body(w, w_stride, act, n_records, to, P, R); a lone row takes P1 panels at once, four rows two.
 */
#define MATMUL_TILES(name, body, P1)                                                               \
    static void tile1_##name(const uint8_t *w, size_t w_stride, const uint8_t *act,                \
                             uint32_t n_records, TileTo to)                                        \
    {                                                                                              \
        body(w, w_stride, act, n_records, to, P1, 1);                                              \
    }                                                                                              \
    static void tile4_##name(const uint8_t *w, size_t w_stride, const uint8_t *act,                \
                             uint32_t n_records, TileTo to)                                        \
    {                                                                                              \
        body(w, w_stride, act, n_records, to, 2, 4);                                               \
    }

#define MATMUL_SLOT(name, body, P1)                                                                \
    MATMUL_TILES(name, body, P1)                                                                   \
    static void matmul_##name(const MatmulArgs *args)                                              \
    {                                                                                              \
        matmul_drive(args, (TileKernel){tile1_##name, tile4_##name, P1, 2});                       \
    }

/* ---- many rows ---- */

/* Of each panel of the scratch, the vector that lies where `at` does in the first. */
ALWAYS_INLINE void panels_load(__m512 *out, const void *at, unsigned P)
{
    UNROLL
    for (unsigned p = 0; p < P; p++) {
        out[p] = _mm512_loadu_ps((const float *)((const uint8_t *)at + p * WIDE_SCRATCH_BYTES));
    }
}

/* s += n groups of quants that lie unpacked, a cache line each, from q on. */
ALWAYS_INLINE void wide_groups_add(Sums *s, const uint8_t *q, unsigned n, const uint8_t *act,
                                   unsigned P, unsigned R)
{
    UNROLL
    for (unsigned g = 0; g < n; g++) {
        __m512i w[WIDE_PANELS];
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            w[p] = load512(q + p * WIDE_SCRATCH_BYTES + 64 * g);
        }
        group_add(s, w, g, act, P, R);
    }
}

ALWAYS_INLINE void wide_tile_load(Accs *a, const float *level, bool fresh, unsigned P, unsigned R)
{
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            a->v[r][p] =
                fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(level + (p * R + r) * PANEL_ROWS);
        }
    }
}

/* The merges of a wide tile; returns the level above the one that the sums end up on. */
ALWAYS_INLINE float *wide_tile_store(Accs *a, float *level, unsigned n_merges, unsigned P,
                                     unsigned R)
{
    return levels_store(a, level, n_merges, WIDE_TILE_FLOATS, P, R) + WIDE_TILE_FLOATS;
}

/* G groups of R rows at once: 24 sums of two groups keep both multipliers busy with 11 loads, 12 of
 * one with 7. */
typedef struct WideRows {
    const uint8_t *act;
    size_t apart; /* bytes from the first group's to the second's */
    float *level;
    size_t level_apart; /* floats */
} WideRows;

ALWAYS_INLINE void rows_load(Accs acc[2], const WideRows *rows, bool fresh, unsigned P, unsigned R,
                             unsigned G)
{
    UNROLL
    for (unsigned g = 0; g < G; g++) {
        wide_tile_load(&acc[g], rows->level + g * rows->level_apart, fresh, P, R);
    }
}

ALWAYS_INLINE void rows_store(Accs acc[2], WideRows *rows, unsigned n_merges, unsigned P,
                              unsigned R, unsigned G)
{
    float *next = rows->level;
    UNROLL
    for (unsigned g = 0; g < G; g++) {
        float *level =
            wide_tile_store(&acc[g], rows->level + g * rows->level_apart, n_merges, P, R);
        next = g == 0 ? level : next;
    }
    rows->level = next;
}

#define WIDE_TILE(name, body, P, R)                                                                \
    static void wide##R##x##P##_##name(const uint8_t *scratch, const uint8_t *act,                 \
                                       const WideChunk *chunk, float *level)                       \
    {                                                                                              \
        body(scratch, act, chunk, level, P, R);                                                    \
    }

/* pair(scratch, act, act_apart, chunk, level, level_apart, P) */
#define WIDE_PAIR(name, pair, P)                                                                   \
    static void wide8x##P##_##name(const uint8_t *scratch, const uint8_t *act, size_t act_apart,   \
                                   const WideChunk *chunk, float *level, size_t level_apart)       \
    {                                                                                              \
        pair(scratch, act, act_apart, chunk, level, level_apart, P);                               \
    }
#define WIDE_PAIRS(name, pair)                                                                     \
    WIDE_PAIR(name, pair, 1) WIDE_PAIR(name, pair, 2) WIDE_PAIR(name, pair, 3)

/* A type's kernel for many rows, name_wide_avx512, from its unpacking and its tile; the last
 * argument: `.row8 = ...`. */
#define WIDE_KERNEL(name, body, record_bytes, from, ...)                                           \
    WIDE_TILE(name, body, 1, 1)                                                                    \
    WIDE_TILE(name, body, 2, 1)                                                                    \
    WIDE_TILE(name, body, 3, 1)                                                                    \
    WIDE_TILE(name, body, 1, 4)                                                                    \
    WIDE_TILE(name, body, 2, 4)                                                                    \
    WIDE_TILE(name, body, 3, 4)                                                                    \
    const WideKernel name##_wide_avx512 = {                                                        \
        .unpack = name##_unpack,                                                                   \
        .row1 = {wide1x1_##name, wide1x2_##name, wide1x3_##name},                                  \
        .row4 = {wide4x1_##name, wide4x2_##name, wide4x3_##name},                                  \
        .scratch_record_bytes = record_bytes,                                                      \
        .rows_from = from,                                                                         \
        __VA_ARGS__,                                                                               \
    };

/* A tile of floats for one group, name_wide, and for two, name_pair. */
#define ROWS_WIDE(name, rows)                                                                      \
    ALWAYS_INLINE void name##_wide(const uint8_t *scratch, const uint8_t *act,                     \
                                   const WideChunk *chunk, float *level, unsigned P, unsigned R)   \
    {                                                                                              \
        rows(scratch, (WideRows){.act = act, .level = level}, chunk, P, R, 1);                     \
    }                                                                                              \
    ALWAYS_INLINE void name##_pair(const uint8_t *scratch, const uint8_t *act, size_t act_apart,   \
                                   const WideChunk *chunk, float *level, size_t level_apart,       \
                                   unsigned P)                                                     \
    {                                                                                              \
        rows(scratch, (WideRows){act, act_apart, level, level_apart}, chunk, P, 4, 2);             \
    }

/* Its kernel. */
#define WIDE_KERNEL_PAIRS(name, type, record_bytes, from)                                          \
    WIDE_PAIRS(name, type##_pair)                                                                  \
    WIDE_KERNEL(name, type##_wide, record_bytes, from,                                             \
                .row8 = {wide8x1_##name, wide8x2_##name, wide8x3_##name})

/* A slot that takes few rows record by record, many on unpacked quants. */
#define MATMUL_SLOT_WIDE(name, body, P1)                                                           \
    MATMUL_TILES(name, body, P1)                                                                   \
    static void matmul_##name(const MatmulArgs *args)                                              \
    {                                                                                              \
        if (args->rows >= name##_wide_avx512.rows_from) {                                          \
            matmul_drive_wide(args, &name##_wide_avx512);                                          \
        } else {                                                                                   \
            matmul_drive(args, (TileKernel){tile1_##name, tile4_##name, P1, 2});                   \
        }                                                                                          \
    }

extern const WideKernel q4_0_wide_avx512, q4_1_wide_avx512, q5_0_wide_avx512, q5_1_wide_avx512,
    q8_0_wide_avx512, q4_k_wide_avx512, q5_k_wide_avx512, q6_k_wide_avx512, f32_wide_avx512,
    f16_wide_avx512, bf16_wide_avx512, bf16_dots_wide_avx512, f8_wide_avx512;

void matmul_fill_avx512_float(Kernels *kernels);
void matmul_fill_avx512_f8(Kernels *kernels);
void matmul_fill_avx512_q32(Kernels *kernels);
void matmul_fill_avx512_k(Kernels *kernels);
void matmul_fill_avx512_bf16(Kernels *kernels);
