/* What this machine can do at most, measured: the denominators of every fraction that the benches
 * print. */
#pragma once

#include "kernels/kernels.h"
#include "kernels/parallel.h"

typedef struct Peaks {
    double read_bytes_per_s; /* plain read loop over memory far beyond the caches */
    double int8_ops_per_s;   /* multiply and add count as two */
    double f32_ops_per_s;
} Peaks;

/* All threads of the pool at once; medians. Takes about 0.2 s. False without memory. */
bool peaks_measure(Pool *pool, KernelIsa isa, Peaks *out);

/* Operations of one call of the isa's int8 (f32) loop on the calling thread, for pairs interleaved
 * with a kernel: time it oneself. */
double peaks_int8_loop(KernelIsa isa);
double peaks_f32_loop(KernelIsa isa);

/* Reads n bytes (256 at a time) with the prefetch that the kernels have. */
uint64_t peaks_read_loop(const uint8_t *p, size_t n);

double peaks_now_s(void);
double peaks_median(double *values, int n);
