/* Products with many rows by 16-bit matrix instructions: class fast. Weights of every type but F32
 * become bf16 in registers, activations are bf16, sums f32, k ascending in one accumulator: a row's
 * bits depend on the row and the weights (but those of fewer rows are other kernels').
 *
 * A block has 8 warps of P panels each and 8 NT rows. A turn is 64 k: the rows' activations lie in
 * shared memory, as two blocks [row][32], read by all warps 16 bytes a lane without bank conflicts;
 * two more turns are copied meanwhile. Weights go from device memory straight to the lanes that
 * need them, a block ahead.
 *
 * The same unpacking gives plain rows of bf16, for a library's product (dense.c). */
#include "kernels/cuda/half_fragments.h"
#include "kernels/cuda/matmul.h"

enum { THREADS = 256, WARPS = 8, TURN = 64, TURNS = 3, BLOCK_K = 32 };

/* ---- products ---- */

/* Starts copying turn `turn` of the rows from row0 on: [TURN / 32][ROWS][32]. */
template <int ROWS>
__device__ __forceinline__ void copy_rows(const ProductArgs &a, uint32_t row0, uint32_t turn,
                                          uint16_t *to)
{
    for (uint32_t e = threadIdx.x; e < ROWS * (TURN / 8); e += THREADS) {
        const uint32_t row = e / (TURN / 8), chunk = e % (TURN / 8), k = turn * TURN + 8 * chunk;
        const bool there = row0 + row < a.rows && k < a.act_ld;
        const uint16_t *from = a.act.bf16 + (there ? (size_t)(row0 + row) * a.act_ld + k : 0);
        copy_to_shared(to + (chunk / 4 * ROWS + row) * BLOCK_K + chunk % 4 * 8, from, there);
    }
}

template <Dtype T, int P>
__device__ __forceinline__ void load_panels(const ProductArgs &a, const uint8_t *const panels[P],
                                            uint32_t block, HalfStored<T> s[P])
{
#pragma unroll
    for (int p = 0; p < P; p++) {
        s[p] = load_half<T>(panels[p], block, a.w.n_in);
    }
}

template <int NT, int P>
__device__ __forceinline__ void multiply_block(const uint16_t *x, const uint32_t w[P][2][4],
                                               float acc[P][NT][4])
{
    const unsigned g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int j = 0; j < NT; j++) {
        const uint4 b = load_vector<uint4>(x + (8 * j + g) * BLOCK_K + 8 * t);
#pragma unroll
        for (int p = 0; p < P; p++) {
            const uint32_t first[4] = {w[p][0][0], w[p][1][0], w[p][0][1], w[p][1][1]};
            const uint32_t second[4] = {w[p][0][2], w[p][1][2], w[p][0][3], w[p][1][3]};
            mma_bf16(acc[p][j], first, b.x, b.y);
            mma_bf16(acc[p][j], second, b.z, b.w);
        }
    }
}

template <int NT, int P>
__device__ __forceinline__ void put_tile(const ProductArgs &a, uint32_t panel0, uint32_t row0,
                                         const float acc[P][NT][4])
{
    const unsigned g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int p = 0; p < P; p++) {
#pragma unroll
        for (int j = 0; j < NT; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                put_product(a, row0 + 8 * j + 2 * t + i % 2,
                            (panel0 + p) * PANEL_ROWS + 2 * g + i / 2, 0, acc[p][j][i]);
            }
        }
    }
}

template <Dtype T, int NT, int P>
static __global__ void __launch_bounds__(THREADS) half_kernel(const __grid_constant__ ProductArgs a)
{
    constexpr int ROWS = 8 * NT;
    uint16_t *x = dynamic_shared<uint16_t>();
    const uint32_t row0 = blockIdx.x * ROWS, panel0 = (blockIdx.y * WARPS + warp_index()) * P;
    const uint32_t n_panels = (a.w.n_out + PANEL_ROWS - 1) / PANEL_ROWS;
    const uint32_t n_blocks = (a.w.n_in + BLOCK_K - 1) / BLOCK_K;
    const uint32_t n_turns = (n_blocks * BLOCK_K + TURN - 1) / TURN;
    const uint8_t *panels[P];
#pragma unroll
    for (int p = 0; p < P; p++) { /* a panel too many is the last one again, unused */
        const uint32_t panel = panel0 + p < n_panels ? panel0 + p : n_panels - 1;
        panels[p] = a.w.data + panel * a.w.panel_bytes;
    }
    float acc[P][NT][4] = {};
    HalfStored<T> next[P];
    load_panels<T, P>(a, panels, 0, next);
    for (uint32_t turn = 0; turn < TURNS - 1; turn++) {
        copy_rows<ROWS>(a, row0, turn, x + turn * ROWS * TURN);
        commit_copies();
    }
    for (uint32_t turn = 0; turn < n_turns; turn++) {
        wait_copies<TURNS - 2>();
        __syncthreads(); /* this turn is there, and the one before it was used by all */
        copy_rows<ROWS>(a, row0, turn + TURNS - 1, x + (turn + TURNS - 1) % TURNS * ROWS * TURN);
        commit_copies();
#pragma unroll
        for (uint32_t b = 0; b < TURN / BLOCK_K; b++) {
            const uint32_t block = turn * (TURN / BLOCK_K) + b;
            if (block >= n_blocks) {
                break;
            }
            uint32_t w[P][2][4];
#pragma unroll
            for (int p = 0; p < P; p++) {
                half_values<T>(next[p], w[p]);
            }
            load_panels<T, P>(a, panels, block + 1 < n_blocks ? block + 1 : block, next);
            multiply_block<NT, P>(x + (turn % TURNS * TURN + b * BLOCK_K) * ROWS, w, acc);
        }
    }
    put_tile<NT, P>(a, panel0, row0, acc);
}

