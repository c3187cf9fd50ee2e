#include "proto/plan/device_memory.h"

#include "proto/plan/rank_span.h"

#define ALIGN 256u
#define ROWS_LIMIT 65536u /* of a checked plan; others are counted as if they had no more */
/* Keys that one block of a device's attention takes, and the (row, head) pairs of a tile: partial
 * results of that many tiles as fit lie in the workspace. */
#define SPLIT_KEYS 256u
#define TILE_PAIRS 8u
#define TILES_BYTES ((uint64_t)64 << 20)
#define SORTED_AT_ONCE 1024u /* keys that a block sorts when the best ids are sought */
#define PANEL_ROWS 16u

static uint64_t ceil_div(uint64_t n, uint64_t d)
{
    return (n + d - 1) / d;
}

static uint64_t aligned(uint64_t bytes)
{
    return ceil_div(bytes, ALIGN) * ALIGN;
}

/* ---- workspace: what one op needs at a time ---- */

/* Activations as any weight type wants them: at most two 16-bit floats a value, or 8 bits and three
 * numbers of each 32; a scale a row; rows in groups of 4; parts of their own. */
static uint64_t activation_bytes(uint32_t rows, uint32_t n_in)
{
    return ceil_div(rows, 4) * 4 * (ceil_div(n_in, 32) * 32 * 4 + 16) + 4 * ALIGN;
}

/* 16-bit rows of activations, a strip of weights as 16-bit rows, and the library's own. */
static uint64_t library_bytes(const DeviceLimits *l)
{
    const uint64_t row = ceil_div(l->widest_in, 32) * 32 * 2;
    const uint64_t strip = MIN(row * l->widest_out, MAX(DEVICE_STRIP_BYTES, row * PANEL_ROWS));
    return aligned(row * l->max_rows) + ALIGN + aligned(strip) + DEVICE_LIBRARY_BYTES;
}

/* Partial results of keys that are split; not all tiles at once where they are many. */
static uint64_t attention_bytes(const DeviceLimits *l, uint64_t n_segments, uint64_t longest)
{
    const uint64_t splits = ceil_div(l->max_keys, SPLIT_KEYS), kv = MAX(l->n_kv_heads, 1u),
                   tile = kv * TILE_PAIRS * splits * (l->head_size + 2) * sizeof(float),
                   shared = ceil_div(l->n_heads, kv) + 1,
                   tiles = n_segments * ceil_div(longest * shared, TILE_PAIRS);
    return splits <= 1 ? 0 : MIN(tiles * tile, MAX(TILES_BYTES, tile));
}

/* The trivial device's: a tile of 48 pairs on each level of the tree of blocks, and two lists of
 * blocks. */
static uint64_t host_attention_bytes(const DeviceLimits *l)
{
    return sizeof(float) * 48 * 32 * ceil_div((uint64_t)l->head_size + 4, 16) * 16 +
           2 * sizeof(void *) * ceil_div(l->max_keys, KV_BLOCK) + ALIGN;
}

static uint64_t candidate_bytes(const DeviceLimits *l)
{
    const uint64_t first = ceil_div(l->vocabulary, SORTED_AT_ONCE),
                   second = ceil_div(first * DEVICE_KEEP_LIMIT, SORTED_AT_ONCE);
    return l->sampled_rows * DEVICE_KEEP_LIMIT * (first + second) * sizeof(uint64_t);
}

uint64_t device_workspace_bytes(const DeviceLimits *l)
{
    uint64_t bytes = activation_bytes(l->max_rows, l->widest_in);
    bytes = MAX(bytes, attention_bytes(l, l->max_segments, 1));
    bytes = MAX(bytes, attention_bytes(l, 1, l->max_rows));
    bytes = MAX(bytes, host_attention_bytes(l));
    bytes = MAX(bytes, candidate_bytes(l));
    bytes = MAX(bytes, DEVICE_CHECKSUM_BYTES);
    if (l->fast && l->max_rows >= DEVICE_LIBRARY_ROWS) {
        bytes = MAX(bytes, library_bytes(l));
    }
    return aligned(bytes);
}

/* ---- buffers ---- */

static DeviceInput input_of(uint64_t rows, uint32_t context)
{
    DeviceInput in = {.pages_ld = (uint32_t)ceil_div(context, KV_BLOCK)};
    in.draws = aligned(4 * sizeof(uint32_t) * rows);
    in.segments = aligned(in.draws + DEVICE_DRAW_BYTES * rows);
    in.pages = aligned(in.segments + DEVICE_SEGMENT_BYTES * rows);
    in.sum = aligned(in.pages + sizeof(uint32_t) * rows * in.pages_ld);
    in.bytes = in.sum + ALIGN;
    return in;
}

static uint32_t own_vocabulary(const ModelSpec *spec, const PlanReplica *replica,
                               const PlanStage *stage, const PlanRank *rank)
{
    const uint64_t first = (uint64_t)rank->vocab_first * VOCAB_CHUNK,
                   end = MIN(first + (uint64_t)rank->vocab_count * VOCAB_CHUNK, spec->vocab_size);
    const bool last = stage == &replica->stages[replica->n_stages - 1];
    return last && end > first ? (uint32_t)(end - first) : 0;
}

