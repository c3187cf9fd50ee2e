/* Products of 256-element super-blocks with many rows: Q4_K, Q5_K, Q6_K on quants and scales
 * unpacked once for all rows (ops/matmul_wide.h). The sums are those of matmul_k.c, exact in i32
 * whatever their order.
 *
 * The sum over a block of 4-bit quants is scaled by one vpdpwssd instead of vpmulld (two) and an
 * addition. It has to fit i16 for that, so quants are made signed by where it starts: (q - 8) x 32
 * elements, 8 * 127 * 32 = 32512. What the offset takes away is added again, once a super-block, as
 * scales times sums of activations. With 5 and 6 bits, sums that fit would be over 16 and 8
 * elements: more loads than anything else. */
#include "kernels/avx512/matmul.h"

/* Scales as i32, that is pairs of i16 (scale, 0). */
typedef struct WideAffine {
    float d[16], dmin[16];
    int16_t m[4][16][2], sc_pair[4][16][2]; /* of 32-blocks (2i, 2i + 1) */
    int32_t sc[8][16];
    uint8_t q[64][64];
} WideAffine;

typedef struct WideQ6K {
    float d[16];
    int16_t sc_pair[8][16][2]; /* of the halves of a 32-block, times -32 */
    int32_t sc[16][16];
    uint8_t q[64][64];
} WideQ6K;

_Static_assert(sizeof(WideAffine) <= WIDE_SCRATCH_BYTES && sizeof(WideQ6K) <= WIDE_SCRATCH_BYTES,
               "a super-block fits the scratch");

/* ---- unpacking ---- */

/* 8 groups of a 32-block; bits above the nibbles from qh (5 bits: one row, 6 bits: two). */
ALWAYS_INLINE void quants_unpack(unsigned bits, const uint8_t (*q)[64], const uint8_t *qh,
                                 uint8_t (*to)[64])
{
    const __m512i low = _mm512_set1_epi8(15);
    UNROLL
    for (unsigned g = 0; g < 8; g++) {
        const __m512i both = load512(q[g / 2]);
        __m512i w = _mm512_and_si512(g % 2 ? _mm512_srli_epi16(both, 4) : both, low);
        if (bits == 5) {
            const __m512i high = shift16(load512(qh), 4 - (int)g);
            w = _mm512_or_si512(w, _mm512_and_si512(high, _mm512_set1_epi8(0x10)));
        } else if (bits == 6) {
            const __m512i high = shift16(load512(qh + 64 * (g / 4)), 4 - 2 * (int)(g % 4));
            w = _mm512_or_si512(w, _mm512_and_si512(high, _mm512_set1_epi8(0x30)));
        }
        store512(to[g], w);
    }
}

#define AFFINE_UNPACK(name, Record, bits, qh_of_b)                                                 \
    static void name##_unpack(const uint8_t *w, uint32_t n_records, uint8_t *scratch)              \
    {                                                                                              \
        WideAffine *to = (WideAffine *)scratch;                                                    \
        for (const Record *rec = (const Record *)w; n_records > 0; n_records--, rec++, to++) {     \
            _mm512_store_ps(to->d, load_f16x16(rec->d));                                           \
            _mm512_store_ps(to->dmin, load_f16x16(rec->dmin));                                     \
            for (unsigned i = 0; i < 4; i++) {                                                     \
                const __m512i even = _mm512_cvtepu8_epi32(                                         \
                                  _mm_loadu_si128((const __m128i *)rec->sc[2 * i])),               \
                              odd = _mm512_cvtepu8_epi32(                                          \
                                  _mm_loadu_si128((const __m128i *)rec->sc[2 * i + 1]));           \
                store512(to->sc[2 * i], even);                                                     \
                store512(to->sc[2 * i + 1], odd);                                                  \
                store512(to->sc_pair[i], _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));       \
                store512(to->m[i],                                                                 \
                         _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)rec->m[i])));    \
            }                                                                                      \
            for (unsigned b = 0; b < 8; b++) {                                                     \
                quants_unpack(bits, rec->q[b], qh_of_b, to->q + 8 * b);                            \
            }                                                                                      \
        }                                                                                          \
    }

AFFINE_UNPACK(q4_k, RecordQ4K, 4, NULL)
AFFINE_UNPACK(q5_k, RecordQ5K, 5, rec->qh[b])

