/* What this worker's machine can do, as far as plans need it (DESIGN 6.3, "measured"): taken in
 * under a second at start and kept in the state directory, so that restarts are instant. */
#pragma once

#include "kernels/kernels.h"
#include "proto/base/log.h"

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct Measure {
    double read_bytes_per_s;                 /* DRAM, all threads */
    double int8_ops_per_s, f32_ops_per_s;    /* multiply-adds x 2, all threads, weights in cache */
    double link_latency_s, link_bytes_per_s; /* one message over a TCP socket of this host */
} Measure;

typedef struct MeasureOptions {
    KernelIsa isa;
    unsigned threads;
    const int *cpus;       /* `threads` cpu numbers or NULL; borrowed */
    uint64_t memory_bytes; /* the worker's budget: the read buffer takes at most a quarter */
} MeasureOptions;

/* Measures now; one worker of a host at a time (others wait, at most 3 s). False + MEMORY when
 * there is no memory for it. Blocks. */
bool measure_run(const MeasureOptions *options, Measure *out, GError **error);
/* From DIR/measure if it was taken with the same cpu, threads, cpu list and isa, else measured and
 * kept there. A directory that cannot be written is no error. */
bool measure_get(const char *state_dir, const MeasureOptions *options, Measure *out, Log *log,
                 GError **error);
/* The processor's name from /proc/cpuinfo; returned. */
char *measure_cpu_name(void);
