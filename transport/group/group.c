/* Collectives by plain exchange: every transfer goes from its sender to its receiver directly, in
 * messages of at most PIECE_BYTES, and the receiver adds in the order of the tree.
 *
 * Invariants:
 *   1. A message belongs to (step, site, phase). Links deliver in order, so the messages of a
 *      transfer are appended as they come.
 *   2. A message for the running collective goes to its destination at once; one for a later
 *      collective (a peer that is ahead) waits in `early`; one for an earlier collective (of a call
 *      that was given up) is dropped.
 *   3. Expectations exist only while a call runs: after it nothing points into the caller's memory.
 *   4. Destinations are written before the own data has been sent only where the caller keeps them
 *      apart from what it sends. */
#include "transport/group/group.h"

#include "transport/group/reduction.h"
#include "transport/link/buffer_pool.h"
#include "transport/link/link_clock.h"

#include "proto/base/checked.h"

#include <sched.h>
#include <string.h>

/* shared/WIRE.md, prefill: smaller pieces cost messages, larger ones overlap less. */
#define PIECE_BYTES (256u << 10)
#define EARLY_MESSAGES_LIMIT 4096u
#define EARLY_BYTES_LIMIT (256u << 20)
#define YIELD_US 2000
/* Progress now and then even when nothing comes: UCX looks after silent peers inside it. */
#define SLEEP_LIMIT_US 100000
#define ELEMENT_GRAIN 16u /* floats: cuts of the two-shot at cache lines */

typedef enum Phase { PHASE_WHOLE = 0, PHASE_SCATTER = 1, PHASE_GATHER = 2 } Phase;

/* What the running call waits for from one rank. */
typedef struct Expectation {
    char *to; /* borrowed from the caller or a slot */
    size_t size, got;
    uint16_t flags; /* site and phase */
} Expectation;

typedef struct Slot {
    void *data;
    size_t size;
} Slot;

struct Group {
    GroupOptions options;
    Link *links[TREE_LEAVES_LIMIT];
    const GroupWait *wait; /* of the running call, else NULL */
    Expectation expected[TREE_LEAVES_LIMIT];
    bool mismatch;
    LinkBuffer *early[TREE_LEAVES_LIMIT]; /* in order of arrival; tag = step << 16 | flags */
    BufferPool early_pool;
    Slot slots[TREE_LEAVES_LIMIT]; /* arriving subtrees, by rank */
    ReductionCache reductions;
    GroupCounters counters;
    atomic_int waits_for;
    const char *_Atomic operation;
    _Atomic int64_t since_us;
};

Group *group_new(const GroupOptions *options)
{
    g_assert(options->n_ranks >= 1 && options->n_ranks <= TREE_LEAVES_LIMIT &&
             options->rank < options->n_ranks);
    Group *group = g_new0(Group, 1);
    group->options = *options;
    group->options.links = NULL;
    group->options.op = options->op != 0 ? options->op : LINK_OP_PARTIAL;
    memcpy(group->links, options->links, options->n_ranks * sizeof *group->links);
    group->early_pool.out_limit = EARLY_MESSAGES_LIMIT;
    group->early_pool.bytes_out_limit = EARLY_BYTES_LIMIT;
    atomic_init(&group->waits_for, -1);
    return group;
}

void group_free(Group *group)
{
    if (group == NULL) {
        return;
    }
    for (uint32_t r = 0; r < group->options.n_ranks; r++) {
        while (group->early[r] != NULL) {
            LinkBuffer *message = group->early[r];
            group->early[r] = message->next;
            buffer_free(message);
        }
        weft_free(group->slots[r].data);
    }
    buffer_pool_clear(&group->early_pool);
    g_free(group);
}

static uint16_t flags_of(uint16_t site, Phase phase)
{
    return (uint16_t)(site | (unsigned)phase << 14);
}

/* ---- arriving ---- */

static void expectation_append(Group *group, Expectation *expected, const void *data, size_t size)
{
    if (size > expected->size - expected->got) {
        group->mismatch = true;
        return;
    }
    memcpy(expected->to + expected->got, data, size);
    expected->got += size;
}

static bool expectation_takes(const Group *group, const Expectation *expected, uint32_t step,
                              uint16_t flags)
{
    return group->wait != NULL && expected->size > 0 && group->wait->step == step &&
           expected->flags == flags;
}

