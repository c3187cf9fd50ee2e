/* Products of quantised weights with few rows (decoding): bound by the weights' stream from memory.
 *
 * A block has P panels of 16 outputs and 8 * NT rows; in each round its 8 warps take the next 8
 * spans, one each, put the spans' sums into shared memory, and all threads add them in order. The
 * two buffers take turns, so one barrier a round is enough. Matrix instructions do one row or eight
 * at the same price; integer sums inside a 32-block are exact. */
#pragma once

#include "kernels/cuda/fragments.h"
#include "kernels/cuda/matmul.h"
#include "kernels/cuda/ptx.h"

enum { NARROW_THREADS = 256, NARROW_WARPS = 8 };

/* 1.5 * 2^23: an integer below 2^22 added to these bits is that number added to this float, which
 * turns an accumulator into a float by one subtraction. */
#define INTEGER_BASE 12582912.0f
#define INTEGER_BASE_BITS 0x4b400000

/* The row's 8 bytes of q from k on that this lane's B fragment holds; zeros for no row. */
__device__ __forceinline__ uint2 load_quants(const ProductArgs &a, uint32_t row, uint32_t k)
{
    return row < a.rows ? load_vector<uint2>(a.act.q + (size_t)row * a.w.n_in + k)
                        : make_uint2(0, 0);
}

/* Scales of one 32-block (or 256-block) of columns 2t and 2t + 1. */
__device__ __forceinline__ Pair load_pair(const float *values, const ProductArgs &a, uint32_t row,
                                          uint32_t n_blocks, uint32_t block)
{
    return {row < a.rows ? values[(size_t)row * n_blocks + block] : 0.0f,
            row + 1 < a.rows ? values[(size_t)(row + 1) * n_blocks + block] : 0.0f};
}
__device__ __forceinline__ int2 load_sums(const ProductArgs &a, uint32_t row, uint32_t n_blocks,
                                          uint32_t block)
{
    return make_int2(row < a.rows ? a.act.sum[(size_t)row * n_blocks + block] : 0,
                     row + 1 < a.rows ? a.act.sum[(size_t)(row + 1) * n_blocks + block] : 0);
}

/* acc goes on by one 32-block. acc[0], acc[1]: output 2g, columns 2t, 2t + 1; acc[2], acc[3]: 2g+1.
 */
template <Dtype T>
__device__ __forceinline__ void block32(float acc[4], const uint32_t w[4], uint2 b, Pair d, Pair m,
                                        Pair act_d, Pair act_ds, int2 sum)
{
    int c[4];
    c[0] = c[2] = INTEGER_BASE_BITS - quant_offset(T) * sum.x;
    c[1] = c[3] = INTEGER_BASE_BITS - quant_offset(T) * sum.y;
    mma_u8_s8(c, w, b.x, b.y);
    acc[0] = fmaf(__int_as_float(c[0]) - INTEGER_BASE, d.x * act_d.x, acc[0]);
    acc[1] = fmaf(__int_as_float(c[1]) - INTEGER_BASE, d.x * act_d.y, acc[1]);
    acc[2] = fmaf(__int_as_float(c[2]) - INTEGER_BASE, d.y * act_d.x, acc[2]);
    acc[3] = fmaf(__int_as_float(c[3]) - INTEGER_BASE, d.y * act_d.y, acc[3]);
    if constexpr (has_minimum(T)) {
        acc[0] = fmaf(m.x, act_ds.x, acc[0]);
        acc[1] = fmaf(m.x, act_ds.y, acc[1]);
        acc[2] = fmaf(m.y, act_ds.x, acc[2]);
        acc[3] = fmaf(m.y, act_ds.y, acc[3]);
    }
}

template <Dtype T>
__device__ __forceinline__ uint32_t load_minima(const uint8_t *record, unsigned g)
{
    if constexpr (T == DTYPE_Q4_1 || T == DTYPE_Q5_1) {
        return load_scales(reinterpret_cast<const typename RecordOf<T>::Type *>(record)->m, g);
    }
    return 0;
}

