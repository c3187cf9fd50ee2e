/* Dropout keyed by (seed, site, sample, position, channel) (NUMERICS 18): an element is kept or not
 * whatever the layout, micro-batch or thread. */
#pragma once

#include <stddef.h>
#include <stdint.h>

typedef struct Dropout {
    float rate; /* of elements that become 0; 0: none */
    uint64_t seed;
} Dropout;

/* x[channel] = 0, or x[channel] * (1 / (1 - rate)), for the `width` channels of one row: 0 where
 * the word channel % 4 of Philox4x32-10 with key = seed (low word first), counter = (channel / 4,
 * site << 20 | position, sample, its high word) is below rate 2^32. sample: number over all steps;
 * position below 2^20, site below 2^12. The gradient is the same function of the gradient. */
void dropout_row(const Dropout *d, uint32_t site, uint64_t sample, uint32_t position, float *x,
                 uint32_t width);
/* Words below this are dropped. */
static inline uint64_t dropout_limit(const Dropout *d)
{
    return (uint64_t)((double)d->rate * 0x1p32);
}
