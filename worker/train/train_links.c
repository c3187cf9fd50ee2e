#include "worker/train/train_links.h"

#include "proto/base/error.h"
#include "proto/base/units.h"

static bool is_set_ahead(const TrainLinks *l, const TrainGroup *g)
{
    return g == &l->from_previous || g == &l->from_next || g == &l->tensor;
}

/* members: globals, filled. */
static void open_group(TrainLinks *l, TrainGroup *g, uint16_t op)
{
    const TrainPosition *p = &l->o.position;
    const uint32_t own = train_global(p, p->replica, p->stage, p->rank);
    Link *links[PLAN_RANKS_LIMIT];
    for (uint32_t i = 0; i < g->n; i++) {
        links[i] = g->globals[i] == own ? NULL : l->o.links[g->globals[i]];
        g->rank = g->globals[i] == own ? i : g->rank;
    }
    g->turns.deadline_us = l->o.deadline_us;
    if (g->n < 2) {
        return;
    }
    const GroupOptions options = {.port = l->o.port,
                                  .n_ranks = g->n,
                                  .rank = g->rank,
                                  .links = links,
                                  .op = op,
                                  .abort = l->o.abort,
                                  .spin_us = l->o.spin_us,
                                  .yield = l->o.yield,
                                  .two_shot_bytes = TRAIN_TWO_SHOT_BYTES,
                                  .early_bytes = is_set_ahead(l, g) ? l->o.early_bytes : 0};
    g->turns.group = group_new(&options);
}

/* Sender first. */
static void open_channel(TrainLinks *l, TrainChannel *c, uint16_t op, uint32_t from, uint32_t to)
{
    if (from != to) {
        c->n = 2;
        c->globals[0] = from;
        c->globals[1] = to;
        open_group(l, c, op);
    }
}

/* Stages in a ring: the way back to the first one is used by interleaved schedules. */
static void open_channels(TrainLinks *l)
{
    const TrainPosition *p = &l->o.position;
    const uint32_t own = train_global(p, p->replica, p->stage, p->rank),
                   next = train_global(p, p->replica, (p->stage + 1) % p->pp, p->rank),
                   previous = train_global(p, p->replica, (p->stage + p->pp - 1) % p->pp, p->rank);
    open_channel(l, &l->to_next, LINK_OP_TRAIN_FORWARD, own, next);
    open_channel(l, &l->from_previous, LINK_OP_TRAIN_FORWARD, previous, own);
    open_channel(l, &l->to_previous, LINK_OP_TRAIN_BACKWARD, own, previous);
    open_channel(l, &l->from_next, LINK_OP_TRAIN_BACKWARD, next, own);
    if (p->pp > 1 && (p->stage == 0 || p->stage + 1 == p->pp)) {
        open_channel(l, &l->tied, LINK_OP_TRAIN_TIED, train_global(p, p->replica, 0, p->rank),
                     train_global(p, p->replica, p->pp - 1, p->rank));
    }
}

TrainLinks *train_links_new(const TrainLinksOptions *options)
{
    TrainLinks *l = g_new0(TrainLinks, 1);
    l->o = *options;
    const TrainPosition *p = &l->o.position;
    l->o.links = g_memdup2(options->links, train_world(p) * sizeof *options->links);
    l->world.n = train_world(p);
    l->data.n = p->dp;
    l->tensor.n = p->tp;
    for (uint32_t i = 0; i < l->world.n; i++) {
        l->world.globals[i] = i;
    }
    for (uint32_t d = 0; d < p->dp; d++) {
        l->data.globals[d] = train_global(p, d, p->stage, p->rank);
    }
    for (uint32_t r = 0; r < p->tp; r++) {
        l->tensor.globals[r] = train_global(p, p->replica, p->stage, r);
    }
    open_group(l, &l->world, LINK_OP_TRAIN_WORLD);
    open_group(l, &l->data, LINK_OP_PARTIAL);
    open_group(l, &l->tensor, LINK_OP_PARTIAL);
    open_channels(l);
    return l;
}

void train_links_free(TrainLinks *l)
{
    if (l == NULL) {
        return;
    }
    TrainGroup *const groups[] = {&l->world,   &l->data,      &l->tensor,      &l->from_previous,
                                  &l->to_next, &l->from_next, &l->to_previous, &l->tied};
    for (size_t i = 0; i < G_N_ELEMENTS(groups); i++) {
        group_free(groups[i]->turns.group);
    }
    g_free((void *)l->o.links);
    g_free(l);
}

static void hand_to(TrainGroup *g, Link *link, const LinkHeader *header, const void *payload)
{
    if (g->turns.group != NULL) {
        group_receive(g->turns.group, link, header, payload);
    }
}

