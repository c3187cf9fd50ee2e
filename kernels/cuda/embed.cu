/* Rows of the embedding. */
#include "kernels/cuda/device.h"
#include "kernels/cuda/quant.h"

enum { THREADS = 256 };

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

/* ---- the embedding ---- */

struct EmbedArgs {
    PackedMatrix table;
    const uint32_t *ids;
    uint32_t first_id;
    bool accumulate;
    float *out;
    size_t ld;
};

static __global__ void __launch_bounds__(THREADS) embed_kernel(EmbedArgs a)
{
    const uint32_t id = a.ids[blockIdx.x] - a.first_id; /* an id below wraps: not there */
    const uint8_t *panel = a.table.data + (size_t)(id / PANEL_ROWS) * a.table.panel_bytes;
    for (uint32_t k = threadIdx.x; k < a.table.n_in; k += THREADS) {
        float *to = a.out + blockIdx.x * a.ld + k;
        const float v =
            id < a.table.n_out ? panel_element(a.table.type, panel, id % PANEL_ROWS, k) : 0.0f;
        *to = a.accumulate ? *to + v : v;
    }
}

extern "C" int weft_cuda_embed(const PackedMatrix *table, const uint32_t *ids, uint32_t first_id,
                               uint32_t n, bool accumulate, float *out, size_t ld,
                               WeftCudaStream stream)
{
    if (packed_shape(table->type).k == 0) {
        return (int)cudaErrorInvalidValue;
    }
    const EmbedArgs args = {*table, ids, first_id, accumulate, out, ld};
    return launch(embed_kernel, dim3(n), THREADS, 0, stream, args);
}
