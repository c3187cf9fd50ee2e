/* Dropout keyed by (seed, site, sample, position, channel) (NUMERICS 18): an element is kept or not
 * whatever the layout, micro-batch or thread. */
#pragma once

#include <stddef.h>
#include <stdint.h>

typedef struct Dropout {
    float rate; /* of elements that become 0; 0: none */
    uint64_t seed;
} Dropout;

/* Sites: the embedding's result, and each layer's two sub-layers' results. */
static inline uint32_t dropout_site_attention(uint32_t layer)
{
    return 1 + 2 * layer;
}
static inline uint32_t dropout_site_ffn(uint32_t layer)
{
    return 2 + 2 * layer;
}
#define DROPOUT_SITE_EMBEDDING 0u

/* x[channel] = 0, or x[channel] * (1 / (1 - rate)), for the `width` channels of one row. sample:
 * number over all steps; position below 2^20, site below 2^12. The gradient is the same function of
 * the gradient. */
void dropout_row(const Dropout *d, uint32_t site, uint64_t sample, uint32_t position, float *x,
                 uint32_t width);
