/* Activations as the weights' products want them, from f32 rows. The numbers are those of
 * kernels/generic/quant.c; the layout is this room's own (activations.h). */
#include "kernels/cuda/activations.h"
#include "kernels/cuda/fragments.h"

enum { THREADS = 256, WARPS = THREADS / 32 };

struct QuantiseArgs {
    const float *x;
    size_t ld;
    uint32_t rows, n_in;
    Activations act;
};

__device__ static int warp_sum(int value, unsigned lanes)
{
    for (unsigned other = 1; other < lanes; other *= 2) {
        value += __shfl_xor_sync(ALL_LANES, value, other);
    }
    return value;
}

/* One warp a block of 32 * STEPS elements; lane l has elements l, l + 32, ... */
template <unsigned STEPS>
static __global__ void __launch_bounds__(THREADS) quantise_kernel(QuantiseArgs a)
{
    const uint32_t n_blocks = a.n_in / (32 * STEPS);
    const size_t item = (size_t)blockIdx.x * WARPS + warp_index();
    if (item >= (size_t)a.rows * n_blocks) {
        return; /* a whole warp */
    }
    const size_t row = item / n_blocks, block = item % n_blocks;
    const float *x = a.x + row * a.ld + block * 32 * STEPS;
    float v[STEPS], most = 0.0f;
    bool finite = true;
    for (unsigned i = 0; i < STEPS; i++) {
        v[i] = x[32 * i + lane_index()];
        const float magnitude = fabsf(v[i]);
        finite = finite && magnitude < INFINITY;
        most = magnitude > most ? magnitude : most;
    }
    finite = __ballot_sync(ALL_LANES, !finite) == 0;
    most = warp_max(most);
    const float d = finite ? most / 127.0f : NAN;
    const float inverse = finite && most >= ACT_AMAX_MIN ? 127.0f / most : 0.0f;
    int8_t *q = a.act.q + row * a.n_in + block * 32 * STEPS;
    for (unsigned i = 0; i < STEPS; i++) {
        const int quant = inverse != 0.0f ? (int)rintf(v[i] * inverse) : 0;
        q[32 * i + lane_index()] = (int8_t)quant;
        const int sum = warp_sum(quant, STEPS == 1 ? 32 : 16);
        if (STEPS == 1 && lane_index() == 0) {
            a.act.sum[item] = sum;
            a.act.ds[item] = d * (float)sum;
        }
        if (STEPS != 1 && lane_index() % 16 == 0) {
            a.act.sum[item * 16 + 2 * i + lane_index() / 16] = sum;
        }
    }
    if (lane_index() == 0) {
        a.act.d[item] = d;
    }
}

static __global__ void __launch_bounds__(THREADS) round_bf16_kernel(QuantiseArgs a, size_t ld)
{
    const uint32_t k = blockIdx.x * THREADS + threadIdx.x;
    if (k < ld) {
        const float v = k < a.n_in ? a.x[blockIdx.y * a.ld + k] : 0.0f;
        a.act.bf16[blockIdx.y * ld + k] = bf16_of_f32(v);
    }
}

/* x = scale * (high + low), scale a power of two that puts the row's largest below 2^15: 22 bits of
 * each product's operand, and no overflow of f16. A block a row. */
static __global__ void __launch_bounds__(THREADS) split_f16_kernel(QuantiseArgs a, size_t ld)
{
    float *shared = dynamic_shared<float>();
    const float *x = a.x + blockIdx.x * a.ld;
    float most = 0.0f;
    bool finite = true;
    for (uint32_t k = threadIdx.x; k < a.n_in; k += THREADS) {
        const float magnitude = fabsf(x[k]);
        finite = finite && magnitude < INFINITY;
        most = magnitude > most ? magnitude : most;
    }
    finite = __ballot_sync(ALL_LANES, !finite) == 0;
    most = warp_max(most);
    if (lane_index() == 0) {
        shared[warp_index()] = finite ? most : INFINITY;
    }
    __syncthreads();
    most = 0.0f;
    for (unsigned w = 0; w < WARPS; w++) {
        most = shared[w] > most ? shared[w] : most;
    }
    /* 2^(e - 14) for most in [2^e, 2^(e+1)), within the normal numbers both ways */
    int exponent = (int)(float_bits(most) >> 23 & 255u) - 14;
    exponent = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
    const float scale = most < INFINITY ? float_of_bits((uint32_t)exponent << 23) : NAN;
    const float inverse = float_of_bits((uint32_t)(254 - exponent) << 23);
    for (uint32_t k = threadIdx.x; k < ld; k += THREADS) {
        const float v = k < a.n_in && most < INFINITY ? x[k] * inverse : 0.0f;
        const uint16_t high = f16_of_f32(v);
        const size_t at = blockIdx.x * ld + (a.act.kind == ACTIVATIONS_F8 ? f8_position(k) : k);
        a.act.high[at] = high;
        a.act.low[at] = f16_of_f32(v - f32_of_f16(high));
    }
    if (threadIdx.x == 0) {
        a.act.d[blockIdx.x] = scale;
    }
}

extern "C" size_t weft_cuda_activation_bytes(Dtype weight, uint32_t rows, uint32_t n_in)
{
    return activations_at(weight, nullptr, rows, n_in).bytes;
}

extern "C" int weft_cuda_quantise(Dtype weight, const float *x, size_t x_ld, uint32_t rows,
                                  uint32_t n_in, void *buffer, WeftCudaStream stream)
{
    const QuantiseArgs args = {x, x_ld, rows, n_in, activations_at(weight, buffer, rows, n_in)};
    const size_t ld = activation_row_elements(n_in);
    const RecordShape shape = packed_shape(weight);
    if (shape.k == 0 || n_in % (shape.k < 32 ? 1 : shape.k) != 0 || rows > 65535) {
        return (int)cudaErrorInvalidValue;
    }
    switch (args.act.kind) {
    case ACTIVATIONS_F32:
        return 0; /* read where they are */
    case ACTIVATIONS_BF16:
        return launch(round_bf16_kernel, dim3(blocks_of(ld, THREADS), rows), THREADS, 0, stream,
                      args, ld);
    case ACTIVATIONS_F16_PAIR:
    case ACTIVATIONS_F8:
        return launch(split_f16_kernel, dim3(rows), THREADS, WARPS * sizeof(float), stream, args,
                      ld);
    case ACTIVATIONS_Q8_32:
        return launch(quantise_kernel<1>, dim3(blocks_of((size_t)rows * (n_in / 32), WARPS)),
                      THREADS, 0, stream, args);
    case ACTIVATIONS_Q8_256:
        return launch(quantise_kernel<8>, dim3(blocks_of((size_t)rows * (n_in / 256), WARPS)),
                      THREADS, 0, stream, args);
    }
    return (int)cudaErrorInvalidValue;
}
