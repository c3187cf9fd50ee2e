/* Products of 256-element super-blocks with many rows: Q4_K, Q5_K, Q6_K on quants and scales
 * unpacked once for all rows (ops/matmul_wide.h). The sums are those of matmul_k.c, which has the
 * bounds. */
#include "kernels/avx2/matmul.h"

/* sc: pairs of equal i16, of 32-blocks (Q4_K, Q5_K); pair: of the two halves of a 32-block (Q6_K,
 * its offset). */
typedef struct WideAffine {
    float d[16], dmin[16];
    int16_t sc[8][16][2], m[4][16][2];
    uint8_t q[64][64];
} WideAffine;

typedef struct WideQ6K {
    float d[16];
    int16_t sc[16][16][2], pair[8][16][2];
    uint8_t q[64][64];
} WideQ6K;

typedef struct Sums {
    __m256i v[4][2];
} Sums;

/* ---- unpacking ---- */

ALWAYS_INLINE void store256(void *p, __m256i v)
{
    _mm256_store_si256((__m256i *)p, v);
}

ALWAYS_INLINE void scales_unpack(const uint16_t *from, float *to)
{
    _mm256_store_ps(to, load_f16x8(from));
    _mm256_store_ps(to + 8, load_f16x8(from + 8));
}

ALWAYS_INLINE __m256i shift16(__m256i x, int left)
{
    return left >= 0 ? _mm256_slli_epi16(x, left) : _mm256_srli_epi16(x, -left);
}

/* 8 groups of a 32-block; bits above the nibbles from qh (5 bits: one row, 6 bits: two). */
ALWAYS_INLINE void quants_unpack(unsigned bits, const uint8_t (*q)[64], const uint8_t *qh,
                                 uint8_t (*to)[64])
{
    const __m256i low = _mm256_set1_epi8(15);
    UNROLL
    for (unsigned g = 0; g < 8; g++) {
        UNROLL
        for (unsigned v = 0; v < 64; v += 32) {
            const __m256i both = load256(q[g / 2] + v);
            __m256i w = _mm256_and_si256(g % 2 ? _mm256_srli_epi16(both, 4) : both, low);
            if (bits == 5) {
                const __m256i high = shift16(load256(qh + v), 4 - (int)g);
                w = _mm256_or_si256(w, _mm256_and_si256(high, _mm256_set1_epi8(0x10)));
            } else if (bits == 6) {
                const __m256i high = shift16(load256(qh + 64 * (g / 4) + v), 4 - 2 * (int)(g % 4));
                w = _mm256_or_si256(w, _mm256_and_si256(high, _mm256_set1_epi8(0x30)));
            }
            store256(to[g] + v, w);
        }
    }
}

ALWAYS_INLINE __m256i pair_of_bytes(const uint8_t *p)
{
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
    return _mm256_or_si256(wide, _mm256_slli_epi32(wide, 16));
}

#define AFFINE_UNPACK(name, Record, bits, qh_of_b)                                                 \
    static void name##_unpack(const uint8_t *w, uint32_t n_records, uint8_t *scratch)              \
    {                                                                                              \
        WideAffine *to = (WideAffine *)scratch;                                                    \
        for (uint32_t i = 0; i < n_records; i++, w += sizeof(Record), to++) {                      \
            const Record *rec = (const Record *)w;                                                 \
            scales_unpack(rec->d, to->d);                                                          \
            scales_unpack(rec->dmin, to->dmin);                                                    \
            for (unsigned b = 0; b < 8; b++) {                                                     \
                store256(to->sc[b], pair_of_bytes(rec->sc[b]));                                    \
                store256(to->sc[b] + 8, pair_of_bytes(rec->sc[b] + 8));                            \
                quants_unpack(bits, rec->q[b], qh_of_b, to->q + 8 * b);                            \
            }                                                                                      \
            for (unsigned p = 0; p < 8; p++) {                                                     \
                store256((int16_t *)to->m + 16 * p,                                                \
                         _mm256_cvtepu8_epi16(_mm_loadu_si128(                                     \
                             (const __m128i *)((const uint8_t *)rec->m + 16 * p))));               \
            }                                                                                      \
        }                                                                                          \
    }

