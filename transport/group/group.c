/* Collectives by plain exchange: every transfer goes from its sender to its receiver directly, in
 * messages of at most PIECE_BYTES, and the receiver adds in the order of the tree.
 *
 * Invariants:
 *   1. A message belongs to (step, site, phase). Links deliver in order, so the messages of a
 *      transfer are appended as they come.
 *   2. A message for the running collective goes to its destination at once; one for a later
 *      collective (a peer that is ahead) waits in `early`; one for an earlier collective (of a call
 *      that was given up) is dropped. Once one could not be kept, nothing of that peer can be
 *      believed: the call that runs and all later ones end with the reason.
 *   3. Expectations exist only while a call runs: after it nothing points into the caller's memory.
 *   4. Destinations are written before the own data has been sent only where the caller keeps them
 *      apart from what it sends. */
#include "transport/group/group_state.h"

#include "transport/link/link_clock.h"

#include "proto/base/checked.h"

#include <limits.h>
#include <sched.h>
#include <string.h>

#define EARLY_BYTES_LIMIT (256u << 20)
#define YIELD_US 2000
/* Progress now and then even when nothing comes: UCX looks after silent peers inside it. */
#define SLEEP_LIMIT_US 100000

Group *group_new(const GroupOptions *options)
{
    g_assert(options->n_ranks >= 1 && options->n_ranks <= TREE_LEAVES_LIMIT &&
             options->rank < options->n_ranks);
    Group *group = g_new0(Group, 1);
    group->options = *options;
    group->options.links = NULL;
    group->options.op = options->op != 0 ? options->op : LINK_OP_PARTIAL;
    memcpy(group->links, options->links, options->n_ranks * sizeof *group->links);
    group->early_pool.out_limit = UINT_MAX; /* the smallest buffer counts for its bytes, too */
    group->early_pool.bytes_out_limit =
        options->early_bytes > 0 ? options->early_bytes : EARLY_BYTES_LIMIT;
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
        weft_unmap(group->slots[r].data, group->slots[r].size);
    }
    buffer_pool_clear(&group->early_pool);
    g_free(group);
}

void group_set_ahead(Group *group, uint64_t n_transfers, size_t bytes)
{
    size_t all; /* capacities of buffers: at most twice the bytes, and of a transfer's last one */
    BufferPool *pool = &group->early_pool;
    if (!sz_mul(2 * (bytes + BUFFER_LEAST_BYTES), n_transfers, &all)) {
        all = SIZE_MAX / 2;
    }
    pool->bytes_out_limit = MAX(pool->bytes_out_limit, all);
}

size_t group_early_bytes(const Group *group)
{
    return group->early_pool.bytes_out;
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
    BufferPool *pool = &group->early_pool;
    LinkBuffer *message = group->lost == GROUP_OK ? buffer_pool_get(pool, header->length) : NULL;
    if (message == NULL) {
        if (group->lost == GROUP_OK) {
            group->lost = buffer_pool_is_full(pool, header->length) ? GROUP_AHEAD : GROUP_NO_MEMORY;
            group->lost_rank = rank;
        }
        return;
    }
    memcpy(buffer_data(message), payload, header->length);
    message->tag = (uint64_t)header->step << 16 | header->flags;
    if (group->early[rank] == NULL) {
        group->early[rank] = message;
    } else {
        group->early_last[rank]->next = message;
    }
    group->early_last[rank] = message;
}

