/* DeviceExchange: what a rank on a device exchanges in a step beside its passes: gradients folded
 * over the replicas, what their owners made of them, vectors of cut matrices. Among devices of one
 * host (a data team) that is done on the stream, bucket by bucket: in class fast a reduce-scatter
 * of the replicas' whole sums, in class exact their subtrees gathered and folded by the one tree
 * (NUMERICS 14); and an all-gather. The rank's thread. */
#pragma once

#include "worker/train/gradient_exchange.h"
#include "worker/train/rank_team.h"

typedef struct DeviceExchangeOptions {
    DeviceWork *work;
    const Ownership *reduced;
    const LeafCuts *leaves;
    DeviceTeam *team; /* of the replicas; NULL: they exchange over links, not here */
    bool exact;
} DeviceExchangeOptions;

typedef struct DeviceExchange DeviceExchange;

/* Borrows all; more than one replica. Returned. */
DeviceExchange *device_exchange_open(const DeviceExchangeOptions *options, GError **error);
void device_exchange_close(DeviceExchange *x); /* NULL-safe */
/* Its bytes on the device, with a team or not; options' work is not read. */
size_t device_exchange_bytes(const DeviceExchangeOptions *options);

/* A step: this rank's sets of gradients, in leaf order (borrowed until it is finished), become the
 * root in what this rank owns of `root`, which is the first of them or, where there is none, zeros.
 * Enqueued on a stream of its own, beside what the work does meanwhile; what fails is in the work.
 */
void device_exchange_begin(DeviceExchange *x, Parameters *const *subtrees, uint32_t n,
                           Parameters *root);
bool device_exchange_has_begun(const DeviceExchange *x);
/* What is enqueued by now makes floats from `from` on (that only falls) final in all sets. */
void device_exchange_final(DeviceExchange *x, size_t from);
/* That makes everything final; the work's stream goes on when the exchange is done. */
void device_exchange_finish(DeviceExchange *x);
/* Buckets of the last exchange that did not wait for its end. */
uint32_t device_exchange_early(const DeviceExchange *x);
/* Everybody's owned floats of `set` (without a lookup part) to everybody; likewise. */
void device_exchange_share(DeviceExchange *x, Parameters *set);
/* exchange_vectors() of a set on the device, over the links: they are few floats. pinned: for
 * device_exchange_vector_bytes(). */
bool device_exchange_vectors(DeviceWork *work, TrainLinks *links, Parameters *gradients,
                             float *pinned, GError **error);
size_t device_exchange_vector_bytes(const Holding *h);
