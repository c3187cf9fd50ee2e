/* One span of quantised weights times a tile of rows, by one warp: what the products with few rows
 * (matmul_narrow.h) and with many (matmul_wide.h) share. Where the activations come from is a
 * Source: device memory or shared memory. */
#pragma once

#include "kernels/cuda/fragments.h"
#include "kernels/cuda/matmul.h"
#include "kernels/cuda/ptx.h"

/* 1.5 * 2^23: an integer below 2^22 added to these bits is that number added to this float, which
 * turns an accumulator into a float by one subtraction. */
#define INTEGER_BASE 12582912.0f
#define INTEGER_BASE_BITS 0x4b400000

/* Activations of a span in device memory. Of tile j a lane needs column 8j + g of the quants and
 * columns 8j + 2t, + 1 of the numbers; k and block count from the span's beginning; a column that
 * is no row gives zeros. */
struct DeviceSource {
    const ProductArgs &a;
    uint32_t row0;
    SpanRange range;

    __device__ __forceinline__ uint2 quants(int j, uint32_t k) const
    {
        const uint32_t row = row0 + 8 * j + lane_index() / 4;
        return row < a.rows ? load_vector<uint2>(a.act.q + (size_t)row * a.w.n_in + range.k + k)
                            : make_uint2(0, 0);
    }
    template <typename T>
    __device__ __forceinline__ T number(const T *values, int j, uint32_t column, uint32_t length,
                                        uint32_t index) const
    {
        const uint32_t row = row0 + 8 * j + lane_index() % 4 * 2 + column;
        return row < a.rows ? values[(size_t)row * (a.w.n_in / length) + range.k / length + index]
                            : (T)0;
    }
    __device__ __forceinline__ Pair scale(int j, uint32_t length, uint32_t block) const
    {
        return {number(a.act.d, j, 0, length, block), number(a.act.d, j, 1, length, block)};
    }
    /* F8_E4M3: eight f16 of column 8j + g, and the rows' scales. */
    __device__ __forceinline__ uint4 halves(const uint16_t *x, int j, uint32_t k) const
    {
        const uint32_t row = row0 + 8 * j + lane_index() / 4;
        return row < a.rows ? load_vector<uint4>(x + (size_t)row * a.act_ld + range.k + k)
                            : make_uint4(0, 0, 0, 0);
    }
    __device__ __forceinline__ Pair row_scale(int j) const
    {
        const uint32_t row = row0 + 8 * j + lane_index() % 4 * 2;
        return {row < a.rows ? a.act.d[row] : 0.0f, row + 1 < a.rows ? a.act.d[row + 1] : 0.0f};
    }
    __device__ __forceinline__ Pair scaled_sum(int j, uint32_t block) const
    {
        return {number(a.act.ds, j, 0, 32, block), number(a.act.ds, j, 1, 32, block)};
    }
    __device__ __forceinline__ int2 sum(int j, uint32_t length, uint32_t index) const
    {
        return make_int2(number(a.act.sum, j, 0, length, index),
                         number(a.act.sum, j, 1, length, index));
    }
};

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

/* One span of n 32-blocks. panels: P pointers to the span's first record. AHEAD: records whose
 * loads are under way together. */
