/* Products for training in class exact: kernels/ops/gemm.h on fma units, bit for bit. An output is
 * one thread's, which takes the steps of its chain in order; only outputs are split, so tiles,
 * blocks and devices change no bit.
 *
 * A block of 256 threads makes a tile of 128 x 128 outputs, 8 x 8 a thread (64 x 64, 4 x 4, where
 * the large ones would leave multiprocessors idle), from 16 steps at a time in shared memory, laid
 * out by step: while these are multiplied, the next 16, perhaps of the next segment, are under way
 * into registers. Units fold as they end: what waits for its right neighbour lies in the workspace,
 * a slot for each block, each thread's own elements; so blocks with units go from tile to tile.
 *
 * Narrow operands are rounded on their way into shared memory. bf16dot (NUMERICS 10) has the two
 * steps of a pair exchanged there. Its flush is decided by fma_flushed() where a sum is subnormal
 * or the smallest normal number: an instruction's own flush may differ from x86 where rounding
 * makes the difference.
 *
 * Bound by fma: a step of a thread is 64 of them beside 4 loads of 16 bytes from shared memory, a
 * turn of 16 steps has 16 loads and 16 stores besides. bf16 has two integer instructions more for
 * each, and small tiles alone: its sums are held twice. */
#include "kernels/cuda/device.h"
extern "C" {
#include "kernels/generic/bf16dot.h"
}

enum {
    THREADS = 256,
    SIDE = 16,  /* threads along a side of the tile */
    DEPTH = 16, /* steps in shared memory at a time, in each of two buffers */
    LARGE = 128,
    SMALL = 64,
    LARGE_FROM = 192,  /* large tiles: fewer leave multiprocessors idle */
    SLOTS = 304,       /* of blocks with units: two on each multiprocessor */
    INLINE = 64,       /* segments among the kernel's parameters; more are written to memory */
    TABLE_ALIGN = 256, /* bytes */
};

enum class Operands { F32, BF16, F16 };

struct Segment {
    const float *a, *b;
    uint32_t a_row, a_step, b_step, b_column, length;
    bool continues;
    TreeStep step;
};

struct Product {
    uint32_t m, n, n_segments;
    bool accumulate, flushes_c;
    float *c;
    size_t ld, subtree_stride;
    float *stack; /* [slot][level][element][thread] */
    uint32_t levels;
    const Segment *table; /* or NULL: */
    Segment segments[INLINE];
};

__device__ __forceinline__ const Segment &segment_of(const Product &p, uint32_t i)
{
    return p.table != nullptr ? p.table[i] : p.segments[i];
}

/* ---- operands into shared memory ---- */

template <Operands K> __device__ __forceinline__ float rounded(float x)
{
    if constexpr (K == Operands::BF16) {
        return flush_subnormal(f32_of_bf16(bf16_of_f32(x)));
    } else if constexpr (K == Operands::F16) {
        return f32_of_f16(f16_of_f32(x));
    } else {
        return x;
    }
}

/* Elements that a thread brings of an operand: neighbours in memory are neighbouring threads'. */
struct Share {
    uint32_t outer, outer_next, step, step_next;
};
template <int TILE> __device__ __forceinline__ Share share_of(bool by_step)
{
    const uint32_t t = threadIdx.x;
    return by_step ? Share{t / DEPTH, THREADS / DEPTH, t % DEPTH, 0}
                   : Share{t % TILE, 0, t / TILE, THREADS / TILE};
}

/* One operand of a tile: x(outer, step) = x[outer * outer_stride + step * step_stride]. */
struct Part {
    const float *x;
    uint32_t outer_stride, step_stride;
    uint32_t first, end; /* the tile begins at `first`, the operand ends at `end` */
};
__device__ static Part part_a(const Product &p, const Segment &s, uint32_t row0)
{
    return {s.a, s.a_row, s.a_step, row0, p.m};
}
__device__ static Part part_b(const Product &p, const Segment &s, uint32_t column0)
{
    return {s.b, s.b_column, s.b_step, column0, p.n};
}

