/* Attention in tiles: up to ATTENTION_TILE (row, head) pairs, the items, walk the key blocks
 * together. A 16-bit block that many items read is converted to f32 once; few (decoding) convert
 * while they read. An 8-bit block is always converted first: its scales are by key. Every item's
 * arithmetic is that of generic/attention.c: the tile shares loads, never sums.
 *
 *   for each block, or for two that a node of the tree has as its leaves:
 *                    scores  K block [head_size][32]  x  q of a group of items -> p [item][32]
 *                            (16 lanes: of both blocks at once, so that a load of q serves four
 *                            vectors)
 *                    highest score of each item's visible lanes                -> m of the block
 *                    factors of the merges by the binary counter (generic/attention.c), the
 *                            exponentials of all items at once                 -> m, e
 *                    exponentials and their sum                                -> p, s
 *                    values  p of a group of items  x  V block [32][head_size], merged while it
 *                            is in registers                                    -> o
 *
 * Two blocks at once: o of the left one stays in the first-level cache, which the slots of a tile
 * do not fit, and the chains of exponentials of the merges are half as many.
 *
 * Items are ordered by row, then head, so first and end block rise with the item: the active ones
 * of a block are a range, and the heads of a row share the visible range of a block that the
 * diagonal or the window cuts. */
#pragma once

#include "kernels/ops/attention.h"

enum {
    TILE = ATTENTION_TILE,
    LEVELS = ATTENTION_LEVELS, /* of the tree: slots */
    GROUP = 6,                 /* items whose sums are in registers at once */
    BLOCK_VECS = 32 / VEC_LANES,
    CONVERT_ABOVE = 2 * GROUP, /* items that read a 16-bit block: convert it once */
};

/* Vectors of 32 keys, or of the head, that a group of n items holds sums of: at least 8 sums hide
 * the latency of fma; sums, one item's operand and a vector each must fit in the registers with one
 * to spare, or gcc spills. */
#define SCORE_VECS(n) (VEC_LANES == 8 && (n) > 3 ? 2 : BLOCK_VECS)
#define VALUE_VECS(n)                                                                              \
    ((n) == 1 ? 8 : (n) > 6 ? 2 : VEC_LANES == 16 || (n) == 2 ? 4 : (n) == 3 ? 3 : 2)
#define MOST_VECS 8

/* Items that a group of `left` takes. With 16 lanes a 16-bit vector takes as long as two fmas to
 * convert: rather 8 items, half of the head at a time, than 6 and 2. */
#define MOST_ITEMS 8
VEC_FN uint32_t group_items(KvType type, uint32_t left)
{
    return VEC_LANES == 16 && type != KV_F32 && (left == 7 || left == 8) ? left
           : left < GROUP                                                ? left
                                                                         : GROUP;
}

/* The loops are functions of their own: inlined into the walk over blocks, gcc lacks integer
 * registers for their pointers. */
#define ATTENTION_FN static __attribute__((noinline, unused))

typedef struct Item {
    const float *q;
    float *out;           /* or the partial */
    uint32_t first, last; /* visible keys [first, last) */
} Item;

/* Factors of a merge, of each item: o = o_left left + o_run run. */
typedef struct Factors {
    float left[TILE], run[TILE];
} Factors;

typedef struct Tile {
    const AttentionArgs *args;
    uint32_t n_items;
    size_t o_vecs;            /* of the head, padded to 16 elements */
    float *k[2], *v;          /* blocks as f32, [head_size][32] and [32][head_size] */
    float *p[2];              /* of the blocks at hand: [TILE][32], */
    float *block_m, *block_s; /* [2][TILE] */
    float *m, *s;             /* [LEVELS][TILE] */
    /* [LEVELS][o_vecs][TILE][VEC_LANES]: what a group merges lies at constant distances */
    float *o;
    Factors *factors;  /* [LEVELS] */
    uint32_t n_levels; /* slots that anything was put into */
    /* Items below filled[l], of those that are active, hold an operand in slot l; merged[l] is what
     * it was before the blocks at hand took it in. */
    uint32_t filled[LEVELS], merged[LEVELS];
    Item items[TILE];
} Tile;

VEC_FN Vec kv_load(KvType type, const void *block, size_t index)
{
    return type == KV_F16    ? vec_load_f16((const uint16_t *)block + index)
           : type == KV_BF16 ? vec_load_bf16((const uint16_t *)block + index)
                             : vec_load((const float *)block + index);
}

/* Bytes of one that is read unconverted. */
VEC_FN size_t kv_element(KvType type)
{
    return type == KV_F32 ? sizeof(float) : sizeof(uint16_t);
}

VEC_FN Vec kv_load_first(KvType type, const void *block, size_t index, uint32_t n)
{
    if (type == KV_F32) {
        return vec_load_first((const float *)block + index, n);
    }
    uint16_t few[VEC_LANES] = {0};
    memcpy(few, (const uint16_t *)block + index, n * sizeof(uint16_t));
    return kv_load(type, few, 0);
}

