/* Attention in tiles: up to ATTENTION_TILE (row, head) pairs, the items, walk the key blocks
 * together. A 16-bit block that many items read is converted to f32 once; few (decoding) convert
 * while they read. An 8-bit block is always converted first: its scales are by key. Every item's
 * arithmetic is that of generic/attention.c: the tile shares loads, never sums.
 *
 *   for each block:  scores  K block [head_size][32]  x  q of a group of items -> p [item][32]
 *                            (16 lanes: of two blocks at once, so that a load of q serves four
 *                            vectors; those of the second wait in p_next)
 *                    softmax of each item's visible lanes                      -> m, s, p
 *                    factors of the merges by the binary counter (generic/attention.c), the
 *                            exponentials of all items at once                 -> m, s, e
 *                    values  p of a group of items  x  V block [32][head_size], merged while it
 *                            is in registers                                    -> o
 *
 * Items are ordered by row, then head, so first and end block rise with the item: the active ones
 * of a block are a range, and the heads of a row share the visible range of a block that the
 * diagonal or the window cuts. */
#pragma once

#include "kernels/ops/attention.h"

enum {
    TILE = ATTENTION_TILE,
    RUN = ATTENTION_LEVELS, /* of m and s: the block at hand */
    GROUP = 6,              /* items whose sums are in registers at once */
    BLOCK_VECS = 32 / VEC_LANES,
    BLOCKS_AT_ONCE = VEC_LANES == 16 ? 2 : 1, /* of scores */
    CONVERT_ABOVE = 2 * GROUP,                /* items that read a 16-bit block: convert it once */
};

/* Vectors of 32 keys, or of the head, that a group of n items holds sums of: at least 8 sums hide
 * the latency of fma; sums, one item's operand and a vector each must fit in the registers with one
 * to spare, or gcc spills. */
#define SCORE_VECS(n) (VEC_LANES == 8 && (n) > 3 ? 2 : BLOCK_VECS)
#define VALUE_VECS(n) ((n) == 1 ? 8 : VEC_LANES == 16 || (n) == 2 ? 4 : (n) == 3 ? 3 : 2)
#define MOST_VECS 8

/* With 16 lanes the loops are functions of their own: inlined into the walk over blocks, gcc lacks
 * integer registers for their pointers. With 8 inlining is 1-2 % faster. */
#if VEC_LANES == 16
#define ATTENTION_FN static __attribute__((noinline, unused))
#else
#define ATTENTION_FN VEC_FN
#endif

typedef struct Item {
    const float *q;
    float *out;           /* or the partial */
    uint32_t first, last; /* visible keys [first, last) */
    uint32_t filled;      /* bit l: slot l holds an operand */
    uint32_t merges;      /* bit l: the block at hand takes in slot l */
} Item;

/* Factors of a merge, of each item: o = o_left left + o_run run. */
typedef struct Factors {
    float left[TILE], run[TILE];
} Factors;

typedef struct Tile {
    const AttentionArgs *args;
    uint32_t n_items;
    size_t o_ld;            /* floats from item to item in o */
    float *k, *v;           /* the block at hand as f32, [head_size][32] and [32][head_size] */
    float *p;               /* [TILE][32] */
    float *k_next, *p_next; /* of the block after it */
    float *m, *s;           /* [RUN + 1][TILE] */
    float *o;               /* [RUN][n_items][o_ld] */
    Factors *factors;       /* [RUN] */
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

/* p[i][j] = (q_i . k_j) * scale for n items from `first` on and n_vecs vectors of keys from `key`
 * on (n, n_vecs constant). Vectors from BLOCK_VECS on are of the next block (key is 0 then), for
 * p_next. */
VEC_FN void scores_of(const Tile *tile, KvType type, const void *k, const void *k_next,
                      uint32_t first, const unsigned n, uint32_t key, const unsigned n_vecs)
{
    const uint32_t head_size = tile->args->head_size;
    const float *q[GROUP];
    Vec acc[GROUP][2 * BLOCK_VECS];
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
            float *p = v < BLOCK_VECS ? tile->p : tile->p_next;
            vec_store(p + (first + i) * KV_BLOCK + key + v % BLOCK_VECS * VEC_LANES,
                      vec_mul(acc[i][v], scale));
        }
    }
}

VEC_FN void scores_of_group(const Tile *tile, KvType type, const void *k, uint32_t first,
                            const unsigned n)
{
    for (uint32_t key = 0; key < KV_BLOCK; key += SCORE_VECS(n) * VEC_LANES) {
        scores_of(tile, type, k, NULL, first, n, key, SCORE_VECS(n));
    }
}

