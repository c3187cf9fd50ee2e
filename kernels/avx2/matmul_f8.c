/* Products of F8_E4M3 weights. Few rows: weights to f32 by way of f16, in registers, for each tile
 * of 4 rows x one panel or one row x two panels. Many rows: unpacked once for all
 * (ops/matmul_wide.h), which leaves nothing but loads and fmas. */
#include "kernels/avx2/matmul.h"
#include "kernels/vector/f8_act.h"

/* ---- few rows ---- */

/* 16 weights of one k as f32: 2^-8 of their value, or the value. */
ALWAYS_INLINE void f8_widen(__m256i halves, bool whole, __m256 out[2])
{
    const __m256 scale = _mm256_set1_ps(0x1p8f);
    out[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    out[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
    if (whole) {
        out[0] = _mm256_mul_ps(out[0], scale);
        out[1] = _mm256_mul_ps(out[1], scale);
    }
}

ALWAYS_INLINE void f8_add(__m256 sum[4][2], const __m256 weight[2], const uint8_t *x, unsigned R)
{
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        const __m256 v = broadcast_f32(x + 4 * r);
        sum[r][0] = _mm256_fmadd_ps(weight[0], v, sum[r][0]);
        sum[r][1] = _mm256_fmadd_ps(weight[1], v, sum[r][1]);
    }
}

/* The sums of one block of P panels x R rows, P * R <= 4. whole: x is as it comes. */
ALWAYS_INLINE void f8_block(const uint8_t *w, size_t w_stride, const uint8_t *x, bool whole,
                            __m256 sum[4][2], unsigned P, unsigned R)
{
    lanes_clear(sum, P * R);
    w += offsetof(RecordF8, q);
    for (unsigned k = 0; k < F8_BLOCK; k += 4, w += 64, x += 4 * 4 * R) {
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            prefetch_line(w + p * w_stride);
            UNROLL
            for (unsigned i = 0; i < 2; i++) {
                const __m256i pairs = load256(w + p * w_stride + 32 * i);
                __m256 weight[2];
                f8_widen(f8_even(pairs), whole, weight);
                f8_add(sum + p * R, weight, x + 4 * R * (2 * i), R);
                f8_widen(f8_odd(pairs), whole, weight);
                f8_add(sum + p * R, weight, x + 4 * R * (2 * i + 1), R);
            }
        }
    }
}

/* acc = fmaf(scale, sum, acc). */
ALWAYS_INLINE void f8_block_add(const uint8_t *w, size_t w_stride, __m256 sum[4][2],
                                __m256 acc[4][2], unsigned P, unsigned R)
{
    UNROLL
    for (unsigned p = 0; p < P; p++) {
        const float *scale = ((const RecordF8 *)(w + p * w_stride))->scale;
        UNROLL
        for (unsigned i = p * R; i < (p + 1) * R; i++) {
            acc[i][0] = _mm256_fmadd_ps(_mm256_loadu_ps(scale), sum[i][0], acc[i][0]);
            acc[i][1] = _mm256_fmadd_ps(_mm256_loadu_ps(scale + 8), sum[i][1], acc[i][1]);
        }
    }
}

ALWAYS_INLINE void f8_tile(const uint8_t *w, size_t w_stride, const uint8_t *act,
                           uint32_t n_records, TileTo to, unsigned R)
{
    const unsigned P = R == 1 ? 2 : 1;
    _Alignas(32) float scaled[F8_BLOCK * 4];
    __m256 acc[4][2];
    lanes_clear(acc, P * R);
    for (; n_records > 0; n_records--, w += sizeof(RecordF8), act += F8_BLOCK * 4 * R) {
        __m256 sum[4][2];
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            prefetch_line(w + p * w_stride);
        }
        if (f8_act_scale(act, F8_BLOCK * R, scaled)) {
            f8_block(w, w_stride, (const uint8_t *)scaled, false, sum, P, R);
        } else {
            f8_block(w, w_stride, act, true, sum, P, R);
        }
        f8_block_add(w, w_stride, sum, acc, P, R);
    }
    tile_store(to, acc, P * R);
}

/* ---- many rows ---- */

typedef struct WideF8 {
    float scale[16];
    float w[F8_BLOCK][16];
} WideF8;

_Static_assert(sizeof(WideF8) <= WIDE_SCRATCH_BYTES, "a block fits the scratch");

static void f8_unpack(const uint8_t *w, uint32_t n_records, uint8_t *scratch)
{
    WideF8 *to = (WideF8 *)scratch;
    for (const RecordF8 *b = (const RecordF8 *)w; n_records > 0; n_records--, b++, to++) {
        __builtin_memcpy(to->scale, b->scale, sizeof to->scale);
        for (unsigned k = 0; k < F8_BLOCK; k += 2) {
            const __m256i pairs = load256(b->q[k / 2]);
            __m256 even[2], odd[2];
            f8_widen(f8_even(pairs), true, even);
            f8_widen(f8_odd(pairs), true, odd);
            _mm256_store_ps(to->w[k], even[0]);
            _mm256_store_ps(to->w[k] + 8, even[1]);
            _mm256_store_ps(to->w[k + 1], odd[0]);
            _mm256_store_ps(to->w[k + 1] + 8, odd[1]);
        }
    }
}

ALWAYS_INLINE void f8_wide(const uint8_t *scratch, const uint8_t *act, const WideChunk *chunk,
                           float *level, unsigned R)
{
    const WideF8 *b = (const WideF8 *)scratch;
    for (uint32_t u = 0; u < chunk->n_runs; u++) {
        __m256 acc[4][2];
        wide_tile_load(acc, level, chunk->fresh || u > 0, R);
        for (uint32_t i = chunk->runs[u].n_records; i > 0; i--, b++) {
            __m256 sum[4][2];
            lanes_clear(sum, R);
            for (unsigned k = 0; k < F8_BLOCK; k++, act += 4 * R) {
                const __m256 weight[2] = {_mm256_load_ps(b->w[k]), _mm256_load_ps(b->w[k] + 8)};
                f8_add(sum, weight, act, R);
            }
            f8_block_add((const uint8_t *)b, 0, sum, acc, 1, R);
        }
        level = wide_tile_store(acc, level, chunk->runs[u].n_merges, R);
    }
}

WIDE_KERNEL(f8, f8_wide, NULL, sizeof(WideF8), 16)
MATMUL_TILES(f8, f8_tile)

static void matmul_f8(const MatmulArgs *args)
{
    if (args->rows >= f8_wide_kernel.rows_from) {
        matmul_drive_wide(args, &f8_wide_kernel);
    } else {
        matmul_drive(args, (TileKernel){tile1_f8, tile4_f8, 2, 1});
    }
}

void matmul_fill_avx2_f8(Kernels *kernels)
{
    kernels->matmul[DTYPE_F8_E4M3] = matmul_f8;
}
