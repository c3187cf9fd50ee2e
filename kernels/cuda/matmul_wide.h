/* Products of quantised weights with many rows (prompts, large batches): bound by arithmetic.
 *
 * A block has 8 panels, a warp each, and 64 rows. A span's activations lie in shared memory, read
 * by all warps; the next span's are copied meanwhile (two buffers). Weights go from device memory
 * straight into fragments: a warp's panel is nobody else's. The sums and their order are those of
 * matmul_narrow.h, so the bits are, too. */
#pragma once

#include "kernels/cuda/matmul_spans.h"

enum {
    WIDE_THREADS = 256,
    WIDE_PANELS = 8,
    WIDE_TILES = 8,
    WIDE_ROWS = 8 * WIDE_TILES,
    WIDE_STRIDE = SPAN + 32, /* bytes of a row of quants: 8 rows x 4 lanes meet all banks */
};

/* Numbers of a span beside its quants, by row: scales, then sums (or scaled sums). */
template <Dtype T> __host__ __device__ constexpr unsigned wide_scales()
{
    return is_k_type(T) ? 1 : 8;
}
template <Dtype T> __host__ __device__ constexpr unsigned wide_numbers()
{
    return wide_scales<T>() + (is_k_type(T) ? 16 : 8);
}
template <Dtype T> __host__ __device__ constexpr unsigned wide_buffer_bytes()
{
    return WIDE_ROWS * WIDE_STRIDE + wide_numbers<T>() * WIDE_ROWS * 4;
}

/* The span's activations in shared memory: quants [row][WIDE_STRIDE], numbers [number][row]. */
template <Dtype T> struct SharedSource {
    const uint8_t *quants_at;
    const uint32_t *numbers_at;

    __device__ __forceinline__ uint2 quants(int j, uint32_t k) const
    {
        return load_vector<uint2>(quants_at + (8 * j + lane_index() / 4) * WIDE_STRIDE + k);
    }
    __device__ __forceinline__ uint2 numbers(int j, uint32_t number) const
    {
        return load_vector<uint2>(numbers_at + number * WIDE_ROWS + 8 * j + lane_index() % 4 * 2);
    }
    __device__ __forceinline__ Pair scale(int j, uint32_t, uint32_t block) const
    {
        const uint2 bits = numbers(j, block);
        return {float_of_bits(bits.x), float_of_bits(bits.y)};
    }
    __device__ __forceinline__ Pair scaled_sum(int j, uint32_t block) const
    {
        const uint2 bits = numbers(j, wide_scales<T>() + block);
        return {float_of_bits(bits.x), float_of_bits(bits.y)};
    }
    __device__ __forceinline__ int2 sum(int j, uint32_t, uint32_t index) const
    {
        const uint2 bits = numbers(j, wide_scales<T>() + index);
        return make_int2((int)bits.x, (int)bits.y);
    }
};

/* Starts copying the quants of a span; what is no row or beyond the span becomes zero. */
__device__ __forceinline__ void copy_quants(const ProductArgs &a, uint32_t row0, SpanRange range,
                                            uint8_t *to)
{
    for (uint32_t e = threadIdx.x; e < WIDE_ROWS * (SPAN / 16); e += WIDE_THREADS) {
        const uint32_t row = e / (SPAN / 16), k = e % (SPAN / 16) * 16;
        const bool there = row0 + row < a.rows && k < range.n;
        const int8_t *from = a.act.q + (there ? (size_t)(row0 + row) * a.w.n_in + range.k + k : 0);
        copy_to_shared(to + row * WIDE_STRIDE + k, from, there);
    }
}

template <Dtype T>
__device__ __forceinline__ void load_numbers(const ProductArgs &a, uint32_t row0, SpanRange range,
                                             uint32_t *to)
{
    constexpr uint32_t block = is_k_type(T) ? 256 : 32, part = is_k_type(T) ? 16 : 32;
    constexpr uint32_t scales = wide_scales<T>();
    const uint32_t *second = has_minimum(T) && !is_k_type(T)
                                 ? reinterpret_cast<const uint32_t *>(a.act.ds)
                                 : reinterpret_cast<const uint32_t *>(a.act.sum);
    for (uint32_t e = threadIdx.x; e < wide_numbers<T>() * WIDE_ROWS; e += WIDE_THREADS) {
        const uint32_t number = e / WIDE_ROWS, row = row0 + e % WIDE_ROWS;
        const uint32_t length = number < scales ? block : part;
        const uint32_t index = number < scales ? number : number - scales;
        const uint32_t *from =
            number < scales ? reinterpret_cast<const uint32_t *>(a.act.d) : second;
        const bool there = row < a.rows && index * length < range.n;
        to[e] = there ? from[(size_t)row * (a.w.n_in / length) + range.k / length + index] : 0;
    }
}

template <Dtype T>
static __global__ void __launch_bounds__(WIDE_THREADS)
    wide_kernel(const __grid_constant__ ProductArgs a)
{
    const unsigned g = lane_index() / 4, t = lane_index() % 4;
    const uint32_t panel = blockIdx.x * WIDE_PANELS + warp_index(), row0 = blockIdx.y * WIDE_ROWS;
    const bool mine = panel * PANEL_ROWS < a.w.n_out;
    SpanFold<4 * WIDE_TILES> fold;
    uint32_t unit = 0;
    SpanRange next = span_range(a.cut, 0, &unit);
    copy_quants(a, row0, next, dynamic_shared<uint8_t>());
    commit_copies();
    for (uint32_t span = 0; span < a.cut.n_spans; span++) {
        uint8_t *quants = dynamic_shared<uint8_t>(span % 2 * wide_buffer_bytes<T>());
        uint32_t *numbers = reinterpret_cast<uint32_t *>(quants + WIDE_ROWS * WIDE_STRIDE);
        const SpanRange range = next;
        load_numbers<T>(a, row0, range, numbers);
        if (span + 1 < a.cut.n_spans) {
            next = span_range(a.cut, span + 1, &unit);
            copy_quants(a, row0, next,
                        dynamic_shared<uint8_t>((span + 1) % 2 * wide_buffer_bytes<T>()));
        }
        commit_copies();
        wait_copies<1>();
        __syncthreads();
        if (mine) {
            const SharedSource<T> source = {quants, numbers};
            const uint8_t *const panels[1] = {span_records<T>(a, panel, range.k)};
            float acc[1][WIDE_TILES][4] = {};
            span_product<T, WIDE_TILES, 1, 2>(source, panels, range.n, acc);
            fold.add(
                a.cut, [&](int i) { return acc[0][i / 4][i % 4]; },
                [&](int i, uint32_t subtree, float value) {
                    put_product(a, row0 + i / 4 * 8 + 2 * t + i % 2,
                                panel * PANEL_ROWS + 2 * g + i % 4 / 2, subtree, value);
                });
        }
        __syncthreads(); /* before this buffer is filled again */
    }
}

template <Dtype T> static int start_wide(const ProductArgs &args, WeftCudaStream stream)
{
    const dim3 grid(blocks_of(args.w.n_out, WIDE_PANELS * PANEL_ROWS),
                    blocks_of(args.rows, WIDE_ROWS));
    return launch(wide_kernel<T>, grid, WIDE_THREADS, 2 * wide_buffer_bytes<T>(), stream, args);
}
