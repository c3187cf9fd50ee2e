/* TrainLinks: how one rank of a training layout talks to the others: groups over one port's links.
 *
 *   world     all ranks: losses, norms, digests
 *   data      the replicas of one (stage, tensor rank): gradients and weights
 *   tensor    the tensor ranks of one stage: partial sums
 *   channels  of two ranks, for one direction each: activations to the next stage, their gradients
 *             to the one before; the embedding of a tied model between first and last stage
 *
 * Owned and called by the rank's thread, which owns the port. A failed call leaves the ranks at
 * different places: every rank of the job is then to be built anew, under another epoch. */
#pragma once

#include "proto/plan/train_layout.h"
#include "transport/group/turns.h"

#define TRAIN_TWO_SHOT_BYTES (256u << 10) /* GroupOptions */

typedef struct TrainLinksOptions {
    LinkPort *port;     /* borrowed */
    Link *const *links; /* by train_global(); NULL at own place; copied */
    TrainPosition position;
    const Plan *plan;         /* borrowed: names for errors */
    const atomic_bool *abort; /* borrowed; as GroupOptions' */
    int64_t deadline_us;      /* of each wait; 0 = none */
    int64_t spin_us;
    bool yield;
    size_t early_bytes; /* GroupOptions, of the groups that train_links_set_ahead() is about */
} TrainLinksOptions;

typedef struct TrainGroup {
    GroupTurns turns; /* turns.group NULL: this rank alone */
    uint32_t n, rank;
    uint32_t globals[PLAN_RANKS_LIMIT];
} TrainGroup;

/* One direction between two ranks; turns.group NULL: there is no such neighbour. */
typedef TrainGroup TrainChannel;

typedef struct TrainLinks {
    TrainLinksOptions o;
    TrainGroup world, data, tensor;
    TrainChannel from_previous, to_next, from_next, to_previous, tied;
    const TrainGroup *failed; /* where the last error was */
} TrainLinks;

/* Returned. */
TrainLinks *train_links_new(const TrainLinksOptions *options);
void train_links_free(TrainLinks *l); /* NULL-safe; before the port is closed */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(TrainLinks, train_links_free)

/* The port's receive handler hands every message of training here. */
void train_links_receive(TrainLinks *l, Link *link, const LinkHeader *header, const void *payload);

/* OK: true. Else WORKER_LOST, CANCELLED, MEMORY or PROTOCOL names whom the group waited for, in
 * what and how long. */
bool train_links_check(TrainLinks *l, const TrainGroup *group, GroupStatus status, GError **error);

/* Bytes to the channel's other end; from it: exactly `size`. */
bool train_channel_send(TrainLinks *l, TrainChannel *c, const char *operation, const void *data,
                        size_t size, GError **error);
bool train_channel_receive(TrainLinks *l, TrainChannel *c, const char *operation, void *data,
                           size_t size, GError **error);

/* A neighbouring stage may be ahead by so many transfers of up to so many bytes, the tensor ranks
 * all together by so many others. */
void train_links_set_ahead(TrainLinks *l, uint32_t n_stage, uint32_t n_tensor, size_t bytes);

/* Payload sent so far, by what for. */
typedef struct TrainTraffic {
    uint64_t world, data, tensor, pipeline, tied; /* bytes */
} TrainTraffic;
TrainTraffic train_links_traffic(const TrainLinks *l);
/* Time that this rank has waited for others, without what its port was busy with meanwhile. */
uint64_t train_links_wait_us(const TrainLinks *l);
