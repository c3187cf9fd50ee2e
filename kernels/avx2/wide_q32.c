/* Products of 32-element blocks with many rows: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 on quants unpacked
 * once for all rows (ops/matmul_wide.h). The sums are those of matmul_q32.c, which has the bounds
 * of the i16 ones.
 *
 * Q8_0's quants and activations are widened to i16 instead, so that vpmaddwd sums exactly in i32:
 * twice the products, but neither vpsignb nor a second widening for each. */
#include "kernels/avx2/matmul.h"

typedef struct WideQ32 {
    float d[16], m[16];
    uint8_t q[8][64];
} WideQ32;

/* Of each group and lane k 0 and 2, then k 1 and 3. */
typedef struct WideQ80 {
    float d[16];
    int16_t even[8][16][2], odd[8][16][2];
} WideQ80;

typedef struct Sums {
    __m256i v[4][2];
} Sums;

/* ---- unpacking ---- */

ALWAYS_INLINE void scales_unpack(const uint16_t *from, float *to)
{
    _mm256_store_ps(to, load_f16x8(from));
    _mm256_store_ps(to + 8, load_f16x8(from + 8));
}

ALWAYS_INLINE void store256(void *p, __m256i v)
{
    _mm256_store_si256((__m256i *)p, v);
}

ALWAYS_INLINE void nibbles_unpack(const uint8_t (*q)[64], const uint8_t *qh, bool five,
                                  uint8_t (*to)[64])
{
    const __m256i low = _mm256_set1_epi8(15), bit = _mm256_set1_epi8(16);
    UNROLL
    for (unsigned j = 0; j < 4; j++) {
        UNROLL
        for (unsigned v = 0; v < 64; v += 32) {
            const __m256i both = load256(q[j] + v);
            __m256i w0 = _mm256_and_si256(both, low),
                    w1 = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
            if (five) { /* bit g of each byte to bit 4; neighbours' bits are masked off */
                const __m256i high = load256(qh + v);
                const __m256i h0 = 2 * j <= 4 ? _mm256_slli_epi16(high, (int)(4 - 2 * j))
                                              : _mm256_srli_epi16(high, (int)(2 * j - 4));
                const __m256i h1 = 2 * j + 1 <= 4 ? _mm256_slli_epi16(high, (int)(3 - 2 * j))
                                                  : _mm256_srli_epi16(high, (int)(2 * j - 3));
                w0 = _mm256_or_si256(w0, _mm256_and_si256(h0, bit));
                w1 = _mm256_or_si256(w1, _mm256_and_si256(h1, bit));
            }
            store256(to[2 * j] + v, w0);
            store256(to[2 * j + 1] + v, w1);
        }
    }
}

/* One record; where it lies and what it has differ by type. */
#define NIBBLES_UNPACK(name, Record, minimum, qh_of_b, five)                                       \
    ALWAYS_INLINE void name##_record_unpack(const uint8_t *w, WideQ32 *to)                         \
    {                                                                                              \
        const Record *b = (const Record *)w;                                                       \
        const uint16_t *m = minimum;                                                               \
        scales_unpack(b->d, to->d);                                                                \
        if (m) {                                                                                   \
            scales_unpack(m, to->m);                                                               \
        }                                                                                          \
        nibbles_unpack(b->q, qh_of_b, five, to->q);                                                \
    }                                                                                              \
    static void name##_unpack(const uint8_t *w, uint32_t n_records, uint8_t *scratch)              \
    {                                                                                              \
        for (uint32_t i = 0; i < n_records; i++) {                                                 \
            name##_record_unpack(w + (size_t)i * sizeof(Record), (WideQ32 *)scratch + i);          \
        }                                                                                          \
    }

NIBBLES_UNPACK(q4_0, RecordQ40, NULL, NULL, false)
NIBBLES_UNPACK(q4_1, RecordQ41, b->m, NULL, false)
NIBBLES_UNPACK(q5_0, RecordQ50, NULL, b->qh, true)
NIBBLES_UNPACK(q5_1, RecordQ51, b->m, b->qh, true)

static void q8_0_unpack(const uint8_t *w, uint32_t n_records, uint8_t *scratch)
{
    const __m256i low = _mm256_set1_epi16(255);
    WideQ80 *to = (WideQ80 *)scratch;
    for (uint32_t i = 0; i < n_records; i++, w += sizeof(RecordQ80), to++) {
        const RecordQ80 *b = (const RecordQ80 *)w;
        scales_unpack(b->d, to->d);
        for (unsigned g = 0; g < 8; g++) {
            UNROLL
            for (unsigned v = 0; v < 16; v += 8) {
                const __m256i q = load256(b->q[g] + 4 * v);
                store256(to->even[g] + v, _mm256_and_si256(q, low));
                store256(to->odd[g] + v, _mm256_srli_epi16(q, 8));
            }
        }
    }
}

