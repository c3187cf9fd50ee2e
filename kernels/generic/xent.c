#include "kernels/generic/train.h"

#include "kernels/ops/math.h"

float xent_loss(float m, float l, float z)
{
    return (m - z) + log32_inline(l);
}

void xent_backward_generic(const float *z, uint32_t n, float m, float l, uint32_t target,
                           float factor, float *dz)
{
    const float r = 1.0f / l;
    for (uint32_t i = 0; i < n; i++) {
        const float p = exp32_inline(z[i] - m) * r;
        dz[i] = (i == target ? p - 1.0f : p) * factor;
    }
}
