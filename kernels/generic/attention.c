/* Attention as kernels/ops/attention.h defines it, one (row, head) after another: every block of 32
 * keys gives (m, s, o) by itself, and the blocks merge by the growing tree over the absolute block
 * index (NUMERICS 2, 5).
 *
 * The tree is a binary counter: slot l of the stack holds the node of a finished run of 2^l blocks.
 * Block b, when it is done, merges with slot 0, 1, ... for each trailing one bit of b, and rests in
 * the slot after those. What is left at the end merges from the right: the largest power of two is
 * the outermost left operand. A run without a visible key is no operand: its slot is empty and a
 * merge with it is a move. */
#include "kernels/generic/ops.h"

#include "proto/model/blocks.h"
#include "kernels/ops/math.h"

/* Element `index` of a block, of position `key`. */
typedef float (*LoadFn)(const void *block, size_t index, uint32_t key, uint32_t head_size);

static float load_f16(const void *block, size_t index, uint32_t key, uint32_t head_size)
{
    (void)key, (void)head_size;
    return f16_to_f32(((const uint16_t *)block)[index]);
}

static float load_bf16(const void *block, size_t index, uint32_t key, uint32_t head_size)
{
    (void)key, (void)head_size;
    return bf16_to_f32(((const uint16_t *)block)[index]);
}

static float load_f32(const void *block, size_t index, uint32_t key, uint32_t head_size)
{
    (void)key, (void)head_size;
    return ((const float *)block)[index];
}

static float load_q8(const void *block, size_t index, uint32_t key, uint32_t head_size)
{
    return (float)((const int8_t *)block)[index] * kv_q8_scales(block, head_size)[key];
}

size_t attention_scratch_floats(uint32_t n_q, uint32_t head_size)
{
    const size_t items = ATTENTION_TILE, padded = (head_size + 15u) & ~15u;
    (void)n_q;                                  /* heads beyond the tile are done in turns */
    return 3 * KV_BLOCK * padded                /* two blocks of K and one of V as f32 */
           + 2 * items * KV_BLOCK               /* scores of two */
           + items * (ATTENTION_LEVELS + 2) * 2 /* m and s, and those of two blocks */
           + items * ATTENTION_LEVELS * padded  /* o */
           + items * ATTENTION_LEVELS * 2       /* factors of merges */
           + 64;
}

/* A partial result: [0] = m, [1] = s, [2...] = o. */
static float *partial(const AttentionArgs *args, uint32_t level)
{
    return args->scratch + (size_t)level * (args->head_size + 2);
}

/* right = left merged with right. */
static void merge(const float *left, float *right, uint32_t head_size)
{
    const float m = left[0] > right[0] ? left[0] : right[0];
    const float e_left = exp32_inline(left[0] - m), e_right = exp32_inline(right[0] - m);
    right[0] = m;
    for (uint32_t i = 1; i < head_size + 2; i++) {
        right[i] = fmaf(left[i], e_left, right[i] * e_right);
    }
}

/* The same where either may be no operand. */
static void merge_present(const float *left, float *right, uint32_t head_size)
{
    if (left[1] == 0.0f) {
        return;
    }
    if (right[1] == 0.0f) {
        memcpy(right, left, (head_size + 2) * sizeof(float));
        return;
    }
    merge(left, right, head_size);
}

/* o / s; +0 where no key was visible. */
static void divide(const float *run, uint32_t head_size, float *out)
{
    for (uint32_t d = 0; d < head_size; d++) {
        out[d] = run[1] == 0.0f ? 0.0f : run[2 + d] / run[1];
    }
}

