/* Collectives over inproc, a thread a rank: bit for bit what one process computes by the tree as
 * NUMERICS 2 writes it down. */
#include "cluster.h"

#include "proto/plan/tree.h"

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define LEAVES 20u
#define MAX_N 1100u

/* ---- the definition, independent of proto/plan/tree.c ---- */

static float leaf_value(uint32_t leaf, size_t i)
{
    uint32_t x = leaf * 2654435761u + (uint32_t)i * 40503u + 12345u;
    x ^= x >> 15;
    x *= 2246822519u;
    x ^= x >> 13;
    float mantissa = (float)(int32_t)(x & 0xffffff) - 8388608.0f;
    return ldexpf(mantissa, (int)(x >> 27) - 30);
}

static float node(uint32_t a, uint32_t b, size_t i, float (*leaf)(uint32_t, size_t))
{
    if (b == a + 1) {
        return leaf(a, i);
    }
    uint32_t m = a + (b - a + 1) / 2;
    float left = node(a, m, i, leaf);
    return left + node(m, b, i, leaf);
}

/* Writes the maximal subtrees of node(a, b) inside [first, last), one vector each; returns how
 * many. */
static uint32_t subtrees(uint32_t a, uint32_t b, uint32_t first, uint32_t last,
                         float (*leaf)(uint32_t, size_t), float *out, size_t stride, size_t n)
{
    if (b <= first || last <= a) {
        return 0;
    }
    if (first <= a && b <= last) {
        for (size_t i = 0; out != NULL && i < n; i++) {
            out[i] = node(a, b, i, leaf);
        }
        return 1;
    }
    uint32_t m = a + (b - a + 1) / 2;
    uint32_t k = subtrees(a, m, first, last, leaf, out, stride, n);
    return k + subtrees(m, b, first, last, leaf, out != NULL ? out + k * stride : NULL, stride, n);
}

/* ---- all-reduce ---- */

/* The v-th way of cutting: even; everything on the last rank; the first rank empty; random. */
static void make_cuts(uint32_t n_leaves, uint32_t n_ranks, unsigned v, uint32_t *cuts)
{
    uint32_t x = n_leaves * 7919 + n_ranks * 104729 + v;
    for (uint32_t r = 0; r <= n_ranks; r++) {
        x = x * 1664525u + 1013904223u;
        cuts[r] = v == 0   ? n_leaves * r / n_ranks
                  : v == 1 ? 0
                  : v == 2 ? n_leaves * (r > 0 ? r - 1 : 0) / (n_ranks > 1 ? n_ranks - 1 : 1)
                           : (x >> 8) % (n_leaves + 1);
    }
    cuts[0] = 0;
    cuts[n_ranks] = n_leaves;
    for (uint32_t r = 1; r < n_ranks; r++) {
        cuts[r] = MAX(cuts[r], cuts[r - 1]);
        cuts[r] = MIN(cuts[r], n_leaves);
    }
}

static const float *references[LEAVES + 1];

typedef struct ReduceCase {
    uint32_t n_leaves;
    const uint32_t *cuts;
    size_t n;
    bool in_place, two_shot;
} ReduceCase;

/* Two shots are made only where they send fewer bytes, all ranks together: (n-1)/n S for each
 * subtree of anybody and (n-1) S, instead of (n-1) S for each. */
static bool two_shots_pay(uint32_t n_ranks, uint32_t n_leaves, const uint32_t *cuts)
{
    uint32_t sum = 0;
    for (uint32_t r = 0; r < n_ranks; r++) {
        sum += tree_subtrees(n_leaves, cuts[r], cuts[r + 1]);
    }
    return (n_ranks - 1) * sum > n_ranks;
}

static void check_bytes(ClusterRank *rank, const ReduceCase *c, uint32_t s, uint64_t sent)
{
    const uint64_t n_ranks = rank->cluster->n_ranks, bytes = c->n * sizeof(float);
    if (!c->two_shot || !two_shots_pay((uint32_t)n_ranks, c->n_leaves, c->cuts)) {
        rank_check(rank, sent == (n_ranks - 1) * s * bytes); /* FORMULAS 7a */
    } else if (c->n % (16 * n_ranks) == 0) {
        rank_check(rank,
                   sent == (n_ranks - 1) * s * bytes / n_ranks + (n_ranks - 1) * bytes / n_ranks);
    }
}

