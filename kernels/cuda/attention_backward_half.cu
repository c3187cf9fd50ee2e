/* Backward of causal attention with 16-bit operands, by matrix instructions: class fast. As flash
 * attention's (Dao 2023, arXiv 2307.08691), but no sum goes through atomics: dq has a pass of its
 * own, and heads that share keys are folded at the end. blockIdx.z is an item, a document and a KV
 * head; blockIdx.y a query head of it; a block has a tile of TILE rows (or keys), 16 a warp, and
 * goes through the keys (or rows) that they meet, TURN at a time.
 *
 *   stats_kernel  of each row the maximum and the inverse sum of its exponentials, and
 *                 delta = sum of p dp: one pass with running maxima
 *   dkv_kernel    a tile of keys: dv += p' dout, dk += ds' q over the rows from the first key on
 *   fold_kernel   dk and dv of the heads by the tree program (NUMERICS 16), where there are several
 *   dq_kernel     a tile of rows: dq += ds k over the keys up to the last row; last, for dq may
 * take dout's place
 *
 * Scores and dp are made again by each of the three: 9 products of a row and a key in all.
 * Numbers: q, k, v, dout, p and ds are f16 or bf16 as the operands are, products exact, sums and
 * everything between f32. A gradient's bits depend on its document alone: tiles and turns begin
 * with it. What a row does not see has p and ds 0, so that finite values are needed. */
#include "kernels/cuda/attention_backward.h"
#include "kernels/cuda/attention_fragments.h"

enum {
    THREADS = 128,
    WARPS = 4,
    TILE = 16 * WARPS,
    TURN = 32,
    N_TILES = TURN / 8, /* of 8 columns of a result */
    STATS = 3,          /* maximum, inverse sum, delta */
    FOLD_THREADS = 256,
};

#define LOG2_E 1.44269504f

/* 16-bit rows in shared memory: [row][PITCH], 8 rows meet all banks. */
template <int DIMS> struct Rows {
    static constexpr unsigned PITCH = DIMS + 8;
    static constexpr size_t BYTES_OF_ONE = PITCH * sizeof(uint16_t);
};

/* Rows row0 .. row0 + n of `from`, zeros from n_rows and from head_size on. All threads. */
template <KvType T, int DIMS>
__device__ __forceinline__ void load_rows(uint16_t *to, unsigned n, const float *from, size_t ld,
                                          uint32_t row0, uint32_t n_rows, uint32_t head_size)
{
    for (uint32_t e = threadIdx.x; e < n * (DIMS / 2); e += THREADS) {
        const uint32_t r = e / (DIMS / 2), d = e % (DIMS / 2) * 2;
        const float *x = from + (size_t)(row0 + r) * ld + d;
        const bool there = row0 + r < n_rows;
        const float low = there && d < head_size ? x[0] : 0.0f;
        const float high = there && d + 1 < head_size ? x[1] : 0.0f;
        *reinterpret_cast<uint32_t *>(to + r * Rows<DIMS>::PITCH + d) = pack<T>(low, high);
    }
}

/* This warp's 16 rows of `left` times the TURN rows of `right`, over the head's dimensions. Lane
 * (g, t) has rows g and g + 8, columns 8n + 2t and + 1. */
template <KvType T, int DIMS>
__device__ __forceinline__ void row_products(const uint16_t *left, const uint16_t *right,
                                             uint32_t head_size, float s[N_TILES][4])
{
    constexpr unsigned PITCH = Rows<DIMS>::PITCH;
    const unsigned lane = lane_index();
#pragma unroll
    for (unsigned k = 0; k < DIMS / 16; k++) {
        if (16 * k >= head_size) {
            break;
        }
        uint32_t a[4];
        load_matrices(a, left + lane % 16 * PITCH + k * 16 + lane / 16 * 8);
#pragma unroll
        for (unsigned n = 0; n < N_TILES / 2; n++) {
            uint32_t b[4];
            const unsigned row = n * 16 + lane / 16 * 8 + lane % 8;
            load_matrices(b, right + row * PITCH + k * 16 + lane / 8 % 2 * 8);
            multiply<T>(s[2 * n], a, b[0], b[1]);
            multiply<T>(s[2 * n + 1], a, b[2], b[3]);
        }
    }
}

