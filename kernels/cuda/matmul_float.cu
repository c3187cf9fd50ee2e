/* Products of float weights out of their panels: matrix instructions for F16 and BF16, fma for F32.
 * The layout of matmul_narrow.h: 8 warps take a span each, all threads add the spans in order.
 *
 * BF16: both operands bf16, products exact, f32 sums in the hardware's order inside 16 k, k
 * ascending. F16: x is two f16 of a common power of two (quantise.cu), so its products are those
 * of 22 bits; the low halves' sum is added once a span. F32: two chains a span, of even and odd k,
 * then their sum. */
#include "kernels/cuda/matmul.h"
#include "kernels/cuda/ptx.h"

enum { THREADS = 256, WARPS = 8, TILE = 8 * PANEL_ROWS };

/* Two adjacent 16-bit elements of row `row`, and the two behind them; zeros for no row. */
__device__ __forceinline__ uint2 load_four(const uint16_t *x, const ProductArgs &a, uint32_t row,
                                           uint32_t k)
{
    return row < a.rows ? load_vector<uint2>(x + (size_t)row * a.act_ld + k) : make_uint2(0, 0);
}

/* Lane (g, t) has k 4t..4t+3 of each 16: pairs 4t/2 and 4t/2 + 1 of outputs 2g and 2g + 1. */
__device__ static void span_bf16(const ProductArgs &a, const uint8_t *panel, uint32_t row0,
                                 SpanRange range, float acc[4])
{
    const unsigned g = lane_index() / 4, t = lane_index() % 4;
    const RecordBF16 *records = reinterpret_cast<const RecordBF16 *>(panel);
    const uint32_t end = (range.k + range.n + 1) / 2;
#pragma unroll 4
    for (uint32_t k = range.k; k < range.k + range.n; k += 16) {
        const uint32_t pair = k / 2 + 2 * t;
        const uint2 zero = make_uint2(0, 0);
        const uint2 w0 = pair < end ? load_vector<uint2>(records[pair].w[2 * g]) : zero;
        const uint2 w1 = pair + 1 < end ? load_vector<uint2>(records[pair + 1].w[2 * g]) : zero;
        const uint2 b = load_four(a.act.bf16, a, row0 + g, k + 4 * t);
        const uint32_t w[4] = {w0.x, w0.y, w1.x, w1.y};
        mma_bf16(acc, w, b.x, b.y);
    }
}

