/* Element-wise ops of the feed-forward and residual paths, and the one exponential (NUMERICS 7;
 * KERNELS.md "exp"). */
#pragma once
#include <stddef.h>
#include <stdint.h>

/* out[i] = (g / (1 + exp(-g))) * up[i], exp = exp32() below; in place allowed. */
typedef void (*SwigluFn)(const float *gate, const float *up, uint32_t n, float *out);
/* x[i] += y[i] */
typedef void (*AddFn)(float *x, const float *y, size_t n);

/* exp in f32: the same sequence of fma, add, mul in every variant (kernels/ops/math.h has the
 * inline scalar). exp32(-inf) = +0. */
float exp32(float x);

/* Double-precision functions of +,-,*,/,fma,sqrt,rint only, for tables and samplers (no libm,
 * NUMERICS 7). Within 1e-14 relative (sin, cos: absolute) for |x| < 1e9. */
double det_exp(double x);
double det_log(double x);
double det_pow(double x, double y); /* x > 0 */
double det_sin(double x);
double det_cos(double x);
