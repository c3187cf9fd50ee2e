/* Products of float weights with many rows: F32, F16, BF16 (by two fmas) and F8_E4M3 on weights
 * widened to f32 once for all rows (ops/matmul_wide.h). The sums are those of matmul_float.c and
 * matmul_f8.c. 12 fmas for 3 loads and 4 broadcasts. */
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

/* sum += one k: w [16] of each panel times x [R]. */
ALWAYS_INLINE void step_add(Accs *sum, const uint8_t *w, const uint8_t *x, unsigned P, unsigned R)
{
    __m512 weight[WIDE_PANELS];
    UNROLL
    for (unsigned p = 0; p < P; p++) {
        weight[p] = _mm512_loadu_ps((const float *)(w + p * WIDE_SCRATCH_BYTES));
    }
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        const __m512 a = broadcast_f32(x + 4 * r);
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            sum->v[r][p] = _mm512_fmadd_ps(weight[p], a, sum->v[r][p]);
        }
    }
}

/* n of them, one after the other. */
ALWAYS_INLINE void steps_add(Accs *sum, const uint8_t *w, const uint8_t *x, uint32_t n, unsigned P,
                             unsigned R)
{
    for (; n > 0; n--, w += sizeof(WideF32), x += 4 * R) {
        step_add(sum, w, x, P, R);
    }
}

ALWAYS_INLINE void float_wide(const uint8_t *scratch, const uint8_t *act, const WideChunk *chunk,
                              float *level, unsigned P, unsigned R)
{
    for (uint32_t u = 0; u < chunk->n_runs; u++) {
        const uint32_t n = chunk->runs[u].n_records;
        Accs acc;
        wide_tile_load(&acc, level, chunk->fresh || u > 0, P, R);
        steps_add(&acc, scratch, act, n, P, R);
        level = wide_tile_store(&acc, level, chunk->runs[u].n_merges, P, R);
        scratch += n * sizeof(WideF32);
        act += (size_t)n * 4 * R;
    }
}

#define WIDE_PAIRS (WIDE_SCRATCH_BYTES / sizeof(WideBF16))
/* Rows' pairs as f32. */
typedef struct WidePairs {
    _Alignas(64) float odd[(WIDE_PAIRS + 3) / 4 * 4 * ACT_ROW_GROUP];
    _Alignas(64) float even[(WIDE_PAIRS + 3) / 4 * 4 * ACT_ROW_GROUP];
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

ALWAYS_INLINE void bf16_wide(const uint8_t *scratch, const uint8_t *act, const WideChunk *chunk,
                             float *level, unsigned P, unsigned R)
{
    WidePairs wide;
    const uint8_t *odd = (const uint8_t *)wide.odd, *even = (const uint8_t *)wide.even;
    pairs_widen(act, chunk->n_records * R, &wide);
    for (uint32_t u = 0; u < chunk->n_runs; u++) {
        Accs acc;
        wide_tile_load(&acc, level, chunk->fresh || u > 0, P, R);
        const unsigned saved = flush_begin();
        for (uint32_t i = chunk->runs[u].n_records; i > 0;
             i--, scratch += sizeof(WideBF16), odd += 4 * R, even += 4 * R) {
            step_add(&acc, scratch + offsetof(WideBF16, odd), odd, P, R);
            step_add(&acc, scratch + offsetof(WideBF16, even), even, P, R);
        }
        UNROLL
        for (unsigned r = 0; r < R; r++) {
            UNROLL
            for (unsigned p = 0; p < P; p++) {
                result_done(&acc.v[r][p]);
            }
        }
        flush_end(saved);
        level = wide_tile_store(&acc, level, chunk->runs[u].n_merges, P, R);
    }
}

ALWAYS_INLINE void f8_wide(const uint8_t *scratch, const uint8_t *act, const WideChunk *chunk,
                           float *level, unsigned P, unsigned R)
{
    for (uint32_t u = 0; u < chunk->n_runs; u++) {
        Accs acc;
        wide_tile_load(&acc, level, chunk->fresh || u > 0, P, R);
        for (uint32_t i = chunk->runs[u].n_records; i > 0; i--) {
            Accs sum;
            accs_clear(&sum, P, R);
            steps_add(&sum, scratch + offsetof(WideF8, w), act, F8_BLOCK, P, R);
            UNROLL
            for (unsigned p = 0; p < P; p++) {
                const __m512 scale =
                    _mm512_loadu_ps((const float *)(scratch + p * WIDE_SCRATCH_BYTES));
                UNROLL
                for (unsigned r = 0; r < R; r++) {
                    acc.v[r][p] = _mm512_fmadd_ps(scale, sum.v[r][p], acc.v[r][p]);
                }
            }
            scratch += sizeof(WideF8);
            act += F8_BLOCK * 4 * R;
        }
        level = wide_tile_store(&acc, level, chunk->runs[u].n_merges, P, R);
    }
}

WIDE_KERNEL(f32, float_wide, sizeof(WideF32), 16)
WIDE_KERNEL(f16, float_wide, sizeof(WideF32), 16)
WIDE_KERNEL(bf16, bf16_wide, sizeof(WideBF16), 16)
WIDE_KERNEL(f8, f8_wide, sizeof(WideF8), 16)