static void check_all_reduce(ClusterRank *rank, const GroupWait *wait, const ReduceCase *c)
{
    size_t n = c->n, stride = n + 3;
    const uint32_t *cut = c->cuts + rank->rank;
    g_autofree float *mine = g_new(float, TREE_SUBTREES_LIMIT *stride), *apart = g_new(float, n);
    float *out = c->in_place ? mine : apart;
    uint32_t s = subtrees(0, c->n_leaves, cut[0], cut[1], leaf_value, mine, stride, n);
    uint64_t before = group_counters(rank->group)->bytes_sent;
    GroupStatus status =
        group_all_reduce(rank->group, wait, c->n_leaves, c->cuts, mine, stride, n, out);
    rank_check(rank, status == GROUP_OK);
    rank_check(rank,
               status != GROUP_OK || memcmp(out, references[c->n_leaves], n * sizeof *out) == 0);
    check_bytes(rank, c, s, group_counters(rank->group)->bytes_sent - before);
}

static void rank_all_reduces(ClusterRank *rank, void *user)
{
    static const size_t lengths[] = {1, 19, 960, MAX_N};
    uint32_t cuts[CLUSTER_RANKS + 1];
    GroupWait wait = {
        .step = 0xfffffff0u, .deadline_us = test_clock_us() + 60000000, .operation = "all-reduce"};
    unsigned call = 0;
    for (uint32_t n_leaves = 1; n_leaves <= LEAVES; n_leaves++, wait.step++) {
        wait.site = 0;
        for (unsigned v = 0; v < 6; v++, wait.site++, call++) {
            make_cuts(n_leaves, rank->cluster->n_ranks, v, cuts);
            ReduceCase c = {.n_leaves = n_leaves,
                            .cuts = cuts,
                            .n = lengths[call % 4],
                            .in_place = call % 3 == 0,
                            .two_shot = *(const size_t *)user == 0};
            check_all_reduce(rank, &wait, &c);
        }
    }
}

static void all_reduce_with(size_t two_shot_bytes, bool seal)
{
    for (uint32_t n_ranks = 1; n_ranks <= 5; n_ranks++) {
        ClusterOptions options = {
            .n_ranks = n_ranks, .seal = seal, .two_shot_bytes = two_shot_bytes, .yield = true};
        Cluster *cluster = cluster_new(&options);
        cluster_run(cluster, rank_all_reduces, &two_shot_bytes);
        cluster_free(cluster);
    }
}

static void one_shot_is_the_tree(void **state)
{
    all_reduce_with(SIZE_MAX, true);
}

static void two_shot_is_the_tree(void **state)
{
    all_reduce_with(0, false);
}

/* ---- the same, block after block ---- */

enum { BLOCK = 600 };

/* Each rank makes its blocks in strides of its own, and some wait for the first ones meanwhile:
 * what is complete is right, and what is not yet made is not sent. */
static void check_blocks(ClusterRank *rank, const GroupWait *wait, const ReduceCase *c)
{
    const size_t n = c->n, stride = n + 5;
    const uint32_t *cut = c->cuts + rank->rank;
    g_autofree float *mine = g_new(float, TREE_SUBTREES_LIMIT *stride), *apart = g_new(float, n),
                     *made = g_new(float, TREE_SUBTREES_LIMIT *stride);
    float *out = c->in_place ? mine : apart;
    const uint32_t s = subtrees(0, c->n_leaves, cut[0], cut[1], leaf_value, made, stride, n);
    const uint64_t before = group_counters(rank->group)->bytes_sent;
    const GroupReduce what = {.n_leaves = c->n_leaves,
                              .cuts = c->cuts,
                              .mine = mine,
                              .stride = stride,
                              .n = n,
                              .block = BLOCK,
                              .out = out};
    memset(mine, 0x7f, TREE_SUBTREES_LIMIT * stride * sizeof *mine);
    group_reduce_begin(rank->group, wait, &what);
    for (size_t at = 0; at < n;) {
        const size_t to = MIN(at + (rank->rank + 1) * BLOCK, n);
        for (uint32_t k = 0; k < s; k++) {
            memcpy(mine + k * stride + at, made + k * stride + at, (to - at) * sizeof *mine);
        }
        at = to;
        group_reduce_made(rank->group, at);
        if (!c->two_shot && wait->site % 2 == 0) {
            rank_check(rank,
                       group_reduce_wait(rank->group, BLOCK / 2, wait->deadline_us) == GROUP_OK);
            rank_check(rank,
                       memcmp(out, references[c->n_leaves], MIN(BLOCK / 2, n) * sizeof *out) == 0);
        }
    }
    rank_check(rank, group_reduce_end(rank->group, wait->deadline_us) == GROUP_OK);
    rank_check(rank, memcmp(out, references[c->n_leaves], n * sizeof *out) == 0);
    check_bytes(rank, c, s, group_counters(rank->group)->bytes_sent - before);
}