AFFINE_UNPACK(q4_k, RecordQ4K, 4, NULL)
AFFINE_UNPACK(q5_k, RecordQ5K, 5, rec->qh[b])

static void q6_k_unpack(const uint8_t *w, uint32_t n_records, uint8_t *scratch)
{
    /* From i16 pairs (first half's scale, second half's) to pairs of one of them. */
    const __m256i first = _mm256_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13, 0, 1,
                                           0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13);
    const __m256i second = _mm256_add_epi8(first, _mm256_set1_epi8(2));
    WideQ6K *to = (WideQ6K *)scratch;
    for (uint32_t i = 0; i < n_records; i++, w += sizeof(RecordQ6K), to++) {
        const RecordQ6K *rec = (const RecordQ6K *)w;
        scales_unpack(rec->d, to->d);
        for (unsigned b = 0; b < 8; b++) {
            UNROLL
            for (unsigned v = 0; v < 16; v += 8) {
                const __m256i pair =
                    _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(rec->sc[b] + v)));
                store256(to->pair[b] + v, pair);
                store256(to->sc[2 * b] + v, _mm256_shuffle_epi8(pair, first));
                store256(to->sc[2 * b + 1] + v, _mm256_shuffle_epi8(pair, second));
            }
            quants_unpack(6, rec->q[b], rec->qh[b][0], to->q + 8 * b);
        }
    }
}

/* ---- products ---- */

ALWAYS_INLINE void sums_clear(Sums *s, unsigned R)
{
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        s->v[r][0] = s->v[r][1] = _mm256_setzero_si256();
    }
}

/* total += scale * (n groups), scale as i16 pairs. */
ALWAYS_INLINE void groups_add(Sums *total, const uint8_t (*q)[64], const uint8_t *act, unsigned R,
                              unsigned n, const int16_t (*scale)[2])
{
    Sums s;
    UNROLL
    for (unsigned g = 0; g < n; g++) {
        const __m256i w0 = load256(q[g]), w1 = load256(q[g] + 32);
        UNROLL
        for (unsigned r = 0; r < R; r++) {
            const __m256i a = broadcast_i32(act + (g * R + r) * 4);
            const __m256i p0 = _mm256_maddubs_epi16(w0, a), p1 = _mm256_maddubs_epi16(w1, a);
            s.v[r][0] = g == 0 ? p0 : _mm256_add_epi16(s.v[r][0], p0);
            s.v[r][1] = g == 0 ? p1 : _mm256_add_epi16(s.v[r][1], p1);
        }
    }
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        total->v[r][0] =
            _mm256_add_epi32(total->v[r][0], _mm256_madd_epi16(s.v[r][0], load256(scale)));
        total->v[r][1] =
            _mm256_add_epi32(total->v[r][1], _mm256_madd_epi16(s.v[r][1], load256(scale + 8)));
    }
}

/* total += m . sums over n rows of pairs. */
ALWAYS_INLINE void pairs_add(Sums *total, const int16_t (*m)[16][2], const uint8_t *sums,
                             unsigned n, unsigned R)
{
    UNROLL
    for (unsigned p = 0; p < n; p++) {
        UNROLL
        for (unsigned r = 0; r < R; r++) {
            const __m256i a = broadcast_i32(sums + (p * R + r) * 4);
            total->v[r][0] = _mm256_add_epi32(total->v[r][0], _mm256_madd_epi16(load256(m[p]), a));
            total->v[r][1] =
                _mm256_add_epi32(total->v[r][1], _mm256_madd_epi16(load256(m[p] + 8), a));
        }
    }
}

