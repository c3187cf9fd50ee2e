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

/* Name of the CPUs that shares[own] computes on in turns, a step each, with the other stages that
 * have them; NULL: it needs no turn. In a pipeline whose stages have CPUs between them in fair
 * parts two steps that meet there meet again at every stage, while other CPUs idle; in turns they
 * part. Only where a stage has one rank (ranks of one compute at the same time) on CPUs for one at
 * a time that others have, all of them, or not at all. At most CPU_TURN_NAME_LIMIT bytes; g_free().
 */
#define CPU_TURN_NAME_LIMIT 100u
char *cpu_turn_name(const CpuShare *shares, const uint32_t *stages, uint32_t n, uint32_t own);

/* The CPUs over which shares[own] is to roam instead of staying on its own ones; fills
 * out[CPU_LIMIT] and returns how many, 0 = it stays. For ranks of equal work: pinned, two could
 * have one CPU between them while another idles, so where they share CPUs they roam over those of
 * all ranks on their host. */
uint32_t cpu_roam(const CpuShare *shares, uint32_t n, uint32_t own, uint32_t *out);
