/* Rows by number, dropout, and operands of 16-bit products. Bound by memory; neighbours adjacent.
 */
#include "kernels/cuda/device.h"
extern "C" {
#include "kernels/ops/dropout.h"
}
#include "kernels/cuda/philox.h"

enum { THREADS = 256 };

/* ---- the embedding and its gradient ---- */

struct GatherArgs {
    const float *table;
    const uint32_t *index;
    uint32_t first, n, width;
    bool accumulate;
    float *out;
};

/* A block a row. */
static __global__ void __launch_bounds__(THREADS) gather_kernel(GatherArgs a)
{
    const uint32_t id = a.index[blockIdx.x], row = id - a.first;
    const bool there = id >= a.first && row < a.n;
    const float *from = a.table + (size_t)row * a.width;
    float *out = a.out + (size_t)blockIdx.x * a.width;
    if (!there && a.accumulate) {
        return;
    }
    for (uint32_t i = threadIdx.x; i < a.width; i += THREADS) {
        const float x = there ? from[i] : 0.0f;
        out[i] = a.accumulate ? out[i] + x : x;
    }
}

extern "C" int weft_cuda_gather(const float *table, const uint32_t *index, uint32_t first,
                                uint32_t n, uint32_t rows, uint32_t width, bool accumulate,
                                float *out, WeftCudaStream stream)
{
    const GatherArgs args = {table, index, first, n, width, accumulate, out};
    return launch(gather_kernel, dim3(rows), THREADS, 0, stream, args);
}

/* A block an id and 256 channels; a thread a channel, rows in order. */
static __global__ void __launch_bounds__(THREADS)
    scatter_kernel(const float *dy, const uint32_t *ids, const uint32_t *starts,
                   const uint32_t *order, uint32_t width, float *out)
{
    const uint32_t i = blockIdx.y * THREADS + threadIdx.x;
    if (i >= width) {
        return;
    }
    float *to = out + (size_t)ids[blockIdx.x] * width + i;
    float sum = *to;
    for (uint32_t at = starts[blockIdx.x]; at < starts[blockIdx.x + 1]; at++) {
        sum += dy[(size_t)order[at] * width + i];
    }
    *to = sum;
}

extern "C" int weft_cuda_scatter(const float *dy, const uint32_t *ids, const uint32_t *starts,
                                 const uint32_t *order, uint32_t n_ids, uint32_t width, float *out,
                                 WeftCudaStream stream)
{
    return launch(scatter_kernel, dim3(n_ids, blocks_of(width, THREADS)), THREADS, 0, stream, dy,
                  ids, starts, order, width, out);
}

/* ---- residual and dropout: a block a row, a thread four channels, which one block of Philox
 * decides ---- */

static __global__ void __launch_bounds__(THREADS)
    dropout_kernel(const __grid_constant__ CudaDropout a, uint64_t dropped, float factor)
{
    const uint32_t row = blockIdx.x;
    const uint64_t sample = a.first_sample + row / a.length;
    const uint32_t key[2] = {(uint32_t)a.dropout.seed, (uint32_t)(a.dropout.seed >> 32)};
    for (uint32_t block = threadIdx.x; 4 * block < a.width; block += THREADS) {
        const uint32_t counter[4] = {block, a.site << 20 | row % a.length, (uint32_t)sample,
                                     (uint32_t)(sample >> 32)};
        uint32_t words[4] = {};
        if (a.dropout.rate > 0.0f) {
            philox(counter, key, words);
        }
        for (uint32_t i = 0; i < 4 && 4 * block + i < a.width; i++) {
            const size_t at = (size_t)row * a.width + 4 * block + i;
            float x = a.x[at];
            if (a.bias != nullptr) {
                x += a.bias[4 * block + i];
            }
            if (a.dropout.rate > 0.0f) {
                x = words[i] < dropped ? 0.0f : x * factor;
            }
            a.out[at] = a.residual != nullptr ? x + a.residual[at] : x;
        }
    }
}

extern "C" int weft_cuda_dropout(const CudaDropout *args, WeftCudaStream stream)
{
    return launch(dropout_kernel, dim3(args->rows), THREADS, 0, stream, *args,
                  dropout_limit(&args->dropout), 1.0f / (1.0f - args->dropout.rate));
}

/* ---- operands ---- */

template <bool BF16>
static __global__ void __launch_bounds__(THREADS)
    round_kernel(const float *x, size_t ld, uint32_t n, uint16_t *out, size_t out_ld)
{
    const size_t row = blockIdx.x;
    for (size_t i = blockIdx.y * THREADS + threadIdx.x; i < out_ld; i += gridDim.y * THREADS) {
        const float v = i < n ? x[row * ld + i] : 0.0f;
        out[row * out_ld + i] = BF16 ? bf16_of_f32(v) : f16_of_f32(v);
    }
}

extern "C" int weft_cuda_round(const float *x, size_t ld, uint32_t rows, uint32_t n, Dtype to,
                               void *out, size_t out_ld, WeftCudaStream stream)
{
    if (to != DTYPE_BF16 && to != DTYPE_F16) {
        return (int)cudaErrorInvalidValue;
    }
    const unsigned columns = blocks_of(out_ld, 4 * THREADS);
    return launch(to == DTYPE_BF16 ? round_kernel<true> : round_kernel<false>,
                  dim3(rows, columns < 65535 ? columns : 65535), THREADS, 0, stream, x, ld, n,
                  static_cast<uint16_t *>(out), out_ld);
}