static void q6_k_unpack(const uint8_t *w, uint32_t n_records, uint8_t *scratch)
{
    const __m512i zero = _mm512_setzero_si512();
    WideQ6K *to = (WideQ6K *)scratch;
    for (const RecordQ6K *rec = (const RecordQ6K *)w; n_records > 0; n_records--, rec++, to++) {
        _mm512_store_ps(to->d, load_f16x16(rec->d));
        for (unsigned b = 0; b < 8; b++) {
            const __m512i pair =
                _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)rec->sc[b]));
            const __m512i first = _mm512_srai_epi32(_mm512_slli_epi32(pair, 16), 16),
                          second = _mm512_srai_epi32(pair, 16);
            store512(to->sc[2 * b], first);
            store512(to->sc[2 * b + 1], second);
            const __m512i low = _mm512_and_si512(
                _mm512_sub_epi32(zero, _mm512_slli_epi32(first, 5)), _mm512_set1_epi32(0xffff));
            const __m512i high = _mm512_slli_epi32(second, 16 + 5);
            store512(to->sc_pair[b], _mm512_or_si512(low, _mm512_sub_epi32(zero, high)));
            quants_unpack(6, rec->q[b], rec->qh[b][0], to->q + 8 * b);
        }
    }
}

/* ---- products ---- */

/* to += a . b, pairs of i16. As an instruction that changes its operand: from the intrinsic gcc 12
 * makes two moves for each in a loop. */
ALWAYS_INLINE void pairs_fuse(__m512i *to, __m512i a, __m512i b)
{
#ifdef WEFT_EMULATE_AVX512
    *to = _mm512_dpwssd_epi32(*to, a, b);
#else
    __asm__("vpdpwssd %2, %1, %0" : "+v"(*to) : "v"(a), "v"(b));
#endif
}

/* total += scale * (8 groups of quants at q, less their offset, as i16): offset holds minus it, for
 * the half of the pair of activation sums at `sums` that is this block's. */
ALWAYS_INLINE void part_add(Sums *total, const uint8_t *q, const uint8_t *act, const uint8_t *sums,
                            __m512i offset, const int32_t *scale, unsigned P, unsigned R)
{
    Sums s;
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        const __m512i start =
            _mm512_dpwssd_epi32(_mm512_setzero_si512(), broadcast_i32(sums + 4 * r), offset);
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            s.v[r][p] = start;
        }
    }
    wide_groups_add(&s, q, 8, act, P, R);
    UNROLL
    for (unsigned p = 0; p < P; p++) {
        const __m512i sc = load512((const uint8_t *)scale + p * WIDE_SCRATCH_BYTES);
        UNROLL
        for (unsigned r = 0; r < R; r++) {
            pairs_fuse(&total->v[r][p], s.v[r][p], sc);
        }
    }
}

/* total += scale * (n groups of quants at q), where that does not fit i16. */
ALWAYS_INLINE void long_add(Sums *total, const uint8_t *q, unsigned n, const uint8_t *act,
                            const int32_t *scale, unsigned P, unsigned R)
{
    Sums s;
    sums_clear(&s, P, R);
    wide_groups_add(&s, q, n, act, P, R);
    UNROLL
    for (unsigned p = 0; p < P; p++) {
        const __m512i sc = load512((const uint8_t *)scale + p * WIDE_SCRATCH_BYTES);
        UNROLL
        for (unsigned r = 0; r < R; r++) {
            total->v[r][p] = _mm512_add_epi32(total->v[r][p], _mm512_mullo_epi32(s.v[r][p], sc));
        }
    }
}

/* total = n pairs of scales or minima times pairs of activation sums, << shift. */
ALWAYS_INLINE void pairs_total(Sums *total, const int16_t (*pairs)[16][2], const uint8_t *sums,
                               unsigned n, unsigned shift, unsigned P, unsigned R)
{
    sums_clear(total, P, R);
    UNROLL
    for (unsigned i = 0; i < n; i++) {
        __m512i w[WIDE_PANELS];
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            w[p] = load512((const uint8_t *)pairs[i] + p * WIDE_SCRATCH_BYTES);
        }
        UNROLL
        for (unsigned r = 0; r < R; r++) {
            const __m512i a = broadcast_i32(sums + (i * R + r) * 4);
            UNROLL
            for (unsigned p = 0; p < P; p++) {
                pairs_fuse(&total->v[r][p], w[p], a);
            }
        }
    }
    if (shift > 0) {
        UNROLL
        for (unsigned r = 0; r < R; r++) {
            UNROLL
            for (unsigned p = 0; p < P; p++) {
                total->v[r][p] = _mm512_slli_epi32(total->v[r][p], shift);
            }
        }
    }
}

