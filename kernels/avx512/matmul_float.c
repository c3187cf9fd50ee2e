/* Products of float weights: F32 and F16 as fmaf chains, BF16 as bf16dot (NUMERICS 10) by two fmas;
 * matmul_bf16.c has it in one instruction. */
#include "kernels/avx512/flush.h"
#include "kernels/avx512/matmul.h"

ALWAYS_INLINE void float_tile(Dtype type, const uint8_t *w, size_t w_stride, const uint8_t *act,
                              uint32_t n_records, TileTo to, unsigned P, unsigned R)
{
    const unsigned bytes = type == DTYPE_F32 ? sizeof(RecordF32) : sizeof(RecordF16);
    Accs acc;
    accs_clear(&acc, P, R);
    for (uint32_t k = 0; k < n_records; k++, w += bytes, act += 4 * R) {
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            const uint8_t *from = w + p * w_stride;
            const __m512 weight = type == DTYPE_F32 ? _mm512_loadu_ps((const float *)from)
                                                    : load_f16x16((const uint16_t *)from);
            _mm_prefetch((const char *)from + PREFETCH_AHEAD, _MM_HINT_T0);
            UNROLL
            for (unsigned r = 0; r < R; r++) {
                acc.v[r][p] = _mm512_fmadd_ps(weight, broadcast_f32(act + 4 * r), acc.v[r][p]);
            }
        }
    }
    accs_store(to, &acc, P, R);
}

ALWAYS_INLINE void bf16_tile(const uint8_t *w, size_t w_stride, const uint8_t *act,
                             uint32_t n_records, TileTo to, unsigned P, unsigned R)
{
    Accs acc;
    const unsigned saved = flush_begin();
    accs_clear(&acc, P, R);
    for (uint32_t k = 0; k < n_records; k++, w += sizeof(RecordBF16), act += 4 * R) {
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            const __m512i pairs = load512(w + p * w_stride);
            const __m512 even = bf16_even(pairs), odd = bf16_odd(pairs);
            _mm_prefetch((const char *)w + p * w_stride + PREFETCH_AHEAD, _MM_HINT_T0);
            UNROLL
            for (unsigned r = 0; r < R; r++) {
                const __m512i x = broadcast_i32(act + 4 * r);
                acc.v[r][p] = _mm512_fmadd_ps(even, bf16_even(x),
                                              _mm512_fmadd_ps(odd, bf16_odd(x), acc.v[r][p]));
            }
        }
    }
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            result_done(&acc.v[r][p]);
        }
    }
    flush_end(saved);
    accs_store(to, &acc, P, R);
}

#define F32_TILE(w, w_stride, act, n_records, to, P, R)                                            \
    float_tile(DTYPE_F32, w, w_stride, act, n_records, to, P, R)
#define F16_TILE(w, w_stride, act, n_records, to, P, R)                                            \
    float_tile(DTYPE_F16, w, w_stride, act, n_records, to, P, R)

/* A lone row takes two panels: one chain does not cover the latency of fma. */
MATMUL_SLOT_WIDE(f32, F32_TILE, 2)
MATMUL_SLOT_WIDE(f16, F16_TILE, 2)
MATMUL_SLOT_WIDE(bf16, bf16_tile, 2)

void matmul_fill_avx512_float(Kernels *kernels)
{
    kernels->matmul[DTYPE_F32] = matmul_f32;
    kernels->matmul[DTYPE_F16] = matmul_f16;
    kernels->matmul[DTYPE_BF16] = matmul_bf16;
}
