/* Agent: one worker of a cluster: its listener, its stream to the coordinator, its deployments and
 * its health, on one Loop. Everything outside comes through the options, so that a test can host
 * many agents in one process under simulated time. */
#pragma once

#include "worker/agent/deployments.h"
#include "worker/agent/identity.h"
#include "worker/measure.h"

#include "proto/base/random.h"

typedef struct Agent Agent;

typedef struct AgentOptions { /* texts and arrays are copied, objects borrowed */
    Loop *loop;
    RpcTransport *transport;
    Random *random;
    Log *log;
    const LinkFill *fill;
    const Identity *identity;
    const char *state_dir;     /* where a renewed certificate goes; NULL = nowhere */
    const char *cache_dir;     /* or NULL */
    bool packed_images;        /* keeps weights in cache_dir as they are packed, */
    int64_t packed_after_us;   /* so long after a load */
    const char *models_dir;    /* or NULL */
    const char *listen;        /* of the mutual TLS listener; port 0 = any */
    const char *advertise;     /* host under which peers reach it; NULL = as in listen */
    const char *health_listen; /* plaintext, health only; or NULL */
    const char *host;          /* equal for workers that can share memory; NULL = none */
    uint64_t memory_bytes;
    unsigned threads;
    const int *cpus;         /* `threads` of them or NULL */
    const uint32_t *cpu_set; /* [n_cpu_set]: where the compute threads may run; none = not known */
    unsigned n_cpu_set;
    KernelIsa isa;
    const Device *device; /* where it computes; NULL = on the host's cores */
    const Device *const
        *devices;          /* [n_devices]: several, `device` the first of them, a rank each */
    unsigned n_devices;    /* 0: no more than `device` */
    uint64_t device_bytes; /* of memory_bytes, each device's; 0: all */
    const Measure *device_measures; /* [n_devices], each one's own; NULL: `measure` is theirs */
    uint32_t numerics_classes;      /* bit per NumericsClass */
    Measure measure;
    bool crowded;
    unsigned leave_ms;   /* agent_stop() gives the coordinator so long to move its work; 0 = none */
    unsigned io_threads; /* loading; 0 = on the loop, and engines without a thread: agent_step() */
    double (*lag_ms)(void *user); /* of the loop, for heartbeats; NULL: 0 */
    void *lag_user;
    /* The coordinator refuses this worker for good (revoked, other version); the agent does nothing
     * more. */
    void (*refused)(const GError *error, void *user);
    void *user;
} AgentOptions;

/* Opens the listeners and starts attaching. NULL + error when a listener cannot be had. */
Agent *agent_new(const AgentOptions *options, GError **error);
/* "host:port" that peers use; borrowed. */
const char *agent_address(const Agent *agent);
bool agent_is_attached(const Agent *agent);
Deployments *agent_deployments(Agent *agent); /* borrowed */
/* io_threads 0: one turn of every engine; true if anything was done. */
bool agent_step(Agent *agent);
/* Tells the coordinator, and goes on until it has moved what runs here, or leave_ms are over, or
 * it is not there, or this is called again; then health off, streams and engines ended, and
 * stopped(user) on the loop, once. */
void agent_stop(Agent *agent, LoopFn stopped, void *user);
/* After stopped. NULL-safe. */
void agent_free(Agent *agent);