static void rank_reduces_blocks(ClusterRank *rank, void *user)
{
    static const size_t lengths[] = {MAX_N, BLOCK + 1, BLOCK, 960};
    uint32_t cuts[CLUSTER_RANKS + 1];
    GroupWait wait = {.step = 7, .deadline_us = test_clock_us() + 60000000, .operation = "blocks"};
    for (uint32_t n_leaves = 1; n_leaves <= LEAVES; n_leaves += 3) {
        for (unsigned v = 0; v < 6; v++, wait.site++) {
            make_cuts(n_leaves, rank->cluster->n_ranks, v, cuts);
            const ReduceCase c = {.n_leaves = n_leaves,
                                  .cuts = cuts,
                                  .n = lengths[wait.site % 4],
                                  .in_place = wait.site % 3 == 0,
                                  .two_shot = *(const size_t *)user == 0};
            check_blocks(rank, &wait, &c);
        }
    }
    rank_check(rank, group_waits_for(rank->group, NULL, NULL) == -1);
}

static void blocks_are_the_tree(void **state)
{
    for (size_t two_shot_bytes = 0; two_shot_bytes < 2; two_shot_bytes++) {
        for (uint32_t n_ranks = 1; n_ranks <= 4; n_ranks++) {
            size_t from = two_shot_bytes == 0 ? 0 : SIZE_MAX;
            ClusterOptions options = {
                .n_ranks = n_ranks, .seal = true, .two_shot_bytes = from, .yield = true};
            Cluster *cluster = cluster_new(&options);
            cluster_run(cluster, rank_reduces_blocks, &from);
            cluster_free(cluster);
        }
    }
}

static float minus_zero(uint32_t leaf, size_t i)
{
    return -0.0f;
}

/* -0 + -0 = -0: a zero that somebody adds for an empty rank would turn it into +0. */
static void rank_reduces_minus_zero(ClusterRank *rank, void *user)
{
    static const uint32_t cuts[] = {0, 0, 3, 3, 7};
    float mine[TREE_SUBTREES_LIMIT * 64], out[64];
    uint32_t r = rank->rank;
    subtrees(0, 7, cuts[r], cuts[r + 1], minus_zero, mine, 64, 64);
    GroupWait wait = {
        .step = 1, .site = 1, .deadline_us = test_clock_us() + 20000000, .operation = "minus zero"};
    rank_check(rank, group_all_reduce(rank->group, &wait, 7, cuts, mine, 64, 64, out) == GROUP_OK);
    for (unsigned i = 0; i < 64; i++) {
        rank_check(rank, out[i] == 0.0f && signbit(out[i]));
    }
}

static void an_empty_rank_is_no_operand(void **state)
{
    for (size_t two_shot_bytes = 0; two_shot_bytes < 2; two_shot_bytes++) {
        ClusterOptions options = {.n_ranks = 4,
                                  .two_shot_bytes = two_shot_bytes == 0 ? 0 : SIZE_MAX};
        Cluster *cluster = cluster_new(&options);
        cluster_run(cluster, rank_reduces_minus_zero, NULL);
        cluster_free(cluster);
    }
}

/* ---- the others ---- */

static uint8_t pattern(uint32_t from, uint32_t to, size_t i)
{
    return (uint8_t)(from * 37 + to * 11 + i * 3 + (i >> 9));
}

static size_t pair_size(uint32_t from, uint32_t to)
{
    static const size_t sizes[] = {0, 1, 1000, 600000};
    return sizes[(from * 3 + to) % 4];
}

static void rank_gathers(ClusterRank *rank, const GroupWait *wait)
{
    uint32_t n = rank->cluster->n_ranks, me = rank->rank;
    size_t sizes[CLUSTER_RANKS];
    void *out[CLUSTER_RANKS];
    for (uint32_t r = 0; r < n; r++) {
        sizes[r] = pair_size(r, 0);
        out[r] = g_malloc0(sizes[r] + 1);
    }
    g_autofree uint8_t *mine = g_malloc(sizes[me] + 1);
    for (size_t i = 0; i < sizes[me]; i++) {
        mine[i] = pattern(me, 0, i);
    }
    rank_check(rank, group_all_gather(rank->group, wait, mine, sizes, out) == GROUP_OK);
    for (uint32_t r = 0; r < n; r++) {
        for (size_t i = 0; i < sizes[r]; i++) {
            rank_check(rank, ((uint8_t *)out[r])[i] == pattern(r, 0, i));
        }
        rank_check(rank, ((uint8_t *)out[r])[sizes[r]] == 0);
        g_free(out[r]);
    }
}

