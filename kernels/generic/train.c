/* Every slot that only training has: generic has them all. */
#include "kernels/generic/train.h"

#include "kernels/fill.h"

void kernels_fill_generic_train(Kernels *kernels)
{
    kernels->train = (TrainKernels){
        .gemm = gemm_generic,
        .gemm_bf16 = gemm_bf16_generic,
        .gemm_f16 = gemm_f16_generic,
        .layer_norm = layer_norm_generic,
        .rms_norm_backward = rms_norm_backward_generic,
        .layer_norm_backward = layer_norm_backward_generic,
        .norm_weight_backward = norm_weight_backward_generic,
        .sum_rows = sum_rows_generic,
        .gelu = gelu_generic,
        .gelu_backward = gelu_backward_generic,
        .swiglu_backward = swiglu_backward_generic,
        .attention_backward = attention_backward_generic,
        .xent_backward = xent_backward_generic,
        .gradient_finish = gradient_finish_generic,
        .sum_squares = sum_squares_generic,
        .adamw = adamw_generic,
        .sgd = sgd_generic,
    };
}
