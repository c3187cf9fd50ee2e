/* Products of 32-element blocks: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0. A tile is R rows x 16 outputs, two
 * vectors of 8.
 *
 * No instruction may saturate (NUMERICS 9). vpmaddubsw makes i16 sums of two products: 4-bit quants
 * give at most 2 * 15 * 127 = 3,810, so that a whole block (8 groups) fits an i16 (30,480); 5-bit
 * quants give 7,874, four groups fit (31,496); 8-bit ones, as |w| * sign(a, w), give 2 * 128 * 127
 * = 32,512 and are widened at once. */
#include "kernels/avx2/matmul.h"

/* Loop bounds are constants after inlining, array dimensions are literally so: gcc 12 keeps the
 * arrays in registers only then. */
typedef struct Sums {
    __m256i v[4][2];
} Sums;

/* i16 += products of nibble rows [j0, j1) with their activations; five: the quants have a fifth bit
 * in qh. */
ALWAYS_INLINE void nibble_sums(Sums *s, const uint8_t (*q)[64], const uint8_t *qh, bool five,
                               const uint8_t *act, unsigned R, unsigned j0, unsigned j1)
{
    const __m256i low = _mm256_set1_epi8(15), bit = _mm256_set1_epi8(16);
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        s->v[r][0] = s->v[r][1] = _mm256_setzero_si256();
    }
    UNROLL
    for (unsigned j = j0; j < j1; j++) {
        __m256i w[2][2]; /* group 2j, 2j + 1; half panel */
        UNROLL
        for (unsigned v = 0; v < 2; v++) {
            const __m256i both = load256(q[j] + 32 * v);
            w[0][v] = _mm256_and_si256(both, low);
            w[1][v] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
            if (five) {
                const __m256i high = load256(qh + 32 * v);
                /* Bit g of each byte to bit 4; what a 16-bit shift drags in from the neighbour is
                 * masked off. */
                const __m256i h0 = 2 * j <= 4 ? _mm256_slli_epi16(high, (int)(4 - 2 * j))
                                              : _mm256_srli_epi16(high, (int)(2 * j - 4));
                const __m256i h1 = 2 * j + 1 <= 4 ? _mm256_slli_epi16(high, (int)(3 - 2 * j))
                                                  : _mm256_srli_epi16(high, (int)(2 * j - 3));
                w[0][v] = _mm256_or_si256(w[0][v], _mm256_and_si256(h0, bit));
                w[1][v] = _mm256_or_si256(w[1][v], _mm256_and_si256(h1, bit));
            }
        }
        UNROLL
        for (unsigned g = 0; g < 2; g++) {
            UNROLL
            for (unsigned r = 0; r < R; r++) {
                const __m256i a = broadcast_i32(act + ((2 * j + g) * R + r) * 4);
                s->v[r][0] = _mm256_add_epi16(s->v[r][0], _mm256_maddubs_epi16(w[g][0], a));
                s->v[r][1] = _mm256_add_epi16(s->v[r][1], _mm256_maddubs_epi16(w[g][1], a));
            }
        }
    }
}

/* Exact i32 sums of a block of unsigned quants, without the offset. */
ALWAYS_INLINE void nibble_block(Sums *s, const uint8_t (*q)[64], const uint8_t *qh, bool five,
                                const uint8_t *act, unsigned R)
{
    const __m256i ones = _mm256_set1_epi16(1);
    nibble_sums(s, q, qh, five, act, R, 0, five ? 2 : 4);
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        s->v[r][0] = _mm256_madd_epi16(s->v[r][0], ones);
        s->v[r][1] = _mm256_madd_epi16(s->v[r][1], ones);
    }
    if (five) {
        Sums upper;
        nibble_sums(&upper, q, qh, five, act, R, 2, 4);
        UNROLL
        for (unsigned r = 0; r < R; r++) {
            s->v[r][0] = _mm256_add_epi32(s->v[r][0], _mm256_madd_epi16(upper.v[r][0], ones));
            s->v[r][1] = _mm256_add_epi32(s->v[r][1], _mm256_madd_epi16(upper.v[r][1], ones));
        }
    }
}

