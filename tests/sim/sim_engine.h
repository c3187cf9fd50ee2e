/* SimEngine: engines without threads in a SimWorld. The linker puts the functions of sim_engine.c
 * in the place of the clock that the engine reads, of engine_step() and of link_port_wait()
 * (`--wrap`, tests/sim/meson.build), so that everything else of worker/serve and transport runs as
 * it is built for the product:
 *
 *   - time is the world's; a step takes virtual time, as arithmetic would;
 *   - each engine runs on a fiber of its own and gives way where its thread would sleep.
 *
 * Outside a world (between enter and leave nobody) the real functions run. */
#pragma once

#include "tests/sim/sim_net.h"
#include "worker/serve/engine.h"

typedef struct SimEngine {
    Engine *engine;
    SimNode *node;
    char *job;
    uint32_t replica, stage, rank;
    uint64_t generation, epoch;
    unsigned n_stages;
    /* private */
    struct Fiber *fiber;
    bool did;
    int64_t busy_until_us;  /* computing */
    int64_t waits_since_us; /* inside a step, without a message, since; 0 = not */
    uint64_t steps;
} SimEngine;

typedef struct SimEngineHooks { /* each may be NULL */
    void (*opened)(SimEngine *engine, void *user);
    void (*started)(SimEngine *engine, const uint8_t secret[32], void *user);
    void (*closing)(SimEngine *engine, void *user);
    void *user;
} SimEngineHooks;

void sim_engines_enter(SimWorld *world, const SimEngineHooks *hooks);
/* All engines are gone. */
void sim_engines_leave(void);
/* A step takes between these; the world's seed decides. */
void sim_engines_set_step(int64_t least_us, int64_t most_us);
/* Of SimEngine, borrowed. */
const GPtrArray *sim_engines(void);