VEC_FN void scores_of_type(const Tile *tile, KvType type, const void *k, uint32_t first,
                           uint32_t end)
{
    for (; first + GROUP <= end; first += GROUP) {
        scores_of_group(tile, type, k, first, GROUP);
    }
    switch (end - first) {
    case 5:
        scores_of_group(tile, type, k, first, 5);
        break;
    case 4:
        scores_of_group(tile, type, k, first, 4);
        break;
    case 3:
        scores_of_group(tile, type, k, first, 3);
        break;
    case 2:
        scores_of_group(tile, type, k, first, 2);
        break;
    case 1:
        scores_of_group(tile, type, k, first, 1);
        break;
    default:
        break;
    }
}

#define SCORES(name, type)                                                                         \
    ATTENTION_FN void name(const Tile *tile, const void *k, uint32_t first, uint32_t end)          \
    {                                                                                              \
        scores_of_type(tile, type, k, first, end);                                                 \
    }
SCORES(scores_f16, KV_F16)
SCORES(scores_bf16, KV_BF16)
SCORES(scores_f32, KV_F32)

VEC_FN void scores(const Tile *tile, KvType type, const void *k, uint32_t first, uint32_t end)
{
    (type == KV_F16 ? scores_f16 : type == KV_BF16 ? scores_bf16 : scores_f32)(tile, k, first, end);
}

/* Keys [low, high) of a block are visible. */
VEC_FN void softmax(const Tile *tile, uint32_t item, int low, int high)
{
    float *p = tile->p + (size_t)item * KV_BLOCK;
    Vec x[BLOCK_VECS], top = vec_all(-INFINITY);
#pragma GCC unroll 4
    for (unsigned v = 0; v < BLOCK_VECS; v++) {
        const int at = (int)(v * VEC_LANES);
        x[v] = vec_between(vec_load(p + at), vec_all(-INFINITY), low - at,
                           high - at > 0 ? high - at : 0);
        top = vec_max(x[v], top);
    }
    const float m = vec_max_lane(top);
#pragma GCC unroll 4
    for (unsigned v = 0; v < BLOCK_VECS; v++) {
        x[v] = vec_exp(vec_sub(x[v], vec_all(m))); /* invisible: exp(-inf) = +0 */
        vec_store(p + v * VEC_LANES, x[v]);
    }
    tile->m[RUN * TILE + item] = m;
    tile->s[RUN * TILE + item] = vec_fold(x);
}

#if VEC_LANES == 16
/* Of four items that see the whole block. */
VEC_FN void softmax_4(const Tile *tile, uint32_t item)
{
    float *p = tile->p + (size_t)item * KV_BLOCK;
    Vec x[4][BLOCK_VECS], top[4];
#pragma GCC unroll 4
    for (unsigned i = 0; i < 4; i++) {
        top[i] = vec_max(vec_load(p + i * KV_BLOCK), vec_all(-INFINITY));
        top[i] = vec_max(vec_load(p + i * KV_BLOCK + VEC_LANES), top[i]);
    }
    float *m = tile->m + RUN * TILE + item;
    vec_max_lanes_4(top, m);
#pragma GCC unroll 4
    for (unsigned i = 0; i < 4; i++) {
#pragma GCC unroll 4
        for (unsigned v = 0; v < BLOCK_VECS; v++) {
            float *at = p + i * KV_BLOCK + v * VEC_LANES;
            x[i][v] = vec_exp(vec_sub(vec_load(at), vec_all(m[i])));
            vec_store(at, x[i][v]);
        }
    }
    vec_fold_4(x, tile->s + RUN * TILE + item);
}
#endif

VEC_FN float *slot_o(const Tile *tile, uint32_t slot, uint32_t item)
{
    return tile->o + (slot * tile->n_items + item) * tile->o_ld;
}

/* Keys of a block for a group of items, and what becomes of its o. */
typedef struct Group {
    uint32_t first;     /* item */
    uint32_t low, high; /* visible keys */
    uint32_t merges;    /* of all its items */
    uint32_t target;    /* slot for o */
} Group;

/* o_i[d...] = sum over j in [low, high) of p[i][j] v[j][d...], merged with what slots hold, for n
 * items and n_vecs vectors of d (constants). `rest` of the lanes, if not all, of a last vector. */