/* One span of a type of 32-blocks. panels: P pointers to the span's first record. */
template <Dtype T, int NT, int P>
__device__ __forceinline__ void span32(const ProductArgs &a, const uint8_t *const *panels,
                                       uint32_t row0, SpanRange range, float (*acc)[NT][4])
{
    constexpr int AHEAD = NT * P == 1 ? 8 : 2; /* records whose loads are under way together */
    const unsigned g = lane_index() / 4, t = lane_index() % 4;
    const uint32_t n_blocks = a.w.n_in / 32, n = range.n / 32;
    for (uint32_t i0 = 0; i0 < n; i0 += AHEAD) {
        Stored stored[AHEAD][P];
        uint32_t d[AHEAD][P], m[AHEAD][P];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
#pragma unroll
            for (int p = 0; p < P; p++) {
                if (i0 + i < n) {
                    const uint8_t *record =
                        panels[p] + (size_t)(i0 + i) * sizeof(typename RecordOf<T>::Type);
                    stored[i][p] = load_stored<T>(record, 0, g, t);
                    d[i][p] = load_scales(
                        reinterpret_cast<const typename RecordOf<T>::Type *>(record)->d, g);
                    m[i][p] = load_minima<T>(record, g);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (i0 + i >= n) {
                break;
            }
            const uint32_t k = range.k + 32 * (i0 + i), block = k / 32;
#pragma unroll
            for (int j = 0; j < NT; j++) {
                const uint32_t row = row0 + 8 * j;
                const uint2 b = load_quants(a, row + g, k + 8 * t);
                const Pair act_d = load_pair(a.act.d, a, row + 2 * t, n_blocks, block);
                Pair act_ds = {0.0f, 0.0f};
                int2 sum = make_int2(0, 0);
                if constexpr (has_minimum(T)) {
                    act_ds = load_pair(a.act.ds, a, row + 2 * t, n_blocks, block);
                } else {
                    sum = load_sums(a, row + 2 * t, n_blocks, block);
                }
#pragma unroll
                for (int p = 0; p < P; p++) {
                    uint32_t w[4];
                    unpack<T>(stored[i][p], t, w);
                    block32<T>(acc[p][j], w, b, scales_of(d[i][p]), scales_of(m[i][p]), act_d,
                               act_ds, sum);
                }
            }
        }
    }
}

/* total += scale * idot of 32-block b of a super-block. */
template <Dtype T>
__device__ __forceinline__ void block_k(int total[4], const typename RecordOf<T>::Type *r,
                                        unsigned b, const uint32_t w[4], uint2 q, int2 sum_low,
                                        int2 sum_high)
{
    const unsigned g = lane_index() / 4, t = lane_index() % 4;
    if constexpr (T == DTYPE_Q6_K) {
        /* Two scales: lanes t = 0, 1 hold the first 16 k, the others the second. */
        const int2 sums[2] = {sum_low, sum_high};
#pragma unroll
        for (unsigned half = 0; half < 2; half++) {
            const bool mine = t / 2 == half;
            int c[4];
            c[0] = c[2] = -quant_offset(T) * sums[half].x;
            c[1] = c[3] = -quant_offset(T) * sums[half].y;
            mma_u8_s8(c, w, mine ? q.x : 0, mine ? q.y : 0);
            const int first = r->sc[b][2 * g][half], second = r->sc[b][2 * g + 1][half];
            total[0] += first * c[0];
            total[1] += first * c[1];
            total[2] += second * c[2];
            total[3] += second * c[3];
        }
    } else {
        int c[4] = {0, 0, 0, 0};
        mma_u8_s8(c, w, q.x, q.y);
        const int first = r->sc[b][2 * g], second = r->sc[b][2 * g + 1];
        total[0] += first * c[0];
        total[1] += first * c[1];
        total[2] += second * c[2];
        total[3] += second * c[3];
    }
}

/* One span of a type of 256-blocks: one record. */
template <Dtype T, int NT, int P>
__device__ __forceinline__ void span256(const ProductArgs &a, const uint8_t *const *panels,
                                        uint32_t row0, SpanRange range, float (*acc)[NT][4])
{
    typedef typename RecordOf<T>::Type Record;
    constexpr int AHEAD = NT * P == 1 ? 8 : 2;
    const unsigned g = lane_index() / 4, t = lane_index() % 4;
    const uint32_t super = range.k / 256, n_sums = a.w.n_in / 16;
    int total[P][NT][4] = {}, mins[P][NT][4] = {};
    for (unsigned b0 = 0; b0 < 8; b0 += AHEAD) {
        Stored stored[AHEAD][P];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
#pragma unroll
            for (int p = 0; p < P; p++) {
                stored[i][p] = load_stored<T>(panels[p], b0 + i, g, t);
            }
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const unsigned b = b0 + i;
#pragma unroll
            for (int j = 0; j < NT; j++) {
                const uint32_t row = row0 + 8 * j;
                const uint2 q = load_quants(a, row + g, range.k + 32 * b + 8 * t);
                const int2 low = load_sums(a, row + 2 * t, n_sums, 16 * super + 2 * b);
                const int2 high = load_sums(a, row + 2 * t, n_sums, 16 * super + 2 * b + 1);
#pragma unroll
                for (int p = 0; p < P; p++) {
                    const Record *r = reinterpret_cast<const Record *>(panels[p]);
                    uint32_t w[4];
                    unpack<T>(stored[i][p], t, w);
                    block_k<T>(total[p][j], r, b, w, q, low, high);
                    if constexpr (has_minimum(T)) {
                        const int first = r->m[b / 2][2 * g][b % 2];
                        const int second = r->m[b / 2][2 * g + 1][b % 2];
                        mins[p][j][0] += first * (low.x + high.x);
                        mins[p][j][1] += first * (low.y + high.y);
                        mins[p][j][2] += second * (low.x + high.x);
                        mins[p][j][3] += second * (low.y + high.y);
                    }
                }
            }
        }
    }
#pragma unroll
    for (int p = 0; p < P; p++) {
        const Record *r = reinterpret_cast<const Record *>(panels[p]);
        const Pair d = scales_of(load_scales(r->d, g));
#pragma unroll
        for (int j = 0; j < NT; j++) {
            const Pair act_d = load_pair(a.act.d, a, row0 + 8 * j + 2 * t, a.w.n_in / 256, super);
            float *to = acc[p][j];
            to[0] = fmaf((float)total[p][j][0], d.x * act_d.x, 0.0f);
            to[1] = fmaf((float)total[p][j][1], d.x * act_d.y, 0.0f);
            to[2] = fmaf((float)total[p][j][2], d.y * act_d.x, 0.0f);
            to[3] = fmaf((float)total[p][j][3], d.y * act_d.y, 0.0f);
            if constexpr (has_minimum(T)) {
                const Pair m = scales_of(load_scales(r->dmin, g));
                to[0] = fmaf(-(float)mins[p][j][0], m.x * act_d.x, to[0]);
                to[1] = fmaf(-(float)mins[p][j][1], m.x * act_d.y, to[1]);
                to[2] = fmaf(-(float)mins[p][j][2], m.y * act_d.x, to[2]);
                to[3] = fmaf(-(float)mins[p][j][3], m.y * act_d.y, to[3]);
            }
        }
    }
}

