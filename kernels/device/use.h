/* DeviceUse: what a device holds for this process beside what was allocated on it: kernels that
 * were loaded at their first use, libraries' memory, graphs, communicators. Nobody can reckon it;
 * it is seen in what is free, and reported, so that plans count it (proto/plan/device_memory.h).
 * What other processes take on the device meanwhile looks the same: more than the limit is not
 * believed. Any thread. */
#pragma once

#include "kernels/device/device.h"

#include <stdatomic.h>

#define DEVICE_USE_LIMIT ((uint64_t)2 << 30)

typedef struct DeviceUse {
    uint64_t free_at_open;
    atomic_uint_fast64_t groups; /* of those that are joined now */
    atomic_uint_fast64_t rank;   /* the most that was seen beside allocations and groups; 0: none */
    atomic_uint_fast64_t group;  /* the most that joining one took; 0: none */
} DeviceUse;

/* When it was opened: what is free now is before the first kernel. Returned, g_free. */
DeviceUse *device_use_new(const Device *device);
/* Looks at what is free, unless something is being allocated just then. */
void device_use_note(const Device *device);
/* After the n-th step of a rank, counted from 1: notes it now and then, ever more rarely. */
void device_use_step(const Device *device, uint64_t n);
/* Before a group is begun, and when it has been joined: what it took, to be given back at its end.
 */
uint64_t device_use_group_begins(const Device *device);
uint64_t device_use_group_joined(const Device *device, uint64_t before);
void device_use_group_ended(const Device *device, uint64_t bytes);
