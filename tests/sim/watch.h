/* Watch: looks over the shoulders of coordinator, agents and engines while they run (their
 * functions are passed through here by the linker, `--wrap`), and holds what they do against the
 * invariants. It changes nothing, except where a seeded bug is planted (bugs.h). One History at a
 * time. */
#pragma once

#include "tests/sim/history.h"

SimEngineHooks watch_hooks(History *history);
void watch_begin(History *history);
void watch_end(History *history);
/* What holds at any time; every 250 ms of virtual time. */
void watch_look(History *history);
/* All requests are over and nothing happened for a while: nobody may hold anything for them. */
void watch_check_quiet(History *history);

/* ---- between the files of the watch ---- */

History *watch_history(void); /* NULL: nobody watches */
/* When the coordinator took that epoch of a replica, as far as it was seen; 0 = it did not. */
int64_t watch_epoch_us(const char *job, uint32_t replica, uint64_t epoch);
/* Whether the coordinator has this in force. */
bool watch_is_live(const char *job, uint32_t replica, uint64_t epoch);
/* What a call to a leader is about, "request/choice"; returned. */
char *watch_sequence(const Weft__V1__GenerateRequest *generate);
/* When the coordinator's last call about this there ended, 0 = it is open or never was. */
int64_t watch_call_over_us(const char *sequence, uint32_t replica, uint64_t epoch);
void watch_coordinator_begin(void);
void watch_coordinator_end(void);
void watch_coordinator_look(History *history);
void watch_coordinator_quiet(History *history);
void watch_worker_begin(void);
void watch_worker_end(void);
void watch_worker_look(History *history);
void watch_worker_quiet(History *history);
