/* Products of 8-bit floats (F8_E4M3: blocks of 128 with a scale) with few rows, and class exact's
 * with any number: e4m3 becomes f16 in registers, exactly; an activation is two f16 of a common
 * power of two (quantise.cu), so what is rounded is its 23rd bit and the sums (matmul_spans.h,
 * span_f8()). Bound by the weights' stream from memory up to 32 rows, which share one reading.
 *
 * And the operands of a library's product of e4m3 with e4m3 (dense.c): plain rows of weights, and
 * activations rounded to e4m3 in blocks of 128. */
#include "kernels/cuda/matmul_narrow.h"

enum { THREADS = 256, WARPS = 8, BLOCK = 128 };

int product_f8(const ProductArgs &args, WeftCudaStream stream)
{
    return args.rows <= 8 ? start_narrow<DTYPE_F8_E4M3, 1, 1>(args, stream)
                          : start_narrow<DTYPE_F8_E4M3, 4, 1>(args, stream);
}

/* ---- the library's weights ---- */

struct UnpackF8Args {
    PackedMatrix w;
    uint8_t *rows;
    float *scales;
};

/* A warp a 32-block of a panel: 16 rows x 32 bytes. */
static __global__ void __launch_bounds__(THREADS) unpack_f8_kernel(UnpackF8Args a)
{
    const unsigned g = lane_index() / 4, t = lane_index() % 4;
    const uint32_t block = blockIdx.x * WARPS + warp_index();
    if (block >= a.w.n_in / 32) {
        return; /* a whole warp */
    }
    const RecordF8 *r =
        reinterpret_cast<const RecordF8 *>(a.w.data + blockIdx.y * a.w.panel_bytes) + block / 4;
    const StoredF8 s = load_f8<F8_ADJACENT>(r, block % 4, g, t);
    for (unsigned o = 0; o < 2; o++) {
        const uint32_t row = blockIdx.y * PANEL_ROWS + 2 * g + o, take = o == 0 ? 0x5410 : 0x7632;
        if (row >= a.w.n_out) {
            continue;
        }
        store_vector(
            a.rows + (size_t)row * a.w.n_in + block * 32 + 8 * t,
            make_uint2(__byte_perm(s.q[0], s.q[1], take), __byte_perm(s.q[2], s.q[3], take)));
        if (block % 4 == 0 && t == 0) {
            a.scales[(size_t)(block / 4) * a.w.n_out + row] = r->scale[2 * g + o];
        }
    }
}

extern "C" int weft_cuda_unpack_f8(const PackedMatrix *w, uint8_t *rows, float *scales,
                                   WeftCudaStream stream)
{
    if (w->type != DTYPE_F8_E4M3 || w->n_in % BLOCK != 0 || w->n_out > 65535 * PANEL_ROWS) {
        return (int)cudaErrorInvalidValue;
    }
    const UnpackF8Args args = {*w, rows, scales};
    return launch(unpack_f8_kernel,
                  dim3(blocks_of(w->n_in / 32, WARPS), blocks_of(w->n_out, PANEL_ROWS)), THREADS, 0,
                  stream, args);
}

/* ---- the library's activations ---- */

struct QuantiseF8Args {
    const float *x;
    size_t ld;
    uint32_t rows, n_in;
    uint8_t *codes;
    float *scales;
};

/* A warp a block of 128 elements, four a lane. */
static __global__ void __launch_bounds__(THREADS) quantise_f8_kernel(QuantiseF8Args a)
{
    const uint32_t n_blocks = a.n_in / BLOCK;
    const size_t item = (size_t)blockIdx.x * WARPS + warp_index();
    if (item >= (size_t)a.rows * n_blocks) {
        return; /* a whole warp */
    }
    const size_t row = item / n_blocks, block = item % n_blocks;
    const float *x = a.x + row * a.ld + block * BLOCK + 4 * lane_index();
    float v[4], most = 0.0f;
    bool finite = true;
    for (unsigned i = 0; i < 4; i++) {
        v[i] = x[i];
        const float magnitude = fabsf(v[i]);
        finite = finite && magnitude < INFINITY;
        most = magnitude > most ? magnitude : most;
    }
    finite = __ballot_sync(ALL_LANES, !finite) == 0;
    most = warp_max(most);
    const float inverse = finite && most >= ACT_AMAX_MIN ? 448.0f / most : 0.0f;
    uint32_t four = 0;
    for (unsigned i = 0; i < 4; i++) {
        four |= (uint32_t)(inverse != 0.0f ? e4m3_of_f32(v[i] * inverse) : 0) << 8 * i;
    }
    store_vector(a.codes + row * a.n_in + block * BLOCK + 4 * lane_index(), four);
    if (lane_index() == 0) {
        a.scales[block * a.rows + row] = finite ? most / 448.0f : NAN;
    }
}

extern "C" int weft_cuda_quantise_f8(const float *x, size_t x_ld, uint32_t rows, uint32_t n_in,
                                     uint8_t *codes, float *scales, WeftCudaStream stream)
{
    if (n_in % BLOCK != 0) {
        return (int)cudaErrorInvalidValue;
    }
    const QuantiseF8Args args = {x, x_ld, rows, n_in, codes, scales};
    return launch(quantise_f8_kernel, dim3(blocks_of((size_t)rows * (n_in / BLOCK), WARPS)),
                  THREADS, 0, stream, args);
}