template <int TILE>
__device__ __forceinline__ void load_part(const Part &p, uint32_t step0, uint32_t length,
                                          float out[TILE / SIDE])
{
    const Share share = share_of<TILE>(p.step_stride == 1);
    const uint32_t outer = p.first + share.outer, step = step0 + share.step;
    const size_t at = (size_t)outer * p.outer_stride + (size_t)step * p.step_stride,
                 next = (size_t)share.outer_next * p.outer_stride +
                        (size_t)share.step_next * p.step_stride;
#pragma unroll
    for (unsigned e = 0; e < TILE / SIDE; e++) {
        const bool there =
            outer + e * share.outer_next < p.end && step + e * share.step_next < length;
        out[e] = there ? p.x[at + e * next] : 0.0f;
    }
}

/* Rows of a step are a few floats longer than the tile: then steps of one row are in different
 * banks. */
template <int TILE> constexpr unsigned PITCH = TILE + 4;

template <Operands K, int TILE>
__device__ __forceinline__ void store_part(bool by_step, const float in[TILE / SIDE], float *tile)
{
    const Share share = share_of<TILE>(by_step);
#pragma unroll
    for (unsigned e = 0; e < TILE / SIDE; e++) {
        const uint32_t step = share.step + e * share.step_next;
        tile[(K == Operands::BF16 ? step ^ 1u : step) * PITCH<TILE> + share.outer +
             e * share.outer_next] = rounded<K>(in[e]);
    }
}

/* ---- steps ---- */

/* Rows or columns of this thread: runs of four, 64 apart. */
__device__ __forceinline__ uint32_t place_of(uint32_t thread, unsigned i)
{
    return i / 4 * SMALL + thread * 4 + i % 4;
}

template <int R>
__device__ __forceinline__ void load_step(const float *step, uint32_t thread, float out[R])
{
#pragma unroll
    for (unsigned i = 0; i < R; i += 4) {
        const float4 four = load_vector<float4>(step + place_of(thread, i));
        out[i] = four.x;
        out[i + 1] = four.y;
        out[i + 2] = four.z;
        out[i + 3] = four.w;
    }
}

/* 0 < |x| <= 2^-126 */
__device__ __forceinline__ bool may_flush(uint32_t least)
{
    return least < 0x01000000u;
}
__device__ __forceinline__ uint32_t flush_key(float x)
{
    return (float_bits(x) << 1) - 1u;
}

/* Apart, so that the steps around it stay small. */
__device__ __attribute__((noinline)) static float settle(float a, float b, float c)
{
    return fma_flushed(a, b, c);
}

template <Operands K, int R>
__device__ __forceinline__ void multiply_row(float a, const float b[R], float acc[R])
{
    if constexpr (K != Operands::BF16) {
#pragma unroll
        for (unsigned j = 0; j < R; j++) {
            acc[j] = fmaf(a, b[j], acc[j]);
        }
        return;
    }
    float sum[R];
    uint32_t least = ~0u;
#pragma unroll
    for (unsigned j = 0; j < R; j++) {
        sum[j] = fmaf(a, b[j], acc[j]);
        least = flush_key(sum[j]) < least ? flush_key(sum[j]) : least;
    }
    if (may_flush(least)) {
#pragma unroll
        for (unsigned j = 0; j < R; j++) {
            sum[j] = settle(a, b[j], acc[j]);
        }
    }
#pragma unroll
    for (unsigned j = 0; j < R; j++) {
        acc[j] = sum[j];
    }
}

template <Operands K, int TILE>
__device__ __forceinline__ void multiply_step(const float *a, const float *b, unsigned step,
                                              float acc[TILE / SIDE][TILE / SIDE])
{
    constexpr int R = TILE / SIDE;
    float x[R], y[R];
    load_step<R>(a + step * PITCH<TILE>, threadIdx.x / SIDE, x);
    load_step<R>(b + step * PITCH<TILE>, threadIdx.x % SIDE, y);
#pragma unroll
    for (unsigned i = 0; i < R; i++) {
        multiply_row<K, R>(x[i], y, acc[i]);
    }
}

/* Steps [0, n) of a buffer; what is behind a segment's end is not multiplied: -0 + 0 is +0. */
template <Operands K, int TILE>
__device__ __forceinline__ void multiply_buffer(const float *a, const float *b, uint32_t n,
                                                float acc[TILE / SIDE][TILE / SIDE])
{
    if (n < DEPTH) {
#pragma unroll 1
        for (unsigned t = 0; t < n; t++) {
            multiply_step<K, TILE>(a, b, t, acc);
        }
        return;
    }
    if constexpr (K == Operands::BF16) {
#pragma unroll 2
        for (unsigned t = 0; t < DEPTH; t++) {
            multiply_step<K, TILE>(a, b, t, acc);
        }
    } else {
#pragma unroll
        for (unsigned t = 0; t < DEPTH; t++) {
            multiply_step<K, TILE>(a, b, t, acc);
        }
    }
}

