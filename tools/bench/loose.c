#include "tools/bench/loose.h"

#include "kernels/avx2/matmul.h"
#include "kernels/avx2/vec.h"
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#include "kernels/vector/attention.h"
#pragma GCC diagnostic pop

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
void loose_coarse_q4_0(const MatmulArgs *a)
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

/* ---- horizontal dot products ---- */

ALWAYS_INLINE __m256 horizontal_block(const uint8_t *w, const LooseBlock *x, __m256 acc)
{
    uint16_t half;
    memcpy(&half, w, 2);
    const __m128i both = _mm_loadu_si128((const __m128i *)(w + 2));
    const __m256i q = _mm256_sub_epi8(
        _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(both, 4), both), _mm256_set1_epi8(15)),
        _mm256_set1_epi8(8));
    const __m256i a = load256(x->q);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(a, q));
    const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(fours), _mm256_set1_ps(_cvtsh_ss(half) * x->d), acc);
}

ALWAYS_INLINE float horizontal_sum(__m256 v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

void loose_horizontal_q4_0(const uint8_t *rows, size_t row_bytes, uint32_t n_rows, uint32_t n_in,
                           const LooseBlock *x, float *out)
{
    for (uint32_t n = 0; n < n_rows; n++, rows += row_bytes) {
        __m256 even = _mm256_setzero_ps(), odd = even;
        for (uint32_t b = 0; b + 2 <= n_in / 32; b += 2) {
            prefetch_line(rows + 18 * b);
            even = horizontal_block(rows + 18 * b, x + b, even);
            odd = horizontal_block(rows + 18 * b + 18, x + b + 1, odd);
        }
        out[n] = horizontal_sum(_mm256_add_ps(even, odd));
    }
}

/* ---- attention with a running maximum ---- */

/* p = exp(x - max so far), s and the factor of what was summed before. */
VEC_FN float running_softmax(const Tile *tile, uint32_t item, int low, int high)
{
    float *p = tile->p + (size_t)item * KV_BLOCK;
    Vec x[BLOCK_VECS], top = vec_all(-INFINITY), sum = vec_zero();
#pragma GCC unroll 4
    for (unsigned v = 0; v < BLOCK_VECS; v++) {
        const int at = (int)(v * VEC_LANES);
        x[v] = vec_between(vec_load(p + at), vec_all(-INFINITY), low - at,
                           high - at > 0 ? high - at : 0);
        top = vec_max(x[v], top);
    }
    const float before = tile->m[item], here = vec_max_lane(top), m = here > before ? here : before;
    const float factor = exp32_inline(before - m);
#pragma GCC unroll 4
    for (unsigned v = 0; v < BLOCK_VECS; v++) {
        x[v] = vec_exp(vec_sub(x[v], vec_all(m)));
        sum = vec_add(sum, x[v]);
        vec_store(p + v * VEC_LANES, x[v]);
    }
    tile->m[item] = m;
    tile->s[item] = tile->s[item] * factor + horizontal_sum(sum);
    return factor;
}

/* o = o factor + p V for n items, two vectors of the head at a time. */
VEC_FN void running_values(const Tile *tile, KvType type, const void *v_block, const float *factor,
                           uint32_t first, const unsigned n, uint32_t low, uint32_t high)
{
    const uint32_t head_size = tile->args->head_size;
    const float *p = tile->p + (size_t)first * KV_BLOCK;
    for (uint32_t d = 0; d + 2 * VEC_LANES <= head_size; d += 2 * VEC_LANES) {
        Vec acc[GROUP][2];
        float *o = slot_o(tile, 0, first) + d;
#pragma GCC unroll 8
        for (unsigned i = 0; i < n; i++) {
            const Vec f = vec_all(factor[first + i]);
            acc[i][0] = vec_mul(vec_load(o + i * tile->o_ld), f);
            acc[i][1] = vec_mul(vec_load(o + i * tile->o_ld + VEC_LANES), f);
        }
        for (uint32_t j = low; j < high; j++) {
            const size_t at = (size_t)j * head_size + d;
            const Vec v0 = kv_load(type, v_block, at), v1 = kv_load(type, v_block, at + VEC_LANES);
#pragma GCC unroll 8
            for (unsigned i = 0; i < n; i++) {
                const Vec weight = vec_all(p[i * KV_BLOCK + j]);
                acc[i][0] = vec_fma(weight, v0, acc[i][0]);
                acc[i][1] = vec_fma(weight, v1, acc[i][1]);
            }
        }
#pragma GCC unroll 8
        for (unsigned i = 0; i < n; i++) {
            vec_store(o + i * tile->o_ld, acc[i][0]);
            vec_store(o + i * tile->o_ld + VEC_LANES, acc[i][1]);
        }
    }
}

VEC_FN void running_block(Tile *tile, KvType type, const void *v, const float *factor, uint32_t end,
                          uint32_t start)
{
    for (uint32_t i = 0, n; i < end; i += n) {
        const uint32_t high = visible_high(&tile->items[i], start);
        n = 1;
        while (n < GROUP && i + n < end && visible_high(&tile->items[i + n], start) == high) {
            n++;
        }
        switch (n) {
        case 6:
            running_values(tile, type, v, factor, i, 6, 0, high);
            break;
        case 5:
            running_values(tile, type, v, factor, i, 5, 0, high);
            break;
        case 4:
            running_values(tile, type, v, factor, i, 4, 0, high);
            break;
        case 3:
            running_values(tile, type, v, factor, i, 3, 0, high);
            break;
        case 2:
            running_values(tile, type, v, factor, i, 2, 0, high);
            break;
        default:
            running_values(tile, type, v, factor, i, 1, 0, high);
            break;
        }
    }
}

/* Causal, no window; the rows of a tile end in the same block or the next. */
static void running_tile(Tile *tile)
{
    const AttentionArgs *args = tile->args;
    const size_t n_values = (size_t)args->head_size * KV_BLOCK;
    float factor[TILE];
    for (uint32_t i = 0; i < tile->n_items; i++) {
        tile->m[i] = -1e30f;
        tile->s[i] = 0;
        memset(slot_o(tile, 0, i), 0, tile->o_ld * sizeof(float));
    }
    uint32_t first = 0;
    for (uint32_t block = 0; first < tile->n_items; block++) {
        const uint32_t start = block * KV_BLOCK, end = tile->n_items;
        const void *k = args->k_blocks[block], *v = args->v_blocks[block];
        const bool convert = end - first > CONVERT_ABOVE;
        if (convert) {
            kv_convert(KV_F16, k, n_values, tile->k);
            kv_convert(KV_F16, v, n_values, tile->v);
            scores(tile, KV_F32, tile->k, first, end);
        } else {
            scores(tile, KV_F16, k, first, end);
        }
        for (uint32_t i = first; i < end; i++) {
            factor[i] = running_softmax(tile, i, 0, (int)visible_high(&tile->items[i], start));
        }
        if (first == 0 && convert) {
            running_block(tile, KV_F32, tile->v, factor, end, start);
        } else if (first == 0) {
            running_block(tile, KV_F16, v, factor, end, start);
        }
        for (; first < end && tile->items[first].last <= start + KV_BLOCK; first++) {
            divide(slot_o(tile, 0, first), tile->s[first], args->head_size, tile->items[first].out);
        }
    }
}

void loose_attention_f16(const AttentionArgs *args)
{
    Tile tile = {.args = args, .o_ld = (args->head_size + 15u) & ~15u};
    tile.k = args->scratch;
    tile.v = tile.k + KV_BLOCK * tile.o_ld;
    tile.p = tile.v + KV_BLOCK * tile.o_ld;
    tile.m = tile.p + TILE * KV_BLOCK;
    tile.s = tile.m + (RUN + 1) * TILE;
    tile.o = tile.s + (RUN + 1) * TILE;
    const uint32_t rows_at_once = TILE / args->n_q;
    for (uint32_t row = 0; row < args->n_rows; row += rows_at_once) {
        tile_fill(&tile, row, args->n_rows - row < rows_at_once ? args->n_rows - row : rows_at_once,
                  0, args->n_q);
        running_tile(&tile);
    }
}