/* acc = fmaf(sign (float)total, d_w * d_a, acc) */
ALWAYS_INLINE void scaled_add(Accs *acc, const Sums *total, const float *d, bool negative,
                              const uint8_t *act, unsigned P, unsigned R)
{
    UNROLL
    for (unsigned p = 0; p < P; p++) {
        const __m512 dw =
            _mm512_loadu_ps((const float *)((const uint8_t *)d + p * WIDE_SCRATCH_BYTES));
        UNROLL
        for (unsigned r = 0; r < R; r++) {
            const __m512 scale = _mm512_mul_ps(dw, broadcast_f32(act + ACT_Q8_256_D(R) + 4 * r));
            const __m512 sum = _mm512_cvtepi32_ps(total->v[r][p]);
            acc->v[r][p] = negative ? _mm512_fnmadd_ps(sum, scale, acc->v[r][p])
                                    : _mm512_fmadd_ps(sum, scale, acc->v[r][p]);
        }
    }
}

ALWAYS_INLINE void affine_add(Accs *acc, unsigned bits, const WideAffine *rec, const uint8_t *act,
                              unsigned P, unsigned R)
{
    const uint8_t *sums = act + ACT_Q8_256_SUM32(R);
    Sums total;
    if (bits == 4) {
        const __m512i even = _mm512_set1_epi32(-8 & 0xffff), odd = _mm512_slli_epi32(even, 16);
        pairs_total(&total, rec->sc_pair, sums, 4, 3, P, R);
        for (unsigned b = 0; b < 8; b += 2) {
            const uint8_t *a = act + b * 32 * R, *a_sums = sums + b / 2 * 4 * R;
            part_add(&total, rec->q[8 * b], a, a_sums, even, rec->sc[b], P, R);
            part_add(&total, rec->q[8 * b + 8], a + 32 * R, a_sums, odd, rec->sc[b + 1], P, R);
        }
    } else {
        sums_clear(&total, P, R);
        for (unsigned b = 0; b < 8; b++) {
            long_add(&total, rec->q[8 * b], 8, act + b * 32 * R, rec->sc[b], P, R);
        }
    }
    scaled_add(acc, &total, rec->d, false, act, P, R);
    pairs_total(&total, rec->m, sums, 4, 0, P, R);
    scaled_add(acc, &total, rec->dmin, true, act, P, R);
}

/* sc_pair is -32 times the scales. */
ALWAYS_INLINE void q6_k_add(Accs *acc, const WideQ6K *rec, const uint8_t *act, unsigned P,
                            unsigned R)
{
    Sums total;
    pairs_total(&total, rec->sc_pair, act + ACT_Q8_256_SUM16(R), 8, 0, P, R);
    for (unsigned half = 0; half < 16; half++) {
        long_add(&total, rec->q[4 * half], 4, act + half * 16 * R, rec->sc[half], P, R);
    }
    scaled_add(acc, &total, rec->d, false, act, P, R);
}

#define Q4_K_ADD(acc, rec, act, P, R) affine_add(acc, 4, rec, act, P, R)
#define Q5_K_ADD(acc, rec, act, P, R) affine_add(acc, 5, rec, act, P, R)

/* The runs of a chunk, by a type's records. */
#define K_WIDE(name, Record, add)                                                                  \
    ALWAYS_INLINE void name##_wide(const uint8_t *scratch, const uint8_t *act,                     \
                                   const WideChunk *chunk, float *level, unsigned P, unsigned R)   \
    {                                                                                              \
        const Record *rec = (const Record *)scratch;                                               \
        for (uint32_t u = 0; u < chunk->n_runs; u++) {                                             \
            Accs acc;                                                                              \
            wide_tile_load(&acc, level, chunk->fresh || u > 0, P, R);                              \
            for (uint32_t i = chunk->runs[u].n_records; i > 0; i--, rec++) {                       \
                add(&acc, rec, act, P, R);                                                         \
                act += ACT_Q8_256_TILE(R);                                                         \
            }                                                                                      \
            level = wide_tile_store(&acc, level, chunk->runs[u].n_merges, P, R);                   \
        }                                                                                          \
    }

K_WIDE(q4_k, WideAffine, Q4_K_ADD)
K_WIDE(q5_k, WideAffine, Q5_K_ADD)
K_WIDE(q6_k, WideQ6K, q6_k_add)

WIDE_KERNEL(q4_k, q4_k_wide, sizeof(WideAffine), 24, .row8 = {NULL})
WIDE_KERNEL(q5_k, q5_k_wide, sizeof(WideAffine), 24, .row8 = {NULL})
WIDE_KERNEL(q6_k, q6_k_wide, sizeof(WideQ6K), 16, .row8 = {NULL})
