#include "kernels/generic/ops.h"

#include "kernels/ops/math.h"
#include "kernels/ops/philox.h"

void philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4])
{
    uint32_t c[4] = {counter[0], counter[1], counter[2], counter[3]};
    uint32_t k[2] = {key[0], key[1]};
    for (unsigned round = 0; round < PHILOX_ROUNDS; round++) {
        const uint64_t a = (uint64_t)PHILOX_M0 * c[0], b = (uint64_t)PHILOX_M1 * c[2];
        const uint32_t next[4] = {(uint32_t)(b >> 32) ^ c[1] ^ k[0], (uint32_t)b,
                                  (uint32_t)(a >> 32) ^ c[3] ^ k[1], (uint32_t)a};
        memcpy(c, next, sizeof c);
        k[0] += PHILOX_W0;
        k[1] += PHILOX_W1;
    }
    memcpy(out, c, sizeof c);
}

void gumbel_generic(const GumbelKey *key, uint32_t first_id, uint32_t n, float *noise)
{
    const uint32_t k[2] = {(uint32_t)key->seed, (uint32_t)(key->seed >> 32)};
    uint32_t random[4] = {0};
    for (uint32_t i = 0; i < n; i++) {
        if (i % 4 == 0) {
            const uint32_t counter[4] = {key->position, (first_id + i) / 4, key->purpose,
                                         key->choice};
            philox4x32(counter, k, random);
        }
        noise[i] = gumbel_inline(random[i % 4]);
    }
}

bool chunk_stats_generic(const float *logits, uint32_t n, float *m_out, float *l_out)
{
    float m = logits[0];
    bool finite = true;
    for (uint32_t i = 0; i < n; i++) {
        m = logits[i] > m ? logits[i] : m;
        finite = finite && fabsf(logits[i]) < INFINITY;
    }
    float lanes[32] = {0};
    for (uint32_t i = 0; i < n; i++) {
        lanes[i % 32] += exp32_inline(logits[i] - m);
    }
    *m_out = m + 0.0f; /* a maximum of -0 and +0 is +0 in whatever order it was found */
    *l_out = lanes_fold(lanes);
    return finite;
}

/* node(a,b) of (m, l); the result lies in m[a], l[a]. */
static void merge_range(float *m, float *l, uint32_t a, uint32_t b)
{
    if (b - a < 2) {
        return;
    }
    const uint32_t middle = a + (b - a + 1) / 2;
    merge_range(m, l, a, middle);
    merge_range(m, l, middle, b);
    const float top = m[a] > m[middle] ? m[a] : m[middle];
    l[a] = fmaf(l[a], exp32_inline(m[a] - top), l[middle] * exp32_inline(m[middle] - top));
    m[a] = top;
}

void chunk_stats_merge(float *m, float *l, uint32_t n)
{
    merge_range(m, l, 0, n);
}
