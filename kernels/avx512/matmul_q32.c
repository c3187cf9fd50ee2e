/* Products of 32-element blocks: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0. vpdpbusd adds four products of
 * unsigned weights and signed activations to an i32 without saturating; the offset of signed types
 * is where the sum starts (start_c of the activation tile). */
#include "kernels/avx512/matmul.h"

/* q, qh: of the first panel; five: the quants have a fifth bit. */
ALWAYS_INLINE void nibble_block(Sums *s, const uint8_t *q, const uint8_t *qh, bool five,
                                size_t w_stride, const uint8_t *act, unsigned P, unsigned R)
{
    const __m512i low = _mm512_set1_epi8(15), bit = _mm512_set1_epi8(16);
    UNROLL
    for (unsigned j = 0; j < 4; j++) {
        __m512i w0[2], w1[2];
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            const __m512i both = load512(q + p * w_stride + 64 * j);
            w0[p] = _mm512_and_si512(both, low);
            w1[p] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
            if (five) {
                const __m512i high = load512(qh + p * w_stride);
                w0[p] =
                    _mm512_or_si512(w0[p], _mm512_and_si512(shift16(high, 4 - 2 * (int)j), bit));
                w1[p] =
                    _mm512_or_si512(w1[p], _mm512_and_si512(shift16(high, 3 - 2 * (int)j), bit));
            }
        }
        group_add(s, w0, 2 * j, act, P, R);
        group_add(s, w1, 2 * j + 1, act, P, R);
    }
}

ALWAYS_INLINE void byte_block(Sums *s, const uint8_t *q, size_t w_stride, const uint8_t *act,
                              unsigned P, unsigned R)
{
    UNROLL
    for (unsigned g = 0; g < 8; g++) {
        __m512i w[2];
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            w[p] = load512(q + p * w_stride + 64 * g);
        }
        group_add(s, w, g, act, P, R);
    }
}

/* acc = fmaf((float)s, d_w * d_a, acc), then the minimum: acc = fmaf(m_w, d_a * sum_a, acc). */
ALWAYS_INLINE void block_add(Accs *acc, const Sums *s, const uint16_t *d, const uint16_t *m,
                             size_t w_stride, const uint8_t *act, unsigned P, unsigned R)
{
    UNROLL
    for (unsigned p = 0; p < P; p++) {
        const __m512 dw = load_f16x16((const uint16_t *)((const uint8_t *)d + p * w_stride));
        const __m512 mw = m ? load_f16x16((const uint16_t *)((const uint8_t *)m + p * w_stride))
                            : _mm512_setzero_ps();
        UNROLL
        for (unsigned r = 0; r < R; r++) {
            const __m512 scale = _mm512_mul_ps(dw, broadcast_f32(act + ACT_Q8_32_D(R) + 4 * r));
            acc->v[r][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s->v[r][p]), scale, acc->v[r][p]);
            if (m) {
                acc->v[r][p] =
                    _mm512_fmadd_ps(mw, broadcast_f32(act + ACT_Q8_32_DS(R) + 4 * r), acc->v[r][p]);
            }
        }
    }
}

#define Q32_TILE(name, Record, block_sums, minimum, start)                                         \
    ALWAYS_INLINE void name##_tile(const uint8_t *w, size_t w_stride, const uint8_t *act,          \
                                   uint32_t n_records, TileTo to, unsigned P, unsigned R)          \
    {                                                                                              \
        Accs acc;                                                                                  \
        accs_clear(&acc, P, R);                                                                    \
        for (uint32_t i = 0; i < n_records; i++, w += sizeof(Record), act += ACT_Q8_32_TILE(R)) {  \
            const Record *b = (const Record *)w;                                                   \
            Sums s;                                                                                \
            UNROLL                                                                                 \
            for (unsigned p = 0; p < P; p++) {                                                     \
                prefetch_record(w + p * w_stride, sizeof(Record));                                 \
            }                                                                                      \
            sums_start(&s, start, act, P, R);                                                      \
            block_sums;                                                                            \
            block_add(&acc, &s, b->d, minimum, w_stride, act, P, R);                               \
        }                                                                                          \
        accs_store(to, &acc, P, R);                                                                \
    }

Q32_TILE(q4_0, RecordQ40, nibble_block(&s, b->q[0], NULL, false, w_stride, act, P, R), NULL,
         (int)ACT_Q8_32_START8(R))
Q32_TILE(q4_1, RecordQ41, nibble_block(&s, b->q[0], NULL, false, w_stride, act, P, R), b->m, -1)
Q32_TILE(q5_0, RecordQ50, nibble_block(&s, b->q[0], b->qh, true, w_stride, act, P, R), NULL,
         (int)ACT_Q8_32_START16(R))
Q32_TILE(q5_1, RecordQ51, nibble_block(&s, b->q[0], b->qh, true, w_stride, act, P, R), b->m, -1)
Q32_TILE(q8_0, RecordQ80, byte_block(&s, b->q[0], w_stride, act, P, R), NULL,
         (int)ACT_Q8_32_START128(R))

MATMUL_SLOT_WIDE(q4_0, q4_0_tile, 1)
MATMUL_SLOT_WIDE(q4_1, q4_1_tile, 1)
MATMUL_SLOT_WIDE(q5_0, q5_0_tile, 1)
MATMUL_SLOT_WIDE(q5_1, q5_1_tile, 1)
MATMUL_SLOT_WIDE(q8_0, q8_0_tile, 1)

void matmul_fill_avx512_q32(Kernels *kernels)
{
    kernels->matmul[DTYPE_Q4_0] = matmul_q4_0;
    kernels->matmul[DTYPE_Q4_1] = matmul_q4_1;
    kernels->matmul[DTYPE_Q5_0] = matmul_q5_0;
    kernels->matmul[DTYPE_Q5_1] = matmul_q5_1;
    kernels->matmul[DTYPE_Q8_0] = matmul_q8_0;
}