/* ---- products ---- */

/* i16 sums of groups [g0, g1). */
ALWAYS_INLINE void group_sums(Sums *s, const uint8_t (*q)[64], const uint8_t *act, unsigned R,
                              unsigned g0, unsigned g1)
{
    UNROLL
    for (unsigned g = g0; g < g1; g++) {
        const __m256i w0 = load256(q[g]), w1 = load256(q[g] + 32);
        UNROLL
        for (unsigned r = 0; r < R; r++) {
            const __m256i a = broadcast_i32(act + (g * R + r) * 4);
            const __m256i p0 = _mm256_maddubs_epi16(w0, a), p1 = _mm256_maddubs_epi16(w1, a);
            s->v[r][0] = g == g0 ? p0 : _mm256_add_epi16(s->v[r][0], p0);
            s->v[r][1] = g == g0 ? p1 : _mm256_add_epi16(s->v[r][1], p1);
        }
    }
}

/* s = scale * (pairs of s), plus what it was in `plus`. */
ALWAYS_INLINE void widen(Sums *s, const Sums *plus, int scale, unsigned R)
{
    const __m256i by = _mm256_set1_epi16((short)scale);
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        UNROLL
        for (unsigned v = 0; v < 2; v++) {
            const __m256i wide = _mm256_madd_epi16(s->v[r][v], by);
            s->v[r][v] = plus ? _mm256_add_epi32(plus->v[r][v], wide) : wide;
        }
    }
}

/* acc = fmaf((float)s, d_w * d_a, acc), then the minimum: fmaf(m_w, d_a * sum_a, acc). */
ALWAYS_INLINE void block_add(__m256 acc[4][2], const Sums *s, const float *d, const float *m,
                             int start, const uint8_t *act, unsigned R)
{
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        const __m256 da = broadcast_f32(act + ACT_Q8_32_D(R) + 4 * r);
        UNROLL
        for (unsigned v = 0; v < 2; v++) {
            __m256i sum = s->v[r][v];
            if (start >= 0) {
                sum = _mm256_add_epi32(sum, broadcast_i32(act + (unsigned)start + 4 * r));
            }
            acc[r][v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum),
                                        _mm256_mul_ps(_mm256_load_ps(d + 8 * v), da), acc[r][v]);
            if (m) {
                acc[r][v] =
                    _mm256_fmadd_ps(_mm256_load_ps(m + 8 * v),
                                    broadcast_f32(act + ACT_Q8_32_DS(R) + 4 * r), acc[r][v]);
            }
        }
    }
}

/* What fills the scratch on the way, a record ahead; unpack NULL: it is full. */
typedef struct Filling {
    const uint8_t *w;
    unsigned record_bytes;
    void (*unpack)(const uint8_t *w, WideQ32 *to);
} Filling;

ALWAYS_INLINE void quants_wide(Filling fill, uint8_t *scratch, const uint8_t *act,
                               const WideChunk *chunk, float *level, unsigned R, bool five,
                               bool minimum, int start)
{
    WideQ32 *b = (WideQ32 *)scratch;
    const WideQ32 *end = b + chunk->n_records;
    if (fill.unpack) {
        fill.unpack(fill.w, b);
    }
    for (uint32_t u = 0; u < chunk->n_runs; u++) {
        __m256 acc[4][2];
        wide_tile_load(acc, level, chunk->fresh || u > 0, R);
        for (uint32_t i = chunk->runs[u].n_records; i > 0; i--, b++, act += ACT_Q8_32_TILE(R)) {
            Sums s, upper;
            if (fill.unpack && b + 1 < end) {
                fill.w += fill.record_bytes;
                fill.unpack(fill.w, b + 1);
            }
            group_sums(&s, b->q, act, R, 0, five ? 4 : 8);
            widen(&s, NULL, 1, R);
            if (five) {
                group_sums(&upper, b->q, act, R, 4, 8);
                widen(&upper, &s, 1, R);
                s = upper;
            }
            block_add(acc, &s, b->d, minimum ? b->m : NULL, start, act, R);
        }
        level = wide_tile_store(acc, level, chunk->runs[u].n_merges, R);
    }
}

