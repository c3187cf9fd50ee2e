/* What both instruction sets fill of training's part of the table with kernels/vector, in the lanes
 * of the vec.h that was included before. */
#pragma once

#include "kernels/kernels.h"

#include "kernels/vector/act_backward.h"
#include "kernels/vector/attention_backward.h"
#include "kernels/vector/gemm.h"
#include "kernels/vector/norm_backward.h"
#include "kernels/vector/optimizer.h"

static void train_fill_vector(Kernels *kernels)
{
    kernels->train = (TrainKernels){
        .gemm = gemm_vector,
        .gemm_bf16 = gemm_bf16_vector,
        .gemm_f16 = gemm_f16_vector,
        .layer_norm = layer_norm_vector,
        .rms_norm_backward = rms_norm_backward_vector,
        .layer_norm_backward = layer_norm_backward_vector,
        .norm_weight_backward = norm_weight_backward_vector,
        .sum_rows = sum_rows_vector,
        .gelu = gelu_vector,
        .gelu_backward = gelu_backward_vector,
        .swiglu_backward = swiglu_backward_vector,
        .attention_backward = attention_backward_vector,
        .xent_backward = xent_backward_vector,
        .gradient_finish = gradient_finish_vector,
        .sum_squares = sum_squares_vector,
        .adamw = adamw_vector,
        .sgd = sgd_vector,
    };
}