static void early_keep(Group *group, uint32_t rank, const LinkHeader *header, const void *payload)
{
    LinkBuffer *message = buffer_pool_get(&group->early_pool, header->length);
    if (message == NULL) {
        group->mismatch = true;
        return;
    }
    memcpy(buffer_data(message), payload, header->length);
    message->tag = (uint64_t)header->step << 16 | header->flags;
    LinkBuffer **tail = &group->early[rank];
    while (*tail != NULL) {
        tail = &(*tail)->next;
    }
    *tail = message;
}

void group_receive(Group *group, Link *link, const LinkHeader *header, const void *payload)
{
    for (uint32_t r = 0; r < group->options.n_ranks; r++) {
        if (group->links[r] == link) {
            Expectation *expected = &group->expected[r];
            if (expectation_takes(group, expected, header->step, header->flags)) {
                expectation_append(group, expected, payload, header->length);
            } else {
                early_keep(group, r, header, payload);
            }
            return;
        }
    }
}

/* Earlier than the running collective: left over from a call that was given up. Steps may wrap
 * around. */
static bool early_is_over(const LinkBuffer *message, const GroupWait *wait)
{
    uint32_t step = (uint32_t)(message->tag >> 16);
    uint16_t site = (uint16_t)(message->tag & (GROUP_SITE_LIMIT - 1));
    return step != wait->step ? (int32_t)(step - wait->step) < 0 : site < wait->site;
}

/* Sets what rank r is to send now, and takes what is here of it already. */
static void group_expect(Group *group, uint32_t r, Phase phase, void *to, size_t size)
{
    Expectation *expected = &group->expected[r];
    *expected = (Expectation){.to = to, .size = size, .flags = flags_of(group->wait->site, phase)};
    LinkBuffer **at = &group->early[r];
    while (*at != NULL) {
        LinkBuffer *message = *at;
        bool takes = expectation_takes(group, expected, (uint32_t)(message->tag >> 16),
                                       (uint16_t)message->tag);
        if (takes) {
            expectation_append(group, expected, buffer_data(message), message->size);
        }
        if (takes || early_is_over(message, group->wait)) {
            *at = message->next;
            buffer_pool_put(&group->early_pool, message);
        } else {
            at = &message->next;
        }
    }
}

/* ---- waiting ---- */

static void group_report(Group *group, int rank, int64_t since_us)
{
    atomic_store_explicit(&group->operation, group->wait->operation, memory_order_relaxed);
    atomic_store_explicit(&group->since_us, since_us, memory_order_relaxed);
    atomic_store_explicit(&group->waits_for, rank, memory_order_release);
}

int group_waits_for(const Group *group, const char **operation, int64_t *since_us)
{
    int rank = atomic_load_explicit(&((Group *)group)->waits_for, memory_order_acquire);
    if (operation != NULL) {
        *operation = atomic_load_explicit(&((Group *)group)->operation, memory_order_relaxed);
    }
    if (since_us != NULL) {
        *since_us = atomic_load_explicit(&((Group *)group)->since_us, memory_order_relaxed);
    }
    return rank;
}

/* The first rank that owes something, one that is dead first; -1 = none. */
static int group_pending(const Group *group, bool *dead)
{
    int pending = -1;
    *dead = false;
    for (uint32_t r = 0; r < group->options.n_ranks; r++) {
        if (group->expected[r].got < group->expected[r].size) {
            if (link_is_dead(group->links[r])) {
                *dead = true;
                return (int)r;
            }
            pending = pending < 0 ? (int)r : pending;
        }
    }
    return pending;
}

/* Why the call must be given up now, or GROUP_OK. */
static GroupStatus group_gives_up(const Group *group, int64_t now_us)
{
    if (group->options.abort != NULL &&
        atomic_load_explicit(group->options.abort, memory_order_acquire)) {
        return GROUP_ABORTED;
    }
    if (group->mismatch) {
        return GROUP_MISMATCH;
    }
    return group->wait->deadline_us != 0 && now_us >= group->wait->deadline_us ? GROUP_DEADLINE
                                                                               : GROUP_OK;
}

/* Progresses until something came or a while is over. */
static void group_wait_some(Group *group, int64_t now_us)
{
    LinkPort *port = group->options.port;
    if (group->options.yield) {
        int64_t until = now_us + YIELD_US;
        do {
            if (link_port_progress(port) > 0) {
                return;
            }
            sched_yield();
        } while (link_clock_us() < until);
    }
    int64_t limit = SLEEP_LIMIT_US;
    if (group->wait->deadline_us != 0) {
        limit = CLAMP(group->wait->deadline_us - now_us, 0, limit);
    }
    link_port_wait(port, limit, group->options.spin_us);
}