static void rank_exchanges(ClusterRank *rank, const GroupWait *wait)
{
    uint32_t n = rank->cluster->n_ranks, me = rank->rank;
    size_t send_sizes[CLUSTER_RANKS] = {0}, receive_sizes[CLUSTER_RANKS] = {0};
    const void *send[CLUSTER_RANKS] = {NULL};
    void *receive[CLUSTER_RANKS] = {NULL};
    for (uint32_t r = 0; r < n; r++) {
        send_sizes[r] = pair_size(me, r);
        receive_sizes[r] = pair_size(r, me);
        uint8_t *to = g_malloc(send_sizes[r] + 1);
        for (size_t i = 0; i < send_sizes[r]; i++) {
            to[i] = pattern(me, r, i);
        }
        send[r] = to;
        receive[r] = g_malloc0(receive_sizes[r] + 1);
    }
    rank_check(rank, group_all_to_all(rank->group, wait, send, send_sizes, receive,
                                      receive_sizes) == GROUP_OK);
    for (uint32_t r = 0; r < n; r++) {
        for (size_t i = 0; i < receive_sizes[r]; i++) {
            rank_check(rank, ((uint8_t *)receive[r])[i] == pattern(r, me, i));
        }
        g_free((void *)send[r]);
        g_free(receive[r]);
    }
}

static void rank_broadcasts(ClusterRank *rank, const GroupWait *wait, uint32_t root)
{
    uint8_t data[3000];
    for (size_t i = 0; i < sizeof data; i++) {
        data[i] = rank->rank == root ? pattern(root, wait->site, i) : 0;
    }
    rank_check(rank, group_broadcast(rank->group, wait, root, data, sizeof data) == GROUP_OK);
    for (size_t i = 0; i < sizeof data; i++) {
        rank_check(rank, data[i] == pattern(root, wait->site, i));
    }
}

/* node(a, b) of the leaves that are there; *there: whether one is. */
static float node_missing(uint32_t a, uint32_t b, uint64_t missing, size_t i, bool *there)
{
    if (b == a + 1) {
        *there = (missing >> a & 1) == 0;
        return leaf_value(a, i);
    }
    const uint32_t m = a + (b - a + 1) / 2;
    bool is_left, is_right;
    const float left = node_missing(a, m, missing, i, &is_left),
                right = node_missing(m, b, missing, i, &is_right);
    *there = is_left || is_right;
    return is_left && is_right ? left + right : is_left ? left : right;
}

enum { SCATTERED = 100 };

/* The maximal subtrees of [first, last) that are there; returns how many. */
static uint32_t subtrees_missing(uint32_t a, uint32_t b, uint32_t first, uint32_t last,
                                 uint64_t missing, float (*out)[SCATTERED])
{
    bool there = false;
    if (b <= first || last <= a) {
        return 0;
    }
    if (first <= a && b <= last) {
        for (size_t i = 0; i < SCATTERED; i++) {
            out[0][i] = node_missing(a, b, missing, i, &there);
        }
        return there ? 1 : 0;
    }
    const uint32_t m = a + (b - a + 1) / 2;
    const uint32_t k = subtrees_missing(a, m, first, last, missing, out);
    return k + subtrees_missing(m, b, first, last, missing, out + k);
}

/* n at once: all are sent, as far as the links have room, before the first is received. */
static GroupStatus reduce_scatter(ClusterRank *rank, GroupWait *wait, const GroupOperands *operands,
                                  const size_t *first, unsigned n, float *out)
{
    const uint16_t site = wait->site;
    GroupStatus status = GROUP_OK;
    for (unsigned i = 0; i < n; i++, wait->site++) {
        GroupSent sent = {0};
        status = group_scatter_send(rank->group, wait, operands, first, i == 1, &sent);
        if (status == GROUP_OK && !sent.done) {
            status = group_scatter_send(rank->group, wait, operands, first, true, &sent);
        }
        rank_check(rank, status == GROUP_OK && sent.done);
    }
    for (wait->site = site; wait->site < site + n; wait->site++) {
        GroupWait again = *wait;
        status = group_scatter_receive(rank->group, &again, operands, first, out);
        rank_check(rank, status == GROUP_OK);
    }
    wait->site--;
    return status;
}