/* acc = fmaf(sign (float)s, d_w * d_a, acc) */
ALWAYS_INLINE void scaled_add(__m256 acc[4][2], const Sums *s, const float *d, bool negative,
                              const uint8_t *act, unsigned R)
{
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        const __m256 da = broadcast_f32(act + ACT_Q8_256_D(R) + 4 * r);
        UNROLL
        for (unsigned v = 0; v < 2; v++) {
            const __m256 scale = _mm256_mul_ps(_mm256_load_ps(d + 8 * v), da);
            const __m256 sum = _mm256_cvtepi32_ps(s->v[r][v]);
            acc[r][v] = negative ? _mm256_fnmadd_ps(sum, scale, acc[r][v])
                                 : _mm256_fmadd_ps(sum, scale, acc[r][v]);
        }
    }
}

ALWAYS_INLINE void affine_add(__m256 acc[4][2], unsigned bits, const WideAffine *rec,
                              const uint8_t *act, unsigned R)
{
    Sums total;
    sums_clear(&total, R);
    for (unsigned b = 0; b < 8; b++) {
        const uint8_t *a = act + b * 32 * R;
        if (bits == 4) {
            groups_add(&total, rec->q + 8 * b, a, R, 8, rec->sc[b]);
        } else {
            groups_add(&total, rec->q + 8 * b, a, R, 4, rec->sc[b]);
            groups_add(&total, rec->q + 8 * b + 4, a + 16 * R, R, 4, rec->sc[b]);
        }
    }
    scaled_add(acc, &total, rec->d, false, act, R);
    sums_clear(&total, R);
    pairs_add(&total, rec->m, act + ACT_Q8_256_SUM32(R), 4, R);
    scaled_add(acc, &total, rec->dmin, true, act, R);
}

ALWAYS_INLINE void q6_k_add(__m256 acc[4][2], const WideQ6K *rec, const uint8_t *act, unsigned R)
{
    Sums total;
    sums_clear(&total, R);
    pairs_add(&total, rec->pair, act + ACT_Q8_256_SUM16(R), 8, R);
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        UNROLL
        for (unsigned v = 0; v < 2; v++) { /* times -32 */
            total.v[r][v] =
                _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(total.v[r][v], 5));
        }
    }
    for (unsigned b = 0; b < 16; b++) {
        groups_add(&total, rec->q + 4 * b, act + b * 16 * R, R, 2, rec->sc[b]);
        groups_add(&total, rec->q + 4 * b + 2, act + b * 16 * R + 8 * R, R, 2, rec->sc[b]);
    }
    scaled_add(acc, &total, rec->d, false, act, R);
}

#define Q4_K_ADD(acc, rec, act, R) affine_add(acc, 4, rec, act, R)
#define Q5_K_ADD(acc, rec, act, R) affine_add(acc, 5, rec, act, R)

/* The runs of a chunk, by a type's records. */
#define K_WIDE(name, Record, add)                                                                  \
    ALWAYS_INLINE void name##_wide(const uint8_t *scratch, const uint8_t *act,                     \
                                   const WideChunk *chunk, float *level, unsigned R)               \
    {                                                                                              \
        const Record *rec = (const Record *)scratch;                                               \
        for (uint32_t u = 0; u < chunk->n_runs; u++) {                                             \
            __m256 acc[4][2];                                                                      \
            wide_tile_load(acc, level, chunk->fresh || u > 0, R);                                  \
            for (uint32_t i = chunk->runs[u].n_records; i > 0; i--, rec++) {                       \
                add(acc, rec, act, R);                                                             \
                act += ACT_Q8_256_TILE(R);                                                         \
            }                                                                                      \
            level = wide_tile_store(acc, level, chunk->runs[u].n_merges, R);                       \
        }                                                                                          \
    }

K_WIDE(q4_k, WideAffine, Q4_K_ADD)
K_WIDE(q5_k, WideAffine, Q5_K_ADD)
K_WIDE(q6_k, WideQ6K, q6_k_add)

WIDE_KERNEL(q4_k, q4_k_wide, NULL, sizeof(WideAffine), 16)
WIDE_KERNEL(q5_k, q5_k_wide, NULL, sizeof(WideAffine), 8)
WIDE_KERNEL(q6_k, q6_k_wide, NULL, sizeof(WideQ6K), 8)