/* out += s right: the result of row_products(), rounded, is the left operand as it lies; columns
 * from d0 on. */
template <KvType T, int DIMS, int OUT>
__device__ __forceinline__ void add_products(const float s[N_TILES][4], const uint16_t *right,
                                             uint32_t d0, uint32_t head_size, float out[OUT / 8][4])
{
    const unsigned lane = lane_index();
#pragma unroll
    for (unsigned k = 0; k < N_TILES / 2; k++) {
        uint32_t a[4];
#pragma unroll
        for (unsigned i = 0; i < 4; i++) { /* rows g, g + 8, then the second 8 columns */
            const float *pair = s[2 * k + i / 2] + i % 2 * 2;
            a[i] = pack<T>(pair[0], pair[1]);
        }
        const uint16_t *at =
            right + (k * 16 + lane / 8 % 2 * 8 + lane % 8) * Rows<DIMS>::PITCH + lane / 16 * 8;
#pragma unroll
        for (unsigned n = 0; n < OUT / 16; n++) {
            if (d0 + 16 * n >= head_size) {
                break;
            }
            uint32_t b[4];
            load_matrices_transposed(b, at + d0 + n * 16);
            multiply<T>(out[2 * n], a, b[0], b[1]);
            multiply<T>(out[2 * n + 1], a, b[2], b[3]);
        }
    }
}

/* A warp's 16 rows of f32 results; columns d0 .. d0 + OUT. */
template <int OUT>
__device__ __forceinline__ void put_rows(const float x[OUT / 8][4], float *to, size_t ld,
                                         uint32_t row0, uint32_t n_rows, uint32_t d0,
                                         uint32_t head_size)
{
    const unsigned g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (unsigned n = 0; n < OUT / 8; n++) {
#pragma unroll
        for (unsigned i = 0; i < 4; i++) {
            const uint32_t row = row0 + g + i / 2 * 8, d = d0 + 8 * n + 2 * t + i % 2;
            if (row < n_rows && d < head_size) {
                to[(size_t)row * ld + d] = x[n][i];
            }
        }
    }
}

/* One item's part of the workspace: stats [n_q][n_rows of the longest][STATS], then dk and dv of
 * each head [n_q][n_rows][head_size], where there are several. */
__host__ __device__ static inline size_t stats_floats(const CudaAttentionBackward &c)
{
    return (size_t)c.n_q * c.n_rows * STATS;
}
__host__ __device__ static inline size_t partial_floats(const CudaAttentionBackward &c)
{
    return c.n_q > 1 ? (size_t)c.n_q * c.n_rows * c.head_size : 0;
}
__host__ __device__ static inline size_t item_floats(const CudaAttentionBackward &c)
{
    return stats_floats(c) + 2 * partial_floats(c);
}

size_t attention_backward_half_floats(const CudaAttentionBackward *c)
{
    return item_floats(*c);
}

/* ---- what a tile of rows does with a turn of keys ---- */

/* A tile's own rows of two matrices, and a turn of the two others. */
template <int DIMS> struct Tiles {
    static constexpr size_t OWN = TILE * Rows<DIMS>::BYTES_OF_ONE;
    static constexpr size_t OTHER = TURN * Rows<DIMS>::BYTES_OF_ONE;
    static constexpr size_t BYTES = 2 * OWN + 2 * OTHER;
    uint16_t *own[2], *other[2];

    __device__ __forceinline__ Tiles()
        : own{dynamic_shared<uint16_t>(), dynamic_shared<uint16_t>(OWN)},
          other{dynamic_shared<uint16_t>(2 * OWN), dynamic_shared<uint16_t>(2 * OWN + OTHER)}
    {
    }
    __device__ __forceinline__ const uint16_t *mine(unsigned which) const
    {
        return own[which] + warp_index() * 16 * Rows<DIMS>::PITCH;
    }
};

