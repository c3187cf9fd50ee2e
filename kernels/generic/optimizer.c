#include "kernels/generic/train.h"

#include "kernels/ops/math.h"

void gradient_finish_generic(float *g, size_t n, float back, float tokens)
{
    for (size_t i = 0; i < n; i++) {
        g[i] = (g[i] * back) / tokens;
    }
}

float sum_squares_generic(const float *x, size_t ld, uint32_t rows, uint32_t columns)
{
    float lanes[32] = {0};
    for (uint32_t r = 0; r < rows; r++) {
        for (uint32_t c = 0; c < columns; c++) {
            float *lane = &lanes[((size_t)r * columns + c) % 32];
            *lane = fmaf(x[r * ld + c], x[r * ld + c], *lane);
        }
    }
    return lanes_fold(lanes);
}

static float node_range(const float *values, uint32_t a, uint32_t b)
{
    const uint32_t middle = a + (b - a + 1) / 2;
    return b - a == 1 ? values[a] : node_range(values, a, middle) + node_range(values, middle, b);
}

float node_sum(const float *values, uint32_t n)
{
    return node_range(values, 0, n);
}

void adamw_generic(const AdamwScalars *s, size_t n, const float *g, float *m, float *v, float *w)
{
    for (size_t i = 0; i < n; i++) {
        const float h = g[i] * s->clip;
        m[i] = fmaf(s->beta1, m[i], s->rest1 * h);
        v[i] = fmaf(s->beta2, v[i], (s->rest2 * h) * h);
        const float u = (m[i] * s->correct1) / (sqrtf(v[i] * s->correct2) + s->eps);
        w[i] = fmaf(-s->rate, fmaf(s->decay, w[i], u), w[i]);
    }
}

void sgd_generic(const SgdScalars *s, size_t n, const float *g, float *b, float *w)
{
    for (size_t i = 0; i < n; i++) {
        const float h = fmaf(s->decay, w[i], g[i] * s->clip);
        b[i] = fmaf(s->momentum, b[i], h);
        w[i] = fmaf(-s->rate, s->nesterov ? fmaf(s->momentum, b[i], h) : b[i], w[i]);
    }
}
