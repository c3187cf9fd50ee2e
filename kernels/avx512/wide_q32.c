/* Products of 32-element blocks with many rows: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 on quants unpacked
 * once for all rows (ops/matmul_wide.h). The sums are those of matmul_q32.c. A block of 4 rows x 3
 * panels is 96 products, and 36 to 48 conversions, multiplications and fmas: where two ports take
 * everything, at most 73 % of the products' peak (67 % with minima). */
#include "kernels/avx512/matmul.h"

/* Whole cache lines: a load of quants never touches two. */
typedef struct WideQ32 {
    float d[16], m[16];
    uint8_t q[8][64];
} WideQ32;

/* ---- unpacking ---- */

ALWAYS_INLINE void nibbles_unpack(const uint8_t (*q)[64], const uint8_t *qh, bool five,
                                  uint8_t (*to)[64])
{
    const __m512i low = _mm512_set1_epi8(15), bit = _mm512_set1_epi8(16);
    UNROLL
    for (unsigned j = 0; j < 4; j++) {
        const __m512i both = load512(q[j]);
        __m512i w0 = _mm512_and_si512(both, low),
                w1 = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        if (five) { /* bit g of each byte to bit 4; neighbours' bits are masked off */
            const __m512i high = load512(qh);
            w0 = _mm512_or_si512(w0, _mm512_and_si512(shift16(high, 4 - 2 * (int)j), bit));
            w1 = _mm512_or_si512(w1, _mm512_and_si512(shift16(high, 3 - 2 * (int)j), bit));
        }
        store512(to[2 * j], w0);
        store512(to[2 * j + 1], w1);
    }
}

#define NIBBLES_UNPACK(name, Record, minimum, qh_of_b, five)                                       \
    static void name##_unpack(const uint8_t *w, uint32_t n_records, uint8_t *scratch)              \
    {                                                                                              \
        WideQ32 *to = (WideQ32 *)scratch;                                                          \
        for (const Record *b = (const Record *)w; n_records > 0; n_records--, b++, to++) {         \
            const uint16_t *m = minimum;                                                           \
            _mm512_store_ps(to->d, load_f16x16(b->d));                                             \
            if (m) {                                                                               \
                _mm512_store_ps(to->m, load_f16x16(m));                                            \
            }                                                                                      \
            nibbles_unpack(b->q, qh_of_b, five, to->q);                                            \
        }                                                                                          \
    }

NIBBLES_UNPACK(q4_0, RecordQ40, NULL, NULL, false)
NIBBLES_UNPACK(q4_1, RecordQ41, b->m, NULL, false)
NIBBLES_UNPACK(q5_0, RecordQ50, NULL, b->qh, true)
NIBBLES_UNPACK(q5_1, RecordQ51, b->m, b->qh, true)

static void q8_0_unpack(const uint8_t *w, uint32_t n_records, uint8_t *scratch)
{
    WideQ32 *to = (WideQ32 *)scratch;
    for (const RecordQ80 *b = (const RecordQ80 *)w; n_records > 0; n_records--, b++, to++) {
        _mm512_store_ps(to->d, load_f16x16(b->d));
        UNROLL
        for (unsigned g = 0; g < 8; g++) {
            store512(to->q[g], load512(b->q[g]));
        }
    }
}

/* ---- products ---- */

/* acc = fmaf((float)s, d_w * d_a, acc), then the minimum: fmaf(m_w, d_a * sum_a, acc). What
 * belongs to a panel stays in registers: loads are as scarce as products. */
ALWAYS_INLINE void block_add(Accs *acc, const Sums *s, const uint8_t *panel, bool minimum,
                             const uint8_t *act, unsigned P, unsigned R)
{
    __m512 of_panel[WIDE_PANELS];
    panels_load(of_panel, panel + offsetof(WideQ32, d), P);
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        const __m512 da = broadcast_f32(act + ACT_Q8_32_D(R) + 4 * r);
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            acc->v[r][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s->v[r][p]),
                                           _mm512_mul_ps(of_panel[p], da), acc->v[r][p]);
        }
    }
    if (!minimum) {
        return;
    }
    panels_load(of_panel, panel + offsetof(WideQ32, m), P);
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        const __m512 ds = broadcast_f32(act + ACT_Q8_32_DS(R) + 4 * r);
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            acc->v[r][p] = _mm512_fmadd_ps(of_panel[p], ds, acc->v[r][p]);
        }
    }
}

ALWAYS_INLINE void quants_wide(const uint8_t *scratch, const uint8_t *act, const WideChunk *chunk,
                               float *level, bool minimum, int start, unsigned P, unsigned R)
{
    for (uint32_t u = 0; u < chunk->n_runs; u++) {
        Accs acc;
        wide_tile_load(&acc, level, chunk->fresh || u > 0, P, R);
        for (uint32_t i = chunk->runs[u].n_records; i > 0;
             i--, scratch += sizeof(WideQ32), act += ACT_Q8_32_TILE(R)) {
            Sums s;
            sums_start(&s, start, act, P, R);
            wide_groups_add(&s, scratch + offsetof(WideQ32, q), 8, act, P, R);
            block_add(&acc, &s, scratch, minimum, act, P, R);
        }
        level = wide_tile_store(&acc, level, chunk->runs[u].n_merges, P, R);
    }
}

#define Q4_0_WIDE(scratch, act, chunk, level, P, R)                                                \
    quants_wide(scratch, act, chunk, level, false, (int)ACT_Q8_32_START8(R), P, R)
#define Q5_0_WIDE(scratch, act, chunk, level, P, R)                                                \
    quants_wide(scratch, act, chunk, level, false, (int)ACT_Q8_32_START16(R), P, R)
#define Q8_0_WIDE(scratch, act, chunk, level, P, R)                                                \
    quants_wide(scratch, act, chunk, level, false, (int)ACT_Q8_32_START128(R), P, R)
#define MINIMA_WIDE(scratch, act, chunk, level, P, R)                                              \
    quants_wide(scratch, act, chunk, level, true, -1, P, R)

WIDE_KERNEL(q4_0, Q4_0_WIDE, sizeof(WideQ32), 24, .row8 = {NULL})
WIDE_KERNEL(q4_1, MINIMA_WIDE, sizeof(WideQ32), 24, .row8 = {NULL})
WIDE_KERNEL(q5_0, Q5_0_WIDE, sizeof(WideQ32), 16, .row8 = {NULL})
WIDE_KERNEL(q5_1, MINIMA_WIDE, sizeof(WideQ32), 16, .row8 = {NULL})
WIDE_KERNEL(q8_0, Q8_0_WIDE, sizeof(WideQ32), 16, .row8 = {NULL})