/* n_values, a multiple of VEC_LANES. */
VEC_FN void kv_convert(KvType type, const void *block, size_t n_values, float *out)
{
    for (size_t i = 0; i < n_values; i += VEC_LANES) {
        vec_store(out + i, kv_load(type, block, i));
    }
}

/* An 8-bit K block [head_size][32]: lanes are keys, so are the scales. */
VEC_FN void kv_convert_q8_k(const void *block, uint32_t head_size, float *out)
{
    const int8_t *q = block;
    const float *scales = kv_q8_scales(block, head_size);
    Vec scale[BLOCK_VECS];
#pragma GCC unroll 4
    for (unsigned v = 0; v < BLOCK_VECS; v++) {
        scale[v] = vec_load(scales + v * VEC_LANES);
    }
    for (size_t d = 0; d < head_size; d++) {
#pragma GCC unroll 4
        for (unsigned v = 0; v < BLOCK_VECS; v++) {
            const size_t at = d * KV_BLOCK + v * VEC_LANES;
            vec_store(out + at, vec_mul(vec_load_i8(q + at), scale[v]));
        }
    }
}

/* An 8-bit V block [32][head_size]. */
VEC_FN void kv_convert_q8_v(const void *block, uint32_t head_size, float *out)
{
    const float *scales = kv_q8_scales(block, head_size);
    for (size_t j = 0; j < KV_BLOCK; j++) {
        const int8_t *q = (const int8_t *)block + j * head_size;
        float *row = out + j * head_size;
        uint32_t d = 0;
        for (; d + VEC_LANES <= head_size; d += VEC_LANES) {
            vec_store(row + d, vec_mul(vec_load_i8(q + d), vec_all(scales[j])));
        }
        for (; d < head_size; d++) {
            row[d] = (float)q[d] * scales[j];
        }
    }
}

VEC_FN void kv_convert_k(const Tile *tile, KvType type, const void *k, float *out)
{
    const uint32_t head_size = tile->args->head_size;
    if (type == KV_Q8) {
        kv_convert_q8_k(k, head_size, out);
    } else {
        kv_convert(type, k, (size_t)head_size * KV_BLOCK, out);
    }
}

VEC_FN void kv_convert_v(const Tile *tile, KvType type, const void *v, float *out)
{
    const uint32_t head_size = tile->args->head_size;
    if (type == KV_Q8) {
        kv_convert_q8_v(v, head_size, out);
    } else {
        kv_convert(type, v, (size_t)head_size * KV_BLOCK, out);
    }
}

/* p[b][i][j] = (q_i . k_j) * scale for n items from `first` on and n_vecs vectors of keys from
 * `key` on (n, n_vecs constant). Vectors from BLOCK_VECS on are of k_next and block b + 1 (key is
 * 0). */
VEC_FN void scores_of(const Tile *tile, KvType type, const void *k, const void *k_next, uint32_t b,
                      uint32_t first, const unsigned n, uint32_t key, const unsigned n_vecs)
{
    const uint32_t head_size = tile->args->head_size;
    const float *q[MOST_ITEMS];
    Vec acc[MOST_ITEMS][2 * BLOCK_VECS];
#pragma GCC unroll 8
    for (unsigned i = 0; i < n; i++) {
        q[i] = tile->items[first + i].q;
#pragma GCC unroll 8
        for (unsigned v = 0; v < n_vecs; v++) {
            acc[i][v] = vec_zero();
        }
    }
    for (uint32_t d = 0; d < head_size; d++) {
        Vec keys[2 * BLOCK_VECS];
#pragma GCC unroll 8
        for (unsigned v = 0; v < n_vecs; v++) {
            keys[v] = kv_load(type, v < BLOCK_VECS ? k : k_next,
                              (size_t)d * KV_BLOCK + key + v % BLOCK_VECS * VEC_LANES);
        }
#pragma GCC unroll 8
        for (unsigned i = 0; i < n; i++) {
            const Vec query = vec_all(q[i][d]);
#pragma GCC unroll 8
            for (unsigned v = 0; v < n_vecs; v++) {
                acc[i][v] = vec_fma(query, keys[v], acc[i][v]);
            }
        }
    }
    const Vec scale = vec_all(tile->args->scale);
#pragma GCC unroll 8
    for (unsigned i = 0; i < n; i++) {
#pragma GCC unroll 8
        for (unsigned v = 0; v < n_vecs; v++) {
            float *p = v < BLOCK_VECS ? tile->p[b] : tile->p[1];
            vec_store(p + (first + i) * KV_BLOCK + key + v % BLOCK_VECS * VEC_LANES,
                      vec_mul(acc[i][v], scale));
        }
    }
}

