/* Sampling where the logits lie (NUMERICS 6, 12, 13): per vocabulary chunk of 1,024 ids. */
#pragma once
#include "proto/model/model_spec.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* max and sum of exp(x - max) of one chunk: lanes as NUMERICS 4. Returns false if any logit is not
 * finite. n <= 1024. */
typedef bool (*ChunkStatsFn)(const float *logits, uint32_t n, float *m_out, float *l_out);

/* noise[i] = Gumbel noise of id first_id + i: -log(-log(u)), u = (word id%4 of Philox4x32-10 + 1/2)
 * / 2^32, key = seed (low word first), counter = (position, id/4, purpose, choice); own log in f32
 * (math.h), the same bits everywhere. first_id is a multiple of 4. */
typedef struct GumbelKey {
    uint64_t seed;
    uint32_t choice, position, purpose;
} GumbelKey;
typedef void (*GumbelFn)(const GumbelKey *key, uint32_t first_id, uint32_t n, float *noise);

/* Philox4x32-10 (Salmon et al. 2011), reference vectors in the tests. */
void philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

/* Merge of (m, l) pairs in chunk order by node(0, n): left first, as NUMERICS 5. In place; result
 * in m[0], l[0]. */
void chunk_stats_merge(float *m, float *l, uint32_t n);
