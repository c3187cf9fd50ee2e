/* Latency: times in bounded memory, however many there are, with quantiles that are at most 0.4 %
 * off. A bucket is 1/128 of the power of two below it; up to 256 us it is one microsecond. */
#pragma once

#include <stdint.h>

typedef struct Latency Latency;

Latency *latency_new(void);
void latency_free(Latency *l); /* NULL-safe */
/* A time in microseconds; negative counts as 0. */
void latency_add(Latency *l, int64_t us);
uint64_t latency_n(const Latency *l);
/* The least time (s) that at least a fraction q of all does not exceed (nearest rank); 0 of none.
 */
double latency_quantile_s(const Latency *l, double q);
double latency_max_s(const Latency *l);
double latency_mean_s(const Latency *l);
