/* The all-reduce by the tree, beside its caller's work.
 *
 * One shot: blocks go out as they are made, each whole to every peer; a block is summed, by every
 * rank, when all have sent theirs. In a slot: block after block, in each subtree after subtree.
 * Two shots: a single block, of which every rank sums a slice and sends the sum on. Two shots send
 * (n-1)/n (sum of s_r) S + (n-1) S bytes, all ranks together, one shot (n-1) (sum of s_r) S: so two
 * ranks with a subtree each need but one.
 *
 * Invariants:
 *   1. Messages of a phase leave in order: blocks, in each the peers, then subtrees, then bytes.
 *   2. A block is summed only when the own one has left: `out` may be mine[0]. A peer's slice of
 *      the sum comes only when that peer has had this rank's operands of it.
 *   3. After a failure nothing more is sent or summed; the end tells. */
#include "transport/group/group_state.h"

#include "transport/link/link_clock.h"

#include "proto/base/checked.h"

#define ELEMENT_GRAIN 16u /* floats: cuts of two shots at cache lines */

/* Elements [begin, end). */
typedef struct Part {
    size_t begin, end;
} Part;

bool group_two_shots_pay(uint32_t n_ranks, uint32_t n_operands, size_t n, size_t two_shot_bytes)
{
    return n > 0 && n * sizeof(float) >= two_shot_bytes &&
           (uint64_t)(n_ranks - 1) * n_operands > n_ranks;
}

/* Of block b, what goes to rank r. */
static Part part_of(const Running *run, size_t b, uint32_t r)
{
    return run->two_shot ? (Part){run->first[r], run->first[r + 1]}
                         : (Part){b * run->what.block, MIN((b + 1) * run->what.block, run->what.n)};
}

static bool expect_all(Group *group)
{
    Running *run = &group->running;
    const uint32_t rank = group->options.rank;
    const Phase phase = run->two_shot ? PHASE_SCATTER : PHASE_WHOLE;
    const size_t own = run->two_shot ? run->first[rank + 1] - run->first[rank] : run->what.n;
    for (uint32_t r = 0; r < group->options.n_ranks; r++) {
        size_t size;
        if (r == rank) {
            continue;
        }
        if (!sz_mul(own * sizeof(float), run->reduction->n_subtrees[r], &size) ||
            !slot_reserve(&group->slots[r], size)) {
            return false;
        }
        group_expect(group, r, 0, phase, group->slots[r].data, size);
        if (run->two_shot) {
            group_expect(group, r, 1, PHASE_GATHER, run->what.out + run->first[r],
                         (run->first[r + 1] - run->first[r]) * sizeof(float));
        }
    }
    return true;
}

void group_reduce_begin(Group *group, const GroupWait *wait, const GroupReduce *what)
{
    Running *run = &group->running;
    const uint32_t n_ranks = group->options.n_ranks;
    const Reduction *reduction =
        reduction_find(&group->reductions, what->n_leaves, 0, what->cuts, n_ranks);
    group_begin(group, wait);
    *run = (Running){.open = true,
                     .two_shot = group_two_shots_pay(n_ranks, reduction->n_operands, what->n,
                                                     group->options.two_shot_bytes),
                     .wait = *wait,
                     .what = *what,
                     .reduction = reduction,
                     .peer = 1};
    group->wait = &run->wait;
    for (uint32_t r = 0; r <= n_ranks; r++) {
        run->first[r] =
            r == n_ranks ? what->n : what->n / ELEMENT_GRAIN * r / n_ranks * ELEMENT_GRAIN;
    }
    run->what.block = run->two_shot ? what->n : CLAMP(what->block, 1, MAX(what->n, 1));
    run->n_blocks = (what->n + run->what.block - 1) / run->what.block;
    run->status = expect_all(group) ? GROUP_OK : GROUP_NO_MEMORY;
}

/* ---- sending ---- */

/* A part of n vectors, as a row of bytes: the message that begins at byte `at`. Returns its size,
 * 0 at the end. */
static size_t next_piece(const float *vectors, size_t stride, uint32_t n, Part part, size_t at,
                         LinkPart *parts, unsigned *n_parts)
{
    const size_t length = (part.end - part.begin) * sizeof(float), total = length * n;
    size_t size = 0;
    for (*n_parts = 0; size < PIECE_BYTES && at < total; (*n_parts)++) {
        const size_t k = at / length, from = at % length,
                     take = MIN(length - from, PIECE_BYTES - size);
        parts[*n_parts] =
            (LinkPart){(const char *)(vectors + k * stride + part.begin) + from, take};
        size += take;
        at += take;
    }
    return size;
}

/* The next message of what peer run->peer gets of n vectors. False: no room, or a failure. */
static bool send_piece(Group *group, Phase phase, const float *vectors, uint32_t n, Part part)
{
    Running *run = &group->running;
    const uint32_t to = group_peer(group, run->peer);
    LinkPart parts[TREE_SUBTREES_LIMIT];
    unsigned n_parts;
    const size_t size = next_piece(vectors, run->what.stride, n, part, run->at, parts, &n_parts);
    if (size == 0) {
        run->peer++;
        run->at = 0;
        return true;
    }
    const LinkStatus sent = group_try_piece(group, to, phase, parts, n_parts, size);
    if (sent == LINK_OK) {
        run->at += size;
        link_port_progress(group->options.port);
    } else if (sent != LINK_AGAIN) {
        group_report(group, (int)to, link_clock_us());
        run->status = GROUP_PEER_DEAD;
    }
    return sent == LINK_OK;
}

