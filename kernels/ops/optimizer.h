/* What the owner of a gradient tile does with it (NUMERICS 15, 17; FORMULAS 13, 19). Element by
 * element, so any cut gives the same bits. Scalars are computed once a step, in double with det_*,
 * rounded once and travel. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* g = (g * back) / tokens: the loss scale multiplied back, the mean over valid tokens. */
typedef void (*GradientFinishFn)(float *g, size_t n, float back, float tokens);

/* Sum of squares of a tile, elements row-major through 32 lanes (NUMERICS 4): lane (r * columns +
 * c) mod 32 = fmaf(x, x, lane), then node(0,32). x: [rows][ld]. */
typedef float (*SumSquaresFn)(const float *x, size_t ld, uint32_t rows, uint32_t columns);

/* node(0, n) of values, n >= 1. */
float node_sum(const float *values, uint32_t n);

/* AdamW (Loshchilov, Hutter 2019, algorithm 2):
 *   h = g * clip; m = fmaf(beta1, m, rest1 * h); v = fmaf(beta2, v, (rest2 * h) * h)
 *   u = (m * correct1) / (sqrt(v * correct2) + eps)
 *   w = fmaf(-rate, fmaf(decay, w, u), w) */
typedef struct AdamwScalars {
    float rate, beta1, rest1 /* 1 - beta1 */, beta2, rest2;
    float correct1, correct2; /* 1 / (1 - beta^t) */
    float eps, decay;         /* decay 0 for tensors without it */
    float clip;               /* min(1, limit / norm); 1 = none */
} AdamwScalars;
typedef void (*AdamwFn)(const AdamwScalars *s, size_t n, const float *g, float *m, float *v,
                        float *w);

/* SGD with momentum:
 *   h = fmaf(decay, w, g * clip); b = fmaf(momentum, b, h)
 *   w = fmaf(-rate, nesterov ? fmaf(momentum, b, h) : b, w) */
typedef struct SgdScalars {
    float rate, momentum, decay, clip;
    bool nesterov;
} SgdScalars;
typedef void (*SgdFn)(const SgdScalars *s, size_t n, const float *g, float *b, float *w);
