/* Element by element: residual, bias, activations and their gradients, optimizer steps. One thread
 * an element, neighbours adjacent; bound by memory. */
#include "kernels/cuda/device.h"
extern "C" {
#include "kernels/ops/act.h"
}

enum { THREADS = 256 };

/* Element (row, column) of this thread; the grid covers columns in x, rows in y and what y cannot
 * hold in z. */
#define ROW_OF_GRID (blockIdx.z * gridDim.y + blockIdx.y)
#define COLUMN_OF_GRID (blockIdx.x * THREADS + threadIdx.x)

static dim3 grid_of(uint32_t rows, uint32_t n)
{
    const unsigned y = rows < 32768 ? rows : 32768;
    return dim3(blocks_of(n, THREADS), y, y == 0 ? 0 : blocks_of(rows, y));
}

static __global__ void add_kernel(float *x, size_t x_ld, const float *y, size_t y_ld, uint32_t rows,
                                  uint32_t n)
{
    const size_t row = ROW_OF_GRID, i = COLUMN_OF_GRID;
    if (row < rows && i < n) {
        x[row * x_ld + i] += y[row * y_ld + i];
    }
}

static __global__ void swiglu_kernel(const float *gate, size_t gate_ld, const float *up,
                                     size_t up_ld, uint32_t rows, uint32_t n, float *out,
                                     size_t out_ld)
{
    const size_t row = ROW_OF_GRID, i = COLUMN_OF_GRID;
    if (row < rows && i < n) {
        const float g = gate[row * gate_ld + i];
        out[row * out_ld + i] = (g / (1.0f + exp32_inline(-g))) * up[row * up_ld + i];
    }
}

static __global__ void gelu_kernel(const float *x, size_t x_ld, const float *bias, uint32_t rows,
                                   uint32_t n, float *out, size_t out_ld)
{
    const size_t row = ROW_OF_GRID, i = COLUMN_OF_GRID;
    if (row < rows && i < n) {
        const float v = bias != nullptr ? x[row * x_ld + i] + bias[i] : x[row * x_ld + i];
        const float s = v * fmaf(GELU_CUBE, v * v, GELU_LINEAR);
        out[row * out_ld + i] = v / (1.0f + exp32_inline(-s));
    }
}

extern "C" int weft_cuda_add(float *x, size_t x_ld, const float *y, size_t y_ld, uint32_t rows,
                             uint32_t n, WeftCudaStream stream)
{
    return launch(add_kernel, grid_of(rows, n), THREADS, 0, stream, x, x_ld, y, y_ld, rows, n);
}

extern "C" int weft_cuda_add_bias(float *x, size_t ld, const float *bias, uint32_t rows, uint32_t n,
                                  WeftCudaStream stream)
{
    return launch(add_kernel, grid_of(rows, n), THREADS, 0, stream, x, ld, bias, (size_t)0, rows,
                  n);
}

extern "C" int weft_cuda_swiglu(const float *gate, size_t gate_ld, const float *up, size_t up_ld,
                                uint32_t rows, uint32_t n, float *out, size_t out_ld,
                                WeftCudaStream stream)
{
    return launch(swiglu_kernel, grid_of(rows, n), THREADS, 0, stream, gate, gate_ld, up, up_ld,
                  rows, n, out, out_ld);
}

extern "C" int weft_cuda_gelu(const float *x, size_t x_ld, const float *bias, uint32_t rows,
                              uint32_t n, float *out, size_t out_ld, WeftCudaStream stream)
{
    return launch(gelu_kernel, grid_of(rows, n), THREADS, 0, stream, x, x_ld, bias, rows, n, out,
                  out_ld);
}