/* What is made. */
static void send_blocks(Group *group)
{
    Running *run = &group->running;
    const uint32_t n_ranks = group->options.n_ranks;
    bool goes = true;
    while (goes && run->n_sent < run->n_blocks &&
           run->made >= MIN((run->n_sent + 1) * run->what.block, run->what.n)) {
        if (run->peer >= n_ranks) {
            run->peer = 1;
            run->n_sent++;
            continue;
        }
        goes = send_piece(group, run->two_shot ? PHASE_SCATTER : PHASE_WHOLE, run->what.mine,
                          run->reduction->n_subtrees[group->options.rank],
                          part_of(run, run->n_sent, group_peer(group, run->peer)));
    }
}

/* Two shots: the own slice of the sum. */
static void send_sum(Group *group)
{
    Running *run = &group->running;
    const uint32_t rank = group->options.rank;
    const Part own = {run->first[rank], run->first[rank + 1]};
    while (run->two_shot && run->n_summed == 1 && run->peer < group->options.n_ranks &&
           send_piece(group, PHASE_GATHER, run->what.out, 1, own)) {
    }
}

/* ---- summing ---- */

/* Whether everybody's operands of the own part of block b are here. */
static bool has_arrived(const Group *group, size_t b)
{
    const Running *run = &group->running;
    const uint32_t rank = group->options.rank;
    const Part own = part_of(run, b, rank);
    for (uint32_t r = 0; r < group->options.n_ranks; r++) {
        const Expectation *e = &group->expected[r][0];
        const size_t want =
            run->two_shot ? e->size : run->reduction->n_subtrees[r] * own.end * sizeof(float);
        if (r != rank && e->got < want) {
            return false;
        }
    }
    return true;
}

static void sum_block(Group *group, size_t b)
{
    Running *run = &group->running;
    const uint32_t rank = group->options.rank;
    const Part own = part_of(run, b, rank);
    const size_t n = own.end - own.begin, before = run->two_shot ? 0 : own.begin;
    const float *operands[TREE_OPERANDS_LIMIT];
    uint32_t i = 0;
    for (uint32_t r = 0; r < group->options.n_ranks; r++) {
        const uint32_t n_subtrees = run->reduction->n_subtrees[r];
        for (uint32_t k = 0; k < n_subtrees; k++) {
            operands[i++] = r == rank
                                ? run->what.mine + k * run->what.stride + own.begin
                                : (const float *)group->slots[r].data + n_subtrees * before + k * n;
        }
    }
    reduction_sum(run->reduction, operands, n, run->what.out + own.begin);
}

static void sum_blocks(Group *group)
{
    Running *run = &group->running;
    while (run->n_summed < run->n_sent && has_arrived(group, run->n_summed)) {
        sum_block(group, run->n_summed++);
    }
}

/* ---- going on ---- */

/* True: something has left, or was summed. */
static bool advance(Group *group)
{
    Running *run = &group->running;
    const uint64_t n_messages = group->counters.messages_sent;
    const size_t n_summed = run->n_summed;
    if (run->status == GROUP_OK && (group->lost != GROUP_OK || group->mismatch)) {
        run->status = group->lost != GROUP_OK ? group->lost : GROUP_MISMATCH;
    }
    if (run->status == GROUP_OK) {
        send_blocks(group);
        sum_blocks(group);
        send_sum(group);
    }
    return group->counters.messages_sent > n_messages || run->n_summed > n_summed;
}

void group_reduce_made(Group *group, size_t n)
{
    Running *run = &group->running;
    g_assert(run->open && n >= run->made && n <= run->what.n);
    run->made = n;
    link_port_progress(group->options.port);
    advance(group);
}

/* Whether out[0 .. n) is complete. */
static bool is_complete(const Group *group, size_t n)
{
    const Running *run = &group->running;
    bool dead;
    return run->two_shot ? run->n_summed == run->n_blocks && run->peer >= group->options.n_ranks &&
                               group_pending(group, &dead) < 0
                         : MIN(run->n_summed * run->what.block, run->what.n) >= n;
}

GroupStatus group_reduce_wait(Group *group, size_t n, int64_t deadline_us)
{
    Running *run = &group->running;
    int64_t start = 0;
    g_assert(run->open && n <= run->made);
    run->wait.deadline_us = deadline_us;
    for (;;) {
        bool dead;
        if (advance(group)) {
            continue;
        }
        if (run->status != GROUP_OK || is_complete(group, n)) {
            return run->status;
        }
        const int64_t now = link_clock_us();
        const int rank = group_pending(group, &dead);
        start = start == 0 ? now : start;
        group_report(group, rank >= 0 ? rank : (int)group_peer(group, run->peer), start);
        run->status = dead ? GROUP_PEER_DEAD : group_gives_up(group, now);
        if (run->status == GROUP_OK) {
            group_wait_some(group, now);
        }
    }
}

GroupStatus group_reduce_end(Group *group, int64_t deadline_us)
{
    Running *run = &group->running;
    g_assert(run->made == run->what.n || run->status != GROUP_OK);
    const GroupStatus status =
        run->status == GROUP_OK ? group_reduce_wait(group, run->what.n, deadline_us) : run->status;
    run->open = false;
    return group_end(group, status);
}

GroupStatus group_all_reduce(Group *group, const GroupWait *wait, uint32_t n_leaves,
                             const uint32_t *cuts, const float *mine, size_t stride, size_t n,
                             float *out)
{
    const GroupReduce what = {.n_leaves = n_leaves,
                              .cuts = cuts,
                              .mine = mine,
                              .stride = stride,
                              .n = n,
                              .block = n,
                              .out = out};
    group_reduce_begin(group, wait, &what);
    group_reduce_made(group, n);
    return group_reduce_end(group, wait->deadline_us);
}
