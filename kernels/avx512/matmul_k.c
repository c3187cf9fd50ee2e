/* Products of 256-element super-blocks: Q4_K, Q5_K, Q6_K. vpdpbusd sums a sub-block, vpmulld scales
 * it; all exact in i32 (bounds: avx2/matmul_k.c). */
#include "kernels/avx512/matmul.h"

typedef enum Bits { BITS_4 = 4, BITS_5 = 5, BITS_6 = 6 } Bits;

/* Quants of group g (of 8); bits above the nibbles from qh (Q5: a row a sub-block, Q6: two). */
ALWAYS_INLINE __m512i group_quants(Bits bits, const uint8_t *q, const uint8_t *qh, unsigned g)
{
    const __m512i both = load512(q + 64 * (g / 2));
    __m512i w = _mm512_and_si512(g % 2 ? _mm512_srli_epi16(both, 4) : both, _mm512_set1_epi8(15));
    if (bits == BITS_5) {
        w = _mm512_or_si512(
            w, _mm512_and_si512(shift16(load512(qh), 4 - (int)g), _mm512_set1_epi8(0x10)));
    } else if (bits == BITS_6) {
        const __m512i high = shift16(load512(qh + 64 * (g / 4)), 4 - 2 * (int)(g % 4));
        w = _mm512_or_si512(w, _mm512_and_si512(high, _mm512_set1_epi8(0x30)));
    }
    return w;
}

/* total += scale * (groups [g0, g1) of a sub-block). */
ALWAYS_INLINE void groups_add(Bits bits, Sums *total, const uint8_t *q, const uint8_t *qh,
                              size_t w_stride, const uint8_t *act, unsigned P, unsigned R,
                              unsigned g0, unsigned g1, const __m512i scale[2])
{
    Sums s;
    sums_clear(&s, P, R);
    UNROLL
    for (unsigned g = g0; g < g1; g++) {
        __m512i w[2];
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            w[p] =
                group_quants(bits, q + p * w_stride, bits == BITS_4 ? NULL : qh + p * w_stride, g);
        }
        group_add(&s, w, g, act, P, R);
    }
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            total->v[r][p] =
                _mm512_add_epi32(total->v[r][p], _mm512_mullo_epi32(s.v[r][p], scale[p]));
        }
    }
}

/* acc = fmaf(sign (float)s, d_w * d_a, acc) */
ALWAYS_INLINE void scaled_add(Accs *acc, const Sums *s, const uint16_t *d, bool negative,
                              size_t w_stride, const uint8_t *act, unsigned P, unsigned R)
{
    UNROLL
    for (unsigned p = 0; p < P; p++) {
        const __m512 dw = load_f16x16((const uint16_t *)((const uint8_t *)d + p * w_stride));
        UNROLL
        for (unsigned r = 0; r < R; r++) {
            const __m512 scale = _mm512_mul_ps(dw, broadcast_f32(act + ACT_Q8_256_D(R) + 4 * r));
            const __m512 sum = _mm512_cvtepi32_ps(s->v[r][p]);
            acc->v[r][p] = negative ? _mm512_fnmadd_ps(sum, scale, acc->v[r][p])
                                    : _mm512_fmadd_ps(sum, scale, acc->v[r][p]);
        }
    }
}

/* s += pairs of i16 weights . pairs of activation sums at `sums`. */
ALWAYS_INLINE void pairs_add(Sums *s, const __m512i pairs[2], const uint8_t *sums, unsigned P,
                             unsigned R)
{
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        const __m512i a = broadcast_i32(sums + 4 * r);
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            s->v[r][p] = _mm512_dpwssd_epi32(s->v[r][p], pairs[p], a);
        }
    }
}

/* sum of m * (sum of activations) over the 8 sub-blocks, two at a time. */
ALWAYS_INLINE void minima(Sums *s, const uint8_t *m, size_t w_stride, const uint8_t *act,
                          unsigned P, unsigned R)
{
    sums_clear(s, P, R);
    UNROLL
    for (unsigned pair = 0; pair < 4; pair++) {
        __m512i m16[2];
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            m16[p] = _mm512_cvtepu8_epi16(
                _mm256_loadu_si256((const __m256i *)(m + p * w_stride + 32 * pair)));
        }
        pairs_add(s, m16, act + ACT_Q8_256_SUM32(R) + pair * R * 4, P, R);
    }
}