VEC_FN void values_of(const Tile *tile, KvType type, const void *v_block, const Group *group,
                      const unsigned n, uint32_t d, const unsigned n_vecs, uint32_t rest)
{
    const uint32_t first = group->first;
    const uint32_t head_size = tile->args->head_size;
    const float *p = tile->p + (size_t)first * KV_BLOCK;
    Vec acc[GROUP][MOST_VECS];
#pragma GCC unroll 8
    for (unsigned i = 0; i < n; i++) {
#pragma GCC unroll 8
        for (unsigned v = 0; v < n_vecs; v++) {
            acc[i][v] = vec_zero();
        }
    }
    const size_t step = kv_element(type) * head_size;
    const uint8_t *row = (const uint8_t *)v_block + group->low * step + d * kv_element(type);
    for (uint32_t j = group->low; j < group->high; j++, row += step) {
        Vec value[MOST_VECS];
#pragma GCC unroll 8
        for (unsigned v = 0; v < n_vecs; v++) {
            value[v] = rest == VEC_LANES ? kv_load(type, row, v * VEC_LANES)
                                         : kv_load_first(type, row, v * VEC_LANES, rest);
        }
#pragma GCC unroll 8
        for (unsigned i = 0; i < n; i++) {
            const Vec weight = vec_all(p[i * KV_BLOCK + j]);
#pragma GCC unroll 8
            for (unsigned v = 0; v < n_vecs; v++) {
                acc[i][v] = vec_fma(weight, value[v], acc[i][v]);
            }
        }
    }
    for (uint32_t merges = group->merges; merges != 0; merges &= merges - 1) {
        const uint32_t level = (uint32_t)__builtin_ctz(merges);
        const Factors *by = &tile->factors[level];
        const float *left = slot_o(tile, level, first) + d;
#pragma GCC unroll 8
        for (unsigned i = 0; i < n; i++) {
            const Vec e_left = vec_all(by->left[first + i]), e_run = vec_all(by->run[first + i]);
#pragma GCC unroll 8
            for (unsigned v = 0; v < n_vecs; v++) {
                acc[i][v] = vec_fma(vec_load(left + i * tile->o_ld + v * VEC_LANES), e_left,
                                    vec_mul(acc[i][v], e_run));
            }
        }
    }
    float *o = slot_o(tile, group->target, first) + d;
#pragma GCC unroll 8
    for (unsigned i = 0; i < n; i++) {
#pragma GCC unroll 8
        for (unsigned v = 0; v < n_vecs; v++) {
            vec_store(o + i * tile->o_ld + v * VEC_LANES, acc[i][v]); /* rows of o are padded */
        }
    }
}

VEC_FN void values_of_group(const Tile *tile, KvType type, const void *v_block, const Group *group,
                            const unsigned n)
{
    const uint32_t head_size = tile->args->head_size, lanes = VEC_LANES;
    uint32_t d = 0;
    for (; d + VALUE_VECS(n) * lanes <= head_size; d += VALUE_VECS(n) * lanes) {
        values_of(tile, type, v_block, group, n, d, VALUE_VECS(n), lanes);
    }
    for (; VALUE_VECS(n) > 4 && d + 4 * lanes <= head_size; d += 4 * lanes) {
        values_of(tile, type, v_block, group, n, d, VALUE_VECS(n) > 4 ? 4 : 1, lanes);
    }
    for (; VALUE_VECS(n) > 2 && d + 2 * lanes <= head_size; d += 2 * lanes) {
        values_of(tile, type, v_block, group, n, d, 2, lanes);
    }
    for (; d + lanes <= head_size; d += lanes) {
        values_of(tile, type, v_block, group, n, d, 1, lanes);
    }
    if (d < head_size) {
        values_of(tile, type, v_block, group, n, d, 1, head_size - d);
    }
}

/* Lowest and highest visible key of the block for an item, [low, high). */
VEC_FN uint32_t visible_low(const Item *item, uint32_t start)
{
    return item->first > start ? item->first - start : 0;
}

VEC_FN uint32_t visible_high(const Item *item, uint32_t start)
{
    return item->last - start < KV_BLOCK ? item->last - start : KV_BLOCK;
}

/* Of items [first, end). */
ATTENTION_FN void softmaxes(const Tile *tile, uint32_t first, uint32_t end, uint32_t start)
{
    for (uint32_t i = first; i < end; i++) {
#if VEC_LANES == 16
        /* visible keys begin and end with the row, so with the item */
        for (; i + 4 <= end && tile->items[i + 3].first <= start &&
               tile->items[i].last >= start + KV_BLOCK;
             i += 4) {
            softmax_4(tile, i);
        }
        if (i == end) {
            break;
        }
#endif
        softmax(tile, i, (int)visible_low(&tile->items[i], start),
                (int)visible_high(&tile->items[i], start));
    }
}

