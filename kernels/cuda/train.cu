/* Training, but for products, attention and the loss: gradients of activations and norms, sums over
 * rows in order, and what the owner of a gradient does with it. */
#include "kernels/cuda/device.h"
extern "C" {
#include "kernels/ops/act.h"
}

enum { THREADS = 256, WARPS = 8, N_LIMIT = 8192 };

/* ---- flat arrays: one thread an element ---- */

#define FLAT_INDEX ((size_t)blockIdx.x * THREADS + threadIdx.x)
template <typename... Parameters, typename... Arguments>
static int flat(void (*kernel)(size_t, Parameters...), size_t n, WeftCudaStream stream,
                Arguments... arguments)
{
    return launch(kernel, dim3(blocks_of(n, THREADS)), THREADS, 0, stream, n, arguments...);
}

/* The logistic function of s and its slope, finite for every s. */
__device__ static void logistic(float s, float *y, float *z)
{
    const float e = exp32_inline(-(-88.0f > s ? -88.0f : s));
    *y = 1.0f / (1.0f + e);
    *z = *y * (e * *y);
}

static __global__ void gelu_backward_kernel(size_t n, const float *x, const float *dy, float *dx)
{
    const size_t i = FLAT_INDEX;
    if (i < n) {
        const float v = x[i], square = v * v;
        float y, z;
        logistic(v * fmaf(GELU_CUBE, square, GELU_LINEAR), &y, &z);
        dx[i] = dy[i] * fmaf(v * z, fmaf(GELU_CUBE3, square, GELU_LINEAR), y);
    }
}

static __global__ void swiglu_backward_kernel(size_t n, const float *gate, const float *up,
                                              const float *dy, float *dgate, float *dup)
{
    const size_t i = FLAT_INDEX;
    if (i < n) {
        const float g = gate[i], u = up[i];
        float y, z;
        logistic(g, &y, &z);
        dup[i] = dy[i] * (g * y);
        dgate[i] = (dy[i] * u) * fmaf(g, z, y);
    }
}

static __global__ void adamw_kernel(size_t n, AdamwScalars s, const float *g, float *m, float *v,
                                    float *w)
{
    const size_t i = FLAT_INDEX;
    if (i < n) {
        const float h = g[i] * s.clip;
        const float first = fmaf(s.beta1, m[i], s.rest1 * h);
        const float second = fmaf(s.beta2, v[i], (s.rest2 * h) * h);
        const float u = (first * s.correct1) / (sqrtf(second * s.correct2) + s.eps);
        m[i] = first;
        v[i] = second;
        w[i] = fmaf(-s.rate, fmaf(s.decay, w[i], u), w[i]);
    }
}

static __global__ void sgd_kernel(size_t n, SgdScalars s, const float *g, float *b, float *w)
{
    const size_t i = FLAT_INDEX;
    if (i < n) {
        const float h = fmaf(s.decay, w[i], g[i] * s.clip);
        const float moved = fmaf(s.momentum, b[i], h);
        b[i] = moved;
        w[i] = fmaf(-s.rate, s.nesterov ? fmaf(s.momentum, moved, h) : moved, w[i]);
    }
}

static __global__ void gradient_finish_kernel(size_t n, float *g, float back, float tokens)
{
    const size_t i = FLAT_INDEX;
    if (i < n) {
        g[i] = (g[i] * back) / tokens;
    }
}

extern "C" int weft_cuda_gelu_backward(const float *x, const float *dy, size_t n, float *dx,
                                       WeftCudaStream stream)
{
    return flat(gelu_backward_kernel, n, stream, x, dy, dx);
}
extern "C" int weft_cuda_swiglu_backward(const float *gate, const float *up, const float *dy,
                                         size_t n, float *dgate, float *dup, WeftCudaStream stream)
{
    return flat(swiglu_backward_kernel, n, stream, gate, up, dy, dgate, dup);
}
extern "C" int weft_cuda_adamw(const AdamwScalars *scalars, size_t n, const float *g, float *m,
                               float *v, float *w, WeftCudaStream stream)
{
    return flat(adamw_kernel, n, stream, *scalars, g, m, v, w);
}
extern "C" int weft_cuda_sgd(const SgdScalars *scalars, size_t n, const float *g, float *b,
                             float *w, WeftCudaStream stream)
{
    return flat(sgd_kernel, n, stream, *scalars, g, b, w);
}
extern "C" int weft_cuda_gradient_finish(float *g, size_t n, float back, float tokens,
                                         WeftCudaStream stream)
{
    return flat(gradient_finish_kernel, n, stream, g, back, tokens);
}

/* ---- squares of tiles: a warp a tile, its lanes those of NUMERICS 4 ---- */

static __global__ void __launch_bounds__(THREADS)
    sum_squares_kernel(const CudaTile *tiles, uint32_t n_tiles, float *out)
{
    const uint32_t index = blockIdx.x * WARPS + warp_index();
    if (index >= n_tiles) {
        return; /* a whole warp */
    }
    const CudaTile tile = tiles[index];
    float lane = 0.0f;
    uint32_t row = lane_index() / tile.columns, column = lane_index() % tile.columns;
    while (row < tile.rows) {
        const float x = tile.x[row * tile.ld + column];
        lane = fmaf(x, x, lane);
        for (column += WARP; column >= tile.columns; column -= tile.columns) {
            row++;
        }
    }
    const float sum = warp_fold(lane);
    if (lane_index() == 0) {
        out[index] = sum;
    }
}

extern "C" int weft_cuda_sum_squares(const CudaTile *tiles, uint32_t n_tiles, float *out,
                                     WeftCudaStream stream)
{
    return launch(sum_squares_kernel, dim3(blocks_of(n_tiles, WARPS)), THREADS, 0, stream, tiles,
                  n_tiles, out);
}