template <Dtype T, int NT, int P, int AHEAD, typename Source>
__device__ __forceinline__ void span32(const Source &source, const uint8_t *const *panels,
                                       uint32_t n, float (*acc)[NT][4])
{
    const unsigned g = lane_index() / 4, t = lane_index() % 4;
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
            const uint32_t block = i0 + i;
#pragma unroll
            for (int j = 0; j < NT; j++) {
                const uint2 b = source.quants(j, 32 * block + 8 * t);
                const Pair act_d = source.scale(j, 32, block);
                Pair act_ds = {0.0f, 0.0f};
                int2 sum = make_int2(0, 0);
                if constexpr (has_minimum(T)) {
                    act_ds = source.scaled_sum(j, block);
                } else {
                    sum = source.sum(j, 32, block);
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
template <Dtype T, int NT, int P, int AHEAD, typename Source>
__device__ __forceinline__ void span256(const Source &source, const uint8_t *const *panels,
                                        float (*acc)[NT][4])
{
    typedef typename RecordOf<T>::Type Record;
    const unsigned g = lane_index() / 4, t = lane_index() % 4;
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
                const uint2 q = source.quants(j, 32 * b + 8 * t);
                const int2 low = source.sum(j, 16, 2 * b), high = source.sum(j, 16, 2 * b + 1);
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
            const Pair act_d = source.scale(j, 256, 0);
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

/* One record of 8-bit floats, `block` its first 32-block in the span. Products with the high and
 * with the low f16 of each activation, summed apart, k ascending; then
 * acc = fmaf(scale, (high + low) * row scale, acc). */
template <int NT, int P>
__device__ __forceinline__ void record_f8(const DeviceSource &source, const StoredF8 (*stored)[P],
                                          const float2 scales[P], uint32_t block,
                                          float (*acc)[NT][4])
{
    const unsigned t = lane_index() % 4;
    float high[P][NT][4] = {}, low[P][NT][4] = {};
#pragma unroll
    for (unsigned i = 0; i < 4; i++) {
        uint32_t w[P][2][4];
#pragma unroll
        for (int p = 0; p < P; p++) {
            widen_f8(stored[i][p], w[p]);
        }
#pragma unroll
        for (int j = 0; j < NT; j++) {
            const uint4 h = source.halves(source.a.act.high, j, 32 * (block + i) + 8 * t);
            const uint4 l = source.halves(source.a.act.low, j, 32 * (block + i) + 8 * t);
#pragma unroll
            for (int p = 0; p < P; p++) {
                const uint32_t first[4] = {w[p][0][0], w[p][1][0], w[p][0][1], w[p][1][1]};
                const uint32_t second[4] = {w[p][0][2], w[p][1][2], w[p][0][3], w[p][1][3]};
                mma_f16(high[p][j], first, h.x, h.y);
                mma_f16(high[p][j], second, h.z, h.w);
                mma_f16(low[p][j], first, l.x, l.y);
                mma_f16(low[p][j], second, l.z, l.w);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < NT; j++) {
        const Pair row = source.row_scale(j);
#pragma unroll
        for (int p = 0; p < P; p++) {
            float *to = acc[p][j];
            const float *h = high[p][j], *l = low[p][j];
            to[0] = fmaf(scales[p].x, (h[0] + l[0]) * row.x, to[0]);
            to[1] = fmaf(scales[p].x, (h[1] + l[1]) * row.y, to[1]);
            to[2] = fmaf(scales[p].y, (h[2] + l[2]) * row.x, to[2]);
            to[3] = fmaf(scales[p].y, (h[3] + l[3]) * row.y, to[3]);
        }
    }
}

/* One span of n 32-blocks of 8-bit floats: one record or two. */
template <int NT, int P, int AHEAD>
__device__ __forceinline__ void span_f8(const DeviceSource &source, const uint8_t *const *panels,
                                        uint32_t n, float (*acc)[NT][4])
{
    static_assert(AHEAD % 4 == 0, "whole records");
    const unsigned g = lane_index() / 4, t = lane_index() % 4;
    for (uint32_t i0 = 0; i0 < n; i0 += AHEAD) {
        StoredF8 stored[AHEAD][P];
        float2 scales[AHEAD / 4][P] = {};
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
#pragma unroll
            for (int p = 0; p < P; p++) {
                const RecordF8 *r = reinterpret_cast<const RecordF8 *>(panels[p]) + (i0 + i) / 4;
                if (i0 + i < n) {
                    stored[i][p] = load_f8<F8_LINES>(r, i % 4, g, t);
                    if (i % 4 == 0) {
                        scales[i / 4][p] = load_vector<float2>(r->scale + 2 * g);
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i += 4) {
            if (i0 + i < n) {
                record_f8<NT, P>(source, stored + i, scales[i / 4], i0 + i, acc);
            }
        }
    }
}

template <Dtype T, int NT, int P, int AHEAD, typename Source>
__device__ __forceinline__ void span_product(const Source &source, const uint8_t *const *panels,
                                             uint32_t n, float (*acc)[NT][4])
{
    if constexpr (T == DTYPE_F8_E4M3) {
        span_f8<NT, P, AHEAD>(source, panels, n / 32, acc);
    } else if constexpr (is_k_type(T)) {
        span256<T, NT, P, AHEAD>(source, panels, acc);
    } else {
        span32<T, NT, P, AHEAD>(source, panels, n / 32, acc);
    }
}

/* Where a panel's records of a span begin. */
template <Dtype T>
__device__ __forceinline__ const uint8_t *span_records(const ProductArgs &a, uint32_t panel,
                                                       uint32_t k)
{
    return a.w.data + panel * a.w.panel_bytes +
           (size_t)(k / (32 * record_blocks(T))) * sizeof(typename RecordOf<T>::Type);
}
