/* Attention over paged keys and values (NUMERICS 5).
 *
 * One page = KV_BLOCK = 32 positions of one (layer, KV head): K block is [head_size][32] (a lane is
 * a key), V block is [32][head_size], element type KvType. KV_Q8: int8 elements in this order, then
 * float scale[32], by position; a row x of one position and head becomes scale = max|x| / 127 and
 * q = x / scale rounded to nearest even, within +-127 (all 0 where the scale is 0; a row that is
 * not finite gets a NaN for its scale), and reads as (float)q * scale, rounded. For query q and
 * block b: score_j = (sum over d, sequential from +0, fmaf(q[d], k[d][j])) * scale; m = max over
 * visible j; p_j = exp32(score_j - m), invisible: not there; s = lanes j folded by node(0,32) with
 * missing lanes skipped as operands; o[d] = sequential over visible j of fmaf(p_j, v[j][d], o[d])
 * from +0. Blocks merge by the growing tree (NUMERICS 2, 5). Result o[d] / s. */
#pragma once
#include "proto/plan/plan.h"
#include <stddef.h>
#include <stdint.h>

/* Bytes of one K (or V) block. */
static inline size_t kv_block_bytes(KvType type, uint32_t head_size)
{
    return (size_t)KV_BLOCK * kv_row_bytes(type, head_size);
}

/* The 32 scales of a KV_Q8 block. */
static inline const float *kv_q8_scales(const void *block, uint32_t head_size)
{
    return (const float *)(const void *)((const int8_t *)block + (size_t)KV_BLOCK * head_size);
}

/* Writes one position's key and value (after RoPE) of one KV head into slot `slot` (0..31) of its
 * page, rounded to the type (nearest even). Blocks of KV_F32 and KV_Q8 are aligned to 4 bytes. */
typedef void (*KvWriteFn)(const float *k, const float *v, uint32_t head_size, uint32_t slot,
                          void *k_block, void *v_block);

typedef struct AttentionArgs {
    const float *q; /* [n_rows][q_ld]; the group's heads adjacent: q[r*q_ld + h*head_size + d] */
    size_t q_ld;
    float *out; /* the same shape with out_ld */
    size_t out_ld;
    uint32_t n_rows; /* consecutive positions of one sequence, first_position first */
    uint32_t first_position;
    uint32_t n_q;       /* query heads of the group that this call computes */
    uint32_t head_size; /* <= 256 */
    float scale;
    uint32_t window; /* keys older than window positions are not there; 0 = none */
    bool causal;     /* false: all of n_keys visible */
    uint32_t n_keys; /* keys written so far, >= first_position + n_rows when causal */
    const uint8_t *const *k_blocks; /* by block index, ceil(n_keys/32) */
    const uint8_t *const *v_blocks;
    float *scratch; /* attention_scratch_floats(n_q, head_size) */
    float *partial; /* NULL, or: only the keys of run `run`, and instead of out, per row and head
                     * attention_partial_floats() apart: m, s, o[head_size]. s = 0: no key of the
                     * run is visible. For attention_combine. */
    uint32_t run;
} AttentionArgs;

/* A run is 16 blocks, from a multiple of 16 on: a whole subtree of the growing tree, so threads may
 * share one row's keys by runs. */
#define ATTENTION_RUN_KEYS (16u * KV_BLOCK)
static inline uint32_t attention_runs(uint32_t n_keys)
{
    return (n_keys + ATTENTION_RUN_KEYS - 1) / ATTENTION_RUN_KEYS;
}
static inline size_t attention_partial_floats(uint32_t head_size)
{
    return head_size + 2u;
}
/* Merges the partials of runs 0..n_runs-1 of one row and head, `stride` floats apart, by the
 * growing tree, and writes out[head_size]: the bits that the whole would have. Destroys the
 * partials. */
typedef void (*AttentionCombineFn)(float *partials, size_t stride, uint32_t n_runs,
                                   uint32_t head_size, float *out);

/* Keys [first, last) that a row sees: all, or those up to its own position; at most `window` of
 * them, its own included; of the run, if one is asked for. first >= last: none, the result is 0. */
typedef struct AttentionRange {
    uint32_t first, last;
} AttentionRange;
static inline AttentionRange attention_range(const AttentionArgs *args, uint32_t row)
{
    const uint32_t position = args->first_position + row;
    AttentionRange range = {0, args->causal ? position + 1 : args->n_keys};
    if (args->window != 0 && position >= args->window) {
        range.first = position - args->window + 1;
    }
    if (args->partial != NULL) {
        const uint32_t start = args->run * ATTENTION_RUN_KEYS, end = start + ATTENTION_RUN_KEYS;
        range.first = range.first > start ? range.first : start;
        range.last = range.last < end ? range.last : end;
    }
    return range;
}

#define ATTENTION_TILE 48u   /* (row, head) pairs that share one pass over the keys */
#define ATTENTION_LEVELS 28u /* of the tree: 2^32 positions are 2^27 blocks */
/* Floats of scratch, any alignment: the stack of partial (m, s, o) and a tile of scores, for every
 * instruction set. */
size_t attention_scratch_floats(uint32_t n_q, uint32_t head_size);
typedef void (*AttentionFn)(const AttentionArgs *args);
