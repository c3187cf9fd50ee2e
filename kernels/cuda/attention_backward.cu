/* Backward of causal attention over whole sequences, as kernels/ops/attention_backward.h specifies
 * it, bit for bit: scores are computed again, p and ds of a group of query heads are kept in a
 * workspace of n_rows x n_rows each. blockIdx.z is an item, a document and a KV head.
 *
 *   rows_kernel   p and ds: a block takes 8 rows of one head, a warp a tile of 32 keys (lane = key,
 *                 chains over d), then a warp a row (the 32 lanes of NUMERICS 4)
 *   dq_kernel     a warp a row, lane = dimensions, a chain over the keys
 *   dkv_kernel    a warp a key, lane = dimensions, chains over the rows of each query head, heads
 *                 folded by the tree program
 * All on fma units, for f32 operands; 16-bit ones have matrix instructions
 * (attention_backward_half.cu). */
#include "kernels/cuda/attention_backward.h"

enum {
    THREADS = 256,
    WARPS = 8,
    ROWS = 8,
    DEPTH = 32, /* of d that a tile of keys holds at a time */
    DIMS = 8,   /* per lane: head_size <= 256 */
    ITEMS_LIMIT = 65535,
};

/* An item and its squares: p and ds [n_q][n_rows][n_rows]. */
struct Item : BackwardItem {
    float *p, *ds;
};

__host__ __device__ static inline size_t square_floats(const CudaAttentionBackward &c)
{
    return (size_t)c.n_q * c.n_rows * c.n_rows;
}

__device__ static Item item_of(const BackwardArgs &a)
{
    float *p = backward_workspace(a, 2 * square_floats(a.c));
    return {backward_item(a), p, p + square_floats(a.c)};
}

/* ---- p and ds ---- */

/* Shared: q, dout of 8 rows [d][ROWS]; each warp's tiles of k and v [key][DEPTH + 1]. */
__host__ __device__ static inline size_t rows_shared_floats(uint32_t head_size)
{
    return (size_t)2 * head_size * ROWS + (size_t)WARPS * 2 * WARP * (DEPTH + 1);
}

__device__ static void load_tile(float *tile, const float *from, size_t ld, uint32_t key0,
                                 uint32_t n_keys, uint32_t d0, uint32_t head_size)
{
    for (unsigned key = 0; key < WARP; key++) {
        const uint32_t d = d0 + lane_index();
        tile[key * (DEPTH + 1) + lane_index()] =
            key0 + key < n_keys && d < head_size ? from[(key0 + key) * ld + d] : 0.0f;
    }
}

/* Raw scores into p, dp into ds: keys key0.. of this warp, all rows of the block. */
__device__ static void score_tile(const CudaAttentionBackward &c, const Item &item, uint32_t row0,
                                  uint32_t key0, float *p, float *ds, const float *q,
                                  const float *dout, float *tiles)
{
    float *k_tile = tiles, *v_tile = tiles + WARP * (DEPTH + 1);
    float score[ROWS] = {}, dp[ROWS] = {};
    for (uint32_t d0 = 0; d0 < c.head_size; d0 += DEPTH) {
        __syncwarp();
        load_tile(k_tile, item.k, c.kv_ld, key0, item.n_rows, d0, c.head_size);
        load_tile(v_tile, item.v, c.kv_ld, key0, item.n_rows, d0, c.head_size);
        __syncwarp();
        const uint32_t n = c.head_size - d0 < DEPTH ? c.head_size - d0 : (uint32_t)DEPTH;
        for (uint32_t i = 0; i < n; i++) {
            const float k = k_tile[lane_index() * (DEPTH + 1) + i];
            const float v = v_tile[lane_index() * (DEPTH + 1) + i];
#pragma unroll
            for (unsigned r = 0; r < ROWS; r++) {
                score[r] = fmaf(q[(d0 + i) * ROWS + r], k, score[r]);
                dp[r] = fmaf(dout[(d0 + i) * ROWS + r], v, dp[r]);
            }
        }
    }
    const uint32_t key = key0 + lane_index();
#pragma unroll
    for (unsigned r = 0; r < ROWS; r++) {
        if (row0 + r < item.n_rows && key <= row0 + r) {
            p[(size_t)(row0 + r) * item.n_rows + key] = score[r] * c.scale;
            ds[(size_t)(row0 + r) * item.n_rows + key] = dp[r];
        }
    }
}

