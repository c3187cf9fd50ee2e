/* Products of quantised weights with few rows (decoding): bound by the weights' stream from memory.
 *
 * A block has P panels of 16 outputs and 8 * NT rows; in each round its 8 warps take the next 8
 * spans, one each, put the spans' sums into shared memory, and all threads add them in order. The
 * two buffers take turns, so one barrier a round is enough. Matrix instructions do one row or eight
 * at the same price; integer sums inside a 32-block are exact. */
#pragma once

#include "kernels/cuda/matmul_spans.h"

enum { NARROW_THREADS = 256, NARROW_WARPS = 8 };

/* Floats of one warp's buffer: [P][8 * NT rows][16 outputs]. */
template <int NT, int P> __host__ __device__ constexpr unsigned narrow_tile()
{
    return P * NT * 8 * PANEL_ROWS;
}

/* 32-blocks whose loads are under way together: whole records of 8-bit floats. */
template <Dtype T> __host__ __device__ constexpr int narrow_ahead(int tiles)
{
    return tiles == 1 ? 8 : T == DTYPE_F8_E4M3 ? 4 : 2;
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
                panels[p] = span_records<T>(a, panel, range.k);
            }
            float acc[P][NT][4] = {};
            const DeviceSource source = {a, row0, range};
            span_product<T, NT, P, narrow_ahead<T>(NT * P)>(source, panels, range.n, acc);
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
