#include "kernels/avx512/matmul.h"
#include "kernels/avx512/vec.h"

/* The i32 sums of four products each: u8 times i8. */
#define LOOSE_FOURS(unsigned_bytes, bytes)                                                         \
    _mm256_dpbusd_epi32(_mm256_setzero_si256(), unsigned_bytes, bytes)
#include "tools/bench/loose_shared.h"

/* ---- coarse activations ---- */

enum { BLOCKS_PER_SCALE = 8 };

typedef struct Unpacked {
    float d[16];
    uint8_t q[8][64];
} Unpacked;

/* A panel's blocks of one scale. */
typedef Unpacked Chunk[BLOCKS_PER_SCALE];

static void unpack(const RecordQ40 *from, Unpacked *to)
{
    const __m512i low = _mm512_set1_epi8(15);
    _mm512_store_ps(to->d, load_f16x16(from->d));
    UNROLL
    for (unsigned j = 0; j < 4; j++) {
        const __m512i both = load512(from->q[j]);
        store512(to->q[2 * j], _mm512_and_si512(both, low));
        store512(to->q[2 * j + 1], _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
    }
}

/* tile[r] += d_a * (sum over eight blocks of d_w * (i32 sum of a block)), 4 rows x P panels. */
ALWAYS_INLINE void coarse_tile4(const Chunk *w, const uint8_t *act,
                                float (*tile)[WIDE_PANELS][PANEL_ROWS], unsigned P)
{
    enum { R = 4 };
    const uint8_t *first = act;
    Accs sum;
    accs_clear(&sum, P, R);
    for (unsigned b = 0; b < BLOCKS_PER_SCALE; b++, act += ACT_Q8_32_TILE(R)) {
        Sums s;
        sums_start(&s, (int)ACT_Q8_32_START8(R), act, P, R);
        UNROLL
        for (unsigned g = 0; g < 8; g++) {
            __m512i quants[WIDE_PANELS];
            UNROLL
            for (unsigned p = 0; p < P; p++) {
                quants[p] = load512(w[p][b].q[g]);
            }
            group_add(&s, quants, g, act, P, R);
        }
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            const __m512 d = _mm512_load_ps(w[p][b].d);
            UNROLL
            for (unsigned r = 0; r < R; r++) {
                sum.v[r][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s.v[r][p]), d, sum.v[r][p]);
            }
        }
    }
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        const __m512 d = broadcast_f32(first + ACT_Q8_32_D(R) + 4 * r);
        UNROLL
        for (unsigned p = 0; p < P; p++) {
            float *at = tile[r][p];
            _mm512_store_ps(at, _mm512_fmadd_ps(sum.v[r][p], d, _mm512_load_ps(at)));
        }
    }
}

static void coarse_panels(const MatmulArgs *a, uint32_t panel, uint32_t n)
{
    enum { ROWS = 128 };
    _Alignas(64) Chunk scratch[WIDE_PANELS];
    _Alignas(64) float tiles[ROWS][WIDE_PANELS][PANEL_ROWS];
    const size_t row_bytes = act_row_bytes(ACT_Q8_32, a->w->n_in);
    const uint8_t *w = a->w->data + (size_t)panel * a->w->panel_bytes;
    for (uint32_t row0 = 0; row0 < a->rows; row0 += ROWS) {
        const uint32_t rows = a->rows - row0 < ROWS ? a->rows - row0 : ROWS;
        memset(tiles, 0, sizeof tiles);
        for (uint32_t at = 0; at < a->w->n_in / 32; at += BLOCKS_PER_SCALE) {
            for (uint32_t p = 0; p < n; p++) {
                const RecordQ40 *from = (const RecordQ40 *)(w + p * a->w->panel_bytes) + at;
                for (uint32_t b = 0; b < BLOCKS_PER_SCALE; b++) {
                    prefetch_record((const uint8_t *)(from + b), sizeof *from);
                    unpack(from + b, &scratch[p][b]);
                }
            }
            for (uint32_t r = 0; r < rows; r += 4) {
                const uint8_t *act = (const uint8_t *)a->act + (row0 + r) * row_bytes +
                                     (size_t)at * ACT_Q8_32_TILE(4);
                switch (n) {
                case 3:
                    coarse_tile4(scratch, act, tiles + r, 3);
                    break;
                case 2:
                    coarse_tile4(scratch, act, tiles + r, 2);
                    break;
                default:
                    coarse_tile4(scratch, act, tiles + r, 1);
                    break;
                }
            }
        }
        for (uint32_t r = 0; r < rows; r++) {
            memcpy(a->out + (row0 + r) * a->ld + panel * PANEL_ROWS, tiles[r],
                   n * sizeof *tiles[r]);
        }
    }
}

/* One row times a panel: nothing is unpacked. */
static void coarse_row(const MatmulArgs *a, uint32_t panel)
{
    const __m512i low = _mm512_set1_epi8(15);
    const RecordQ40 *w = (const RecordQ40 *)(a->w->data + (size_t)panel * a->w->panel_bytes);
    const uint8_t *act = a->act;
    __m512 acc = _mm512_setzero_ps();
    for (uint32_t i = 0; i < a->w->n_in / 32; i += BLOCKS_PER_SCALE) {
        const float *d = (const float *)(const void *)(act + ACT_Q8_32_D(1));
        __m512 sum = _mm512_setzero_ps();
        UNROLL
        for (unsigned b = 0; b < BLOCKS_PER_SCALE; b++, w++, act += ACT_Q8_32_TILE(1)) {
            __m512i even = broadcast_i32(act + ACT_Q8_32_START8(1)), odd = _mm512_setzero_si512();
            prefetch_record((const uint8_t *)w, sizeof *w);
            UNROLL
            for (unsigned j = 0; j < 4; j++) {
                const __m512i both = load512(w->q[j]);
                even = _mm512_dpbusd_epi32(even, _mm512_and_si512(both, low),
                                           broadcast_i32(act + 8 * j));
                odd = _mm512_dpbusd_epi32(odd, _mm512_and_si512(_mm512_srli_epi16(both, 4), low),
                                          broadcast_i32(act + 8 * j + 4));
            }
            sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(even, odd)),
                                  load_f16x16(w->d), sum);
        }
        acc = _mm512_fmadd_ps(sum, _mm512_set1_ps(*d), acc);
    }
    _mm512_storeu_ps(a->out + panel * PANEL_ROWS, acc);
}

static void coarse_q4_0(const MatmulArgs *a)
{
    if (a->rows == 1) {
        for (uint32_t panel = a->panel0; panel < a->panel1; panel++) {
            coarse_row(a, panel);
        }
        return;
    }
    for (uint32_t panel = a->panel0, n; panel < a->panel1; panel += n) {
        n = wide_at_once(a->panel1 - panel);
        coarse_panels(a, panel, n);
    }
}

const LooseOps loose_avx512 = {coarse_q4_0, horizontal_q4_0, attention_f16};