static void rank_reduce_scatters(ClusterRank *rank, GroupWait *wait, uint64_t missing,
                                 unsigned at_once)
{
    uint32_t n_ranks = rank->cluster->n_ranks, me = rank->rank, cuts[CLUSTER_RANKS + 1];
    size_t first[CLUSTER_RANKS + 1];
    make_cuts(13, n_ranks, 4, cuts);
    for (uint32_t r = 0; r <= n_ranks; r++) {
        first[r] = r == 0 ? 0 : r == n_ranks ? SCATTERED : 10 + r * r; /* uneven */
    }
    float mine[TREE_SUBTREES_LIMIT + 1][SCATTERED], out[SCATTERED];
    const float *pointers[TREE_SUBTREES_LIMIT];
    const uint32_t n = subtrees_missing(0, 13, cuts[me], cuts[me + 1], missing, mine);
    for (uint32_t k = 0; k < n; k++) {
        pointers[k] = mine[k];
    }
    const GroupOperands operands = {13, missing, cuts, pointers};
    const uint64_t before = group_counters(rank->group)->bytes_sent;
    rank_check(rank, reduce_scatter(rank, wait, &operands, first, at_once, out) == GROUP_OK);
    for (size_t i = first[me]; i < first[me + 1]; i++) {
        bool there;
        const float want = node_missing(0, 13, missing, i, &there);
        rank_check(rank, there && memcmp(&out[i - first[me]], &want, sizeof want) == 0);
    }
    const size_t foreign = SCATTERED - (first[me + 1] - first[me]);
    rank_check(rank, group_counters(rank->group)->bytes_sent - before == at_once * n * foreign * 4);
}

static void rank_does_all(ClusterRank *rank, void *user)
{
    GroupWait wait = {
        .step = 5, .deadline_us = test_clock_us() + 60000000, .operation = "all of them"};
    for (unsigned round = 0; round < 8; round++) {
        rank_gathers(rank, &wait);
        wait.site++;
        rank_exchanges(rank, &wait);
        wait.site++;
        for (uint32_t root = 0; root < rank->cluster->n_ranks; root++, wait.site++) {
            rank_broadcasts(rank, &wait, root);
        }
        for (unsigned at_once = 1; at_once <= 3; at_once += 2) {
            rank_reduce_scatters(rank, &wait, 0, at_once);
            wait.site++;
            /* leaves 0, 4, 7, 9 and 11 are missing */
            rank_reduce_scatters(rank, &wait, 0x0a91, at_once);
            wait.site++;
        }
    }
    rank_check(rank, group_waits_for(rank->group, NULL, NULL) == -1);
}

static void every_collective_moves_its_bytes(void **state)
{
    for (uint32_t n_ranks = 1; n_ranks <= 5; n_ranks++) {
        ClusterOptions options = {.n_ranks = n_ranks, .seal = true};
        Cluster *cluster = cluster_new(&options);
        cluster_run(cluster, rank_does_all, NULL);
        cluster_free(cluster);
    }
}

/* A root does not wait for its listeners: what it sent ahead is kept, in order. */
static void a_root_may_run_ahead(void **state)
{
    Cluster *cluster = cluster_new(&(ClusterOptions){.n_ranks = 2});
    GroupWait wait = {.step = 1, .operation = "ahead", .deadline_us = test_clock_us() + 20000000};
    for (wait.site = 0; wait.site < 100; wait.site++) {
        rank_broadcasts(&cluster->ranks[0], &wait, 0);
    }
    for (wait.site = 0; wait.site < 100; wait.site++) {
        rank_broadcasts(&cluster->ranks[1], &wait, 0);
    }
    assert_string_equal(cluster->ranks[0].failure, "");
    assert_string_equal(cluster->ranks[1].failure, "");
    cluster_free(cluster);
}

/* What was sent for calls that this rank never made is forgotten, not kept until the limit: 6000
 * broadcasts, every 100th heard. */
static void what_is_over_is_forgotten(void **state)
{
    Cluster *cluster = cluster_new(&(ClusterOptions){.n_ranks = 2});
    GroupWait wait = {.operation = "every hundredth", .deadline_us = test_clock_us() + 20000000};
    for (wait.step = 1; wait.step <= 6000; wait.step++) {
        rank_broadcasts(&cluster->ranks[0], &wait, 0);
        if (wait.step % 100 == 0) {
            rank_broadcasts(&cluster->ranks[1], &wait, 0);
        }
    }
    assert_string_equal(cluster->ranks[1].failure, "");
    cluster_free(cluster);
}

enum { AHEAD = 200, AHEAD_BYTES = 1024, EARLY_BYTES = 64 << 10 };

static GroupStatus ahead_broadcast(ClusterRank *rank, GroupWait *wait, uint8_t *data)
{
    wait->deadline_us = test_clock_us() + 20000000;
    return group_broadcast(rank->group, wait, 0, data, AHEAD_BYTES);
}

