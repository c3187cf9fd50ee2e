/* Attention over paged keys and values, as kernels/ops/attention.h specifies it, bit for bit.
 *
 * A block of the grid is (split of the keys, KV head, tile of items); an item is a (row, query
 * head) pair of one segment, so that the heads of a group, and rows that follow one another, share
 * each key and value that is read. A split is 8 blocks of 32 keys: an aligned subtree of the
 * growing tree. Each of the 8 warps does one block of 32 keys: lane = key for the scores (a chain
 * over d in each lane), lane = dimensions for the values (a chain over the keys). The 8 partial
 * results merge in shared memory, the splits in combine_kernel(), both by doubling steps, which is
 * the growing tree. A part without a visible key has s = 0 and is no operand.
 *
 * Bound: memory when decoding (two instructions a 64-byte read besides one fma an item), fma when
 * there are many rows: class fast has matrix instructions there (attention_prefill.cu). */
#include "kernels/cuda/attention_items.h"
#include "kernels/cuda/attention_prefill.h"

enum { THREADS = 256, WARPS = 8, SPLIT_KEYS = WARPS * KV_BLOCK, HEAD_LIMIT = 256, ITEM_LIMIT = 8 };

struct Args {
    CudaAttention c;
    uint32_t rows_until; /* segments of as many rows or more are not done here; 0 = all are */
    uint32_t tiles;      /* of one segment: all that the longest one may need */
    uint32_t tile_first; /* of this launch: tile = tile_first + blockIdx.z */
    uint32_t n_tiles;    /* of this launch */
    uint32_t n_splits;
    float *partials; /* [tile][KV head][ITEMS][split][head_size + 2]: m, s, o */
};

/* ---- elements of the cache ---- */

template <KvType T>
__device__ __forceinline__ float load_element(const uint8_t *block, size_t index, float scale)
{
    if constexpr (T == KV_F16) {
        return f32_of_f16(reinterpret_cast<const uint16_t *>(block)[index]);
    } else if constexpr (T == KV_BF16) {
        return f32_of_bf16(reinterpret_cast<const uint16_t *>(block)[index]);
    } else if constexpr (T == KV_F32) {
        return reinterpret_cast<const float *>(block)[index];
    } else {
        return (float)reinterpret_cast<const int8_t *>(block)[index] * scale;
    }
}

template <KvType T>
__device__ __forceinline__ float load_scale(const uint8_t *block, uint32_t head_size, unsigned key)
{
    return T == KV_Q8 ? reinterpret_cast<const float *>(block + (size_t)KV_BLOCK * head_size)[key]
                      : 0.0f;
}

/* ---- merging ---- */

/* left = left merged with right, by one warp; each is m, s, o[head_size]. */
__device__ static void merge(float *left, const float *right, uint32_t head_size)
{
    const float m1 = left[0], s1 = left[1], m2 = right[0], s2 = right[1];
    __syncwarp();
    if (s2 == 0.0f) {
        return; /* the same for all lanes */
    }
    if (s1 == 0.0f) {
        for (uint32_t i = lane_index(); i < head_size + 2; i += WARP) {
            left[i] = right[i];
        }
        return;
    }
    const float m = m1 > m2 ? m1 : m2;
    const float e1 = exp32_inline(m1 - m), e2 = exp32_inline(m2 - m);
    for (uint32_t i = lane_index(); i < head_size + 2; i += WARP) {
        left[i] = i == 0 ? m : fmaf(left[i], e1, right[i] * e2);
    }
}

/* Merges `n` parts, `stride` floats apart, into the first, by doubling: all warps of a block take
 * pairs. `sets` such rows of parts, set_stride apart, go through it together. */
__device__ static void merge_all(float *parts, size_t stride, uint32_t n, uint32_t sets,
                                 size_t set_stride, uint32_t head_size)
{
    for (uint32_t step = 1; step < n; step *= 2) {
        const uint32_t pairs = (n - step + 2 * step - 1) / (2 * step);
        for (uint32_t i = warp_index(); i < pairs * sets; i += WARPS) {
            float *left = parts + i / pairs * set_stride + (size_t)(i % pairs) * 2 * step * stride;
            merge(left, left + step * stride, head_size);
        }
        __syncthreads();
    }
}

__device__ static void put_result(const CudaAttention &c, const Item &item, const float *part)
{
    const float s = part[1];
    for (uint32_t d = lane_index(); d < c.head_size; d += WARP) {
        c.out[item.row * c.out_ld + (size_t)item.head * c.head_size + d] =
            s == 0.0f ? 0.0f : part[2 + d] / s;
    }
}

