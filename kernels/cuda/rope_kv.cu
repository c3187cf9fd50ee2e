/* Rotary positions, and writing keys and values into their pages. */
#include "kernels/cuda/device.h"

#include <cfloat>

enum { THREADS = 128 };

struct RopeArgs {
    float *x;
    size_t ld;
    const uint32_t *positions;
    uint32_t n_heads, head_size, dims;
    bool adjacent, inverse;
    const float *cos, *sin;
};

/* A block a row; a thread a pair. */
static __global__ void __launch_bounds__(THREADS) rope_kernel(RopeArgs a)
{
    const uint32_t half = a.dims / 2, position = a.positions[blockIdx.x];
    const uint32_t stride = a.adjacent ? 2 : 1, apart = a.adjacent ? 1 : half;
    for (uint32_t pair = threadIdx.x; pair < a.n_heads * half; pair += THREADS) {
        const uint32_t head = pair / half, i = pair % half;
        float *first = a.x + blockIdx.x * a.ld + (size_t)head * a.head_size + i * stride;
        const float c = a.cos[(size_t)position * half + i];
        const float turn = a.sin[(size_t)position * half + i], s = a.inverse ? -turn : turn;
        const float x = first[0], y = first[apart];
        first[0] = fmaf(x, c, -(y * s));
        first[apart] = fmaf(x, s, y * c);
    }
}

extern "C" int weft_cuda_rope(float *x, size_t ld, const uint32_t *positions, uint32_t rows,
                              uint32_t n_heads, uint32_t head_size, uint32_t dims,
                              RopePairing pairing, const float *cos, const float *sin, bool inverse,
                              WeftCudaStream stream)
{
    const RopeArgs args = {
        x, ld, positions, n_heads, head_size, dims, pairing == ROPE_ADJACENT, inverse, cos, sin};
    return launch(rope_kernel, dim3(rows), THREADS, 0, stream, args);
}

/* ---- keys and values ---- */

struct KvWriteArgs {
    CudaKv kv;
    const float *k, *v;
    size_t ld;
    const uint32_t *sequences, *positions;
};

/* As generic: NaN if the row is not finite. Called by a whole warp. */
__device__ static float q8_scale(const float *x, uint32_t n)
{
    float most = 0.0f;
    bool finite = true;
    for (uint32_t i = lane_index(); i < n; i += WARP) {
        const float magnitude = fabsf(x[i]);
        finite = finite && magnitude <= FLT_MAX;
        most = magnitude > most ? magnitude : most;
    }
    finite = __ballot_sync(ALL_LANES, !finite) == 0;
    most = warp_max(most);
    return finite ? most / 127.0f : NAN;
}

__device__ static int8_t q8_of(float x, float scale)
{
    const float shift = 12582912.0f; /* 1.5 x 2^23: rounds to nearest even */
    if (!(scale > 0.0f)) {
        return 0;
    }
    const float ratio = x / scale, q = ratio > 127.0f ? 127.0f : ratio < -127.0f ? -127.0f : ratio;
    const float rounded = q + shift;
    return (int8_t)(rounded - shift);
}

/* Element `index` of a block. */
__device__ static void kv_store(KvType type, uint8_t *block, size_t index, float x, float scale)
{
    switch (type) {
    case KV_F16:
        reinterpret_cast<uint16_t *>(block)[index] = f16_of_f32(x);
        break;
    case KV_BF16:
        reinterpret_cast<uint16_t *>(block)[index] = bf16_of_f32(x);
        break;
    case KV_F32:
        reinterpret_cast<float *>(block)[index] = x;
        break;
    case KV_Q8:
        reinterpret_cast<int8_t *>(block)[index] = q8_of(x, scale);
        break;
    }
}

/* One warp an item: (row, KV head). */
static __global__ void __launch_bounds__(THREADS) kv_write_kernel(KvWriteArgs a, uint32_t n_items)
{
    const uint32_t item = blockIdx.x * (THREADS / WARP) + warp_index();
    if (item >= n_items) {
        return; /* a whole warp */
    }
    const CudaKv &kv = a.kv;
    const uint32_t row = item / kv.n_kv_heads, head = item % kv.n_kv_heads, size = kv.head_size;
    const uint32_t position = a.positions[row], slot = position % KV_BLOCK;
    const uint32_t page = kv.tables[a.sequences[row] * kv.table_ld + position / KV_BLOCK];
    uint8_t *k_block = kv.base + page * kv.page_stride + head * kv.head_stride;
    uint8_t *v_block = k_block + kv.v_offset;
    const float *k = a.k + row * a.ld + (size_t)head * size;
    const float *v = a.v + row * a.ld + (size_t)head * size;
    float k_scale = 0.0f, v_scale = 0.0f;
    if (kv.type == KV_Q8) {
        k_scale = q8_scale(k, size);
        v_scale = q8_scale(v, size);
        if (lane_index() == 0) {
            reinterpret_cast<float *>(k_block + (size_t)KV_BLOCK * size)[slot] = k_scale;
            reinterpret_cast<float *>(v_block + (size_t)KV_BLOCK * size)[slot] = v_scale;
        }
    }
    for (uint32_t d = lane_index(); d < size; d += WARP) {
        kv_store(kv.type, k_block, (size_t)d * KV_BLOCK + slot, k[d], k_scale);
        kv_store(kv.type, v_block, (size_t)slot * size + d, v[d], v_scale);
    }
}

extern "C" int weft_cuda_kv_write(const CudaKv *kv, const float *k, const float *v, size_t ld,
                                  const uint32_t *sequences, const uint32_t *positions,
                                  uint32_t rows, WeftCudaStream stream)
{
    const KvWriteArgs args = {*kv, k, v, ld, sequences, positions};
    const uint32_t n_items = rows * kv->n_kv_heads;
    return launch(kv_write_kernel, dim3(blocks_of(n_items, THREADS / WARP)), THREADS, 0, stream,
                  args, n_items);
}