/* Exact i32 sums of signed 8-bit quants, stored + 128. */
ALWAYS_INLINE void byte_block(Sums *s, const uint8_t (*q)[64], const uint8_t *act, unsigned R)
{
    const __m256i ones = _mm256_set1_epi16(1), flip = _mm256_set1_epi8((char)0x80);
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        s->v[r][0] = s->v[r][1] = _mm256_setzero_si256();
    }
    UNROLL
    for (unsigned g = 0; g < 8; g++) {
        const __m256i w0 = _mm256_xor_si256(load256(q[g]), flip),
                      w1 = _mm256_xor_si256(load256(q[g] + 32), flip);
        const __m256i m0 = _mm256_abs_epi8(w0), m1 = _mm256_abs_epi8(w1);
        UNROLL
        for (unsigned r = 0; r < R; r++) {
            const __m256i a = broadcast_i32(act + (g * R + r) * 4);
            const __m256i p0 = _mm256_maddubs_epi16(m0, _mm256_sign_epi8(a, w0));
            const __m256i p1 = _mm256_maddubs_epi16(m1, _mm256_sign_epi8(a, w1));
            s->v[r][0] = _mm256_add_epi32(s->v[r][0], _mm256_madd_epi16(p0, ones));
            s->v[r][1] = _mm256_add_epi32(s->v[r][1], _mm256_madd_epi16(p1, ones));
        }
    }
}

/* acc = fmaf((float)s, d_w * d_a, acc), then the minimum: acc = fmaf(m_w, d_a * sum_a, acc). */
ALWAYS_INLINE void block_add(__m256 acc[4][2], const Sums *s, const uint16_t *d, const uint16_t *m,
                             int start, const uint8_t *act, unsigned R)
{
    UNROLL
    for (unsigned v = 0; v < 2; v++) {
        const __m256 dw = load_f16x8(d + 8 * v);
        const __m256 mw = m ? load_f16x8(m + 8 * v) : _mm256_setzero_ps();
        UNROLL
        for (unsigned r = 0; r < R; r++) {
            __m256i sum = s->v[r][v];
            if (start >= 0) {
                sum = _mm256_add_epi32(sum, broadcast_i32(act + (unsigned)start + 4 * r));
            }
            acc[r][v] = _mm256_fmadd_ps(
                _mm256_cvtepi32_ps(sum),
                _mm256_mul_ps(dw, broadcast_f32(act + ACT_Q8_32_D(R) + 4 * r)), acc[r][v]);
            if (m) {
                acc[r][v] =
                    _mm256_fmadd_ps(mw, broadcast_f32(act + ACT_Q8_32_DS(R) + 4 * r), acc[r][v]);
            }
        }
    }
}

#define Q32_TILE(name, Record, block_sums, minimum, start)                                         \
    ALWAYS_INLINE void name##_tile(const uint8_t *w, size_t w_stride, const uint8_t *act,          \
                                   uint32_t n_records, TileTo to, unsigned R)                      \
    {                                                                                              \
        __m256 acc[4][2];                                                                          \
        lanes_clear(acc, R);                                                                       \
        for (uint32_t i = 0; i < n_records; i++, w += sizeof(Record), act += ACT_Q8_32_TILE(R)) {  \
            const Record *b = (const Record *)w;                                                   \
            Sums s;                                                                                \
            prefetch_record(w, sizeof(Record));                                                    \
            block_sums;                                                                            \
            block_add(acc, &s, b->d, minimum, start, act, R);                                      \
        }                                                                                          \
        tile_store(to, acc, R);                                                                    \
    }

Q32_TILE(q4_0, RecordQ40, nibble_block(&s, b->q, NULL, false, act, R), NULL,
         (int)ACT_Q8_32_START8(R))
Q32_TILE(q4_1, RecordQ41, nibble_block(&s, b->q, NULL, false, act, R), b->m, -1)
Q32_TILE(q5_0, RecordQ50, nibble_block(&s, b->q, b->qh, true, act, R), NULL,
         (int)ACT_Q8_32_START16(R))
Q32_TILE(q5_1, RecordQ51, nibble_block(&s, b->q, b->qh, true, act, R), b->m, -1)
Q32_TILE(q8_0, RecordQ80, byte_block(&s, b->q, act, R), NULL, -1)

MATMUL_SLOT_WIDE(q4_0, q4_0_tile)
MATMUL_SLOT_WIDE(q4_1, q4_1_tile)
MATMUL_SLOT_WIDE(q5_0, q5_0_tile)
MATMUL_SLOT_WIDE(q5_1, q5_1_tile)
MATMUL_SLOT_WIDE(q8_0, q8_0_tile)

void matmul_fill_avx2_q32(Kernels *kernels)
{
    kernels->matmul[DTYPE_Q4_0] = matmul_q4_0;
    kernels->matmul[DTYPE_Q4_1] = matmul_q4_1;
    kernels->matmul[DTYPE_Q5_0] = matmul_q5_0;
    kernels->matmul[DTYPE_Q5_1] = matmul_q5_1;
    kernels->matmul[DTYPE_Q8_0] = matmul_q8_0;
}
