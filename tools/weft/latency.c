#include "tools/weft/latency.h"

#include <glib.h>
#include <math.h>

enum {
    PER_POWER = 128, /* buckets of a power of two */
    EXACT = 2 * PER_POWER,
    SHIFTS = 33, /* above them a time counts as the longest: 2^41 us are 25 days */
    N_BUCKETS = EXACT + SHIFTS * PER_POWER
};

struct Latency {
    uint64_t n, buckets[N_BUCKETS];
    int64_t least_us, most_us;
    double sum_us;
};

Latency *latency_new(void)
{
    return g_new0(Latency, 1);
}

void latency_free(Latency *l)
{
    g_free(l);
}

/* Bucket EXACT + k * PER_POWER + j holds the times from (PER_POWER + j) << (k + 1) on. */
static unsigned bucket_of(uint64_t us)
{
    if (us < EXACT) {
        return (unsigned)us;
    }
    const unsigned shift = (unsigned)g_bit_storage(us) - g_bit_storage(PER_POWER);
    if (shift > SHIFTS) {
        return N_BUCKETS - 1;
    }
    return EXACT + (shift - 1) * PER_POWER + (unsigned)(us >> shift) - PER_POWER;
}

static double middle_of(unsigned bucket)
{
    if (bucket < EXACT) {
        return bucket;
    }
    const unsigned shift = (bucket - EXACT) / PER_POWER + 1,
                   step = PER_POWER + (bucket - EXACT) % PER_POWER;
    const uint64_t least = (uint64_t)step << shift, width = UINT64_C(1) << shift;
    return (double)least + (double)(width - 1) / 2;
}

void latency_add(Latency *l, int64_t us)
{
    us = MAX(us, 0);
    l->least_us = l->n == 0 ? us : MIN(l->least_us, us);
    l->most_us = MAX(l->most_us, us);
    l->sum_us += (double)us;
    l->buckets[bucket_of((uint64_t)us)]++;
    l->n++;
}

uint64_t latency_n(const Latency *l)
{
    return l->n;
}

double latency_quantile_s(const Latency *l, double q)
{
    if (l->n == 0) {
        return 0;
    }
    const uint64_t rank = (uint64_t)CLAMP(ceil(q * (double)l->n), 1, (double)l->n);
    uint64_t below = 0;
    unsigned i = 0;
    while (below + l->buckets[i] < rank) {
        below += l->buckets[i++];
    }
    return CLAMP(middle_of(i), (double)l->least_us, (double)l->most_us) / 1e6;
}

double latency_max_s(const Latency *l)
{
    return (double)l->most_us / 1e6;
}

double latency_mean_s(const Latency *l)
{
    return l->n > 0 ? l->sum_us / (double)l->n / 1e6 : 0;
}
