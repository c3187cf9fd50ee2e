#include "proto/base/random.h"

#include <errno.h>
#include <glib.h>
#include <string.h>
#include <sys/random.h>

static void system_fill(Random *self, void *out, size_t n_bytes)
{
    uint8_t *p = out;
    while (n_bytes > 0) {
        ssize_t got = getrandom(p, n_bytes, 0);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            /* Keys must never be predictable: a process without entropy must not go on. */
            g_error("getrandom failed: %s", g_strerror(errno));
        }
        p += got;
        n_bytes -= (size_t)got;
    }
}

Random *random_system(void)
{
    static Random source = {.fill = system_fill};
    return &source;
}

/* SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014. */
static uint64_t splitmix_next(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* Each call starts at a fresh 64-bit word, so that what follows depends on the sequence of calls
 * only; bytes little-endian. */
static void seeded_fill(Random *self, void *out, size_t n_bytes)
{
    RandomSeeded *seeded = (RandomSeeded *)self;
    uint8_t *p = out;
    while (n_bytes > 0) {
        uint64_t word = GUINT64_TO_LE(splitmix_next(&seeded->state));
        size_t n = MIN(n_bytes, sizeof word);
        memcpy(p, &word, n);
        p += n;
        n_bytes -= n;
    }
}

void random_seeded_init(RandomSeeded *self, uint64_t seed)
{
    self->base.fill = seeded_fill;
    self->state = seed;
}
