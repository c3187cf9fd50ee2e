/* Vectors of a row whose length is no whole number of them. */
#pragma once

#include <stdint.h>

/* The n-th vector of a row of n elements from i on: whole, or the rest with +0 behind it. */
VEC_FN Vec row_load(const float *p, uint32_t i, uint32_t n)
{
    return n - i >= VEC_LANES ? vec_load(p + i) : vec_load_first(p + i, n - i);
}

VEC_FN void row_store(float *p, uint32_t i, uint32_t n, Vec v)
{
    if (n - i >= VEC_LANES) {
        vec_store(p + i, v);
    } else {
        vec_store_first(p + i, v, n - i);
    }
}

/* v in the lanes that a row of n elements has from i on, +0 in the others: as an operand of a sum
 * that starts from +0 it changes no bit. */
VEC_FN Vec row_only(Vec v, uint32_t i, uint32_t n)
{
    return n - i >= VEC_LANES ? v : vec_between(v, vec_zero(), 0, (int)(n - i));
}