/* ---- one block of 32 keys ---- */

/* Scores of this lane's key with each item, exponentials into p[key][ITEMS] and m, s into parts. */
template <KvType T, int ITEMS>
__device__ __forceinline__ void block_scores(const CudaAttention &c, const uint8_t *k,
                                             const float *q /* [d][ITEMS] */, const Item *items,
                                             uint32_t block, float *p, float *parts, size_t stride)
{
    const unsigned key = lane_index();
    const uint32_t position = block * KV_BLOCK + key;
    const float scale = load_scale<T>(k, c.head_size, key);
    float dot[ITEMS] = {};
#pragma unroll 8
    for (uint32_t d = 0; d < c.head_size; d++) {
        const float x = load_element<T>(k, (size_t)d * KV_BLOCK + key, scale);
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            dot[i] = fmaf(q[d * ITEMS + i], x, dot[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const bool visible = position >= items[i].first && position < items[i].last;
        const float score = dot[i] * c.scale;
        const float m = warp_max(visible ? score : -INFINITY);
        const float e = visible ? exp32_inline(score - m) : 0.0f;
        const float s = warp_fold(e);
        p[key * ITEMS + i] = e;
        if (key == 0) {
            parts[i * stride] = m;
            parts[i * stride + 1] = s;
        }
    }
    __syncwarp();
}

/* o of each item: this lane has dimensions lane, lane + 32, ... */
template <KvType T, int ITEMS, int DIMS>
__device__ __forceinline__ void block_values(const CudaAttention &c, const uint8_t *v,
                                             const Item *items, uint32_t block, const float *p,
                                             float *parts, size_t stride)
{
    float o[ITEMS][DIMS] = {};
    uint32_t low = KV_BLOCK, high = 0; /* keys that some item sees */
    uint32_t lows[ITEMS], highs[ITEMS];
    const uint32_t start = block * KV_BLOCK;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        lows[i] = items[i].first > start ? items[i].first - start : 0;
        highs[i] = items[i].last <= start             ? 0
                   : items[i].last - start < KV_BLOCK ? items[i].last - start
                                                      : KV_BLOCK;
        if (lows[i] < highs[i]) {
            low = low < lows[i] ? low : lows[i];
            high = high > highs[i] ? high : highs[i];
        }
    }
#pragma unroll 4
    for (uint32_t key = low; key < high; key++) {
        const float scale = load_scale<T>(v, c.head_size, key);
        float x[DIMS];
#pragma unroll
        for (int j = 0; j < DIMS; j++) {
            const uint32_t d = lane_index() + 32 * j;
            x[j] =
                d < c.head_size ? load_element<T>(v, (size_t)key * c.head_size + d, scale) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            if (key >= lows[i] && key < highs[i]) { /* never multiplied by 0: v may be NaN */
                const float weight = p[key * ITEMS + i];
#pragma unroll
                for (int j = 0; j < DIMS; j++) {
                    o[i][j] = fmaf(weight, x[j], o[i][j]);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
#pragma unroll
        for (int j = 0; j < DIMS; j++) {
            const uint32_t d = lane_index() + 32 * j;
            if (d < c.head_size) {
                parts[i * stride + 2 + d] = o[i][j];
            }
        }
    }
}

/* ---- the kernels ---- */

/* Shared memory: items, q, each warp's p, parts of (item, warp). */
template <int ITEMS> __host__ __device__ static inline size_t shared_floats(uint32_t head_size)
{
    return ITEMS * 4 + (size_t)head_size * ITEMS + WARPS * KV_BLOCK * ITEMS +
           (size_t)ITEMS * WARPS * (head_size + 2);
}

template <KvType T, int ITEMS, int DIMS>
static __global__ void __launch_bounds__(THREADS) attention_kernel(const __grid_constant__ Args a)
{
    const CudaAttention &c = a.c;
    const size_t stride = c.head_size + 2;
    Item *items = dynamic_shared<Item>();
    float *q = dynamic_shared<float>() + ITEMS * 4;
    float *p = q + c.head_size * ITEMS + warp_index() * KV_BLOCK * ITEMS;
    float *parts = q + c.head_size * ITEMS + WARPS * KV_BLOCK * ITEMS; /* [ITEMS][WARPS][stride] */
    const uint32_t split = blockIdx.x, kv_head = blockIdx.y, tile = a.tile_first + blockIdx.z;
    const CudaSegment segment = c.segments[tile / a.tiles];
    const HeadRange heads = heads_of(c, kv_head);
    if (a.rows_until != 0 && segment.n_rows >= a.rows_until) {
        return; /* the whole block */
    }
    if (threadIdx.x < ITEMS) {
        items[threadIdx.x] = item_of(c, segment, heads, tile % a.tiles * ITEMS + threadIdx.x);
    }
    __syncthreads();
    for (uint32_t e = threadIdx.x; e < c.head_size * ITEMS; e += THREADS) {
        const Item &item = items[e % ITEMS];
        q[e] = item.row == UINT32_MAX
                   ? 0.0f
                   : c.q[item.row * c.q_ld + (size_t)item.head * c.head_size + e / ITEMS];
    }
    __syncthreads();
    const uint32_t block = split * WARPS + warp_index();
    uint32_t first = UINT32_MAX, last = 0;
    for (int i = 0; i < ITEMS; i++) {
        if (items[i].first < items[i].last) {
            first = first < items[i].first ? first : items[i].first;
            last = last > items[i].last ? last : items[i].last;
        }
    }
    float *mine = parts + warp_index() * stride;
    if (block * KV_BLOCK < last && (block + 1) * KV_BLOCK > first) {
        const uint32_t page = c.kv.tables[segment.table * c.kv.table_ld + block];
        const uint8_t *k = c.kv.base + page * c.kv.page_stride + (size_t)kv_head * c.kv.head_stride;
        block_scores<T, ITEMS>(c, k, q, items, block, p, mine, WARPS * stride);
        block_values<T, ITEMS, DIMS>(c, k + c.kv.v_offset, items, block, p, mine, WARPS * stride);
    } else if (lane_index() < ITEMS) {
        mine[lane_index() * WARPS * stride + 1] = 0.0f;
        mine[lane_index() * WARPS * stride] = 0.0f;
    }
    __syncthreads();
    merge_all(parts, stride, WARPS, ITEMS, WARPS * stride, c.head_size);
    for (uint32_t i = warp_index(); i < ITEMS; i += WARPS) {
        const Item item = items[i];
        const float *part = parts + i * WARPS * stride;
        if (item.row == UINT32_MAX) {
            continue;
        }
        if (a.n_splits == 1) {
            put_result(c, item, part);
            continue;
        }
        float *to = a.partials +
                    (((size_t)blockIdx.z * gridDim.y + kv_head) * ITEMS + i) * a.n_splits * stride +
                    split * stride;
        const uint32_t n = part[1] == 0.0f ? 2 : (uint32_t)stride;
        for (uint32_t e = lane_index(); e < n; e += WARP) {
            to[e] = part[e];
        }
    }
}

/* A block an item. */
template <int ITEMS>
static __global__ void __launch_bounds__(THREADS) combine_kernel(const __grid_constant__ Args a)
{
    const CudaAttention &c = a.c;
    const size_t stride = c.head_size + 2;
    const uint32_t kv_head = blockIdx.y, tile = a.tile_first + blockIdx.z;
    const CudaSegment segment = c.segments[tile / a.tiles];
    const Item item =
        item_of(c, segment, heads_of(c, kv_head), tile % a.tiles * ITEMS + blockIdx.x);
    if (item.row == UINT32_MAX || (a.rows_until != 0 && segment.n_rows >= a.rows_until)) {
        return; /* the whole block */
    }
    float *parts = a.partials + (((size_t)blockIdx.z * gridDim.y + kv_head) * ITEMS + blockIdx.x) *
                                    a.n_splits * stride;
    merge_all(parts, stride, a.n_splits, 1, 0, c.head_size);
    if (warp_index() == 0) {
        put_result(c, item, parts);
    }
}

/* ---- the host's side ---- */

static uint32_t items_of(const CudaAttention *c)
{
    const uint64_t most = (uint64_t)c->longest_segment * c->heads_per_kv;
    return most <= 4 ? 4 : ITEM_LIMIT;
}

static uint32_t splits_of(const CudaAttention *c)
{
    return blocks_of(c->max_keys, SPLIT_KEYS);
}

static size_t tile_bytes(const CudaAttention *c)
{
    return (size_t)c->kv.n_kv_heads * items_of(c) * splits_of(c) * (c->head_size + 2) *
           sizeof(float);
}

static uint64_t all_tiles(const CudaAttention *c)
{
    return (uint64_t)c->n_segments *
           blocks_of((size_t)c->longest_segment * c->heads_per_kv, items_of(c));
}

extern "C" size_t weft_cuda_attention_bytes(const CudaAttention *c)
{
    const size_t most = 64u << 20;
    if (splits_of(c) <= 1) {
        return 0;
    }
    const uint64_t all = all_tiles(c) * tile_bytes(c);
    return all < most ? (size_t)all : most > tile_bytes(c) ? most : tile_bytes(c);
}

template <KvType T, int ITEMS, int DIMS>
static int run_tiles(Args args, uint64_t tiles, uint64_t per_launch, WeftCudaStream stream)
{
    const CudaAttention &c = args.c;
    for (uint64_t at = 0; at < tiles; at += per_launch) {
        args.tile_first = (uint32_t)at;
        args.n_tiles = (uint32_t)(tiles - at < per_launch ? tiles - at : per_launch);
        const size_t shared = shared_floats<ITEMS>(c.head_size) * sizeof(float);
        int status = launch(attention_kernel<T, ITEMS, DIMS>,
                            dim3(args.n_splits, c.kv.n_kv_heads, args.n_tiles), THREADS, shared,
                            stream, args);
        if (status == 0 && args.n_splits > 1) {
            status = launch(combine_kernel<ITEMS>, dim3(ITEMS, c.kv.n_kv_heads, args.n_tiles),
                            THREADS, 0, stream, args);
        }
        if (status != 0) {
            return status;
        }
    }
    return 0;
}

template <KvType T, int ITEMS>
static int run_items(const Args &args, uint64_t tiles, uint64_t per_launch, WeftCudaStream stream)
{
    return args.c.head_size <= 64    ? run_tiles<T, ITEMS, 2>(args, tiles, per_launch, stream)
           : args.c.head_size <= 128 ? run_tiles<T, ITEMS, 4>(args, tiles, per_launch, stream)
                                     : run_tiles<T, ITEMS, 8>(args, tiles, per_launch, stream);
}

template <KvType T>
static int run_type(const Args &args, uint64_t tiles, uint64_t per_launch, WeftCudaStream stream)
{
    return items_of(&args.c) == 4 ? run_items<T, 4>(args, tiles, per_launch, stream)
                                  : run_items<T, 8>(args, tiles, per_launch, stream);
}

/* All segments, or those of fewer than rows_until rows. */
static int attend(const CudaAttention *c, uint32_t rows_until, WeftCudaStream stream)
{
    Args args = {};
    args.c = *c;
    args.rows_until = rows_until;
    args.n_splits = splits_of(c);
    args.tiles = blocks_of((size_t)c->longest_segment * c->heads_per_kv, items_of(c));
    args.partials = static_cast<float *>(c->workspace);
    const uint64_t tiles = all_tiles(c);
    uint64_t per_launch = 65535;
    if (args.n_splits > 1) {
        const uint64_t fit = c->workspace_bytes / tile_bytes(c);
        per_launch = fit < per_launch ? fit : per_launch;
    }
    if (per_launch == 0 || tiles > UINT32_MAX) {
        return (int)cudaErrorInvalidValue;
    }
    switch (c->kv.type) {
    case KV_F16:
        return run_type<KV_F16>(args, tiles, per_launch, stream);
    case KV_BF16:
        return run_type<KV_BF16>(args, tiles, per_launch, stream);
    case KV_F32:
        return run_type<KV_F32>(args, tiles, per_launch, stream);
    case KV_Q8:
        return run_type<KV_Q8>(args, tiles, per_launch, stream);
    }
    return (int)cudaErrorInvalidValue;
}

/* Rows from which on a segment fills half of a warp's matrices; a single row never does: decoding
 * wants splits of the keys. */
static uint32_t long_rows(const CudaAttention *c)
{
    const uint32_t rows = blocks_of(16, c->heads_per_kv);
    return rows < 2 ? 2 : rows;
}

extern "C" int weft_cuda_attention(const CudaAttention *c, WeftCudaStream stream)
{
    if (c->head_size == 0 || c->head_size > HEAD_LIMIT || c->heads_per_kv == 0 ||
        c->max_keys == 0 || c->kv.n_kv_heads > 65535) {
        return (int)cudaErrorInvalidValue;
    }
    if (c->n_segments == 0 || c->longest_segment == 0 || c->n_heads == 0) {
        return 0;
    }
    const uint32_t rows = long_rows(c);
    if (!c->fast || c->longest_segment < rows || !attention_prefill_takes(c)) {
        return attend(c, 0, stream);
    }
    int status = attention_prefill(c, rows, stream);
    if (status == 0 && c->n_segments > 1) {
        CudaAttention others = *c;
        others.longest_segment = rows - 1;
        status = attend(&others, rows, stream);
    }
    return status;
}
