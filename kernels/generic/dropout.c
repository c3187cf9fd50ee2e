#include "kernels/ops/dropout.h"

#include "kernels/ops/sample.h"

void dropout_row(const Dropout *d, uint32_t site, uint64_t sample, uint32_t position, float *x,
                 uint32_t width)
{
    const uint32_t key[2] = {(uint32_t)d->seed, (uint32_t)(d->seed >> 32)};
    const uint64_t dropped = dropout_limit(d);
    const float factor = 1.0f / (1.0f - d->rate);
    for (uint32_t block = 0; 4 * block < width; block++) {
        const uint32_t counter[4] = {block, site << 20 | position, (uint32_t)sample,
                                     (uint32_t)(sample >> 32)};
        uint32_t words[4];
        philox4x32(counter, key, words);
        for (uint32_t i = 4 * block; i < width && i < 4 * block + 4; i++) {
            x[i] = words[i % 4] < dropped ? 0.0f : x[i] * factor;
        }
    }
}