/* Whether two items see the same keys of the block and merge alike. */
VEC_FN bool alike(const Item *a, const Item *b, uint32_t start)
{
    return visible_low(a, start) == visible_low(b, start) &&
           visible_high(a, start) == visible_high(b, start) && a->merges == b->merges;
}

VEC_FN void values(const Tile *tile, KvType type, const void *v_block, uint32_t target,
                   uint32_t first, uint32_t end, uint32_t start)
{
    for (unsigned n; first < end; first += n) {
        const Item *item = &tile->items[first];
        const Group group = {.first = first,
                             .low = visible_low(item, start),
                             .high = visible_high(item, start),
                             .merges = item->merges,
                             .target = target};
        n = 1;
        while (n < GROUP && first + n < end && alike(item, item + n, start)) {
            n++;
        }
        switch (n) {
        case 6:
            values_of_group(tile, type, v_block, &group, 6);
            break;
        case 5:
            values_of_group(tile, type, v_block, &group, 5);
            break;
        case 4:
            values_of_group(tile, type, v_block, &group, 4);
            break;
        case 3:
            values_of_group(tile, type, v_block, &group, 3);
            break;
        case 2:
            values_of_group(tile, type, v_block, &group, 2);
            break;
        default:
            values_of_group(tile, type, v_block, &group, 1);
            break;
        }
    }
}

/* The block of items [first, end) takes in slot `level` where it holds an operand: m and s, and the
 * factors of o. */
VEC_FN void merge_level(Tile *tile, uint32_t level, uint32_t first, uint32_t end)
{
    float m[TILE], s[TILE];
    const float *m_left = tile->m + level * TILE, *s_left = tile->s + level * TILE;
    float *m_run = tile->m + RUN * TILE, *s_run = tile->s + RUN * TILE;
    Factors *by = &tile->factors[level];
    for (uint32_t i = first - first % VEC_LANES; i < end;
         i += VEC_LANES) { /* lanes of other items are computed and dropped */
        const Vec left = vec_load(m_left + i), run = vec_load(m_run + i), top = vec_max(left, run);
        const Vec el = vec_exp(vec_sub(left, top)), er = vec_exp(vec_sub(run, top));
        vec_store(m + i, top);
        vec_store(s + i, vec_fma(vec_load(s_left + i), el, vec_mul(vec_load(s_run + i), er)));
        vec_store(by->left + i, el);
        vec_store(by->run + i, er);
    }
    for (uint32_t i = first; i < end; i++) {
        Item *item = &tile->items[i];
        if ((item->filled >> level & 1u) != 0) {
            item->merges |= 1u << level;
            m_run[i] = m[i];
            s_run[i] = s[i];
        }
    }
}

/* A block of items [first, end), m and s of which are in RUN, goes to slot `target`, merged with
 * what the slots below hold. */
VEC_FN void push(Tile *tile, uint32_t target, uint32_t first, uint32_t end)
{
    for (uint32_t i = first; i < end; i++) {
        tile->items[i].merges = 0;
    }
    for (uint32_t level = 0; level < target; level++) {
        merge_level(tile, level, first, end);
    }
    for (uint32_t i = first; i < end; i++) {
        Item *item = &tile->items[i];
        tile->m[target * TILE + i] = tile->m[RUN * TILE + i];
        tile->s[target * TILE + i] = tile->s[RUN * TILE + i];
        item->filled = (item->filled & ~item->merges) | 1u << target;
    }
}