VEC_FN void scores_of_group(const Tile *tile, KvType type, const void *k, uint32_t b,
                            uint32_t first, const unsigned n)
{
    for (uint32_t key = 0; key < KV_BLOCK; key += SCORE_VECS(n) * VEC_LANES) {
        scores_of(tile, type, k, NULL, b, first, n, key, SCORE_VECS(n));
    }
}

VEC_FN void scores_of_type(const Tile *tile, KvType type, const void *k, uint32_t b, uint32_t first,
                           uint32_t end)
{
    for (uint32_t n; first < end; first += n) {
        n = group_items(type, end - first);
        switch (n) {
        case 8:
            scores_of_group(tile, type, k, b, first, 8);
            break;
        case 7:
            scores_of_group(tile, type, k, b, first, 7);
            break;
        case 6:
            scores_of_group(tile, type, k, b, first, 6);
            break;
        case 5:
            scores_of_group(tile, type, k, b, first, 5);
            break;
        case 4:
            scores_of_group(tile, type, k, b, first, 4);
            break;
        case 3:
            scores_of_group(tile, type, k, b, first, 3);
            break;
        case 2:
            scores_of_group(tile, type, k, b, first, 2);
            break;
        default:
            scores_of_group(tile, type, k, b, first, 1);
            break;
        }
    }
}

#define SCORES(name, type)                                                                         \
    ATTENTION_FN void name(const Tile *tile, const void *k, uint32_t b, uint32_t first,            \
                           uint32_t end)                                                           \
    {                                                                                              \
        scores_of_type(tile, type, k, b, first, end);                                              \
    }
SCORES(scores_f16, KV_F16)
SCORES(scores_bf16, KV_BF16)
SCORES(scores_f32, KV_F32)

VEC_FN void scores(const Tile *tile, KvType type, const void *k, uint32_t b, uint32_t first,
                   uint32_t end)
{
    (type == KV_F16    ? scores_f16
     : type == KV_BF16 ? scores_bf16
                       : scores_f32)(tile, k, b, first, end);
}

/* The blocks at hand: one, or a left leaf of the tree and its right neighbour. */
typedef struct Blocks {
    uint32_t start; /* position of the first key */
    uint32_t n;
    uint32_t first, end; /* active items: those that see a key of each block */
    uint32_t target;     /* slot of the result, */
    uint32_t takes;      /* bit l: which takes in slot l */
    uint32_t takes_some; /* of them, those that not every active item has an operand in */
    const void *k[2], *v[2];
} Blocks;

/* Visible keys of block b for an item, [low, high). */
VEC_FN uint32_t visible_low(const Item *item, const Blocks *at, uint32_t b)
{
    const uint32_t start = at->start + b * KV_BLOCK;
    return item->first > start ? item->first - start : 0;
}

VEC_FN uint32_t visible_high(const Item *item, const Blocks *at, uint32_t b)
{
    const uint32_t start = at->start + b * KV_BLOCK;
    return item->last - start < KV_BLOCK ? item->last - start : KV_BLOCK;
}

/* Keys outside [low, high) of block b count as -inf from here on. */
VEC_FN void hide(const Tile *tile, uint32_t b, uint32_t item, int low, int high)
{
    float *p = tile->p[b] + (size_t)item * KV_BLOCK;
#pragma GCC unroll 4
    for (unsigned v = 0; v < BLOCK_VECS; v++) {
        const int at = (int)(v * VEC_LANES);
        const Vec x = vec_between(vec_load(p + at), vec_all(-INFINITY), low - at,
                                  high - at > 0 ? high - at : 0);
        vec_store(p + at, x);
    }
}

VEC_FN Vec top_of(const float *p)
{
    Vec top = vec_all(-INFINITY);
#pragma GCC unroll 4
    for (unsigned v = 0; v < BLOCK_VECS; v++) {
        top = vec_max(vec_load(p + v * VEC_LANES), top);
    }
    return top;
}

/* The highest visible scores of block b. */
VEC_FN void tops_of(const Tile *tile, const Blocks *at, uint32_t b)
{
    const float *p = tile->p[b];
    float *m = tile->block_m + b * TILE;
    for (uint32_t i = at->first; i < at->end; i++) {
        const Item *item = &tile->items[i];
        const uint32_t low = visible_low(item, at, b), high = visible_high(item, at, b);
        if (high - low != KV_BLOCK) {
            hide(tile, b, i, (int)low, (int)high);
        }
    }
    uint32_t i = at->first;
#if VEC_LANES == 16
    for (; i + 4 <= at->end; i += 4) {
        const float *four = p + (size_t)i * KV_BLOCK;
        const Vec top[4] = {top_of(four), top_of(four + KV_BLOCK), top_of(four + 2 * KV_BLOCK),
                            top_of(four + 3 * KV_BLOCK)};
        vec_max_lanes_4(top, m + i);
    }
#endif
    for (; i < at->end; i++) {
        m[i] = vec_max_lane(top_of(p + (size_t)i * KV_BLOCK));
    }
}

