/* Schedule: what one seed does to a cluster, drawn before anything runs, so that a run can be told
 * in words and repeated. */
#pragma once

#include "tests/sim/stream.h"

#define SCHEDULE_STREAMS 8u
#define SCHEDULE_FAULTS 12u

typedef enum FaultKind {
    FAULT_KILL,             /* worker; comes back after a while */
    FAULT_FREEZE,           /* worker, thawed after a while */
    FAULT_CONTROL_RESET,    /* worker and coordinator: the connection breaks, nothing connects */
    FAULT_CONTROL_HOLE,     /* the same, and nobody is told */
    FAULT_DATA_CUT,         /* two workers, healed as if nothing had been */
    FAULT_DATA_RESET,       /* two workers, healed with broken connections */
    FAULT_DRAIN,            /* worker, undrained after a while */
    FAULT_COORDINATOR_KILL, /* back after a while */
    FAULT_COORDINATOR_FREEZE,
    FAULT_DISK,       /* the coordinator's disk takes no write; b even: then the coordinator dies */
    FAULT_STOP,       /* worker, cleanly: it says goodbye; comes back after a while */
    FAULT_ALL_SILENT, /* nothing passes between the coordinator and any worker */
    FAULT_KINDS,
} FaultKind;

typedef struct Fault {
    FaultKind kind;
    unsigned a, b;
    int64_t at_us, for_us;
} Fault;

typedef struct Schedule {
    uint64_t seed;
    unsigned n_workers, n_streams, n_faults;
    StreamPlan streams[SCHEDULE_STREAMS];
    Fault faults[SCHEDULE_FAULTS];
    uint64_t memory_bytes; /* of each worker */
    SimTrouble trouble;    /* until the repair */
    int64_t step_least_us, step_most_us, link_us, rpc_jitter_us, disk_us;
    uint32_t recovery_wait_ms; /* of the coordinator */
    int64_t repair_us;         /* everything is put right then, and stays so */
} Schedule;

void schedule_draw(Schedule *schedule, uint64_t seed);
/* How long a stream may stand still at most, 0 = no promise: one thing alone breaks, and there is a
 * worker to take over. */
int64_t schedule_stall_us(const Schedule *schedule);
/* Many lines; returned. */
char *schedule_text(const Schedule *schedule);
/* Puts the faults and the repair into the director's hands. */
void schedule_begin(const Schedule *schedule, Whole *whole);