/* Rows are the tile's: scores and dp of a turn of keys. */
template <KvType T, int DIMS>
__device__ __forceinline__ void
scores_of_rows(const CudaAttentionBackward &c, const BackwardItem &item, const Tiles<DIMS> &tiles,
               uint32_t key0, float s[N_TILES][4], float dp[N_TILES][4])
{
    __syncthreads(); /* the last turn has been read */
    load_rows<T, DIMS>(tiles.other[0], TURN, item.k, c.kv_ld, key0, item.n_rows, c.head_size);
    load_rows<T, DIMS>(tiles.other[1], TURN, item.v, c.kv_ld, key0, item.n_rows, c.head_size);
    __syncthreads();
    row_products<T, DIMS>(tiles.mine(0), tiles.other[0], c.head_size, s);
    row_products<T, DIMS>(tiles.mine(1), tiles.other[1], c.head_size, dp);
}

template <KvType T, int DIMS>
__device__ __forceinline__ void load_tile_of_rows(const CudaAttentionBackward &c,
                                                  const BackwardItem &item,
                                                  const Tiles<DIMS> &tiles, uint32_t row0)
{
    const size_t column = (size_t)blockIdx.y * c.head_size;
    load_rows<T, DIMS>(tiles.own[0], TILE, item.q + column, c.q_ld, row0, item.n_rows, c.head_size);
    load_rows<T, DIMS>(tiles.own[1], TILE, item.dout + column, c.q_ld, row0, item.n_rows,
                       c.head_size);
}

