/* CRC32C of words in device memory (specified: proto/base/crc32c.h).
 *
 * The CRC is linear over GF(2): a word w that k words follow adds w * x^(32 (k + 1)) modulo the
 * polynomial, whatever the others are. So thread t of all T takes the words t, t + T, t + 2T, ...
 * by Horner's rule, where a step is one product with x^(32 T), of which tables of four bytes are in
 * shared memory; then it multiplies its sum by the power that its last word is short of, and the
 * block adds up (exclusive or). A second kernel, of one block, adds the blocks. Sums of bits have
 * no order: the result is the same for any grid. Reflected: bit 31 is x^0. */
#include "kernels/cuda/device.h"

enum {
    THREADS = 256,
    BLOCKS = 256,           /* at most; WEFT_CUDA_CHECKSUM_BYTES has room for their sums */
    WORDS_OF_A_THREAD = 16, /* at least, where there are as many */
    POWERS = 17,            /* a last word is short of BLOCKS * THREADS words at most */
    TABLES = 4
};
static_assert(BLOCKS * sizeof(uint32_t) == WEFT_CUDA_CHECKSUM_BYTES, "a sum of each block");
static_assert(1u << (POWERS - 1) == BLOCKS * THREADS, "powers of two up to it");

struct ChecksumArgs {
    const uint32_t *words;
    size_t n;
    uint32_t step;           /* x^(32 T), T the threads of all blocks */
    uint32_t powers[POWERS]; /* x^(32 * 2^i) */
    uint32_t *sums;          /* of blocks */
};

static __host__ __device__ inline uint32_t times_x(uint32_t a)
{
    return a >> 1 ^ (0x82f63b78u & (0u - (a & 1u)));
}

/* a * b modulo the polynomial. */
static __host__ __device__ inline uint32_t product(uint32_t a, uint32_t b)
{
    uint32_t sum = 0;
    for (unsigned bit = 32; bit-- > 0;) {
        sum ^= b & (0u - (a >> bit & 1u));
        b = times_x(b);
    }
    return sum;
}

/* Exclusive or over the block; thread 0 gets it. All threads call. */
__device__ static uint32_t block_sum(uint32_t mine, uint32_t *warps)
{
    for (unsigned other = 1; other < WARP; other *= 2) {
        mine ^= __shfl_xor_sync(ALL_LANES, mine, other);
    }
    __syncthreads(); /* what lay in `warps` has been read */
    if (lane_index() == 0) {
        warps[warp_index()] = mine;
    }
    __syncthreads();
    uint32_t sum = 0;
    for (unsigned w = 0; threadIdx.x == 0 && w < THREADS / WARP; w++) {
        sum ^= warps[w];
    }
    return sum;
}

static __global__ void __launch_bounds__(THREADS)
    checksum_kernel(const __grid_constant__ ChecksumArgs a)
{
    uint32_t *table = dynamic_shared<uint32_t>(); /* [TABLES][256]: of byte j of a sum */
    for (unsigned j = 0; j < TABLES; j++) {
        table[j * 256 + threadIdx.x] = product(threadIdx.x << 8 * j, a.step);
    }
    __syncthreads();
    const size_t stride = (size_t)gridDim.x * THREADS;
    uint32_t sum = 0;
    size_t at = (size_t)blockIdx.x * THREADS + threadIdx.x;
    const bool any = at < a.n;
    for (; at < a.n; at += stride) {
        sum = table[sum & 255] ^ table[256 + (sum >> 8 & 255)] ^ table[512 + (sum >> 16 & 255)] ^
              table[768 + (sum >> 24)] ^ a.words[at];
    }
    if (any) {
        const size_t behind = a.n - (at - stride); /* 1 to stride */
        for (unsigned i = 0; i < POWERS; i++) {
            if (behind >> i & 1) {
                sum = product(sum, a.powers[i]);
            }
        }
    }
    sum = block_sum(sum, table);
    if (threadIdx.x == 0) {
        a.sums[blockIdx.x] = sum;
    }
}

/* A block of as many threads as there are sums at most. */
static __global__ void __launch_bounds__(THREADS)
    add_kernel(const uint32_t *sums, unsigned n, uint32_t ends, uint32_t *out)
{
    const uint32_t mine = threadIdx.x < n ? sums[threadIdx.x] : 0;
    const uint32_t sum = block_sum(mine, dynamic_shared<uint32_t>());
    if (threadIdx.x == 0) {
        *out = sum ^ ends;
    }
}

/* x^(32 n). */
static uint32_t power_of_words(const uint32_t *powers, size_t n)
{
    uint32_t power = 0x80000000u, square = powers[0];
    for (; n > 0; n >>= 1) {
        power = n & 1 ? product(power, square) : power;
        square = product(square, square);
    }
    return power;
}

extern "C" int weft_cuda_checksum(const void *data, size_t n_words, uint32_t *out, void *workspace,
                                  WeftCudaStream stream)
{
    const size_t fit = n_words / (THREADS * WORDS_OF_A_THREAD);
    const unsigned n_blocks = fit < 1 ? 1 : fit < BLOCKS ? (unsigned)fit : (unsigned)BLOCKS;
    ChecksumArgs args = {
        static_cast<const uint32_t *>(data), n_words, 0, {0}, static_cast<uint32_t *>(workspace)};
    uint32_t power = 0x80000000u;
    for (unsigned bit = 0; bit < 32; bit++) {
        power = times_x(power);
    }
    for (unsigned i = 0; i < POWERS; i++, power = product(power, power)) {
        args.powers[i] = power;
    }
    args.step = power_of_words(args.powers, (size_t)n_blocks * THREADS);
    const int error = launch(checksum_kernel, dim3(n_blocks), THREADS,
                             TABLES * 256 * sizeof(uint32_t), stream, args);
    /* The register starts with ones and is inverted at the end. */
    const uint32_t ends = product(0xffffffffu, power_of_words(args.powers, n_words)) ^ 0xffffffffu;
    return error != 0 ? error
                      : launch(add_kernel, dim3(1), THREADS, THREADS / WARP * sizeof(uint32_t),
                               stream, (const uint32_t *)args.sums, n_blocks, ends, out);
}