/* One block's keys [low, high) for query q. */
static void block_partial(const AttentionArgs *args, const float *q, uint32_t block, uint32_t low,
                          uint32_t high, LoadFn load, float *out)
{
    const void *k = args->k_blocks[block], *v = args->v_blocks[block];
    float p[KV_BLOCK] = {0};
    float m = 0.0f;
    for (uint32_t j = low; j < high; j++) {
        float dot = 0.0f;
        for (uint32_t d = 0; d < args->head_size; d++) {
            dot = fmaf(q[d], load(k, (size_t)d * KV_BLOCK + j, j, args->head_size), dot);
        }
        p[j] = dot * args->scale;
        m = j == low || p[j] > m ? p[j] : m;
    }
    for (uint32_t j = low; j < high; j++) {
        p[j] = exp32_inline(p[j] - m);
    }
    for (uint32_t d = 0; d < args->head_size; d++) {
        float o = 0.0f;
        for (uint32_t j = low; j < high; j++) {
            o = fmaf(p[j], load(v, (size_t)j * args->head_size + d, j, args->head_size), o);
        }
        out[2 + d] = o;
    }
    out[0] = m;
    out[1] = lanes_fold(p); /* invisible lanes hold +0, which changes no sum of exponentials */
}

static void attend(const AttentionArgs *args, uint32_t row, uint32_t head, LoadFn load)
{
    const AttentionRange range = attention_range(args, row);
    const float *q = args->q + row * args->q_ld + (size_t)head * args->head_size;
    const uint32_t size = args->head_size;
    const uint32_t n_blocks = range.first < range.last ? (range.last + KV_BLOCK - 1) / KV_BLOCK : 0;
    float *run = partial(args, ATTENTION_LEVELS); /* the run that ends at the current block */
    uint32_t filled = 0;                          /* bit l: slot l holds an operand */

    for (uint32_t block = range.first / KV_BLOCK; block < n_blocks; block++) {
        const uint32_t start = block * KV_BLOCK;
        const uint32_t low = range.first > start ? range.first - start : 0;
        const uint32_t high = range.last - start < KV_BLOCK ? range.last - start : KV_BLOCK;
        block_partial(args, q, block, low, high, load, run);
        uint32_t level = 0;
        for (; (block >> level & 1u) != 0; level++) {
            if ((filled >> level & 1u) != 0) {
                merge(partial(args, level), run, size);
                filled &= ~(1u << level);
            }
        }
        memcpy(partial(args, level), run, (size + 2) * sizeof(float));
        filled |= 1u << level;
    }
    bool any = false;
    for (uint32_t level = 0; level < ATTENTION_LEVELS; level++) {
        if ((filled >> level & 1u) == 0) {
            continue;
        }
        if (any) {
            merge(partial(args, level), run, size);
        } else {
            memcpy(run, partial(args, level), (size + 2) * sizeof(float));
            any = true;
        }
    }
    if (!any) {
        memset(run, 0, (size + 2) * sizeof(float));
    }
    if (args->partial != NULL) {
        const size_t item = (size_t)row * args->n_q + head;
        memcpy(args->partial + item * attention_partial_floats(size), run,
               (size + 2) * sizeof(float));
    } else {
        divide(run, size, args->out + row * args->out_ld + (size_t)head * size);
    }
}

/* The same counter over runs, in place: stack[] holds the runs whose nodes are complete. */
void attention_combine_generic(float *partials, size_t stride, uint32_t n_runs, uint32_t head_size,
                               float *out)
{
    float *stack[ATTENTION_LEVELS + 1];
    uint32_t depth = 0;
    for (uint32_t i = 0; i < n_runs; i++) {
        stack[depth++] = partials + i * stride;
        for (uint32_t level = i; (level & 1u) != 0; level >>= 1, depth--) {
            merge_present(stack[depth - 2], stack[depth - 1], head_size);
            stack[depth - 2] = stack[depth - 1];
        }
    }
    for (; depth > 1; depth--) {
        merge_present(stack[depth - 2], stack[depth - 1], head_size);
        stack[depth - 2] = stack[depth - 1];
    }
    divide(stack[0], head_size, out);
}

static void attention(const AttentionArgs *args, LoadFn load)
{
    for (uint32_t row = 0; row < args->n_rows; row++) {
        for (uint32_t head = 0; head < args->n_q; head++) {
            attend(args, row, head, load);
        }
    }
}

void attention_f16_generic(const AttentionArgs *args)
{
    attention(args, load_f16);
}

void attention_bf16_generic(const AttentionArgs *args)
{
    attention(args, load_bf16);
}

void attention_f32_generic(const AttentionArgs *args)
{
    attention(args, load_f32);
}

void attention_q8_generic(const AttentionArgs *args)
{
    attention(args, load_q8);
}
