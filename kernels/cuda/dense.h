/* Large products of floats by cuBLASLt, with what follows them in the same kernel: for
 * prompts and training, where its matrix instructions are the fastest. Class `fast`: the library
 * chooses tiles and splits by shape, so a row's bits depend on how many rows there are. ops.c gives
 * it rows of bf16, or of e4m3, that it unpacks from the panels strip by strip, so that no second
 * copy of the weights is kept. */
#pragma once

#include "kernels/cuda/launch.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A library handle and the algorithms found so far, for one device and one thread at a time. */
typedef struct CudaDense CudaDense;

/* The handle of the current device; NULL: cuBLASLt's status is in *status. */
CudaDense *cuda_dense_new(int *status);
void cuda_dense_free(CudaDense *dense); /* NULL-safe */

/* e4m3 times e4m3 for weights of F8_E4M3. Activations have 4 significant bits then, not 8, which is
 * more than class fast promises to change (kernels.md): a host must ask for it, by
 * WEFT_DEVICE_FP8_ACTIVATIONS=1 in the environment. */
typedef struct CudaDenseF8 {
    bool wanted; /* asked for, and the library has not refused yet */
    bool left;   /* such activations are what the last product left in the workspace */
} CudaDenseF8;
CudaDenseF8 *cuda_dense_f8(CudaDense *dense);

typedef struct CudaDenseProduct {
    Dtype type;    /* of w and x: BF16, F16, F32, or F8_E4M3 (the codes) */
    const void *w; /* [n_out][w_ld], or [n_in][w_ld] where w_by_in */
    size_t w_ld;
    const void *x; /* [rows][x_ld], or [n_in][x_ld] where x_by_in */
    size_t x_ld;
    bool w_by_in, x_by_in;
    /* F8_E4M3: [n_in / 128][n_out] and [n_in / 128][rows], aligned to 16 bytes. Then no operand is
     * turned, there is no bias, rows and n_out are multiples of 4 and n_in of 128. */
    const float *w_scales, *x_scales;
    uint32_t rows, n_out, n_in; /* n_in and the rows' distances: multiples of 8 are fast */
    float *out;                 /* [rows][ld]; f32 sums */
    size_t ld;
    const float *bias; /* [n_out] or NULL */
    bool gelu;         /* out = gelu(W x + bias), tanh form; needs bias, not with accumulate */
    bool accumulate;   /* out = out + W x (+ bias) */
    void *workspace;   /* device memory for the library; 32 MiB lets it choose freely */
    size_t workspace_bytes;
} CudaDenseProduct;

/* 0, or cuBLASLt's status (cublasStatus_t); CUBLAS_STATUS_NOT_SUPPORTED = 15 where it has no
 * algorithm (F8_E4M3 with such scales: compute capability 9.0 alone, from CUDA 12.9 on). The first
 * call of a shape asks for one on the host; capture graphs after it. */
int cuda_dense_product(CudaDense *dense, const CudaDenseProduct *args, WeftCudaStream stream);

#ifdef __cplusplus
}
#endif