ATTENTION_FN void tops(const Tile *tile, const Blocks *at)
{
    for (uint32_t b = 0; b < at->n; b++) {
        tops_of(tile, at, b);
    }
}

/* p = exp(p - m) of an item, hidden ones +0. */
VEC_FN void exps_of(float *p, float m, Vec x[BLOCK_VECS])
{
#pragma GCC unroll 4
    for (unsigned v = 0; v < BLOCK_VECS; v++) {
        x[v] = vec_exp(vec_sub(vec_load(p + v * VEC_LANES), vec_all(m)));
        vec_store(p + v * VEC_LANES, x[v]);
    }
}

/* And their sums. */
ATTENTION_FN void exps(const Tile *tile, const Blocks *at)
{
    for (uint32_t b = 0; b < at->n; b++) {
        const float *m = tile->block_m + b * TILE;
        float *s = tile->block_s + b * TILE, *p = tile->p[b];
        uint32_t i = at->first;
#if VEC_LANES == 16
        for (; i + 4 <= at->end; i += 4) {
            Vec x[4][BLOCK_VECS];
#pragma GCC unroll 4
            for (uint32_t j = 0; j < 4; j++) {
                exps_of(p + (i + j) * KV_BLOCK, m[i + j], x[j]);
            }
            vec_fold_4(x, s + i);
        }
#endif
        for (; i < at->end; i++) {
            Vec x[BLOCK_VECS];
            exps_of(p + i * KV_BLOCK, m[i], x);
            s[i] = vec_fold(x);
        }
    }
}

/* From element d, a multiple of VEC_LANES, on; a vector on is O_STEP floats away. */
#define O_STEP ((size_t)TILE * VEC_LANES)
VEC_FN float *slot_o(const Tile *tile, uint32_t slot, uint32_t item, uint32_t d)
{
    return tile->o + (slot * tile->o_vecs + d / VEC_LANES) * O_STEP + (size_t)item * VEC_LANES;
}

/* The visible keys of a group of items, and what becomes of its o. */
typedef struct Group {
    uint32_t first;     /* item */
    uint32_t low, high; /* of the first block from low on, of the last one up to high */
    uint32_t merges;    /* bit l: it takes in slot l */
} Group;

typedef struct ValueSums {
    Vec v[MOST_ITEMS][MOST_VECS];
} ValueSums;

/* sum[i] += over n_keys of p[i][j] v[j][d...], for n items and n_vecs vectors of d (constants).
 * `rest` of the lanes, if not all, of a last vector. */
VEC_FN void values_add(ValueSums *sum, KvType type, const uint8_t *row, size_t step, const float *p,
                       uint32_t n_keys, const unsigned n, const unsigned n_vecs, uint32_t rest)
{
    for (; n_keys > 0; n_keys--, row += step, p++) {
        Vec value[MOST_VECS];
#pragma GCC unroll 8
        for (unsigned v = 0; v < n_vecs; v++) {
            value[v] = rest == VEC_LANES ? kv_load(type, row, v * VEC_LANES)
                                         : kv_load_first(type, row, v * VEC_LANES, rest);
        }
#pragma GCC unroll 8
        for (unsigned i = 0; i < n; i++) {
            const Vec weight = vec_all(p[i * KV_BLOCK]);
#pragma GCC unroll 8
            for (unsigned v = 0; v < n_vecs; v++) {
                sum->v[i][v] = vec_fma(weight, value[v], sum->v[i][v]);
            }
        }
    }
}

/* sum = left e_left + sum e_run */
VEC_FN void values_merge(ValueSums *sum, const Factors *by, uint32_t first, const float *left,
                         const unsigned n, const unsigned n_vecs)
{
    const float *e_left = by->left + first, *e_run = by->run + first;
#pragma GCC unroll 8
    for (unsigned i = 0; i < n; i++) {
        const Vec el = vec_all(e_left[i]), er = vec_all(e_run[i]);
#pragma GCC unroll 8
        for (unsigned v = 0; v < n_vecs; v++) {
            sum->v[i][v] =
                vec_fma(vec_load(left + v * O_STEP + i * VEC_LANES), el, vec_mul(sum->v[i][v], er));
        }
    }
}

VEC_FN void values_store(const ValueSums *sum, float *to, const unsigned n, const unsigned n_vecs)
{
#pragma GCC unroll 8
    for (unsigned i = 0; i < n; i++) {
#pragma GCC unroll 8
        for (unsigned v = 0; v < n_vecs; v++) {
            vec_store(to + v * O_STEP + i * VEC_LANES, sum->v[i][v]);
        }
    }
}

VEC_FN void values_clear(ValueSums *sum, const unsigned n, const unsigned n_vecs)
{
#pragma GCC unroll 8
    for (unsigned i = 0; i < n; i++) {
#pragma GCC unroll 8
        for (unsigned v = 0; v < n_vecs; v++) {
            sum->v[i][v] = vec_zero();
        }
    }
}

