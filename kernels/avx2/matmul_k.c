/* Products of 256-element super-blocks: Q4_K, Q5_K, Q6_K. A tile is R rows x 16 outputs. Everything
 * inside a super-block is exact in i32; bounds: 8 * 63 * 32 * 31 * 127 = 63.5 M (Q5_K), 16 * 128 *
 * 16 * 63 * 127 = 262 M (Q6_K before the offset is taken off).
 *
 * The i16 sums of a sub-block (two products each) are multiplied by its scale and widened by one
 * vpmaddwd: (s0, s1) . (sc, sc). 4-bit quants: 32 elements fit an i16, 5-bit: 16 (31,496), 6-bit: 8
 * (2 * 2 * 63 * 127 = 32,004), see matmul_q32.c. */
#include "kernels/avx2/matmul.h"

typedef struct Sums {
    __m256i v[4][2];
} Sums;

typedef enum Bits { BITS_4 = 4, BITS_5 = 5, BITS_6 = 6 } Bits;

ALWAYS_INLINE void sums_clear(Sums *s, unsigned R)
{
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        s->v[r][0] = s->v[r][1] = _mm256_setzero_si256();
    }
}

ALWAYS_INLINE __m256i shift16(__m256i x, int left)
{
    return left >= 0 ? _mm256_slli_epi16(x, left) : _mm256_srli_epi16(x, -left);
}

/* Quants of group g (of 8) of one half panel; bits above the nibbles from qh (Q5: a row a
 * sub-block, Q6: two). */
ALWAYS_INLINE __m256i group_quants(Bits bits, const uint8_t (*q)[64], const uint8_t *qh, unsigned g,
                                   unsigned v)
{
    const __m256i both = load256(q[g / 2] + 32 * v);
    __m256i w = _mm256_and_si256(g % 2 ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(15));
    if (bits == BITS_5) {
        const __m256i high = shift16(load256(qh + 32 * v), 4 - (int)g);
        w = _mm256_or_si256(w, _mm256_and_si256(high, _mm256_set1_epi8(0x10)));
    } else if (bits == BITS_6) {
        const __m256i high = shift16(load256(qh + 64 * (g / 4) + 32 * v), 4 - 2 * (int)(g % 4));
        w = _mm256_or_si256(w, _mm256_and_si256(high, _mm256_set1_epi8(0x30)));
    }
    return w;
}

/* total += scale * (groups [g0, g1) of a sub-block), scale as i16 pairs of equals. */
ALWAYS_INLINE void groups_add(Bits bits, Sums *total, const uint8_t (*q)[64], const uint8_t *qh,
                              const uint8_t *act, unsigned R, unsigned g0, unsigned g1,
                              const __m256i scale[2])
{
    Sums s;
    sums_clear(&s, R);
    UNROLL
    for (unsigned g = g0; g < g1; g++) {
        const __m256i w0 = group_quants(bits, q, qh, g, 0), w1 = group_quants(bits, q, qh, g, 1);
        UNROLL
        for (unsigned r = 0; r < R; r++) {
            const __m256i a = broadcast_i32(act + (g * R + r) * 4);
            s.v[r][0] = _mm256_add_epi16(s.v[r][0], _mm256_maddubs_epi16(w0, a));
            s.v[r][1] = _mm256_add_epi16(s.v[r][1], _mm256_maddubs_epi16(w1, a));
        }
    }
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        total->v[r][0] = _mm256_add_epi32(total->v[r][0], _mm256_madd_epi16(s.v[r][0], scale[0]));
        total->v[r][1] = _mm256_add_epi32(total->v[r][1], _mm256_madd_epi16(s.v[r][1], scale[1]));
    }
}

ALWAYS_INLINE __m256i pair_of_bytes(const uint8_t *p)
{
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
    return _mm256_or_si256(wide, _mm256_slli_epi32(wide, 16));
}

/* acc = fmaf(sign (float)s, d_w * d_a, acc) */
ALWAYS_INLINE void scaled_add(__m256 acc[4][2], const Sums *s, const uint16_t *d, bool negative,
                              const uint8_t *act, unsigned R)
{
    UNROLL
    for (unsigned v = 0; v < 2; v++) {
        const __m256 dw = load_f16x8(d + 8 * v);
        UNROLL
        for (unsigned r = 0; r < R; r++) {
            const __m256 scale = _mm256_mul_ps(dw, broadcast_f32(act + ACT_Q8_256_D(R) + 4 * r));
            const __m256 sum = _mm256_cvtepi32_ps(s->v[r][v]);
            acc[r][v] = negative ? _mm256_fnmadd_ps(sum, scale, acc[r][v])
                                 : _mm256_fmadd_ps(sum, scale, acc[r][v]);
        }
    }
}

/* sum of m * (sum of activations) over the 8 sub-blocks, two at a time. */
ALWAYS_INLINE void minima(Sums *s, const uint8_t (*m)[16][2], const uint8_t *act, unsigned R)
{
    sums_clear(s, R);
    UNROLL
    for (unsigned pair = 0; pair < 4; pair++) {
        const __m256i m0 = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)m[pair]));
        const __m256i m1 = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)m[pair] + 1));
        UNROLL
        for (unsigned r = 0; r < R; r++) {
            const __m256i sums = broadcast_i32(act + ACT_Q8_256_SUM32(R) + (pair * R + r) * 4);
            s->v[r][0] = _mm256_add_epi32(s->v[r][0], _mm256_madd_epi16(m0, sums));
            s->v[r][1] = _mm256_add_epi32(s->v[r][1], _mm256_madd_epi16(m1, sums));
        }
    }
}

