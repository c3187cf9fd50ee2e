/* kernels/vector in the lanes of this instruction set: what only training has. */
#include "kernels/fill.h"

#include "kernels/avx512/vec.h"

#include "kernels/vector/act_backward.h"
#include "kernels/vector/attention_backward.h"
#include "kernels/vector/gemm.h"
#include "kernels/vector/norm_backward.h"
#include "kernels/vector/optimizer.h"

const TrainKernels train_avx512 = {
    .gemm = gemm_vector,
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