/* o_i[d...] = sum over the visible keys of p[i][j] v[j][d...] of each block, merged with each other
 * and with what slots hold. Of two blocks the left one's waits in slot 0, which is empty, at the
 * first items' place for every group. */
VEC_FN void values_of(const Tile *tile, KvType type, const Blocks *at, const Group *group,
                      const unsigned n, uint32_t d, const unsigned n_vecs, uint32_t rest)
{
    const uint32_t first = group->first;
    const size_t step = kv_element(type) * tile->args->head_size;
    float *const waiting = slot_o(tile, 0, 0, 0);
    ValueSums sum;
    /* One loop that runs twice, for of two gcc 12 spills the sums in the second. */
    for (uint32_t b = 0, low = group->low;; b++, low = 0) {
        const uint32_t high = b + 1 == at->n ? group->high : KV_BLOCK;
        const uint8_t *row = (const uint8_t *)at->v[b] + low * step + d * kv_element(type);
        const float *p = tile->p[b] + (size_t)first * KV_BLOCK + low;
        values_clear(&sum, n, n_vecs);
        values_add(&sum, type, row, step, p, high - low, n, n_vecs, rest);
        if (b + 1 == at->n) {
            break;
        }
        values_store(&sum, waiting, n, n_vecs);
    }
    for (uint32_t merges = group->merges; merges != 0; merges &= merges - 1) {
        const uint32_t level = (uint32_t)__builtin_ctz(merges);
        const float *left = at->n == 2 && level == 0 ? waiting : slot_o(tile, level, first, d);
        values_merge(&sum, &tile->factors[level], first, left, n, n_vecs);
    }
    values_store(&sum, slot_o(tile, at->target, first, d), n, n_vecs);
}

VEC_FN void values_of_group(const Tile *tile, KvType type, const Blocks *at, const Group *group,
                            const unsigned n)
{
    const uint32_t head_size = tile->args->head_size, lanes = VEC_LANES;
    uint32_t d = 0;
    for (; d + VALUE_VECS(n) * lanes <= head_size; d += VALUE_VECS(n) * lanes) {
        values_of(tile, type, at, group, n, d, VALUE_VECS(n), lanes);
    }
    for (; VALUE_VECS(n) > 4 && d + 4 * lanes <= head_size; d += 4 * lanes) {
        values_of(tile, type, at, group, n, d, VALUE_VECS(n) > 4 ? 4 : 1, lanes);
    }
    for (; VALUE_VECS(n) > 2 && d + 2 * lanes <= head_size; d += 2 * lanes) {
        values_of(tile, type, at, group, n, d, 2, lanes);
    }
    for (; d + lanes <= head_size; d += lanes) {
        values_of(tile, type, at, group, n, d, 1, lanes);
    }
    if (d < head_size) {
        values_of(tile, type, at, group, n, d, 1, head_size - d);
    }
}

/* Bit l: the result of an item takes in slot l. */
VEC_FN uint32_t merges_of(const Tile *tile, const Blocks *at, uint32_t item)
{
    uint32_t merges = at->takes;
    for (uint32_t some = at->takes_some; some != 0; some &= some - 1) {
        const uint32_t level = (uint32_t)__builtin_ctz(some);
        merges &= ~((uint32_t)(item >= tile->merged[level]) << level);
    }
    return merges;
}

/* Whether they see the same keys: visible keys begin and end with the item. */
VEC_FN bool see_alike(const Tile *tile, const Blocks *at, uint32_t first, uint32_t end)
{
    const Item *a = &tile->items[first], *b = &tile->items[end - 1];
    return visible_low(a, at, 0) == visible_low(b, at, 0) &&
           visible_high(a, at, at->n - 1) == visible_high(b, at, at->n - 1);
}

VEC_FN void values_of_type(const Tile *tile, KvType type, const Blocks *at)
{
    for (uint32_t first = at->first, n; first < at->end; first += n) {
        const Item *item = &tile->items[first];
        const Group group = {.first = first,
                             .low = visible_low(item, at, 0),
                             .high = visible_high(item, at, at->n - 1),
                             .merges = merges_of(tile, at, first) | (at->n - 1)};
        n = group_items(type, at->end - first);
        while (!see_alike(tile, at, first, first + n) ||
               (at->takes_some != 0 &&
                (merges_of(tile, at, first + n - 1) | (at->n - 1)) != group.merges)) {
            n--; /* operands are the first items' too: if the last one merges alike, all do */
        }
        switch (n) {
        case 8:
            values_of_group(tile, type, at, &group, 8);
            break;
        case 7:
            values_of_group(tile, type, at, &group, 7);
            break;
        case 6:
            values_of_group(tile, type, at, &group, 6);
            break;
        case 5:
            values_of_group(tile, type, at, &group, 5);
            break;
        case 4:
            values_of_group(tile, type, at, &group, 4);
            break;
        case 3:
            values_of_group(tile, type, at, &group, 3);
            break;
        case 2:
            values_of_group(tile, type, at, &group, 2);
            break;
        default:
            values_of_group(tile, type, at, &group, 1);
            break;
        }
    }
}