static uint32_t own_ffn_width(const ModelSpec *spec, const PlanRank *rank)
{
    const uint64_t first = MIN((uint64_t)rank->ffn_first * spec->ffn_unit_width, spec->ffn_width),
                   end = MIN(((uint64_t)rank->ffn_first + rank->ffn_count) * spec->ffn_unit_width,
                             spec->ffn_width);
    return (uint32_t)(end - first);
}

static uint32_t most_subtrees(const ModelSpec *spec, const PlanStage *stage, bool fast)
{
    uint32_t most = stage->n_ranks > 1;
    for (uint32_t k = 0; !fast && stage->n_ranks > 1 && k < stage->n_ranks; k++) {
        most = MAX(most, rank_subtrees(spec, &stage->ranks[k]));
    }
    return most;
}

static uint64_t drawn_bytes(uint64_t rows, uint32_t vocabulary)
{
    return rows * (ceil_div(vocabulary, VOCAB_CHUNK) * DEVICE_CHUNK_BYTES +
                   (DEVICE_KEEP_LIMIT + DEVICE_TOP_LIMIT) * DEVICE_CANDIDATE_BYTES);
}

DeviceSizes device_sizes(const Plan *plan, const ModelSpec *spec, const PlanReplica *replica,
                         const PlanStage *stage, const PlanRank *rank)
{
    const bool fast = plan->definition.numerics == NUMERICS_FAST;
    const uint32_t rows = MIN(plan->max_rows, ROWS_LIMIT), context = plan->definition.context;
    const uint64_t row = (uint64_t)sizeof(float) * rows, vector = row * spec->width;
    uint32_t head_first, n_heads, kv_first, n_kv_heads;
    rank_heads(spec, rank, &head_first, &n_heads);
    model_spec_kv_heads_of(spec, head_first, n_heads, &kv_first, &n_kv_heads);
    const uint32_t q = n_heads * spec->head_size, kv = n_kv_heads * spec->head_size,
                   ffn = own_ffn_width(spec, rank);
    DeviceSizes z = {.input = input_of(rows, context),
                     .subtrees = most_subtrees(spec, stage, fast),
                     .vocabulary = own_vocabulary(spec, replica, stage, rank)};
    z.draws = z.vocabulary > 0 && (z.vocabulary - 1) % VOCAB_CHUNK + 1 >= DEVICE_SHORTEST_CHUNK;
    z.logits_rows = MAX(DEVICE_LOGITS_ROWS_DOWN, MIN(rows, DEVICE_LOGITS_ROWS));
    z.x = aligned(vector);
    z.arriving = stage == &replica->stages[0] ? 0 : z.x;
    z.q = aligned(row * q);
    z.kv = aligned(row * kv);
    z.ffn = aligned(row * ffn);
    z.partial = aligned(z.subtrees * vector);
    z.gathered = aligned(fast ? 0 : (uint64_t)stage->n_ranks * z.subtrees * vector);
    z.logits = aligned((uint64_t)sizeof(float) * z.logits_rows * z.vocabulary);
    z.drawn = aligned(z.draws ? drawn_bytes(rows, z.vocabulary) : 0);
    z.rope = aligned((uint64_t)sizeof(float) * context * (spec->rope.dims / 2));
    z.limits = (DeviceLimits){.max_rows = rows,
                              .max_keys = context,
                              .max_segments = rows,
                              .n_heads = n_heads,
                              .n_kv_heads = n_kv_heads,
                              .head_size = spec->head_size,
                              .widest_in = MAX(spec->width, MAX(q, ffn)),
                              .widest_out = MAX(MAX(spec->width, z.vocabulary), MAX(q, ffn)),
                              .sampled_rows = z.draws ? z.logits_rows : 0,
                              .vocabulary = z.draws ? z.vocabulary : 0,
                              .fast = fast};
    z.workspace = device_workspace_bytes(&z.limits);
    return z;
}

uint64_t device_sizes_total(const DeviceSizes *z)
{
    return 2 * (z->x + z->q + z->kv + z->ffn + z->rope) + z->arriving + z->partial + z->gathered +
           z->logits + z->drawn + z->input.bytes + z->workspace;
}

uint64_t device_beside_bytes(const PlanMember *member, bool grouped)
{
    const uint64_t rank = member->device_rank_bytes, group = member->device_group_bytes;
    return (rank > 0 ? rank : DEVICE_RANK_BYTES) + (!grouped    ? 0
                                                    : group > 0 ? group
                                                                : DEVICE_GROUP_BYTES);
}

uint64_t device_rank_bytes(const Plan *plan, const ModelSpec *spec, const PlanReplica *replica,
                           const PlanStage *stage, const PlanRank *rank, const PlanMember *member)
{
    const DeviceSizes sizes = device_sizes(plan, spec, replica, stage, rank);
    return device_sizes_total(&sizes) + device_beside_bytes(member, stage->n_ranks > 1);
}