#define AFFINE_K_TILE(name, Record, bits, qh_of_b)                                                 \
    ALWAYS_INLINE void name##_tile(const uint8_t *w, size_t w_stride, const uint8_t *act,          \
                                   uint32_t n_records, TileTo to, unsigned P, unsigned R)          \
    {                                                                                              \
        Accs acc;                                                                                  \
        accs_clear(&acc, P, R);                                                                    \
        for (uint32_t i = 0; i < n_records; i++, w += sizeof(Record), act += ACT_Q8_256_TILE(R)) { \
            const Record *rec = (const Record *)w;                                                 \
            Sums total, mins;                                                                      \
            sums_clear(&total, P, R);                                                              \
            for (unsigned b = 0; b < 8; b++) {                                                     \
                __m512i scale[2];                                                                  \
                UNROLL                                                                             \
                for (unsigned p = 0; p < P; p++) {                                                 \
                    scale[p] = _mm512_cvtepu8_epi32(                                               \
                        _mm_loadu_si128((const __m128i *)(rec->sc[b] + p * w_stride)));            \
                    prefetch_record(w + p * w_stride + b * (sizeof(Record) / 8),                   \
                                    sizeof(Record) / 8);                                           \
                }                                                                                  \
                groups_add(bits, &total, rec->q[b][0], qh_of_b, w_stride, act + b * 32 * R, P, R,  \
                           0, 8, scale);                                                           \
            }                                                                                      \
            minima(&mins, rec->m[0][0], w_stride, act, P, R);                                      \
            scaled_add(&acc, &total, rec->d, false, w_stride, act, P, R);                          \
            scaled_add(&acc, &mins, rec->dmin, true, w_stride, act, P, R);                         \
        }                                                                                          \
        accs_store(to, &acc, P, R);                                                                \
    }

AFFINE_K_TILE(q4_k, RecordQ4K, BITS_4, NULL)
AFFINE_K_TILE(q5_k, RecordQ5K, BITS_5, rec->qh[b])

/* Quants are taken unsigned: S = sum sc * (unsigned dot) - 32 * sum sc * (sum of activations). */
ALWAYS_INLINE void q6_k_tile(const uint8_t *w, size_t w_stride, const uint8_t *act,
                             uint32_t n_records, TileTo to, unsigned P, unsigned R)
{
    Accs acc;
    accs_clear(&acc, P, R);
    for (uint32_t i = 0; i < n_records; i++, w += sizeof(RecordQ6K), act += ACT_Q8_256_TILE(R)) {
        const RecordQ6K *rec = (const RecordQ6K *)w;
        Sums total, offset;
        sums_clear(&total, P, R);
        sums_clear(&offset, P, R);
        for (unsigned b = 0; b < 8; b++) {
            const uint8_t *a = act + b * 32 * R;
            __m512i pairs[2], scale0[2], scale1[2];
            UNROLL
            for (unsigned p = 0; p < P; p++) {
                pairs[p] = _mm512_cvtepi8_epi16(_mm256_loadu_si256(
                    (const __m256i *)((const uint8_t *)rec->sc[b] + p * w_stride)));
                scale0[p] = _mm512_srai_epi32(_mm512_slli_epi32(pairs[p], 16), 16);
                scale1[p] = _mm512_srai_epi32(pairs[p], 16);
                prefetch_record(w + p * w_stride + b * (sizeof(RecordQ6K) / 8),
                                sizeof(RecordQ6K) / 8);
            }
            groups_add(BITS_6, &total, rec->q[b][0], rec->qh[b][0], w_stride, a, P, R, 0, 4,
                       scale0);
            groups_add(BITS_6, &total, rec->q[b][0], rec->qh[b][0], w_stride, a, P, R, 4, 8,
                       scale1);
            pairs_add(&offset, pairs, act + ACT_Q8_256_SUM16(R) + b * R * 4, P, R);
        }
        UNROLL
        for (unsigned r = 0; r < R; r++) {
            UNROLL
            for (unsigned p = 0; p < P; p++) {
                total.v[r][p] =
                    _mm512_sub_epi32(total.v[r][p], _mm512_slli_epi32(offset.v[r][p], 5));
            }
        }
        scaled_add(&acc, &total, rec->d, false, w_stride, act, P, R);
    }
    accs_store(to, &acc, P, R);
}

MATMUL_SLOT_WIDE(q4_k, q4_k_tile, 1)
MATMUL_SLOT_WIDE(q5_k, q5_k_tile, 1)
MATMUL_SLOT_WIDE(q6_k, q6_k_tile, 1)

void matmul_fill_avx512_k(Kernels *kernels)
{
    kernels->matmul[DTYPE_Q4_K] = matmul_q4_k;
    kernels->matmul[DTYPE_Q5_K] = matmul_q5_k;
    kernels->matmul[DTYPE_Q6_K] = matmul_q6_k;
}
