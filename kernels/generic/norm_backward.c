#include "kernels/generic/train.h"

#include "kernels/ops/math.h"

/* Mean and scale of a layer-normed row. */
static void layer_stats(const float *x, float eps, uint32_t n, float stats[2])
{
    float sums[32] = {0}, squares[32] = {0};
    for (uint32_t i = 0; i < n; i++) {
        sums[i % 32] += x[i];
    }
    stats[0] = lanes_fold(sums) / (float)n;
    for (uint32_t i = 0; i < n; i++) {
        const float d = x[i] - stats[0];
        squares[i % 32] = fmaf(d, d, squares[i % 32]);
    }
    stats[1] = 1.0f / sqrtf(lanes_fold(squares) / (float)n + eps);
}

void layer_norm_generic(const float *x, const float *weight, const float *bias, float eps,
                        uint32_t n, float *out)
{
    float stats[2];
    layer_stats(x, eps, n, stats);
    for (uint32_t i = 0; i < n; i++) {
        out[i] = fmaf((x[i] - stats[0]) * stats[1], weight[i], bias[i]);
    }
}

/* (32 lanes of g * h) / n */
static float mean_product(const float *x, const float *weight, const float *dy, uint32_t n,
                          const float stats[2])
{
    float lanes[32] = {0};
    for (uint32_t i = 0; i < n; i++) {
        const float h = (x[i] - stats[0]) * stats[1], g = dy[i] * weight[i];
        lanes[i % 32] = fmaf(g, h, lanes[i % 32]);
    }
    return lanes_fold(lanes) / (float)n;
}

void rms_norm_backward_generic(const float *x, const float *weight, const float *dy, float eps,
                               uint32_t n, float *dx, float stats[2])
{
    float lanes[32] = {0};
    for (uint32_t i = 0; i < n; i++) {
        lanes[i % 32] = fmaf(x[i], x[i], lanes[i % 32]);
    }
    stats[0] = 0.0f;
    stats[1] = 1.0f / sqrtf(lanes_fold(lanes) / (float)n + eps);
    const float c = mean_product(x, weight, dy, n, stats);
    for (uint32_t i = 0; i < n; i++) {
        dx[i] = fmaf(stats[1], fmaf(-(x[i] * stats[1]), c, dy[i] * weight[i]), dx[i]);
    }
}

void layer_norm_backward_generic(const float *x, const float *weight, const float *dy, float eps,
                                 uint32_t n, float *dx, float stats[2])
{
    layer_stats(x, eps, n, stats);
    float lanes[32] = {0};
    for (uint32_t i = 0; i < n; i++) {
        lanes[i % 32] += dy[i] * weight[i];
    }
    const float a = lanes_fold(lanes) / (float)n;
    const float c = mean_product(x, weight, dy, n, stats);
    for (uint32_t i = 0; i < n; i++) {
        const float h = (x[i] - stats[0]) * stats[1];
        dx[i] = fmaf(stats[1], fmaf(-h, c, dy[i] * weight[i] - a), dx[i]);
    }
}

void norm_weight_backward_generic(const float *x, const float *dy, size_t ld, const float *stats,
                                  uint32_t rows, uint32_t n, float *dweight, float *dbias)
{
    for (uint32_t r = 0; r < rows; r++) {
        for (uint32_t i = 0; i < n; i++) {
            const float h = (x[r * ld + i] - stats[2 * r]) * stats[2 * r + 1];
            dweight[i] = fmaf(dy[r * ld + i], h, dweight[i]);
            if (dbias != NULL) {
                dbias[i] += dy[r * ld + i];
            }
        }
    }
}

void sum_rows_generic(const float *dy, size_t ld, uint32_t rows, uint32_t n, float *out)
{
    for (uint32_t r = 0; r < rows; r++) {
        for (uint32_t i = 0; i < n; i++) {
            out[i] += dy[r * ld + i];
        }
    }
}
