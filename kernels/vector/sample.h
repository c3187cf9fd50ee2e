#pragma once

#include "kernels/ops/sample.h"

/* Philox4x32-10 of the VEC_LANES counters (position, first_block + lane, purpose, choice). */
VEC_FN void philox_lanes(const GumbelKey *key, uint32_t first_block, VecInt c[4])
{
    uint32_t k0 = (uint32_t)key->seed, k1 = (uint32_t)(key->seed >> 32);
    c[0] = vec_int_all(key->position);
    c[1] = vec_int_add(vec_int_all(first_block), vec_int_iota());
    c[2] = vec_int_all(key->purpose);
    c[3] = vec_int_all(key->choice);
    for (unsigned round = 0; round < PHILOX_ROUNDS; round++) {
        VecInt a_high, a_low, b_high, b_low;
        vec_int_multiply(c[0], PHILOX_M0, &a_high, &a_low);
        vec_int_multiply(c[2], PHILOX_M1, &b_high, &b_low);
        c[0] = vec_int_xor(vec_int_xor(b_high, c[1]), vec_int_all(k0));
        c[1] = b_low;
        c[2] = vec_int_xor(vec_int_xor(a_high, c[3]), vec_int_all(k1));
        c[3] = a_low;
        k0 += PHILOX_W0;
        k1 += PHILOX_W1;
    }
}

static void gumbel_vector(const GumbelKey *key, uint32_t first_id, uint32_t n, float *noise)
{
    enum { AT_ONCE = 4 * VEC_LANES };
    for (uint32_t i = 0; i < n; i += AT_ONCE) {
        VecInt bits[4];
        Vec words[4];
        philox_lanes(key, (first_id + i) / 4, bits);
        for (unsigned w = 0; w < 4; w++) {
            words[w] = vec_gumbel(bits[w]);
        }
        if (n - i >= AT_ONCE) {
            vec_store_interleaved(noise + i, words);
        } else {
            float last[AT_ONCE];
            vec_store_interleaved(last, words);
            memcpy(noise + i, last, (n - i) * sizeof(float));
        }
    }
}

static bool chunk_stats_vector(const float *logits, uint32_t n, float *m_out, float *l_out)
{
    enum { N_VEC = 32 / VEC_LANES };
    const uint32_t whole = n - n % VEC_LANES, rest = n % VEC_LANES;
    Vec top = vec_all(-INFINITY);
    int finite = 1;
    for (uint32_t i = 0; i < whole; i += VEC_LANES) {
        const Vec x = vec_load(logits + i);
        top = vec_max(x, top);
        finite &= vec_is_finite(x);
    }
    if (rest != 0) {
        const Vec x = vec_load_first(logits + whole, rest);
        top = vec_max(vec_between(x, top, 0, (int)rest), top);
        finite &= vec_is_finite(x);
    }
    const float m = vec_max_lane(top);
    Vec lanes[N_VEC];
    for (unsigned v = 0; v < N_VEC; v++) {
        lanes[v] = vec_zero();
    }
    uint32_t i = 0;
    for (; i < whole; i += VEC_LANES) {
        Vec *lane = &lanes[i / VEC_LANES % N_VEC];
        *lane = vec_add(*lane, vec_exp(vec_sub(vec_load(logits + i), vec_all(m))));
    }
    if (rest != 0) { /* lanes beyond n get +0, which changes no sum of exponentials */
        Vec *lane = &lanes[i / VEC_LANES % N_VEC];
        const Vec p = vec_exp(vec_sub(vec_load_first(logits + i, rest), vec_all(m)));
        *lane = vec_add(*lane, vec_between(p, vec_zero(), 0, (int)rest));
    }
    *m_out = m + 0.0f;
    *l_out = vec_fold(lanes);
    return finite != 0;
}
