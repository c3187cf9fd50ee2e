/* The variants without the contract that are written in the vocabulary of kernels/vector. Whoever
 * includes this has included its vec.h and says how four bytes are multiplied (LOOSE_FOURS). */
#pragma once

#include "tools/bench/loose.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#include "kernels/vector/attention.h"
#pragma GCC diagnostic pop

/* ---- horizontal dot products ---- */

VEC_FN __m256 horizontal_block(const uint8_t *w, const LooseBlock *x, __m256 acc)
{
    uint16_t half;
    memcpy(&half, w, 2);
    const __m128i both = _mm_loadu_si128((const __m128i *)(const void *)(w + 2));
    const __m256i q = _mm256_sub_epi8(
        _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(both, 4), both), _mm256_set1_epi8(15)),
        _mm256_set1_epi8(8));
    const __m256i a = _mm256_loadu_si256((const __m256i *)(const void *)x->q);
    const __m256i fours = LOOSE_FOURS(_mm256_abs_epi8(q), _mm256_sign_epi8(a, q));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(fours), _mm256_set1_ps(_cvtsh_ss(half) * x->d), acc);
}

VEC_FN float horizontal_sum(__m256 v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

static void horizontal_q4_0(const uint8_t *rows, size_t row_bytes, uint32_t n_rows, uint32_t n_in,
                            const LooseBlock *x, float *out)
{
    for (uint32_t n = 0; n < n_rows; n++, rows += row_bytes) {
        __m256 even = _mm256_setzero_ps(), odd = even;
        for (uint32_t b = 0; b + 2 <= n_in / 32; b += 2) {
            _mm_prefetch((const char *)rows + 18 * b + PREFETCH_AHEAD, _MM_HINT_T0);
            even = horizontal_block(rows + 18 * b, x + b, even);
            odd = horizontal_block(rows + 18 * b + 18, x + b + 1, odd);
        }
        out[n] = horizontal_sum(_mm256_add_ps(even, odd));
    }
}

/* ---- attention with a running maximum ---- */

/* Of each item: the highest score so far, the factor of what was summed before, and the sum of
 * exponentials by lanes, which are added at the end. */
typedef struct Running {
    float m[TILE], top[TILE], factor[TILE];
    float s[TILE][VEC_LANES];
} Running;

/* The keys of two blocks, or of one, that a walk takes at once. */
typedef struct Keys {
    uint32_t start, n_blocks;
    const void *v[2];
} Keys;

VEC_FN uint32_t running_high(const Item *item, const Keys *keys)
{
    const uint32_t n = keys->n_blocks * KV_BLOCK, seen = item->last - keys->start;
    return seen < n ? seen : n;
}

VEC_FN float *scores_at(const Tile *tile, unsigned v, uint32_t item)
{
    return tile->p[v / BLOCK_VECS] + item * KV_BLOCK + v % BLOCK_VECS * VEC_LANES;
}

/* Keys that an item does not see count as -inf from here on. */
VEC_FN void running_mask(const Tile *tile, uint32_t item, const Keys *keys)
{
    const int high = (int)running_high(&tile->items[item], keys);
    for (unsigned v = 0; v < keys->n_blocks * BLOCK_VECS; v++) {
        const int at = (int)(v * VEC_LANES);
        float *p = scores_at(tile, v, item);
        vec_store(p,
                  vec_between(vec_load(p), vec_all(-INFINITY), 0, high - at > 0 ? high - at : 0));
    }
}

VEC_FN Vec running_top(const Tile *tile, uint32_t item, const unsigned n_vecs)
{
    Vec top = vec_load(scores_at(tile, 0, item));
#pragma GCC unroll 8
    for (unsigned v = 1; v < n_vecs; v++) {
        top = vec_max(vec_load(scores_at(tile, v, item)), top);
    }
    return top;
}

VEC_FN void running_softmax(const Tile *tile, Running *run, uint32_t first, uint32_t end,
                            const unsigned n_vecs)
{
    uint32_t i = first;
#if VEC_LANES == 16
    for (; i + 4 <= end; i += 4) {
        Vec top[4];
#pragma GCC unroll 4
        for (unsigned j = 0; j < 4; j++) {
            top[j] = running_top(tile, i + j, n_vecs);
        }
        vec_max_lanes_4(top, run->top + i);
    }
#endif
    for (; i < end; i++) {
        run->top[i] = vec_max_lane(running_top(tile, i, n_vecs));
    }
    for (i = first - first % VEC_LANES; i < end; i += VEC_LANES) {
        const Vec before = vec_load(run->m + i), m = vec_max(before, vec_load(run->top + i));
        vec_store(run->factor + i, vec_exp(vec_sub(before, m)));
        vec_store(run->m + i, m);
    }
    for (i = first; i < end; i++) {
        Vec s = vec_mul(vec_load(run->s[i]), vec_all(run->factor[i]));
        const Vec m = vec_all(run->m[i]);
#pragma GCC unroll 8
        for (unsigned v = 0; v < n_vecs; v++) {
            float *p = scores_at(tile, v, i);
            const Vec e = vec_exp(vec_sub(vec_load(p), m));
            s = vec_add(s, e);
            vec_store(p, e);
        }
        vec_store(run->s[i], s);
    }
}

/* o = o factor + p V for n items and n_vecs vectors of the head (constants). */
VEC_FN void running_values(const Tile *tile, const Running *run, KvType type, const Keys *keys,
                           uint32_t first, const unsigned n, uint32_t d, const unsigned n_vecs)
{
    const uint32_t high = running_high(&tile->items[first], keys);
    const size_t step = kv_element(type) * tile->args->head_size;
    float *o = slot_o(tile, 0, first, d);
    Vec acc[MOST_ITEMS][MOST_VECS];
#pragma GCC unroll 8
    for (unsigned i = 0; i < n; i++) {
        const Vec factor = vec_all(run->factor[first + i]);
#pragma GCC unroll 8
        for (unsigned v = 0; v < n_vecs; v++) {
            acc[i][v] = vec_mul(vec_load(o + v * O_STEP + i * VEC_LANES), factor);
        }
    }
    for (uint32_t b = 0; b * KV_BLOCK < high; b++) {
        const uint32_t n_keys = high - b * KV_BLOCK < KV_BLOCK ? high - b * KV_BLOCK : KV_BLOCK;
        const uint8_t *row = (const uint8_t *)keys->v[b] + d * kv_element(type);
        const float *p = tile->p[b] + (size_t)first * KV_BLOCK;
        for (uint32_t j = 0; j < n_keys; j++, row += step, p++) {
            Vec value[MOST_VECS];
#pragma GCC unroll 8
            for (unsigned v = 0; v < n_vecs; v++) {
                value[v] = kv_load(type, row, v * VEC_LANES);
            }
#pragma GCC unroll 8
            for (unsigned i = 0; i < n; i++) {
                const Vec weight = vec_all(p[i * KV_BLOCK]);
#pragma GCC unroll 8
                for (unsigned v = 0; v < n_vecs; v++) {
                    acc[i][v] = vec_fma(weight, value[v], acc[i][v]);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (unsigned i = 0; i < n; i++) {
#pragma GCC unroll 8
        for (unsigned v = 0; v < n_vecs; v++) {
            vec_store(o + v * O_STEP + i * VEC_LANES, acc[i][v]);
        }
    }
}

VEC_FN void running_group(const Tile *tile, const Running *run, KvType type, const Keys *keys,
                          uint32_t first, const unsigned n)
{
    const unsigned most = 64 / VEC_LANES, n_vecs = VALUE_VECS(n) < most ? VALUE_VECS(n) : most;
    const unsigned whole = n_vecs == 3 ? 2 : n_vecs; /* heads are multiples of 64 */
    for (uint32_t d = 0; d < tile->args->head_size; d += whole * VEC_LANES) {
        running_values(tile, run, type, keys, first, n, d, whole);
    }
}

VEC_FN void running_groups(const Tile *tile, const Running *run, KvType type, const Keys *keys,
                           uint32_t first, uint32_t end)
{
    for (uint32_t n; first < end; first += n) {
        const uint32_t high = running_high(&tile->items[first], keys);
        n = group_items(type, end - first);
        while (running_high(&tile->items[first + n - 1], keys) != high) {
            n--;
        }
        switch (n) {
        case 8:
            running_group(tile, run, type, keys, first, 8);
            break;
        case 7:
            running_group(tile, run, type, keys, first, 7);
            break;
        case 6:
            running_group(tile, run, type, keys, first, 6);
            break;
        case 5:
            running_group(tile, run, type, keys, first, 5);
            break;
        case 4:
            running_group(tile, run, type, keys, first, 4);
            break;
        case 3:
            running_group(tile, run, type, keys, first, 3);
            break;
        case 2:
            running_group(tile, run, type, keys, first, 2);
            break;
        default:
            running_group(tile, run, type, keys, first, 1);
            break;
        }
    }
}

ATTENTION_FN void running_values_f16(const Tile *tile, const Running *run, const Keys *keys,
                                     uint32_t first)
{
    running_groups(tile, run, KV_F16, keys, first, tile->n_items);
}

ATTENTION_FN void running_values_f32(const Tile *tile, const Running *run, const Keys *keys,
                                     uint32_t first)
{
    running_groups(tile, run, KV_F32, keys, first, tile->n_items);
}

ATTENTION_FN void running_softmaxes(const Tile *tile, Running *run, const Keys *keys,
                                    uint32_t first)
{
    for (uint32_t i = first; i < tile->n_items; i++) {
        if (running_high(&tile->items[i], keys) < keys->n_blocks * KV_BLOCK) {
            running_mask(tile, i, keys);
        }
    }
    if (keys->n_blocks == 2) {
        running_softmax(tile, run, first, tile->n_items, 2 * BLOCK_VECS);
    } else {
        running_softmax(tile, run, first, tile->n_items, BLOCK_VECS);
    }
}

static void running_tile(Tile *tile)
{
    const AttentionArgs *args = tile->args;
    const size_t n_values = (size_t)args->head_size * KV_BLOCK;
    Running run;
    for (uint32_t i = 0; i < TILE; i++) {
        run.m[i] = run.top[i] = -1e30f;
    }
    memset(run.s, 0, sizeof run.s);
    memset(tile->o, 0, tile->o_vecs * O_STEP * sizeof(float));
    uint32_t first = 0;
    for (uint32_t block = 0; first < tile->n_items; block += 2) {
        const uint32_t start = block * KV_BLOCK, end = start + 2 * KV_BLOCK;
        const bool convert = tile->n_items - first > CONVERT_ABOVE;
        Keys keys = {start, tile->items[tile->n_items - 1].last > start + KV_BLOCK ? 2 : 1, {NULL}};
        Blocks at = {.start = start, .n = keys.n_blocks, .first = first, .end = tile->n_items};
        for (uint32_t b = 0; b < keys.n_blocks; b++) {
            at.k[b] = args->k_blocks[block + b];
            keys.v[b] = args->v_blocks[block + b];
            if (convert) {
                kv_convert(KV_F16, at.k[b], n_values, tile->k[b]);
                at.k[b] = tile->k[b];
            }
        }
        if (at.n == 2) {
            scores_of_two(tile, convert ? KV_F32 : KV_F16, &at);
        } else {
            scores(tile, convert ? KV_F32 : KV_F16, at.k[0], 0, first, tile->n_items);
        }
        running_softmaxes(tile, &run, &keys, first);
        if (convert) {
            for (uint32_t b = 0; b < keys.n_blocks; b++) {
                float *to = b == 0 ? tile->v : tile->k[0];
                kv_convert(KV_F16, keys.v[b], n_values, to);
                keys.v[b] = to;
            }
            running_values_f32(tile, &run, &keys, first);
        } else {
            running_values_f16(tile, &run, &keys, first);
        }
        for (; first < tile->n_items && tile->items[first].last <= end; first++) {
            float s = 0;
            for (unsigned lane = 0; lane < VEC_LANES; lane++) {
                s += run.s[first][lane];
            }
            for (uint32_t d = 0; d < args->head_size; d += VEC_LANES) {
                vec_store(tile->items[first].out + d,
                          vec_div(vec_load(slot_o(tile, 0, first, d)), vec_all(s)));
            }
        }
    }
}

static void attention_f16(const AttentionArgs *args)
{
    Tile tile;
    tile_place(&tile, args);
    const uint32_t rows_at_once = TILE / args->n_q;
    for (uint32_t row = 0; row < args->n_rows; row += rows_at_once) {
        tile_fill(&tile, row, args->n_rows - row < rows_at_once ? args->n_rows - row : rows_at_once,
                  0, args->n_q);
        running_tile(&tile);
    }
}