/* ---- norms: a block a row, lanes in the first warp ---- */

struct NormBackwardArgs {
    const float *x, *weight, *dy;
    size_t ld;
    float eps;
    uint32_t n;
    float *dx, *stats;
};

/* Shared: x, g = dy * weight (rounded), then mean, scale, c, a. */
template <bool LAYER>
static __global__ void __launch_bounds__(THREADS) norm_backward_kernel(NormBackwardArgs a)
{
    float *x = dynamic_shared<float>(), *g = x + a.n, *numbers = g + a.n;
    for (uint32_t i = threadIdx.x; i < a.n; i += THREADS) {
        x[i] = a.x[blockIdx.x * a.ld + i];
        g[i] = a.dy[blockIdx.x * a.ld + i] * a.weight[i];
    }
    __syncthreads();
    if (warp_index() == 0) {
        float mean = 0.0f, lane = 0.0f, gradients = 0.0f;
        if (LAYER) {
            for (uint32_t i = lane_index(); i < a.n; i += WARP) {
                lane += x[i];
                gradients += g[i];
            }
            mean = warp_fold(lane) / (float)a.n;
        }
        lane = 0.0f;
        for (uint32_t i = lane_index(); i < a.n; i += WARP) {
            const float d = x[i] - mean;
            lane = fmaf(d, d, lane);
        }
        const float scale = 1.0f / sqrtf(warp_fold(lane) / (float)a.n + a.eps);
        lane = 0.0f;
        for (uint32_t i = lane_index(); i < a.n; i += WARP) {
            lane = fmaf(g[i], (x[i] - mean) * scale, lane);
        }
        const float c = warp_fold(lane) / (float)a.n;
        const float shift = LAYER ? warp_fold(gradients) / (float)a.n : 0.0f;
        if (lane_index() == 0) {
            a.stats[2 * blockIdx.x] = numbers[0] = mean;
            a.stats[2 * blockIdx.x + 1] = numbers[1] = scale;
            numbers[2] = c;
            numbers[3] = shift;
        }
    }
    __syncthreads();
    const float mean = numbers[0], scale = numbers[1], c = numbers[2], shift = numbers[3];
    for (uint32_t i = threadIdx.x; i < a.n; i += THREADS) {
        float *dx = a.dx + blockIdx.x * a.ld + i;
        const float h = LAYER ? (x[i] - mean) * scale : x[i] * scale;
        *dx = fmaf(scale, fmaf(-h, c, LAYER ? g[i] - shift : g[i]), *dx);
    }
}

static int norm_backward(void (*kernel)(NormBackwardArgs), const NormBackwardArgs &args,
                         uint32_t rows, WeftCudaStream stream)
{
    if (args.n == 0 || args.n > N_LIMIT) {
        return (int)cudaErrorInvalidValue;
    }
    return launch(kernel, dim3(rows), THREADS, (2 * args.n + 4) * sizeof(float), stream, args);
}

extern "C" int weft_cuda_rms_norm_backward(const float *x, const float *weight, const float *dy,
                                           size_t ld, float eps, uint32_t rows, uint32_t n,
                                           float *dx, float *stats, WeftCudaStream stream)
{
    const NormBackwardArgs args = {x, weight, dy, ld, eps, n, dx, stats};
    return norm_backward(norm_backward_kernel<false>, args, rows, stream);
}

extern "C" int weft_cuda_layer_norm_backward(const float *x, const float *weight, const float *dy,
                                             size_t ld, float eps, uint32_t rows, uint32_t n,
                                             float *dx, float *stats, WeftCudaStream stream)
{
    const NormBackwardArgs args = {x, weight, dy, ld, eps, n, dx, stats};
    return norm_backward(norm_backward_kernel<true>, args, rows, stream);
}

/* ---- sums over rows in order: a thread a channel ---- */

static __global__ void __launch_bounds__(THREADS)
    norm_weight_backward_kernel(const float *x, const float *dy, size_t ld, const float *stats,
                                uint32_t rows, uint32_t n, float *dweight, float *dbias)
{
    const uint32_t i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) {
        return;
    }
    float weight = dweight[i], bias = dbias != nullptr ? dbias[i] : 0.0f;
#pragma unroll 4
    for (uint32_t r = 0; r < rows; r++) {
        const float d = dy[r * ld + i];
        const float h = (x[r * ld + i] - stats[2 * r]) * stats[2 * r + 1];
        weight = fmaf(d, h, weight);
        bias += d;
    }
    dweight[i] = weight;
    if (dbias != nullptr) {
        dbias[i] = bias;
    }
}

static __global__ void __launch_bounds__(THREADS)
    sum_rows_kernel(const float *dy, size_t ld, uint32_t rows, uint32_t n, float *out)
{
    const uint32_t i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) {
        return;
    }
    float sum = out[i];
#pragma unroll 8
    for (uint32_t r = 0; r < rows; r++) {
        sum += dy[r * ld + i];
    }
    out[i] = sum;
}

extern "C" int weft_cuda_norm_weight_backward(const float *x, const float *dy, size_t ld,
                                              const float *stats, uint32_t rows, uint32_t n,
                                              float *dweight, float *dbias, WeftCudaStream stream)
{
    return launch(norm_weight_backward_kernel, dim3(blocks_of(n, THREADS)), THREADS, 0, stream, x,
                  dy, ld, stats, rows, n, dweight, dbias);
}

extern "C" int weft_cuda_sum_rows(const float *dy, size_t ld, uint32_t rows, uint32_t n, float *out,
                                  WeftCudaStream stream)
{
    return launch(sum_rows_kernel, dim3(blocks_of(n, THREADS)), THREADS, 0, stream, dy, ld, rows, n,
                  out);
}