template <Dtype T, int NT, int P> static int start(const ProductArgs &args, WeftCudaStream stream)
{
    const dim3 grid(blocks_of(args.rows, 8 * NT), blocks_of(args.w.n_out, WARPS * P * PANEL_ROWS));
    return launch(half_kernel<T, NT, P>, grid, THREADS, TURNS * 8 * NT * TURN * sizeof(uint16_t),
                  stream, args);
}

template <Dtype T> static int product(const ProductArgs &args, WeftCudaStream stream)
{
    return args.rows <= 64 ? start<T, 8, 1>(args, stream) : start<T, 16, 2>(args, stream);
}

int product_half(const ProductArgs &args, WeftCudaStream stream)
{
    switch (args.w.type) {
    case DTYPE_BF16:
        return product<DTYPE_BF16>(args, stream);
    case DTYPE_F16:
        return product<DTYPE_F16>(args, stream);
    case DTYPE_Q4_0:
        return product<DTYPE_Q4_0>(args, stream);
    case DTYPE_Q4_1:
        return product<DTYPE_Q4_1>(args, stream);
    case DTYPE_Q5_0:
        return product<DTYPE_Q5_0>(args, stream);
    case DTYPE_Q5_1:
        return product<DTYPE_Q5_1>(args, stream);
    case DTYPE_Q8_0:
        return product<DTYPE_Q8_0>(args, stream);
    case DTYPE_Q4_K:
        return product<DTYPE_Q4_K>(args, stream);
    case DTYPE_Q5_K:
        return product<DTYPE_Q5_K>(args, stream);
    case DTYPE_Q6_K:
        return product<DTYPE_Q6_K>(args, stream);
    case DTYPE_F8_E4M3:
        return product<DTYPE_F8_E4M3>(args, stream);
    default:
        return (int)cudaErrorInvalidValue;
    }
}

/* ---- plain rows ---- */

struct UnpackArgs {
    PackedMatrix w;
    uint16_t *rows;
    size_t ld;
    uint32_t n_blocks;
};

/* A warp a 32-block of a panel: 16 rows x 64 bytes. */
template <Dtype T> static __global__ void __launch_bounds__(THREADS) unpack_kernel(UnpackArgs a)
{
    const unsigned g = lane_index() / 4, t = lane_index() % 4;
    const uint32_t block = blockIdx.x * WARPS + warp_index();
    if (block >= a.n_blocks) {
        return; /* a whole warp */
    }
    const uint8_t *panel = a.w.data + blockIdx.y * a.w.panel_bytes;
    uint32_t w[2][4];
    half_values<T>(load_half<T>(panel, block, a.w.n_in), w);
#pragma unroll
    for (unsigned o = 0; o < 2; o++) {
        const uint32_t row = blockIdx.y * PANEL_ROWS + 2 * g + o;
        if (row < a.w.n_out) {
            store_vector(a.rows + row * a.ld + block * BLOCK_K + 8 * t,
                         make_uint4(w[o][0], w[o][1], w[o][2], w[o][3]));
        }
    }
}

template <Dtype T> static int start_unpack(const UnpackArgs &args, WeftCudaStream stream)
{
    return launch(unpack_kernel<T>,
                  dim3(blocks_of(args.n_blocks, WARPS), blocks_of(args.w.n_out, PANEL_ROWS)),
                  THREADS, 0, stream, args);
}

extern "C" size_t weft_cuda_row_elements(uint32_t n_in)
{
    return ((size_t)n_in + BLOCK_K - 1) / BLOCK_K * BLOCK_K;
}

extern "C" int weft_cuda_unpack(const PackedMatrix *w, uint16_t *rows, size_t ld,
                                WeftCudaStream stream)
{
    const UnpackArgs args = {*w, rows, ld, blocks_of(w->n_in, BLOCK_K)};
    if (ld < weft_cuda_row_elements(w->n_in) || ld % 8 != 0 || w->n_out > 65535 * PANEL_ROWS) {
        return (int)cudaErrorInvalidValue;
    }
    switch (w->type) {
    case DTYPE_BF16:
        return start_unpack<DTYPE_BF16>(args, stream);
    case DTYPE_F16:
        return start_unpack<DTYPE_F16>(args, stream);
    case DTYPE_Q4_0:
        return start_unpack<DTYPE_Q4_0>(args, stream);
    case DTYPE_Q4_1:
        return start_unpack<DTYPE_Q4_1>(args, stream);
    case DTYPE_Q5_0:
        return start_unpack<DTYPE_Q5_0>(args, stream);
    case DTYPE_Q5_1:
        return start_unpack<DTYPE_Q5_1>(args, stream);
    case DTYPE_Q8_0:
        return start_unpack<DTYPE_Q8_0>(args, stream);
    case DTYPE_Q4_K:
        return start_unpack<DTYPE_Q4_K>(args, stream);
    case DTYPE_Q5_K:
        return start_unpack<DTYPE_Q5_K>(args, stream);
    case DTYPE_Q6_K:
        return start_unpack<DTYPE_Q6_K>(args, stream);
    case DTYPE_F8_E4M3:
        return start_unpack<DTYPE_F8_E4M3>(args, stream);
    default:
        return (int)cudaErrorInvalidValue;
    }
}