/* Softmax and its gradient of one row, by one warp; lane j has keys j, j + 32, ... */
__device__ static void finish_row(float scale, uint32_t row, float *p, float *ds)
{
    float m = -INFINITY, lane = 0.0f;
    for (uint32_t j = lane_index(); j <= row; j += WARP) {
        m = p[j] > m ? p[j] : m;
    }
    m = warp_max(m);
    for (uint32_t j = lane_index(); j <= row; j += WARP) {
        p[j] = exp32_inline(p[j] - m);
        lane += p[j];
    }
    const float r = 1.0f / warp_fold(lane);
    lane = 0.0f;
    for (uint32_t j = lane_index(); j <= row; j += WARP) {
        p[j] *= r;
        lane = fmaf(p[j], ds[j], lane);
    }
    const float delta = warp_fold(lane);
    for (uint32_t j = lane_index(); j <= row; j += WARP) {
        ds[j] = (p[j] * (ds[j] - delta)) * scale;
    }
}

static __global__ void __launch_bounds__(THREADS)
    rows_kernel(const __grid_constant__ BackwardArgs a)
{
    const CudaAttentionBackward &c = a.c;
    const Item item = item_of(a);
    const uint32_t row0 = blockIdx.x * ROWS, head = blockIdx.y;
    if (row0 >= item.n_rows) {
        return; /* a whole block */
    }
    float *q = dynamic_shared<float>(), *dout = q + c.head_size * ROWS;
    float *tiles = dout + c.head_size * ROWS + warp_index() * 2 * WARP * (DEPTH + 1);
    for (uint32_t e = threadIdx.x; e < c.head_size * ROWS; e += THREADS) {
        const uint32_t row = row0 + e % ROWS;
        const size_t at = row * c.q_ld + (size_t)head * c.head_size + e / ROWS;
        q[e] = row < item.n_rows ? item.q[at] : 0.0f;
        dout[e] = row < item.n_rows ? item.dout[at] : 0.0f;
    }
    __syncthreads();
    const size_t square = (size_t)item.n_rows * item.n_rows;
    float *p = item.p + head * square, *ds = item.ds + head * square;
    for (uint32_t key0 = warp_index() * WARP; key0 < row0 + ROWS && key0 < item.n_rows;
         key0 += WARPS * WARP) {
        score_tile(c, item, row0, key0, p, ds, q, dout, tiles);
    }
    __syncthreads();
    const uint32_t row = row0 + warp_index();
    if (row < item.n_rows) {
        finish_row(c.scale, row, p + (size_t)row * item.n_rows, ds + (size_t)row * item.n_rows);
    }
}

/* ---- dq ---- */

static __global__ void __launch_bounds__(THREADS) dq_kernel(const __grid_constant__ BackwardArgs a)
{
    const CudaAttentionBackward &c = a.c;
    const Item item = item_of(a);
    const uint32_t row = blockIdx.x * WARPS + warp_index(), head = blockIdx.y;
    if (row >= item.n_rows) {
        return; /* a whole warp */
    }
    const float *ds = item.ds + ((size_t)blockIdx.y * item.n_rows + row) * item.n_rows;
    float dq[DIMS] = {};
    for (uint32_t j = 0; j <= row; j++) {
        const float slope = ds[j];
#pragma unroll
        for (unsigned i = 0; i < DIMS; i++) {
            const uint32_t d = lane_index() + WARP * i;
            if (d < c.head_size) {
                dq[i] = fmaf(slope, item.k[j * c.kv_ld + d], dq[i]);
            }
        }
    }
#pragma unroll
    for (unsigned i = 0; i < DIMS; i++) {
        const uint32_t d = lane_index() + WARP * i;
        if (d < c.head_size) {
            item.dq[row * c.q_ld + (size_t)head * c.head_size + d] = dq[i];
        }
    }
}

/* ---- dk and dv ---- */

/* One head's chains over the rows that see key j. */
__device__ static void head_gradients(const CudaAttentionBackward &c, const Item &item, uint32_t h,
                                      uint32_t j, float dk[DIMS], float dv[DIMS])
{
    const size_t square = (size_t)item.n_rows * item.n_rows, column = (size_t)h * c.head_size;
    for (unsigned i = 0; i < DIMS; i++) {
        dk[i] = dv[i] = 0.0f;
    }
    for (uint32_t row = j; row < item.n_rows; row++) {
        const float ds = item.ds[h * square + (size_t)row * item.n_rows + j];
        const float p = item.p[h * square + (size_t)row * item.n_rows + j];
#pragma unroll
        for (unsigned i = 0; i < DIMS; i++) {
            const uint32_t d = lane_index() + WARP * i;
            if (d < c.head_size) {
                dk[i] = fmaf(ds, item.q[row * c.q_ld + column + d], dk[i]);
                dv[i] = fmaf(p, item.dout[row * c.q_ld + column + d], dv[i]);
            }
        }
    }
}

