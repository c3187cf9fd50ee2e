/* Workers of one host that were given the same CPUs. */
#pragma once

#include <stdint.h>

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
