/* What the collectives of a group share: its state, and moving bytes. Internal to transport/group.
 */
#pragma once

#include "transport/group/group.h"
#include "transport/group/reduction.h"
#include "transport/link/buffer_pool.h"

/* shared/WIRE.md, prefill: smaller pieces cost messages, larger ones overlap less. With its header
 * and tag a piece fits a buffer of 256 KiB. */
#define PIECE_BYTES ((256u << 10) - 64)

typedef enum Phase { PHASE_WHOLE = 0, PHASE_SCATTER = 1, PHASE_GATHER = 2 } Phase;

/* What the running call waits for from one rank in one phase. */
typedef struct Expectation {
    char *to; /* borrowed from the caller or a slot */
    size_t size, got;
    uint16_t flags; /* site and phase */
} Expectation;

typedef struct Slot {
    void *data;
    size_t size;
} Slot;

/* The all-reduce that is under way (all_reduce.c). */
typedef struct Running {
    bool open, two_shot;
    GroupWait wait;
    GroupReduce what;
    const Reduction *reduction;          /* of the cache: no other is looked for meanwhile */
    size_t first[TREE_LEAVES_LIMIT + 1]; /* two shots: slices of the elements, by rank */
    size_t made;                         /* floats of the own subtrees */
    size_t n_blocks, n_sent, n_summed;   /* blocks; summed: of which the own part is in `out` */
    uint32_t peer;                       /* that gets block n_sent now, or the sum; from 1 */
    size_t at;                           /* bytes that it has got of it */
    GroupStatus status;
} Running;

struct Group {
    GroupOptions options;
    Link *links[TREE_LEAVES_LIMIT];
    const GroupWait *wait;                      /* of the running call, else NULL */
    Expectation expected[TREE_LEAVES_LIMIT][2]; /* the second: of a second phase */
    bool mismatch;                              /* of the running call */
    GroupStatus lost; /* OK, or why an early message was not kept: final */
    uint32_t lost_rank;
    /* in order of arrival; tag = step << 16 | flags; last: where there is a first */
    LinkBuffer *early[TREE_LEAVES_LIMIT], *early_last[TREE_LEAVES_LIMIT];
    BufferPool early_pool;
    Slot slots[TREE_LEAVES_LIMIT]; /* arriving subtrees, by rank */
    Running running;
    ReductionCache reductions;
    GroupCounters counters;
    atomic_int waits_for;
    const char *_Atomic operation;
    _Atomic int64_t since_us;
};

/* ---- a call's frame: group.c ---- */

void group_begin(Group *group, const GroupWait *wait);
GroupStatus group_end(Group *group, GroupStatus status);
/* The i-th peer to send to, i = 1 .. n_ranks-1: each rank starts with its right neighbour, so that
 * they do not all send to one. */
uint32_t group_peer(const Group *group, uint32_t i);

/* ---- the all-reduce: all_reduce.c ---- */

/* For vectors of n floats, of which all ranks together bring n_operands. */
bool group_two_shots_pay(uint32_t n_ranks, uint32_t n_operands, size_t n, size_t two_shot_bytes);

/* ---- arriving ---- */

/* Sets what rank r is to send in a phase, and takes what is here of it already; which: 0, or 1 for
 * a second phase that is awaited meanwhile. */
void group_expect(Group *group, uint32_t r, unsigned which, Phase phase, void *to, size_t size);
bool slot_reserve(Slot *slot, size_t size);

/* ---- sending and waiting ---- */

/* One message, at most PIECE_BYTES. */
LinkStatus group_try_piece(Group *group, uint32_t to, Phase phase, const LinkPart *parts,
                           unsigned n_parts, size_t size);
void group_report(Group *group, int rank, int64_t since_us);
/* The first rank that owes something, one that is dead first; -1 = none. */
int group_pending(const Group *group, bool *dead);
/* Why the call must be given up now, or GROUP_OK. */
GroupStatus group_gives_up(const Group *group, int64_t now_us);
/* Progresses until something came or a while is over, and counts the wait. */
void group_wait_some(Group *group, int64_t now_us);
