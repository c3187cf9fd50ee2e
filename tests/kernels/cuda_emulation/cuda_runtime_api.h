/* The part of CUDA's host interface that kernels/cuda and its parity test use, over the CPU's
 * memory: a name for a name, so that the same test runs on a device when it is built with nvcc. */
#pragma once

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct CUstream_st *cudaStream_t;
typedef enum cudaError {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorLaunchFailure = 719,
} cudaError_t;
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };

/* Memory of exactly `size` bytes (AddressSanitizer sees what lies beyond), full of NaN. */
cudaError_t cudaMalloc(void **pointer, size_t size);
cudaError_t cudaFree(void *pointer);
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind);
cudaError_t cudaMemset(void *to, int value, size_t size);
cudaError_t cudaDeviceSynchronize(void);
cudaError_t cudaGetLastError(void);
const char *cudaGetErrorString(cudaError_t error);

/* ---- of the emulation alone ---- */

typedef enum EmulationOrder {
    EMULATION_ASCENDING,  /* blocks from the first on; each warp as far as it can go */
    EMULATION_DESCENDING, /* from the last on; and asynchronous copies are done at once, not late */
    EMULATION_RANDOM,     /* threads in another order at every turn, from the seed */
} EmulationOrder;
/* In which order what may run in any order runs from now on. A kernel whose result depends on it
 * has a race. */
void emulation_set_order(EmulationOrder order, unsigned long seed);
/* What the last failed launch did wrong; "" if none did. */
const char *emulation_failure(void);

#ifdef __cplusplus
}
#endif
