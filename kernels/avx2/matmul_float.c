/* Products of float weights: F32 and F16 as fmaf chains, BF16 as bf16dot (NUMERICS 10). A tile is 4
 * rows x one panel; a lone row takes two panels at once, because one chain a lane does not cover
 * the latency of fma. */
#include "kernels/avx2/matmul.h"
#include "kernels/vector/flush.h"

ALWAYS_INLINE void floats_load(Dtype type, const uint8_t *w, __m256 out[2])
{
    if (type == DTYPE_F32) {
        out[0] = _mm256_loadu_ps((const float *)w);
        out[1] = _mm256_loadu_ps((const float *)w + 8);
    } else {
        out[0] = load_f16x8((const uint16_t *)w);
        out[1] = load_f16x8((const uint16_t *)w + 8);
    }
}

/* P panels x R rows, P * R <= 4. */
ALWAYS_INLINE void float_tile(Dtype type, const uint8_t *w, size_t w_stride, const uint8_t *act,
                              uint32_t n_records, TileTo to, unsigned P, unsigned R)
{
    const unsigned bytes = type == DTYPE_F32 ? sizeof(RecordF32) : sizeof(RecordF16);
    __m256 acc[4][2];
    lanes_clear(acc, P * R);
    for (uint32_t k = 0; k < n_records; k++, w += bytes, act += 4 * R) {
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            __m256 weight[2];
            floats_load(type, w + p * w_stride, weight);
            prefetch_line(w + p * w_stride);
            UNROLL
            for (unsigned r = 0; r < R; r++) {
                const __m256 x = broadcast_f32(act + 4 * r);
                acc[p * R + r][0] = _mm256_fmadd_ps(weight[0], x, acc[p * R + r][0]);
                acc[p * R + r][1] = _mm256_fmadd_ps(weight[1], x, acc[p * R + r][1]);
            }
        }
    }
    tile_store(to, acc, P * R);
}

ALWAYS_INLINE void result_done(__m256 *v)
{
    __asm__ volatile("" : "+x"(*v) : : "memory");
}

ALWAYS_INLINE __m256 bf16_even(__m256i pairs)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
}

ALWAYS_INLINE __m256 bf16_odd(__m256i pairs)
{
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000u)));
}

ALWAYS_INLINE void bf16_tile(const uint8_t *w, size_t w_stride, const uint8_t *act,
                             uint32_t n_records, TileTo to, unsigned P, unsigned R)
{
    __m256 acc[4][2];
    const unsigned saved = flush_begin();
    lanes_clear(acc, P * R);
    for (uint32_t k = 0; k < n_records; k++, w += sizeof(RecordBF16), act += 4 * R) {
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            const __m256i w0 = load256(w + p * w_stride), w1 = load256(w + p * w_stride + 32);
            const __m256 even0 = bf16_even(w0), odd0 = bf16_odd(w0), even1 = bf16_even(w1),
                         odd1 = bf16_odd(w1);
            prefetch_line(w + p * w_stride);
            UNROLL
            for (unsigned r = 0; r < R; r++) {
                const __m256i x = broadcast_i32(act + 4 * r);
                const __m256 x_even = bf16_even(x), x_odd = bf16_odd(x);
                __m256 *a = acc[p * R + r];
                a[0] = _mm256_fmadd_ps(even0, x_even, _mm256_fmadd_ps(odd0, x_odd, a[0]));
                a[1] = _mm256_fmadd_ps(even1, x_even, _mm256_fmadd_ps(odd1, x_odd, a[1]));
            }
        }
    }
    UNROLL
    for (unsigned i = 0; i < P * R; i++) {
        result_done(&acc[i][0]);
        result_done(&acc[i][1]);
    }
    flush_end(saved);
    tile_store(to, acc, P * R);
}

#define F32_TILE(w, w_stride, act, n_records, to, R)                                               \
    float_tile(DTYPE_F32, w, w_stride, act, n_records, to, (R) == 1 ? 2 : 1, R)
#define F16_TILE(w, w_stride, act, n_records, to, R)                                               \
    float_tile(DTYPE_F16, w, w_stride, act, n_records, to, (R) == 1 ? 2 : 1, R)
#define BF16_TILE(w, w_stride, act, n_records, to, R)                                              \
    bf16_tile(w, w_stride, act, n_records, to, (R) == 1 ? 2 : 1, R)

MATMUL_SLOT(f32, F32_TILE, 2, 1)
MATMUL_SLOT(f16, F16_TILE, 2, 1)
MATMUL_SLOT(bf16, BF16_TILE, 2, 1)

void matmul_fill_avx2_float(Kernels *kernels)
{
    kernels->matmul[DTYPE_F32] = matmul_f32;
    kernels->matmul[DTYPE_F16] = matmul_f16;
    kernels->matmul[DTYPE_BF16] = matmul_bf16;
}