/* Rank 0 is AHEAD broadcasts ahead, all of which have come to rank 1. */
static void run_ahead(Cluster *cluster, GroupWait *wait)
{
    uint8_t data[AHEAD_BYTES];
    for (wait->site = 0; wait->site < AHEAD; wait->site++) {
        memset(data, wait->site, sizeof data);
        assert_int_equal(ahead_broadcast(&cluster->ranks[0], wait, data), GROUP_OK);
        while (link_port_progress(cluster->ranks[1].port) > 0) {
        }
    }
}

/* Then each call says so, whatever it would wait for: nothing of that peer can be believed. */
static void too_far_ahead_is_final(void **state)
{
    Cluster *cluster = cluster_new(&(ClusterOptions){.n_ranks = 3, .early_bytes = EARLY_BYTES});
    Group *group = cluster->ranks[1].group;
    GroupWait wait = {.step = 1, .operation = "far ahead"};
    uint8_t data[AHEAD_BYTES];
    const char *operation;
    run_ahead(cluster, &wait);
    assert_in_range(group_early_bytes(group), EARLY_BYTES - AHEAD_BYTES, EARLY_BYTES);
    for (wait.site = 0; wait.site < 3; wait.site++) { /* also what has come */
        assert_int_equal(ahead_broadcast(&cluster->ranks[1], &wait, data), GROUP_AHEAD);
        assert_int_equal(group_waits_for(group, &operation, NULL), 0);
        assert_string_equal(operation, "far ahead");
    }
    static const uint32_t cuts[] = {0, 1, 2, 3};
    static const size_t first[] = {0, 1, 2, 3};
    float mine[3] = {0}, out[3];
    const float *const subtrees[] = {mine};
    const GroupOperands operands = {3, 0, cuts, subtrees};
    GroupSent sent = {0};
    wait = (GroupWait){.step = 2, .operation = "later", .deadline_us = test_clock_us() + 20000000};
    assert_int_equal(group_all_reduce(group, &wait, 3, cuts, mine, 3, 3, out), GROUP_AHEAD);
    wait.site++;
    assert_int_equal(group_scatter_send(group, &wait, &operands, first, false, &sent), GROUP_AHEAD);
    assert_int_equal(group_scatter_receive(group, &wait, &operands, first, out), GROUP_AHEAD);
    assert_int_equal(group_waits_for(group, &operation, NULL), 0);
    assert_string_equal(operation, "later");
    cluster_free(cluster);
}

/* What the caller says may be under way is kept whole. */
static void as_far_ahead_as_was_said_is_kept(void **state)
{
    Cluster *cluster = cluster_new(&(ClusterOptions){.n_ranks = 2, .early_bytes = EARLY_BYTES});
    GroupWait wait = {.step = 1, .operation = "ahead"};
    group_set_ahead(cluster->ranks[1].group, AHEAD, AHEAD_BYTES);
    run_ahead(cluster, &wait);
    for (wait.site = 0; wait.site < AHEAD; wait.site++) {
        uint8_t data[AHEAD_BYTES], want[AHEAD_BYTES];
        memset(want, wait.site, sizeof want);
        assert_int_equal(ahead_broadcast(&cluster->ranks[1], &wait, data), GROUP_OK);
        assert_memory_equal(data, want, sizeof want);
    }
    assert_int_equal(group_early_bytes(cluster->ranks[1].group), 0);
    cluster_free(cluster);
}

/* ---- how a wait ends ---- */

static GroupStatus gather_four_bytes(ClusterRank *rank, const GroupWait *wait)
{
    uint32_t mine = rank->rank, out[CLUSTER_RANKS];
    size_t sizes[CLUSTER_RANKS];
    void *outs[CLUSTER_RANKS];
    for (uint32_t r = 0; r < rank->cluster->n_ranks; r++) {
        sizes[r] = 4;
        outs[r] = &out[r];
    }
    return group_all_gather(rank->group, wait, &mine, sizes, outs);
}

