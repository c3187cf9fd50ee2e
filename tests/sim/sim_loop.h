/* SimWorld: a virtual clock and one event heap in one thread, behind any number of Loops (one a
 * daemon). The same seed gives the same run, event by event; another seed gives another order among
 * events of the same virtual microsecond.
 *
 * What stays in order whatever the seed: functions posted to one Loop. What the seed shuffles:
 * everything else that is due at the same time (posts to different Loops, timers). Handlers take no
 * virtual time. */
#pragma once

#include "proto/base/loop.h"
#include "proto/base/random.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct SimWorld SimWorld;

/* The seed of a test: WEFT_SIM_SEED, else `fallback`. Printed on standard error, so that a failure
 * can be run again. */
uint64_t sim_seed(uint64_t fallback);

SimWorld *sim_world_new(uint64_t seed);
/* Runs what is still posted (at the time it is), forgets timers, frees the Loops. */
void sim_world_free(SimWorld *world);
/* A new Loop of the world; borrowed, lives as long as it. */
Loop *sim_world_loop(SimWorld *world);
/* A stopped process: its events wait until it is thawed; its clock goes on. */
void sim_loop_freeze(Loop *loop, bool frozen);
/* fn(user) after each event of this Loop, at the same virtual time: what a process's other threads
 * would do meanwhile. NULL: nothing. */
void sim_loop_set_after(Loop *loop, LoopFn fn, void *user);
/* The world's own random stream (keys, ids), from the seed. */
Random *sim_world_random(SimWorld *world);

/* Runs the next event, moving the clock to it. False when there is none, or none before `until_us`
 * (then the clock is there). */
bool sim_world_step(SimWorld *world, int64_t until_us);
/* Runs all events of the next `duration_us`. */
void sim_world_run_for(SimWorld *world, int64_t duration_us);
/* Runs until *done; false when `limit_us` of virtual time passed or nothing is left. */
bool sim_world_run_until(SimWorld *world, const bool *done, int64_t limit_us);

int64_t sim_world_now_us(const SimWorld *world);
uint64_t sim_world_n_events(const SimWorld *world);
/* A hash over (time, Loop, order) of every event that ran. */
uint64_t sim_world_digest(const SimWorld *world);
