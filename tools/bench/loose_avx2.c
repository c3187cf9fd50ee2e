#include "kernels/avx2/matmul.h"
#include "kernels/avx2/vec.h"

/* The i32 sums of four products each: u8 times i8. */
#define LOOSE_FOURS(unsigned_bytes, bytes)                                                         \
    _mm256_madd_epi16(_mm256_maddubs_epi16(unsigned_bytes, bytes), _mm256_set1_epi16(1))
#include "tools/bench/loose_shared.h"

/* ---- coarse activations ---- */

enum { BLOCKS_PER_SCALE = 8 };

typedef struct Unpacked {
    float d[16];
    uint8_t q[8][64];
} Unpacked;

static void unpack(const RecordQ40 *from, Unpacked *to)
{
    const __m256i low = _mm256_set1_epi8(15);
    for (unsigned v = 0; v < 2; v++) {
        _mm256_store_ps(to->d + 8 * v, load_f16x8(from->d + 8 * v));
        UNROLL
        for (unsigned j = 0; j < 4; j++) {
            const __m256i both = load256(from->q[j] + 32 * v);
            _mm256_store_si256((__m256i *)(to->q[2 * j] + 32 * v), _mm256_and_si256(both, low));
            _mm256_store_si256((__m256i *)(to->q[2 * j + 1] + 32 * v),
                               _mm256_and_si256(_mm256_srli_epi16(both, 4), low));
        }
    }
}

/* sum[r][v] += d_w * (i32 sum of a block). */
ALWAYS_INLINE void coarse_block(const Unpacked *w, const uint8_t *act, __m256 sum[4][2], unsigned R)
{
    __m256i s[4][2];
    UNROLL
    for (unsigned g = 0; g < 8; g++) {
        const __m256i w0 = load256(w->q[g]), w1 = load256(w->q[g] + 32);
        UNROLL
        for (unsigned r = 0; r < R; r++) {
            const __m256i a = broadcast_i32(act + (g * R + r) * 4);
            const __m256i p0 = _mm256_maddubs_epi16(w0, a), p1 = _mm256_maddubs_epi16(w1, a);
            s[r][0] = g == 0 ? p0 : _mm256_add_epi16(s[r][0], p0);
            s[r][1] = g == 0 ? p1 : _mm256_add_epi16(s[r][1], p1);
        }
    }
    const __m256i ones = _mm256_set1_epi16(1);
    UNROLL
    for (unsigned r = 0; r < R; r++) {
        const __m256i start = broadcast_i32(act + ACT_Q8_32_START8(R) + 4 * r);
        UNROLL
        for (unsigned v = 0; v < 2; v++) {
            const __m256i whole = _mm256_add_epi32(_mm256_madd_epi16(s[r][v], ones), start);
            sum[r][v] =
                _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), _mm256_load_ps(w->d + 8 * v), sum[r][v]);
        }
    }
}

ALWAYS_INLINE void coarse_tile(const Unpacked *w, const uint8_t *act, uint32_t n_records,
                               float *tile, unsigned R)
{
    __m256 sum[4][2];
    for (uint32_t i = 0; i < n_records; i += BLOCKS_PER_SCALE) {
        const uint8_t *first = act;
        UNROLL
        for (unsigned r = 0; r < R; r++) {
            sum[r][0] = sum[r][1] = _mm256_setzero_ps();
        }
        for (unsigned b = 0; b < BLOCKS_PER_SCALE; b++, w++, act += ACT_Q8_32_TILE(R)) {
            coarse_block(w, act, sum, R);
        }
        UNROLL
        for (unsigned r = 0; r < R; r++) {
            const __m256 d = broadcast_f32(first + ACT_Q8_32_D(R) + 4 * r);
            UNROLL
            for (unsigned v = 0; v < 2; v++) {
                float *at = tile + r * PANEL_ROWS + 8 * v;
                _mm256_store_ps(at, _mm256_fmadd_ps(sum[r][v], d, _mm256_load_ps(at)));
            }
        }
    }
}

/* One unit, rows a multiple of 4 or 1, n_in a multiple of 256, n_out of 16. */
static void coarse_q4_0(const MatmulArgs *a)
{
    enum { CHUNK = 16, ROWS = 128 };
    static _Thread_local _Alignas(64) Unpacked scratch[CHUNK];
    static _Thread_local _Alignas(64) float tiles[ROWS * PANEL_ROWS];
    const uint32_t n_records = a->w->n_in / 32, R = a->rows == 1 ? 1 : 4;
    const size_t row_bytes = act_row_bytes(ACT_Q8_32, a->w->n_in);
    for (uint32_t row0 = 0; row0 < a->rows; row0 += ROWS) {
        const uint32_t rows = a->rows - row0 < ROWS ? a->rows - row0 : ROWS;
        for (uint32_t panel = a->panel0; panel < a->panel1; panel++) {
            const RecordQ40 *w =
                (const RecordQ40 *)(a->w->data + (size_t)panel * a->w->panel_bytes);
            memset(tiles, 0, sizeof(float) * rows * PANEL_ROWS);
            for (uint32_t at = 0; at < n_records; at += CHUNK) {
                const uint32_t n = n_records - at < CHUNK ? n_records - at : CHUNK;
                for (uint32_t i = 0; i < n; i++) {
                    prefetch_record((const uint8_t *)(w + at + i), sizeof *w);
                    unpack(w + at + i, &scratch[i]);
                }
                for (uint32_t r = 0; r < rows; r += R) {
                    const uint8_t *act = (const uint8_t *)a->act + (row0 + r) * row_bytes +
                                         (size_t)at * ACT_Q8_32_TILE(1) * R;
                    if (R == 1) {
                        coarse_tile(scratch, act, n, tiles + r * PANEL_ROWS, 1);
                    } else {
                        coarse_tile(scratch, act, n, tiles + r * PANEL_ROWS, 4);
                    }
                }
            }
            for (uint32_t r = 0; r < rows; r++) {
                memcpy(a->out + (row0 + r) * a->ld + panel * PANEL_ROWS, tiles + r * PANEL_ROWS,
                       PANEL_ROWS * sizeof(float));
            }
        }
    }
}

const LooseOps loose_avx2 = {coarse_q4_0, horizontal_q4_0, attention_f16};
