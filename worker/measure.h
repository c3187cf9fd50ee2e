/* What this worker's machine can do, as far as plans need it (DESIGN 6.3, "measured"): taken in
 * under a second at each start. Something else that runs at that moment can only make it slower,
 * so the best of the starts of a week counts, kept in the state directory. */
#pragma once

#include "kernels/kernels.h"
#include "proto/base/log.h"

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct Measure {
    double read_bytes_per_s;                 /* DRAM, all threads */
    double int8_ops_per_s, f32_ops_per_s;    /* multiply-adds x 2, all threads, weights in cache */
    double matmul_ops_per_s[DTYPE_LIMIT];    /* the same of each weight type; 0: there is none */
    double link_latency_s, link_bytes_per_s; /* one message over a TCP socket of this host */
    int64_t since_s; /* Unix seconds: the figures are the best of the measurements since then */
} Measure;

typedef struct MeasureOptions {
    KernelIsa isa;
    unsigned threads;
    const int *cpus;       /* `threads` cpu numbers or NULL; borrowed */
    uint64_t memory_bytes; /* the worker's budget: the read buffer takes at most a quarter */
    int64_t now_s;         /* Unix seconds */
    const char *turn;      /* those of one name measure one after another: an abstract socket's */
} MeasureOptions;

/* Measures, one worker of a host at a time (others wait, at most 3 s), and keeps the better of each
 * figure in DIR/measure: of what is there from the same cpu, threads, cpu list and isa, at most a
 * week old, and of now. What is kept is taken as it is while another worker of the host measures. A
 * directory that cannot be written is no error. False + MEMORY when there is no memory or no thread
 * for it. Blocks. */
bool measure_get(const char *state_dir, const MeasureOptions *options, Measure *out, Log *log,
                 GError **error);
/* The processor's name from /proc/cpuinfo; returned. */
char *measure_cpu_name(void);
