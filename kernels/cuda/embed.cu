/* Weights to floats: rows of the embedding, and whole matrices from packed panels to plain rows. */
#include "kernels/cuda/device.h"
#include "kernels/cuda/quant.h"

#include <cstddef>

enum { THREADS = 256, TILE = 64 };

/* ---- one element out of a packed panel ---- */

/* Element k of lane `lane` of a panel, dequantised as block_dequantise() does. */
__device__ static float panel_element(Dtype type, const uint8_t *panel, unsigned lane, uint32_t k)
{
    switch (type) {
    case DTYPE_F32:
        return reinterpret_cast<const RecordF32 *>(panel)[k].w[lane];
    case DTYPE_F16:
        return f32_of_f16(reinterpret_cast<const RecordF16 *>(panel)[k].w[lane]);
    case DTYPE_BF16:
        return f32_of_bf16(reinterpret_cast<const RecordBF16 *>(panel)[k / 2].w[lane][k % 2]);
    default:
        return quant_element(type, panel, lane, k);
    }
}

__device__ static void put_element(Dtype type, void *data, size_t index, float v)
{
    if (type == DTYPE_F32) {
        static_cast<float *>(data)[index] = v;
    } else {
        static_cast<uint16_t *>(data)[index] = type == DTYPE_F16 ? f16_of_f32(v) : bf16_of_f32(v);
    }
}

static bool is_float(Dtype type)
{
    return type == DTYPE_F32 || type == DTYPE_F16 || type == DTYPE_BF16;
}

/* ---- the embedding ---- */

struct EmbedArgs {
    PackedMatrix table;
    const uint32_t *ids;
    uint32_t first_id;
    float *out;
    size_t ld;
};

static __global__ void __launch_bounds__(THREADS) embed_kernel(EmbedArgs a)
{
    const uint32_t id = a.ids[blockIdx.x] - a.first_id; /* an id below wraps: not there */
    const uint8_t *panel = a.table.data + (size_t)(id / PANEL_ROWS) * a.table.panel_bytes;
    for (uint32_t k = threadIdx.x; k < a.table.n_in; k += THREADS) {
        a.out[blockIdx.x * a.ld + k] =
            id < a.table.n_out ? panel_element(a.table.type, panel, id % PANEL_ROWS, k) : 0.0f;
    }
}

extern "C" int weft_cuda_embed(const PackedMatrix *table, const uint32_t *ids, uint32_t first_id,
                               uint32_t n, float *out, size_t ld, WeftCudaStream stream)
{
    if (packed_shape(table->type).k == 0) {
        return (int)cudaErrorInvalidValue;
    }
    const EmbedArgs args = {*table, ids, first_id, out, ld};
    return launch(embed_kernel, dim3(n), THREADS, 0, stream, args);
}

/* ---- panels to rows ---- */

struct UnpackArgs {
    PackedMatrix w;
    Dtype to;
    void *rows;
    size_t ld;
};

/* A block takes 64 columns of one panel: read along the panel's 16 lanes, written along rows. */
static __global__ void __launch_bounds__(THREADS) unpack_kernel(UnpackArgs a)
{
    float *tile = dynamic_shared<float>(); /* [16][TILE + 1] */
    const uint32_t k0 = blockIdx.x * TILE, row0 = blockIdx.y * PANEL_ROWS;
    const uint8_t *panel = a.w.data + blockIdx.y * a.w.panel_bytes;
    for (uint32_t i = threadIdx.x; i < PANEL_ROWS * TILE; i += THREADS) {
        const uint32_t lane = i % PANEL_ROWS, k = i / PANEL_ROWS;
        tile[lane * (TILE + 1) + k] =
            k0 + k < a.w.n_in ? panel_element(a.w.type, panel, lane, k0 + k) : 0.0f;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < PANEL_ROWS * TILE; i += THREADS) {
        const uint32_t k = i % TILE, lane = i / TILE;
        if (row0 + lane < a.w.n_out && k0 + k < a.ld) {
            put_element(a.to, a.rows, (row0 + lane) * a.ld + k0 + k, tile[lane * (TILE + 1) + k]);
        }
    }
}

extern "C" size_t weft_cuda_row_elements(Dtype float_type, uint32_t n_in)
{
    const size_t line = float_type == DTYPE_F32 ? 16 : 32; /* elements of 64 bytes */
    return (n_in + line - 1) / line * line;
}

extern "C" int weft_cuda_unpack(const PackedMatrix *w, Dtype to, void *rows, size_t ld,
                                WeftCudaStream stream)
{
    const unsigned n_panels = blocks_of(w->n_out, PANEL_ROWS);
    if (packed_shape(w->type).k == 0 || !is_float(to) || ld < w->n_in || n_panels > 65535) {
        return (int)cudaErrorInvalidValue;
    }
    const UnpackArgs args = {*w, to, rows, ld};
    return launch(unpack_kernel, dim3(blocks_of(ld, TILE), n_panels), THREADS,
                  PANEL_ROWS * (TILE + 1) * sizeof(float), stream, args);
}
