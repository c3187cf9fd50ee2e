/* Philox4x32-10 on a device: the words of philox4x32() (kernels/ops/sample.h). Included by .cu
 * files only. */
#pragma once

#include "kernels/cuda/device.h"
extern "C" {
#include "kernels/ops/philox.h"
}

__device__ static inline void philox(const uint32_t counter[4], const uint32_t key[2],
                                     uint32_t out[4])
{
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = key[0], k1 = key[1];
    for (unsigned round = 0; round < PHILOX_ROUNDS; round++) {
        const uint32_t high_a = __umulhi(PHILOX_M0, c0), low_a = PHILOX_M0 * c0;
        const uint32_t high_b = __umulhi(PHILOX_M1, c2), low_b = PHILOX_M1 * c2;
        c0 = high_b ^ c1 ^ k0;
        c1 = low_b;
        c2 = high_a ^ c3 ^ k1;
        c3 = low_a;
        k0 += PHILOX_W0;
        k1 += PHILOX_W1;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}
