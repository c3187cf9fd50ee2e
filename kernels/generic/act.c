#include "kernels/generic/ops.h"

#include "kernels/ops/math.h"

float exp32(float x)
{
    return exp32_inline(x);
}

void swiglu_generic(const float *gate, const float *up, uint32_t n, float *out)
{
    for (uint32_t i = 0; i < n; i++) {
        out[i] = (gate[i] / (1.0f + exp32_inline(-gate[i]))) * up[i];
    }
}

void add_generic(float *x, const float *y, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        x[i] += y[i];
    }
}
