/* Norms: a block a row. The row is loaded by all threads into shared memory; the 32 virtual lanes
 * of NUMERICS 4 are the 32 lanes of the first warp, each a chain of n/32; all threads write. */
#include "kernels/cuda/device.h"

enum { THREADS = 256, N_LIMIT = 16384 };

struct NormArgs {
    float *x;
    size_t x_ld;
    const uint32_t *index;
    const float *residual;
    size_t residual_ld;
    const float *weight, *bias;
    float eps;
    uint32_t n;
    float *out;
    size_t out_ld;
};

/* This block's row, with the residual added, into shared memory: [0..n); behind it lie the block's
 * two statistics. */
__device__ static float *load_row(const NormArgs &a)
{
    float *row = dynamic_shared<float>();
    const size_t at = a.index != nullptr ? a.index[blockIdx.x] : blockIdx.x;
    float *x = a.x + at * a.x_ld;
    for (uint32_t i = threadIdx.x; i < a.n; i += THREADS) {
        float v = x[i];
        if (a.residual != nullptr) {
            v += a.residual[at * a.residual_ld + i];
            x[i] = v;
        }
        row[i] = v;
    }
    __syncthreads();
    return row;
}

/* 32 lanes of squares of row - mean, folded. */
__device__ static float squares(const float *row, uint32_t n, float mean)
{
    float lane = 0.0f;
    for (uint32_t i = lane_index(); i < n; i += WARP) {
        const float d = row[i] - mean;
        lane = fmaf(d, d, lane);
    }
    return warp_fold(lane);
}

static __global__ void __launch_bounds__(THREADS) rms_norm_kernel(NormArgs a)
{
    float *row = load_row(a);
    if (warp_index() == 0) {
        const float sum = squares(row, a.n, 0.0f);
        if (lane_index() == 0) {
            row[a.n] = 1.0f / sqrtf(sum / (float)a.n + a.eps);
        }
    }
    __syncthreads();
    const float scale = row[a.n];
    for (uint32_t i = threadIdx.x; i < a.n; i += THREADS) {
        a.out[blockIdx.x * a.out_ld + i] = (row[i] * scale) * a.weight[i];
    }
}

static __global__ void __launch_bounds__(THREADS) layer_norm_kernel(NormArgs a)
{
    float *row = load_row(a);
    if (warp_index() == 0) {
        float lane = 0.0f;
        for (uint32_t i = lane_index(); i < a.n; i += WARP) {
            lane += row[i];
        }
        const float mean = warp_fold(lane) / (float)a.n;
        const float sum = squares(row, a.n, mean);
        if (lane_index() == 0) {
            row[a.n] = mean;
            row[a.n + 1] = 1.0f / sqrtf(sum / (float)a.n + a.eps);
        }
    }
    __syncthreads();
    const float mean = row[a.n], scale = row[a.n + 1];
    for (uint32_t i = threadIdx.x; i < a.n; i += THREADS) {
        a.out[blockIdx.x * a.out_ld + i] = fmaf((row[i] - mean) * scale, a.weight[i], a.bias[i]);
    }
}

static int norm(void (*kernel)(NormArgs), const NormArgs &args, uint32_t rows,
                WeftCudaStream stream)
{
    if (args.n == 0 || args.n > N_LIMIT) {
        return (int)cudaErrorInvalidValue;
    }
    return launch(kernel, dim3(rows), THREADS, (args.n + 2) * sizeof(float), stream, args);
}

extern "C" int weft_cuda_rms_norm(float *x, size_t x_ld, const uint32_t *index,
                                  const float *residual, size_t residual_ld, const float *weight,
                                  float eps, uint32_t rows, uint32_t n, float *out, size_t out_ld,
                                  WeftCudaStream stream)
{
    const NormArgs args = {x,       x_ld, index, residual, residual_ld, weight,
                           nullptr, eps,  n,     out,      out_ld};
    return norm(rms_norm_kernel, args, rows, stream);
}

extern "C" int weft_cuda_layer_norm(float *x, size_t x_ld, const uint32_t *index,
                                    const float *residual, size_t residual_ld, const float *weight,
                                    const float *bias, float eps, uint32_t rows, uint32_t n,
                                    float *out, size_t out_ld, WeftCudaStream stream)
{
    const NormArgs args = {x,    x_ld, index, residual, residual_ld, weight,
                           bias, eps,  n,     out,      out_ld};
    return norm(layer_norm_kernel, args, rows, stream);
}
