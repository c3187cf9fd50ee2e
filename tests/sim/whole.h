/* Whole: a cluster in one process and one thread: the product's coordinator, agents and engines in
 * a SimWorld, over inproc rpc, SimNet and a disk in memory; and everything that happens to
 * clusters. Only clock, rpc, data plane and disk are stand-ins. */
#pragma once

#include "coordinator/coordinator.h"
#include "tests/sim/reference.h"
#include "tests/sim/sim_engine.h"
#include "tests/sim/sim_net.h"
#include "transport/rpc/inproc/inproc.h"
#include "worker/agent/agent.h"

#define WHOLE_WORKERS 6u
#define WHOLE_CONTROL "coordinator:1"
#define WHOLE_CA "simulated-ca"
#define WHOLE_SECOND INT64_C(1000000)

typedef struct Whole Whole;

typedef struct WholeWorker {
    Whole *whole;
    unsigned index;
    char name[8], address[16];
    Loop *loop; /* of the process; NULL while there is none */
    SimNode *node;
    Agent *agent;
    bool dying;   /* killed: what is left is being swept up, and nobody sees it */
    bool leaving; /* asked to stop; it is seen until it is gone */
    bool frozen;
    bool draining;       /* an administrator said so, and the coordinator agreed */
    int64_t drained_us;  /* since when */
    unsigned n_drains;   /* calls, of either kind */
    RpcInprocFault link; /* to and from the coordinator */
    int64_t thawed_us;
    bool wanted; /* to be started again when the last process is gone */
} WholeWorker;

struct Whole {
    const Foundation *foundation;
    SimWorld *world;
    RpcTransport *transport;
    SimNet *net;
    StoreDisk *disk;
    Loop *director; /* faults, and the clients */
    RpcChannel *client;
    Coordinator *coordinator; /* NULL while it is dead */
    Loop *coordinator_loop;
    unsigned n_incarnations;
    uint32_t recovery_wait_ms; /* of the next coordinator */
    int64_t coordinator_up_us, coordinator_died_us,
        coordinator_frozen_us;                    /* last; frozen: until then */
    bool coordinator_frozen, coordinator_started; /* started: it serves */
    WholeWorker workers[WHOLE_WORKERS];
    unsigned n_workers;
    uint64_t memory_bytes; /* of each */
    bool over;             /* being taken apart: what was planned for it does not happen */
    bool chatty;
    Log log;
    int64_t last_fault_us; /* when something was done to it last */
};

/* The coordinator runs, no worker does. Enters the world (sim_engine.h). chatty: every log line
 * goes to standard error. */
Whole *whole_new(const Foundation *foundation, uint64_t seed, unsigned n_workers,
                 uint64_t memory_bytes, uint32_t recovery_wait_ms, const SimEngineHooks *hooks,
                 bool chatty);
/* Ends every process and forgets the world. */
void whole_free(Whole *whole);

void whole_start_coordinator(Whole *whole);
/* As SIGKILL: nothing that it did not say is said, what is not on disk is lost. */
void whole_kill_coordinator(Whole *whole);
void whole_freeze_coordinator(Whole *whole, bool frozen);

/* Writes of a coordinator that serves fail, until they do not; one that is started finds a disk
 * that works. */
void whole_fail_disk(Whole *whole, bool fails);

/* As soon as an earlier process of the same worker is gone. */
void whole_start_worker(Whole *whole, unsigned i);
void whole_kill_worker(Whole *whole, unsigned i);
void whole_freeze_worker(Whole *whole, unsigned i, bool frozen);
/* The connection between a worker and the coordinator. */
void whole_set_control(Whole *whole, unsigned i, RpcInprocFault fault);
/* The network between two workers' hosts. */
void whole_cut(Whole *whole, unsigned a, unsigned b);
void whole_heal(Whole *whole, unsigned a, unsigned b, bool reset);
void whole_stop_worker(Whole *whole, unsigned i); /* as SIGTERM does */
void whole_drain(Whole *whole, unsigned i, bool drain);
/* Everything up, thawed, healed, undrained, and no trouble on the network. */
void whole_repair(Whole *whole);