#define VALUES(name, type)                                                                         \
    ATTENTION_FN void name(const Tile *tile, const Blocks *at)                                     \
    {                                                                                              \
        values_of_type(tile, type, at);                                                            \
    }
VALUES(values_f16, KV_F16)
VALUES(values_bf16, KV_BF16)
VALUES(values_f32, KV_F32)

VEC_FN void values(const Tile *tile, KvType type, const Blocks *at)
{
    (type == KV_F16 ? values_f16 : type == KV_BF16 ? values_bf16 : values_f32)(tile, at);
}

/* Factors of two operands' merge, of VEC_LANES items from i on; returns its m. */
VEC_FN Vec merge_tops(Factors *by, uint32_t i, Vec left, Vec run)
{
    const Vec top = vec_max(left, run);
    vec_store(by->left + i, vec_exp(vec_sub(left, top)));
    vec_store(by->run + i, vec_exp(vec_sub(run, top)));
    return top;
}

VEC_FN Vec merge_sums(const Factors *by, uint32_t i, Vec left, Vec run)
{
    return vec_fma(left, vec_load(by->left + i), vec_mul(run, vec_load(by->run + i)));
}

/* Of VEC_LANES items from i on: those that merge, of so many, and the others as they were. */
VEC_FN Vec merged_lanes(Vec merged, Vec others, uint32_t i, uint32_t n_merged, uint32_t end)
{
    return n_merged >= end ? merged
                           : vec_between(merged, others, 0, n_merged > i ? (int)(n_merged - i) : 0);
}

/* The blocks go to slot `target`, merged with each other and with what the slots below hold: m, and
 * the factors of s and o. A slot is filled by blocks of all items that are active then; of those of
 * a later block the first ones had begun by then and hold an operand. Lanes of other items are
 * computed and dropped. */
VEC_FN void push_tops(Tile *tile, Blocks *at)
{
    at->takes = at->takes_some = 0;
    for (uint32_t level = at->n - 1; level < at->target; level++) {
        const uint32_t filled = tile->filled[level];
        at->takes |= (uint32_t)(filled > at->first) << level;
        at->takes_some |= (uint32_t)(filled > at->first && filled < at->end) << level;
        tile->merged[level] = filled;
        tile->filled[level] = 0;
    }
    for (uint32_t i = at->first - at->first % VEC_LANES; i < at->end; i += VEC_LANES) {
        Vec m = vec_load(tile->block_m + i);
        if (at->n == 2) {
            m = merge_tops(&tile->factors[0], i, m, vec_load(tile->block_m + TILE + i));
        }
        for (uint32_t takes = at->takes; takes != 0; takes &= takes - 1) {
            const uint32_t level = (uint32_t)__builtin_ctz(takes);
            const Vec left = vec_load(tile->m + level * TILE + i);
            m = merged_lanes(merge_tops(&tile->factors[level], i, left, m), m, i,
                             tile->merged[level], at->end);
        }
        vec_store(tile->m + at->target * TILE + i, m);
    }
    tile->filled[at->target] = at->end;
    tile->n_levels = at->target < tile->n_levels ? tile->n_levels : at->target + 1;
}

/* And s. */
VEC_FN void push_sums(Tile *tile, const Blocks *at)
{
    for (uint32_t i = at->first - at->first % VEC_LANES; i < at->end; i += VEC_LANES) {
        Vec s = vec_load(tile->block_s + i);
        if (at->n == 2) {
            s = merge_sums(&tile->factors[0], i, s, vec_load(tile->block_s + TILE + i));
        }
        for (uint32_t takes = at->takes; takes != 0; takes &= takes - 1) {
            const uint32_t level = (uint32_t)__builtin_ctz(takes);
            const Vec left = vec_load(tile->s + level * TILE + i);
            s = merged_lanes(merge_sums(&tile->factors[level], i, left, s), s, i,
                             tile->merged[level], at->end);
        }
        vec_store(tile->s + at->target * TILE + i, s);
    }
}

/* out = o / s */
VEC_FN void divide(const float *o, float s, uint32_t head_size, float *out)
{
    uint32_t d = 0;
    for (; d + VEC_LANES <= head_size; d += VEC_LANES) {
        vec_store(out + d, vec_div(vec_load(o + d), vec_all(s)));
    }
    if (d < head_size) {
        vec_store_first(out + d, vec_div(vec_load_first(o + d, head_size - d), vec_all(s)),
                        head_size - d);
    }
}