__device__ static void span_f16(const ProductArgs &a, const uint8_t *panel, uint32_t row0,
                                SpanRange range, float acc[4])
{
    const unsigned g = lane_index() / 4, t = lane_index() % 4;
    const RecordF16 *records = reinterpret_cast<const RecordF16 *>(panel);
    float low[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
    for (uint32_t k = range.k; k < range.k + range.n; k += 16) {
        uint32_t both[4]; /* outputs 2g (low half) and 2g + 1 of k 4t + i */
#pragma unroll
        for (unsigned i = 0; i < 4; i++) {
            const uint32_t at = k + 4 * t + i;
            both[i] = at < range.k + range.n
                          ? *reinterpret_cast<const uint32_t *>(records[at].w + 2 * g)
                          : 0;
        }
        const uint32_t w[4] = {
            __byte_perm(both[0], both[1], 0x5410), __byte_perm(both[0], both[1], 0x7632),
            __byte_perm(both[2], both[3], 0x5410), __byte_perm(both[2], both[3], 0x7632)};
        const uint2 high = load_four(a.act.high, a, row0 + g, k + 4 * t);
        const uint2 rest = load_four(a.act.low, a, row0 + g, k + 4 * t);
        mma_f16(acc, w, high.x, high.y);
        mma_f16(low, w, rest.x, rest.y);
    }
    const uint32_t row = row0 + 2 * t;
    const float s0 = row < a.rows ? a.act.d[row] : 0.0f;
    const float s1 = row + 1 < a.rows ? a.act.d[row + 1] : 0.0f;
    acc[0] = (acc[0] + low[0]) * s0;
    acc[1] = (acc[1] + low[1]) * s1;
    acc[2] = (acc[2] + low[2]) * s0;
    acc[3] = (acc[3] + low[3]) * s1;
}

/* Lane l: output l % 16, k of the parity l / 16, all 8 rows. */
__device__ static void span_f32(const ProductArgs &a, const uint8_t *panel, uint32_t row0,
                                SpanRange range, float *tile)
{
    const unsigned output = lane_index() % 16, parity = lane_index() / 16;
    const RecordF32 *records = reinterpret_cast<const RecordF32 *>(panel);
    float acc[8] = {};
#pragma unroll 2
    for (uint32_t i = parity; i < range.n; i += 2) {
        const float w = records[range.k + i].w[output];
#pragma unroll
        for (unsigned r = 0; r < 8; r++) {
            if (row0 + r < a.rows) {
                acc[r] = fmaf(w, a.x[(row0 + r) * a.x_ld + range.k + i], acc[r]);
            }
        }
    }
#pragma unroll
    for (unsigned r = 0; r < 8; r++) {
        const float other = __shfl_xor_sync(ALL_LANES, acc[r], 16);
        if (parity == 0) {
            tile[r * PANEL_ROWS + output] = acc[r] + other;
        }
    }
}

template <Dtype T>
static __global__ void __launch_bounds__(THREADS)
    float_kernel(const __grid_constant__ ProductArgs a)
{
    const unsigned g = lane_index() / 4, t = lane_index() % 4;
    const uint32_t row0 = blockIdx.y * 8;
    const uint8_t *panel = a.w.data + blockIdx.x * a.w.panel_bytes;
    SpanFold<1> fold;
    uint32_t unit = 0;
    for (uint32_t span0 = 0; span0 < a.cut.n_spans; span0 += WARPS) {
        float *buffer = dynamic_shared<float>() + (span0 / WARPS % 2) * WARPS * TILE;
        if (span0 + warp_index() < a.cut.n_spans) {
            const SpanRange range = span_range(a.cut, span0 + warp_index(), &unit);
            float *mine = buffer + warp_index() * TILE;
            if constexpr (T == DTYPE_F32) {
                span_f32(a, panel, row0, range, mine);
            } else {
                float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                if constexpr (T == DTYPE_BF16) {
                    span_bf16(a, panel, row0, range, acc);
                } else {
                    span_f16(a, panel, row0, range, acc);
                }
                float *to = mine + 2 * t * PANEL_ROWS + 2 * g;
                store_vector(to, make_float2(acc[0], acc[2]));
                store_vector(to + PANEL_ROWS, make_float2(acc[1], acc[3]));
            }
        }
        __syncthreads();
        for (uint32_t w = 0; w < WARPS && span0 + w < a.cut.n_spans; w++) {
            const unsigned e = threadIdx.x;
            fold.add(
                a.cut, [&](int) { return e < TILE ? buffer[w * TILE + e] : 0.0f; },
                [&](int, uint32_t subtree, float value) {
                    if (e < TILE) {
                        put_product(a, row0 + e / PANEL_ROWS,
                                    blockIdx.x * PANEL_ROWS + e % PANEL_ROWS, subtree, value);
                    }
                });
        }
    }
}

template <Dtype T> static int start(const ProductArgs &args, WeftCudaStream stream)
{
    return launch(float_kernel<T>,
                  dim3(blocks_of(args.w.n_out, PANEL_ROWS), blocks_of(args.rows, 8)), THREADS,
                  2 * WARPS * TILE * sizeof(float), stream, args);
}

int product_float(const ProductArgs &args, WeftCudaStream stream)
{
    return args.w.type == DTYPE_F32   ? start<DTYPE_F32>(args, stream)
           : args.w.type == DTYPE_F16 ? start<DTYPE_F16>(args, stream)
                                      : start<DTYPE_BF16>(args, stream);
}
