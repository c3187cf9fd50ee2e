/* Products of F8_E4M3 weights: to f32 by way of f16, in registers, for each tile of up to 4 rows x
 * two panels. */
#include "kernels/avx512/matmul.h"
#include "kernels/vector/f8_act.h"

/* 16 weights of one k as f32, 2^-8 of their value, or the value (whole: x is as it comes), times
 * those of R rows. */
ALWAYS_INLINE void f8_add(Accs *sum, unsigned p, __m256i halves, bool whole, const uint8_t *x,
                          unsigned R)
{
    __m512 weight = _mm512_cvtph_ps(halves);
    if (whole) {
        weight = _mm512_mul_ps(weight, _mm512_set1_ps(0x1p8f));
    }
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        sum->v[r][p] = _mm512_fmadd_ps(weight, broadcast_f32(x + 4 * r), sum->v[r][p]);
    }
}

ALWAYS_INLINE void f8_block(const uint8_t *w, size_t w_stride, const uint8_t *x, bool whole,
                            Accs *sum, unsigned P, unsigned R)
{
    accs_clear(sum, P, R);
    w += offsetof(RecordF8, q);
    for (unsigned k = 0; k < F8_BLOCK; k += 4, w += 64, x += 4 * 4 * R) {
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            _mm_prefetch((const char *)w + p * w_stride + PREFETCH_AHEAD, _MM_HINT_T0);
            UNROLL
            for (unsigned i = 0; i < 2; i++) {
                const __m256i pairs =
                    _mm256_loadu_si256((const __m256i *)(const void *)(w + p * w_stride + 32 * i));
                f8_add(sum, p, f8_even(pairs), whole, x + 4 * R * (2 * i), R);
                f8_add(sum, p, f8_odd(pairs), whole, x + 4 * R * (2 * i + 1), R);
            }
        }
    }
}

ALWAYS_INLINE void f8_tile(const uint8_t *w, size_t w_stride, const uint8_t *act,
                           uint32_t n_records, TileTo to, unsigned P, unsigned R)
{
    _Alignas(32) float scaled[F8_BLOCK * 4];
    Accs acc;
    accs_clear(&acc, P, R);
    for (; n_records > 0; n_records--, w += sizeof(RecordF8), act += F8_BLOCK * 4 * R) {
        Accs sum;
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            _mm_prefetch((const char *)w + p * w_stride + PREFETCH_AHEAD, _MM_HINT_T0);
        }
        if (f8_act_scale(act, F8_BLOCK * R, scaled)) {
            f8_block(w, w_stride, (const uint8_t *)scaled, false, &sum, P, R);
        } else {
            f8_block(w, w_stride, act, true, &sum, P, R);
        }
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            const __m512 scale = _mm512_loadu_ps(((const RecordF8 *)(w + p * w_stride))->scale);
            UNROLL
            for (unsigned r = 0; r < R; r++) {
                acc.v[r][p] = _mm512_fmadd_ps(scale, sum.v[r][p], acc.v[r][p]);
            }
        }
    }
    accs_store(to, &acc, P, R);
}

MATMUL_SLOT_WIDE(f8, f8_tile, 2)

void matmul_fill_avx512_f8(Kernels *kernels)
{
    kernels->matmul[DTYPE_F8_E4M3] = matmul_f8;
}
