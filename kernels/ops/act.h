/* Element-wise ops of the feed-forward and residual paths, and the one exponential (NUMERICS 7;
 * KERNELS.md "exp"). */
#pragma once
#include <stddef.h>
#include <stdint.h>

/* out[i] = (g / (1 + exp(-g))) * up[i], exp = exp32() below; in place allowed. */
typedef void (*SwigluFn)(const float *gate, const float *up, uint32_t n, float *out);
/* x[i] += y[i] */
typedef void (*AddFn)(float *x, const float *y, size_t n);

/* GELU in the tanh form of GPT-2 (Hendrycks, Gimpel 2016), (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)):
 * s = x * fmaf(GELU_CUBE, x * x, GELU_LINEAR), out = x / (1 + exp(-s)). In place allowed. */
#define GELU_LINEAR 1.5957691216057308f /* 2 sqrt(2 / pi) */
#define GELU_CUBE 0.07135481627159856f  /* 0.044715 times that */
#define GELU_CUBE3 0.21406444881479567f /* 3 times that */
typedef void (*GeluFn)(const float *x, uint32_t n, float *out);

/* dx = dy * the slope: s as above; e = exp(-(-88 > s ? -88 : s)), y = 1 / (1 + e), z = y * (e * y)
 * (so that no infinity meets a zero); slope = fmaf(x * z, fmaf(GELU_CUBE3, x * x, GELU_LINEAR), y).
 * dx may be dy or x. */
typedef void (*GeluBackwardFn)(const float *x, const float *dy, uint32_t n, float *dx);

/* e = exp(-(-88 > gate ? -88 : gate)), y = 1 / (1 + e), z = y * (e * y):
 * dup = dy * (gate * y), dgate = (dy * up) * fmaf(gate, z, y). dgate may be gate, dup may be up, dy
 * is apart. */
typedef void (*SwigluBackwardFn)(const float *gate, const float *up, const float *dy, uint32_t n,
                                 float *dgate, float *dup);

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
