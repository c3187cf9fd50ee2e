#include "kernels/generic/ops.h"

#include "kernels/ops/math.h"

void rms_norm_generic(const float *x, const float *weight, float eps, uint32_t n, float *out)
{
    float lanes[32] = {0};
    for (uint32_t i = 0; i < n; i++) {
        lanes[i % 32] = fmaf(x[i], x[i], lanes[i % 32]);
    }
    const float mean = lanes_fold(lanes) / (float)n;
    const float scale = 1.0f / sqrtf(mean + eps);
    for (uint32_t i = 0; i < n; i++) {
        out[i] = (x[i] * scale) * weight[i];
    }
}