/* Folds what an item's slots hold, from the right, and writes o / s, or the partial. */
VEC_FN void finish(Tile *tile, uint32_t item)
{
    const uint32_t head_size = tile->args->head_size;
    float *const out = tile->items[item].out;
    struct {
        uint32_t level;
        float left, run;
    } merges[LEVELS];
    uint32_t lowest = 0, n_merges = 0;
    while (tile->filled[lowest] <= item) {
        lowest++;
    }
    float m = tile->m[lowest * TILE + item], s = tile->s[lowest * TILE + item];
    for (uint32_t level = lowest + 1; level < tile->n_levels; level++) {
        if (tile->filled[level] <= item) {
            continue;
        }
        const float m_left = tile->m[level * TILE + item], top = m_left > m ? m_left : m;
        const float e_left = exp32_inline(m_left - top), e_run = exp32_inline(m - top);
        s = fmaf(tile->s[level * TILE + item], e_left, s * e_run);
        m = top;
        merges[n_merges].level = level;
        merges[n_merges].left = e_left;
        merges[n_merges++].run = e_run;
    }
    const bool partial = tile->args->partial != NULL;
    float *const to = partial ? out + 2 : out;
    if (partial) {
        out[0] = m;
        out[1] = s;
    }
    for (uint32_t d = 0; d < head_size; d += VEC_LANES) {
        Vec o = vec_load(slot_o(tile, lowest, item, d));
        for (uint32_t i = 0; i < n_merges; i++) {
            o = vec_fma(vec_load(slot_o(tile, merges[i].level, item, d)), vec_all(merges[i].left),
                        vec_mul(o, vec_all(merges[i].run)));
        }
        o = partial ? o : vec_div(o, vec_all(s));
        if (head_size - d >= VEC_LANES) {
            vec_store(to + d, o);
        } else {
            vec_store_first(to + d, o, head_size - d);
        }
    }
}

/* Scores of both blocks for items [first, end). */
VEC_FN void scores_of_two(const Tile *tile, KvType type, const Blocks *at)
{
    uint32_t first = at->first;
    if (VEC_LANES == 16 && type == KV_F32) {
        for (; first + GROUP <= at->end; first += GROUP) {
            scores_of(tile, KV_F32, at->k[0], at->k[1], 0, first, GROUP, 0, 2 * BLOCK_VECS);
        }
    }
    scores(tile, type, at->k[0], 0, first, at->end);
    scores(tile, type, at->k[1], 1, first, at->end);
}

/* Scores, softmax and values of the blocks at hand, which lie in memory as `type`. */
VEC_FN void blocks_run(Tile *tile, KvType type, Blocks *at)
{
    const bool convert = type == KV_Q8 || (type != KV_F32 && at->end - at->first > CONVERT_ABOVE);
    const KvType read = convert ? KV_F32 : type;
    for (uint32_t b = 0; convert && b < at->n; b++) {
        kv_convert_k(tile, type, at->k[b], tile->k[b]);
        at->k[b] = tile->k[b];
    }
    if (at->n == 2) {
        scores_of_two(tile, read, at);
    } else {
        scores(tile, read, at->k[0], 0, at->first, at->end);
    }
    tops(tile, at);
    push_tops(tile, at); /* its exponentials wait for each other, the next ones do not */
    exps(tile, at);
    push_sums(tile, at);
    for (uint32_t b = 0; convert && b < at->n; b++) {
        float *to = b == 0 ? tile->v : tile->k[0]; /* which is read */
        kv_convert_v(tile, type, at->v[b], to);
        at->v[b] = to;
    }
    values(tile, read, at);
}

VEC_FN void tile_run(Tile *tile, KvType type)
{
    const AttentionArgs *args = tile->args;
    const Item *items = tile->items;
    uint32_t first = 0, end = 0;
    tile->n_levels = 0;
    memset(tile->filled, 0, sizeof tile->filled);
    for (uint32_t block = items[0].first / KV_BLOCK; first < tile->n_items;) {
        const uint32_t start = block * KV_BLOCK, next = start + KV_BLOCK;
        while (end < tile->n_items && items[end].first < next) {
            end++;
        }
        /* the same items see both */
        const bool two = block % 2 == 0 && items[first].last > next &&
                         (end == tile->n_items || items[end].first >= next + KV_BLOCK);
        Blocks at = {.start = start, .n = two ? 2 : 1, .first = first, .end = end};
        for (uint32_t b = 0; b < at.n; b++) {
            at.k[b] = args->k_blocks[block + b];
            at.v[b] = args->v_blocks[block + b];
        }
        block += at.n;
        at.target = (uint32_t)__builtin_ctz(block); /* where the counter's carry ends */
        blocks_run(tile, type, &at);
        for (; first < end && items[first].last <= block * KV_BLOCK; first++) {
            finish(tile, first);
        }
    }
}

/* Rows [row, row + n_rows) x heads [head, head + n_heads) as the items of a tile. Those that see no
 * key are no items and get their zeros here: they are the first rows (the run lies ahead of them)
 * or the last (their window lies beyond it). */
