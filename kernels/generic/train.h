/* The generic (specifying) implementations of the ops that only training has; contracts:
 * kernels/ops. */
#pragma once

#include "kernels/ops/act.h"
#include "kernels/ops/attention_backward.h"
#include "kernels/ops/gemm.h"
#include "kernels/ops/norm.h"
#include "kernels/ops/optimizer.h"
#include "kernels/ops/xent.h"

void gemm_generic(const GemmArgs *args);
void gemm_bf16_generic(const GemmArgs *args);
void gemm_f16_generic(const GemmArgs *args);
void layer_norm_generic(const float *x, const float *weight, const float *bias, float eps,
                        uint32_t n, float *out);
void rms_norm_backward_generic(const float *x, const float *weight, const float *dy, float eps,
                               uint32_t n, float *dx, float stats[2]);
void layer_norm_backward_generic(const float *x, const float *weight, const float *dy, float eps,
                                 uint32_t n, float *dx, float stats[2]);
void norm_weight_backward_generic(const float *x, const float *dy, size_t ld, const float *stats,
                                  uint32_t rows, uint32_t n, float *dweight, float *dbias);
void sum_rows_generic(const float *dy, size_t ld, uint32_t rows, uint32_t n, float *out);
void gelu_generic(const float *x, uint32_t n, float *out);
void gelu_backward_generic(const float *x, const float *dy, uint32_t n, float *dx);
void swiglu_backward_generic(const float *gate, const float *up, const float *dy, uint32_t n,
                             float *dgate, float *dup);
void attention_backward_generic(const AttentionBackwardArgs *args);
void xent_backward_generic(const float *z, uint32_t n, float m, float l, uint32_t target,
                           float factor, float *dz);
void gradient_finish_generic(float *g, size_t n, float back, float tokens);
float sum_squares_generic(const float *x, size_t ld, uint32_t rows, uint32_t columns);
void adamw_generic(const AdamwScalars *s, size_t n, const float *g, float *m, float *v, float *w);
void sgd_generic(const SgdScalars *s, size_t n, const float *g, float *b, float *w);