__device__ __forceinline__ uint32_t smaller_of(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

/* ---- stats ---- */

struct Running {
    float m, l, w; /* maximum; this lane's sums of exponentials, and of these times dp */
};

/* A lane's part of a row in one turn: columns 2t, 2t + 1 of each 8. */
__device__ __forceinline__ void take_turn(Running &r, uint32_t row, uint32_t key0, unsigned half,
                                          float scale, const float s[N_TILES][4],
                                          const float dp[N_TILES][4])
{
    const unsigned t = lane_index() % 4;
    float most = r.m, x[N_TILES][2];
#pragma unroll
    for (unsigned n = 0; n < N_TILES; n++) {
#pragma unroll
        for (unsigned e = 0; e < 2; e++) {
            const uint32_t key = key0 + 8 * n + 2 * t + e;
            x[n][e] = key <= row ? s[n][2 * half + e] * scale : -INFINITY;
            most = x[n][e] > most ? x[n][e] : most;
        }
    }
    most = quad_max(most); /* of the first turn: finite, key 0 is seen by all */
    const float shrink = fast_exp2(r.m - most);
    r.m = most;
    r.l *= shrink;
    r.w *= shrink;
#pragma unroll
    for (unsigned n = 0; n < N_TILES; n++) {
#pragma unroll
        for (unsigned e = 0; e < 2; e++) {
            const float exponential = fast_exp2(x[n][e] - most);
            r.l += exponential;
            r.w = fmaf(exponential, dp[n][2 * half + e], r.w);
        }
    }
}

template <KvType T, int DIMS>
static __global__ void __launch_bounds__(THREADS)
    stats_kernel(const __grid_constant__ BackwardArgs a)
{
    const CudaAttentionBackward &c = a.c;
    const BackwardItem item = backward_item(a);
    const uint32_t row0 = (gridDim.x - 1 - blockIdx.x) * TILE; /* the longest first */
    if (row0 >= item.n_rows) {
        return; /* a whole block */
    }
    const Tiles<DIMS> tiles;
    const uint32_t end = smaller_of(row0 + TILE, item.n_rows);
    const uint32_t first = row0 + warp_index() * 16 + lane_index() / 4;
    Running running[2] = {{-INFINITY, 0.0f, 0.0f}, {-INFINITY, 0.0f, 0.0f}};
    load_tile_of_rows<T, DIMS>(c, item, tiles, row0);
    for (uint32_t key0 = 0; key0 < end; key0 += TURN) {
        float s[N_TILES][4] = {}, dp[N_TILES][4] = {};
        scores_of_rows<T, DIMS>(c, item, tiles, key0, s, dp);
#pragma unroll
        for (unsigned half = 0; half < 2; half++) {
            take_turn(running[half], first + 8 * half, key0, half, c.scale * LOG2_E, s, dp);
        }
    }
#pragma unroll
    for (unsigned half = 0; half < 2; half++) {
        const uint32_t row = first + 8 * half;
        const float inverse = 1.0f / quad_sum(running[half].l);
        const float delta = quad_sum(running[half].w) * inverse;
        if (lane_index() % 4 == 0 && row < item.n_rows) {
            float *to = backward_workspace(a, item_floats(c)) +
                        ((size_t)blockIdx.y * c.n_rows + row) * STATS;
            to[0] = running[half].m;
            to[1] = inverse;
            to[2] = delta;
        }
    }
}

/* p and ds of a score, in their places; stats: of its row. */
__device__ __forceinline__ void slopes(bool seen, const float *stats, float scale, float *score,
                                       float *dp)
{
    const float p = seen ? fast_exp2(*score * (scale * LOG2_E) - stats[0]) * stats[1] : 0.0f;
    *dp = seen ? (p * (*dp - stats[2])) * scale : 0.0f;
    *score = p;
}

/* ---- dq ---- */

template <KvType T, int DIMS>
static __global__ void __launch_bounds__(THREADS) dq_kernel(const __grid_constant__ BackwardArgs a)
{
    const CudaAttentionBackward &c = a.c;
    const BackwardItem item = backward_item(a);
    const uint32_t row0 = (gridDim.x - 1 - blockIdx.x) * TILE;
    if (row0 >= item.n_rows) {
        return; /* a whole block */
    }
    const Tiles<DIMS> tiles;
    const uint32_t end = smaller_of(row0 + TILE, item.n_rows), mine = row0 + warp_index() * 16;
    const unsigned g = lane_index() / 4, t = lane_index() % 4;
    const float *stats =
        backward_workspace(a, item_floats(c)) + (size_t)blockIdx.y * c.n_rows * STATS;
    float own[2][STATS] = {}, dq[DIMS / 8][4] = {};
    for (unsigned half = 0; half < 2; half++) {
        for (unsigned i = 0; i < STATS && mine + g + 8 * half < item.n_rows; i++) {
            own[half][i] = stats[(mine + g + 8 * half) * STATS + i];
        }
    }
    load_tile_of_rows<T, DIMS>(c, item, tiles, row0);
    for (uint32_t key0 = 0; key0 < end; key0 += TURN) {
        float s[N_TILES][4] = {}, ds[N_TILES][4] = {};
        scores_of_rows<T, DIMS>(c, item, tiles, key0, s, ds);
#pragma unroll
        for (unsigned n = 0; n < N_TILES; n++) {
#pragma unroll
            for (unsigned i = 0; i < 4; i++) {
                const uint32_t row = mine + g + i / 2 * 8, key = key0 + 8 * n + 2 * t + i % 2;
                slopes(key <= row && row < item.n_rows, own[i / 2], c.scale, &s[n][i], &ds[n][i]);
            }
        }
        add_products<T, DIMS, DIMS>(ds, tiles.other[0], 0, c.head_size, dq);
    }
    put_rows<DIMS>(dq, item.dq + (size_t)blockIdx.y * c.head_size, c.q_ld, mine, item.n_rows, 0,
                   c.head_size);
}

/* ---- dk and dv ---- */

/* What a pass over the rows leaves in registers: more dimensions take passes of their own. */
template <int DIMS> struct Pass {
    static constexpr int OUT = DIMS < 128 ? DIMS : 128;
};

/* A turn of rows, with what is known of each. */
template <KvType T, int DIMS>
__device__ __forceinline__ void
load_turn_of_rows(const CudaAttentionBackward &c, const BackwardItem &item,
                  const Tiles<DIMS> &tiles, float *turn_stats, const float *stats, uint32_t row0)
{
    const size_t column = (size_t)blockIdx.y * c.head_size;
    __syncthreads(); /* the last turn has been read */
    load_rows<T, DIMS>(tiles.other[0], TURN, item.q + column, c.q_ld, row0, item.n_rows,
                       c.head_size);
    load_rows<T, DIMS>(tiles.other[1], TURN, item.dout + column, c.q_ld, row0, item.n_rows,
                       c.head_size);
    for (unsigned e = threadIdx.x; e < TURN * STATS; e += THREADS) {
        turn_stats[e] = row0 + e / STATS < item.n_rows ? stats[(size_t)row0 * STATS + e] : 0.0f;
    }
    __syncthreads();
}

/* Where a head's gradients of keys and values go: the place itself, or a part to be folded. */
struct Target {
    float *dk, *dv;
    size_t ld;
};
__device__ static inline Target target_of(const BackwardArgs &a, const BackwardItem &item)
{
    const CudaAttentionBackward &c = a.c;
    if (c.n_q == 1) {
        return {item.dk, item.dv, c.kv_ld};
    }
    float *dk = backward_workspace(a, item_floats(c)) + stats_floats(c) +
                (size_t)blockIdx.y * c.n_rows * c.head_size;
    return {dk, dk + partial_floats(c), c.head_size};
}

template <KvType T, int DIMS>
static __global__ void __launch_bounds__(THREADS) dkv_kernel(const __grid_constant__ BackwardArgs a)
{
    constexpr int OUT = Pass<DIMS>::OUT, PASSES = DIMS / OUT;
    const CudaAttentionBackward &c = a.c;
    const BackwardItem item = backward_item(a);
    const uint32_t key0 = blockIdx.x / PASSES * TILE, d0 = blockIdx.x % PASSES * OUT;
    if (key0 >= item.n_rows || d0 >= c.head_size) {
        return; /* a whole block */
    }
    const Tiles<DIMS> tiles;
    float *turn_stats = dynamic_shared<float>(Tiles<DIMS>::BYTES);
    const float *stats =
        backward_workspace(a, item_floats(c)) + (size_t)blockIdx.y * c.n_rows * STATS;
    const uint32_t mine = key0 + warp_index() * 16;
    const unsigned g = lane_index() / 4, t = lane_index() % 4;
    float dk[OUT / 8][4] = {}, dv[OUT / 8][4] = {};
    load_rows<T, DIMS>(tiles.own[0], TILE, item.k, c.kv_ld, key0, item.n_rows, c.head_size);
    load_rows<T, DIMS>(tiles.own[1], TILE, item.v, c.kv_ld, key0, item.n_rows, c.head_size);
    for (uint32_t row0 = key0; row0 < item.n_rows; row0 += TURN) { /* TILE is whole turns */
        load_turn_of_rows<T, DIMS>(c, item, tiles, turn_stats, stats, row0);
        float p[N_TILES][4] = {}, ds[N_TILES][4] = {};
        row_products<T, DIMS>(tiles.mine(0), tiles.other[0], c.head_size, p);
        row_products<T, DIMS>(tiles.mine(1), tiles.other[1], c.head_size, ds);
#pragma unroll
        for (unsigned n = 0; n < N_TILES; n++) {
#pragma unroll
            for (unsigned i = 0; i < 4; i++) {
                const uint32_t key = mine + g + i / 2 * 8, in_turn = 8 * n + 2 * t + i % 2;
                const uint32_t row = row0 + in_turn;
                slopes(key <= row && row < item.n_rows, turn_stats + in_turn * STATS, c.scale,
                       &p[n][i], &ds[n][i]);
            }
        }
        add_products<T, DIMS, OUT>(p, tiles.other[1], d0, c.head_size, dv);
        add_products<T, DIMS, OUT>(ds, tiles.other[0], d0, c.head_size, dk);
    }
    const Target to = target_of(a, item);
    put_rows<OUT>(dk, to.dk, to.ld, mine, item.n_rows, d0, c.head_size);
    put_rows<OUT>(dv, to.dv, to.ld, mine, item.n_rows, d0, c.head_size);
}

/* An element of dk and dv a thread: its heads by the tree program. */
static __global__ void __launch_bounds__(FOLD_THREADS)
    fold_kernel(const __grid_constant__ BackwardArgs a)
{
    const CudaAttentionBackward &c = a.c;
    const BackwardItem item = backward_item(a);
    const size_t e = (size_t)blockIdx.x * FOLD_THREADS + threadIdx.x;
    if (e >= (size_t)item.n_rows * c.head_size) {
        return;
    }
    const float *dk = backward_workspace(a, item_floats(c)) + stats_floats(c) + e;
    const float *dv = dk + partial_floats(c);
    const size_t head = (size_t)c.n_rows * c.head_size;
    const size_t at = e / c.head_size * c.kv_ld + e % c.head_size;
    float keys[BACKWARD_LEVELS], values[BACKWARD_LEVELS];
    uint32_t depth = 0, emitted = 0;
    for (uint32_t h = 0; h < c.n_q; h++) {
        keys[depth] = dk[h * head];
        values[depth] = dv[h * head];
        depth++;
        for (uint32_t m = a.steps[h].n_merges; m > 0; m--) {
            depth--;
            keys[depth - 1] += keys[depth];
            values[depth - 1] += values[depth];
        }
        if (a.steps[h].emit) {
            depth--;
            item.dk[emitted * c.subtree_stride + at] = keys[depth];
            item.dv[emitted * c.subtree_stride + at] = values[depth];
            emitted++;
        }
    }
}

/* ---- the host's side ---- */

template <KvType T, int DIMS>
static int start(const BackwardArgs &args, uint32_t n_items, WeftCudaStream stream)
{
    constexpr size_t shared = Tiles<DIMS>::BYTES;
    const CudaAttentionBackward &c = args.c;
    const unsigned tiles = blocks_of(c.n_rows, TILE), passes = DIMS / Pass<DIMS>::OUT;
    int status =
        launch(stats_kernel<T, DIMS>, dim3(tiles, c.n_q, n_items), THREADS, shared, stream, args);
    if (status == 0) {
        status = launch(dkv_kernel<T, DIMS>, dim3(tiles * passes, c.n_q, n_items), THREADS,
                        shared + TURN * STATS * sizeof(float), stream, args);
    }
    if (status == 0 && c.n_q > 1) {
        status = launch(fold_kernel,
                        dim3(blocks_of((size_t)c.n_rows * c.head_size, FOLD_THREADS), 1, n_items),
                        FOLD_THREADS, 0, stream, args);
    }
    if (status == 0) { /* after what reads dout */
        status =
            launch(dq_kernel<T, DIMS>, dim3(tiles, c.n_q, n_items), THREADS, shared, stream, args);
    }
    return status;
}

template <KvType T>
static int start_type(const BackwardArgs &args, uint32_t n_items, WeftCudaStream stream)
{
    return args.c.head_size <= 64    ? start<T, 64>(args, n_items, stream)
           : args.c.head_size <= 128 ? start<T, 128>(args, n_items, stream)
                                     : start<T, 256>(args, n_items, stream);
}

int attention_backward_half(const BackwardArgs &args, uint32_t n_items, WeftCudaStream stream)
{
    return args.c.operands == DTYPE_BF16 ? start_type<KV_BF16>(args, n_items, stream)
                                         : start_type<KV_F16>(args, n_items, stream);
}