#define AFFINE_K_TILE(name, Record, bits, qh_of_b)                                                 \
    ALWAYS_INLINE void name##_tile(const uint8_t *w, size_t w_stride, const uint8_t *act,          \
                                   uint32_t n_records, TileTo to, unsigned R)                      \
    {                                                                                              \
        __m256 acc[4][2];                                                                          \
        lanes_clear(acc, R);                                                                       \
        for (uint32_t i = 0; i < n_records; i++, w += sizeof(Record), act += ACT_Q8_256_TILE(R)) { \
            const Record *rec = (const Record *)w;                                                 \
            Sums total, mins;                                                                      \
            sums_clear(&total, R);                                                                 \
            for (unsigned b = 0; b < 8; b++) {                                                     \
                const __m256i scale[2] = {pair_of_bytes(rec->sc[b]),                               \
                                          pair_of_bytes(rec->sc[b] + 8)};                          \
                const uint8_t *a = act + b * 32 * R;                                               \
                prefetch_part(w, b, sizeof(Record));                                               \
                groups_add(bits, &total, rec->q[b], qh_of_b, a, R, 0, (bits) == BITS_4 ? 8 : 4,    \
                           scale);                                                                 \
                if ((bits) == BITS_5) {                                                            \
                    groups_add(bits, &total, rec->q[b], qh_of_b, a, R, 4, 8, scale);               \
                }                                                                                  \
            }                                                                                      \
            minima(&mins, rec->m, act, R);                                                         \
            scaled_add(acc, &total, rec->d, false, act, R);                                        \
            scaled_add(acc, &mins, rec->dmin, true, act, R);                                       \
        }                                                                                          \
        tile_store(to, acc, R);                                                                    \
    }

AFFINE_K_TILE(q4_k, RecordQ4K, BITS_4, NULL)
AFFINE_K_TILE(q5_k, RecordQ5K, BITS_5, rec->qh[b])

/* Quants are taken unsigned: S = sum sc * (unsigned dot) - 32 * sum sc * (sum of activations). */
ALWAYS_INLINE void q6_k_tile(const uint8_t *w, size_t w_stride, const uint8_t *act,
                             uint32_t n_records, TileTo to, unsigned R)
{
    /* From i16 pairs (first half's scale, second half's) to pairs of one of them. */
    const __m256i first = _mm256_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13, 0, 1,
                                           0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13);
    const __m256i second = _mm256_add_epi8(first, _mm256_set1_epi8(2));
    __m256 acc[4][2];
    lanes_clear(acc, R);
    for (uint32_t i = 0; i < n_records; i++, w += sizeof(RecordQ6K), act += ACT_Q8_256_TILE(R)) {
        const RecordQ6K *rec = (const RecordQ6K *)w;
        Sums total, offset;
        sums_clear(&total, R);
        sums_clear(&offset, R);
        for (unsigned b = 0; b < 8; b++) {
            const uint8_t *a = act + b * 32 * R;
            const __m256i pairs[2] = {
                _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)rec->sc[b])),
                _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)rec->sc[b] + 1))};
            const __m256i scale0[2] = {_mm256_shuffle_epi8(pairs[0], first),
                                       _mm256_shuffle_epi8(pairs[1], first)};
            const __m256i scale1[2] = {_mm256_shuffle_epi8(pairs[0], second),
                                       _mm256_shuffle_epi8(pairs[1], second)};
            prefetch_part(w, b, sizeof(RecordQ6K));
            groups_add(BITS_6, &total, rec->q[b], rec->qh[b][0], a, R, 0, 2, scale0);
            groups_add(BITS_6, &total, rec->q[b], rec->qh[b][0], a, R, 2, 4, scale0);
            groups_add(BITS_6, &total, rec->q[b], rec->qh[b][0], a, R, 4, 6, scale1);
            groups_add(BITS_6, &total, rec->q[b], rec->qh[b][0], a, R, 6, 8, scale1);
            UNROLL
            for (unsigned r = 0; r < R; r++) {
                const __m256i sums = broadcast_i32(act + ACT_Q8_256_SUM16(R) + (b * R + r) * 4);
                offset.v[r][0] =
                    _mm256_add_epi32(offset.v[r][0], _mm256_madd_epi16(pairs[0], sums));
                offset.v[r][1] =
                    _mm256_add_epi32(offset.v[r][1], _mm256_madd_epi16(pairs[1], sums));
            }
        }
        UNROLL
        for (unsigned r = 0; r < R; r++) {
            total.v[r][0] = _mm256_sub_epi32(total.v[r][0], _mm256_slli_epi32(offset.v[r][0], 5));
            total.v[r][1] = _mm256_sub_epi32(total.v[r][1], _mm256_slli_epi32(offset.v[r][1], 5));
        }
        scaled_add(acc, &total, rec->d, false, act, R);
    }
    tile_store(to, acc, R);
}

MATMUL_SLOT_WIDE(q4_k, q4_k_tile)
MATMUL_SLOT_WIDE(q5_k, q5_k_tile)
MATMUL_SLOT_WIDE(q6_k, q6_k_tile)

void matmul_fill_avx2_k(Kernels *kernels)
{
    kernels->matmul[DTYPE_Q4_K] = matmul_q4_k;
    kernels->matmul[DTYPE_Q5_K] = matmul_q5_k;
    kernels->matmul[DTYPE_Q6_K] = matmul_q6_k;
}