static uint64_t group_busy_us(const Group *group)
{
    return link_counters_busy_ns(link_port_counters(group->options.port)) / 1000;
}

/* busy_us: of the port when the wait began. */
static void group_count_wait(Group *group, int64_t took_us, uint64_t busy_us)
{
    uint64_t busy = group_busy_us(group) - busy_us;
    group->counters.wait_us += (uint64_t)took_us > busy ? (uint64_t)took_us - busy : 0;
}

static GroupStatus group_await(Group *group)
{
    bool dead;
    int rank = group_pending(group, &dead);
    if (rank < 0 && !group->mismatch) {
        return GROUP_OK;
    }
    int64_t start = link_clock_us(), now = start;
    uint64_t busy = group_busy_us(group);
    GroupStatus status = GROUP_OK;
    while (rank >= 0 && status == GROUP_OK) {
        group_report(group, rank, start);
        status = dead ? GROUP_PEER_DEAD : group_gives_up(group, now);
        if (status == GROUP_OK) {
            group_wait_some(group, now);
            now = link_clock_us();
            rank = group_pending(group, &dead);
        }
    }
    group_count_wait(group, now - start, busy);
    return status == GROUP_OK && group->mismatch ? GROUP_MISMATCH : status;
}

/* ---- sending ---- */

static LinkStatus group_try_piece(Group *group, uint32_t to, Phase phase, const LinkPart *parts,
                                  unsigned n_parts, size_t size)
{
    LinkStatus sent =
        link_send_try(group->links[to], group->options.op, flags_of(group->wait->site, phase),
                      group->wait->step, parts, n_parts);
    if (sent == LINK_OK) {
        group->counters.bytes_sent += size;
        group->counters.messages_sent++;
    }
    return sent;
}

static GroupStatus group_send_piece(Group *group, uint32_t to, Phase phase, const LinkPart *parts,
                                    unsigned n_parts, size_t size)
{
    int64_t start = 0;
    for (;;) {
        LinkStatus sent = group_try_piece(group, to, phase, parts, n_parts, size);
        if (sent == LINK_OK) {
            return GROUP_OK;
        }
        int64_t now = link_clock_us();
        start = start == 0 ? now : start;
        group_report(group, (int)to, start);
        GroupStatus status = sent == LINK_AGAIN ? group_gives_up(group, now) : GROUP_PEER_DEAD;
        if (status != GROUP_OK) {
            return status;
        }
        uint64_t busy = group_busy_us(group);
        group_wait_some(group, now);
        group_count_wait(group, link_clock_us() - now, busy);
    }
}

/* One transfer: the parts in a row, cut into messages. */
static GroupStatus group_send(Group *group, uint32_t to, Phase phase, const LinkPart *parts,
                              unsigned n_parts)
{
    LinkPart piece[TREE_SUBTREES_LIMIT];
    unsigned n_piece = 0;
    size_t size = 0;
    g_assert(n_parts <= TREE_SUBTREES_LIMIT);
    for (unsigned i = 0; i < n_parts; i++) {
        for (size_t done = 0; done < parts[i].size;) {
            size_t take = MIN(parts[i].size - done, PIECE_BYTES - size);
            piece[n_piece++] = (LinkPart){.data = (const char *)parts[i].data + done, .size = take};
            size += take;
            done += take;
            if (size == PIECE_BYTES) {
                GroupStatus status = group_send_piece(group, to, phase, piece, n_piece, size);
                if (status != GROUP_OK) {
                    return status;
                }
                link_port_progress(group->options.port);
                n_piece = 0;
                size = 0;
            }
        }
    }
    return size > 0 ? group_send_piece(group, to, phase, piece, n_piece, size) : GROUP_OK;
}

/* The i-th peer to send to, i = 1 .. n_ranks-1: each rank starts with its right neighbour, so that
 * they do not all send to one. */
static uint32_t group_peer(const Group *group, uint32_t i)
{
    return (group->options.rank + i) % group->options.n_ranks;
}

/* ---- a call's frame ---- */

static void group_begin(Group *group, const GroupWait *wait)
{
    g_assert(wait->site < GROUP_SITE_LIMIT);
    group->wait = wait;
    group->mismatch = false;
    group->counters.calls++;
}