/* ---- a tile ---- */

/* Steps [step, step + DEPTH) of a segment; behind the last one segment == n_segments. */
struct Turn {
    uint32_t segment, step;
};
__device__ static Turn skip_empty(const Product &p, Turn t)
{
    while (t.segment < p.n_segments && t.step >= segment_of(p, t.segment).length) {
        t = {t.segment + 1, 0};
    }
    return t;
}

/* The block's tile of outputs, and this thread's part of it. */
template <int TILE> struct Tile {
    static constexpr int R = TILE / SIDE;
    uint32_t row0, column0;
    float acc[R][R], next_a[R], next_b[R];
};

template <int TILE> __device__ __forceinline__ float *buffer_a(unsigned buffer)
{
    return dynamic_shared<float>() + buffer * 2 * DEPTH * PITCH<TILE>;
}
template <int TILE> __device__ __forceinline__ float *buffer_b(unsigned buffer)
{
    return buffer_a<TILE>(buffer) + DEPTH * PITCH<TILE>;
}

template <int TILE>
__device__ __forceinline__ void load_turn(const Product &p, const Turn &turn, Tile<TILE> &tile)
{
    const Segment &s = segment_of(p, turn.segment);
    load_part<TILE>(part_a(p, s, tile.row0), turn.step, s.length, tile.next_a);
    load_part<TILE>(part_b(p, s, tile.column0), turn.step, s.length, tile.next_b);
}

template <Operands K, int TILE>
__device__ __forceinline__ void store_turn(const Product &p, const Turn &turn,
                                           const Tile<TILE> &tile, unsigned buffer)
{
    const Segment &s = segment_of(p, turn.segment);
    store_part<K, TILE>(s.a_step == 1, tile.next_a, buffer_a<TILE>(buffer));
    store_part<K, TILE>(s.b_step == 1, tile.next_b, buffer_b<TILE>(buffer));
}

/* f(element of the accumulator, row, column) for this thread's outputs that there are. */
template <int TILE, typename F>
__device__ __forceinline__ void for_outputs(const Product &p, Tile<TILE> &tile, const F &f)
{
    constexpr int R = TILE / SIDE;
#pragma unroll
    for (unsigned i = 0; i < R; i++) {
        const uint32_t row = tile.row0 + place_of(threadIdx.x / SIDE, i);
#pragma unroll
        for (unsigned j = 0; j < R; j++) {
            const uint32_t column = tile.column0 + place_of(threadIdx.x % SIDE, j);
            if (row < p.m && column < p.n) {
                f(tile.acc[i][j], row, column);
            }
        }
    }
}

template <int TILE> __device__ __forceinline__ void clear(Tile<TILE> &tile)
{
    constexpr unsigned R = TILE / SIDE;
#pragma unroll
    for (unsigned e = 0; e < R * R; e++) {
        tile.acc[e / R][e % R] = 0.0f;
    }
}

template <int TILE> __device__ static void begin_tile(const Product &p, Tile<TILE> &tile)
{
    clear(tile);
    if (p.accumulate) {
        for_outputs(p, tile, [&](float &acc, uint32_t row, uint32_t column) {
            const float x = p.c[row * p.ld + column];
            acc = p.flushes_c ? flush_subnormal(x) : x;
        });
    }
}

template <Operands K> __device__ __forceinline__ float fold(float left, float right)
{
    return K == Operands::BF16 ? add_flushed(left, right) : left + right;
}

/* A unit has ended. */
template <Operands K, int TILE>
__device__ static void end_unit(const Product &p, TreeStep step, Tile<TILE> &tile, uint32_t *depth,
                                uint32_t *emitted)
{
    constexpr unsigned R = TILE / SIDE;
    constexpr size_t LEVEL = (size_t)R * R * THREADS;
    float *stack = p.stack + (size_t)blockIdx.x * p.levels * LEVEL + threadIdx.x;
    for (unsigned k = 0; k < step.n_merges; k++) {
        const float *left = stack + --*depth * LEVEL;
#pragma unroll
        for (unsigned e = 0; e < R * R; e++) {
            tile.acc[e / R][e % R] = fold<K>(left[e * THREADS], tile.acc[e / R][e % R]);
        }
    }
    if (step.emit) {
        float *c = p.c + p.subtree_stride * (*emitted)++;
        for_outputs(p, tile, [&](float &acc, uint32_t row, uint32_t column) {
            c[row * p.ld + column] = acc;
        });
    } else {
        float *to = stack + (*depth)++ * LEVEL;
#pragma unroll
        for (unsigned e = 0; e < R * R; e++) {
            to[e * THREADS] = tile.acc[e / R][e % R];
        }
    }
    clear(tile);
}

