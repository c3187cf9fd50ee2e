/* Products of float weights with many rows: F32, F16, BF16 (by two fmas) and F8_E4M3 on weights
 * widened to f32 once for all rows (ops/matmul_wide.h). The sums are those of matmul_float.c and
 * matmul_f8.c. */
#include "kernels/avx512/flush.h"
#include "kernels/avx512/matmul.h"
#include "kernels/vector/f8_act.h"

typedef struct WideF32 {
    float w[16];
} WideF32;

/* The odd element of a pair comes first (NUMERICS 10). */
typedef struct WideBF16 {
    float odd[16], even[16];
} WideBF16;

typedef struct WideF8 {
    float scale[16];
    float w[F8_BLOCK][16];
} WideF8;

_Static_assert(sizeof(WideF8) <= WIDE_SCRATCH_BYTES, "a block fits the scratch");

static void f32_unpack(const uint8_t *w, uint32_t n_records, uint8_t *scratch)
{
    __builtin_memcpy(scratch, w, n_records * sizeof(RecordF32));
}

static void f16_unpack(const uint8_t *w, uint32_t n_records, uint8_t *scratch)
{
    WideF32 *to = (WideF32 *)scratch;
    for (const RecordF16 *b = (const RecordF16 *)w; n_records > 0; n_records--, b++, to++) {
        _mm512_store_ps(to->w, load_f16x16(b->w));
    }
}

static void bf16_unpack(const uint8_t *w, uint32_t n_records, uint8_t *scratch)
{
    WideBF16 *to = (WideBF16 *)scratch;
    for (; n_records > 0; n_records--, w += sizeof(RecordBF16), to++) {
        const __m512i pairs = load512(w);
        _mm512_store_ps(to->odd, bf16_odd(pairs));
        _mm512_store_ps(to->even, bf16_even(pairs));
    }
}

static void f8_unpack(const uint8_t *w, uint32_t n_records, uint8_t *scratch)
{
    const __m512 whole = _mm512_set1_ps(0x1p8f);
    WideF8 *to = (WideF8 *)scratch;
    for (const RecordF8 *b = (const RecordF8 *)w; n_records > 0; n_records--, b++, to++) {
        __builtin_memcpy(to->scale, b->scale, sizeof to->scale);
        for (unsigned k = 0; k < F8_BLOCK; k += 2) {
            const __m256i pairs = _mm256_loadu_si256((const __m256i *)(const void *)b->q[k / 2]);
            _mm512_store_ps(to->w[k], _mm512_mul_ps(_mm512_cvtph_ps(f8_even(pairs)), whole));
            _mm512_store_ps(to->w[k + 1], _mm512_mul_ps(_mm512_cvtph_ps(f8_odd(pairs)), whole));
        }
    }
}

/* acc += one k: w [16] of each panel times x [R]. */
ALWAYS_INLINE void step_add(Accs acc[2], const uint8_t *w, const uint8_t *x, size_t apart,
                            unsigned P, unsigned R, unsigned G)
{
    __m512 weight[WIDE_PANELS];
    UNROLL
    for (unsigned p = 0; p < P; p++) {
        weight[p] = _mm512_loadu_ps((const float *)(w + p * WIDE_SCRATCH_BYTES));
    }
    UNROLL
    for (unsigned g = 0; g < G; g++) {
        UNROLL
        for (unsigned r = 0; r < R; r++) {
            const __m512 a = broadcast_f32(x + g * apart + 4 * r);
            UNROLL
            for (unsigned p = 0; p < P; p++) {
                acc[g].v[r][p] = _mm512_fmadd_ps(weight[p], a, acc[g].v[r][p]);
            }
        }
    }
}

/* n of them, one after the other. */
ALWAYS_INLINE void steps_add(Accs acc[2], const uint8_t *w, const uint8_t *x, size_t apart,
                             uint32_t n, unsigned P, unsigned R, unsigned G)
{
    for (; n > 0; n--, w += sizeof(WideF32), x += 4 * R) {
        step_add(acc, w, x, apart, P, R, G);
    }
}

ALWAYS_INLINE void float_rows(const uint8_t *scratch, WideRows rows, const WideChunk *chunk,
                              unsigned P, unsigned R, unsigned G)
{
    for (uint32_t u = 0; u < chunk->n_runs; u++) {
        const uint32_t n = chunk->runs[u].n_records;
        Accs acc[2];
        rows_load(acc, &rows, chunk->fresh || u > 0, P, R, G);
        steps_add(acc, scratch, rows.act, rows.apart, n, P, R, G);
        rows_store(acc, &rows, chunk->runs[u].n_merges, P, R, G);
        scratch += n * sizeof(WideF32);
        rows.act += (size_t)n * 4 * R;
    }
}

