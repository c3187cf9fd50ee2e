/* SimDisk: the coordinator's disk takes its time (`--wrap` of store_write()): what was not on it
 * yet when the coordinator is killed is lost, and everything that may only follow a durable write
 * waits. One Whole at a time. */
#pragma once

#include "tests/sim/whole.h"

/* A write takes up to most_us; writes stay in order. */
void sim_disk_enter(Whole *whole, int64_t most_us);
/* Before the world ends: what is still to be written is forgotten. */
void sim_disk_leave(void);
