#include "kernels/generic/train.h"

#include "kernels/ops/math.h"

void gelu_generic(const float *x, uint32_t n, float *out)
{
    for (uint32_t i = 0; i < n; i++) {
        const float s = x[i] * fmaf(GELU_CUBE, x[i] * x[i], GELU_LINEAR);
        out[i] = x[i] / (1.0f + exp32_inline(-s));
    }
}

/* The logistic function of s and its slope, finite for every s. */
static void logistic(float s, float *y, float *z)
{
    const float e = exp32_inline(-(-88.0f > s ? -88.0f : s));
    *y = 1.0f / (1.0f + e);
    *z = *y * (e * *y);
}

void gelu_backward_generic(const float *x, const float *dy, uint32_t n, float *dx)
{
    for (uint32_t i = 0; i < n; i++) {
        const float square = x[i] * x[i];
        float y, z;
        logistic(x[i] * fmaf(GELU_CUBE, square, GELU_LINEAR), &y, &z);
        dx[i] = dy[i] * fmaf(x[i] * z, fmaf(GELU_CUBE3, square, GELU_LINEAR), y);
    }
}

void swiglu_backward_generic(const float *gate, const float *up, const float *dy, uint32_t n,
                             float *dgate, float *dup)
{
    for (uint32_t i = 0; i < n; i++) {
        const float g = gate[i], u = up[i];
        float y, z;
        logistic(g, &y, &z);
        dup[i] = dy[i] * (g * y);
        dgate[i] = (dy[i] * u) * fmaf(g, z, y);
    }
}
