/* What the AVX-512 matmul files share. A tile is R rows x P panels, one vector of 16 lanes a panel.
 */
#pragma once

#include "kernels/fill.h"
#include "kernels/ops/matmul_drive.h"

#include <immintrin.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
/* Bytes: fits one thread's stream from DRAM for all types (measured). */
#define PREFETCH_AHEAD 8192

/* Loop bounds are constants after inlining, array dimensions are literally so: gcc 12 keeps the
 * arrays in registers only then. */
typedef struct Sums {
    __m512i v[4][2];
} Sums;
typedef struct Accs {
    __m512 v[4][2];
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

/* The merges happen while the sums are in registers. */
ALWAYS_INLINE void accs_store(TileTo to, Accs *a, unsigned P, unsigned R)
{
    for (; to.n_merges > 0; to.n_merges--) {
        to.at -= TILE_FLOATS;
        UNROLL
        for (unsigned r = 0; r < R; r++) {
            UNROLL
            for (unsigned p = 0; p < P; p++) {
                const __m512 left = _mm512_loadu_ps(to.at + (p * R + r) * PANEL_ROWS);
                a->v[r][p] = _mm512_add_ps(left, a->v[r][p]);
            }
        }
    }
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            _mm512_store_ps(to.at + (p * R + r) * PANEL_ROWS, a->v[r][p]);
        }
    }
}

/* body(w, w_stride, act, n_records, to, P, R); a lone row takes P1 panels at once, four rows two.
 */
#define MATMUL_SLOT(name, body, P1)                                                                \
    static void tile1_##name(const uint8_t *w, size_t w_stride, const uint8_t *act,                \
                             uint32_t n_records, TileTo to)                                        \
    {                                                                                              \
        body(w, w_stride, act, n_records, to, P1, 1);                                              \
    }                                                                                              \
    static void tile4_##name(const uint8_t *w, size_t w_stride, const uint8_t *act,                \
                             uint32_t n_records, TileTo to)                                        \
    {                                                                                              \
        body(w, w_stride, act, n_records, to, 2, 4);                                               \
    }                                                                                              \
    static void matmul_##name(const MatmulArgs *args)                                              \
    {                                                                                              \
        matmul_drive(args, (TileKernel){tile1_##name, tile4_##name, P1, 2});                       \
    }

void matmul_fill_avx512_float(Kernels *kernels);
void matmul_fill_avx512_f8(Kernels *kernels);
void matmul_fill_avx512_q32(Kernels *kernels);
void matmul_fill_avx512_k(Kernels *kernels);
void matmul_fill_avx512_bf16(Kernels *kernels);
