/* Group: collectives over the tensor ranks of one stage and epoch, in canonical order (NUMERICS 2
 * and 3), over links. Owned and called by the engine thread; inside a call it progresses the port,
 * and gives up when the wait's deadline passes, a peer is dead, or `abort` turns true.
 *
 * Wire cost, n ranks, S bytes of one vector set, s_r subtrees handed over by this rank (FORMULAS
 * 7a): one-shot: sends (n-1) * s_r * S;  two-shot: reduce-scatter (n-1)/n * s_r * S + all-gather
 * (n-1)/n * S. */
#pragma once

#include "transport/link/link.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct Group Group;

typedef enum GroupStatus {
    GROUP_OK = 0,
    GROUP_DEADLINE = -1,
    GROUP_PEER_DEAD = -2,
    GROUP_ABORTED = -3,
    GROUP_MISMATCH = -4, /* a peer sent more than this rank expects: the ranks do not run one
                            program */
    GROUP_NO_MEMORY = -5,
    GROUP_AHEAD = -6, /* a peer ran further ahead than is kept, and what it sent is lost: like
                         memory that was short for it, final, and how all later calls end */
} GroupStatus;

typedef struct GroupOptions {
    LinkPort *port; /* borrowed */
    uint32_t n_ranks, rank;
    Link *const *links; /* by rank; NULL at own rank; copied */
    uint16_t op; /* of its messages; 0 = LINK_OP_PARTIAL. Groups that share a link differ in it */
    const atomic_bool *abort; /* borrowed; set from any thread, followed by link_port_interrupt() */
    int64_t spin_us; /* busy waiting before sleeping; 0 with yield when there are more ranks than
                        cores */
    bool yield;      /* more ranks than cores: sched_yield on every empty progress, for 2 ms, before
                        spin_us */
    size_t two_shot_bytes; /* from this S on two-shot, where that sends fewer bytes, all ranks
                              together (part of no definition: same bits) */
    size_t early_bytes;    /* of messages for later calls that are kept, at most; 0: 256 MiB */
} GroupOptions;
Group *group_new(const GroupOptions *options);
void group_free(Group *group);

/* Peers may be ahead by so many transfers of up to so many bytes: as much is kept, too, if it is
 * more than early_bytes. */
void group_set_ahead(Group *group, uint64_t n_transfers, size_t bytes);
/* What is kept now of messages for later calls: bytes of their buffers. */
size_t group_early_bytes(const Group *group);

/* The receive handler of the port hands messages of the group's op here. Copies the payload. */
void group_receive(Group *group, Link *link, const LinkHeader *header, const void *payload);

#define GROUP_SITE_LIMIT (1u << 14)

/* Each collective carries (step, site): site (below GROUP_SITE_LIMIT) orders the collectives of a
 * step, equal on all ranks, each used once per step and in ascending order. What peers sent for a
 * collective before the running one is forgotten. */
typedef struct GroupWait {
    uint32_t step;
    uint16_t site;
    int64_t deadline_us;   /* CLOCK_MONOTONIC; 0 = none */
    const char *operation; /* static text for the wait report */
} GroupWait;

/* All-reduce by the unit tree: cuts[0..n_ranks] are leaf (unit) boundaries per rank of node(0,
 * n_leaves). `mine`: this rank's subtrees, s_r vectors of n floats, at `stride` floats from each
 * other, in leaf order. out: n floats, the root; may be mine[0]. */
GroupStatus group_all_reduce(Group *group, const GroupWait *wait, uint32_t n_leaves,
                             const uint32_t *cuts, const float *mine, size_t stride, size_t n,
                             float *out);
/* The same beside the caller's work: blocks of the vectors are sent as they are made and summed as
 * they arrive. Between begin and end the group makes no other call. */
typedef struct GroupReduce {
    uint32_t n_leaves;
    const uint32_t *cuts; /* borrowed until the end, like all here */
    const float *mine;
    size_t stride, n;
    size_t block; /* floats that are sent at once, the same on all ranks; two shots know only n */
    float *out;   /* apart from what is sent, or mine[0] */
} GroupReduce;
void group_reduce_begin(Group *group, const GroupWait *wait, const GroupReduce *what);
/* Elements [0, n) of each own subtree are made. Progresses the port, sends and sums what it can;
 * never waits. Of use also when no more was made. */