static GroupStatus group_end(Group *group, GroupStatus status)
{
    memset(group->expected, 0, group->options.n_ranks * sizeof *group->expected);
    group->wait = NULL;
    if (status == GROUP_OK) {
        atomic_store_explicit(&group->waits_for, -1, memory_order_release);
    }
    return status;
}

/* ---- all-gather, broadcast, all-to-all ---- */

static GroupStatus group_gather(Group *group, Phase phase, const void *mine, const size_t *sizes,
                                void *const *out)
{
    uint32_t n = group->options.n_ranks, rank = group->options.rank;
    for (uint32_t r = 0; r < n; r++) {
        if (r != rank) {
            group_expect(group, r, phase, out[r], sizes[r]);
        }
    }
    LinkPart part = {.data = mine, .size = sizes[rank]};
    for (uint32_t i = 1; i < n; i++) {
        GroupStatus status = group_send(group, group_peer(group, i), phase, &part, 1);
        if (status != GROUP_OK) {
            return status;
        }
    }
    if (out[rank] != mine && sizes[rank] > 0) {
        memcpy(out[rank], mine, sizes[rank]);
    }
    return group_await(group);
}

GroupStatus group_all_gather(Group *group, const GroupWait *wait, const void *mine,
                             const size_t *sizes, void *const *out)
{
    group_begin(group, wait);
    return group_end(group, group_gather(group, PHASE_WHOLE, mine, sizes, out));
}

GroupStatus group_broadcast(Group *group, const GroupWait *wait, uint32_t root, void *data,
                            size_t size)
{
    g_assert(root < group->options.n_ranks);
    group_begin(group, wait);
    if (group->options.rank != root) {
        group_expect(group, root, PHASE_WHOLE, data, size);
        return group_end(group, group_await(group));
    }
    LinkPart part = {.data = data, .size = size};
    GroupStatus status = GROUP_OK;
    for (uint32_t i = 1; i < group->options.n_ranks && status == GROUP_OK; i++) {
        status = group_send(group, group_peer(group, i), PHASE_WHOLE, &part, 1);
    }
    return group_end(group, status);
}

GroupStatus group_all_to_all(Group *group, const GroupWait *wait, const void *const *send,
                             const size_t *send_sizes, void *const *receive,
                             const size_t *receive_sizes)
{
    uint32_t n = group->options.n_ranks, rank = group->options.rank;
    g_assert(send_sizes[rank] == receive_sizes[rank]);
    group_begin(group, wait);
    for (uint32_t r = 0; r < n; r++) {
        if (r != rank) {
            group_expect(group, r, PHASE_WHOLE, receive[r], receive_sizes[r]);
        }
    }
    for (uint32_t i = 1; i < n; i++) {
        uint32_t to = group_peer(group, i);
        LinkPart part = {.data = send[to], .size = send_sizes[to]};
        GroupStatus status = group_send(group, to, PHASE_WHOLE, &part, 1);
        if (status != GROUP_OK) {
            return group_end(group, status);
        }
    }
    if (send[rank] != receive[rank] && send_sizes[rank] > 0) {
        memcpy(receive[rank], send[rank], send_sizes[rank]);
    }
    return group_end(group, group_await(group));
}

/* ---- reductions ---- */

/* This rank's subtrees: whole vectors. */
typedef const float *const *Subtrees;

static bool slot_reserve(Slot *slot, size_t size)
{
    if (slot->size >= size) {
        return true;
    }
    size_t capacity = 4096;
    while (capacity < size) {
        capacity *= 2;
    }
    weft_free(slot->data);
    slot->data = weft_alloc(1, capacity, "arriving partial sums", NULL);
    slot->size = slot->data != NULL ? capacity : 0;
    return slot->data != NULL;
}

static bool group_expect_subtrees(Group *group, const Reduction *reduction, Phase phase, size_t n)
{
    for (uint32_t r = 0; r < group->options.n_ranks; r++) {
        size_t size;
        if (r == group->options.rank) {
            continue;
        }
        if (!sz_mul(n * sizeof(float), reduction->n_subtrees[r], &size) ||
            !slot_reserve(&group->slots[r], size)) {
            return false;
        }
        group_expect(group, r, phase, group->slots[r].data, size);
    }
    return true;
}

static GroupStatus group_send_subtrees(Group *group, uint32_t to, Phase phase, Subtrees mine,
                                       uint32_t n_subtrees, size_t first, size_t n)
{
    LinkPart parts[TREE_SUBTREES_LIMIT];
    for (uint32_t k = 0; k < n_subtrees; k++) {
        parts[k] = (LinkPart){.data = mine[k] + first, .size = n * sizeof(float)};
    }
    return group_send(group, to, phase, parts, n_subtrees);
}

