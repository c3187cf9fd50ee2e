#include "cluster.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

int64_t test_clock_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static void on_receive(Link *link, const LinkHeader *header, const void *payload, void *user)
{
    ClusterRank *rank = user;
    rank_check(rank, (uintptr_t)payload % 16 == 0);
    if (header->op == LINK_OP_PARTIAL) {
        group_receive(rank->group, link, header, payload);
    }
}

static void on_dead(Link *link, const char *why, void *user)
{
    ((ClusterRank *)user)->n_dead++;
}

static void connect_pair(Cluster *cluster, uint32_t a, uint32_t b, bool seal)
{
    LinkConnect connect = {.handle = 1000 + a * 64 + b, .seal = seal};
    memset(connect.send_key, (int)(a * 64 + b), sizeof connect.send_key);
    memset(connect.receive_key, (int)(b * 64 + a), sizeof connect.receive_key);
    uint32_t ends[2] = {a, b};
    for (unsigned i = 0; i < 2; i++) {
        ClusterRank *self = &cluster->ranks[ends[i]];
        g_autoptr(GBytes) address = link_port_address(cluster->ranks[ends[1 - i]].port);
        connect.address = address;
        connect.peer = ends[1 - i];
        self->links[ends[1 - i]] = link_connect(self->port, &connect, NULL);
        assert_non_null(self->links[ends[1 - i]]);
        uint8_t swap[32];
        memcpy(swap, connect.send_key, 32);
        memcpy(connect.send_key, connect.receive_key, 32);
        memcpy(connect.receive_key, swap, 32);
    }
}

Cluster *cluster_new(const ClusterOptions *options)
{
    Cluster *cluster = g_new0(Cluster, 1);
    cluster->fill = link_fill_inproc_new();
    cluster->n_ranks = options->n_ranks;
    for (uint32_t r = 0; r < options->n_ranks; r++) {
        ClusterRank *rank = &cluster->ranks[r];
        rank->cluster = cluster;
        rank->rank = r;
        LinkPortOptions port = {
            .fill = cluster->fill, .receive = on_receive, .dead = on_dead, .user = rank};
        rank->port = link_port_open(&port, NULL);
        assert_non_null(rank->port);
    }
    for (uint32_t a = 0; a < options->n_ranks; a++) {
        for (uint32_t b = a + 1; b < options->n_ranks; b++) {
            connect_pair(cluster, a, b, options->seal);
        }
    }
    for (uint32_t r = 0; r < options->n_ranks; r++) {
        ClusterRank *rank = &cluster->ranks[r];
        GroupOptions group = {.port = rank->port,
                              .n_ranks = options->n_ranks,
                              .rank = r,
                              .links = rank->links,
                              .abort = &rank->abort,
                              .yield = options->yield,
                              .two_shot_bytes = options->two_shot_bytes,
                              .early_bytes = options->early_bytes};
        rank->group = group_new(&group);
    }
    return cluster;
}

void cluster_free(Cluster *cluster)
{
    for (uint32_t r = 0; r < cluster->n_ranks; r++) {
        group_free(cluster->ranks[r].group);
        link_port_close(cluster->ranks[r].port);
    }
    link_fill_free(cluster->fill);
    g_free(cluster);
}

typedef struct RankThread {
    pthread_t thread;
    ClusterRank *rank;
    void (*fn)(ClusterRank *rank, void *user);
    void *user;
} RankThread;

static void *rank_main(void *data)
{
    RankThread *t = data;
    t->fn(t->rank, t->user);
    return NULL;
}

void cluster_run(Cluster *cluster, void (*fn)(ClusterRank *rank, void *user), void *user)
{
    RankThread threads[CLUSTER_RANKS];
    for (uint32_t r = 0; r < cluster->n_ranks; r++) {
        threads[r] = (RankThread){.rank = &cluster->ranks[r], .fn = fn, .user = user};
        assert_int_equal(pthread_create(&threads[r].thread, NULL, rank_main, &threads[r]), 0);
    }
    for (uint32_t r = 0; r < cluster->n_ranks; r++) {
        pthread_join(threads[r].thread, NULL);
    }
    for (uint32_t r = 0; r < cluster->n_ranks; r++) {
        if (cluster->ranks[r].failure[0] != '\0') {
            fail_msg("%s", cluster->ranks[r].failure);
        }
    }
}