static void tile_fill(Tile *tile, uint32_t row, uint32_t n_rows, uint32_t head, uint32_t n_heads)
{
    const AttentionArgs *args = tile->args;
    const size_t partial = attention_partial_floats(args->head_size);
    tile->n_items = 0;
    for (uint32_t r = row; r < row + n_rows; r++) {
        const AttentionRange range = attention_range(args, r);
        for (uint32_t h = head; h < head + n_heads; h++) {
            float *out = args->partial != NULL
                             ? args->partial + ((size_t)r * args->n_q + h) * partial
                             : args->out + r * args->out_ld + (size_t)h * args->head_size;
            if (range.first < range.last) {
                tile->items[tile->n_items++] =
                    (Item){args->q + r * args->q_ld + (size_t)h * args->head_size, out, range.first,
                           range.last};
            } else {
                memset(out, 0, (args->partial != NULL ? partial : args->head_size) * sizeof(float));
            }
        }
    }
}

/* A tile without items, in the scratch. */
static void tile_place(Tile *tile, const AttentionArgs *args)
{
    tile->args = args;
    tile->n_items = 0;
    const size_t padded = (args->head_size + 15u) & ~15u;
    tile->o_vecs = padded / VEC_LANES;
    tile->k[0] = args->scratch;
    tile->k[1] = tile->k[0] + KV_BLOCK * padded;
    tile->v = tile->k[1] + KV_BLOCK * padded;
    tile->p[0] = tile->v + KV_BLOCK * padded;
    tile->p[1] = tile->p[0] + TILE * KV_BLOCK;
    tile->block_m = tile->p[1] + TILE * KV_BLOCK;
    tile->block_s = tile->block_m + 2 * TILE;
    tile->m = tile->block_s + 2 * TILE;
    tile->s = tile->m + LEVELS * TILE;
    tile->o = tile->s + LEVELS * TILE;
    tile->factors = (Factors *)(tile->o + LEVELS * TILE * padded);
}

VEC_FN void attention_vector(const AttentionArgs *args, KvType type)
{
    Tile tile;
    tile_place(&tile, args);
    const uint32_t heads_at_once = args->n_q < TILE ? args->n_q : TILE,
                   rows_at_once = TILE / heads_at_once;
    for (uint32_t head = 0; head < args->n_q; head += heads_at_once) {
        const uint32_t n_heads =
            args->n_q - head < heads_at_once ? args->n_q - head : heads_at_once;
        for (uint32_t row = 0; row < args->n_rows; row += rows_at_once) {
            tile_fill(&tile, row,
                      args->n_rows - row < rows_at_once ? args->n_rows - row : rows_at_once, head,
                      n_heads);
            if (tile.n_items > 0) {
                tile_run(&tile, type);
            }
        }
    }
}

static void attention_f16_vector(const AttentionArgs *args)
{
    attention_vector(args, KV_F16);
}

static void attention_bf16_vector(const AttentionArgs *args)
{
    attention_vector(args, KV_BF16);
}

static void attention_f32_vector(const AttentionArgs *args)
{
    attention_vector(args, KV_F32);
}

static void attention_q8_vector(const AttentionArgs *args)
{
    attention_vector(args, KV_Q8);
}

/* right = left merged with right, partials of one row and head; s = 0: no operand. */
static void combine_two(const float *left, float *right, uint32_t head_size)
{
    if (left[1] == 0.0f) {
        return;
    }
    if (right[1] == 0.0f) {
        memcpy(right, left, attention_partial_floats(head_size) * sizeof(float));
        return;
    }
    const float m = left[0] > right[0] ? left[0] : right[0];
    const float e_left = exp32_inline(left[0] - m), e_right = exp32_inline(right[0] - m);
    const Vec el = vec_all(e_left), er = vec_all(e_right);
    uint32_t i = 1;
    right[0] = m;
    for (; i + VEC_LANES <= head_size + 2; i += VEC_LANES) {
        vec_store(right + i, vec_fma(vec_load(left + i), el, vec_mul(vec_load(right + i), er)));
    }
    for (; i < head_size + 2; i++) {
        right[i] = fmaf(left[i], e_left, right[i] * e_right);
    }
}

/* generic/attention.c has the comment. */
static void attention_combine_vector(float *partials, size_t stride, uint32_t n_runs,
                                     uint32_t head_size, float *out)
{
    float *stack[ATTENTION_LEVELS + 1];
    uint32_t depth = 0;
    for (uint32_t i = 0; i < n_runs; i++) {
        stack[depth++] = partials + i * stride;
        for (uint32_t level = i; (level & 1u) != 0; level >>= 1, depth--) {
            combine_two(stack[depth - 2], stack[depth - 1], head_size);
            stack[depth - 2] = stack[depth - 1];
        }
    }
    for (; depth > 1; depth--) {
        combine_two(stack[depth - 2], stack[depth - 1], head_size);
        stack[depth - 2] = stack[depth - 1];
    }
    if (stack[0][1] == 0.0f) {
        memset(out, 0, head_size * sizeof(float));
    } else {
        divide(stack[0] + 2, stack[0][1], head_size, out);
    }
}