/* Floats of one warp's buffer: [P][8 * NT rows][16 outputs]. */
template <int NT, int P> __host__ __device__ constexpr unsigned narrow_tile()
{
    return P * NT * 8 * PANEL_ROWS;
}

template <Dtype T, int NT, int P>
static __global__ void __launch_bounds__(NARROW_THREADS, 2)
    narrow_kernel(const __grid_constant__ ProductArgs a)
{
    constexpr unsigned TILE = narrow_tile<NT, P>();
    constexpr int COUNT = (TILE + NARROW_THREADS - 1) / NARROW_THREADS;
    const unsigned g = lane_index() / 4, t = lane_index() % 4;
    const uint32_t panel0 = blockIdx.x * P, row0 = blockIdx.y * 8 * NT;
    const uint32_t n_panels = (a.w.n_out + PANEL_ROWS - 1) / PANEL_ROWS;
    const uint32_t record_k = is_k_type(T) ? 256 : 32;
    SpanFold<COUNT> fold;
    uint32_t unit = 0;
    for (uint32_t span0 = 0; span0 < a.cut.n_spans; span0 += NARROW_WARPS) {
        float *buffer = dynamic_shared<float>() + (span0 / NARROW_WARPS % 2) * NARROW_WARPS * TILE;
        if (span0 + warp_index() < a.cut.n_spans) {
            const SpanRange range = span_range(a.cut, span0 + warp_index(), &unit);
            const uint8_t *panels[P];
#pragma unroll
            for (int p = 0; p < P; p++) { /* a panel too many is the last one again, unused */
                const uint32_t panel = panel0 + p < n_panels ? panel0 + p : n_panels - 1;
                panels[p] = a.w.data + panel * a.w.panel_bytes +
                            (size_t)(range.k / record_k) * sizeof(typename RecordOf<T>::Type);
            }
            float acc[P][NT][4] = {};
            if constexpr (is_k_type(T)) {
                span256<T, NT, P>(a, panels, row0, range, acc);
            } else {
                span32<T, NT, P>(a, panels, row0, range, acc);
            }
            float *mine = buffer + warp_index() * TILE;
#pragma unroll
            for (int p = 0; p < P; p++) {
#pragma unroll
                for (int j = 0; j < NT; j++) {
                    float *to = mine + ((p * NT + j) * 8 + 2 * t) * PANEL_ROWS + 2 * g;
                    store_vector(to, make_float2(acc[p][j][0], acc[p][j][2]));
                    store_vector(to + PANEL_ROWS, make_float2(acc[p][j][1], acc[p][j][3]));
                }
            }
        }
        __syncthreads();
        for (uint32_t w = 0; w < NARROW_WARPS && span0 + w < a.cut.n_spans; w++) {
            fold.add(
                a.cut,
                [&](int i) {
                    const unsigned e = threadIdx.x + i * NARROW_THREADS;
                    return e < TILE ? buffer[w * TILE + e] : 0.0f;
                },
                [&](int i, uint32_t subtree, float value) {
                    const unsigned e = threadIdx.x + i * NARROW_THREADS;
                    const unsigned row = e / PANEL_ROWS % (8 * NT);
                    const unsigned panel = panel0 + e / PANEL_ROWS / (8 * NT);
                    if (e < TILE) {
                        put_product(a, row0 + row, panel * PANEL_ROWS + e % PANEL_ROWS, subtree,
                                    value);
                    }
                });
        }
    }
}

template <Dtype T, int NT, int P>
static int start_narrow(const ProductArgs &args, WeftCudaStream stream)
{
    const dim3 grid(blocks_of(args.w.n_out, P * PANEL_ROWS), blocks_of(args.rows, 8 * NT));
    return launch(narrow_kernel<T, NT, P>, grid, NARROW_THREADS,
                  2 * NARROW_WARPS * narrow_tile<NT, P>() * sizeof(float), stream, args);
}