#define WIDE_PAIRS_OF_BF16 (WIDE_SCRATCH_BYTES / sizeof(WideBF16))
/* A group's pairs as f32. */
typedef struct WidePairs {
    _Alignas(64) float odd[WIDE_PAIRS_OF_BF16 * ACT_ROW_GROUP];
    _Alignas(64) float even[WIDE_PAIRS_OF_BF16 * ACT_ROW_GROUP];
} WidePairs;

ALWAYS_INLINE void pairs_widen(const uint8_t *act, uint32_t n, WidePairs *to)
{
    uint32_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m512i pairs = load512(act + 4 * i);
        _mm512_store_ps(to->odd + i, bf16_odd(pairs));
        _mm512_store_ps(to->even + i, bf16_even(pairs));
    }
    for (; i < n; i++) {
        uint32_t pair;
        __builtin_memcpy(&pair, act + 4 * i, sizeof pair);
        const uint32_t odd = pair & 0xffff0000u, even = pair << 16;
        __builtin_memcpy(to->odd + i, &odd, sizeof odd);
        __builtin_memcpy(to->even + i, &even, sizeof even);
    }
}

ALWAYS_INLINE void bf16_rows(const uint8_t *scratch, WideRows rows, const WideChunk *chunk,
                             unsigned P, unsigned R, unsigned G)
{
    WidePairs wide[2];
    const uint8_t *odd = (const uint8_t *)wide[0].odd, *even = (const uint8_t *)wide[0].even;
    UNROLL
    for (unsigned g = 0; g < G; g++) {
        pairs_widen(rows.act + g * rows.apart, chunk->n_records * R, &wide[g]);
    }
    for (uint32_t u = 0; u < chunk->n_runs; u++) {
        Accs acc[2];
        rows_load(acc, &rows, chunk->fresh || u > 0, P, R, G);
        const unsigned saved = flush_begin();
        for (uint32_t i = chunk->runs[u].n_records; i > 0;
             i--, scratch += sizeof(WideBF16), odd += 4 * R, even += 4 * R) {
            step_add(acc, scratch + offsetof(WideBF16, odd), odd, sizeof wide[0], P, R, G);
            step_add(acc, scratch + offsetof(WideBF16, even), even, sizeof wide[0], P, R, G);
        }
        UNROLL
        for (unsigned i = 0; i < G * R * P; i++) {
            result_done(&acc[i / (R * P)].v[i / P % R][i % P]);
        }
        flush_end(saved);
        rows_store(acc, &rows, chunk->runs[u].n_merges, P, R, G);
    }
}

ALWAYS_INLINE void f8_rows(const uint8_t *scratch, WideRows rows, const WideChunk *chunk,
                           unsigned P, unsigned R, unsigned G)
{
    for (uint32_t u = 0; u < chunk->n_runs; u++) {
        Accs acc[2];
        rows_load(acc, &rows, chunk->fresh || u > 0, P, R, G);
        for (uint32_t i = chunk->runs[u].n_records; i > 0;
             i--, scratch += sizeof(WideF8), rows.act += F8_BLOCK * 4 * R) {
            Accs sum[2];
            accs_clear(&sum[0], P, R);
            accs_clear(&sum[1], P, R);
            steps_add(sum, scratch + offsetof(WideF8, w), rows.act, rows.apart, F8_BLOCK, P, R, G);
            UNROLL
            for (unsigned p = 0; p < P; p++) {
                const __m512 scale =
                    _mm512_loadu_ps((const float *)(scratch + p * WIDE_SCRATCH_BYTES));
                UNROLL
                for (unsigned j = 0; j < G * R; j++) {
                    acc[j / R].v[j % R][p] =
                        _mm512_fmadd_ps(scale, sum[j / R].v[j % R][p], acc[j / R].v[j % R][p]);
                }
            }
        }
        rows_store(acc, &rows, chunk->runs[u].n_merges, P, R, G);
    }
}

ROWS_WIDE(float, float_rows)
ROWS_WIDE(bf16, bf16_rows)
ROWS_WIDE(f8, f8_rows)

WIDE_KERNEL_PAIRS(f32, float, sizeof(WideF32), 20)
WIDE_KERNEL_PAIRS(f16, float, sizeof(WideF32), 20)
WIDE_KERNEL_PAIRS(bf16, bf16, sizeof(WideBF16), 20)
WIDE_KERNEL_PAIRS(f8, f8, sizeof(WideF8), 8)
