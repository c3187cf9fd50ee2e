/* RMS norm. out[i] = (x[i] * scale) * weight[i], scale = 1 / sqrt(mean + eps), mean = sum / n with
 * sum of squares in 32 virtual lanes (NUMERICS 4: lane = fmaf(x,x,lane), lanes fold by node(0,32)).
 * in place allowed. */
#pragma once
#include <stddef.h>
#include <stdint.h>
typedef void (*RmsNormFn)(const float *x, const float *weight, float eps, uint32_t n, float *out);