/* total += w . a over a group of pairs. */
ALWAYS_INLINE void pairs_add(Sums *total, const int16_t (*w)[2], const uint8_t *act, unsigned R)
{
    const __m256i w0 = load256(w), w1 = load256(w + 8);
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        const __m256i a = broadcast_i32(act + 4 * r);
        total->v[r][0] = _mm256_add_epi32(total->v[r][0], _mm256_madd_epi16(w0, a));
        total->v[r][1] = _mm256_add_epi32(total->v[r][1], _mm256_madd_epi16(w1, a));
    }
}

/* A block's activations as i16: [8][R] pairs of k 0 and 2, then as many of k 1 and 3. */
ALWAYS_INLINE void act_widen(const uint8_t *act, uint8_t *to, unsigned R)
{
    UNROLL
    for (unsigned i = 0; i < 32 * R; i += 32) {
        const __m256i a = load256(act + i);
        store256(to + i, _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8));
        store256(to + 32 * R + i, _mm256_srai_epi16(a, 8));
    }
}

ALWAYS_INLINE void bytes_wide(const uint8_t *scratch, const uint8_t *act, const WideChunk *chunk,
                              float *level, unsigned R)
{
    /* All records at once: what was stored just before is slow to load. */
    _Alignas(32) uint8_t buffer[WIDE_SCRATCH_BYTES / sizeof(WideQ80)][2 * 32 * 4];
    const WideQ80 *b = (const WideQ80 *)scratch;
    const uint8_t *wide = buffer[0];
    for (uint32_t i = 0; i < chunk->n_records; i++) {
        act_widen(act + i * ACT_Q8_32_TILE(R), buffer[i], R);
    }
    for (uint32_t u = 0; u < chunk->n_runs; u++) {
        __m256 acc[4][2];
        wide_tile_load(acc, level, chunk->fresh || u > 0, R);
        for (uint32_t i = chunk->runs[u].n_records; i > 0;
             i--, b++, wide += sizeof buffer[0], act += ACT_Q8_32_TILE(R)) {
            Sums s;
            UNROLL
            for (unsigned r = 0; r < R; r++) {
                s.v[r][0] = s.v[r][1] = broadcast_i32(act + ACT_Q8_32_START128(R) + 4 * r);
            }
            UNROLL
            for (unsigned g = 0; g < 8; g++) {
                pairs_add(&s, b->even[g], wide + 4 * R * g, R);
                pairs_add(&s, b->odd[g], wide + 32 * R + 4 * R * g, R);
            }
            block_add(acc, &s, b->d, NULL, -1, act, R);
        }
        level = wide_tile_store(acc, level, chunk->runs[u].n_merges, R);
    }
}

/* A type of quants: the tiles on what is unpacked, and the one that unpacks. */
#define QUANTS_WIDE(name, Record, five, minimum, start)                                            \
    ALWAYS_INLINE void name##_wide(const uint8_t *scratch, const uint8_t *act,                     \
                                   const WideChunk *chunk, float *level, unsigned R)               \
    {                                                                                              \
        quants_wide((Filling){0}, (uint8_t *)scratch, act, chunk, level, R, five, minimum, start); \
    }                                                                                              \
    static void name##_wide_first(const uint8_t *w, uint8_t *scratch, const uint8_t *act,          \
                                  const WideChunk *chunk, float *level)                            \
    {                                                                                              \
        const unsigned R = 4;                                                                      \
        quants_wide((Filling){w, sizeof(Record), name##_record_unpack}, scratch, act, chunk,       \
                    level, R, five, minimum, start);                                               \
    }

QUANTS_WIDE(q4_0, RecordQ40, false, false, (int)ACT_Q8_32_START8(R))
QUANTS_WIDE(q4_1, RecordQ41, false, true, -1)
QUANTS_WIDE(q5_0, RecordQ50, true, false, (int)ACT_Q8_32_START16(R))
QUANTS_WIDE(q5_1, RecordQ51, true, true, -1)

WIDE_KERNEL(q4_0, q4_0_wide, q4_0_wide_first, sizeof(WideQ32), 32)
WIDE_KERNEL(q4_1, q4_1_wide, q4_1_wide_first, sizeof(WideQ32), 32)
WIDE_KERNEL(q5_0, q5_0_wide, q5_0_wide_first, sizeof(WideQ32), 16)
WIDE_KERNEL(q5_1, q5_1_wide, q5_1_wide_first, sizeof(WideQ32), 16)
WIDE_KERNEL(q8_0, bytes_wide, NULL, sizeof(WideQ80), 16)