/* Everybody's subtrees in tree order: own ones where they lie, the others' in their slots. */
static void group_sum(Group *group, const Reduction *reduction, Subtrees mine, size_t first,
                      size_t n, float *out)
{
    const float *operands[TREE_OPERANDS_LIMIT];
    uint32_t i = 0;
    for (uint32_t r = 0; r < group->options.n_ranks; r++) {
        for (uint32_t k = 0; k < reduction->n_subtrees[r]; k++) {
            operands[i++] = r == group->options.rank ? mine[k] + first
                                                     : (const float *)group->slots[r].data + k * n;
        }
    }
    reduction_sum(reduction, operands, n, out);
}

/* first[r] .. first[r+1]: the elements that rank r sums up. One-shot is the case in which everybody
 * sums all of them. */
static GroupStatus group_scatter(Group *group, Phase phase, const Reduction *reduction,
                                 Subtrees mine, const size_t *first, float *out)
{
    uint32_t rank = group->options.rank;
    size_t n = first[rank + 1] - first[rank];
    if (!group_expect_subtrees(group, reduction, phase, n)) {
        return GROUP_NO_MEMORY;
    }
    for (uint32_t i = 1; i < group->options.n_ranks; i++) {
        uint32_t to = group_peer(group, i);
        GroupStatus status =
            group_send_subtrees(group, to, phase, mine, reduction->n_subtrees[rank], first[to],
                                first[to + 1] - first[to]);
        if (status != GROUP_OK) {
            return status;
        }
    }
    GroupStatus status = group_await(group);
    if (status == GROUP_OK) {
        group_sum(group, reduction, mine, first[rank], n, out);
    }
    return status;
}

GroupStatus group_reduce_scatter(Group *group, const GroupWait *wait, const GroupOperands *mine,
                                 const size_t *first, float *out)
{
    const Reduction *reduction = reduction_find(&group->reductions, mine->n_leaves, mine->missing,
                                                mine->cuts, group->options.n_ranks);
    group_begin(group, wait);
    return group_end(group,
                     group_scatter(group, PHASE_SCATTER, reduction, mine->subtrees, first, out));
}

/* ---- the halves of a reduce-scatter ---- */

static const Reduction *reduction_of(Group *group, const GroupOperands *mine)
{
    return reduction_find(&group->reductions, mine->n_leaves, mine->missing, mine->cuts,
                          group->options.n_ranks);
}

/* The next piece for the peer that *sent stands at; false: that peer has all. */
static bool scatter_piece(const GroupOperands *mine, uint32_t n_subtrees, size_t begin, size_t size,
                          GroupSent *sent, LinkPart *piece)
{
    if (sent->at == size) {
        sent->subtree++;
        sent->at = 0;
    }
    if (size == 0 || sent->subtree >= n_subtrees) {
        return false;
    }
    *piece = (LinkPart){.data = (const char *)(mine->subtrees[sent->subtree] + begin) + sent->at,
                        .size = MIN(size - sent->at, PIECE_BYTES)};
    return true;
}

GroupStatus group_scatter_send(Group *group, const GroupWait *wait, const GroupOperands *mine,
                               const size_t *first, bool waits, GroupSent *sent)
{
    const uint32_t n_subtrees = reduction_of(group, mine)->n_subtrees[group->options.rank];
    GroupStatus status = GROUP_OK;
    LinkStatus last = LINK_OK;
    group->wait = wait;
    while (status == GROUP_OK && last == LINK_OK && sent->peer + 1 < group->options.n_ranks) {
        const uint32_t to = group_peer(group, sent->peer + 1);
        LinkPart piece;
        if (!scatter_piece(mine, n_subtrees, first[to], (first[to + 1] - first[to]) * sizeof(float),
                           sent, &piece)) {
            *sent = (GroupSent){.peer = sent->peer + 1};
            continue;
        }
        if (waits) {
            status = group_send_piece(group, to, PHASE_SCATTER, &piece, 1, piece.size);
        } else {
            last = group_try_piece(group, to, PHASE_SCATTER, &piece, 1, piece.size);
            status = last == LINK_OK || last == LINK_AGAIN ? GROUP_OK : GROUP_PEER_DEAD;
        }
        if (!waits && status != GROUP_OK) {
            group_report(group, (int)to, link_clock_us());
        }
        sent->at += status == GROUP_OK && last == LINK_OK ? piece.size : 0;
    }
    sent->done = sent->peer + 1 == group->options.n_ranks;
    return group_end(group, status);
}

