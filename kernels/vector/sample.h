#pragma once

#include "kernels/ops/sample.h"

enum {
    PHILOX_VECS = 2, /* in flight at once: ten rounds are a long chain */
    GUMBEL_AT_ONCE = 4 * VEC_LANES * PHILOX_VECS,
};

/* Philox4x32-10 of the counters (position, first_block + VEC_LANES v + lane, purpose, choice). */
VEC_FN void philox_lanes(const GumbelKey *key, uint32_t first_block, VecInt c[PHILOX_VECS][4])
{
    uint32_t k0 = (uint32_t)key->seed, k1 = (uint32_t)(key->seed >> 32);
    for (unsigned v = 0; v < PHILOX_VECS; v++) {
        c[v][0] = vec_int_all(key->position);
        c[v][1] = vec_int_add(vec_int_all(first_block + v * VEC_LANES), vec_int_iota());
        c[v][2] = vec_int_all(key->purpose);
        c[v][3] = vec_int_all(key->choice);
    }
    for (unsigned round = 0; round < PHILOX_ROUNDS; round++) {
        for (unsigned v = 0; v < PHILOX_VECS; v++) {
            VecInt a_high, a_low, b_high, b_low;
            vec_int_multiply(c[v][0], PHILOX_M0, &a_high, &a_low);
            vec_int_multiply(c[v][2], PHILOX_M1, &b_high, &b_low);
            c[v][0] = vec_int_xor(vec_int_xor(b_high, c[v][1]), vec_int_all(k0));
            c[v][1] = b_low;
            c[v][2] = vec_int_xor(vec_int_xor(a_high, c[v][3]), vec_int_all(k1));
            c[v][3] = a_low;
        }
        k0 += PHILOX_W0;
        k1 += PHILOX_W1;
    }
}

VEC_FN void gumbel_group(const GumbelKey *key, uint32_t first_id, float *noise)
{
    VecInt bits[PHILOX_VECS][4];
    philox_lanes(key, first_id / 4, bits);
    for (unsigned v = 0; v < PHILOX_VECS; v++) {
        Vec words[4];
        for (unsigned w = 0; w < 4; w++) {
            words[w] = vec_gumbel(bits[v][w]);
        }
        vec_store_interleaved(noise + v * 4 * VEC_LANES, words);
    }
}

static void gumbel_vector(const GumbelKey *key, uint32_t first_id, uint32_t n, float *noise)
{
    uint32_t i = 0;
    for (; i + GUMBEL_AT_ONCE <= n; i += GUMBEL_AT_ONCE) {
        gumbel_group(key, first_id + i, noise + i);
    }
    if (i < n) {
        float last[GUMBEL_AT_ONCE];
        gumbel_group(key, first_id + i, last);
        memcpy(noise + i, last, (n - i) * sizeof(float));
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
