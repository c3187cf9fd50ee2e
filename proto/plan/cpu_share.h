/* Compute threads: of each rank of a worker, and of workers of one host on the same CPUs. */
#pragma once

#include <stddef.h>
#include <stdint.h>

/* Of a worker's threads those of each rank: a rank on every device, or one (n_devices 0) on its
 * cores. 1 at least. */
uint32_t cpu_rank_threads(uint32_t threads, size_t n_devices);

#define CPU_LIMIT 4096u /* numbers from here on are left out of account */

typedef struct CpuShare {
    const char *host;     /* borrowed; NULL or "" = unknown: shares with nobody */
    uint32_t threads;     /* compute threads */
    const uint32_t *cpus; /* borrowed, [n_cpus]: where they may run; none = unknown */
    uint32_t n_cpus;
} CpuShare;

/* Compute threads per CPU where shares[own] runs when all n of them compute at once: the threads of
 * those that share a CPU with it over the CPUs of these; 1 at least. */
double cpu_crowding(const CpuShare *shares, uint32_t n, uint32_t own);

/* How many pipeline stages find CPUs at the same time, 1 at least: all of them, or fewer where
 * they share CPUs. stages[i] is the stage that shares[i] works for; a stage computes when all of
 * its shares do. */
uint32_t cpu_stages_at_once(const CpuShare *shares, const uint32_t *stages, uint32_t n);