void group_reduce_made(Group *group, size_t n);
/* Until out[0 .. n) is complete, where [0, n) was made; deadline_us as in GroupWait. After a
 * failure that of the end. */
GroupStatus group_reduce_wait(Group *group, size_t n, int64_t deadline_us);
/* The rest of it, all being made. */
GroupStatus group_reduce_end(Group *group, int64_t deadline_us);
/* Everybody's bytes to everybody: sizes[r] known on all ranks (0 = that rank sends nothing); out[r]
 * receives rank r's bytes (own rank included: copied unless equal to mine). */
GroupStatus group_all_gather(Group *group, const GroupWait *wait, const void *mine,
                             const size_t *sizes, void *const *out);
/* Bytes of `root` to all. */
GroupStatus group_broadcast(Group *group, const GroupWait *wait, uint32_t root, void *data,
                            size_t size);
/* What a rank brings to a tree: cuts as for group_all_reduce(). */
typedef struct GroupOperands {
    uint32_t n_leaves;
    uint64_t missing; /* bit i: leaf i has no operand (NUMERICS 2); the same on all ranks */
    const uint32_t *cuts;
    const float *const *subtrees; /* own ones that are there, in leaf order: whole vectors */
} GroupOperands;
/* A reduce-scatter: each rank keeps elements [first[r], first[r+1]) of the root vector. Its halves
 * apart, so that several may be under way: sends in ascending order of sites, receives too; the
 * same operands and cuts in both. */
typedef struct GroupSent { /* zeros before the first call */
    uint32_t peer, subtree;
    size_t at; /* bytes */
    bool done;
} GroupSent;
/* Goes on sending as far as the links have room, or (waits) to the end. */
GroupStatus group_scatter_send(Group *group, const GroupWait *wait, const GroupOperands *mine,
                               const size_t *first, bool waits, GroupSent *sent);
/* Whether all has arrived that group_scatter_receive() would wait for. */
bool group_scatter_arrived(Group *group, const GroupWait *wait, const GroupOperands *mine,
                           const size_t *first);
/* out may be the own part of a subtree. */
GroupStatus group_scatter_receive(Group *group, const GroupWait *wait, const GroupOperands *mine,
                                  const size_t *first, float *out);
/* send[r] (send_sizes[r] bytes) to rank r, receive[r] (receive_sizes[r]) from rank r. */
GroupStatus group_all_to_all(Group *group, const GroupWait *wait, const void *const *send,
                             const size_t *send_sizes, void *const *receive,
                             const size_t *receive_sizes);

/* ---- for plans: bytes that a rank holds in its group, at most but for what is longer on its way
 * than usual ---- */

/* The tree that ranks complete: cuts as for group_all_reduce(), missing as in GroupOperands. */
typedef struct GroupCut {
    uint32_t n_ranks, rank, n_leaves;
    uint64_t missing;
    const uint32_t *cuts;
} GroupCut;
/* Subtrees of all peers. */
uint32_t group_arriving(const GroupCut *cut);
/* All-reduces of n floats: arriving subtrees, and messages. */
uint64_t group_all_reduce_bytes(const GroupCut *cut, size_t n, size_t two_shot_bytes);
/* Reduce-scatters of elements first[0] .. first[n_ranks], up to `window` of them under way. */
uint64_t group_scatter_bytes(const GroupCut *cut, const size_t *first, uint32_t window);
/* Messages of so many bytes between two ranks, a way: kept where they come, or until they are out.
 */
uint64_t group_message_bytes(uint64_t size);

/* Whom the last failed or the running call waits for: rank, operation, since (CLOCK_MONOTONIC us);
 * -1 = nobody. Any thread. */
int group_waits_for(const Group *group, const char **operation, int64_t *since_us);

typedef struct GroupCounters {
    uint64_t bytes_sent, messages_sent; /* payload, by collectives */
    uint64_t wait_us; /* for peers, without what the port was busy with meanwhile */
    uint64_t calls;
} GroupCounters;
const GroupCounters *group_counters(const Group *group);