/* to = left e_left + right e_right, over padded rows. */
VEC_FN void merge_o(const Tile *tile, const float *left, float e_left, const float *right,
                    float e_right, float *to)
{
    const Vec el = vec_all(e_left), er = vec_all(e_right);
    for (size_t d = 0; d < tile->o_ld; d += VEC_LANES) {
        vec_store(to + d, vec_fma(vec_load(left + d), el, vec_mul(vec_load(right + d), er)));
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
VEC_FN void finish(Tile *tile, uint32_t i)
{
    Item *item = &tile->items[i];
    const uint32_t head_size = tile->args->head_size;
    uint32_t level = (uint32_t)__builtin_ctz(item->filled);
    float *o = slot_o(tile, level, i), m = tile->m[level * TILE + i], s = tile->s[level * TILE + i];
    for (uint32_t left = item->filled & (item->filled - 1); left != 0; left &= left - 1) {
        level = (uint32_t)__builtin_ctz(left);
        const float m_left = tile->m[level * TILE + i], top = m_left > m ? m_left : m;
        const float e_left = exp32_inline(m_left - top), e_right = exp32_inline(m - top);
        s = fmaf(tile->s[level * TILE + i], e_left, s * e_right);
        merge_o(tile, slot_o(tile, level, i), e_left, o, e_right, o);
        m = top;
    }
    if (tile->args->partial != NULL) {
        item->out[0] = m;
        item->out[1] = s;
        memcpy(item->out + 2, o, head_size * sizeof(float));
    } else {
        divide(o, s, head_size, item->out);
    }
}

/* Scores of the block at hand for items [first, end), and of the next one for as many groups of
 * them as see it; returns the end of these, or first. */
VEC_FN uint32_t scores_ahead(const Tile *tile, const float *k, const float *k_next, uint32_t first,
                             uint32_t end)
{
    for (; first + GROUP <= end; first += GROUP) {
        scores_of(tile, KV_F32, k, k_next, first, GROUP, 0, 2 * BLOCK_VECS);
    }
    scores(tile, KV_F32, k, first, end);
    return first;
}

VEC_FN void swap(float **a, float **b)
{
    float *const c = *a;
    *a = *b;
    *b = c;
}

VEC_FN void tile_run(Tile *tile, KvType type)
{
    const AttentionArgs *args = tile->args;
    uint32_t first = 0, end = 0; /* active items: those that see a key of the block */
    uint32_t ahead = 0;          /* p_next has the scores of the block for [first, ahead) */
    for (uint32_t block = tile->items[0].first / KV_BLOCK; first < tile->n_items; block++) {
        const uint32_t start = block * KV_BLOCK;
        while (end < tile->n_items && tile->items[end].first < start + KV_BLOCK) {
            end++;
        }
        const void *k = args->k_blocks[block], *v = args->v_blocks[block];
        const bool convert = type == KV_Q8 || (type != KV_F32 && end - first > CONVERT_ABOVE);
        const uint32_t target =
            (uint32_t)__builtin_ctz(~block); /* where the counter's carry ends */
        if (BLOCKS_AT_ONCE == 2 && ahead > first) {
            swap(&tile->p, &tile->p_next);
            swap(&tile->k, &tile->k_next);
            scores(tile, KV_F32, convert ? tile->k : k, ahead, end);
            ahead = first;
        } else {
            const bool two = BLOCKS_AT_ONCE == 2 && (convert || type == KV_F32) &&
                             end - first >= GROUP && tile->items[first].last > start + KV_BLOCK;
            const void *next = two ? args->k_blocks[block + 1] : NULL;
            if (convert) {
                kv_convert_k(tile, type, k, tile->k);
                k = tile->k;
                if (BLOCKS_AT_ONCE == 1) { /* 2 % faster than after the scores */
                    kv_convert_v(tile, type, v, tile->v);
                }
                if (two) {
                    kv_convert_k(tile, type, next, tile->k_next);
                    next = tile->k_next;
                }
            }
            if (two) {
                ahead = scores_ahead(tile, k, next, first, end);
            } else {
                scores(tile, convert ? KV_F32 : type, k, first, end);
            }
        }
        softmaxes(tile, first, end, start);
        push(tile, target, first, end);
        if (convert) {
            if (BLOCKS_AT_ONCE == 2) {
                kv_convert_v(tile, type, v, tile->v);
            }
            values(tile, KV_F32, tile->v, target, first, end, start);
        } else {
            values(tile, type, v, target, first, end, start);
        }
        for (; first < end && tile->items[first].last <= start + KV_BLOCK; first++) {
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
                    (Item){args->q + r * args->q_ld + (size_t)h * args->head_size,
                           out,
                           range.first,
                           range.last,
                           0,
                           0};
            } else {
                memset(out, 0, (args->partial != NULL ? partial : args->head_size) * sizeof(float));
            }
        }
    }
}

VEC_FN void attention_vector(const AttentionArgs *args, KvType type)
{
    Tile tile = {.args = args, .o_ld = (args->head_size + 15u) & ~15u};
    tile.k = args->scratch;
    tile.k_next = tile.k + KV_BLOCK * tile.o_ld;
    tile.v = tile.k_next + KV_BLOCK * tile.o_ld;
    tile.p = tile.v + KV_BLOCK * tile.o_ld;
    tile.p_next = tile.p + TILE * KV_BLOCK;
    tile.m = tile.p_next + TILE * KV_BLOCK;
    tile.s = tile.m + (RUN + 1) * TILE;
    tile.o = tile.s + (RUN + 1) * TILE;
    tile.factors = (Factors *)(tile.o + (size_t)RUN * TILE * tile.o_ld);
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
