/* For the tests of transport/link and transport/group: n ranks, each with a port and links to all
 * others, over one fill; and a way to run each rank on a thread of its own. */
#pragma once

#include "transport/group/group.h"

#define CLUSTER_RANKS 8u

typedef struct ClusterRank {
    struct Cluster *cluster;
    uint32_t rank;
    LinkPort *port;
    Link *links[CLUSTER_RANKS];
    Group *group;
    atomic_bool abort;
    unsigned n_dead;
    char failure[160]; /* the first check that failed on this rank's thread */
} ClusterRank;

typedef struct Cluster {
    LinkFill *fill;
    uint32_t n_ranks;
    ClusterRank ranks[CLUSTER_RANKS];
} Cluster;

typedef struct ClusterOptions {
    uint32_t n_ranks;
    bool seal;
    size_t two_shot_bytes;
    size_t early_bytes;
    bool yield;
} ClusterOptions;

Cluster *cluster_new(const ClusterOptions *options);
void cluster_free(Cluster *cluster);
/* fn on a thread a rank; fails the test with the first failure that a rank noted. */
void cluster_run(Cluster *cluster, void (*fn)(ClusterRank *rank, void *user), void *user);

/* A check on a rank's thread: cmocka's own jump out of the test's thread. */
#define rank_check(rank_, condition)                                                               \
    do {                                                                                           \
        if (!(condition) && (rank_)->failure[0] == '\0') {                                         \
            g_snprintf((rank_)->failure, sizeof(rank_)->failure, "rank %u, line %d: %s",           \
                       (rank_)->rank, __LINE__, #condition);                                       \
        }                                                                                          \
    } while (0)

int64_t test_clock_us(void); /* CLOCK_MONOTONIC */
