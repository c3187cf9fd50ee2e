/* The emulation sees what it is there to see: kernels with a known fault must fail, and one that is
 * right must not. By exit status. */
#include "cuda_runtime.h"

#include <cstdio>

alignas(16) extern unsigned char shared_bytes[];
static unsigned n_failed;

static void expect(bool condition, const char *what)
{
    std::printf("%s %s\n", condition ? "ok" : "NOT OK", what);
    n_failed += !condition;
}

template <typename... Parameters, typename... Arguments>
static cudaError_t start(size_t shared_size, void (*kernel)(Parameters...), Arguments... arguments)
{
    cudaLaunchConfig_t config = {dim3(2), dim3(64), shared_size, nullptr, nullptr, 0};
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

static void reverse(int *out)
{
    int *shared = reinterpret_cast<int *>(shared_bytes);
    shared[threadIdx.x] = (int)threadIdx.x;
    __syncthreads();
    out[blockIdx.x * 64 + threadIdx.x] = shared[63 - threadIdx.x];
}

static void reverse_without_barrier(int *out)
{
    int *shared = reinterpret_cast<int *>(shared_bytes);
    shared[threadIdx.x] = (int)threadIdx.x;
    out[blockIdx.x * 64 + threadIdx.x] = shared[63 - threadIdx.x];
}

static void half_a_barrier(int *)
{
    if (threadIdx.x < 32) {
        __syncthreads();
    }
}

static void two_barriers(int *)
{
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

static void half_a_warp(int *out)
{
    if (threadIdx.x % 2 == 0) {
        out[threadIdx.x] = __shfl_sync(~0u, 1, 0);
    }
}

static void some_lanes(int *out)
{
    out[threadIdx.x] = __shfl_sync(0xffffu, 1, 0);
}

static void beyond_shared(int *)
{
    reinterpret_cast<volatile char *>(shared_bytes)[threadIdx.x] = 1;
}

static void crooked_load(int *out)
{
    emulated_check_aligned(out + 1, 16);
}

static void sums(int *out)
{
    int lane = (int)threadIdx.x % 32;
    for (unsigned other = 1; other < 32; other *= 2) {
        lane += __shfl_xor_sync(~0u, lane, other);
    }
    out[blockIdx.x * 64 + threadIdx.x] =
        lane + (__ballot_sync(~0u, threadIdx.x % 2) == 0xaaaaaaaau);
}

int main()
{
    int out[128];
    for (int order = 0; order < 3; order++) {
        emulation_set_order((EmulationOrder)order, 5);
        expect(start(256, reverse, out) == cudaSuccess && out[0] == 63 && out[127] == 0,
               "a barrier parts the writes from the reads");
        expect(start(0, sums, out) == cudaSuccess && out[0] == 497 && out[127] == 497,
               "shuffles and votes of whole warps");
        expect(start(256, reverse_without_barrier, out) == cudaSuccess, "a race runs");
        expect(out[0] != 63 || out[63] != 0, "a race shows in each order at another place");
    }
    expect(start(0, half_a_barrier, out) != cudaSuccess, "a barrier that half of a block meets");
    expect(start(0, two_barriers, out) != cudaSuccess, "two barriers at once");
    expect(start(0, half_a_warp, out) != cudaSuccess, "a warp-wide operation of half a warp");
    expect(start(0, some_lanes, out) != cudaSuccess, "a mask of some lanes");
    expect(start(0, crooked_load, out) != cudaSuccess, "a vector load at a crooked address");
#if !defined(__SANITIZE_ADDRESS__) /* which ends the program at the write itself */
    expect(start(63, beyond_shared, out) != cudaSuccess, "a write behind shared memory");
#endif
    expect(start(228 * 1024, reverse, out) != cudaSuccess, "more shared memory than there is");
    expect(emulation_failure()[0] != '\0', "a failure has a text");
    return n_failed != 0;
}
