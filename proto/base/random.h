/* Random: where keys, ids and seeds come from. Real fill: getrandom(2). Simulated: a seeded stream.
 * Never used for sampling: that is Philox keyed by the request (NUMERICS 12). */
#pragma once

#include <stddef.h>
#include <stdint.h>

typedef struct Random Random;
struct Random {
    void (*fill)(Random *self, void *out, size_t n_bytes);
};

/* The process's secure random source; never NULL, any thread. */
Random *random_system(void);

/* A reproducible stream for tests (SplitMix64). *state* is caller-owned and lives as long as the
 * Random; one thread. */
typedef struct RandomSeeded {
    Random base;
    uint64_t state;
} RandomSeeded;
void random_seeded_init(RandomSeeded *self, uint64_t seed);

static inline void random_fill(Random *r, void *out, size_t n)
{
    r->fill(r, out, n);
}
static inline uint64_t random_u64(Random *r)
{
    uint64_t v;
    r->fill(r, &v, sizeof v);
    return v;
}