void group_receive(Group *group, Link *link, const LinkHeader *header, const void *payload)
{
    for (uint32_t r = 0; r < group->options.n_ranks; r++) {
        if (group->links[r] == link) {
            Expectation *expected = group->expected[r];
            expected += !expectation_takes(group, expected, header->step, header->flags);
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

void group_expect(Group *group, uint32_t r, unsigned which, Phase phase, void *to, size_t size)
{
    Expectation *expected = &group->expected[r][which];
    *expected = (Expectation){.to = to, .size = size, .flags = flags_of(group->wait->site, phase)};
    LinkBuffer **at = &group->early[r], *last = NULL;
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
            last = message;
            at = &message->next;
        }
    }
    group->early_last[r] = last;
}

/* ---- waiting ---- */

void group_report(Group *group, int rank, int64_t since_us)
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

int group_pending(const Group *group, bool *dead)
{
    int pending = -1;
    *dead = false;
    for (uint32_t r = 0; r < group->options.n_ranks; r++) {
        const Expectation *e = group->expected[r];
        if (e[0].got < e[0].size || e[1].got < e[1].size) {
            if (link_is_dead(group->links[r])) {
                *dead = true;
                return (int)r;
            }
            pending = pending < 0 ? (int)r : pending;
        }
    }
    return pending;
}

GroupStatus group_gives_up(const Group *group, int64_t now_us)
{
    if (group->options.abort != NULL &&
        atomic_load_explicit(group->options.abort, memory_order_acquire)) {
        return GROUP_ABORTED;
    }
    if (group->lost != GROUP_OK) {
        return group->lost;
    }
    if (group->mismatch) {
        return GROUP_MISMATCH;
    }
    return group->wait->deadline_us != 0 && now_us >= group->wait->deadline_us ? GROUP_DEADLINE
                                                                               : GROUP_OK;
}

static void group_progress_some(Group *group, int64_t now_us)
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

void group_wait_some(Group *group, int64_t now_us)
{
    const uint64_t busy_before = group_busy_us(group);
    group_progress_some(group, now_us);
    const uint64_t took = (uint64_t)(link_clock_us() - now_us),
                   busy = group_busy_us(group) - busy_before;
    group->counters.wait_us += took > busy ? took - busy : 0;
}

static GroupStatus group_await(Group *group)
{
    bool dead;
    int rank = group_pending(group, &dead);
    int64_t start = link_clock_us(), now = start;
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
    return status == GROUP_OK && group->mismatch ? GROUP_MISMATCH : status;
}

/* ---- sending ---- */

LinkStatus group_try_piece(Group *group, uint32_t to, Phase phase, const LinkPart *parts,
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
        group_wait_some(group, now);
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

uint32_t group_peer(const Group *group, uint32_t i)
{
    return (group->options.rank + i) % group->options.n_ranks;
}

/* ---- a call's frame ---- */

void group_begin(Group *group, const GroupWait *wait)
{
    g_assert(wait->site < GROUP_SITE_LIMIT && !group->running.open);
    group->wait = wait;
    group->mismatch = false;
    group->counters.calls++;
}

GroupStatus group_end(Group *group, GroupStatus status)
{
    if (group->lost != GROUP_OK) {
        group_report(group, (int)group->lost_rank, link_clock_us());
        status = group->lost;
    }
    memset(group->expected, 0, group->options.n_ranks * sizeof *group->expected);
    group->wait = NULL;
    if (status == GROUP_OK) {
        atomic_store_explicit(&group->waits_for, -1, memory_order_release);
    }
    return status;
}

/* ---- all-gather, broadcast, all-to-all ---- */

GroupStatus group_all_gather(Group *group, const GroupWait *wait, const void *mine,
                             const size_t *sizes, void *const *out)
{
    uint32_t n = group->options.n_ranks, rank = group->options.rank;
    group_begin(group, wait);
    for (uint32_t r = 0; r < n; r++) {
        if (r != rank) {
            group_expect(group, r, 0, PHASE_WHOLE, out[r], sizes[r]);
        }
    }
    LinkPart part = {.data = mine, .size = sizes[rank]};
    for (uint32_t i = 1; i < n; i++) {
        GroupStatus status = group_send(group, group_peer(group, i), PHASE_WHOLE, &part, 1);
        if (status != GROUP_OK) {
            return group_end(group, status);
        }
    }
    if (out[rank] != mine && sizes[rank] > 0) {
        memcpy(out[rank], mine, sizes[rank]);
    }
    return group_end(group, group_await(group));
}

GroupStatus group_broadcast(Group *group, const GroupWait *wait, uint32_t root, void *data,
                            size_t size)
{
    g_assert(root < group->options.n_ranks);
    group_begin(group, wait);
    if (group->options.rank != root) {
        group_expect(group, root, 0, PHASE_WHOLE, data, size);
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
            group_expect(group, r, 0, PHASE_WHOLE, receive[r], receive_sizes[r]);
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

bool slot_reserve(Slot *slot, size_t size)
{
    if (slot->size >= size) {
        return true;
    }
    weft_unmap(slot->data, slot->size);
    slot->data = weft_map(size, "arriving partial sums", NULL);
    slot->size = slot->data != NULL ? size : 0;
    return slot->data != NULL;
}

static bool group_expect_subtrees(Group *group, const Reduction *reduction, size_t n)
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
        group_expect(group, r, 0, PHASE_SCATTER, group->slots[r].data, size);
    }
    return true;
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

/* ---- the halves of a reduce-scatter; first[r] .. first[r+1]: what rank r sums up ---- */

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
    if (!group_expect_subtrees(group, reduction, n)) {
        return group_end(group, GROUP_NO_MEMORY);
    }
    const GroupStatus status = group_await(group);
    if (status == GROUP_OK) {
        group_sum(group, reduction, mine->subtrees, first[rank], n, out);
    }
    return group_end(group, status);
}

const GroupCounters *group_counters(const Group *group)
{
    return &group->counters;
}