template <Operands K, int TILE> __device__ static void run_tile(const Product &p, Tile<TILE> &tile)
{
    uint32_t depth = 0, emitted = 0;
    unsigned buffer = 0;
    Turn turn = skip_empty(p, {0, 0});
    const bool has_outputs = tile.row0 + place_of(threadIdx.x / SIDE, 0) < p.m &&
                             tile.column0 + place_of(threadIdx.x % SIDE, 0) < p.n;
    begin_tile(p, tile);
    if (turn.segment < p.n_segments) {
        load_turn(p, turn, tile);
        store_turn<K, TILE>(p, turn, tile, buffer);
    }
    __syncthreads();
    for (uint32_t s = 0; s < p.n_segments; s++) {
        const uint32_t length = segment_of(p, s).length;
        const uint32_t steps = K == Operands::BF16 ? length + length % 2 : length;
        for (uint32_t step = 0; step < length; step += DEPTH) {
            turn = skip_empty(p, {s, step + DEPTH});
            const bool more = turn.segment < p.n_segments;
            if (more) {
                load_turn(p, turn, tile);
            }
            if (has_outputs) {
                multiply_buffer<K, TILE>(buffer_a<TILE>(buffer), buffer_b<TILE>(buffer),
                                         steps - step < DEPTH ? steps - step : (uint32_t)DEPTH,
                                         tile.acc);
            }
            buffer ^= 1u;
            if (more) {
                store_turn<K, TILE>(p, turn, tile, buffer);
            }
            __syncthreads();
        }
        if (!segment_of(p, s).continues) {
            end_unit<K, TILE>(p, segment_of(p, s).step, tile, &depth, &emitted);
        }
    }
}

template <Operands K, int TILE>
static __global__ void __launch_bounds__(THREADS, 2)
    gemm_exact_kernel(const __grid_constant__ Product p)
{
    const uint32_t rows = (p.m + TILE - 1) / TILE, columns = (p.n + TILE - 1) / TILE;
    Tile<TILE> tile;
    for (uint32_t i = blockIdx.x; i < rows * columns; i += gridDim.x) {
        tile.row0 = i % rows * TILE;
        tile.column0 = i / rows * TILE;
        run_tile<K, TILE>(p, tile);
    }
}

/* Segments that the parameters have no room for. */
struct Table {
    uint32_t n;
    Segment *to;
    Segment segments[INLINE];
};
static __global__ void __launch_bounds__(INLINE) table_kernel(const __grid_constant__ Table t)
{
    if (threadIdx.x < t.n) {
        t.to[threadIdx.x] = t.segments[threadIdx.x];
    }
}

/* ---- the C face ---- */

static size_t table_bytes(uint32_t n_segments)
{
    const size_t bytes = n_segments > INLINE ? n_segments * sizeof(Segment) : 0;
    return (bytes + TABLE_ALIGN - 1) / TABLE_ALIGN * TABLE_ALIGN;
}

/* Of the stack below the unit that ends, for programs of n units. */
static uint32_t most_levels(uint32_t n_units)
{
    uint32_t levels = 0;
    while (levels < 32 && n_units > 1u << levels) {
        levels++;
    }
    return levels;
}

extern "C" size_t weft_cuda_gemm_bytes(uint32_t n_segments, uint32_t rows, uint32_t columns)
{
    const size_t tiles = (size_t)blocks_of(rows, LARGE) * blocks_of(columns, LARGE),
                 slots = tiles < SLOTS ? tiles : (size_t)SLOTS;
    return table_bytes(n_segments) +
           most_levels(n_segments) * slots * LARGE * LARGE * sizeof(float);
}

static bool to_segment(const GemmSegment *g, Segment *out)
{
    if ((g->a_row != 1 && g->a_step != 1) || (g->b_step != 1 && g->b_column != 1) ||
        (g->a_row | g->a_step | g->b_step | g->b_column) > UINT32_MAX) {
        return false;
    }
    *out = {g->a,
            g->b,
            (uint32_t)g->a_row,
            (uint32_t)g->a_step,
            (uint32_t)g->b_step,
            (uint32_t)g->b_column,
            g->length,
            g->continues,
            g->step};
    return true;
}