bool group_scatter_arrived(Group *group, const GroupWait *wait, const GroupOperands *mine,
                           const size_t *first)
{
    const Reduction *reduction = reduction_of(group, mine);
    const uint32_t rank = group->options.rank;
    const size_t n = first[rank + 1] - first[rank];
    const uint64_t tag = (uint64_t)wait->step << 16 | flags_of(wait->site, PHASE_SCATTER);
    for (uint32_t r = 0; r < group->options.n_ranks; r++) {
        size_t missing = r == rank ? 0 : reduction->n_subtrees[r] * n * sizeof(float);
        for (const LinkBuffer *m = group->early[r]; m != NULL && missing > 0; m = m->next) {
            missing -= m->tag == tag ? MIN(missing, m->size) : 0;
        }
        if (missing > 0) {
            return false;
        }
    }
    return true;
}

GroupStatus group_scatter_receive(Group *group, const GroupWait *wait, const GroupOperands *mine,
                                  const size_t *first, float *out)
{
    const Reduction *reduction = reduction_of(group, mine);
    const uint32_t rank = group->options.rank;
    const size_t n = first[rank + 1] - first[rank];
    group_begin(group, wait);
    if (!group_expect_subtrees(group, reduction, PHASE_SCATTER, n)) {
        return group_end(group, GROUP_NO_MEMORY);
    }
    const GroupStatus status = group_await(group);
    if (status == GROUP_OK) {
        group_sum(group, reduction, mine->subtrees, first[rank], n, out);
    }
    return group_end(group, status);
}

static GroupStatus group_one_shot(Group *group, const Reduction *reduction, Subtrees mine, size_t n,
                                  float *out)
{
    uint32_t rank = group->options.rank;
    if (!group_expect_subtrees(group, reduction, PHASE_WHOLE, n)) {
        return GROUP_NO_MEMORY;
    }
    for (uint32_t i = 1; i < group->options.n_ranks; i++) {
        GroupStatus status = group_send_subtrees(group, group_peer(group, i), PHASE_WHOLE, mine,
                                                 reduction->n_subtrees[rank], 0, n);
        if (status != GROUP_OK) {
            return status;
        }
    }
    GroupStatus status = group_await(group);
    if (status == GROUP_OK) {
        group_sum(group, reduction, mine, 0, n, out);
    }
    return status;
}

static GroupStatus group_two_shot(Group *group, const Reduction *reduction, Subtrees mine, size_t n,
                                  float *out)
{
    uint32_t n_ranks = group->options.n_ranks, rank = group->options.rank;
    size_t first[TREE_LEAVES_LIMIT + 1], sizes[TREE_LEAVES_LIMIT];
    void *parts[TREE_LEAVES_LIMIT];
    for (uint32_t r = 0; r <= n_ranks; r++) {
        first[r] = r == n_ranks ? n : n / ELEMENT_GRAIN * r / n_ranks * ELEMENT_GRAIN;
    }
    for (uint32_t r = 0; r < n_ranks; r++) {
        sizes[r] = (first[r + 1] - first[r]) * sizeof(float);
        parts[r] = out + first[r];
    }
    GroupStatus status = group_scatter(group, PHASE_SCATTER, reduction, mine, first, parts[rank]);
    return status == GROUP_OK ? group_gather(group, PHASE_GATHER, parts[rank], sizes, parts)
                              : status;
}

GroupStatus group_all_reduce(Group *group, const GroupWait *wait, uint32_t n_leaves,
                             const uint32_t *cuts, const float *mine, size_t stride, size_t n,
                             float *out)
{
    const Reduction *reduction =
        reduction_find(&group->reductions, n_leaves, 0, cuts, group->options.n_ranks);
    bool two_shot =
        group->options.n_ranks > 1 && n * sizeof(float) >= group->options.two_shot_bytes;
    const float *subtrees[TREE_SUBTREES_LIMIT];
    for (uint32_t k = 0; k < reduction->n_subtrees[group->options.rank]; k++) {
        subtrees[k] = mine + k * stride;
    }
    group_begin(group, wait);
    return group_end(group, two_shot ? group_two_shot(group, reduction, subtrees, n, out)
                                     : group_one_shot(group, reduction, subtrees, n, out));
}

const GroupCounters *group_counters(const Group *group)
{
    return &group->counters;
}