static void a_deadline_ends_the_wait_and_names_the_rank(void **state)
{
    Cluster *cluster = cluster_new(&(ClusterOptions){.n_ranks = 3});
    int64_t start = test_clock_us();
    GroupWait wait = {
        .step = 1, .site = 3, .deadline_us = start + 20000, .operation = "attention 4"};
    assert_int_equal(
        gather_four_bytes(&cluster->ranks[1],
                          &(GroupWait){.step = 1, .site = 3, .deadline_us = start + 1}),
        GROUP_DEADLINE); /* rank 1 has sent its part, and waits for 0 and 2 */
    assert_int_equal(gather_four_bytes(&cluster->ranks[0], &wait), GROUP_DEADLINE);
    assert_true(test_clock_us() - start >= 20000);
    const char *operation;
    int64_t since;
    assert_int_equal(group_waits_for(cluster->ranks[0].group, &operation, &since), 2);
    assert_string_equal(operation, "attention 4");
    assert_in_range(since, start, test_clock_us());
    /* The next step works, and what is left of the old one is no part of it. */
    GroupWait next = {
        .step = 2, .site = 0, .deadline_us = test_clock_us() + 20000000, .operation = "next"};
    rank_broadcasts(&cluster->ranks[0], &next, 0);
    rank_broadcasts(&cluster->ranks[1], &next, 0);
    rank_broadcasts(&cluster->ranks[2], &next, 0);
    for (unsigned r = 0; r < 3; r++) {
        assert_string_equal(cluster->ranks[r].failure, "");
    }
    assert_int_equal(group_waits_for(cluster->ranks[1].group, NULL, NULL), -1);
    cluster_free(cluster);
}

typedef struct Waiter {
    ClusterRank *rank;
    GroupStatus status;
} Waiter;

static void *waiter_main(void *data)
{
    Waiter *waiter = data;
    GroupWait wait = {.step = 1, .deadline_us = test_clock_us() + 20000000, .operation = "waiting"};
    waiter->status = gather_four_bytes(waiter->rank, &wait);
    return NULL;
}

/* Rank 0 waits for rank 1; `end` ends that. */
static GroupStatus wait_until(Cluster *cluster, void (*end)(Cluster *cluster))
{
    Waiter waiter = {.rank = &cluster->ranks[0]};
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, waiter_main, &waiter), 0);
    while (group_waits_for(cluster->ranks[0].group, NULL, NULL) != 1) {
        sched_yield();
    }
    end(cluster);
    pthread_join(thread, NULL);
    return waiter.status;
}

static void abort_rank_0(Cluster *cluster)
{
    atomic_store(&cluster->ranks[0].abort, true);
    link_port_interrupt(cluster->ranks[0].port);
}

static void close_rank_1(Cluster *cluster)
{
    link_port_close(cluster->ranks[1].port);
    cluster->ranks[1].port = NULL;
}

static void an_abort_ends_the_wait(void **state)
{
    Cluster *cluster = cluster_new(&(ClusterOptions){.n_ranks = 2});
    int64_t start = test_clock_us();
    assert_int_equal(wait_until(cluster, abort_rank_0), GROUP_ABORTED);
    assert_true(test_clock_us() - start < 10000000);
    cluster_free(cluster);
}

static void a_dead_peer_ends_the_wait_and_is_named(void **state)
{
    Cluster *cluster = cluster_new(&(ClusterOptions){.n_ranks = 2});
    assert_int_equal(wait_until(cluster, close_rank_1), GROUP_PEER_DEAD);
    assert_int_equal(group_waits_for(cluster->ranks[0].group, NULL, NULL), 1);
    assert_int_equal(cluster->ranks[0].n_dead, 1);
    cluster_free(cluster);
}

/* Also one that is only sent to, without waiting. */
static void a_dead_peer_ends_a_scatter_and_is_named(void **state)
{
    Cluster *cluster = cluster_new(&(ClusterOptions){.n_ranks = 2});
    ClusterRank *rank = &cluster->ranks[0];
    const float mine[8] = {0};
    const float *const subtrees[] = {mine};
    const uint32_t cuts[] = {0, 1, 2};
    const size_t first[] = {0, 4, 8};
    const GroupOperands operands = {2, 0, cuts, subtrees};
    const GroupWait wait = {.step = 1, .operation = "folding"};
    const char *operation;
    GroupSent sent = {0};
    close_rank_1(cluster);
    while (rank->n_dead == 0) {
        link_port_progress(rank->port);
    }
    assert_int_equal(group_scatter_send(rank->group, &wait, &operands, first, false, &sent),
                     GROUP_PEER_DEAD);
    assert_false(sent.done);
    assert_int_equal(group_waits_for(rank->group, &operation, NULL), 1);
    assert_string_equal(operation, "folding");
    cluster_free(cluster);
}

/* A failure before or between blocks is told by whatever waits next, and by the end; then the group
 * is as before. */