static __global__ void __launch_bounds__(THREADS) dkv_kernel(const __grid_constant__ BackwardArgs a)
{
    const CudaAttentionBackward &c = a.c;
    const Item item = item_of(a);
    const uint32_t j = blockIdx.x * WARPS + warp_index();
    if (j >= item.n_rows) {
        return; /* a whole warp */
    }
    float dk[BACKWARD_LEVELS][DIMS], dv[BACKWARD_LEVELS][DIMS];
    uint32_t depth = 0, emitted = 0;
    for (uint32_t h = 0; h < c.n_q; h++) {
        head_gradients(c, item, h, j, dk[depth], dv[depth]);
        depth++;
        for (uint32_t m = a.steps[h].n_merges; m > 0; m--) {
            depth--;
            for (unsigned i = 0; i < DIMS; i++) {
                dk[depth - 1][i] += dk[depth][i];
                dv[depth - 1][i] += dv[depth][i];
            }
        }
        if (a.steps[h].emit) {
            depth--;
            const size_t at = emitted++ * c.subtree_stride + j * c.kv_ld;
            for (unsigned i = 0; i < DIMS; i++) {
                const uint32_t d = lane_index() + WARP * i;
                if (d < c.head_size) {
                    item.dk[at + d] = dk[depth][i];
                    item.dv[at + d] = dv[depth][i];
                }
            }
        }
    }
}

static bool is_half(const CudaAttentionBackward *c)
{
    return c->operands == DTYPE_BF16 || c->operands == DTYPE_F16;
}

extern "C" size_t weft_cuda_attention_backward_bytes(const CudaAttentionBackward *c)
{
    return (is_half(c) ? attention_backward_half_floats(c) : 2 * square_floats(*c)) * sizeof(float);
}

static int attention_backward_f32(const BackwardArgs &args, uint32_t n_items, WeftCudaStream stream)
{
    const CudaAttentionBackward &c = args.c;
    const size_t shared = rows_shared_floats(c.head_size) * sizeof(float);
    const unsigned by_row = blocks_of(c.n_rows, WARPS);
    int status = launch(rows_kernel, dim3(blocks_of(c.n_rows, ROWS), c.n_q, n_items), THREADS,
                        shared, stream, args);
    if (status == 0) { /* before dq, which may take dout's place */
        status = launch(dkv_kernel, dim3(by_row, 1, n_items), THREADS, 0, stream, args);
    }
    if (status == 0) {
        status = launch(dq_kernel, dim3(by_row, c.n_q, n_items), THREADS, 0, stream, args);
    }
    return status;
}

extern "C" int weft_cuda_attention_backward(const CudaAttentionBackward *c, WeftCudaStream stream)
{
    if (c->head_size == 0 || c->head_size > BACKWARD_HEAD_SIZE_LIMIT || c->n_q == 0 ||
        c->n_q > BACKWARD_HEADS_LIMIT || c->n_rows == 0) {
        return (int)cudaErrorInvalidValue;
    }
    BackwardArgs args = {};
    args.c = *c;
    args.c.n_kv_heads = c->n_kv_heads > 0 ? c->n_kv_heads : 1;
    for (uint32_t h = 0; h < c->n_q; h++) {
        args.steps[h] = c->steps[h];
    }
    const uint32_t total = args.c.n_kv_heads * (c->segments != nullptr ? c->n_segments : 1);
    const size_t fit = c->workspace_bytes / weft_cuda_attention_backward_bytes(c);
    const size_t most = ITEMS_LIMIT, at_most = fit < most ? fit : most;
    const uint32_t at_once = at_most < 1 ? 1 : (uint32_t)at_most;
    int status = 0;
    for (args.first = 0; args.first < total && status == 0; args.first += at_once) {
        const uint32_t n = total - args.first < at_once ? total - args.first : at_once;
        status = is_half(c) ? attention_backward_half(args, n, stream)
                            : attention_backward_f32(args, n, stream);
    }
    return status;
}
