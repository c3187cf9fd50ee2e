/* RankDevice: a rank's state on a device and its copies in host memory, where it is exchanged with
 * other ranks, saved and restored. Between two steps the device's weights and moments are the
 * state; copies are made when somebody asks. One thread, the rank's. */
#pragma once

#include "worker/model/parameters.h"
#include "worker/train/device_exchange.h"
#include "worker/train/optimizer.h"

typedef struct RankDevice {
    DeviceWork *work;
    TrainLinks *links; /* borrowed; NULL: this rank alone */
    RankTeams teams;
    DeviceExchange *exchange; /* NULL: one replica */
    float *vectors;           /* pinned: device_exchange_vectors(); NULL: one tensor rank */
    Parameters *weights;      /* on the device */
    GPtrArray *sets;          /* of Parameters in host memory: copies of sets of gradients */
    Parameters *shown;        /* NULL, or a copy for train_rank_gradients() */
    bool host_stale;          /* the device has stepped since the host's copies were made */
    bool weights_stale, moments_stale; /* the host's copies were filled since: not yet up */
} RankDevice;

/* host: whose holding and values the device is to have; borrowed. Returned. */
RankDevice *rank_device_new(const Device *device, const Parameters *host, TrainLinks *links,
                            GError **error);
/* Before what else lies on the device is freed: nobody is waited for any more. */
void rank_device_leave(RankDevice *d); /* NULL-safe */
void rank_device_free(RankDevice *d);  /* NULL-safe */
/* What it takes to exchange with other ranks; options' work is the rank's. */
bool rank_device_open_exchange(RankDevice *d, const DeviceExchangeOptions *options, GError **error);

/* The host's copies are what the device has, or the other way round. */
bool rank_device_settle(RankDevice *d, Parameters *weights, Optimizer *optimizer, GError **error);
bool rank_device_take_up(RankDevice *d, const Parameters *weights, Optimizer *optimizer,
                         GError **error);
/* Host copy number `index` of a set of gradients, filled from `set` unless that is NULL; borrowed.
 */
Parameters *rank_device_copy(RankDevice *d, uint32_t index, const Parameters *set, GError **error);
/* The copy to be shown, of `set`; NULL: no memory, or the device failed. Borrowed. */
const Parameters *rank_device_show(RankDevice *d, const Parameters *set);
/* What this rank owns of `device` down to or up from `host`, their lookup parts included. */
bool rank_device_owned_down(RankDevice *d, const Ownership *owned, Parameters *host,
                            const Parameters *device, GError **error);
bool rank_device_owned_up(RankDevice *d, const Ownership *owned, Parameters *device,
                          const Parameters *host, GError **error);
/* Everything up. */
bool rank_device_up(RankDevice *d, Parameters *device, const Parameters *host, GError **error);
