#include "proto/plan/cpu_share.h"

#include "proto/base/hash.h"

#include <glib.h>
#include <stdbool.h>
#include <string.h>

#define WORDS (CPU_LIMIT / 64)

typedef struct CpuSet {
    uint64_t words[WORDS];
} CpuSet;

uint32_t cpu_rank_threads(uint32_t threads, size_t n_devices)
{
    return (uint32_t)MAX(threads / MAX(n_devices, 1u), 1u);
}

static void add_set(CpuSet *set, const CpuShare *share)
{
    for (uint32_t i = 0; i < share->n_cpus; i++) {
        if (share->cpus[i] < CPU_LIMIT) {
            set->words[share->cpus[i] / 64] |= UINT64_C(1) << share->cpus[i] % 64;
        }
    }
}

static CpuSet set_of(const CpuShare *share)
{
    CpuSet set = {{0}};
    add_set(&set, share);
    return set;
}

static bool overlap(const CpuSet *a, const CpuSet *b)
{
    uint64_t common = 0;
    for (uint32_t i = 0; i < WORDS; i++) {
        common |= a->words[i] & b->words[i];
    }
    return common != 0;
}

static uint32_t cpus_in(const CpuSet *set)
{
    uint32_t n = 0;
    for (uint32_t w = 0; w < WORDS; w++) {
        n += (uint32_t)__builtin_popcountll(set->words[w]);
    }
    return n;
}

static bool same_host(const CpuShare *a, const CpuShare *b)
{
    return a->host != NULL && b->host != NULL && *a->host != '\0' && strcmp(a->host, b->host) == 0;
}

double cpu_crowding(const CpuShare *shares, uint32_t n, uint32_t own)
{
    const CpuSet mine = set_of(&shares[own]);
    CpuSet all = mine;
    uint32_t threads = shares[own].threads;
    bool shared = false;
    for (uint32_t i = 0; i < n; i++) {
        if (i == own || !same_host(&shares[i], &shares[own])) {
            continue;
        }
        const CpuSet other = set_of(&shares[i]);
        if (overlap(&mine, &other)) {
            shared = true;
            threads += shares[i].threads;
            add_set(&all, &shares[i]);
        }
    }
    return shared ? MAX(1.0, (double)threads / cpus_in(&all)) : 1.0;
}

uint32_t cpu_stages_at_once(const CpuShare *shares, const uint32_t *stages, uint32_t n)
{
    g_autofree double *crowding = g_new(double, n);
    double at_once = 0.0;
    for (uint32_t i = 0; i < n; i++) {
        crowding[i] = cpu_crowding(shares, n, i);
    }
    for (uint32_t i = 0; i < n; i++) {
        double worst = 1.0;
        bool first = true; /* of its stage */
        for (uint32_t j = 0; j < n; j++) {
            if (stages[j] == stages[i]) {
                first = first && j >= i;
                worst = MAX(worst, crowding[j]);
            }
        }
        at_once += first ? 1.0 / worst : 0.0;
    }
    return (uint32_t)MAX(at_once + 0.5, 1.0);
}

static bool has_cpu(const CpuSet *set, uint32_t cpu)
{
    return cpu < CPU_LIMIT && (set->words[cpu / 64] >> cpu % 64 & 1u) != 0;
}

/* "weft-cpus-0-3,8"; what is longer than a name may be is hashed. */
static char *name_of(const CpuSet *set)
{
    GString *name = g_string_new("weft-cpus-");
    const size_t prefix = name->len;
    for (uint32_t cpu = 0, last; cpu < CPU_LIMIT; cpu = last + 1) {
        last = cpu;
        if (!has_cpu(set, cpu)) {
            continue;
        }
        while (has_cpu(set, last + 1)) {
            last++;
        }
        g_string_append_printf(name, name->len > prefix ? ",%u" : "%u", cpu);
        if (last > cpu) {
            g_string_append_printf(name, "-%u", last);
        }
    }
    if (name->len > CPU_TURN_NAME_LIMIT) {
        const Hash128 hash = hash128(set, sizeof *set);
        char hex[33];
        hash128_hex(&hash, hex);
        g_string_truncate(name, prefix);
        g_string_append(name, hex);
    }
    return g_string_free(name, FALSE);
}

char *cpu_turn_name(const CpuShare *shares, const uint32_t *stages, uint32_t n, uint32_t own)
{
    const CpuSet mine = set_of(&shares[own]);
    bool shared = false;
    if (cpus_in(&mine) >= 2 * shares[own].threads) {
        return NULL;
    }
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t j = 0; j < i; j++) {
            if (stages[i] == stages[j]) {
                return NULL;
            }
        }
        if (i != own && same_host(&shares[i], &shares[own])) {
            const CpuSet other = set_of(&shares[i]);
            const bool overlaps = overlap(&mine, &other);
            if (overlaps && memcmp(&mine, &other, sizeof mine) != 0) {
                return NULL;
            }
            shared = shared || overlaps;
        }
    }
    if (!shared) {
        return NULL;
    }
    return name_of(&mine);
}

uint32_t cpu_roam(const CpuShare *shares, uint32_t n, uint32_t own, uint32_t *out)
{
    CpuSet all = set_of(&shares[own]);
    uint32_t n_out = 0;
    if (cpu_crowding(shares, n, own) <= 1.0) {
        return 0;
    }
    for (uint32_t i = 0; i < n; i++) {
        if (same_host(&shares[i], &shares[own])) {
            add_set(&all, &shares[i]);
        }
    }
    for (uint32_t cpu = 0; cpu < CPU_LIMIT; cpu++) {
        if ((all.words[cpu / 64] >> cpu % 64 & 1u) != 0) {
            out[n_out++] = cpu;
        }
    }
    return n_out;
}