void train_links_receive(TrainLinks *l, Link *link, const LinkHeader *header, const void *payload)
{
    switch (header->op) {
    case LINK_OP_TRAIN_WORLD:
        hand_to(&l->world, link, header, payload);
        return;
    case LINK_OP_PARTIAL: /* no link belongs to both */
        hand_to(&l->data, link, header, payload);
        hand_to(&l->tensor, link, header, payload);
        return;
    case LINK_OP_TRAIN_FORWARD:
        hand_to(&l->from_previous, link, header, payload);
        return;
    case LINK_OP_TRAIN_BACKWARD:
        hand_to(&l->from_next, link, header, payload);
        return;
    case LINK_OP_TRAIN_TIED:
        hand_to(&l->tied, link, header, payload);
        return;
    default:
        return;
    }
}

/* ---- errors ---- */

static const char *name_of(const TrainLinks *l, uint32_t global)
{
    const TrainPosition *p = &l->o.position;
    return l->o.plan->replicas[global / (p->pp * p->tp)]
        .stages[global / p->tp % p->pp]
        .ranks[global % p->tp]
        .worker;
}

static WeftErrorCode code_of(GroupStatus status)
{
    return status == GROUP_ABORTED     ? WEFT_ERROR_CANCELLED
           : status == GROUP_MISMATCH  ? WEFT_ERROR_PROTOCOL
           : status == GROUP_NO_MEMORY ? WEFT_ERROR_MEMORY
                                       : WEFT_ERROR_WORKER_LOST;
}

static const char *text_of(GroupStatus status)
{
    return status == GROUP_ABORTED     ? "the wait was aborted"
           : status == GROUP_MISMATCH  ? "it sent more than this rank expects"
           : status == GROUP_NO_MEMORY ? "no memory for what arrives"
           : status == GROUP_PEER_DEAD ? "its link is dead"
                                       : "nothing came in time";
}

static void set_ahead_error(const TrainGroup *group, const char *operation, const char *worker,
                            GError **error)
{
    g_autofree char *kept = units_format_size(group_early_bytes(group->turns.group));
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                "training: %s, worker %s: it is further ahead than this rank keeps messages for "
                "(%s wait here); give all workers one version of weft, or make micro-batches "
                "smaller (layout.micro: more of them)",
                operation, worker, kept);
}

bool train_links_check(TrainLinks *l, const TrainGroup *group, GroupStatus status, GError **error)
{
    if (status == GROUP_OK) {
        return true;
    }
    const char *operation = "a collective";
    int64_t since = link_clock_us();
    const int rank = group_waits_for(group->turns.group, &operation, &since);
    const char *worker = rank < 0 ? "(none)" : name_of(l, group->globals[rank]);
    l->failed = group;
    if (status == GROUP_AHEAD) {
        set_ahead_error(group, operation, worker, error);
        return false;
    }
    g_set_error(error, WEFT_ERROR, code_of(status),
                "training: %s, worker %s: %s after %" G_GINT64_FORMAT " ms", operation, worker,
                text_of(status), (link_clock_us() - since) / 1000);
    return false;
}

/* ---- channels ---- */

bool train_channel_send(TrainLinks *l, TrainChannel *c, const char *operation, const void *data,
                        size_t size, GError **error)
{
    const GroupWait wait = group_turn(&c->turns, operation);
    return train_links_check(
        l, c, group_broadcast(c->turns.group, &wait, c->rank, (void *)data, size), error);
}

bool train_channel_receive(TrainLinks *l, TrainChannel *c, const char *operation, void *data,
                           size_t size, GError **error)
{
    const GroupWait wait = group_turn(&c->turns, operation);
    return train_links_check(l, c, group_broadcast(c->turns.group, &wait, 1 - c->rank, data, size),
                             error);
}

void train_links_set_ahead(TrainLinks *l, uint32_t n_stage, uint32_t n_tensor, size_t bytes)
{
    TrainGroup *const groups[] = {&l->from_previous, &l->from_next, &l->tensor};
    for (size_t i = 0; i < G_N_ELEMENTS(groups); i++) {
        if (groups[i]->turns.group != NULL) {
            group_set_ahead(groups[i]->turns.group, groups[i] == &l->tensor ? n_tensor : n_stage,
                            bytes);
        }
    }
}

/* ---- counting ---- */

static uint64_t sent(const TrainGroup *g)
{
    return g->turns.group != NULL ? group_counters(g->turns.group)->bytes_sent : 0;
}

TrainTraffic train_links_traffic(const TrainLinks *l)
{
    return (TrainTraffic){.world = sent(&l->world),
                          .data = sent(&l->data),
                          .tensor = sent(&l->tensor),
                          .pipeline = sent(&l->to_next) + sent(&l->to_previous),
                          .tied = sent(&l->tied)};
}

uint64_t train_links_wait_us(const TrainLinks *l)
{
    const TrainGroup *const groups[] = {&l->world,         &l->data,    &l->tensor,
                                        &l->from_previous, &l->to_next, &l->from_next,
                                        &l->to_previous,   &l->tied};
    uint64_t sum = 0;
    for (size_t i = 0; i < G_N_ELEMENTS(groups); i++) {
        sum += groups[i]->turns.group != NULL ? group_counters(groups[i]->turns.group)->wait_us : 0;
    }
    return sum;
}