static void a_dead_peer_ends_an_all_reduce_in_blocks(void **state)
{
    Cluster *cluster = cluster_new(&(ClusterOptions){.n_ranks = 2, .two_shot_bytes = SIZE_MAX});
    ClusterRank *rank = &cluster->ranks[0];
    static const uint32_t cuts[] = {0, 1, 2};
    float mine[8] = {0}, out[8];
    const int64_t deadline_us = test_clock_us() + 20000000;
    const GroupWait wait = {.step = 1, .operation = "blocks"};
    const GroupReduce what = {
        .n_leaves = 2, .cuts = cuts, .mine = mine, .stride = 8, .n = 8, .block = 4, .out = out};
    const char *operation;
    group_reduce_begin(rank->group, &wait, &what);
    group_reduce_made(rank->group, 4);
    close_rank_1(cluster);
    assert_int_equal(group_reduce_wait(rank->group, 4, deadline_us), GROUP_PEER_DEAD);
    group_reduce_made(rank->group, 8);
    assert_int_equal(group_reduce_end(rank->group, deadline_us), GROUP_PEER_DEAD);
    assert_int_equal(group_waits_for(rank->group, &operation, NULL), 1);
    assert_string_equal(operation, "blocks");
    group_reduce_begin(rank->group, &wait, &what);
    group_reduce_made(rank->group, 8);
    assert_int_equal(group_reduce_end(rank->group, deadline_us), GROUP_PEER_DEAD);
    cluster_free(cluster);
}

/* The wait's deadline counts, whatever time was spent beside it. */
static void a_deadline_ends_an_all_reduce_in_blocks(void **state)
{
    Cluster *cluster = cluster_new(&(ClusterOptions){.n_ranks = 2, .two_shot_bytes = SIZE_MAX});
    ClusterRank *rank = &cluster->ranks[0];
    static const uint32_t cuts[] = {0, 1, 2};
    float mine[8] = {0}, out[8];
    const GroupWait wait = {.step = 1, .deadline_us = 1, .operation = "blocks"};
    const GroupReduce what = {
        .n_leaves = 2, .cuts = cuts, .mine = mine, .stride = 8, .n = 8, .block = 4, .out = out};
    group_reduce_begin(rank->group, &wait, &what);
    group_reduce_made(rank->group, 8);
    const int64_t start = test_clock_us();
    assert_int_equal(group_reduce_end(rank->group, start + 20000), GROUP_DEADLINE);
    assert_true(test_clock_us() - start >= 20000);
    assert_int_equal(group_waits_for(rank->group, NULL, NULL), 1);
    cluster_free(cluster);
}

static void another_size_is_a_mismatch(void **state)
{
    Cluster *cluster = cluster_new(&(ClusterOptions){.n_ranks = 2});
    GroupWait wait = {.step = 1, .operation = "sizes", .deadline_us = test_clock_us() + 20000000};
    uint64_t data[2] = {1, 2};
    assert_int_equal(group_broadcast(cluster->ranks[0].group, &wait, 0, data, 16), GROUP_OK);
    assert_int_equal(group_broadcast(cluster->ranks[1].group, &wait, 0, data, 8), GROUP_MISMATCH);
    cluster_free(cluster);
}

static int make_references(void **state)
{
    for (uint32_t n = 1; n <= LEAVES; n++) {
        float *sum = g_new(float, MAX_N);
        for (size_t i = 0; i < MAX_N; i++) {
            sum[i] = node(0, n, i, leaf_value);
        }
        references[n] = sum;
    }
    return 0;
}

static int free_references(void **state)
{
    for (uint32_t n = 1; n <= LEAVES; n++) {
        g_free((void *)references[n]);
    }
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_shot_is_the_tree),
        cmocka_unit_test(two_shot_is_the_tree),
        cmocka_unit_test(blocks_are_the_tree),
        cmocka_unit_test(an_empty_rank_is_no_operand),
        cmocka_unit_test(every_collective_moves_its_bytes),
        cmocka_unit_test(a_root_may_run_ahead),
        cmocka_unit_test(what_is_over_is_forgotten),
        cmocka_unit_test(too_far_ahead_is_final),
        cmocka_unit_test(as_far_ahead_as_was_said_is_kept),
        cmocka_unit_test(a_deadline_ends_the_wait_and_names_the_rank),
        cmocka_unit_test(an_abort_ends_the_wait),
        cmocka_unit_test(a_dead_peer_ends_the_wait_and_is_named),
        cmocka_unit_test(a_dead_peer_ends_a_scatter_and_is_named),
        cmocka_unit_test(a_dead_peer_ends_an_all_reduce_in_blocks),
        cmocka_unit_test(a_deadline_ends_an_all_reduce_in_blocks),
        cmocka_unit_test(another_size_is_a_mismatch),
    };
    return cmocka_run_group_tests(tests, make_references, free_references);
}
