/* RMS norm. out[i] = (x[i] * scale) * weight[i], scale = 1 / sqrt(mean + eps), mean = sum / n with
 * sum of squares in 32 virtual lanes (NUMERICS 4: lane = fmaf(x,x,lane), lanes fold by node(0,32)).
 * in place allowed. */
#pragma once
#include <stddef.h>
#include <stdint.h>
typedef void (*RmsNormFn)(const float *x, const float *weight, float eps, uint32_t n, float *out);

/* Layer norm: h = (x - mean) * scale, out = fmaf(h, weight, bias); mean = (32 lanes of x) / n,
 * scale = 1 / sqrt(variance + eps), variance = (32 lanes of squares of x - mean) / n, lanes and
 * squares as above. In place allowed. */
typedef void (*LayerNormFn)(const float *x, const float *weight, const float *bias, float eps,
                            uint32_t n, float *out);

/* ---- backward, one row: dx += the gradient of x, dy being that of out ----
 *
 * h as in the forward pass (RMS: h = x * scale), g = dy * weight (rounded), c = (32 lanes, lane =
 * fmaf(g, h, lane)) / n:
 *   RMS    dx = fmaf(scale, fmaf(-h, c, g), dx)
 *   layer  dx = fmaf(scale, fmaf(-h, c, g - a), dx), a = (32 lanes of g) / n
 * stats[0] = mean (RMS: 0), stats[1] = scale, for norm_weight_backward. dx overlaps no input. */
typedef void (*NormBackwardFn)(const float *x, const float *weight, const float *dy, float eps,
                               uint32_t n, float *dx, float stats[2]);

/* Gradients of weight and bias over rows in order, n channels of each row (a thread takes some of
 * them, never some rows): h = (x - mean) * scale, dweight = fmaf(dy, h, dweight), dbias = dbias +
 * dy. x, dy: [rows][ld]; stats: [rows][2]; dbias may be NULL. */
typedef void (*NormWeightBackwardFn)(const float *x, const float *dy, size_t ld, const float *stats,
                                     uint32_t rows, uint32_t n, float *dweight, float *dbias);
/* out = out + dy over rows in order: the gradient of a bias. dy: [rows][ld], n channels. */
typedef void (*SumRowsFn)(const float *dy, size_t ld, uint32_t rows, uint32_t n, float *out);