/* Fills what the segments decide; false: they are no program. */
static bool read_program(const CudaGemm *g, Product *p)
{
    uint32_t depth = 0;
    size_t length = 0;
    for (uint32_t i = 0; i < g->n_segments; i++) {
        const GemmSegment *s = &g->segments[i];
        length += s->length;
        if (s->continues) {
            continue;
        }
        if (s->step.n_merges > depth) {
            return false;
        }
        depth -= s->step.n_merges;
        depth += s->step.emit ? 0 : 1;
        p->levels = depth > p->levels ? depth : p->levels;
    }
    p->flushes_c = g->operands == DTYPE_BF16 && length > 0;
    return g->n_segments > 0 && !g->segments[g->n_segments - 1].continues && depth == 0;
}

/* The segments into the parameters, or into the workspace. 0 or CUDA's error. */
static int place_segments(const CudaGemm *g, Product *p, WeftCudaStream stream)
{
    Segment *table = static_cast<Segment *>(g->workspace);
    for (uint32_t first = 0; first < g->n_segments; first += INLINE) {
        Table t = {};
        t.n = g->n_segments - first < INLINE ? g->n_segments - first : (uint32_t)INLINE;
        t.to = table + first;
        for (uint32_t i = 0; i < t.n; i++) {
            if (!to_segment(&g->segments[first + i], &t.segments[i])) {
                return (int)cudaErrorInvalidValue;
            }
        }
        if (g->n_segments <= INLINE) {
            memcpy(p->segments, t.segments, sizeof t.segments);
            return 0;
        }
        const int error = launch(table_kernel, dim3(1), INLINE, 0, stream, t);
        if (error != 0) {
            return error;
        }
    }
    p->table = table;
    return 0;
}

template <Operands K, int TILE>
static int start(const CudaGemm *g, Product &p, WeftCudaStream stream)
{
    const size_t level = (size_t)TILE * TILE * sizeof(float), table = table_bytes(g->n_segments);
    size_t blocks = (size_t)blocks_of(p.m, TILE) * blocks_of(p.n, TILE);
    if (g->workspace_bytes < table || blocks > INT32_MAX) {
        return (int)cudaErrorInvalidValue;
    }
    if (p.levels > 0) {
        const size_t slots = (g->workspace_bytes - table) / (level * p.levels);
        blocks = blocks < slots ? blocks : slots;
        if (blocks == 0) {
            return (int)cudaErrorInvalidValue;
        }
        p.stack = reinterpret_cast<float *>(static_cast<uint8_t *>(g->workspace) + table);
    }
    const int error = place_segments(g, &p, stream);
    return error != 0 ? error
                      : launch(gemm_exact_kernel<K, TILE>, dim3((unsigned)blocks), THREADS,
                               4 * DEPTH * PITCH<TILE> * sizeof(float), stream, p);
}

template <Operands K> static int choose(const CudaGemm *g, Product &p, WeftCudaStream stream)
{
    if constexpr (K != Operands::BF16) {
        const size_t large = (size_t)blocks_of(p.m, LARGE) * blocks_of(p.n, LARGE);
        if (g->tile != 0 ? g->tile == LARGE : large >= LARGE_FROM) {
            return start<K, LARGE>(g, p, stream);
        }
    }
    return start<K, SMALL>(g, p, stream);
}

extern "C" int weft_cuda_gemm(const CudaGemm *g, WeftCudaStream stream)
{
    Product p = {};
    p.m = g->m;
    p.n = g->n;
    p.n_segments = g->n_segments;
    p.accumulate = g->accumulate;
    p.c = g->c;
    p.ld = g->ld;
    p.subtree_stride = g->subtree_stride;
    if (!read_program(g, &p)) {
        return (int)cudaErrorInvalidValue;
    }
    if (g->m == 0 || g->n == 0) {
        return 0;
    }
    switch (g->operands) {
    case DTYPE_F32:
        return choose<Operands::F32>(g, p, stream);
    case DTYPE_BF16:
        return choose<Operands::BF16>(g, p, stream);
    case DTYPE_F16:
        return choose<Operands::F16>(g, p, stream);
    default:
        return (int)cudaErrorInvalidValue;
    }
}
