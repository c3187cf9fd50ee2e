/* Attention of runs of rows by matrix instructions. Internal to this room: weft_cuda_attention()
 * chooses. Included by .cu files only. */
#pragma once

#include "kernels/cuda/device.h"

/* Whether there is a kernel for this cache and head size. */
bool attention_prefill_takes(const CudaAttention *args);
/* The segments of rows_from rows and more; the others are left alone. */
int attention_prefill(const CudaAttention *args, uint32_t rows_from, WeftCudaStream stream);
